"""The outermost calls that a step made of the network's parts, which run again as they ran."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_koopman.network.axes.graphs import n_graphs
from lightning_koopman.network.axes.padding import Valid
from lightning_koopman.network.tensors import (
    address_of,
    all_tensors,
    derived,
    first_packed,
    need_not_wait,
    tensors_inside,
)

NOT_COPIED = (
    *(bool, int, float, complex, str, bytes, type(None), slice, torch.dtype, torch.device, torch.Size),
    *(nn.Module, FunctionType, type),
)
"""What is kept as it is: nobody changes it, or it is the network's own."""


@dataclass(frozen=True)
class Kept:
    """A copy of a tensor, on the CPU, where it was, and of which derived class with which attributes.

    What is differentiated for it under gradients of the step's own has ``grads``.
    """

    copy: Tensor
    device: torch.device
    start: int = 0
    grads: bool = False
    kind: type[Tensor] = Tensor
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        """Entries of its first axis; a single number is one."""
        return self.copy.shape[0] if self.copy.ndim else 1


@dataclass(frozen=True)
class KeptObject:
    """A copy of an argument that is neither a tensor nor a plain value."""

    copy: Any
    n_rows: int


@dataclass(frozen=True)
class FedObject:
    """An object of a class of its own that an earlier call of the step gave."""

    call: int
    place: int


@dataclass(frozen=True)
class Fed(FedObject):
    """A tensor that an earlier call of the step gave, or a view of its memory.

    Attributes:
        given: How that call laid its tensor out.
    """

    given: tuple[int, ...]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def autocast_of(kind: str) -> tuple[bool, torch.dtype]:
    """Tell whether products are cast now on a kind of device, and to what."""
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


@dataclass
class RecordedCall:
    """One outermost call, copied before it ran.

    Attributes:
        direct: Whether ``forward`` itself was called, which fires no hook.
        idle: Watched modules that did not run within the call, by ``id``.
        autocasts: What the step let torch cast around the call, by kind of device.
        grads: Whether the step let torch follow gradients where the Trainer does not.
    """

    module: nn.Module
    direct: bool
    args: Any
    kwargs: Any
    idle: frozenset[int] = frozenset()
    autocasts: Mapping[str, tuple[bool, torch.dtype]] = field(default_factory=dict)
    grads: bool = False

    def run(self, args: Any, kwargs: Any) -> Any:
        """Call the module as it was called."""
        with ExitStack() as around:
            for kind, (enabled, dtype) in self.autocasts.items():
                now = autocast_of(kind)
                # What stands there already, as a Trainer's precision, keeps the casts that it remembers.
                if now != (enabled, dtype) and (now[0] or enabled):
                    around.enter_context(torch.autocast(kind, dtype if enabled else None, enabled))
            if self.grads:
                around.enter_context(torch.enable_grad())
            return (self.module.forward if self.direct else self.module)(*args, **kwargs)

    @property
    def given(self) -> list[Any]:
        """What the call takes, in the end."""
        return _leaves((self.args, self.kwargs))

    @property
    def n_rows(self) -> int:
        """Rows of the longest tensor that the call takes, but for what an earlier call gave."""
        packed = first_packed((self.args, self.kwargs))
        if packed is not None and isinstance(packed.batch_sizes, Kept):
            return int(packed.batch_sizes.copy[0])
        copies = (part for part in self.given if isinstance(part, Kept | KeptObject))
        return max((part.n_rows for part in copies), default=1)

    @property
    def n_samples(self) -> int:
        """Graphs of the batch of these that the call takes, else its rows."""
        told = (
            getattr(part.copy, "num_graphs", 0) for part in self.given if isinstance(part, KeptObject)
        )
        copies = [part.copy for part in self.given if isinstance(part, Kept)]
        return int(max(told, default=0)) or n_graphs(copies) or self.n_rows

    @property
    def starts(self) -> set[int]:
        """Where in memory the tensors begin that the call takes, but for what an earlier call gave."""
        return {part.start for part in self.given if isinstance(part, Kept)} - {0}

    @property
    def read(self) -> set[int]:
        """The earlier calls of the step that gave something that the call takes."""
        return {part.call for part in self.given if isinstance(part, FedObject)}

    @property
    def ran(self) -> set[nn.Module]:
        """What it runs, as far as can be told."""
        return {module for module in self.module.modules() if id(module) not in self.idle}

    @property
    def weighted(self) -> set[nn.Module]:
        """What it runs that has weights of its own."""
        return {module for module in self.ran if any(True for _ in module.parameters(recurse=False))}


class Part(NamedTuple):
    """A part of a batch that may have targets of its own, as batches of several loaders have.

    Attributes:
        told: What is kept of it to find targets in, by name.
        starts: Where in memory its tensors begin.
    """

    told: dict[str, Tensor]
    starts: frozenset[int] = frozenset()

    @classmethod
    def of(cls, told: dict[str, Tensor], part: Any) -> Part:
        """Note where a part is."""
        return cls(told, frozenset(map(start_of, tensors_inside(part))) - {0})


