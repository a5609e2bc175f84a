"""Takes means in float64 of what streams by, some of it at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

_VALUES_AT_ONCE = 2**18
"""Values that are taken in float64 at once."""


def rows_at_once(values: Tensor) -> int:
    """Return how many rows are taken in float64 at once, for copies of more would fill the memory."""
    return max(1, _VALUES_AT_ONCE // max(1, math.prod(values.shape[1:])))


def chunks(values: Tensor) -> Iterator[tuple[slice, ...]]:
    """Give the places of what is taken in float64 at once: some rows, or a part of one."""
    size = rows_at_once(values)
    for row in range(0, len(values), size):
        rows = slice(row, row + size)
        if size > 1 or values.ndim == 1:
            yield (rows,)
            continue
        width = rows_at_once(values[0])
        for column in range(0, values.shape[1], width):
            yield rows, slice(column, column + width)


class MeanAndSpread:
    """Mean and standard deviation over the first axis of what streams by, in float64.

    Axes whose size varies from part to part are averaged over, too. Sums are kept about the first part's
    mean, so that a large mean costs no digits.

    Attributes:
        count: Rows so far, times positions along axes that vary.
        offset: Mean of the first part; where an axis varies, its size is 1.
    """

    def __init__(self, parts: Iterable[Tensor] = ()) -> None:
        self.count = 0
        self._varying: list[int] = []
        for part in parts:
            self.update(part)

    def update(self, part: Tensor) -> None:
        """Add some rows."""
        if not self.count:
            self._shape = part.shape[1:]
            self.offset = part.mean(dim=0, dtype=torch.float64)
            self._sum, self._squares = torch.zeros_like(self.offset), torch.zeros_like(self.offset)
        if len(part.shape[1:]) != len(self._shape):
            raise ValueError(
                f"states of shape {tuple(part.shape[1:])} and of shape {tuple(self._shape)} per sample "
                "arrived, which have no mean; bring all batches to one number of axes"
            )
        sizes = zip(part.shape[1:], self._shape, strict=True)
        found = [k for k, (here, first) in enumerate(sizes) if here != first and k not in self._varying]
        if found:
            self._merge(found)
        for place in chunks(part):
            own = () if 0 in self._varying else place[1:]
            chunk = part[place].double() - self.offset[own]
            self._sum[own] += self._summed(chunk)
            self._squares[own] += self._summed(chunk.square())
        self.count += len(part) * math.prod(part.shape[1 + k] for k in self._varying)

    def _summed(self, rows: Tensor) -> Tensor:
        total = rows.sum(dim=0)
        return total.sum(dim=self._varying, keepdim=True) if self._varying else total

    def _merge(self, axes: Sequence[int]) -> None:
        """Average over some axes from here on."""
        shift, count = self.offset, self.count
        self.offset = self.offset.mean(dim=list(axes), keepdim=True)
        # Σ(x - c) = Σ(x - o) + n (o - c), and the squares likewise.
        shift = shift - self.offset
        squares = self._squares + 2 * shift * self._sum + count * shift.square()
        self._squares = squares.sum(dim=list(axes), keepdim=True)
        self._sum = (self._sum + count * shift).sum(dim=list(axes), keepdim=True)
        self.count = count * math.prod(self._shape[k] for k in axes)
        self._varying += axes

    @property
    def mean(self) -> Tensor:
        """Mean of each entry."""
        return self.offset + self._sum / self.count

    @property
    def std(self) -> Tensor:
        """Standard deviation of each entry."""
        variance = self._squares / self.count - (self._sum / self.count).square()
        return variance.clamp_min(0).sqrt()
