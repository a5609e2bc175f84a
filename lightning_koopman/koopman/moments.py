"""Counts, means and covariances of a chain of states, one set per fold, in one matrix."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_FEW_STATES = 6
_GROUP_WIDTH = 1536
# Of more states that are read side by side, as in dense networks, each pair is small and asked for by
# many steps: to put them side by side for each takes longer than to cut them off what was put so once.


@dataclass(frozen=True)
class Layout:
    """Where each moment of a chain of states lies in one flat row.

    Kept are the sums of every state, the products of every state with itself, with the states that its
    step reads and with the last one, and the products of all states that are read at the same time.

    Attributes:
        dims: Widths d_0 … d_L of the states.
        folds: Number of folds, one row each.
        delay: How many states before it each step reads at least; 0 where links say it all.
        links: For each step i = 1 … L, further earlier states that it reads; empty means none.
        squares: States that no step reads, of whose products with themselves the diagonal alone is kept.
        sums: Steps whose states are sums of others, which have no numbers of their own.
    """

    dims: tuple[int, ...]
    folds: int
    delay: int = 1
    links: tuple[tuple[int, ...], ...] = ()
    squares: tuple[int, ...] = ()
    sums: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.dims) < 2:
            raise ValueError(
                f"{len(self.dims)} of at least 2 states arrived; pass the state before a component "
                "and the state after it"
            )
        if min(self.dims) < 1:
            raise ValueError(f"dims is {list(self.dims)}; each is the width of a state, 1 or above")
        if self.folds < 2:
            raise ValueError(f"folds is {self.folds}; held-out R² needs at least 2")
        if not (0 if self.links and all(self.links) else 1) <= self.delay < len(self.dims):
            raise ValueError(
                f"delay is {self.delay}; with {len(self.dims) - 1} components it must lie between 1 "
                f"and {len(self.dims) - 1}"
            )
        if self.links and len(self.links) != len(self.dims) - 1:
            raise ValueError(f"links has {len(self.links)} entries for {len(self.dims) - 1} steps")
        for i, read in enumerate(self.links, start=1):
            if not all(0 <= p < i for p in read):
                raise ValueError(f"links of step {i} are {read}; a step reads states 0 … {i - 1} only")

    @cached_property
    def components(self) -> tuple[int, ...]:
        """The steps that have numbers, in order."""
        return tuple(i for i in range(1, len(self.dims)) if i not in self.sums)

    @cached_property
    def parents(self) -> tuple[tuple[int, ...], ...]:
        """For each state 0 … L, the states that its step reads, the nearest first."""
        read = [set(range(max(0, i - self.delay), i)) for i in range(len(self.dims))]
        for i, links in enumerate(self.links, start=1):
            read[i].update(links)
        return tuple(tuple(sorted(states, reverse=True)) for states in read)

    @cached_property
    def live(self) -> tuple[tuple[int, ...], ...]:
        """For each state i, the states up to it that a step behind it may read, the nearest first."""
        last = len(self.dims) - 1
        return (
            *(
                tuple(sorted({p for c in self.parents[i + 1 :] for p in c if p <= i}, reverse=True))
                for i in range(last)
            ),
            (last,),
        )

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Index pairs i ≤ j whose products are kept."""
        last = len(self.dims) - 1
        kept = {(i, i) for i in range(last + 1)} | {(i, last) for i in range(last + 1)}
        kept |= {(p, i) for i, read in enumerate(self.parents) for p in read}
        kept |= {(p, q) for states in self.live for p in states for q in states if p <= q}
        return tuple(sorted(kept))

    @cached_property
    def _groups(self) -> tuple[tuple[int, ...], ...]:
        """Join what steps read, of more than a few states, into few groups, each the nearest first."""
        last = len(self.dims) - 1
        sets = {tuple(sorted({*states, last}, reverse=True)) for states in self.live}
        sets |= {(i, *read) for i, read in enumerate(self.parents)}
        found: list[set[int]] = []
        # Steps that follow each other read nearly the same, beside what is read of the last state.
        for states in sorted((s for s in sets if len(s) > _FEW_STATES), key=lambda s: s[::-1]):
            union = found[-1].union(states) if found else set(states)
            narrow = sum(self.dims[p] for p in union) <= _GROUP_WIDTH
            if found and (narrow or len(union) == max(len(found[-1]), len(states))):
                found[-1] = union
            else:
                found.append(set(states))
        return tuple(tuple(sorted(states, reverse=True)) for states in found)

    def group(self, states: Sequence[int]) -> tuple[int, ...]:
        """Return the first such group that holds some states; none of a few."""
        asked = frozenset(states)
        if asked not in self._group_of:
            holding = (found for found in self._groups if asked <= set(found))
            self._group_of[asked] = next(holding, ()) if len(asked) > _FEW_STATES else ()
        return self._group_of[asked]

    @cached_property
    def _group_of(self) -> dict[frozenset[int], tuple[int, ...]]:
        return {}

    @cached_property
    def slices(self) -> dict[tuple[int, ...], slice]:
        """Place of the sum of state i, under ``(i,)``, and of a product, under ``(i, j)``."""
        places: dict[tuple[int, ...], slice] = {}
        start = 1
        for key in [(i,) for i in range(len(self.dims))] + list(self.pairs):
            size = math.prod(self.dims[i] for i in (key[:1] if key[0] in self.squares else key))
            places[key] = slice(start, start + size)
            start += size
        return places

    @cached_property
    def diagonals(self) -> tuple[slice, ...]:
        """Place of the squares of each state."""
        places = (self.slices[i, i] for i in range(len(self.dims)))
        steps = (1 if i in self.squares else width + 1 for i, width in enumerate(self.dims))
        return tuple(slice(p.start, p.stop, step) for p, step in zip(places, steps, strict=True))

    @property
    def size(self) -> int:
        """Length of a row: one count, then sums, then products."""
        return int(self.slices[self.pairs[-1]].stop)

    def zeros(self) -> Tensor:
        """Make empty moments."""
        return torch.zeros(self.folds, self.size, dtype=torch.float64, device="cpu")


