"""Which samples of the loaders a measurement takes in this process."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lightning_koopman.callback.trainer_facts import (
    data_part,
    is_dealt_out,
    samples_for_rank,
    unrepeated_samples,
    validation_batches,
)
from lightning_koopman.measurement.measurement import Measurement
from lightning_koopman.network.runs.samples import spread_over

HELD_BYTES = 2**27
"""Rows that a measurement holds, at most, until bases are fitted to samples from everywhere in them."""


@dataclass
class WatchedSamples:
    """Counts samples, and knows which of several loaders is watched.

    Attributes:
        most: Samples behind which nothing more is taken. All processes stop at the same batch, or a
            model that talks to its other copies would wait forever.
        counted: How many of them count in this process, repeats aside.
        unrepeated: How many a loader gives before its sampler begins to repeat some.
        loader: Number of the loader that is watched, ``None`` until one gives a batch.
        others: Whether other loaders gave batches.
        left_out: Whether a batch was watched in which no component ran.
        chosen: Numbers of the batches that are watched, from everywhere in the data, which may come
            sorted; ``None`` for all, as far as samples are wanted.
    """

    most: int = 0
    counted: int = 0
    unrepeated: int = 0
    batch_rows: int = 1
    loader: int | None = None
    others: bool = False
    left_out: bool = False
    chosen: Collection[int] | None = None

    @staticmethod
    def of(
        trainer: Any, loader: Any, most: int, *, like: WatchedSamples | None = None
    ) -> WatchedSamples:
        """Find this process's share of the samples of a loader, ``most`` over all processes.

        Samples that are run again are ``like`` those that were recorded.
        """
        part = data_part(trainer)
        if like is None:
            # All processes watch the same loader, also where the first gives this one nothing.
            watched = 0 if trainer.world_size > 1 else None
            like = WatchedSamples(unrepeated=unrepeated_samples(loader), loader=watched)
        own = min(samples_for_rank(most, part.count, part.index), like.unrepeated)
        rows, most = getattr(loader, "batch_size", None) or 1, samples_for_rank(most, part.count)
        needed, there, chosen = math.ceil(most / rows), validation_batches(trainer), None
        # Processes that are not dealt samples out may have unlike numbers of batches.
        if needed < there < math.inf and (part.count == 1 or is_dealt_out(loader)):
            chosen = frozenset(spread_over(needed, int(there)))
        return WatchedSamples(
            most=most,
            counted=own if part.counts else 0,
            unrepeated=like.unrepeated,
            batch_rows=rows,
            loader=like.loader,
            others=like.others,
            chosen=chosen,
        )

    def takes(self, loader: int, batch: int) -> bool:
        """Check whether a batch is watched: chosen of the first loader that gives one."""
        if self.loader is None:
            self.loader = loader
        self.others = self.others or loader != self.loader
        return loader == self.loader and (self.chosen is None or batch in self.chosen)

    def leave_out(self, measurement: Measurement) -> None:
        """Leave a batch out in which no component ran."""
        self.left_out = True
        # Where a sampler begins to repeat samples, as many fewer have come.
        self.unrepeated -= self.batch_rows
        if measurement.max_samples is not None:
            most = min(measurement.max_samples, self.unrepeated)
            measurement.max_samples = max(most, measurement.n_samples)
