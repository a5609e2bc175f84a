"""Settles how each recorded tensor becomes rows: batch axis, layout, reduction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lightning_koopman.pooling import (
    REDUCTIONS,
    Reduce,
    RowForm,
    by_sample,
    has_channels_first,
    pooled_grid,
)
from lightning_koopman.recorded import Recorded
from lightning_koopman.tensors import all_tensors

ReduceOption = Reduce | Mapping[str, Reduce]


def row_forms(
    records: Sequence[Recorded], batch: Any, reduce: ReduceOption, max_dim: int
) -> dict[str, RowForm]:
    """Settle how each recorded tensor becomes rows.

    Args:
        records: Everything recorded in the first pass.
        batch: What the pass ran on.
        reduce: How spatial and sequence axes are reduced, or that by glob pattern.
        max_dim: Wider states are pooled.

    Returns:
        Forms by name.
    """
    n_samples, second = batch_size(records, batch)
    forms = {}
    for record in records:
        chosen = _reduction(record.name, reduce)
        shape = record.tensor.shape
        axis, group = 0, 1
        if len(shape) > 1 and shape[1] == n_samples and record.lengths is None:
            native = record.name in second
            if shape[0] != n_samples or native or (second and len(shape) == 3):
                axis = 1
        if axis == 0 and shape and n_samples > 0 and shape[0] > n_samples and shape[0] % n_samples == 0:
            group = shape[0] // n_samples if n_samples > 1 else 1
        if callable(chosen) or not shape:
            forms[record.name] = RowForm(reduce=chosen)
            continue
        values = by_sample(record.tensor, axis, group)
        first = has_channels_first(values, record.module)
        grid = pooled_grid(tuple(values.shape[1:]), max_dim, channels_first=first)
        forms[record.name] = RowForm(axis, group, first, grid, chosen)
    return forms


def _reduction(name: str, reduce: ReduceOption) -> Reduce:
    if not isinstance(reduce, Mapping):
        return reduce
    return next((way for glob, way in reduce.items() if fnmatchcase(name, glob)), "pool")


def check_reduce(reduce: Any) -> None:
    """Refuse reductions that do not exist.

    Args:
        reduce: A name, a callable, or a mapping of glob patterns to either.

    Raises:
        ValueError: If it is something else.
    """
    for way in reduce.values() if isinstance(reduce, Mapping) else [reduce]:
        if way not in REDUCTIONS and not callable(way):
            raise ValueError(f"reduce holds {way!r}; choose one of {REDUCTIONS} or give a callable")


def batch_size(records: Sequence[Recorded], batch: Any) -> tuple[int, set[str]]:
    """Tell the number of samples of the first pass, and which states have the batch on axis 1.

    Args:
        records: Everything recorded in the first pass.
        batch: What the pass ran on.

    Returns:
        The number, and names of states that came from modules with the batch second.
    """
    second = {
        record.name: record.tensor.shape[1]
        for record in records
        if record.lengths is None
        and record.tensor.ndim == 3
        and type(record.module).__module__.startswith("torch.nn.")
        and any(getattr(part, "batch_first", None) is False for part in record.module.modules())
    }
    if second:
        return next(iter(second.values())), set(second)
    sizes = [record.tensor.shape[0] for record in records if record.tensor.ndim]
    given = next((t.shape[0] for t in all_tensors(batch) if t.ndim), 0)

    def fits(record: Recorded) -> bool:
        shape = record.tensor.shape
        return bool(shape) and (shape[0] % given == 0 or (len(shape) > 1 and shape[1] == given))

    if given and all(fits(record) for record in records):
        return given, set()
    return (Counter(sizes).most_common(1)[0][0] if sizes else 0), set()
