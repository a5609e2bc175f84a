"""What altering each component did to the outputs, beside what was predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from scipy.stats import spearmanr

from lightning_koopman.effects import UNITS, Kind, Scale, with_share
from lightning_koopman.tables import as_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

PREDICTORS: Mapping[Kind, str] = {"linear": "nonlinearity", "output_noise": "sensitivity"}
"""The quantity that a kind is set against where the report predicts no effect of it."""


@dataclass(frozen=True, eq=False)
class Interventions:
    """What altering each component did to the outputs.

    Attributes:
        components: Names, in order of execution.
        kinds: Kinds of intervention, the columns of the arrays.
        effect: Change of the outputs, shape ``(components, kinds)``; 0 where nothing changes.
        effect_stderr: Standard errors of the effects, the same shape: over samples, which are taken as
            independent, and in quadrature over draws where there are several; NaN for a single sample.
            Alterations are taken as given: that other samples would have given ``linear`` another
            operator, ``skip`` another mean or ``output_noise`` another spread is in none of them.
        metric: Metric after the intervention, the same shape; NaN where there is none.
        metric_stderr: Standard errors of the metric's difference from ``metric_before``, the same shape:
            paired, over samples and draws as above; NaN where the metric is not the accuracy.
        metric_before: Metric of the network as it is.
        scale: What effects are measured in: ``"kl"`` is the mean KL divergence in nats from the
            original to the altered class distribution, ``"relative"`` the mean squared change over
            the outputs' variance.
        n_samples: Samples the effects are measured on.
        predicted: By kind, what the report predicts, shape ``(components,)``: effects in the unit of
            those measured where :func:`lightning_koopman.predict_effects` filled them in, else the
            quantity of :data:`PREDICTORS`, if any.
        predicted_stderr: Standard errors of what stands in ``predicted``, by kind.
        predictor: By kind, the name of what stands in ``predicted``: ``"effect"``, or a quantity.
    """

    components: tuple[str, ...]
    kinds: tuple[Kind, ...]
    effect: NDArray[np.float64]
    effect_stderr: NDArray[np.float64]
    metric: NDArray[np.float64]
    metric_stderr: NDArray[np.float64]
    metric_before: float
    scale: Scale
    n_samples: int
    predicted: Mapping[Kind, NDArray[np.float64]] = field(repr=False)
    predicted_stderr: Mapping[Kind, NDArray[np.float64]] = field(repr=False)
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

    def to_frame(self) -> DataFrame:
        """Return what was measured as a pandas table, one row per component.

        Returns:
            The component, and for every kind the measured effect, the predicted one where that
            is an effect too, and the change of the metric where there is one, each with its standard
            error; then the scale, the number of samples and the metric before.
        """
        import pandas

        rows = []
        for i, component in enumerate(self.components):
            row: dict[str, Any] = {"component": component}
            for column, kind in enumerate(self.kinds):
                row[f"measured_{kind}"] = float(self.effect[i, column])
                row[f"measured_{kind}_stderr"] = float(self.effect_stderr[i, column])
                if self.predictor.get(kind) == "effect":
                    row[f"predicted_{kind}"] = float(self.predicted[kind][i])
                    row[f"predicted_{kind}_stderr"] = float(self.predicted_stderr[kind][i])
                if math.isfinite(self.metric_before):
                    row[f"metric_change_{kind}"] = float(self.metric[i, column] - self.metric_before)
                    row[f"metric_change_{kind}_stderr"] = float(self.metric_stderr[i, column])
            row |= {"scale": self.scale, "n_samples": self.n_samples}
            if math.isfinite(self.metric_before):
                row["metric_before"] = self.metric_before
            rows.append(row)
        return pandas.DataFrame(rows)

    def plot(self) -> Figure:
        """Draw predicted against measured with their standard errors, a panel a kind.

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
        padding=0,
    )
    table.add_column("component", overflow="fold", min_width=13)
    for kind in result.kinds:
        table.add_column(kind, justify="right", no_wrap=True)
    same = [kind for kind in result.kinds if result.predictor.get(kind) == "effect"]
    for i, component in enumerate(result.components):
        table.add_row(
            escape(component), *map(with_share, result.effect[i], result.effect_stderr[i]), style="bold"
        )
        if same:
            cells = {k: with_share(result.predicted[k][i], result.predicted_stderr[k][i]) for k in same}
            table.add_row("  predicted", *(cells.get(kind, "") for kind in result.kinds))
        for name, values in (("metric", result.metric[i]), ("± of change", result.metric_stderr[i])):
            if np.isfinite(values).any():
                table.add_row(f"  {name}", *(f"{value:.3f}" for value in values), style="dim")
    table.add_section()
    table.add_row("set against", *(result.predictor.get(kind, "nothing") for kind in result.kinds))
    ranks = [result.spearman(kind) for kind in result.kinds]
    table.add_row("Spearman", *("" if math.isnan(rank) else f"{rank:.2f}" for rank in ranks))
    return table
