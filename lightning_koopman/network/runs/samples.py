"""Which samples are looked at where not all are: some of everywhere, for data may come sorted."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler

from lightning_koopman.network.axes.graphs import n_graphs
from lightning_koopman.network.runs.steps import Step
from lightning_koopman.network.tensors import all_tensors, first_packed, refuse_without_shape

_GOLDEN = (math.sqrt(5) - 1) / 2
# Of all shares of a round, steps of this one leave the most even gaps, wherever one stops.

_NEAR = 32
# How far from it a step is looked for: that of few indices is a fraction, which may be a coarse one.


class SpreadSampler(Sampler[int]):
    """Every index once, in an order of which any part that comes first is spread over all of them."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        size, ideal = self.size, round(_GOLDEN * self.size)
        near = range(max(1, ideal - _NEAR), max(2, min(size, ideal + _NEAR)))
        step = min(near, key=lambda step: _coarseness(step, size))
        return (i * step % size for i in range(size))


def _coarseness(step: int, size: int) -> float:
    """Return the largest quotient of a continued fraction, infinity where it is not in lowest terms."""
    largest, rest = 0, size
    while step:
        largest, (rest, step) = max(largest, rest // step), (step, rest % step)
    return largest if rest == 1 else math.inf


def spread(batches: Iterable[Any], wanted: int | None) -> Iterable[Any]:
    """Return batches in an order of which any that come first are spread over all of the data.

    Of a ``DataLoader`` that goes through its data in order, samples are spread; of a list or tuple,
    batches. What holds no more samples than are ``wanted`` is left as it is, and so is whatever else
    gives batches. Where all are wanted, what comes first still matters: bases are fitted to it.
    """
    if isinstance(batches, list | tuple):
        if wanted is None or sum(map(samples_in, batches)) <= wanted:
            return batches
        return [batches[i] for i in SpreadSampler(len(batches))]
    if not isinstance(batches, DataLoader):
        return batches
    old, sampler = batches.batch_sampler, batches.sampler
    if type(old) is BatchSampler:
        sampler = old.sampler
    elif old is not None:
        return batches
    if type(sampler) is not SequentialSampler or (wanted is not None and len(sampler) <= wanted):
        return batches
    order = SpreadSampler(len(sampler))
    batched = None if old is None else BatchSampler(order, old.batch_size, old.drop_last)
    # A loader lets none of these be set, and may hold an iterator of the user's own.
    loader = copy.copy(batches)
    vars(loader).update(sampler=order, batch_sampler=batched, _iterator=None)
    return loader


def spread_over(count: int, size: int) -> list[int]:
    """Return ``count`` indices below ``size``, or as many as there are, at even distances.

    Of fewer than all, none is the last.
    """
    if count >= size:
        return list(range(size))
    first = (size // count - 1) // 2
    return [first + i * size // count for i in range(count)]


def samples_in(batch: Any) -> int:
    """Count the samples of a batch, or of a step that was recorded."""
    if isinstance(batch, Step):
        return batch.n_samples
    refuse_without_shape(batch)
    if (packed := first_packed(batch)) is not None:
        return int(packed.batch_sizes[0])
    # Rows of graph libraries' batches are nodes.
    if (graphs := getattr(batch, "num_graphs", None)) is not None:
        return int(graphs)
    tensors = [tensor for tensor in all_tensors(batch) if tensor.ndim]
    return n_graphs(tensors) or (len(tensors[0]) if tensors else 1)


def first_samples(batches: Iterable[Any], count: int, *, may_be_second: bool = False) -> Iterator[Any]:
    """Take batches until they hold so many samples, of the last only some if it is plain enough.

    None is cut of which samples ``may_be_second``, along the second axis, for all that it shows.
    """
    for batch in batches:
        size = samples_in(batch)
        shows_none = all(1 < tensor.ndim < 4 for tensor in all_tensors(batch) if tensor.ndim)
        is_whole = size <= count or (may_be_second and shows_none)
        yield batch if is_whole else _cut(batch, size, count)
        count -= size
        if count <= 0:
            return


def _cut(value: Any, size: int, count: int) -> Any:
    """Keep some samples of what has one entry per sample, where everything in it has."""
    kept = spread_over(count, size)

    def is_plain(part: Any) -> bool:
        if isinstance(part, Tensor):
            return part.ndim == 0 or len(part) == size
        if type(part) is dict:
            return all(map(is_plain, part.values()))
        return type(part) in (tuple, list) and (len(part) == size or all(map(is_plain, part)))

    def cut(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.index_select(0, torch.tensor(kept, device=part.device)) if part.ndim else part
        if type(part) is dict:
            return {name: cut(inner) for name, inner in part.items()}
        alone = len(part) == size and not all(map(is_plain, part))
        return type(part)([part[i] for i in kept] if alone else map(cut, part))

    return cut(value) if is_plain(value) else value
