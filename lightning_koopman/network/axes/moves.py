"""Runs operators that move entries on the numbers of rows instead, which tells whose each one is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from lightning_koopman.network.axes.batch_axes import BatchAxes
from lightning_koopman.network.operators import Operator
from lightning_koopman.network.tensors import all_tensors, has_places

_BY_AXES = frozenset({
    *("select", "slice", "split", "split_with_sizes", "unbind", "cat", "stack"),
    *("flip", "roll", "gather", "index", "index_select", "slice_scatter", "select_scatter"),
})
"""Operators that move entries along axes that they are told of."""

MOVES = _BY_AXES | {
    *("rot90", "take", "put", "masked_select", "masked_scatter", "diagonal_scatter"),
    *("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
    *("replication_pad1d", "replication_pad2d", "replication_pad3d"),
}
"""Operators of which each entry that they give is one that they read, or none."""

_VALUES = frozenset({"self", "src", "source", "tensors"})
"""What such operators call the arguments that hold what they move."""

Numbers = Callable[[Tensor], Tensor | None]
"""Tells the row that each entry of a tensor is of, counted from 1, 0 for none; ``None`` if unknown."""


def values_moved(op: Operator, args: Sequence[Any]) -> list[Tensor]:
    """Return the tensors of which an operator moves entries, if it does nothing else."""
    name = op.name
    if name not in MOVES or (name == "put" and len(args) > 3 and args[3]):
        return []
    values = [tensor for _, value in _values(op, args) for tensor in all_tensors(value)]
    return values if all(map(has_places, values)) else []


def may_move_samples(
    op: Operator, args: Sequence[Any], tensor: Tensor, axes: BatchAxes, which: int
) -> bool:
    """Check whether an operator may move entries of a tensor from one sample to another."""
    name, given = op.name, args[op.dims] if op.dims < len(args) else 0
    if name not in _BY_AXES or (name == "roll" and not given):
        return True
    found = axes.find(tensor, which)
    if found is None:
        # What is a row may be put anywhere.
        return name in ("slice_scatter", "select_scatter")
    if tensor.shape[found.axis] != axes.size(which) * found.inner:
        return True
    if name == "index":
        return found.axis < len(args[1]) and args[1][found.axis] is not None
    dims = [given] if isinstance(given, int) else given
    return name != "stack" and found.axis in {dim % tensor.ndim for dim in dims}


def _values(op: Operator, args: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    for place, (argument, value) in enumerate(zip(op.func._schema.arguments, args, strict=False)):
        if argument.name in _VALUES:
            yield place, value


def move(op: Operator, args: Sequence[Any], numbers: Numbers) -> list[Tensor] | None:
    """Return the rows that what an operator gives is of, if they are known of all that it moves."""
    given = list(args)
    for place, value in _values(op, args):
        told = [numbers(tensor) for tensor in all_tensors(value)]
        if any(each is None for each in told):
            return None
        if op.written:
            told = [each.clone() for each in told if each is not None]
        given[place] = told[0] if isinstance(value, Tensor) else told
    for place, argument in enumerate(op.func._schema.arguments[: len(given)]):
        if argument.name == "value":
            given[place] = 0
    return all_tensors(op.func(*given))


def rows_along(numbers: Tensor, axis: int) -> Tensor | None:
    """Return the row of each entry along an axis, and 0 for none, if others along it are of the same."""
    other = numbers.movedim(axis, 0).flatten(1) if numbers.ndim > 1 else numbers[:, None]
    if not other.numel():
        return None
    rows = other.amax(dim=1)
    alike = bool(((other == rows[:, None]) | (other == 0)).all())
    return rows if alike else None
