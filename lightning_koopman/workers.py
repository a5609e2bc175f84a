"""Work spread over processes, whose results come back in order."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

_Context = TypeVar("_Context")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# What one worker process holds: the pickled job, and what its set-up gave.
_held: dict[str, Any] = {}


class WorkerError(RuntimeError):
    """A worker process ended before its work was done."""


def run_in_processes(
    setup: Callable[[], _Context],
    function: Callable[[_Context, _Item], _Result],
    items: Sequence[_Item],
    workers: int,
) -> Generator[tuple[_Item, _Result], None, None]:
    """Call a function on every item, in newly started processes that share the torch threads.

    Args:
        setup: Called once in every process.
        function: Called as ``function(context, item)`` with what ``setup`` gave.
        items: The work.
        workers: Number of processes.

    Yields:
        Item and result, in the order of the items.

    Raises:
        ValueError: If ``setup`` or ``function`` cannot be sent to another process.
        WorkerError: If a process dies; what was ready is given before.
        KeyboardInterrupt: After Ctrl-C, when the processes are ended and what was ready is given.
    """
    try:
        job = pickle.dumps((setup, function))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"workers is {workers}, but model and batches cannot be sent to other processes ({error}); "
            "pass a build function, or workers=1"
        ) from None
    threads = max(1, torch.get_num_threads() // workers)
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (job, threads))
    before = multiprocessing.active_children()
    waiting: list[tuple[_Item, Future[bytes]]] = []
    started: list[Any] = []
    try:
        with _ctrl_c_held_back():
            waiting = [(item, executor.submit(_run, item)) for item in items]
            started = [child for child in multiprocessing.active_children() if child not in before]
        while waiting:
            item, future = waiting[0]
            result = pickle.loads(future.result())
            waiting.pop(0)
            yield item, result
    except KeyboardInterrupt:
        _end(executor, started)
        yield from _ready(waiting)
        raise
    except BrokenProcessPool:
        yield from _ready(waiting)
        left = [item for item, future in waiting if not _succeeded(future)]
        raise WorkerError(
            f"a worker process ended before {len(left)} of {len(items)} were done (killed, or out of "
            f"memory?); what was measured is kept. Run again with less than workers={workers}"
        ) from None
    finally:
        if waiting:
            _end(executor, started)
        executor.shutdown()


def _start(job: bytes, threads: int) -> None:
    # Ctrl-C reaches every process of the terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _held["job"] = job


def _run(item: Any) -> bytes:
    """Give the result as bytes: tensors sent as such would live in memory shared with this process."""
    try:
        if "context" not in _held:
            setup, _held["function"] = pickle.loads(_held["job"])
            _held["context"] = setup()
        return pickle.dumps(_held["function"](_held["context"], item))
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an exception that cannot travel would break the whole pool
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise


@contextlib.contextmanager
def _ctrl_c_held_back() -> Generator[None, None, None]:
    """Start processes with Ctrl-C blocked, so that none meets it while it still imports."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _end(executor: ProcessPoolExecutor, processes: Sequence[Any]) -> None:
    executor.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()


def _succeeded(future: Future[bytes]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _ready(waiting: Sequence[tuple[_Item, Future[bytes]]]) -> Iterator[tuple[_Item, Any]]:
    for item, future in waiting:
        if _succeeded(future):
            yield item, pickle.loads(future.result())
