"""Fits a Koopman operator from moments or from data, with its held-out R²."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_koopman.moments import Layout, accumulate, covariances
from lightning_koopman.states import sample_keys

TIKHONOV_GRID = (0.0, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge weights tried, in units of the mean variance of the regressors."""

RESOLUTION_GRID = (0.0, *(10 ** (-8 + step / 4) for step in range(25)))
"""Ridge weights tried for a chain; the last, 1e-2, is the most that a chain is smoothed by default."""

RCOND = 1e-12
"""Directions whose variance is below this share of the largest are taken as dead."""

_SAFE_PIVOT = 1e-8
"""Cholesky is left for ``eigh``, which drops dead directions, where a pivot is below this share."""


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
        return (x.double() - self.x_mean) @ self.matrix + self.y_mean


@dataclass(frozen=True)
class Factored:
    """Rows of an operator as the product that solves for them; cheaper to apply than to multiply out.

    Attributes:
        vectors: Shape ``(d_in, k)``.
        filters: Shape ``(k, 1)``.
        projected: Shape ``(k, d_out)``.
    """

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
    """

    values: Tensor
    vectors: Tensor
    projected: Tensor
    mean_variance: float

    def filters(self, tikhonov: float) -> Tensor:
        """Inverse eigenvalues under a ridge weight.

        Args:
            tikhonov: In units of the regressors' mean variance.

        Returns:
            Shape ``(k,)``.
        """
        return 1.0 / (self.values + tikhonov * self.mean_variance)

    def matrix(self, tikhonov: float) -> Tensor:
        """Solve for the operator.

        Args:
            tikhonov: In units of the regressors' mean variance.

        Returns:
            K of shape ``(d_in, d_out)``.
        """
        return self.vectors @ (self.filters(tikhonov)[:, None] * self.projected)

    def parts(self, tikhonov: float, widths: Sequence[int]) -> list[Factored]:
        """Solve for the operator, cut into one block a state that it reads, without multiplying it out.

        Args:
            tikhonov: In units of the regressors' mean variance.
            widths: Widths of the states.

        Returns:
            Blocks of shape ``(width, d_out)``.
        """
        filters = self.filters(tikhonov)[:, None]
        return [
            Factored(vectors, filters, self.projected)
            for vectors in torch.split(self.vectors, list(widths))
        ]

    @property
    def condition(self) -> float:
        """Ratio of the largest to the smallest kept eigenvalue; 1 where none is kept."""
        return float(self.values[0] / self.values[-1]) if len(self.values) else 1.0


def alive(variances: Tensor) -> Tensor:
    """Tell which variances are more than rounding beside the largest one.

    Args:
        variances: Shape ``(d,)``; may be empty.

    Returns:
        Mask of shape ``(d,)``; all false where no variance is positive.
    """
    largest = torch.cat([variances, variances.new_zeros(1)]).max()
    return variances > RCOND * largest


def spectrum(c_xx: Tensor, c_xy: Tensor) -> Spectrum:
    """Diagonalise the regressors' covariance and drop its dead directions.

    Args:
        c_xx: Covariance of the regressors, shape ``(d_in, d_in)``.
        c_xy: Cross-covariance with the targets, shape ``(d_in, d_out)``.

    Returns:
        The problem in its eigenbasis.
    """
    values, vectors = torch.linalg.eigh(c_xx)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = int(alive(values).sum())
    vectors = vectors[:, :kept]
    mean_variance = float(c_xx.diagonal().sum()) / max(1, len(c_xx))
    return Spectrum(values[:kept], vectors, vectors.T @ c_xy, mean_variance)


def solve(c_xx: Tensor, c_xy: Tensor, tikhonov: float) -> Tensor:
    """Solve for the operator under one ridge weight.

    Args:
        c_xx: Covariance of the regressors, shape ``(d_in, d_in)``; that of units which never vary is
            exactly zero.
        c_xy: Cross-covariance with the targets, shape ``(d_in, d_out)``.
        tikhonov: In units of the regressors' mean variance.

    Returns:
        K of shape ``(d_in, d_out)``, by Cholesky, or in the eigenbasis where that is not safe.
    """
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
    """The squared error a sample of one problem's operators, as a function of the ridge weight.

    Attributes:
        train: The problem.
        variance: Squared deviation of the targets, a sample.
        linear: Coefficients of the filters, shape ``(k,)``.
        quadratic: Coefficients of their products, ``(k, k)``, or its diagonal alone, ``(k,)``.
    """

    train: Spectrum
    variance: float
    linear: Tensor
    quadratic: Tensor

    def errors(self, grid: Sequence[float]) -> Tensor:
        """Evaluate.

        Args:
            grid: Ridge weights.

        Returns:
            One non-negative error a weight, shape ``(len(grid),)``.
        """
        weights = torch.tensor(grid, dtype=self.linear.dtype, device=self.linear.device)
        f = 1.0 / (self.train.values + weights[:, None] * self.train.mean_variance)
        twice = f * self.quadratic if self.quadratic.ndim == 1 else f @ self.quadratic
        return (self.variance - 2 * f @ self.linear + (twice * f).sum(dim=1)).clamp_min(0)


def held_out(train: Spectrum, c_xx: Tensor, c_xy: Tensor, c_yy_trace: float) -> HeldOut:
    """Set up the squared error on held-out moments.

    Args:
        train: The problem fitted on the other folds.
        c_xx: Held-out products of the regressors about the training means, ``(d_in, d_in)``.
        c_xy: Held-out products with the targets, ``(d_in, d_out)``.
        c_yy_trace: Held-out squared deviation of the targets from their training mean, a sample.

    Returns:
        The error, ready for any ridge weight.
    """
    # With K = U diag(f) W, W = UᵀC_xy: SSE = tr C_yy - 2 f·v + fᵀMf costs O(k²) a weight.
    rotated = train.vectors.T @ (c_xx @ train.vectors)
    linear = (train.projected * (train.vectors.T @ c_xy)).sum(dim=1)
    return HeldOut(train, c_yy_trace, linear, rotated.mul_(train.projected @ train.projected.T))


def in_sample(train: Spectrum, c_yy_trace: float) -> HeldOut:
    """Set up the squared error on the moments that the problem was fitted to.

    Args:
        train: The problem.
        c_yy_trace: Variance of the targets, summed over units.

    Returns:
        The error, ready for any ridge weight.
    """
    linear = train.projected.square().sum(dim=1)
    return HeldOut(train, c_yy_trace, linear, train.values * linear)


def held_out_errors(
    train: Spectrum, c_xx: Tensor, c_xy: Tensor, c_yy_trace: float, grid: Sequence[float]
) -> list[float]:
    """Squared error a sample on held-out moments, for each ridge weight at once.

    Args:
        train: As in :func:`held_out`.
        c_xx: As there.
        c_xy: As there.
        c_yy_trace: As there.
        grid: Ridge weights.

    Returns:
        One non-negative error a weight.
    """
    errors: list[float] = held_out(train, c_xx, c_xy, c_yy_trace).errors(grid).tolist()
    return errors


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
        Operator with ``matrix`` of shape ``(d_in, d_out)``, float64, on the device of ``x``.

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
    """Squared held-out errors, a row a fold and a column a ridge weight, and the squares they are of."""
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
            found = held_out_errors(problem, test_xx, test_xy, trace, grid)
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
