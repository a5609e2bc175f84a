"""Matplotlib figures of reports and of their evolution.

Each function draws on a figure or on axes that it is given, or on a new figure that no window manager
knows of, and returns the figure and its axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from lightning_koopman.koopman.credit import QUANTITIES
from lightning_koopman.report.fields import MIN_R2, ReportFields
from lightning_koopman.report.tables import DECISIONS, decide

if TYPE_CHECKING:
    from lightning_koopman.report.effects import Effects

_BELIEVED, _DOUBTED, _CHAIN = "#1f6f8b", "#c9c9c9", "#d1495b"
_COLORS = {
    "can go": "#d1495b",
    "can become linear": "#edae49",
    "linear already": "#edae49",
    "keep": _BELIEVED,
    "undecided": _BELIEVED,
    "doubted": _DOUBTED,
}
_TALLEST = 22.0
_MOST_LABELS = 60

_UNITS = {
    "credit": "nats per direction",
    "gain": "nats per direction",
    "sensitivity": "nats",
    "nonlinearity": "share of the variance",
    "r2": "share of the variance",
    "chain_r2": "share of the variance",
    "rank": "directions",
}


def visible(ax: Any) -> Any:
    """Return the axes that were given, or else a new figure of pyplot, which notebooks show."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.figure()


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
    height = _height(size, 0.32, 1.9)
    figure, axis = _axes(ax, 8, height, report.components)
    found = [decisions[names[i]] for i in order]
    error = 2 * np.nan_to_num(stderr[order])
    colors = [_COLORS[decision] for decision in found]
    axis.barh(np.arange(len(order)), values[order], xerr=error, color=colors, capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(f"{label}, ± 2 standard errors")
    _name_rows(axis, [names[i] for i in order])
    axis.invert_yaxis()
    shown = [name for name in DECISIONS if name in found]
    handles = [Patch(color=_COLORS[name], label=f"{name}: {DECISIONS[name]}") for name in shown]
    axis.legend(handles=handles, loc="lower right", fontsize="small")
    axis.set_title(f"Importance of components{report.label}, {samples} samples", fontsize="medium")
    return figure, axis


def plot_report(report: ReportFields, ax: Any = None) -> tuple[Figure, NDArray[Any]]:
    """Draw credits and gains with one standard error, and the R² that they rest on."""
    size = len(report.components)
    figure, axes = _panels(ax, 3, 11, _height(size, 0.42, 1.4), report.components)
    places = np.arange(size)
    for axis, name in ((axes[0], "credit"), (axes[1], "gain")):
        colors = [_DOUBTED if doubts else _BELIEVED for doubts in report.doubts_about(name)]
        axis.barh(places, getattr(report, name), xerr=report.stderr[name], color=colors, capsize=3)
        axis.set_xlabel(f"{name} [{_UNITS[name]}]")
        axis.axvline(0, color="black", linewidth=0.8)
    axes[2].plot(report.r2, places, "o", color=_BELIEVED, label="component")
    axes[2].plot(report.chain_r2, places, "s", color=_CHAIN, fillstyle="none", label="chain behind it")
    axes[2].axvline(MIN_R2, color="black", linewidth=0.8, linestyle=":")
    fits = np.concatenate([report.r2, report.chain_r2])
    axes[2].set_xlim(fits.min(where=np.isfinite(fits), initial=0.0) - 0.05, 1.05)
    axes[2].set_xlabel("held-out R²")
    axes[2].legend(loc="lower left", fontsize="small")
    _name_rows(axes[0], report.components)
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


def plot_marked(
    components: Sequence[str],
    values: NDArray[np.float64],
    stderr: NDArray[np.float64],
    marked: NDArray[np.bool_],
    xlabel: str,
    title: str,
    ax: Any = None,
) -> tuple[Figure, Any]:
    """Draw one number per component with two standard errors; those that are marked stand out."""
    figure, axis = _axes(ax, 8, _height(len(components), 0.35, 1.4), components)
    colors = np.where(marked, _CHAIN, _DOUBTED)
    axis.barh(np.arange(len(components)), values, xerr=2 * stderr, color=colors, capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(xlabel)
    _name_rows(axis, components)
    axis.invert_yaxis()
    axis.set_title(title, fontsize="medium")
    return figure, axis


def plot_steps(
    names: Sequence[str],
    loss: NDArray[np.float64],
    stderr: NDArray[np.float64],
    admitted: float,
    label: str,
    ax: Any = None,
) -> tuple[Figure, Any]:
    """Draw a loss after each of several steps, with its standard error and the loss that is admitted."""
    figure, axis = _axes(ax, max(5.0, min(14.0, 0.6 * len(names) + 2)), 3.6)
    places = np.arange(len(names))
    axis.errorbar(places, loss, np.nan_to_num(stderr), fmt="o-", ms=4, color=_BELIEVED, capsize=2)
    axis.axhline(admitted, color=_CHAIN, linewidth=0.8, linestyle=":")
    axis.set_xticks(places, names, rotation=45, ha="right")
    axis.set_xlabel("component, one after the other")
    axis.set_ylabel(label)
    return figure, axis


def plot_options(
    names: Sequence[str],
    options: Sequence[str],
    values: NDArray[np.float64],
    stderr: NDArray[np.float64],
    chosen: Sequence[int],
    label: str,
    ax: Any = None,
) -> tuple[Figure, Any]:
    """Draw what each option costs per component on a logarithmic axis, with the chosen ones filled."""
    figure, axis = _axes(ax, 7, _height(len(names), 0.35, 1.6))
    places = np.arange(len(names))
    shades = colormaps["viridis"](np.linspace(0.05, 0.85, len(options)))
    for column, (option, shade) in enumerate(zip(options, shades, strict=True)):
        shown = values[:, column] > 0
        at, points = places[shown], values[shown, column]
        axis.errorbar(points, at, xerr=stderr[shown, column], fmt="none", ecolor=shade, lw=0.8)
        axis.plot(points, at, "o", color=shade, fillstyle="none", label=option)
        taken = shown & (np.array(chosen) == column)
        axis.plot(values[taken, column], places[taken], "o", color=shade)
    axis.set_xscale("log")
    axis.set_xlabel(label)
    axis.legend(fontsize="small", title="filled: chosen")
    _name_rows(axis, names)
    axis.invert_yaxis()
    return figure, axis


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


def plot_spectra(report: ReportFields, ax: Any = None) -> tuple[Figure, Any]:
    """Draw the singular values of every component's operator."""
    if not report.operators:
        raise ValueError("the report holds no operators; a report read from JSON has none")
    figure, axis = _axes(ax, 7, 4.5, ["1e-10"])
    shades = colormaps["viridis"](np.linspace(0.05, 0.9, len(report.operators)))
    for shade, (name, operator) in zip(shades, report.operators.items(), strict=True):
        values = torch.linalg.svdvals(operator.matrix.double()).cpu().numpy()
        values = values[values > 1e-12 * max(values[0], 1e-300)]
        axis.semilogy(np.arange(1, len(values) + 1), values, color=shade, label=name)
    if len(report.operators) <= _MOST_LABELS // 3:
        axis.legend(fontsize="small")
    axis.set_xlabel("index")
    axis.set_ylabel("singular value")
    axis.set_title(f"Koopman operators{report.label}")
    return figure, axis


def plot_effects(
    effects: Effects, ax: Any = None, kinds: Sequence[str] | None = None
) -> tuple[Figure, Any]:
    """Draw effects, one panel per kind: bars, or predicted against measured where both are known."""
    kinds, size = effects.kinds if kinds is None else kinds, len(effects.components)
    both = [kind for kind in kinds if kind in effects.predicted]
    height = 3.6 if both else _height(size, 0.3, 1.4)
    room = [] if both else effects.components
    width = max(4.5, 3.4 * len(kinds) + 1)
    figure, axes = _panels(ax, len(kinds), width, height, room, share=not both)
    unit = "mean KL [nats]" if effects.scale == "kl" else "relative squared change"
    for axis, kind in zip(axes, kinds, strict=True):
        if kind in effects.predicted:
            _against(axis, effects, kind)
            rank = effects.spearman(kind)
            axis.set_title(kind if np.isnan(rank) else f"{kind}: Spearman {rank:.2f}", fontsize="medium")
            axis.set(xlabel=f"{unit}, predicted", ylabel=f"{unit}, measured" if axis is axes[0] else "")
            continue
        colors = [_DOUBTED if effects.doubts_of(kind, i) else _BELIEVED for i in range(size)]
        axis.barh(range(size), effects.values[kind], xerr=effects.stderr[kind], color=colors, capsize=2)
        axis.set_title(f"{kind}, {effects.how[kind]}", fontsize="medium")
        axis.set_xlabel(unit)
        if both or axis is axes[0]:
            _name_rows(axis, effects.components)
            axis.invert_yaxis()
    return figure, axes if len(kinds) > 1 else axes[0]


def _against(axis: Any, effects: Effects, kind: str) -> None:
    """Draw measured against predicted effects on logarithmic axes, with the line where both agree."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    numbers = np.stack([
        effects.predicted[kind],
        effects.values[kind],
        effects.stderr[kind],
        effects.predicted_stderr[kind],
    ])
    shown = (numbers[:2] > 0).all(axis=0) & np.isfinite(numbers[:2]).all(axis=0)
    if not shown.any():
        return
    names, numbers = np.array(effects.components)[shown], numbers[:, shown]
    axis.errorbar(*numbers, "o", ms=4, color="#1f6f8b", lw=0.8, capsize=2)
    for place, i in enumerate(np.argsort(numbers[0])):
        # Neighbours often lie close together: every second name stands to the right, below its point.
        x, y, end = (5, -11, "left") if place % 2 else (-5, 5, "right")
        style = {"fontsize": "x-small", "textcoords": "offset points"}
        axis.annotate(names[i], (numbers[0, i], numbers[1, i]), xytext=(x, y), ha=end, **style)
    axis.margins(0.12)
    ends = [numbers[:2].min() / 1.5, numbers[:2].max() * 1.5]
    axis.plot(ends, ends, color="black", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", yscale="log")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(LogLocator(subs=(1, 3) if ends[1] < 100 * ends[0] else (1,), numticks=5))
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        scale.set_minor_formatter(NullFormatter())


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
    figure, axis = _axes(ax, width, _height(len(components), 0.35, 1.6), components)
    shown = np.ma.masked_invalid(values)
    end = float(np.ma.max(np.abs(shown))) if shown.count() else 1.0
    style = {"cmap": "RdBu_r", "vmin": -end, "vmax": end} if signed else {"cmap": "viridis"}
    image = axis.imshow(shown, aspect="auto", **style)
    axis.set_facecolor("#eeeeee")
    _name_rows(axis, components)
    axis.set_title(title, fontsize="medium", wrap=True)
    figure.colorbar(image, ax=axis, label=label)
    return figure, axis


def _axes(
    ax: Any, width: float, height: float, names: Sequence[str] | None = None
) -> tuple[Figure, Any]:
    """Return a figure and the axes to draw on."""
    if isinstance(ax, Axes):
        return _figure_of(ax), ax
    figure = _figure(ax, width, height, names)
    return figure, figure.subplots()


def _panels(
    ax: Any, count: int, width: float, height: float, names: Sequence[str], share: bool = True
) -> tuple[Figure, NDArray[Any]]:
    """Return a figure and several axes side by side to draw on."""
    if ax is not None and not isinstance(ax, Figure):
        axes = np.atleast_1d(np.asarray(ax, dtype=object))
        if axes.shape != (count,):
            raise ValueError(f"ax holds {axes.size} axes; this picture has {count} panels, one each")
        return _figure_of(axes[0]), axes
    figure = _figure(ax, width, height, names or None)
    return figure, figure.subplots(1, count, squeeze=False, sharey=share)[0]


def _figure_of(axis: Axes) -> Figure:
    figure: Any = axis.get_figure()
    return figure  # type: ignore[no-any-return]


def _figure(figure: Figure | None, width: float, height: float, names: Sequence[str] | None) -> Figure:
    """Size a figure; with room for the names of its rows, for constrained layout would draw it twice."""
    figure = Figure() if figure is None else figure
    figure.set_size_inches(width, height)
    if names is None:
        figure.set_layout_engine("constrained")
    else:
        left = min(0.4, (0.5 + 0.085 * max(map(len, names), default=0)) / width)
        figure.subplots_adjust(left, 0.62 / height, 1 - 0.25 / width, 1 - 0.5 / height, wspace=0.12)
    return figure


def _name_rows(axis: Any, components: Sequence[str]) -> None:
    step = -(-len(components) // _MOST_LABELS)
    axis.set_yticks(range(0, len(components), step), components[::step])


def _height(rows: int, each: float, rest: float) -> float:
    return min(_TALLEST, max(2.4, each * rows + rest))
