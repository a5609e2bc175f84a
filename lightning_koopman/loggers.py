"""What each kind of logger takes: figures, a layout of charts, a table."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lightning_koopman.formats import to_markdown
from lightning_koopman.report import CreditReport
from lightning_koopman.tables import to_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BANDS = ("credit_low", "credit_high")
"""Scalars at the edges of the credit's error band."""

FREE_FOR_FIGURES = 64 * 2**20
"""Bytes that must be free where a logger writes; figures of a long training take some."""

# A writer keeps only its last layout, so several monitors of one run must write theirs together.
_layouts: WeakKeyDictionary[Any, dict[str, dict[str, list[Any]]]] = WeakKeyDictionary()


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


def figure_sink(logger: Any) -> Callable[[str, Figure, int], None] | None:
    """Find how a logger takes figures, if it does.

    Args:
        logger: Any logger.

    Returns:
        What takes a tag, a figure and a step; ``None`` where figures are not taken.
    """
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


def write_layout(logger: Any, prefix: str, quantities: Sequence[str], components: Sequence[str]) -> None:
    """Write TensorBoard's custom-scalars layout once, where a logger takes one.

    Args:
        logger: Any logger.
        prefix: First part of every tag.
        quantities: Which numbers get a chart.
        components: Which components get a chart of their credit's error band.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if not hasattr(experiment, "add_custom_scalars"):
        return
    layouts = _layouts.setdefault(experiment, {})
    if prefix in layouts:
        return
    joined = getattr(logger, "_prefix", "") or ""
    joined = f"{joined}{logger.LOGGER_JOIN_CHAR}{prefix}" if joined else prefix
    layouts[prefix] = {
        f"{name}, all components": ["Multiline", [f"{re.escape(joined)}/{re.escape(name)}/"]]
        for name in quantities
    }
    if "credit" in quantities:
        layouts[f"{prefix}: credit ± standard error"] = {
            f"credit of {name}": ["Margin", [f"{joined}/{part}/{name}" for part in ("credit", *BANDS)]]
            for name in components
        }
    experiment.add_custom_scalars(layouts)


def write_table(logger: Any, tag: str, report: CreditReport, step: int) -> None:
    """Write a report as a table, where a logger takes tables or texts.

    Args:
        logger: Any logger.
        tag: Its tag.
        report: The report.
        step: Step on the logger's axis.
    """
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


def free_bytes(logger: Any) -> float:
    """Tell how much room there is where a logger writes.

    Args:
        logger: Any logger.

    Returns:
        Bytes; infinity where it does not tell a folder.
    """
    told = getattr(logger, "log_dir", None) or getattr(logger, "save_dir", None)
    if not isinstance(told, str | os.PathLike):
        return math.inf
    folder = Path(told).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
