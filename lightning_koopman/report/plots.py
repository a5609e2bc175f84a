"""Matplotlib figures of reports and of their evolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_koopman.koopman.credit import QUANTITIES
from lightning_koopman.report.fields import MIN_R2, ReportFields

_BELIEVED, _DOUBTED, _CHAIN = "#1f6f8b", "#c9c9c9", "#d1495b"
_TALLEST = 22.0
_MOST_LABELS = 60


def plot_report(report: ReportFields) -> Figure:
    """Draw credits and gains with one standard error, and the R² that they rest on."""
    size = len(report.components)
    figure = _figure(11, _height(size, 0.42, 1.4), report.components)
    axes = figure.subplots(1, 3, sharey=True)
    places = np.arange(size)
    for axis, name in ((axes[0], "credit"), (axes[1], "gain")):
        colors = [_DOUBTED if doubts else _BELIEVED for doubts in report.doubts_of(name)]
        axis.barh(places, getattr(report, name), xerr=report.stderr[name], color=colors, capsize=3)
        axis.set_xlabel(f"{name} [nats per direction]")
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
    figure.suptitle(
        f"Koopman credit{_at_step(report)}, {report.n_samples} samples; grey: carries a doubt"
    )
    return figure


def plot_evolution(reports: Sequence[ReportFields], quantity: str = "credit") -> Figure:
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
    figure, axis = _heat_map(values, components, f"{quantity} over training", quantity)
    steps = [i if report.step is None else report.step for i, report in enumerate(reports)]
    shown = np.unique(np.linspace(0, len(reports) - 1, min(len(reports), 8)).astype(int))
    axis.set_xticks(shown, [str(steps[i]) for i in shown])
    axis.set_xlabel("step")
    return figure


def plot_marked(
    components: Sequence[str],
    values: NDArray[np.float64],
    stderr: NDArray[np.float64],
    marked: NDArray[np.bool_],
    xlabel: str,
    title: str,
) -> Figure:
    """Draw one number per component with two standard errors; those that are marked stand out."""
    figure = Figure(figsize=(8, _height(len(components), 0.35, 1.4)), layout="constrained")
    axis = figure.subplots()
    colors = np.where(marked, _CHAIN, _DOUBTED)
    axis.barh(np.arange(len(components)), values, xerr=2 * stderr, color=colors, capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(xlabel)
    _name_rows(axis, components)
    axis.invert_yaxis()
    figure.suptitle(title)
    return figure


def plot_steps(
    names: Sequence[str],
    loss: NDArray[np.float64],
    stderr: NDArray[np.float64],
    admitted: float,
    label: str,
) -> Figure:
    """Draw a loss after each of several steps, with its standard error and the loss that is admitted."""
    figure = Figure(figsize=(max(5.0, min(14.0, 0.6 * len(names) + 2)), 3.6), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(names))
    axis.errorbar(places, loss, np.nan_to_num(stderr), fmt="o-", ms=4, color=_BELIEVED, capsize=2)
    axis.axhline(admitted, color=_CHAIN, linewidth=0.8, linestyle=":")
    axis.set_xticks(places, names, rotation=45, ha="right")
    axis.set_xlabel("component, one after the other")
    axis.set_ylabel(label)
    return figure


def plot_options(
    names: Sequence[str],
    options: Sequence[str],
    values: NDArray[np.float64],
    stderr: NDArray[np.float64],
    chosen: Sequence[int],
    label: str,
) -> Figure:
    """Draw what each option costs per component on a logarithmic axis, with the chosen ones filled."""
    figure = Figure(figsize=(7, _height(len(names), 0.35, 1.6)), layout="constrained")
    axis = figure.subplots()
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
    return figure


def plot_directions(report: ReportFields) -> Figure:
    """Draw how each component's credit splits over the output directions, as a heat map."""
    if report.directions == 0:
        raise ValueError("no output direction reaches back to the input, so there is no split to draw")
    figure, axis = _heat_map(
        report.volumes,
        report.components,
        f"credit by output direction{_at_step(report)}",
        "log|R[j, j]| [nats]",
    )
    step = max(1, report.directions // 20)
    axis.set_xticks(range(0, report.directions, step))
    axis.set_xlabel("output direction")
    return figure


def plot_spectra(report: ReportFields) -> Figure:
    """Draw the singular values of every component's operator."""
    if not report.operators:
        raise ValueError("the report holds no operators; a report read from JSON has none")
    figure = _figure(7, 4.5, ["1e-10"])
    axis = figure.subplots()
    shades = colormaps["viridis"](np.linspace(0.05, 0.9, len(report.operators)))
    for shade, (name, operator) in zip(shades, report.operators.items(), strict=True):
        values = torch.linalg.svdvals(operator.matrix.double()).cpu().numpy()
        values = values[values > 1e-12 * max(values[0], 1e-300)]
        axis.semilogy(np.arange(1, len(values) + 1), values, color=shade, label=name)
    if len(report.operators) <= _MOST_LABELS // 3:
        axis.legend(fontsize="small")
    axis.set_xlabel("index")
    axis.set_ylabel("singular value")
    axis.set_title(f"Koopman operators{_at_step(report)}")
    return figure


def _heat_map(
    values: NDArray[np.float64], components: Sequence[str], title: str, label: str
) -> tuple[Figure, Any]:
    width = min(14, max(5, 0.3 * values.shape[1] + 3))
    figure = _figure(width, _height(len(components), 0.35, 1.6), components)
    axis = figure.subplots()
    image = axis.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="viridis")
    _name_rows(axis, components)
    axis.set_title(title)
    figure.colorbar(image, label=label)
    return figure, axis


def _figure(width: float, height: float, names: Sequence[str]) -> Figure:
    """Make a figure with room for the names of its rows; constrained layout would draw it twice."""
    left = min(0.4, (0.5 + 0.085 * max(map(len, names), default=0)) / width)
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(left, 0.62 / height, 1 - 0.25 / width, 1 - 0.5 / height, wspace=0.12)
    return figure


def _name_rows(axis: Any, components: Sequence[str]) -> None:
    step = -(-len(components) // _MOST_LABELS)
    axis.set_yticks(range(0, len(components), step), components[::step])


def _height(rows: int, each: float, rest: float) -> float:
    return min(_TALLEST, max(2.4, each * rows + rest))


def _at_step(report: ReportFields) -> str:
    return "" if report.step is None else f" at step {report.step}"
