"""Draws with Matplotlib what reports, effects and decisions hold.

Each function draws on a figure or on axes that it is given, or on a new figure that no window manager
knows of, and returns the figure and its axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

BELIEVED, DOUBTED, MARKED = "#1f6f8b", "#c9c9c9", "#d1495b"
MOST_LABELS = 60
_TALLEST = 22.0
_NAME_LINE = 0.15
"""Height of a name beside points, in inches."""

_RUNS = ("#12b5cb", "#e52592", "#f9ab00", "#9334e6", "#7cb342", "#e8710a", "#425066")
"""TensorBoard's colours in its order, from the one that the first run below a training's own gets."""
MOST_LINES = 4 * len(_RUNS)


def visible(ax: Any) -> Any:
    """Return the axes that were given, or else a new figure of pyplot, which notebooks show."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.figure()


def plot_drift(drift: Any, ax: Any) -> tuple[Figure, Any]:
    """Draw the drift of each component with two standard errors; those that changed stand out."""
    size = len(drift.components)
    figure, axis = axes_on(ax, 8, height_of(size, 0.35, 1.4), drift.components)
    colors = np.where(drift.changed, MARKED, DOUBTED)
    axis.barh(range(size), drift.drift, xerr=2 * drift.stderr, color=colors, capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("drift [share of the output's variance]")
    name_rows(axis, drift.components)
    axis.invert_yaxis()
    title = f"Drift, {drift.n_samples} samples; red: changed beyond error"
    axis.set_title(title, fontsize="medium")
    return figure, axis


def plot_steps(steps: Any, stderr: NDArray[np.float64], label: str, ax: Any) -> tuple[Figure, Any]:
    """Draw the loss after each of several steps, with its error and the loss that is admitted."""
    names = ("none", *steps.components)
    loss, error = np.append(0.0, steps.loss), np.append(0.0, np.nan_to_num(stderr))
    figure, axis = axes_on(ax, max(5.0, min(14.0, 0.6 * len(names) + 2)), 3.6)
    places = np.arange(len(names))
    axis.errorbar(places, loss, error, fmt="o-", ms=4, color=BELIEVED, capsize=2)
    axis.axhline(steps.max_drop, color=MARKED, linewidth=0.8, linestyle=":")
    axis.set_xticks(places, names, rotation=45, ha="right")
    axis.set_xlabel("component, one after the other")
    axis.set_ylabel(label)
    return figure, axis


def plot_bands(
    names: Sequence[str],
    steps: Sequence[int],
    values: NDArray[np.float64],
    stderr: NDArray[np.float64],
    label: str,
    title: str,
    linear_below: float | None,
) -> tuple[Figure, NDArray[Any]]:
    """Draw one line per name over steps, shaded two standard errors up and down.

    As many names share a panel as there are colours. Where ``linear_below`` is given, what is above it
    is drawn to a logarithmic scale.
    """
    lower, upper = values - 2 * stderr, values + 2 * stderr
    groups = [slice(i, i + len(_RUNS)) for i in range(0, len(names), len(_RUNS))]
    # Small, with large letters: TensorBoard shows it a few hundred pixels wide.
    width, height = 4.8, 2.5 * len(groups) + 0.8
    figure = _figure(None, width, height, names)
    right = 1 - min(0.4, (0.4 + 0.075 * max(map(len, names))) / width)
    figure.subplots_adjust(0.85 / width, 0.45 / height, right, 1 - 0.35 / height, hspace=0.08)
    axes = figure.subplots(len(groups), squeeze=False, sharex=True, sharey=True)[:, 0]
    for axis, group in zip(axes, groups, strict=True):
        for place, i in enumerate(range(len(names))[group]):
            color = _RUNS[place]
            axis.fill_between(steps, lower[i], upper[i], color=color, alpha=0.35, linewidth=0.8)
            # Equal lines are told apart where the upper one has gaps.
            dashes = "-" if place % 2 == 0 else (0, (4, 2))
            axis.plot(steps, values[i], color=color, linestyle=dashes, linewidth=0.9, label=names[i])
        axis.grid(alpha=0.3)
        axis.locator_params(nbins=4)
        _add_key(figure, axis, names[group])
    if linear_below is not None:
        lowest = float(np.nanmin(lower))
        axes[0].set_yscale("symlog", linthresh=linear_below)
        axes[0].set_ylim(bottom=lowest if lowest > linear_below else 0)
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].set_title(title, fontsize="medium", loc="left", y=1)
    axes[0].set_ylabel(label)
    axes[-1].set_xlabel("step")
    place_labels(figure, axes)
    return figure, axes


