"""Hooks that record every component's state in one forward pass, and that always come off."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from lightning_koopman.network.components import (
    around_of,
    clean_modules,
    clean_name,
    common_ancestor,
    first_name,
    in_turns,
    inner_components,
    inner_transparent,
    is_frozen,
    is_leaf,
    n_weights,
    named_components,
    norms_beside,
    transparent_modules,
    with_output,
    with_tables,
    without_component,
)
from lightning_koopman.network.hooks import attach_in, ended
from lightning_koopman.network.input_data import holds_numbers
from lightning_koopman.network.inputs import Inputs
from lightning_koopman.network.isolation import plain_numerics
from lightning_koopman.network.names import (
    INPUT,
    OUTPUT,
    further_name,
    is_sum,
    module_of,
    numbered,
    sum_name,
)
from lightning_koopman.network.origins import Origins
from lightning_koopman.network.provenance import Provenance
from lightning_koopman.network.returned import Returned
from lightning_koopman.network.rows import Recorded, with_lengths_in_order
from lightning_koopman.network.sharded import LET_IT_BE_WHOLE, refuse_part, whole_here
from lightning_koopman.network.shared_memory import further_tensors
from lightning_koopman.network.signals import signals_wait
from lightning_koopman.network.stages import Stages
from lightning_koopman.network.takers import Takers
from lightning_koopman.network.tensors import (
    Given,
    all_tensors,
    are_data,
    detached_copy,
    first_packed,
    first_real,
    first_tensor,
    is_all_of_memory,
    is_real,
    is_underived,
    order_of_axes,
    padded,
    plain,
    unpacked,
    view_of_memory,
)
from lightning_koopman.network.watch import unseen


def _while_recording(hook: Callable[..., None]) -> Callable[..., None]:
    """Leave out a hook when the pass has ended, or is none on data."""

    @functools.wraps(hook)
    def safe(self: Capture, *args: Any, **kwargs: Any) -> None:
        # Torch gives a hook what the call takes, and behind it what it gave: the last two tell.
        if not self._closed and are_data(args[-2:], kwargs):
            was_ours, self._takers.is_ours = self._takers.is_ours, True
            try:
                hook(self, *args, **kwargs)
            finally:
                self._takers.is_ours = was_ours

    return safe


class _Gave(NamedTuple):
    """A state's tensor as a module call gave it.

    Attributes:
        tensor: A weak reference to it.
        name: Of the state.
        call: That gave it.
        writes: The latest writes to it in place by then.
    """

    tensor: ReferenceType[Tensor]
    name: str
    call: tuple[int, int]
    writes: frozenset[str]


class _Sum(NamedTuple):
    """How later passes find a sum of states in what takes it.

    Attributes:
        name: Of the sum.
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


