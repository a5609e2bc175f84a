"""What a user may choose of how the numbers are made, checked once and carried as one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_koopman.koopman.lifts import Observables, check_observables
from lightning_koopman.koopman.regression import check_tikhonov
from lightning_koopman.network.rows import ReduceOption, check_reduce

Normalize = Literal["none", "rms", "whiten"]
"""Coordinates of every state: as they are, each unit over its standard deviation, or whitened."""


@dataclass(frozen=True)
class Options:
    """How states become rows, and rows become credits.

    Attributes:
        rank: Most output directions to align; ``None`` takes all that reach back to the input.
        tikhonov: Ridge weight in units of the regressors' mean variance; ``None`` picks one per step.
        normalize: Coordinates of every state.
        targets: Output units of interest; ``None`` takes the leading POD directions of the output.
        delay: How many earlier states each operator sees at least.
        folds: Number of folds for held-out R² and error bars.
        max_dim: States wider than this are pooled and projected on their leading POD directions.
        reduce: What becomes of spatial and sequence axes.
        output: What the chain ends with: a module's name, or a callable from what the model returns.
        observables: Lift of every state but the last.
        seed: Chooses the folds and the random features.
        errors: Whether standard errors are computed; without them each is NaN.
    """

    rank: int | None = None
    tikhonov: float | None = None
    normalize: Normalize = "none"
    targets: Sequence[int] | None = None
    delay: int = 1
    folds: int = 5
    max_dim: int = 256
    reduce: ReduceOption = "pool"
    output: str | Callable[[Any], Any] | None = None
    observables: Observables = None
    seed: int = 0
    errors: bool = True

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"folds is {self.folds}; held-out R² needs at least 2")
        if isinstance(self.delay, bool) or not isinstance(self.delay, int) or self.delay < 1:
            raise ValueError(f"delay is {self.delay!r}; it must be an integer of 1 or above")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}; at least one output direction must be aligned")
        if self.max_dim < 1:
            raise ValueError(f"max_dim is {self.max_dim}; a state vector needs at least one value")
        check_tikhonov(self.tikhonov)
        if self.normalize not in get_args(Normalize):
            raise ValueError(f"normalize is {self.normalize!r}; choose one of {get_args(Normalize)}")
        if self.targets is not None and self.normalize == "whiten":
            raise ValueError(
                f"targets is {list(self.targets)}, but normalize='whiten' mixes the output's units; "
                "choose 'none' or 'rms'"
            )
        check_reduce(self.reduce)
        check_observables(self.observables)


DEFAULTS = Options()
