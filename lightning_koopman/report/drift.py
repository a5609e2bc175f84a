"""Which components compute something else than a reference did; pure arithmetic and its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape

from lightning_koopman.report.text import EMPTY_DRIFT, Fitted, Shown, counted, with_places

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_DEAD = 0.99e12
"""Drifts of outputs that no longer vary, up to rounding."""


@dataclass(frozen=True, eq=False)
class Drift(Shown):
    """How far each component is from what it computed when a reference was measured.

    All arrays are of shape ``(L,)``, one entry per component, in order of execution.

    Attributes:
        components: Names, in order of execution.
        drift: Share of the output's variance that the reference's operator leaves unexplained, less the
            share that an operator fitted to the new states leaves. 1e12 stands for an output that no
            longer varies, NaN for what cannot be told: that of a component which reads nothing else, or
            which always was constant.
        stderr: Standard errors of the drift (paired jackknife).
        changed: Whether the drift is above 0 beyond error. Where nothing changed, no component at all
            is marked in 95 % of the networks.
        old: Share of variance that the reference's operator leaves unexplained.
        new: Share that an operator fitted to the new states leaves.
        n_samples: Number of new samples.
        step: Training step of the new weights, if known.
        since: Training step of the reference, if known.
        parts: By component, the module calls that it is made of.
        enough: How many samples states of these widths need.
        moved: How far the mean of the network's input is from the reference's, over the root of its
            variance; 0 where other samples may differ as much.
        widened: How many times as large that root is as the reference's; 1 where other samples may
            differ as much.
        reference_samples: Number of samples that the reference rests on.
    """

    components: tuple[str, ...]
    drift: NDArray[np.float64]
    stderr: NDArray[np.float64]
    changed: NDArray[np.bool_]
    old: NDArray[np.float64]
    new: NDArray[np.float64]
    n_samples: int
    step: int | None = None
    since: int | None = None
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    enough: int = 0
    moved: float = 0.0
    widened: float = 1.0
    reference_samples: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes drift too small, so that a change may be missed, or marks what did not change."""
        notes = []
        # On samples that they have seen, old operators leave less than new ones do on those held out.
        seen = (self.drift < -5 * self.stderr) & (self.drift < -0.1 * self.new)
        if self.n_samples < self.enough:
            notes.append(
                f"{self.n_samples} samples are few for states this wide, and make drift too small; take "
                f"{self.enough} or more"
            )
        elif seen.any() and 2 * seen.sum() >= (~self.changed).sum():
            notes.append(
                "the reference explains more than operators fitted to these samples do, so it has seen "
                "them, rounded otherwise, and drift is too small; take the same bits (precision, "
                "preprocessing), or other samples"
            )
        if 0 < self.reference_samples < min(self.enough, self.n_samples) and self.changed.any():
            notes.append(
                f"the reference rests on {self.reference_samples} samples, few for states this wide, "
                f"and components may be marked for that; measure it on {self.enough} or more"
            )
        if self.moved and self.changed.any():
            notes.append(
                f"the mean of the input is {self.moved:.2f} of its spread away from the reference's, "
                "and components may be marked for what they are given; to tell, take samples like those"
            )
        if self.widened != 1 and self.changed.any():
            notes.append(
                f"the spread of the input is {self.widened:.2g} times the reference's, and components "
                "may be marked for what they are given; to tell, take samples like those"
            )
        return tuple(notes)

    @property
    def suspicion(self) -> NDArray[np.float64]:
        """Drift over what is in doubt anyway, shape ``(L,)``: where to look first, largest first.

        In doubt are what even a new operator leaves unexplained, the drift's own error, and 3 % of the
        variance. So a block that adds little to a large stream is not hidden by one whose output hardly
        any linear operator explains.
        """
        doubt: NDArray[np.float64] = np.maximum(self.new, 0) + self.stderr + 0.03
        return self.drift / doubt

    @property
    def culprit(self) -> str | None:
        """Name of the changed component under the most suspicion; ``None`` where none changed."""
        if not self.changed.any():
            return None
        return self.components[int(np.where(self.changed, self.suspicion, -np.inf).argmax())]

    @property
    def verdict(self) -> str:
        """What was found and what to do next, in one sentence or two."""
        count = int(self.changed.sum())
        if (culprit := self.culprit) is None:
            return (
                f"No component changed beyond error on {self.n_samples} samples. If you expect that one "
                "did, measure on more samples."
            )
        also = f", {count - 1} more changed too" if count > 1 else ""
        modules = [name for name in self.parts.get(culprit, ()) if name != culprit]
        made_of = f" (modules {', '.join(modules)})" if modules else ""
        if self.drift[self.components.index(culprit)] >= _DEAD:
            made_of += ", whose output no longer varies,"
        return (
            f"Look at {culprit}{made_of} first{also}. Compare its weights with the reference's "
            "checkpoint, or put them back and measure again."
        )

    def to_frame(self) -> DataFrame:
        """Return the drift as a pandas table.

        Returns:
            One row per component: the component, its drift with standard error, whether it changed, the
            shares of variance that the old and a new operator leave, and the suspicion.
        """
        import pandas

        names = ("drift", "stderr", "changed", "old", "new", "suspicion")
        return pandas.DataFrame({
            "component": list(self.components),
            **{name: getattr(self, name) for name in names},
        })

    def plot(self, ax: Any = None) -> tuple[Figure, Any]:
        """Draw the drift of every component with two standard errors.

        Args:
            ax: Matplotlib axes to draw on; ``None`` makes a figure.

        Returns:
            The figure and its axes.
        """
        from lightning_koopman.report.drawing import plot_drift, visible

        return plot_drift(self, visible(ax))

    def __rich__(self) -> Fitted:
        since = "" if self.since is None else f" since step {self.since}"
        at = "" if self.step is None else f" at step {self.step}"
        changed = ["yes" if mark else "" for mark in self.changed]
        if (culprit := self.culprit) is not None:
            changed[self.components.index(culprit)] = "first"
        pairs = zip(self.drift, self.stderr, strict=True)
        return Fitted(
            title=f"Drift{at}{since}, {self.n_samples} samples: share of the output's variance",
            columns={
                "component": self.components,
                "drift": [
                    f"{with_places(value)}±{with_places(error)}" if np.isfinite(value) else ""
                    for value, error in pairs
                ],
                "left by old": [with_places(value) for value in self.old],
                "left by new": [with_places(value) for value in self.new],
                "suspicion": [with_places(value, 3) for value in self.suspicion],
                "changed": changed,
            },
            gives_way=("left by new", "left by old", "suspicion"),
            styles=["bold" if mark == "first" else None for mark in changed],
            lines=[
                *([] if np.isfinite(self.drift).all() else [EMPTY_DRIFT]),
                *(f"Note: {note}" for note in self.notes),
                escape(self.verdict),
            ],
        )

    def __repr__(self) -> str:
        count, culprit = counted(len(self.components), "component"), self.culprit
        first = "" if culprit is None else f", first {culprit!r}"
        return f"Drift({count}, {self.changed.sum()} changed{first})"
