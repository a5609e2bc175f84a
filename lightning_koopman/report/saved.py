"""Saves reports as JSON, whole or not at all, and checks what is read."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_koopman.koopman.credit import QUANTITIES
from lightning_koopman.report.effects import KINDS, Effects, Scale, plain

if TYPE_CHECKING:
    from lightning_koopman.report.report import CreditReport


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """Give a temporary file to write, which takes a file's place when the context ends."""
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


FORMAT = 1
"""Version of the saved form."""

ARRAYS = (*QUANTITIES, "variance_kept", "tikhonov", "condition")
"""Fields of one number a component."""

# What makes a terminal do something, changes the direction of text, or cannot be encoded.
_UNSHOWABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class ReportFormatError(ValueError):
    """A file that should hold a report does not."""


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a file of JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    # A number of thousands of digits is a plain ValueError.
    except (ValueError, RecursionError) as error:
        raise ReportFormatError(f"{os.fspath(path)} is not JSON: {error}") from None


def plain_fields(report: CreditReport) -> dict[str, Any]:
    """Turn a report into plain Python values, with ``None`` for what is not finite."""
    return {
        "format": FORMAT,
        "components": list(report.components),
        "widths": list(report.widths),
        **{name: plain(getattr(report, name)) for name in (*ARRAYS, "stable")},
        "stderr": {name: plain(values) for name, values in report.stderr.items()},
        "volumes": plain(report.volumes),
        "directions": report.directions,
        "n_samples": report.n_samples,
        "total": plain(report.total),
        "total_stderr": plain(report.total_stderr),
        "notes": list(report.notes),
        "step": report.step,
        "parts": {name: list(calls) for name, calls in report.parts.items()},
        "folds": report.folds,
        "delay": report.delay,
        "run": report.run,
        "source": dict(report.source),
        "effects": None if report.effects is None else report.effects.to_dict(),
    }


def checked_fields(given: Any) -> dict[str, Any]:
    """Turn a saved report into the fields of one, checking every entry."""
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise ReportFormatError(f"expected an object with format {FORMAT}")
    if given.get("excitation"):
        raise ReportFormatError(
            f"the report was measured with excitation={short(given['excitation'])}, which was removed "
            "in 0.2; measure it again without"
        )
    components = _checked_list(given, "components", str)
    size = len(components)
    if not size or len(set(components)) < size:
        raise ReportFormatError("components must be distinct names, at least one")
    stderr = given.get("stderr")
    if not isinstance(stderr, dict) or set(stderr) != set(QUANTITIES):
        raise ReportFormatError(f"stderr must hold {', '.join(QUANTITIES)}")
    directions, n_samples = _checked_int(given, "directions"), _checked_int(given, "n_samples")
    step = given.get("step")
    arrays: dict[str, Any] = {name: _array(given, name, (size,)) for name in ARRAYS}
    arrays["stable"] = np.array(_checked_list(given, "stable", bool, size))
    return dict(
        components=tuple(components),
        widths=tuple(_checked_list(given, "widths", int, size)),
        **arrays,
        stderr={name: _errors(stderr, name, (size,)) for name in QUANTITIES},
        volumes=_array(given, "volumes", (size, directions)),
        directions=directions,
        n_samples=n_samples,
        total=float(_array(given, "total", ())),
        total_stderr=float(_errors(given, "total_stderr", ())),
        notes=tuple(_checked_list(given, "notes", str)),
        step=None if step is None else _checked_int(given, "step"),
        parts=_checked_parts(given.get("parts", {})),
        folds=_checked_count(given, "folds", 5, least=2),
        delay=_checked_count(given, "delay", 1, least=1),
        run=_checked_run(given.get("run", "")),
        source=_checked_source(given.get("source", {})),
        effects=_checked_effects(given.get("effects"), size),
    )


def _checked_int(given: Mapping[str, Any], name: str) -> int:
    value = given.get(name)
    if type(value) is not int or value < 0:
        raise ReportFormatError(f"{name} must be a whole number, not {short(value)}")
    return value


def _checked_list(given: Mapping[str, Any], name: str, kind: type, size: int | None = None) -> list[Any]:
    value = given.get(name)
    if not isinstance(value, list) or any(type(v) is not kind for v in value):
        raise ReportFormatError(f"{name} must be a list of {kind.__name__}")
    if size is not None and len(value) != size:
        raise ReportFormatError(f"{name} has {len(value)} entries for {size} components")
    return [_shown(v) for v in value] if kind is str else value


def _shown(text: str) -> str:
    return _UNSHOWABLE.sub("\ufffd", text)


def _checked_parts(value: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict):
        raise ReportFormatError(f"parts must name the module calls of each state, not {short(value)}")
    return {_shown(name): tuple(_checked_list(value, name, str)) for name in value}


def _checked_effects(value: Any, size: int) -> Effects | None:
    if value is None:
        return None
    values = value.get("values") if isinstance(value, dict) else None
    if not isinstance(values, dict) or not values or not set(values) <= set(KINDS):
        raise ReportFormatError(f"effects must hold values of kinds out of {KINDS}, not {short(value)}")
    stderr = value.get("stderr")
    if not isinstance(stderr, dict) or set(stderr) != set(values):
        raise ReportFormatError("effects must hold a stderr for each kind")
    scale = value.get("scale")
    if scale not in get_args(Scale):
        raise ReportFormatError(
            f"effects have the scale {short(scale)}; expected one of {get_args(Scale)}"
        )
    strength = float(_array(value, "strength", ()))
    if not 0 <= strength < math.inf:
        raise ReportFormatError(f"effects have the strength {strength}; expected 0 or above")
    return Effects(
        values={kind: _array(values, kind, (size,)) for kind in values},
        stderr={kind: _errors(stderr, kind, (size,)) for kind in values},
        influence_stderr=_errors(value, "influence_stderr", (size,)),
        scale=scale,
        strength=strength,
        n_samples=_checked_int(value, "n_samples"),
    )


def _checked_count(given: Mapping[str, Any], name: str, default: int, *, least: int) -> int:
    value = given.get(name, default)
    if type(value) is not int or not least <= value < 10**9:
        raise ReportFormatError(f"{name} must be a whole number from {least} on, not {short(value)}")
    return value


def _checked_run(value: Any) -> str:
    if not isinstance(value, str):
        raise ReportFormatError(f"run must be a name, not {short(value)}")
    return _shown(value)


def _checked_source(value: Any) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ReportFormatError(f"source cannot be written again: {error}") from None
    if not isinstance(value, dict):
        raise ReportFormatError(f"source must tell a checkpoint and options, not {short(value)}")
    return value


def _numeric(value: Any) -> bool:
    """NumPy would also read strings as numbers."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif not (part is None or type(part) in (int, float)):
            return False
    return True


def _errors(given: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    array = _array(given, name, shape)
    if (array < 0).any():
        raise ReportFormatError(f"{name} holds a standard error below 0")
    return array


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
