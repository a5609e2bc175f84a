"""The commands: each parameter is an option, and its line here is what ``--help`` says of it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import progress
from rich.console import Console

from lightning_koopman.cli.user_code import build_batches, build_model, build_trained
from lightning_koopman.koopman.options import DEFAULTS, Options
from lightning_koopman.network.weights import Weights
from lightning_koopman.report.effects import Kind
from lightning_koopman.report.report import CreditReport
from lightning_koopman.report.saved import folder_of
from lightning_koopman.report.text import counted


def report(file: str, out: str | None = None) -> None:
    """Show saved reports again, without the model.

    Args:
        file: JSON file that evaluate, demo or to_json wrote.
        out: File to write, by its name json, csv or else HTML; by default the reports are printed.
    """
    from lightning_koopman.report.files import read_reports, write_reports

    check_writable(out)
    reports = read_reports(file, may_be_empty=False)
    if out is None:
        show_reports(reports)
    else:
        write_reports(reports, out, otherwise="html")
        say_written(out)


def compare(
    before: str,
    after: str,
    model: str | None = None,
    data: str | None = None,
    quantity: Literal["credit", "gain", "nonlinearity", "sensitivity"] = "credit",
    trust_checkpoint: bool = False,
    weights: Weights = "saved",
) -> None:
    """Show which components changed beyond error between two checkpoints or two saved reports.

    Args:
        before: A checkpoint, or a JSON file of reports, whose last one counts.
        after: Another of the same kind.
        model: Model to build, as in evaluate; needed for checkpoints.
        data: Data to measure on, as in evaluate; needed for checkpoints.
        quantity: Which number.
        trust_checkpoint: Unpickle whatever the checkpoints hold. They may then run any code.
        weights: Which weights of a training with weight averaging: as saved, averaged or current.
    """
    from lightning_koopman.measurement.drift import drift
    from lightning_koopman.measurement.evaluate import credit_report
    from lightning_koopman.report.comparison import changes_table
    from lightning_koopman.report.files import read_reports

    found: list[CreditReport] = []
    for path in (before, after):
        is_report = path.lower().endswith(".json")
        if is_report:
            found.append(read_reports(path, may_be_empty=False)[-1])
            continue
        if model is None or data is None:
            raise ValueError(f"{path} is no .json report, so it needs --model and --data to be measured")
        network, checkpoint = build_trained(model, path, trust_checkpoint, weights)
        batches = build_batches(data, checkpoint.data_hyper_parameters)
        found.append(credit_report(network, batches, step=checkpoint.step))
    console = Console()
    console.print(changes_table(found[0], found[1], quantity))
    if data is not None and found[0].reference is not None and not is_report:
        # Anew, for what was measured on may be used up.
        batches = build_batches(data, checkpoint.data_hyper_parameters)
        console.print(drift(found[0], network, batches, step=checkpoint.step))
    else:
        console.print(
            "A saved report holds no operators. To see which component does something else, run "
            "lightning-koopman evaluate --reference FILE on one checkpoint and drift FILE on the other.",
            soft_wrap=True,
        )


def merge(reports: list[str], out: str) -> None:
    """Put the reports of several shards of one evaluation in one file, sorted by step.

    Args:
        reports: JSON files that evaluate wrote with --shard.
        out: File for all of them, by its name csv, html or else JSON.
    """
    from lightning_koopman.report.files import merge_reports, write_reports

    check_writable(out)
    merged = merge_reports(reports)
    write_reports(merged, out)
    told = f"{counted(len(merged), 'report')} in {out}"
    Console().print(told, highlight=False, soft_wrap=True, markup=False)


def check_writable(*paths: str | None, figure: str | None = None) -> None:
    """Refuse files that could not be written before the work is done that is to be in them."""
    for path in filter(None, (*paths, figure)):
        folder = folder_of(path)
        if Path(path).is_dir():
            raise IsADirectoryError(f"{path} cannot be written, for it is a folder; name a file in it")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(
                f"{path} cannot be written, for no file can be made in {folder}; name another folder"
            )
    if figure is not None and (kind := Path(figure).suffix[1:].lower()):
        from matplotlib.backend_bases import FigureCanvasBase

        if kind not in (known := FigureCanvasBase.get_supported_filetypes()):
            raise ValueError(
                f"{figure} is no figure that can be drawn; end its name in .{', .'.join(known)}"
            )


def check_table(out: str | None) -> None:
    """Refuse a page for numbers that only a table is made of."""
    if out is not None and out.lower().endswith(".html"):
        raise ValueError(
            f"{out} would be a page, and pages are made of reports alone; end its name in .json or .csv"
        )


def say_written(*paths: str | None) -> None:
    """Print where results went, if anywhere."""
    for path in filter(None, paths):
        Console().print(f"Written to {path}", highlight=False, soft_wrap=True, markup=False)


def show_reports(reports: Sequence[CreditReport]) -> None:
    """Print reports, and a table over all of them where they are of several runs."""
    from lightning_koopman.report.comparison import runs_table

    for shown in reports:
        Console().print(shown)
    if len({shown.run for shown in reports}) > 1:
        Console().print(runs_table(reports))


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


def drift(
    reference: str,
    model: str,
    data: str,
    ckpt: str,
    figure: str | None = None,
    out: str | None = None,
    max_samples: int | None = None,
    trust_checkpoint: bool = False,
    weights: Weights = "saved",
) -> None:
    """Show which components do something else than when a reference was measured.

    Args:
        reference: File that evaluate --reference or save_reference wrote.
        model: Model to build, as in evaluate.
        data: Data to measure on, as in evaluate; the same as the reference's or others.
        ckpt: Checkpoint of the network as it is now.
        figure: File for a figure.
        out: File for the numbers: JSON if its name ends in .json, else CSV; no page.
        max_samples: Most samples to take; all by default.
        trust_checkpoint: Unpickle whatever the checkpoint holds. It may then run any code.
        weights: Which weights of a training with weight averaging: as saved, averaged or current.
    """
    from lightning_koopman.measurement import drift as measurement
    from lightning_koopman.report.files import write_table
    from lightning_koopman.report.reference_file import read_reference

    # Whatever is wrong should be known before a model is built.
    check_writable(out, figure=figure)
    check_table(out)
    read_reference(reference)
    network, checkpoint = build_trained(model, ckpt, trust_checkpoint, weights)
    batches = build_batches(data, checkpoint.data_hyper_parameters)
    found = measurement.drift(reference, network, batches, max_samples=max_samples, step=checkpoint.step)
    if figure is not None:
        found.plot()[0].savefig(figure)
    if out is not None:
        write_table(found.to_frame(), out)
    say_written(figure, out)
    # The last line says what to do next.
    Console().print(found)


def evaluate(
    model: str,
    data: str,
    ckpt: str | list[str],
    logdir: str | None = None,
    out: str | None = None,
    components: str | list[str] | None = None,
    options: Options = DEFAULTS,
    trust_checkpoint: bool = False,
    shard: str = "1/1",
    fresh: bool = False,
    weights: Weights = "saved",
    effects: bool | list[Kind] = False,
    initial_checkpoint: str | None = None,
    reference: str | None = None,
) -> None:
    """Measure the credits of saved checkpoints, each at its own global step.

    Args:
        model: Model to build, as pkg.mod:Class or pkg.mod:function. A LightningModule gets the
            hyperparameters that its checkpoint saved.
        data: Data to measure on, as pkg.mod:DataModule (its validation loader; it gets the
            hyperparameters that the checkpoint saved), or a function or object that gives batches.
        ckpt: Path or glob pattern of checkpoints, a folder of .ckpt files, or a list of these.
        logdir: Folder for TensorBoard event files.
        out: File for the reports, by its name csv, html or else JSON, written after every checkpoint, or
            as often as that takes a quarter of the time. A second run with the same file measures only
            checkpoints that are new or changed, or all if an option changed. It cannot see changes of
            the model's code or of the data: use fresh then. Beside csv and html, a .json file of the
            same name is kept for the second run and the report command.
        components: Names or glob patterns of components; chosen by default.
        options: How states become rows, and rows become credits.
        trust_checkpoint: Unpickle whatever the checkpoints hold. They may then run any code.
        shard: i/n takes every n-th checkpoint from the i-th on, for n machines; then use merge.
        fresh: Measure again what was measured before.
        weights: Which weights of a training with weight averaging: as saved, averaged or current.
        effects: Also tell what altering each component does to the outputs: all kinds, or those
            of a list such as [linear,skip].
        initial_checkpoint: Weights that training began with, for the effect of going back to them; by
            default they are drawn anew.
        reference: File for what the drift command needs of the last checkpoint.
    """
    from lightning_koopman.checkpoints.series import EvaluationError, evaluate_checkpoints
    from lightning_koopman.report.files import read_known, write_with_known

    check_writable(out, reference)
    if reference is not None and options.errors is False:
        raise ValueError(f"{reference} is made of what errors are; leave --options.errors false out")
    part = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
    if part is None:
        raise ValueError(f"shard is {shard!r}; write i/n with i from 1 to n")
    known = [] if out is None or fresh else read_known(out)
    of_model, of_data = _first_hyper_parameters(ckpt, trust_checkpoint)
    network, batches = build_model(model, of_model), build_batches(data, of_data)
    console = Console(stderr=True)

    def show_known(taken: int, total: int) -> None:
        if known:
            told = f"{taken} of {counted(total, 'report')} taken over from {out}"
            console.print(told, highlight=False, soft_wrap=True, markup=False)

    def save(reports: list[CreditReport]) -> None:
        if out is not None:
            write_with_known(reports, out)

    saved, took = 0.0, 0.0

    def save_often(reports: list[CreditReport]) -> None:
        nonlocal saved, took
        # All of them are written each time: many would take longer to write than one to measure.
        if (began := time.perf_counter()) - saved > 3 * took:
            save(reports)
            saved = time.perf_counter()
            took = saved - began

    failure = None
    columns = progress.Progress.get_default_columns()[:2]
    bar = progress.Progress(
        *columns, progress.MofNCompleteColumn(), progress.TimeRemainingColumn(), console=console
    )
    with bar:
        task = bar.add_task("checkpoints", total=None, visible=False)
        try:
            reports = evaluate_checkpoints(
                network,
                ckpt,
                batches,
                logdir=logdir,
                trust_checkpoint=trust_checkpoint,
                on_progress=lambda done, total: bar.update(
                    task, completed=done, total=total, visible=total > 0
                ),
                on_report=save_often,
                on_known=show_known,
                shard=(int(part[1]), int(part[2])),
                known=known,
                about={"model": model, "data": data},
                weights=weights,
                effects=effects,
                initial=initial_checkpoint,
                components=components,
                options=options,
            )
        except EvaluationError as error:
            failure, reports = error, error.reports
    show_reports(reports)
    save(reports)
    if out is not None and reports:
        say_written(out)
    if reference is not None and reports:
        if reports[-1].reference is not None:
            reports[-1].save_reference(reference)
            say_written(reference)
        elif failure is None:
            raise ValueError(
                f"the last report was taken over from {out}, which holds no reference; add --fresh to "
                "measure it again"
            )
    if failure is not None:
        raise failure


def _first_hyper_parameters(
    ckpt: str | list[str], trust: bool
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the arguments of model and DataModule that the first readable checkpoint saved."""
    from lightning_koopman.network.weights import CheckpointError, find_checkpoints, load_checkpoint

    for path in find_checkpoints(ckpt):
        try:
            checkpoint = load_checkpoint(path, trust=trust)
        except CheckpointError:
            continue
        return checkpoint.hyper_parameters, checkpoint.data_hyper_parameters
    return {}, {}


def components(
    model: str,
    data: str | None = None,
    components: str | list[str] | None = None,
    depth: int | None = None,
    max_dim: int = DEFAULTS.max_dim,
) -> None:
    """List what would be reported as components, without measuring it.

    Args:
        model: Model to build, as pkg.mod:Class or pkg.mod:function.
        data: Data as in evaluate, whose first batch is run for shapes and state widths.
        components: Names or glob patterns of components; chosen by default.
        depth: Take the parts at this depth of the module tree instead.
        max_dim: Wider states are pooled and projected.
    """
    from lightning_koopman.measurement.overview import describe_components

    if components is not None and depth is not None:
        raise ValueError(f"components is {components!r} and depth is {depth}; give one of the two")
    found = describe_components(
        build_model(model, {}, "without arguments"),
        None if data is None else build_batches(data),
        components=components if depth is None else depth,
        max_dim=max_dim,
    )
    Console().print(found)
