"""Stands by calls that are not ours: they are made once, and end as if nobody stood by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_koopman.network.access.signals import came_from_signal

Failed = Callable[[Exception], object]
"""Takes an error of ours that must not reach the call which it happened beside."""


class Call:
    """A call of somebody else's, which whoever stands by makes.

    Attributes:
        called: What is called.
        began: Whether it was called.
        gave: What it gave, alone in a tuple, once it ended.
    """

    __slots__ = ("began", "called", "gave")

    def __init__(self, called: Callable[..., Any]) -> None:
        self.called, self.began = called, False
        self.gave: tuple[Any, ...] = ()

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Make the call, and remember what it gave."""
        self.began = True
        self.gave = (self.called(*args, **kwargs),)
        return self.gave[0]


def stand_by(
    listener: Callable[..., Any],
    called: Callable[..., Any],
    failed: Failed | None,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Let a listener make a call, and make it without one that ``failed`` hears about.

    Errors of the call itself are the caller's, and so is what a signal raises beside it. Where nobody
    hears about it, the listener's errors fly, too.

    Example:
        >>> def broken(call, args, kwargs):
        ...     return call(*args, **kwargs) + 1 / 0
        >>> stand_by(broken, abs, print, -2)
        division by zero
        2
    """
    call = Call(called)
    try:
        return listener(call, args, kwargs)
    except Exception as error:
        if failed is None or (call.began and not call.gave) or came_from_signal(error):
            raise
        failed(error)
    return call.gave[0] if call.gave else called(*args, **kwargs)
