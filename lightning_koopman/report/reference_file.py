"""References as files: tensors and one line of JSON in the safetensors format, nothing executable."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_koopman.koopman.lifts import Lift, LiftKind
from lightning_koopman.koopman.options import Options
from lightning_koopman.koopman.reference import FoldFits, Reference
from lightning_koopman.koopman.states import Basis
from lightning_koopman.network.axes.rows import Reduction
from lightning_koopman.report.saved import ReportFormatError, write_atomically
from lightning_koopman.report.schema import Text

_KEY = "lightning_koopman_reference"
"""Where the line of JSON stands in the file's header."""

FORMAT = 1
"""Version of the saved form."""

Index = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]


class _Lift(BaseModel, strict=True):
    kind: LiftKind
    scale: float
    bandwidth: float


class _Content(BaseModel, strict=True):
    format: Literal[1]
    states: Annotated[list[Text], Field(min_length=2)]
    widths: list[Size]
    parents: list[Annotated[list[Index], Field(min_length=1)]]
    kept_variance: list[float]
    lifts: list[_Lift | None]
    n_samples: Index
    modules: list[Text]
    named: bool
    calls: list[list[Text]]
    grids: dict[Text, list[Size]]
    parts: dict[Text, list[Text]]
    step: Index | None
    functions: list[Literal["reduce", "output", "observables"]]
    max_dim: Size
    reduce: Reduction | dict[str, Reduction]
    output: str | None
    folds: Annotated[int, Field(ge=2, le=1000)]
    delay: Size
    seed: int
    observables: LiftKind | None


def write_reference(reference: Reference, path: str | os.PathLike[str]) -> None:
    """Write a reference, completely or not at all."""
    options, basis = reference.options, reference.basis
    functions = list(reference.functions)
    content: dict[str, Any] = {"format": FORMAT, "functions": functions}
    for name, otherwise in (("reduce", "pool"), ("output", None), ("observables", None)):
        value = getattr(options, name)
        inside = value.values() if isinstance(value, Mapping) else [value]
        # A function would have to be run to be read again.
        if any(map(callable, inside)):
            functions.append(name)
            value = otherwise
        content[name] = dict(value) if isinstance(value, Mapping) else value
    for name in ("max_dim", "folds", "delay", "seed"):
        content[name] = getattr(options, name)
    for name in ("states", "widths", "parents", "n_samples", "modules", "named", "calls", "step"):
        content[name] = getattr(reference, name)
    content |= {
        "grids": dict(reference.grids),
        "parts": dict(reference.parts),
        "kept_variance": basis.kept_variance,
        "lifts": [
            None if lift is None else {n: getattr(lift, n) for n in ("kind", "scale", "bandwidth")}
            for lift in basis.lifts
        ],
    }
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in _named(reference)}
    with write_atomically(path) as temporary:
        temporary.write_bytes(save(tensors, {_KEY: json.dumps(content)}))


def _named(reference: Reference) -> list[tuple[str, Tensor]]:
    """Return the tensors of a reference under the names that they have in a file."""
    basis = reference.basis
    tensors = [(f"operator.{i}", matrices) for i, matrices in enumerate(reference.operators, start=1)]
    tensors += [(f"mean.{i}", mean) for i, mean in enumerate(reference.means)]
    tensors += [("variance", reference.variance)]
    tensors += [(f"center.{i}", center) for i, center in enumerate(basis.center)]
    tensors += [(f"basis.{i}", v) for i, v in enumerate(basis.vectors) if v is not None]
    for i, lift in enumerate(basis.lifts):
        if lift is not None:
            tensors += [(f"lift.{i}.{n}", getattr(lift, n)) for n in ("center", "points", "phases")]
    return tensors


