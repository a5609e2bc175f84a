"""Times a network before and after a change, in turns, so that both see the same machine."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from lightning_koopman.decisions.swaps import LinearComponent, swapped
from lightning_koopman.network.runs.forward_runner import ForwardRunner

_SLOWER = 1.02
"""A network counts as slower beyond this ratio, and beyond the error of what was measured."""
_PASSES = (12, 24, 48)
"""After how many passes of both networks it is asked which one is slower; the last answer stands."""
_QUANTILE, _ERRORS = 0.15, 1.8
"""Times are compared where few passes are shorter, for other work only makes passes longer: within so
many standard errors of the quantile."""


@contextmanager
def _on_one_thread() -> Generator[None, None, None]:
    """Compute on one thread: where cores are busy, several wait for each other longer than they work."""
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def least_seconds(runner: ForwardRunner) -> float:
    """Return the least seconds that a pass over the first batch takes, on one thread."""
    with _on_one_thread():
        return min(_seconds(runner) for _ in range(10))


def _seconds(runner: ForwardRunner) -> float:
    start = time.perf_counter()
    runner.run_batch(0)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare_times(
    runner: ForwardRunner, swaps: Sequence[LinearComponent]
) -> tuple[tuple[float, float], bool]:
    """Time both networks in turns, so that both see the same machine; see if the new one is slower."""
    if not swaps:
        seconds = least_seconds(runner)
        return (seconds, seconds), False
    times: list[tuple[float, float]] = []
    with _on_one_thread():
        for count in _PASSES:
            while len(times) < count:
                pair = {}
                # Whichever runs second finds the caches as the first one left them.
                for new in (False, True) if len(times) % 2 == 0 else (True, False):
                    with swapped(runner.model, swaps if new else []):
                        pair[new] = _seconds(runner)
                times.append((pair[False], pair[True]))
            before, after = np.sort(times, axis=0).T
            middle, error = count * _QUANTILE, _ERRORS * math.sqrt(count * _QUANTILE * (1 - _QUANTILE))
            low, high = max(0, math.floor(middle - error)), math.ceil(middle + error)
            slower = after[low] > _SLOWER * before[high]
            if slower or after[high] < _SLOWER * before[low]:
                break
    typical = np.quantile(times, _QUANTILE, axis=0)
    return (float(typical[0]), float(typical[1])), bool(slower)