_TILE = 32
"""Width of the strips that symmetric products are computed in; wide ones save nearly half."""

_CACHED_VALUES = 2**18
_LEAST_ROWS = 512
# Rows that are copied at once: few enough for the cache, enough for a fast product.


def accumulate(
    layout: Layout,
    moments: Tensor,
    states: Sequence[Tensor],
    fold_of: Tensor,
    center: Sequence[Tensor] | None = None,
) -> None:
    """Add one batch to the moments, in place."""
    offsets = None if center is None else [offset.to(moments) for offset in center]
    # The one thing that a device is asked. It has no cache to keep copies in, and wants large products.
    on_cpu = moments.device.type == "cpu"
    counts = (fold_of == torch.arange(layout.folds, device=fold_of.device)[:, None]).sum(dim=1).tolist()
    size = max(_LEAST_ROWS, _CACHED_VALUES // max(layout.dims)) if on_cpu else max(counts)
    start = 0
    order = None if max(counts) == len(fold_of) else torch.argsort(fold_of)
    for row, count in zip(moments, counts, strict=False):
        if not count:
            continue
        row[0] += count
        tiled = on_cpu and count >= 8 * _TILE
        mirrored = [i for i, width in enumerate(layout.dims) if tiled and width > 2 * _TILE]
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
    # One row per unit, for products of such are an eighth to a quarter faster.
    parts: dict[int, Tensor] = {}
    for pair in layout.pairs:
        for i in {*pair} - parts.keys():
            if isinstance(chosen, slice):
                part = states[i][chosen]
            else:
                part = states[i].index_select(0, chosen.to(states[i].device))
            parts[i] = row.new_empty(part.shape[1], part.shape[0]).copy_(part.T)
            if offsets is not None:
                parts[i] -= offsets[i][:, None]
            row[layout.slices[i,]] += parts[i].sum(dim=1)
        i, j = pair
        place = row[layout.slices[pair]]
        if i != j:
            add_product(place.view(layout.dims[i], layout.dims[j]), parts[i], parts[j])
        elif i in layout.squares:
            place += parts[i].square().sum(dim=1)
        else:
            add_square(place.view(layout.dims[i], layout.dims[i]), parts[i], i in mirrored)
        for i in set(pair):
            # Copies of all states at once would make memory grow with their number.
            remaining[i] -= 1
            if not remaining[i]:
                del parts[i]


def add_product(block: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right.T``; BLAS is up to four times as fast where the narrower one comes first."""
    if block.shape[0] < 2 * block.shape[1]:
        block.addmm_(left, right.T)
    else:
        block += (right @ left.T).T


def add_square(block: Tensor, part: Tensor, upper: bool) -> None:
    """Add ``part @ part.T``, or no more of it than what is on and above the tiles of the diagonal."""
    if not upper:
        block.addmm_(part, part.T)
        return
    for start in range(0, len(block), _TILE):
        block[start : start + _TILE, start:].addmm_(part[start : start + _TILE], part[start:].T)


def _mirror(block: Tensor) -> None:
    """Copy what is above the tiles of the diagonal to below them."""
    for start in range(0, len(block), _TILE):
        stop = start + _TILE
        block[stop:, start:stop] = block[start:stop, stop:].T


def recentred(layout: Layout, moments: Tensor, shifts: Sequence[Tensor]) -> Tensor:
    """Compute the moments that the same samples have about other offsets."""
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


RESOLUTION = 1e-13
"""Units whose variance is below this share of their second moment are constant up to rounding."""

_LEAST_VARIANCE = 1e-290
# What is below cannot be told from its share of 1e-12 without underflow.


@dataclass(frozen=True)
class Covariances:
    """Means and covariances of a chain of states over some of the samples, or over those of each fold.

    Attributes:
        count: Number of samples, without an axis, or ``(folds,)``, as which all others begin.
        means: Mean of each state, shape ``(…, d_i)``.
        variances: Diagonal of each state's own block, shape ``(…, d_i)``.
        blocks: Products about the means, divided by ``count``, shape ``(…, d_i, d_j)`` under ``(i, j)``;
            those read off moments are computed whenever they are asked for.
    """

    count: Tensor
    means: tuple[Tensor, ...]
    variances: tuple[Tensor, ...]
    blocks: Mapping[tuple[int, int], Tensor]

    def __getitem__(self, pair: tuple[int, int]) -> Tensor:
        i, j = pair
        return self.blocks[pair] if i <= j else self.blocks[j, i].mT

    def normal_equations(self, read: Sequence[int], i: int) -> tuple[Tensor, Tensor]:
        """Return the covariance of some states side by side, and their cross-covariance with another."""
        return self.beside(read), self.across(read, i)

    def beside(self, states: Sequence[int]) -> Tensor:
        """Return the covariance of some states side by side."""
        if len(states) == 1:
            return self[states[0], states[0]]
        if (found := self._within(states, states)) is not None:
            return found
        rows = [torch.cat([self[p, q] for q in states], dim=-1) for p in states]
        return torch.cat(rows, dim=-2)

    def across(self, states: Sequence[int], i: int) -> Tensor:
        """Return the cross-covariance of some states side by side with another."""
        if len(states) == 1:
            return self[states[0], i]
        if (found := self._within(states, (i,))) is not None:
            return found
        return torch.cat([self[p, i] for p in states], dim=-2)

    def _within(self, rows: Sequence[int], columns: Sequence[int]) -> Tensor | None:
        return self.blocks.within(rows, columns) if isinstance(self.blocks, _Blocks) else None


@dataclass(frozen=True)
class _Blocks(Mapping[tuple[int, int], Tensor]):
    """Covariances of samples of means ``own``, taken ``about`` others; only ``alive`` units vary."""

    layout: Layout
    row: Tensor
    without: Tensor | None
    scale: Tensor
    own: tuple[Tensor, ...]
    about: tuple[Tensor, ...]
    alive: tuple[Tensor | None, ...]

    def within(self, rows: Sequence[int], columns: Sequence[int]) -> Tensor | None:
        """Cut what many states side by side have with others, to read only, off that of their group.

        It is ``None`` of a few.
        """
        group = self.layout.group((*rows, *columns))
        if not group:
            return None
        places, start = dict[int, range](), 0
        for state in group:
            places[state] = range(start, start := start + self.layout.dims[state])
        found = self._joint(group)
        for axis, states in ((-2, rows), (-1, columns)):
            runs = list[range]()
            for state in states:
                own = places[state]
                if runs and runs[-1].stop == own.start:
                    own = range(runs.pop().start, own.stop)
                runs.append(own)
            cut = [found.narrow(axis, run.start, len(run)) for run in runs]
            found = cut[0] if len(cut) == 1 else torch.cat(cut, dim=axis)
        return found

    def _joint(self, group: tuple[int, ...]) -> Tensor:
        """Return the covariance of a group, NaN where products are not kept; one stays."""
        if group not in self._joints:
            self._joints.clear()
            dims = [self.layout.dims[state] for state in group]
            joint = self.row.new_full((*self.scale.shape[:-1], sum(dims), sum(dims)), torch.nan)
            cut = [torch.split(rows, dims, dim=-1) for rows in torch.split(joint, dims, dim=-2)]
            for (a, i), (b, j) in itertools.combinations_with_replacement(enumerate(group), 2):
                if (j, i) in self.layout.slices:
                    cut[b][a].copy_(block := self[j, i])
                    if a != b:
                        cut[a][b].copy_(block.mT)
            self._joints[group] = joint
        return self._joints[group]

    @cached_property
    def _joints(self) -> dict[tuple[int, ...], Tensor]:
        return {}

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.layout.pairs)

    def __len__(self) -> int:
        return len(self.layout.pairs)

    def __getitem__(self, pair: tuple[int, int]) -> Tensor:
        i, j = pair
        raw = _read(self.row, self.without, self.layout.slices[pair])
        raw = raw.view(*raw.shape[:-1], self.layout.dims[i], self.layout.dims[j])
        # E[(x - a)(y - b)ᵀ] = E[xyᵀ] - m_x bᵀ - a (m_y - b)ᵀ
        own, about = self.own, self.about
        block = _less_outer(raw, self.scale[..., None], own[i], about[j])
        if about is not own:
            moved = (own[j] - about[j]) * (self.scale > 0)
            block = _less_outer(block, None, about[i], moved)
        rows, columns = self.alive[i], self.alive[j]
        if rows is not None:
            block *= rows[..., None]
        if columns is not None:
            block *= columns[..., None, :]
        return block


def _less_outer(block: Tensor, scale: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Take an outer product, or one of each fold, off a block, in place but where it is scaled."""
    if a.numel() == block.shape[-2]:
        # One matrix: wide ones take as long to pass through as to compute, so both in one go.
        flat, a, b = block.view(block.shape[-2:]), a.reshape(-1), b.reshape(-1)
        if scale is None:
            return flat.addr_(a, b, alpha=-1).view(block.shape)
        return torch.addr(flat, a, b, beta=float(scale), alpha=-1).view(block.shape)
    block = block if scale is None else block * scale
    return block.baddbmm_(a[:, :, None], b[:, None], alpha=-1)


def _read(row: Tensor, without: Tensor | None, place: slice) -> Tensor:
    return row[..., place] if without is None else row[..., place] - without[..., place]


def covariances(
    layout: Layout,
    row: Tensor,
    *,
    about: Sequence[Tensor] | None = None,
    without: Tensor | None = None,
) -> Covariances:
    """Read means and covariances off one row, or off each of several, or one without each of several.

    They are exactly zero for units that only rounding moves.

    Raises:
        ValueError: If squares are beyond double precision.
    """
    count = _read(row, without, slice(0, 1))
    scale = torch.where(count > 0, 1 / count, 0.0)
    dims = layout.dims
    # Of all states at once: what is narrow would take longer to ask for than to compute.
    mean = _read(row, without, slice(1, 1 + sum(dims))) * scale
    square = torch.cat([_read(row, without, place) for place in layout.diagonals], dim=-1) * scale
    if not bool(square.isfinite().all()):
        raise ValueError(
            "states hold values so large that their squares are beyond double precision; scale them "
            "down, below 1e150"
        )
    offset = mean if about is None else torch.cat(tuple(about), dim=-1)
    variance = square - mean * offset
    if about is not None:
        variance = variance - offset * (mean - offset) * (scale > 0)
    alive = variance > (RESOLUTION * square).clamp_min(_LEAST_VARIANCE)
    variance *= alive
    varies: Sequence[Tensor | None] = [None] * len(dims)
    if not bool(alive.all()):
        varies = [None if bool(part.all()) else part for part in alive.split_with_sizes(dims, -1)]
    own, middle = mean.split_with_sizes(dims, -1), offset.split_with_sizes(dims, -1)
    blocks = _Blocks(layout, row, without, scale, own, own if about is None else middle, tuple(varies))
    return Covariances(count[..., 0], middle, variance.split_with_sizes(dims, -1), blocks)
