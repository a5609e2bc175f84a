"""What altering each component does to the outputs: the result, its table and its figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape

from lightning_koopman.koopman.chain import jackknife
from lightning_koopman.network.arguments import check_type
from lightning_koopman.report.saved import to_plain
from lightning_koopman.report.text import Fitted, Shown, counted, with_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Kind = Literal["linear", "reinit", "weight_noise", "output_noise", "skip"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Ways to alter a component; replacements come on top, under names of their own."""


def check_kinds(effects: Any) -> None:
    """Refuse what names no kinds."""
    check_type((Collection, f"a list of some of {KINDS}, or () for none"), effects=effects)
    if odd := effects if isinstance(effects, str) else [kind for kind in effects if kind not in KINDS]:
        raise ValueError(f"effects is {odd!r}; give a list of some of {KINDS}, or () for none")


Scale = Literal["kl", "relative"]
"""What a change of the outputs is measured in: mean KL divergence in nats from the original to the
altered class distribution, or mean squared change over the outputs' variance."""

UNITS: Mapping[Scale, str] = {"kl": "KL in nats", "relative": "share of the outputs' variance"}

SATURATED = 0.5
"""Nats above which a prediction to second order still orders effects, but does not size them."""


@dataclass(frozen=True, eq=False)
class Effects(Shown):
    """What altering one component at a time, or a set of them together, does to the outputs.

    All arrays are float64, one entry per name in ``components``.

    Attributes:
        components: Names, in order of execution; after them the sets that were measured together.
        values: By kind of alteration, the change of the outputs; NaN where no gradient leads from the
            outputs to the component, it leads to other outputs alone, it cannot be altered so, or
            altered outputs are NaN.
        stderr: Standard errors of the values, by kind: over samples, which are taken as independent, and
            over draws where there are several; NaN where there is a single sample.
        how: By kind, ``"measured"`` or ``"predicted"``.
        scale: What changes are measured in, ``"kl"`` or ``"relative"``.
        n_samples: Samples that the effects rest on.
        strength: Standard deviation of noise, as a share of the parameters' or units' own.
        metric_before: Metric of the network as it is; NaN where there is none.
        metric: By kind that was measured, the metric of the altered network.
        metric_stderr: Standard errors of its difference from ``metric_before``: paired, over samples and
            draws as above; NaN where the metric is not the accuracy.
        predicted: By kind that was measured, the predicted effect, where both were asked for.
        predicted_stderr: Standard errors of what stands in ``predicted``.
        doubts: By kind, for each component the reasons not to believe the number: ``saturated`` (a
            prediction above half a nat orders, but does not size), ``samples`` (too few for the
            directions that a linear map has), ``leverage`` (single samples decide their own prediction),
            ``infinite`` (of the altered outputs some are NaN, infinite or beyond all numbers),
            ``gradient`` (none leads there), ``inputs`` (a linear map is of the first tensor that the
            component takes alone, though others vary too), ``outputs`` (the same of those that it
            gives), ``unsteady`` (the network answers differently when asked twice), ``elsewhere``
            (the component leads to other outputs alone, so there is no number) and ``refused`` (it
            cannot be altered in this way, as a note says, so there is none).
        sets: By name of a set that was measured together, its members.
        folds: By predicted kind, the number of samples of each fold.
        pairs: By predicted kind, each fold's part of the second-order effects H, shape
            ``(folds, L, L)``; the sum over folds has the effects on its diagonal.
        notes: What a reader must know.
    """

    components: tuple[str, ...]
    values: Mapping[str, NDArray[np.float64]]
    stderr: Mapping[str, NDArray[np.float64]]
    how: Mapping[str, str]
    scale: Scale
    n_samples: int
    strength: float = 0.3
    metric_before: float = math.nan
    metric: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    metric_stderr: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    predicted: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    predicted_stderr: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    doubts: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    sets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folds: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    pairs: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of alteration."""
        return tuple(self.values)

    @property
    def unit(self) -> str:
        """The unit in words."""
        return UNITS[self.scale]

    def of(self, components: str | Collection[str], kind: str) -> tuple[float, float]:
        """Return the effect of altering some components together.

        Of a single component and of a set that was measured together, that is what stands in
        ``values``. Of other sets, it is the second order: the sum of H over all pairs of the set.

        Args:
            components: Names of components; one alone may come as text.
            kind: One of :attr:`kinds`.

        Returns:
            The effect and its standard error. NaN for an alteration of weights that two of them share.

        Raises:
            ValueError: If a component or the kind is unknown, or the kind was not predicted and the set
                not measured.
        """
        self._check_kind(kind)
        names = {components} if isinstance(components, str) else set(components)
        if not names or (strangers := names - set(self.components)):
            raise ValueError(
                f"there are no effects of {sorted(strangers) if names else 'no component'}; there are "
                f"of {self.components}"
            )
        row = next((name for name, members in self.sets.items() if set(members) == names), None)
        if row is None and len(names) == 1:
            (row,) = names
        if row is not None:
            place = self.components.index(row)
            return float(self.values[kind][place]), float(self.stderr[kind][place])
        if kind not in self.pairs:
            raise ValueError(
                f"the effect {kind!r} of {sorted(names)} together was neither measured nor predicted; "
                "measure it with sets=[{...}], or predict the kind with how='predicted'"
            )
        places = [self.components.index(name) for name in names]
        return set_effect(self.pairs[kind], self.folds[kind], places)

    def spearman(self, kind: str) -> float:
        """Rank correlation over components between predicted and measured effect.

        Args:
            kind: One of :attr:`kinds`.

        Returns:
            Between -1 and 1; NaN where only one of both is there, or fewer than three components.

        Raises:
            ValueError: If the kind is unknown.
        """
        self._check_kind(kind)
        if kind not in self.predicted:
            return math.nan
        both = np.stack([self.values[kind], self.predicted[kind]])[
            :, : len(self.components) - len(self.sets)
        ]
        both = both[:, np.isfinite(both).all(axis=0)]
        if both.shape[1] < 3 or any(len(set(values)) < 2 for values in both):
            return math.nan
        from scipy.stats import spearmanr  # takes seconds to import

        return float(spearmanr(*both).statistic)

    def to_frame(self) -> DataFrame:
        """Return the effects as a pandas table, one row per component.

        Returns:
            The component, and for every kind the effect, the one predicted beside it and the change of
            the metric where there are any, each with its standard error, and the doubts; then the
            scale, the number of samples and the metric before.
        """
        import pandas

        rows = []
        for i, component in enumerate(self.components):
            row: dict[str, Any] = {"component": component}
            for kind in self.kinds:
                row[f"{self.how[kind]}_{kind}"] = float(self.values[kind][i])
                row[f"{self.how[kind]}_{kind}_stderr"] = float(self.stderr[kind][i])
                if kind in self.predicted:
                    row[f"predicted_{kind}"] = float(self.predicted[kind][i])
                    row[f"predicted_{kind}_stderr"] = float(self.predicted_stderr[kind][i])
                if kind in self.metric:
                    row[f"metric_change_{kind}"] = float(self.metric[kind][i] - self.metric_before)
                    row[f"metric_change_{kind}_stderr"] = float(self.metric_stderr[kind][i])
                row[f"doubt_{kind}"] = ", ".join(self.doubts_of(kind, i))
            row |= {"scale": self.scale, "n_samples": self.n_samples}
            if self.metric:
                row["metric_before"] = self.metric_before
            rows.append(row)
        return pandas.DataFrame(rows)

    def doubts_of(self, kind: str, component: int) -> tuple[str, ...]:
        """Return the reasons not to believe one number.

        Args:
            kind: One of :attr:`kinds`.
            component: Index of the component.

        Returns:
            The words that :attr:`doubts` explains; none where nothing speaks against it.
        """
        return self.doubts[kind][component] if kind in self.doubts else ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, with ``None`` for what is not finite.

        Returns:
            Every field.
        """
        return dict(to_plain(self))

    @classmethod
    def from_dict(cls, given: Any) -> Effects:
        """Rebuild effects from :meth:`to_dict`, checking every field.

        Args:
            given: The dictionary.

        Returns:
            The effects.

        Raises:
            ReportFormatError: If a field is missing, of the wrong kind or of the wrong length.
        """
        from lightning_koopman.report.schema import checked_effects

        return cls(**checked_effects(given))

    def plot(self, ax: Any = None, *, kind: str | None = None) -> tuple[Figure, Any]:
        """Draw the effects with their standard errors, one panel per kind.

        Args:
            ax: Matplotlib axes to draw on, as many as there are panels; ``None`` makes a figure.
            kind: One of :attr:`kinds`; ``None`` draws all.

        Returns:
            The figure, and its axes (an array where there are several): bars per component, or predicted
            against measured effects where both are known; grey bars carry a doubt.

        Raises:
            ValueError: If the kind is unknown, or ``ax`` holds another number of axes.
        """
        from lightning_koopman.report.drawing import plot_effects, visible

        if kind is not None:
            self._check_kind(kind)
        return plot_effects(self, visible(ax), None if kind is None else [kind])

    def __repr__(self) -> str:
        by_way = {
            way: [k for k, w in self.how.items() if w == way] for way in sorted({*self.how.values()})
        }
        how = "; ".join(f"{way} {', '.join(kinds)}" for way, kinds in by_way.items())
        count = counted(len(self.components) - len(self.sets), "component")
        return f"Effects({count}; {how}; {self.unit}, {self.n_samples} samples)"

    def __rich__(self) -> Fitted:
        columns: dict[str, list[str]] = {"component": []}
        columns |= {kind: [] for kind in self.kinds}
        styles: list[str | None] = []
        grey: dict[str, list[bool]] = {kind: [] for kind in self.kinds}

        def add(name: str, cells: Mapping[str, str], style: str | None) -> None:
            columns["component"].append(name)
            for kind in self.kinds:
                columns[kind].append(cells.get(kind, ""))
                grey[kind].append(columns[kind][-1].endswith("?"))
            styles.append(style)

        ways = sorted({*self.how.values()})
        if len(ways) > 1:
            add("", self.how, "dim")
        more = bool(self.predicted or self.metric)
        for i, component in enumerate(self.components):
            effects = {kind: self.cell(kind, i) for kind in self.kinds}
            add(component, effects, "bold" if more else None)
            if self.predicted:
                beside = {
                    k: with_share(v[i], self.predicted_stderr[k][i]) for k, v in self.predicted.items()
                }
                add("  predicted", beside, None)
            for name, numbers in (("  metric", self.metric), ("  ± of change", self.metric_stderr)):
                if any(np.isfinite(values[i]) for values in numbers.values()):
                    add(name, {kind: f"{values[i]:.3f}" for kind, values in numbers.items()}, "dim")
        ranks = {kind: rank for kind in self.kinds if not math.isnan(rank := self.spearman(kind))}
        if ranks:
            add("Spearman", {kind: f"{rank:.2f}" for kind, rank in ranks.items()}, None)
        heading = " and ".join(ways).capitalize()
        before = "" if math.isnan(self.metric_before) else f", metric {self.metric_before:.4f} as it was"
        return Fitted(
            f"{heading} effects of altering a component\n{self.n_samples} samples, {self.unit}{before}",
            columns,
            (),
            styles,
            [*_said_doubts(self), *(f"Note: {escape(note)}" for note in self.notes)],
            grey,
        )

    def cell(self, kind: str, component: int) -> str:
        """Return one effect as text, with its standard error as a share of it and a mark for a doubt.

        Args:
            kind: One of :attr:`kinds`.
            component: Index of the component.

        Returns:
            Such as ``0.12±4%``, or ``0.9±4%?`` where there is a doubt.
        """
        text = with_share(self.values[kind][component], self.stderr[kind][component])
        return text + "?" if text and self.doubts_of(kind, component) else text

    def _check_kind(self, kind: str) -> None:
        if kind not in self.values:
            raise ValueError(f"there are no effects of {kind!r}; there are of {self.kinds}")


