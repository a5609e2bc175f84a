"""Fits every step of a chain on all samples and with each fold left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_koopman.moments import Covariances, Layout, covariances
from lightning_koopman.operator import (
    RESOLUTION_GRID,
    Spectrum,
    alive,
    held_out_errors,
    resolved_tikhonov,
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

    @property
    def count_out(self) -> float:
        """Number of samples that are held out."""
        return 0.0 if self.test is None else self.test.count


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


@dataclass(frozen=True)
class Fit:
    """R² of every step (or of the chain behind it), with what its error bar needs.

    ``r2`` is held out over all folds, ``without`` leaves one fold after the other out of it, and
    ``in_sample`` is that of the fit to all samples.
    """

    r2: Tensor
    without: list[Tensor]
    in_sample: Tensor


def choose_steps(
    layout: Layout, folds: Sequence[Split], tikhonov: float | None
) -> tuple[list[float], list[list[float]]]:
    """Pick each step's ridge weight over all folds, and once more without each of them."""
    steps = range(1, len(layout.dims))
    if tikhonov is not None or not folds:
        given = [tikhonov or 0.0] * len(steps)
        return given, [given] * len(folds)
    chosen: list[float] = []
    without: list[list[float]] = [[] for _ in folds]
    for i in steps:
        rows = [
            [split.count_out * error for error in _errors(layout, split, i, RESOLUTION_GRID)]
            for split in folds
        ]
        table = torch.tensor(rows, dtype=torch.float64)
        chosen.append(resolved_tikhonov(table, RESOLUTION_GRID))
        for fold, picked in enumerate(without):
            rest = torch.cat([table[:fold], table[fold + 1 :]]) if len(folds) > 1 else table
            picked.append(resolved_tikhonov(rest, RESOLUTION_GRID))
    return chosen, without


def fit_steps(layout: Layout, whole: Split, folds: Sequence[Split], chosen: Sequence[float]) -> Fit:
    """R² of every step's operator."""

    def table(splits: Sequence[Split]) -> tuple[Tensor, Tensor]:
        steps = list(enumerate(chosen, start=1))
        errors = [[s.count_out * _errors(layout, s, i, [t])[0] for i, t in steps] for s in splits]
        totals = [[s.count_out * _variance(s, i) for i, _ in steps] for s in splits]
        shape = (len(splits), len(chosen))
        return (
            torch.tensor(errors, dtype=torch.float64).reshape(shape),
            torch.tensor(totals, dtype=torch.float64).reshape(shape),
        )

    return Fit(*_pooled_r2(*table(folds)), in_sample=_pooled_r2(*table([_on_itself(whole)]))[0])


def _on_itself(split: Split) -> Split:
    return replace(split, test=split.train)


def _errors(layout: Layout, split: Split, i: int, grid: Sequence[float]) -> list[float]:
    assert split.test is not None
    return held_out_errors(
        split.problems[i - 1],
        _regressors(split.test, layout, i),
        _targets(split.test, layout, i),
        _variance(split, i),
        grid,
    )


def _variance(split: Split, i: int) -> float:
    assert split.test is not None
    return float(split.test[i, i].diagonal().sum())


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


def fit_chain(layout: Layout, whole: Split, folds: Sequence[Split], chosen: Sequence[float]) -> Fit:
    """R² of the output predicted from each state through all operators behind it."""

    def table(splits: Sequence[Split]) -> tuple[Tensor, Tensor]:
        errors = torch.zeros(len(splits), len(chosen), dtype=torch.float64)
        totals = torch.zeros_like(errors)
        for row, split in enumerate(splits):
            totals[row] = split.count_out * _variance(split, len(chosen))
            errors[row] = split.count_out * _chain_errors(layout, split, chosen)
        return errors, totals

    return Fit(*_pooled_r2(*table(folds)), in_sample=_pooled_r2(*table([_on_itself(whole)]))[0])


def _chain_errors(layout: Layout, split: Split, chosen: Sequence[float]) -> Tensor:
    test, last = split.test, len(chosen)
    assert test is not None
    operators = step_blocks(layout, split.problems, chosen, split.widths)
    errors = torch.zeros(last, dtype=torch.float64)
    # ŷ = Σ_p x_p B_p; replacing x_i by its own prediction leads to state i - 1.
    width = test[last, last].shape[0]
    blocks = {last: torch.eye(width, dtype=torch.float64, device=test.means[0].device)}
    for i in range(last, 0, -1):
        error = _variance(split, last)
        for p, left in blocks.items():
            error -= 2 * float((left * test[p, last]).sum())
            for q, right in blocks.items():
                error += float((left * (test[p, q] @ right)).sum())
        errors[i - 1] = max(0.0, error)
        replaced = blocks.pop(i)
        for p, operator in zip(layout.parents[i], operators[i - 1], strict=True):
            moved = operator @ replaced
            blocks[p] = blocks[p] + moved if p in blocks else moved
    return errors


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
