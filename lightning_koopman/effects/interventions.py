"""Measures what altering each component does to the outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor, nn

from lightning_koopman.effects.alterations import Alterations
from lightning_koopman.effects.linear_map import LinearFit
from lightning_koopman.effects.scoring import Measured, Metric, Outputs, over_draws
from lightning_koopman.network.forward_runner import ForwardFn, ForwardRunner
from lightning_koopman.network.hook_points import Alteration
from lightning_koopman.network.isolation import undisturbed
from lightning_koopman.report.effects import KINDS, UNITS, Kind, Scale, with_share
from lightning_koopman.report.report import CreditReport
from lightning_koopman.report.tables import as_text

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
        """Draw predicted against measured with their standard errors, one panel per kind.

        Returns:
            A Matplotlib figure that no window manager knows of.
        """
        from lightning_koopman.report.plots import Comparison, plot_comparisons

        unknown = np.full(len(self.components), np.nan)
        panels = []
        for column, kind in enumerate(self.kinds):
            rank = self.spearman(kind)
            title = kind if math.isnan(rank) else f"{kind}: Spearman {rank:.2f}"
            panel = Comparison(
                title,
                self.predictor.get(kind),
                self.predicted.get(kind, unknown),
                self.predicted_stderr.get(kind, unknown),
                self.effect[:, column],
                self.effect_stderr[:, column],
            )
            panels.append(panel)
        unit = "mean KL [nats]" if self.scale == "kl" else "relative squared change"
        return plot_comparisons(panels, self.components, f"{unit} (measured)")

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> Table:
        before = "" if math.isnan(self.metric_before) else f", metric {self.metric_before:.4f} as it was"
        table = Table(
            title=f"Interventions, {self.n_samples} samples: {UNITS[self.scale]}{before}",
            box=SIMPLE_HEAD,
            padding=0,
        )
        table.add_column("component", overflow="fold", min_width=13)
        for kind in self.kinds:
            table.add_column(kind, justify="right", no_wrap=True)
        same = [kind for kind in self.kinds if self.predictor.get(kind) == "effect"]
        for i, component in enumerate(self.components):
            effects = map(with_share, self.effect[i], self.effect_stderr[i])
            table.add_row(escape(component), *effects, style="bold")
            if same:
                cells = {k: with_share(self.predicted[k][i], self.predicted_stderr[k][i]) for k in same}
                table.add_row("  predicted", *(cells.get(kind, "") for kind in self.kinds))
            for name, values in (("metric", self.metric[i]), ("± of change", self.metric_stderr[i])):
                if np.isfinite(values).any():
                    table.add_row(f"  {name}", *(f"{value:.3f}" for value in values), style="dim")
        table.add_section()
        table.add_row("set against", *(self.predictor.get(kind, "nothing") for kind in self.kinds))
        ranks = [self.spearman(kind) for kind in self.kinds]
        table.add_row("Spearman", *("" if math.isnan(rank) else f"{rank:.2f}" for rank in ranks))
        return table


def intervene(
    model: nn.Module,
    batches: Iterable[Any],
    report: CreditReport,
    kinds: Sequence[Kind] = KINDS,
    *,
    components: Sequence[str] | None = None,
    fit_batches: Iterable[Any] | None = None,
    initial: Mapping[str, Tensor] | None = None,
    strength: float = 0.3,
    draws: int = 5,
    metric: Metric | None = None,
    scale: Scale | None = None,
    forward_fn: ForwardFn | None = None,
    seed: int = 0,
) -> Interventions:
    """Alter each component of a trained network in turn, and measure what its outputs do.

    The kinds, for a component that turns x_{i-1} into x_i:

    * ``linear``: its output is replaced by its Koopman operator applied to the output of the component
      before it (of the ``delay`` components before it). Where the report's states are the flattened
      tensors themselves, the report's own operator is used. Where they are pooled, projected or lifted,
      the operator cannot give back a whole tensor; a map from the leading POD directions of
      x_{i-1} to every entry of x_i is then fitted on ``fit_batches``.
    * ``reinit``: its weights and buffers go back to ``initial``, or are drawn anew by
      ``reset_parameters``.
    * ``weight_noise``: Gaussian noise of ``strength`` times its own standard deviation is added to each
      parameter tensor of more than one entry.
    * ``output_noise``: Gaussian noise of ``strength`` times each unit's standard deviation is added to
      its output.
    * ``skip``: its output is replaced by x_{i-1} where the shapes agree, else by its mean.

    Units' means and standard deviations are those over ``batches``. Kinds that draw are averaged over
    ``draws``. A module that runs several times is altered in all its calls by the kinds that touch
    weights, in one call by the others. The model is left exactly as it was found, also when an
    exception flies.

    Args:
        model: The model that the report was measured on.
        batches: Data to measure on, which the operators should not have seen: tensors, tuples of input
            and target, or mappings.
        report: What was measured on the model.
        kinds: Which interventions.
        components: Which components; ``None`` takes all.
        fit_batches: Data to fit linear maps on, where the report's operators cannot be used as they
            are: of reduced states, and in a report read from JSON (there from x_{i-1} alone).
        initial: ``state_dict`` of the network at its initialisation.
        strength: Noise, as a share of the standard deviation.
        draws: Number of draws that kinds with a random part are averaged over.
        metric: Called as ``metric(outputs, targets)`` over all batches; ``None`` takes the accuracy
            where targets are class indices, and none otherwise.
        scale: What effects are measured in, see
            :class:`Interventions`; ``None`` takes ``"kl"`` where
            targets are class indices, ``"relative"`` otherwise.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.
        seed: Seed of everything that is drawn.

    Returns:
        Effects and metrics.

    Raises:
        ValueError: If an argument is out of range, the report does not belong to the model, a linear
            map must be fitted but ``fit_batches`` is missing, a component cannot be re-initialised, or
            the samples are not along the first axis of its output.
    """
    scale = _agreed_scale(report, kinds, scale, strength)
    alterations = Alterations(
        model, batches, report, kinds,
        components=components, initial=initial, strength=strength, draws=draws, forward_fn=forward_fn,
    )  # fmt: skip
    runner, points = alterations.runner, alterations.points.values()
    chosen = tuple(report.components if components is None else components)
    with undisturbed(model):
        before = Outputs(runner.run(points, update=alterations.update), runner.batches, scale, metric)
        if "linear" in kinds:
            fit_on = None if fit_batches is None else ForwardRunner(model, fit_batches, forward_fn)
            _fit_maps(alterations, chosen, fit_on, seed)
        scores = np.empty((len(chosen), len(kinds), len(Measured._fields)))
        for i, name in enumerate(chosen):
            for column, kind in enumerate(kinds):
                # The generator's state is the user's: undisturbed puts it back.
                torch.manual_seed(seed + i)
                scores[i, column] = _measured(alterations, before, kind, name, draws)
    return Interventions(
        components=chosen,
        kinds=tuple(kinds),
        effect=scores[:, :, 0],
        effect_stderr=scores[:, :, 1],
        metric=scores[:, :, 2],
        metric_stderr=scores[:, :, 3],
        metric_before=before.metric,
        scale=before.scale,
        n_samples=before.n_samples,
        **_predictions(report, chosen, kinds),
    )


def _fit_maps(
    alterations: Alterations, components: Sequence[str], fit_on: ForwardRunner | None, seed: int
) -> None:
    """Fit linear maps where the report's operators do not act on whole tensors."""
    fits = {name: LinearFit(seed=seed) for name in components if alterations.operator(name) is None}
    if not fits:
        return
    if fit_on is None:
        raise ValueError(
            f"the operators of {list(fits)} act on reduced states or tensors of several axes, or are "
            "missing, so they give no whole tensor; pass fit_batches with data to fit maps on, other "
            "than what effects are measured on"
        )
    alterations.fits.update(fits)
    fit_on.run(alterations.points.values(), update=alterations.update_fits)
    alterations.maps.update({name: fit.solve() for name, fit in fits.items()})


