"""Records every component's state in one forward pass, through hooks that are always removed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.components import named_components, transparent_modules
from lightning_koopman.module_tree import clean_modules, clean_name
from lightning_koopman.origins import Origins
from lightning_koopman.recorded import INPUT, OUTPUT, Recorded
from lightning_koopman.tensors import (
    detached_copy,
    first_packed,
    first_tensor,
    unpacked,
    whole,
)

_NO_LABELS: frozenset[str] = frozenset()


def _kept_out_of_the_forward(hook: Callable[..., None]) -> Callable[..., None]:
    """Store a hook's error for :meth:`Capture.end_pass`, for it may not end the user's own pass."""

    @functools.wraps(hook)
    def safe(self: Capture, *args: Any, **kwargs: Any) -> None:
        if self._closed:
            return
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            self._error, self._closed = error, True

    return safe


class Capture:
    """Hooks that record the states x_0 … x_L of the chosen components, one pass at a time.

    Use as a context manager around any number of forward passes. A pass begins with
    :meth:`start_pass`, or where the components' common ancestor is called again; :meth:`end_pass`
    returns what was recorded, or raises what went wrong in a hook. Components are named in order of
    execution; one that runs several times appears as ``name``, ``name#1``, …. The output of a
    parameter-free module that directly consumes a component's output belongs to that component.

    Args:
        model: The module to watch; it is only ever read.
        components: Names, patterns, types or a depth, as in :func:`named_components`.
        keep: Turns a state's tensor, and the :class:`Recorded` it belongs to, into what is stored. It
            must copy, for a later in-place module may overwrite the tensor.
        output: Name of the module whose output the chain ends with; it becomes a component if it is
            none.
        follow: Whether to follow the data through the first pass, so that :attr:`Recorded.sources`
            is known there.
        on_call: Called before each component runs, with the module, the number of its calls before in
            this pass, its arguments, and what tells the states that a value came from, where that is
            followed.

    Attributes:
        components: The chosen modules by name.
        skipped: Components that gave nothing to record in the current pass.
        parts: By state, in order of execution, the module calls that its component is made of; the last
            one gives the state. A second call of a module reads ``name#1``, as states do.

    Raises:
        ValueError: If the components cannot be chosen, or the model is a TorchScript module.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Any = None,
        *,
        keep: Callable[[Tensor, Any], Any] = lambda tensor, _: detached_copy(tensor),
        output: str | None = None,
        follow: bool = False,
        on_call: Callable[..., None] | None = None,
    ) -> None:
        if isinstance(model, torch.jit.ScriptModule):
            raise ValueError(
                f"{type(model).__name__} is a TorchScript module, whose parts take no forward hooks. "
                "Pass the nn.Module that it was scripted from."
            )
        self.components = named_components(model, components)
        self.end = None if output is None else self._named_output(model, output)
        self._model = model
        self._named = components is not None
        # Named components are taken to the letter; only an automatic choice merges activations.
        self._transparent = [] if self._named else transparent_modules(model, self.components)
        self._keep = keep
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._input_handles: dict[int, torch.utils.hooks.RemovableHandle] = {}
        self._superseded: set[tuple[int, int]] = set()
        self._merged: set[tuple[int, int]] = set()
        self._names = {id(module): clean_name(name) for name, module in model.named_modules()}
        self.parts: dict[str, tuple[str, ...]] = {}
        self._inputs: dict[tuple[int, int], str] = {}
        self._passes = 0
        self._follow = follow
        self._on_call = on_call
        self._origins = Origins()
        self.start_pass()

    def __enter__(self) -> Capture:
        try:
            ancestor = self._common_ancestor()
            if ancestor is not None:
                self._handles.append(ancestor.register_forward_pre_hook(self._on_ancestor))
            takes_input = {module for module, _ in self._inputs}
            for name, module in self.components.items():
                if self._passes == 0 or self._on_call is not None or id(module) in takes_input:
                    handle = module.register_forward_pre_hook(self._on_input, with_kwargs=True)
                    self._input_handles[id(module)] = handle
                self._handles.append(
                    module.register_forward_hook(functools.partial(self._on_output, name))
                )
            for module in self._transparent:
                self._handles.append(module.register_forward_hook(self._on_transparent))
            if self.end is not None and self.end not in self.components:
                end = dict(clean_modules(self._model))[self.end]
                self._handles.append(end.register_forward_hook(lambda _m, _a, out: self.record_end(out)))
            if self._follow and self._passes == 0:
                self._origins.follow()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Take every hook off the model; safe to call twice."""
        self._origins.leave()
        for handle in (*self._handles, *self._input_handles.values()):
            handle.remove()
        self._handles.clear()
        self._input_handles.clear()

    def start_pass(self, batch: Any = None) -> None:
        """Forget what was recorded and begin a new forward pass.

        Args:
            batch: What the pass is about to run on; it tells several network inputs apart.
        """
        self._states: dict[str, Any] = {}
        self._calls: dict[int, int] = {}
        self._pending: dict[int, tuple[frozenset[str] | None, bool]] = {}
        self._raw: Tensor | None = None
        self._current: tuple[str, int, int] | None = None
        self._closed = False
        self._error: Exception | None = None
        self._sources_of: dict[str, tuple[frozenset[str] | None, bool]] = {}
        self.skipped: list[str] = []
        self._unusable: str | None = None
        self._origins.start_pass(batch)

    def end_pass(self) -> dict[str, Any]:
        """End the pass and hand over its states.

        Returns:
            Stored state by name, in order of execution. The first is :data:`INPUT`, unless the first
            component takes no floating-point tensor; then its own output comes first.

        Raises:
            ValueError: If a component returned nothing that can be recorded.
        """
        states, error = self._states, self._error
        if error is None and self._unusable is not None:
            error = ValueError(self._unusable)
        self._passes += error is None
        self._origins.leave()
        if self._passes == 1 and self._on_call is None:
            self._keep_input_hooks()
        self.start_pass()
        if error is not None:
            raise error
        return states

    def _keep_input_hooks(self) -> None:
        """Take the hooks off all inputs that the first pass showed not to be the network's."""
        takes_input = {module for module, _ in self._inputs}
        for module in list(self._input_handles):
            if module not in takes_input:
                self._input_handles.pop(module).remove()

    @property
    def untraced(self) -> Exception | None:
        """What kept the data from being followed, if anything did; sources then mean nothing."""
        return self._origins.error

    @property
    def silent(self) -> list[str]:
        """Chosen components that did not run in the current pass."""
        return [name for name, module in self.components.items() if id(module) not in self._calls]

    def record_end(self, value: Any) -> None:
        """Record a state that no component gave, such as the network's own output, as the last one.

        Args:
            value: A tensor, or tensors nested as modules give them.

        Raises:
            ValueError: If there is no floating-point tensor in it.
        """
        name = self.end or OUTPUT
        if self._closed or name in self._states:
            return
        sources = self._origins.of(value)
        tensor = first_tensor(value)
        if tensor is None:
            raise ValueError(
                f"the output of interest is a {type(value).__name__} without a floating-point tensor; "
                "let output= give one"
            )
        tensor = whole(tensor)
        self._states[name] = self._keep(tensor, Recorded(name, self._model, tensor, None, sources))

    def _named_output(self, model: nn.Module, output: str) -> str:
        modules = dict(clean_modules(model))
        if output not in modules:
            raise ValueError(
                f"output is {output!r}, which is no module of {type(model).__name__}. "
                f"It has {', '.join(map(repr, list(modules)[:8]))}."
            )
        for name in self.components:
            if output.startswith(name + "."):
                raise ValueError(
                    f"output {output!r} is part of component {name!r}. Name finer components with "
                    "components=[...], or a later output."
                )
        if not any(name == output or name.startswith(output + ".") for name in self.components):
            self.components[output] = modules[output]
        return output

    def _common_ancestor(self) -> nn.Module | None:
        """Find the innermost module that holds all components, if it is one that can be called."""
        wanted = {id(module) for module in self.components.values()}
        ancestor = None
        for module in self._model.modules():
            inside = {id(part) for part in module.modules() if part is not module}
            if wanted <= inside and not isinstance(module, nn.ModuleList | nn.ModuleDict):
                ancestor = module
        return ancestor

    @_kept_out_of_the_forward
    def _on_ancestor(self, module: nn.Module, args: Any) -> None:
        # A second call within one step (two views, a teacher) is another pass: the first one counts.
        self._closed = bool(self._states)

    @_kept_out_of_the_forward
    def _on_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensor = first_tensor((args, kwargs))
        key = (id(module), self._calls.get(id(module), 0))
        if tensor is not None:
            if self._passes == 0 and self._is_input(tensor):
                self._inputs[key] = INPUT if not self._inputs else f"{INPUT}#{len(self._inputs)}"
                self._origins.claim(tensor, self._inputs[key])
            if key in self._inputs:
                name = self._inputs[key]
                recorded = self._recorded(name, module, (args, kwargs), tensor, _NO_LABELS)
                self._states[name] = self._keep(recorded.tensor, recorded)
        if self._on_call is not None:
            followed = self._origins.of if self._origins.following else None
            self._on_call(module, key[1], args, kwargs, followed)
        self._pending[id(module)] = (self._origins.of((args, kwargs)), tensor is not None)

    def _is_input(self, tensor: Tensor) -> bool:
        """Tell whether a component takes data of the batch that no component has taken before."""
        fresh = self._origins.is_fresh(tensor)
        return not self._states if fresh is None else fresh

    @_kept_out_of_the_forward
    def _on_output(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        call = self._count(module)
        self._record(name if call == 0 else f"{name}#{call}", module, call, output)

    @_kept_out_of_the_forward
    def _on_transparent(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self._count(module)
        if self._current is None or self._raw is None or first_tensor(args) is not self._raw:
            return
        name, *recorded_by = self._current
        if self._passes == 0 and self._continues(output, name):
            self._merged.add((id(module), call))
            self._superseded.add((recorded_by[0], recorded_by[1]))
        if (id(module), call) not in self._merged:
            return
        self._record(name, module, call, output)

    def _continues(self, output: Any, name: str) -> bool:
        """Tell whether an output still holds a component's state, one row a sample."""
        # A module may look at a state for its type or length alone, as rotary embeddings do.
        tensor = first_tensor(output)
        assert self._raw is not None
        if tensor is None or tensor.shape[:1] != self._raw.shape[:1]:
            return False
        return self._origins.may_hold(tensor, name)

    def _count(self, module: nn.Module) -> int:
        call = self._calls.get(id(module), 0)
        self._calls[id(module)] = call + 1
        return call

    def _record(self, name: str, module: nn.Module, call: int, output: Any) -> None:
        tensor = first_tensor(output)
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
        self._raw, self._current = tensor, (name, id(module), call)
        if self._passes == 0:
            called = self._names[id(module)] if call == 0 else f"{self._names[id(module)]}#{call}"
            self.parts[name] = (*self.parts.get(name, ()), called)
        sources, from_float = self._pending.get(id(module), (None, True))
        if name in self._sources_of:
            sources, from_float = self._sources_of[name]
        self._sources_of[name] = (sources, from_float)
        self._origins.mark(output, name)
        # The first pass shows which modules are followed by one that speaks for the component.
        if (id(module), call) not in self._superseded:
            recorded = self._recorded(name, module, output, tensor, sources, from_float)
            self._states[name] = self._keep(recorded.tensor, recorded)

    def _recorded(
        self,
        name: str,
        module: nn.Module,
        value: Any,
        tensor: Tensor,
        sources: frozenset[str] | None,
        from_float: bool = True,
    ) -> Recorded:
        packed = first_packed(value)
        if packed is not None and packed.data is tensor:
            tensor, lengths = unpacked(packed)
            return Recorded(name, module, tensor, lengths, sources, from_float)
        return Recorded(name, module, whole(tensor), None, sources, from_float)
