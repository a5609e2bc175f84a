"""The numbers of a report, as what shows and saves them reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_koopman.koopman.operator import KoopmanOperator
from lightning_koopman.koopman.reference import Reference
from lightning_koopman.report.effects import Effects

MIN_R2 = 0.5
"""Below this held-out R², of its own operator or of the chain behind it, a component is marked."""

_SPEAK_AGAINST = {
    "credit": ("chain_r2", "ridge", "lost"),
    "gain": ("r2", "chain_r2", "lost"),
    "sensitivity": ("chain_r2", "ridge", "lost"),
    "nonlinearity": ("r2",),
    "r2": ("r2",),
}
"""By quantity, the doubts that are about it: credits come from the chain behind, gains also from the
component's own operator; in them, what ridge does to two credits cancels. docs/calibration-doubts.md
holds how often each is right."""


@dataclass(frozen=True, eq=False, repr=False)
class ReportFields:
    """Fields of :class:`lightning_koopman.CreditReport`, which says what each holds."""

    components: tuple[str, ...]
    credit: NDArray[np.float64]
    gain: NDArray[np.float64]
    nonlinearity: NDArray[np.float64]
    sensitivity: NDArray[np.float64]
    r2: NDArray[np.float64]
    chain_r2: NDArray[np.float64]
    rank: NDArray[np.float64]
    stderr: Mapping[str, NDArray[np.float64]]
    directions: int
    n_samples: int
    total: float
    total_stderr: float
    volumes: NDArray[np.float64]
    widths: tuple[int, ...]
    variance_kept: NDArray[np.float64]
    tikhonov: NDArray[np.float64]
    condition: NDArray[np.float64]
    stable: NDArray[np.bool_]
    notes: tuple[str, ...] = ()
    operators: Mapping[str, KoopmanOperator] = field(default_factory=dict)
    step: int | None = None
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folds: int = 5
    delay: int = 1
    run: str = ""
    source: Mapping[str, Any] = field(default_factory=dict)
    effects: Effects | None = None
    types: tuple[str, ...] = ()
    parameters: tuple[int, ...] = ()
    drift: NDArray[np.float64] | None = None
    reference: Reference | None = None

    @property
    def doubts(self) -> tuple[tuple[str, ...], ...]:
        """Reasons not to believe a component's numbers; an empty tuple where there are none.

        The words are ``r2`` (its own operator fits badly), ``chain_r2`` (the chain behind it does),
        ``ridge`` (the credit moves by more than half a nat, and its error, when the ridge weight moves
        tenfold, or what is read beside it tells the same) and ``lost`` (no output direction can be
        followed back to it).
        """
        marks = {
            "r2": ~(self.r2 >= MIN_R2),  # also where it is NaN
            "chain_r2": ~(self.chain_r2 >= MIN_R2),
            "lost": ~np.isfinite(self.credit),
            "ridge": np.isfinite(self.credit) & ~self.stable,
        }
        each = range(len(self.components))
        return tuple(tuple(word for word, marked in marks.items() if marked[i]) for i in each)

    def doubts_about(self, quantity: str) -> tuple[tuple[str, ...], ...]:
        """Return those of :attr:`doubts` that speak against one quantity, by component.

        Args:
            quantity: Name of an array, such as ``"credit"``.

        Returns:
            A tuple of words per component. Nothing speaks against chain R² and rank.
        """
        words = _SPEAK_AGAINST.get(quantity, ())
        return tuple(tuple(word for word in doubts if word in words) for doubts in self.doubts)

    @property
    def label(self) -> str:
        """Run and step as words to follow a noun, such as ``" of run a at step 10"``."""
        of_run = f" of run {self.run}" if self.run else ""
        return of_run + ("" if self.step is None else f" at step {self.step}")

    @property
    def trusted(self) -> NDArray[np.bool_]:
        """Whether nothing speaks against a component's numbers, shape ``(L,)``."""
        return np.array([not reasons for reasons in self.doubts])
