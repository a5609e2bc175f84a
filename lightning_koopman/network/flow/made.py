"""What a module call makes, told from what it was given and merely hands on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.network.flow.inputs import Call
from lightning_koopman.network.flow.shared_memory import further_tensors
from lightning_koopman.network.tensors import all_tensors, first_real, has_places, is_real


class Given:
    """The tensors that a call is given, as they are before it runs.

    A module may hand on what it took beside what it makes, and write that into the very dictionary that
    it took: what it was given shows before the call alone.

    Example:
        >>> x = torch.ones(2, 3)
        >>> given = Given({"x": x})
        >>> given.first_made({"x": x, "h": 2 * x}, x)
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """

    def __init__(self, value: Any) -> None:
        self.tensors = all_tensors(value)
        self._known = {id(tensor): (tensor, _mark_of(tensor)) for tensor in self.tensors}

    def passes(self, tensor: Tensor) -> bool:
        """Check whether a tensor is one that was given, and holds what it held."""
        if id(tensor) not in self._known:
            return False
        _, mark = self._known[id(tensor)]
        if isinstance(mark, Tensor):
            return torch.equal(mark, tensor[:1])
        return mark is None or mark == tensor._version

    def first_made(self, value: Any, first: Tensor | None) -> Tensor | None:
        """Find the ``first`` tensor that a call gives, or, if it hands that on, the first that it makes.

        Where it makes none, what it hands on is what it gives.
        """
        if first is None or isinstance(value, Tensor) or not self.passes(first):
            return first
        made = (t for t in all_tensors(value) if is_real(t) and t.ndim and not self.passes(t))
        return next(made, first)


def _mark_of(tensor: Tensor) -> int | Tensor | None:
    """Return what tells whether a tensor is written to later; nothing where that cannot be told."""
    if not tensor.is_inference():
        return tensor._version
    # Made under inference mode, a tensor counts no writes; these change its first sample, as a rule.
    plain = tensor.ndim and has_places(tensor) and not tensor.is_quantized
    return tensor[:1].clone() if plain else None


class Made:
    """Finds what calls make: a state and further tensors, later where the first pass had them."""

    def __init__(self) -> None:
        # Of calls that hand on what they take.
        self._places: dict[Call, tuple[int, ...]] = {}
        self.start_call()

    def start_call(self) -> None:
        """Forget what modules were given in the call of the network before."""
        self._given: dict[int, Given] = {}

    def clear(self) -> None:
        """Forget all places."""
        self._places.clear()

    def take(self, module: nn.Module, given: Any) -> None:
        """Remember what a module is given before it runs, as the first pass has to."""
        self._given[id(module)] = Given(given)

    def find(
        self, call: Call, output: Any, given: Any
    ) -> tuple[Given | None, Tensor | None, list[tuple[int, Tensor]]]:
        """Return what was remembered of a call, its state, and further tensors with their places."""
        before = self._given.pop(call[0], None)
        if isinstance(output, Tensor):
            return before, first_real(output), []
        real = list(filter(is_real, all_tensors(output)))
        if (places := self._places.get(call)) is not None:
            found = [(place, real[place]) for place in places if place < len(real)]
            return before, found[0][1] if found else None, found[1:]
        first = first_real(output)
        if before is not None:
            first = before.first_made(output, first)
        if first is None:
            return before, None, []
        further = further_tensors(
            output, first, all_tensors(given) if before is None else before.tensors
        )
        if before is not None and any(map(before.passes, real)):
            own = [place for place, tensor in enumerate(real) if tensor is first]
            self._places[call] = (*own[:1], *(place for place, _ in further))
        return before, first, further
