"""Fits the coordinates of state vectors: POD bases and centres."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_koopman.lifts import Lift


@dataclass(frozen=True)
class Basis:
    """What freezes the coordinates of a chain's state vectors.

    Attributes:
        vectors: POD basis of each state, ``(D_i, d_i)``; ``None`` where the state is kept whole.
        kept_variance: Share of each state's variance that its basis keeps.
        center: Mean of each state in the new coordinates, ``(d_i,)``.
        lifts: What each state is lifted by; empty where none is, or the user's function does it.
    """

    vectors: tuple[Tensor | None, ...]
    kept_variance: tuple[float, ...]
    center: tuple[Tensor, ...]
    lifts: tuple[Lift | None, ...] = ()


def fit_basis(rows: Sequence[Tensor], max_dim: int) -> Basis:
    """Fit the coordinates of every state to some of its rows.

    Args:
        rows: One block of rows a state, each ``(n_samples, D_i)``.
        max_dim: Largest state vector kept.

    Returns:
        Bases and centres.
    """
    fitted = [pod_basis(block, max_dim) for block in rows]
    vectors = tuple(basis for basis, _ in fitted)
    means = (block.mean(dim=0, dtype=torch.float64) for block in rows)
    center = tuple(m if v is None else m @ v for m, v in zip(means, vectors, strict=True))
    return Basis(vectors, tuple(share for _, share in fitted), center)


def projected(rows: Sequence[Tensor], bases: Sequence[Tensor | None]) -> list[Tensor]:
    """Give rows in the coordinates of their bases.

    Args:
        rows: One block of rows a state, each ``(n_samples, D_i)``.
        bases: POD basis of each state, ``(D_i, d_i)``; ``None`` where the state is kept whole.

    Returns:
        States, each ``(n_samples, d_i)``; the rows themselves where they are kept whole.
    """
    return [
        block if basis is None else block @ basis.to(block)
        for block, basis in zip(rows, bases, strict=True)
    ]


def pod_basis(rows: Tensor, max_dim: int) -> tuple[Tensor | None, float]:
    """Find the leading principal directions and the share of variance they keep.

    Args:
        rows: Shape ``(n_samples, d)``.
        max_dim: Most directions kept.

    Returns:
        Orthonormal columns, shape ``(d, k)``, or ``None`` where rows are no wider than ``max_dim``; and
        the share.
    """
    n_samples, width = rows.shape
    if width <= max_dim:
        return None, 1.0
    centred = rows.to(torch.float64, copy=True)
    centred -= centred.mean(dim=0)
    # The smaller of the two Gram matrices has the same non-zero spectrum.
    tall = n_samples >= width
    gram = centred.T @ centred if tall else centred @ centred.T
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    kept = min(max_dim, int((values > 1e-12 * values[0]).sum()))
    if kept == 0:
        return torch.eye(width, 1, dtype=torch.float64, device=rows.device), 1.0
    basis = vectors[:, :kept] if tall else centred.T @ (vectors[:, :kept] / values[:kept].sqrt())
    return basis, float(values[:kept].sum() / values.sum())
