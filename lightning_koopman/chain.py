"""Sets up the regressions of a chain's steps on all samples, and with each fold left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_koopman.covariance import Covariances, covariances
from lightning_koopman.layout import Layout
from lightning_koopman.regression import Solved, Spectrum, alive, spectrum

Normalize = Literal["none", "rms", "whiten"]


@dataclass(frozen=True)
class Split:
    """The regression problems on some folds, and the moments of the fold left out.

    ``directions`` are the POD directions of the output, leading first, in its coordinates, and
    ``output_rank`` is how many of them are alive. ``problems`` make way for ``solved`` once the ridge
    weights are known.
    """

    count: float
    train: Covariances
    test: Covariances | None
    problems: tuple[Spectrum, ...]
    directions: Tensor
    output_rank: int
    solved: tuple[Solved, ...] = ()

    @property
    def widths(self) -> list[int]:
        """Width of every state in the coordinates chosen."""
        return [len(mean) for mean in self.train.means]

    @property
    def held_out(self) -> Covariances:
        """Covariances of the fold left out, about the means of the others."""
        assert self.test is not None
        return self.test


def split_chain(
    layout: Layout,
    moments: Tensor,
    fold: int | None,
    normalize: Normalize,
    total: Tensor | None = None,
) -> Split:
    """Set up every step's regression on all folds, or on all but one; ``total`` sums all folds."""
    total = moments.sum(dim=0) if total is None else total
    train = covariances(layout, total, without=None if fold is None else moments[fold])
    test = None if fold is None else covariances(layout, moments[fold], about=train.means)
    scales = _scales(train, layout, normalize)
    if scales is not None:
        train = _rescaled(train, scales)
        test = None if test is None else _rescaled(test, scales)
    problems = tuple(
        spectrum(regressors(train, layout, i), targets(train, layout, i))
        for i in range(1, len(layout.dims))
    )
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


def regressors(given: Covariances, layout: Layout, i: int) -> Tensor:
    """Give the covariance of what a step reads.

    Args:
        given: Covariances of the states.
        layout: The chain.
        i: The step, from 1.

    Returns:
        Shape ``(d_in, d_in)``.
    """
    read = layout.parents[i]
    if len(read) == 1:
        return given[read[0], read[0]]
    return torch.cat([torch.cat([given[p, q] for q in read], dim=1) for p in read])


def targets(given: Covariances, layout: Layout, i: int) -> Tensor:
    """Give the covariances of what a step reads with what it gives.

    Args:
        given: Covariances of the states.
        layout: The chain.
        i: The step, from 1.

    Returns:
        Shape ``(d_in, d_i)``.
    """
    return torch.cat([given[p, i] for p in layout.parents[i]])


def _scales(train: Covariances, layout: Layout, normalize: Normalize) -> list[Tensor] | None:
    """Give T_i for the coordinates x_i T_i, or ``None`` for the coordinates as they are."""
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
