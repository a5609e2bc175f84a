"""The commands that show, compare and join reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich.console import Console

from lightning_koopman.report import CreditReport
from lightning_koopman.user_code import build_batches, build_trained


def report(
    file: str,
    out: str | None = None,
    format: Literal["json", "csv", "html"] = "html",
) -> None:
    """Show saved reports again, without the model.

    Args:
        file: JSON file that evaluate, demo or to_json wrote.
        out: File to write; by default the reports are printed.
        format: Kind of that file.
    """
    from lightning_koopman.formats import read_reports, write_reports

    reports = read_reports(file)
    if out is None:
        show_reports(reports)
    else:
        write_reports(reports, out, format)


def compare(
    before: str,
    after: str,
    model: str | None = None,
    data: str | None = None,
    quantity: Literal["credit", "gain", "nonlinearity", "sensitivity"] = "credit",
    trust_checkpoint: bool = False,
    weights: Literal["saved", "averaged", "current"] = "saved",
) -> None:
    """Show which components changed beyond error between two checkpoints or two saved reports.

    Args:
        before: A checkpoint, or a JSON file of reports, whose last one counts.
        after: Another of the same kind.
        model: Model to build, as pkg.mod:Class; needed for checkpoints.
        data: Data to measure on, as pkg.mod:DataModule; needed for checkpoints.
        quantity: Which number.
        trust_checkpoint: Unpickle whatever the checkpoints hold. They may then run any code.
        weights: Which weights of a training with weight averaging: as saved, averaged or current.

    Raises:
        ValueError: If checkpoints come without model and data.
    """
    from lightning_koopman.comparison import changes_table
    from lightning_koopman.evaluate import credit_report
    from lightning_koopman.formats import read_reports

    found = []
    for path in (before, after):
        if path.endswith(".json"):
            found.append(read_reports(path)[-1])
            continue
        if model is None or data is None:
            raise ValueError(f"{path} is no .json report, so it needs --model and --data to be measured")
        network, checkpoint = build_trained(model, path, trust_checkpoint, weights)
        batches = build_batches(data, checkpoint.data_hyper_parameters)
        found.append(credit_report(network, batches, step=checkpoint.step))
    Console().print(changes_table(found[0], found[1], quantity))


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


def show_reports(reports: Sequence[CreditReport]) -> None:
    """Print reports, and a table over all of them where they are of several runs.

    Args:
        reports: The reports.
    """
    from lightning_koopman.comparison import runs_table

    for shown in reports:
        Console().print(shown)
    if len({shown.run for shown in reports}) > 1:
        Console().print(runs_table(reports))
