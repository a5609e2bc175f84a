"""Renders reports as text, Markdown, JSON, CSV and HTML, and reads files of them."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_koopman.report import files as report_files
from lightning_koopman.report.comparison import newest_of_runs
from lightning_koopman.report.report import CreditReport
from lightning_koopman.report.saved import ReportFormatError, read_json, whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd}
th{cursor:pointer;background:#f4f4f4}td:first-child,th:first-child{text-align:left}
tr.doubt{color:#8a8a8a}img{max-width:100%}"""

_SORT = """document.querySelectorAll("th").forEach(h=>h.addEventListener("click",()=>{
const b=h.closest("table").tBodies[0],i=h.cellIndex,up=h.dataset.up!=="1";h.dataset.up=up?"1":"0";
const k=r=>r.cells[i].dataset.value??r.cells[i].textContent;
[...b.rows].sort((p,q)=>{const x=k(p),y=k(q),d=x-y;
return (Number.isNaN(d)?x.localeCompare(y):d)*(up?1:-1)}).forEach(r=>b.append(r))}))"""

_COLUMNS = ("credit", "gain", "nonlinearity", "sensitivity", "r2", "chain_r2", "rank")


def to_html(reports: Sequence[CreditReport]) -> str:
    """Give reports as one page that works offline."""
    if not reports:
        raise ValueError("no report to show")
    newest = newest_of_runs(reports)
    several = len(newest) > 1
    notes = dict.fromkeys(
        f"run {report.run}: {note}" if several else note for report in newest for note in report.notes
    )
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    heading = f" of {len(newest)} runs" if several else escape(newest[0].moment)
    summary = "".join(f"<p>{_summary(report, several)}</p>" for report in newest)
    pictures = "".join(_pictures(reports, report, several) for report in newest)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>Koopman credit</title><style>{_STYLE}</style></head><body>"
        f"<h1>Koopman credit{heading}</h1>{summary}<p>Grey rows carry a doubt: do not act on them. "
        f"Click a heading to sort.</p>{_table(newest)}{_effects(newest)}<ul>{listed}</ul>{pictures}"
        f"<script>{_SORT}</script></body></html>\n"
    )


def _summary(report: CreditReport, several: bool) -> str:
    name = f"{escape(report.moment.strip())}: " if several else ""
    return (
        f"{name}{report.n_samples} samples, {report.directions} output directions, total "
        f"{report.total:.3f} ± {report.total_stderr:.3f} nats a direction."
    )


def _pictures(reports: Sequence[CreditReport], newest: CreditReport, several: bool) -> str:
    from lightning_koopman.report.plots import plot_directions, plot_evolution, plot_report

    figures = {"Credits and gains": plot_report(newest)}
    of_run = [report for report in reports if report.run == newest.run]
    alike = [report for report in of_run if report.components == newest.components]
    if len(alike) > 1:
        figures["Credit over training"] = plot_evolution(alike)
    if newest.directions:
        figures["Credit by output direction"] = plot_directions(newest)
    run = f", run {escape(newest.run)}" if several else ""
    return "".join(
        f'<h2>{title}{run}</h2><img alt="{title}{run}" src="{_data_uri(figure)}">'
        for title, figure in figures.items()
    )


def _table(newest: Sequence[CreditReport]) -> str:
    """Give one row a component and report, with run and step where there are several reports."""
    several = len(newest) > 1
    names = (*(("run", "step") if several else ()), "component", *_COLUMNS, "doubt")
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = []
    for report in newest:
        place = f"<td>{escape(report.run)}</td><td>{report.step}</td>" if several else ""
        for i, component in enumerate(report.components):
            cells = [f"{place}<td>{escape(component)}</td>"]
            for name in _COLUMNS:
                value, error = float(getattr(report, name)[i]), float(report.stderr[name][i])
                cells.append(f'<td data-value="{value}">{value:.3f} ± {error:.3f}</td>')
            doubt = ", ".join(report.doubts[i])
            mark = ' class="doubt"' if doubt else ""
            rows.append(f"<tr{mark}>{''.join(cells)}<td>{doubt}</td></tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _effects(newest: Sequence[CreditReport]) -> str:
    """Give the predicted effects, one table a report that has them."""
    tables = []
    for report in newest:
        if report.effects is None:
            continue
        run = f", run {escape(report.run)}" if len(newest) > 1 else ""
        columns = [*report.effects.values.values(), report.influence]
        head = "".join(f"<th>{name}</th>" for name in (*report.effects.values, "influence"))
        rows = []
        for i, component in enumerate(report.components):
            texts = zip(columns, report.effects.cells(i), strict=True)
            cells = "".join(f'<td data-value="{v[i]}">{text}</td>' for v, text in texts)
            rows.append(f"<tr><td>{escape(component)}</td>{cells}</tr>")
        tables.append(
            f"<h2>Predicted effects of altering a component{run}</h2><p>{escape(report.effects.unit)}, "
            f"{report.effects.n_samples} samples.</p><table><thead><tr><th>component</th>{head}</tr>"
            f"</thead><tbody>{''.join(rows)}</tbody></table>"
        )
    return "".join(tables)


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


Format = Literal["json", "csv", "html"]


def to_markdown(report: CreditReport) -> str:
    """Give the report as a Markdown table whose doubted rows are marked."""
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
    """Write reports to one file, whole or not at all."""
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
    """Write reports so that a second evaluation can take them over."""
    if kind != "json":
        report_files.write_reports(reports, _beside(path))
    if reports or kind == "json":
        write_reports(reports, path, kind)


def read_known(path: str | os.PathLike[str], kind: Format = "json") -> list[CreditReport]:
    """Read what :func:`write_with_known` wrote."""
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
    """Read a JSON file of one report or several."""
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
