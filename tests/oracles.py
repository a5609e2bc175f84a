"""Closed-form truths in NumPy and SciPy, from the definitions; they share no code with the package."""

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
import scipy.linalg

Array = np.ndarray


def dense_product(weights: Sequence[Array]) -> Array:
    """The matrix of a whole linear chain, acting from the right."""
    return reduce(np.matmul, weights)


def log_volume(matrix: Array) -> float:
    """log sqrt det(MᵀM) of a matrix of full column rank."""
    return float(np.log(np.linalg.svd(matrix, compute_uv=False)).sum())


def log_gram_volume(matrix: Array) -> float:
    """The same from the Gram determinant."""
    return 0.5 * float(np.linalg.slogdet(matrix.T @ matrix)[1])


def effective_rank(x: Array) -> float:
    """Directions that vary; those with a ten-thousandth of the mean variance count by half."""
    variances = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    variances = variances[variances > 1e-12 * variances.max()]
    ratio = variances / (1e-4 * variances.mean())
    return float((ratio**2 / (1 + ratio**2)).sum())


def pod(x: Array, rank: int) -> Array:
    """Leading principal directions, by SVD of the data itself."""
    return np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:rank].T


def least_squares(x: Array, y: Array) -> Array:
    """Minimum-norm least squares on centred data, LAPACK gelsd."""
    # SciPy's own cut-off, one machine epsilon, takes the rounding of duplicate units for a direction.
    return scipy.linalg.lstsq(x - x.mean(0), y - y.mean(0), cond=1e-9, lapack_driver="gelsd")[0]


def ridge(x: Array, y: Array, tikhonov: float) -> Array:
    """Ridge regression by the normal equations, the weight in units of the mean variance of x."""
    if tikhonov == 0:
        return least_squares(x, y)
    x, y = x - x.mean(0), y - y.mean(0)
    covariance = x.T @ x / len(x)
    weight = tikhonov * np.trace(covariance) / x.shape[1]
    return np.linalg.solve(covariance + weight * np.eye(x.shape[1]), x.T @ y / len(x))


def reduced_rank(x: Array, y: Array, rank: int, tikhonov: float = 0.0) -> Array:
    """Reduced-rank ridge regression: rows added for the ridge, then the SVD of the fitted values."""
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    weight = tikhonov * centred_x.var(0).mean() * len(x)
    x_all = np.vstack([centred_x, np.sqrt(weight) * np.eye(x.shape[1])])
    y_all = np.vstack([centred_y, np.zeros((x.shape[1], y.shape[1]))])
    full = scipy.linalg.lstsq(x_all, y_all)[0]
    leading = np.linalg.svd(x_all @ full, full_matrices=False)[2][:rank].T
    return full @ leading @ leading.T


Fit = Callable[[Array, Array], Array]


def expected_error(x: Array, y: Array, tikhonov: float) -> float:
    """Generalised cross-validation from the hat matrix of the samples themselves."""
    n, centred = len(x), x - x.mean(0)
    basis, values = np.linalg.svd(centred, full_matrices=False)[:2]
    alive = values > 1e-6 * values.max()
    basis, values = basis[:, alive], values[alive] ** 2
    filters = values / (values + tikhonov * (centred**2).sum() / x.shape[1])
    hat = np.full((n, n), 1 / n) + (basis * filters) @ basis.T
    residual = ((y - hat @ y) ** 2).sum() / n
    return float(residual / (1 - np.trace(hat) / n) ** 2)


def doubling_ridge(x: Array, y: Array, grid: Sequence[float]) -> float:
    """The largest weight of a grid at which that error is at most twice its least, interpolated."""
    errors = np.array([expected_error(x, y, weight) for weight in grid])
    last = int(np.flatnonzero(errors <= 2 * errors.min())[-1])
    if last == len(grid) - 1:
        return grid[last]
    share = (2 * errors.min() - errors[last]) / (errors[last + 1] - errors[last])
    return float(grid[last] ** (1 - share) * grid[last + 1] ** share)


