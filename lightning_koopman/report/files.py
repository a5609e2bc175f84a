"""Files of several reports: written whole or not at all, read with every field checked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence

from lightning_koopman.report.report import CreditReport
from lightning_koopman.report.saved import ReportFormatError, read_json, whole_file


def write_reports(reports: Sequence[CreditReport], path: str | os.PathLike[str]) -> None:
    """Write reports as a JSON list, by a temporary file that is renamed when complete."""
    text = json.dumps([report.to_dict() for report in reports], indent=1, allow_nan=False)
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_reports(path: str | os.PathLike[str]) -> list[CreditReport]:
    """Read what :func:`write_reports` wrote."""
    given = read_json(path)
    if not isinstance(given, list):
        raise ReportFormatError(f"{os.fspath(path)} holds no list of reports")
    try:
        return [CreditReport.from_dict(item) for item in given]
    except ReportFormatError as error:
        raise ReportFormatError(f"{os.fspath(path)} holds no list of reports: {error}") from None


def merge_reports(paths: Iterable[str | os.PathLike[str]]) -> list[CreditReport]:
    """Put the reports of several shards in one list."""
    by_step: dict[tuple[str, int | None], tuple[str, CreditReport]] = {}
    for path in [os.fspath(name) for name in paths]:
        for report in read_reports(path):
            other = by_step.setdefault((report.run, report.step), (path, report))
            if {**other[1].to_dict(), "source": None} != {**report.to_dict(), "source": None}:
                raise ReportFormatError(
                    f"{other[0]} and {path} hold different reports{report.moment}; merge shards of "
                    "one evaluation only"
                )
    order = sorted(by_step, key=lambda key: (key[0], -1 if key[1] is None else key[1]))
    return [by_step[key][1] for key in order]
