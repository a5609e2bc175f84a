"""What altering each component is predicted to do to the outputs; pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

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
        scale: Unit of the values.
        strength: Standard deviation of noise, as a share of the parameters' or units' own.
        n_samples: Samples that the predictions rest on.
    """

    values: Mapping[Kind, NDArray[np.float64]]
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
        shares = []
        for effect in self.values.values():
            moved = np.sqrt(effect)
            if np.nansum(moved) > 0:
                shares.append(moved / np.nansum(moved))
        if not shares:
            return np.full(len(next(iter(self.values.values()))), np.nan)
        mean: NDArray[np.float64] = np.mean(shares, axis=0)
        return mean

    def to_dict(self) -> dict[str, Any]:
        """Give plain Python values, with ``None`` for what is not finite."""
        return {
            "values": {
                kind: [float(v) if np.isfinite(v) else None for v in values]
                for kind, values in self.values.items()
            },
            "scale": self.scale,
            "strength": self.strength,
            "n_samples": self.n_samples,
        }
