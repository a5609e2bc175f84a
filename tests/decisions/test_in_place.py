"""Networks that change tensors in place, and those that hold metrics, are decided on as any others."""

from __future__ import annotations

import copy

import pytest
import torch
import torchmetrics
from torch import Tensor, nn

from lightning_koopman import bit_widths, component_effects, drop_order, linearize
from lightning_koopman.decisions.swaps import copied_with

CPU = torch.Generator().manual_seed(5)
X = torch.randn(240, 8, generator=CPU)


class PreActivation(nn.Module):
    """Rectifies what it takes in place, and may add it again."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.inner, self.adds = nn.Linear(8, 8), adds

    def forward(self, x: Tensor) -> Tensor:
        if self.adds:
            x += self.inner(x)
            return x
        return self.inner(x.relu_())


def network(adds: bool) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = (PreActivation(adds) for _ in range(3))
    return nn.Sequential(nn.Linear(8, 8), *blocks, nn.Linear(8, 4)).eval()


def labelled(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    y = outputs(net, X).argmax(1)
    return [(a.clone(), b) for a, b in zip(X.split(60), y.split(60), strict=True)]


@torch.no_grad()
def outputs(net: nn.Module, x: Tensor) -> Tensor:
    return net(x.clone()).double()


def divergence(own: Tensor, other: Tensor) -> float:
    p, q = own.log_softmax(1), other.log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


@torch.no_grad()
def without(net: nn.Sequential, gone: set[str]) -> Tensor:
    """Run the parts that are left, each on a tensor of its own."""
    x = X.clone()
    for name, part in net.named_children():
        x = x if name in gone else part(x.clone())
    return x.double()


@pytest.mark.parametrize("adds", [False, True])
def test_what_follows_a_dropped_component_leaves_its_input_as_it_was(adds: bool):
    net = network(adds)
    data = labelled(net)
    found = drop_order(net, data, max_drop=1.0)
    assert {"0", "1", "2"} <= {*found.candidates}
    own = outputs(net, X)
    gone: set[str] = set()
    for step, name in enumerate(found.components):
        gone |= {name}
        assert found.effect[step] == pytest.approx(divergence(own, without(net, gone)), abs=1e-6)
    alone = {name: divergence(own, without(net, {name})) for name in found.candidates}
    effects = component_effects(net, data)
    for name, value, beside in zip(found.candidates, found.remaining[0], alone.values(), strict=True):
        assert value == pytest.approx(beside, abs=1e-6)
        assert effects.of(name, "skip")[0] == pytest.approx(beside, abs=1e-6)
    assert torch.equal(torch.cat([x for x, _ in data]), X)


def test_the_network_that_comes_of_it_leaves_its_input_as_it_was():
    net = network(adds=True)
    small = drop_order(net, labelled(net), components=["0"], steps=1).apply(net, 1)
    x = X.clone()
    with torch.no_grad():
        given = small(x)
    assert torch.equal(x, X)
    torch.testing.assert_close(given.double(), without(net, {"0"}))


class InTuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.inner(x),)


class Opened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = InTuple(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        (y,) = self.block(x)
        return self.head(y.relu_()) + x[:, :4]


def test_a_copy_comes_in_a_tuple_where_the_component_gave_one():
    torch.manual_seed(0)
    net = Opened().eval()
    found = drop_order(net, labelled(net), components=["block"], steps=1)
    with torch.no_grad():
        truth = net.head(X.relu()) + X[:, :4]
    assert found.effect[0] == pytest.approx(divergence(outputs(net, X), truth.double()), abs=1e-6)
    torch.testing.assert_close(outputs(found.apply(net, 1), X), truth.double())


class Measuring(nn.Module):
    """Holds metrics, which make their functions anew when they are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)))
        self.head = nn.Linear(8, 4)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=4)
        self.both = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError()])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_a_network_that_holds_metrics_is_copied_with_them():
    torch.manual_seed(0)
    net = Measuring().eval()
    data = labelled(net)
    small = drop_order(net, data, steps=1).apply(net, 1)
    linear = linearize(net, data, max_drop=1.0, allow_larger=True).model
    for new in (small, linear):
        new.accuracy.update(torch.eye(4), torch.arange(4))
        assert int(new.accuracy.tp.sum()) == 4
    assert int(net.accuracy.tp.sum()) == 0
    assert net.accuracy.update_called is False
    pytest.importorskip("torchao", reason="torchao is not installed")
    rounded = bit_widths(net, data, average=4.0).apply(net)
    rounded.accuracy.update(torch.eye(4), torch.arange(4))
    assert int(net.accuracy.tp.sum()) == 0


def test_of_a_function_beside_a_metric_the_copy_is_still_refused():
    net = Measuring().eval()
    net.steps = [lambda x: net.body(x)]
    with pytest.raises(ValueError, match="'steps' of 'Measuring' holds a function that refers to a"):
        copied_with(net, [])
    with pytest.raises(ValueError, match="'steps' of 'Measuring'"):
        linearize(net, labelled(net))
    assert copy.deepcopy(net).steps[0] is net.steps[0]  # which is why
