"""Ridge regression from moments."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

TIKHONOV_GRID = (0.0, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge weights tried, in units of the mean variance of the regressors."""

RESOLUTION_GRID = (0.0, *(10 ** (-8 + step / 4) for step in range(25)))
"""Ridge weights tried for a chain; the last, 1e-2, is the most that a chain is smoothed by default."""


def check_tikhonov(tikhonov: float | None) -> None:
    """Refuse a ridge weight that is no non-negative number."""
    if tikhonov is not None and not 0 <= tikhonov < float("inf"):
        raise ValueError(f"tikhonov is {tikhonov}; it must be a finite number, 0 or above")


def choose_tikhonov(errors: Sequence[Sequence[float]], grid: Sequence[float]) -> float:
    """Pick the smallest ridge weight whose held-out error is not clearly above the best.

    Held-out R² is flat over decades of ridge weights, while every increase shrinks the operator and
    its determinant. Of the weights within one standard error of the best, by the folds' paired
    differences, the smallest is therefore taken.
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


RCOND = 1e-12
"""Directions whose variance is below this share of the largest are taken as dead."""

_SAFE_PIVOT = 1e-8
"""Cholesky is left for ``eigh``, which drops dead directions, where a pivot is below this share."""


@dataclass(frozen=True)
class Factored:
    """Rows of ``vectors @ (filters * projected)``; cheaper to apply than to multiply out."""

    vectors: Tensor
    filters: Tensor
    projected: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the rows."""
        return self.vectors.shape[0], self.projected.shape[1]

    def __matmul__(self, other: Tensor) -> Tensor:
        product: Tensor = self.vectors @ (self.filters * (self.projected @ other))
        return product


@dataclass(frozen=True)
class Spectrum:
    """A regression problem in the eigenbasis of its regressors, ready for any ridge weight.

    Attributes:
        values: Kept eigenvalues of C_xx, descending, shape ``(k,)``.
        vectors: Their eigenvectors, shape ``(d_in, k)``.
        projected: ``vectors.T @ C_xy``, shape ``(k, d_out)``.
        mean_variance: trace(C_xx) / d_in, the unit of the ridge weight.
        matrices: K by ridge weight, once they are solved for and the eigenbasis has made way.
    """

    values: Tensor
    vectors: Tensor
    projected: Tensor
    mean_variance: float
    matrices: Mapping[float, Tensor] = field(default_factory=dict)

    def filters(self, tikhonov: float) -> Tensor:
        """Inverse eigenvalues under a ridge weight."""
        return 1.0 / (self.values + tikhonov * self.mean_variance)

    def matrix(self, tikhonov: float) -> Tensor:
        """Solve for the operator."""
        return self.vectors @ (self.filters(tikhonov)[:, None] * self.projected)

    def parts(self, tikhonov: float, widths: Sequence[int]) -> Sequence[Tensor | Factored]:
        """Return the operator, one block per state that it reads."""
        if self.matrices:
            return torch.split(self.matrices[tikhonov], list(widths))
        filters = self.filters(tikhonov)[:, None]
        return [
            Factored(vectors, filters, self.projected)
            for vectors in torch.split(self.vectors, list(widths))
        ]

    def solved(self, weights: Collection[float]) -> Spectrum:
        """Solve for some ridge weights, and let go of the eigenbasis."""
        matrices = {weight: self.matrix(weight) for weight in weights}
        empty = self.vectors.new_empty(0)
        return replace(self, vectors=empty, projected=empty, matrices=matrices)

    @property
    def condition(self) -> float:
        """Ratio of the largest to the smallest kept eigenvalue; 1 where none is kept."""
        return float(self.values[0] / self.values[-1]) if len(self.values) else 1.0


def alive(variances: Tensor) -> Tensor:
    """Return which variances are more than rounding beside the largest one."""
    largest = torch.cat([variances, variances.new_zeros(1)]).max()
    return variances > RCOND * largest


def spectrum(c_xx: Tensor, c_xy: Tensor) -> Spectrum:
    """Diagonalise the regressors' covariance and drop its dead directions."""
    values, vectors = torch.linalg.eigh(c_xx)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = int(alive(values).sum())
    vectors = vectors[:, :kept]
    mean_variance = float(c_xx.diagonal().sum()) / max(1, len(c_xx))
    return Spectrum(values[:kept], vectors, vectors.T @ c_xy, mean_variance)


def solve(c_xx: Tensor, c_xy: Tensor, tikhonov: float) -> Tensor:
    """Solve for the operator under one ridge weight."""
    variances = c_xx.diagonal()
    varies = variances > 0
    some_dead = not bool(varies.all())
    system, targets = (c_xx[varies][:, varies], c_xy[varies]) if some_dead else (c_xx.clone(), c_xy)
    system.diagonal().add_(tikhonov * float(variances.mean()))
    factor, failed = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal().square()
    if not len(pivots) or int(failed) or not bool(pivots.min() > _SAFE_PIVOT * pivots.max()):
        return spectrum(c_xx, c_xy).matrix(tikhonov)
    solved = torch.cholesky_solve(targets, factor)
    if not some_dead:
        return solved
    matrix = torch.zeros_like(c_xy)
    matrix[varies] = solved
    return matrix


@dataclass(frozen=True)
class HeldOut:
    """The squared error per sample of one problem's operators, as a function of the ridge weight.

    Attributes:
        train: The problem.
        variance: Squared deviation of the targets, per sample.
        linear: Coefficients of the filters, shape ``(k,)``.
        quadratic: Coefficients of their products, ``(k, k)``, or its diagonal alone, ``(k,)``.
    """

    train: Spectrum
    variance: float
    linear: Tensor
    quadratic: Tensor

    def errors(self, grid: Sequence[float]) -> Tensor:
        """Compute the error of each ridge weight."""
        weights = torch.tensor(grid, dtype=self.linear.dtype, device=self.linear.device)
        f = 1.0 / (self.train.values + weights[:, None] * self.train.mean_variance)
        twice = f * self.quadratic if self.quadratic.ndim == 1 else f @ self.quadratic
        return (self.variance - 2 * f @ self.linear + (twice * f).sum(dim=1)).clamp_min(0)


def held_out(train: Spectrum, c_xx: Tensor, c_xy: Tensor, c_yy_trace: float) -> HeldOut:
    """Set up the squared error on held-out moments."""
    # With K = U diag(f) W, W = UᵀC_xy: SSE = tr C_yy - 2 f·v + fᵀMf costs O(k²) a weight.
    rotated = train.vectors.T @ (c_xx @ train.vectors)
    linear = (train.projected * (train.vectors.T @ c_xy)).sum(dim=1)
    return HeldOut(train, c_yy_trace, linear, rotated.mul_(train.projected @ train.projected.T))


def in_sample(train: Spectrum, c_yy_trace: float) -> HeldOut:
    """Set up the squared error on the moments that the problem was fitted to."""
    linear = train.projected.square().sum(dim=1)
    return HeldOut(train, c_yy_trace, linear, train.values * linear)
