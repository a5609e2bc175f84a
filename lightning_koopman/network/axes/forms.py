"""Settles how recorded tensors become rows: which axes hold samples and channels, how far to pool."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lightning_koopman.network.axes.batch_axes import Place
from lightning_koopman.network.axes.input_data import rows_given
from lightning_koopman.network.axes.recorded import Recorded
from lightning_koopman.network.axes.rows import Reduce, ReduceOption, RowForm, by_sample
from lightning_koopman.network.names import is_sum
from lightning_koopman.network.tensors import all_tensors

_POOLED_CELLS = 16
_FINEST = (
    4  # values a kept direction: held-out R² of a small ResNet's blocks rose by .01 to .03 from 1 to 4
)
_CHANNEL_COUNTS: tuple[tuple[Any, str, str | None], ...] = (
    (nn.modules.conv._ConvNd, "out_channels", "in_channels"),
    (nn.modules.batchnorm._BatchNorm, "num_features", "num_features"),
    (nn.modules.instancenorm._InstanceNorm, "num_features", "num_features"),
    (nn.GroupNorm, "num_channels", "num_channels"),
    (nn.Linear, "out_features", "in_features"),
    (nn.Embedding, "embedding_dim", None),
    (nn.LayerNorm, "normalized_shape", "normalized_shape"),
)
"""Where layers say how many channels they give, and how many they take."""


def row_forms(
    records: Sequence[Recorded], batch: Any, reduce: ReduceOption, max_dim: int
) -> dict[str, RowForm]:
    """Settle how each recorded tensor becomes rows."""
    n_samples, second = batch_size(records, batch)
    turned = any(has_batch_second(record.module) for record in records)
    given = rows_given(batch)
    of_axis = _axis_of_samples(records, batch, n_samples)
    forms, images, has_sequences = dict[str, RowForm](), list[str](), False
    for record in records:
        shape = record.tensor.shape
        if is_sum(record.name) and (form := _form_of_part(record, records, forms)) is not None:
            forms[record.name] = replace(form, is_input=False)
            continue
        chosen = _reduction(record.name, reduce)
        if callable(chosen) or not shape:
            forms[record.name] = RowForm(reduce=chosen, is_input=record.is_input, of_axis=of_axis)
            continue
        form = RowForm()
        if record.lengths is None:
            form = form_of(
                record.name,
                record.tensor,
                n_samples,
                record.merged,
                second=record.name in second,
                turned=turned,
                followed=record.sources is not None,
                picked=_is_picked(record, n_samples),
                place=record.places[of_axis],
            )
            if n_samples == 1 and form == RowForm() and _is_of_data(record):
                # Views, windows and the like of a single sample are all its own.
                form = RowForm(group=shape[0])
        values = by_sample(record.tensor, form)
        first = has_channels_first(values, record.module, is_input=record.is_input)
        grid = pooled_grid(tuple(values.shape[1:]), max_dim, channels_first=first)
        forms[record.name] = replace(
            form,
            channels_first=first,
            grid=grid,
            reduce=chosen,
            is_input=record.is_input,
            of_batch=form.group > 1 and n_samples == given and not of_axis,
            of_axis=of_axis,
        )
        if chosen in ("last", "cls"):
            images += [record.name] if values.ndim > 3 else []
            has_sequences |= values.ndim == 3
    # Where some states are sequences, others, such as images before there are tokens, are pooled.
    if has_sequences:
        forms |= {name: replace(forms[name], reduce="pool") for name in images}
    return forms


def _is_of_data(record: Recorded) -> bool:
    """Check whether a state is known to be made of data of the batch, and not of picked rows."""
    is_made = record.is_input or (record.from_data and not (record.ignores_data or record.is_idle))
    return is_made and record.sources is not None and len(record.tensor) not in record.orders


def _form_of_part(
    record: Recorded, records: Sequence[Recorded], forms: Mapping[str, RowForm]
) -> RowForm | None:
    """Find the form of what a sum is made of, if that has its shape."""
    parts = (r for r in records if r.name in (record.sources or ()) and r.name in forms)
    return next((forms[r.name] for r in parts if r.tensor.shape == record.tensor.shape), None)


def _axis_of_samples(records: Sequence[Recorded], batch: Any, n_samples: int) -> int:
    """Find which of the two first axes of the batch's tensors the samples are along."""
    shape = next((t.shape for t in all_tensors(batch) if t.ndim > 1), (0, 0))
    if shape[0] != shape[1]:
        return int(n_samples == shape[1])
    packed = (_are_at(r.places, 0) for r in records if r.lengths is not None)
    second = ((r.module, r.tensor, r.places) for r in records if r.lengths is None)
    return int(any(packed) or are_second_of_batch(second))


