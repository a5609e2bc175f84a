"""A call beside which somebody stands is made once, and ends as it would alone."""

import signal
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import credit_report
from lightning_koopman.network.access.bystander import Call, stand_by


class Made:
    """Counts its calls."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.calls = error, 0

    def __call__(self, value: int) -> int:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return 2 * value


def before(call: Call, args: Any, kwargs: Any) -> Any:
    raise MemoryError("before")


def behind(call: Call, args: Any, kwargs: Any) -> Any:
    call(*args, **kwargs)
    raise MemoryError("behind")


@pytest.mark.parametrize("listener", [before, behind])
def test_a_listener_that_fails_changes_nothing(listener):
    made, heard = Made(), list[Exception]()
    assert stand_by(listener, made, heard.append, 3) == 6
    assert made.calls == 1
    assert [str(error) for error in heard] == [listener.__name__]


@pytest.mark.parametrize("listener", [before, behind])
def test_it_ends_the_call_where_nobody_hears_of_it(listener):
    with pytest.raises(MemoryError, match=listener.__name__):
        stand_by(listener, Made(), None, 3)


@pytest.mark.parametrize("error", [MemoryError("theirs"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("listener", [before, behind])
def test_an_error_of_the_call_itself_is_the_callers(listener, error):
    made, heard = Made(error), list[Exception]()
    with pytest.raises(type(error)) as caught:
        stand_by(listener, made, heard.append, 3)
    assert caught.value is error
    assert made.calls == 1
    assert all(str(each) == "before" for each in heard)


def test_what_a_signal_raises_beside_it_is_the_callers():
    def stop(*_: object) -> None:
        raise TimeoutError("time is up")

    def listener(call: Call, args: Any, kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return call(*args, **kwargs)

    kept = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(TimeoutError):
            stand_by(listener, Made(), print, 3)
    finally:
        signal.signal(signal.SIGUSR1, kept)


class Scaled(nn.Linear):
    """Has a keyword named as something of ours."""

    def forward(self, x: Tensor, called: float = 1, listener: float = 1, failed: float = 1) -> Tensor:
        return super().forward(x) * called * listener * failed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaled, self.head = Scaled(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scaled.forward(x, called=2, listener=3, failed=0.5))


def test_a_forward_that_is_called_by_itself_may_have_any_keyword():
    torch.manual_seed(0)
    net = Net()
    plain = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    plain[0].weight.data, plain[0].bias.data = 3 * net.scaled.weight, 3 * net.scaled.bias
    plain[1].load_state_dict(net.head.state_dict())
    batches = list(torch.randn(4, 64, 6))
    reports = [credit_report(net, batches), credit_report(plain, batches)]
    left, right = (list(report.credit) for report in reports)
    assert left == pytest.approx(right, rel=1e-6)
