"""Records the outermost calls that a step makes of the network's parts, and runs them again.

What runs again is exactly what the user ran: the same modules with the same arguments, in the same
order, where later calls are fed with what earlier ones give now. Nothing is guessed: where the user's
own code stands between two calls, or a pass does not give again what it gave, nothing is run again.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_koopman.network.access.hooks import attach_in, ended, is_wrapped, wrap
from lightning_koopman.network.access.isolation import is_compiled_itself
from lightning_koopman.network.access.signals import signals_wait
from lightning_koopman.network.access.watch import unseen
from lightning_koopman.network.axes.padding import Valid
from lightning_koopman.network.components import (
    clean_name,
    common_ancestor,
    has_weights,
    transparent_modules,
)
from lightning_koopman.network.flow.dataflow import DataFlow
from lightning_koopman.network.runs.steps import (
    NOT_COPIED,
    Fed,
    FedObject,
    Kept,
    KeptObject,
    Part,
    RecordedCall,
    Step,
    autocast_of,
    mapped,
    objects_in,
    start_of,
)
from lightning_koopman.network.tensors import (
    INTEGERS,
    address_of,
    all_tensors,
    exactly,
    first_tensor,
    is_underived,
    need_not_wait,
    plain,
    tensors_inside,
)

BYTES_KEPT = 256 * 2**20
"""Most bytes of arguments that are kept to be run again."""


class Recording:
    """The outermost calls of some steps, within a budget of bytes.

    Use as a context manager around each step; :meth:`end_step` keeps what it recorded. Whether the
    user's own code stands between the calls of a step is told by following the data through one step,
    from number ``follow_from`` on; ``None`` never follows, for compiled code would be compiled anew.
    Parts of a component may be called past it, until a step calls it as a whole alone. Where data may
    come ``ordered`` and not all steps fit into the budget, those that are kept are from everywhere.

    Attributes:
        steps: What was recorded.
        full: Whether the budget did not hold all steps.
        recording: Whether a step is being recorded.
        n_lone: How many calls on one sample were left out.
    """

    def __init__(
        self,
        model: nn.Module,
        components: dict[str, nn.Module],
        *,
        budget: int = BYTES_KEPT,
        follow_from: int | None = 0,
        ordered: bool = True,
    ) -> None:
        self.steps: list[Step] = []
        self._reason: str | None = None
        self._follow_from, self._followed, self._follows = follow_from, False, False
        self._called_none = False
        self.full, self.n_lone = False, 0
        self._ordered = ordered
        # How many steps had calls, and one of how many is kept.
        self._n_steps, self._every = 0, 1
        self._budget = budget
        between = [m for m in transparent_modules(model, components) if _is_pure(m)]
        parts = {id(module) for module in (*components.values(), *between)}
        inside = {id(m): [part for part in m.modules() if part is not m] for m in components.values()}
        self._inside_of = {key: {*map(id, inner)} for key, inner in inside.items()}
        inner = (part for each in inside.values() for part in each)
        parts |= {id(part) for part in inner if has_weights(part) or _is_pure(part)}
        self._names = {id(m): clean_name(n) or type(m).__name__ for n, m in model.named_modules()}
        # What a compiled module holds may be registered beside it, too, and be called as it is.
        compiled = [part for part in model.modules() if is_compiled_itself(part)]
        hidden = {id(part) for whole in compiled for part in whole.modules() if part is not whole}
        carriers = {id(m): m for m in _carriers(model, parts) if id(m) not in hidden}
        self._carriers = list(carriers.values())
        self._watched = frozenset(map(id, self._carriers))
        self._ran: set[int] = set()
        # Those whose ``forward`` steps call themselves.
        self._direct = {id(model), id(common_ancestor(model, components.values()))}
        if getattr(model, "_compiler_ctx", None) is not None:
            self._reason, self._carriers = "the whole module is compiled", []
        self._attach = attach_in(model, self._refuse)
        self._hooks = ExitStack()
        self._flow: DataFlow | None = None
        self._step = Step()
        self.recording = False

    @property
    def reason(self) -> str | None:
        """Why nothing may be run again, if so."""
        if self._reason is None and not self._followed and any(len(s.calls) > 1 for s in self.steps):
            return "nobody could follow whether the step runs code of its own between its calls"
        if self._reason is None and self._called_none and not self.steps and not self.full:
            return (
                "no step called a component as a module, nor what holds it or a part of it (forward() "
                "itself, weights alone, compiled code and what it was made from cannot be recorded)"
            )
        return self._reason

    @property
    def n_bytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(step.n_bytes for step in self.steps)

    def __enter__(self) -> Recording:
        self.close()
        self._step, self.recording = Step(), True
        self._without_grads = not torch.is_grad_enabled()
        self._inside: list[tuple[nn.Module, bool]] = []
        self._own = {id(module): vars(module).get("forward") for module in self._carriers}
        # By memory, the first tensor in it that a call gave: the call, its place, and the tensor.
        self._gave: dict[int, tuple[int, int, Tensor]] = {}
        self._objects: list[list[tuple[Any, list[Tensor]]]] = []
        self._data, self._made = set[int](), set[int]()
        self._taken = dict[int, Tensor]()
        with ExitStack() as hooks:
            # Ctrl-C in between would leave what is half hung.
            with signals_wait():
                self._hang(hooks)
            self._hooks = hooks.pop_all()
        return self

    def _hang(self, hooks: ExitStack) -> None:
        """Put on what the stack takes off."""
        self._follows = self._is_followed()
        if self._follows:
            self._flow = hooks.enter_context(DataFlow())
        for module in self._carriers:
            around = functools.partial(self._around, module)
            # A module compiled in place takes no hooks that come after compilation.
            if module._compiled_call_impl is None:
                hung = self._attach(module, before=self._before, after=self._after, first=True)
                hooks.enter_context(hung)
            else:
                hooks.enter_context(wrap(module, "_compiled_call_impl", around, self._refuse))
            if id(module) in self._direct and not self._attach.keywords["compiles"]:
                hooks.enter_context(wrap(module, "forward", around, self._refuse))

    def _is_followed(self) -> bool:
        """Check whether the data of the next step is followed: once, and where it can tell anything."""
        if self._follow_from is None or self._followed or len(self.steps) < self._follow_from:
            return False
        # Only where there are several calls can the user's own code stand between them.
        return not self.steps or len(self.steps[0].calls) > 1

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take all hooks off; safe to call twice."""
        with signals_wait():
            self._hooks.close()
        self.recording = False
        self._flow, self._gave, self._objects = None, {}, []

    def keep(self, parts: Iterable[Part], valid: Valid = MappingProxyType({})) -> None:
        """Copy integers of the batch of the step under way, before the step may change them.

        Of other tensors there will be the copy of what a call takes, or nothing where none takes them.
        What marks positions that hold data is taken as it is.
        """
        self._step.valid, self._step.parts = valid, (kept := [])
        for told, starts in parts:
            copied = {name: _copied(part) for name, part in told.items() if part.dtype in INTEGERS}
            kept.append(Part({**told, **copied}, starts))
            self._step.n_bytes += sum(part.nbytes for part in copied.values())

    def end_step(self, *, lone: bool = True) -> Step:
        """Return the calls of the step that just ended, and keep them if they fit into the budget.

        Without ``lone``, calls on one sample are left out beside others on more.
        """
        self.close()
        step, self._step = self._step, Step()
        for told, _ in step.parts:
            for name, part in told.items():
                if part.dtype not in INTEGERS:
                    told[name] = self._taken.get(id(part), torch.empty(0, device="cpu"))
        self._taken = {}
        if len(step.outputs) < len(step.calls):
            # Calls behind it are not told from those inside of it.
            self._reason = self._reason or "a call failed, and the step went on without it"
        if not lone and self._reason is None:
            step, before = step.without_lone_samples(), len(step.calls)
            self.n_lone += before - len(step.calls)
        # A step without calls tells nothing.
        self._followed = self._followed or (self._follows and bool(step.calls))
        self._let_be(step)
        self._called_none = self._called_none or not step.calls
        if step.calls:
            self._keep(step)
        return step

    def _keep(self, step: Step) -> None:
        """Keep a step if it fits into the budget, or can be made to fit."""
        number, self._n_steps = self._n_steps, self._n_steps + 1
        while self._ordered and self.steps and number % self._every == 0 and not self._fits(step):
            del self.steps[1::2]
            self._every *= 2
        if number % self._every == 0 and self._fits(step):
            self.steps.append(step)
        else:
            self.full = True

    def _fits(self, step: Step) -> bool:
        return self.n_bytes + step.n_bytes <= self._budget

    def _let_be(self, step: Step) -> None:
        """Hang nothing more inside components that a step calls as a whole alone."""
        called = {id(call.module) for call in step.calls}
        ran = set[int]().union(*(self._watched - call.idle for call in step.calls))
        whole = [c for c, inner in self._inside_of.items() if c in ran and called.isdisjoint(inner)]
        if not whole:
            return
        gone = set[int]().union(*(self._inside_of.pop(component) for component in whole))
        gone -= set[int]().union(*self._inside_of.values())
        self._carriers = [module for module in self._carriers if id(module) not in gone]
        self._watched -= gone

    def differs(self) -> str | None:
        """Run the first step again and say what it does not give again, if anything.

        The weights must be those it was recorded with.
        """
        if self.reason is not None or not self.steps:
            return self.reason
        step = self.steps[0]
        for call, old, new in zip(step.calls, step.outputs, step.results(), strict=True):
            tensor = first_tensor(new)
            if old is None or tensor is None:
                continue
            # Compared where it is: only there, a copy that nobody waited for is complete.
            tensor, old = plain(tensor).detach(), old.to(tensor.device)
            scale = float(old.abs().max()) if old.numel() else 0.0
            if tensor.shape != old.shape or not torch.allclose(
                exactly(tensor).double(),
                exactly(old).double(),
                rtol=1e-3,
                atol=1e-5 * scale,
                equal_nan=True,
            ):
                name = self._names[id(call.module)]
                return (
                    f"{name!r} does not give again what it gave (it samples, keeps state, or its "
                    "weights were others)"
                )
        return None

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        forward = vars(module).get("forward")
        # Under ddp a step itself arrives as a call, with the step in place of the module's own forward.
        counts = is_wrapped(forward) or forward is self._own.get(id(module))
        begins = counts and not self._is_within
        self._inside.append((module, counts))
        if begins:
            self._begin(module, args, kwargs, direct=False)
        self._ran.add(id(module))

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if ended(self._inside, module) and not self._is_within:
            self._end(output)

    @property
    def _grads(self) -> bool:
        """Whether the step itself let torch follow gradients."""
        return self._without_grads and torch.is_grad_enabled()

    @property
    def _is_within(self) -> bool:
        """Whether a call that counts is under way."""
        return any(counts for _, counts in self._inside)

    def _around(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        compiled, nested = module._compiled_call_impl is not None, self._is_within
        if not nested:
            self._begin(module, args, kwargs, direct=not compiled)
        # Nothing is hung inside compiled modules.
        self._ran |= {id(m) for m in module.modules()} if compiled else {id(module)}
        if nested:
            return forward(*args, **kwargs)
        depth = len(self._inside)
        self._inside.append((module, True))
        try:
            output = forward(*args, **kwargs)
        finally:
            del self._inside[depth:]
        self._end(output)
        return output

    def _begin(self, module: nn.Module, args: Any, kwargs: Any, *, direct: bool) -> None:
        self._ran = set()
        name = self._names[id(module)]
        held = itertools.chain(itertools.islice(module.parameters(), 1), tensors_inside((args, kwargs)))
        kinds = dict.fromkeys(("cpu", *(tensor.device.type for tensor in held)))
        autocasts = {kind: autocast_of(kind) for kind in kinds if torch.amp.is_autocast_available(kind)}
        args, kwargs = self._kept(args, name), self._kept(kwargs, name)
        self._step.calls.append(
            RecordedCall(module, direct, args, kwargs, autocasts=autocasts, grads=self._grads)
        )

    def _end(self, output: Any) -> None:
        number = len(self._objects)
        for place, tensor in enumerate(all_tensors(output)):
            self._gave.setdefault(address_of(tensor), (number, place, tensor))
        self._objects.append([(each, list(tensors_inside(each))) for each in objects_in(output)])
        call = self._step.calls[number]
        call.idle = self._watched - self._ran
        # What holds nothing of the network's may be what prepares the data.
        if _holds_tensors(call.module):
            self._made |= {*map(address_of, tensors_inside(output))} - {0}
            if self._flow is not None:
                self._flow.label(output, f"{number}")
        first = None if self.steps else first_tensor(output)
        self._step.outputs.append(None if first is None else _copied(first))

    def _refuse(self, error: Exception) -> None:
        """Run nothing again where a call could not be recorded: the user's own step goes on."""
        self._reason = self._reason or f"a call could not be copied ({type(error).__name__}: {error})"

    def _kept(self, value: Any, name: str) -> Any:
        """Copy arguments, but for tensors that an earlier call of the step gave."""

        def keep(part: Any) -> Any:
            if isinstance(part, Tensor):
                return self._kept_tensor(part, name)
            if isinstance(part, NOT_COPIED):
                return part
            if (fed := self._fed_object(part, name)) is not None:
                return fed
            made: dict[int, Any] = {}
            twin = copy.deepcopy(part, made)
            inside = [value for value in made.values() if isinstance(value, Tensor | np.ndarray)]
            self._step.n_bytes += sum(value.nbytes for value in inside)
            return KeptObject(twin, max((len(value) for value in inside if value.ndim), default=1))

        return mapped(value, keep)

    def _fed_object(self, value: Any, name: str) -> FedObject | None:
        """Find an object among what earlier calls gave; others may not hold what these computed."""
        inside = list(tensors_inside(value))
        for call in reversed(range(len(self._objects))):
            for place, (given, tensors) in enumerate(self._objects[call]):
                if given is value and list(map(id, tensors)) == list(map(id, inside)):
                    return FedObject(call, place)
        # What earlier calls took, and maybe handed on, is the step's own data.
        inside = [tensor for tensor in inside if address_of(tensor) not in self._data]
        self._data.update(map(address_of, inside))
        self._note_own_code(inside, name, made=not self._made.isdisjoint(map(address_of, inside)))
        return None

    def _note_own_code(self, tensors: Any, name: str, *, made: bool = False) -> None:
        """Note whether a call takes what the step's own code made of what earlier calls gave."""
        labelled = self._flow is not None and (self._flow.labels(tensors) or self._flow.error)
        if made or labelled:
            self._reason = self._reason or f"the step runs code of its own before {name!r}"

    def _kept_tensor(self, tensor: Tensor, name: str) -> Kept | Fed:
        if (address := address_of(tensor)) in self._gave and address:
            call, place, given = self._gave[address]
            offset = int(tensor.storage_offset() - given.storage_offset())
            return Fed(call, place, given.stride(), tensor.size(), tensor.stride(), offset)
        self._note_own_code(tensor, name)
        self._data.add(address)
        self._step.n_bytes += tensor.nbytes
        grads = self._grads and tensor.requires_grad
        kept = Kept(_copied(tensor), tensor.device, start_of(tensor), grads)
        self._taken[id(tensor)] = kept.copy
        if is_underived(tensor) or type(kept.copy) is not Tensor:
            return kept
        return replace(kept, kind=type(tensor), attributes={**vars(tensor)})


def _copied(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU without waiting for a GPU; what runs there later finds it complete."""
    with unseen():
        return plain(tensor).detach().to("cpu", copy=True, non_blocking=need_not_wait(tensor.device))


def _holds_tensors(module: nn.Module) -> bool:
    """Check whether a module has parameters or buffers."""
    return any(True for held in (module.parameters(), module.buffers()) for _ in held)


def _is_pure(module: nn.Module) -> bool:
    """Check whether a module between components gives the same again, whatever else it ran on."""
    kind = type(module)
    return kind.__module__.startswith("torch.nn.") and not issubclass(kind, nn.modules.loss._Loss)


def _carriers(module: nn.Module, parts: set[int]) -> Iterator[nn.Module]:
    """Find the modules that hold any part, but for what is compiled, or computes weights."""
    if isinstance(module, torch.jit.ScriptModule | ParametrizationList):
        return
    if not any(id(m) in parts for m in module.modules()):
        return
    yield module
    if not is_compiled_itself(module):
        for child in module.children():
            yield from _carriers(child, parts)
