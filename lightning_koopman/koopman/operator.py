"""Fits a Koopman operator from moments or from data, with its held-out R²."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_koopman.koopman.moments import Layout, accumulate, covariances
from lightning_koopman.koopman.regression import (
    alive,
    check_tikhonov,
    choose_ridge,
    held_out_errors,
    solve,
    spectrum,
)
from lightning_koopman.koopman.states import sample_keys
from lightning_koopman.network.arguments import INTEGER, TENSOR, check_given, check_type
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
        check_type(TENSOR, x=x)
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
        tikhonov: Ridge weight λ, without unit; ``None`` picks, as for a chain, the largest up to 1e-2
            that at most doubles the error expected on other data (generalised cross-validation).
        rank: Largest rank of the matrix, by reduced-rank regression; ``None`` keeps all.
        folds: Number of folds that R² is held out over. Equal rows share a fold. ``None`` leaves R²
            open.
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
    check_type(INTEGER, seed=seed)
    check_given(INTEGER, rank=rank, folds=folds)
    check_type(TENSOR, x=x, y=y)
    _check_pair(x, y, rank)
    x, y = exactly(x), exactly(y)
    layout = Layout((x.shape[1], y.shape[1]), 2 if folds is None else folds, squares=(1,))
    offsets = _offset("x", x), _offset("y", y)
    if folds is None:
        fold_of = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        moments = torch.zeros(1, layout.size, dtype=torch.float64, device=x.device)
    else:
        fold_of, moments = sample_keys(x, seed) % folds, layout.zeros().to(x.device)
    accumulate(layout, moments, [x, y], fold_of, offsets)
    summed = moments.sum(dim=0)
    everything = covariances(layout, summed)
    c_xx, c_xy = everything[0, 0], everything[0, 1]
    if tikhonov is None:
        problem = spectrum(c_xx, c_xy)
        values = problem.values
        errors = problem.expected_error(float(everything.variances[1].sum()), float(everything.count))
        tikhonov = choose_ridge(errors)
        matrix = problem.matrix(tikhonov)
    else:
        # Eigenvalues alone cost a third of what eigenvectors do.
        values = torch.linalg.eigvalsh(c_xx).flip(0)
        values = values[alive(values)]
        matrix = solve(c_xx, c_xy, tikhonov)
    kept = len(values)
    if rank is not None:
        matrix, kept = _limit_rank(matrix, c_xy, rank), min(kept, rank)
    return KoopmanOperator(
        matrix=matrix,
        x_mean=everything.means[0] + offsets[0],
        y_mean=everything.means[1] + offsets[1],
        r2=float("nan") if folds is None else _held_out_r2(layout, moments, summed, tikhonov, rank),
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
        raise ValueError(f"{x.shape[0]} of at least 2 samples arrived for an operator; pass more")
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


def _held_out_r2(
    layout: Layout, moments: Tensor, summed: Tensor, tikhonov: float, rank: int | None
) -> float:
    """R² over all folds, each predicted by a fit to the others; NaN where the target never varies."""
    error = total = 0.0
    for row in moments:
        train = covariances(layout, summed, without=row)
        test = covariances(layout, row, about=train.means)
        if train.count < 2 or test.count == 0:
            continue
        c_xy, variance = train[0, 1], test.variances[1].sum()
        matrix = solve(train[0, 0], c_xy, tikhonov)
        if rank is not None:
            matrix = _limit_rank(matrix, c_xy, rank)
        left = held_out_errors(matrix, test[0, 0], test[0, 1], variance)
        total += float(test.count * variance)
        error += float(test.count * left)
    return 1 - error / total if total > 0 else float("nan")


def _limit_rank(matrix: Tensor, c_xy: Tensor, rank: int) -> Tensor:
    """Reduced-rank regression: project the targets on the leading directions of the predictions."""
    _, vectors = torch.linalg.eigh(matrix.T @ c_xy)
    leading = vectors[:, -rank:]
    reduced: Tensor = matrix @ (leading @ leading.T)
    return reduced
