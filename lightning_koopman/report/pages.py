"""Renders reports as a page of HTML and as Markdown."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from lightning_koopman.report.comparison import newest_of_runs
from lightning_koopman.report.fields import ReportFields
from lightning_koopman.report.tables import (
    GLOSSARY,
    all_notes,
    columns,
    next_step,
    total_line,
    verdict,
    what_effects_are,
)
from lightning_koopman.report.text import with_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:78rem;margin:2rem auto;padding:0 1rem}
.wide{overflow-x:auto}th{cursor:pointer}img{max-width:100%}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem}
dt{font-weight:600}dd{margin:0}table{border-collapse:collapse}
th,td{padding:.25rem .5rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th{background:#f4f4f4;vertical-align:bottom}td:first-child,th:first-child,td.name,td.words,th:last-child{text-align:left}
td.words{white-space:normal;min-width:6rem}td.doubt{color:#9a9a9a}"""

_SORT = """document.querySelectorAll("th").forEach(h=>h.addEventListener("click",()=>{
const b=h.closest("table").tBodies[0],i=h.cellIndex,up=h.dataset.up!=="1";h.dataset.up=up?"1":"0";
const k=r=>r.cells[i].dataset.value??r.cells[i].textContent;
[...b.rows].sort((p,q)=>{const x=k(p),y=k(q),d=x-y;
return (Number.isNaN(d)?x.localeCompare(y):d)*(up?1:-1)}).forEach(r=>b.append(r))}))"""

_COLUMNS = {
    "credit": "credit",
    "gain": "gain",
    "r2": "R²",
    "chain_r2": "chain R²",
    "sensitivity": "sensitivity",
    "rank": "rank",
}


_METRIC = "metric then"


def to_html(reports: Sequence[ReportFields]) -> str:
    """Return reports as one page that works offline."""
    if not reports:
        raise ValueError("no report to show")
    from lightning_koopman.report.plots import plot_importance

    newest = newest_of_runs(reports)
    several = len(newest) > 1
    notes = dict.fromkeys(
        f"run {report.run}: {note}" if several else note
        for report in newest
        for note in all_notes(report)
    )
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    about = f" of {len(newest)} runs" if several else escape(newest[0].label)
    heading = f"Koopman credit{about}"
    summary = "".join(
        f"<p>{escape(report.label.strip()) + ': ' if several else ''}{_summary(report)}</p>"
        for report in newest
    )
    runs = [f", run {escape(report.run)}" if several else "" for report in newest]
    each = list(zip(newest, runs, strict=True))
    first = "".join(
        _picture("What each component is worth", run, plot_importance(report)[0]) for report, run in each
    )
    effects = "".join(_effects(report, run) for report, run in each)
    pictures = "".join(_pictures(reports, report, run) for report, run in each)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{heading}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{heading}</h1>{summary}{first}{effects}<h2>Credits</h2><p>Grey numbers carry the doubt "
        f"that their row ends with: do not act on them. Click a heading to sort.</p>{_credits(newest)}"
        f"{_glossary(newest)}{f'<h2>Notes</h2><ul>{listed}</ul>' if listed else ''}{pictures}"
        f"<script>{_SORT}</script></body></html>\n"
    )


def _summary(report: ReportFields) -> str:
    """Return what a report rests on, what it means for a decision, and what to do next."""
    said = "".join(f"<br><b>{escape(line)}</b>" for line in verdict(report))
    basis = f"{report.n_samples} samples, {total_line(report)}."
    return f"{basis}{said}<br>{escape(next_step(report))}"


def _glossary(newest: Sequence[ReportFields]) -> str:
    """Return one line per column that is shown."""
    shown = {"holds", "parameters", *_COLUMNS, "doubt"}
    effects = [report.effects for report in newest if report.effects is not None]
    shown |= {kind for found in effects for kind in found.kinds}
    shown |= {_METRIC for found in effects if found.metric}
    lines = "".join(
        f"<dt>{_COLUMNS.get(name, name)}</dt><dd>{escape(line)}</dd>"
        for name, line in GLOSSARY.items()
        if name in shown
    )
    return f"<h2>What the columns mean</h2><dl>{lines}</dl>"


def _pictures(reports: Sequence[ReportFields], newest: ReportFields, run: str) -> str:
    from lightning_koopman.report.plots import plot_directions, plot_evolution

    figures = {}
    of_run = [report for report in reports if report.run == newest.run]
    alike = [report for report in of_run if report.components == newest.components]
    if len(alike) > 1:
        figures["Credit over training"] = plot_evolution(alike)[0]
    if newest.directions:
        figures["Credit by output direction"] = plot_directions(newest)[0]
    return "".join(_picture(title, run, figure) for title, figure in figures.items())