def fold_errors(x: Array, y: Array, folds: Array, fit: Fit) -> tuple[Array, Array]:
    """Held-out squared error and squared deviation from the training mean, a fold each."""
    errors, totals = [], []
    for fold in np.unique(folds):
        train, test = folds != fold, folds == fold
        matrix = fit(x[train], y[train])
        prediction = (x[test] - x[train].mean(0)) @ matrix + y[train].mean(0)
        errors.append(((y[test] - prediction) ** 2).sum())
        totals.append(((y[test] - y[train].mean(0)) ** 2).sum())
    return np.array(errors), np.array(totals)


def held_out_r2(x: Array, y: Array, folds: Array, fit: Fit) -> float:
    """1 - ΣSSE / ΣSST over all folds."""
    errors, totals = fold_errors(x, y, folds, fit)
    return 1 - errors.sum() / totals.sum()


def chain_fold_errors(
    states: Sequence[Array], start: int, folds: Array, fit: Fit
) -> tuple[Array, Array]:
    """Errors of the last state predicted from state ``start`` one operator after the other."""
    errors, totals = [], []
    for fold in np.unique(folds):
        train, test = folds != fold, folds == fold
        prediction = states[start][test]
        for before, after in zip(states[start:], states[start + 1 :], strict=False):
            matrix = fit(before[train], after[train])
            prediction = (prediction - before[train].mean(0)) @ matrix + after[train].mean(0)
        y = states[-1]
        errors.append(((y[test] - prediction) ** 2).sum())
        totals.append(((y[test] - y[train].mean(0)) ** 2).sum())
    return np.array(errors), np.array(totals)


def jackknife(whole: float, without: Sequence[float], sizes: Sequence[int]) -> float:
    """Delete-one-group standard error for groups of any size (Busing et al. 1999), term by term."""
    n, g = sum(sizes), len(sizes)
    h = [n / size for size in sizes]
    centre = g * whole - sum((1 - size / n) * value for size, value in zip(sizes, without, strict=True))
    variance = 0.0
    for h_j, value in zip(h, without, strict=True):
        pseudo = h_j * whole - (h_j - 1) * value
        variance += (pseudo - centre) ** 2 / (h_j - 1) / g
    return float(np.sqrt(variance))


def plain_jackknife(without: Sequence[float]) -> float:
    """The textbook formula for groups of equal size."""
    values = np.asarray(without)
    return float(np.sqrt((len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum()))


def jackknife_bias(whole: float, without: Sequence[float], sizes: Sequence[int]) -> float:
    """The jackknife's estimate of how far the replicates lie off, scaled to the whole sample."""
    n = sum(sizes)
    return sum((1 - size / n) * (value - whole) for size, value in zip(sizes, without, strict=True))


def in_sample_r2(states: Sequence[Array], i: int, fit: Fit) -> float:
    """R² of the last state predicted from state i through all operators, on the samples they saw."""
    centred = [x - x.mean(0) for x in states]
    predicted = centred[i]
    for before, after in zip(centred[i:], centred[i + 1 :], strict=False):
        predicted = predicted @ fit(before, after)
    return float(1 - ((centred[-1] - predicted) ** 2).sum() / (centred[-1] ** 2).sum())


def jacobians(states: Sequence[Array], rank: int, fit: Fit) -> list[Array]:
    """J_0 … J_L of the fitted chain, the leading output directions last."""
    backward = [pod(states[-1], rank)]
    for before, after in zip(reversed(states[:-1]), reversed(states[1:]), strict=True):
        backward.insert(0, fit(before, after) @ backward[0])
    return backward


def credits(states: Sequence[Array], rank: int, fit: Fit) -> dict[str, Array]:
    """Credit, gain, sensitivity and total from dense Jacobians."""
    chain = jacobians(states, rank, fit)
    volumes = np.array([log_volume(jacobian) / rank for jacobian in chain])
    spread = [np.std(x, axis=0)[:, None] * jacobian for x, jacobian in zip(states, chain, strict=True)]
    return {
        "credit": volumes[1:],
        "gain": volumes[:-1] - volumes[1:],
        "sensitivity": np.array([np.log(np.linalg.norm(s)) for s in spread[1:]]),
        "total": volumes[0],
    }


def canonical_correlations(x: Array, y: Array) -> Array:
    """By QR of each centred block and the SVD between the two bases."""
    bases = [np.linalg.qr(block - block.mean(0))[0] for block in (x, y)]
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