def are_second_of_batch(
    states: Iterable[tuple[nn.Module, Tensor, Sequence[Place | None]]],
) -> bool:
    """Check whether the samples are along the second axis of the batch, of two of one size.

    So it is where a module of torch that has samples second has that axis there, or where states have no
    other one of the two: a loop over steps, or a mean over them, leaves the samples.
    """
    known = list(states)
    left = {axis for *_, places in known for axis in range(2) if places[axis] and not places[1 - axis]}
    return left == {1} or any(_are_at(at, 1) and gives_batch_second(m, t) for m, t, at in known)


def _are_at(places: Sequence[Place | None], axis: int) -> bool:
    """Check whether the second axis of the batch is an axis of a tensor, and the first is not."""
    return places[1] == (axis, 1) != places[0]


def _is_picked(record: Recorded, n_samples: int) -> bool:
    """Check whether the rows along the first axis were picked from those of samples."""
    order = record.orders.get(record.tensor.shape[0])
    # Of three axes, the first may be positions that were turned.
    return order is not None and order.moved and (record.tensor.ndim == 2 or order.base == n_samples)


def has_batch_second(module: nn.Module) -> bool:
    """Return whether a module, or a part of it, takes the samples along the second axis."""
    return any(getattr(part, "batch_first", None) is False for part in module.modules())


def gives_batch_second(module: nn.Module, tensor: Tensor) -> bool:
    """Return whether what a module of torch gave, or was given, has the samples along axis 1."""
    of_torch = type(module).__module__.startswith("torch.nn.")
    return tensor.ndim == 3 and of_torch and has_batch_second(module)


def form_of(
    name: str,
    tensor: Tensor,
    n_samples: int,
    merged: tuple[int, ...] | None,
    *,
    second: bool,
    turned: bool,
    followed: bool = False,
    picked: bool = False,
    place: Place | None = None,
) -> RowForm:
    """Find where a state's samples are.

    ``second`` says that its module has them along axis 1, ``turned`` that any module has. Where the data
    was ``followed``, several rows are a sample's only if a merge was seen: some may be all that is left
    of many, as an expert's share of positions. Rows that were ``picked`` are along the first axis. Of
    several axes of as many entries, ``place`` says which are the samples, if that is known.
    """
    shape = tensor.shape
    untold = (
        f"which entries of {name!r}, of shape {tuple(shape)}, belong to which of the {n_samples} "
        "samples cannot be told. Take batches of another size, or leave it out with components=[...]."
    )
    if n_samples < 2 or shape[0] <= n_samples:
        merged = None
    if place in ((0, 1), (1, 1)) and shape[:2] == (n_samples, n_samples) and not second:
        return RowForm(batch_axis=place.axis)
    # Two axes are rows and units as a rule, and as many units as samples happen.
    may_be_second = second or (not picked and (turned or len(shape) > 2))
    if merged is None and may_be_second and len(shape) > 1 and shape[1] == n_samples:
        if shape[0] != n_samples or second:
            return RowForm(batch_axis=1)
        if turned and len(shape) == 3:
            raise ValueError(untold)
    if n_samples < 2 or shape[0] <= n_samples or shape[0] % n_samples:
        return RowForm()
    group = shape[0] // n_samples
    if merged is None:
        return RowForm() if followed else RowForm(group=group)
    if n_samples not in merged:
        return RowForm()
    run = math.prod(merged[merged.index(n_samples) + 1 :])
    if merged.count(n_samples) > 1:
        # Of two axes of this size, the samples are the first, unless some module has them second.
        if place is None and turned:
            raise ValueError(untold)
        run = run if place is None or place.axis else place.inner
    return RowForm(group=group, run=run if run < group else 0)


def _reduction(name: str, reduce: ReduceOption) -> Reduce:
    if not isinstance(reduce, Mapping):
        return reduce
    return next((way for glob, way in reduce.items() if fnmatchcase(name, glob)), "pool")