def _picture(title: str, run: str, figure: Figure, heading: bool = True) -> str:
    above = f"<h2>{title}{run}</h2>" if heading else ""
    return f'{above}<img alt="{title}{run}" src="{_data_uri(figure)}">'


def _credits(newest: Sequence[ReportFields]) -> str:
    """Return one row per component and report, with run and step where there are several reports."""
    several = len(newest) > 1
    holding = all(len(report.types) == len(report.components) for report in newest)
    rows = []
    for report in newest:
        step = "" if report.step is None else report.step
        place = f"<td>{escape(report.run)}</td><td>{step}</td>" if several else ""
        doubted = {name: report.doubts_about(name) for name in _COLUMNS}
        shown = columns(report)
        for i, component in enumerate(report.components):
            own = f'<td class="name">{escape(component)}</td>'
            if holding:
                size = shown["parameters"][i]
                own += f'<td class="words">{escape(shown["holds"][i])}</td>'
                own += f'<td data-value="{size.replace(",", "") or 0}">{size}</td>'
            texts = "".join(
                _number(getattr(report, name)[i], report.stderr[name][i], bool(doubted[name][i]))
                for name in _COLUMNS
            )
            words = f'<td class="words">{shown["doubt"][i]}</td>'
            rows.append(f"<tr>{place}{own}{texts}{words}</tr>")
    own_names = ("component", *(("holds", "parameters") if holding else ()))
    return _table((*(("run", "step") if several else ()), *own_names, *_COLUMNS.values(), "doubt"), rows)


def _number(value: float, error: float, doubted: bool) -> str:
    mark = ' class="doubt"' if doubted else ""
    return f'<td data-value="{float(value)}"{mark}>{with_error(value, error)}</td>'


def _effects(report: ReportFields, run: str) -> str:
    """Return the effects of a report as a figure and a table, nothing where it has none."""
    from lightning_koopman.report.drawing import plot_effects

    if (effects := report.effects) is None:
        return ""
    names, rows = ["component"], []
    for kind in effects.kinds:
        names += [escape(kind), *([_METRIC] if kind in effects.metric else [])]
    for i, component in enumerate(effects.components):
        texts = ""
        for kind in effects.kinds:
            doubted = bool(effects.doubts_of(kind, i))
            texts += _number(effects.values[kind][i], effects.stderr[kind][i], doubted)
            if kind in effects.metric:
                texts += _number(effects.metric[kind][i], effects.metric_stderr[kind][i], False)
        words = "; ".join(
            f"{kind}: {', '.join(found)}"
            for kind in effects.kinds
            if (found := effects.doubts_of(kind, i))
        )
        last = f'<td class="words">{escape(words)}</td>'
        rows.append(f"<tr><td>{escape(component)}</td>{texts}{last}</tr>")
    ways = {*effects.how.values()}
    how = ", ".join(ways if len(ways) == 1 else (f"{escape(k)} {way}" for k, way in effects.how.items()))
    if effects.metric:
        how += f"; metric {effects.metric_before:.4f} as it was, ± standard error of its change"
    picture = (
        "" if effects.kinds == ("skip",) else _picture("Effects", run, plot_effects(effects)[0], False)
    )
    return (
        f"<h2>Effects of altering a component{run}</h2><p>{escape(effects.unit)}, "
        f"{effects.n_samples} samples; {how}.</p>{picture}{_table([*names, 'doubt'], rows)}"
    )


def _table(names: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def to_markdown(report: ReportFields) -> str:
    """Return the report as a Markdown table whose doubted numbers are marked."""
    found = columns(report, " ± ")
    for quantity in ("credit", "gain"):
        pairs = zip(found[quantity], report.doubts_about(quantity), strict=True)
        found[quantity] = [f"⚠ {text}" if doubts else text for text, doubts in pairs]
    lines = [
        f"**Koopman credit{report.label}**, {report.n_samples} samples, {total_line(report)}",
        "",
        f"| {' | '.join(found)} |",
        "|---" + "|---:" * (len(found) - 2) + "|---|",
    ]
    for name, *texts in zip(*found.values(), strict=True):
        shown = name.replace("|", "\\|")
        lines.append(f"| {' | '.join([shown, *texts])} |")
    below = (*verdict(report), *what_effects_are(report), *all_notes(report), next_step(report))
    lines += ["", *(f"- {line}" for line in below)]
    return "\n".join(lines).rstrip()
