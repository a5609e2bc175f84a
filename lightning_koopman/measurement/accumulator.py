"""Rows of every state in, moments kept, a report out; over the samples of one process or of all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_koopman.koopman.credit import samples_needed
from lightning_koopman.koopman.moments import recentred
from lightning_koopman.koopman.options import Options
from lightning_koopman.koopman.states import Basis, fit_basis, sample_keys, split_rows, widest
from lightning_koopman.measurement.metric import KoopmanCredit
from lightning_koopman.measurement.processes import Share, agree_on_basis, agreed, sum_moments
from lightning_koopman.report.report import CreditReport

_MOST_ROWS = 4096
_MOST_VALUES = 2**22
# Rows are gathered until a fold's share of them makes products fast, within this many values in all.


class Accumulator:
    """Rows of every state in, moments kept, a report out.

    The first ``2 * max_dim`` samples fix, for every wider state, an orthonormal POD basis that stays
    frozen; all later samples are projected on it. Rows are gathered until the products over them are
    large enough to be fast, so memory is bounded by a fixed number of samples. Where processes share the
    samples and must agree on one basis first, all rows are held until :meth:`merge`.

    Attributes:
        names: Names of the states, known from the first batch on.
        widths: Their widths before reduction.
        links: For each step, the states it reads; empty where each reads the one before it.
        basis: The frozen coordinates of the state vectors.
        n_seen: Samples that arrived so far.
        n_samples: Samples taken so far, at most ``max_samples``.
    """

    def __init__(
        self, options: Options, *, max_samples: int | None = None, shared: bool = False
    ) -> None:
        self.options = options
        self.names: tuple[str, ...] = ()
        self.widths: tuple[int, ...] = ()
        self.links: tuple[tuple[int, ...], ...] = ()
        self.basis: Basis | None = None
        self.n_seen = self.n_samples = 0
        self._max_samples, self._shared = max_samples, shared
        self._metric: KoopmanCredit | None = None
        self._held: list[list[Tensor]] = []
        self._block: list[Tensor] = []
        self._filled = self._batches = 0

    @property
    def waits(self) -> bool:
        """Whether rows are held until a basis is agreed on."""
        max_dim, lift = self.options.max_dim, self.options.observables
        fitted = isinstance(lift, str) or any(width > max_dim for width in self.widths)
        return self._shared and self.basis is None and fitted

    def push(self, rows: Mapping[str, Tensor]) -> None:
        """Add one batch of rows by state, each ``(n_samples, D_i)``, in the order of the chain."""
        batch, self._batches = self._batches, self._batches + 1
        self._check(rows, batch)
        arrived = next(iter(rows.values())).shape[0]
        room = arrived if self._max_samples is None else self._max_samples - self.n_samples
        taken = min(arrived, max(0, room))
        if taken:
            self._gather([block[:taken] for block in rows.values()])
        self.n_seen += arrived
        self.n_samples += taken

    def flush(self) -> None:
        """Add up what is still gathered."""
        held, self._held = self._held, []
        if held and self.basis is None:
            rows, held = split_rows(held, 2 * self.options.max_dim)
            self._add(rows)
        # Held by processes that first agreed on a basis.
        for later in held:
            self._gather(later)
        if self._filled:
            self._add([block[: self._filled] for block in self._block])
        self._block, self._filled = [], 0

    def _new_metric(self, center: Sequence[Tensor]) -> KoopmanCredit:
        options = self.options
        return KoopmanCredit(
            self.names[1:],
            dims=[len(offset) for offset in center],
            center=center,
            links=self.links or None,
            rank=options.rank,
            tikhonov=options.tikhonov,
            normalize=options.normalize,
            targets=options.targets,
            # Links name all that a step reads: branches side by side do not read one another.
            delay=0 if self.links and options.delay == 1 else options.delay,
            folds=options.folds,
            seed=options.seed,
            sync_on_compute=False,
        )

    def _gather(self, rows: list[Tensor]) -> None:
        """Add rows to those that wait for company."""
        if self.waits:
            self._held.append(rows)
            return
        while len(rows[0]):
            size = len(self._block[0]) if self._block else self._block_size
            count = min(size - self._filled, len(rows[0]))
            taken, rows = [part[:count] for part in rows], [part[count:] for part in rows]
            if self.basis is not None:
                if not self._block:
                    self.basis = self.basis.like(taken)
                # Wide rows do not wait: what is gathered are states, and the input that tells the folds.
                taken = [taken[0], *self.basis.project(taken)]
            if not self._block:
                self._block = [part.new_empty(size, part.shape[1]) for part in taken]
            for block, part in zip(self._block, taken, strict=True):
                block[self._filled : self._filled + count] = part
            self._filled += count
            if self._filled == size:
                full, self._filled = self._block, 0
                if self.basis is None:
                    self._block = []
                self._add(full)

    @property
    def _block_size(self) -> int:
        """Number of rows gathered before products over them are taken."""
        first = 2 * self.options.max_dim
        if self.basis is None:
            return first
        values = self.widths[0] + sum(len(offset) for offset in self.basis.center)
        return max(first, min(_MOST_ROWS, _MOST_VALUES // values))

    def _fit_basis(self, rows: list[Tensor]) -> Basis:
        options = self.options
        return fit_basis(rows, options.max_dim, options.observables, options.seed)

    def _add(self, rows: list[Tensor]) -> None:
        """Add up rows as state vectors; the first freeze the basis, later ones are in it already."""
        if self.basis is None:
            self.basis = self._fit_basis(rows)
            rows = [rows[0], *self.basis.project(rows)]
        keys = sample_keys(rows[0], self.options.seed)
        if self._metric is None:
            self._metric = self._new_metric(self.basis.center).to(keys.device)
        self._metric.update(self.basis.lift(rows[1:], self.options.observables), keys)

    def _check(self, rows: Mapping[str, Tensor], batch: int) -> None:
        names = tuple(rows)
        if not self.names:
            self.names = names
            self.widths = tuple(block.shape[1] for block in rows.values())
        if names != self.names:
            odd = sorted(set(names) ^ set(self.names)) or list(names)
            raise ValueError(
                f"batch {batch} ran the components {names}, the batches before it {self.names} "
                f"(difference: {odd}). Choose components that run in every pass with components=[...]."
            )
        n_samples = next(iter(rows.values())).shape[0]
        for (name, block), width in zip(rows.items(), self.widths, strict=True):
            if block.shape[0] != n_samples:
                raise ValueError(
                    f"component {name!r} gave {block.shape[0]} rows in batch {batch}, but {names[0]!r} "
                    f"has {n_samples}. Rows are samples: axis 0 must be the batch axis."
                )
            if block.shape[1] != width:
                raise ValueError(
                    f"component {name!r} gave {block.shape[1]} values per sample in batch {batch}, but "
                    f"{width} before. Bring the samples to one size."
                )
        if all_finite(list(rows.values())):
            return
        for name, block in rows.items():
            if not bool(torch.isfinite(block).all()):
                kind = "NaN" if bool(torch.isnan(block).any()) else "infinity"
                raise ValueError(
                    f"component {name!r} gave {kind} in batch {batch}. Find the sample or the layer "
                    "with torch.autograd.set_detect_anomaly(True), or leave the batch out."
                )

    def share(self) -> Share:
        """Return what the other processes must know of this one's samples."""
        if not self.waits:
            self.flush()
        center = () if self.basis is None else self.basis.center
        offsets = tuple(offset.cpu() for offset in center)
        return Share(self.names, self.widths, self.n_samples, offsets, links=self.links)

    def first_rows(self, count: int) -> list[Tensor]:
        """Copy the first rows that are held, at most ``count``, one block per state."""
        return split_rows(self._held, count)[0]

    def merge(self, shares: Sequence[Share], device: torch.device) -> None:
        """Add up the samples of all processes; collectives that each of them must join."""
        common, error = agreed(shares), None
        own = None if self.basis is None else [offset.cpu() for offset in self.basis.center]
        self.names, self.widths, self.links = common.names, common.widths, common.links
        center = common.center
        if not center:
            max_dim = self.options.max_dim
            self.basis = agree_on_basis(self.first_rows, shares, max_dim, self._fit_basis)
            center = self.basis.center
            try:
                self.flush()
            except Exception as failure:
                error = failure
        merged = self._new_metric(center).to(device)
        assert merged.layout is not None
        moments = merged.moments
        try:
            if self._metric is not None:
                moments = self._metric.moments.to(device)
                if own is not None:
                    shifts = [(a - b).to(moments) for a, b in zip(own, center, strict=True)]
                    moments = recentred(merged.layout, moments, shifts)
        except Exception as failure:
            # The others wait in the sum, and hear of it there.
            moments, error = merged.moments, error or failure
        merged.moments = sum_moments(moments, error)
        if self.basis is None:
            self.basis = Basis((None,) * len(center), (1.0,) * len(center), center)
        self._metric = merged

    def credits(self, notes: Sequence[str], *, step: int | None = None) -> CreditReport:
        """Return the report, with the states that each component reads."""
        self.flush()
        if self._metric is None or self.basis is None:
            raise ValueError("no sample arrived: the batches were empty")
        kept, layout, options = self.basis.kept_variance[1:], self._metric.layout, self.options
        assert layout is not None
        # Few samples make narrow states: as many as those need would be few again.
        dims = widest(self.widths, layout.dims, options.max_dim, options.observables)
        enough = samples_needed(replace(layout, dims=dims))
        report = self._metric.report(variance_kept=kept, notes=notes, step=step, enough=enough)
        parents, names = layout.parents, self.names
        reads = {name: tuple(names[p] for p in parents[i]) for i, name in enumerate(names) if i}
        return replace(report, reads=reads)


def all_finite(blocks: Sequence[Tensor]) -> bool:
    """Check whether all values are finite; a finite sum has finite terms, and is found faster."""
    sums = torch.stack([block.sum().to(blocks[0]) for block in blocks])
    return all(map(math.isfinite, sums.tolist()))
