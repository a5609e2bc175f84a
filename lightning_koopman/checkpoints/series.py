"""Evaluates the checkpoints of one or several trainings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from lightning_koopman.callback.loggers import CreditWriter, EventFile
from lightning_koopman.effects.alterations import UNUSED_INITIAL
from lightning_koopman.effects.component_effects import component_effects
from lightning_koopman.koopman.credit import StateError
from lightning_koopman.koopman.options import DEFAULTS, Options, takes_options
from lightning_koopman.measurement.evaluate import credit_report
from lightning_koopman.network.arguments import FUNCTION, INTEGER, check_each, check_given
from lightning_koopman.network.components import Components
from lightning_koopman.network.runs.forward import ForwardFn, check_arguments
from lightning_koopman.network.weights import (
    Checkpoint,
    CheckpointError,
    Weights,
    apply_checkpoint,
    find_checkpoints,
    load_checkpoint,
    load_weights,
    run_names,
)
from lightning_koopman.report.effects import KINDS, Kind, check_kinds
from lightning_koopman.report.report import REPORT, CreditReport


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


@takes_options(
    workers="start a process per shard, with shard=(i, n)",
    build="start a process per shard, with shard=(i, n)",
)
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
    components: Components | Sequence[Components] | None = None,
    forward_fn: ForwardFn | None = None,
    options: Options = DEFAULTS,
) -> list[CreditReport]:
    """Measure the credits of a training after it has ended, checkpoint by checkpoint.

    Checkpoints in different folders are different runs, named by the folder below the common one.

    Args:
        model: A model of the architecture that was saved; its own weights are put back at the end.
        checkpoints: Paths or glob patterns of Lightning checkpoints or bare state dicts, or folders, of
            which all files are taken whose names end in ``.ckpt``, at whatever depth.
        batches: As in :func:`credit_report`; iterated once per checkpoint.
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
        effects: Whether to tell the effects of altering each component too, or of which kinds, see
            :func:`lightning_koopman.component_effects`.
        initial: Checkpoint of the weights that training began with, for the effect of going back to
            them; without it, weights drawn anew take their place.
        components: As in :func:`credit_report`.
        forward_fn: As in :func:`credit_report`.
        options: As in :func:`credit_report`.

    Returns:
        One report per checkpoint, sorted by run and step; the last one can save its reference. A file
        that holds no step counts by its place among the files of its run, where there are several.

    Raises:
        EvaluationError: If a checkpoint is missing, damaged, of another architecture, or of a network
            that gives NaN or always the same; it is raised after all others were evaluated, and carries
            their reports. Ctrl-C raises it too, with what was measured until then.
        CheckpointError: If no checkpoint matches.
        ValueError: As :func:`credit_report`, or if the shard is out of range.
    """
    check_arguments(model, batches, forward_fn)
    check_each(INTEGER, shard=shard)
    if len(shard) != 2 or not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"shard is {'/'.join(map(str, shard))}; write i/n with i from 1 to n")
    check_given(FUNCTION, on_progress=on_progress, on_report=on_report, on_known=on_known)
    check_given((Mapping, "names of model and data by 'model' and 'data'"), about=about)
    check_each(REPORT, known=known)
    kinds = KINDS if effects is True else effects or ()
    check_kinds(kinds)
    if initial is not None and "reinit" not in kinds:
        raise ValueError(UNUSED_INITIAL)
    predicted = {"effects": tuple(kinds), "initial": initial and os.fspath(initial)} if kinds else {}
    chosen = {"components": components, "forward_fn": forward_fn, **vars(options)}
    asked = {**chosen, **(about or {}), **predicted, "weights": weights}
    index, failures = _checkpoint_index(checkpoints, shard, trust_checkpoint, asked, known)
    count = sum(item.known is None for item in index)
    if isinstance(batches, Iterator) and (kinds or count > 1):
        batches = list(batches)
    if on_known is not None:
        on_known(len(index) - count, len(index))
    start = None if initial is None else load_checkpoint(initial, trust=trust_checkpoint).state_dict
    reports = [item.known for item in index]
    logs: dict[str, _RunLog] = {}
    done, interrupted = 0, False

    def measure(item: _Indexed) -> CreditReport:
        checkpoint = load_checkpoint(item.path, trust=trust_checkpoint, weights=weights)
        apply_checkpoint(model, checkpoint)
        try:
            report = credit_report(
                model,
                batches,
                components=components,
                forward_fn=forward_fn,
                max_samples=None,  # the same samples of every checkpoint
                step=item.step,
                options=options,
            )
        except StateError as error:
            _refuse(item.path, model, error)
        found = None
        if kinds:
            found = component_effects(
                model,
                batches,
                report,
                kinds,
                initial=start,
                forward_fn=forward_fn,
                seed=options.seed,
            )
        notes = list(report.notes)
        if differing := _built_otherwise(model, checkpoint):
            notes.append(
                f"the checkpoint saved {differing}; if that changes what the network computes, measure "
                "it in one that is built so"
            )
        # References of many checkpoints need not fit in memory: the last one's is kept.
        kept = report.reference if item is index[-1] else None
        # A place among files is no step to others.
        kept = kept and replace(kept, step=item.source["step"])
        report = replace(report, effects=found, notes=tuple(notes))
        return replace(report, run=item.run, source=item.source, reference=kept)

    original = {name: value.detach().clone() for name, value in model.state_dict().items()}
    try:
        if on_progress is not None:
            on_progress(0, count)
        for place, item in enumerate(index):
            if interrupted and item.known is None:
                continue
            try:
                if item.known is None:
                    try:
                        reports[place] = measure(item)
                    except CheckpointError as error:
                        failures.append(str(error))
                    done += 1
                report = reports[place]
                # Logged before it is saved: what is taken over from a file is not logged again.
                if logdir is not None and report is not None:
                    if item.run not in logs:
                        logs[item.run] = _RunLog(os.path.join(logdir, item.run))
                    logs[item.run].add(report, known=item.known is not None)
                if item.known is None:
                    if report is not None and on_report is not None:
                        on_report([report for report in reports if report is not None])
                    if on_progress is not None:
                        on_progress(done, count)
            except KeyboardInterrupt:
                interrupted = True
                failures.append(f"interrupted after {done} of {count} checkpoints")
        for log in logs.values():
            log.finish()
    finally:
        load_weights(model, original)
        for log in logs.values():
            log.close()
    found = [report for report in reports if report is not None]
    if failures:
        raise EvaluationError(found, failures, interrupted=interrupted)
    return found


def _refuse(path: Path, model: nn.Module, error: StateError) -> NoReturn:
    """Raise why a network with the weights of a checkpoint has no credits."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CheckpointError(
                f"{path} cannot be measured, for its {name!r} holds NaN or infinity; its training "
                "diverged, or the file is damaged"
            )
    raise CheckpointError(f"{path} cannot be measured: {error}")


