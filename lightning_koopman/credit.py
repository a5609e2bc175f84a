"""Credits, gains, nonlinearity, sensitivity and error bars from moments; pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from lightning_koopman.alignment import Alignment
from lightning_koopman.chain import Normalize, Split, split_chain, split_folds
from lightning_koopman.fits import fit_chain, fit_steps, solve_steps
from lightning_koopman.jackknife import with_bias
from lightning_koopman.layout import Layout
from lightning_koopman.operator import KoopmanOperator
from lightning_koopman.ranks import state_ranks, unseen_shifts
from lightning_koopman.ridge import RESOLUTION_GRID, check_tikhonov
from lightning_koopman.volumes import align_split, volumes

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
        operators: One a component; where it reads several states, its regressors are these states
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
    *,
    rank: int | None = None,
    tikhonov: float | None = None,
    normalize: Normalize = "none",
    targets: Sequence[int] | None = None,
    center: Sequence[Tensor] | None = None,
) -> Credits:
    """Compute all numbers of a chain from its moments.

    Args:
        layout: What the moments hold.
        moments: Shape ``(folds, size)``.
        rank: Most output directions to align; ``None`` takes all that reach back to the input.
        tikhonov: Ridge weight in units of the regressors' mean variance; ``None`` picks, for every
            component, the largest up to 1e-2 that at most doubles its held-out unexplained variance.
        normalize: Coordinates of every state: as they are, each unit over its standard deviation, or
            whitened.
        targets: Output units of interest, not with ``"whiten"``; ``None`` takes the leading POD
            directions of the output.
        center: Offsets that the moments were summed about, one a state; ``None`` means zero. They
            only move the operators' means.

    Returns:
        The numbers.

    Raises:
        ValueError: If fewer than two samples were seen, the output is constant, or an argument is
            out of range.
    """
    check_options(rank=rank, tikhonov=tikhonov, normalize=normalize, targets=targets)
    _check(layout, moments, targets)
    whole, folds = split_folds(layout, moments, normalize)
    if whole.output_rank == 0:
        raise ValueError(
            f"the output of the last component is constant over all {int(whole.count)} samples, so "
            "nothing can be credited for it. Check the data, or end the chain earlier with components=."
        )
    step, chosen, chosen_without = fit_steps(layout, whole, folds, tikhonov)
    for fold, without_it in enumerate(chosen_without):
        folds[fold] = solve_steps(folds[fold], chosen, without_it)
    behind = fit_chain(layout, whole, folds, chosen)
    asked = len(targets) if targets is not None else whole.output_rank
    asked = min(asked, rank) if rank is not None else asked
    chain = align_split(layout, whole, chosen, range(asked), targets)
    kept = chain.kept
    values = _values(layout, whole, chain, step.r2, behind.r2)
    held_out = torch.tensor([whole.count - split.count for split in folds], dtype=torch.float64)
    replicates = []
    for fold, without_it in enumerate(chosen_without):
        # Let go of each split behind its last use: all of them take as much memory as the moments.
        split = folds.pop(0)
        without = align_split(layout, split, without_it, kept, targets)
        replicates.append(
            _values(layout, split, without, step.without[fold], behind.without[fold], len(kept))
        )
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
    moved = volumes(layout, whole, align_split(layout, whole, smoothed, kept, targets), len(kept))
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
        dropped=tuple(
            column if targets is None else targets[column]
            for column in range(asked)
            if column not in kept
        ),
    )


def _values(
    layout: Layout,
    split: Split,
    chain: Alignment,
    r2: Tensor,
    chain_r2: Tensor,
    expected: int | None = None,
) -> dict[str, Tensor]:
    """Give every quantity, and the total, of an aligned chain."""
    return volumes(layout, split, chain, expected) | {
        "r2": r2,
        "chain_r2": chain_r2,
        "nonlinearity": 1 - r2,
        "rank": state_ranks(layout, split),
    }


def check_options(
    *,
    folds: int = 5,
    delay: int | str = 1,
    rank: int | None = None,
    tikhonov: float | None = None,
    normalize: str = "none",
    targets: Sequence[int] | None = None,
) -> None:
    """Refuse options that no chain can be computed with, before any work is done.

    Args:
        folds: Number of folds.
        delay: Step delay, or ``"auto"``.
        rank: Most output directions.
        tikhonov: Ridge weight.
        normalize: Coordinates of the states.
        targets: Output units of interest.

    Raises:
        ValueError: If one is out of range, or two exclude each other.
    """
    if folds < 2:
        raise ValueError(f"folds is {folds}; held-out R² needs at least 2")
    if delay != "auto" and (isinstance(delay, str) or delay < 1):
        raise ValueError(
            f"delay is {delay!r}; each operator sees at least one earlier state: give 1 or more, or "
            "'auto'"
        )
    if rank is not None and rank < 1:
        raise ValueError(f"rank is {rank}; at least one output direction must be aligned")
    check_tikhonov(tikhonov)
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize is {normalize!r}; choose one of {get_args(Normalize)}")
    if targets is not None and normalize == "whiten":
        raise ValueError(
            f"targets is {list(targets)}, but normalize='whiten' mixes the output's units; choose "
            "'none' or 'rms'"
        )


def samples_needed(layout: Layout) -> int:
    """Give the number of samples below which the operators are not worth reading.

    Args:
        layout: The chain.

    Returns:
        Twice the widest operator's regressors, in every training split. From there on the error bars
        hold; with once as many they do not (``docs/calibration.md``).
    """
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
    """Give each component's operator in the coordinates of the states themselves."""
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
