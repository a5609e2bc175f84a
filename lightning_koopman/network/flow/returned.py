"""Finds in the first pass what the tensors that a network returns are made of, and which are states."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_koopman.network.access.watch import unseen
from lightning_koopman.network.axes.recorded import Pick, Recorded
from lightning_koopman.network.flow.inputs import Call, Inputs
from lightning_koopman.network.flow.provenance import Provenance
from lightning_koopman.network.names import module_of, numbered
from lightning_koopman.network.tensors import (
    address_of,
    all_tensors,
    is_real,
    plain,
    tensors_inside,
    varies,
)


class End(NamedTuple):
    """A tensor that a network returns and that is a state of its own.

    Attributes:
        name: Of the state.
        tensor: As it was returned.
        is_further: Whether it is made of one state alone, by what no component does.
    """

    name: str
    tensor: Tensor
    is_further: bool


class Returned:
    """What a network returned in the first pass.

    Attributes:
        made_of: The states that reach each tensor with samples. Those of several states are states
            themselves, under the same name, as is what is less than the last one or more was done with.
        sizes: How many numbers each tensor holds.
        in_losses: The states that reach single numbers, as losses are, with the position that is read of
            each, if it is one alone.
        rows: How many rows the tensors have that are made of states.
        changes: The last state, where every tensor that is made of it alone is another function of it,
            without being a state of its own.
        compares: Whether nothing with samples is made of states but similarities between them.
    """

    def __init__(self, provenance: Provenance, inputs: Inputs, whole: Call) -> None:
        self.made_of: dict[str, frozenset[str]] = {}
        self.sizes: dict[str, int] = {}
        self.in_losses: dict[str, Pick | None] = {}
        self.rows: set[int] = set()
        self.changes: str | None = None
        self.compares = False
        self._provenance, self._inputs, self._whole = provenance, inputs, whole
        self._places: dict[int, str] = {}
        self._further: set[str] = set()

    def find(
        self,
        name: str,
        module: nn.Module,
        call: Any,
        output: Any,
        last: tuple[str, Tensor] | None,
        moved: Set[str],
    ) -> None:
        """Find what returned tensors were made of.

        Args:
            name: Of the first of them.
            module: That returned them.
            call: What it was called with.
            output: What it returned.
            last: The name and the tensor of the last state, if what is made of it may be one, too.
            moved: States whose rows are in an order of the network's own.
        """
        with unseen():
            further = [] if last is None else self._beyond(*last, output)
        # The last state is no end where weights that are no component's go on with it.
        is_read = any(map(self._provenance.holds_own, further))
        gone_on_with = frozenset({last[0]}) if last and is_read else frozenset[str]()
        for place, tensor in enumerate(tensors_inside(output)):
            if not tensor.ndim:
                picks = self._provenance.flow.picks(tensor)
                for state in self._provenance.parts_of(tensor) or ():
                    pick = picks.get(state)
                    self.in_losses[state] = pick if self.in_losses.get(state, pick) == pick else None
            if self._provenance.compares_samples(tensor, all_tensors(call), module):
                self.compares |= bool(self._provenance.parts_of(tensor))
                continue
            if not tensor.ndim or not is_real(tensor):
                continue
            sources = self._provenance.parts_of(tensor)
            # What a network hands on, as targets of whole graphs, does not tell what its rows are.
            if not tensor.is_nested and (sources is None or self._inputs.beyond(sources)):
                self.rows.add(len(tensor))
            is_further = any(tensor is other for other in further)
            if sources and (is_further or sources != gone_on_with):
                own = numbered(name, len(self.made_of))
                # The same numbers may be returned twice, under two names.
                if {known for known, _ in self._provenance.stages(tensor)}.isdisjoint(self.made_of):
                    self._provenance.mark_returned(tensor, own)
                self.sizes[own] = tensor.numel()
                self.made_of[own] = sources = sources | self._mixed_into(own, tensor, call)
                if is_further:
                    self._further.add(own)
                if len(sources) > 1 or sources & moved or is_further:
                    self._places[place] = own
        self.compares &= not self.made_of

    def is_of_states(self, output: Any) -> bool:
        """Check whether any of what was returned is made of states."""
        return any(self._inputs.beyond(self._provenance.of(tensor)) for tensor in all_tensors(output))

    def joins(self, result: Any, states: Mapping[str, Recorded], components: Collection[str]) -> bool:
        """Check whether all of a result mixes states that are returned apart, or were not returned."""
        sizes = {name: record.tensor.numel() for name, record in states.items()} | self.sizes
        mixed = []
        for tensor in all_tensors(result):
            known = self._provenance.parts_of(tensor) or frozenset()
            given = {n for n, _ in self._provenance.stages(tensor)} & self.made_of.keys()
            inside = frozenset[str]().union(*(self.made_of[name] for name in given))
            apart = {name for name in known - inside if module_of(name) in components}
            if made_of := given | apart:
                # Side by side, they are the state that the chain ends with.
                beside = tensor.numel() == sum(sizes.get(name, 0) for name in made_of)
                mixed.append(len(made_of) > 1 and len(inside | apart) > 1 and not beside)
        return any(mixed) and all(mixed)

    def ends(self, output: Any) -> list[End]:
        """Find the tensors that are states of their own, in any pass."""
        returned = enumerate(tensors_inside(output)) if self._places else ()
        found = [(self._places[place], tensor) for place, tensor in returned if place in self._places]
        return [End(name, tensor, name in self._further) for name, tensor in found]

    def sources(self, name: str, tensor: Tensor) -> frozenset[str]:
        """Return what a tensor that is a state was made of, with sums where it reads these."""
        parts = self._provenance.parts_of(tensor) or frozenset()
        return self.made_of[name] - parts | (self._provenance.of(tensor) or frozenset())

    def _mixed_into(self, name: str, tensor: Tensor, call: Any) -> frozenset[str]:
        """Find the data that are mixed into states in a tensor."""
        # Of those that a component took in whatever form, for others may be targets.
        raw = self._provenance.taken(self._inputs.unclaimed(tensor))
        if raw and self._inputs.beyond(self._provenance.parts_of(tensor)) and tensor.ndim > 1:
            self._inputs.find_mixed(name, raw, self._inputs.data(call), self._whole)
        return frozenset(self._inputs.mixed_in.get(name, ()))

    def _beyond(self, name: str, state: Tensor, output: Any) -> list[Tensor]:
        """Find what is made of one state alone, if less than it or with weights of its own."""
        parts, weighted, unlike = list[Tensor](), list[Tensor](), list[bool]()
        for tensor in filter(is_real, tensors_inside(output)):
            values = plain(tensor).detach()
            if tensor.is_nested or self._provenance.parts_of(tensor) != frozenset({name}):
                continue
            alike = tensor.ndim > 0 and (state.ndim == 2 or tensor.ndim <= state.ndim)
            # A single sample has nothing to differ from.
            tells = values.isfinite().all() and (values.shape[:1] == (1,) or varies(values))
            if not alike or not tells:
                continue
            # A cast, as to the caller's type, makes nothing else of it.
            cast = state.to(values.dtype)
            shifted = tensor.shape == cast.shape and _are_shifted(values[:_FEW], cast[:_FEW])
            is_part = tensor.numel() < state.numel()
            if self._provenance.holds_own(tensor) and not shifted:
                weighted.append(tensor)
            elif is_part:
                parts.append(tensor)
            if not is_part:
                moved = tensor.shape != cast.shape or _are_moved(values, cast)
                unlike.append(not (shifted or moved))
        whole = sum(part.numel() for part in parts) >= state.numel()
        found = weighted if whole else weighted + parts
        self.changes = name if unlike and all(unlike) and not found else None
        return found


_FEW = 8
"""Samples that tell what all others would."""


def _are_shifted(values: Tensor, state: Tensor) -> bool:
    """Check whether values are a state's but for a shift, as by a bias, which no credit knows of."""
    return torch.allclose(state + (values - state)[:1], values, rtol=1e-4)


def _are_moved(values: Tensor, state: Tensor) -> bool:
    """Check whether values may be those of a state in other places, by their norm and their sum."""
    if address_of(values) == address_of(state):
        return True
    one, other = values.detach().float(), state.detach().float()
    size, norm = float(other.norm()), float(one.norm())
    return abs(norm - size) <= 1e-4 * size and abs(float(one.sum() - other.sum())) <= 1e-4 * size
