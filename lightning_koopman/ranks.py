"""How many directions each state spans, and what those never seen might do to a volume."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.special import stdtrit
from torch import Tensor

from lightning_koopman.chain import Split
from lightning_koopman.layout import Layout
from lightning_koopman.regression import alive

RANK_SHARE = 1e-4
"""Share of the mean variance, of the directions that vary at all, at which one counts by half in a
state's rank."""


def state_ranks(layout: Layout, split: Split) -> Tensor:
    """Effective rank of the state behind each component: how many of its directions vary."""
    # A direction of variance v counts v² / (v² + t²). So the rank moves smoothly with the data, and
    # units that wake in one sample of a million do not count.
    ranks, known = [], split.solved or split.problems
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
    """How far the log-volume behind each state may move when directions that never varied wake.

    It concerns states read by a linear step, whose ridge weight is so small that directions too rare
    to be seen in so many samples would count in full. Were u of them to join k with weights like
    theirs, the log-volume would grow by log(1 + u / k) / 2 a direction; a 95 % interval just reaches
    so far. What a linear step gives out has no directions but those it reads.

    Args:
        layout: The chain.
        whole: All samples.
        linear: Whether each step is linear.
        chosen: Ridge weight of each step.

    Returns:
        Standard errors in nats a direction by state x_0 … x_L, shape ``(L + 1,)``.
    """
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
