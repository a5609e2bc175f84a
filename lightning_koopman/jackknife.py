"""Standard errors from numbers that were computed again without each fold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def jackknife(value: Tensor, replicates: Sequence[Tensor], count: float, held_out: Tensor) -> Tensor:
    """Give the delete-one-fold standard error.

    Args:
        value: A number over all samples, or an array of them.
        replicates: The same with one fold after the other left out.
        count: Number of all samples.
        held_out: Number of samples in each fold, shape ``(folds,)``.

    Returns:
        Errors of the same shape; NaN with fewer than two folds.
    """
    # Folds of unequal size: Busing, Meijer & van der Leeden (1999), Statistics and Computing 9, 3-8.
    if len(replicates) < 2:
        return torch.full_like(value, torch.nan)
    ratio = (count / held_out).view(-1, *[1] * value.ndim)
    stacked = torch.stack(list(replicates))
    pseudo = ratio * value - (ratio - 1) * stacked
    centre = len(replicates) * value - ((1 - 1 / ratio) * stacked).sum(dim=0)
    variance = ((pseudo - centre) ** 2 / (ratio - 1)).mean(dim=0)
    return variance.sqrt()


def with_bias(
    value: Tensor,
    replicates: Sequence[Tensor],
    count: float,
    held_out: Tensor,
    gap: Tensor | None = None,
) -> Tensor:
    """Give the jackknife error and the bias of a finite sample, added in quadrature.

    Args:
        value: As in :func:`jackknife`.
        replicates: As there.
        count: As there.
        held_out: As there.
        gap: The bias where it is known otherwise; ``None`` takes the jackknife's own estimate of it.

    Returns:
        Errors of the same shape; NaN with fewer than two folds.
    """
    spread = jackknife(value, replicates, count, held_out)
    if gap is None and replicates:
        # With folds of unequal size, each replicate's distance counts by how much was left out.
        ratio = (count / held_out).view(-1, *[1] * value.ndim)
        gap = ((1 - 1 / ratio) * (torch.stack(list(replicates)) - value)).sum(dim=0)
    return spread if gap is None else (spread.square() + gap.square()).sqrt()
