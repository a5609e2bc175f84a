"""Adds up the states of all samples, here and in other processes, and reports on them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.koopman.lifts import Observables
from lightning_koopman.koopman.moments import recentred
from lightning_koopman.koopman.states import Snapshots, StateReducer
from lightning_koopman.measurement.metric import KoopmanCredit
from lightning_koopman.measurement.processes import Share, agree_on_basis, agreed, sum_moments
from lightning_koopman.report.report import CreditReport


class Accumulator:
    """Rows of every state in, moments kept, a report out.

    Attributes:
        n_seen: Samples that arrived so far.
        n_samples: Samples taken so far, at most ``max_samples``.
        seconds: Time spent so far.
    """

    def __init__(
        self,
        *,
        max_dim: int,
        max_samples: int | None = None,
        hold: bool = False,
        observables: Observables = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        # Made and thrown away: its checks belong before the first batch, not behind the last.
        KoopmanCredit(seed=seed, **options)
        self.n_seen = 0
        self.n_samples = 0
        self.seconds = 0.0
        self._max_samples = max_samples
        self._reducer = StateReducer(max_dim, seed=seed, hold=hold, observables=observables)
        self._options = options | {"seed": seed}
        self._metric: KoopmanCredit | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the states, known from the first batch on."""
        return self._reducer.names

    def settle(self, links: tuple[tuple[int, ...], ...]) -> None:
        """Learn how the states are linked, before the first batch."""
        if links:
            self._options["links"] = links

    def push(self, rows: Mapping[str, Tensor]) -> None:
        """Add one batch."""
        arrived = next(iter(rows.values())).shape[0]
        room = arrived if self._max_samples is None else self._max_samples - self.n_samples
        most = min(arrived, max(0, room))
        self.take(self._reducer.push(rows, most))
        self.n_seen += arrived
        self.n_samples += most

    def flush(self) -> None:
        """Take what is still gathered."""
        self.take(self._reducer.flush())

    def take(self, ready: Iterator[Snapshots]) -> None:
        """Add snapshots to the moments."""
        start = time.perf_counter()
        for snapshots in ready:
            if self._metric is None:
                self._metric = KoopmanCredit(
                    self._reducer.names[1:],
                    dims=self._reducer.dims,
                    center=self._reducer.center,
                    **self._options,
                ).to(snapshots.keys.device)
            self._metric.update(snapshots.states, snapshots.keys)
        self.seconds += time.perf_counter() - start

    def share(self) -> Share:
        """Tell what the other processes must know of this one's samples."""
        if not self._reducer.waits:
            self.flush()
        return Share(
            self._reducer.names,
            self._reducer.widths,
            self.n_samples,
            tuple(offset.cpu() for offset in self._reducer.center),
            links=self._options.get("links", ()),
        )

    def merge(self, shares: Sequence[Share], device: torch.device) -> None:
        """Add up the samples of all processes; collectives that each of them must join."""
        common, reducer, error = agreed(shares), self._reducer, None
        own = tuple(offset.cpu() for offset in reducer.center)
        reducer.expect(common.names, common.widths)
        self.settle(common.links)
        if not common.center:
            reducer.fix(agree_on_basis(reducer.first_rows, shares, reducer.max_dim, reducer.fitted))
            try:
                self.flush()
            except Exception as failure:
                error = failure
        start = time.perf_counter()
        self._sum_up(common.center or tuple(reducer.center), own, device, error)
        self.seconds += time.perf_counter() - start

    def _sum_up(
        self,
        center: tuple[Tensor, ...],
        own: tuple[Tensor, ...],
        device: torch.device,
        error: Exception | None,
    ) -> None:
        """Move this process's moments to the common centre and add all of them up."""
        dims = tuple(offset.shape[0] for offset in center)
        names, options = self._reducer.names[1:], self._options
        whole = KoopmanCredit(names, dims=dims, center=center, **options).to(device)
        assert whole.layout is not None
        moments = whole.moments
        try:
            if self._metric is not None:
                moments = self._metric.moments.to(device)
            if own and self._metric is not None:
                shifts = [(a - b).to(moments) for a, b in zip(own, center, strict=True)]
                moments = recentred(whole.layout, moments, shifts)
        except Exception as failure:
            # The others wait in the sum, and hear of it there.
            moments, error = whole.moments, error or failure
        whole.moments = sum_moments(moments, error)
        if not self._reducer.kept_variance:
            self._reducer.kept_variance = (1.0,) * len(dims)
        self._metric = whole

    def report(self, notes: Sequence[str], *, step: int | None = None) -> CreditReport:
        """Finish and compute the report."""
        self.flush()
        if self._metric is None:
            raise ValueError("no sample arrived: the batches were empty")
        start = time.perf_counter()
        kept = self._reducer.kept_variance[1:]
        report = self._metric.report(variance_kept=kept, notes=notes, step=step)
        self.seconds += time.perf_counter() - start
        assert self._metric.layout is not None
        parents = self._metric.layout.parents
        names = self._reducer.names
        reads = {name: tuple(names[p] for p in parents[i]) for i, name in enumerate(names) if i}
        return replace(report, reads=reads)
