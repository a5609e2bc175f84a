"""Fits one operator per component from moments, for all folds and with each left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_koopman.koopman.moments import Covariances, Layout, covariances
from lightning_koopman.koopman.options import Normalize
from lightning_koopman.koopman.regression import (
    RESOLUTION_GRID,
    Factored,
    Spectrum,
    alive,
    held_out,
    in_sample,
    resolved_tikhonov,
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
    """The regression problems on some folds, and the moments they are tested on.

    ``test`` is the fold left out, about the means of the others, or ``train`` where none is.
    ``directions`` are the POD directions of the output, leading first, ``output_rank`` of them alive.
    """

    count: float
    train: Covariances
    test: Covariances
    problems: tuple[Spectrum, ...]
    directions: Tensor
    output_rank: int

    def variance(self, i: int) -> float:
        """Squared deviation of a state, per sample that is tested on."""
        return float(self.test.variances[i].sum())


def split_chain(
    layout: Layout, moments: Tensor, fold: int | None, normalize: Normalize, total: Tensor | None = None
) -> Split:
    """Set up every step's regression on all folds, or on all but one; ``total`` sums all folds."""
    total = moments.sum(dim=0) if total is None else total
    train = covariances(layout, total, without=None if fold is None else moments[fold])
    test = train if fold is None else covariances(layout, moments[fold], about=train.means)
    scales = _scales(train, layout, normalize)
    if scales is not None:
        test = _rescaled(test, scales)
        train = test if fold is None else _rescaled(train, scales)
    problems = tuple(spectrum(*_normal_equations(train, layout, i)) for i in range(1, len(layout.dims)))
    output = train[len(layout.dims) - 1, len(layout.dims) - 1]
    if normalize == "whiten":
        # Whitened coordinates are the POD directions in ascending order; their covariance is no guide.
        values = torch.linalg.eigvalsh(output)
        directions = torch.eye(len(output), dtype=output.dtype, device=output.device)
    else:
        values, directions = torch.linalg.eigh(output)
    return Split(train.count, train, test, problems, directions.flip(1), int(alive(values).sum()))


def split_folds(layout: Layout, moments: Tensor, normalize: Normalize) -> tuple[Split, list[Split]]:
    """Set up the regressions on all folds, and without each fold that can be held out."""
    total = moments.sum(dim=0)
    folds = []
    for fold in range(layout.folds):
        # A fold without samples has nothing to hold out; leaving out all but one leaves nothing to fit.
        rest = float(total[0] - moments[fold, 0])
        if moments[fold, 0] > 0 and rest >= 2:
            folds.append(split_chain(layout, moments, fold, normalize, total))
    return split_chain(layout, moments, None, normalize, total), folds


def _normal_equations(given: Covariances, layout: Layout, i: int) -> tuple[Tensor, Tensor]:
    """Return the covariance of what a step reads, and its cross-covariance with what the step gives."""
    read = layout.parents[i]
    c_xy = torch.cat([given[p, i] for p in read])
    if len(read) == 1:
        return given[read[0], read[0]], c_xy
    return torch.cat([torch.cat([given[p, q] for q in read], dim=1) for p in read]), c_xy


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
class Fit:
    """R² of every step (or of the chain behind it), with what its error bar needs.

    ``r2`` is held out over all folds, ``without`` leaves one fold after the other out of it, and
    ``in_sample`` is that of the fit to all samples.
    """

    r2: Tensor
    without: list[Tensor]
    in_sample: Tensor

    @property
    def gap(self) -> Tensor:
        """Standard error for the bias of R² in a finite sample."""
        # Held out, R² is too low by about as much as it is too high in sample: by half the gap between
        # them. Half of that as a standard error makes 95 % intervals reach 1.4 times as far.
        return (self.in_sample - self.r2).abs() / 4


