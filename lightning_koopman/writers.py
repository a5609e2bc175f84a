"""Reports to loggers: scalars, layout, histograms, figures, table; nothing is computed here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_koopman.formats import to_markdown, to_rows
from lightning_koopman.report import CreditReport, check_quantities

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_TAGS = 200
"""Most scalar tags that are written unless the user asks for more."""

_BANDS = ("credit_low", "credit_high")
_TOTALS = ("total", "doubts", "overhead_s")

# A writer keeps only its last layout, so several monitors of one run must write theirs together.
_layouts: WeakKeyDictionary[Any, dict[str, dict[str, list[Any]]]] = WeakKeyDictionary()


class CreditWriter:
    """Writes a growing series of reports to any loggers, at steps that the caller chooses.

    Scalars and hyperparameters go to every logger. Figures, tables and texts go where the logger takes
    them: TensorBoard, Weights & Biases and MLflow are recognised by their methods, so that both
    Lightning namespaces and a bare ``SummaryWriter`` in an :class:`EventFile` work alike. Figures are
    drawn at the 1st, 2nd, 4th, 8th … report and at the end: TensorBoard keeps ten images a tag, and
    drawing costs more than measuring a small network does.

    Args:
        prefix: First part of every key.
        quantities: Which arrays are written; if credit is among them, so are the edges of its error
            band.
        top_k: Write scalars of the ``k`` components with the largest credit in the first report;
            ``None`` writes all, up to :data:`MOST_TAGS` tags.
        figures: Whether to draw figures, histograms and the closing table.
        layout: Whether to write TensorBoard's custom-scalars layout.

    Attributes:
        shown: Components whose scalars are written; chosen at the first report, then fixed.

    Raises:
        ValueError: If a quantity is unknown or ``top_k`` is below 1.
    """

    def __init__(
        self,
        prefix: str = "koopman",
        quantities: Sequence[str] = ("credit", "gain", "nonlinearity"),
        *,
        top_k: int | None = None,
        figures: bool = True,
        layout: bool = True,
    ) -> None:
        check_quantities(quantities)
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; at least one component must be written")
        self.prefix, self.quantities, self.top_k = prefix, tuple(quantities), top_k
        self.figures, self.layout = figures, layout
        self.shown: tuple[str, ...] = ()
        self._written = 0
        self._newest_drawn = False

    def draw(self, loggers: Sequence[Any], reports: Sequence[CreditReport], step: int) -> None:
        """Write layout, histograms and, when due, figures of the newest report.

        Args:
            loggers: Where to.
            reports: All reports so far, the newest last.
            step: Step on the loggers' axis.
        """
        self._choose(reports[-1])
        self._written += 1
        self._newest_drawn = self._written & (self._written - 1) == 0
        for logger in loggers:
            if self.layout:
                self._lay_out(logger)
            if self.figures:
                self._write_histograms(logger, reports[-1], step)
        if self.figures and self._newest_drawn:
            self._draw(loggers, reports, step)

    def scalars(self, report: CreditReport, overhead_s: float | None = None) -> dict[str, float]:
        """Give the flat numbers that every logger takes.

        Args:
            report: The report.
            overhead_s: Seconds that measuring has cost; ``None`` leaves the entry out.

        Returns:
            ``{prefix}/{quantity}/{component}`` to number, for the components shown, and the totals.
        """
        self._choose(report)
        every = report.to_scalars(self.prefix, self.quantities)
        names = list(self.quantities)
        if "credit" in names:
            names += _BANDS
            edges = zip(report.components, report.credit, report.stderr["credit"], strict=True)
            for component, value, error in edges:
                every[f"{self.prefix}/credit_low/{component}"] = float(value - error)
                every[f"{self.prefix}/credit_high/{component}"] = float(value + error)
        wanted = [f"{self.prefix}/{name}/{component}" for name in names for component in self.shown]
        kept = {key: every[key] for key in wanted if key in every}
        if report.effects is not None:
            for component, share in zip(report.components, report.influence, strict=True):
                if component in self.shown:
                    kept[f"{self.prefix}/influence/{component}"] = float(share)
        kept[f"{self.prefix}/total"] = report.total
        kept[f"{self.prefix}/doubts"] = float((~report.trusted).sum())
        if overhead_s is not None:
            kept[f"{self.prefix}/overhead_s"] = overhead_s
        return kept

    def finish(self, loggers: Sequence[Any], reports: Sequence[CreditReport], step: int) -> None:
        """Write the final figures and the closing table.

        Args:
            loggers: Where to.
            reports: All reports, the newest last.
            step: Step on the loggers' axis.
        """
        if not self.figures or not reports:
            return
        if not self._newest_drawn:
            self._draw(loggers, reports, step)
        for logger in loggers:
            _write_table(logger, f"{self.prefix}/report", reports[-1], step)

    def log_options(
        self, loggers: Sequence[Any], options: Mapping[str, Any], known: Mapping[str, Any]
    ) -> None:
        """Log the options of a measurement as hyperparameters.

        Args:
            loggers: Where to.
            options: Name to value.
            known: Hyperparameters that the run logs anyway. TensorBoard reads only the first set of a
                run, so both must arrive together.
        """
        ours = {f"{self.prefix}/{name}": _simple(value) for name, value in options.items()}
        for logger in loggers:
            logger.log_hyperparams({**known, **ours})

    def _choose(self, report: CreditReport) -> None:
        """Fix once which components get scalars, and say so where the limit leaves some out."""
        if self.shown and set(self.shown) <= set(report.components):
            return
        each = len(self.quantities) + len(_BANDS) * ("credit" in self.quantities)
        each += report.effects is not None
        limit = max(1, (MOST_TAGS - len(_TOTALS)) // each) if self.top_k is None else self.top_k
        size = len(report.components)
        order = np.argsort(-np.nan_to_num(report.credit, nan=-np.inf), kind="stable")[:limit]
        self.shown = tuple(report.components[i] for i in sorted(order))
        if self.top_k is None and limit < size:
            rank_zero_warn(
                f"{size} components with {each} numbers each would make {size * each} tags, more than "
                f"{MOST_TAGS}; scalars are written of the {limit} with the largest credit now, figures "
                f"and reports hold all. Set top_k={size} to write all, or name components.",
                stacklevel=4,
            )

    def _lay_out(self, logger: Any) -> None:
        experiment: Any = getattr(logger, "experiment", None)
        if not hasattr(experiment, "add_custom_scalars"):
            return
        layouts = _layouts.setdefault(experiment, {})
        if self.prefix in layouts:
            return
        joined = getattr(logger, "_prefix", "") or ""
        joined = f"{joined}{logger.LOGGER_JOIN_CHAR}{self.prefix}" if joined else self.prefix
        charts = {
            f"{name}, all components": ["Multiline", [f"{re.escape(joined)}/{re.escape(name)}/"]]
            for name in self.quantities
        }
        layouts[self.prefix] = charts
        if "credit" in self.quantities:
            layouts[f"{self.prefix}: credit ± standard error"] = {
                f"credit of {name}": [
                    "Margin",
                    [f"{joined}/{part}/{name}" for part in ("credit", *_BANDS)],
                ]
                for name in self.shown
            }
        experiment.add_custom_scalars(layouts)

    def _write_histograms(self, logger: Any, report: CreditReport, step: int) -> None:
        experiment: Any = getattr(logger, "experiment", None)
        if not hasattr(experiment, "add_histogram"):
            return
        arrays = {name: getattr(report, name) for name in ("credit", "gain", "nonlinearity")}
        arrays["credit by direction"] = report.volumes
        for name, values in arrays.items():
            finite = np.clip(values[np.isfinite(values)], -1e19, 1e19)  # the outermost bins
            if finite.size:
                experiment.add_histogram(f"{self.prefix}/{name}", finite, step)

    def _draw(self, loggers: Sequence[Any], reports: Sequence[CreditReport], step: int) -> None:
        accepted = [show for logger in loggers if (show := _figure_sink(logger)) is not None]
        if not accepted:
            return
        from lightning_koopman.plots import plot_directions, plot_evolution, plot_report, plot_spectra

        newest = reports[-1]
        alike = [report for report in reports if report.components == newest.components]
        figures = {"evolution": plot_evolution(alike), "credits": plot_report(newest)}
        if newest.directions:
            figures["directions"] = plot_directions(newest)
        if newest.operators:
            figures["spectra"] = plot_spectra(newest)
        for name, figure in figures.items():
            for show in accepted:
                show(f"{self.prefix}/{name}", figure, step)


class EventFile:
    """A TensorBoard event file with the few methods of a Lightning logger that a writer calls.

    Args:
        logdir: Folder for the file.
    """

    def __init__(self, logdir: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.experiment = SummaryWriter(logdir)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write scalars.

        Args:
            metrics: Tag to number.
            step: Where on the axis.
        """
        for name, value in metrics.items():
            self.experiment.add_scalar(name, value, step)
        self.experiment.flush()

    def close(self) -> None:
        """Close the file."""
        self.experiment.close()


def _figure_sink(logger: Any) -> Callable[[str, Figure, int], None] | None:
    """Find how a logger takes figures, if it does."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):
        return lambda tag, figure, step: experiment.add_figure(tag, figure, step)
    if hasattr(logger, "log_image"):
        return lambda tag, figure, step: logger.log_image(tag, [figure], step=step)
    if hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):
        return lambda tag, figure, step: experiment.log_figure(
            logger.run_id, figure, f"{tag}_{step:08d}.png"
        )
    return None


def _write_table(logger: Any, tag: str, report: CreditReport, step: int) -> None:
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_text"):
        experiment.add_text(tag, to_markdown(report), step)
    elif hasattr(logger, "log_table"):
        rows = to_rows(report)
        logger.log_table(
            tag, columns=list(rows[0]), data=[list(row.values()) for row in rows], step=step
        )
    elif hasattr(experiment, "log_text") and hasattr(logger, "run_id"):
        experiment.log_text(logger.run_id, to_markdown(report), f"{tag}.md")


def _simple(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
