"""One process's measurement inside a Trainer, from the first batch to the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_koopman.callback.trainer_facts import data_part, plain_numerics, share, unrepeated_samples
from lightning_koopman.measurement.measurement import Measurement, merge_processes
from lightning_koopman.network.forward_runner import ForwardFn, default_forward
from lightning_koopman.network.isolation import is_compiled


class Session:
    """The measurement under way in a process, if there is one, and what the process owes the others.

    Attributes:
        measurement: The measurement under way.
        owes_exchange: Whether the other processes wait for this one at the end of the epoch.
        rides_along: Whether Lightning's own forward pass is watched; otherwise each batch runs again.
    """

    def __init__(
        self,
        components: Any,
        *,
        max_samples: int,
        forward_fn: ForwardFn | None,
        options: Mapping[str, Any],
    ) -> None:
        self.measurement: Measurement | None = None
        self.owes_exchange = False
        self.rides_along = True
        self._components = components
        self._max_samples = max_samples
        self._forward_fn = forward_fn
        self._options = options
        self._most_seen = 0
        self._failure: Exception | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is under way and nobody waits."""
        return self.measurement is None and not self.owes_exchange

    @property
    def wants_more(self) -> bool:
        """Whether a measurement is under way that has not seen its samples yet."""
        return self.measurement is not None and self.measurement.n_seen < self._most_seen

    def begin(self, trainer: Any, pl_module: Any, loader: Any) -> None:
        """Start measuring this process's share of the samples that a loader gives."""
        self.owes_exchange = trainer.world_size > 1
        self.rides_along = not is_compiled(pl_module)
        part = data_part(trainer)
        # All stop at the same batch, or a model that talks to its other copies would wait forever.
        self._most_seen = share(self._max_samples, part.count)
        own = min(share(self._max_samples, part.count, part.index), unrepeated_samples(loader))
        with plain_numerics(pl_module):
            self.measurement = Measurement(
                pl_module,
                self._components,
                max_samples=own if part.counts else 0,
                hold=trainer.world_size > 1,
                sync_on_compute=False,
                **self._options,
            )

    def start_batch(self, batch: Any) -> None:
        """Put the hooks on for one batch, where they ride along."""
        if self.measurement is not None and self.rides_along:
            self.measurement.start_pass(batch)
            self.measurement.capture.__enter__()

    def end_batch(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        """Take the hooks off and add up what they saw, or run the batch again."""
        if not self.rides_along:
            self.run(trainer, pl_module, [batch])
            return
        assert self.measurement is not None
        self.measurement.capture.remove()
        with plain_numerics(pl_module):
            self.measurement.end_pass()

    def run(self, trainer: Any, pl_module: Any, batches: Iterable[Any]) -> None:
        """Run batches once more, as Lightning would, but eagerly and in eval mode."""
        assert self.measurement is not None
        precision = trainer.precision_plugin

        def forward(model: nn.Module, batch: Any) -> None:
            batch = precision.convert_input(trainer.strategy.batch_to_device(batch, pl_module.device))
            with precision.forward_context():
                (self._forward_fn or default_forward)(model, batch)

        def wanted() -> Iterable[Any]:
            for batch in batches:
                if not self.wants_more:
                    return
                yield batch

        self.measurement.run(pl_module, wanted(), forward)

    def finish(self, pl_module: Any) -> Measurement:
        """End the measurement; every process of the run must call this."""
        measurement, failure, owes_exchange = self.measurement, self._failure, self.owes_exchange
        self.forget()
        if owes_exchange:
            merge_processes(measurement, pl_module.device, failure)
        assert measurement is not None
        return measurement

    def fail(self, error: Exception) -> None:
        """Take the hooks off and remember an error that the other processes must hear of."""
        self._give_up()
        self._failure = error

    def forget(self) -> None:
        """Give up the measurement under way, hooks first."""
        self._give_up()
        self.owes_exchange, self._failure = False, None

    def _give_up(self) -> None:
        if self.measurement is not None:
            self.measurement.capture.remove()
            self.measurement = None
