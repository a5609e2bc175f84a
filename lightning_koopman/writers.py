"""What of a growing series of reports loggers get, and when; nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_koopman.loggers import (
    BANDS,
    FREE_FOR_FIGURES,
    figure_sink,
    free_bytes,
    write_layout,
    write_table,
)
from lightning_koopman.report import CreditReport, check_quantities

MOST_TAGS = 200
"""Most scalar tags that are written unless the user asks for more."""

_TOTALS = ("total", "doubts", "overhead_s")


class CreditWriter:
    """Writes a growing series of reports to any loggers, at steps that the caller chooses.

    Scalars and hyperparameters go to every logger. Figures, tables and texts go where the logger takes
    them: TensorBoard, Weights & Biases and MLflow are recognised by their methods, so that both
    Lightning namespaces and an :class:`~lightning_koopman.loggers.EventFile` work alike. Figures are
    drawn at the 1st, 2nd, 4th, 8th … report and at the end: TensorBoard keeps ten images a tag, and
    drawing costs more than measuring a small network does.

    Args:
        prefix: First part of every key.
        quantities: Which arrays are written; if credit is among them, so are the edges of its error
            band.
        top_k: Write scalars of the ``k`` components with the largest credit in the first report;
            ``None`` writes all, up to :data:`MOST_TAGS` tags.
        figures: Whether to draw figures and the closing table.
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
        self._told_of_room = False

    def draw(self, loggers: Sequence[Any], reports: Sequence[CreditReport], step: int) -> None:
        """Write the layout and, when due, figures of the newest report.

        Args:
            loggers: Where to.
            reports: All reports so far, the newest last.
            step: Step on the loggers' axis.
        """
        self._choose(reports[-1])
        self._written += 1
        self._newest_drawn = self._written & (self._written - 1) == 0
        loggers = self._with_room(loggers)
        if self.layout:
            for logger in loggers:
                write_layout(logger, self.prefix, self.quantities, self.shown)
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
            names += BANDS
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
        loggers = self._with_room(loggers)
        if not self._newest_drawn:
            self._draw(loggers, reports, step)
        for logger in loggers:
            write_table(logger, f"{self.prefix}/report", reports[-1], step)

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

    def _with_room(self, loggers: Sequence[Any]) -> list[Any]:
        """Pick the loggers whose disk will not be filled by figures, which could end the training."""
        if not self.figures:
            return list(loggers)
        roomy = [logger for logger in loggers if free_bytes(logger) >= FREE_FOR_FIGURES]
        if len(roomy) < len(loggers) and not self._told_of_room:
            self._told_of_room = True
            rank_zero_warn(
                f"less than {FREE_FOR_FIGURES // 2**20} MiB are free where a logger writes, so it gets "
                "scalars only, and no figures",
                stacklevel=4,
            )
        return roomy

    def _choose(self, report: CreditReport) -> None:
        """Fix once which components get scalars, and say so where the limit leaves some out."""
        if self.shown and set(self.shown) <= set(report.components):
            return
        each = len(self.quantities) + len(BANDS) * ("credit" in self.quantities)
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

    def _draw(self, loggers: Sequence[Any], reports: Sequence[CreditReport], step: int) -> None:
        accepted = [show for logger in loggers if (show := figure_sink(logger)) is not None]
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


def _simple(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
