"""A report as rows and as a table to read: what may go or become linear first, then the credits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.markup import escape

from lightning_koopman.koopman.credit import QUANTITIES
from lightning_koopman.report.effects import Effects
from lightning_koopman.report.fields import ReportFields
from lightning_koopman.report.text import Fitted

WITHIN = 0.01
"""What may be lost where the verdict says that something can go: of the metric, or of the effect."""

_LINEAR_R2 = 0.999

_GIVES_WAY = ("type", "parameters", "chain R²", "gain", "R²", "drift", "credit")


def to_rows(report: ReportFields) -> list[dict[str, Any]]:
    """Return one flat row per component: quantities, effects where there are any, doubts."""
    effects = report.effects
    rows = []
    for i, (component, doubts) in enumerate(zip(report.components, report.doubts, strict=True)):
        row: dict[str, Any] = {"run": report.run, "step": report.step, "component": component}
        for name in QUANTITIES:
            row[name] = float(getattr(report, name)[i])
            row[f"{name}_stderr"] = float(report.stderr[name][i])
        if effects is not None:
            place = effects.components.index(component) if component in effects.components else None
            for kind in effects.kinds:
                found = (effects.values[kind], effects.stderr[kind])
                value, error = (math.nan if place is None else float(v[place]) for v in found)
                row |= {f"effect_{kind}": value, f"effect_{kind}_stderr": error}
        rows.append(row | {"width": report.widths[i], "doubt": ", ".join(doubts)})
    return rows


def total_line(report: ReportFields) -> str:
    """Return the number of directions and the total as words."""
    return (
        f"{report.directions} output directions, total {report.total:.3f} ± {report.total_stderr:.3f} "
        "nats per direction"
    )


def columns(report: ReportFields, sign: str = "±") -> dict[str, list[str]]:
    """Return what a reader sees: one text per component by heading, what decides first."""
    found: dict[str, list[str]] = {"component": list(report.components)}
    if len(report.types) == len(report.parameters) == len(report.components):
        found["type"] = list(report.types)
        found["parameters"] = [f"{number:,}" if number else "" for number in report.parameters]
    if (effects := report.effects) is not None:
        for kind in ("skip", "linear"):
            if kind in effects.kinds:
                found[kind] = [_effect(effects, kind, name) for name in report.components]
    for name in ("credit", "gain"):
        numbers = zip(getattr(report, name), report.stderr[name], report.doubts_of(name), strict=True)
        found[name] = [f"{v:.3f}{sign}{e:.3f}{'?' if doubts else ''}" for v, e, doubts in numbers]
    found["R²"] = [f"{value:.3f}" for value in report.r2]
    found["doubt"] = [", ".join(doubts) for doubts in report.doubts]
    return found


def credit_table(report: ReportFields) -> Fitted:
    """Lay a report out, one row per component, with the verdict and the notes below."""
    title = f"Koopman credit{escape(report.label)}, {report.n_samples} samples\n{total_line(report)}"
    lines = [f"[bold]{escape(line)}[/]" for line in verdict(report)]
    if (effects := report.effects) is not None:
        lines.append(f"skip, linear: effect of altering one component, {effects.unit}; ± of it.")
    marked = sum(bool(words) for name in ("credit", "gain") for words in report.doubts_of(name))
    if marked:
        lines.append(
            f"{marked} of {2 * len(report.components)} credits and gains carry a doubt (?), which the "
            "last column names: do not act on these there (README)."
        )
    lines += [f"Note: {escape(note)}" for note in report.notes]
    lines.append(f"[bold]{escape(next_step(report))}[/]")
    return Fitted(title, columns(report), _GIVES_WAY, lines=lines)


def has_more(report: ReportFields) -> bool:
    """Return whether the effects hold more than the columns of a report's own table."""
    if (effects := report.effects) is None:
        return False
    others = {*effects.kinds} - {"skip", "linear"} or {*effects.components} - {*report.components}
    return bool(others or effects.predicted)


def verdict(report: ReportFields) -> list[str]:
    """Say in up to two lines what the numbers mean for a decision."""
    effects = report.effects
    kinds = () if effects is None else effects.kinds
    lines = []
    if effects is not None and "skip" in kinds:
        lines.append(_verdict_of(effects, "skip", "can go", "nothing can go"))
    if effects is not None and "linear" in kinds:
        lines.append(_verdict_of(effects, "linear", "can become linear", "nothing can become linear"))
    elif linear := [n for n, r2 in zip(report.components, report.r2, strict=True) if r2 >= _LINEAR_R2]:
        are = "is" if len(linear) == 1 else "are"
        lines.append(f"{_some(linear)} {are} linear already (R² {_LINEAR_R2} or more)")
    return lines


def next_step(report: ReportFields) -> str:
    """Say what to do next."""
    kinds = () if report.effects is None else report.effects.kinds
    if "skip" not in kinds:
        return "Next: lightning-koopman effects, or component_effects: what may go"
    if "linear" not in kinds:
        return "Next: lightning-koopman drop, or drop_order: how many may go together"
    return "Next: lightning-koopman drop, or linearize: how many may give way together"


def _verdict_of(effects: Effects, kind: str, can: str, nothing: str) -> str:
    """Say which components can be altered one by one within a loss, beyond two standard errors."""
    count = len(effects.components) - len(effects.sets)
    loss, error, unit = (
        effects.values[kind][:count],
        effects.stderr[kind][:count],
        "of the outputs' variance",
    )
    if effects.scale == "kl":
        unit = "nats of KL"
    if kind in effects.metric_stderr and np.isfinite(effects.metric_stderr[kind]).any():
        loss, error = (
            effects.metric_before - effects.metric[kind][:count],
            effects.metric_stderr[kind][:count],
        )
        unit = "of the accuracy"
    if not np.isfinite(loss).any():
        return f"no effect of {kind} is known"
    sure = np.nan_to_num(loss + 2 * np.nan_to_num(error), nan=np.inf) <= WITHIN
    names = [name for name, found in zip(effects.components, sure, strict=False) if found]
    if names:
        how = "alone" if len(names) == 1 else "one at a time"
        return f"{_some(names)} {can} {how} within {WITHIN:.0%} {unit}"
    least = int(np.nanargmin(loss))
    return (
        f"{nothing} within {WITHIN:.0%} {unit} for sure: the least, {effects.components[least]}, costs "
        f"{loss[least]:.3f}±{error[least]:.3f}"
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _effect(effects: Effects, kind: str, component: str) -> str:
    if component not in effects.components:
        return ""
    return effects.cell(kind, effects.components.index(component))
