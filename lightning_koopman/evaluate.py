"""Models, checkpoints and data through the whole chain."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_koopman.chain import Normalize
from lightning_koopman.checkpoints import (
    Checkpoint,
    CheckpointError,
    apply_checkpoint,
    find_checkpoints,
    load_checkpoint,
)
from lightning_koopman.components import Components
from lightning_koopman.measurement import ForwardFn, Measurement
from lightning_koopman.plan import ReduceOption
from lightning_koopman.report import CreditReport
from lightning_koopman.writers import CreditWriter, EventFile


def credit_report(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    components: Components | Sequence[Components] | None = None,
    forward_fn: ForwardFn | None = None,
    rank: int | None = None,
    tikhonov: float | None = None,
    max_dim: int = 256,
    reduce: ReduceOption = "pool",
    output: str | Callable[[Any], Any] | None = None,
    folds: int = 5,
    normalize: Normalize = "none",
    delay: int = 1,
    targets: Sequence[int] | None = None,
    seed: int = 0,
    step: int | None = None,
) -> CreditReport:
    """Measure the Koopman credit of every component of a model.

    The model runs once over the batches, in eval mode and without gradients, and is left exactly as it
    was found. Memory does not grow with the number of samples.

    Args:
        model: Any module; Lightning is not needed.
        batches: Iterable of tensors, of tuples whose first entry is the input, or of mappings of keyword
            arguments; a ``DataLoader`` is one.
        components: Names or glob patterns of ``model.named_modules()``, types of modules, or a depth in
            the module tree; ``None`` chooses.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.
        rank: Most output directions to align; ``None`` takes all that reach back to the input.
        tikhonov: Ridge weight in units of the regressors' mean variance; ``None`` picks, for
            every component, the largest up to 1e-2 that at most doubles its held-out error.
        max_dim: States wider than this are pooled and projected on their leading POD directions.
        reduce: What becomes of spatial and sequence axes: ``"pool"`` (to a small grid where the state
            is wide), ``"flatten"``, ``"mean"``, ``"last"`` (position that holds data), ``"cls"`` (the
            first position), or a callable from the tensor to one row a sample; or a mapping from glob
            patterns of names to any of these. Padding that the batch marks (``attention_mask``,
            ``lengths``, …) is left out of pools and means.
        output: What the chain ends with: the name of a module, or a callable from what the model
            returns to a tensor; ``None`` takes the last component's output.
        folds: Number of folds for held-out R² and error bars.
        normalize: Coordinates of every state: as they are (``"none"``), each unit over its standard
            deviation (``"rms"``) or whitened (``"whiten"``).
        delay: Step delay: how many earlier states each operator sees.
        targets: Output units of interest; ``None`` takes the leading POD directions of the output.
        seed: Chooses the folds.
        step: Training step the weights belong to, for the report.

    Returns:
        The report.

    Raises:
        ValueError: If no sample arrives, no component runs, a state is not finite or changes its shape,
            or an argument is out of range.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> report = credit_report(net, torch.randn(500, 4).split(100))
        >>> report.components
        ('0', '2')
        >>> bool(abs(report.gain.sum() - report.total) < 1e-9)
        True

    References:
        Liang et al. (2022), arXiv 2212.00998.
    """
    if isinstance(batches, Tensor):
        raise ValueError(
            f"batches is one tensor of shape {tuple(batches.shape)}, whose rows would each be taken "
            "for a batch; pass an iterable of batches, such as x.split(256) or [x]"
        )
    measurement = Measurement(
        model,
        components,
        max_dim=max_dim,
        reduce=reduce,
        output=output,
        seed=seed,
        rank=rank,
        tikhonov=tikhonov,
        folds=folds,
        normalize=normalize,
        delay=delay,
        targets=targets,
    )
    measurement.run(model, batches, forward_fn)
    return measurement.report(step=step)


class EvaluationError(CheckpointError):
    """Some checkpoints could not be evaluated; the others were.

    Attributes:
        reports: Reports of the checkpoints that could be evaluated, by step.
        failures: What went wrong with each of the others.
    """

    def __init__(self, reports: list[CreditReport], failures: list[str]) -> None:
        super().__init__("\n".join(failures))
        self.reports = reports
        self.failures = failures


def evaluate_checkpoints(
    model: nn.Module,
    checkpoints: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    batches: Iterable[Any],
    *,
    logdir: str | os.PathLike[str] | None = None,
    trust_checkpoint: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_report: Callable[[list[CreditReport]], None] | None = None,
    shard: tuple[int, int] = (1, 1),
    **options: Any,
) -> list[CreditReport]:
    """Measure the credits of a training after it has ended, checkpoint by checkpoint.

    Args:
        model: A model of the architecture that was saved; its own weights are put back at the end.
        checkpoints: Paths or glob patterns of Lightning checkpoints or bare state dicts.
        batches: As in :func:`credit_report`; iterated once a checkpoint.
        logdir: Folder for TensorBoard, where each checkpoint appears at its own global step.
        trust_checkpoint: Unpickle whatever the files hold, which may run any code.
        on_progress: Called with the number of checkpoints done and of all.
        on_report: Called after every checkpoint with all reports so far, to save them.
        shard: ``(i, n)`` takes every n-th checkpoint from the i-th on, counted from 1, so that n
            machines share the work.
        options: Passed on to :func:`credit_report`.

    Returns:
        One report a checkpoint, sorted by step. A file that does not tell its step counts by its place
        among the files.

    Raises:
        EvaluationError: If a checkpoint is missing, damaged or of another architecture; it is raised
            after all others were evaluated, and carries their reports. Ctrl-C raises it too, with what
            was measured until then.
        ValueError: As :func:`credit_report`, or if the shard is out of range.
    """
    number, shards = shard
    if not 1 <= number <= shards:
        raise ValueError(f"shard is {number}/{shards}; write i/n with i from 1 to n")
    paths = find_checkpoints(checkpoints)
    if iter(batches) is batches and len(paths) > 1:
        batches = list(batches)
    failures: list[str] = []
    order: list[tuple[int, Checkpoint]] = []
    for place, path in list(enumerate(paths))[number - 1 :: shards]:
        try:
            checkpoint = load_checkpoint(path, trust=trust_checkpoint)
        except CheckpointError as error:
            failures.append(str(error))
            continue
        step = place if checkpoint.step is None else checkpoint.step
        # Only the step is needed for sorting: weights of many checkpoints need not fit in memory.
        order.append((step, Checkpoint(path, step, {}, {})))
    order.sort(key=lambda item: item[0])

    original = {name: value.detach().clone() for name, value in model.state_dict().items()}
    reports: list[CreditReport] = []
    writer = CreditWriter()
    loggers = [] if logdir is None else [EventFile(os.fspath(logdir))]
    try:
        try:
            for done, (step, checkpoint) in enumerate(order):
                if on_progress is not None:
                    on_progress(done, len(order))
                try:
                    apply_checkpoint(model, load_checkpoint(checkpoint.path, trust=trust_checkpoint))
                except CheckpointError as error:
                    failures.append(str(error))
                    continue
                report = credit_report(model, batches, step=step, **options)
                reports.append(report)
                if on_report is not None:
                    on_report(reports)
                writer.draw(loggers, reports, step)
                for logger in loggers:
                    logger.log_metrics(writer.scalars(report), step)
        except KeyboardInterrupt:
            failures.append(f"interrupted after {len(reports)} of {len(order)} checkpoints")
        if on_progress is not None:
            on_progress(len(order), len(order))
        writer.finish(loggers, reports, step=reports[-1].step or 0 if reports else 0)
    finally:
        model.load_state_dict(original)
        for logger in loggers:
            logger.close()
    if failures:
        raise EvaluationError(reports, failures)
    return reports
