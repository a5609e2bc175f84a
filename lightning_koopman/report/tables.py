"""A report as rows and as a table to read: what may go or become linear first, then the credits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape

from lightning_koopman.koopman.credit import QUANTITIES
from lightning_koopman.report.effects import Effects
from lightning_koopman.report.fields import ReportFields
from lightning_koopman.report.text import EMPTY_DRIFT, Fitted, with_error, with_places

WITHIN = 0.01
"""What may be lost where the verdict says that something can go: of the metric, or of the effect."""

_LINEAR_R2 = 0.999

_LINEAR_KEPT = 0.99
"""Share of its output's variance that must be seen of a component that is called linear."""

_LINEAR_KINDS = {"Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding"}

_GIVES_WAY = ("holds", "type", "parameters", "gain", "R²", "credit")

_MOST_PARTS = 4

_CAN = {"skip": "can go", "linear": "can become linear"}
"""What a component can do whose alteration costs little, by the kinds of effects that decide."""

DECISIONS = {
    "can go": "leaving it out costs next to nothing",
    "can become linear": "a linear map in its place costs next to nothing",
    "linear already": f"R² {_LINEAR_R2} or more",
    "keep": "the outputs need it, or it is not sure that they do not",
    "undecided": "measure its effects to decide",
    "doubted": "do not act on this number",
}
"""What may be done with a component, in plain words."""

GLOSSARY = {
    "holds": "class of the module, and what belongs to it, in order of execution",
    "parameters": "how many numbers the component learns",
    "skip": "how far the outputs move when the component is left out: what it is worth",
    "linear": "how far they move when the best linear map takes its place",
    "reinit": "how far they move when its weights go back to those that training began with",
    "weight_noise": "how far they move when noise is added to its weights",
    "output_noise": "how far they move when noise is added to what it gives",
    "metric then": "metric of the network so altered, the accuracy if no other was given",
    "credit": "how strongly the outputs answer to what the component gives, in nats per direction",
    "gain": "what the component itself adds to that, in nats per direction; gains sum to the total",
    "sensitivity": "how far independent noise on what it gives moves the outputs",
    "r2": "share of its output's variance that a linear map of its input gives, on held-out samples; "
    "the rest is its nonlinearity",
    "chain_r2": "the same for the outputs, predicted from what the component gives",
    "rank": "number of directions in which its output varies",
    "drift": "share of its output's variance that its earlier operator no longer explains",
    "total": "how strongly the outputs answer to the inputs, in nats per direction; all gains together",
    "doubts": "how many components carry a doubt, which says not to act on their credit or gain",
    "overhead": "share of the training's time that watching took so far",
    "doubt": (
        "why not to act on the grey numbers of a row: its own operator (r2) or the chain behind it "
        "(chain_r2) fits badly, the credit hangs on the ridge weight (ridge), or no output direction "
        "reaches it (lost)"
    ),
}
"""What each column means, in a line."""


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
    total = with_error(report.total, report.total_stderr, " ± ") or "unknown"
    return f"{report.directions} output directions, total {total} nats per direction"


def columns(report: ReportFields, sign: str = "±") -> dict[str, list[str]]:
    """Return what a reader sees: one text per component by heading, what decides first."""
    found: dict[str, list[str]] = {"component": list(report.components)}
    if len(report.types) == len(report.parameters) == len(report.components):
        found["holds"] = [_inside(report, i) for i in range(len(report.components))]
        found["parameters"] = [f"{number:,}" if number else "" for number in report.parameters]
    for kind, effects in _deciding(report).items():
        found[kind] = [_effect(effects, kind, name) for name in report.components]
    if report.drift is not None:
        found["drift"] = [with_places(value) for value in report.drift]
    for name in ("credit", "gain"):
        pairs = zip(getattr(report, name), report.stderr[name], strict=True)
        found[name] = [with_error(value, error, sign) for value, error in pairs]
    found["R²"] = [f"{value:.3f}" for value in report.r2]
    found["doubt"] = [", ".join(doubts) for doubts in report.doubts]
    return found