def read_reference(path: str | os.PathLike[str]) -> Reference:
    """Read a reference, checking everything in it."""
    name = os.fspath(path)
    try:
        with safe_open(name, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            keys = [] if text is None else list(file.keys())
            tensors = {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise ReportFormatError(f"{name} holds no reference: {error}") from None
    except OSError as error:
        raise ReportFormatError(f"{name} cannot be read as a reference: {error}") from None
    if text is None:
        raise ReportFormatError(
            f"{name} holds no reference: it is a file of tensors that save_reference did not write"
        )
    try:
        content = _Content.model_validate_json(text)
        return _rebuilt(content, tensors)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ReportFormatError(f"{name} holds no reference: field {place}: {first['msg']}") from None
    except (KeyError, ValueError, IndexError) as error:
        raise ReportFormatError(f"{name} holds no reference: {error}") from None


def _rebuilt(content: _Content, tensors: dict[str, Tensor]) -> Reference:
    """Put a reference together, each part of which fits the others."""
    size, folds = len(content.states), content.folds
    lengths = [("lifts", size)] if content.lifts else []
    for field, expected in (*lengths, ("widths", size), ("kept_variance", size), ("parents", size - 1)):
        if len(getattr(content, field)) != expected:
            raise ValueError(f"{field} has {len(getattr(content, field))} entries; expected {expected}")
    for i, read in enumerate(content.parents, start=1):
        if any(p >= i for p in read) or len(set(read)) < len(read):
            raise ValueError(f"step {i} reads the states {read}; each is one before it, named once")

    def take(key: str, *shape: int | None) -> Tensor:
        if key not in tensors:
            raise ValueError(f"tensor {key} is missing")
        tensor = tensors[key]
        fits = tensor.ndim == len(shape) and all(
            n in (None, m) for n, m in zip(shape, tensor.shape, strict=True)
        )
        if not fits or not tensor.is_floating_point():
            wanted = tuple("any" if n is None else n for n in shape)
            raise ValueError(f"tensor {key} is {tensor.dtype} {tuple(tensor.shape)}; expected {wanted}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"tensor {key} holds NaN or infinity")
        return tensor

    center = tuple(take(f"center.{i}", None) for i in range(size))
    dims = [len(offset) for offset in center]
    vectors: list[Tensor | None] = []
    lifts: list[Lift | None] = []
    lifted = content.observables is not None or "observables" in content.functions
    for i, width in enumerate(content.widths):
        basis = take(f"basis.{i}", width, None) if f"basis.{i}" in tensors else None
        plain = width if basis is None else basis.shape[1]
        vectors.append(basis)
        if content.lifts:
            lifts.append(_lift(content.lifts[i], i, plain, take))
        if plain != dims[i] and (i == size - 1 or not lifted):
            raise ValueError(f"tensor center.{i} has {dims[i]} entries; expected {plain}")
    read_widths = [sum(dims[p] for p in read) for read in content.parents]
    operators = [
        take(f"operator.{i}", folds, width, dims[i]) for i, width in enumerate(read_widths, start=1)
    ]
    means = [take(f"mean.{i}", folds, width) for i, width in enumerate(dims)]
    # Files of 0.2.0 do not hold it.
    variance = take("variance", 1) if "variance" in tensors else torch.tensor([torch.nan], device="cpu")
    return Reference(
        states=tuple(content.states),
        widths=tuple(content.widths),
        parents=tuple(map(tuple, content.parents)),
        basis=Basis(tuple(vectors), tuple(content.kept_variance), center, tuple(lifts)),
        fits=FoldFits.known(operators, means, variance),
        n_samples=content.n_samples,
        options=Options(
            max_dim=content.max_dim,
            reduce=content.reduce,
            output=content.output,
            folds=folds,
            delay=content.delay,
            seed=content.seed,
            observables=content.observables,
        ),
        modules=tuple(content.modules),
        named=content.named,
        calls=tuple(map(tuple, content.calls)),
        grids={name: tuple(grid) for name, grid in content.grids.items()},
        parts={name: tuple(calls) for name, calls in content.parts.items()},
        step=content.step,
        functions=tuple(content.functions),
    )


def _lift(lift: _Lift | None, i: int, width: int, take: Any) -> Lift | None:
    if lift is None:
        return None
    center, points = take(f"lift.{i}.center", width), take(f"lift.{i}.points", width, None)
    phases = take(f"lift.{i}.phases", points.shape[1] if lift.kind == "rff" else 0)
    return Lift(lift.kind, center, lift.scale, points, phases, lift.bandwidth)
