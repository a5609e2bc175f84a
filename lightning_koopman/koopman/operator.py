"""Fits a Koopman operator from moments or from data, with its held-out R²."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_koopman.koopman.moments import Layout, accumulate, covariances
from lightning_koopman.koopman.regression import (
    TIKHONOV_GRID,
    alive,
    check_tikhonov,
    choose_tikhonov,
    held_out,
    solve,
    spectrum,
)
from lightning_koopman.koopman.states import sample_keys
from lightning_koopman.network.tensors import exactly


@dataclass(frozen=True)
class KoopmanOperator:
    """A linear map between the states before and after a component.

    Attributes:
        matrix: K of shape ``(d_in, d_out)``, acting from the right: ``(X - x_mean) @ K + y_mean ≈ Y``.
        x_mean: Mean of the regressors, shape ``(d_in,)``.
        y_mean: Mean of the targets, shape ``(d_out,)``.
        r2: Held-out R² over all units and folds; NaN where no fold could be held out.
        tikhonov: Ridge weight used, in units of the regressors' mean variance.
        rank: Numerical rank of the regressors' covariance, or of the matrix if that was limited.
        condition: Ratio of the largest to the smallest kept variance of the regressors.
    """

    matrix: Tensor
    x_mean: Tensor
    y_mean: Tensor
    r2: float
    tikhonov: float
    rank: int
    condition: float

    @property
    def singular_values(self) -> Tensor:
        """Singular values of the matrix, in descending order."""
        values: Tensor = torch.linalg.svdvals(self.matrix)
        return values

    @property
    def logabsdet(self) -> float:
        """Sum of the logarithms of the singular values that are kept, in nats.

        For a square operator of full rank this is log|det K|. Kept are those above 1e-8 of the
        largest; there is none for a zero matrix, which gives minus infinity.
        """
        values = self.singular_values
        kept = values[values > 1e-8 * values[:1].sum()]
        return float(kept.log().sum()) if len(kept) else float("-inf")

    def predict(self, x: Tensor) -> Tensor:
        """Carry states across the component.

        Args:
            x: Shape ``(n_samples, d_in)``.

        Returns:
            Predicted states, shape ``(n_samples, d_out)``, float64.

        Raises:
            ValueError: If the width is not ``d_in``.
        """
        if x.ndim != 2 or x.shape[1] != self.matrix.shape[0]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (n_samples, {self.matrix.shape[0]})"
            )
        return (exactly(x).double() - self.x_mean) @ self.matrix + self.y_mean


def fit_operator(
    x: Tensor,
    y: Tensor,
    *,
    tikhonov: float | None = None,
    rank: int | None = None,
    folds: int | None = 5,
    seed: int = 0,
) -> KoopmanOperator:
    """Fit the linear map that best carries snapshots ``x`` to snapshots ``y``.

    Minimises ‖XK - Y‖² / n + λ s ‖K‖² (Frobenius norms) over centred data, where s is the mean
    variance of ``x``, from the Gram matrices: by Cholesky where they are well conditioned, else by
    ``eigh`` with a relative cut-off, so that dead and duplicate units do no harm.

    Args:
        x: Snapshots before the component, shape ``(n_samples, d_in)``.
        y: Snapshots after it, shape ``(n_samples, d_out)``, same row order.
        tikhonov: Ridge weight λ, without unit; ``None`` picks the one with the best held-out R².
        rank: Largest rank of the matrix, by reduced-rank regression; ``None`` keeps all.
        folds: Number of folds that R² is held out over. Equal rows share a fold. ``None`` fits all rows
            once, for a given ``tikhonov``, and leaves R² open.
        seed: Chooses the folds.

    Returns:
        Operator with ``matrix`` of shape ``(d_in, d_out)``, float64, on the device of ``x``,
        or the CPU if that has no float64.

    Raises:
        ValueError: If shapes do not fit, fewer than two rows arrive, a value is not finite, or
            ``tikhonov``, ``rank`` or ``folds`` is out of range.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> operator = fit_operator(x, x @ torch.diag(torch.tensor([1.0, 2.0, 3.0]).double()))
        >>> operator.singular_values.round(decimals=6).tolist()
        [3.0, 2.0, 1.0]
        >>> round(operator.r2, 9)
        1.0

    References:
        Williams, Kevrekidis & Rowley (2015), J. Nonlinear Sci. 25, 1307-1346.
    """
    check_tikhonov(tikhonov)
    _check_pair(x, y, rank)
    if tikhonov is None and folds is None:
        raise ValueError(
            "neither tikhonov nor folds is given; the ridge weight is picked by held-out R², so give one"
        )
    x, y = exactly(x), exactly(y)
    layout = Layout((x.shape[1], y.shape[1]), 2 if folds is None else folds, squares=(1,))
    offsets = _offset("x", x), _offset("y", y)
    if folds is None:
        fold_of = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        moments = torch.zeros(1, layout.size, dtype=torch.float64, device=x.device)
    else:
        fold_of, moments = sample_keys(x, seed) % folds, layout.zeros().to(x.device)
    accumulate(layout, moments, [x, y], fold_of, offsets)
    summed = moments[0] if folds is None else moments.sum(dim=0)
    grid = TIKHONOV_GRID if tikhonov is None else (tikhonov,)
    errors, total = ([], 0.0) if folds is None else _fold_errors(layout, moments, summed, grid, rank)
    tikhonov = choose_tikhonov(errors, grid) if errors else grid[0]
    error = sum(row[grid.index(tikhonov)] for row in errors)
    everything = covariances(layout, summed)
    c_xx, c_xy = everything[0, 0], everything[0, 1]
    values = torch.linalg.eigvalsh(c_xx).flip(0)
    values = values[alive(values)]
    matrix, kept = solve(c_xx, c_xy, tikhonov), len(values)
    if rank is not None:
        matrix, kept = _limit_rank(matrix, c_xy, rank), min(kept, rank)
    return KoopmanOperator(
        matrix=matrix,
        x_mean=everything.means[0] + offsets[0],
        y_mean=everything.means[1] + offsets[1],
        r2=1 - error / total if total > 0 else float("nan"),
        tikhonov=tikhonov,
        rank=kept,
        condition=float(values[0] / values[-1]) if len(values) else 1.0,
    )


def _check_pair(x: Tensor, y: Tensor, rank: int | None) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; expected (n_samples, d_in) and "
            "(n_samples, d_out) with the same rows"
        )
    if x.shape[0] < 2:
        raise ValueError(f"{x.shape[0]} sample arrived; an operator needs at least 2")
    if rank is not None and not 1 <= rank <= min(x.shape[1], y.shape[1]):
        raise ValueError(
            f"rank is {rank}; for a ({x.shape[1]}, {y.shape[1]}) operator it lies between 1 and "
            f"{min(x.shape[1], y.shape[1])}"
        )


def _offset(name: str, data: Tensor) -> Tensor:
    """Mean of the rows, ``(d,)``, float64."""
    mean = data.mean(dim=0, dtype=torch.float64)
    # A finite mean has finite terms, and is found in a pass that is needed anyway.
    if not bool(torch.isfinite(mean).all()) and not bool(torch.isfinite(data).all()):
        raise ValueError(f"{name} holds NaN or infinity; remove those rows")
    return mean


def _fold_errors(
    layout: Layout, moments: Tensor, summed: Tensor, grid: Sequence[float], rank: int | None
) -> tuple[list[list[float]], float]:
    """Squared held-out errors, by fold and ridge weight, and the squares they are of."""
    total, errors = 0.0, []
    for row in moments:
        train = covariances(layout, summed, without=row)
        test = covariances(layout, row, about=train.means)
        if train.count < 2 or test.count == 0:
            continue
        trace = float(test.variances[1].sum())
        total += test.count * trace
        test_xx, test_xy = test[0, 0], test[0, 1]
        if rank is None and len(grid) > 1:
            problem = spectrum(train[0, 0], train[0, 1])
            found = held_out(problem, test_xx, test_xy, trace).errors(grid).tolist()
        else:
            solved = [solve(train[0, 0], train[0, 1], weight) for weight in grid]
            if rank is not None:
                solved = [_limit_rank(matrix, train[0, 1], rank) for matrix in solved]
            products = [(k * (test_xx @ k - 2 * test_xy)).sum() for k in solved]
            found = [max(0.0, trace + float(product)) for product in products]
        errors.append([test.count * error for error in found])
    return errors, total


def _limit_rank(matrix: Tensor, c_xy: Tensor, rank: int) -> Tensor:
    """Reduced-rank regression: project the targets on the leading directions of the predictions."""
    _, vectors = torch.linalg.eigh(matrix.T @ c_xy)
    leading = vectors[:, -rank:]
    reduced: Tensor = matrix @ (leading @ leading.T)
    return reduced
