"""What altering each component did to the outputs, beside what was predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from scipy.stats import spearmanr

from lightning_koopman.effects import UNITS, Kind, Scale
from lightning_koopman.tables import as_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREDICTORS: Mapping[Kind, str] = {"linear": "nonlinearity", "output_noise": "sensitivity"}
"""The quantity that a kind is set against where the report predicts no effect of it."""


@dataclass(frozen=True, eq=False)
class Interventions:
    """What altering each component did to the outputs.

    Attributes:
        components: Names, in order of execution.
        kinds: Kinds of intervention, the columns of the arrays.
        effect: Change of the outputs, shape ``(components, kinds)``; 0 where nothing changes.
        metric: Metric after the intervention, the same shape; NaN where there is none.
        metric_before: Metric of the network as it is.
        scale: What effects are measured in: ``"kl"`` is the mean KL divergence in nats from the
            original to the altered class distribution, ``"relative"`` the mean squared change over
            the outputs' variance.
        n_samples: Samples the effects are measured on.
        predicted: By kind, what the report predicts, shape ``(components,)``: effects in the unit of
            those measured where :func:`lightning_koopman.predict_effects` filled them in, else the
            quantity of :data:`PREDICTORS`, if any.
        predictor: By kind, the name of what stands in ``predicted``: ``"effect"``, or a quantity.
    """

    components: tuple[str, ...]
    kinds: tuple[Kind, ...]
    effect: NDArray[np.float64]
    metric: NDArray[np.float64]
    metric_before: float
    scale: Scale
    n_samples: int
    predicted: Mapping[Kind, NDArray[np.float64]] = field(repr=False)
    predictor: Mapping[Kind, str] = field(default_factory=dict, repr=False)

    def spearman(self, kind: Kind) -> float:
        """Rank correlation over components between prediction and measured effect.

        Args:
            kind: One of ``kinds``.

        Returns:
            Between -1 and 1; NaN with fewer than three components that have both, or no prediction.

        Raises:
            ValueError: If the kind was not measured.
        """
        if kind not in self.kinds:
            raise ValueError(f"{kind!r} was not measured; measured were {self.kinds}")
        if kind not in self.predicted:
            return float("nan")
        effect = self.effect[:, self.kinds.index(kind)]
        known = np.isfinite(effect) & np.isfinite(self.predicted[kind])
        constant = any(len(set(v[known])) < 2 for v in (effect, self.predicted[kind]))
        if known.sum() < 3 or constant:
            return float("nan")
        return float(spearmanr(effect[known], self.predicted[kind][known]).statistic)

    def plot(self) -> Figure:
        """Draw predicted against measured, a panel a kind.

        Returns:
            A Matplotlib figure that no window manager knows of.
        """
        from lightning_koopman.plots import plot_interventions

        return plot_interventions(self)

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> Table:
        return _table(self)


def _table(result: Interventions) -> Table:
    """Lay measured effects out beside predicted ones, one group of rows a component."""
    before = "" if math.isnan(result.metric_before) else f", metric {result.metric_before:.4f} as it was"
    table = Table(
        title=f"Interventions, {result.n_samples} samples: {UNITS[result.scale]}{before}",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("component", overflow="fold", min_width=11)
    for kind in result.kinds:
        table.add_column(kind, justify="right", no_wrap=True)
    same = [kind for kind in result.kinds if result.predictor.get(kind) == "effect"]
    for i, component in enumerate(result.components):
        table.add_row(escape(component), *(f"{value:.2g}" for value in result.effect[i]), style="bold")
        if same:
            cells = [f"{result.predicted[k][i]:.2g}" if k in same else "" for k in result.kinds]
            table.add_row("  predicted", *cells)
        if np.isfinite(result.metric[i]).any():
            table.add_row("  metric", *(f"{value:.3f}" for value in result.metric[i]), style="dim")
    table.add_section()
    table.add_row("set against", *(result.predictor.get(kind, "nothing") for kind in result.kinds))
    ranks = [result.spearman(kind) for kind in result.kinds]
    table.add_row("Spearman", *("" if math.isnan(rank) else f"{rank:.2f}" for rank in ranks))
    return table
