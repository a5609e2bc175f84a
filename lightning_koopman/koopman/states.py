"""Turns rows into state vectors: a frozen POD basis, lifts, a key per sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_koopman.koopman.lifts import Lift, Observables, fit_lift, lifted_by


def sample_keys(rows: Tensor, seed: int = 0) -> Tensor:
    """Hash each row's bits, so that a sample's fold depends on nothing but its content.

    Batch size, order and process do not matter then, and a sample that appears twice (augmentation,
    padding of a distributed sampler) is never held out from its own copy.
    """
    generator = torch.Generator().manual_seed(seed)
    odd = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator) * 2 + 1
    odd = odd.to(rows.device)
    hashed = []
    # Few enough rows at once for the cache.
    for part in torch.split(rows, max(1, 2**16 // max(1, rows.shape[1]))):
        # Adding zero turns -0.0 into 0.0.
        bits = part.to(torch.float64, copy=True).add_(0.0).contiguous().view(torch.int64)
        # Round numbers differ in their leading bits only, which a product alone never carries downward.
        hashed.append(bits.bitwise_xor_(bits >> 32).mul_(odd).sum(dim=1))
    keys = torch.cat(hashed)
    for shift, factor in ((32, -7046029288634856825), (29, -4417276706812531889)):
        keys = (keys ^ (keys >> shift)) * factor
    return (keys >> 16) & (2**40 - 1)


@dataclass(frozen=True)
class Basis:
    """What freezes the coordinates of a chain's state vectors.

    Attributes:
        vectors: POD basis of each state, ``(D_i, d_i)``; ``None`` where the state is kept whole.
        kept_variance: Share of each state's variance that its basis keeps.
        center: Mean of each state in the new coordinates, ``(d_i,)``.
        lifts: What each state is lifted by; empty where none is, or the user's function does it.
    """

    vectors: tuple[Tensor | None, ...]
    kept_variance: tuple[float, ...]
    center: tuple[Tensor, ...]
    lifts: tuple[Lift | None, ...] = ()


def fit_basis(rows: Sequence[Tensor], max_dim: int) -> Basis:
    """Fit the coordinates of every state to some of its rows."""
    fitted = [pod_basis(block, max_dim) for block in rows]
    vectors = tuple(basis for basis, _ in fitted)
    means = (block.mean(dim=0, dtype=torch.float64) for block in rows)
    center = tuple(m if v is None else m @ v for m, v in zip(means, vectors, strict=True))
    return Basis(vectors, tuple(share for _, share in fitted), center)


def projected(rows: Sequence[Tensor], bases: Sequence[Tensor | None]) -> list[Tensor]:
    """Give rows in the coordinates of their bases."""
    return [
        block if basis is None else block @ basis.to(block)
        for block, basis in zip(rows, bases, strict=True)
    ]


def pod_basis(rows: Tensor, max_dim: int) -> tuple[Tensor | None, float]:
    """Find the leading principal directions and the share of variance they keep."""
    n_samples, width = rows.shape
    if width <= max_dim:
        return None, 1.0
    centred = rows.to(torch.float64, copy=True)
    centred -= centred.mean(dim=0)
    # The smaller of the two Gram matrices has the same non-zero spectrum.
    tall = n_samples >= width
    gram = centred.T @ centred if tall else centred @ centred.T
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    kept = min(max_dim, int((values > 1e-12 * values[0]).sum()))
    if kept == 0:
        return torch.eye(width, 1, dtype=torch.float64, device=rows.device), 1.0
    basis = vectors[:, :kept] if tall else centred.T @ (vectors[:, :kept] / values[:kept].sqrt())
    return basis, float(values[:kept].sum() / values.sum())


_MOST_ROWS = 4096
_MOST_VALUES = 2**22
# Rows are gathered until a fold's share of them makes products fast, within this many values in all.


@dataclass(frozen=True)
class Snapshots:
    """State vectors of some samples; they are overwritten when the next ones are asked for.

    Attributes:
        states: x_0 … x_L, each of shape ``(n_samples, d_i)``, same row order.
        keys: One integer a sample, shape ``(n_samples,)``; equal inputs have equal keys.
    """

    states: list[Tensor]
    keys: Tensor


class StateReducer:
    """Streams recorded states into snapshots of at most ``max_dim`` values.

    The first ``2 * max_dim`` samples fix, for every wider state, an orthonormal POD basis that stays
    frozen; all later samples are projected on it. Rows are gathered until the products over them
    are large enough to be fast, so memory is bounded by a fixed number of samples.
    """

    def __init__(
        self,
        max_dim: int = 256,
        *,
        seed: int = 0,
        hold: bool = False,
        observables: Observables = None,
    ) -> None:
        if max_dim < 1:
            raise ValueError(f"max_dim is {max_dim}; a state vector needs at least one value")
        self.max_dim = max_dim
        self.names: tuple[str, ...] = ()
        self.kept_variance: tuple[float, ...] = ()
        self.center: list[Tensor] = []
        self._bases: list[Tensor | None] = []
        self._first: list[list[Tensor]] = []
        self._block: list[Tensor] = []
        self._rows = 0
        self._batches = 0
        self._widths: dict[str, int] = {}
        self._seed = seed
        self._hold = hold
        self._observables = observables
        self._lifts: list[Lift | None] = []

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the states before reduction, known from the first batch on."""
        return tuple(self._widths.values())

    @property
    def waits(self) -> bool:
        """Whether rows are held until a basis is agreed on."""
        fitted = isinstance(self._observables, str) or any(w > self.max_dim for w in self.widths)
        return self._hold and not self.center and fitted

    @property
    def dims(self) -> tuple[int, ...]:
        """Widths of the state vectors, known once the bases are fixed."""
        return tuple(center.shape[0] for center in self.center)

    def push(self, states: Mapping[str, Tensor], most: int | None = None) -> Iterator[Snapshots]:
        """Take one batch of pooled states."""
        batch, self._batches = self._batches, self._batches + 1
        self._check(states, batch)
        if most == 0:
            return
        yield from self._gather([rows[:most] for rows in states.values()])

    def _gather(self, rows: list[Tensor]) -> Iterator[Snapshots]:
        """Add rows to those that wait for company."""
        if self.waits:
            self._first.append(rows)
            return
        while len(rows[0]):
            size = len(self._block[0]) if self._block else self._size
            count = min(size - self._rows, len(rows[0]))
            taken, rows = [part[:count] for part in rows], [part[count:] for part in rows]
            if self.center:
                if not self._block:
                    # Once and for all in the type of the rows.
                    self._bases = [
                        basis if basis is None else basis.to(part)
                        for basis, part in zip(self._bases, taken, strict=True)
                    ]
                # Wide rows do not wait: what is gathered are states, and the input that tells the folds.
                taken = [taken[0], *projected(taken, self._bases)]
            if not self._block:
                self._block = [part.new_empty(size, part.shape[1]) for part in taken]
            for block, part in zip(self._block, taken, strict=True):
                block[self._rows : self._rows + count] = part
            self._rows += count
            if self._rows == size:
                yield self._hand_over()

    @property
    def _size(self) -> int:
        """Number of rows gathered before products over them are taken."""
        first = 2 * self.max_dim
        if not self.center:
            return first
        return max(first, min(_MOST_ROWS, _MOST_VALUES // (self.widths[0] + sum(self.dims))))

    def _hand_over(self) -> Snapshots:
        rows, self._rows = [block[: self._rows] for block in self._block], 0
        if self.center:
            return self._reduced(rows)
        self._block = []
        return self._reduced([rows[0], *self._start(rows)])

    def _start(self, rows: list[Tensor]) -> list[Tensor]:
        """Freeze the bases that fit the first rows, and give these rows in them."""
        self.fix(self.fitted(rows))
        return projected(rows, self._bases)

    def flush(self) -> Iterator[Snapshots]:
        """Hand over what is still gathered."""
        held, self._first = self._first, []
        if held and not self.center:
            rows, held = _split_rows(held, 2 * self.max_dim)
            yield self._reduced([rows[0], *self._start(rows)])
        # Held by processes that first agreed on a basis.
        for later in held:
            yield from self._gather(later)
        if self._rows:
            yield self._hand_over()
        self._block = []

    def first_rows(self, count: int) -> list[Tensor]:
        """Copy the first rows that are gathered and not yet handed over."""
        return _split_rows(self._first, count)[0]

    def expect(self, names: Sequence[str], widths: Sequence[int]) -> None:
        """Learn from elsewhere which states arrive, where no batch told."""
        self.names = tuple(names)
        self._widths = dict(zip(names, widths, strict=True))

    def fix(self, basis: Basis) -> None:
        """Freeze bases and centres that were fitted elsewhere."""
        self._bases = list(basis.vectors)
        self._lifts = list(basis.lifts)
        self.kept_variance, self.center = basis.kept_variance, list(basis.center)

    def _check(self, states: Mapping[str, Tensor], batch: int) -> None:
        names = tuple(states)
        if not self.names:
            self.names = names
            self._widths = {name: rows.shape[1] for name, rows in states.items()}
        if names != self.names:
            odd = sorted(set(names) ^ set(self.names)) or list(names)
            raise ValueError(
                f"batch {batch} ran the components {names}, the batches before it {self.names} "
                f"(difference: {odd}). Choose components that run in every pass with components=[...]."
            )
        n_samples = next(iter(states.values())).shape[0]
        for name, rows in states.items():
            if rows.shape[0] != n_samples:
                raise ValueError(
                    f"component {name!r} gave {rows.shape[0]} rows in batch {batch}, but {names[0]!r} "
                    f"has {n_samples}. Rows are samples: axis 0 must be the batch axis."
                )
            if rows.shape[1] != self._widths[name]:
                raise ValueError(
                    f"component {name!r} gave {rows.shape[1]} values a sample in batch {batch}, but "
                    f"{self._widths[name]} before. Bring the samples to one size."
                )
        # A finite sum has finite terms, and is found faster.
        first = next(iter(states.values()))
        sums = torch.stack([rows.sum().to(first) for rows in states.values()])
        if all(map(math.isfinite, sums.tolist())):
            return
        for name, rows in states.items():
            if not bool(torch.isfinite(rows).all()):
                kind = "NaN" if bool(torch.isnan(rows).any()) else "infinity"
                raise ValueError(
                    f"component {name!r} gave {kind} in batch {batch}. Find the sample or the layer "
                    "with torch.autograd.set_detect_anomaly(True), or leave the batch out."
                )

    def fitted(self, rows: Sequence[Tensor]) -> Basis:
        """Fit bases, lifts and centres to some rows, without freezing them here."""
        basis = fit_basis(rows, self.max_dim)
        if self._observables is None:
            return basis
        states = [state.double() for state in projected(rows, basis.vectors)]
        lifts: list[Lift | None] = [None] * len(states)
        if isinstance(self._observables, str):
            kind = self._observables
            lifts[:-1] = [fit_lift(s, kind, self.max_dim, seed=self._seed) for s in states[:-1]]
        center = tuple(state.mean(dim=0) for state in self._lifted(states, lifts))
        return replace(basis, center=center, lifts=tuple(lifts))

    def _lifted(self, states: list[Tensor], lifts: Sequence[Lift | None]) -> list[Tensor]:
        if self._observables is None:
            return states
        lifted, last = [], len(self.names) - 1
        for i, state in enumerate(states):
            if callable(self._observables) and i < last:
                lifted.append(lifted_by(self._observables, state.double()))
            else:
                lift = lifts[i]
                lifted.append(state.double() if lift is None else lift(state.double()))
        return lifted

    def _reduced(self, rows: list[Tensor]) -> Snapshots:
        keys = sample_keys(rows[0], self._seed)
        return Snapshots(self._lifted(rows[1:], self._lifts), keys)


def _split_rows(batches: list[list[Tensor]], count: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Cut the first ``count`` rows off a list of batches of states."""
    taken: list[list[Tensor]] = []
    rest = list(batches)
    while rest and count > 0:
        batch = rest.pop(0)
        if batch[0].shape[0] > count:
            rest.insert(0, [rows[count:] for rows in batch])
        taken.append([rows[:count] for rows in batch])
        count -= taken[-1][0].shape[0]
    return [torch.cat(rows) for rows in zip(*taken, strict=True)], rest
