"""Matplotlib figures of reports and of their evolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from lightning_koopman.koopman.credit import QUANTITIES
from lightning_koopman.report.report import MIN_R2, CreditReport

if TYPE_CHECKING:
    from lightning_koopman.effects.interventions import Interventions

_BELIEVED, _DOUBTED, _CHAIN = "#1f6f8b", "#c9c9c9", "#d1495b"
_TALLEST = 22.0
_MOST_LABELS = 60


def plot_report(report: CreditReport) -> Figure:
    """Draw credits and gains with one standard error, and the R² that they rest on."""
    size = len(report.components)
    figure = Figure(figsize=(11, _height(size, 0.42, 1.4)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    places = np.arange(size)
    colors = np.where(report.trusted, _BELIEVED, _DOUBTED)
    for axis, name, unit in (
        (axes[0], "credit", "nats a direction"),
        (axes[1], "gain", "nats a direction"),
    ):
        axis.barh(places, getattr(report, name), xerr=report.stderr[name], color=colors, capsize=3)
        axis.set_xlabel(f"{name} [{unit}]")
        axis.axvline(0, color="black", linewidth=0.8)
    axes[2].plot(report.r2, places, "o", color=_BELIEVED, label="component")
    axes[2].plot(report.chain_r2, places, "s", color=_CHAIN, fillstyle="none", label="chain behind it")
    axes[2].axvline(MIN_R2, color="black", linewidth=0.8, linestyle=":")
    axes[2].set_xlim(
        min(0.0, *(v for v in (*report.r2, *report.chain_r2) if np.isfinite(v)), 0.0) - 0.05, 1.05
    )
    axes[2].set_xlabel("held-out R²")
    axes[2].legend(loc="lower left", fontsize="small")
    _name_rows(axes[0], report.components)
    axes[0].invert_yaxis()
    figure.suptitle(
        f"Koopman credit{_at_step(report)}, {report.n_samples} samples; grey: carries a doubt"
    )
    return figure


def plot_evolution(reports: Sequence[CreditReport], quantity: str = "credit") -> Figure:
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


def plot_interventions(result: Interventions) -> Figure:
    """Draw prediction against measured effect, a panel a kind of intervention."""
    figure = Figure(figsize=(3.2 * len(result.kinds), 3.2), layout="constrained")
    panels = figure.subplots(1, len(result.kinds), squeeze=False)[0]
    unit = "mean KL [nats]" if result.scale == "kl" else "relative squared change"
    for column, (axis, kind) in enumerate(zip(panels, result.kinds, strict=True)):
        name, effect = result.predictor.get(kind), result.effect[:, column]
        predicted = result.predicted.get(kind, np.full(len(effect), np.nan))
        errors = (result.predicted_stderr.get(kind, predicted), result.effect_stderr[:, column])
        shown = np.isfinite(predicted) & np.isfinite(effect)
        if name == "effect":
            shown &= (predicted > 0) & (effect > 0)
        if shown.any():
            names = np.array(result.components)[shown]
            _against(axis, names, predicted[shown], effect[shown], [e[shown] for e in errors], name)
        axis.set_xlabel("nothing predicted" if name is None else f"{name} (predicted)")
        rank = result.spearman(kind)
        axis.set_title(kind if np.isnan(rank) else f"{kind}: Spearman {rank:.2f}", fontsize="medium")
    panels[0].set_ylabel(f"{unit} (measured)")
    return figure


def _against(axis: Any, names: Any, predicted: Any, effect: Any, errors: Any, name: str | None) -> None:
    xerr, yerr = errors
    axis.errorbar(predicted, effect, yerr, xerr, fmt="o", ms=4, color=_BELIEVED, lw=0.8, capsize=2)
    for place, i in enumerate(np.argsort(predicted)):
        # Neighbours often lie close together: every second name stands to the right, below its point.
        x, y, end = (5, -11, "left") if place % 2 else (-5, 5, "right")
        at = (predicted[i], effect[i])
        axis.annotate(
            names[i], at, fontsize="x-small", xytext=(x, y), textcoords="offset points", ha=end
        )
    axis.margins(0.12)
    if name == "effect":
        ends = [min(predicted.min(), effect.min()) / 1.5, max(predicted.max(), effect.max()) * 1.5]
        axis.plot(ends, ends, color="black", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", yscale="log")
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_locator(
                LogLocator(subs=(1, 3) if ends[1] < 100 * ends[0] else (1,), numticks=5)
            )
            scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            scale.set_minor_formatter(NullFormatter())
    elif (effect > 0).all():
        axis.set_yscale("log")


def plot_directions(report: CreditReport) -> Figure:
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


def plot_spectra(report: CreditReport) -> Figure:
    """Draw the singular values of every component's operator."""
    if not report.operators:
        raise ValueError("the report holds no operators; a report read from JSON has none")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    shades = np.linspace(0.05, 0.9, len(report.operators))
    for shade, (name, operator) in zip(shades, report.operators.items(), strict=True):
        values = torch.linalg.svdvals(operator.matrix.double()).cpu().numpy()
        values = values[values > 1e-12 * max(values[0], 1e-300)]
        axis.semilogy(np.arange(1, len(values) + 1), values, color=_shade(shade), label=name)
    if len(report.operators) <= _MOST_LABELS // 3:
        axis.legend(fontsize="small")
    axis.set_xlabel("index")
    axis.set_ylabel("singular value")
    axis.set_title(f"Koopman operators{_at_step(report)}")
    return figure


def _heat_map(
    values: NDArray[np.float64], components: Sequence[str], title: str, label: str
) -> tuple[Figure, Any]:
    figure = Figure(
        figsize=(min(14, max(5, 0.3 * values.shape[1] + 3)), _height(len(components), 0.35, 1.6)),
        layout="constrained",
    )
    axis = figure.subplots()
    image = axis.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="viridis")
    _name_rows(axis, components)
    axis.set_title(title)
    figure.colorbar(image, label=label)
    return figure, axis


def _name_rows(axis: Any, components: Sequence[str]) -> None:
    step = -(-len(components) // _MOST_LABELS)
    axis.set_yticks(range(0, len(components), step), components[::step])


def _height(rows: int, each: float, rest: float) -> float:
    return min(_TALLEST, max(2.4, each * rows + rest))


def _shade(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](share)


def _at_step(report: CreditReport) -> str:
    return "" if report.step is None else f" at step {report.step}"
