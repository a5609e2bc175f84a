"""Fits one operator per component from moments, for all folds and with each left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from lightning_koopman.koopman.moments import Covariances, Layout, covariances
from lightning_koopman.koopman.options import Normalize
from lightning_koopman.koopman.regression import (
    RCOND,
    RIDGE_GRID,
    Spectrum,
    alive,
    choose_ridge,
    held_out_errors,
    is_settled,
    product,
    solve_each,
    spectrum,
)


def jackknife(value: Tensor, replicates: Tensor, count: float, held_out: Tensor) -> Tensor:
    """Compute the delete-one-fold standard error; ``replicates`` have an axis of folds in front."""
    # Folds of unequal size: Busing, Meijer & van der Leeden (1999), Statistics and Computing 9, 3-8.
    if len(replicates) < 2:
        return torch.full_like(value, torch.nan)
    ratio = (count / held_out).view(-1, *[1] * value.ndim)
    pseudo = ratio * value - (ratio - 1) * replicates
    centre = len(replicates) * value - ((1 - 1 / ratio) * replicates).sum(dim=0)
    variance = ((pseudo - centre) ** 2 / (ratio - 1)).mean(dim=0)
    return variance.sqrt()


def bias(value: Tensor, replicates: Tensor, count: float, held_out: Tensor) -> Tensor:
    """Estimate from the folds left out how far a finite sample moves a value."""
    # With folds of unequal size, each replicate's distance counts by how much was left out.
    ratio = (count / held_out).view(-1, *[1] * value.ndim)
    return ((1 - 1 / ratio) * (replicates - value)).sum(dim=0)


@dataclass(frozen=True)
class Split:
    """The moments that operators are fitted to, and those that they are tested on.

    They are those of all samples, or, with an axis of folds in front, of all but each of several folds.
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
        return float(self.train.count)

    def fold(self, place: int) -> Split:
        """Return what alignments need to know of one fold."""
        train = self.train
        means, variances = (tuple(x[place] for x in xs) for xs in (train.means, train.variances))
        one = Covariances(train.count[place], means, variances, {})
        return replace(self, train=one, test=one, directions=self.directions[place])

    def normal_equations(self, i: int) -> tuple[Tensor, Tensor]:
        """Return the covariance of what step i reads, and that with what it gives."""
        return self.train.normal_equations(self.layout.parents[i], i)

    def blocks(self, i: int, operator: Tensor) -> Sequence[Tensor]:
        """Cut the operator of step i, or of more behind it, into one block per state that it reads."""
        widths = [self.train.means[p].shape[-1] for p in self.layout.parents[i]]
        return torch.split(operator, widths, dim=-2)


def split_chain(
    layout: Layout,
    moments: Tensor,
    folds: Sequence[int] | None,
    normalize: Normalize,
    total: Tensor | None = None,
) -> Split:
    """Read what is fitted on all folds, or on all but each of some; ``total`` sums all folds."""
    total = moments.sum(dim=0) if total is None else total
    held = None if folds is None else _rows_of(moments, folds)
    train = covariances(layout, total, without=held)
    test = train if held is None else covariances(layout, held, about=train.means)
    scales = _scales(train, layout, normalize)
    if scales is not None:
        test = _rescaled(test, scales)
        train = test if held is None else _rescaled(train, scales)
    output = train[len(layout.dims) - 1, len(layout.dims) - 1]
    if normalize == "whiten":
        # Whitened coordinates are the POD directions in ascending order; their covariance is no guide.
        values = torch.linalg.eigvalsh(output)
        directions = torch.eye(output.shape[-1], device="cpu").to(output).expand(output.shape)
    else:
        values, directions = torch.linalg.eigh(output)
    rank = int(alive(values).sum()) if held is None else output.shape[-1]
    return Split(layout, train, test, directions.flip(-1), rank)


def _rows_of(moments: Tensor, folds: Sequence[int]) -> Tensor:
    """Return the moments of some folds; a copy only where these do not lie side by side."""
    if folds[-1] - folds[0] == len(folds) - 1:
        return moments[folds[0] : folds[-1] + 1]
    return moments[list(folds)]


