"""Streaming means and covariances, a set a fold, that add up over batches and processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_koopman.layout import Layout

_TILE = 64
"""Width of the strips that symmetric products are computed in; wide ones save nearly half."""

_CACHED_VALUES = 2**17
_LEAST_ROWS = 512
# Rows that are copied at once: few enough for the cache, enough for a fast product.


def accumulate(
    layout: Layout,
    moments: Tensor,
    states: Sequence[Tensor],
    fold_of: Tensor,
    center: Sequence[Tensor] | None = None,
) -> None:
    """Add one batch to the moments, in place.

    Args:
        layout: What is kept and where.
        moments: Shape ``(folds, size)``, float64.
        states: x_0 … x_L, each ``(n_samples, d_i)``, of any floating-point type.
        fold_of: Fold of each sample, shape ``(n_samples,)``.
        center: Fixed offsets, one ``(d_i,)`` a state, that are taken off first; ``None`` takes none.
    """
    offsets = None if center is None else [offset.to(moments) for offset in center]
    counts = torch.bincount(fold_of, minlength=layout.folds).tolist()
    size = max(_LEAST_ROWS, _CACHED_VALUES // max(layout.dims))
    start = 0
    order = None if max(counts) == len(fold_of) else torch.argsort(fold_of)
    for row, count in zip(moments, counts, strict=False):
        if not count:
            continue
        row[0] += count
        mirrored = [i for i, width in enumerate(layout.dims) if width > 2 * _TILE <= count // 2]
        # A few rows of one fold, one state after the other: copies that fit into the cache.
        for first in range(start, start + count, size):
            chosen = slice(first, min(first + size, start + count))
            _accumulate_rows(
                layout, row, states, chosen if order is None else order[chosen], offsets, mirrored
            )
        for i in mirrored:
            if i not in layout.squares:
                _mirror(row[layout.slices[i, i]].view(layout.dims[i], layout.dims[i]))
        start += count


def _accumulate_rows(
    layout: Layout,
    row: Tensor,
    states: Sequence[Tensor],
    chosen: slice | Tensor,
    offsets: Sequence[Tensor] | None,
    mirrored: Sequence[int],
) -> None:
    """Add some samples of one fold; of the states ``mirrored``, blocks above the diagonal alone."""
    remaining = Counter(i for pair in layout.pairs for i in set(pair))
    parts: dict[int, Tensor] = {}
    for pair in layout.pairs:
        for i in pair:
            if i not in parts:
                if isinstance(chosen, slice):
                    part = states[i][chosen].to(row, copy=offsets is not None)
                else:
                    part = states[i].index_select(0, chosen.to(states[i].device)).to(row)
                parts[i] = part if offsets is None else part.sub_(offsets[i])
        i, j = pair
        place = row[layout.slices[pair]]
        if i == j:
            row[layout.slices[i,]] += parts[i].sum(dim=0)
        if i != j:
            place.view(layout.dims[i], layout.dims[j]).addmm_(parts[i].T, parts[j])
        elif i in layout.squares:
            place += parts[i].square().sum(dim=0)
        else:
            _add_square(place.view(layout.dims[i], layout.dims[i]), parts[i], i in mirrored)
        for i in set(pair):
            # Copies of all states at once would make memory grow with their number.
            remaining[i] -= 1
            if not remaining[i]:
                del parts[i]


def _add_square(block: Tensor, part: Tensor, upper: bool) -> None:
    """Add ``part.T @ part``, or no more of it than what is on and above the tiles of the diagonal."""
    if not upper:
        block.addmm_(part.T, part)
        return
    for start in range(0, len(block), _TILE):
        columns = part[:, start : start + _TILE]
        block[start : start + _TILE, start:].addmm_(columns.T, part[:, start:])


def _mirror(block: Tensor) -> None:
    """Copy what is above the tiles of the diagonal to below them."""
    for start in range(0, len(block), _TILE):
        stop = start + _TILE
        block[stop:, start:stop] = block[start:stop, stop:].T


def recentred(layout: Layout, moments: Tensor, shifts: Sequence[Tensor]) -> Tensor:
    """Give the moments that the same samples have about other offsets.

    Args:
        layout: What lies where.
        moments: Shape ``(folds, size)``.
        shifts: Old offset minus new offset of each state, shape ``(d_i,)``.

    Returns:
        New moments.
    """
    moved = moments.clone()
    for row in moved:
        count = row[0].clone()
        sums = [row[layout.slices[i,]].clone() for i in range(len(layout.dims))]
        for i, j in layout.pairs:
            block = row[layout.slices[i, j]].view(layout.dims[i], layout.dims[j])
            # Σ(x + a)(y + b)ᵀ = Σxyᵀ + (Σx) bᵀ + a (Σy + n b)ᵀ
            block += torch.outer(sums[i], shifts[j]) + torch.outer(
                shifts[i], sums[j] + count * shifts[j]
            )
        for i, total in enumerate(sums):
            row[layout.slices[i,]] = total + count * shifts[i]
    return moved
