"""Calls modules a second time, with what they took but for one tensor, unseen by any hook."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lightning_koopman.tensors import all_tensors, first_tensor


@dataclass(frozen=True)
class Call:
    """What a module was called with, copied.

    Attributes:
        args: Arguments.
        kwargs: Keyword arguments.
        state: The first floating-point tensor among them.
        others: The other floating-point tensors.
        autocast: Whether it ran under autocast, and in which type.
        foreign: Type of an argument that is neither a tensor nor a plain value, which a second call may
            alter; ``None`` where there is none.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    state: Tensor
    others: tuple[Tensor, ...]
    autocast: tuple[bool, torch.dtype]
    foreign: str | None


def copied_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
    """Copy what a module is called with, before it can change anything in place.

    Args:
        args: Arguments.
        kwargs: Keyword arguments.

    Returns:
        The copy; ``None`` where there is no floating-point tensor.
    """
    given = first_tensor((args, kwargs))
    if given is None:
        return None
    copies = _Copies()
    state = copies.of(given)
    args, kwargs = copies.within(args), copies.within(kwargs)
    numbers = [tensor for tensor in all_tensors((args, kwargs)) if tensor.is_floating_point()]
    device = state.device.type
    return Call(
        args,
        kwargs,
        state,
        tuple(tensor for tensor in numbers if tensor is not state),
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        _foreign((args, kwargs)),
    )


def answer(modules: Sequence[nn.Module], call: Call, state: Tensor) -> Tensor:
    """Tell what modules, one after the other, give on another state.

    Their ``forward`` is called with all hooks on them and inside them switched off.

    Args:
        modules: The modules; each but the first takes the first tensor of what the one before it gave.
        call: What the first of them took; all but ``state`` stays as it was.
        state: What to put in place of ``call.state``, wherever that stood.

    Returns:
        The first tensor of what the last one gives.

    Raises:
        ValueError: If that holds no tensor.
    """
    # Copies again: what a module changes in place must be there for the next call.
    copies = _Copies()
    copies.put(call.state, state.clone())
    enabled, dtype = call.autocast
    with _without_hooks(modules), torch.autocast(state.device.type, dtype=dtype, enabled=enabled):
        given: Any = modules[0].forward(*copies.within(call.args), **copies.within(call.kwargs))
        for module in modules[1:]:
            given = module.forward(first_tensor(given))
    tensor = first_tensor(given)
    if tensor is None:
        raise ValueError(f"a component gave {type(given).__name__} without a tensor on a noisy input")
    return tensor.detach()


class _Copies:
    """One copy for every tensor, however often it occurs."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def put(self, tensor: Tensor, copy: Tensor) -> None:
        # The original is kept, for its identity must not pass on to another tensor.
        self._known[id(tensor)] = (tensor, copy)

    def of(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._known:
            self.put(tensor, tensor.detach().clone())
        return self._known[id(tensor)][1]

    def within(self, value: Any) -> Any:
        """Rebuild tuples, lists and dictionaries around copies; anything else stays what it is."""
        if isinstance(value, Tensor):
            return self.of(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.within, value))
        if type(value) in (tuple, list):
            return type(value)(map(self.within, value))
        if type(value) is dict:
            return {name: self.within(part) for name, part in value.items()}
        return value


def _foreign(value: Any) -> str | None:
    plain = Tensor | bool | int | float | str | torch.dtype | torch.device
    if value is None or isinstance(value, plain):
        return None
    if type(value) in (tuple, list, dict) or hasattr(value, "_fields"):
        parts = value.values() if isinstance(value, dict) else value
        return next((found for part in parts if (found := _foreign(part)) is not None), None)
    return type(value).__name__


@contextmanager
def _without_hooks(modules: Sequence[nn.Module]) -> Generator[None, None, None]:
    """Switch off every forward hook on modules and all they hold, and put them back."""
    parts = {id(part): part for module in modules for part in module.modules()}.values()
    kept = [(part, part._forward_hooks, part._forward_pre_hooks) for part in parts]
    everywhere = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
    saved = [OrderedDict(hooks) for hooks in everywhere]
    try:
        for part, _, _ in kept:
            part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict()
        for hooks in everywhere:
            hooks.clear()
        yield
    finally:
        for part, hooks, pre_hooks in kept:
            part._forward_hooks, part._forward_pre_hooks = hooks, pre_hooks
        for hooks, before in zip(everywhere, saved, strict=True):
            hooks.update(before)
