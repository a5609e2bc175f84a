"""What signals call comes behind what may not be cut in two, once, and is told from other errors."""

import functools
import signal
import threading
from collections.abc import Callable, Generator
from typing import Any

import pytest

from lightning_koopman.network.access.signals import came_from_signal, signals_wait

TWO = (signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture
def came() -> Generator[list[int], None, None]:
    """The signals whose handler ran, in order."""
    numbers: list[int] = []
    before = [signal.signal(number, lambda number, _: numbers.append(number)) for number in TWO]
    yield numbers
    for number, handler in zip(TWO, before, strict=True):
        signal.signal(number, handler)


def test_signals_wait_for_the_end_of_the_body_in_order(came):
    with signals_wait():
        with signals_wait():
            signal.raise_signal(TWO[1])
            signal.raise_signal(TWO[0])
        assert came == []
    assert came == [*TWO[::-1]]
    signal.raise_signal(TWO[0])
    assert came == [*TWO[::-1], TWO[0]]


def test_signals_wait_from_when_the_body_says_so(came):
    with signals_wait(now=False) as signals:
        signal.raise_signal(TWO[0])
        assert came == [TWO[0]]
        signals.now = True
        signal.raise_signal(TWO[1])
        assert came == [TWO[0]]
    assert came == [*TWO]


def test_a_signal_that_comes_again_waits_no_longer(came):
    with signals_wait():
        signal.raise_signal(TWO[0])
        signal.raise_signal(TWO[0])
        assert came == [TWO[0]]
    assert came == [TWO[0]]


def test_all_that_waited_is_called_whichever_raises_and_whatever_the_body_raised(came):
    def body() -> None:
        with signals_wait():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(TWO[0])
            raise ValueError("of the body")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert came == [TWO[0]]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_the_body_sets_stays(came):
    others: list[int] = []
    with signals_wait():
        signal.signal(TWO[0], lambda number, _: others.append(number))
    signal.raise_signal(TWO[0])
    assert (others, came) == ([TWO[0]], [])


def test_nothing_waits_in_another_thread(came):
    entered, told = threading.Event(), threading.Event()

    def body() -> None:
        with signals_wait():
            entered.set()
            told.wait(10)

    thread = threading.Thread(target=body)
    thread.start()
    entered.wait(10)
    signal.raise_signal(TWO[0])
    assert came == [TWO[0]]
    told.set()
    thread.join()


def stop(number: int, frame: Any) -> None:
    raise TimeoutError("time is up")


class Stopper:
    def __call__(self, number: int, frame: Any) -> None:
        stop(number, frame)

    def method(self, number: int, frame: Any) -> None:
        stop(number, frame)


@pytest.mark.parametrize("handler", [stop, Stopper(), Stopper().method, functools.partial(stop)])
@pytest.mark.usefixtures("came")
def test_an_error_that_a_signal_raised_is_told_from_others(handler):
    def caught(act: Callable[[], Any]) -> BaseException:
        with pytest.raises(TimeoutError) as raised:
            act()
        return raised.value

    def fails() -> None:
        raise TimeoutError("a server did not answer")

    signal.signal(TWO[0], handler)
    assert came_from_signal(caught(lambda: signal.raise_signal(TWO[0])))
    assert not came_from_signal(caught(fails))
