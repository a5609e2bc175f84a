"""Ridge regression from moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_koopman.network.arguments import NUMBER, check_given

RIDGE_GRID = (0.0, *(10 ** (-8 + step / 4) for step in range(25)))
"""Ridge weights tried, in units of the mean variance of the regressors; at most 1e-2."""


def check_tikhonov(tikhonov: float | None) -> None:
    """Refuse a ridge weight that is no non-negative number."""
    check_given(NUMBER, tikhonov=tikhonov)
    if tikhonov is not None and not 0 <= tikhonov < float("inf"):
        raise ValueError(f"tikhonov is {tikhonov}; it must be a finite number, 0 or above")


def choose_ridge(errors: Tensor) -> float:
    """Pick the largest ridge weight that at most doubles what the operator leaves unexplained.

    ``errors`` are those under each weight of :data:`RIDGE_GRID`, which others are interpolated between.
    Without a ridge, volumes are decided by directions in which the state hardly varies, and more samples
    always bring more of them: they have no large-sample limit. A ridge weight of 1e-2 leaves the
    directions alone that carry more than a hundredth of the mean variance, and costs a network with
    nonlinearities little of its R². A step that is linear to the last digit gets none.
    """
    known = errors[errors.isfinite()]
    # Below this, what is left unexplained is rounding.
    if not len(known) or known.min() <= _ROUNDING * known.max():
        return RIDGE_GRID[0]
    limit = 2 * float(known.min())
    within = int((errors <= limit).nonzero()[-1])
    low = RIDGE_GRID[within]
    if within == len(RIDGE_GRID) - 1 or low == 0:
        return low
    before, behind = float(errors[within]), float(errors[within + 1])
    return float(low * (RIDGE_GRID[within + 1] / low) ** ((limit - before) / (behind - before)))


def is_settled(errors: Tensor) -> bool:
    """Check whether the errors of similar data would pick the same ridge weight, an end of the grid."""
    known = errors[errors.isfinite()]
    if not len(known) or known.min() <= _ROUNDING / 10 * known.max():
        return True
    return bool(errors[-1] <= _CLEAR * known.min())


_ROUNDING = 1e-9
"""Share of the largest error at which what is left unexplained is rounding."""

_CLEAR = 1.5
"""Ratio of errors that no fold left out lifts above 2."""

RCOND = 1e-12
"""Directions whose variance is below this share of the largest are taken as dead."""

_EXACT = 1e-16
"""Share of the targets' variance that double precision does not tell from none."""

_SAFE_PIVOT = 1e-8
"""Cholesky is left for ``eigh``, which drops dead directions, where a pivot is below this share."""

_NO_FREEDOM = 1e-6
"""Share of the samples that a fit must leave undecided for its errors to tell of other data."""


@dataclass(frozen=True)
class Spectrum:
    """A regression problem in the eigenbasis of its regressors, ready for any ridge weight.

    Attributes:
        values: Kept eigenvalues of C_xx, descending, shape ``(k,)``.
        vectors: Their eigenvectors, shape ``(d_in, k)``.
        projected: ``vectors.T @ C_xy``, shape ``(k, d_out)``.
        mean_variance: trace(C_xx) / d_in, the unit of the ridge weight.
    """

    values: Tensor
    vectors: Tensor
    projected: Tensor
    mean_variance: float

    def filters(self, tikhonov: float) -> Tensor:
        """Inverse eigenvalues under a ridge weight."""
        return 1.0 / (self.values + tikhonov * self.mean_variance)

    def matrix(self, tikhonov: float) -> Tensor:
        """Solve for the operator."""
        return self.vectors @ (self.filters(tikhonov)[:, None] * self.projected)

    def reached(self, entries: Tensor, variance: float, count: float) -> Tensor | None:
        """Find the directions of the targets that some regressors reach; ``None`` if all that could be.

        The regressors, or n directions of them, are given by their entries of the vectors, ``(n, k)``;
        ``variance`` is the squared deviation of the targets per sample, of which there are ``count``.
        """
        # Where nothing is reached, rounding is, and along directions that hardly vary it is not small.
        # Beside its standard error it is: what the regressors add to those beside them, as a spread of
        # the targets, then stays below what n weights make of the residual by chance.
        unit = self.values.rsqrt()[:, None]
        added = torch.linalg.qr(unit * entries.T).Q.T @ (unit * self.projected)
        _, spreads, directions = torch.linalg.svd(added, full_matrices=False)
        chance = 2 * (len(entries) + 1) / count * float(self.residual((0.0,), variance))
        least = min(max(chance, _EXACT * variance), RCOND * variance)
        kept = spreads.square() > least
        return None if bool(kept.all()) else directions[kept].T

    def residual(self, grid: Sequence[float], variance: float) -> Tensor:
        """Compute the squared error per sample that each ridge weight leaves in sample.

        ``variance`` is the squared deviation of the targets per sample.
        """
        explained = (self.values.rsqrt()[:, None] * self.projected).square().sum(dim=1)
        # What the weight adds is summed for itself: as a difference it would be lost in rounding.
        kept = (self._shrunk(grid).square() * explained).sum(dim=1)
        return kept + (variance - explained.sum()).clamp_min(0)

    def expected_error(self, variance: float, count: float) -> Tensor:
        """Estimate the squared error per sample on other data, by generalised cross-validation.

        It is that under each weight of :data:`RIDGE_GRID`, and infinite where the fit has as many
        degrees of freedom as there are samples.

        References:
            Golub, Heath & Wahba (1979), Technometrics 21, 215-223.
        """
        left = (count - 1 - len(self.values) + self._shrunk(RIDGE_GRID).sum(dim=1)) / count
        errors = self.residual(RIDGE_GRID, variance) / left.square()
        return torch.where(left > _NO_FREEDOM, errors, torch.inf)

    def _shrunk(self, grid: Sequence[float]) -> Tensor:
        """Return the share of each direction that each ridge weight takes away."""
        weights = self.mean_variance * torch.tensor(grid, dtype=self.values.dtype, device="cpu")[:, None]
        weights = weights.to(self.values.device)
        return weights / (self.values + weights)

    @property
    def condition(self) -> float:
        """Ratio of the largest to the smallest kept eigenvalue; 1 where none is kept."""
        return float(self.values[0] / self.values[-1]) if len(self.values) else 1.0


