"""Finds the operators and modules that take something in each pass, where the first pass showed it."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable
from typing import Any

from torch import Tensor

from lightning_koopman.network.watch import Watcher, flat, kept_out_of_the_pass

# These make room or copies, which passes differ in as samples lie otherwise in memory, and nothing new.
_SAME_VALUES = frozenset({
    *("clone", "_to_copy", "copy_", "contiguous", "lift_fresh", "_unsafe_view", "_reshape_alias"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
})


class Takers(Watcher):
    """Tells the calls of one pass apart by what ran before them, and finds them again in later passes.

    A call is known by the component whose call ended last, and how often it was made since then; that of
    an operator also by what was computed since then, so that none is found where something else was.
    Where another component ended last, as of experts that samples are sent to in turns, it is the one of
    its name that comes as late in the pass.

    Args:
        on_found: Called with what was noted of an operator, and the tensors that it takes by then.
        running: Components that run, of which operators are not looked at.

    Attributes:
        is_ours: Whether what runs now is none of the network's operators.
    """

    def __init__(
        self, on_found: Callable[[Any, list[Tensor]], None], running: Collection[int] = ()
    ) -> None:
        super().__init__()
        self._on_found, self._running = on_found, running
        self._noted: dict[Hashable, list[Any]] = defaultdict(list)
        self._noted_late: dict[tuple[Hashable, int], list[tuple[Any, Any]]] = defaultdict(list)
        # The names of all that was noted.
        self.names: set[Hashable] = set()
        self.is_ours = False
        self.begin(None)

    @property
    def watches(self) -> bool:
        """Whether there are operators to find."""
        return any(isinstance(name, str) for name in self.names)

    def begin(self, call: Any) -> None:
        """Note that a call of a component ended, or with ``None``, that a call of the network begins."""
        self._behind, self._computed = call, 0
        if call is None:
            self._counts: Counter[Hashable] = Counter()
            self._found: set[Any] = set()

    def look(self, name: Hashable, computed: int = 0) -> list[Any]:
        """Return what was noted of the call that is about to be made, or began, of something."""
        here = self._behind, computed, name
        self._counts.update((name, here))
        self._here = (*here, self._counts[here]), (name, self._counts[name])
        place, late = self._here
        found = self._noted.get(place, [])
        self._found.update(found)
        known = self._noted_late.get(late, ())
        # Should it come where it was noted, too, that counts.
        return found + [
            what for behind, what in known if behind != self._behind and what not in self._found
        ]

    def note(self, what: Hashable) -> None:
        """Remember something of the call that was looked at last."""
        place, late = self._here
        self._noted[place].append(what)
        self._noted_late[late].append((self._behind, what))
        self.names.add(late[0])

    def forget(self, which: Callable[[Any], bool]) -> None:
        """Forget what was noted, where it is so."""
        self.names.clear()
        for noted in self._noted.values():
            noted[:] = [what for what in noted if not which(what)]
        for (name, _), known in self._noted_late.items():
            known[:] = [(behind, what) for behind, what in known if not which(what)]
            self.names |= {name} if known else set()

    @kept_out_of_the_pass()
    def precede(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        """Tell the operator that is about to run from others, and show what it takes if it was noted."""
        if self.is_ours or self._running:
            return
        name, is_new = _kind(func)
        if is_new:
            self._computed = hash((self._computed, name))
        for what in self.look(name, self._computed):
            self._on_found(what, list(flat((*args, *kwargs.values()))))


@functools.lru_cache(maxsize=4096)
def _kind(func: Any) -> tuple[str, bool]:
    """Return an operator's name, and whether it computes anything."""
    name = func._schema.name.rpartition("::")[2]
    return name, not (func.is_view or name in _SAME_VALUES)
