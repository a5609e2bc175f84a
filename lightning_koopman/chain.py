"""Fits every step of a chain on all samples and with each fold left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_koopman.moments import Covariances, Layout, covariances
from lightning_koopman.operator import (
    TIKHONOV_GRID,
    Spectrum,
    alive,
    choose_tikhonov,
    held_out_errors,
    spectrum,
)

Normalize = Literal["none", "rms", "whiten"]


@dataclass(frozen=True)
class Split:
    """The regression problems on some folds, and the moments of the fold left out.

    ``directions`` are the POD directions of the output, leading first, in its coordinates.
    """

    count: float
    train: Covariances
    test: Covariances | None
    problems: tuple[Spectrum, ...]
    directions: Tensor

    @property
    def widths(self) -> list[int]:
        """Width of every state in the coordinates chosen."""
        return [len(mean) for mean in self.train.means]


def split_chain(layout: Layout, moments: Tensor, fold: int | None, normalize: Normalize) -> Split:
    """Set up every step's regression on all folds, or on all but one."""
    total = moments.sum(dim=0)
    train = covariances(layout, total if fold is None else total - moments[fold])
    test = None if fold is None else covariances(layout, moments[fold], about=train.means)
    scales = _scales(train, len(layout.dims), normalize)
    if scales is not None:
        train = _rescaled(train, scales)
        test = None if test is None else _rescaled(test, scales)
    problems = tuple(
        spectrum(_regressors(train, layout, i), _targets(train, layout, i))
        for i in range(1, len(layout.dims))
    )
    output = train[len(layout.dims) - 1, len(layout.dims) - 1]
    if normalize == "whiten":
        # Whitened coordinates are the POD directions in ascending order; their covariance is no guide.
        directions = torch.eye(len(output), dtype=output.dtype, device=output.device)
    else:
        directions = torch.linalg.eigh(output)[1]
    return Split(train.count, train, test, problems, directions.flip(1))


def _scales(train: Covariances, n_states: int, normalize: Normalize) -> list[Tensor] | None:
    """Give T_i for the coordinates x_i T_i, or ``None`` for the coordinates as they are."""
    if normalize == "none":
        return None
    scales = []
    for i in range(n_states):
        covariance = train[i, i]
        if normalize == "rms":
            variance = covariance.diagonal()
            scales.append(torch.diag(torch.where(alive(variance), variance, torch.inf).rsqrt()))
        else:
            values, vectors = torch.linalg.eigh(covariance)
            kept = alive(values)
            scales.append(vectors[:, kept] * values[kept].rsqrt())
    return scales


def _rescaled(given: Covariances, scales: Sequence[Tensor]) -> Covariances:
    return Covariances(
        given.count,
        tuple(mean @ scale for mean, scale in zip(given.means, scales, strict=True)),
        {(i, j): scales[i].T @ block @ scales[j] for (i, j), block in given.blocks.items()},
    )


def _regressors(given: Covariances, layout: Layout, i: int) -> Tensor:
    read = layout.parents[i]
    if len(read) == 1:
        return given[read[0], read[0]]
    return torch.cat([torch.cat([given[p, q] for q in read], dim=1) for p in read])


def _targets(given: Covariances, layout: Layout, i: int) -> Tensor:
    return torch.cat([given[p, i] for p in layout.parents[i]])


def fit_steps(
    layout: Layout, folds: Sequence[Split], tikhonov: float | None
) -> tuple[list[float], Tensor, list[Tensor]]:
    """Pick each step's ridge weight; return it with R² over all folds and with each fold left out."""
    grid = TIKHONOV_GRID if tikhonov is None else (tikhonov,)
    steps = range(1, len(layout.dims))
    chosen: list[float] = []
    errors = torch.zeros(len(folds), len(steps), dtype=torch.float64)
    totals = torch.zeros_like(errors)
    for column, i in enumerate(steps):
        table = []
        for row, split in enumerate(folds):
            assert split.test is not None
            trace = float(split.test[i, i].diagonal().sum())
            fold_errors = held_out_errors(
                split.problems[column],
                _regressors(split.test, layout, i),
                _targets(split.test, layout, i),
                trace,
                grid,
            )
            table.append([split.test.count * error for error in fold_errors])
            totals[row, column] = split.test.count * trace
        chosen.append(choose_tikhonov(table, grid) if table else grid[0])
        at_chosen = [row[grid.index(chosen[-1])] for row in table]
        errors[:, column] = torch.tensor(at_chosen, dtype=torch.float64)
    return chosen, *_pooled_r2(errors, totals)


def _pooled_r2(errors: Tensor, totals: Tensor) -> tuple[Tensor, list[Tensor]]:
    """R² over all folds, and over all but each one; NaN where the target never varies."""

    def r2(error: Tensor, total: Tensor) -> Tensor:
        return torch.where(total > 0, 1 - error / total, torch.nan)

    without = [r2(errors.sum(0) - e, totals.sum(0) - t) for e, t in zip(errors, totals, strict=True)]
    return r2(errors.sum(0), totals.sum(0)), without


def step_blocks(
    layout: Layout,
    problems: Sequence[Spectrum],
    chosen: Sequence[float],
    widths: Sequence[int] | None = None,
) -> list[list[Tensor]]:
    """Solve every step and cut its matrix into one block a state it reads, of the given widths."""
    widths = layout.dims if widths is None else widths
    solved = []
    for i, (problem, tikhonov) in enumerate(zip(problems, chosen, strict=True), start=1):
        matrix = problem.matrix(tikhonov)
        read = layout.parents[i]
        if len(read) == 1:
            solved.append([matrix])
        else:
            solved.append(list(torch.split(matrix, [widths[p] for p in read])))
    return solved


def fit_chain(
    layout: Layout, folds: Sequence[Split], chosen: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """Held-out R² of the output predicted from each state through all operators behind it."""
    last = len(layout.dims) - 1
    errors = torch.zeros(len(folds), last, dtype=torch.float64)
    totals = torch.zeros_like(errors)
    for row, split in enumerate(folds):
        test = split.test
        assert test is not None
        operators = step_blocks(layout, split.problems, chosen, split.widths)
        trace = float(test[last, last].diagonal().sum())
        # ŷ = Σ_p x_p B_p; replacing x_i by its own prediction leads to state i - 1.
        width = test[last, last].shape[0]
        blocks = {last: torch.eye(width, dtype=torch.float64, device=test.means[0].device)}
        for i in range(last, 0, -1):
            error = trace
            for p, left in blocks.items():
                error -= 2 * float((left * test[p, last]).sum())
                for q, right in blocks.items():
                    error += float((left * (test[p, q] @ right)).sum())
            errors[row, i - 1] = test.count * max(0.0, error)
            totals[row, i - 1] = test.count * trace
            replaced = blocks.pop(i)
            for p, operator in zip(layout.parents[i], operators[i - 1], strict=True):
                moved = operator @ replaced
                blocks[p] = blocks[p] + moved if p in blocks else moved
    return _pooled_r2(errors, totals)


def state_ranks(layout: Layout, split: Split) -> Tensor:
    """Numerical rank of the state behind each component."""
    ranks = []
    for i in range(1, len(layout.dims)):
        if i < len(split.problems) and layout.parents[i + 1] == (i,):
            # This state is the regressor of the next step, whose spectrum is at hand.
            ranks.append(len(split.problems[i].values))
            continue
        ranks.append(int(alive(torch.linalg.eigvalsh(split.train[i, i])).sum()))
    return torch.tensor(ranks, dtype=torch.float64)
