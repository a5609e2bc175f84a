"""Aligns a chain that some of the folds gave, and reads its volumes off."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_koopman.alignment import Alignment, align
from lightning_koopman.chain import Split
from lightning_koopman.fits import step_factors
from lightning_koopman.layout import Layout


def align_split(
    layout: Layout,
    split: Split,
    chosen: Sequence[float],
    columns: Sequence[int],
    targets: Sequence[int] | None,
) -> Alignment:
    """Align the operators of some folds.

    Args:
        layout: The chain.
        split: Its regressions on these folds.
        chosen: Ridge weight of each step.
        columns: Which output directions to align, of those that ``targets`` names.
        targets: Output units, in this order; ``None`` means the split's own leading directions.

    Returns:
        The alignment.
    """
    directions = split.directions
    if targets is not None:
        directions = torch.eye(len(directions)).to(directions)[:, list(targets)]
    blocks = step_factors(layout, split, chosen)
    # Whitened without a fold, an output may have fewer directions than over all samples.
    present = [column for column in columns if column < directions.shape[1]]
    return align(blocks, directions[:, present], layout.parents[1:])


def volumes(
    layout: Layout, split: Split, chain: Alignment, expected: int | None = None
) -> dict[str, Tensor]:
    """Read credit, gain, sensitivity and total off an alignment.

    Args:
        layout: The chain.
        split: What was aligned.
        chain: Its alignment.
        expected: How many directions it should have kept; ``None`` takes what it kept.

    Returns:
        By quantity, shape ``(L,)``, the total a scalar; NaN where the chain lost directions.
    """
    n_steps = len(layout.dims) - 1
    if chain.rank == 0 or (expected is not None and chain.rank != expected):
        nan = torch.full((n_steps,), torch.nan, dtype=torch.float64)
        return {"credit": nan, "gain": nan, "sensitivity": nan, "total": nan[0]}
    means = chain.log_volumes.mean(dim=1)
    spread = [
        split.train.variances[i].clamp_min(0).sqrt()[:, None] * chain.jacobian(i)
        for i in range(1, n_steps + 1)
    ]
    return {
        "credit": means[1:],
        "gain": means[:-1] - means[1:],
        "sensitivity": torch.stack([torch.linalg.matrix_norm(s).log() for s in spread]),
        "total": means[0],
    }