_VALUES_AT_ONCE = 2**20
"""Entries of operators, and of a covariance, up to which all folds are left out at once.

It spares many small operations; with more, each fold alone stays in the cache.
"""


def held_out_folds(
    layout: Layout, moments: Tensor, normalize: Normalize, total: Tensor
) -> list[list[int]]:
    """Group the folds that can be held out, by how many are left out at once."""
    # A fold without samples has nothing to hold out; leaving out all but one leaves nothing to fit.
    held = (moments[:, 0] > 0) & (total[0] - moments[:, 0] >= 2)
    folds = held.nonzero()[:, 0].tolist()
    dims, parents = layout.dims, layout.parents
    widths = [sum(dims[p] for p in read) for read in parents]
    values = max(sum(map(math.prod, zip(dims, widths, strict=True))), max(widths) ** 2)
    # Whitened, a state may be of another width without each fold.
    if normalize == "none" and values * len(folds) <= _VALUES_AT_ONCE:
        return [folds] if folds else []
    return [[fold] for fold in folds]


def _scales(train: Covariances, layout: Layout, normalize: Normalize) -> list[Tensor] | None:
    """Return T_i for the coordinates x_i T_i, or ``None`` for the coordinates as they are."""
    if normalize == "none":
        return None
    scales = []
    for i, width in enumerate(layout.dims):
        if normalize == "rms":
            variance = train.variances[i].reshape(width)
            scales.append(torch.diag(torch.where(alive(variance), variance, torch.inf).rsqrt()))
        else:
            values, vectors = torch.linalg.eigh(train[i, i].reshape(width, width))
            kept = alive(values)
            scales.append(vectors[:, kept] * values[kept].rsqrt())
    return scales


def _rescaled(given: Covariances, scales: Sequence[Tensor]) -> Covariances:
    blocks = {(i, j): scales[i].T @ block @ scales[j] for (i, j), block in given.blocks.items()}
    return Covariances(
        given.count,
        tuple(mean @ scale for mean, scale in zip(given.means, scales, strict=True)),
        tuple(blocks[i, i].diagonal(dim1=-2, dim2=-1) for i in range(len(scales))),
        blocks,
    )


Limits = tuple[Tensor | None, Tensor | None]
"""Orthonormal directions that a state varies in, and of a step's target that it reaches."""


@dataclass(frozen=True)
class Step:
    """The fit of one step to all samples.

    Attributes:
        tikhonov: Ridge weight; infinite where the operator was given.
        settled: Whether any fold left out would pick the same.
        matrix: The operator.
        smoothed: The operator under ten times the ridge weight, or the smallest there is.
        values: Kept variances of the regressors along their principal directions, descending.
        condition: Ratio of the largest to the smallest of them.
        limits: By state that is read beside others, the directions that it varies in, and those of the
            target that it reaches; ``None`` where these are all there can be.
    """

    tikhonov: float
    settled: bool
    matrix: Tensor
    smoothed: Tensor
    values: Tensor
    condition: float
    limits: Mapping[int, Limits] = field(default_factory=dict)

    @property
    def is_given(self) -> bool:
        """Whether nothing was fitted, as where states are added up as they are."""
        return math.isinf(self.tikhonov)

    def n_varying(self, state: int, width: int) -> int:
        """Return in how many of its directions a state varies, as far as these limit it."""
        varies, _ = self.limits.get(state, (None, None))
        return width if varies is None else varies.shape[1]

    def within_limits(self, block: Tensor, state: int) -> Tensor:
        """Return what an operator says of a state without what can only be rounding.

        However little that is, it would count as output directions that reach the state.
        """
        varies, reached = self.limits.get(state, (None, None))
        if varies is not None:
            block = varies @ (varies.T @ block)
        return block if reached is None else block @ reached @ reached.T