@dataclass
class Step:
    """The outermost calls of one step of the user's.

    Attributes:
        valid: Which positions of padded sequences held data in the step's batch.
        parts: What was kept to find targets in, on the CPU: of all of the batch, or of each part of it.
        outputs: First tensor of what each call gave, where it was kept to be compared.
    """

    calls: list[RecordedCall] = field(default_factory=list)
    valid: Valid = field(default_factory=dict)
    parts: list[Part] = field(default_factory=lambda: [Part({})])
    outputs: list[Tensor | None] = field(default_factory=list)
    n_bytes: int = 0

    def part_of(self, calls: Iterable[int]) -> int | None:
        """Find the part of the batch that some calls are about, if it is one alone."""
        if len(self.parts) < 2:
            return 0
        about, before = {*calls}, set[int]()
        while about != before:
            before, about = about, about.union(*(self.calls[i].read for i in about))
        starts = set[int]().union(*(self.calls[i].starts for i in about))
        found = [place for place, part in enumerate(self.parts) if part.starts & starts]
        return found[0] if len(found) == 1 else None

    @property
    def n_samples(self) -> int:
        """Samples of the first call, as far as what it takes tells."""
        return self.calls[0].n_samples if self.calls else 1

    def without_strangers(self, parts: Collection[nn.Module], whole: nn.Module | None = None) -> Step:
        """Leave out calls that have nothing to do with one that runs all parts, if any does.

        If none does, what was called before the ``whole`` that holds them counts where others take it.
        """
        read = [call.read for call in self.calls]
        kept = {i for i, call in enumerate(self.calls) if call.ran >= {*parts}}
        if not kept:
            first = next((i for i, call in enumerate(self.calls) if call.module is whole), 0)
            kept = {*range(first, len(self.calls))}
        before: set[int] = set()
        while kept != before:
            before = set(kept)
            kept |= {i for j in before for i in read[j]}
            kept |= {j for j, sources in enumerate(read) if sources & before}
        return self._of(kept)

    def without_lone_samples(self) -> Step:
        """Leave out calls on one sample of what others run on more, as to act in an environment.

        Those that take what another call gave, or give what another takes, stay.
        """
        read = [call.read for call in self.calls]
        lone = {
            i
            for i, call in enumerate(self.calls)
            if call.n_rows == 1 and not read[i] and not any(i in sources for sources in read)
        }
        kept = {*range(len(self.calls))} - lone
        more = set[nn.Module]().union(*(self.calls[i].weighted for i in kept))
        return self._of(kept | {i for i in lone if not self.calls[i].weighted <= more})

    def _of(self, kept: Collection[int]) -> Step:
        """Return the step of some of its calls alone, none of which takes what others gave."""
        if len(kept) == len(self.calls):
            return self
        place = {old: new for new, old in enumerate(sorted(kept))}

        def moved(part: Any) -> Any:
            return replace(part, call=place[part.call]) if isinstance(part, FedObject) else part

        calls = [self.calls[i] for i in place]
        calls = [replace(c, args=mapped(c.args, moved), kwargs=mapped(c.kwargs, moved)) for c in calls]
        return replace(self, calls=calls, outputs=[self.outputs[i] for i in place])

    def revive(self) -> list[Any]:
        """Copy what the calls take, for they may change it in place: a batch, as far as they know."""

        def revive(part: Any) -> Any:
            if isinstance(part, Kept):
                made = part.copy.to(part.device, copy=True, non_blocking=need_not_wait(part.device))
                made.requires_grad_(part.grads)
                return made if part.kind is Tensor else derived(made, part.kind, part.attributes)
            return copy.deepcopy(part.copy) if isinstance(part, KeptObject) else part

        return [mapped((call.args, call.kwargs), revive) for call in self.calls]

    def run(self, given: list[Any] | None = None) -> list[Any]:
        """Call the modules again on what :meth:`revive` gave, and return what each of them gives."""
        return list(self.results(given))

    def results(self, given: list[Any] | None = None) -> Iterator[Any]:
        """Run as :meth:`run` does, and give what each call gives before later ones can change it."""
        returned: list[Any] = []
        for call, taken in zip(self.calls, given or self.revive(), strict=True):
            args, kwargs = _fed(taken, returned)
            returned.append(call.run(args, kwargs))
            yield returned[-1]


def start_of(tensor: Tensor) -> int:
    """Return where a tensor's values begin in memory; 0 where it has no memory of its own."""
    return tensor.data_ptr() if address_of(tensor) else 0


def objects_in(value: Any) -> list[Any]:
    """Find what is neither a tensor nor a plain value in what a call gives, in order."""
    return [part for part in _leaves(value) if not isinstance(part, (Tensor, *NOT_COPIED))]


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Rebuild tuples, lists and dictionaries around changed parts."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        # Its own ``__new__`` may take nothing but what belongs there, as that of packed sequences does.
        return tuple.__new__(type(value), (mapped(part, change) for part in value))
    if type(value) in (tuple, list):
        return type(value)(mapped(part, change) for part in value)
    if type(value) is dict:
        return {key: mapped(part, change) for key, part in value.items()}
    return change(value)


def _leaves(value: Any) -> list[Any]:
    """List what tuples, lists and dictionaries hold in the end."""
    found: list[Any] = []
    mapped(value, found.append)
    return found


def _fed(value: Any, returned: list[Any]) -> Any:
    def feed(part: Any) -> Any:
        if not isinstance(part, Fed):
            fed = isinstance(part, FedObject)
            return objects_in(returned[part.call])[part.place] if fed else part
        given = all_tensors(returned[part.call])[part.place]
        if given.stride() != part.given:
            # What was put in its place may be laid out in another way, and is viewed below.
            laid_out = torch.empty_strided(
                given.size(), part.given, dtype=given.dtype, device=given.device
            )
            given = laid_out.copy_(given)
        if part.offset == 0 and given.size() == part.size and given.stride() == part.stride:
            return given
        return given.as_strided(part.size, part.stride, given.storage_offset() + part.offset)

    return mapped(value, feed)
