"""Hooks that record every component's state in one forward pass, and that always come off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.network.components import (
    clean_modules,
    clean_name,
    common_ancestor,
    named_components,
    transparent_modules,
    with_output,
)
from lightning_koopman.network.hook_points import attach
from lightning_koopman.network.recorder import OUTPUT, Recorder
from lightning_koopman.network.tensors import detached_copy


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

    Attributes:
        components: The chosen modules by name.
        end: Name of the module whose output the chain ends with, if one was named.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Any = None,
        *,
        keep: Callable[[Tensor, Any], Any] = lambda tensor, _: detached_copy(tensor),
        output: str | None = None,
        follow: bool = False,
    ) -> None:
        if isinstance(model, torch.jit.ScriptModule):
            raise ValueError(
                f"{type(model).__name__} is a TorchScript module, whose parts take no forward hooks. "
                "Pass the nn.Module that it was scripted from."
            )
        self.components = named_components(model, components)
        self.end = output
        # Named components are taken to the letter; only an automatic choice merges activations.
        named = components is not None
        if output is not None:
            self.components = with_output(model, self.components, output)
        self._transparent = [] if named else transparent_modules(model, self.components)
        self._model = model
        self._follow = follow
        names = {id(module): clean_name(name) for name, module in model.named_modules()}
        self._recorder = Recorder(names, named, keep)
        self._hooks = ExitStack()
        self._input_hooks: dict[str, ExitStack] = {}
        self._closed = False
        self._error: Exception | None = None

    def __enter__(self) -> Capture:
        with ExitStack() as hooks:
            ancestor = common_ancestor(self._model, self.components.values())
            if ancestor is not None:
                hooks.enter_context(attach(ancestor, before=self._on_ancestor))
            for name, module in self.components.items():
                if self._recorder.takes_input(module):
                    self._input_hooks[name] = hooks.enter_context(attach(module, before=self._on_input))
                on_output = functools.partial(self._on_output, name)
                hooks.enter_context(attach(module, after=on_output))
            for module in self._transparent:
                hooks.enter_context(attach(module, after=self._on_transparent))
            if self.end is not None and self.end not in self.components:
                end = dict(clean_modules(self._model))[self.end]
                hooks.enter_context(attach(end, after=self._on_end))
            if self._follow and self._recorder.passes == 0:
                hooks.callback(self._recorder.origins.leave)
                self._recorder.origins.follow()
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take every hook off the model; safe to call twice."""
        self._hooks.close()
        self._input_hooks.clear()

    def start_pass(self, batch: Any = None) -> None:
        """Forget what was recorded and begin a new forward pass."""
        self._closed, self._error = False, None
        self._recorder.start_pass(batch)

    def end_pass(self) -> dict[str, Any]:
        """End the pass and hand over its states."""
        error = self._error
        try:
            if error is not None:
                raise error
            return self._recorder.end_pass()
        finally:
            self._recorder.origins.leave()
            self._drop_input_hooks()
            self.start_pass()

    def _drop_input_hooks(self) -> None:
        """Take the hooks off all inputs that the first pass showed not to be the network's."""
        for name in list(self._input_hooks):
            if not self._recorder.takes_input(self.components[name]):
                self._input_hooks.pop(name).close()

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """By state, in order of execution, the module calls that its component is made of.

        The last one gives the state. A second call of a module reads ``name#1``, as states do.
        """
        return self._recorder.parts

    @property
    def skipped(self) -> list[str]:
        """Components that gave nothing to record in the current pass."""
        return self._recorder.skipped

    @property
    def untraced(self) -> Exception | None:
        """What kept the data from being followed, if anything did; sources then mean nothing."""
        return self._recorder.origins.error

    @property
    def silent(self) -> list[str]:
        """Chosen components that did not run in the current pass."""
        ran = self._recorder.calls
        return [name for name, module in self.components.items() if id(module) not in ran]

    def record_end(self, value: Any) -> None:
        """Record a state that no component gave, such as the network's own output, as the last one."""
        if not self._closed:
            self._recorder.end(self.end or OUTPUT, self._model, value)

    @_kept_out_of_the_forward
    def _on_ancestor(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # A second call within one step (two views, a teacher) is another pass: the first one counts.
        self._closed = bool(self._recorder.states)

    @_kept_out_of_the_forward
    def _on_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._recorder.take(module, args, kwargs)

    @_kept_out_of_the_forward
    def _on_output(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._recorder.give(name, module, output)

    @_kept_out_of_the_forward
    def _on_transparent(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._recorder.pass_on(module, args, output)

    @_kept_out_of_the_forward
    def _on_end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.record_end(output)