def fit_steps(
    whole: Split, tikhonov: float | None, given: Mapping[int, Tensor] = MappingProxyType({})
) -> list[Step]:
    """Fit every step to all samples, by one eigendecomposition each, but those that are given."""
    steps, ranges = [], dict[int, Tensor | None]()
    # One step after the other: the eigenvectors of all of them at once would fill the memory.
    for i in range(1, len(whole.layout.dims)):
        if (matrix := given.get(i)) is not None:
            limits = _limits_of_given(whole, i, ranges)
            steps.append(Step(math.inf, True, matrix, matrix, matrix.new_empty(0), 1.0, limits))
            continue
        problem, weight, settled = spectrum(*whole.normal_equations(i)), tikhonov, True
        if weight is None:
            errors = problem.expected_error(float(whole.train.variances[i].sum()), whole.count)
            weight, settled = choose_ridge(errors), is_settled(errors)
        smoothed = problem.matrix(max(10 * weight, RIDGE_GRID[1]))
        matrix = problem.matrix(weight)
        limits = _limits(whole, i, problem, weight, ranges)
        steps.append(Step(weight, settled, matrix, smoothed, problem.values, problem.condition, limits))
    return steps


def relimited(split: Split, steps: Sequence[Step]) -> list[Step]:
    """Return steps with their limits in the coordinates that states have without one fold."""
    found, ranges = list(steps), dict[int, Tensor | None]()
    for i, step in enumerate(steps, start=1):
        if step.limits:
            problem = spectrum(*(block[0] for block in split.normal_equations(i)))
            found[i - 1] = replace(step, limits=_limits(split, i, problem, step.tikhonov, ranges))
    return found


def _limits(
    split: Split, i: int, problem: Spectrum, weight: float, ranges: dict[int, Tensor | None]
) -> dict[int, Limits]:
    """Find what limits the states that step i reads; ``ranges`` keeps those found for others."""
    read, train, limits = split.layout.parents[i], split.train, dict[int, Limits]()
    if len(read) == 1:
        # Whatever the operator says lies in the range of the state, and reaches all of the target.
        return limits
    # States that vary in all directions side by side do so each for itself.
    deficient = len(problem.values) < len(problem.vectors)
    variance, start = float(train.variances[i].sum()), 0
    for p in read:
        width = train.means[p].shape[-1]
        entries, start = problem.vectors[start : start + width], start + width
        varies, reached = _range(split, p, ranges) if deficient else None, None
        if weight == 0:
            entries = entries if varies is None else varies.T @ entries
            reached = problem.reached(entries, variance, split.count)
        if varies is not None or reached is not None:
            limits[p] = varies, reached
    return limits


def _limits_of_given(whole: Split, i: int, ranges: dict[int, Tensor | None]) -> dict[int, Limits]:
    """Find the directions that the states vary in which a step reads whose operator is given."""
    found = {p: _range(whole, p, ranges) for p in whole.layout.parents[i]}
    return {p: (varies, None) for p, varies in found.items() if varies is not None}


def _range(split: Split, p: int, ranges: dict[int, Tensor | None]) -> Tensor | None:
    """Find the directions that a state varies in, once; ``None`` if it does in all."""
    if p in ranges:
        return ranges[p]
    width = split.train.means[p].shape[-1]
    covariance = split.train[p, p].reshape(width, width)
    # All are alive where they are beyond a share of the sum of variances, which is at least the largest.
    least = RCOND * covariance.trace() * torch.eye(width, device="cpu").to(covariance)
    ranges[p] = None
    if int(torch.linalg.cholesky_ex(covariance - least).info):
        values, vectors = torch.linalg.eigh(covariance)
        kept = alive(values)
        ranges[p] = None if bool(kept.all()) else vectors[:, kept]
    return ranges[p]