def fit_steps(
    layout: Layout, whole: Split, folds: Sequence[Split], tikhonov: float | None
) -> tuple[Fit, list[float], list[list[float]]]:
    """Fit every step: R², and its ridge weight over all folds and once more without each of them."""
    shape = (len(folds), len(layout.dims) - 1)
    errors, totals = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    within = torch.zeros(2, 1, shape[1], dtype=torch.float64)
    chosen: list[float] = []
    without: list[list[float]] = [[] for _ in folds]
    counts = torch.tensor([split.test.count for split in folds], dtype=torch.float64)
    # One step after the other: the forms of all of them at once would fill the memory.
    for i in range(1, len(layout.dims)):
        forms = [
            held_out(split.problems[i - 1], *_normal_equations(split.test, layout, i), split.variance(i))
            for split in folds
        ]
        if tikhonov is None and folds:
            rows = torch.stack([form.errors(RESOLUTION_GRID).cpu() for form in forms])
            rows = counts[:, None] * rows
            ridge = resolved_tikhonov(rows, RESOLUTION_GRID)
            rests = (torch.cat([rows[:fold], rows[fold + 1 :]]) for fold in range(len(folds)))
            ridges = [resolved_tikhonov(rest, RESOLUTION_GRID) for rest in rests]
        else:
            ridge = tikhonov or 0.0
            ridges = [ridge] * len(folds)
        chosen.append(ridge)
        for fold, form in enumerate(forms):
            without[fold].append(ridges[fold])
            errors[fold, i - 1] = counts[fold] * float(form.errors([ridge]))
            totals[fold, i - 1] = counts[fold] * form.variance
        own = in_sample(whole.problems[i - 1], whole.variance(i))
        within[0, 0, i - 1], within[1, 0, i - 1] = float(own.errors([ridge])), own.variance
    return Fit(*_pooled_r2(errors, totals), in_sample=_pooled_r2(*within)[0]), chosen, without


def _pooled_r2(errors: Tensor, totals: Tensor) -> tuple[Tensor, list[Tensor]]:
    """R² over all folds, and over all but each one; NaN where the target never varies."""

    def r2(error: Tensor, total: Tensor) -> Tensor:
        return torch.where(total > 0, 1 - error / total, torch.nan)

    without = [r2(errors.sum(0) - e, totals.sum(0) - t) for e, t in zip(errors, totals, strict=True)]
    return r2(errors.sum(0), totals.sum(0)), without


def solve_steps(split: Split, *chosen: Sequence[float]) -> Split:
    """Solve every step for one or more choices of ridge weights, and let go of what takes memory."""
    problems = tuple(
        problem.solved(set(weights)) for problem, *weights in zip(split.problems, *chosen, strict=True)
    )
    return replace(split, problems=problems)


def step_factors(
    layout: Layout, split: Split, chosen: Sequence[float]
) -> Sequence[Sequence[Tensor | Factored]]:
    """Return every step's operator, cut into one block per state it reads."""
    widths = [len(mean) for mean in split.train.means]
    steps = zip(split.problems, chosen, layout.parents[1:], strict=True)
    return [problem.parts(weight, [widths[p] for p in read]) for problem, weight, read in steps]


def fit_chain(layout: Layout, whole: Split, folds: Sequence[Split], chosen: Sequence[float]) -> Fit:
    """R² of the output predicted from each state through all operators behind it."""

    def table(splits: Sequence[Split]) -> tuple[Tensor, Tensor]:
        errors = torch.zeros(len(splits), len(chosen), dtype=torch.float64)
        totals = torch.zeros_like(errors)
        for row, split in enumerate(splits):
            totals[row] = split.test.count * split.variance(len(chosen))
            errors[row] = split.test.count * _chain_errors(layout, split, chosen)
        return errors, totals

    return Fit(*_pooled_r2(*table(folds)), in_sample=_pooled_r2(*table([whole]))[0])


def _chain_errors(layout: Layout, split: Split, chosen: Sequence[float]) -> Tensor:
    test, last = split.test, len(chosen)
    operators = step_factors(layout, split, chosen)
    errors = torch.zeros(last, dtype=torch.float64)
    # ŷ = Σ_p x_p B_p; replacing x_i by its own prediction leads to state i - 1.
    width = test[last, last].shape[0]
    blocks = {last: torch.eye(width, dtype=torch.float64, device=test.means[0].device)}
    for i in range(last, 0, -1):
        error = split.variance(last)
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
