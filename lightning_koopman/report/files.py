"""Files of reports: JSON to be read again, and tables and pages to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_koopman.report.pages import to_html
from lightning_koopman.report.report import CreditReport
from lightning_koopman.report.saved import ReportFormatError, read_json, to_plain, write_atomically

if TYPE_CHECKING:
    from pandas import DataFrame

Format = Literal["json", "csv", "html"]


def kind_of(path: str | os.PathLike[str], otherwise: Format = "json") -> Format:
    """Return what kind of file is meant by how its name ends."""
    by_ending: dict[str, Format] = {".json": "json", ".csv": "csv", ".html": "html"}
    return by_ending.get(Path(path).suffix.lower(), otherwise)


def write_table(table: DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table as JSON where the file's name ends so, else as CSV."""
    with write_atomically(path) as temporary:
        if kind_of(path, "csv") == "json":
            # to_json of pandas rounds to ten decimal places.
            rows = [to_plain(row) for row in table.to_dict("records")]
            temporary.write_text(json.dumps(rows, indent=1, allow_nan=False), encoding="utf-8")
        else:
            table.to_csv(temporary, index=False)


def write_reports(
    reports: Sequence[CreditReport], path: str | os.PathLike[str], otherwise: Format = "json"
) -> None:
    """Write reports to one file, of the kind that its name ends in."""
    kind = kind_of(path, otherwise)
    with write_atomically(path) as temporary:
        if kind == "csv":
            import pandas

            pandas.concat([report.to_frame() for report in reports]).to_csv(temporary, index=False)
        elif kind == "html":
            temporary.write_text(to_html(reports), encoding="utf-8")
        else:
            content = [report.to_dict() for report in reports]
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")


def read_reports(path: str | os.PathLike[str], *, may_be_empty: bool = True) -> list[CreditReport]:
    """Read a JSON file of one report or of a list of them."""
    try:
        content = read_json(path)
    except OSError as error:
        raise ReportFormatError(f"{os.fspath(path)} cannot be read: {error.strerror}") from None
    try:
        parts = content if isinstance(content, list) else [content]
        reports = [CreditReport.from_dict(part) for part in parts]
    except ReportFormatError as error:
        raise ReportFormatError(f"{os.fspath(path)} holds no report: {error}") from None
    if not (reports or may_be_empty):
        raise ReportFormatError(f"{os.fspath(path)} holds an empty list of reports")
    return reports


def merge_reports(paths: Iterable[str | os.PathLike[str]]) -> list[CreditReport]:
    """Return the reports of several shards as one list, by run and step."""
    # Files of one step, as last.ckpt and the one before it, have a report each.
    by_file: dict[tuple[str, int, str], tuple[str, CreditReport]] = {}
    for path in [os.fspath(name) for name in paths]:
        for report in read_reports(path):
            step = -1 if report.step is None else report.step
            key = report.run, step, os.path.basename(str(report.source.get("path")))
            first, other = by_file.setdefault(key, (path, report))
            if {**other.to_dict(), "source": None} != {**report.to_dict(), "source": None}:
                raise ReportFormatError(
                    f"{first} and {path} hold different reports{report.label}; merge shards of one "
                    "evaluation only"
                )
    return [by_file[key][1] for key in sorted(by_file)]


def write_with_known(reports: Sequence[CreditReport], path: str) -> None:
    """Write reports so that a second evaluation can take them over."""
    if (known := _known_file(path)) != path:
        write_reports(reports, known)
    if reports or known == path:
        write_reports(reports, path)


def read_known(path: str) -> list[CreditReport]:
    """Read what :func:`write_with_known` wrote."""
    known = _known_file(path)
    try:
        return read_reports(known) if os.path.exists(known) else []
    except ReportFormatError as error:
        raise ReportFormatError(
            f"{error}. Name another --out, or pass --fresh to replace the file"
        ) from None


def _known_file(path: str) -> str:
    """Return the JSON file that keeps the reports of a table or a page."""
    return path if kind_of(path) == "json" else f"{path}.json"
