"""Hooks that record every component's state in one forward pass, and that always come off."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.network.access.hooks import attach_in
from lightning_koopman.network.access.isolation import plain_numerics
from lightning_koopman.network.access.signals import signals_wait
from lightning_koopman.network.access.watch import unseen
from lightning_koopman.network.axes.input_data import holds_numbers
from lightning_koopman.network.axes.recorded import Recorded
from lightning_koopman.network.capture.calls import Calls, Pass
from lightning_koopman.network.capture.chosen import Chosen
from lightning_koopman.network.capture.kept_states import KeptStates
from lightning_koopman.network.capture.stages import Stages
from lightning_koopman.network.capture.sums import Sums
from lightning_koopman.network.components import around_of, clean_modules, is_frozen, is_leaf
from lightning_koopman.network.flow.inputs import Call, Inputs
from lightning_koopman.network.flow.made import Given, Made
from lightning_koopman.network.flow.origins import Origins
from lightning_koopman.network.flow.provenance import Provenance
from lightning_koopman.network.flow.returned import Returned
from lightning_koopman.network.names import INPUT, OUTPUT, further_name, module_of, numbered
from lightning_koopman.network.sharded import refuse_part
from lightning_koopman.network.tensors import (
    all_tensors,
    are_data,
    detached_copy,
    first_real,
    first_tensor,
    plain,
)


class Capture:
    """Hooks that record the states x_0 … x_L of the chosen components, one pass at a time.

    Use as a context manager around any number of forward passes. A pass begins with
    :meth:`start_pass`, or where the components' common ancestor is called again; :meth:`end_pass`
    returns what was recorded, or raises what went wrong in a hook. Components are named in order of
    execution; one that runs several times appears as ``name``, ``name#1``, …. The output of a
    parameter-free module that directly consumes a component's output belongs to that component, unless
    something else reads that output, too, or the module consumes other states beside it. The first pass
    shows which inputs are the network's, and what speaks for a component; later ones follow.

    Here are the hooks, and what they tell each other; what they find out is in classes of their own, of
    which none knows this one.

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
        calls_alone: Calls that have a state of their own in a network that this one is compared with;
            norms called otherwise belong to what they run behind, whatever that is.
        sums: The sums of states that are states in such a network.
        keep: Turns a state's tensor, and what was recorded of it, into what is stored. It must copy, for
            a later in-place module may overwrite the tensor.
        returned: What the network returned in the first pass.
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
        self._modules = Chosen(model, components, output)
        self.components, self.end = self._modules.components, self._modules.end
        self.chosen = tuple(self.components)
        self.calls_alone: Collection[str] | None = None
        self.sums: Collection[str] | None = None
        self.again: Callable[[dict[str, Any]], None] | None = None
        self.keep, self.parts = keep, dict[str, tuple[str, ...]]()
        self._model, self._trained = model, trained
        self._pass, self._direct = Pass(), set[int]()
        self._attach = attach_in(model, self._pass.fail)
        self._hooks = ExitStack()
        # Whether hooks are on that the first pass alone needs.
        self._hangs_all = False
        # Components that did not run, and whose weights were read.
        self._used: set[str] = set()
        self._alone, self._foreign = set[Call](), set[Call]()
        self._looking_up: list[int] = []
        self._leads_in = False
        self._provenance = Provenance()
        name = INPUT if INPUT not in self._modules.candidates else "data"
        self.inputs = Inputs(self._provenance, name)
        whole = id(self._modules.ancestor), -1
        self.origins = Origins(self._provenance, self.inputs, self._modules.names, whole)
        self.returned = Returned(self._provenance, self.inputs, whole)
        self._kept = KeptStates(model, keep, self._provenance, self.inputs)
        self._stages, self._made = Stages(self._provenance), Made()
        self._calls = Calls(self._pass, self._kept, self.returned, self._begin_call, self._note_returned)
        self._sums = Sums(self._pass, self._calls, self._kept, self._stages, self._modules)
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
        modules, calls = self._modules, self._calls

        def hang(
            module: nn.Module, before: Any = None, after: Any = None, *, direct: bool = False
        ) -> None:
            """Hang hooks, which see ``direct`` calls of ``forward`` where there may be any."""
            seen = self._direct if direct and (first or id(module) in self._direct) else None
            before, after = (hook and self._while_recording(hook) for hook in (before, after))
            hooks.enter_context(self._attach(module, before=before, after=after, direct=seen))

        if modules.ancestor is not None:
            hang(modules.ancestor, calls.on_ancestor, calls.on_returned, direct=True)
        # Before others read where what a module takes comes from.
        for module in modules.takers(None if first else self._sums.takers.names):
            hang(module, self._sums.on_taken, direct=modules.holds(module))
        for module in around_of(self._model, modules.ancestor):
            hang(module, calls.on_around, calls.on_around_returned, direct=True)
        for name, module in modules.whole.items():
            if self._takes_input(module):
                hang(module, self._on_input, direct=True)
            hang(module, after=functools.partial(self._on_output, name), direct=True)
        for name, (module, _) in modules.inner.items():
            if first or name in self.components:
                on_input = functools.partial(self._on_inner_input, name)
                on_output = functools.partial(self._on_inner_output, name)
                hang(module, on_input, on_output)
        on_transparent_input = self._stages.take if first else None
        for module, owners in modules.inner_transparent:
            if first or any(id(module) == merged for merged, _ in self._stages.merged):
                on_inner = functools.partial(self._on_inner_transparent, owners)
                hang(module, on_transparent_input, on_inner)
        tables = {n: m for n, m in modules.tables.items() if first or n in self.components}
        for name, module in tables.items():
            hang(module, self._on_table_input, functools.partial(self._on_table_output, name))
        for name, module in modules.norms.items():
            on_output = functools.partial(self._on_norm_output, name)
            hang(module, self._on_norm_input, on_output, direct=True)
        for module in modules.transparent:
            if all(module is not other for other in tables.values()):
                hang(module, on_transparent_input, self._on_transparent)
        if self.end is not None and self.end not in self.components:
            end = dict(clean_modules(self._model))[self.end]
            hang(end, after=lambda *called: self.record_end(called[-1]))
        if first:
            hooks.callback(self._leave)
            # Before the flow, which asks it for the place of what it shows.
            self._sums.takers.__enter__()
            self._provenance.follow(self._model, self._sums.on_function)

    def _while_recording(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Leave out a hook when the pass has ended, or is none on data."""

        def safe(module: nn.Module, *given: Any) -> None:
            # Torch gives a hook what the call takes, and behind it what it gave: the last two tell.
            if not self._pass.closed and are_data(given[-2:]):
                takers = self._sums.takers
                was_ours, takers.is_ours = takers.is_ours, True
                try:
                    hook(module, given[:2], *given[2:])
                finally:
                    takers.is_ours = was_ours

        return safe

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
                self._used = {n for n, m in silent.items() if self._provenance.has_read(m)}
        finally:
            self._provenance.leave()
            self._sums.takers.__exit__()

    def start_pass(self, batch: Any = None) -> None:
        """Forget what was recorded and begin a new forward pass."""
        # These may be others from now on.
        self._kept.keep, self._sums.known = self.keep, self.sums
        self._pass.start()
        self._looking_up.clear()
        self._calls.start_pass()
        self._start_call()
        self._sums.takers.error = None
        self._provenance.start_pass(batch)
        if not self.is_first and batch is not None:
            if self._sums.takers.watches:
                self._sums.takers.__enter__()
            if self._kept.moved:
                self._provenance.follow_rows(self._model)

    def _start_call(self, *, again: bool = False) -> None:
        """Forget what was recorded of the call before."""
        self._pass.start_call(again=again)
        self._kept.start_call()
        self._stages.start_call()
        self._sums.start_call()
        self.origins.start_call()
        self.skipped: list[str] = []
        self._made.start_call()
        self._last: tuple[str, Tensor] | None = None
        self._unusable: str | None = None

    def _take_apart(self) -> None:
        """Let what continues a component go on for itself where something else reads that state, too."""
        states = self._kept.states
        for name, stage, kept, readers in self._stages.apart():
            states[name] = kept
            self.parts[name] = self.parts[name][: stage + 1]
            for reader, further in readers.items():
                if isinstance(record := states.get(reader), Recorded):
                    sources = (record.sources or frozenset()) | further
                    states[reader] = replace(record, sources=sources)
                if reader in self.returned.made_of:
                    self.returned.made_of[reader] |= further

    def end_pass(self) -> dict[str, Any]:
        """End the pass and return its states by name, in order of execution."""
        try:
            self._while_recording(lambda *_: self._calls.settle())(self._model)
            self._leave()
            lost = None if self.is_first else self._sums.takers.error
            error = self._pass.error or self._provenance.lost_order or lost
            if error is not None:
                raise error
            if self._unusable is not None:
                raise ValueError(self._unusable)
            self._take_apart()
            self._pass.is_first = False
            self.inputs.end_pass()
            return self._kept.states
        finally:
            self._leave()
            if self._hangs_all and not self.is_first:
                self.remove()
                self.__enter__()
            self.start_pass()

    @property
    def untraced(self) -> Exception | None:
        """What kept the data from being followed, if anything did; sources then mean nothing."""
        return self._provenance.error

    @property
    def is_first(self) -> bool:
        """Whether no pass was recorded yet."""
        return self._pass.is_first

    @property
    def ran(self) -> bool:
        """Whether any component ran in the current pass."""
        return bool(self._pass.ran)

    @property
    def failed(self) -> bool:
        """Whether something went wrong in a hook of the current pass."""
        return self._pass.error is not None

    @property
    def silent(self) -> list[str]:
        """Chosen components that did not run in the current pass."""
        called = self._pass.ran | self._modules.opened
        return [name for name, module in self.components.items() if id(module) not in called]

    @property
    def given(self) -> dict[str, Any]:
        """What the components' common ancestor, or else the network, was called with, by name."""
        return self._calls.given

    def told(self, silent: Collection[str]) -> list[str]:
        """Return what a reader must know of components that ran in no pass."""
        return self._modules.told(silent, self._used)

    def in_turns(self, records: Iterable[Recorded]) -> frozenset[str]:
        """Find the components that the network sends samples to in turns, by what one pass recorded."""
        return self._modules.in_turns(records)

    def n_weights(self, components: Iterable[Iterable[str]]) -> tuple[int, ...]:
        """Count the parameters of components, each given by its calls, with norms behind a layer."""
        return self._modules.n_weights(components, self.parts)

    def homeless(self, silent: Collection[str]) -> dict[str, int]:
        """Count the parameters that are in no component, by name, where components were not named."""
        return self._modules.homeless(self.parts, silent)

    def forget_sums(self, but: Collection[str]) -> None:
        """Look for no other sums in later passes than some."""
        self._sums.takers.forget(lambda found: found.name not in but)

    def joins(self, result: Any) -> bool:
        """Check whether all that the caller makes of states mixes some that the network gives apart."""
        return self.is_first and self.returned.joins(result, self._kept.states, self.components)

    def record_end(self, value: Any) -> None:
        """Record a state that no component gave, such as the network's own output, as the last one."""
        name = self.end or OUTPUT
        if self._pass.closed or (name in self._kept.states and name != OUTPUT):
            return
        self._kept.states.pop(name, None)
        self._stages.read(name, value)
        sources, tensor = self._provenance.of(value), first_tensor(value)
        if tensor is None:
            raise ValueError(
                f"the output of interest has type {type(value).__name__}, without a floating-point "
                "tensor; let output= give one"
            )
        self._kept.store(tensor, Recorded(name, self._model, tensor, None, sources))

    def _begin_call(self, module: nn.Module, given: Any, is_first: bool) -> None:
        """Begin a call of the network, perhaps a further one in the same pass."""
        states = self._kept.states
        self._provenance.own_weights(self._model)
        if states and is_first:
            self._begin_behind_others(given)
        elif states and self.again is not None:
            self._take_apart()
            self._pass.is_first = False
            self._start_call(again=True)
            # The step is under way, in whatever inference mode or autocast; sums are added to outside.
            with plain_numerics(next(module.parameters(), torch.empty(0, device="cpu"))), unseen():
                self.again(states)
        elif states:
            self._pass.closed = True
        self._sums.takers.begin(None)

    def _begin_behind_others(self, given: Any) -> None:
        """Keep the states of parts that were called before, if this call reads them."""
        sources = self._provenance.of(given)
        if sources is not None:
            self._leads_in = bool(sources & self._kept.states.keys())
        if self._leads_in:
            return
        self._start_call()
        if self.is_first:
            self.parts.clear()
            self._alone.clear()
            for known in (self.inputs, self.origins, self._stages, self._made):
                known.clear()
            self.forget_sums(but=())

    def _note_returned(self, module: nn.Module, call: Any, output: Any) -> None:
        """Find what the returned tensors were made of, and record those that are states of their own."""
        if self.is_first and not self.returned.made_of:
            name = OUTPUT if OUTPUT not in self.components else "returned"
            last = None if self._modules.named else self._last
            self.returned.find(name, module, call, output, last, self._kept.moved)
            drawn = filter(lambda end: self._provenance.draws(end.tensor), self.returned.ends(output))
            self.origins.noisy += [end.name for end in drawn]
        for end in self.returned.ends(output):
            self._stages.read(end.name, end.tensor)
            self._kept.add_mixed_in(end.name, call)
            sources = self.returned.sources(end.name, end.tensor)
            self._kept.add(end.name, module, end.tensor, sources, is_further=end.is_further)

    def _on_inner_input(self, name: str, module: nn.Module, given: Any) -> None:
        if not self._modules.inner[name][1] & self._pass.running:
            self._on_input(module, given)

    def _on_inner_output(self, name: str, module: nn.Module, given: Any, output: Any) -> None:
        """Let a part be a component, where it is called and what it is part of is not."""
        if not self._modules.inner[name][1] & self._pass.running:
            self._modules.open(name)
            self._on_output(name, module, given, output)

    def _on_input(self, module: nn.Module, given: Any) -> None:
        self._pass.running.add(id(module))
        key = self._pass.key(module)
        if self.is_first:
            self._made.take(module, given)
            if self._calls.is_behind and all(map(self._provenance.is_untouched, all_tensors(given))):
                # It runs on other data than the ancestor did, such as noise.
                self._foreign.add(key)
                return
            self.origins.take(key, given, self._kept.states.keys())
        self._kept.add_inputs(key, module, given)
        self._stages.forget_freed(given)

    def _on_output(self, name: str, module: nn.Module, given: Any, output: Any) -> None:
        self._pass.running.discard(id(module))
        key = self._pass.count(module)
        self._sums.takers.begin(key)
        # What reads what runs on other data does so, too.
        if key not in self._foreign:
            self._record(numbered(name, key[1]), module, key, output, given)

    def _on_transparent(self, module: nn.Module, given: Any, output: Any) -> None:
        """Let what a parameter-free module made of a component's output count as that component's."""
        key = self._pass.count(module)
        gave = self._stages.taken(module) if self.is_first else self._stages.find(given)
        if gave is None or (raw := gave.tensor()) is None:
            return
        if self.is_first and self.origins.continues(module, given, output, gave.name, raw):
            self._stages.merge(gave, key)
        if key in self._stages.merged:
            self._record(gave.name, module, key, output, given)

    def _on_inner_transparent(
        self, owners: set[int], module: nn.Module, given: Any, output: Any
    ) -> None:
        """Let it belong to a part of a component that is not called as a whole."""
        # In later passes nobody tells which components run.
        merged = self._pass.key(module) in self._stages.merged
        if not owners & self._pass.running if self.is_first else merged:
            self._on_transparent(module, given, output)
        else:
            self._pass.count(module)

    def _on_table_input(self, module: nn.Module, given: Any) -> None:
        self._looking_up.append(self._provenance.flow.lookups)
        if self.is_first:
            self._stages.take(module, given)

    def _on_table_output(self, name: str, module: nn.Module, given: Any, output: Any) -> None:
        """Let a module that looks up entries of its own, as states choose them, be a component."""
        looks_up = self._provenance.flow.lookups > (self._looking_up.pop() if self._looking_up else 0)
        if looks_up and self._looking_up:
            # What it is part of speaks for it.
            return
        if name not in self.components and looks_up and first_real(output) is not None:
            self.components[name] = module
        if name in self.components:
            if self._takes_input(module):
                self._on_input(module, given)
            self._on_output(name, module, given, output)
        elif any(module is other for other in self._modules.transparent):
            self._on_transparent(module, given, output)

    def _on_norm_input(self, module: nn.Module, given: Any) -> None:
        """Find whether a norm takes what a layer gave as it is, and so belongs to that layer."""
        key = self._pass.key(module)
        if self.is_first:
            gave = self._stages.take(module, given)
            before = None if gave is None else self.components[module_of(gave.name)]
            belongs = before is not None and (id(module) in self._modules.listed or is_leaf(before))
            if self.calls_alone is not None:
                # A layer may be a wrapper in one of the networks that are compared, as with adapters.
                called = numbered(self._modules.names[id(module)], key[1])
                belongs = before is not None and called not in self.calls_alone
            if not belongs:
                self._stages.taken(module)
                self._alone.add(key)
        if key in self._alone:
            self._on_input(module, given)

    def _on_norm_output(self, name: str, module: nn.Module, given: Any, output: Any) -> None:
        if self._pass.key(module) in self._alone:
            self._on_output(name, module, given, output)
        else:
            self._on_transparent(module, given, output)

    def _takes_input(self, module: nn.Module) -> bool:
        """Check whether the module's input must be seen in the next pass."""
        # Of what runs inside of components, no operator takes sums.
        seen = self.is_first or id(module) in self._modules.opened or self._sums.takers.watches
        return seen or any(taker == id(module) for taker, _ in self.inputs.at)

    def _record(self, name: str, module: nn.Module, key: Call, output: Any, given: Any) -> None:
        """Record what a call gave, and in the first pass what it was made of."""
        before, tensor, further = self._made.find(key, output, given)
        if tensor is None:
            self._unusable = (
                f"component {name!r} returned {type(output).__name__} with no floating-point tensor. "
                "Leave it out with components=[...]."
            )
            if self._modules.named:
                raise ValueError(self._unusable)
            self.skipped.append(name)
            return
        self._unusable = None
        self._stages.give(tensor, name, key)
        if self.is_first:
            self._record_first(name, module, key, before, output, given, tensor, further)
            return
        self._kept.add_mixed_in(name, self._calls.call)
        # The first pass shows which modules are followed by one that speaks for the component.
        if key not in self._stages.superseded:
            self._kept.add(name, module, tensor, None, output)
        for place, other in further:
            self._kept.add(further_name(name, place), module, other, None)

    def _record_first(
        self,
        name: str,
        module: nn.Module,
        key: Call,
        before: Given | None,
        output: Any,
        given: Any,
        tensor: Tensor,
        further: Sequence[tuple[int, Tensor]],
    ) -> None:
        """Record what a call gave, and find out what it was made of."""
        refuse_part(name, module, tensor)
        kept, made = self._kept, output
        if before is not None and not isinstance(output, Tensor):
            made = [t for t in all_tensors(output) if t is tensor or not before.passes(t)]
        called = numbered(self._modules.names[id(module)], key[1])
        self.parts[name] = (*self.parts.get(name, ()), called)
        origin, new = self.origins.of(name, key, made, tensor, kept.states.keys(), self._calls.call)
        for added in new:
            kept.add(added.name, module, added.copied, frozenset(), is_input=True, holds=added.holds)
        kept.add_mixed_in(name, self._calls.call)
        # What continues a state reads it at whatever stage it is, and others as they are.
        self._stages.read(name, given, made, but=name if key in self._stages.merged else None)
        self._last = None if tensor.is_nested or not tensor.ndim else (name, plain(tensor))
        untouched, made_of = self._provenance.is_untouched(tensor), self._provenance.of(tensor)
        is_idle = origin.is_idle or self._provenance.is_idle(tensor)
        masks = [] if is_idle else self._provenance.masks([other for _, other in further])
        self._provenance.mark(made, name, idle=is_idle)
        self._provenance.own(masks)
        facts: dict[str, Any] = {
            "from_float": origin.from_float,
            "is_frozen": is_frozen(self.components[module_of(name)], self._trained),
            "is_idle": is_idle,
            "from_data": not untouched,
            "is_behind": self._calls.is_behind,
            # A module that continues a component is known to compare none.
            "is_pairwise": before is not None
            and self._provenance.compares_samples(tensor, before.tensors, module),
        }
        if key not in self._stages.superseded:
            ignores_data = untouched and (bool(origin.sources) or not origin.from_float)
            own = {"is_loss": bool(origin.targets), "ignores_data": ignores_data}
            kept.add(name, module, tensor, origin.sources, output, **own, **facts)
            self._stages.add(name, key, tensor, kept.states[name], made_of)
        for place, other in further:
            if any(other is mask for mask in masks) or not holds_numbers(other):
                continue
            other_name = further_name(name, place)
            self._provenance.mark(other, other_name, idle=is_idle, is_part=True)
            kept.add(other_name, module, other, origin.sources, **facts)
