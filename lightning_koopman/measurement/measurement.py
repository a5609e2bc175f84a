"""One report in the making: forward passes in, a report out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.koopman.lifts import Observables, check_observables
from lightning_koopman.measurement.accumulator import Accumulator
from lightning_koopman.measurement.processes import Share, agreed, exchange
from lightning_koopman.network.capture import Capture
from lightning_koopman.network.components import Components
from lightning_koopman.network.forward_runner import ForwardFn, default_forward, to_device
from lightning_koopman.network.isolation import undisturbed
from lightning_koopman.network.plan import Plan, in_a_row, make_plan
from lightning_koopman.network.recorder import INPUT, OUTPUT, Recorded
from lightning_koopman.network.rows import ReduceOption, check_reduce, valid_positions
from lightning_koopman.network.tensors import detached_copy, exact_device, exactly
from lightning_koopman.report.report import CreditReport


class Measurement:
    """One report in the making: forward passes in, rows of states passed on, a report out.

    Attributes:
        capture: The hooks; enter it around a forward pass, then call :meth:`end_pass`.
        accumulator: What the rows of all passes are added up in.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Components | Sequence[Components] | None = None,
        *,
        max_dim: int = 256,
        max_samples: int | None = None,
        hold: bool = False,
        reduce: ReduceOption = "pool",
        output: str | Callable[[Any], Any] | None = None,
        observables: Observables = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.accumulator = Accumulator(
            max_dim=max_dim,
            max_samples=max_samples,
            hold=hold,
            observables=observables,
            seed=seed,
            **options,
        )
        check_reduce(reduce)
        check_observables(observables)
        self.capture = Capture(
            model,
            components,
            keep=self._keep,
            output=None if callable(output) else output,
            follow=True,
        )
        self.plan: Plan | None = None
        self._reduce = reduce
        self._max_dim = max_dim
        self._valid: Tensor | None = None
        self._batch: Any = None
        self._seconds = 0.0
        self._observables = observables
        self._silent: list[str] = []
        self._skipped: list[str] = []
        self._untraced: str | None = None
        self._passes = 0
        self._named = components is not None
        self._output = output

    @property
    def n_seen(self) -> int:
        """Samples that arrived so far."""
        return self.accumulator.n_seen

    @property
    def seconds(self) -> float:
        """Time spent so far on everything but the forward passes themselves."""
        return self._seconds + self.accumulator.seconds

    def run(self, model: nn.Module, batches: Iterable[Any], forward_fn: ForwardFn | None = None) -> None:
        """Send batches through a model that is left exactly as it was found."""
        forward = default_forward if forward_fn is None else forward_fn
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with undisturbed(model, batches), self.capture:
            for batch in batches:
                given = to_device(batch, device)
                self.start_pass(given)
                self.record_output(forward(model, given))
                self.end_pass()

    def start_pass(self, batch: Any = None) -> None:
        """Get ready for a forward pass."""
        self._batch, self._valid = batch, valid_positions(batch)
        self.capture.start_pass(batch)

    def record_output(self, given: Any) -> None:
        """Record what the whole pass gave, where that is the output of interest."""
        if callable(self._output):
            self.capture.record_end(self._output(given))

    def end_pass(self) -> None:
        """Take what the capture recorded in the pass that just ended."""
        self._silent, self._skipped = self.capture.silent, self.capture.skipped
        states = self.capture.end_pass()
        if len(states) < 2:
            raise ValueError(
                f"no component ran in the forward pass; chosen were {list(self.capture.components)}. "
                "Check forward_fn, or name modules that the pass calls with components=[...]."
            )
        start = time.perf_counter()
        if self.plan is None:
            records = list(states.values())
            if (error := self.capture.untraced) is not None:
                records = in_a_row(records)
                self._untraced = (
                    f"the data could not be followed ({type(error).__name__}: {error}), so each is "
                    "taken to read what ran right before it"
                )
            self.plan = make_plan(
                records,
                batch=self._batch,
                end=OUTPUT if callable(self._output) else self.capture.end,
                named=self._named,
                reduce=self._reduce,
                max_dim=self._max_dim,
            )
            links = self.plan.links
            if any(read != (i,) for i, read in enumerate(links)):
                self.accumulator.settle(links=links)
            kept = self.plan.recorded
            states = {r.name: self._rows(r.tensor, r) for r in states.values() if r.name in kept}
        rows = self.plan.join(states, self._passes)
        self._passes += 1
        self._seconds += time.perf_counter() - start
        self.accumulator.push(rows)

    def _keep(self, tensor: Tensor, recorded: Recorded) -> Any:
        if self.plan is None:
            # Which form the rows take is settled once the whole first pass is known.
            return dataclasses.replace(recorded, tensor=detached_copy(tensor))
        start = time.perf_counter()
        rows = self._rows(tensor, recorded)
        self._seconds += time.perf_counter() - start
        return rows

    def _rows(self, tensor: Tensor, recorded: Recorded) -> Tensor | None:
        assert self.plan is not None
        if recorded.name not in self.plan.recorded:
            return None
        valid = self._valid
        if recorded.lengths is not None:
            places = torch.arange(tensor.shape[1])
            valid = (places < recorded.lengths[:, None]).to(tensor.device)
        return exactly(self.plan.forms[recorded.name].rows(tensor, valid))

    def report(self, *, step: int | None = None) -> CreditReport:
        """Finish and compute the report."""
        report = self.accumulator.report(self._notes(), step=step)
        return dataclasses.replace(report, parts=self._parts())

    def _notes(self) -> list[str]:
        """What a reader must know of how the states were recorded."""
        # A process that saw no batch settled no plan; its report is not the one that is logged.
        notes = [] if self.plan is None else list(self.plan.notes)
        if self._observables is not None:
            given = self._observables
            called = given if isinstance(given, str) else getattr(given, "__name__", "a function")
            notes.append(
                f"every state but the output was lifted by {called}, so credits, gains, sensitivities "
                "and R² are about the lifted coordinates"
            )
        if self._untraced is not None:
            notes.append(self._untraced)
        if self._silent:
            notes.append(f"never ran, so left out: {', '.join(map(repr, self._silent))}")
        if self._skipped:
            notes.append(f"gave no floating-point tensor, so left out: {', '.join(self._skipped)}")
        names = self.accumulator.names
        if names and not names[0].startswith(INPUT):
            notes.append(
                f"{names[0]!r} takes no floating-point input, so its output is x_0 and it has no credit "
                "of its own"
            )
        return notes

    def _parts(self) -> dict[str, tuple[str, ...]]:
        """Module calls by state, where every state is one component's."""
        if self.plan is None or any(len(group) > 1 for group in self.plan.states):
            return {}
        return {name: calls for name, calls in self.capture.parts.items() if name in self.plan.names}


def merge_processes(
    measurement: Measurement | None, device: torch.device, error: Exception | None = None
) -> None:
    """Let each process's measurement hold the samples of all; collectives.

    Each process must call this once, whatever happened to it.
    """
    share = Share()
    try:
        if measurement is not None:
            share = measurement.accumulator.share()
    except Exception as failure:
        error = failure
    if error is not None:
        share = Share(error=f"{type(error).__name__}: {error}")
    shares = exchange(share)
    if error is not None:
        raise error
    if not agreed(shares).count:
        raise ValueError("no sample arrived: the batches were empty in every process")
    assert measurement is not None
    measurement.accumulator.merge(shares, exact_device(device))