def credit_table(report: ReportFields) -> Fitted:
    """Lay a report out, one row per component, with the verdict and the notes below."""
    title = f"Koopman credit{escape(report.label)}, {report.n_samples} samples\n{total_line(report)}"
    lines = [f"[bold]{escape(line)}[/]" for line in verdict(report)]
    lines += map(escape, what_effects_are(report))
    about = {"credit": "credit", "gain": "gain", "R²": "r2"}
    grey = {title: [bool(d) for d in report.doubts_about(name)] for title, name in about.items()}
    for kind, effects in _deciding(report).items():
        grey[kind] = [_doubted(effects, kind, name) for name in report.components]
    if marked := int((~report.trusted).sum()):
        lines.append(
            f"{marked} of {len(report.components)} rows carry a doubt: do not act on their grey numbers "
            "(chain_r2, lost: credit and gain; ridge: credit; r2: gain and R²)."
        )
    if report.drift is not None and np.isnan(report.drift).any():
        lines.append(EMPTY_DRIFT)
    # Effects that stand above, in a table of their own, have theirs below that.
    notes = report.notes if has_more(report) else all_notes(report)
    lines += [f"Note: {escape(note)}" for note in notes]
    lines.append(f"[bold]{escape(next_step(report))}[/]")
    shown = columns(report)
    if not marked:
        del shown["doubt"]
    return Fitted(title, shown, _GIVES_WAY, grey=grey, lines=lines)


def all_notes(report: ReportFields) -> tuple[str, ...]:
    """Return the notes of a report and those of its effects."""
    return report.notes if report.effects is None else (*report.notes, *report.effects.notes)


def has_more(report: ReportFields) -> bool:
    """Return whether the effects hold more than the columns of a report's own table."""
    if (effects := report.effects) is None:
        return False
    others = {*effects.kinds} - {*_CAN} or {*effects.components} - {*report.components}
    return bool(others or effects.predicted)


def _deciding(report: ReportFields) -> dict[str, Effects]:
    """Return the effects of a report by the kinds that decide, as far as they are known."""
    effects = report.effects
    return {} if effects is None else {kind: effects for kind in _CAN if kind in effects.kinds}


def verdict(report: ReportFields) -> list[str]:
    """Say in up to two lines what the numbers mean for a decision."""
    deciding = _deciding(report)
    lines = [_verdict_of(effects, kind) for kind, effects in deciding.items()]
    if "linear" not in deciding and (linear := _found_linear(report)):
        are = "is" if len(linear) == 1 else "are"
        lines.append(f"{_some(linear)} {are} linear already (R² {_LINEAR_R2} or more)")
    return lines


def _found_linear(report: ReportFields) -> list[str]:
    """Return the components that are linear on these data, but for layers that are so by their kind."""
    kinds = report.types or ("",) * len(report.components)
    # Weight norm and the like make classes of their own of layers.
    kinds = tuple(kind.removeprefix("Parametrized") for kind in kinds)
    return [
        name
        for name, kind, straight in zip(report.components, kinds, _are_linear(report), strict=True)
        if straight and not (kind in _LINEAR_KINDS and len(report.parts.get(name, ())) < 2)
    ]


def _are_linear(report: ReportFields) -> NDArray[np.bool_]:
    """Return which components a linear map explains, as far as nearly all that they give is seen."""
    return (report.r2 >= _LINEAR_R2) & (report.variance_kept >= _LINEAR_KEPT)


def what_effects_are(report: ReportFields) -> list[str]:
    """Return a line on each kind of effect in a table, with its unit, and its samples where fewer."""
    lines = []
    for kind, effects in _deciding(report).items():
        fewer = f", on {effects.n_samples} samples" if effects.n_samples < report.n_samples else ""
        lines.append(f"{kind}: {GLOSSARY[kind]} ({effects.unit}{fewer}).")
    return lines


def next_step(report: ReportFields) -> str:
    """Say what to do next."""
    sure = {kind: bool(_sure(effects, kind).any()) for kind, effects in _deciding(report).items()}
    if "skip" not in sure:
        return "Next: lightning-koopman effects, or component_effects: what may go"
    if sure["skip"]:
        return "Next: lightning-koopman drop, or drop_order: how many may go together"
    if sure.get("linear", True):
        return "Next: lightning-koopman linearize, or linearize(): what may become linear"
    return "Next: lightning-koopman bits, or bit_widths: how many bits their weights need"


