"""Fits one operator per component from moments, for all folds and with each left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_koopman.koopman.moments import Covariances, Layout, covariances
from lightning_koopman.koopman.options import Normalize
from lightning_koopman.koopman.regression import (
    RIDGE_GRID,
    Spectrum,
    alive,
    choose_ridge,
    held_out_error,
    is_settled,
    solve,
    spectrum,
)


def jackknife(value: Tensor, replicates: Sequence[Tensor], count: float, held_out: Tensor) -> Tensor:
    """Compute the delete-one-fold standard error."""
    # Folds of unequal size: Busing, Meijer & van der Leeden (1999), Statistics and Computing 9, 3-8.
    if len(replicates) < 2:
        return torch.full_like(value, torch.nan)
    ratio = (count / held_out).view(-1, *[1] * value.ndim)
    stacked = torch.stack(list(replicates))
    pseudo = ratio * value - (ratio - 1) * stacked
    centre = len(replicates) * value - ((1 - 1 / ratio) * stacked).sum(dim=0)
    variance = ((pseudo - centre) ** 2 / (ratio - 1)).mean(dim=0)
    return variance.sqrt()


def with_bias(
    value: Tensor, replicates: Sequence[Tensor], count: float, held_out: Tensor, gap: Tensor | None
) -> Tensor:
    """Compute the jackknife error and the bias of a finite sample, added in quadrature."""
    spread = jackknife(value, replicates, count, held_out)
    if gap is None and replicates:
        # With folds of unequal size, each replicate's distance counts by how much was left out.
        ratio = (count / held_out).view(-1, *[1] * value.ndim)
        gap = ((1 - 1 / ratio) * (torch.stack(list(replicates)) - value)).sum(dim=0)
    return spread if gap is None else (spread.square() + gap.square()).sqrt()


@dataclass(frozen=True)
class Split:
    """The moments that operators are fitted to, and those that they are tested on.

    ``test`` is the fold left out, about the means of the others, or ``train`` where none is.
    ``directions`` are the POD directions of the output, leading first, ``output_rank`` of them alive.
    """

    layout: Layout
    train: Covariances
    test: Covariances
    directions: Tensor
    output_rank: int

    @property
    def count(self) -> float:
        """Number of samples that operators are fitted to."""
        return self.train.count

    def problem(self, i: int) -> Spectrum:
        """Diagonalise the regression problem of step i."""
        return spectrum(*normal_equations(self.train, self.layout, i))

    def solve(self, i: int, tikhonov: float) -> Tensor:
        """Solve for the operator of step i under one ridge weight."""
        return solve(*normal_equations(self.train, self.layout, i), tikhonov)

    def blocks(self, operators: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Cut each step's operator into one block per state that it reads."""
        widths = [len(mean) for mean in self.train.means]
        pairs = zip(operators, self.layout.parents[1:], strict=True)
        return [torch.split(operator, [widths[p] for p in read]) for operator, read in pairs]


def split_chain(
    layout: Layout, moments: Tensor, fold: int | None, normalize: Normalize, total: Tensor | None = None
) -> Split:
    """Read what is fitted on all folds, or on all but one; ``total`` sums all folds."""
    total = moments.sum(dim=0) if total is None else total
    train = covariances(layout, total, without=None if fold is None else moments[fold])
    test = train if fold is None else covariances(layout, moments[fold], about=train.means)
    scales = _scales(train, layout, normalize)
    if scales is not None:
        test = _rescaled(test, scales)
        train = test if fold is None else _rescaled(train, scales)
    output = train[len(layout.dims) - 1, len(layout.dims) - 1]
    if normalize == "whiten":
        # Whitened coordinates are the POD directions in ascending order; their covariance is no guide.
        values = torch.linalg.eigvalsh(output)
        directions = torch.eye(len(output), dtype=output.dtype, device=output.device)
    else:
        values, directions = torch.linalg.eigh(output)
    return Split(layout, train, test, directions.flip(1), int(alive(values).sum()))


def held_out_splits(
    layout: Layout, moments: Tensor, normalize: Normalize, total: Tensor
) -> Iterator[Split]:
    """Leave out one fold after the other, of those that can be held out."""
    for fold in range(layout.folds):
        # A fold without samples has nothing to hold out; leaving out all but one leaves nothing to fit.
        if moments[fold, 0] > 0 and float(total[0] - moments[fold, 0]) >= 2:
            yield split_chain(layout, moments, fold, normalize, total)


def normal_equations(given: Covariances, layout: Layout, i: int) -> tuple[Tensor, Tensor]:
    """Return the covariance of what a step reads, and its cross-covariance with what the step gives."""
    read = layout.parents[i]
    return _inner(given, read), _stacked(given, read, i)


def _inner(given: Covariances, states: Sequence[int]) -> Tensor:
    """Return the covariance of some states side by side."""
    if len(states) == 1:
        return given[states[0], states[0]]
    return torch.cat([torch.cat([given[p, q] for q in states], dim=1) for p in states])


def _stacked(given: Covariances, states: Sequence[int], i: int) -> Tensor:
    """Return the cross-covariance of some states side by side with another."""
    return given[states[0], i] if len(states) == 1 else torch.cat([given[p, i] for p in states])


def _scales(train: Covariances, layout: Layout, normalize: Normalize) -> list[Tensor] | None:
    """Return T_i for the coordinates x_i T_i, or ``None`` for the coordinates as they are."""
    if normalize == "none":
        return None
    scales = []
    for i in range(len(layout.dims)):
        if normalize == "rms":
            variance = train.variances[i]
            scales.append(torch.diag(torch.where(alive(variance), variance, torch.inf).rsqrt()))
        else:
            values, vectors = torch.linalg.eigh(train[i, i])
            kept = alive(values)
            scales.append(vectors[:, kept] * values[kept].rsqrt())
    return scales


