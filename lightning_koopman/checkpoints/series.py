"""Evaluates the checkpoints of one or several trainings."""

from __future__ import annotations

import json

import os

from collections.abc import Iterable, Mapping, Sequence

from dataclasses import dataclass, replace

from importlib.metadata import version

from pathlib import Path

from typing import Any

from lightning_koopman.network.weights import (
    CheckpointError,
    find_checkpoints,
    load_checkpoint,
    run_names,
)

from lightning_koopman.report.report import CreditReport

from collections import deque

from lightning_koopman.callback.loggers import EventFile

from lightning_koopman.callback.loggers import CreditWriter

from collections.abc import Callable, Iterable, Mapping, Sequence

from dataclasses import replace

from torch import Tensor, nn

from lightning_koopman.network.weights import (
    CheckpointError,
    Weights,
    apply_checkpoint,
    load_checkpoint,
)

from lightning_koopman.report.effects import KINDS, Kind

from lightning_koopman.measurement.evaluate import credit_report

from lightning_koopman.effects.predictions import predict_effects





@dataclass(frozen=True)
class Entry:
    """One checkpoint of a series.

    Attributes:
        path: The file.
        run: Name of its training.
        step: Its step, or its place among the files of its run where it tells none.
        source: What identifies the measurement.
        known: Report of an earlier evaluation that still holds.
    """

    path: Path
    run: str
    step: int
    source: Mapping[str, Any]
    known: CreditReport | None = None


def settled_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Give options as JSON would give them back, with the version that measures."""
    plain = {**options, "version": version("lightning-koopman")}
    settled: dict[str, Any] = json.loads(json.dumps(plain, default=repr, sort_keys=True))
    return settled


def list_entries(
    checkpoints: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    shard: tuple[int, int],
    trust: bool,
    settled: Mapping[str, Any],
    known: Sequence[CreditReport],
) -> tuple[list[Entry], list[str]]:
    """List the checkpoints of a shard by run and step, and what is wrong with the others."""
    paths = find_checkpoints(checkpoints)
    runs = run_names(paths)
    # The last one counts where an earlier evaluation met a file twice.
    by_path = {str(report.source.get("path")): report for report in known}
    entries, failures = [], []
    for place, (path, run) in list(enumerate(zip(paths, runs, strict=True)))[shard[0] - 1 :: shard[1]]:
        in_run = runs[:place].count(run)
        try:
            source = _source(path, settled)
            old = by_path.get(source["path"])
            if old is not None and {**old.source, "step": None} == source:
                step = old.source.get("step")
                step = step if type(step) is int else in_run
                entries.append(Entry(path, run, step, old.source, replace(old, run=run, step=step)))
                continue
            # Only the step is needed for sorting: weights of many checkpoints need not fit in memory.
            told = load_checkpoint(path, trust=trust).step
        except CheckpointError as error:
            failures.append(str(error))
            continue
        source["step"] = told
        entries.append(Entry(path, run, in_run if told is None else told, source))
    entries.sort(key=lambda entry: (entry.run, entry.step))
    return entries, failures


def _source(path: Path, settled: Mapping[str, Any]) -> dict[str, Any]:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    return {
        "path": os.path.normpath(path),
        "size": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "step": None,
        "options": dict(settled),
    }




class RunLogs:
    """TensorBoard files of a series, a folder a run."""

    def __init__(self, logdir: str | os.PathLike[str] | None) -> None:
        self._logdir = logdir
        self._logs: dict[str, _RunLog] = {}

    def add(self, report: CreditReport, *, known: bool) -> None:
        """Write one report."""
        if self._logdir is None:
            return
        if report.run not in self._logs:
            self._logs[report.run] = _RunLog(os.path.join(self._logdir, report.run))
        self._logs[report.run].add(report, known=known)

    def add_known(self, waiting: deque[Entry], before: Entry | None = None) -> None:
        """Take entries off a queue until one is met, and write those known."""
        while waiting and (entry := waiting.popleft()).path != getattr(before, "path", None):
            if entry.known is not None:
                self.add(entry.known, known=True)

    def finish(self) -> None:
        """Draw what is drawn at the end of a run."""
        for log in self._logs.values():
            log.finish()

    def close(self) -> None:
        """Close the files."""
        for log in self._logs.values():
            log.close()


class _RunLog:
    """Event file of one run; reports that an earlier evaluation wrote there are not repeated."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._started = any(Path(folder).glob("events.out.tfevents.*"))
        self._writer = CreditWriter()
        self._files: list[EventFile] = []
        self._reports: list[CreditReport] = []

    def add(self, report: CreditReport, *, known: bool) -> None:
        self._reports.append(report)
        scalars = self._writer.scalars(report)
        if known and self._started:
            return
        if not self._files:
            self._files = [EventFile(self._folder)]
        step = report.step or 0
        self._writer.draw(self._files, self._reports, step)
        self._files[0].log_metrics(scalars, step)

    def finish(self) -> None:
        if self._files:
            self._writer.finish(self._files, self._reports, self._reports[-1].step or 0)

    def close(self) -> None:
        for file in self._files:
            file.close()




class EvaluationError(CheckpointError):
    """Some checkpoints could not be evaluated; the others were.

    Attributes:
        reports: Reports of the checkpoints that could be evaluated, by run and step.
        failures: What went wrong with each of the others.
        interrupted: Whether Ctrl-C ended the evaluation.
    """

    def __init__(
        self, reports: list[CreditReport], failures: list[str], *, interrupted: bool = False
    ) -> None:
        super().__init__("\n".join(failures))
        self.reports, self.failures, self.interrupted = reports, failures, interrupted


