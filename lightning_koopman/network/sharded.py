"""Tensors of which each of several processes may hold a part, as under tensor parallelism."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

LET_IT_BE_WHOLE = (
    "Under tensor parallelism, let it give whole outputs (output_layouts=Replicate()), or name "
    "components that do with components=[...]."
)
"""What to do about a state of which each process holds a part."""


def is_spread(tensor: Any) -> bool:
    """Check whether a tensor is one over several processes."""
    return hasattr(tensor, "full_tensor")


def whole_here(tensor: Any) -> Tensor | None:
    """Take a tensor that this process holds all of, without asking another process."""
    if not is_spread(tensor):
        return tensor  # type: ignore[no-any-return]
    held = [
        placement.is_replicate() or tensor.device_mesh.size(axis) == 1
        for axis, placement in enumerate(tensor.placements)
    ]
    return tensor.to_local() if all(held) else None


def refuse_part(name: str, module: nn.Module, tensor: Tensor) -> None:
    """Refuse the units that one process holds of what tensor parallelism spread."""
    width = getattr(module, "out_features", getattr(module, "embedding_dim", None))
    if width is None or not is_spread(getattr(module, "weight", None)):
        width = None
        if any(map(is_spread, module.parameters())) and tensor.ndim and not tensor.is_nested:
            width = _spread_width(module, tensor.shape[-1])
    if width is not None and tensor.shape[-1] != width:
        raise ValueError(
            f"component {name!r} gave {tensor.shape[-1]} of its {width} units, and other processes the "
            f"rest. {LET_IT_BE_WHOLE}"
        )


def _spread_width(module: nn.Module, given: int) -> int | None:
    """Find how wide an output is of which a process holds ``given``, if weights say that it does.

    So it is where that is the width of a part of some weight here, and of no whole one.
    """
    weights = list(module.parameters())
    if any(given in weight.shape for weight in weights):
        return None
    local = ((weight, weight.to_local().shape) for weight in weights if hasattr(weight, "to_local"))
    sizes = (pair for weight, part in local for pair in zip(weight.shape, part, strict=True))
    return next((whole for whole, held in sizes if held == given), None)