def _built_otherwise(model: nn.Module, checkpoint: Checkpoint) -> str:
    """Return the arguments that a LightningModule saved where the one to measure in has others.

    Numbers of heads or slopes of an activation change what the same weights compute, and no shape.
    """
    own = getattr(model, "hparams", None)
    own, plain = own if isinstance(own, Mapping) else {}, (bool, int, float, str)
    return ", ".join(
        f"{name}={saved!r} and the network was built with {own[name]!r}"
        for name, saved in checkpoint.hyper_parameters.items()
        if isinstance(saved, plain) and isinstance(own.get(name), plain) and saved != own[name]
    )


@dataclass(frozen=True)
class _Indexed:
    """One checkpoint of a series, what identifies its measurement, and a report that still holds."""

    path: Path
    run: str
    step: int | None
    source: Mapping[str, Any]
    known: CreditReport | None


def _checkpoint_index(
    checkpoints: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    shard: tuple[int, int],
    trust: bool,
    asked: Mapping[str, Any],
    known: Sequence[CreditReport],
) -> tuple[list[_Indexed], list[str]]:
    """List the checkpoints of a shard by run and step, and what is wrong with the others."""
    # As JSON will return them; numbers of another version of this package would not compare.
    plain = {**asked, "version": version("lightning-koopman")}
    options = json.loads(json.dumps(plain, default=repr, sort_keys=True))
    paths = find_checkpoints(checkpoints)
    runs = run_names(paths)
    # The last one counts where an earlier evaluation met a file twice.
    by_path = {str(report.source.get("path")): report for report in known}
    index, failures = [], []
    for place, (path, run) in list(enumerate(zip(paths, runs, strict=True)))[shard[0] - 1 :: shard[1]]:
        try:
            status = path.stat()
            source = {
                "path": os.path.normpath(path),
                "size": status.st_size,
                "modified_ns": status.st_mtime_ns,
                "step": None,
                "options": options,
            }
            old = by_path.get(source["path"])
            if old is not None and {**old.source, "step": None} != source:
                old = None
            # Only the step is needed for sorting: weights of many checkpoints need not fit in memory.
            told = load_checkpoint(path, trust=trust).step if old is None else old.source.get("step")
        except FileNotFoundError:
            failures.append(f"{path} does not exist")
        except OSError as error:
            failures.append(f"{path} cannot be read ({error.strerror})")
        except CheckpointError as error:
            failures.append(str(error))
        else:
            by_place = runs[:place].count(run) if runs.count(run) > 1 else None
            step = told if type(told) is int else by_place
            old = old and replace(old, run=run, step=step)
            index.append(_Indexed(path, run, step, {**source, "step": told}, old))
    index.sort(key=lambda item: (item.run, item.step or 0))
    return index, failures


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
        self._files = self._files or [EventFile(self._folder)]
        step = report.step or 0
        self._writer.draw(self._files, self._reports, step)
        self._writer.write(self._files[0], scalars, step)

    def finish(self) -> None:
        if self._files:
            self._writer.finish(self._files, self._reports, self._reports[-1].step or 0)

    def close(self) -> None:
        self._writer.close(self._files)
        for file in self._files:
            file.experiment.close()
