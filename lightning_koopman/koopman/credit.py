"""Credits, gains and what else is reported per component, from moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_koopman.koopman.alignment import Alignment, align
from lightning_koopman.koopman.chain import (
    Split,
    fit_chain,
    fit_steps,
    solve_steps,
    split_chain,
    split_folds,
    step_factors,
    with_bias,
)
from lightning_koopman.koopman.moments import Layout
from lightning_koopman.koopman.operator import KoopmanOperator
from lightning_koopman.koopman.options import DEFAULTS, Options
from lightning_koopman.koopman.regression import RESOLUTION_GRID, alive


def align_split(
    layout: Layout,
    split: Split,
    chosen: Sequence[float],
    columns: Sequence[int],
    targets: Sequence[int] | None,
) -> Alignment:
    """Align the operators of some folds."""
    directions = split.directions
    if targets is not None:
        directions = torch.eye(len(directions)).to(directions)[:, list(targets)]
    blocks = step_factors(layout, split, chosen)
    # Whitened without a fold, an output may have fewer directions than over all samples.
    present = [column for column in columns if column < directions.shape[1]]
    return align(blocks, directions[:, present], layout.parents[1:])


def volumes(
    layout: Layout, split: Split, chain: Alignment, expected: Alignment | None = None
) -> dict[str, Tensor]:
    """Read credit, gain, sensitivity and total off an alignment; NaN where another was expected."""
    n_steps = len(layout.dims) - 1
    if chain.rank == 0 or (expected is not None and chain.rank != expected.rank):
        nan = torch.full((n_steps,), torch.nan, dtype=torch.float64)
        return {"credit": nan, "gain": nan, "sensitivity": nan, "total": nan[0]}
    means = chain.log_volumes.nanmean(dim=1)
    lost = means.isnan()
    if expected is not None:
        lost |= (chain.log_volumes.isnan() != expected.log_volumes.isnan()).any(dim=1)
    spread = [
        split.train.variances[i].clamp_min(0).sqrt()[:, None] * chain.jacobian(i)
        for i in range(1, len(layout.dims))
    ]
    sensitivity = torch.stack([torch.linalg.matrix_norm(s).log() for s in spread])
    # A dead branch has no gain; the gain of what stands behind it is that over what carries.
    gain, before = torch.full_like(means[1:], torch.nan), means[0]
    for i in range(1, n_steps + 1):
        if not means[i].isnan():
            gain[i - 1], before = before - means[i], means[i]
    gone = torch.full_like(means, torch.nan)
    return {
        "credit": torch.where(lost, gone, means)[1:],
        "gain": torch.where(lost[1:] | lost[:-1] & ~means[:-1].isnan(), gone[1:], gain),
        "sensitivity": torch.where(means[1:].isnan(), gone[1:], sensitivity),
        "total": means[0],
    }


RANK_SHARE = 1e-4
"""Share of the mean variance, of the directions that vary at all, at which one counts by half in a
state's rank."""


def state_ranks(layout: Layout, split: Split) -> Tensor:
    """Effective rank of the state behind each component: how many of its directions vary."""
    # A direction of variance v counts v² / (v² + t²). So the rank moves smoothly with the data, and
    # units that wake in one sample of a million do not count.
    ranks, known = [], split.problems
    for i in range(1, len(layout.dims)):
        if i < len(known) and layout.parents[i + 1] == (i,):
            # This state is the regressor of the next step, whose spectrum is at hand.
            values = known[i].values
        else:
            values = torch.linalg.eigvalsh(split.train[i, i])
            values = values[alive(values)]
        squares = (values / (RANK_SHARE * values.mean())).square()
        ranks.append(float((squares / (1 + squares)).sum()))
    return torch.tensor(ranks, dtype=torch.float64)


