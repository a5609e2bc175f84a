"""Reports side by side: the newest of every run, and what changed between two."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from scipy.special import stdtrit

from lightning_koopman.report.fields import ReportFields
from lightning_koopman.report.tables import columns


def newest_of_runs(reports: Sequence[ReportFields]) -> list[ReportFields]:
    """Return the last report of every run."""
    return list({report.run: report for report in reports}.values())


def runs_table(reports: Sequence[ReportFields]) -> Table:
    """Lay several runs out side by side, component by component."""
    table = Table(title="Newest of every run; dim numbers carry the doubt", box=SIMPLE_HEAD)
    for name in ("component", "run", "step", "credit", "gain", "doubt"):
        table.add_column(name, justify="right" if name in {"step", "credit", "gain"} else "left")
    rows: dict[str, list[list[str]]] = {}
    for report in newest_of_runs(reports):
        found, step = columns(report), "" if report.step is None else str(report.step)
        for name in ("credit", "gain"):
            pairs = zip(found[name], report.doubts_about(name), strict=True)
            found[name] = [f"[dim]{text}[/]" if doubts else text for text, doubts in pairs]
        numbers = zip(found["credit"], found["gain"], found["doubt"], strict=True)
        for component, own in zip(report.components, numbers, strict=True):
            row = [escape(component), escape(report.run), step, *own]
            rows.setdefault(component, []).append(row)
    for row in itertools.chain(*rows.values()):
        table.add_row(*row)
    return table


def changes(before: ReportFields, after: ReportFields, quantity: str = "credit") -> list[dict[str, Any]]:
    """Compute which components changed beyond error, at the 95 % level.

    The two errors are added in quadrature, as for independent samples, and the difference over them is
    held against the quantile of Student's t with Welch's degrees of freedom: jackknife errors of few
    folds are themselves uncertain. Over the same samples the error of the difference is usually smaller,
    so this is the cautious side.

    References:
        Welch (1947), Biometrika 34, 28-35.
    """
    if before.components != after.components:
        raise ValueError(
            f"the reports are over {before.components} and {after.components}; only equal components "
            "compare"
        )
    rows = []
    about = [report.doubts_about(quantity) for report in (before, after)]
    for i, component in enumerate(before.components):
        old, new = (float(getattr(report, quantity)[i]) for report in (before, after))
        errors = [(float(report.stderr[quantity][i]), report.folds - 1) for report in (before, after)]
        error = math.hypot(*(each for each, _ in errors))
        quantile = _quantile(errors)
        rows.append({
            "component": component,
            "before": old,
            "after": new,
            "difference": new - old,
            "stderr": error,
            "quantile": quantile,
            "changed": abs(new - old) > quantile * error + 1e-9,
            "doubt": ", ".join(dict.fromkeys(word for doubts in about for word in doubts[i])),
        })
    return rows


def changes_table(before: ReportFields, after: ReportFields, quantity: str = "credit") -> Table:
    """Lay :func:`changes` out, one row per component."""
    table = Table(title=f"Change of {quantity}; changed: beyond error, at 95 %", box=SIMPLE_HEAD)
    for name in ("component", "before", "after", "difference", "changed", "doubt"):
        table.add_column(name, justify="left" if name in {"component", "doubt"} else "right")
    for row in changes(before, after, quantity):
        table.add_row(
            escape(row["component"]),
            *(f"{row[name]:.3f}" for name in ("before", "after")),
            f"{row['difference']:+.3f}±{row['stderr']:.3f}",
            "yes" if row["changed"] else "",
            row["doubt"],
            style="dim" if row["doubt"] else "bold" if row["changed"] else None,
        )
    return table


def _quantile(errors: Sequence[tuple[float, int]]) -> float:
    """Return the two-sided 95 % quantile for errors with their degrees of freedom."""
    largest = max(error for error, _ in errors)
    if not (math.isfinite(largest) and largest > 0):
        return float(stdtrit(min(freedom for _, freedom in errors), 0.975))
    # Relative to the largest, since fourth powers of small errors underflow.
    shares = [((error / largest) ** 2, freedom) for error, freedom in errors]
    freedom = sum(s for s, _ in shares) ** 2 / sum(s**2 / f for s, f in shares)
    return float(stdtrit(freedom, 0.975))
