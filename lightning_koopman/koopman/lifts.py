"""Lifts state vectors into more coordinates, in which a linear operator can follow a nonlinear map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

LiftKind = Literal["polynomial", "rff", "rbf"]
LIFTS: tuple[LiftKind, ...] = get_args(LiftKind)

Observables = LiftKind | Callable[[Tensor], Any] | None
"""Which functions of a state an operator acts on; ``None`` means the state's own coordinates."""

_MOST_VALUES = 2048


@dataclass(frozen=True)
class Lift:
    """A lift that is fixed: the state itself, and functions of it in the same unit.

    Attributes:
        kind: Which of :data:`LIFTS` it is.
        center: Mean of the rows it was fitted to, shape ``(d,)``.
        scale: Root mean square of these rows about it.
        points: Frequencies (``"rff"``) or centres (``"rbf"``), shape ``(d, n)``; else empty.
        phases: Of the frequencies, shape ``(n,)``; else empty.
        bandwidth: Median distance of two rows.
    """

    kind: LiftKind
    center: Tensor
    scale: float
    points: Tensor
    phases: Tensor
    bandwidth: float

    def __call__(self, rows: Tensor) -> Tensor:
        """Lift rows."""
        about = rows - self.center.to(rows)
        points = self.points.to(rows)
        if self.kind == "polynomial":
            i, j = torch.triu_indices(rows.shape[1], rows.shape[1], device=rows.device)
            more = about[:, i] * about[:, j] / self.scale
        elif self.kind == "rff":
            more = 2**0.5 * self.scale * torch.cos(about @ points + self.phases.to(rows))
        else:
            squared = torch.cdist(about, points.T, compute_mode="donot_use_mm_for_euclid_dist").square()
            more = self.scale * torch.exp(-squared / (2 * self.bandwidth**2))
        return torch.cat([rows, more], dim=1)


def fit_lift(rows: Tensor, kind: LiftKind, size: int, *, seed: int = 0) -> Lift:
    """Fix a lift by the first rows of a state.

    Example:
        >>> lift = fit_lift(torch.eye(3, dtype=torch.float64), "polynomial", 0)
        >>> lift(torch.ones(1, 3, dtype=torch.float64)).shape
        torch.Size([1, 9])
    """
    rows = rows.double().cpu()
    width = rows.shape[1]
    values = width * (width + 3) // 2
    if kind == "polynomial" and values > _MOST_VALUES:
        raise ValueError(
            f"observables='polynomial' makes {values} values of {width}; set max_dim to at most 62, or "
            "take 'rff' or 'rbf'"
        )
    center = rows.mean(dim=0)
    about = rows - center
    scale = float(about.square().mean().sqrt()) or 1.0
    distances = torch.pdist(about[:512])
    bandwidth = float(distances.median()) if len(distances) else 0.0
    bandwidth = bandwidth or scale
    generator = torch.Generator().manual_seed(seed)
    points, phases = rows.new_zeros(width, 0), rows.new_zeros(0)
    if kind == "rff":
        exact = torch.float64
        points = torch.randn(width, size, generator=generator, dtype=exact, device="cpu") / bandwidth
        phases = 2 * torch.pi * torch.rand(size, generator=generator, dtype=exact, device="cpu")
    elif kind == "rbf":
        points = about[torch.randperm(len(about), generator=generator, device="cpu")[:size]].T
    return Lift(kind, center, scale, points, phases, bandwidth)


def lifted_by(function: Callable[[Tensor], Any], rows: Tensor) -> Tensor:
    """Lift rows by what the user gave."""
    lifted = function(rows)
    if not isinstance(lifted, Tensor) or lifted.ndim != 2 or len(lifted) != len(rows):
        got = tuple(lifted.shape) if isinstance(lifted, Tensor) else type(lifted).__name__
        raise ValueError(
            f"observables gave {got} for rows of shape {tuple(rows.shape)}; it must give one row of "
            "values per sample"
        )
    if not bool(torch.isfinite(lifted).all()):
        raise ValueError(
            f"observables gave NaN or infinity for rows of shape {tuple(rows.shape)}; let it give "
            "finite values"
        )
    return lifted.detach().double()


def check_observables(observables: Any) -> None:
    """Refuse a lift that does not exist."""
    if observables is not None and observables not in LIFTS and not callable(observables):
        raise ValueError(
            f"observables is {observables!r}; choose one of {LIFTS}, give a callable from rows to rows, "
            "or leave it out"
        )
