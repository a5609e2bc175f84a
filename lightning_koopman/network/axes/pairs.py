"""Follows where each row meets all others, as samples do that are compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence, Set
from typing import Any

from torch import Tensor

from lightning_koopman.network.operators import DISTANCES, VIEWS, Operator
from lightning_koopman.network.tensors import address_of, all_tensors, has_places

# These multiply two tensors last, or compare them.
_MEET = DISTANCES | {"mm", "addmm", "bmm", "baddbmm"}


class PairedRows:
    """Of how many rows each met all others in what tensors were made of, by their memory."""

    def __init__(self, keep: Callable[[Tensor], None]) -> None:
        self._keep = keep
        self._sizes: dict[int, frozenset[int]] = {}

    def of(self, tensor: Tensor) -> frozenset[int]:
        """Return of how many rows each met all others."""
        return self._sizes.get(address_of(tensor), frozenset())

    def follow(
        self,
        op: Operator,
        reads: Sequence[Tensor],
        known: Sequence[frozenset[str]],
        out: Any,
        others: Set[str],
    ) -> None:
        """Pass on which rows met, and note those that an operator lets meet.

        What has no more labels than the ``others`` is no data.
        """
        sizes = frozenset[int]().union(*map(self.of, reads if self._sizes else ()))
        if isinstance(out, Tensor) and _may_hold_pairs(out):
            data = [None if of <= others else read for of, read in zip(known, reads, strict=True)]
            if (size := _n_paired(op.name, data, out)) > 1:
                sizes |= {size}
        for tensor in all_tensors(out) if sizes else ():
            if address := address_of(tensor):
                if address not in self._sizes:
                    self._keep(tensor)
                self._sizes[address] = sizes


def _may_hold_pairs(tensor: Tensor) -> bool:
    """Check whether a tensor has two axes of one size in front, or behind one of heads."""
    if tensor.is_nested:
        return False
    shape = tensor.shape
    return len(shape) > 1 and (shape[0] == shape[1] or (len(shape) == 3 and shape[1] == shape[2]))


def _n_paired(name: str, reads: Sequence[Tensor | None], out: Tensor) -> int:
    """Return how many rows of data an operator puts to each of as many others; 0 where it does not.

    It does as it multiplies two tensors of data, combines them along axes of their own, or takes rows
    apart that were repeated. What it reads is ``None`` where that is no data.
    """
    data = [t for t in reads if t is not None and has_places(t)]
    if name in _MEET:
        both = all(read is not None for read in reads[-2:])
        return out.shape[-1] if both and out.shape[-1] == out.shape[-2] else 0
    if name in VIEWS:
        size = out.shape[0]
        apart = size == out.shape[1] and any(read.shape[:1] == (size * size,) for read in data)
        return size if apart else 0
    for read in data:
        # Expanded along one of two axes, as x[None] and x[:, None] are, whatever combines them later.
        alike = read.ndim > 2 and read.shape[0] == read.shape[1] and read.shape[:2] == out.shape[:2]
        if alike and (read.stride(0) == 0) != (read.stride(1) == 0):
            return read.shape[0]
    spread = [_spread_axes(read, out) for read in data] if len(data) > 1 else []
    for one, other in itertools.combinations(spread, 2):
        for axis in one - other:
            if any(out.shape[axis] == out.shape[k] for k in other - one):
                return out.shape[axis]
    return 0


def _spread_axes(tensor: Tensor, out: Tensor) -> set[int]:
    """Find the axes of an operator's output along which something that it read is the same."""
    missing = out.ndim - tensor.ndim
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    alike = {missing + axis for axis, (size, stride) in enumerate(sizes) if size == 1 or stride == 0}
    return {axis for axis in alike | {*range(missing)} if axis >= 0 and out.shape[axis] > 1}
