"""Reports as plain values and JSON; files are written completely or left as they were."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
"""Version of the saved form."""


class ReportFormatError(ValueError):
    """A file that should hold a report does not."""


def folder_of(path: str | os.PathLike[str]) -> Path:
    """Return the folder that a file is to be in, which must be there."""
    if not (folder := Path(path).parent).is_dir():
        raise FileNotFoundError(
            f"{os.fspath(path)} cannot be written, for there is no folder {folder}; make it first"
        )
    return folder


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """Yield a temporary file to write, which takes a file's place when the context ends."""
    folder_of(path)
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a file of JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ReportFormatError(
            f"{os.fspath(path)} is no text file; a report is a JSON file that evaluate or to_json wrote "
            "(evaluate --ckpt measures a checkpoint)"
        ) from None
    # A number of thousands of digits is a plain ValueError.
    except (ValueError, RecursionError) as error:
        name, told = os.fspath(path), str(error)
        if name.lower().endswith((".html", ".csv")):
            beside = Path(f"{name}.json")
            known = f", as {beside}" if beside.exists() else ""
            told = f"give the .json file that evaluate or to_json wrote{known}, not a page or a table"
        raise ReportFormatError(f"{name} is not JSON: {told}") from None


def to_plain(value: Any, leave_out: Collection[str] = ()) -> Any:
    """Return lists, dictionaries and numbers, with ``None`` for what is not finite."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: to_plain(part) for name, part in value.items() if name not in leave_out}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [to_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
