"""The command line: arguments in, the work called, reports out."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn


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
    components: str | list[str] | None = None,
    rank: int | None = None,
    tikhonov: float | None = None,
    max_dim: int = 256,
    folds: int = 5,
    normalize: Literal["none", "rms", "whiten"] = "none",
    delay: int = 1,
    seed: int = 0,
    trust_checkpoint: bool = False,
    shard: str = "1/1",
) -> None:
    """Measure the credits of saved checkpoints, each at its own global step.

    Args:
        model: Model to build, as pkg.mod:Class or pkg.mod:function. A LightningModule gets the
            hyperparameters that its checkpoint saved.
        data: Data to measure on, as pkg.mod:DataModule (its validation loader), or a function or object
            that gives batches.
        ckpt: Path or glob pattern of checkpoints, or a list of them.
        logdir: Folder for TensorBoard event files.
        out: JSON file for the reports, kept complete after every checkpoint.
        components: Names or glob patterns of components; chosen by default.
        rank: Most output directions to align.
        tikhonov: Ridge weight; chosen by held-out R² by default.
        max_dim: Wider states are pooled and projected.
        folds: Number of folds for held-out R² and error bars.
        normalize: Coordinates of every state.
        delay: Step delay.
        seed: Chooses the folds.
        trust_checkpoint: Unpickle whatever the checkpoints hold. They may then run any code.
        shard: i/n takes every n-th checkpoint from the i-th on, for n machines; then use merge.

    Raises:
        EvaluationError: If a checkpoint cannot be used; the others are still evaluated.
    """
    from lightning_koopman.checkpoints import CheckpointError, find_checkpoints, load_checkpoint
    from lightning_koopman.evaluate import EvaluationError, evaluate_checkpoints
    from lightning_koopman.report_files import write_reports

    part = _shard(shard)
    paths = find_checkpoints(ckpt)
    hyper_parameters: dict[str, Any] = {}
    for path in paths:
        try:
            hyper_parameters = dict(load_checkpoint(path, trust=trust_checkpoint).hyper_parameters)
            break
        except CheckpointError:
            continue
    network = _build_model(model, hyper_parameters)
    batches = _build_batches(data)
    failure = None
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("checkpoints", total=len(paths))
        try:
            reports = evaluate_checkpoints(
                network,
                paths,
                batches,
                logdir=logdir,
                trust_checkpoint=trust_checkpoint,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
                on_report=None if out is None else functools.partial(write_reports, path=out),
                shard=part,
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
    for report in reports:
        Console().print(report)
    if out is not None:
        write_reports(reports, out)
    if failure is not None:
        raise failure


def merge(reports: list[str], out: str) -> None:
    """Put the reports of several shards of one evaluation in one file, sorted by step.

    Args:
        reports: JSON files that evaluate wrote with --shard.
        out: JSON file for all of them.
    """
    from lightning_koopman.report_files import merge_reports, write_reports

    merged = merge_reports(reports)
    write_reports(merged, out)
    Console().print(f"{len(merged)} reports in {out}", highlight=False, soft_wrap=True)


def linearize(
    model: str,
    data: str,
    ckpt: str,
    out: str,
    max_drop: float = 0.01,
    components: str | list[str] | None = None,
    max_dim: int = 256,
    seed: int = 0,
    trust_checkpoint: bool = False,
) -> None:
    """Replace as many components as possible by linear layers, and write the new checkpoint.

    Args:
        model: Model to build, as in evaluate.
        data: Data, as pkg.mod:DataModule: linear layers are fitted on its training loader and chosen on
            its validation loader. Of the batches that a function or object gives, those at even places
            are fitted on, and the others chosen on.
        ckpt: Checkpoint of the trained network.
        out: Checkpoint to write; lightning_koopman.linear_component.load_linearized reads it.
        max_drop: Largest drop of the accuracy; without class targets, largest relative squared change
            of the outputs.
        components: Names or glob patterns of components; chosen by default.
        max_dim: Most directions of a wide input that are kept.
        seed: Chooses the folds.
        trust_checkpoint: Unpickle whatever the checkpoint holds. It may then run any code.
    """
    from lightning_koopman.checkpoints import apply_checkpoint, load_checkpoint
    from lightning_koopman.evaluate import credit_report
    from lightning_koopman.linear_component import save_linearized
    from lightning_koopman.linearization import linearize_within

    checkpoint = load_checkpoint(ckpt, trust=trust_checkpoint)
    hyper_parameters = dict(checkpoint.hyper_parameters)
    network = _build_model(model, hyper_parameters)
    apply_checkpoint(network, checkpoint)
    fit_on, choose_on = _fit_and_choose(data)
    report = credit_report(network, fit_on, components=components, max_dim=max_dim, seed=seed)
    result = linearize_within(
        network, report, fit_on, choose_on, max_drop=max_drop, max_dim=max_dim, seed=seed
    )
    Console().print(result)
    step = {} if checkpoint.step is None else {"global_step": checkpoint.step}
    save_linearized(result.model, out, more=step | {"hyper_parameters": hyper_parameters})
    Console().print(f"Written to {out}", highlight=False, soft_wrap=True)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments; ``None`` takes the process's own.

    Returns:
        Exit code: 0, or 1 after an error that was printed. Unusable arguments exit with 2.
    """
    given = list(sys.argv[1:] if args is None else args)
    # jsonargparse names options after parameters; dashes are what people type.
    given = [re.sub(r"^--[a-z_-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in given]
    commands: Any = {"demo": demo, "evaluate": evaluate, "merge": merge, "linearize": linearize}
    try:
        auto_cli(commands, args=given, prog="lightning-koopman", as_positional=False)
    except (ValueError, ImportError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escaped(error)}", soft_wrap=True)
        return 1
    return 0


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found is None:
        raise ValueError(f"shard is {text!r}; write i/n with i from 1 to n")
    return int(found[1]), int(found[2])


def _escaped(error: BaseException) -> str:
    from rich.markup import escape

    return escape(str(error))


def _named_object(name: str) -> Any:
    """Import what the user named as pkg.mod:attribute, and nothing else."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{name!r} names nothing; write pkg.mod:Name")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    found: Any = importlib.import_module(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module_name} has no {attribute!r}")
        found = getattr(found, part)
    return found


def _build_model(name: str, hyper_parameters: dict[str, Any]) -> nn.Module:
    found = _named_object(name)
    if not isinstance(found, nn.Module):
        accepted = inspect.signature(found).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        arguments = {k: v for k, v in hyper_parameters.items() if takes_all or k in accepted}
        try:
            found = found(**arguments)
        except TypeError as error:
            raise ValueError(
                f"{name} cannot be built from the hyperparameters in the checkpoint ({error}); name a "
                "function that builds it"
            ) from None
    if not isinstance(found, nn.Module):
        raise ValueError(f"{name} gives a {type(found).__name__}, not a torch.nn.Module")
    return found


def _build_batches(name: str) -> Iterable[Any]:
    found = _named_object(name)
    if callable(found):
        try:
            found = found()
        except TypeError as error:
            raise ValueError(f"{name} cannot be called without arguments ({error})") from None
    if hasattr(found, "val_dataloader"):
        found.prepare_data()
        found.setup("validate")
        found = found.val_dataloader()
    if (
        isinstance(found, list | tuple)
        and found
        and hasattr(found[0], "__iter__")
        and hasattr(found[0], "dataset")
    ):
        found = found[0]
    if not isinstance(found, Iterable):
        raise ValueError(f"{name} gives a {type(found).__name__}, which holds no batches")
    return found


def _fit_and_choose(name: str) -> tuple[list[Any], list[Any]]:
    """Give batches to fit on and others to choose on."""
    found = _named_object(name)
    found = found() if callable(found) else found
    if hasattr(found, "train_dataloader"):
        found.prepare_data()
        found.setup("fit")
        return list(found.train_dataloader()), list(_build_batches(name))
    batches = list(_build_batches(name))
    if len(batches) < 2:
        raise ValueError(
            f"{name} gives {len(batches)} batch; linearize needs at least one to fit on and one to "
            "choose on"
        )
    return batches[::2], batches[1::2]


if __name__ == "__main__":
    sys.exit(main())
