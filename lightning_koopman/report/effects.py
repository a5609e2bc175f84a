"""What altering each component is predicted to do to the outputs; pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Kind = Literal["linear", "reinit", "weight_noise", "output_noise", "skip"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Ways to alter a component, as :func:`lightning_koopman.intervene` carries them out."""

Scale = Literal["kl", "relative"]
"""What a change of the outputs is measured in: mean KL divergence in nats from the original to the
altered class distribution, or mean squared change over the outputs' variance."""

UNITS: Mapping[Scale, str] = {"kl": "KL in nats", "relative": "share of the outputs' variance"}


@dataclass(frozen=True, eq=False)
class Effects:
    """Predicted effects of altering one component at a time, to second order.

    Attributes:
        values: By kind of alteration, the predicted change of the outputs, shape ``(L,)``, not
            negative; NaN where no gradient leads from the outputs to the component.
        stderr: Standard errors of the values, by kind; NaN where fewer than two folds hold samples.
        influence_stderr: Standard errors of :attr:`influence`, shape ``(L,)``.
        scale: Unit of the values.
        strength: Standard deviation of noise, as a share of the parameters' or units' own.
        n_samples: Samples that the predictions rest on.
    """

    values: Mapping[Kind, NDArray[np.float64]]
    stderr: Mapping[Kind, NDArray[np.float64]]
    influence_stderr: NDArray[np.float64]
    scale: Scale
    strength: float
    n_samples: int

    @property
    def unit(self) -> str:
        """The unit in words."""
        return UNITS[self.scale]

    @property
    def influence(self) -> NDArray[np.float64]:
        """Each component's share of what alterations do to the outputs, shape ``(L,)``.

        Of every kind, the square root of the effect (how far the outputs move) is divided by its sum
        over components, and the shares are averaged over kinds; a kind without any effect is left
        out. No scale is learned, so influences compare components of one network, and sum to 1.
        """
        return mean_share(np.stack(list(self.values.values()), axis=1))

    def cells(self, component: int) -> list[str]:
        """Return the effects and the influence of the component of that index, with errors, as texts."""
        i = component
        found = [with_share(values[i], self.stderr[kind][i]) for kind, values in self.values.items()]
        return [*found, f"{self.influence[i]:.3f}±{self.influence_stderr[i]:.3f}"]


def with_share(value: float, error: float) -> str:
    """Return an effect as text, with its standard error as a share of it."""
    share = f"±{error / value:.0%}" if value > 0 and math.isfinite(error) else ""
    return f"{value:.2g}{share}"


def mean_share(effects: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average over kinds each component's share of how far the outputs move."""
    moved = np.sqrt(effects)
    total = np.nansum(moved, axis=0)
    if not (total > 0).any():
        return np.full(len(effects), np.nan)
    shares: NDArray[np.float64] = (moved[:, total > 0] / total[total > 0]).mean(axis=1)
    return shares
