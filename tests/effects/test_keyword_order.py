"""What a call takes first is what its signature has first, in whatever order keywords come."""

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import component_effects, credit_report, drop_order
from lightning_koopman.network.runs.hook_points import HookPoint, HookPoints
from lightning_koopman.network.tensors import in_order

X = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))

CALLS = {
    "positions": lambda m, a, c: m.mix(a, c),
    "in order": lambda m, a, c: m.mix(a=a, context=c),
    "turned": lambda m, a, c: m.mix(context=c, a=a),
}


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, a: Tensor, context: Tensor) -> Tensor:
        return torch.tanh(self.left(a)) + 0.5 * self.right(context)


def network(call: str) -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.last(CALLS[call](m, torch.tanh(m.one(x)), torch.tanh(m.two(x))))

    torch.manual_seed(1)
    parts = {"one": nn.Linear(8, 8), "two": nn.Linear(8, 8), "mix": Mix(), "last": nn.Linear(8, 3)}
    return wired(run, **parts)


@pytest.mark.parametrize("call", CALLS)
def test_a_dropped_block_gives_what_its_signature_has_first(call):
    model = network(call)
    order = drop_order(model, [X], components=["mix"], steps=1, samples=600)
    with torch.no_grad():
        before, after = model(X), model.last(torch.tanh(model.one(X)))
    expected = (after - before).square().sum() / (before - before.mean(0)).square().sum()
    assert order.effect[0] == pytest.approx(float(expected), rel=1e-4)
    torch.testing.assert_close(order.apply(model, steps=1)(X), after)


@pytest.mark.parametrize("call", CALLS)
def test_a_skipped_call_gives_what_its_signature_has_first(call):
    model = network(call)
    effects = component_effects(model, [X], kinds=["skip", "linear"], samples=600)
    with torch.no_grad():
        before, after = model(X), model.last(torch.tanh(model.one(X)))
    expected = (after - before).square().sum() / (before - before.mean(0)).square().sum()
    row = effects.components.index("mix")
    assert effects.values["skip"][row] == pytest.approx(float(expected), rel=1e-4)
    plain = component_effects(network("positions"), [X], kinds=["linear"], samples=600)
    np.testing.assert_allclose(effects.values["linear"], plain.values["linear"], rtol=1e-5)


def test_credits_do_not_depend_on_the_order_of_keywords():
    reports = [credit_report(network(call), X.split(100)) for call in CALLS]
    for report in reports:
        assert (report.components, report.reads) == (reports[0].components, reports[0].reads)
        np.testing.assert_allclose(report.credit, reports[0].credit, atol=1e-6)


@pytest.mark.parametrize("call", CALLS)
def test_data_taken_by_keyword_are_read_in_the_order_of_the_signature(call):
    torch.manual_seed(0)
    model = wired(
        lambda m, x: m.last(CALLS[call](m, x[:, :8], x[:, 8:])), mix=Mix(), last=nn.Linear(8, 3)
    )
    point, x = HookPoint("in", "mix"), torch.randn(200, 16)
    with HookPoints(model, [point]) as points:
        model(x)
    assert torch.equal(points.values[point], x[:, :8])


def test_names_that_a_signature_has_not_come_last_as_the_caller_has_them():
    class Open(nn.Module):
        def forward(self, a: Tensor, **more: Tensor) -> Tensor:
            return a

    assert list(in_order(Open(), {"z": 0, "b": 1, "a": 2})) == ["a", "z", "b"]

    class Told(nn.Module):
        forward = print

    assert list(in_order(Told(), {"z": 0, "b": 1})) == ["z", "b"]


def test_scripted_modules_tell_no_names():
    scripted = torch.jit.script(nn.Bilinear(2, 2, 2))
    assert list(in_order(scripted, {"input2": 0, "input1": 1})) == ["input2", "input1"]
