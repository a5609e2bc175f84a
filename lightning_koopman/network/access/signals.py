"""What signals call: it waits while weights are not the user's, and what it raises is never ours."""

from __future__ import annotations

import functools
import signal
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from types import FrameType, SimpleNamespace
from typing import Any

# Not those that come often, as of profilers, nor by which loaders learn that a worker died.
_NAMES = ("ALRM", "HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "XCPU")
_SIGNALS = tuple(getattr(signal, f"SIG{name}") for name in _NAMES if hasattr(signal, f"SIG{name}"))


@contextmanager
def signals_wait(*, now: bool = True) -> Generator[SimpleNamespace, None, None]:
    """Let what signals call run behind the body: it may save the model, or end what puts it back.

    Unless ``now``, they wait from when the body sets ``now`` of what it is given, which no signal can
    come before if it is the first thing that a clean-up does. A signal that comes a second time is not
    kept waiting. Python's first thread alone calls anything for signals, so in others nothing waits.
    """
    state = SimpleNamespace(now=now)
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    own, waiting = _handlers(), dict[int, FrameType | None]()

    def wait(number: int, frame: FrameType | None) -> None:
        if not state.now or number in waiting:
            waiting.pop(number, None)
            own[number](number, frame)
        else:
            waiting[number] = frame

    try:
        for number in own:
            signal.signal(number, wait)
        yield state
    finally:
        state.now = False
        for number, handler in own.items():
            if signal.getsignal(number) is wait:
                signal.signal(number, handler)
        # Each is called, whichever raises.
        with ExitStack() as calls:
            for number, frame in reversed(waiting.items()):
                calls.callback(own[number], number, frame)


def came_from_signal(error: BaseException) -> bool:
    """Check whether something raised an error that a signal calls: it only happened to meet us."""
    codes = {_code_of(handler) for handler in _handlers().values()} - {None}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def _handlers() -> dict[int, Callable[[int, FrameType | None], Any]]:
    """Find what Python calls for signals."""
    return {number: each for number in _SIGNALS if callable(each := signal.getsignal(number))}


def _code_of(handler: Any) -> Any:
    """Find what an error's traceback shows of a function, a method, or an object that is called."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    for held in (handler, type(handler).__call__):
        if (code := getattr(held, "__code__", None)) is not None:
            return code
    return None
