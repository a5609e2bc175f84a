"""Recorded calls run again under the casts that they ran under."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_koopman.network.runs.recording import Recording


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).eval()


def parts_of(net: nn.Sequential) -> dict[str, nn.Module]:
    return {"0": net[0], "2": net[2]}


def without_casts() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", enabled=False)


AROUND: dict[str, Any] = {
    "nothing": nullcontext,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", torch.float16),
    "none": without_casts,
}


@pytest.mark.parametrize(("then", "now"), itertools.product(AROUND, AROUND))
def test_calls_run_again_as_they_were_cast(then: str, now: str) -> None:
    net = network()
    recording = Recording(net, parts_of(net))
    with torch.no_grad(), recording, AROUND[then]():
        given = net(torch.randn(5, 4))
    recording.end_step()
    with torch.no_grad(), AROUND[now]():
        assert recording.differs() is None
        (again,) = recording.steps[0].run()
        assert torch.is_autocast_enabled("cpu") == (now in ("bfloat16", "float16"))
    assert again.dtype == given.dtype
    assert torch.equal(again, given)


def test_each_call_of_a_step_has_casts_of_its_own() -> None:
    net = network()
    recording = Recording(net, parts_of(net))
    with torch.no_grad(), recording:
        with AROUND["bfloat16"]():
            state = net[0](torch.randn(5, 4))
            net[1](state)
        with without_casts():
            given = net[2](torch.randn(5, 8))
    recording.end_step()
    with torch.no_grad(), AROUND["bfloat16"]():
        first, _, last = recording.steps[0].run()
    assert (first.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(first, state)
    assert torch.equal(last, given)


def test_weights_that_are_changed_between_calls_are_cast_anew() -> None:
    net = network()
    recording = Recording(net, parts_of(net))
    x = torch.randn(5, 4)
    with torch.no_grad(), recording, AROUND["bfloat16"]():
        net(x)
    recording.end_step()
    with torch.no_grad():
        recording.steps[0].run()
        net[0].weight.mul_(2)
        (again,) = recording.steps[0].run()
        with AROUND["bfloat16"]():
            assert torch.equal(again, net(x))


def test_a_step_without_calls_does_not_tell_whether_code_stands_between_calls() -> None:
    def step(net: nn.Sequential, x: Tensor) -> Tensor:
        return net[2](net[0](x) + 1)

    net = network()
    recording = Recording(net, parts_of(net))
    for run in (lambda *_: None, step):
        with torch.no_grad(), recording:
            run(net, torch.randn(5, 4))
        recording.end_step()
    assert recording.reason == "the step runs code of its own before '2'"
