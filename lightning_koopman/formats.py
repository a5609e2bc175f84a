"""Reports as plain rows, Markdown and files, and back."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_koopman import report_files
from lightning_koopman.credit import QUANTITIES
from lightning_koopman.html import to_html
from lightning_koopman.report import CreditReport
from lightning_koopman.schema import ReportFormatError, read_json
from lightning_koopman.whole_files import whole_file

Format = Literal["json", "csv", "parquet", "html"]


def to_rows(report: CreditReport) -> list[dict[str, Any]]:
    """Give one flat row a component.

    Args:
        report: The report.

    Returns:
        Rows with the run, the step, the component, every quantity and its standard error, the
        influence and the predicted effects where there are any, and the doubts.
    """
    rows = []
    for i, component in enumerate(report.components):
        row: dict[str, Any] = {"run": report.run, "step": report.step, "component": component}
        for name in QUANTITIES:
            row[name] = float(getattr(report, name)[i])
            row[f"{name}_stderr"] = float(report.stderr[name][i])
        if report.effects is not None:
            row["influence"] = float(report.influence[i])
            row["influence_stderr"] = float(report.effects.influence_stderr[i])
            for kind, effect in report.effects.values.items():
                row[f"effect_{kind}"] = float(effect[i])
                row[f"effect_{kind}_stderr"] = float(report.effects.stderr[kind][i])
        row["width"] = report.widths[i]
        row["doubt"] = ", ".join(report.doubts[i])
        rows.append(row)
    return rows


def to_markdown(report: CreditReport) -> str:
    """Give the report as a Markdown table whose doubted rows are marked.

    Args:
        report: The report.

    Returns:
        A title, the table and the notes. Rows that carry a doubt begin with a warning sign.
    """
    lines = [
        f"**Koopman credit{report.moment}**, {report.n_samples} samples, {report.directions} output "
        f"directions, total {report.total:.3f} ± {report.total_stderr:.3f} nats a direction",
        "",
        "| component | credit | gain | nonlinearity | R² | chain R² | rank | doubt |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for i, component in enumerate(report.components):
        name = component.replace("|", "\\|")
        doubt = ", ".join(report.doubts[i])
        cells = [
            f"⚠ {name}" if doubt else name,
            f"{report.credit[i]:.3f} ± {report.stderr['credit'][i]:.3f}",
            f"{report.gain[i]:.3f} ± {report.stderr['gain'][i]:.3f}",
            f"{report.nonlinearity[i]:.3f}",
            f"{report.r2[i]:.3f}",
            f"{report.chain_r2[i]:.3f}",
            f"{report.rank[i]:.0f}/{report.widths[i]}",
            doubt,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if report.effects is not None:
        kinds = list(report.effects.values)
        lines += ["", f"Predicted effects, {report.effects.unit}:", ""]
        lines += [
            f"| component | {' | '.join(kinds)} | influence |",
            "|---" + "|---:" * (len(kinds) + 1) + "|",
        ]
        for i, component in enumerate(report.components):
            name = component.replace("|", "\\|")
            lines.append(f"| {name} | {' | '.join(report.effects.cells(i))} |")
    lines += ["", *(f"- {note}" for note in report.notes)]
    return "\n".join(lines).rstrip()


def write_reports(
    reports: Sequence[CreditReport], path: str | os.PathLike[str], kind: Format = "json"
) -> None:
    """Write reports to one file, whole or not at all.

    Args:
        reports: The reports.
        path: The file.
        kind: ``"json"`` can be read back; ``"csv"`` and ``"parquet"`` hold one row a component and
            report, and need pandas; ``"html"`` is a page to look at.

    Raises:
        ModuleNotFoundError: If pandas, or pyarrow for Parquet, is not installed.
    """
    if kind == "json":
        report_files.write_reports(reports, path)
        return
    if kind == "html":
        with whole_file(path) as temporary:
            temporary.write_text(to_html(reports), encoding="utf-8")
        return
    try:
        pandas = importlib.import_module("pandas")
        if kind == "parquet":
            importlib.import_module("pyarrow")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"--format {kind} needs {error.name}: pip install 'lightning-koopman[tables]'"
        ) from None
    frame = pandas.DataFrame([row for report in reports for row in to_rows(report)])
    with whole_file(path) as temporary:
        (frame.to_csv if kind == "csv" else frame.to_parquet)(temporary, index=False)


def write_with_known(
    reports: Sequence[CreditReport], path: str | os.PathLike[str], kind: Format = "json"
) -> None:
    """Write reports so that a second evaluation can take them over.

    Args:
        reports: The reports; without any, only JSON is written.
        path: The file. Beside a kind that cannot be read back, ``path.json`` is written too.
        kind: As in :func:`write_reports`.
    """
    if kind != "json":
        report_files.write_reports(reports, _beside(path))
    if reports or kind == "json":
        write_reports(reports, path, kind)


def read_known(path: str | os.PathLike[str], kind: Format = "json") -> list[CreditReport]:
    """Read what :func:`write_with_known` wrote.

    Args:
        path: The file.
        kind: Its kind.

    Returns:
        The reports; none if there is no file yet.

    Raises:
        ReportFormatError: If the file holds something else.
    """
    source = path if kind == "json" else _beside(path)
    if not Path(source).exists():
        return []
    try:
        return report_files.read_reports(source)
    except ReportFormatError as error:
        raise ReportFormatError(
            f"{error}. Name another --out, or pass --fresh to replace the file"
        ) from None


def _beside(path: str | os.PathLike[str]) -> str:
    return f"{os.fspath(path)}.json"


def read_reports(path: str | os.PathLike[str]) -> list[CreditReport]:
    """Read a JSON file of one report or several.

    Args:
        path: What :func:`write_reports` or :meth:`CreditReport.to_json` wrote.

    Returns:
        The reports, without operators.

    Raises:
        ReportFormatError: If the file does not exist or holds something else.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise ReportFormatError(f"{os.fspath(path)} cannot be read: {error.strerror}") from None
    try:
        parts = content if isinstance(content, list) else [content]
        reports = [CreditReport.from_dict(part) for part in parts]
    except ReportFormatError as error:
        raise ReportFormatError(f"{os.fspath(path)} holds no report: {error}") from None
    if not reports:
        raise ReportFormatError(f"{os.fspath(path)} holds an empty list of reports")
    return reports
