"""A report as rows and as a table to read, and any table as plain text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.constrain import Constrain
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lightning_koopman.koopman.credit import QUANTITIES

if TYPE_CHECKING:
    from lightning_koopman.report.report import CreditReport


@dataclass(frozen=True)
class Captioned:
    """A table with lines below it.

    The caption of a table that is wider than the screen would lose the end of each line.

    Attributes:
        table: The table.
        lines: The lines, in rich's markup.
    """

    table: Table
    lines: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Wrap the lines to the table's width, or to the screen's if that is less."""
        yield self.table
        width = min(options.max_width, console.measure(self.table, options=options).maximum)
        if self.lines:
            yield Constrain(Text.from_markup("\n".join(self.lines), style="table.caption"), width)


def to_rows(report: CreditReport) -> list[dict[str, Any]]:
    """Return one flat row per component: quantities, predicted effects where there are any, doubts."""
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


def credit_table(report: CreditReport) -> Captioned:
    """Lay a report out, one row a component, dim where it carries a doubt."""
    table = Table(
        title=f"Koopman credit{escape(report.moment)}, {report.n_samples} samples\n"
        f"{report.directions} output directions, total {report.total:.3f} ± {report.total_stderr:.3f} "
        "nats a direction",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("component", overflow="fold", min_width=9)
    for name in ("credit", "gain", "nonlin.", "R²", "chain R²", "rank"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("doubt", min_width=5)
    for i, component in enumerate(report.components):
        table.add_row(
            escape(component),
            _with_error(report, "credit", i),
            _with_error(report, "gain", i),
            f"{report.nonlinearity[i]:.3f}",
            f"{report.r2[i]:.3f}",
            f"{report.chain_r2[i]:.3f}",
            f"{report.rank[i]:.0f}/{report.widths[i]}",
            ", ".join(report.doubts[i]),
            style="dim" if report.doubts[i] else None,
        )
    return Captioned(table, _caption(report))


def effects_table(report: CreditReport) -> Table:
    """Lay out the predicted effects of a report that has them, one row a component."""
    effects = report.effects
    if effects is None:
        raise ValueError("the report predicts no effects; predict_effects fills them in")
    table = Table(
        title=f"Predicted effects of altering a component, {effects.n_samples} samples: {effects.unit}",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("component", overflow="fold", min_width=9)
    for name in (*effects.values, "influence"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, component in enumerate(report.components):
        table.add_row(escape(component), *effects.cells(i))
    return table


def _with_error(report: CreditReport, name: str, i: int) -> str:
    return f"{getattr(report, name)[i]:.3f}±{report.stderr[name][i]:.3f}"


def _caption(report: CreditReport) -> list[str]:
    marked = int((~report.trusted).sum())
    doubt = (
        [f"{marked} of {len(report.components)} rows carry a doubt: do not act on them (README)."]
        if marked
        else []
    )
    return doubt + [f"Note: {escape(note)}" for note in report.notes]


def as_text(table: Any) -> str:
    """Render what rich can print as plain text."""
    file = io.StringIO()
    Console(file=file, width=130, color_system=None).print(table)
    return file.getvalue().rstrip()