def unseen_shifts(
    layout: Layout, whole: Split, linear: Sequence[bool], chosen: Sequence[float]
) -> Tensor:
    """Compute how far the log-volume behind each state may move if directions that never varied wake."""
    # It concerns states read by a linear step, whose ridge weight is so small that directions too rare
    # to be seen in so many samples would count in full. Were u of them to join k with weights like
    # theirs, the log-volume would grow by log(1 + u / k) / 2 per direction; a 95 % interval just reaches
    # so far. What a linear step gives out has no directions but those it reads.
    from scipy.special import stdtrit  # most of a second to import, and torch has no such quantile

    shifts = torch.zeros(len(layout.dims), dtype=torch.float64)
    unseen, quantile = [layout.dims[0]], float(stdtrit(layout.folds - 1, 0.975))
    for i, problem in enumerate(whole.problems, start=1):
        read = layout.parents[i]
        # Not what a linear step cannot give anyway.
        missing = sum(layout.dims[p] for p in read) - len(problem.values)
        missing = min(missing, sum(unseen[p] for p in read))
        if linear[i - 1] and chosen[i - 1] < 1 / whole.count and missing and len(problem.values):
            for p in read:
                shifts[p] = math.log1p(missing / len(problem.values)) / 2 / quantile
        unseen.append(missing if linear[i - 1] else layout.dims[i])
    return shifts


QUANTITIES = ("credit", "gain", "nonlinearity", "sensitivity", "r2", "chain_r2", "rank")
"""Names of the numbers reported for every component."""

MAX_RIDGE_SHIFT = 0.5
"""Nats a direction that a stable credit may move, or its standard error if that is more, when the ridge
weight moves tenfold."""

LINEAR = 1e-6
"""Share of the variance that a step may leave unexplained and count as linear: rounding, and a unit that
wakes in one sample, whose weights no other sample tells."""


@dataclass(frozen=True)
class Credits:
    """Every number of a chain of L components, with its error bar.

    Attributes:
        values: By quantity, shape ``(L,)`` each.
        stderr: Standard errors, the same names and shapes: the delete-one-fold jackknife, with the ridge
            weight chosen anew in every replicate, and in quadrature the bias of a finite sample and what
            directions never seen could do.
        volumes: log|R_i[j, j]| behind each component, by output direction, shape ``(L, r)``.
        total: Log-volume of the whole network, in nats a direction.
        total_stderr: Its standard error.
        stable: Whether the credit moves by no more than :data:`MAX_RIDGE_SHIFT`, or its error, when
            every ridge weight moves tenfold.
        operators: One per component; where it reads several states, its regressors are these states
            side by side, the nearest first.
        alignment: The aligned chain over all samples.
        lost: Indices of the components behind which an output direction stops to matter.
        dropped: The output directions that are lost there: units of ``targets`` where these were given,
            else places among the leading POD directions, from 0.
    """

    values: dict[str, Tensor]
    stderr: dict[str, Tensor]
    volumes: Tensor
    total: float
    total_stderr: float
    stable: Tensor
    operators: tuple[KoopmanOperator, ...]
    alignment: Alignment
    lost: tuple[int, ...]
    dropped: tuple[int, ...]


