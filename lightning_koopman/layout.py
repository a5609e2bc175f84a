"""Where each moment of a chain of states lies in one flat row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where each moment of a chain of states lies in one flat row.

    Kept are the sums of every state, the products of every state with itself, with the states that its
    step reads and with the last one, and the products of all states that are read at the same time.

    Attributes:
        dims: Widths d_0 … d_L of the states.
        folds: Number of folds, one row each.
        delay: How many states before it each step reads at least.
        links: For each step i = 1 … L, further earlier states that it reads; empty means none.
        reach: Keep what every delay up to this one needs, so that :func:`dataclasses.replace` may change
            ``delay`` later on the same moments.
        squares: States that no step reads, of whose products with themselves the diagonal alone is kept.
    """

    dims: tuple[int, ...]
    folds: int
    delay: int = 1
    links: tuple[tuple[int, ...], ...] = ()
    reach: int = 1
    squares: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.dims) < 2:
            raise ValueError(
                f"{len(self.dims)} state arrived; an operator needs two, the state before a component "
                "and the state after it"
            )
        if self.folds < 2:
            raise ValueError(f"folds is {self.folds}; held-out R² needs at least 2")
        if not 1 <= self.delay < len(self.dims):
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
    def parents(self) -> tuple[tuple[int, ...], ...]:
        """For each state 0 … L, the states that its step reads, the nearest first."""
        return self._reading(self.delay)

    def _reading(self, delay: int) -> tuple[tuple[int, ...], ...]:
        read = [set(range(max(0, i - delay), i)) for i in range(len(self.dims))]
        for i, links in enumerate(self.links, start=1):
            read[i].update(links)
        return tuple(tuple(sorted(states, reverse=True)) for states in read)

    @cached_property
    def _most_read(self) -> tuple[tuple[int, ...], ...]:
        return self._reading(max(self.delay, self.reach))

    @cached_property
    def live(self) -> tuple[tuple[int, ...], ...]:
        """For each state i, the states up to it that a step behind it may read, the nearest first."""
        last = len(self.dims) - 1
        return (
            *(
                tuple(sorted({p for c in self._most_read[i + 1 :] for p in c if p <= i}, reverse=True))
                for i in range(last)
            ),
            (last,),
        )

    @cached_property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Index pairs i ≤ j whose products are kept."""
        last = len(self.dims) - 1
        kept = {(i, i) for i in range(last + 1)} | {(i, last) for i in range(last + 1)}
        kept |= {(p, i) for i, read in enumerate(self._most_read) for p in read}
        kept |= {(p, q) for states in self.live for p in states for q in states if p <= q}
        return tuple(sorted(kept))

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

    @property
    def size(self) -> int:
        """Length of a row: one count, then sums, then products."""
        return int(self.slices[self.pairs[-1]].stop)

    def zeros(self) -> Tensor:
        """Make empty moments.

        Returns:
            Zeros of shape ``(folds, size)``, float64.
        """
        return torch.zeros(self.folds, self.size, dtype=torch.float64)
