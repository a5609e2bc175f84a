"""Checkpoints of one training or several, measured one after another."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_koopman.checkpoints import (
    CheckpointError,
    Weights,
    apply_checkpoint,
    load_checkpoint,
)
from lightning_koopman.effects import KINDS, Kind
from lightning_koopman.entries import Entry, list_entries, settled_options
from lightning_koopman.evaluate import credit_report
from lightning_koopman.predictions import predict_effects
from lightning_koopman.report import CreditReport
from lightning_koopman.run_logs import RunLogs


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
