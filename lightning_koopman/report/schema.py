"""What a saved report must hold; pydantic checks it. It takes a while to import, so only files do."""

from __future__ import annotations

import json
import math
import re
from reprlib import repr as short
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, Field, ValidationError, ValidationInfo

from lightning_koopman.koopman.credit import QUANTITIES
from lightning_koopman.report.effects import Effects, Kind, Scale
from lightning_koopman.report.saved import FORMAT, ReportFormatError

# What makes a terminal do something, changes the direction of text, or cannot be encoded.
_UNSHOWABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _showable(text: str) -> str:
    return _UNSHOWABLE.sub("\ufffd", text)


def _array(values: list[Any]) -> Any:
    return np.array(values)  # by itself, pydantic 2.7 would hand it a second argument


def _one_each(values: list[Any], info: ValidationInfo) -> list[Any]:
    if len(values) != info.context:
        raise ValueError(f"has {len(values)} entries for {info.context} components")
    return values


def _not_below_zero(values: Any) -> Any:
    if np.any(np.asarray(values) < 0):
        raise ValueError("holds a standard error below 0")
    return values


def _writable(source: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(source, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be written again: {error}") from None
    return source


Text = Annotated[str, AfterValidator(_showable)]
Texts = Annotated[list[Text], AfterValidator(tuple)]
Count = Annotated[int, Field(ge=0)]
Number = Annotated[float | None, AfterValidator(lambda value: math.nan if value is None else value)]
Row = Annotated[list[Number], AfterValidator(_array)]
Column = Annotated[list[Number], AfterValidator(_one_each), AfterValidator(_array)]
Errors = Annotated[Column, AfterValidator(_not_below_zero)]


class _Effects(BaseModel, strict=True):
    values: dict[Kind, Column]
    stderr: dict[Kind, Errors]
    influence_stderr: Errors
    scale: Scale
    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    n_samples: Count


class _Report(BaseModel, strict=True):
    components: Texts
    credit: Column
    gain: Column
    nonlinearity: Column
    sensitivity: Column
    r2: Column
    chain_r2: Column
    rank: Column
    stderr: dict[str, Errors]
    directions: Count
    n_samples: Count
    total: Number
    total_stderr: Annotated[Number, AfterValidator(_not_below_zero)]
    volumes: Annotated[list[Row], AfterValidator(_one_each)]
    widths: Annotated[list[int], AfterValidator(_one_each), AfterValidator(tuple)]
    variance_kept: Column
    tikhonov: Column
    condition: Column
    stable: Annotated[list[bool], AfterValidator(_one_each), AfterValidator(_array)]
    notes: Texts
    step: Count | None = None
    parts: dict[Text, Texts] = {}
    folds: Annotated[int, Field(ge=2, lt=10**9)] = 5
    delay: Annotated[int, Field(ge=1, lt=10**9)] = 1
    run: Text = ""
    source: Annotated[dict[str, Any], AfterValidator(_writable)] = {}
    effects: _Effects | None = None


def checked_fields(given: Any) -> dict[str, Any]:
    """Return the fields of a saved report, each of which was checked."""
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise ReportFormatError(f"expected an object with format {FORMAT}, not {short(given)}")
    if given.get("excitation"):
        raise ReportFormatError(
            f"the report was measured with excitation={short(given['excitation'])}, which was removed "
            "in 0.2; measure it again without"
        )
    components = given.get("components")
    size = len(components) if isinstance(components, list) else 0
    try:
        found = dict(_Report.model_validate(given, context=size))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, problem = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        arrived = "" if first["type"] == "missing" else f", not {short(first['input'])}"
        raise ReportFormatError(f"field {_showable(place)}: {problem}{arrived}") from None
    if not size or len(set(found["components"])) < size:
        raise ReportFormatError("components must be distinct names, at least one")
    if set(found["stderr"]) != set(QUANTITIES):
        raise ReportFormatError(f"stderr must hold {', '.join(QUANTITIES)}")
    if wrong := {len(row) for row in found["volumes"]} - {found["directions"]}:
        raise ReportFormatError(f"volumes has rows of {wrong} numbers; expected {found['directions']}")
    if (effects := found["effects"]) is not None:
        if not effects.values or effects.stderr.keys() != effects.values.keys():
            raise ReportFormatError("effects must hold values and stderr of equal kinds, at least one")
        found["effects"] = Effects(**dict(effects))
    return found | {"volumes": np.stack(found["volumes"])}
