"""The frozen result: rows, text table, JSON, flat scalars."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lightning_koopman.credit import QUANTITIES, Credits
from lightning_koopman.operator import KoopmanOperator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_R2 = 0.5
"""Below this held-out R², of its own operator or of the chain behind it, a component is marked."""

_FORMAT = 1
_ARRAYS = (*QUANTITIES, "variance_kept", "tikhonov", "condition")


class ReportFormatError(ValueError):
    """A file that should hold a report does not."""


@dataclass(frozen=True, eq=False)
class CreditReport:
    """Credits of every component of one network over one set of samples.

    All arrays are float64 of shape ``(L,)``, one entry a component, in order of execution. Every log
    is natural, so credits and gains are in nats a direction.

    Attributes:
        components: Names, in order of execution.
        credit: How strongly the outputs answer to the component's output.
        gain: What the component itself contributes; sums to ``total``.
        nonlinearity: 1 - ``r2``: the share of variance lost if its operator replaced the component.
        sensitivity: Log of how far independent noise on the component's output moves the outputs.
        r2: Held-out R² of the component's operator.
        chain_r2: Held-out R² of the output predicted from the component's output.
        rank: Numerical rank of the component's output.
        stderr: Standard errors (jackknife, and the bias of a finite sample in quadrature), by the names
            of the seven arrays above.
        directions: Number r of aligned output directions.
        n_samples: Number of samples seen.
        total: Log-volume of the whole network, in nats a direction.
        total_stderr: Standard error of ``total``.
        volumes: log|R[j, j]| by component and output direction, shape ``(L, r)``; its row means are
            the credits.
        widths: Length of each component's state vector.
        variance_kept: Share of the output's variance, after pooling, that the state vector keeps, over
            the samples that fixed its basis.
        tikhonov: Ridge weight of each operator, in units of its regressors' mean variance.
        condition: Ratio of the largest to the smallest kept variance of each operator's regressors.
        stable: Whether the credit moves by no more than half a nat, or its error, when every ridge
            weight moves tenfold.
        notes: What a reader must know: dropped directions, silent components, too few samples.
        operators: Koopman operator of each component; empty in a report read from JSON.
        step: Training step the weights belong to, if known.
        parts: By state, in order of execution, the module calls that its component is made of, the last
            of which gives the state. A first state that is no component is x_0.
        reads: By component, the states that its operator takes, the nearest first; empty in a report
            read from JSON.
        folds: Number of folds that the error bars rest on; their degrees of freedom are one less.
        run: Name of the training among several; empty where there is one.
        source: What was measured, and how: the checkpoint's path, size and time of modification, and the
            options. Empty where the weights came from no file.
    """

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
    operators: Mapping[str, KoopmanOperator] = field(default_factory=dict, repr=False)
    step: int | None = None
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    folds: int = 5
    run: str = ""
    source: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def doubts(self) -> tuple[tuple[str, ...], ...]:
        """Why not to believe a component's numbers; an empty tuple where nothing speaks against them.

        The words are ``r2`` (its own operator fits badly), ``chain_r2`` (the chain behind it does),
        ``ridge`` (the credit moves by more than half a nat, and its error, when the ridge weight moves
        tenfold) and ``lost`` (no output direction can be followed back to it).
        """
        reasons = []
        for i, _ in enumerate(self.components):
            found = []
            if not self.r2[i] >= MIN_R2:
                found.append("r2")
            if not self.chain_r2[i] >= MIN_R2:
                found.append("chain_r2")
            if not math.isfinite(self.credit[i]):
                found.append("lost")
            elif not self.stable[i]:
                found.append("ridge")
            reasons.append(tuple(found))
        return tuple(reasons)

    @property
    def moment(self) -> str:
        """Run and step as words to follow a noun, such as ``" of run a at step 10"``."""
        of_run = f" of run {self.run}" if self.run else ""
        return of_run + ("" if self.step is None else f" at step {self.step}")

    @property
    def trusted(self) -> NDArray[np.bool_]:
        """Whether nothing speaks against a component's numbers, shape ``(L,)``."""
        return np.array([not reasons for reasons in self.doubts])

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

    def to_dict(self) -> dict[str, Any]:
        """Give plain Python values, with ``None`` for what is not finite.

        Returns:
            Everything but the operators.
        """
        return {
            "format": _FORMAT,
            "components": list(self.components),
            "widths": list(self.widths),
            **{name: _plain(getattr(self, name)) for name in (*_ARRAYS, "stable")},
            "stderr": {name: _plain(values) for name, values in self.stderr.items()},
            "volumes": _plain(self.volumes),
            "directions": self.directions,
            "n_samples": self.n_samples,
            "total": _plain(self.total),
            "total_stderr": _plain(self.total_stderr),
            "notes": list(self.notes),
            "step": self.step,
            "parts": {name: list(calls) for name, calls in self.parts.items()},
            "folds": self.folds,
            "run": self.run,
            "source": dict(self.source),
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Write the report as JSON; numbers that are not finite become ``null``.

        Args:
            path: File to write, whole or not at all; ``None`` only returns the text.

        Returns:
            The text.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            temporary = Path(f"{os.fspath(path)}.tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
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
        try:
            return cls.from_dict(json.loads(Path(source).read_text(encoding="utf-8")))
        except ReportFormatError as error:
            raise ReportFormatError(f"{os.fspath(source)} holds no report: {error}") from None
        # A number of thousands of digits is a plain ValueError.
        except (ValueError, RecursionError) as error:
            raise ReportFormatError(f"{os.fspath(source)} is not JSON: {error}") from None

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
        if not isinstance(given, dict) or given.get("format") != _FORMAT:
            raise ReportFormatError(f"expected an object with format {_FORMAT}")
        components = _checked_list(given, "components", str)
        size = len(components)
        if not size or len(set(components)) < size:
            raise ReportFormatError("components must be distinct names, at least one")
        stderr = given.get("stderr")
        if not isinstance(stderr, dict) or set(stderr) != set(QUANTITIES):
            raise ReportFormatError(f"stderr must hold {', '.join(QUANTITIES)}")
        directions, n_samples = _checked_int(given, "directions"), _checked_int(given, "n_samples")
        step = given.get("step")
        arrays: dict[str, Any] = {name: _array(given, name, (size,)) for name in _ARRAYS}
        arrays["stable"] = np.array(_checked_list(given, "stable", bool, size))
        return cls(
            components=tuple(components),
            widths=tuple(_checked_list(given, "widths", int, size)),
            **arrays,
            stderr={name: _array(stderr, name, (size,)) for name in QUANTITIES},
            volumes=_array(given, "volumes", (size, directions)),
            directions=directions,
            n_samples=n_samples,
            total=float(_array(given, "total", ())),
            total_stderr=float(_array(given, "total_stderr", ())),
            notes=tuple(_checked_list(given, "notes", str)),
            step=None if step is None else _checked_int(given, "step"),
            parts=_checked_parts(given.get("parts", {})),
            folds=_checked_folds(given.get("folds", 5)),
            run=_checked_run(given.get("run", "")),
            source=_checked_source(given.get("source", {})),
        )

    def plot(self) -> Figure:
        """Draw credits and gains with their error bars, and how far each row may be believed.

        Returns:
            A Matplotlib figure that no window manager knows of.
        """
        from lightning_koopman.plots import plot_report

        return plot_report(self)

    def __rich__(self) -> Table:
        table = Table(
            title=f"Koopman credit{escape(self.moment)}, {self.n_samples} samples\n"
            f"{self.directions} output directions, total {self.total:.3f} ± {self.total_stderr:.3f} "
            "nats a direction",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            caption="\n".join(self._caption()) or None,
            caption_justify="left",
        )
        table.add_column("component", overflow="fold", min_width=9)
        for name in ("credit", "gain", "nonlin.", "R²", "chain R²", "rank"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("doubt", min_width=5)
        for i, component in enumerate(self.components):
            table.add_row(
                escape(component),
                self._with_error("credit", i),
                self._with_error("gain", i),
                f"{self.nonlinearity[i]:.3f}",
                f"{self.r2[i]:.3f}",
                f"{self.chain_r2[i]:.3f}",
                f"{self.rank[i]:.0f}/{self.widths[i]}",
                ", ".join(self.doubts[i]),
                style="dim" if self.doubts[i] else None,
            )
        return table

    def __str__(self) -> str:
        return as_text(self)

    def _with_error(self, name: str, i: int) -> str:
        return f"{getattr(self, name)[i]:.3f}±{self.stderr[name][i]:.3f}"

    def _caption(self) -> list[str]:
        marked = int((~self.trusted).sum())
        doubt = (
            [f"{marked} of {len(self.components)} rows carry a doubt: do not act on them (README)."]
            if marked
            else []
        )
        return doubt + [f"Note: {escape(note)}" for note in self.notes]


def build_report(
    components: Sequence[str],
    credits: Credits,
    *,
    n_samples: int,
    variance_kept: Sequence[float] | None = None,
    notes: Sequence[str] = (),
    step: int | None = None,
    folds: int = 5,
) -> CreditReport:
    """Give the numbers of a chain their names.

    Args:
        components: Names, in order of execution.
        credits: The numbers.
        n_samples: Number of samples they rest on.
        variance_kept: Share of variance in each state vector; ``None`` means all.
        notes: Sentences for the reader.
        step: Training step the weights belong to.
        folds: Number of folds that the error bars rest on.

    Returns:
        The report.
    """
    notes = list(notes)
    lost = [components[i - 1] for i in credits.lost if i > 0]
    if credits.lost:
        notes.append(
            f"{credits.alignment.rank} output directions reach back to the input; others are lost at "
            f"{', '.join(map(repr, lost)) or 'the input'} and were dropped"
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
        folds=folds,
    )


def as_text(table: Any) -> str:
    """Render what rich can print as plain text.

    Args:
        table: The thing to print.

    Returns:
        Text of at most 130 columns, without colours.
    """
    file = io.StringIO()
    Console(file=file, width=130, color_system=None).print(table)
    return file.getvalue().rstrip()


def check_quantities(quantities: Sequence[str]) -> None:
    """Refuse names that no report holds.

    Args:
        quantities: Names of :data:`QUANTITIES`, with or without ``_stderr``.

    Raises:
        ValueError: If one is unknown.
    """
    known = [*QUANTITIES, *(f"{name}_stderr" for name in QUANTITIES)]
    if isinstance(quantities, str):
        raise ValueError(f"quantities is {quantities!r}; give a list, with names out of {known}")
    unknown = [name for name in quantities if name not in known]
    if unknown:
        raise ValueError(f"unknown quantities {unknown}; choose from {known}")


def _numpy(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().cpu().numpy().astype(np.float64)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.tolist()] if value.ndim else _plain(value.item())
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value if isinstance(value, bool) or math.isfinite(value) else None


def _checked_int(given: Mapping[str, Any], name: str) -> int:
    value = given.get(name)
    if type(value) is not int or value < 0:
        raise ReportFormatError(f"{name} must be a whole number, not {value!r}")
    return value


def _checked_list(given: Mapping[str, Any], name: str, kind: type, size: int | None = None) -> list[Any]:
    value = given.get(name)
    if not isinstance(value, list) or any(type(v) is not kind for v in value):
        raise ReportFormatError(f"{name} must be a list of {kind.__name__}")
    if size is not None and len(value) != size:
        raise ReportFormatError(f"{name} has {len(value)} entries for {size} components")
    return value


def _checked_parts(value: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise ReportFormatError(f"parts must name the module calls of each state, not {value!r}")
    return {name: tuple(_checked_list(value, name, str)) for name in value}


def _checked_folds(value: Any) -> int:
    if type(value) is not int or not 2 <= value < 10**9:
        raise ReportFormatError(f"folds must be a whole number from 2 on, not {value!r}")
    return value


def _checked_run(value: Any) -> str:
    if not isinstance(value, str):
        raise ReportFormatError(f"run must be a name, not {value!r}")
    return value


def _checked_source(value: Any) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ReportFormatError(f"source cannot be written again: {error}") from None
    if not isinstance(value, dict):
        raise ReportFormatError(f"source must tell a checkpoint and options, not {value!r}")
    return value


def _numeric(value: Any) -> bool:
    """NumPy would also read strings as numbers."""
    if isinstance(value, list):
        return all(map(_numeric, value))
    return value is None or type(value) in (int, float)


def _array(given: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    try:
        if not _numeric(given[name]):
            raise TypeError
        # float64 turns null into NaN.
        array = np.array(given[name], dtype=np.float64)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ReportFormatError(f"{name} is missing or not a table of numbers") from None
    if array.shape != shape and not (array.size == 0 and 0 in shape):
        raise ReportFormatError(f"{name} has shape {array.shape}; expected {shape}")
    return array.reshape(shape)