def evaluate_checkpoints(
    model: nn.Module,
    checkpoints: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    batches: Iterable[Any],
    *,
    logdir: str | os.PathLike[str] | None = None,
    trust_checkpoint: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_report: Callable[[list[CreditReport]], None] | None = None,
    on_known: Callable[[int, int], None] | None = None,
    shard: tuple[int, int] = (1, 1),
    known: Sequence[CreditReport] = (),
    about: Mapping[str, Any] | None = None,
    weights: Weights = "saved",
    effects: bool | Sequence[Kind] = False,
    initial: str | os.PathLike[str] | None = None,
    **options: Any,
) -> list[CreditReport]:
    """Measure the credits of a training after it has ended, checkpoint by checkpoint.

    Checkpoints in different folders are different runs, named by the folder below the common one.

    Args:
        model: A model of the architecture that was saved; its own weights are put back at the end.
        checkpoints: Paths or glob patterns of Lightning checkpoints or bare state dicts.
        batches: As in :func:`credit_report`; iterated once a checkpoint.
        logdir: Folder for TensorBoard, where each checkpoint appears at its own global step, each run in
            a folder of its own.
        trust_checkpoint: Unpickle whatever the files hold, which may run any code.
        on_progress: Called with the number of checkpoints done and of all that must be measured.
        on_report: Called after every checkpoint with all reports so far, to save them.
        on_known: Called once with the number of reports taken over and of all checkpoints.
        shard: ``(i, n)`` takes every n-th checkpoint from the i-th on, counted from 1, so that n
            machines share the work.
        known: Reports of an earlier evaluation. One is taken over where path, size and modification time
            of the file, the options and ``about`` are what they were.
        about: Names of model and data, or whatever else must be equal for a known report to hold.
        weights: Which of the weights that a checkpoint holds: those in its ``state_dict`` (``"saved"``),
            or, of a training with averaging, the ``"averaged"`` or the ``"current"`` ones.
        effects: Whether to predict the effects of altering each component too, or of which kinds, see
            :func:`lightning_koopman.predict_effects`.
        initial: Checkpoint of the weights that training began with, for the effect of going back to
            them; without it, weights drawn anew take their place.
        options: Passed on to :func:`credit_report`.

    Returns:
        One report a checkpoint, sorted by run and step. A file that does not tell its step counts by its
        place among the files of its run.

    Raises:
        EvaluationError: If a checkpoint is missing, damaged or of another architecture; it is raised
            after all others were evaluated, and carries their reports. Ctrl-C raises it too, with what
            was measured until then.
        ValueError: As :func:`credit_report`, or if the shard is out of range.
    """
    number, shards = shard
    if not 1 <= number <= shards:
        raise ValueError(f"shard is {number}/{shards}; write i/n with i from 1 to n")
    kinds = KINDS if effects is True else tuple(effects or ())
    if initial is not None and "reinit" not in kinds:
        raise ValueError(
            "initial weights are given, but the effect of going back to them is not asked for"
        )
    predicted = {"effects": kinds, "initial": initial and os.fspath(initial)} if kinds else {}
    settled = settled_options({**options, **(about or {}), **predicted, "weights": weights})
    entries, failures = list_entries(checkpoints, shard, trust_checkpoint, settled, known)
    new = [entry for entry in entries if entry.known is None]
    if iter(batches) is batches and (kinds or len(new) > 1):
        batches = list(batches)
    if on_known is not None:
        on_known(len(entries) - len(new), len(entries))
    reports = {id(entry): entry.known for entry in entries if entry.known is not None}
    start = None if initial is None else load_checkpoint(initial, trust=trust_checkpoint).state_dict
    logs, waiting, done, interrupted = RunLogs(logdir), deque(entries), 0, False
    original = {name: value.detach().clone() for name, value in model.state_dict().items()}
    try:
        try:
            if on_progress is not None:
                on_progress(0, len(new))
            for entry in new:
                result = _measure(
                    model,
                    batches,
                    entry,
                    trust=trust_checkpoint,
                    weights=weights,
                    options=options,
                    kinds=kinds,
                    initial=start,
                )
                logs.add_known(waiting, before=entry)
                if isinstance(result, CheckpointError):
                    failures.append(str(result))
                else:
                    reports[id(entry)] = result
                    if on_report is not None:
                        on_report(_in_order(entries, reports))
                    logs.add(result, known=False)
                done += 1
                if on_progress is not None:
                    on_progress(done, len(new))
        except KeyboardInterrupt:
            interrupted = True
            failures.append(f"interrupted after {done} of {len(new)} checkpoints")
        logs.add_known(waiting)
        logs.finish()
    finally:
        model.load_state_dict(original)
        logs.close()
    found = _in_order(entries, reports)
    if failures:
        raise EvaluationError(found, failures, interrupted=interrupted)
    return found


def _measure(
    model: nn.Module,
    batches: Iterable[Any],
    entry: Entry,
    *,
    trust: bool,
    weights: Weights,
    options: Mapping[str, Any],
    kinds: Sequence[Kind],
    initial: Mapping[str, Tensor] | None,
) -> CreditReport | CheckpointError:
    """Give the report of one checkpoint, or what is wrong with the file."""
    try:
        apply_checkpoint(model, load_checkpoint(entry.path, trust=trust, weights=weights))
    except CheckpointError as error:
        return error
    report = credit_report(model, batches, step=entry.step, **options)
    if kinds:
        how = {name: options[name] for name in ("forward_fn", "seed") if name in options}
        report = predict_effects(model, batches, report, kinds, initial=initial, **how)
    return replace(report, run=entry.run, source=entry.source)


def _in_order(entries: Sequence[Entry], reports: Mapping[int, CreditReport]) -> list[CreditReport]:
    return [reports[id(entry)] for entry in entries if id(entry) in reports]
