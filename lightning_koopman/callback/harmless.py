"""A callback for both of Lightning's namespaces, whose errors do not end the training."""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_koopman.callback.budget import Budget
from lightning_koopman.network.access.signals import came_from_signal

_NAMESPACES = ("lightning.pytorch", "pytorch_lightning")

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:

    class _NotImported:
        """Stands for Lightning until it is imported; ``object`` as a base could not be replaced."""

    # Importing the namespace that the user does not use would rebind loggers and warnings of the other.
    Callback = type("Callback", (_NotImported,), {})


def join_namespaces(*, required: bool = False) -> None:
    """Let the Trainer and the LightningCLI of each namespace imported by now know the callback."""
    imported = (getattr(sys.modules.get(name), "Callback", None) for name in _NAMESPACES)
    bases = tuple(base for base in imported if base is not None)
    for name in _NAMESPACES if required else ():
        with suppress(ImportError):
            bases = bases or (importlib.import_module(name).Callback,)
    if required and not bases:
        raise ModuleNotFoundError("the callback needs Lightning: pip install lightning")
    if bases not in ((), Callback.__bases__):
        Callback.__bases__ = bases


def release_memory() -> None:
    """Hand freed memory back to the system where the C library, glibc, keeps it in pieces.

    Large blocks that come and go with each measurement lie between what stays: without it, a process
    grows by some ten MiB in its first measurements.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class HarmlessCallback(Callback):
    """Base of a callback whose hooks are wrapped in :func:`never_in_the_way`.

    Attributes:
        budget: Counts the time that these hooks take.
        sync_pending: Whether the other processes wait for this one at the end of the epoch.
    """

    def __init__(self, on_error: Literal["warn", "raise"], budget: Budget) -> None:
        join_namespaces(required=True)
        super().__init__()
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error is {on_error!r}; choose 'warn' or 'raise'")
        self.on_error = on_error
        self.budget = budget
        self.sync_pending = False
        self._warned: set[str] = set()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In a process that was spawned, nothing but this makes the callback.
        join_namespaces(required=True)
        self.__dict__.update(state)

    def _warn_once(self, message: str, *, kind: str | None = None) -> None:
        if (kind or message) not in self._warned:
            self._warned.add(kind or message)
            rank_zero_warn(message, stacklevel=4)

    def _fail(self, error: Exception) -> None:
        """Take the hooks off and remember an error that the other processes must hear of."""

    def _forget(self) -> None:
        """Give up the measurement under way, hooks first."""


def never_in_the_way(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Turn an error of ours into one warning, unless the user asked for the error itself."""

    @functools.wraps(hook)
    def safe(self: HarmlessCallback, *args: Any, **kwargs: Any) -> Any:
        try:
            with self.budget.watching():
                return hook(self, *args, **kwargs)
        except Exception as error:
            if came_from_signal(error):
                self._forget()
                raise
            if self.sync_pending:
                # The other processes wait for this one at the end of the epoch, and hear of it there.
                self._fail(error)
                return None
            self._forget()
            if self.on_error == "raise":
                raise
            why = str(error).removesuffix(".") or type(error).__name__
            self._warn_once(
                f"Koopman credit skipped: {why}. Training continues; later "
                "measurements are retried (shown once).",
                kind="error",
            )
            return None
        except BaseException:
            self._forget()
            raise

    return safe
