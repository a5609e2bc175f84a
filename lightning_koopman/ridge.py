"""Ridge weights: the grids that are tried, and how one is chosen by held-out errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TIKHONOV_GRID = (0.0, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge weights tried, in units of the mean variance of the regressors."""

RESOLUTION_GRID = (0.0, *(10 ** (-8 + step / 4) for step in range(25)))
"""Ridge weights tried for a chain; the last, 1e-2, is the most that a chain is smoothed by default."""


def check_tikhonov(tikhonov: float | None) -> None:
    """Refuse a ridge weight that is no non-negative number.

    Args:
        tikhonov: The weight, or ``None``.

    Raises:
        ValueError: If it is negative or not finite.
    """
    if tikhonov is not None and not 0 <= tikhonov < float("inf"):
        raise ValueError(f"tikhonov is {tikhonov}; it must be a finite number, 0 or above")


def choose_tikhonov(errors: Sequence[Sequence[float]], grid: Sequence[float]) -> float:
    """Pick the smallest ridge weight whose held-out error is not clearly above the best.

    Held-out R² is flat over decades of ridge weights, while every increase shrinks the operator and
    its determinant. Of the weights within one standard error of the best, by the folds' paired
    differences, the smallest is therefore taken.

    Args:
        errors: A row a fold, a column a weight, already multiplied by the fold's sample count.
        grid: The weights, ascending.

    Returns:
        The chosen weight.
    """
    table = torch.tensor(errors, dtype=torch.float64)
    best = int(table.sum(dim=0).argmin())
    excess = table - table[:, best : best + 1]
    spread = excess.std(dim=0) * len(errors) ** 0.5 if len(errors) > 1 else torch.zeros(len(grid))
    allowed = excess.sum(dim=0) <= spread
    allowed[best] = True
    return grid[int(allowed.nonzero()[0])]


def resolved_tikhonov(errors: Tensor, grid: Sequence[float]) -> float:
    """Pick the largest ridge weight that at most doubles what the operator leaves unexplained.

    Without a ridge, volumes are decided by directions in which the state hardly varies, and more samples
    always bring more of them: they have no large-sample limit. A ridge weight of 1e-2 leaves the
    directions alone that carry more than a hundredth of the mean variance, and costs a network with
    nonlinearities little of its R². A step that is linear to the last digit gets none.

    Args:
        errors: Held-out errors, a row a fold, a column a weight, multiplied by the fold's sample count.
        grid: The weights, ascending.

    Returns:
        The weight; between two weights of the grid it is interpolated, so that it moves smoothly with
        the data.
    """
    total = errors.sum(dim=0)
    # Below this, what is left unexplained is rounding.
    if total.min() <= 1e-9 * total.max():
        return grid[0]
    limit = 2 * float(total.min())
    within = int((total <= limit).nonzero()[-1])
    low = grid[within]
    if within == len(grid) - 1 or low == 0:
        return low
    before, behind = float(total[within]), float(total[within + 1])
    return float(low * (grid[within + 1] / low) ** ((limit - before) / (behind - before)))
