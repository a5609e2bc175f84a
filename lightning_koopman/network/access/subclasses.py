"""Lets classes derived from ``Tensor`` make their objects while a dispatch mode is on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class MadeUnwatched:
    """Has objects of derived classes made as if no dispatch mode were on, while anybody asks for it.

    What ``Tensor.__new__`` makes of a tensor comes back from a mode as an object of its own already, and
    torch refuses to make it one of a derived class: the user's own code would end in that error. Memory
    is shared all the same, by which data are followed. Patched are the derived classes alone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._askers: set[int] = set()
        self._undo: dict[type, Callable[[], None]] = {}

    def begin(self, asker: object) -> None:
        """Let one ask for it; safe where an interrupt kept it from ending."""
        with self._lock:
            self._askers.add(id(asker))
            for kind in [kind for kind in _derived(Tensor) if _makes(kind)]:
                if kind not in self._undo:
                    self._undo[kind] = _patched(kind)

    def end(self, asker: object) -> None:
        """Let it ask no longer."""
        with self._lock:
            self._askers.discard(id(asker))
            while self._undo and not self._askers:
                self._undo.popitem()[1]()


def _derived(kind: type) -> Iterator[type]:
    """Find the classes derived from one that are not torch's own."""
    derived: type
    for derived in type.__subclasses__(kind):
        if derived.__module__.partition(".")[0] != "torch":
            yield derived
        yield from _derived(derived)


def _makes(kind: type) -> bool:
    """Check whether a class makes its objects itself, or has ``Tensor`` make them."""
    maker: Any = kind.__new__
    return "__new__" in vars(kind) or maker is Tensor.__new__


def _patched(kind: Any) -> Callable[[], None]:
    """Put a function in the place of a class's ``__new__``, and return what takes it out again."""
    own, inner = vars(kind).get("__new__"), kind.__new__

    @functools.wraps(inner)
    def made(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return inner(*args, **kwargs)

    def undo() -> None:
        if own is None:
            del kind.__new__
        else:
            kind.__new__ = own

    kind.__new__ = staticmethod(made)
    return undo
