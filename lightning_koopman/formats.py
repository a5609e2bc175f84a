"""Reports as Markdown and files, and back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_koopman import report_files
from lightning_koopman.html import to_html
from lightning_koopman.report import CreditReport
from lightning_koopman.schema import ReportFormatError, read_json
from lightning_koopman.whole_files import whole_file

Format = Literal["json", "csv", "html"]


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
        kind: ``"json"`` can be read back; ``"csv"`` holds one row per component and report;
            ``"html"`` is a page to look at.
    """
    if kind == "json":
        report_files.write_reports(reports, path)
        return
    with whole_file(path) as temporary:
        if kind == "html":
            temporary.write_text(to_html(reports), encoding="utf-8")
        else:
            import pandas

            pandas.concat([report.to_frame() for report in reports]).to_csv(temporary, index=False)


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
