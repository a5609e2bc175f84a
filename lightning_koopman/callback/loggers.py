"""What loggers receive of a report: scalars, figures, a closing table, and TensorBoard's runs."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_warn
from numpy.typing import NDArray

from lightning_koopman.report.drift import Drift
from lightning_koopman.report.effects import KINDS
from lightning_koopman.report.pages import to_markdown
from lightning_koopman.report.report import CreditReport
from lightning_koopman.report.tables import GLOSSARY, to_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FREE_FOR_FIGURES = 64 * 2**20
"""Bytes that must be free where a logger writes; figures of a long training take some."""

MOST_TAGS = 200
"""Most scalar tags that are written; TensorBoard grows slow with thousands."""

BANDS = "_bands"
"""How the tag of a figure ends that shows a chart's numbers with their errors; it stands beside it."""

_TOTALS = ("total", "doubts", "overhead")

_LONGEST_RUN = 80

_UNIT_OF_EFFECTS = ", in nats of KL for class scores, else as share of the outputs' variance"

# By logger and folder, the writers of components' runs, which several monitors may share. They are in no
# object that users copy, for each has a thread.
_runs: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


class EventFile:
    """A TensorBoard event file with what :class:`CreditWriter` needs of a Lightning logger."""

    def __init__(self, logdir: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.experiment = SummaryWriter(logdir)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        for name, value in metrics.items():
            self.experiment.add_scalar(name, value, step)
        self.experiment.flush()


class CreditWriter:
    """Writes a growing series of reports to any loggers, at steps that the caller chooses.

    Scalars go to every logger, under a key per component. TensorBoard draws all curves of a run in one
    colour, so there each component is a run of its own below the logger's folder, numbered in order of
    execution, and all components share a chart per quantity. Figures, tables and texts go where the
    logger takes them: TensorBoard, Weights & Biases and MLflow are recognised by their methods, so that
    both Lightning namespaces and an :class:`EventFile` work alike.
    Figures are drawn at the 1st, 2nd, 4th, 8th … report, unless there is no time, and at the end:
    TensorBoard keeps ten images per tag, and drawing costs more than measuring a small network does.
    They show what its own charts do not: errors, and what may be done with each component. Other loggers
    have no chart of several components, and get one of the credits too.

    Attributes:
        names: What components may get scalars of: the credit, and ``more``: kinds of effects, and drift.
        shown: Components whose scalars are written; chosen at the first report, then fixed.
    """

    def __init__(
        self,
        prefix: str = "koopman",
        *,
        figures: bool = True,
        more: Sequence[str] = (),
    ) -> None:
        self.prefix, self.figures, self.names = prefix, figures, ("credit", *more)
        self.reset()

    def reset(self) -> None:
        """Begin a new run, with figures of its own."""
        self.shown: tuple[str, ...] = ()
        self._labels: dict[str, str] = {}
        self._written = 0
        self._newest_drawn = self._doubted = False
        self._warned_of_room = False

    def scalars(
        self, report: CreditReport, overhead: float | None = None, drift: Drift | None = None
    ) -> dict[str, float]:
        """Return the flat numbers that every logger takes."""
        self._choose(report)
        every = {**report.to_scalars(self.prefix, ["credit"]), **self.beside(report, drift)}
        kept = {key: value for key, value in every.items() if self._parted(key)[1] in self.shown}
        kept[f"{self.prefix}/total"] = report.total
        kept[f"{self.prefix}/doubts"] = float((~report.trusted).sum())
        if overhead is not None:
            kept[f"{self.prefix}/overhead"] = overhead
        return kept

    def write(self, logger: Any, scalars: Mapping[str, float], step: int) -> None:
        """Write what :meth:`scalars` gave, in TensorBoard each component's to a run of its own."""
        if not (self.figures and _holds_runs(logger)):
            logger.log_metrics(scalars, step=step)
            return
        self._doubted = self._doubted or bool(scalars.get(f"{self.prefix}/doubts"))
        plain, apart = {}, []
        for key, value in scalars.items():
            name, component = self._parted(key)
            if component in self._labels:
                # The last component's credit, 0 by definition, is no curve.
                if name != "credit" or value != 0:
                    apart.append((self._labels[component], name, value))
            elif name != "doubts" or self._doubted:
                plain[key] = value
        logger.log_metrics(plain, step=step)
        joined = getattr(logger, "_prefix", "") or ""
        joined = f"{joined}{logger.LOGGER_JOIN_CHAR}{self.prefix}" if joined else self.prefix
        runs = _runs.setdefault(logger, {})
        for label, name, value in apart:
            path = f"{logger.experiment.log_dir}/{self.prefix}/{label}"
            if path not in runs:
                runs[path] = type(logger.experiment)(path)
            runs[path].add_scalar(f"{joined}/{name}", value, step)
        for run in runs.values():
            run.flush()

    def _parted(self, key: str) -> tuple[str, str]:
        """Return what a key is about: a quantity, and the component if it is of one."""
        name, _, component = key.removeprefix(f"{self.prefix}/").partition("/")
        return name, component

    def beside(self, report: CreditReport, drift: Drift | None = None) -> dict[str, float]:
        """Return the effects and drifts of all components, as far as there are any."""
        found = {}
        if report.effects is not None:
            for kind, values in report.effects.values.items():
                for component, value in zip(report.effects.components, values, strict=True):
                    found[f"{self.prefix}/{kind}/{component}"] = float(value)
        if drift is not None:
            for component, value in zip(drift.components, drift.drift, strict=True):
                found[f"{self.prefix}/drift/{component}"] = float(value)
        return {key: value for key, value in found.items() if math.isfinite(value)}

    def draws_for(self, loggers: Sequence[Any]) -> bool:
        """Check whether any logger gets figures."""
        return self.figures and any(_figure_sink(logger) is not None for logger in loggers)

    @property
    def draws_next(self) -> bool:
        """Whether the next report may be drawn."""
        number = self._written + 1
        return self.figures and number & (number - 1) == 0

    def draw(
        self,
        loggers: Sequence[Any],
        reports: Sequence[CreditReport],
        step: int,
        drifts: Sequence[Drift] = (),
        *,
        figures: bool = True,
    ) -> None:
        """Write what the charts show and, when due and wanted, figures of the newest report."""
        self._choose(reports[-1])
        self._newest_drawn = figures and self.draws_next
        loggers = self._with_room(loggers)
        if self.figures and not self._written:
            for logger in loggers:
                self._write_words(logger, reports[-1], step)
        self._written += 1
        if self._newest_drawn:
            self._draw(loggers, reports, step, drifts)

    def finish(
        self,
        loggers: Sequence[Any],
        reports: Sequence[CreditReport],
        step: int,
        drifts: Sequence[Drift] = (),
    ) -> None:
        """Write the final figures and the closing table."""
        if not self.figures or not reports:
            return
        loggers = self._with_room(loggers)
        if not self._newest_drawn:
            self._draw(loggers, reports, step, drifts)
        for logger in loggers:
            _write_table(logger, f"{self.prefix}/report", reports[-1], step)

    @staticmethod
    def close(loggers: Sequence[Any]) -> None:
        """Close the runs of components; what is written later goes to new files."""
        with ExitStack() as runs:
            for logger in loggers:
                for run in _runs.pop(logger, {}).values():
                    runs.callback(run.close)

    def _choose(self, report: CreditReport) -> None:
        """Fix once which components get scalars, and warn where the limit leaves some out."""
        digits = len(str(len(report.components)))
        for place, component in enumerate(report.components, 1):
            name = re.sub(r"[^\w.+#-]", "_", component)[:_LONGEST_RUN]
            self._labels[component] = f"{place:0{digits}d}-{name}"
        if self.shown and set(self.shown) <= set(report.components):
            return
        each = len(self.names)
        limit = max(1, (MOST_TAGS - len(_TOTALS)) // each)
        size = len(report.components)
        order = np.argsort(-np.nan_to_num(report.credit, nan=-np.inf), kind="stable")[:limit]
        self.shown = tuple(report.components[i] for i in sorted(order))
        if limit < size:
            rank_zero_warn(
                f"{size} components with {each} numbers each would make {size * each} tags, more than "
                f"{MOST_TAGS}; scalars are written of the {limit} with the largest credit now, figures "
                "and reports hold all. Name components to choose.",
                stacklevel=4,
            )

    def _with_room(self, loggers: Sequence[Any]) -> list[Any]:
        """Return the loggers whose disk figures will not fill, which could end the training."""
        if not self.figures:
            return list(loggers)
        roomy = [logger for logger in loggers if free_bytes(logger) >= FREE_FOR_FIGURES]
        if len(roomy) < len(loggers) and not self._warned_of_room:
            self._warned_of_room = True
            rank_zero_warn(
                f"less than {FREE_FOR_FIGURES // 2**20} MiB are free where a logger writes, so it gets "
                "scalars only, and no figures",
                stacklevel=4,
            )
        return roomy

    def _write_words(self, logger: Any, report: CreditReport, step: int) -> None:
        """Write what each chart shows, where a logger is TensorBoard's."""
        experiment: Any = getattr(logger, "experiment", None)
        if not hasattr(experiment, "add_text"):
            return
        kinds = report.effects.kinds if report.effects else ()
        lines = ["Each component is a run of its own, numbered in order of execution.", ""]
        for name in dict.fromkeys((*self.names, *kinds, *_TOTALS)):
            unit = _UNIT_OF_EFFECTS if name in KINDS else ""
            lines.append(f"- **{self.prefix}/{name}**: {GLOSSARY[name]}{unit}.")
        lines += [
            "",
            "The credit of the last component is 0 by definition and not drawn.",
            "",
            f"From the second measurement with errors on, the images **{self.prefix}/…{BANDS}** show "
            "the same numbers in bands of two standard errors up and down: where two bands do not meet, "
            "the difference is beyond error.",
        ]
        experiment.add_text(f"{self.prefix}/charts", "\n".join(lines), step)

    def _draw(
        self,
        loggers: Sequence[Any],
        reports: Sequence[CreditReport],
        step: int,
        drifts: Sequence[Drift],
    ) -> None:
        sinks = [(each, show) for each in loggers if (show := _figure_sink(each)) is not None]
        if not sinks:
            return
        from lightning_koopman.report import plots

        newest = reports[-1]
        alike = [report for report in reports if report.components == newest.components]
        drawn = {"importance": plots.plot_importance(newest)}
        for name in self.names:
            if (course := plots.plot_course(name, alike, drifts)) is not None:
                drawn[f"{name}{BANDS}"] = course
        if not all(_holds_runs(logger) for logger, _ in sinks):
            drawn["evolution"] = plots.plot_evolution(alike)
        for logger, show in sinks:
            for name, (figure, _) in drawn.items():
                # Where components are runs, its chart of credits shows the same.
                if name != "evolution" or not _holds_runs(logger):
                    show(f"{self.prefix}/{name}", figure, step)


def _holds_runs(logger: Any) -> bool:
    """Check whether each component is a run of its own in what a logger writes."""
    experiment: Any = getattr(logger, "experiment", None)
    return isinstance(getattr(experiment, "log_dir", None), str) and hasattr(experiment, "add_scalar")


def _figure_sink(logger: Any) -> Callable[[str, Figure, int], None] | None:
    """Return what takes figures to a logger, if it takes any."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):
        return lambda tag, figure, step: experiment.add_image(
            tag, _pixels(figure), step, dataformats="HWC"
        )
    if hasattr(logger, "log_image"):
        return lambda tag, figure, step: logger.log_image(tag, [figure], step=step)
    if hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):
        return lambda tag, figure, step: experiment.log_figure(
            logger.run_id, figure, f"{tag}_{step:08d}.png"
        )
    return None


def _pixels(figure: Figure) -> NDArray[np.uint8]:
    """Draw a figure, ``(height, width, 3)``; a writer's own way to do so takes longer than drawing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _write_table(logger: Any, tag: str, report: CreditReport, step: int) -> None:
    """Write a report as a table, where a logger takes tables or texts."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_text"):
        experiment.add_text(tag, to_markdown(report), step)
    elif hasattr(logger, "log_table"):
        rows = to_rows(report)
        data = [list(row.values()) for row in rows]
        logger.log_table(tag, columns=list(rows[0]), data=data, step=step)
    elif hasattr(experiment, "log_text") and hasattr(logger, "run_id"):
        experiment.log_text(logger.run_id, to_markdown(report), f"{tag}.md")


def free_bytes(logger: Any) -> float:
    """Return how much room there is where a logger writes."""
    told = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
    if not isinstance(told, str | os.PathLike):
        return math.inf
    folder = Path(told).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