def _rescaled(given: Covariances, scales: Sequence[Tensor]) -> Covariances:
    blocks = {(i, j): scales[i].T @ block @ scales[j] for (i, j), block in given.blocks.items()}
    return Covariances(
        given.count,
        tuple(mean @ scale for mean, scale in zip(given.means, scales, strict=True)),
        tuple(blocks[i, i].diagonal() for i in range(len(scales))),
        blocks,
    )


@dataclass(frozen=True)
class Step:
    """The fit of one step to all samples.

    Attributes:
        tikhonov: Ridge weight.
        settled: Whether any fold left out would pick the same.
        matrix: The operator.
        smoothed: The operator under ten times the ridge weight, or the smallest there is.
        values: Kept variances of the regressors along their principal directions, descending.
        condition: Ratio of the largest to the smallest of them.
    """

    tikhonov: float
    settled: bool
    matrix: Tensor
    smoothed: Tensor
    values: Tensor
    condition: float


def fit_steps(whole: Split, tikhonov: float | None) -> list[Step]:
    """Fit every step to all samples, by one eigendecomposition each."""
    steps = []
    # One step after the other: the eigenvectors of all of them at once would fill the memory.
    for i in range(1, len(whole.layout.dims)):
        problem, weight, settled = whole.problem(i), tikhonov, True
        if weight is None:
            errors = problem.expected_error(float(whole.train.variances[i].sum()), whole.count)
            weight, settled = choose_ridge(errors), is_settled(errors)
        smoothed = problem.matrix(max(10 * weight, RIDGE_GRID[1]))
        matrix = problem.matrix(weight)
        steps.append(Step(weight, settled, matrix, smoothed, problem.values, problem.condition))
    return steps


def refit_steps(split: Split, steps: Sequence[Step], *, anew: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Fit every step without a fold: under the ridge weights over all samples, and ``anew`` its own."""
    operators, own = [], []
    for i, step in enumerate(steps, start=1):
        if step.settled or not anew:
            operators.append(split.solve(i, step.tikhonov))
            own.append(operators[-1])
        else:
            problem = split.problem(i)
            errors = problem.expected_error(float(split.train.variances[i].sum()), split.count)
            operators.append(problem.matrix(step.tikhonov))
            own.append(problem.matrix(choose_ridge(errors)))
    return operators, own


class R2:
    """R² of every step and of the chain behind every state, held out and in sample.

    Attributes:
        step: Of each step's own operator, over all folds held out.
        chain: Of the output predicted from each state through all operators behind it.
    """

    def __init__(self, whole: Split, steps: Sequence[Step]) -> None:
        self._whole, self._operators = whole, [step.matrix for step in steps]
        self._rows: list[tuple[Tensor, Tensor]] = []

    def hold_out(self, split: Split, operators: Sequence[Tensor]) -> None:
        """Add what operators leave unexplained of the fold that they were not fitted to."""
        errors, totals = _squares(split, operators)
        self._rows.append((split.test.count * errors, split.test.count * totals))

    def values(self, without: int | None = None) -> dict[str, Tensor]:
        """Compute the values over all folds, or over all but one."""
        rows = [row for place, row in enumerate(self._rows) if place != without]
        empty = torch.zeros(2, len(self._operators), dtype=torch.float64)
        step, chain = _r2(
            sum((errors for errors, _ in rows), empty), sum((totals for _, totals in rows), empty)
        )
        return {"r2": step, "chain_r2": chain, "nonlinearity": 1 - step}

    def gaps(self) -> dict[str, Tensor]:
        """Compute standard errors for the bias of R² in a finite sample."""
        # Held out, R² is too low by about as much as it is too high in sample: by half the gap between
        # them. Half of that as a standard error makes 95 % intervals reach 1.4 times as far.
        values = self.values()
        step, chain = _r2(*_squares(self._whole, self._operators))
        step, chain = (step - values["r2"]).abs() / 4, (chain - values["chain_r2"]).abs() / 4
        return {"r2": step, "chain_r2": chain, "nonlinearity": step}


def _r2(errors: Tensor, totals: Tensor) -> Tensor:
    """R², and NaN where the target never varies."""
    return torch.where(totals > 0, 1 - errors / totals, torch.nan)


def _squares(split: Split, operators: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Squared errors per sample of every step and of the chain behind it, shape (2, L); and totals."""
    test, last = split.test, len(operators)
    totals = torch.stack([variances.sum() for variances in test.variances[1:]]).tolist()
    cut = split.blocks(operators)
    steps, chain = [], [0.0]
    # ŷ = Σ_p x_p B_p; replacing x_i by its own prediction leads to state i - 1.
    blocks: dict[int, Tensor] = {}
    for i in range(last, 0, -1):
        given = normal_equations(test, split.layout, i)
        steps.append(held_out_error(operators[i - 1], *given, totals[i - 1]))
        replaced = blocks.pop(i, None)
        for p, operator in zip(split.layout.parents[i], cut[i - 1], strict=True):
            moved = operator if replaced is None else operator @ replaced
            blocks[p] = blocks[p] + moved if p in blocks else moved
        if i > 1:
            states = list(blocks)
            # Without another branch beside it, the chain reads what its first step reads.
            c_xx = given[0] if states == list(split.layout.parents[i]) else _inner(test, states)
            operator = torch.cat(list(blocks.values())) if len(states) > 1 else blocks[states[0]]
            c_xy = _stacked(test, states, last)
            chain.append(held_out_error(operator, c_xx, c_xy, totals[-1]))
    errors = torch.tensor([steps[::-1], chain[::-1]], dtype=torch.float64)
    return errors, torch.tensor([totals, totals[-1:] * last], dtype=torch.float64)
