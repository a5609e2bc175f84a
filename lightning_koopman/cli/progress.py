"""How far a long piece of work has come, for a person at a terminal."""

from __future__ import annotations

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _RateColumn(ProgressColumn):
    """How many are done a minute, as soon as the first is."""

    def render(self, task: Task) -> Text:
        return Text(
            "" if not task.speed else f"{60 * task.speed:.1f} a minute", style="progress.data.speed"
        )


COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    _RateColumn(),
    TimeRemainingColumn(),
)
"""What a progress bar shows."""