def _add_key(figure: Figure, axis: Any, names: Sequence[str]) -> None:
    """Name the colours to the right of a panel; a legend is laid out several times to do so."""
    corner = figure.dpi_scale_trans + ScaledTranslation(1, 1, axis.transAxes)
    heights = [-0.08 - 0.18 * row for row in range(len(names))]
    marks = [[(0.08, height), (0.19, height)] for height in heights]
    colors = list(_RUNS[: len(names)])
    lines = LineCollection(marks, colors=colors, linewidths=5, transform=corner, clip_on=False)
    axis.add_artist(lines)
    for name, height in zip(names, heights, strict=True):
        axis.text(0.26, height, name, fontsize="small", va="center", transform=corner)


def plot_bits(found: Any, label: str, ax: Any) -> tuple[Figure, Any]:
    """Draw what each number of bits costs on a logarithmic axis, with the chosen ones filled."""
    names, values = found.components, found.effects
    figure, axis = axes_on(ax, 7, height_of(len(names), 0.35, 1.6))
    places = np.arange(len(names))
    shades = colormaps["viridis"](np.linspace(0.05, 0.85, len(found.options)))
    for column, (option, shade) in enumerate(zip(found.options, shades, strict=True)):
        shown = values[:, column] > 0
        at, points = places[shown], values[shown, column]
        error = found.effects_stderr[shown, column]
        axis.errorbar(points, at, xerr=error, fmt="none", ecolor=shade, lw=0.8)
        axis.plot(points, at, "o", color=shade, fillstyle="none", label=f"{option} bits")
        taken = shown & (np.array(found.bits) == option)
        axis.plot(values[taken, column], places[taken], "o", color=shade)
    axis.set_xscale("log")
    axis.set_xlabel(label)
    axis.legend(fontsize="small", title="filled: chosen")
    name_rows(axis, names)
    axis.invert_yaxis()
    return figure, axis


def plot_effects(effects: Any, ax: Any = None, kinds: Sequence[str] | None = None) -> tuple[Figure, Any]:
    """Draw effects, one panel per kind: bars, or predicted against measured where both are known."""
    kinds, size = effects.kinds if kinds is None else kinds, len(effects.components)
    both = [kind for kind in kinds if kind in effects.predicted]
    height = (
        max(3.6, height_of(min(size, MOST_LABELS), _NAME_LINE, 1.2))
        if both
        else height_of(size, 0.3, 1.4)
    )
    room = [] if both else effects.components
    beside = 0.06 * max(map(len, effects.components), default=0) if both else 0
    width = max(4.5, (3.4 + beside) * len(kinds) + 1)
    figure, axes = panels_on(ax, len(kinds), width, height, room, share=not both)
    unit = "mean KL [nats]" if effects.scale == "kl" else "relative squared change"
    for axis, kind in zip(axes, kinds, strict=True):
        if kind in effects.predicted:
            _against(axis, effects, kind)
            rank = effects.spearman(kind)
            axis.set_title(kind if np.isnan(rank) else f"{kind}: Spearman {rank:.2f}", fontsize="medium")
            axis.set(xlabel=f"{unit}, predicted", ylabel=f"{unit}, measured" if axis is axes[0] else "")
            continue
        colors = [DOUBTED if effects.doubts_of(kind, i) else BELIEVED for i in range(size)]
        axis.barh(range(size), effects.values[kind], xerr=effects.stderr[kind], color=colors, capsize=2)
        axis.set_title(f"{kind}, {effects.how[kind]}", fontsize="medium")
        axis.set_xlabel(unit)
        axis.locator_params(axis="x", nbins=4)
        if both or axis is axes[0]:
            name_rows(axis, effects.components)
            axis.invert_yaxis()
    return figure, axes if len(kinds) > 1 else axes[0]