def decide(report: ReportFields) -> list[str]:
    """Return one of :data:`DECISIONS` per component."""
    deciding = _deciding(report)
    if not deciding:
        doubted = [bool(doubts) for doubts in report.doubts_about("credit")]
        return [
            "doubted" if doubt else "linear already" if straight else "undecided"
            for doubt, straight in zip(doubted, _are_linear(report), strict=True)
        ]
    cheap = {k: dict(zip(e.components, _sure(e, k), strict=False)) for k, e in deciding.items()}
    first, effects = next(iter(deciding.items()))
    found = []
    for name in report.components:
        able = [_CAN[kind] for kind in deciding if cheap[kind].get(name, False)]
        doubt = _doubted(effects, first, name)
        found.append(able[0] if able else "doubted" if doubt else "keep")
    return found


def _losses(effects: Effects, kind: str) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
    """Return what altering each component loses, its error, and the loss that is small in words."""
    count = len(effects.components) - len(effects.sets)
    if kind in effects.metric_stderr and np.isfinite(effects.metric_stderr[kind]).any():
        loss = effects.metric_before - effects.metric[kind][:count]
        return loss, effects.metric_stderr[kind][:count], f"{WITHIN:g} of accuracy"
    within = (
        f"{WITHIN:g} nats of KL" if effects.scale == "kl" else f"{WITHIN:.0%} of the outputs' variance"
    )
    return effects.values[kind][:count], effects.stderr[kind][:count], within


def _sure(effects: Effects, kind: str) -> NDArray[np.bool_]:
    """Return whether what is lost is small beyond two standard errors and doubts."""
    loss, error, _ = _losses(effects, kind)
    doubted = np.array([bool(effects.doubts_of(kind, i)) for i in range(len(loss))], dtype=bool)
    small = np.nan_to_num(loss + 2 * np.nan_to_num(error), nan=np.inf) <= WITHIN
    return np.asarray(small & ~doubted)


def _doubted(effects: Effects, kind: str, component: str) -> bool:
    """Return whether something speaks against an effect, or it is unknown."""
    if component not in effects.components:
        return True
    place = effects.components.index(component)
    return bool(effects.doubts_of(kind, place)) or bool(np.isnan(effects.values[kind][place]))


def _verdict_of(effects: Effects, kind: str) -> str:
    """Say which components can be altered one by one within a loss, beyond two standard errors."""
    loss, error, within = _losses(effects, kind)
    if not np.isfinite(loss).any():
        return f"no effect of {kind} is known"
    names = [name for name, sure in zip(effects.components, _sure(effects, kind), strict=False) if sure]
    if names:
        how = "alone" if len(names) == 1 else "one at a time"
        return f"{_some(names)} {_CAN[kind]} {how} within {within}"
    least = int(np.nanargmin(loss))
    costs = with_error(loss[least], error[least])
    cheapest = f"the cheapest, {effects.components[least]}, costs {costs}"
    return f"nothing {_CAN[kind]} within {within} for sure: {cheapest}"


def _inside(report: ReportFields, place: int) -> str:
    """Return the class of a component's module and the names of what belongs to it, in order."""
    component, kind = report.components[place], report.types[place]
    parts = [part for part in report.parts.get(component, ()) if part]
    if len(parts) < 2 or component not in parts:
        return kind
    if len(parts) > _MOST_PARTS:
        return f"{kind} and {len(parts) - 1} more"
    return " → ".join(kind if part == component else _short(part) for part in parts)


def _short(part: str) -> str:
    """Return the end of a dotted name; of one that ends in a number, two parts of it."""
    *before, last = part.split(".")
    return ".".join([*before[-1:], last]) if last.partition("#")[0].isdigit() else last


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _effect(effects: Effects, kind: str, component: str) -> str:
    if component not in effects.components:
        return ""
    return effects.cell(kind, effects.components.index(component))
