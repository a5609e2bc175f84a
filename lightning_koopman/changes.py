"""What an alteration changed, sample by sample, and the standard error of the mean over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Change:
    """How far a network's altered outputs lie from its own. Samples are rows of the outputs.

    Attributes:
        moved: What each sample adds to the change, shape ``(n_samples,)``, float64.
        whole: What each sample adds to that which changes are divided by, the same shape.
        metric: Metric of the altered outputs; NaN where there is none.
        gained: How many more of a sample's classes are right, the same shape; ``None`` where the metric
            is not the accuracy, so that nothing is known of it by sample.
        classes: How many classes each sample has, the same shape; one, unless it has positions.
    """

    moved: Tensor
    whole: Tensor
    metric: float
    gained: Tensor | None = None
    classes: Tensor | None = None

    @property
    def effect(self) -> float:
        """The change of the outputs: a mean over samples, or a share of their variance."""
        return float(self.moved.sum() / self.whole.sum())


class Measured(NamedTuple):
    """An alteration's effect and the metric after it, with their standard errors.

    Attributes:
        effect: Mean over draws.
        effect_stderr: Its error.
        metric: Mean over draws; NaN where there is none.
        metric_stderr: Error of its difference from the metric before; NaN where that is no accuracy.
    """

    effect: float
    effect_stderr: float
    metric: float
    metric_stderr: float


def over_draws(draws: Sequence[Change]) -> Measured:
    r"""Average the changes that one alteration made in several draws.

    Samples are taken as independent. With t the sum of ``whole``, and r what a sample's ``moved``,
    averaged over draws, exceeds the effect times its ``whole`` by, the variance is
    :math:`\tfrac{n}{n-1} \sum r^2 / t^2`. Where all samples weigh alike, that is the variance of a mean,
    elsewhere that of a ratio of two sums. With several draws, the variance of their mean is added.

    Args:
        draws: One change a draw, of the same samples.

    Returns:
        Means and standard errors; with a single sample, the errors are NaN.

    Example:
        >>> moved = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
        >>> found = over_draws([Change(moved, torch.ones_like(moved), float("nan"))])
        >>> found.effect, round(found.effect_stderr, 6) == round(float(moved.std()) / 2, 6)
        (3.0, True)
    """
    whole = draws[0].whole
    effect, effect_stderr = _ratio(torch.stack([draw.moved for draw in draws]), whole)
    metric = sum(draw.metric for draw in draws) / len(draws)
    gained = [draw.gained for draw in draws if draw.gained is not None]
    metric_stderr = math.nan
    if gained and draws[0].classes is not None:
        metric_stderr = _ratio(torch.stack(gained), draws[0].classes)[1]
    return Measured(effect, effect_stderr, metric, metric_stderr)


def _ratio(parts: Tensor, whole: Tensor) -> tuple[float, float]:
    """Sums of parts, shape ``(draws, n_samples)``, over the sum of the whole: mean and error."""
    total, n_samples = whole.sum(), len(whole)
    ratios = parts.sum(dim=1) / total
    value = ratios.mean()
    if n_samples < 2:
        return float(value), math.nan
    rest = parts.mean(dim=0) - value * whole
    variance = rest.square().sum() * n_samples / (n_samples - 1) / total.square()
    if len(ratios) > 1:
        variance = variance + ratios.var() / len(ratios)
    return float(value), float(variance.sqrt())
