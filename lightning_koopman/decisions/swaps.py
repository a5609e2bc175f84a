"""Modules that take the place of components, and networks that hold them, saved and loaded."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.network.components import clean_modules, clean_name
from lightning_koopman.network.runs.forward import check_model
from lightning_koopman.network.tensors import first_tensor, in_order
from lightning_koopman.network.weights import CheckpointError, apply_checkpoint, load_checkpoint
from lightning_koopman.report.saved import write_atomically


class _Swap(nn.Module):
    """What takes the place of a module, and answers for it where a network reads its attributes.

    Tensors among them have no values: what reads these cannot do without the module.
    """

    _replaced: nn.Module | None = None

    def stand_for(self, module: nn.Module) -> None:
        """Remember what a module is, but not its weights."""
        if self._replaced is not None or isinstance(module, _Swap):
            return
        with suppress(Exception):  # what cannot be copied is not needed, or missed where it is
            held = (value for part in module.modules() for value in vars(part).values())
            tensors = [t for t in held if isinstance(t, Tensor)]
            tensors += [*module.parameters(), *module.buffers()]
            memo: dict[int, Any] = {id(tensor): tensor.detach().to("meta") for tensor in tensors}
            # Not as a part of this one.
            vars(self)["_replaced"] = copy.deepcopy(module, memo)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # How Python copies or pickles it is its own affair.
            if self._replaced is None or name.startswith("__"):
                raise
            return getattr(self._replaced, name)


class Skipped(_Swap):
    """Gives a copy of the first tensor that it takes, in place of a component that was dropped."""

    def __init__(self, replaces: Sequence[str] = (), in_tuple: bool = False) -> None:
        super().__init__()
        self.replaces, self.in_tuple = tuple(replaces), in_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what came in."""
        if self._replaced is not None:
            # The caller may name what the module takes first behind other tensors.
            kwargs = in_order(self._replaced, kwargs)
        tensor = first_tensor((args, kwargs))
        # What follows may change what it takes in place, and others read what came in.
        given = None if tensor is None else tensor.clone()
        return (given,) if self.in_tuple else given

    def options(self) -> dict[str, Any]:
        """Return what it is built from, as plain values."""
        return {"replaces": list(self.replaces), "in_tuple": self.in_tuple}

    def extra_repr(self) -> str:
        """Return what it stands for, as text."""
        return f"replaces={self.replaces}"


class LinearComponent(_Swap):
    """One ``nn.Linear``, or two with a narrow state between them, in place of a component.

    It acts on whole tensors, or on one axis of theirs, alike at every position.
    """

    def __init__(
        self,
        in_features: int,
        shape: Sequence[int],
        rank: int | None = None,
        replaces: Sequence[str] = (),
        axis: int | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.shape, self.rank = in_features, tuple(shape), rank
        self.replaces, self.axis = tuple(replaces), axis
        out_features = int(torch.Size(self.shape).numel())
        self.layers: nn.Module = (
            nn.Linear(in_features, out_features)
            if rank is None
            else nn.Sequential(nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features))
        )

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Apply the map."""
        if self.axis is not None:
            along: Tensor = self.layers(x.movedim(self.axis, -1))
            return along.movedim(-1, self.axis)
        flat: Tensor = self.layers(x.flatten(1))
        return flat.reshape(-1, *self.shape)

    def options(self) -> dict[str, Any]:
        """Return what it is built from, as plain values."""
        return {
            "in_features": self.in_features,
            "shape": list(self.shape),
            "rank": self.rank,
            "replaces": list(self.replaces),
            "axis": self.axis,
        }

    def extra_repr(self) -> str:
        """Return what it stands for, as text."""
        return f"shape={self.shape}, replaces={self.replaces}"


class Repeated(_Swap):
    """Gives what a component gave once, which tells whether a network runs at all without it."""

    def __init__(self, replaces: Sequence[str], given: Any) -> None:
        super().__init__()
        self.replaces, self.given = tuple(replaces), given

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return it again."""
        return self.given


Swap = Skipped | LinearComponent | Repeated
_KINDS: Mapping[str, type[Skipped | LinearComponent]] = {"skipped": Skipped, "linear": LinearComponent}


