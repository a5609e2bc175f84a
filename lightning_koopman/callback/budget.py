"""How much of a training's time watching it takes, and when it is measured next."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from lightning_koopman.network.arguments import NUMBER, check_type

ALLOWANCE = 1.5
"""Seconds that watching a training may take, however short the training is."""

_PLANNED = 0.6
"""Part of the share that is planned to be spent. Measurements take now more, now less; what Lightning
takes to call a callback, and what measurements do to the epoch behind them (caches, memory that must be
fetched again), is not counted."""

_BEFORE = {"draw": 0.05, "effects": 0.15}
"""Parts of the share that may go, before the end, to what is done at the end in any case."""

_LAST = 1.3
"""How much longer the last measurement takes than those before, for its errors; 1.1 to 1.3 times."""

_ONCE = 0.4
"""Seconds that imports add to a measurement, or a collection of garbage where much is imported."""

NEVER = 2**62
"""A step that no training reaches."""


class Budget:
    """Counts the seconds that watching a training takes, and plans its measurements in even distances.

    All of watching may take a share of the time that the training takes without it, or ``ALLOWANCE`` if
    that is more. The first and the last measurement are always taken. What the last one will take, with
    all that is done at the end in any case (figures, effects), is kept back; the rest pays for the
    measurements in between. Of the share, never of the allowance, a part each may go to figures and
    effects before the end.

    Attributes:
        share: What is planned to be spent, six tenths of the share that may be.
        clock: Gives the time in seconds.
        due: Step from which on the next measurement is due.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.perf_counter) -> None:
        check_type(NUMBER, max_overhead=share)
        if not 0 <= share < math.inf:
            raise ValueError(
                f"max_overhead is {share!r}; give a share of the training's time, such as 0.05"
            )
        self.share, self.clock = _PLANNED * share, clock
        self.start(0)

    def start(self, step: int) -> None:
        """Begin with a training, at its first step."""
        self._began, self._first = self.clock(), step
        self._spent = self._planned = self._apart = 0.0
        self._entered: float | None = None
        self._took: dict[str, float] = {}
        self._spent_on: dict[str, float] = {}
        self._costs: list[float] = []
        self._cost, self.due = 0.0, 0
        self._whole = math.inf

    @property
    def spent(self) -> float:
        """Seconds spent on watching so far."""
        return self._spent + (0.0 if self._entered is None else self.clock() - self._entered)

    @property
    def trained(self) -> float:
        """Seconds that the training took so far without watching."""
        return self.clock() - self._began - self.spent

    @property
    def overhead(self) -> float:
        """Share of the training's time that watching took so far."""
        return self.spent / max(self.trained, 1e-9)

    @contextmanager
    def watching(self) -> Generator[None, None, None]:
        """Count the seconds spent inside."""
        if self._entered is not None:
            yield
            return
        self._entered = self.clock()
        try:
            yield
        finally:
            self._spent, self._entered = self.spent, None

    def add(self, seconds: float) -> None:
        """Count seconds of ours that were spent while the user's own code ran."""
        self._spent += seconds

    @contextmanager
    def apart(self, kind: str) -> Generator[None, None, None]:
        """Learn what something takes that is not done at every measurement."""
        start = self.clock()
        try:
            yield
        finally:
            took = self._took[kind] = self.clock() - start
            self._spent_on[kind] = self._spent_on.get(kind, 0.0) + took
            self._apart += took

    def expect(self, kind: str, seconds: float) -> None:
        """Say what something will take at the end."""
        self._took[kind] = seconds

    def left(self, kind: str) -> float:
        """Return the seconds that something done at the end may take, the rest of the end left aside."""
        rest = sum(seconds for name, seconds in self._took.items() if name != kind)
        return max(ALLOWANCE, self.share * self.trained) - self.spent - rest

    def allowed(self, step: int, last: int | None) -> float:
        """Return the seconds that all of watching may take, until the end where that is known."""
        ahead = 0.0 if last is None else max(0, last - step) / max(1, step - self._first)
        return max(ALLOWANCE, self.share * self.trained * (1 + ahead))

    def room(self, kind: str) -> float:
        """Return the seconds that something which is done at the end in any case may take now too."""
        part = _BEFORE[kind] * self.share * self.trained - self._spent_on.get(kind, 0.0)
        return min(part, self._whole - self.spent - self._kept_back)

    def has_room(self, kind: str) -> bool:
        """Check whether something that is done at the end in any case may be done now too."""
        return self._took.get(kind, 0.0) <= self.room(kind)

    def plan(self, step: int, last: int | None) -> None:
        """Find when the next measurement is due, at the end of one; the ``last`` step may be unknown."""
        self._costs.append(max(self.spent - self._planned - self._apart, 1e-9))
        self._planned, self._apart = self.spent, 0.0
        first, *later = self._costs
        # Where the end is known, the second measurement soon tells more.
        once = first if last is None else max(first - _ONCE, first / 4)
        self._cost = statistics.median_low([once, *later])
        per_step = self.trained / max(1, step - self._first)
        if last is None:
            self.due = step + self._wait(per_step)
            return
        wait = self._even(max(0, last - step), per_step)
        # Measured is where an epoch ends, later than when it was due; the next need not be late as well.
        late = max(0, step - self.due) if len(later) > 1 else 0
        self.due = step + max(1, wait - late)

    @property
    def _kept_back(self) -> float:
        """Seconds that the end will take."""
        return _LAST * self._cost + sum(self._took.values())

    @property
    def _before_end(self) -> float:
        """Part of the share that figures and effects may take before the end."""
        return sum(_BEFORE[kind] for kind in self._took)

    def _even(self, rest: int, per_step: float) -> int:
        """Spread what can be paid over the steps that are left."""
        length = self.trained + rest * per_step
        self._whole = max(ALLOWANCE, self.share * length)
        others = self._before_end * self.share * rest * per_step
        known = len(self._costs) > 1
        # The first measurement pays for imports and caches, so the second tells what one takes. It may
        # use what else is not planned.
        whole = self._whole if known else max(ALLOWANCE, self.share / _PLANNED * length)
        # What is planned leaves room for three tenths of one; without it, rounding would open gaps.
        count = int((whole - self.spent - self._kept_back - others) / self._cost + 0.3)
        if count < 1:
            return NEVER
        return max(1, math.ceil(rest / (count + 1))) if known else 1

    def _wait(self, per_step: float) -> int:
        """Wait until the next one can be paid, where nobody knows how long the training goes on."""
        share = self.share * (1 - self._before_end)
        gained = share * per_step
        others = sum(self._spent_on.values())
        missing = self.spent - others + self._cost + self._kept_back - share * self.trained
        return max(1, math.ceil(missing / gained)) if gained > 0 else NEVER
