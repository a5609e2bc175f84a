"""Matplotlib figures of reports and of their evolution; each returns the figure and its axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from lightning_koopman.koopman.credit import QUANTITIES
from lightning_koopman.report.drawing import (
    BELIEVED,
    DOUBTED,
    MARKED,
    MOST_LINES,
    axes_on,
    height_of,
    name_rows,
    panels_on,
    place_labels,
    plot_bands,
)
from lightning_koopman.report.drift import Drift
from lightning_koopman.report.fields import MIN_R2, ReportFields
from lightning_koopman.report.tables import DECISIONS, decide

_COLORS = {
    "can go": MARKED,
    "can become linear": "#edae49",
    "linear already": "#edae49",
    "keep": BELIEVED,
    "undecided": BELIEVED,
    "doubted": DOUBTED,
}
_LEGEND_LINE = 0.2
"""Height of a line of small text, in inches."""

_LEAST_DRIFT = 1e-4
"""Drift that tables print as 0.0001; less is drawn to a linear scale."""

_UNITS = {
    "credit": "nats per direction",
    "gain": "nats per direction",
    "sensitivity": "nats",
    "nonlinearity": "share of the variance",
    "r2": "share of the variance",
    "chain_r2": "share of the variance",
    "rank": "directions",
    "drift": "share of the output's variance",
}


def plot_importance(report: ReportFields, ax: Any = None) -> tuple[Figure, Any]:
    """Draw what each component is worth, the most first, coloured by what may be done with it."""
    effects, size = report.effects, len(report.components)
    if effects is not None and "skip" in effects.kinds:
        places = [effects.components.index(n) for n in report.components if n in effects.components]
        values, stderr = (found["skip"][places] for found in (effects.values, effects.stderr))
        names = [effects.components[i] for i in places]
        label, samples = f"change of the outputs without it [{effects.unit}]", effects.n_samples
    else:
        values, stderr, names = report.credit, report.stderr["credit"], list(report.components)
        label, samples = f"credit [{_UNITS['credit']}]", report.n_samples
    decisions = dict(zip(report.components, decide(report), strict=True))
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
    found = [decisions[names[i]] for i in order]
    shown = [name for name in DECISIONS if name in found]
    above = _LEGEND_LINE * len(shown)
    height = height_of(size, 0.32, 1.4 + above)
    figure, axis = axes_on(ax, 8, height, report.components)
    error = 2 * np.nan_to_num(stderr[order])
    colors = [_COLORS[decision] for decision in found]
    axis.barh(np.arange(len(order)), values[order], xerr=error, color=colors, capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(f"{label}, ± 2 standard errors")
    name_rows(axis, [names[i] for i in order])
    axis.invert_yaxis()
    handles = [Patch(color=_COLORS[name], label=f"{name}: {DECISIONS[name]}") for name in shown]
    # Above the bars, where it hides none; the title makes room.
    axis.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), fontsize="small", frameon=False
    )
    title = f"Importance of components{report.label}, {samples} samples"
    axis.set_title(title, fontsize="medium", pad=10 + 72 * above, y=1)
    if not isinstance(ax, Axes):
        figure.subplots_adjust(top=1 - (0.5 + above) / height)
        place_labels(figure, [axis])
    return figure, axis


def plot_report(report: ReportFields, ax: Any = None) -> tuple[Figure, NDArray[Any]]:
    """Draw credits and gains with one standard error, and the R² that they rest on."""
    size = len(report.components)
    figure, axes = panels_on(ax, 3, 11, height_of(size, 0.42, 1.4), report.components)
    places = np.arange(size)
    for axis, name in ((axes[0], "credit"), (axes[1], "gain")):
        colors = [DOUBTED if doubts else BELIEVED for doubts in report.doubts_about(name)]
        axis.barh(places, getattr(report, name), xerr=report.stderr[name], color=colors, capsize=3)
        axis.set_xlabel(f"{name} [{_UNITS[name]}]")
        axis.axvline(0, color="black", linewidth=0.8)
    axes[2].plot(report.r2, places, "o", color=BELIEVED, label="component")
    axes[2].plot(report.chain_r2, places, "s", color=MARKED, fillstyle="none", label="chain behind it")
    axes[2].axvline(MIN_R2, color="black", linewidth=0.8, linestyle=":")
    fits = np.concatenate([report.r2, report.chain_r2])
    axes[2].set_xlim(fits.min(where=np.isfinite(fits), initial=0.0) - 0.05, 1.05)
    axes[2].set_xlabel("held-out R²")
    axes[2].legend(loc="lower left", fontsize="small")
    name_rows(axes[0], report.components)
    axes[0].invert_yaxis()
    axes[0].set_title(
        f"Koopman credit{report.label}, {report.n_samples} samples; grey: doubted",
        fontsize="medium",
        loc="left",
    )
    return figure, axes


def plot_evolution(
    reports: Sequence[ReportFields], quantity: str = "credit", ax: Any = None
) -> tuple[Figure, Any]:
    """Draw one quantity as a heat map, component × measurement."""
    if not reports:
        raise ValueError("no report to draw")
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity is {quantity!r}; choose one of {QUANTITIES}")
    components = reports[-1].components
    for report in reports:
        if report.components != components:
            raise ValueError(f"components differ between reports: {report.components} and {components}")
    values = np.stack([getattr(report, quantity) for report in reports], axis=1)
    label = f"{quantity} [{_UNITS[quantity]}]"
    signed = quantity in {"credit", "gain", "sensitivity"}
    figure, axis = _heat_map(ax, values, components, f"{quantity} over training", label, signed)
    steps = [i if report.step is None else report.step for i, report in enumerate(reports)]
    shown = np.unique(np.linspace(0, len(reports) - 1, min(len(reports), 8)).astype(int))
    axis.set_xticks(shown, [str(steps[i]) for i in shown])
    axis.set_xlabel("step")
    return figure, axis


def plot_course(
    name: str, reports: Sequence[ReportFields], drifts: Sequence[Drift] = ()
) -> tuple[Figure, NDArray[Any]] | None:
    """Draw a quantity, an effect or the drift over training: a line per component, its error as a band.

    Measurements without errors are left out, and where fewer than two have any there is no figure. A
    component that is 0 throughout, as the last one's credit is by definition, has no line.
    """
    unit, samples, measured = _measured(name, reports, drifts)
    names = reports[-1].components if reports else ()
    values, stderr = table = np.full((2, len(names), len(measured)), np.nan)
    for column, each in enumerate(measured):
        places = {component: place for place, component in enumerate(each.components)}
        rows = [row for row, component in enumerate(names) if component in places]
        taken = [places[names[row]] for row in rows]
        table[:, rows, column] = each.values[taken], each.stderr[taken]
    table[:, ~np.isfinite(table).all(axis=0)] = np.nan
    drawn = np.flatnonzero(np.nan_to_num(values).any(axis=1))
    known = np.flatnonzero(np.isfinite(values[drawn]).any(axis=0))
    if len(known) < 2:
        return None
    title = f"± 2 standard errors, {samples} samples"
    if len(drawn) > MOST_LINES:
        title += f", {MOST_LINES} largest of {len(drawn)}"
        newest = np.nan_to_num(values[drawn, known[-1]], nan=-np.inf)
        drawn = drawn[np.sort(np.argsort(-newest, kind="stable")[:MOST_LINES])]
    values, stderr = table[:, drawn][:, :, known]
    steps = [i if (step := measured[i].step) is None else step for i in known.tolist()]
    # Drift falls by decades while a network learns, down to its error or what no table shows.
    below = max(_LEAST_DRIFT, 2 * float(np.nanmedian(stderr))) if name == "drift" else None
    return plot_bands([names[i] for i in drawn], steps, values, stderr, f"{name} [{unit}]", title, below)


class _Measured(NamedTuple):
    """One number of several components at one step."""

    step: int | None
    components: tuple[str, ...]
    values: NDArray[np.float64]
    stderr: NDArray[np.float64]


def _measured(
    name: str, reports: Sequence[ReportFields], drifts: Sequence[Drift]
) -> tuple[str, int, list[_Measured]]:
    """Return the unit of a number, the samples that the newest rests on, and every measurement of it."""
    if name == "drift":
        found = [_Measured(each.step, each.components, each.drift, each.stderr) for each in drifts]
        return _UNITS[name], drifts[-1].n_samples if drifts else 0, found
    if name in QUANTITIES:
        found = [_Measured(r.step, r.components, getattr(r, name), r.stderr[name]) for r in reports]
        return _UNITS[name], reports[-1].n_samples if reports else 0, found
    known = [(r.step, r.effects) for r in reports if r.effects is not None and name in r.effects.kinds]
    if not known:
        return "", 0, []
    newest = known[-1][1]
    # Of a network that has learnt nothing yet, it may not have been seen that the outputs are classes.
    same = [(step, effects) for step, effects in known if effects.scale == newest.scale]
    found = [_Measured(step, e.components, e.values[name], e.stderr[name]) for step, e in same]
    return newest.unit, newest.n_samples, found


def plot_directions(report: ReportFields, ax: Any = None) -> tuple[Figure, Any]:
    """Draw how each component's credit splits over the output directions, as a heat map."""
    if report.directions == 0:
        raise ValueError("no output direction reaches back to the input, so there is no split to draw")
    title = f"credit by output direction{report.label}"
    figure, axis = _heat_map(ax, report.volumes, report.components, title, "log|R[j, j]| [nats]")
    step = max(1, report.directions // 20)
    axis.set_xticks(range(0, report.directions, step))
    axis.set_xlabel("output direction")
    return figure, axis


def _heat_map(
    ax: Any,
    values: NDArray[np.float64],
    components: Sequence[str],
    title: str,
    label: str,
    signed: bool = True,
) -> tuple[Figure, Any]:
    """Draw a matrix; what has a sign in two colours that meet at 0."""
    width = min(14, max(5, 0.3 * values.shape[1] + 3))
    figure, axis = axes_on(ax, width, height_of(len(components), 0.35, 1.6), components)
    shown = np.ma.masked_invalid(values)
    end = float(np.ma.max(np.abs(shown))) if shown.count() else 1.0
    style = {"cmap": "RdBu_r", "vmin": -end, "vmax": end} if signed else {"cmap": "viridis"}
    image = axis.imshow(shown, aspect="auto", **style)
    axis.set_facecolor("#eeeeee")
    name_rows(axis, components)
    axis.set_title(title, fontsize="medium", wrap=True)
    figure.colorbar(image, ax=axis, label=label)
    return figure, axis
