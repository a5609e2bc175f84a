"""Matplotlib figures of reports and of their evolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from lightning_koopman.credit import QUANTITIES
from lightning_koopman.report import MIN_R2, CreditReport

if TYPE_CHECKING:
    from lightning_koopman.interventions import Interventions

_BELIEVED, _DOUBTED = "#1f6f8b", "#c9c9c9"


def plot_report(report: CreditReport) -> Figure:
    """Draw credits and gains with one standard error, and the R² that they rest on.

    Args:
        report: The report.

    Returns:
        A figure with three panels. Grey bars belong to components that carry a doubt.
    """
    size = len(report.components)
    figure = Figure(figsize=(11, max(2.4, 0.42 * size + 1.4)), layout="constrained")
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
    axes[2].plot(
        report.chain_r2, places, "s", color="#d1495b", fillstyle="none", label="chain behind it"
    )
    axes[2].axvline(MIN_R2, color="black", linewidth=0.8, linestyle=":")
    axes[2].set_xlim(
        min(0.0, *(v for v in (*report.r2, *report.chain_r2) if np.isfinite(v)), 0.0) - 0.05, 1.05
    )
    axes[2].set_xlabel("held-out R²")
    axes[2].legend(loc="lower left", fontsize="small")
    axes[0].set_yticks(places, report.components)
    axes[0].invert_yaxis()
    at_step = "" if report.step is None else f" at step {report.step}"
    figure.suptitle(f"Koopman credit{at_step}, {report.n_samples} samples; grey: carries a doubt")
    return figure


def plot_evolution(reports: Sequence[CreditReport], quantity: str = "credit") -> Figure:
    """Draw one quantity as a heat map, component × measurement.

    Args:
        reports: Reports of one network over time, with equal components.
        quantity: Which number.

    Returns:
        A figure.

    Raises:
        ValueError: If there is no report, the components differ or the quantity is unknown.
    """
    if not reports:
        raise ValueError("no report to draw")
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity is {quantity!r}; choose one of {QUANTITIES}")
    components = reports[-1].components
    for report in reports:
        if report.components != components:
            raise ValueError(f"components differ between reports: {report.components} and {components}")
    values = np.stack([getattr(report, quantity) for report in reports], axis=1)
    figure = Figure(
        figsize=(max(4.5, 0.3 * len(reports) + 3), 0.35 * len(components) + 1.6), layout="constrained"
    )
    axis = figure.subplots()
    image = axis.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="viridis")
    axis.set_yticks(np.arange(len(components)), components)
    steps = [i if report.step is None else report.step for i, report in enumerate(reports)]
    shown = np.unique(np.linspace(0, len(reports) - 1, min(len(reports), 8)).astype(int))
    axis.set_xticks(shown, [str(steps[i]) for i in shown])
    axis.set_xlabel("step")
    figure.colorbar(image, label=quantity)
    return figure


def plot_interventions(result: Interventions) -> Figure:
    """Draw the quantity reported against the effect measured, a panel a kind of intervention.

    Args:
        result: What :func:`lightning_koopman.intervene` measured.

    Returns:
        A figure; each title gives the rank correlation.
    """
    from lightning_koopman.interventions import PREDICTORS

    figure = Figure(figsize=(3.2 * len(result.kinds), 3.2), layout="constrained")
    panels = figure.subplots(1, len(result.kinds), squeeze=False)[0]
    unit = "mean KL [nats]" if result.scale == "kl" else "relative squared change"
    for column, (axis, kind) in enumerate(zip(panels, result.kinds, strict=True)):
        effect = result.effect[:, column]
        axis.plot(result.predicted[kind], effect, "o", color=_BELIEVED)
        for name, x, y in zip(result.components, result.predicted[kind], effect, strict=True):
            if np.isfinite(x) and np.isfinite(y):
                axis.annotate(
                    name, (x, y), fontsize="x-small", xytext=(3, 3), textcoords="offset points"
                )
        if (effect[np.isfinite(effect)] > 0).all():
            axis.set_yscale("log")
        axis.set_xlabel(f"{PREDICTORS[kind]} (predicted)")
        axis.set_title(f"{kind}: Spearman {result.spearman(kind):.2f}", fontsize="medium")
    panels[0].set_ylabel(f"{unit} (measured)")
    return figure