def pooled_grid(shape: tuple[int, ...], max_dim: int, *, channels_first: bool) -> tuple[int, ...]:
    """Choose how far a state is pooled."""
    if len(shape) < 2:
        return ()
    channels = shape[0] if channels_first else shape[-1]
    axes = shape[1:] if channels_first else shape[:-1]
    if len(axes) > 3:
        axes = (*axes[:2], math.prod(axes[2:]))
    if channels * math.prod(axes) <= max_dim:
        return axes
    cells = min(_POOLED_CELLS, max(1, 16 * max_dim // channels))
    side = max(1, int(cells ** (1 / len(axes)) + 1e-9))
    # Few channels leave room for a finer grid, of which POD can then keep what varies most.
    side = max(side, math.ceil((_FINEST * max_dim / channels) ** (1 / len(axes)) - 1e-9))
    return tuple(min(side, size) for size in axes)


def has_channels_first(tensor: Tensor, module: nn.Module, *, is_input: bool = False) -> bool:
    """Guess the layout of a module's output, or of what it takes."""
    if tensor.ndim < 3:
        return False
    parts = [*module.modules()]
    for part in parts if is_input else reversed(parts):
        for kind, given, taken in _CHANNEL_COUNTS:
            attribute = taken if is_input else given
            if attribute is not None and isinstance(part, kind):
                count = getattr(part, attribute)
                count = count[-1] if isinstance(count, tuple) else count
                are_first, are_last = tensor.shape[1] == count, tensor.shape[-1] == count
                # A linear layer that takes as many as there are along axis 1 mixes positions, and one
                # that takes as many as a square image is wide may take patches of it.
                by_last = is_input and isinstance(part, nn.Linear | nn.LayerNorm)
                are_square = tensor.ndim == 4 and tensor.shape[-2] == count
                if are_first != are_last and (not by_last or (are_last and not are_square)):
                    return bool(are_first)
    if tensor.ndim == 4 and tensor.shape[1] == tensor.shape[2] != tensor.shape[3]:
        return False
    return tensor.ndim > 3


def rows_without_samples(n_samples: int, batch: Any) -> int | None:
    """Count the samples of a batch where a network runs on more rows that are no parts of these."""
    tensors = [tensor for tensor in all_tensors(batch) if tensor.ndim]
    counts, sizes = {len(t) for t in tensors} - {0}, {size for t in tensors for size in t.shape}
    alike = n_samples in sizes or any(n_samples < count or n_samples % count == 0 for count in counts)
    return None if alike else rows_given(batch) or None


def _second_axis(records: Sequence[Recorded], batch: Any) -> int | None:
    """Return the length of the batch's second axis where states have it first, and not its first."""
    plain = (t.shape[:2] for t in all_tensors(batch) if t.ndim > 1 and not t.is_nested)
    first, second = next(plain, (0, 0))
    others = [r for r in records if r.tensor.ndim and len(r.tensor) != first and not r.ignores_data]

    def has_it_first(r: Recorded) -> bool:
        told = r.sources is not None and r.merged is None and second not in r.orders
        return told and len(r.tensor) == second and r.places[0] is None

    # Fewer rows than there were may be of a mean over the samples, unless the network ends with them.
    is_more = second > first or records[-1:] == others[-1:]
    # A single sample is along an axis that nothing tells apart.
    return second if first > 1 and is_more and others and all(map(has_it_first, others)) else None


def batch_size(records: Sequence[Recorded], batch: Any) -> tuple[int, set[str]]:
    """Count the samples of the first pass, and which states have the batch on axis 1."""
    records = [record for record in records if not record.ignores_data] or records
    second = {
        record.name: record.tensor.shape[1]
        for record in records
        if record.lengths is None and gives_batch_second(record.module, record.tensor)
    }
    if second:
        return next(iter(second.values())), set(second)
    sizes = [record.tensor.shape[0] for record in records if record.tensor.ndim]
    given = rows_given(batch)

    def fits(record: Recorded) -> bool:
        shape = record.tensor.shape
        return bool(shape) and (shape[0] % given == 0 or (len(shape) > 1 and shape[1] == given))

    least = min(sizes, default=0)
    if given and least > given and all(size % least == 0 for size in sizes) and least % given == 0:
        # Several views, crops or time steps of each sample all the way: each is a row of its own, unless
        # they meet on the way, or lie in several orders, and which are of one sample is known.
        merges = [record.merged or () for record in records if record.tensor.shape[:1] == (least,)]
        known = all(given in merged for merged in merges)
        runs = {math.prod(merged[merged.index(given) + 1 :]) for merged in merges if known}
        if len(runs) < 2 and not (known and any(record.meet(least) for record in records)):
            return least, set()
    if (beside := _second_axis(records, batch)) is not None:
        return beside, set()
    if given and all(fits(record) for record in records):
        return given, set()
    # Of many experts some get as many samples as others, by chance.
    whole = [len(record.tensor) for record in records if record.tensor.ndim and not record.is_part]
    return (Counter(whole or sizes).most_common(1)[0][0] if sizes else 0), set()
