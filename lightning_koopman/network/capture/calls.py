"""The pass that is under way, and the calls of modules, and of the whole network, in it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import nn

from lightning_koopman.network.access.hooks import ended
from lightning_koopman.network.capture.kept_states import KeptStates
from lightning_koopman.network.flow.returned import Returned


class Pass:
    """Tells which pass is under way, whether it still counts, and which calls modules made in it.

    Attributes:
        is_first: Whether no pass was recorded yet; the first one shows how the network hangs together.
        closed: Whether nothing of it is recorded any longer.
        error: What went wrong in a hook of it.
        running: The components, by id, whose calls are under way.
        ran: The modules, by id, of which a call ended.
    """

    def __init__(self) -> None:
        self.is_first, self.running = True, set[int]()
        self.start()

    def start(self) -> None:
        """Begin a new pass."""
        self.closed = False
        self.error: Exception | None = None
        self.running.clear()
        self.start_call()

    def start_call(self, *, again: bool = False) -> None:
        """Count the calls of modules anew; what ran before did so, where the network is called again."""
        if not again:
            self.ran: set[int] = set()
        self._calls: dict[int, int] = {}

    def fail(self, error: Exception) -> None:
        """Keep an error of a hook, for it may not end the user's own pass."""
        self.error, self.closed = error, True

    def key(self, module: nn.Module) -> tuple[int, int]:
        """Return the module's id, and the number of its call that runs or is the next one."""
        return id(module), self._calls.get(id(module), 0)

    def count(self, module: nn.Module) -> tuple[int, int]:
        """Return the key of the module's call that ends."""
        key = self.key(module)
        self._calls[id(module)] = key[1] + 1
        self.ran.add(id(module))
        return key


class Calls:
    """Tells where a call of the network begins and ends.

    That is a call of the components' common ancestor, but what it returned is what the outermost module
    around it gave that was called, if that called it once and returned what was followed. Where a module
    runs the ancestor's parts or methods in its place, it is a call of that.

    Args:
        current: The pass.
        kept: The states of the call.
        returned: What the network returned in the first pass.
        begins: Called with the module and arguments of a call, and whether it is the first one.
        ends: Called with a module, the arguments of the call, and what the module gave.

    Attributes:
        given: What the ancestor, or else the network, was called with, by name.
        call: The arguments of the call of the network.
    """

    def __init__(
        self,
        current: Pass,
        kept: KeptStates,
        returned: Returned,
        begins: Callable[[nn.Module, Any, bool], None],
        ends: Callable[[nn.Module, Any, Any], None],
    ) -> None:
        self._pass, self._kept, self._returned = current, kept, returned
        self._begins, self._ends = begins, ends
        # Whether what counts is returned by a module around the ancestor, and by which that runs its
        # parts or methods in its place.
        self._is_around = False
        self._in_its_place: nn.Module | None = None
        self.start_pass()

    def start_pass(self) -> None:
        """Forget the calls of the pass before."""
        self._nested, self._called = 0, False
        self.call: Any = ()
        self.given: dict[str, Any] = {}
        self._outer: dict[str, Any] = {}
        # What modules around the ancestor, whose calls run, were called with, and what it gave in them.
        self._around: list[tuple[nn.Module, Any]] = []
        self._inner: tuple[nn.Module, Any] | None = None

    @property
    def is_behind(self) -> bool:
        """Whether the ancestor has returned."""
        return self._called and not self._nested

    @property
    def is_over(self) -> bool:
        """Whether all around the ancestor has returned as well."""
        return self.is_behind and not self._around

    def on_ancestor(self, module: nn.Module, given: Any) -> None:
        """See the ancestor called, perhaps a further time in the same pass."""
        self._nested += 1
        if self._nested == 1:
            self._begin(module, given)

    def _begin(self, module: nn.Module, given: Any) -> None:
        self.settle()
        self._begins(module, given, not self._called)
        self._called, self.call = True, given
        self.given = _with_arguments(self._outer, module, *given)

    def on_around(self, module: nn.Module, given: Any) -> None:
        """See a module around the ancestor called."""
        if module is self._in_its_place:
            # What ran before its first call counts with it, as it did before this was known.
            if self._called:
                self._begin(module, given)
            self._called, self.call = True, given
        self._around.append((module, given))
        self.given = self._outer = _with_arguments(self._outer, module, *given)

    def on_returned(self, module: nn.Module, given: Any, output: Any) -> None:
        """See the ancestor return."""
        self._nested -= 1
        if self._nested:
            return
        if self._around and self._pass.is_first and not self._returned.made_of:
            # What is around it may go on with what it gave, or call it again.
            self._inner = module, output
        elif not self._is_around:
            self._ends(module, self.call, output)

    def on_around_returned(self, module: nn.Module, given: Any, output: Any) -> None:
        """See a module around the ancestor return."""
        call = ended(self._around, module)
        if self._around or call is None:
            return
        not_called = self._pass.is_first and not self._called
        if self._inner is not None or not_called:
            self._is_around = self._returned.is_of_states(output)
            if self._is_around:
                self._inner = None
            self.settle()
        if not_called and self._kept.states:
            self._in_its_place, self._called = module, True
        if self._is_around:
            self._ends(module, call, output)

    def settle(self) -> None:
        """Let what the ancestor gave stand for what the network gives."""
        if self._inner is not None:
            (module, output), self._inner = self._inner, None
            self._ends(module, self.call, output)


def _with_arguments(outer: dict[str, Any], module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Put what a module is called with, which is about its own data, before what is known around it."""
    own = dict(kwargs)
    # Of the class, for somebody may listen to the instance's own; not every one says what it takes.
    with suppress(TypeError, ValueError):
        bound = _signature(type(module).forward).bind_partial(module, *args, **kwargs)
        own = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    return own | {name: value for name, value in outer.items() if name not in own}


_signature = functools.lru_cache(maxsize=64)(inspect.signature)
