"""The one hook mechanism: what hangs on modules or stands in for what they call, and comes off again."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Collection, Generator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.jit import ScriptModule
from torch.utils.hooks import RemovableHandle

from lightning_koopman.network.access.bystander import Failed, stand_by
from lightning_koopman.network.access.isolation import has_compiled_functions
from lightning_koopman.network.access.signals import came_from_signal
from lightning_koopman.network.access.watch import seconds_following
from lightning_koopman.network.tensors import in_order


class _Hook:
    """What is hung on a module; a copy of it, or what is unpickled from it, does nothing.

    A user who copies or saves the model while hooks are on must get the model alone. ``__exit__`` of a
    null context takes any arguments, returns ``None``, and is unpickled without this package. Calls in
    another thread than that which hung it are somebody else's. What goes wrong in it flies where nobody
    hears that it ``failed``.

    Attributes:
        seconds: Time that all hooks of the process took so far.
    """

    seconds = 0.0

    def __init__(self) -> None:
        # Nothing, when it is no longer on; others may have kept it.
        self.function: Callable[..., Any] | None = None
        self.failed: Failed | None = None
        self.number: int | None = None
        self.thread = 0

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        # What is compiled while hooks are on must be what would be compiled without them.
        if torch.compiler.is_compiling() or self.function is None:
            return None
        try:
            if _is_elsewhere(self.thread):
                return None
            # Torch leaves the keywords out where the hook is just taken off, as seen in another thread.
            args, kwargs, *output = given
            return _timed(self.function, module, args, kwargs, *output)
        except Exception as error:
            if self.failed is None or came_from_signal(error):
                raise
            self.failed(error)
            return None

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def _timed(function: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, *output: Any) -> Any:
    """Call what hangs on a module, and count the time."""
    start = time.perf_counter() - seconds_following()
    try:
        return function(module, args, in_order(module, kwargs), *output)
    finally:
        _Hook.seconds += time.perf_counter() - seconds_following() - start


# The same hooks each time: up to torch 2.8, the compiler asks whether those that it saw are still there,
# and compiles anew until it gives up.
_HOOKS: WeakKeyDictionary[nn.Module, list[_Hook]] = WeakKeyDictionary()


@contextmanager
def _hook_of(
    module: nn.Module, function: Callable[..., Any], failed: Failed | None
) -> Generator[_Hook, None, None]:
    """Lend a module's first hook that nobody has."""
    known = _HOOKS.setdefault(module, [])
    hook = next((each for each in known if each.function is None), None)
    if hook is None:
        known.append(hook := _Hook())
    hook.thread, hook.failed, hook.function = threading.get_ident(), failed, function
    try:
        yield hook
    finally:
        hook.function = hook.failed = None


def _keep_place(hook: _Hook, handle: RemovableHandle, *places: dict[int, Any]) -> None:
    """Hang a hook where it hung before, by its number, which the compiler asks for as well."""
    number = handle.id if hook.number is None else hook.number
    for place in places:
        place[number] = place.pop(handle.id)
    hook.number = handle.id = number


def _is_computed_again() -> bool:
    """Check whether a backward pass runs modules, as checkpoints do whose activations were not kept."""
    return torch._C._current_graph_task_id() != -1


def _is_elsewhere(thread: int) -> bool:
    """Check whether what runs now is none of the calls that a thread listens to."""
    return threading.get_ident() != thread or _is_computed_again()


def seconds_in_hooks() -> float:
    """Return the time that hooks, and following data between them, took in this process so far."""
    return _Hook.seconds + seconds_following()


