"""Renders reports as a page of HTML and as Markdown."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from lightning_koopman.report.comparison import newest_of_runs
from lightning_koopman.report.fields import ReportFields
from lightning_koopman.report.tables import columns, next_step, total_line, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd}
th{cursor:pointer;background:#f4f4f4}td:first-child,th:first-child{text-align:left}
td.doubt{color:#8a8a8a}img{max-width:100%}"""

_SORT = """document.querySelectorAll("th").forEach(h=>h.addEventListener("click",()=>{
const b=h.closest("table").tBodies[0],i=h.cellIndex,up=h.dataset.up!=="1";h.dataset.up=up?"1":"0";
const k=r=>r.cells[i].dataset.value??r.cells[i].textContent;
[...b.rows].sort((p,q)=>{const x=k(p),y=k(q),d=x-y;
return (Number.isNaN(d)?x.localeCompare(y):d)*(up?1:-1)}).forEach(r=>b.append(r))}))"""

_COLUMNS = ("credit", "gain", "nonlinearity", "sensitivity", "r2", "chain_r2", "rank")


def to_html(reports: Sequence[ReportFields]) -> str:
    """Return reports as one page that works offline."""
    if not reports:
        raise ValueError("no report to show")
    newest = newest_of_runs(reports)
    several = len(newest) > 1
    notes = dict.fromkeys(
        f"run {report.run}: {note}" if several else note for report in newest for note in report.notes
    )
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    heading = f" of {len(newest)} runs" if several else escape(newest[0].label)
    summary = "".join(
        f"<p>{escape(report.label.strip()) + ': ' if several else ''}{report.n_samples} samples, "
        f"{total_line(report)}.</p>"
        for report in newest
    )
    runs = [f", run {escape(report.run)}" if several else "" for report in newest]
    each = list(zip(newest, runs, strict=True))
    effects = "".join(_effects(report, run) for report, run in each)
    pictures = "".join(_pictures(reports, report, run) for report, run in each)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>Koopman credit</title><style>{_STYLE}</style></head><body>"
        f"<h1>Koopman credit{heading}</h1>{summary}<p>Grey numbers carry a doubt: do not act on them. "
        f"Click a heading to sort.</p>{_credits(newest)}{effects}<ul>{listed}</ul>{pictures}"
        f"<script>{_SORT}</script></body></html>\n"
    )


def _pictures(reports: Sequence[ReportFields], newest: ReportFields, run: str) -> str:
    from lightning_koopman.report.plots import plot_directions, plot_evolution, plot_report

    figures = {"Credits and gains": plot_report(newest)}
    of_run = [report for report in reports if report.run == newest.run]
    alike = [report for report in of_run if report.components == newest.components]
    if len(alike) > 1:
        figures["Credit over training"] = plot_evolution(alike)
    if newest.directions:
        figures["Credit by output direction"] = plot_directions(newest)
    return "".join(
        f'<h2>{title}{run}</h2><img alt="{title}{run}" src="{_data_uri(figure)}">'
        for title, figure in figures.items()
    )


def _credits(newest: Sequence[ReportFields]) -> str:
    """Return one row per component and report, with run and step where there are several reports."""
    several = len(newest) > 1
    rows = []
    for report in newest:
        place = f"<td>{escape(report.run)}</td><td>{report.step}</td>" if several else ""
        marks = {name: report.doubts_of(name) for name in _COLUMNS}
        for i, (component, doubts) in enumerate(zip(report.components, report.doubts, strict=True)):
            texts = ""
            for name in _COLUMNS:
                value, error = getattr(report, name)[i], report.stderr[name][i]
                mark = ' class="doubt"' if marks[name][i] else ""
                texts += f'<td{mark} data-value="{float(value)}">{value:.3f} ± {error:.3f}</td>'
            name = f"<td>{escape(component)}</td>"
            rows.append(f"<tr>{place}{name}{texts}<td>{', '.join(doubts)}</td></tr>")
    return _table((*(("run", "step") if several else ()), "component", *_COLUMNS, "doubt"), rows)


def _effects(report: ReportFields, run: str) -> str:
    """Return the effects of a report, nothing where it has none."""
    if (effects := report.effects) is None:
        return ""
    rows = []
    for i, component in enumerate(effects.components):
        texts = "".join(
            f'<td data-value="{effects.values[kind][i]}">{effects.cell(kind, i)}</td>'
            for kind in effects.kinds
        )
        rows.append(f"<tr><td>{escape(component)}</td>{texts}</tr>")
    how = ", ".join(f"{escape(kind)} {way}" for kind, way in effects.how.items())
    return (
        f"<h2>Effects of altering a component{run}</h2><p>{escape(effects.unit)}, {effects.n_samples} "
        f"samples; {how}.</p>{_table(('component', *map(escape, effects.kinds)), rows)}"
    )


def _table(names: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def to_markdown(report: ReportFields) -> str:
    """Return the report as a Markdown table; a number with a doubt ends with a question mark."""
    found = columns(report, " ± ")
    lines = [
        f"**Koopman credit{report.label}**, {report.n_samples} samples, {total_line(report)}",
        "",
        f"| {' | '.join(found)} |",
        "|---" + "|---:" * (len(found) - 2) + "|---|",
    ]
    for name, *texts in zip(*found.values(), strict=True):
        shown = name.replace("|", "\\|")
        lines.append(f"| {' | '.join([shown, *texts])} |")
    lines += ["", *(f"- {line}" for line in (*verdict(report), *report.notes, next_step(report)))]
    return "\n".join(lines).rstrip()
