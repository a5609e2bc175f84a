"""Decides what of each component's calls is its state, one pass at a time; knows no hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_koopman.network.provenance import Origins
from lightning_koopman.network.tensors import (
    LET_IT_BE_WHOLE,
    first_packed,
    first_tensor,
    is_spread,
    unpacked,
    whole_here,
)

INPUT = "input"
"""Name of the state before the first component."""

OUTPUT = "output"
"""Name of the last state where it is no component's."""


@dataclass(frozen=True)
class Recorded:
    """One state as a module gave it.

    Attributes:
        name: Of the component, or of the network input.
        module: That gave the tensor, or that took it where it is an input.
        tensor: The state; padded, with the batch axis first, where it was a packed sequence.
        lengths: Valid length of each sequence where it was packed, else ``None``.
        sources: The states it was computed from, directly; ``None`` where the data was not followed.
        from_float: Whether the component took a floating-point tensor.
    """

    name: str
    module: nn.Module
    tensor: Tensor
    lengths: Tensor | None = None
    sources: frozenset[str] | None = None
    from_float: bool = True


_NO_LABELS: frozenset[str] = frozenset()


class Recorder:
    """The states of a pass, and what the first pass showed of how components follow each other.

    Attributes:
        origins: Where the values of the pass come from.
        passes: How many passes ended without an error.
        parts: As in :class:`~lightning_koopman.network.capture.Capture`.
        states: What was stored in the current pass, by name.
        calls: How often each module ran in it, by the module's id.
        skipped: Components that gave nothing to record in it.
    """

    def __init__(
        self, names: Mapping[int, str], named: bool, keep: Callable[[Tensor, Any], Any]
    ) -> None:
        self.origins = Origins()
        self.passes = 0
        self.parts: dict[str, tuple[str, ...]] = {}
        self._names, self._named, self._keep = names, named, keep
        self._superseded: set[tuple[int, int]] = set()
        self._merged: set[tuple[int, int]] = set()
        self._inputs: dict[tuple[int, int], str] = {}
        self.start_pass()

    def start_pass(self, batch: Any = None) -> None:
        """Forget what was recorded."""
        self.states: dict[str, Any] = {}
        self.calls: dict[int, int] = {}
        self.skipped: list[str] = []
        self._pending: dict[int, tuple[frozenset[str] | None, bool]] = {}
        self._sources_of: dict[str, tuple[frozenset[str] | None, bool]] = {}
        self._raw: Tensor | None = None
        self._current: tuple[str, int, int] | None = None
        self._unusable: str | None = None
        self.origins.start_pass(batch)

    def end_pass(self) -> dict[str, Any]:
        """Hand over the states of a pass, and stop following its data."""
        self.origins.leave()
        if self._unusable is not None:
            raise ValueError(self._unusable)
        self.passes += 1
        return self.states

    def takes_input(self, module: nn.Module) -> bool:
        """Tell whether the module's input must be seen in the next pass."""
        known = any(taker == id(module) for taker, _ in self._inputs)
        return self.passes == 0 or known

    def take(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """See what a component is about to run on."""
        tensor = first_tensor((args, kwargs))
        key = (id(module), self.calls.get(id(module), 0))
        if tensor is not None:
            if self.passes == 0 and self._is_input(tensor):
                self._inputs[key] = INPUT if not self._inputs else f"{INPUT}#{len(self._inputs)}"
                self.origins.claim(tensor, self._inputs[key])
            if key in self._inputs:
                name = self._inputs[key]
                recorded = _recorded(name, module, (args, kwargs), tensor, _NO_LABELS)
                self.states[name] = self._keep(recorded.tensor, recorded)
        self._pending[id(module)] = (self.origins.of((args, kwargs)), tensor is not None)

    def give(self, name: str, module: nn.Module, output: Any) -> None:
        """Record what a component gave."""
        call = self._count(module)
        self._record(name if call == 0 else f"{name}#{call}", module, call, output)

    def pass_on(self, module: nn.Module, args: Any, output: Any) -> None:
        """Let what a parameter-free module made of a component's output count as that component's."""
        call = self._count(module)
        if self._current is None or self._raw is None or first_tensor(args) is not self._raw:
            return
        name, *recorded_by = self._current
        if self.passes == 0 and self._continues(output, name, self._raw):
            self._merged.add((id(module), call))
            self._superseded.add((recorded_by[0], recorded_by[1]))
        if (id(module), call) in self._merged:
            self._record(name, module, call, output)

    def end(self, name: str, module: nn.Module, value: Any) -> None:
        """Record a state that no component gave, as the last one."""
        if name in self.states:
            return
        sources = self.origins.of(value)
        tensor = first_tensor(value)
        if tensor is None:
            raise ValueError(
                f"the output of interest is a {type(value).__name__} without a floating-point tensor; "
                "let output= give one"
            )
        recorded = _recorded(name, module, value, tensor, sources)
        self.states[name] = self._keep(recorded.tensor, recorded)

    def _is_input(self, tensor: Tensor) -> bool:
        """Tell whether a component takes data of the batch that no component has taken before."""
        fresh = self.origins.is_fresh(tensor)
        return not self.states if fresh is None else fresh

    def _continues(self, output: Any, name: str, raw: Tensor) -> bool:
        """Tell whether an output still holds a component's state, one row a sample."""
        # A module may look at a state for its type or length alone, as rotary embeddings do.
        tensor = first_tensor(output)
        if tensor is None or tensor.shape[:1] != raw.shape[:1]:
            return False
        return self.origins.may_hold(tensor, name)

    def _count(self, module: nn.Module) -> int:
        call = self.calls.get(id(module), 0)
        self.calls[id(module)] = call + 1
        return call

    def _record(self, name: str, module: nn.Module, call: int, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is None:
            self._unusable = (
                f"component {name!r} returned {type(output).__name__} with no floating-point tensor. "
                "Leave it out with components=[...]."
            )
            if self._named:
                raise ValueError(self._unusable)
            self.skipped.append(name)
            return
        self._unusable = None
        _refuse_part(name, module, tensor)
        self._raw, self._current = tensor, (name, id(module), call)
        if self.passes == 0:
            called = self._names[id(module)] if call == 0 else f"{self._names[id(module)]}#{call}"
            self.parts[name] = (*self.parts.get(name, ()), called)
        sources, from_float = self._pending.get(id(module), (None, True))
        if name in self._sources_of:
            sources, from_float = self._sources_of[name]
        self._sources_of[name] = (sources, from_float)
        self.origins.mark(output, name)
        # The first pass shows which modules are followed by one that speaks for the component.
        if (id(module), call) not in self._superseded:
            recorded = _recorded(name, module, output, tensor, sources, from_float)
            self.states[name] = self._keep(recorded.tensor, recorded)


def _refuse_part(name: str, module: nn.Module, tensor: Tensor) -> None:
    """Refuse the units that one process holds of a layer that tensor parallelism spread."""
    width = getattr(module, "out_features", getattr(module, "embedding_dim", None))
    weight = getattr(module, "weight", None)
    if width is not None and is_spread(weight) and tensor.shape[-1] != width:
        raise ValueError(
            f"component {name!r} gave {tensor.shape[-1]} of its {width} units, and other processes the "
            f"rest. {LET_IT_BE_WHOLE}"
        )


def _recorded(
    name: str,
    module: nn.Module,
    value: Any,
    tensor: Tensor,
    sources: frozenset[str] | None,
    from_float: bool = True,
) -> Recorded:
    packed = first_packed(value)
    if packed is not None and packed.data is tensor:
        tensor, lengths = unpacked(packed)
        return Recorded(name, module, tensor, lengths, sources, from_float)
    held = whole_here(tensor)
    if held is None:
        raise ValueError(
            f"the state of {name!r} is a DTensor of which each process holds a part. {LET_IT_BE_WHOLE}"
        )
    return Recorded(name, module, held, None, sources, from_float)
