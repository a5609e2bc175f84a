"""Records every component's state in one forward pass, through hooks that are always removed."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_koopman.components import clean_name, named_components, transparent_modules

INPUT = "input"
"""Name of the state before the first component."""


@contextmanager
def undisturbed(model: nn.Module) -> Generator[None, None, None]:
    """Put a model in eval mode without gradients and leave no trace of it.

    Each module's own mode and the random states of Python, NumPy, torch and CUDA are restored, also
    when the body raises. Compiled modules run eagerly inside, because hooks that are added after
    compilation never fire otherwise.

    Args:
        model: Any module.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    cpu_state, python_state, numpy_state = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(),
    )
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    # Asked for only where needed: the first use of set_stance imports the whole compiler.
    eager = torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()
    try:
        model.eval()
        with torch.inference_mode(False), torch.no_grad(), eager:
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        torch.set_rng_state(cpu_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def is_compiled(model: nn.Module) -> bool:
    """Tell whether a module or any part of it went through ``torch.compile``.

    Args:
        model: Any module.

    Returns:
        True for ``torch.compile(module)`` and for ``module.compile()``.
    """
    return any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        for module in model.modules()
    )


def first_tensor(value: Any) -> Tensor | None:
    """Find the first floating-point tensor in a module's input or output.

    Args:
        value: Tensor, or tensors nested in tuples, lists, mappings and dataclasses.

    Returns:
        The tensor, or ``None`` where there is none.

    Raises:
        ValueError: If the first numeric tensor is complex, which no operator here is fitted to.

    Example:
        >>> first_tensor((torch.tensor([1, 2]), {"out": torch.ones(2, 3)})).shape
        torch.Size([2, 3])
    """
    if isinstance(value, Tensor):
        if value.is_complex():
            raise ValueError(
                f"a state of dtype {value.dtype} arrived; complex states are not supported. "
                "Choose components whose outputs are real, or view them with torch.view_as_real."
            )
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        parts: Any = value.values()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, tuple | list):
        parts = value
    else:
        return None
    return next((t for t in map(first_tensor, parts) if t is not None), None)


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
        components: Names or patterns, as in :func:`named_components`.
        keep: Turns a recorded tensor and the module that made it into what is stored. It must copy,
            for a later in-place module may overwrite the tensor.

    Attributes:
        components: The chosen modules by name.
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
        keep: Callable[[Tensor, nn.Module], Tensor] = lambda tensor, _: tensor.detach().clone(),
    ) -> None:
        if isinstance(model, torch.jit.ScriptModule):
            raise ValueError(
                f"{type(model).__name__} is a TorchScript module, whose parts take no forward hooks. "
                "Pass the nn.Module that it was scripted from."
            )
        self.components = named_components(model, components)
        self._model = model
        # Named components are taken to the letter; only an automatic choice merges activations.
        self._transparent = transparent_modules(model, self.components) if components is None else []
        self._keep = keep
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._superseded: set[tuple[int, int]] = set()
        self._names = {id(module): clean_name(name) for name, module in model.named_modules()}
        self._passes = 0
        self.parts: dict[str, tuple[str, ...]] = {}
        self.start_pass()

    def __enter__(self) -> Capture:
        try:
            ancestor = self._common_ancestor()
            if ancestor is not None:
                self._handles.append(ancestor.register_forward_pre_hook(self._on_ancestor))
            for name, module in self.components.items():
                self._handles.append(module.register_forward_pre_hook(self._on_input, with_kwargs=True))
                self._handles.append(
                    module.register_forward_hook(functools.partial(self._on_output, name))
                )
            for module in self._transparent:
                self._handles.append(module.register_forward_hook(self._on_transparent))
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
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start_pass(self) -> None:
        """Forget what was recorded and begin a new forward pass."""
        self._states: dict[str, Tensor] = {}
        self._calls: dict[int, int] = {}
        self._raw: Tensor | None = None
        self._current: tuple[str, int, int] | None = None
        self._closed = False
        self._error: Exception | None = None

    def end_pass(self) -> dict[str, Tensor]:
        """End the pass and hand over its states.

        Returns:
            Stored state by name, in order of execution. The first is :data:`INPUT`, unless the first
            component takes no floating-point tensor; then its own output comes first.

        Raises:
            ValueError: If a component returned nothing that can be recorded.
        """
        states, error = self._states, self._error
        self._passes += error is None
        self.start_pass()
        if error is not None:
            raise error
        return states

    @property
    def silent(self) -> list[str]:
        """Chosen components that did not run in the current pass."""
        return [name for name, module in self.components.items() if id(module) not in self._calls]

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
        if not self._states:
            tensor = first_tensor((args, kwargs))
            if tensor is not None:
                self._states[INPUT] = self._keep(tensor, module)

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
        if self._passes == 0:
            self._superseded.add((recorded_by[0], recorded_by[1]))
        self._record(name, module, call, output)

    def _count(self, module: nn.Module) -> int:
        call = self._calls.get(id(module), 0)
        self._calls[id(module)] = call + 1
        return call

    def _record(self, name: str, module: nn.Module, call: int, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is None:
            raise ValueError(
                f"component {name!r} returned {type(output).__name__} with no floating-point tensor. "
                "Leave it out with components=[...]."
            )
        self._raw, self._current = tensor, (name, id(module), call)
        if self._passes == 0:
            called = self._names[id(module)] if call == 0 else f"{self._names[id(module)]}#{call}"
            self.parts[name] = (*self.parts.get(name, ()), called)
        # The first pass shows which modules are followed by one that speaks for the component.
        if (id(module), call) not in self._superseded:
            self._states[name] = self._keep(tensor, module)
