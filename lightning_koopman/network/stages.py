"""What states were before further modules continued them, where something reads them as they were."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_koopman.network.provenance import Provenance

_NOTHING: frozenset[str] = frozenset()


class _Stage(NamedTuple):
    """What a module call made of a state: as it was kept, its memory, and what it was made of."""

    call: tuple[int, int]
    kept: Any
    memory: Any
    sources: frozenset[str]


class Apart(NamedTuple):
    """A state that something reads at an early stage, which it then has to be.

    Attributes:
        name: Its name.
        stage: The place of the earliest one that is read.
        kept: What was kept of it.
        calls: The module calls that made the stages, in order.
        readers: What reads later ones, and the further states that these were made of.
    """

    name: str
    stage: int
    kept: Any
    calls: list[tuple[int, int]]
    readers: dict[str, frozenset[str]]


class Stages:
    """The stages of each state of the first pass: of its component, and of modules that continue it.

    A norm or an activation that takes a component's output belongs to that component. Where something
    else reads that output too, as a connection around the norm does, the state is what both read.
    """

    def __init__(self, provenance: Provenance) -> None:
        self._provenance = provenance
        self._stages: dict[str, list[_Stage]] = {}
        self._readers: dict[str, set[tuple[str, int]]] = {}

    def add(
        self,
        name: str,
        call: tuple[int, int],
        tensor: Tensor,
        kept: Any,
        sources: Iterable[str] | None,
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
        """Find the states that something reads at an earlier stage than the last one."""
        found = []
        for name, stages in self._stages.items():
            read = {place for marks in self._readers.values() for n, place in marks if n == name}
            early = [i for i in sorted(read) if i < len(stages) - 1 and stages[i].kept is not None]
            if not early:
                continue
            first, calls = early[0], [stage.call for stage in stages]
            readers = {}
            for reader, marks in self._readers.items():
                last = max((place for n, place in marks if n == name), default=0)
                beside = _NOTHING.union(*(s.sources for s in stages[first + 1 : last + 1]))
                if beside - {reader}:
                    readers[reader] = beside - {reader}
            found.append(Apart(name, first, stages[first].kept, calls, readers))
        return found
