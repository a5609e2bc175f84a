"""The sums of states that modules and functions take, and how later passes find these again."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_koopman.network.access.watch import Watcher, flat, kept_out_of_the_pass
from lightning_koopman.network.axes.recorded import Recorded
from lightning_koopman.network.capture.calls import Calls, Pass
from lightning_koopman.network.capture.chosen import Chosen
from lightning_koopman.network.capture.kept_states import KeptStates
from lightning_koopman.network.capture.stages import Stages
from lightning_koopman.network.names import is_sum, numbered, sum_name
from lightning_koopman.network.operators import COPIES, Operator
from lightning_koopman.network.tensors import (
    all_tensors,
    is_all_of_memory,
    is_real,
    order_of_axes,
    view_of_memory,
    with_axes,
)

# These make room or copies, which passes differ in as samples lie otherwise in memory, and nothing new.
_SAME_VALUES = COPIES | {
    *("copy_", "contiguous", "lift_fresh", "_unsafe_view", "_reshape_alias"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}


class Takers(Watcher):
    """Tells the calls of one pass apart by what ran before them, and finds them again in later passes.

    A call is known by the component whose call ended last, and how often it was made since then; that of
    an operator also by what was computed since then, so that none is found where something else was.
    Where another component ended last, as of experts that samples are sent to in turns, it is the one of
    its name that comes as late in the pass.

    Args:
        on_found: Called with what was noted of an operator, and the tensors that it takes by then.
        running: Components that run, of which operators are not looked at.

    Attributes:
        is_ours: Whether what runs now is none of the network's operators.
    """

    def __init__(
        self, on_found: Callable[[Any, list[Tensor]], None], running: Collection[int] = ()
    ) -> None:
        super().__init__()
        self._on_found, self._running = on_found, running
        self._noted: dict[Hashable, list[Any]] = defaultdict(list)
        self._noted_late: dict[tuple[Hashable, int], list[tuple[Any, Any]]] = defaultdict(list)
        # The names of all that was noted.
        self.names: set[Hashable] = set()
        self.is_ours = False
        self.begin(None)

    @property
    def watches(self) -> bool:
        """Whether there are operators to find."""
        return any(isinstance(name, str) for name in self.names)

    def begin(self, call: Any) -> None:
        """Note that a call of a component ended, or with ``None``, that a call of the network begins."""
        self._behind, self._computed = call, 0
        if call is None:
            self._counts: Counter[Hashable] = Counter()
            self._found: set[Any] = set()

    def look(self, name: Hashable, computed: int = 0) -> list[Any]:
        """Return what was noted of the call that is about to be made, or began, of something."""
        here = self._behind, computed, name
        self._counts.update((name, here))
        self._here = (*here, self._counts[here]), (name, self._counts[name])
        place, late = self._here
        found = self._noted.get(place, [])
        self._found.update(found)
        known = self._noted_late.get(late, ())
        # Should it come where it was noted, too, that counts.
        return found + [
            what for behind, what in known if behind != self._behind and what not in self._found
        ]

    def note(self, what: Hashable) -> None:
        """Remember something of the call that was looked at last."""
        place, late = self._here
        self._noted[place].append(what)
        self._noted_late[late].append((self._behind, what))
        self.names.add(late[0])

    def forget(self, which: Callable[[Any], bool]) -> None:
        """Forget what was noted, where it is so."""
        self.names.clear()
        for noted in self._noted.values():
            noted[:] = [what for what in noted if not which(what)]
        for (name, _), known in self._noted_late.items():
            known[:] = [(behind, what) for behind, what in known if not which(what)]
            self.names |= {name} if known else set()

    @kept_out_of_the_pass()
    def precede(self, op: Operator, args: tuple[Any, ...], kwargs: Any) -> None:
        """Tell the operator that is about to run from others, and show what it takes if it was noted."""
        if self.is_ours or self._running:
            return
        if not (op.is_view or op.full_name in _SAME_VALUES):
            self._computed = hash((self._computed, op.full_name))
        for what in self.look(op.full_name, self._computed):
            self._on_found(what, list(flat((*args, *kwargs.values()))))


class _Sum(NamedTuple):
    """How later passes find a sum of states in what takes it.

    Attributes:
        place: Among the tensors that are taken.
        order: That its axes had as it was added up; ``None`` where it is taken in another shape.
        like: A state that then has its shape.
        axes: The order of that state's axes in which the sum lies in memory.
    """

    name: str
    place: int
    order: tuple[int, ...] | None
    like: str
    axes: tuple[int, ...]


class Sums:
    """Records sums of states that something takes, for what reads these reads no parts of them.

    Attributes:
        known: Those that are states in a network to compare with; these are all there are.
        takers: What finds in later passes what takes them.
    """

    def __init__(
        self, current: Pass, calls: Calls, kept: KeptStates, stages: Stages, chosen: Chosen
    ) -> None:
        self._pass, self._calls, self._chosen = current, calls, chosen
        self._kept, self._stages = kept, stages
        self._provenance, self._inputs = kept.provenance, kept.inputs
        self.known: Collection[str] | None = None
        self.takers = Takers(self._on_function_again, current.running)
        self.start_call()

    def start_call(self) -> None:
        """Begin a call of the network."""
        # How often modules, by id, were called that may take sums, and functions took some, by name.
        self._taken_by: Counter[int | str] = Counter()
        self.takers.begin(None)

    def on_taken(self, module: nn.Module, given: Any) -> None:
        """Record sums of states that no module took before."""
        call = self._taken_by[id(module)]
        self._taken_by[id(module)] += 1
        known = self.takers.look(id(module))
        tensors = [tensor for tensor in all_tensors(given) if is_real(tensor) and not tensor.is_nested]
        if not self._pass.is_first:
            for found in known:
                self._add_again(found, module, tensors, given)
            return
        called = numbered(self._chosen.names[id(module)], call)
        for place, tensor in enumerate(tensors):
            self._add(sum_name(f"{called}[{place}]" if place else called), place, tensor, given)

    def on_function(self, tensor: Tensor, function: str, place: int, goes_on: bool) -> None:
        """Record a sum of states that a function takes, as the first pass shows."""
        current = self._pass
        # Of a step that goes on with what the network returned, as losses do, nothing is a state.
        is_over = not current.is_first or current.closed or self._calls.is_over
        if is_over or current.running or not is_real(tensor):
            return
        made_of = self._provenance.of(tensor) or frozenset()
        if goes_on and len(made_of - self._provenance.idle) < 2:
            # Of what functions make of one state, one after the other, the last one is a state.
            return
        name = sum_name(numbered(f"{function}()", self._taken_by[function]))
        self._taken_by[function] += 1
        self._add(name, place, tensor)

    def _on_function_again(self, found: _Sum, tensors: list[Tensor]) -> None:
        """Record a sum that a function takes as in the first pass."""
        if not (self._pass.is_first or self._pass.closed):
            self._add_again(found, self._chosen.model, tensors)

    def _add_again(
        self, found: _Sum, module: nn.Module, tensors: Sequence[Tensor], given: Any = None
    ) -> None:
        """Record a sum that is known to be among some tensors, as it was added up."""
        tensor = tensors[found.place] if found.place < len(tensors) else None
        if tensor is None or not is_real(tensor):
            return
        if found.order is not None:
            self._kept.add(found.name, module, with_axes(tensor, found.order), None, given)
            return
        shape = self._kept.shapes.get(found.like)
        if shape is not None and shape.numel() == tensor.numel() and tensor.is_contiguous():
            whole = tensor.view([shape[axis] for axis in found.axes])
            back = sorted(range(whole.ndim), key=found.axes.__getitem__)
            self._kept.add(found.name, module, whole.permute(back), None, given)

    def _add(self, name: str, place: int, tensor: Tensor, given: Any = None) -> None:
        """Record a sum of states, if it is one and new, and note how later passes find it."""
        made_of = self._provenance.exactly(tensor) or frozenset()
        states = map(self._kept.states.get, sorted(made_of))
        parts = [part for part in states if isinstance(part, Recorded)]
        if not parts or not self._is_sum(name, tensor, made_of):
            return
        # Rows are made as those of what was added up.
        like, whole = self._laid_out(tensor, parts)
        if like is None:
            return
        order = order_of_axes(view_of_memory(tensor), view_of_memory(whole))
        axes = sorted(range(whole.ndim), key=whole.stride, reverse=True)
        if order is None and not (tensor.is_contiguous() and whole.permute(axes).is_contiguous()):
            return
        self._stages.read(name, tensor)
        self._kept.add(name, like.module, whole, made_of, given)
        self._provenance.mark_sum(tensor, name, made_of)
        known = None if order is None else tuple(order)
        self.takers.note(_Sum(name, place, known, like.name, tuple(axes)))

    def _laid_out(self, tensor: Tensor, parts: Sequence[Recorded]) -> tuple[Recorded | None, Tensor]:
        """Find a state of the shape of a sum that was made of it, and the sum with its axes as there."""
        whole = self._provenance.flow.as_added(tensor)
        parts = [part for part in parts if part.tensor.numel() == tensor.numel()]
        alike = [part for part in parts if sorted(part.tensor.shape) == sorted(whole.shape)]
        # As it was added up or is taken, it may have that shape, but samples along another axis.
        turned = map(whole.permute, itertools.permutations(range(whole.ndim)) if alike else ())
        for views in ([whole, tensor], turned):
            found = [
                (part, view)
                for view in views
                for part in alike
                if part.tensor.shape == view.shape and self._has_samples_as(part, view)
            ]
            if found:
                # Axes of one size are told apart by how both lie in memory.
                return min(found, key=lambda each: each[0].tensor.stride() != each[1].stride())
        steps = set(tensor.stride())
        for part in parts:
            # Axes are merged or split on the way, but none across others.
            nests = not (steps - {*part.tensor.stride()} and {*part.tensor.stride()} - steps)
            if part.tensor.is_contiguous() and is_all_of_memory(tensor) and nests:
                viewed = tensor.as_strided(part.tensor.shape, part.tensor.stride(), 0)
                if self._has_samples_as(part, viewed):
                    return part, viewed
        return None, tensor

    def _has_samples_as(self, part: Recorded, tensor: Tensor) -> bool:
        """Check whether samples are not known to be along another axis than in a state of that shape."""
        pairs = zip(part.places, self._provenance.flow.places(tensor), strict=True)
        return all(None in pair or len({*pair}) == 1 for pair in pairs)

    def _is_sum(self, name: str, tensor: Tensor, made_of: frozenset[str]) -> bool:
        """Check whether what is taken is a sum of states, or was in a network to compare with."""
        if self.known is not None:
            return name in self.known
        varied = made_of - self._provenance.idle
        is_made_of_sums = len(varied) > 1 or any(map(is_sum, varied))
        if not (is_made_of_sums and self._inputs.beyond(varied) and self._provenance.is_sum(tensor)):
            return False
        return not (self._inputs.unclaimed(tensor) or self._provenance.draws(tensor))
