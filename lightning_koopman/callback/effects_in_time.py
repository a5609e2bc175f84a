"""Measures effects as far as the time that watching may take pays for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from lightning_koopman.callback.budget import Budget
from lightning_koopman.callback.recorded_effects import FEWEST, SAMPLES, measure_effects, passes, pooled
from lightning_koopman.callback.trainer_facts import last_step, refuse_sharded_weights
from lightning_koopman.effects.targets import Fit
from lightning_koopman.measurement.processes import gather
from lightning_koopman.network.access.signals import came_from_signal
from lightning_koopman.network.runs.steps import Step
from lightning_koopman.report.effects import Effects, Kind
from lightning_koopman.report.report import CreditReport

_FEW = 1.0
"""Seconds that effects may take at the end in any case."""


class EffectsInTime:
    """Measures effects for the last report of a training, and for others where there is room.

    Args:
        kinds: Which effects.
        budget: What pays for them.

    Attributes:
        seconds_a_sample: What one sample took in one pass, last time.
    """

    def __init__(self, kinds: Sequence[Kind], budget: Budget) -> None:
        self.kinds, self.budget = tuple(kinds), budget
        self.seconds_a_sample = 0.0

    def of_report(
        self,
        trainer: Any,
        pl_module: Any,
        report: CreditReport | None,
        steps: Sequence[Step] | str,
        around: Callable[[], AbstractContextManager[None]],
        *,
        final: bool,
    ) -> CreditReport | None:
        """Return a report with its effects, or with a note that says why it has none.

        ``steps`` are recorded ones, or why there are none. With several processes, each of them must
        call this, whatever became of its report.
        """
        if not self.kinds:
            return report
        if report is not None:
            self._expect(trainer, report)
        several = trainer.world_size > 1
        if several and not final:
            return report
        asked: list[Fit] = []

        def agree(fit: Fit | None) -> list[Fit]:
            asked.extend(each for each in (gather(fit) if several else [fit]) if each is not None)
            return asked

        effects, why = self._own(trainer, pl_module, report, steps, around, agree, final=final)
        if several:
            if not asked:
                agree(None)
            everybody = [found for found in gather(effects) if found is not None]
            effects = pooled(everybody) if everybody else None
        if report is None or (effects is None and why is None):
            return report
        notes = list(report.notes if effects is None else effects.notes)
        if effects is None:
            notes.append(f"effects were not measured: {why}")
            return replace(report, notes=tuple(notes))
        if effects.n_samples < FEWEST:
            notes.append(
                f"effects rest on {effects.n_samples} samples alone; component_effects measures them on "
                "more"
            )
            effects = replace(effects, notes=tuple(notes))
        return replace(report, effects=effects)

    def _expect(self, trainer: Any, report: CreditReport) -> None:
        """Let the budget keep back what effects will take at the end of a training, at most a third."""
        if trainer.state.fn != "fit":
            return
        taken, last = passes(report, self.kinds) * SAMPLES, last_step(trainer)
        most = self.budget.allowed(trainer.global_step, last) / 3
        self.budget.expect("effects", min(taken * self.seconds_a_sample, most))

    def _own(
        self,
        trainer: Any,
        pl_module: Any,
        report: CreditReport | None,
        steps: Sequence[Step] | str,
        around: Callable[[], AbstractContextManager[None]],
        agree: Callable[[Fit], Sequence[Fit]],
        *,
        final: bool,
    ) -> tuple[Effects | None, str | None]:
        """Measure effects on this process's samples, or say why there are none."""
        if report is None:
            return None, None
        if isinstance(steps, str):
            return None, steps if final else None
        per_sample = max(passes(report, self.kinds) * self.seconds_a_sample, 1e-12)
        if final:
            room = max(self.budget.left("effects"), min(SAMPLES * per_sample, _FEW))
        else:
            room, recorded = self.budget.room("effects"), sum(step.n_samples for step in steps)
            if room < per_sample * max(steps[0].n_samples, min(FEWEST, recorded)):
                return None, None
        start = self.budget.clock()
        with self.budget.apart("effects"):
            try:
                refuse_sharded_weights(trainer)
                found = measure_effects(
                    pl_module,
                    steps,
                    report,
                    self.kinds,
                    around,
                    samples=room / per_sample,
                    agree=agree,
                )
            except Exception as error:
                if came_from_signal(error):
                    raise
                return None, str(error)
        # Known better now than from one step run again.
        taken = found.n_samples * passes(report, self.kinds)
        self.seconds_a_sample = (self.budget.clock() - start) / taken
        self._expect(trainer, report)
        return found, None