def _measured(alterations: Alterations, before: Outputs, kind: Kind, name: str, draws: int) -> Measured:
    """Alter one component in one way, as often as it takes, and score the outputs."""
    alter: dict[str, Alteration] = {}
    if kind in ("linear", "output_noise", "skip"):
        alter[alterations.points[name].call] = alterations.output(kind, name)
    drawn = []
    for _ in range(1 if alterations.draws_nothing(kind) else draws):
        with alterations.weights(kind, [name]):
            drawn.append(before.compare(alterations.runner.run(alterations.points.values(), alter)))
    return over_draws(drawn)


def _agreed_scale(
    report: CreditReport, kinds: Sequence[Kind], scale: Scale | None, strength: float
) -> Scale | None:
    """The unit of predicted effects, so that both can be compared."""
    predicted = report.effects
    if predicted is None:
        return scale
    noisy = [kind for kind in ("weight_noise", "output_noise") if kind in kinds]
    if noisy and any(kind in predicted.values for kind in noisy) and predicted.strength != strength:
        raise ValueError(
            f"the report predicts effects of noise of strength {predicted.strength}, but strength is "
            f"{strength}; give both the same"
        )
    if scale not in (None, predicted.scale):
        raise ValueError(
            f"the report predicts effects on the scale {predicted.scale!r}, but scale is {scale!r}; "
            "give both the same"
        )
    return predicted.scale


def _predictions(
    report: CreditReport, components: Sequence[str], kinds: Sequence[Kind]
) -> dict[str, dict[Kind, Any]]:
    """What the report predicts, its errors and its name, as fields of :class:`Interventions`."""
    places = [report.components.index(name) for name in components]
    predicted: dict[Kind, NDArray[np.float64]] = {}
    stderr: dict[Kind, NDArray[np.float64]] = {}
    predictor: dict[Kind, str] = {}
    for kind in kinds:
        if report.effects is not None and kind in report.effects.values:
            predicted[kind] = report.effects.values[kind][places]
            stderr[kind] = report.effects.stderr[kind][places]
            predictor[kind] = "effect"
        elif (name := PREDICTORS.get(kind)) is not None:
            predicted[kind] = getattr(report, name)[places]
            stderr[kind] = report.stderr[name][places]
            predictor[kind] = name
    return {"predicted": predicted, "predicted_stderr": stderr, "predictor": predictor}
