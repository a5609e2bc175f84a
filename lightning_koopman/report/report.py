"""The frozen result of a measurement."""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from torch import Tensor

from lightning_koopman.koopman.credit import QUANTITIES, Credits, samples_needed
from lightning_koopman.koopman.moments import Layout
from lightning_koopman.report.effects import Effects
from lightning_koopman.report.fields import ReportFields
from lightning_koopman.report.saved import (
    FORMAT,
    ReportFormatError,
    read_json,
    to_plain,
    write_atomically,
)
from lightning_koopman.report.tables import credit_table, has_more, to_rows
from lightning_koopman.report.text import Shown, counted, with_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series


@dataclass(frozen=True, eq=False)
class CreditReport(Shown, ReportFields):
    """Credits of every component of one network over one set of samples.

    All arrays are float64 of shape ``(L,)``, one entry per component, in order of execution. Every log
    is natural, so credits and gains are in nats per direction.

    Attributes:
        components: Names, in order of execution.
        credit: How strongly the outputs answer to the component's output.
        gain: What the component itself contributes; sums to ``total``.
        nonlinearity: 1 - ``r2``: the share of variance lost if its operator replaced the component.
        sensitivity: Log of how far independent noise on the component's output moves the outputs.
        r2: Held-out R² of the component's operator.
        chain_r2: Held-out R² of the output predicted from the component's output.
        rank: Directions of the component's output that vary: above 1e-4 of their mean variance, those
            near it in part.
        stderr: Standard errors (jackknife, and the bias of a finite sample in quadrature), by the names
            of the seven arrays above.
        directions: Number r of aligned output directions.
        n_samples: Number of samples seen.
        total: Log-volume of the whole network, in nats per direction.
        total_stderr: Standard error of ``total``.
        volumes: log|R[j, j]| by component and output direction, shape ``(L, r)``; its row means are
            the credits.
        widths: Length of each component's state vector.
        variance_kept: Share of the output's variance, after pooling, that the state vector keeps.
        tikhonov: Ridge weight of each operator, in units of its regressors' mean variance.
        condition: Ratio of the largest to the smallest kept variance of each operator's regressors.
        stable: Whether the credit moves by no more than half a nat, or its error, when every ridge
            weight moves tenfold, and what is read beside the component does not tell the same.
        notes: What a reader must know: dropped directions, silent components, too few samples.
        operators: Koopman operator of each component; empty in a report read from JSON.
        step: Training step the weights belong to, if known.
        parts: By component, in order of execution, the module calls that it is made of, the last of
            which gives its output; also by those that one state joins.
        reads: By component, the states that its operator takes, the nearest first; empty in a report
            read from JSON.
        folds: Number of folds that the error bars rest on; their degrees of freedom are one less.
        delay: How many states before it each operator took at least.
        run: Name of the training among several; empty where there is one.
        source: What was measured, and how: the checkpoint's path, size and time of modification, and the
            options. Empty where the weights came from no file.
        effects: What altering each component does to the outputs, once
            ``dataclasses.replace(report, effects=component_effects(...))`` has filled it in.
        types: Class of the module of each component; empty where unknown.
        parameters: Number of parameters of each component; empty where unknown.
        drift: How far each component is from what it computed at the measurement before, in a training
            with the callback, see :class:`lightning_koopman.report.drift.Drift`; ``None`` elsewhere.
        reference: What :func:`lightning_koopman.drift` holds other weights or samples against; ``None``
            in a report read from JSON.
    """

    def to_scalars(
        self, prefix: str = "koopman", quantities: Sequence[str] = QUANTITIES
    ) -> dict[str, float]:
        """Flatten to what loggers take.

        Args:
            prefix: First part of every key.
            quantities: Which arrays; ``<name>_stderr`` gives an array's standard errors.

        Returns:
            ``{prefix}/{quantity}/{component}`` to number.

        Raises:
            ValueError: If a quantity is unknown.
        """
        check_quantities(quantities)
        scalars = {}
        for name in quantities:
            base = name.removesuffix("_stderr")
            values = self.stderr[base] if name != base else getattr(self, base)
            for component, value in zip(self.components, values, strict=True):
                scalars[f"{prefix}/{name}/{component}"] = float(value)
        return scalars

    def to_frame(self) -> DataFrame:
        """Return the report as a pandas table; pandas writes it as CSV, Parquet and much else.

        Returns:
            One row per component: the run, the step, the component, every quantity and its standard
            error, the effects where there are any, the width of the state and the doubts.
        """
        import pandas

        return pandas.DataFrame(to_rows(self))

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, with ``None`` for what is not finite.

        Returns:
            Everything but the operators.
        """
        return {"format": FORMAT, **to_plain(self, leave_out=("operators", "reads", "reference"))}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Write the report as JSON; numbers that are not finite become ``null``.

        Args:
            path: File to write, completely or not at all; ``None`` only returns the text.

        Returns:
            The text.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            with write_atomically(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> CreditReport:
        """Read a report back.

        Args:
            source: File written by :meth:`to_json`.

        Returns:
            The report, without operators.

        Raises:
            ReportFormatError: If the file is not such a report.
        """
        content = read_json(source)
        try:
            return cls.from_dict(content)
        except ReportFormatError as error:
            raise ReportFormatError(f"{os.fspath(source)} holds no report: {error}") from None

    @classmethod
    def from_dict(cls, given: Any) -> CreditReport:
        """Rebuild a report from :meth:`to_dict`, checking every field.

        Args:
            given: The dictionary.

        Returns:
            The report, without operators.

        Raises:
            ReportFormatError: If a field is missing, of the wrong kind or of the wrong length.
        """
        from lightning_koopman.report.schema import checked_fields

        fields = checked_fields(given)
        if fields["effects"] is not None:
            fields["effects"] = Effects(**fields["effects"])
        return cls(**fields)

    def save_reference(self, path: str | os.PathLike[str]) -> None:
        """Write what :func:`lightning_koopman.drift` needs of this network, in the safetensors format.

        The file holds operators, means, bases and names, no weights, no samples and nothing that could
        be run.

        Args:
            path: File to write, completely or not at all.

        Raises:
            ValueError: If the report holds no reference: one read from JSON has none, nor has one
                that was measured without errors.
        """
        from lightning_koopman.report.reference_file import write_reference

        if self.reference is None:
            raise ValueError(
                "the report holds no reference, for JSON and measurements without errors have none; "
                "save that of a report that was just measured (credit_report, or evaluate --reference)"
            )
        write_reference(self.reference, path)

    def plot(
        self, ax: Any = None, *, kind: Literal["importance", "credits"] = "importance"
    ) -> tuple[Figure, Any]:
        """Draw what each component is worth, the most first, coloured by what may be done with it.

        Args:
            ax: Matplotlib axes to draw on; ``None`` makes a figure.
            kind: ``"importance"`` draws the effect of leaving each component out, or its credit where no
                effects are known. ``"credits"`` draws credits, gains and R² side by side, on three axes.

        Returns:
            The figure and its axes.

        Raises:
            ValueError: If ``kind`` is another, or ``ax`` holds another number of axes.
        """
        from lightning_koopman.report.drawing import visible
        from lightning_koopman.report.plots import plot_importance, plot_report

        drawn = {"importance": plot_importance, "credits": plot_report}
        if kind not in drawn:
            raise ValueError(f"kind is {kind!r}; choose one of {tuple(drawn)}")
        return drawn[kind](self, visible(ax))

    def __getitem__(self, component: str) -> Series:
        if component not in self.components:
            close = difflib.get_close_matches(str(component), self.components, n=3, cutoff=0.4)
            meant = f"did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise KeyError(
                f"no component is called {component!r}; {meant or f'there are {self.components}'}"
            )
        return self.to_frame().set_index("component", drop=False).loc[component]

    def __iter__(self) -> Iterator[str]:
        return iter(self.components)

    def __len__(self) -> int:
        return len(self.components)

    def __repr__(self) -> str:
        step = "" if self.step is None else f"step {self.step}, "
        run = f"run {self.run}, " if self.run else ""
        total = with_error(self.total, self.total_stderr, " ± ") or "unknown"
        size = counted(len(self), "component")
        return f"CreditReport({size}, {run}{step}{self.n_samples} samples, total {total})"

    def __rich__(self) -> RenderableType:
        table = credit_table(self)
        return Group(self.effects, table) if self.effects and has_more(self) else table


def check_quantities(quantities: Sequence[str]) -> None:
    """Check that reports hold quantities of these names."""
    known = [*QUANTITIES, *(f"{name}_stderr" for name in QUANTITIES)]
    if isinstance(quantities, str) or not isinstance(quantities, Collection):
        raise ValueError(f"quantities is {quantities!r}; give a list, with names out of {known}")
    unknown = [name for name in quantities if name not in known]
    if unknown:
        raise ValueError(f"unknown quantities {unknown}; choose from {known}")


def build_report(
    components: Sequence[str],
    credits: Credits,
    layout: Layout,
    *,
    n_samples: int,
    delay: int = 1,
    variance_kept: Sequence[float] | None = None,
    notes: Sequence[str] = (),
    step: int | None = None,
    enough: int | None = None,
) -> CreditReport:
    """Return the report that names the numbers of a chain, and say where the samples are few."""
    notes, needed = list(notes), samples_needed(layout)
    if n_samples < needed:
        advised = needed if enough is None else enough
        note = f"{n_samples} samples are few for states this wide; take {advised} or more"
        warnings.warn(note, stacklevel=3)
        notes.append(note)
    lost = [components[i - 1] for i in credits.lost if i > 0]
    if credits.lost:
        notes.append(
            f"{credits.alignment.rank} output directions reach back to the input; others "
            f"({_spans(credits.dropped)}) are lost at {', '.join(map(repr, lost)) or 'the input'} and "
            "were dropped"
        )
    if told := [components[i - 1] for i in credits.undetermined]:
        notes.append(
            f"states that are read beside {', '.join(map(repr, told))} tell the same, so that the ridge "
            "weight, not the data, says which of them counts: in doubt are its credit, its gain and "
            "that of what reads it"
        )
    values: dict[str, Any] = {name: _numpy(tensor) for name, tensor in credits.values.items()}
    return CreditReport(
        components=tuple(components),
        **values,
        stderr={name: _numpy(tensor) for name, tensor in credits.stderr.items()},
        directions=credits.alignment.rank,
        n_samples=n_samples,
        total=credits.total,
        total_stderr=credits.total_stderr,
        volumes=_numpy(credits.volumes),
        widths=tuple(operator.matrix.shape[1] for operator in credits.operators),
        variance_kept=np.array(variance_kept or [1.0] * len(components), dtype=np.float64),
        tikhonov=np.array([operator.tikhonov for operator in credits.operators]),
        condition=np.array([operator.condition for operator in credits.operators]),
        stable=credits.stable.cpu().numpy(),
        notes=tuple(notes),
        operators=dict(zip(components, credits.operators, strict=True)),
        step=step,
        folds=layout.folds,
        delay=delay,
    )


def _spans(numbers: Sequence[int]) -> str:
    """Write ascending runs short: 3, 5 to 9."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join(" to ".join(map(str, run)) for run in runs)


def _numpy(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().cpu().numpy().astype(np.float64)


REPORT = (CreditReport, "what credit_report returns, or CreditReport.from_json reads")
"""What is told of an argument that must be a report."""
