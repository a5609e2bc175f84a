"""What a saved report must hold; pydantic checks it. It takes a while to import, so only files do."""

from __future__ import annotations

import json
import math
import re
from reprlib import repr as short
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, Field, ValidationError, ValidationInfo

from lightning_koopman.koopman.credit import QUANTITIES
from lightning_koopman.report.saved import FORMAT, ReportFormatError

# What makes a terminal do something, changes the direction of text, or cannot be encoded.
_UNSHOWABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _showable(text: str) -> str:
    return _UNSHOWABLE.sub("\ufffd", text)


def _number(value: float | None) -> float:
    if value is None:
        return math.nan
    # Nothing measured is as large, and sums of such numbers, as a figure's limits are, overflow.
    if 1e300 < abs(value) < math.inf:
        raise ValueError("is beyond 1e300")
    return value


def _array(values: list[Any]) -> Any:
    return np.array(values)  # by itself, pydantic 2.7 would hand it a second argument


def _one_each(values: list[Any], info: ValidationInfo) -> list[Any]:
    if len(values) != info.context:
        raise ValueError(f"has {len(values)} entries for {info.context} components")
    return values


def _one_each_or_none(values: Any, info: ValidationInfo) -> Any:
    return _one_each(values, info) if values else values


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
Number = Annotated[float | None, AfterValidator(_number)]
Row = Annotated[list[Number], AfterValidator(_array)]
Column = Annotated[list[Number], AfterValidator(_one_each), AfterValidator(_array)]
Errors = Annotated[Column, AfterValidator(_not_below_zero)]


class _Effects(BaseModel, strict=True):
    components: Texts
    values: dict[Text, Column]
    stderr: dict[Text, Errors]
    how: dict[Text, Literal["measured", "predicted"]]
    scale: Literal["kl", "relative"]
    n_samples: Count
    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.3
    metric_before: Number = math.nan
    metric: dict[Text, Column] = {}
    metric_stderr: dict[Text, Errors] = {}
    predicted: dict[Text, Column] = {}
    predicted_stderr: dict[Text, Errors] = {}
    doubts: dict[Text, Annotated[list[Texts], AfterValidator(_one_each), AfterValidator(tuple)]] = {}
    sets: dict[Text, Texts] = {}
    folds: dict[Text, Annotated[Row, AfterValidator(_not_below_zero)]] = {}
    pairs: dict[Text, list[list[Row]]] = {}
    notes: Texts = ()  # type: ignore[assignment]


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
    effects: dict[str, Any] | None = None
    drift: Column | None = None
    types: Annotated[Texts, AfterValidator(_one_each_or_none)] = ()  # type: ignore[assignment]
    parameters: Annotated[list[Count], AfterValidator(_one_each_or_none), AfterValidator(tuple)] = ()  # type: ignore[assignment]


def checked_fields(given: Any) -> dict[str, Any]:
    """Return the fields of a saved report, each of which was checked."""
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise ReportFormatError(f"expected an object with format {FORMAT}, not {short(given)}")
    if given.get("excitation"):
        raise ReportFormatError(
            f"the report was measured with excitation={short(given['excitation'])}, which was removed "
            "in 0.2; measure it again without"
        )
    found = _checked(_Report, given)
    if set(found["stderr"]) != set(QUANTITIES):
        raise ReportFormatError(f"stderr must hold {', '.join(QUANTITIES)}")
    if wrong := {len(row) for row in found["volumes"]} - {found["directions"]}:
        raise ReportFormatError(f"volumes has rows of {wrong} numbers; expected {found['directions']}")
    if (effects := found["effects"]) is not None:
        if "influence_stderr" in effects and isinstance(effects.get("values"), dict):  # written by 0.1
            effects |= {"components": list(found["components"])}
            effects |= {"how": dict.fromkeys(effects["values"], "predicted")}
        found["effects"] = checked_effects(effects, "effects.")
    return found | {"volumes": np.stack(found["volumes"])}


_TOGETHER = (
    ("values", "stderr", "how"),
    ("metric", "metric_stderr"),
    ("predicted", "predicted_stderr"),
    ("folds", "pairs"),
)
"""Fields of effects that have the same kinds."""


def checked_effects(given: Any, field: str = "") -> dict[str, Any]:
    """Return the fields of saved effects, each of which was checked."""
    if not isinstance(given, dict):
        raise ReportFormatError(f"expected an object with the fields of effects, not {short(given)}")
    found = _checked(_Effects, given, field)
    kinds = set(found["values"])
    for first, *others in _TOGETHER:
        for name in others:
            if set(found[name]) != set(found[first]) or not (set(found[first]) <= kinds and kinds):
                raise ReportFormatError(f"{field}{name} must be of the kinds that {field}{first} has")
    if not set(found["doubts"]) <= kinds:
        raise ReportFormatError(f"{field}doubts must be of the kinds that {field}values has")
    single = len(found["components"]) - len(found["sets"])
    alone, together = found["components"][:single], found["components"][single:]
    members = {name for names in found["sets"].values() for name in names}
    if tuple(found["sets"]) != together or not members <= set(alone):
        raise ReportFormatError(f"{field}sets must name the last components, and hold names of others")
    for kind, parts in found["pairs"].items():
        shapes = {(len(part), *map(len, part)) for part in parts}
        if len(parts) != len(found["folds"][kind]) or shapes - {(single,) * (single + 1)}:
            raise ReportFormatError(f"{field}pairs must hold {single} times {single} numbers per fold")
        found["pairs"][kind] = np.array(parts, dtype=float).reshape(-1, single, single)
    return found


def _checked(model: type[BaseModel], given: dict[str, Any], field: str = "") -> dict[str, Any]:
    """Return the fields of a model whose columns have one entry per component."""
    components = given.get("components")
    size = len(components) if isinstance(components, list) else 0
    try:
        found = dict(model.model_validate(given, context=size))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, problem = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        arrived = "" if first["type"] == "missing" else f", not {short(first['input'])}"
        raise ReportFormatError(f"field {field}{_showable(place)}: {problem}{arrived}") from None
    if not size or len(set(found["components"])) < size:
        raise ReportFormatError("components must be distinct names, at least one")
    return found
