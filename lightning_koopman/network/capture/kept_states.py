"""The states of one call of a network, as they are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.network.access.watch import unseen
from lightning_koopman.network.axes.recorded import Recorded, with_lengths_in_order
from lightning_koopman.network.flow.inputs import Call, Inputs
from lightning_koopman.network.flow.provenance import Provenance
from lightning_koopman.network.sharded import LET_IT_BE_WHOLE, whole_here
from lightning_koopman.network.tensors import (
    all_tensors,
    first_packed,
    first_real,
    is_real,
    padded,
    unpacked,
)

Keep = Callable[[Tensor, Recorded], Any]


class KeptStates:
    """Keeps the states of one call of a network, with what is known of each.

    Attributes:
        provenance: Tells how their rows came about.
        inputs: What the network takes in.
        keep: Turns a state's tensor, and what was recorded of it, into what is stored.
        states: What is stored, by name, in order of execution.
        shapes: Of the tensors, whatever is stored of them.
        moved: States whose rows are in an order of the network's own, which may be another one in each
            batch.
    """

    def __init__(self, model: nn.Module, keep: Keep, provenance: Provenance, inputs: Inputs) -> None:
        self.keep, self.moved = keep, set[str]()
        self._model, self.provenance, self.inputs = model, provenance, inputs
        self.start_call()

    def start_call(self) -> None:
        """Forget the states of the call before."""
        self.states: dict[str, Any] = {}
        self.shapes: dict[str, torch.Size] = {}

    def add(
        self,
        name: str,
        module: nn.Module,
        tensor: Tensor,
        sources: frozenset[str] | None,
        value: Any = None,
        **facts: Any,
    ) -> None:
        """Keep a state with what is known of it; it may be that of a packed sequence in a value."""
        lengths = None
        packed = first_packed(value)
        if packed is not None and packed.data is tensor:
            held, lengths = unpacked(packed)
        elif tensor.is_nested:
            held, lengths = padded(tensor, name)
        else:
            whole = whole_here(tensor)
            if whole is None:
                raise ValueError(
                    f"the state of {name!r} is a DTensor of which each process holds a part. "
                    f"{LET_IT_BE_WHOLE}"
                )
            held = whole.dequantize() if whole.is_quantized else whole
        facts["is_loss"] = facts.get("is_loss", False) and held.ndim <= 1
        self.store(tensor, Recorded(name, module, held, lengths, sources, **facts))

    def store(self, tensor: Tensor, recorded: Recorded) -> None:
        """Store what was recorded of a state, and how its rows came about."""
        self.shapes[recorded.name] = recorded.tensor.shape
        if rows := self.provenance.rows(recorded.tensor, tensor):
            recorded = replace(recorded, **rows)
            both = (recorded.orders, recorded.second_orders)
            if any(order.holds_all for orders in both for order in orders.values()):
                self.moved.add(recorded.name)
            recorded = with_lengths_in_order(recorded)
        with unseen():
            self.states[recorded.name] = self.keep(recorded.tensor, recorded)

    def add_inputs(self, call: Call, module: nn.Module, given: Any) -> None:
        """Keep what a call takes of the network's inputs."""
        own = self.inputs.at.get(call)
        if not own or first_real(given) is None:
            return
        real = list(filter(is_real, all_tensors(given)))
        for place, name in own.items():
            if place < len(real):
                idle = self.provenance.is_idle(real[place])
                self.add(name, module, real[place], frozenset(), given, is_input=True, is_idle=idle)

    def add_mixed_in(self, name: str, call: Any) -> None:
        """Keep the data that are mixed into what a component takes."""
        if not (mixed_in := self.inputs.mixed_in.get(name)):
            return
        given = self.inputs.data(call)
        for added, place in mixed_in.items():
            if place < len(given) and added not in self.states:
                self.add(added, self._model, given[place], frozenset(), is_input=True)