def alive(variances: Tensor) -> Tensor:
    """Return which variances are more than rounding beside the largest one."""
    if not variances.numel():
        return variances > 0
    return variances > RCOND * variances.amax(dim=-1, keepdim=True).clamp_min(0)


def spectrum(c_xx: Tensor, c_xy: Tensor) -> Spectrum:
    """Diagonalise the regressors' covariance and drop its dead directions."""
    values, vectors = torch.linalg.eigh(c_xx, UPLO="U")  # a tenth faster by rows than "L"
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
    factor, failed = torch.linalg.cholesky_ex(system, upper=True)
    pivots = factor.diagonal().square()
    if not len(pivots) or int(failed) or not bool(pivots.min() > _SAFE_PIVOT * pivots.max()):
        return spectrum(c_xx, c_xy).matrix(tikhonov)
    solved = torch.cholesky_solve(targets, factor, upper=True)
    if not some_dead:
        return solved
    matrix = torch.zeros_like(c_xy)
    matrix[varies] = solved
    return matrix


def solve_each(c_xx: Tensor, c_xy: Tensor, tikhonov: float) -> Tensor:
    """Solve several problems at once, ``(n, d_in, d_in)`` and ``(n, d_in, d_out)``."""
    if not c_xx.shape[1]:
        return torch.zeros_like(c_xy)
    variances = c_xx.diagonal(dim1=1, dim2=2)
    system = c_xx.clone()
    system.diagonal(dim1=1, dim2=2).add_(tikhonov * variances.mean(dim=1, keepdim=True))
    factors, failed = torch.linalg.cholesky_ex(system, upper=True)
    pivots = factors.diagonal(dim1=1, dim2=2).square()
    safe = (failed == 0) & (pivots.amin(dim=1) > _SAFE_PIVOT * pivots.amax(dim=1))
    if bool(safe.all()):
        return torch.cholesky_solve(c_xy, factors, upper=True)
    return torch.stack([solve(xx, xy, tikhonov) for xx, xy in zip(c_xx, c_xy, strict=True)])


def held_out_errors(matrices: Tensor, test_xx: Tensor, test_xy: Tensor, variance: Tensor) -> Tensor:
    """Compute the squared errors per sample of one operator, or of one per fold, ``(folds,)``.

    ``test_xx`` and ``test_xy`` are about the means that each was fitted with; ``variance`` is the
    squared deviation of the targets per sample.
    """
    # |y - xK|² = |y|² + Σ K ∘ (C_xx K - 2 C_xy), all transposed: solvers give K by columns.
    matrices, test_xx, test_xy = (x if x.ndim == 3 else x[None] for x in (matrices, test_xx, test_xy))
    matrices = matrices.mT
    rest = torch.baddbmm(test_xy.mT, matrices, test_xx, beta=-2)
    return (variance + dots(rest, matrices)).clamp_min(0)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices, or batches of them; BLAS is up to eight times as slow by columns as by rows."""
    if left.stride(-2) == 1:
        # As solvers give operators, and as what is transposed lies.
        return (right.mT @ left.mT).mT
    return left @ right


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Sum the products of all entries, for each of several matrices."""
    products: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return products
