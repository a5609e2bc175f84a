"""A report as rows and as a table to read, and any table as plain text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.constrain import Constrain
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightning_koopman.koopman.credit import QUANTITIES
from lightning_koopman.report.fields import ReportFields

COLUMNS = ("credit", "gain", "nonlinearity", "R²", "chain R²", "rank", "doubt")
"""Headings of :func:`cells`."""


@dataclass(frozen=True)
class Captioned:
    """A table with lines of rich's markup below it.

    The caption of a table that is wider than the screen would lose the end of each line.
    """

    table: Table
    lines: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Wrap the lines to the table's width, or to the screen's if that is less."""
        yield self.table
        width = min(options.max_width, console.measure(self.table, options=options).maximum)
        if self.lines:
            yield Constrain(Text.from_markup("\n".join(self.lines), style="table.caption"), width)


def to_rows(report: ReportFields) -> list[dict[str, Any]]:
    """Return one flat row per component: quantities, predicted effects where there are any, doubts."""
    rows = []
    for i, (component, doubts) in enumerate(zip(report.components, report.doubts, strict=True)):
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
        rows.append(row | {"width": report.widths[i], "doubt": ", ".join(doubts)})
    return rows


def total_line(report: ReportFields) -> str:
    """Return the number of directions and the total as words."""
    return (
        f"{report.directions} output directions, total {report.total:.3f} ± {report.total_stderr:.3f} "
        "nats per direction"
    )


def cells(report: ReportFields, i: int, sign: str = "±") -> list[str]:
    """Return what a reader sees of the component of that index, one text per heading."""
    both = ((getattr(report, name)[i], report.stderr[name][i]) for name in ("credit", "gain"))
    with_error = [f"{value:.3f}{sign}{error:.3f}" for value, error in both]
    bare = [f"{values[i]:.3f}" for values in (report.nonlinearity, report.r2, report.chain_r2)]
    return [*with_error, *bare, f"{report.rank[i]:.0f}/{report.widths[i]}", ", ".join(report.doubts[i])]


def new_table(title: str, numbers: Sequence[str]) -> Table:
    """Return an empty table with a column of names and others of numbers."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("component", overflow="fold", min_width=9)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def credit_table(report: ReportFields) -> Captioned:
    """Lay a report out, one row per component, dim where it carries a doubt."""
    title = f"Koopman credit{escape(report.label)}, {report.n_samples} samples\n{total_line(report)}"
    table = new_table(title, [name.replace("nonlinearity", "nonlin.") for name in COLUMNS[:-1]])
    table.add_column("doubt", min_width=5)
    for i, component in enumerate(report.components):
        texts = cells(report, i)
        table.add_row(escape(component), *texts, style="dim" if texts[-1] else None)
    lines = [f"Note: {escape(note)}" for note in report.notes]
    if marked := int((~report.trusted).sum()):
        doubt = f"{marked} of {len(report.components)} rows carry a doubt: do not act on them (README)."
        lines.insert(0, doubt)
    return Captioned(table, lines)


def effects_table(report: ReportFields) -> Table:
    """Lay out the predicted effects of a report that has them, one row per component."""
    effects = report.effects
    if effects is None:
        raise ValueError("the report predicts no effects; predict_effects fills them in")
    title = f"Predicted effects of altering a component, {effects.n_samples} samples: {effects.unit}"
    table = new_table(title, [*effects.values, "influence"])
    for i, component in enumerate(report.components):
        table.add_row(escape(component), *effects.cells(i))
    return table


def as_text(table: Any) -> str:
    """Render what rich can print as plain text."""
    file = io.StringIO()
    Console(file=file, width=130, color_system=None).print(table)
    return file.getvalue().rstrip()