def refit_steps(split: Split, steps: Sequence[Step], *, anew: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Fit every step without each fold, under the weight over all samples and, ``anew``, its own."""
    operators, own = [], []
    for i, step in enumerate(steps, start=1):
        train, chosen_anew = split.train, list[Tensor]()
        if step.is_given:
            fitted = step.matrix.expand(len(train.count), *step.matrix.shape)
        elif step.settled or not anew:
            fitted = solve_each(*split.normal_equations(i), step.tikhonov)
        else:
            facts = train.variances[i].sum(dim=1).tolist(), train.count.tolist()
            under_same = []
            for c_xx, c_xy, variance, count in zip(*split.normal_equations(i), *facts, strict=True):
                problem = spectrum(c_xx, c_xy)
                weight = choose_ridge(problem.expected_error(variance, count))
                under_same.append(problem.matrix(step.tikhonov))
                chosen_anew.append(problem.matrix(weight))
            fitted = torch.stack(under_same)
        operators.append(fitted)
        own.append(torch.stack(chosen_anew) if chosen_anew else fitted)
    return operators, own


class R2:
    """R² of every step, and of the output as predicted from every state through all steps behind it."""

    def __init__(self, whole: Split, steps: Sequence[Step]) -> None:
        self._whole, self._operators = whole, [step.matrix for step in steps]
        size = len(whole.layout.components)
        self._rows = [torch.empty(0, 2, 2, size, dtype=torch.float64, device="cpu")]

    def hold_out(self, split: Split, operators: Sequence[Tensor]) -> None:
        """Add what operators leave unexplained of the folds that they were not fitted to."""
        counts = split.test.count[:, None, None, None]
        self._rows.append(counts * _squares(split, operators))

    def values(self) -> dict[str, Tensor]:
        """Compute the values over all folds."""
        return _r2(torch.cat(self._rows).sum(dim=0))

    def replicates(self) -> dict[str, Tensor]:
        """Compute the values over all folds but each, ``(folds, L)``."""
        rows = torch.cat(self._rows)
        others = 1 - torch.eye(len(rows), dtype=rows.dtype, device="cpu")
        return _r2((others @ rows.flatten(1)).view(rows.shape))

    def gaps(self) -> dict[str, Tensor]:
        """Compute standard errors for the bias of R² in a finite sample."""
        # Held out, R² is too low by about as much as it is too high in sample: by half the gap between
        # them. Half of that as a standard error makes 95 % intervals reach 1.4 times as far.
        held_out, in_sample = self.values(), _r2(_squares(self._whole, self._operators)[0])
        return {name: (in_sample[name] - value).abs() / 4 for name, value in held_out.items()}


def _r2(squares: Tensor) -> dict[str, Tensor]:
    """R² from errors and totals; NaN where the target never varies."""
    errors, totals = squares.unbind(dim=-3)
    step, chain = torch.where(totals > 0, 1 - errors / totals, torch.nan).unbind(dim=-2)
    return {"r2": step, "chain_r2": chain, "nonlinearity": 1 - step}


def _squares(split: Split, operators: Sequence[Tensor]) -> Tensor:
    """Squared errors per sample of every component and of the chain behind it, and what they are of.

    The shape is (folds, 2, 2, L): errors and totals, steps and chains.
    """
    test, last, components = split.test, len(operators), split.layout.components
    totals = [variances.sum(dim=-1).reshape(-1) for variances in test.variances[1:]]
    steps, chain = [], [torch.zeros_like(totals[-1])]
    # ŷ = Σ_p x_p B_p; replacing x_i by its own prediction leads to state i - 1.
    blocks: dict[int, Tensor] = {}
    for i in range(last, 0, -1):
        read = split.layout.parents[i]
        replaced = blocks.pop(i, None)
        moved = operators[i - 1] if replaced is None else product(operators[i - 1], replaced)
        for p, block in zip(read, split.blocks(i, moved), strict=True):
            blocks[p] = blocks[p] + block if p in blocks else block
        states = list(blocks)
        whole = torch.cat(list(blocks.values()), dim=-2) if len(states) > 1 else blocks[states[0]]
        c_xx = test.beside(read)
        if i in components:
            steps.append(held_out_errors(operators[i - 1], c_xx, test.across(read, i), totals[i - 1]))
        if i - 1 in components:
            # Without another branch beside it, the chain reads what its first step reads.
            c_xx = c_xx if states == list(read) else test.beside(states)
            chain.append(held_out_errors(whole, c_xx, test.across(states, last), totals[-1]))
    own = [totals[i - 1] for i in components]
    ends = [steps[::-1], chain[::-1], own, totals[-1:] * len(own)]
    squares = torch.stack([torch.stack(end, dim=1) for end in ends], dim=1)
    return squares.view(-1, 2, 2, len(own))
