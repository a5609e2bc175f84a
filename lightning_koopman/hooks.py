"""Hooks on the user's modules: one mechanism for all, which copies and pickles of a module leave out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

from torch import nn


class _Hook:
    """What is hung on a module; a copy of it, or what is unpickled from it, does nothing.

    A user who copies or saves the model while hooks are on must get the model alone. ``__exit__`` of a
    null context takes any arguments, returns ``None``, and is unpickled without this package.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *given: Any) -> Any:
        return self._function(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def attach(
    module: nn.Module,
    *,
    before: Callable[[nn.Module, Any, Any], Any] | None = None,
    after: Callable[[nn.Module, Any, Any, Any], Any] | None = None,
) -> ExitStack:
    """Hang hooks on a module until the stack that comes back is closed.

    Args:
        module: The module.
        before: Called with the module, its arguments and keyword arguments before each call.
        after: Called with the same and the output behind each call; what it returns replaces the output.

    Returns:
        Takes the hooks off again.
    """
    hooks = ExitStack()
    if before is not None:
        hooks.callback(module.register_forward_pre_hook(_Hook(before), with_kwargs=True).remove)
    if after is not None:
        hooks.callback(module.register_forward_hook(_Hook(after), with_kwargs=True).remove)
    return hooks
