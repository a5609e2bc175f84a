"""Chooses the step delay: how many earlier states each operator must see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_koopman.koopman.chain import Normalize, fit_steps, jackknife, split_folds
from lightning_koopman.koopman.moments import Layout

Delay = int | Literal["auto"]

MAX_DELAY = 4
"""Largest delay that ``"auto"`` considers; products of states that far apart are kept for it."""

_ROUNDING = 1e-9


@dataclass(frozen=True)
class DelayChoice:
    """A delay, and what it was chosen by.

    Attributes:
        delay: The smallest one that no larger one considered improves on by more than its error.
        r2: Held-out R², the mean over all components, with delay 1, 2, …; empty where fewer than two
            folds could be held out.
    """

    delay: int
    r2: tuple[float, ...]


def choose_delay(
    layout: Layout,
    moments: Tensor,
    *,
    tikhonov: float | None = None,
    normalize: Normalize = "none",
) -> DelayChoice:
    """Find the smallest delay whose held-out R² no larger one improves on by more than its error.

    Compared is the mean of R² over all components; the error is that of the improvement itself, by the
    delete-one-fold jackknife. A larger delay may help where the next one does not: a skip over three
    components shows at delay 3 only. So all delays up to ``layout.reach`` are compared.
    """
    counts = moments[:, 0].double().cpu()
    left_out = counts[(counts > 0) & (counts.sum() - counts >= 2)]
    if len(left_out) < 2:
        return DelayChoice(1, ())
    fits = [
        _mean_r2(replace(layout, delay=delay), moments, tikhonov, normalize)
        for delay in range(1, layout.reach + 1)
    ]
    r2, without = (torch.stack(found) for found in zip(*fits, strict=True))
    count = float(counts.sum())
    delay = 1 + next(s for s in range(len(r2)) if not _improved(r2, without, s, count, left_out))
    return DelayChoice(delay, tuple(r2.tolist()))


def _mean_r2(
    layout: Layout, moments: Tensor, tikhonov: float | None, normalize: Normalize
) -> tuple[Tensor, Tensor]:
    """Give the mean R² over all components, and the same without each fold, shape ``(folds,)``."""
    whole, folds = split_folds(layout, moments, normalize)
    fit = fit_steps(layout, whole, folds, tikhonov)[0]
    return fit.r2.nanmean(), torch.stack([r2.nanmean() for r2 in fit.without])


def _improved(r2: Tensor, without: Tensor, s: int, count: float, left_out: Tensor) -> bool:
    """Tell whether an entry behind the s-th exceeds it by more than the difference's error."""
    gains = r2[s + 1 :] - r2[s]
    replicates: Sequence[Tensor] = list((without[s + 1 :] - without[s]).T)
    error = jackknife(gains, replicates, count, left_out)
    # What a linear chain gains by a longer delay is rounding, and so is its error.
    return bool((gains > error.clamp_min(_ROUNDING)).any())
