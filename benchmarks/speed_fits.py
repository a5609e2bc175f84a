"""Operator fits against other solvers: processor seconds and residuals."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from kooplearn.linear_model import Ridge as KooplearnRidge
from pydmd import DMD
from sklearn.linear_model import Ridge
from torch import Tensor

from lightning_koopman import fit_operator
from lightning_koopman.koopman.moments import Layout, accumulate, covariances
from lightning_koopman.koopman.regression import alive, solve

FULL, DEAD, LINEAR = "full rank", "an eighth dead, an eighth doubled", "linear, rank d / 4"


def snapshots(samples: int, width: int, kind: str = FULL) -> tuple[Tensor, Tensor]:
    """States before and after a ReLU layer, in full rank or with one of two ways to lack it."""
    x = torch.relu(torch.randn(samples, width, dtype=torch.float64))
    if kind == LINEAR:
        x = x[:, : width // 4] @ torch.randn(width // 4, width, dtype=torch.float64)
    if kind == DEAD:
        part = width // 8
        x[:, :part], x[:, part : 2 * part] = 0, x[:, 2 * part : 3 * part]
    y = torch.relu(x @ torch.randn(width, width, dtype=torch.float64) / width**0.5)
    return x, y


def solvers(x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """What fits the same snapshots, centred where the solver does not centre by itself."""
    rows, targets = x.numpy(), y.numpy()

    def kooplearn() -> object:
        return KooplearnRidge(
            n_components=rows.shape[1], alpha=1e-8, reduced_rank=False, eigen_solver="dense"
        ).fit(rows, targets)

    return {
        "fit_operator, λ given, folds=None": lambda: fit_operator(x, y, tikhonov=1e-8, folds=None),
        "fit_operator, λ given, R² over 5 folds": lambda: fit_operator(x, y, tikhonov=1e-8),
        "fit_operator, λ chosen, R² over 5 folds": lambda: fit_operator(x, y),
        "scikit-learn Ridge": lambda: Ridge(1e-8).fit(rows, targets),
        "kooplearn Ridge": kooplearn,
        "LAPACK gelsd": lambda: scipy.linalg.lstsq(
            rows - rows.mean(0), targets - targets.mean(0), lapack_driver="gelsd"
        ),
        "PyDMD, full rank": lambda: DMD(svd_rank=-1).fit(rows.T, targets.T),
    }


def timed(samples: int, width: int, repeats: int) -> dict[str, float]:
    """Median processor seconds of each solver, in turn; those that take minutes run once."""
    x, y = snapshots(samples, width)
    runs = solvers(x, y)
    fit_operator(x[:100], y[:100])
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            if repeat and sum(seconds[name]) > 5:
                continue
            start = time.process_time()
            with warnings.catch_warnings(action="ignore"):
                run()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def residuals(samples: int, width: int, kind: str) -> dict[str, float]:
    """Relative distance of each solver's residual from that of gelsd, and ranks."""
    x, y = snapshots(samples, width, kind)
    rows, targets = x.numpy() - x.numpy().mean(0), y.numpy() - y.numpy().mean(0)
    # With the default cut-off, duplicates differ by rounding and spoil its own residual.
    best, _, gelsd_rank, _ = scipy.linalg.lstsq(rows, targets, cond=1e-10, lapack_driver="gelsd")
    floor = np.linalg.norm(targets - rows @ best)

    def distance(matrix: np.ndarray) -> float:
        return abs(float(np.linalg.norm(targets - rows @ matrix) / floor) - 1)

    found = {
        "fit_operator": distance(fit_operator(x, y, tikhonov=0.0).matrix.numpy()),
        "scikit-learn Ridge": distance(Ridge(1e-8).fit(x.numpy(), y.numpy()).coef_.T),
        "float32 products": distance(single_precision(x, y)[0]),
    }
    dmd = DMD(svd_rank=-1).fit(rows.T, targets.T)
    found["PyDMD, full rank"] = distance(
        np.real(dmd.modes @ np.diag(dmd.eigs) @ np.linalg.pinv(dmd.modes)).T
    )
    ranks = {
        "rank by gelsd": float(gelsd_rank),
        "by fit_operator": float(fit_operator(x, y, tikhonov=0.0).rank),
        "by float32 products": float(single_precision(x, y)[1]),
    }
    return found | ranks


def single_precision(x: Tensor, y: Tensor) -> tuple[np.ndarray, int]:
    """Operator and rank from products in float32 over blocks of 512 rows, summed in float64."""
    widths = (x.shape[1], y.shape[1])
    layout = Layout(widths, 2)
    total = layout.zeros()
    center = [x.mean(0), y.mean(0)]
    for rows in torch.arange(len(x)).split(512):
        block = torch.zeros(2, layout.size, dtype=torch.float32)
        fold = torch.zeros(len(rows), dtype=torch.int64)
        accumulate(
            layout, block, [(x - c)[rows].float() for x, c in zip((x, y), center, strict=True)], fold
        )
        total += block
    given = covariances(layout, total.sum(dim=0))
    rank = int(alive(torch.linalg.eigvalsh(given[0, 0])).sum())
    return solve(given[0, 0], given[0, 1], 0.0).numpy(), rank
