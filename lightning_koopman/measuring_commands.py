"""The commands that measure credits, or tell what would be measured."""

from __future__ import annotations

import functools
import re
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress

from lightning_koopman.effects import Kind
from lightning_koopman.progress import COLUMNS
from lightning_koopman.report_commands import show_reports
from lightning_koopman.user_code import build_batches, build_model


def demo(
    logdir: str = "koopman_demo",
    seed: int = 0,
    epochs: int | None = None,
    arch: Literal["mlp", "cnn"] = "mlp",
) -> None:
    """Train a small network on handwritten digits and watch its components' credits.

    Args:
        logdir: Folder for event files, report.json and credits.png.
        seed: Seed of weights and data order.
        epochs: Passes over the training data; by default 30 for the MLP and 8 for the CNN.
        arch: Network to train.
    """
    from lightning_koopman.demo import run_demo

    run_demo(logdir, seed=seed, epochs=epochs, arch=arch)


def evaluate(
    model: str,
    data: str,
    ckpt: str | list[str],
    logdir: str | None = None,
    out: str | None = None,
    format: Literal["json", "csv", "html"] = "json",
    components: str | list[str] | None = None,
    rank: int | None = None,
    tikhonov: float | None = None,
    max_dim: int = 256,
    folds: int = 5,
    normalize: Literal["none", "rms", "whiten"] = "none",
    delay: int | Literal["auto"] = 1,
    seed: int = 0,
    trust_checkpoint: bool = False,
    shard: str = "1/1",
    fresh: bool = False,
    weights: Literal["saved", "averaged", "current"] = "saved",
    effects: bool | list[Kind] = False,
    initial_checkpoint: str | None = None,
) -> None:
    """Measure the credits of saved checkpoints, each at its own global step.

    Args:
        model: Model to build, as pkg.mod:Class or pkg.mod:function. A LightningModule gets the
            hyperparameters that its checkpoint saved.
        data: Data to measure on, as pkg.mod:DataModule (its validation loader; it gets the
            hyperparameters that the checkpoint saved), or a function or object that gives batches.
        ckpt: Path or glob pattern of checkpoints, or a list of them.
        logdir: Folder for TensorBoard event files.
        out: File for the reports, kept complete after every checkpoint. A second run with the same file
            measures only checkpoints that are new or changed, or all if an option changed. It cannot see
            changes of the model's code or of the data: use fresh then.
        format: Kind of that file. Beside csv and html, a .json file of the same name is kept
            for the second run and the report command.
        components: Names or glob patterns of components; chosen by default.
        rank: Most output directions to align.
        tikhonov: Ridge weight; chosen by held-out R² by default.
        max_dim: Wider states are pooled and projected.
        folds: Number of folds for held-out R² and error bars.
        normalize: Coordinates of every state.
        delay: Step delay: earlier states that each operator sees. auto chooses by held-out R².
        seed: Chooses the folds.
        trust_checkpoint: Unpickle whatever the checkpoints hold. They may then run any code.
        shard: i/n takes every n-th checkpoint from the i-th on, for n machines; then use merge.
        fresh: Measure again what was measured before.
        weights: Which weights of a training with weight averaging: as saved, averaged or current.
        effects: Also predict what altering each component would do to the outputs: all kinds, or those
            of a list such as [linear,skip].
        initial_checkpoint: Weights that training began with, for the effect of going back to them; by
            default they are drawn anew.

    Raises:
        EvaluationError: If a checkpoint cannot be used; the others are still evaluated.
    """
    from lightning_koopman.formats import read_known, write_with_known
    from lightning_koopman.series import EvaluationError, evaluate_checkpoints

    part = _shard(shard)
    known = [] if out is None or fresh else read_known(out, format)
    own, of_data = _first_hyper_parameters(ckpt, trust_checkpoint)
    network, batches = build_model(model, own), build_batches(data, of_data)
    console = Console(stderr=True)

    def tell_known(taken: int, total: int) -> None:
        if known:
            console.print(f"{taken} of {total} reports taken over from {out}", highlight=False)

    failure = None
    with Progress(*COLUMNS, console=console) as progress:
        task = progress.add_task("checkpoints", total=None, visible=False)
        try:
            reports = evaluate_checkpoints(
                network,
                ckpt,
                batches,
                logdir=logdir,
                trust_checkpoint=trust_checkpoint,
                on_progress=lambda done, total: progress.update(
                    task, completed=done, total=total, visible=total > 0
                ),
                on_report=None
                if out is None
                else functools.partial(write_with_known, path=out, kind=format),
                on_known=tell_known,
                shard=part,
                known=known,
                about={"model": model, "data": data},
                weights=weights,
                effects=effects,
                initial=initial_checkpoint,
                components=components,
                rank=rank,
                tikhonov=tikhonov,
                max_dim=max_dim,
                folds=folds,
                normalize=normalize,
                delay=delay,
                seed=seed,
            )
        except EvaluationError as error:
            failure, reports = error, error.reports
    show_reports(reports)
    if out is not None:
        write_with_known(reports, out, format)
    if failure is not None:
        raise failure


def _first_hyper_parameters(ckpt: str | list[str], trust: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the arguments of model and DataModule that the first readable checkpoint saved."""
    from lightning_koopman.checkpoints import CheckpointError, find_checkpoints, load_checkpoint

    for path in find_checkpoints(ckpt):
        try:
            checkpoint = load_checkpoint(path, trust=trust)
        except CheckpointError:
            continue
        return dict(checkpoint.hyper_parameters), dict(checkpoint.data_hyper_parameters)
    return {}, {}


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found is None:
        raise ValueError(f"shard is {text!r}; write i/n with i from 1 to n")
    return int(found[1]), int(found[2])


def components(
    model: str,
    data: str | None = None,
    components: str | list[str] | None = None,
    depth: int | None = None,
    max_dim: int = 256,
) -> None:
    """List what would be reported as components, without measuring it.

    Args:
        model: Model to build, as pkg.mod:Class or pkg.mod:function.
        data: Data as in evaluate, whose first batch is run for shapes and state widths.
        components: Names or glob patterns of components; chosen by default.
        depth: Take the parts at this depth of the module tree instead.
        max_dim: Wider states are pooled and projected.

    Raises:
        ValueError: If both components and a depth are given.
    """
    from lightning_koopman.overview import describe_components

    if components is not None and depth is not None:
        raise ValueError(f"components is {components!r} and depth is {depth}; give one of the two")
    found = describe_components(
        build_model(model, {}, "without arguments"),
        None if data is None else build_batches(data),
        components=components if depth is None else depth,
        max_dim=max_dim,
    )
    Console().print(found)
