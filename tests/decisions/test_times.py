"""Which of two networks is slower, on a machine that is busy with other work."""

import itertools
import time

import pytest
import torch
from torch import nn

from lightning_koopman.decisions import timing
from lightning_koopman.decisions.linear import _measure_of
from lightning_koopman.decisions.swaps import LinearComponent, swaps_in
from lightning_koopman.network.runs.forward_runner import ForwardRunner

# Before all networks of a test have one speed.
SECONDS = timing._seconds


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def runner() -> ForwardRunner:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    return ForwardRunner(net, [torch.randn(5, 4)])


def test_a_time_is_that_of_one_pass_over_one_batch():
    class Sleeps(nn.Linear):
        def forward(self, x):
            time.sleep(0.02)
            calls.append(len(x))
            return super().forward(x)

    calls = []
    taken = SECONDS(ForwardRunner(Sleeps(4, 3), [torch.randn(5, 4), torch.randn(6, 4)]))
    assert calls == [5]
    assert taken >= 0.02


def swaps() -> list[LinearComponent]:
    return [LinearComponent(8, (3,), None, ("2",), None)]


@pytest.mark.parametrize(
    ("factor", "disturbed", "slower"),
    [
        *[(0.9, 0.5, 0), (1.0, 0.0, 0), (1.0, 0.5, 0), (1.0, 0.8, 0)],
        *[(1.1, 0.1, 100), (1.3, 0.0, 100), (1.3, 0.3, 100), (1.3, 0.5, 100)],
    ],
)
def test_waiting_for_busy_cores_is_not_slowness(factor, disturbed, slower, monkeypatch, rng):
    """Many a pass waits for up to forty times as long as it takes; the second of a pair is slower."""
    count = itertools.count()

    def seconds(given: ForwardRunner) -> float:
        waits = rng.uniform(1, 40) if rng.random() < disturbed else 0.0
        own = rng.lognormal(0, 0.03) * (1 + 0.04 * (next(count) % 2))
        return own * (factor if swaps_in(given.model) else 1.0) + waits

    monkeypatch.setattr(timing, "_seconds", seconds)
    given, new = runner(), swaps()
    found = [timing.compare_times(given, new) for _ in range(100)]
    assert abs(sum(is_slower for _, is_slower in found) - slower) <= 2
    if disturbed <= 0.5:
        ratios = sorted(after / before for (before, after), _ in found)
        assert ratios[50] == pytest.approx(factor, rel=0.05)


def test_a_wait_for_each_of_several_threads_is_none_on_one(monkeypatch, two_threads):
    """A network of more steps waits more often where its threads wait for each other."""

    def seconds(given: ForwardRunner) -> float:
        steps = 2 if swaps_in(given.model) else 1
        return 0.9 if torch.get_num_threads() == 1 else 8.0 * steps

    monkeypatch.setattr(timing, "_seconds", seconds)
    assert timing.compare_times(runner(), swaps()) == ((0.9, 0.9), False)
    assert _measure_of("seconds")(runner(), None) == pytest.approx(0.9)
    assert torch.get_num_threads() == 2


def test_the_number_of_threads_comes_back_where_the_network_fails(monkeypatch, two_threads):
    monkeypatch.setattr(timing, "_seconds", lambda given: given.fails)
    with pytest.raises(AttributeError, match="fails"):
        timing.compare_times(runner(), swaps())
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("factor", "passes"), [(0.8, 24), (1.3, 24), (1.021, 96)])
def test_passes_are_repeated_as_long_as_it_is_not_known(factor, passes, monkeypatch, rng):
    count = itertools.count(1)

    def seconds(given: ForwardRunner) -> float:
        next(count)
        return rng.lognormal(0, 0.02) * (factor if swaps_in(given.model) else 1.0)

    monkeypatch.setattr(timing, "_seconds", seconds)
    timing.compare_times(runner(), swaps())
    assert next(count) - 1 == passes


def test_a_network_that_stays_is_timed_once(monkeypatch):
    times = iter(range(10, 20))
    monkeypatch.setattr(timing, "_seconds", lambda given: float(next(times)))
    assert timing.compare_times(runner(), []) == ((10.0, 10.0), False)
