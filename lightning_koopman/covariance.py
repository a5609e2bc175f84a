"""Reads means and covariances off the moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_koopman.layout import Layout

RESOLUTION = 1e-13
"""Units whose variance is below this share of their second moment are constant up to rounding."""


@dataclass(frozen=True)
class Covariances:
    """Means and covariances of a chain of states over some of the samples.

    Attributes:
        count: Number of samples.
        means: Mean of each state, shape ``(d_i,)``.
        variances: Diagonal of each state's own block, shape ``(d_i,)``.
        blocks: Products about the means, divided by ``count``, shape ``(d_i, d_j)`` under ``(i, j)``;
            those read off moments are computed whenever they are asked for.
    """

    count: float
    means: tuple[Tensor, ...]
    variances: tuple[Tensor, ...]
    blocks: Mapping[tuple[int, int], Tensor]

    def __getitem__(self, pair: tuple[int, int]) -> Tensor:
        i, j = pair
        return self.blocks[pair] if i <= j else self.blocks[j, i].T


@dataclass(frozen=True)
class _Blocks(Mapping[tuple[int, int], Tensor]):
    """Covariances as moments give them, none of them kept.

    ``own`` are the samples' means, ``about`` what is centred about, and ``alive`` marks the units that
    vary, where not all do.
    """

    layout: Layout
    row: Tensor
    without: Tensor | None
    scale: float
    own: tuple[Tensor, ...]
    about: tuple[Tensor, ...]
    alive: tuple[Tensor | None, ...]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.layout.pairs)

    def __len__(self) -> int:
        return len(self.layout.pairs)

    def __getitem__(self, pair: tuple[int, int]) -> Tensor:
        i, j = pair
        raw = _read(self.row, self.without, self.layout.slices[pair])
        raw = raw.view(self.layout.dims[i], self.layout.dims[j])
        if not self.scale:
            return torch.zeros_like(raw)
        # E[(x - a)(y - b)ᵀ] = E[xyᵀ] - m_x bᵀ - a (m_y - b)ᵀ
        block = torch.addr(raw, self.own[i], self.about[j], beta=self.scale, alpha=-1)
        if self.about is not self.own:
            block.addr_(self.about[i], self.own[j] - self.about[j], alpha=-1)
        rows, columns = self.alive[i], self.alive[j]
        if rows is not None:
            block *= rows[:, None]
        if columns is not None:
            block *= columns
        return block


def _read(row: Tensor, without: Tensor | None, place: slice) -> Tensor:
    return row[place] if without is None else row[place] - without[place]


def covariances(
    layout: Layout,
    row: Tensor,
    *,
    about: Sequence[Tensor] | None = None,
    without: Tensor | None = None,
) -> Covariances:
    """Read means and covariances off one row of moments.

    Units that rounding alone sets in motion are taken as constant: their covariances are exactly zero.

    Args:
        layout: What lies where.
        row: Sum of the rows of some folds, shape ``(size,)``.
        about: Means to centre about, in the same offset; ``None`` takes the samples' own.
        without: A part of ``row`` to leave out, of the same shape.

    Returns:
        Covariances; all zero where the row holds no sample.
    """
    count = float(_read(row, without, slice(0, 1)))
    scale = 1.0 / count if count else 0.0
    states = range(len(layout.dims))
    own = tuple(_read(row, without, layout.slices[i,]) * scale for i in states)
    about = own if about is None else tuple(about)
    variances, varies = [], []
    for i, width in enumerate(layout.dims):
        place = layout.slices[i, i]
        diagonal = slice(place.start, place.stop, 1 if i in layout.squares else width + 1)
        square = _read(row, without, diagonal) * scale
        variance = square - own[i] * about[i]
        if about is not own:
            variance = variance - about[i] * (own[i] - about[i])
        alive = variance > RESOLUTION * square
        variances.append(variance * alive)
        varies.append(None if bool(alive.all()) else alive)
    blocks = _Blocks(layout, row, without, scale, own, about, tuple(varies))
    return Covariances(count, about, tuple(variances), blocks)
