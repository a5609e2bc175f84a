"""Which modules continue a component's state, and what it was before each of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_koopman.network.flow.inputs import Call
from lightning_koopman.network.flow.provenance import Provenance
from lightning_koopman.network.tensors import first_real

_NOTHING: frozenset[str] = frozenset()


class Gave(NamedTuple):
    """A state's tensor as a module call gave it, and the latest writes to it in place by then."""

    tensor: ReferenceType[Tensor]
    name: str
    call: Call
    writes: frozenset[str]


class _Stage(NamedTuple):
    """What a module call made of a state: as it was kept, its memory, and what it was made of."""

    call: Call
    kept: Any
    memory: Any
    sources: frozenset[str]


class Apart(NamedTuple):
    """A state that something reads at an early stage, which it then has to be, and what was kept of it.

    What reads later stages comes with the further states that these were made of.
    """

    name: str
    stage: int
    kept: Any
    readers: dict[str, frozenset[str]]


class Stages:
    """The stages of each state: of its component, and of modules that continue it.

    A norm or an activation that takes a component's output belongs to that component. Where something
    else reads that output too, as a connection around the norm does, the state is what both read. The
    first pass shows this; later ones follow.

    Attributes:
        merged: The calls that continue a state.
        superseded: Those that gave one which another call continued.
    """

    def __init__(self, provenance: Provenance) -> None:
        self._provenance = provenance
        self.merged, self.superseded = set[Call](), set[Call]()
        self.start_call()

    def start_call(self) -> None:
        """Forget the states of the call of the network before."""
        self._gave: dict[int, Gave] = {}
        self._taken: dict[int, Gave] = {}
        self._stages: dict[str, list[_Stage]] = {}
        self._readers: dict[str, set[tuple[str, int]]] = {}

    def clear(self) -> None:
        """Forget which calls continue states."""
        self.merged.clear()
        self.superseded.clear()

    def give(self, tensor: Tensor, name: str, call: Call) -> None:
        """Note what a call gave as a state, which the next one may continue."""
        self._gave[id(tensor)] = Gave(ref(tensor), name, call, self._provenance.flow.writes(tensor))

    def find(self, given: Any) -> Gave | None:
        """Find the state whose tensor a module takes first."""
        tensor = first_real(given)
        gave = self._gave.get(id(tensor))
        return None if gave is None or gave.tensor() is not tensor else gave

    def take(self, module: nn.Module, given: Any) -> Gave | None:
        """Remember which state a module takes, if nothing was written to it since it was given."""
        gave, tensor = self.find(given), first_real(given)
        if (
            gave is not None
            and tensor is not None
            and self._provenance.flow.writes(tensor) == gave.writes
        ):
            self._taken[id(module)] = gave
        return self._taken.get(id(module))

    def taken(self, module: nn.Module) -> Gave | None:
        """Return which state a module took, once."""
        return self._taken.pop(id(module), None)

    def merge(self, gave: Gave, call: Call) -> None:
        """Let a call continue a state, in this pass and later ones."""
        self.merged.add(call)
        self.superseded.add(gave.call)

    def add(
        self, name: str, call: Call, tensor: Tensor, kept: Any, sources: Iterable[str] | None
    ) -> None:
        """Let a tensor be the latest stage of a state."""
        stages = self._stages.setdefault(name, [])
        self._provenance.mark_stage(tensor, name, len(stages))
        memory = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        stages.append(_Stage(call, kept, memory, frozenset(sources or ()) - {name}))

    def read(self, reader: str, *values: Any, but: str | None = None) -> None:
        """Note which stages something is computed from, by what it takes or what was made of it."""
        read = self._readers.setdefault(reader, set())
        for value in values:
            read |= {mark for mark in self._provenance.stages(value) if mark[0] != but}

    def forget_freed(self, given: Any) -> None:
        """Let go of copies of stages that nobody holds, and that nothing reads, or is given now."""
        read = self._provenance.stages(given).union(*self._readers.values())
        for name, stages in self._stages.items():
            for place, stage in enumerate(stages[:-1]):
                if stage.kept is not None and (name, place) not in read and stage.memory.expired():
                    stages[place] = stage._replace(kept=None)

    def apart(self) -> list[Apart]:
        """Let what continues a state go on for itself where something else reads that state, too."""
        found = []
        for name, stages in self._stages.items():
            read = {place for marks in self._readers.values() for n, place in marks if n == name}
            early = [i for i in sorted(read) if i < len(stages) - 1 and stages[i].kept is not None]
            if not early:
                continue
            first, calls = early[0], [stage.call for stage in stages]
            self.superseded.difference_update(calls[first:])
            self.merged.difference_update(calls[first + 1 :])
            readers = {}
            for reader, marks in self._readers.items():
                last = max((place for n, place in marks if n == name), default=0)
                beside = _NOTHING.union(*(s.sources for s in stages[first + 1 : last + 1]))
                if beside - {reader}:
                    readers[reader] = beside - {reader}
            found.append(Apart(name, first, stages[first].kept, readers))
        return found