def _against(axis: Any, effects: Any, kind: str) -> None:
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
    axis.errorbar(*numbers, "o", ms=4, color=BELIEVED, lw=0.8, capsize=2)
    axis.margins(0.12)
    ends = [numbers[:2].min() / 1.5, numbers[:2].max() * 1.5]
    axis.plot(ends, ends, color="black", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", yscale="log")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(LogLocator(subs=(1, 3) if ends[1] < 100 * ends[0] else (1,), numticks=5))
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        scale.set_minor_formatter(NullFormatter())
    _name_points(axis, names, *numbers[:2])


def _name_points(axis: Any, names: Sequence[str], x: NDArray[Any], y: NDArray[Any]) -> None:
    """Write names beside the axes, in the order of their points, each with a line to its own."""
    order = np.argsort(y, kind="stable")[:: -(-len(names) // MOST_LABELS)]
    inches = axis.get_window_extent().height / _figure_of(axis).dpi
    gap = min(_NAME_LINE / inches, 1 / len(order))
    low, high = np.log(axis.get_ylim())
    slots = gap * np.arange(len(order))
    # Each name stands as high as its point, or as near to that as those above and below it allow.
    wanted = (np.log(y[order]) - low) / (high - low) - slots
    above, below = np.maximum.accumulate(wanted), np.minimum.accumulate(wanted[::-1])[::-1]
    heights = np.clip((above + below) / 2, 0, 1 - slots[-1]) + slots
    line = {"arrowstyle": "-", "color": "#999999", "lw": 0.5, "shrinkB": 0}
    for i, height in zip(order, heights, strict=True):
        axis.annotate(
            names[i],
            (x[i], y[i]),
            (1.04, height),
            textcoords="axes fraction",
            fontsize="x-small",
            va="center",
            arrowprops={**line, "relpos": (0, 0.5)},
        )


def axes_on(
    ax: Any, width: float, height: float, names: Sequence[str] | None = None
) -> tuple[Figure, Any]:
    """Return a figure and the axes to draw on."""
    if isinstance(ax, Axes):
        return _figure_of(ax), ax
    figure = _figure(ax, width, height, names)
    return figure, figure.subplots()


def panels_on(
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
        figure.subplots_adjust(left, 0.62 / height, 1 - 0.25 / width, 1 - 0.5 / height, wspace=0.2)
    return figure


def place_labels(figure: Figure, axes: Iterable[Axes]) -> None:
    """Fix where labels stand; to find that out, Matplotlib lays out the texts of all ticks once more."""
    below = ScaledTranslation(0, -0.3, figure.dpi_scale_trans)
    beside = ScaledTranslation(-0.66, 0, figure.dpi_scale_trans)
    for axis in axes:
        axis.xaxis.set_label_coords(0.5, 0, axis.transAxes + below)
        axis.yaxis.set_label_coords(0, 0.5, axis.transAxes + beside)


def name_rows(axis: Any, components: Sequence[str]) -> None:
    """Write the names of components beside their rows, some of them where they are many."""
    step = -(-len(components) // MOST_LABELS)
    axis.set_yticks(range(0, len(components), step), components[::step])
    # A share of many rows is more than a row.
    axis.margins(y=min(0.05, 0.4 / len(components)))


def height_of(rows: int, each: float, rest: float) -> float:
    """Return the height of a figure with so many rows, in inches."""
    return min(_TALLEST, max(2.4, each * rows + rest))
