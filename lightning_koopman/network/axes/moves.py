"""Runs operators that move entries on the numbers of rows as well, which tells whose each one is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.network.operators import PUTS, Operator
from lightning_koopman.network.tensors import all_tensors, has_places

SUMS = frozenset({"index_add", "index_reduce", "scatter_add", "scatter_reduce"})
"""Add entries to those of their first argument at places that another one holds, or combine them so."""

_SORTS = frozenset({"sort", "topk", "unique_dim"})
"""Move entries to where their values say."""

_BY_INDEX = frozenset({"index", "index_put"})
_BY_AXES = (
    (PUTS - _BY_INDEX)
    | SUMS
    | _SORTS
    | {
        *("select", "slice", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"),
        *("unbind", "cat", "flip", "roll", "gather", "index_select", "slice_scatter", "select_scatter"),
        "unfold",
    }
)
"""Move entries along axes that they are told of."""

_WHOLE = (_BY_AXES - _SORTS - {"gather", "scatter", "scatter_add", "scatter_reduce"}) | {"stack"}
"""Move all that there is at a place along these axes together."""

MOVES = (
    _BY_INDEX
    | _BY_AXES
    | {
        *("stack", "embedding", "_pack_padded_sequence", "as_strided"),
        *("rot90", "take", "put", "masked_select", "masked_scatter", "diagonal_scatter"),
        *("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
        *("replication_pad1d", "replication_pad2d", "replication_pad3d"),
    }
)
"""Operators of which each entry that they give is one that they read, or none, or a sum of some."""

_VALUES = frozenset({"self", "src", "source", "tensors", "values", "weight", "input"})
"""What such operators call the arguments that hold what they move."""

_SCANS = frozenset({"cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"})
_POOLS = tuple(f"{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3))
_SOLVES = {
    **{"_linalg_solve_ex": (1, 2), "linalg_solve_triangular": (1, 3), "linalg_lu_solve": (2, 3)},
    **{"cholesky_solve": (0, 9), "triangular_solve": (0, 9)},
}
"""Solve equations: where they have the right-hand side, and whether that is on the right."""


def values_moved(op: Operator, args: Sequence[Any]) -> list[Tensor]:
    """Return the tensors of which an operator moves entries, if it does nothing else."""
    if op.name not in MOVES:
        return []
    values = [tensor for _, value in _values(op, args) for tensor in all_tensors(value)]
    return values if all(map(has_places, values)) else []


def _values(op: Operator, args: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    for place, (argument, value) in enumerate(zip(op.func._schema.arguments, args, strict=False)):
        if argument.name in _VALUES:
            yield place, value


def axes_moved(op: Operator, args: Sequence[Any], tensor: Tensor) -> Collection[int]:
    """Return the axes of a tensor along which an operator moves entries."""
    dims: Any = args[op.dims] if op.dims < len(args) else op.usual_dims
    if op.name == "_pack_padded_sequence":
        dims = 0 if args[2] else 1
    elif op.name == "embedding":
        dims = 0
    elif op.name in _BY_INDEX:
        indices = [each for each in enumerate(args[1]) if each[1] is not None]
        are_masks = any(index.dtype in (torch.bool, torch.uint8) for _, index in indices)
        dims = [k + i for k, index in indices for i in range(index.ndim if are_masks else 1)]
    elif op.name == "stack":
        dims = ()
    elif op.name not in _BY_AXES or dims in ((), []):
        dims = range(tensor.ndim)
    return {dim % max(1, tensor.ndim) for dim in ([dims] if isinstance(dims, int) else dims)}


def chooses(op: Operator) -> bool:
    """Check whether an operator moves entries to where their own values say."""
    return op.name in _SORTS


def puts(op: Operator) -> bool:
    """Check whether an operator puts entries into its first argument."""
    return op.name in PUTS | SUMS or op.name == "put" or op.name.endswith("_scatter")


def adds_up(name: str, args: Sequence[Any]) -> bool:
    """Check whether an operator adds entries to others, at places that it is told of."""
    return name in SUMS or (name in ("index_put", "put") and len(args) > 3 and bool(args[3]))


def move(
    op: Operator, args: Sequence[Any], out: Any, numbers: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor | None], bool] | None:
    """Return the row of each entry that an operator gives, and whether rows of two met in one.

    Rows are counted from 1, 0 is for none; what holds no entries that were moved has no numbers.
    ``None`` is returned where several are added up in one place.
    """
    source = args[0]
    if op.name in _SORTS:
        axis = (args[op.dims] if op.dims < len(args) else op.usual_dims) % max(1, source.ndim)
        told = numbers(source)
        if op.name != "unique_dim":
            return [told.gather(axis, out[1]) if told.ndim else told, None], False
        kinds = torch.unique(source, dim=axis, return_inverse=True)[1]
        index = kinds.new_empty(int(kinds.max()) + 1 if len(kinds) else 0)
        index[kinds] = torch.arange(len(kinds), device=kinds.device)
        return [told.index_select(axis, index), None, None], False
    named = [arg.name for arg in op.func._schema.arguments if not arg.kwarg_only]
    given = [0 if name == "value" else arg for name, arg in zip(named, args, strict=False)]
    values = dict(_values(op, args))
    for place, value in values.items():
        each = [numbers(tensor) for tensor in all_tensors(value)]
        given[place] = each[0] if isinstance(value, Tensor) else each
    places = [*values]
    given = _cut(op, args, given, places)
    for place in places if op.written else ():
        given[place] = given[place].clone()
    if adds_up(op.name, args):
        added = _added(op, given)
        return None if added is None else ([added[0].expand(args[0].shape)], added[1])
    if op.name == "as_strided":
        # Of entries that lie in memory as those of the tensor do.
        memory = given[0].new_zeros(source.untyped_storage().nbytes() // source.element_size())
        view = memory.as_strided(source.shape, source.stride(), source.storage_offset())
        given[0] = view.copy_(given[0])
    made = zip(all_tensors(op.func(*given)), all_tensors(out), strict=True)
    first, *others = (each.expand(like.shape) for each, like in made)
    return [first, *(None if "pack" in op.name else each for each in others)], False


def _cut(op: Operator, args: Sequence[Any], given: list[Any], places: Sequence[int]) -> list[Any]:
    """Leave out copies of numbers along axes that an operator moves nothing along."""
    indices = all_tensors(args[1]) if op.name in _BY_INDEX else []
    values = [tensor for place in places for tensor in all_tensors(given[place])]
    by_axis = op.name in _WHOLE or (len(indices) == 1 and indices[0].ndim == 1)
    if not by_axis or len({tensor.ndim for tensor in values}) > 1:
        return given
    kept = axes_moved(op, args, values[0])
    cut = tuple(
        slice(None)
        if axis in kept or any(t.stride(axis) and t.shape[axis] > 1 for t in values)
        else slice(1)
        for axis in range(values[0].ndim)
    )
    return [
        arg if i not in places else arg[cut] if isinstance(arg, Tensor) else [each[cut] for each in arg]
        for i, arg in enumerate(given)
    ]


def _added(op: Operator, given: list[Any]) -> tuple[Tensor, bool] | None:
    """Return what :func:`move` does where numbers are added to others."""
    place, func = (2 if op.name in ("index_put", "put") else 3), op.func
    if op.name in SUMS:
        func = torch.ops.aten.index_add if "index" in op.name else torch.ops.aten.scatter_add
        given = given[:4]
    before, rows = given[0], given[place]

    def put(values: Tensor) -> Tensor:
        given[0], given[place] = torch.zeros_like(before), values
        return all_tensors(func(*given))[0]

    if bool((put((rows > 0).long()) > 1).any()):
        return None
    placed = put(rows)
    met = bool(((placed > 0) & (before > 0) & (placed != before)).any())
    return torch.where(before > 0, before, placed), met


def axes_met(op: Operator, args: Sequence[Any]) -> tuple[Tensor, Collection[int]] | None:
    """Return what an operator reads, and along which axes it puts several entries of it together.

    Those that sum over an axis, as means and products, are not among them.
    """
    name, axes = op.name, list[int]()
    if name in _SOLVES:
        place, side = _SOLVES[name]
        from_left = len(args) <= side or args[side]
        return args[place], [args[place].ndim - (2 if from_left else 1)]
    if name in _SCANS:
        axes = [args[1] % max(1, args[0].ndim)]
    elif name.startswith("_fft"):
        axes = [dim % args[0].ndim for dim in args[1]]
    elif name.startswith("upsample"):
        axes = [*range(2, args[0].ndim)]
    elif name == "convolution":
        axes = [axis for axis in range(2, args[0].ndim) if args[1].shape[axis] > 1]
    elif name.startswith(_POOLS):
        sizes = list(args[1]) * (int(name.partition("_pool")[2][0]) // len(args[1]))
        axes = [args[0].ndim - len(sizes) + k for k, size in enumerate(sizes) if size > 1]
    return (args[0], axes) if axes else None


def narrowed(numbers: Tensor, axis: int | None = None) -> Tensor:
    """Leave out copies of numbers along other axes than one."""
    axes = enumerate(numbers.stride())
    return numbers[tuple(slice(None) if step or k == axis else slice(1) for k, step in axes)]


def rows_along(numbers: Tensor, axis: int) -> Tensor | None:
    """Return the row of each entry along an axis, and 0 for none, if others along it are of the same."""
    numbers = narrowed(numbers, axis)
    other = numbers.movedim(axis, 0).flatten(1) if numbers.ndim > 1 else numbers[:, None]
    if not other.numel():
        return numbers.new_zeros(other.shape[0])
    rows = other.amax(dim=1)
    alike = bool(((other == rows[:, None]) | (other == 0)).all())
    return rows if alike else None
