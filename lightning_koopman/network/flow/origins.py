"""Finds out, in the first pass, what each component's state was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_koopman.network.axes.input_data import is_integer_data, is_mask
from lightning_koopman.network.flow.inputs import Beside, Call, Inputs
from lightning_koopman.network.flow.provenance import Provenance
from lightning_koopman.network.tensors import (
    address_of,
    all_tensors,
    detached_copy,
    first_real,
    has_places,
    is_real,
)

_NOTHING: frozenset[str] = frozenset()


class Origin(NamedTuple):
    """What a module was given, as far as it is known.

    Attributes:
        sources: The states that it was computed from.
        from_float: Whether a floating-point tensor is in it.
        targets: Data that no component takes, where they are given beside states.
        is_idle: Whether nothing is in it but what the network holds itself.
        raw: Labels of the data of the batch in it that no component took before.
        beside: Data of the batch given beside states: their place among the tensors given, the tensors
            themselves, and copies of them.
        taken: What it takes first, where that is data of the batch mixed into states that are made of
            nothing but data themselves.
        alone: Whether it reads nothing else, for what it takes is recorded as it is.
        draws: Whether random numbers are in it.
        parts: By input that it takes, those that have the same labels.
        integers: Integers of the batch in it, beside floating-point numbers.
    """

    sources: frozenset[str] | None = None
    from_float: bool = True
    targets: Sequence[Tensor] = ()
    is_idle: bool = False
    raw: frozenset[str] = _NOTHING
    beside: tuple[Beside, ...] = ()
    taken: Beside | None = None
    alone: bool = False
    draws: bool = False
    parts: Mapping[str, frozenset[str]] = MappingProxyType({})
    integers: Sequence[Tensor] = ()


class NewInput(NamedTuple):
    """Data that a component takes beside states: their name as an input, and a copy of them.

    Attributes:
        name: Of the input.
        copied: The data as they were when the component was called.
        holds: The states that are mixed into them.
    """

    name: str
    copied: Tensor
    holds: frozenset[str]


class Origins:
    """What the components of the first pass were given, and what of it is in what they gave.

    Attributes:
        uncounted: Components that take integers of the batch beside floating-point numbers.
        noisy: Components that random numbers go into beside states, or that draw them.
        ancestor: The call of the components' common ancestor, which stands for that of the network.
    """

    def __init__(
        self, provenance: Provenance, inputs: Inputs, names: Mapping[int, str], ancestor: Call
    ) -> None:
        self.uncounted: list[str] = []
        self.noisy: list[str] = []
        self._provenance, self._inputs = provenance, inputs
        self._names, self.ancestor = names, ancestor
        self.start_call()

    def start_call(self) -> None:
        """Forget what the call before was made of."""
        self._pending: dict[int, Origin] = {}
        self._of: dict[str, Origin] = {}

    def clear(self) -> None:
        """Forget what was told of components."""
        self.uncounted.clear()
        self.noisy.clear()

    def take(self, call: Call, given: Any, states: Set[str]) -> None:
        """Find what a module is given, before it runs; data that it takes become inputs."""
        tensor, tensors = first_real(given), all_tensors(given)
        real = [] if tensor is None else list(filter(is_real, tensors))
        beside: list[Beside] = []
        parts: dict[str, frozenset[str]] = {}
        sources = self._provenance.of(given)
        others = self._provenance.others(given) if self._inputs.beyond(sources) else []
        self._provenance.take(given)
        if tensor is not None:
            beside = self._inputs.find(
                call,
                tensor,
                tensors,
                with_states=self._inputs.beyond(sources),
                nothing_ran=not states - self._provenance.idle,
            )
            sources = self._provenance.of(given)
        if own := self._inputs.at.get(call, {}):
            # Of parts of one tensor, whose labels are those of its memory, each is one.
            sources = None if sources is None else sources | {*own.values()}
            parts = {n: self._provenance.of(real[place]) or _NOTHING for place, n in own.items()}
        # Data in a tensor of their own are beside states, not mixed into them.
        own_places = {id(other) for _, other, _ in beside}
        mixed = [t for t in tensors if self._provenance.of(t) and id(t) not in own_places]
        raw, taken, integers = self._inputs.unclaimed(mixed), None, list[Tensor]()
        if raw and tensor is not None and self._are_beginnings(sources):
            place = next(i for i, other in enumerate(real) if other is tensor)
            taken = place, tensor, detached_copy(tensor)
        if tensor is not None:
            fresh = filter(self._provenance.unclaimed, tensors)
            integers = [t for t in fresh if is_integer_data(t, tensor)]
        self._pending[call[0]] = Origin(
            sources,
            tensor is not None,
            [other for other in others if not _counts_rows(other, mixed)],
            self._provenance.is_idle(given),
            raw,
            tuple(beside),
            taken,
            draws=self._provenance.draws(given),
            parts=parts,
            integers=integers,
        )

    def of(
        self,
        name: str,
        call: Call,
        made: Any,
        tensor: Tensor,
        states: Set[str],
        whole: Sequence[Any],
    ) -> tuple[Origin, list[NewInput]]:
        """Find what is in what a component made, and data beside states that are inputs from now on.

        Args:
            name: Of the component.
            call: That of a module of it: those that continue it add states that reach them otherwise.
            made: What it gave, without what it handed on.
            tensor: The state in it.
            states: Names of all that was recorded so far.
            whole: What the network was called with, if it was.
        """
        new: list[NewInput] = []
        if name not in self._of:
            origin = self._in_effect(self._pending.get(call[0], Origin()), made)
            if origin.from_float and any(self._may_read(t, made) for t in origin.integers):
                self.uncounted.append(self._names[call[0]])
            origin = origin._replace(targets=self._compared(origin.targets, made, tensor))
            self._of[name] = self._with_mixed_in(name, call, origin, tensor, whole, new)
        self._of[name] = self._with_own(name, self._of[name], made, states)
        return self._of[name], new

    def _in_effect(self, origin: Origin, made: Any) -> Origin:
        """Leave out of what a component was given what did not reach what it made of it."""
        exact = self._provenance.exactly(made)
        if exact is None or not origin.sources:
            return origin
        raw = self._inputs.unclaimed(made)
        if not origin.sources & exact:
            # Such as the integers of a batch alone, where it was given all of the batch.
            from_batch = raw and not exact
            return origin._replace(sources=exact, from_float=False, raw=raw) if from_batch else origin
        beside = tuple(each for each in origin.beside if self._provenance.may_reach(each[1], made))
        exact |= {name for name, alike in origin.parts.items() if alike & exact}
        return origin._replace(sources=origin.sources & exact, raw=origin.raw & raw, beside=beside)

    def _may_read(self, tensor: Tensor, made: Any) -> bool:
        """Check whether a tensor that a component was given may be in what it made."""
        return self._provenance.exactly(made) is None or self._provenance.may_reach(tensor, made)

    def _compared(self, targets: Sequence[Tensor], made: Any, output: Tensor) -> list[Tensor]:
        """Leave out of data what is not compared with states, by a number per sample or for all of them.

        A module may be given a whole batch, and read of it the graphs alone that it sums nodes over.
        """
        fit = (t for t in targets if not output.ndim or len(output) in t.shape)
        return [target for target in fit if self._provenance.may_reach(target, made)]

    def _with_mixed_in(
        self,
        name: str,
        call: Call,
        origin: Origin,
        output: Tensor,
        whole: Sequence[Any],
        new: list[NewInput],
    ) -> Origin:
        """Let the data that a component takes mixed into states, or beside them, be inputs."""
        if origin.draws and self._inputs.beyond(origin.sources):
            self.noisy.append(name)

        def add(beside: Beside, holds: frozenset[str] = _NOTHING) -> str:
            place, tensor, copied = beside
            new.append(NewInput(self._inputs.add(call, place, tensor), copied, holds))
            return new[-1].name

        added: set[str] = set()
        # What gives a number per sample compares them, as a rule.
        if (origin.raw or origin.beside) and self._inputs.beyond(origin.sources) and output.ndim > 1:
            added |= {add(beside) for beside in origin.beside}
            as_it_came = bool(whole) and not origin.raw & self._provenance.changed
            taken = None if as_it_came else origin.taken
            if taken is None:
                given = self._inputs.data(whole)
                known = self._inputs.find_mixed(name, origin.raw, given, self.ancestor)
                if not all(map(is_real, self._provenance.data_of(origin.raw & self._provenance.beside))):
                    self.uncounted.append(name)
                taken = None if known else origin.taken
            if taken is not None:
                # Data that no call shows as they are, mixed into what is made of data alone: an input.
                self._inputs.without_mixed(name)
                mixed = add(taken, origin.sources or _NOTHING)
                return origin._replace(sources=frozenset({mixed, *added}), alone=True)
        added |= self._inputs.mixed_in.get(name, {}).keys()
        return origin._replace(sources=(origin.sources or _NOTHING) | added) if added else origin

    def _with_own(self, name: str, origin: Origin, made: Any, states: Set[str]) -> Origin:
        """Add the states that reached a component past its arguments, as by attributes of its own."""
        if not origin.draws and self._provenance.draws(made):
            self.noisy.append(name)
        if origin.alone:
            return origin
        own = (self._provenance.of(made) or _NOTHING) & (states - {name})
        return origin._replace(sources=(origin.sources or _NOTHING) | own) if own else origin

    def _are_beginnings(self, sources: frozenset[str] | None) -> bool:
        """Check whether states read no others, as embeddings of integers do."""
        known = (self._of.get(name) for name in (sources or _NOTHING) - self._inputs.names)
        return all(origin is not None and not origin.sources for origin in known)

    def continues(self, module: nn.Module, given: Any, output: Any, name: str, raw: Tensor) -> bool:
        """Check whether an output still is a component's state, and the module no loss.

        It is if it holds one row per sample of it; a loss compares it with data that no component takes.
        """
        # A module may look at a state for its type or length alone, as rotary embeddings do.
        tensor = first_real(output)
        if (
            tensor is None
            or tensor.shape[:1] != raw.shape[:1]
            or self._provenance.compares_samples(tensor, [raw], module)
        ):
            return False
        if self._puts_together(given, name, raw, tensor):
            return False
        return self._provenance.may_hold(tensor, name) and not self._is_loss(module, given, tensor, raw)

    def _puts_together(self, given: Any, name: str, raw: Tensor, tensor: Tensor) -> bool:
        """Check whether a module is given more beside a state, as sums, gates and attention are."""
        others = [other for other in all_tensors(given) if other is not raw]
        if any(self._inputs.beyond((self._provenance.of(t) or _NOTHING) - {name}) for t in others):
            return True
        # Lengths, masks and scores of positions may say how to pool it, and views of it are it.
        return tensor.ndim == raw.ndim and any(
            is_real(other)
            and other.ndim > 1
            and (self._provenance.of(other) or self._inputs.unclaimed(other))
            and address_of(other) != address_of(raw)
            and not is_mask(other)
            for other in others
        )

    def _is_loss(self, module: nn.Module, given: Any, tensor: Tensor, raw: Tensor) -> bool:
        """Check whether a module compares a state with data that no component takes, such as targets."""
        if isinstance(module, nn.modules.loss._Loss):
            return True
        others = self._provenance.others(given)
        if not others:
            return False
        # Lengths or a mask of positions may say how to pool a sequence.
        pools = raw.ndim > 2 and tensor.ndim > 1 and all(o.shape != tensor.shape for o in others)
        return not pools


def _counts_rows(tensor: Tensor, states: Sequence[Tensor]) -> bool:
    """Check whether integers say how many rows of states each sample has, as nodes of graphs."""
    counts = has_places(tensor) and tensor.ndim == 1 and not (is_real(tensor) or tensor.is_complex())
    return counts and any(state.shape[:1] == (int(tensor.sum()),) for state in states)