def compute_credits(
    layout: Layout,
    moments: Tensor,
    options: Options = DEFAULTS,
    *,
    center: Sequence[Tensor] | None = None,
) -> Credits:
    """Compute all numbers of a chain from its moments."""
    targets, rank, normalize = options.targets, options.rank, options.normalize
    _check(layout, moments, targets)
    whole, folds = split_folds(layout, moments, normalize)
    if whole.output_rank == 0:
        raise ValueError(
            f"the output of the last component is constant over all {int(whole.count)} samples, so "
            "nothing can be credited for it. Check the data, or end the chain earlier with components=."
        )
    step, chosen, chosen_without = fit_steps(layout, whole, folds, options.tikhonov)
    for fold, without_it in enumerate(chosen_without):
        folds[fold] = solve_steps(folds[fold], chosen, without_it)
    behind = fit_chain(layout, whole, folds, chosen)
    asked = whole.output_rank if targets is None else len(targets)
    asked = asked if rank is None else min(asked, rank)
    chain = align_split(layout, whole, chosen, range(asked), targets)
    kept = chain.kept
    values = _values(layout, whole, chain, step.r2, behind.r2)
    held_out = torch.tensor([whole.count - split.count for split in folds], dtype=torch.float64)
    replicates = []
    for without_it, r2, chain_r2 in zip(chosen_without, step.without, behind.without, strict=True):
        # Let go of each split behind its last use: all of them take as much memory as the moments.
        split = folds.pop(0)
        without = align_split(layout, split, without_it, kept, targets)
        replicates.append(_values(layout, split, without, r2, chain_r2, chain))
        del without
    gaps = {"r2": step.gap, "chain_r2": behind.gap, "nonlinearity": step.gap}
    stderr = {
        name: with_bias(value, [r[name] for r in replicates], whole.count, held_out, gaps.get(name))
        for name, value in values.items()
    }
    unseen = unseen_shifts(layout, whole, [r2 >= 1 - LINEAR for r2 in step.r2.tolist()], chosen)
    for name, extra in (
        ("credit", unseen[1:]),
        ("gain", (unseen[1:].square() + unseen[:-1].square()).sqrt()),
        ("total", unseen[0]),
    ):
        stderr[name] = (stderr[name].square() + extra.square()).sqrt()
    smoothed = [max(10 * t, RESOLUTION_GRID[1]) for t in chosen]
    moved = volumes(layout, whole, align_split(layout, whole, smoothed, kept, targets), chain)
    shift = (moved["credit"] - values["credit"]).abs()
    plain = whole if normalize == "none" else split_chain(layout, moments, None, "none")
    return Credits(
        values={name: values[name] for name in QUANTITIES},
        stderr={name: stderr[name] for name in QUANTITIES},
        volumes=chain.log_volumes[1:],
        total=float(values["total"]),
        total_stderr=float(stderr["total"]),
        stable=shift <= stderr["credit"].clamp_min(MAX_RIDGE_SHIFT),
        operators=_operators(layout, plain, chosen, step.r2, center),
        alignment=chain,
        lost=chain.lost,
        dropped=tuple((targets or range(asked))[c] for c in range(asked) if c not in kept),
    )


def _values(
    layout: Layout,
    split: Split,
    chain: Alignment,
    r2: Tensor,
    chain_r2: Tensor,
    expected: Alignment | None = None,
) -> dict[str, Tensor]:
    """Compute every quantity, and the total, of an aligned chain."""
    return volumes(layout, split, chain, expected) | {
        "r2": r2,
        "chain_r2": chain_r2,
        "nonlinearity": 1 - r2,
        "rank": state_ranks(layout, split),
    }


def samples_needed(layout: Layout) -> int:
    """Return the number of samples below which the operators are not worth reading."""
    widest = max(sum(layout.dims[p] for p in read) for read in layout.parents[1:])
    return math.ceil(2 * widest * layout.folds / (layout.folds - 1))


def _check(layout: Layout, moments: Tensor, targets: Sequence[int] | None) -> None:
    count = int(moments[:, 0].sum())
    if count < 2:
        raise ValueError(f"{count} sample arrived; credits need at least 2, and error bars many more")
    if targets is not None:
        outside = [t for t in targets if not 0 <= t < layout.dims[-1]]
        if outside or not targets or len(set(targets)) < len(targets):
            raise ValueError(
                f"targets is {list(targets)}; name each output at most once, from 0 to "
                f"{layout.dims[-1] - 1}"
            )


def _operators(
    layout: Layout,
    split: Split,
    chosen: Sequence[float],
    r2: Tensor,
    center: Sequence[Tensor] | None,
) -> tuple[KoopmanOperator, ...]:
    """Return each component's operator in the coordinates of the states themselves."""
    means = list(split.train.means[: len(layout.dims)])
    if center is not None:
        means = [mean + offset.to(mean) for mean, offset in zip(means, center, strict=True)]
    return tuple(
        KoopmanOperator(
            matrix=problem.matrix(tikhonov),
            x_mean=torch.cat([means[p] for p in layout.parents[i]]),
            y_mean=means[i],
            r2=float(r2[i - 1]),
            tikhonov=tikhonov,
            rank=len(problem.values),
            condition=problem.condition,
        )
        for i, (problem, tikhonov) in enumerate(zip(split.problems, chosen, strict=True), start=1)
    )