def _said_doubts(effects: Effects) -> list[str]:
    """Return which doubts there are of which kinds, as a line."""
    kinds_of: dict[str, list[str]] = {}
    for kind, rows in effects.doubts.items():
        for word in dict.fromkeys(itertools.chain(*rows)):
            kinds_of.setdefault(word, []).append(kind)
    said = [escape(f"{word} ({', '.join(kinds)})") for word, kinds in kinds_of.items()]
    return [f"?: {', '.join(said)}"] if said else []


def with_folds(parts: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the parts of all folds, with a delete-one-fold jackknife error."""
    whole, count = parts.sum(dim=0), sizes.sum()
    told = (sizes > 0) & (sizes < count)
    # A fold's samples are left out of the outputs' variance, too, as if it were alike in all folds.
    grown = (count / (count - sizes[told])).view(-1, *[1] * whole.ndim)
    return whole, jackknife(whole, (whole - parts[told]) * grown, float(count), sizes[told])


def set_effect(
    pairs: NDArray[np.float64], folds: NDArray[np.float64], places: Sequence[int]
) -> tuple[float, float]:
    """Return the second-order effect of altering the components at some places together."""
    parts = torch.from_numpy(pairs[:, places][:, :, places].sum(axis=(1, 2)))
    value, stderr = with_folds(parts, torch.from_numpy(folds))
    return float(value), float(stderr)
