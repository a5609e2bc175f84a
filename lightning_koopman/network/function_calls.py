"""Finds what functions take in each pass, where the first pass showed it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_koopman.network.watch import Watcher, flat, kept_out_of_the_pass

# These make room or copies, which passes differ in as samples lie otherwise in memory, and nothing new.
_SAME_VALUES = frozenset({
    *("clone", "_to_copy", "copy_", "contiguous", "lift_fresh", "_unsafe_view", "_reshape_alias"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
})

_Place = tuple[Any, int, str, int]
"""A call of an operator: the call of a module that ended last, what was computed since, the operator's
name, and how often it was called since then."""


class FunctionCalls(Watcher):
    """Tells the operators of one pass apart by what ran before them, and finds them again in later ones.

    No operator is found where something else was computed before it since the last module ended than
    in the first pass.

    Args:
        on_found: Called with what was noted of an operator, and the tensors that it takes by then.

    Attributes:
        behind: The call of a module that ended last, if one did.
        is_ours: Whether what runs now is none of the network's operators.
    """

    def __init__(self, on_found: Callable[[Any, list[Tensor]], None]) -> None:
        super().__init__()
        self._on_found = on_found
        self._noted: dict[_Place, list[Any]] = {}
        self.is_ours = False
        self.begin(None)

    def __bool__(self) -> bool:
        """Whether there is anything to find."""
        return bool(self._noted)

    def begin(self, call: Any) -> None:
        """Note that a call of a module ended, or with ``None``, that a call of the network begins."""
        self.behind, self._computed = call, 0
        self._counts: Counter[str] = Counter()

    def note(self, what: Any) -> None:
        """Remember the operator that is about to run."""
        self._noted.setdefault(self._place, []).append(what)

    def forget(self, which: Callable[[Any], bool]) -> None:
        """Forget what was noted, where it is so."""
        left = {
            place: [what for what in noted if not which(what)] for place, noted in self._noted.items()
        }
        self._noted = {place: noted for place, noted in left.items() if noted}

    @kept_out_of_the_pass()
    def precede(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        """Tell the operator that is about to run from others, and show what it takes if it was noted."""
        if self.is_ours:
            return
        name, is_new = _kind(func)
        if is_new:
            self._computed = hash((self._computed, name))
            self._counts.clear()
        self._counts[name] += 1
        self._place = self.behind, self._computed, name, self._counts[name]
        for what in self._noted.get(self._place, ()):
            self._on_found(what, list(flat((*args, *kwargs.values()))))


@functools.lru_cache(maxsize=4096)
def _kind(func: Any) -> tuple[str, bool]:
    """Return an operator's name, and whether it computes anything."""
    name = func._schema.name.rpartition("::")[2]
    return name, not (func.is_view or name in _SAME_VALUES)