def attach(
    module: nn.Module,
    *,
    before: Callable[[nn.Module, Any, Any], Any] | None = None,
    after: Callable[[nn.Module, Any, Any, Any], Any] | None = None,
    first: bool = False,
    direct: set[int] | None = None,
    failed: Failed | None = None,
    unseen: Collection[int] = (),
    compiles: bool = False,
) -> ExitStack:
    """Hang hooks on a module, before all others if ``first``, until the stack returned is closed.

    With ``direct``, they also see calls of ``module.forward`` itself, which fires no hook of torch's;
    the set remembers such modules by their ``id``. Nothing that a module can see is hung on those that
    are ``unseen``, by their ``id``. Where functions that went through ``torch.compile`` may call the
    module (``compiles``), those calls of ``forward`` are not seen. An error in them ends the pass, but
    where somebody hears that they ``failed``.
    """
    forward = vars(module).get("forward")
    own = module._compiled_call_impl is None and (forward is None or is_wrapped(forward))
    if own and id(module) in unseen and not (module._forward_hooks or module._forward_pre_hooks):
        return wrap(module, "forward", functools.partial(_around_forward, module, before, after), failed)
    # Scripted modules refuse hooks, but run those they have where code that is not scripted calls them.
    taker: Any = super(ScriptModule, module) if isinstance(module, ScriptModule) else module
    with ExitStack() as hooks:
        if before is not None:
            hook = hooks.enter_context(_hook_of(module, before, failed))
            handle = taker.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
            hooks.callback(handle.remove)
            _keep_place(hook, handle, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
            if first:
                vars(module)["_forward_pre_hooks"].move_to_end(handle.id, last=False)
        if after is not None:
            hook = hooks.enter_context(_hook_of(module, after, failed))
            handle = taker.register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
            _keep_place(hook, handle, module._forward_hooks, module._forward_hooks_with_kwargs)
        # The compiler looks at what a module has as its ``forward``, and would compile anew each time.
        if direct is not None and own and taker is module and not compiles:
            hooks.enter_context(_watch_direct_calls(module, before, after, direct, failed))
        kept = hooks.pop_all()
    return kept


def _around_forward(
    module: nn.Module,
    before: Callable[..., Any] | None,
    after: Callable[..., Any] | None,
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """Call what would be hooks."""
    if before is not None and (given := _timed(before, module, args, kwargs)) is not None:
        args, kwargs = given
    output = forward(*args, **kwargs)
    changed = None if after is None else _timed(after, module, args, kwargs, output)
    return output if changed is None else changed


def attach_in(model: nn.Module, failed: Failed | None = None) -> functools.partial[ExitStack]:
    """Return :func:`attach` for the modules of a model, of which some compute otherwise under hooks."""
    # The fast path of torch's encoder layers, in bfloat16 for one, gives other values than the slow one.
    layers = (module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer))
    unseen = frozenset(id(part) for layer in layers for part in layer.modules())
    compiles = has_compiled_functions(model)
    return functools.partial(attach, failed=failed, unseen=unseen, compiles=compiles)


def _watch_direct_calls(
    module: nn.Module,
    before: Callable[..., Any] | None,
    after: Callable[..., Any] | None,
    seen: set[int],
    failed: Failed | None,
) -> ExitStack:
    """Call hooks around a module's ``forward`` where it is not the module itself that calls it."""
    hooked: list[None] = []

    def begin(*_: Any) -> None:
        hooked.append(None)

    def around(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if hooked:
            hooked.pop()
            return forward(*args, **kwargs)
        seen.add(id(module))
        return _around_forward(module, before, after, forward, args, kwargs)

    with wrap(module, "forward", around, failed) as hooks:
        hooks.enter_context(attach(module, before=begin, failed=failed))
        kept = hooks.pop_all()
    return kept


class _Around:
    """Stands in for a module's ``forward`` while somebody listens; a copy is the copy's own."""

    def __init__(self) -> None:
        self.listeners: list[tuple[Callable[..., Any], Failed | None]] = []
        self.module: Any = None

    def enter(self, module: nn.Module, name: str) -> None:
        """Take the place of what a module calls by a name."""
        self.module, self.name = module, name
        self.held, self.thread = ref(module), threading.get_ident()
        self.own = name in vars(module)
        self.inner = self.__wrapped__ = getattr(module, name)
        vars(module)[name] = self

    def leave(self) -> None:
        """Give the place back, and let go of the module."""
        values, self.module = vars(self.module), None
        if values.get(self.name) is self:
            if self.own:
                values[self.name] = self.inner
            else:
                del values[self.name]
        del self.inner, self.__wrapped__

    def __getattr__(self, name: str) -> Any:
        # Other people's code looks at what it calls, as at its signature.
        return getattr(self.__dict__["inner"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if self.own:
                return self.inner(*args, **kwargs)
            # A method that was bound anew would be compiled anew.
            return getattr(type(self.module), self.name)(self.module, *args, **kwargs)
        called = vars(self).get("inner")
        if called is None:
            # The place was given back while another thread was about to call this.
            return getattr(self.held(), self.name)(*args, **kwargs)
        for listener, failed in () if _is_elsewhere(self.thread) else self.listeners:
            called = functools.partial(stand_by, listener, called, failed)
        return called(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, self.name)


# The same stands in each time, or what calls the module is compiled anew until the compiler gives up.
_STAND_INS: WeakKeyDictionary[nn.Module, dict[str, _Around]] = WeakKeyDictionary()


def is_wrapped(called: Any) -> bool:
    """Check whether somebody listens to what a module calls."""
    return isinstance(called, _Around)


def wrap(
    module: nn.Module, name: str, listener: Callable[..., Any], failed: Failed | None = None
) -> ExitStack:
    """Let a listener call what a module calls by ``name``, until the stack that comes back is closed.

    It is called with what it stands in for, the arguments and the keyword arguments. Several may listen
    and leave in any order. An error of its own ends the call, but where somebody hears that it
    ``failed``.
    """
    values = vars(module)
    if not isinstance(values.get(name), _Around):
        stand_in = _STAND_INS.setdefault(module, {}).setdefault(name, _Around())
        # It may listen still, if somebody took its place.
        (_Around() if stand_in.listeners else stand_in).enter(module, name)
    around: _Around = values[name]
    listens = listener, failed

    def leave() -> None:
        if listens in around.listeners:
            around.listeners.remove(listens)
        if not around.listeners:
            around.leave()

    with ExitStack() as hooks:
        hooks.callback(leave)
        around.listeners.append(listens)
        kept = hooks.pop_all()
    return kept


_Began = TypeVar("_Began")


def ended(under_way: list[tuple[nn.Module, _Began]], module: nn.Module) -> _Began | None:
    """Forget the latest call of a module, and return what was kept when it began, if that was seen."""
    # Calls that ended in an error, which code around them caught, never came here.
    while under_way:
        began, kept = under_way.pop()
        if began is module:
            return kept
    return None
