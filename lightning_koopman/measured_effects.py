"""Alters one component at a time and measures what the outputs do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_koopman.alterations import altered_output, altered_weights, check_alterations
from lightning_koopman.changes import Measured, over_draws
from lightning_koopman.effects import KINDS, Kind, Scale
from lightning_koopman.forward import ForwardFn
from lightning_koopman.interventions import PREDICTORS, Interventions
from lightning_koopman.isolation import undisturbed
from lightning_koopman.linear_map import LinearMap
from lightning_koopman.report import CreditReport
from lightning_koopman.report_sites import check_samples_first, linear_maps, state_sites
from lightning_koopman.runs import Runner, UnitMoments
from lightning_koopman.scoring import Metric, Outputs
from lightning_koopman.sites import Alteration, Site


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
            :class:`~lightning_koopman.interventions.Interventions`; ``None`` takes ``"kl"`` where
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
    check_alterations(report, kinds, components, strength, draws)
    scale = _agreed_scale(report, kinds, scale, strength)
    chosen = tuple(report.components if components is None else components)
    runner = Runner(model, batches, forward_fn)
    sites = state_sites(report)
    moments = UnitMoments()

    def take(values: Mapping[Site, Tensor]) -> None:
        if set(kinds) & {"linear", "output_noise", "skip"}:
            check_samples_first(report, values)
        moments.update(values)

    with undisturbed(model):
        before = Outputs.of(runner.run(sites.values(), update=take), runner.batches, scale, metric)
        maps: Mapping[str, LinearMap] = {}
        if "linear" in kinds:
            fit_on = None if fit_batches is None else Runner(model, fit_batches, forward_fn)
            maps = linear_maps(report, chosen, moments.shapes, fit_on, seed=seed)
        scores = np.empty((len(chosen), len(kinds), len(Measured._fields)))
        for i, name in enumerate(chosen):
            for column, kind in enumerate(kinds):
                # The generator's state is the user's: undisturbed puts it back.
                torch.manual_seed(seed + i)
                once = kind in ("linear", "skip") or (kind == "reinit" and initial is not None)
                alter: dict[str, Alteration] = {}
                if kind in ("linear", "output_noise", "skip"):
                    call = report.parts[name][-1]
                    alter[call] = altered_output(kind, name, report, moments, maps, strength)
                drawn = []
                for _ in range(1 if once else draws):
                    with altered_weights(kind, model, report.parts[name], initial, strength):
                        drawn.append(before.compare(runner.run(sites.values(), alter)))
                scores[i, column] = over_draws(drawn)
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