def registrations(model: nn.Module, module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Find every place in a network where a module is registered: the parts of its owner, and a key."""
    owners = (owner._modules for owner in model.modules())
    return [(parts, key) for parts in owners for key, part in parts.items() if part is module]


@contextmanager
def put_back(model: nn.Module, modules: Iterable[nn.Module]) -> Generator[None, None, None]:
    """Put modules back wherever they are registered now when the context ends."""
    before = [(parts, key, m) for m in modules for parts, key in registrations(model, m)]
    try:
        yield
    finally:
        for parts, key, module in before:
            parts[key] = module


def put_in_place(model: nn.Module, swap: Swap) -> None:
    """Put a swap wherever the first module it replaces is, and nothing where the others are."""
    modules = dict(clean_modules(model))
    if missing := [name for name in swap.replaces if name not in modules]:
        raise ValueError(
            f"{type(model).__name__} has no module {missing[0]!r}, in whose place another goes; pass "
            "the network that was decided on, or one of its architecture"
        )
    first, *others = (modules[name] for name in swap.replaces)
    swap.stand_for(first)
    for module in (first, *others):
        for parts, key in registrations(model, module):
            parts[key] = swap if module is first else nn.Identity()


@contextmanager
def swapped(model: nn.Module, swaps: Iterable[Swap]) -> Generator[None, None, None]:
    """Put swaps in place in the network itself while the context lasts."""
    swaps, modules = list(swaps), dict(clean_modules(model))
    with put_back(model, [modules[name] for swap in swaps for name in swap.replaces]):
        for swap in swaps:
            put_in_place(model, swap)
        yield


_OF_TORCH = frozenset(vars(nn.Module()))


def check_copyable(model: nn.Module) -> None:
    """Refuse a network that keeps functions of its own: a copy's would run the original's modules."""
    if _holds_function(model, model):
        copied_with(model, ())


def _holds_function(model: nn.Module, of: nn.Module) -> tuple[str, str] | None:
    """Find what holds a function that refers to modules of a network: its owner and its name."""
    own = {id(module) for module in of.modules()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            held = list(value.values()) if isinstance(value, dict) else value
            functions = held if isinstance(held, list | tuple | set) else [held]
            if key not in _OF_TORCH and any(_refers_to(own, function) for function in functions):
                return clean_name(name) or type(model).__name__, key
    return None


def _refers_to(modules: set[int], function: Any) -> bool:
    """Check whether a function holds one of some modules, in what surrounds it or as a default."""
    if not isinstance(function, FunctionType):
        return False
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty
            held.append(cell.cell_contents)
    return any(isinstance(value, nn.Module) and id(value) in modules for value in held)


def copied_with(model: nn.Module, swaps: Iterable[Swap]) -> nn.Module:
    """Copy a network, also where a module holds a tensor with a graph, and put swaps in place."""
    check_model(model)
    held = (value for module in model.modules() for value in vars(module).values())
    graphs = [t for t in held if isinstance(t, Tensor) and not t.is_leaf]
    new = copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in graphs})
    # Some make their functions anew when they are copied, as metrics do.
    if found := _holds_function(new, model):
        owner, key = found
        raise ValueError(
            f"{key!r} of {owner!r} holds a function that refers to a module of the network, so that of "
            "a copy would still run the original's; make it a method"
        )
    for swap in swaps:
        put_in_place(new, swap)
    return new


def swaps_in(model: nn.Module) -> list[Skipped | LinearComponent]:
    """List what stands in place of components."""
    return [module for module in model.modules() if isinstance(module, Skipped | LinearComponent)]


def save_shrunk(
    model: nn.Module, path: str | os.PathLike[str], *, more: Mapping[str, Any] | None = None
) -> None:
    """Write a network with dropped or linear components as a checkpoint for :func:`load_shrunk`.

    Args:
        model: The network, as ``apply`` of a drop order or ``model`` of what became linear gives it.
        path: File to write, completely or not at all.
        more: What the file is to hold beside the weights, by name.
    """
    swaps = [
        {"kind": kind, **swap.options()}
        for swap in swaps_in(model)
        for kind, of_type in _KINDS.items()
        if type(swap) is of_type
    ]
    # torch.save destroys the file first, and tells of a full disk by an internal error.
    content = io.BytesIO()
    torch.save(dict(more or {}) | {"state_dict": model.state_dict(), "swaps": swaps}, content)
    with write_atomically(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_shrunk(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Read a network with dropped or linear components.

    Args:
        model: A network of the architecture that was shrunk; it is left alone.
        path: File written by :func:`save_shrunk`, or by the commands ``drop`` and ``linearize``.

    Returns:
        A new network, with the weights in the file.

    Raises:
        CheckpointError: If the file is no such checkpoint or does not fit the model.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.swaps is None:
        raise CheckpointError(
            f"{os.fspath(path)} holds no dropped or linear components; load it as usual"
        )
    held = sum(tensor.numel() for tensor in checkpoint.state_dict.values())
    new = copied_with(model, [])
    for given in checkpoint.swaps:
        try:
            options = dict(given)
            with torch.device("meta"):
                swap = _KINDS[options.pop("kind")](**options)
            # A file may claim any width, so nothing is allocated before this.
            if sum(p.numel() for p in swap.parameters()) > held:
                raise ValueError("it is larger than the file")
            inside = tuple(f"{name}.layers." for name in swap.replaces[:1])
            own = (each for name, each in checkpoint.state_dict.items() if name.startswith(inside))
            dtype = next((tensor.dtype for tensor in own), torch.float32)
            put_in_place(new, swap.to_empty(device="cpu").to(dtype))
        except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{os.fspath(path)} does not fit {type(model).__name__}: a component cannot be put in "
                f"its place ({type(error).__name__}: {error})"
            ) from None
    apply_checkpoint(new, replace(checkpoint, swaps=None))
    return new
