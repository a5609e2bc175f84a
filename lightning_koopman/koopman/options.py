"""What a user may choose of how the numbers are made, checked once and carried as one object."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, cast, get_args

from lightning_koopman.koopman.lifts import Observables, check_observables
from lightning_koopman.koopman.regression import check_tikhonov
from lightning_koopman.network.arguments import INTEGER, check_each, check_given, check_type
from lightning_koopman.network.axes.rows import ReduceOption, check_reduce

Normalize = Literal["none", "rms", "whiten"]
"""Coordinates of every state: as they are, each unit over its standard deviation, or whitened."""


@dataclass(frozen=True)
class Options:
    """How states become rows, and rows become credits; the defaults suit most networks.

    What takes ``options`` takes its fields by name too: ``credit_report(model, batches, max_dim=64)``.

    Args:
        rank: Most output directions to align; ``None`` takes all that reach back to the input.
        tikhonov: Ridge weight in units of the regressors' mean variance; ``None`` picks, for
            every component, the largest up to 1e-2 that at most doubles the error expected on other
            data.
        normalize: Coordinates of every state: as they are (``"none"``), each unit over its standard
            deviation (``"rms"``) or whitened (``"whiten"``).
        targets: Output units of interest, not with ``"whiten"`` nor of an output wider than ``max_dim``;
            those of images and sequences are counted channel by channel, each over all positions.
            ``None`` takes the leading POD directions of the output.
        delay: Step delay: how many earlier states each operator sees, beside those that the data flow
            links.
        folds: Number of folds for held-out R² and error bars.
        max_dim: States wider than this are pooled and projected on their leading POD directions.
        reduce: What becomes of spatial and sequence axes: ``"pool"`` (to a small grid where the state
            is wide, and the first or last position where the network goes on with that alone),
            ``"flatten"``, ``"mean"``, ``"last"`` (position that holds data), ``"cls"`` (the first
            position), or a callable from the tensor to one row per sample; or a mapping from glob
            patterns of names to any of these, of which the first that matches counts. ``"last"`` and
            ``"cls"`` leave images before there are tokens pooled. Padding that the batch marks
            (``attention_mask``, ``lengths``, …) is left out of pools and means.
        output: What the chain ends with: the name of a module, or, outside a Trainer, a callable from
            what the model returns to a tensor; ``None`` takes all that the network returns, several
            heads side by side, or, where components are named, what the last of them give.
        observables: Lifts every state but the output into further coordinates, in which an operator can
            follow what is nonlinear (EDMD): ``"polynomial"`` (products of two), ``"rff"`` (``max_dim``
            random Fourier features) or ``"rbf"`` (as many Gaussian bumps), each beside the state
            itself and fixed by ``2 * max_dim`` of the samples; or a callable from rows
            ``(n_samples, d)`` to rows. Credits are then about these coordinates.
        seed: Chooses the folds and the random features.
        errors: Whether standard errors are computed, and what a reference for drift needs; without
            them each is NaN. ``None`` computes them, but of the reports of a training under way for
            the last one alone.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> Options(max_dim=64, normalize="rms").max_dim
        64
    """

    rank: int | None = None
    tikhonov: float | None = None
    normalize: Normalize = "none"
    targets: Sequence[int] | None = None
    delay: int = 1
    folds: int = 5
    max_dim: int = 128
    reduce: ReduceOption = "pool"
    output: str | Callable[[Any], Any] | None = None
    observables: Observables = None
    seed: int = 0
    errors: bool | None = None

    def __post_init__(self) -> None:
        check_type(INTEGER, folds=self.folds, max_dim=self.max_dim, seed=self.seed)
        check_given(INTEGER, rank=self.rank)
        for name in ("rank", "folds", "max_dim", "seed"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, int(value))  # files and torch take none of NumPy's
        if self.folds < 2:
            raise ValueError(f"folds is {self.folds}; held-out R² needs at least 2")
        if isinstance(self.delay, bool) or not isinstance(self.delay, int) or self.delay < 1:
            raise ValueError(f"delay is {self.delay!r}; it must be an integer of 1 or above")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}; at least one output direction must be aligned")
        if self.max_dim < 1:
            raise ValueError(f"max_dim is {self.max_dim}; a state vector needs at least one value")
        check_tikhonov(self.tikhonov)
        if self.normalize not in get_args(Normalize):
            raise ValueError(f"normalize is {self.normalize!r}; choose one of {get_args(Normalize)}")
        if self.targets is not None:
            check_each(INTEGER, targets=self.targets)
            if self.normalize == "whiten":
                raise ValueError(
                    f"targets is {list(self.targets)}, but normalize='whiten' mixes the output's units; "
                    "choose 'none' or 'rms'"
                )
        check_reduce(self.reduce)
        check_given((str | Callable, "the name of a module, or a function"), output=self.output)
        check_observables(self.observables)


DEFAULTS = Options()

_NAMES = frozenset(field.name for field in fields(Options))
_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes_options(**gone: str) -> Callable[[_Function], _Function]:
    """Take the fields of the options by their own names too, and say where an argument of old went."""

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if not isinstance(given := kwargs.get("options", DEFAULTS), Options):
                kind = type(given).__name__
                raise TypeError(f"options is of type {kind}; write Options(max_dim=64), for example")
            if named := {name: kwargs.pop(name) for name in kwargs.keys() & _NAMES}:
                kwargs["options"] = replace(given, **named)
            for name in kwargs.keys() & gone:
                raise TypeError(f"{name} is no argument any more: {gone[name]}")
            return function(*args, **kwargs)

        return cast(_Function, checked)

    return decorate
