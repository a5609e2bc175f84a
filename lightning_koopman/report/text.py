"""Tables for a terminal: those that fit themselves to its width, and any of them as plain text."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.constrain import Constrain
from rich.jupyter import JupyterMixin
from rich.markup import escape
from rich.table import Table
from rich.text import Text

EMPTY_DRIFT = (
    "drift: empty where a state was brought to other directions before, or what is read and given is "
    "constant."
)

_WORDS = ("doubt", "type", "holds", "run")
_LONGEST_NAME = 28
_LEAST_WIDTH = 78
_MOST_PLACES = 4


@dataclass(frozen=True)
class Fitted:
    """A table that fits the screen without cutting anything; lines stand below it.

    Attributes:
        title: Above the table.
        columns: Cells by heading; the first column names the rows.
        gives_way: Headings in the order in which columns go where the screen is narrow. What does not
            fit even then stands in a further table below.
        styles: One per row.
        lines: Rich's markup below the table, wrapped to its width.
        grey: By heading, whether each cell is in doubt.
    """

    title: str
    columns: Mapping[str, Sequence[str]]
    gives_way: Sequence[str] = ()
    styles: Sequence[str | None] = ()
    lines: Sequence[str] = ()
    grey: Mapping[str, Sequence[bool]] = field(default_factory=dict)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Drop or move columns until the rest fits, then wrap the lines to its width."""
        names, *kept = self.columns
        gone = list(self.gives_way)
        while gone and self._width([names, *kept]) > options.max_width:
            kept = [name for name in kept if name != gone[0]]
            gone.pop(0)
        longest = max(map(cell_len, self.title.splitlines()))
        widest = max(longest, _LEAST_WIDTH)
        first = True
        while kept:
            shown = [names, kept.pop(0)]
            while kept and self._width([*shown, kept[0]]) <= options.max_width:
                shown.append(kept.pop(0))
            width = self._width(shown)
            if first:
                title = Text.from_markup(self.title, style="table.title", justify="center")
                yield Constrain(title, min(options.max_width, max(width, longest)))
            first, widest = False, max(widest, width)
            yield self._table(shown)
        if self.lines:
            text = Text.from_markup("\n".join(self.lines), style="table.caption")
            yield Constrain(text, min(options.max_width, widest))

    def _width(self, headings: Sequence[str]) -> int:
        """Return how wide a table of some columns is; names and words may be folded."""
        return 1 + sum(2 + self._needs(heading) for heading in headings)

    def _needs(self, heading: str) -> int:
        cells = [heading, *self.columns[heading]]
        if heading in _WORDS:
            cells = [word for cell in cells for word in cell.split()]
        longest = max(map(cell_len, cells), default=0)
        return min(longest, _LONGEST_NAME) if heading == next(iter(self.columns)) else longest

    def _table(self, headings: Sequence[str]) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for place, heading in enumerate(headings):
            words = place == 0 or heading in _WORDS
            table.add_column(
                escape(heading),
                justify="left" if words else "right",
                overflow="fold",
                no_wrap=not words,
                min_width=self._needs(heading),
            )
        cells = [
            [f"[dim]{escape(cell)}[/]" if grey else escape(cell) for cell, grey in self._marked(heading)]
            for heading in headings
        ]
        styles = self.styles or [None] * len(cells[0])
        for row, style in zip(zip(*cells, strict=True), styles, strict=True):
            table.add_row(*row, style=style)
        return table

    def _marked(self, heading: str) -> Iterator[tuple[str, bool]]:
        cells = self.columns[heading]
        return zip(cells, self.grey.get(heading) or [False] * len(cells), strict=True)


class Shown(JupyterMixin):
    """What rich shows as a table, in notebooks, too; its text is that table."""

    def __str__(self) -> str:
        return as_text(self)


def counted(count: int, noun: str) -> str:
    """Return a number of things, of which there may be one."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def as_text(table: Any) -> str:
    """Render what rich can print as plain text."""
    file = io.StringIO()
    Console(file=file, width=130, color_system=None).print(table)
    return file.getvalue().rstrip()


def with_places(value: float, places: int = 4) -> str:
    """Return a number as text with so many places, or few digits where it is large; nothing for NaN."""
    if math.isnan(value):
        return ""
    # Adding zero takes the sign off what is rounded to it.
    return f"{round(value, places) + 0.0:.{places}f}" if abs(value) < 1e4 else f"{value:.3g}"


def with_share(value: float, error: float) -> str:
    """Return an effect as text, with its standard error as a share of it; nothing for NaN."""
    if math.isnan(value):
        return ""
    share = f"±{error / value:.0%}" if value > 0 and math.isfinite(error) else ""
    return f"{value:.2g}{share}"


def with_error(value: float, error: float, sign: str = "±") -> str:
    """Return a number with its standard error, both rounded to the first two digits of the error."""
    if not math.isfinite(value):
        return ""
    if not math.isfinite(error):
        return f"{value:.2g}"
    if error <= 0:
        return f"{value:.3g}{sign}0"
    places = 1 - int(f"{error:.1e}".partition("e")[2])
    small = abs(value) < 1e-3
    if places > _MOST_PLACES and (small or error < 0.5 * 10**-_MOST_PLACES):
        return f"{round(value, places):.{2 if small else 5}g}{sign}{error:.0e}"
    places = min(places, _MOST_PLACES)
    shown = max(places, 0)
    return f"{round(value, places) + 0.0:.{shown}f}{sign}{round(error, places):.{shown}f}"
