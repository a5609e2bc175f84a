"""A linear stand-in for a component, and networks that hold some."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.checkpoints import CheckpointError, apply_checkpoint, load_checkpoint
from lightning_koopman.module_tree import clean_name
from lightning_koopman.whole_files import whole_file


class LinearComponent(nn.Module):
    """One ``nn.Linear``, or two with a narrow state between them, in place of a component.

    Args:
        in_features: Values in one sample of what it takes in.
        shape: Shape of one sample of what it gives out.
        rank: Width between two layers; ``None`` makes one layer.
        replaces: Names of the modules it stands for; the first is its own place.
    """

    def __init__(
        self,
        in_features: int,
        shape: Sequence[int],
        rank: int | None = None,
        replaces: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.in_features, self.shape, self.rank = in_features, tuple(shape), rank
        self.replaces = tuple(replaces)
        out_features = int(torch.Size(self.shape).numel())
        self.layers: nn.Module = (
            nn.Linear(in_features, out_features)
            if rank is None
            else nn.Sequential(nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features))
        )

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Apply the map.

        Args:
            x: Shape ``(n_samples, ...)``.

        Returns:
            Shape ``(n_samples, *shape)``.
        """
        flat: Tensor = self.layers(x.flatten(1))
        return flat.reshape(-1, *self.shape)

    def extra_repr(self) -> str:
        """Say what it stands for."""
        return f"shape={self.shape}, replaces={self.replaces}"


def put_in_place(model: nn.Module, component: LinearComponent) -> None:
    """Put a linear component where the first module it replaces is, and nothing where the others are.

    Args:
        model: Changed in place.
        component: Names what it replaces.
    """
    raw = {clean_name(name): name for name, _ in model.named_modules()}
    first, *others = component.replaces
    model.set_submodule(raw[first], component)
    for name in others:
        model.set_submodule(raw[name], nn.Identity())


def linear_components(model: nn.Module) -> list[LinearComponent]:
    """List a network's linear components.

    Args:
        model: Any module.

    Returns:
        Modules, in order of registration.
    """
    return [module for module in model.modules() if isinstance(module, LinearComponent)]


def save_linearized(
    model: nn.Module, path: str | os.PathLike[str], *, more: Mapping[str, Any] | None = None
) -> None:
    """Write a network with linear components as a checkpoint that :func:`load_linearized` reads.

    Args:
        model: A network that :func:`lightning_koopman.linearize` gave.
        path: File to write, whole or not at all.
        more: Further plain entries, such as ``hyper_parameters``.
    """
    swaps = [
        {
            "in_features": component.in_features,
            "shape": list(component.shape),
            "rank": component.rank,
            "replaces": list(component.replaces),
        }
        for component in linear_components(model)
    ]
    # torch.save destroys the file first, and tells of a full disk by an internal error.
    content = io.BytesIO()
    torch.save(dict(more or {}) | {"state_dict": model.state_dict(), "linearized": swaps}, content)
    with whole_file(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_linearized(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Read a network with linear components.

    Args:
        model: A network of the architecture that was linearised; it is left alone.
        path: File written by :func:`save_linearized`.

    Returns:
        A new network, with the weights in the file.

    Raises:
        CheckpointError: If the file is no such checkpoint or does not fit the model.
    """
    checkpoint = load_checkpoint(path)
    swaps = torch.load(path, map_location="cpu", weights_only=True).get("linearized")
    if not isinstance(swaps, list):
        raise CheckpointError(f"{os.fspath(path)} holds no linear components; load it as usual")
    new = copy.deepcopy(model)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    held = sum(tensor.numel() for tensor in checkpoint.state_dict.values())
    for swap in swaps:
        try:
            put_in_place(new, _unfilled(swap, held).to(dtype))
        except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{os.fspath(path)} does not fit {type(model).__name__}: a linear component cannot be "
                f"put in its place ({type(error).__name__}: {error})"
            ) from None
    apply_checkpoint(new, checkpoint)
    return new


def _unfilled(swap: Mapping[str, Any], most: int) -> LinearComponent:
    """Make a component as a file tells, without believing what it says of widths."""
    with torch.device("meta"):
        component = LinearComponent(**swap)
    if sum(p.numel() for p in component.parameters()) > most:
        raise ValueError("it is larger than the file")
    return component.to_empty(device="cpu")
