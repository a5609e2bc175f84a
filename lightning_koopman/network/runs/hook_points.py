"""Tensors read and replaced where chosen module calls begin and end."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from lightning_koopman.network.access.hooks import attach_in
from lightning_koopman.network.axes.graphs import is_edge_index
from lightning_koopman.network.components import around_of, unwrapped
from lightning_koopman.network.flow.made import Given
from lightning_koopman.network.flow.shared_memory import further_tensors, same_view
from lightning_koopman.network.tensors import (
    all_tensors,
    by_name,
    dense,
    derived,
    first_packed,
    first_tensor,
    has_places,
    is_real,
    is_wrapper,
    plain,
    samples_of_packed,
    varies,
)


class HookPoint(NamedTuple):
    """One end of one module call.

    Attributes:
        end: What the call takes in, or what it gives out.
        call: Dotted module name; the second call in a pass reads ``name#1``.
        place: Which of the tensors with samples that the call takes or gives, where it is not the first.
    """

    end: Literal["in", "out"]
    call: str
    place: int = 0


Alteration = Callable[[Tensor, Mapping[HookPoint, Tensor]], Tensor]
"""Takes what a call gave out and what was read so far; gives what to put in its place.

Where the network differentiates what the call gave, what was read is in its graph, too.
"""


def find_module(model: nn.Module, call: str) -> tuple[nn.Module, int]:
    """Resolve a module call."""
    name, _, number = call.partition("#")
    found = unwrapped(model)
    for part in name.split(".") if name else ():
        # What TorchScript keeps modules in has no `get`.
        if part not in found._modules or (inner := found._modules[part]) is None:
            raise ValueError(
                f"{type(model).__name__} has no module {name!r}, which the report names. Pass the model "
                "that the report was measured on."
            )
        found = unwrapped(inner)
    return found, int(number or 0)


def replace_tensor(value: Any, old: Tensor, new: Tensor) -> Any:
    """Put a tensor in the first place of another one."""
    if value is old:
        return new
    if isinstance(value, Distribution) or is_wrapper(value):
        value = copy.copy(value)
        for name, part in vars(value).items():
            if _holds(part, old):
                vars(value)[name] = replace_tensor(part, old, new)
                break
        return value
    parts: Any = dict(by_name(value)) or dict(enumerate(value))
    key = next((k for k, part in parts.items() if _holds(part, old)), None)
    if key is None:
        return value
    part = parts[key] = replace_tensor(parts[key], old, new)
    if dataclasses.is_dataclass(value):
        # Outputs such as those of transformers are mappings and dataclasses at once.
        return _with_field(value, key, part)
    if isinstance(value, Mapping):
        return parts if type(value) is dict else _with_entry(value, key, parts, new)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*parts.values())
    return type(value)(parts.values())


def _replace_all(value: Any, old: Tensor, new: Tensor) -> Any:
    """Put a tensor in all places of another one, and its parts in those of parts of that."""
    for part in all_tensors(value):
        if (own := same_view(part, old, new)) is not None:
            value = replace_tensor(value, part, own)
    return value


def _holds(value: Any, tensor: Tensor) -> bool:
    return any(other is tensor for other in all_tensors(value))


def _with_field(value: Any, name: str, part: Any) -> Any:
    """Copy a dataclass with a field replaced, also where its class is not made of its fields alone."""
    with suppress(Exception):
        # As tensordict has it, whose classes are made of more than their fields.
        made = type(value).clone(value, recurse=False)
        setattr(made, name, part)
        return made
    with suppress(Exception):  # a constructor of somebody's own
        return dataclasses.replace(value, **{name: part})
    made = copy.copy(value)
    object.__setattr__(made, name, part)
    return made


def _with_entry(table: Any, key: Any, entries: dict[Any, Any], new: Tensor) -> Any:
    """Copy a mapping with the entry that holds a tensor, as one of its class where that can be done."""
    before, kind = table[key], type(table)
    copies: list[Callable[[], Any]] = [
        # As tensordict has it, where other copies share their entries with what they are of.
        lambda: kind.clone(table, recurse=False),
        lambda: copy.copy(table),
        lambda: kind(entries),
    ]
    for copied in copies:
        try:
            made = copied()
            made[key] = entries[key]
            for name, attribute in getattr(made, "__dict__", {}).items():
                if attribute is before:
                    vars(made)[name] = entries[key]
            if _holds(table[key], new):
                table[key] = before
            elif _holds(made[key], new):
                return made
        except Exception:  # other people's code, which may refuse any of this
            continue
    return entries


def _is_beside(other: Tensor, first: Tensor) -> bool:
    """Check whether a tensor is another one than the first, as long, and differs, or joins its rows."""
    if not (has_places(other) and has_places(first)):
        return False
    if is_edge_index(other) and first.shape[:1] != (2,):
        return True
    if not is_real(other) or other.shape[:1] != first.shape[:1]:
        return False
    return other.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() and varies(other)


class HookPoints:
    """Hooks that read, and on demand replace, tensors at chosen module calls.

    Use as a context manager around one forward pass. All hooks come off at the end, also when an
    exception flies. To ``beside`` is added what is read where
    further tensors that vary are given beside it; ``label`` is shown the further tensors that altered
    calls give. Calls are counted anew where ``counted_in``, which holds all modules, is called again in
    the same pass, or what is around it and runs its parts or methods in its place: what is read or
    replaced in its first call is so in each, but for tensors of another shape than in the first.

    Attributes:
        rounds: Copies of the tensors read, by call of ``counted_in``. A replaced output reads as
            replaced.
        unlike: The calls whose outputs were left alone for their shape, once for each.
        packed: The sample of each row of packed sequences that were read, by how many rows they have;
            ``None`` where those differ.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Iterable[HookPoint] = (),
        alter: Mapping[HookPoint, Alteration] | None = None,
        beside: set[HookPoint] | None = None,
        label: Callable[[HookPoint, Tensor], None] | None = None,
        counted_in: nn.Module | None = None,
    ) -> None:
        self._beside, self._label, self._counted_in = beside, label, counted_in
        self._model = model
        self._read = frozenset(read)
        self._alter: dict[str, dict[int, Alteration]] = {}
        for point, alteration in (alter or {}).items():
            self._alter.setdefault(point.call, {})[point.place] = alteration
        # By call, which of the tensors that it takes are read beside the first.
        self._taken: dict[str, list[HookPoint]] = {}
        for point in (point for point in self._read if point.end == "in" and point.place):
            self._taken.setdefault(point.call, []).append(point)
        self.rounds: list[dict[HookPoint, Tensor]] = []
        self.unlike: list[str] = []
        self.packed: dict[int, Tensor | None] = {}
        self._shapes: dict[HookPoint, torch.Size | None] = {}
        self._depth, self._around, self._entered = 0, 0, False
        self._start_round()
        calls = {point.call for point in self._read} | set(self._alter)
        self._watched: dict[int, tuple[nn.Module, dict[int, str]]] = {}
        for call in calls:
            module, number = find_module(model, call)
            self._watched.setdefault(id(module), (module, {}))[1][number] = call
        self._attach = attach_in(model)
        self._hooks = ExitStack()

    def __enter__(self) -> HookPoints:
        with ExitStack() as hooks:
            if self._counted_in is not None:
                ends = {"before": self._on_round, "after": self._on_round_end}
                hooks.enter_context(self._attach(self._counted_in, **ends, direct=set()))
                for module in around_of(self._model, self._counted_in):
                    ends = {"before": self._on_around, "after": self._on_around_end}
                    hooks.enter_context(self._attach(module, **ends, direct=set()))
            for module, calls in self._watched.values():
                before = functools.partial(self._before, calls)
                after = functools.partial(self._after, calls)
                hooks.enter_context(self._attach(module, before=before, after=after, direct=set()))
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    @property
    def values(self) -> dict[HookPoint, Tensor]:
        """Copies of the tensors read since calls are counted."""
        return self.rounds[-1]

    def _start_round(self) -> None:
        self.rounds.append({})
        self._in_graph: dict[HookPoint, Tensor] = {}
        self._counts: dict[int, int] = {}
        self._given: dict[str, Given] = {}
        self._tables: dict[str, list[dict[Any, Any]]] = {}

    def _on_round(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            # What ran before the first call counts with it.
            if self._entered:
                self._start_round()
            self._entered = True

    def _on_round_end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._depth -= 1

    def _on_around(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._around += 1
        if self._around == 1 and not self._entered and self._counts:
            self._start_round()

    def _on_around_end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._around -= 1

    def _is_like_first(self, point: HookPoint, tensor: Tensor) -> bool:
        """Check whether a tensor has the shape that it had where calls were counted first."""
        own = None if tensor.is_nested else tensor.shape
        return self._shapes.setdefault(point, own) == own or len(self.rounds) == 1

    def _before(self, calls: Mapping[int, str], module: nn.Module, args: Any, kwargs: Any) -> None:
        call = calls.get(self._counts.get(id(module), 0))
        if call is None:
            return
        point, self._given[call] = HookPoint("in", call), Given((args, kwargs))
        if point not in self._read:
            return
        tables = [dict(arg) for arg in (*args, *kwargs.values()) if isinstance(arg, Mapping)]
        rest: Any = (args, kwargs)
        if tables:
            # Which entry it takes shows by the one that it writes; others hold options.
            self._tables[call] = tables
            rest = [arg for arg in (*args, *kwargs.values()) if not isinstance(arg, Mapping)]
        if further := self._taken.get(call):
            real = list(filter(is_real, all_tensors(rest)))
            for other in (other for other in further if other.place < len(real)):
                self._keep(other, real[other.place])
        if (tensor := first_tensor(rest)) is not None:
            self._keep(point, tensor)
            self._note_packed(rest, tensor)
            if self._beside is not None and any(_is_beside(t, tensor) for t in all_tensors(rest)):
                self._beside.add(point)

    def _after(
        self, calls: Mapping[int, str], module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        number = self._counts.get(id(module), 0)
        self._counts[id(module)] = number + 1
        call = calls.get(number)
        if call is None:
            return None
        alter = self._alter.get(call, {})
        # A module that calls itself begins as one call and ends as two.
        before = self._given.pop(call, None) or Given((args, kwargs))
        further = self._taken.get(call, [])
        if further and sum(map(is_real, before.tensors)) != sum(map(is_real, all_tensors(output))):
            # Then places do not say what takes the place of what, as of a cell's input and its states.
            for other in further:
                self.values.pop(other, None)
                self._in_graph.pop(other, None)
        first = before.first_made(output, first_tensor(output))
        # The tensors with samples that the call gives, by place.
        given = {0: first}
        if first is not None and not isinstance(output, Tensor):
            given |= dict(further_tensors(output, first, before.tensors))
        for table in self._tables.pop(call, ()):
            self._keep_entry(HookPoint("in", call), table, output, first)
        point = HookPoint("out", call)
        counts = bool(alter) or point in self._read
        if counts and first is not None and not self._is_like_first(point, first):
            self.unlike.append(call)
            return None
        for place, alteration in alter.items():
            if (tensor := given.get(place)) is None:
                raise ValueError(f"{call!r} gave {type(output).__name__} with no tensor to replace")
            if (new := self._altered(tensor, alteration)) is not tensor:
                output = _replace_all(output, tensor, new)
                given[place] = new
        for place, tensor in given.items():
            if place and self._label is not None and alter and tensor is not None:
                self._label(HookPoint("out", call, place), tensor)
            if HookPoint("out", call, place) in self._read:
                self._keep(HookPoint("out", call, place), tensor)
        if point in self._read:
            self._note_packed(output, given[0])
        return output if alter else None

    def _note_packed(self, value: Any, tensor: Tensor | None) -> None:
        """Note what sample each row is about of a tensor that is the data of a packed sequence."""
        if tensor is None or (packed := first_packed(value)) is None or packed.data is not tensor:
            return
        samples = samples_of_packed(packed)
        known = self.packed.setdefault(len(tensor), samples)
        if known is not None and not torch.equal(known, samples):
            self.packed[len(tensor)] = None

    def _altered(self, tensor: Tensor, alteration: Alteration) -> Tensor:
        """Return what takes a tensor's place, laid out as that is and of the same class."""
        old = plain(tensor)
        known = {**self.values, **self._in_graph} if old.requires_grad else self.values
        new = alteration(old, known)
        if new is old:
            return tensor
        new = new.to(old)
        if old.requires_grad and torch.is_grad_enabled() and not new.requires_grad:
            # A network that differentiates its own outputs needs a path here; nothing takes it.
            new = torch.where(torch.ones_like(old, dtype=torch.bool), new, old)
        if new.stride() != old.stride():
            # The user's code may view it, or write to it, as it does to what stood here.
            new = torch.empty_like(old, requires_grad=False).copy_(new)
        return new if old is tensor else derived(new, type(tensor), vars(tensor))

    def _keep_entry(
        self, point: HookPoint, table: Mapping[Any, Any], output: Any, made: Tensor | None
    ) -> None:
        """Read what a call was given where its output is: the entry that it takes and writes anew."""
        if not isinstance(output, Mapping):
            return
        key = next((key for key, value in output.items() if value is made), None)
        if isinstance(tensor := table.get(key), Tensor) and is_real(tensor):
            self._keep(point, tensor)

    def _keep(self, point: HookPoint, tensor: Tensor | None) -> None:
        if tensor is None:
            raise ValueError(f"{point.call!r} has no floating-point tensor to read")
        copied = plain(dense(tensor)).clone()
        self.values[point] = copied.detach()
        if copied.requires_grad and self._alter:
            self._in_graph[point] = copied