class Capture:
    """Hooks that record the states x_0 … x_L of the chosen components, one pass at a time.

    Use as a context manager around any number of forward passes. A pass begins with
    :meth:`start_pass`, or where the components' common ancestor is called again; :meth:`end_pass`
    returns what was recorded, or raises what went wrong in a hook. Components are named in order of
    execution; one that runs several times appears as ``name``, ``name#1``, …. The output of a
    parameter-free module that directly consumes a component's output belongs to that component, unless
    something else reads that output, too, or the module consumes other states beside it. The first pass
    shows which inputs are the network's, and what speaks for a component; later ones follow.

    Attributes:
        again: Called with the states of a call of the common ancestor where another one follows in the
            same pass (two views, a step in time); without it, the first one alone counts.
        components: The chosen modules by name; the first pass adds parts of them that it calls in place
            of the whole.
        chosen: Their names as they were chosen.
        end: Name of the module whose output the chain ends with, if one was named.
        parts: By state, in order of execution, the module calls that its component is made of. The last
            one gives the state. A second call of a module reads ``name#1``, as states do.
        skipped: Components that gave nothing to record in the current pass.
        norms: Those of the components that belong to others where they run right behind a layer.
        calls_alone: Calls that have a state of their own in a network that this one is compared with;
            norms called otherwise belong to what they run behind, whatever that is.
        sums: The sums of states that are states in such a network.
        keep: Turns a state's tensor, and what was recorded of it, into what is stored. It must copy, for
            a later in-place module may overwrite the tensor.
        returned: What the network returned in the first pass. That is the outermost module around the
            components' common ancestor that was called, if it called that once and returned what was
            followed, or else the ancestor.
        given: What that ancestor, or else the network, was called with, by name.
        inputs: What the network takes in.
        origins: What the components of the first pass were made of.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Any = None,
        *,
        keep: Callable[[Tensor, Recorded], Any] = lambda tensor, _: detached_copy(tensor),
        output: str | None = None,
        trained: Collection[int] | None = None,
    ) -> None:
        if isinstance(model, torch.jit.ScriptModule):
            raise ValueError(
                f"{type(model).__name__} is a TorchScript module, whose parts take no forward hooks. "
                "Pass the nn.Module that it was scripted from."
            )
        self.components = named_components(model, components)
        self.end = output if output is None else first_name(model, output)
        # Named components are taken to the letter; only an automatic choice merges activations.
        self._named = components is not None
        if self.end is not None:
            self.components = with_output(model, self.components, self.end)
        # Which of them belong to a layer shows in the first pass.
        norms, listed = ({}, {}) if self._named else norms_beside(model, self.components)
        self._listed = frozenset(map(id, listed.values()))
        self.norms = {name: norm for name, norm in (norms | listed).items() if name != self.end}
        self.components |= self.norms
        self.calls_alone: Collection[str] | None = None
        self.sums: Collection[str] | None = None
        self._alone: set[tuple[int, int]] = set()
        self.chosen = tuple(self.components)
        self._within = {} if self._named else inner_components(model, self.components)
        self._transparent_within = inner_transparent(self.components, self._within)
        # Components of which parts stand for themselves, and those whose calls are under way, by id.
        self._opened: set[int] = set()
        self._running: set[int] = set()
        self._transparent = [] if self._named else transparent_modules(model, self.components)
        # Which of them states choose entries of, as quantisers do, shows in the first pass.
        self._tables = {} if self._named else with_tables(model, self.components)
        self._looking_up: list[int] = []
        self._holders = [*self.components.values(), *self._transparent]
        self._model, self.keep, self._trained = model, keep, trained
        self._names = {id(module): clean_name(name) for name, module in model.named_modules()}
        self._ancestor = common_ancestor(model, self.components.values())
        self._direct: set[int] = set()
        self._attach = attach_in(model, self._fail)
        self._hooks = ExitStack()
        # Whether hooks are on that the first pass alone needs.
        self._hangs_all = False
        self._passes = 0
        self.again: Callable[[dict[str, Any]], None] | None = None
        self.parts: dict[str, tuple[str, ...]] = {}
        # Components that did not run, and whose weights were read.
        self._used: set[str] = set()
        self._superseded: set[tuple[int, int]] = set()
        self._merged: set[tuple[int, int]] = set()
        # Where calls that hand on what they take have what they make, by place.
        self._made_at: dict[tuple[int, int], tuple[int, ...]] = {}
        # Whether what counts is returned by a module around the ancestor, and by which that runs its
        # parts or methods in its place.
        self._is_around = False
        self._in_its_place: nn.Module | None = None
        self._foreign: set[tuple[int, int]] = set()
        self._leads_in = False
        # States whose rows are in an order of the network's own, which may be another one in each batch.
        self._moved: set[str] = set()
        # What finds the sums of states that modules, by id, and functions take.
        self._takers = Takers(self._on_function_again, self._running)
        # The shapes of states that sums are taken in another shape than, in this pass.
        self._shapes: dict[str, torch.Size | None] = {}
        self._provenance = Provenance()
        self.inputs = Inputs(self._provenance, INPUT if INPUT not in self.candidates else "data")
        whole = id(self._ancestor), -1
        self.origins = Origins(self._provenance, self.inputs, self._names, whole)
        self.returned = Returned(self._provenance, self.inputs, whole)
        self.start_pass()

    def __enter__(self) -> Capture:
        with ExitStack() as hooks:
            # Ctrl-C in between would leave what is half hung.
            with signals_wait():
                self._hang(hooks)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _hang(self, hooks: ExitStack) -> None:
        """Put on what the stack takes off."""
        first = self._hangs_all = self.is_first

        def hang(
            module: nn.Module, before: Any = None, after: Any = None, *, direct: bool = False
        ) -> None:
            """Hang hooks, which see ``direct`` calls of ``forward`` where there may be any."""
            seen = self._direct if direct and (first or id(module) in self._direct) else None
            hooks.enter_context(self._attach(module, before=before, after=after, direct=seen))

        if self._ancestor is not None:
            hang(self._ancestor, self._on_ancestor, self._on_returned, direct=True)
        # Before others read where what a module takes comes from.
        for module in self._modules_that_take(first=first):
            direct = any(module is own for own in self._holders)
            hang(module, self._on_taken, direct=direct)
        for module in around_of(self._model, self._ancestor):
            hang(module, self._on_around, self._on_around_returned, direct=True)
        others = {*self._within, *self._tables, *self.norms}
        whole = {name: module for name, module in self.components.items() if name not in others}
        for name, module in whole.items():
            if self._takes_input(module):
                hang(module, self._on_input, direct=True)
            hang(module, after=functools.partial(self._on_output, name), direct=True)
        for name, (module, _) in self._within.items():
            if first or name in self.components:
                on_input = functools.partial(self._on_inner_input, name)
                on_output = functools.partial(self._on_inner_output, name)
                hang(module, on_input, on_output)
        on_transparent_input = self._on_transparent_input if first else None
        for module, owners in self._transparent_within:
            if first or any(id(module) == merged for merged, _ in self._merged):
                on_inner = functools.partial(self._on_inner_transparent, owners)
                hang(module, on_transparent_input, on_inner)
        tables = {n: m for n, m in self._tables.items() if first or n in self.components}
        for name, module in tables.items():
            hang(module, self._on_table_input, functools.partial(self._on_table_output, name))
        for name, module in self.norms.items():
            on_output = functools.partial(self._on_norm_output, name)
            hang(module, self._on_norm_input, on_output, direct=True)
        for module in self._transparent:
            if all(module is not other for other in tables.values()):
                hang(module, on_transparent_input, self._on_transparent)
        if self.end is not None and self.end not in self.components:
            hang(dict(clean_modules(self._model))[self.end], after=self._on_end)
        if first:
            hooks.callback(self._leave)
            # Before the flow, which asks it for the place of what it shows.
            self._takers.__enter__()
            self._provenance.follow(_held_by(self._model), self._on_function)

    def _modules_that_take(self, *, first: bool) -> list[nn.Module]:
        """Find the modules outside of components that may take sums, or are known to."""
        if self._ancestor is None:
            return []
        if not first:
            return [module for module in self._ancestor.modules() if id(module) in self._takers.names]
        others = {id(self._ancestor)}
        others |= {id(p) for m in self.components.values() for p in m.modules() if p is not m}
        return [module for module in self._ancestor.modules() if id(module) not in others]

    def remove(self) -> None:
        """Take every hook off the model; safe to call twice."""
        self._hangs_all = False
        with signals_wait():
            try:
                self._hooks.close()
            finally:
                self._leave()

    def _leave(self) -> None:
        """Stop following the data, and keep what it said of components that did not run."""
        try:
            if self._provenance.follows:
                silent = {name: self.components[name] for name in self.silent}
                self._used = {n for n, m in silent.items() if self._provenance.has_read(_held_by(m))}
        finally:
            self._provenance.leave()
            self._takers.__exit__()

    def start_pass(self, batch: Any = None) -> None:
        """Forget what was recorded and begin a new forward pass."""
        self._closed = False
        self._error: Exception | None = None
        self._ran: set[int] = set()
        self._running.clear()
        self._looking_up.clear()
        self._nested = 0
        self._called = False
        self.given: dict[str, Any] = {}
        self._outer: dict[str, Any] = {}
        # What modules around the ancestor, whose calls run, were called with, and what it gave in them.
        self._around: list[tuple[nn.Module, Any]] = []
        self._inner: tuple[nn.Module, Any] | None = None
        self._start_call()
        self._takers.error = None
        self._provenance.start_pass(batch)
        if self._passes and batch is not None:
            if self._takers.watches:
                self._takers.__enter__()
            if self._moved:
                self._provenance.follow_rows(_held_by(self._model))

    def _fail(self, error: Exception) -> None:
        """Keep an error of a hook for :meth:`end_pass`, for it may not end the user's own pass."""
        self._error, self._closed = error, True

    def _start_call(self) -> None:
        """Forget what was recorded of the call before."""
        self._states: dict[str, Any] = {}
        self._calls: dict[int, int] = {}
        # How often modules, by id, were called that may take sums, and functions took some, by name.
        self._taken_by: Counter[int | str] = Counter()
        self._takers.begin(None)
        self._shapes = dict.fromkeys(self._shapes)
        self.skipped: list[str] = []
        self.origins.start_call()
        self._call: Any = ()
        self._gave: dict[int, _Gave] = {}
        # What modules were given before they run, for what they pass on is not what they make.
        self._given: dict[int, Given] = {}
        self._last: tuple[str, Tensor] | None = None
        self._continuing: dict[int, _Gave] = {}
        self._unusable: str | None = None
        self._stages = Stages(self._provenance)

    def _take_apart(self) -> None:
        """Let what continues a component go on for itself where something else reads that state, too."""
        for name, stage, kept, calls, readers in self._stages.apart():
            self._states[name] = kept
            self.parts[name] = self.parts[name][: stage + 1]
            self._superseded.difference_update(calls[stage:])
            self._merged.difference_update(calls[stage + 1 :])
            for reader, further in readers.items():
                if isinstance(record := self._states.get(reader), Recorded):
                    sources = (record.sources or frozenset()) | further
                    self._states[reader] = replace(record, sources=sources)
                if reader in self.returned.made_of:
                    self.returned.made_of[reader] |= further

    def end_pass(self) -> dict[str, Any]:
        """End the pass and return its states by name, in order of execution."""
        try:
            self._settle_inner()
            self._leave()
            lost = self._takers.error if self._passes else None
            error = self._error or self._provenance.lost_order or lost
            if error is not None:
                raise error
            if self._unusable is not None:
                raise ValueError(self._unusable)
            self._take_apart()
            self._passes += 1
            self.inputs.end_pass()
            return self._states
        finally:
            self._leave()
            if self._hangs_all and self._passes:
                self.remove()
                self.__enter__()
            self.start_pass()

    @property
    def candidates(self) -> dict[str, nn.Module]:
        """All modules, by name, of which the first pass may make components."""
        parts = {name: part for name, (part, _) in self._within.items()}
        return {**self.components, **parts, **self._tables}

    @property
    def untraced(self) -> Exception | None:
        """What kept the data from being followed, if anything did; sources then mean nothing."""
        return self._provenance.error

    @property
    def is_first(self) -> bool:
        """Whether no pass was recorded yet."""
        return self._passes == 0

    @property
    def ran(self) -> bool:
        """Whether any component ran in the current pass."""
        return bool(self._calls or self._ran)

    @property
    def failed(self) -> bool:
        """Whether something went wrong in a hook of the current pass."""
        return self._error is not None

    @property
    def silent(self) -> list[str]:
        """Chosen components that did not run in the current pass."""
        called = self._ran | set(self._calls) | self._opened
        return [name for name, module in self.components.items() if id(module) not in called]

    def told(self, silent: Collection[str]) -> list[str]:
        """Return what a reader must know of components that ran in no pass."""
        ran = [module for name, module in self.components.items() if name not in silent]
        held = {id(parameter) for module in ran for parameter in module.parameters()}
        unread, used = list[str](), list[str]()
        for name in silent:
            weights = list(self.components[name].parameters())
            # They may be those of a component that ran, as of embeddings that others share.
            if not weights or not held.issuperset(map(id, weights)):
                (used if name in self._used else unread).append(name)
        notes = []
        if unread:
            notes.append(f"never ran, so left out: {', '.join(map(repr, unread))}")
        if used:
            notes.append(
                "used by their weights alone, or where no call can be recorded, so left out: "
                f"{', '.join(map(repr, used))}"
            )
        return notes

    def in_turns(self, records: Iterable[Recorded]) -> frozenset[str]:
        """Find the components that the network sends samples to in turns, by what one pass recorded."""
        ran: dict[str, set[str]] = {}
        moved = set[str]()
        for record in records:
            name = module_of(record.name)
            if name in self.components:
                read = (module_of(source) for source in record.sources or ())
                ran.setdefault(name, set()).update(read)
                moved |= {name} if record.orders else set()
        return in_turns(self._model, self.components, ran, moved)

    def joins(self, result: Any) -> bool:
        """Check whether all that the caller makes of states mixes some that the network gives apart."""
        if not self.is_first:
            return False
        sizes = {name: record.tensor.numel() for name, record in self._states.items()}
        sizes |= self.returned.sizes
        mixed = []
        for tensor in all_tensors(result):
            known = self._provenance.parts_of(tensor) or frozenset()
            given = {n for n, _ in self._provenance.stages(tensor)} & self.returned.made_of.keys()
            inside = frozenset[str]().union(*(self.returned.made_of[name] for name in given))
            apart = {name for name in known - inside if module_of(name) in self.components}
            if made_of := given | apart:
                # Side by side, they are the state that the chain ends with.
                beside = tensor.numel() == sum(sizes.get(name, 0) for name in made_of)
                mixed.append(len(made_of) > 1 and len(inside | apart) > 1 and not beside)
        return any(mixed) and all(mixed)

    def record_end(self, value: Any) -> None:
        """Record a state that no component gave, such as the network's own output, as the last one."""
        name = self.end or OUTPUT
        if self._closed or (name in self._states and name != OUTPUT):
            return
        self._states.pop(name, None)
        self._stages.read(name, value)
        sources, tensor = self._provenance.of(value), first_tensor(value)
        if tensor is None:
            raise ValueError(
                f"the output of interest has type {type(value).__name__}, without a floating-point "
                "tensor; let output= give one"
            )
        self._store(tensor, Recorded(name, self._model, tensor, None, sources))

    @_while_recording
    def _on_ancestor(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._nested += 1
        if self._nested == 1:
            self._begin_call(module, args, kwargs)

    def _begin_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Begin a call of what holds all components, perhaps a further one in the same pass."""
        self._settle_inner()
        if self._states and not self._called:
            self._begin_behind_others((args, kwargs))
        elif self._states and self.again is not None:
            self._take_apart()
            states, self._passes = self._states, self._passes + 1
            self._ran |= set(self._calls)
            self._start_call()
            # The step is under way, in whatever inference mode or autocast; sums are added to outside.
            with plain_numerics(next(module.parameters(), torch.empty(0, device="cpu"))), unseen():
                self.again(states)
        elif self._states:
            self._closed = True
        self._takers.begin(None)
        self._called, self._call = True, (args, kwargs)
        self.given = _with_arguments(self._outer, module, args, kwargs)

    def _begin_behind_others(self, given: Any) -> None:
        """Keep the states of parts that were called before, if this call reads them."""
        sources = self._provenance.of(given)
        if sources is not None:
            self._leads_in = bool(sources & self._states.keys())
        if self._leads_in:
            return
        self._start_call()
        if self._passes == 0:
            for known in (
                self.parts,
                self.inputs,
                self.origins,
                self._merged,
                self._superseded,
                self._alone,
                self._made_at,
            ):
                known.clear()
            self.forget_sums(but=())

    @_while_recording
    def _on_around(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is self._in_its_place:
            # What ran before its first call counts with it, as it did before this was known.
            if self._called:
                self._begin_call(module, args, kwargs)
            self._called, self._call = True, (args, kwargs)
        self._around.append((module, (args, kwargs)))
        self.given = self._outer = _with_arguments(self._outer, module, args, kwargs)

    @_while_recording
    def _on_returned(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._nested -= 1
        if self._nested:
            return
        if self._around and self._passes == 0 and not self.returned.made_of:
            # What is around it may go on with what it gave, or call it again.
            self._inner = module, output
        elif not self._is_around:
            self._note_returned(module, self._call, output)

    @_while_recording
    def _on_around_returned(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = ended(self._around, module)
        if self._around or call is None:
            return
        not_called = self._passes == 0 and not self._called
        if self._inner is not None or not_called:
            made_of = map(self._provenance.of, all_tensors(output))
            self._is_around = any(map(self.inputs.beyond, made_of))
            if self._is_around:
                self._inner = None
            self._settle_inner()
        if not_called and self._states:
            self._in_its_place, self._called = module, True
        if self._is_around:
            self._note_returned(module, call, output)

    @_while_recording
    def _settle_inner(self) -> None:
        """Let what the ancestor gave stand for what the network gives."""
        if self._inner is not None:
            (module, output), self._inner = self._inner, None
            self._note_returned(module, self._call, output)

    def _note_returned(self, module: nn.Module, call: Any, output: Any) -> None:
        """Find what the returned tensors were made of, and record those that are states of their own."""
        if self._passes == 0 and not self.returned.made_of:
            name = OUTPUT if OUTPUT not in self.components else "returned"
            last = None if self._named else self._last
            self.returned.find(name, module, call, output, last, self._moved)
            drawn = filter(lambda end: self._provenance.draws(end.tensor), self.returned.ends(output))
            self.origins.noisy += [end.name for end in drawn]
        for end in self.returned.ends(output):
            self._stages.read(end.name, end.tensor)
            self._keep_mixed_in(end.name, call)
            sources = self.returned.sources(end.name, end.tensor)
            self._keep(end.name, module, end.tensor, sources, is_further=end.is_further)

    @_while_recording
    def _on_inner_input(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._within[name][1] & self._running:
            self._on_input(module, args, kwargs)

    @_while_recording
    def _on_inner_output(
        self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        """Let a part be a component, where it is called and what it is part of is not."""
        if self._within[name][1] & self._running:
            return
        if name not in self.components:
            self.components[name] = module
            self._opened |= self._within[name][1]
        self._on_output(name, module, args, kwargs, output)

    @_while_recording
    def _on_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._running.add(id(module))
        given = args, kwargs
        key = (id(module), self._calls.get(id(module), 0))
        if self._passes:
            self._keep_inputs(key, module, given)
            return
        self._given[id(module)] = Given(given)
        is_behind = self._called and not self._nested
        if is_behind and all(map(self._provenance.is_untouched, all_tensors(given))):
            # It runs on other data than the ancestor did, such as noise.
            self._foreign.add(key)
            return
        self.origins.take(key, given, self._states.keys())
        self._keep_inputs(key, module, given)
        self._stages.forget_freed(given)

    @_while_recording
    def _on_taken(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Record sums of states that no module took before, for what reads these reads no parts."""
        call, given = self._taken_by[id(module)], (args, kwargs)
        self._taken_by[id(module)] += 1
        known = self._takers.look(id(module))
        tensors = [tensor for tensor in all_tensors(given) if is_real(tensor) and not tensor.is_nested]
        if self._passes:
            for found in known:
                self._keep_sum(found, module, tensors, given)
            return
        called = numbered(self._names[id(module)], call)
        for place, tensor in enumerate(tensors):
            name = sum_name(f"{called}[{place}]" if place else called)
            if (taken := self._take_sum(name, place, tensor, given)) is not None:
                self._takers.note(taken)

    def _on_function(self, tensor: Tensor, function: str, place: int, goes_on: bool) -> None:
        """Record a sum of states that a function takes, as the first pass shows."""
        # Of a step that goes on with what the network returned, as losses do, nothing is a state.
        is_behind = self._called and not (self._nested or self._around)
        if self._passes or self._closed or self._running or is_behind or not is_real(tensor):
            return
        made_of = self._provenance.of(tensor) or frozenset()
        if goes_on and len(made_of - self._provenance.idle) < 2:
            # Of what functions make of one state, one after the other, the last one is a state.
            return
        name = sum_name(numbered(f"{function}()", self._taken_by[function]))
        self._taken_by[function] += 1
        if (taken := self._take_sum(name, place, tensor)) is not None:
            self._takers.note(taken)

    def _on_function_again(self, found: _Sum, tensors: list[Tensor]) -> None:
        """Record a sum that a function takes as in the first pass."""
        if self._passes and not self._closed:
            self._keep_sum(found, self._model, tensors)

    def _keep_sum(
        self, found: _Sum, module: nn.Module, tensors: Sequence[Tensor], given: Any = None
    ) -> None:
        """Record a sum that is known to be among some tensors, as it was added up."""
        tensor = tensors[found.place] if found.place < len(tensors) else None
        if tensor is None or not is_real(tensor):
            return
        if found.order is not None:
            self._keep(found.name, module, tensor.permute(found.order), None, given)
            return
        shape = self._shapes.get(found.like)
        if shape is not None and shape.numel() == tensor.numel() and tensor.is_contiguous():
            whole = tensor.view([shape[axis] for axis in found.axes])
            self._keep(found.name, module, whole.permute(_inverse(found.axes)), None, given)

    def _take_sum(self, name: str, place: int, tensor: Tensor, given: Any = None) -> _Sum | None:
        """Record a sum of states, if it is one and new, and return how later passes find it."""
        made_of = self._provenance.exactly(tensor) or frozenset()
        parts = [p for p in map(self._states.get, sorted(made_of)) if isinstance(p, Recorded)]
        if not parts or not self._is_sum(name, tensor, made_of):
            return None
        # Rows are made as those of what was added up.
        whole = self._provenance.as_added(tensor)
        like = next((part for part in parts if part.tensor.shape == whole.shape), None)
        if like is None:
            like = next((part for part in parts if part.tensor.numel() == tensor.numel()), None)
            if like is None or not (like.tensor.is_contiguous() and is_all_of_memory(tensor)):
                return None
            whole = tensor.as_strided(like.tensor.shape, like.tensor.stride(), 0)
        order = order_of_axes(view_of_memory(tensor), view_of_memory(whole))
        axes = sorted(range(whole.ndim), key=whole.stride, reverse=True)
        if order is None:
            if not (tensor.is_contiguous() and whole.permute(axes).is_contiguous()):
                return None
            self._shapes[like.name] = None
        self._stages.read(name, tensor)
        self._keep(name, like.module, whole, made_of, given)
        self._provenance.mark_sum(tensor, name, made_of)
        return _Sum(name, place, None if order is None else tuple(order), like.name, tuple(axes))

    def forget_sums(self, but: Collection[str]) -> None:
        """Look for no other sums in later passes than some."""
        self._takers.forget(lambda found: found.name not in but)

    def _is_sum(self, name: str, tensor: Tensor, made_of: frozenset[str]) -> bool:
        """Check whether what a module takes is a sum of states, or was in a network to compare with."""
        if self.sums is not None:
            return name in self.sums
        varied = made_of - self._provenance.idle
        is_made_of_sums = len(varied) > 1 or any(map(is_sum, varied))
        if not (is_made_of_sums and self.inputs.beyond(varied) and self._provenance.is_sum(tensor)):
            return False
        return not (self.inputs.unclaimed(tensor) or self._provenance.draws(tensor))

    def _keep_inputs(self, key: tuple[int, int], module: nn.Module, given: Any) -> None:
        """Record what a call takes of the network's inputs."""
        own = self.inputs.at.get(key)
        if not own or first_real(given) is None:
            return
        real = list(filter(is_real, all_tensors(given)))
        for place, name in own.items():
            if place < len(real):
                idle = self._provenance.is_idle(real[place])
                self._keep(name, module, real[place], frozenset(), given, is_input=True, is_idle=idle)

    @_while_recording
    def _on_output(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._running.discard(id(module))
        call = self._count(module)
        self._takers.begin((id(module), call))
        if (id(module), call) in self._foreign:
            # What reads it runs on other data, too.
            return
        self._record(numbered(name, call), module, call, output, (args, kwargs))

    def _find_gave(self, given: Any) -> _Gave | None:
        """Find the state whose tensor a module takes first."""
        tensor = first_real(given)
        gave = self._gave.get(id(tensor))
        return None if gave is None or gave.tensor() is not tensor else gave

    @_while_recording
    def _on_transparent_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Remember which state a module takes, if nothing was written to it since it was given."""
        gave = self._find_gave((args, kwargs))
        raw = None if gave is None else gave.tensor()
        if gave is not None and raw is not None and self._provenance.writes(raw) == gave.writes:
            self._continuing[id(module)] = gave

    @_while_recording
    def _on_transparent(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Let what a parameter-free module made of a component's output count as that component's."""
        call, given = self._count(module), (args, kwargs)
        gave = self._find_gave(given) if self._passes else self._continuing.pop(id(module), None)
        if gave is None or (raw := gave.tensor()) is None:
            return
        if self._passes == 0 and self.origins.continues(module, given, output, gave.name, raw):
            self._merged.add((id(module), call))
            self._superseded.add(gave.call)
        if (id(module), call) in self._merged:
            self._record(gave.name, module, call, output, given)

    @_while_recording
    def _on_inner_transparent(
        self, owners: set[int], module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        """Let it belong to a part of a component that is not called as a whole."""
        # In later passes nobody tells which components run.
        merged = (id(module), self._calls.get(id(module), 0)) in self._merged
        if merged if self._passes else not owners & self._running:
            self._on_transparent(module, args, kwargs, output)
        else:
            self._count(module)

    @_while_recording
    def _on_table_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._looking_up.append(self._provenance.lookups)
        if self._passes == 0:
            self._on_transparent_input(module, args, kwargs)

    @_while_recording
    def _on_table_output(
        self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        """Let a module that looks up entries of its own, as states choose them, be a component."""
        looks_up = self._provenance.lookups > (self._looking_up.pop() if self._looking_up else 0)
        if looks_up and self._looking_up:
            # What it is part of speaks for it.
            return
        if name not in self.components and looks_up and first_real(output) is not None:
            self.components[name] = module
        if name in self.components:
            if self._takes_input(module):
                self._on_input(module, args, kwargs)
            self._on_output(name, module, args, kwargs, output)
        elif any(module is other for other in self._transparent):
            self._on_transparent(module, args, kwargs, output)

    def n_weights(self, components: Iterable[Iterable[str]]) -> tuple[int, ...]:
        """Count the parameters of components, each given by its calls, with norms behind a layer."""
        modules = dict(clean_modules(self._model)) | self.components
        parts = [{module_of(p) for c in calls for p in self.parts.get(c, (c,))} for calls in components]
        return tuple(n_weights(*(modules[n] for n in names if n in modules)) for names in parts)

    def homeless(self, silent: Collection[str]) -> dict[str, int]:
        """Count the parameters that are in no component, by name, where components were not named."""
        if self._named:
            return {}
        called = {module_of(call) for calls in self.parts.values() for call in calls}
        # A norm of what something else reads as well is part of the step of what takes it.
        apart = [norm for name, norm in self.norms.items() if name not in called and name not in silent]
        holders = [m for m in self._holders if all(m is not norm for norm in apart)]
        return without_component(self._model, holders)

    @_while_recording
    def _on_norm_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Find whether a norm takes what a layer gave as it is, and so belongs to that layer."""
        key = (id(module), self._calls.get(id(module), 0))
        if self._passes == 0:
            self._on_transparent_input(module, args, kwargs)
            gave = self._continuing.get(id(module))
            before = None if gave is None else self.components[module_of(gave.name)]
            belongs = before is not None and (id(module) in self._listed or is_leaf(before))
            if self.calls_alone is not None:
                # A layer may be a wrapper in one of the networks that are compared, as with adapters.
                called = numbered(self._names[id(module)], key[1])
                belongs = before is not None and called not in self.calls_alone
            if not belongs:
                self._continuing.pop(id(module), None)
                self._alone.add(key)
        if key in self._alone:
            self._on_input(module, args, kwargs)

    @_while_recording
    def _on_norm_output(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if (id(module), self._calls.get(id(module), 0)) in self._alone:
            self._on_output(name, module, args, kwargs, output)
        else:
            self._on_transparent(module, args, kwargs, output)

    @_while_recording
    def _on_end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.record_end(output)

    def _takes_input(self, module: nn.Module) -> bool:
        """Check whether the module's input must be seen in the next pass."""
        # Of what runs inside of components, no operator takes sums.
        seen = self._passes == 0 or id(module) in self._opened or self._takers.watches
        return seen or any(taker == id(module) for taker, _ in self.inputs.at)

    def _count(self, module: nn.Module) -> int:
        call = self._calls.get(id(module), 0)
        self._calls[id(module)] = call + 1
        return call

    def _record(self, name: str, module: nn.Module, call: int, output: Any, given: Any) -> None:
        """Record what a call gave, and in the first pass what it was made of."""
        key, before = (id(module), call), self._given.pop(id(module), None)
        tensor, further = self._made(key, before, output, given)
        if tensor is None:
            self._unusable = (
                f"component {name!r} returned {type(output).__name__} with no floating-point tensor. "
                "Leave it out with components=[...]."
            )
            if self._named:
                raise ValueError(self._unusable)
            self.skipped.append(name)
            return
        self._unusable = None
        self._gave[id(tensor)] = _Gave(ref(tensor), name, key, self._provenance.writes(tensor))
        if self._passes == 0:
            self._record_first(name, module, key, before, output, given, tensor, further)
            return
        self._keep_mixed_in(name, self._call)
        # The first pass shows which modules are followed by one that speaks for the component.
        if key not in self._superseded:
            self._keep(name, module, tensor, None, output)
        for place, other in further:
            self._keep(further_name(name, place), module, other, None)

    def _record_first(
        self,
        name: str,
        module: nn.Module,
        key: tuple[int, int],
        before: Given | None,
        output: Any,
        given: Any,
        tensor: Tensor,
        further: Sequence[tuple[int, Tensor]],
    ) -> None:
        """Record what a call gave, and find out what it was made of."""
        refuse_part(name, module, tensor)
        made = output
        if before is not None and not isinstance(output, Tensor):
            made = [t for t in all_tensors(output) if t is tensor or not before.passes(t)]
        called = numbered(self._names[id(module)], key[1])
        self.parts[name] = (*self.parts.get(name, ()), called)
        origin, new = self.origins.of(name, key, made, tensor, self._states.keys(), self._call)
        for added in new:
            self._keep(added.name, module, added.copied, frozenset(), is_input=True, holds=added.holds)
        self._keep_mixed_in(name, self._call)
        # What continues a state reads it at whatever stage it is, and others as they are.
        self._stages.read(name, given, made, but=name if key in self._merged else None)
        self._last = None if tensor.is_nested or not tensor.ndim else (name, plain(tensor))
        untouched, made_of = self._provenance.is_untouched(tensor), self._provenance.of(tensor)
        is_idle = origin.is_idle or self._provenance.is_idle(tensor)
        beside = [other for _, other in further]
        masks = [] if is_idle else self._provenance.masks(beside)
        self._provenance.mark(made, name, idle=is_idle)
        self._provenance.own(masks)
        component = self.components[module_of(name)]
        facts: dict[str, Any] = {
            "from_float": origin.from_float,
            "is_frozen": is_frozen(component, self._trained),
            "is_idle": is_idle,
            "from_data": not untouched,
            "is_behind": self._called and not self._nested,
            # A module that continues a component is known to compare none.
            "is_pairwise": before is not None
            and self._provenance.compares_samples(tensor, before.tensors, module),
        }
        if key not in self._superseded:
            ignores_data = untouched and (bool(origin.sources) or not origin.from_float)
            own = {"is_loss": bool(origin.targets), "ignores_data": ignores_data}
            self._keep(name, module, tensor, origin.sources, output, **own, **facts)
            if self._transparent or self.norms:
                self._stages.add(name, key, tensor, self._states[name], made_of)
        for place, other in further:
            if any(other is mask for mask in masks) or not holds_numbers(other):
                continue
            other_name = further_name(name, place)
            self._provenance.mark(other, other_name, idle=is_idle, is_part=True)
            self._keep(other_name, module, other, origin.sources, **facts)

    def _made(
        self, key: tuple[int, int], before: Given | None, output: Any, given: Any
    ) -> tuple[Tensor | None, list[tuple[int, Tensor]]]:
        """Find what a call makes: its state, and further tensors with their places.

        What it was given ``before`` it ran is known in the first pass, which shows the places.
        """
        if isinstance(output, Tensor):
            return first_real(output), []
        real = list(filter(is_real, all_tensors(output)))
        if (places := self._made_at.get(key)) is not None:
            found = [(place, real[place]) for place in places if place < len(real)]
            return (found[0][1], found[1:]) if found else (None, [])
        first = first_real(output)
        if before is not None:
            first = before.first_made(output, first)
        if first is None:
            return None, []
        known = all_tensors(given) if before is None else before.tensors
        further = further_tensors(output, first, known)
        if before is not None and any(map(before.passes, real)):
            own = [place for place, tensor in enumerate(real) if tensor is first]
            self._made_at[key] = (*own[:1], *(place for place, _ in further))
        return first, further

    def _keep_mixed_in(self, name: str, call: Any) -> None:
        """Record the data that are mixed into what a component takes."""
        if not (mixed_in := self.inputs.mixed_in.get(name)):
            return
        given = self.inputs.data(call)
        for added, place in mixed_in.items():
            if place < len(given) and added not in self._states:
                self._keep(added, self._model, given[place], frozenset(), is_input=True)

    def _keep(
        self,
        name: str,
        module: nn.Module,
        tensor: Tensor,
        sources: frozenset[str] | None,
        value: Any = None,
        *,
        is_loss: bool = False,
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
        is_loss = is_loss and held.ndim <= 1
        self._store(tensor, Recorded(name, module, held, lengths, sources, is_loss=is_loss, **facts))

    def _store(self, tensor: Tensor, recorded: Recorded) -> None:
        """Store what was recorded of a state, and how its rows came about."""
        if recorded.name in self._shapes:
            self._shapes[recorded.name] = recorded.tensor.shape
        if rows := self._provenance.rows(recorded.tensor, tensor):
            recorded = replace(recorded, **rows)
            both = (recorded.orders, recorded.second_orders)
            if any(order.is_of_all for orders in both for order in orders.values()):
                self._moved.add(recorded.name)
            recorded = with_lengths_in_order(recorded)
        with unseen():
            self._states[recorded.name] = self.keep(recorded.tensor, recorded)


def _held_by(model: nn.Module) -> Iterator[Tensor]:
    """Find the tensors that a network holds: parameters, buffers, and plain attributes."""
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            # Of other classes, as those whose values are elsewhere, there may be no memory to know.
            tensors = (t for t in held.values() if isinstance(t, Tensor))
            yield from filter(is_underived, (t if is_underived(t) else plain(t) for t in tensors))


def _inverse(order: Sequence[int]) -> list[int]:
    """Return the order of axes that takes another one back."""
    return sorted(range(len(order)), key=order.__getitem__)


def _with_arguments(outer: dict[str, Any], module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Put what a module is called with, which is about its own data, before what is known around it."""
    own = dict(kwargs)
    # Of the class, for somebody may listen to the instance's own; not every one says what it takes.
    with suppress(TypeError, ValueError):
        bound = _signature(type(module).forward).bind_partial(module, *args, **kwargs)
        own = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    return own | {name: value for name, value in outer.items() if name not in own}


_signature = functools.lru_cache(maxsize=64)(inspect.signature)
