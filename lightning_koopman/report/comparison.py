"""Reports side by side: the newest of every run, and what changed between two."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from scipy.special import stdtrit

from lightning_koopman.report.fields import ReportFields
from lightning_koopman.report.tables import columns
from lightning_koopman.report.text import Fitted


def newest_of_runs(reports: Sequence[ReportFields]) -> list[ReportFields]:
    """Return the last report of every run."""
    return list({report.run: report for report in reports}.values())


def runs_table(reports: Sequence[ReportFields]) -> Fitted:
    """Lay several runs out side by side, component by component."""
    rows: dict[str, list[tuple[Any, ...]]] = {}
    for report in newest_of_runs(reports):
        found, step = columns(report), "" if report.step is None else str(report.step)
        doubts = (report.doubts_about(name) for name in ("credit", "gain"))
        own = (found["credit"], found["gain"], found["doubt"], *doubts)
        for component, *cells in zip(report.components, *own, strict=True):
            rows.setdefault(component, []).append((component, report.run, step, *cells))
    *shown, credits, gains = zip(*itertools.chain(*rows.values()), strict=True)
    names = ("component", "run", "step", "credit", "gain", "doubt")
    grey = {"credit": list(map(bool, credits)), "gain": list(map(bool, gains))}
    title = "Newest of every run; dim numbers carry the doubt"
    return Fitted(title, dict(zip(names, shown, strict=True)), grey=grey)


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


def changes_table(before: ReportFields, after: ReportFields, quantity: str = "credit") -> Fitted:
    """Lay :func:`changes` out, one row per component."""
    rows = changes(before, after, quantity)
    shown = {
        "component": [row["component"] for row in rows],
        "before": [f"{row['before']:.3f}" for row in rows],
        "after": [f"{row['after']:.3f}" for row in rows],
        "difference": [f"{row['difference']:+.3f}±{row['stderr']:.3f}" for row in rows],
        "changed": ["yes" if row["changed"] else "" for row in rows],
        "doubt": [row["doubt"] for row in rows],
    }
    styles = ["dim" if row["doubt"] else "bold" if row["changed"] else None for row in rows]
    return Fitted(f"Change of {quantity}; changed: beyond error, at 95 %", shown, styles=styles)


def _quantile(errors: Sequence[tuple[float, int]]) -> float:
    """Return the two-sided 95 % quantile for errors with their degrees of freedom."""
    largest = max(error for error, _ in errors)
    if not (math.isfinite(largest) and largest > 0):
        return float(stdtrit(min(freedom for _, freedom in errors), 0.975))
    # Relative to the largest, since fourth powers of small errors underflow.
    shares = [((error / largest) ** 2, freedom) for error, freedom in errors]
    freedom = sum(s for s, _ in shares) ** 2 / sum(s**2 / f for s, f in shares)
    return float(stdtrit(freedom, 0.975))
