"""Shows what torch runs in a thread to all that watch there, one operator after the other."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
    _pop_mode_temporarily,
)

from lightning_koopman.network.access.bystander import Call, stand_by
from lightning_koopman.network.access.isolation import may_compile
from lightning_koopman.network.access.signals import came_from_signal
from lightning_koopman.network.access.subclasses import MadeUnwatched
from lightning_koopman.network.operators import Operator, operator_of
from lightning_koopman.network.tensors import has_places

_Method = TypeVar("_Method", bound=Callable[..., Any])
_Watcher = TypeVar("_Watcher", bound="Watcher")


class Watcher:
    """What is shown the operators that run in one thread, as long as it is entered.

    Several may be entered at a time, and left in any order.

    Attributes:
        error: What went wrong in the bookkeeping, which must not reach the pass.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self: _Watcher) -> _Watcher:
        try:
            _WATCH.add(self)
        except BaseException:  # Ctrl-C may come at any place
            _WATCH.remove(self)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            _WATCH.remove(self)
        except BaseException:
            _WATCH.remove(self)
            raise

    def precede(self, op: Operator, args: tuple[Any, ...], kwargs: Any) -> None:
        """See an operator that is about to run."""

    def follow(self, op: Operator, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        """See what an operator read and gave."""

    def follow_functions(self, given: Any, out: Any) -> None:
        """See what an operator that takes functions read and gave, after what ran in these."""


def kept_out_of_the_pass(otherwise: Any = None) -> Callable[[_Method], _Method]:
    """Keep a method's error as that of the watcher: the user's own pass may not end because of ours.

    What is returned then, and from then on, is ``otherwise``.
    """

    def decorate(method: _Method) -> _Method:
        @functools.wraps(method)
        def safe(self: Watcher, *args: Any, **kwargs: Any) -> Any:
            if self.error is None:
                try:
                    return method(self, *args, **kwargs)
                except Exception as error:
                    if came_from_signal(error):
                        raise
                    self.error = error
            return otherwise

        return cast(_Method, safe)

    return decorate


def flat(values: Iterable[Any]) -> Iterator[Tensor]:
    """Go through the tensors that an operator takes or gives, in lists of them, too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from flat(value)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows what runs in one thread to every watcher entered there.

    Dispatch modes must be left in the reverse order of being entered, which two monitors of one training
    do not do. So there is one mode for all, entered with the first watcher and left with the last.

    Attributes:
        seconds: Time that following took so far, in all threads of the process.
    """

    seconds = 0.0
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watchers: list[Watcher] = []
        # What is cast around the operators that one of them is shown as.
        self._casts: frozenset[str] | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # Otherwise functions of the user's that went through the compiler run without it.
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # This would import all of the compiler, which takes seconds.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return stand_by(self._watched, func, self._failed, *args, **(kwargs or {}))

    def _failed(self, error: Exception) -> None:
        """Let the pass go on without being followed."""
        for watcher in self.watchers:
            watcher.error = watcher.error or error

    def _watched(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator, and show what it did."""
        func: Any = call.called
        if isinstance(func, HigherOrderOperator):
            return self._with_functions(call, args, kwargs)
        if _shows_others(func, args):
            return self._one_by_one(call, args, kwargs)
        start, op = time.perf_counter(), operator_of(func)
        for watcher in self.watchers:
            watcher.precede(op, args, kwargs)
        _Watch.seconds += time.perf_counter() - start
        run = _run_casting if op.name in _CASTS_INSIDE else Call.__call__
        out = run(call, *args, **kwargs)
        start = time.perf_counter()
        for watcher in self.watchers:
            watcher.follow(op, args, kwargs, out)
        _Watch.seconds += time.perf_counter() - start
        return out

    def _with_functions(self, call: Call, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run an operator that takes functions, and see what runs in these; the rest is not shown."""

        def watched(function: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return function(*args, **kwargs)

            return run

        out = call(*(watched(arg) if callable(arg) else arg for arg in args), **kwargs)
        for watcher in self.watchers:
            watcher.follow_functions((*args, *kwargs.values()), out)
        return out

    def _one_by_one(self, call: Call, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run an operator that is nothing but others, and see these."""
        func: Any = call.called
        call.called = functools.partial(func._op_dk, _MADE_OF_OTHERS)
        outer, casts = self._casts, _casts_now() if self._casts is None else self._casts
        # What autocast knows has its arguments cast by now, and runs without it.
        has_kernel, name = torch._C._dispatch_has_kernel_for_dispatch_key, func.name()
        self._casts = frozenset(kind for kind in casts if not has_kernel(name, _AUTOCASTS[kind]))
        try:
            with _casting(self._casts), self:
                return call(*args, **kwargs)
        finally:
            self._casts = outer


_CASTS_INSIDE = frozenset({
    "_transformer_encoder_layer_fwd",
    "_native_multi_head_attention",
    "_trilinear",
})
"""Operators that run others, whose arguments autocast casts."""

_AUTOCASTS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
_MADE_OF_OTHERS = torch._C.DispatchKey.CompositeImplicitAutograd


def _casts_now() -> frozenset[str]:
    """Find the kinds of device whose products were cast where torch came to a dispatch mode."""
    with torch.overrides.enable_reentrant_dispatch():
        return frozenset(kind for kind in _AUTOCASTS if torch.is_autocast_enabled(kind))


@contextmanager
def _casting(kinds: Iterable[str]) -> Generator[None, None, None]:
    """Turn autocast on again, which is off below a dispatch mode."""
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(_AUTOCASTS[kind], False))
        yield


def _run_casting(call: Call, /, *args: Any, **kwargs: Any) -> Any:
    """Run an operator that runs others as it runs where nobody watches."""
    # On other devices these are not used with autocast.
    with _casting(_casts_now() & {"cpu"}):
        return call(*args, **kwargs)


def _shows_others(func: Any, args: tuple[Any, ...]) -> bool:
    """Check whether an operator is nothing but others, which inference mode does not show one by one."""
    if not _is_made_of_others(func):
        return False
    given = list(flat(args))
    has_kernel, kinds = torch._C._dispatch_has_kernel_for_dispatch_key, {t.device.type for t in given}
    keys = map(torch._C._dispatch_key_for_device, kinds)
    return all(map(has_places, given)) and not any(has_kernel(func.name(), key) for key in keys)


@functools.lru_cache(maxsize=1024)
def _is_made_of_others(func: Any) -> bool:
    """Check whether torch has an operator as others alone, for devices without a kernel of its own."""
    name = func.name()
    # Some operators are known to no dispatcher, as those that ask a tensor of a subclass for its device.
    known = torch._C._dispatch_has_kernel(name)
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(name, _MADE_OF_OTHERS)


def _register_higher_order() -> None:
    """Let operators that take functions run below a watch, where torch asks each of them for this."""
    for operator in list(torch._ops._higher_order_ops.values()):

        def run(watch: _Watch, *args: Any, operator: Any = operator, **kwargs: Any) -> Any:
            return watch.__torch_dispatch__(operator, (), args, kwargs)

        operator.python_key_table.setdefault(_Watch, run)


class _WatchOfThread(threading.local):
    """The watch of each thread: torch keeps a stack of modes for each, too."""

    def __init__(self) -> None:
        self.watch = _Watch()

    @property
    def _entered(self) -> bool:
        """Whether torch shows what runs to the watch: what an interrupt left undone shows here alone."""
        return any(mode is self.watch for mode in _get_current_dispatch_mode_stack())

    def add(self, watcher: Watcher) -> None:
        if may_compile() and not hasattr(_Watch.__torch_dispatch__, "_torchdynamo_disable"):
            # Or the compiler goes on in the bookkeeping from functions of the user's that it compiled.
            _Watch.__torch_dispatch__ = torch.compiler.disable(_Watch.__torch_dispatch__)  # type: ignore
        if not self.watch.watchers and not self._entered:
            if not hasattr(TorchDispatchMode, "supports_higher_order_operators"):
                _register_higher_order()
            _SUBCLASSES.begin(self.watch)
            self.watch.__enter__()  # type: ignore[no-untyped-call]
        self.watch.watchers.append(watcher)

    def remove(self, watcher: Watcher) -> None:
        """Let go of a watcher; safe where an interrupt kept it from being added."""
        self.watch.watchers = [other for other in self.watch.watchers if other is not watcher]
        if not self.watch.watchers and self._entered:
            self.watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            _SUBCLASSES.end(self.watch)


_SUBCLASSES = MadeUnwatched()
_WATCH = _WatchOfThread()


def unseen() -> AbstractContextManager[Any]:
    """Show nobody what runs meanwhile, for nobody asks what our own copies were made of."""
    is_ours = _get_current_dispatch_mode() is _WATCH.watch
    return _pop_mode_temporarily() if is_ours else nullcontext()


def seconds_following() -> float:
    """Return the time that following data took in this process so far."""
    return _Watch.seconds
