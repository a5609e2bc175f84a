"""Finds out in one pass which tensors of data a network takes in, and where."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from lightning_koopman.network.axes.graphs import is_edge_index, is_of_edges
from lightning_koopman.network.axes.input_data import are_alike, holds_all_of, is_mask
from lightning_koopman.network.flow.provenance import Provenance
from lightning_koopman.network.flow.shared_memory import Coverage
from lightning_koopman.network.names import numbered
from lightning_koopman.network.tensors import all_tensors, detached_copy, is_real

Call = tuple[int, int]
"""A module, by ``id``, and the number of its call."""

Beside = tuple[int, Tensor, Tensor]
"""A tensor's place among those that a call is given, the tensor, and a copy of it."""


class Inputs:
    """The inputs x_0 of a network: data as components take them, alone or mixed into states.

    Attributes:
        names: All inputs.
        at: By call, those that it takes, by their places among the tensors given.
        mixed_in: By component, those that are mixed into states which it takes, and their places among
            what the network is given.
        half_seen: Components that take data of the batch beside states, where no call shows the data.
        changed: Components that take data of the batch mixed into states otherwise than they came.
    """

    def __init__(self, provenance: Provenance, name: str) -> None:
        self.names: set[str] = set()
        self.at: dict[Call, dict[int, str]] = {}
        self.mixed_in: dict[str, dict[str, int]] = {}
        self.half_seen: list[str] = []
        self.changed: list[str] = []
        self._provenance, self._name = provenance, name
        self._covered = Coverage()

    def clear(self) -> None:
        """Forget all inputs."""
        for known in (self.names, self.at, self.mixed_in, self.half_seen, self.changed, self._covered):
            known.clear()

    def keep(self, names: Collection[str]) -> None:
        """Forget all inputs but some."""
        self.names &= {*names}
        self.at = {
            call: {place: name for place, name in taken.items() if name in self.names}
            for call, taken in self.at.items()
        }
        self.mixed_in.clear()

    def end_pass(self) -> None:
        """Let go of the data of the pass."""
        self._covered.clear()

    def beyond(self, sources: frozenset[str] | None) -> bool:
        """Check whether there is more among the sources of a value than inputs."""
        return bool(sources and sources - self.names)

    def unclaimed(self, value: Any) -> frozenset[str]:
        """Return the labels of the data in a value that are no inputs yet, or but in part."""
        return self._provenance.unclaimed(value, self._covered.misses)

    def data(self, whole: Sequence[Any]) -> list[Tensor]:
        """Find what the network is called with, or the batch of a step that calls its parts itself."""
        return list(filter(is_real, all_tensors(whole) if whole else self._provenance.data))

    def find(
        self, call: Call, first: Tensor, given: Sequence[Tensor], *, with_states: bool, nothing_ran: bool
    ) -> list[Beside]:
        """Let data that a component takes be inputs; return those that it takes beside states."""
        if self._provenance.is_idle(first):
            # Behind learned queries come the data.
            first = next((t for t in filter(is_real, given) if self._provenance.is_fresh(t)), first)
            nothing_ran = nothing_ran and not self._provenance.is_idle(first)
        beside: list[Beside] = []
        indices = list(filter(is_edge_index, given))
        for place, tensor in enumerate(filter(is_real, given)):
            if tensor is first:
                fresh = self._provenance.is_fresh(tensor, self.names)
                if self._is_further_part(tensor) or (nothing_ran if fresh is None else fresh):
                    self.add(call, place, tensor)
            # By labels first, for values of all states of a dense network take long to look through.
            elif self._is_new(tensor) and (are_alike(tensor, first) or is_of_edges(tensor, indices)):
                if with_states:
                    # What compares states with it, as losses do, shows by what it gives.
                    beside.append((place, tensor, detached_copy(tensor)))
                else:
                    self.add(call, place, tensor)
        return beside

    def find_mixed(
        self, component: str, labels: frozenset[str], given: Sequence[Tensor], call: Call
    ) -> bool:
        """Find data of the batch, by their labels, among what the network is given.

        Returns whether all of them were there.
        """
        for place, tensor in enumerate(given):
            raw = self.unclaimed(tensor)
            if raw and raw <= labels and (raw & self._provenance.beside or not is_mask(tensor)):
                added = self.add(call, place, tensor)
                self.mixed_in.setdefault(component, {})[added] = place
                if raw & self._provenance.changed and component not in self.changed:
                    self.changed.append(component)
        data = filter(self.unclaimed, self._provenance.data_of(labels))
        if any(is_real(tensor) and not is_mask(tensor) for tensor in data):
            self.half_seen.append(component)
            return False
        return True

    def without_mixed(self, component: str) -> None:
        """Forget what was found mixed into what a component takes."""
        self.mixed_in.pop(component, None)
        self.half_seen = [other for other in self.half_seen if other != component]

    def add(self, call: Call, place: int, tensor: Tensor) -> str:
        """Let a tensor that is taken be an input from now on, and return its name."""
        made_of = self._provenance.made_of(tensor)
        for data in made_of:
            self._covered.open(data)
        whole = self._covered.knows(tensor)
        self._covered.add(tensor)
        if not whole and made_of and all(holds_all_of(tensor, data) for data in made_of):
            whole = True
            for data in made_of:
                self._covered.add(data)
        name = numbered(self._name, len(self.names))
        self.at.setdefault(call, {})[place] = name
        self.names.add(name)
        self._provenance.claim(tensor, name, whole=whole)
        return name

    def _is_new(self, tensor: Tensor) -> bool:
        """Check whether a tensor is made of data alone, of which some are no input yet."""
        fresh = self._provenance.is_fresh(tensor, self.names) is True
        return fresh or self._is_further_part(tensor)

    def _is_further_part(self, tensor: Tensor) -> bool:
        """Check whether a component takes more of what an input is a part of, as steps in time are."""
        sources = self._provenance.of(tensor)
        if not sources or not sources <= self.names:
            return False
        if self._covered.knows(tensor):
            return self._covered.misses(tensor)
        # A copy of some part, nobody knows which: then it is more, unless all was taken.
        return any(map(self._covered.misses, self._provenance.made_of(tensor)))
