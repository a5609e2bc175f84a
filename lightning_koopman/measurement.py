"""One report in the making: forward passes in, a report out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.accumulator import Accumulator
from lightning_koopman.capture import Capture
from lightning_koopman.components import Components
from lightning_koopman.forward import ForwardFn, default_forward, to_device
from lightning_koopman.isolation import undisturbed
from lightning_koopman.lifts import Observables, check_observables
from lightning_koopman.plan import Plan, in_a_row, make_plan
from lightning_koopman.pooling import valid_positions
from lightning_koopman.processes import Share, agreed, exchange
from lightning_koopman.recorded import INPUT, OUTPUT, Recorded
from lightning_koopman.report import CreditReport
from lightning_koopman.row_forms import ReduceOption, check_reduce
from lightning_koopman.tensors import detached_copy, exact_device, exactly, is_spread, whole


class Measurement:
    """One report in the making: forward passes in, rows of states passed on, a report out.

    Args:
        model: The module to watch.
        components: Names or patterns, as in :func:`lightning_koopman.components.named_components`.
        max_dim: Largest state vector kept.
        max_samples: Most samples taken; ``None`` takes all that arrive.
        hold: Whether processes share the samples, so that :func:`merge_processes` follows.
        reduce: How spatial and sequence axes become part of a row, as in :func:`credit_report`.
        output: What the chain ends with, as in :func:`credit_report`.
        observables: Lift of every state but the last, as in :func:`credit_report`.
        seed: Chooses the folds.
        options: Passed on to :class:`KoopmanCredit`.

    Attributes:
        capture: The hooks; enter it around a forward pass, then call :meth:`end_pass`.
        accumulator: What the rows of all passes are added up in.

    Raises:
        ValueError: If the components cannot be chosen or an option is out of range.
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
        self._recorded: dict[str, Any] | None = None
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
        """Send batches through a model that is left exactly as it was found.

        Args:
            model: The module, on its device.
            batches: What ``forward_fn`` takes.
            forward_fn: Called as ``forward_fn(model, batch)``; ``None`` is :func:`default_forward`.

        Raises:
            ValueError: As :meth:`end_pass` does.
        """
        forward = default_forward if forward_fn is None else forward_fn
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with undisturbed(model, batches), self.capture:
            for batch in batches:
                given = to_device(batch, device)
                self.start_pass(given)
                self.record_output(forward(model, given))
                self.end_pass()

    def start_pass(self, batch: Any = None) -> None:
        """Get ready for a forward pass.

        Args:
            batch: What it runs on; it tells network inputs apart and padding from data.
        """
        self._batch, self._valid = batch, valid_positions(batch)
        self.capture.start_pass(batch)

    def record_output(self, given: Any) -> None:
        """Record what the whole pass gave, where that is the output of interest.

        Args:
            given: What the model returned.
        """
        if callable(self._output):
            self.capture.record_end(self._output(given))

    def close_pass(self) -> None:
        """End the recording of a pass, without waiting for any other process.

        Raises:
            ValueError: If no component ran.
        """
        self._silent, self._skipped = self.capture.silent, self.capture.skipped
        states = self.capture.end_pass()
        if len(states) < 2:
            raise ValueError(
                f"no component ran in the forward pass; chosen were {list(self.capture.components)}. "
                "Check forward_fn, or name modules that the pass calls with components=[...]."
            )
        self._recorded = states

    def end_pass(self) -> None:
        """Take what the capture recorded in the pass that just ended.

        Raises:
            ValueError: If no component ran, or the states do not fit those before.
        """
        if self._recorded is None:
            self.close_pass()
        assert self._recorded is not None
        # Nothing between these collectives may fail in one process alone.
        states, self._recorded = {n: _gathered(s) for n, s in self._recorded.items()}, None
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
            states = {r.name: r for r in states.values() if r.name in kept}
        for name, state in states.items():
            if isinstance(state, Recorded):
                states[name] = self._rows(state.tensor, state)
        rows = self.plan.join(states, self._passes)
        self._passes += 1
        self._seconds += time.perf_counter() - start
        self.accumulator.push(rows)

    def _keep(self, tensor: Tensor, recorded: Recorded) -> Any:
        if self.plan is None or is_spread(tensor):
            # Which form the rows take is settled once the whole first pass is known; and in a hook no
            # process may wait for another, for the user's own pass would wait as well.
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
        """Finish and compute the report.

        Args:
            step: Training step the weights belong to.

        Returns:
            The report.

        Raises:
            ValueError: If fewer than two samples were seen.
        """
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


def _gathered(state: Any) -> Any:
    """Give a state whose parts lie in several processes as one; a collective for those."""
    if isinstance(state, Recorded):
        return dataclasses.replace(state, tensor=whole(state.tensor))
    return state


def merge_processes(
    measurement: Measurement | None,
    device: torch.device,
    error: Exception | None = None,
    part: int | None = None,
) -> None:
    """Let each process's measurement hold the samples of all; collectives.

    Each process must call this once, whatever happened to it.

    Args:
        measurement: This process's measurement; ``None`` where it failed.
        device: Where the collectives run.
        error: What kept this process from taking its samples, if anything did.
        part: Which part of the data it ran on, where several processes run on the same.

    Raises:
        Exception: The error given, once all others know of it.
        ProcessError: If another process failed.
        ValueError: If no process took a sample.
    """
    share = Share()
    try:
        if measurement is not None:
            share = dataclasses.replace(measurement.accumulator.share(), part=part)
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
