"""Decisions on networks that differentiate themselves, or without parameters, or of other rows; cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import credit_report, drop_order, linearize
from lightning_koopman.decisions.steps import cost_of
from lightning_koopman.network.runs.forward_runner import ForwardRunner


class Forces(nn.Module):
    """Gives the derivative of an energy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = h = x.detach().requires_grad_()
            for block in self.blocks:
                h = h + torch.tanh(block(h))
            return torch.autograd.grad(self.head(h).tanh().sum(), x)[0]


class Plain(nn.Module):
    """Multiplies by a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(6) + 0.01 * torch.ones(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class More(nn.Linear):
    """Gives several rows for each that it takes, as the members of an ensemble do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(len(x), 3, 2).transpose(0, 1).reshape(-1, 2)


def data() -> list[Tensor]:
    return list(torch.randn(80, 6, generator=torch.Generator().manual_seed(1)).split(20))


def test_operations_of_a_network_that_differentiates_itself_are_counted() -> None:
    net = Forces()
    # Forward, and the gradients of what is taken in: none are asked for of weights.
    with torch.no_grad():
        for p in net.parameters():
            p.requires_grad_(False)
    expected = 2 * (2 * 20 * (2 * 6 * 6 + 6))
    assert cost_of(ForwardRunner(net, data())).flops == expected
    for p in net.parameters():
        p.requires_grad_(True)
    assert cost_of(ForwardRunner(net, data())).flops == expected
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_decisions_on_a_network_that_differentiates_itself() -> None:
    net = Forces()
    order = drop_order(net, data(), components=["blocks.*"], steps=2)
    x = torch.cat(data())
    own, altered = net(x), order.apply(net, steps=1)(x)
    h = x.clone().requires_grad_()
    kept = h
    for i, block in enumerate(net.blocks):
        kept = kept + torch.tanh(kept if f"blocks.{i}" == order.components[0] else block(kept))
    by_hand = torch.autograd.grad(net.head(kept).tanh().sum(), h)[0]
    torch.testing.assert_close(altered, by_hand)
    moved = (by_hand - own).square().mean(0).sum() / own.var(0, correction=0).sum()
    assert order.effect[0] == pytest.approx(float(moved), rel=1e-4)
    assert linearize(net, data(), allow_larger=True).cost_before.flops == order.cost_before.flops


def test_a_network_without_parameters_is_shown() -> None:
    net = nn.Sequential(Plain(), nn.Tanh(), Plain())
    report = credit_report(net, data(), components=["0", "2"])
    order = drop_order(net, data(), report, max_drop=10.0)
    assert order.dropped
    assert "parameters" not in str(order)
    found = linearize(net, data(), report, max_drop=10.0, allow_larger=True)
    assert found.components
    assert found.headline.startswith("LARGER (parameters")
    assert " after 0 parameters" in found.headline
    assert "parameters left" not in str(found)


def test_what_turns_rows_into_more_stays() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), More(6, 6))
    found = linearize(net, data(), max_drop=10.0)
    assert found.refused["4"] == "it turns 20 rows into 60"
    assert "0" in found.candidates
    with pytest.raises(ValueError, match="'4' cannot become linear: it turns 20 rows into 60"):
        linearize(net, data(), components=["4"])


def positions() -> list[Tensor]:
    return list(torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(1)).split(20))


class First(nn.Module):
    """Runs a module and gives the first of what it gives."""

    def __init__(self, inner: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(*[x] * self.times)[0]


class Twice(First):
    """Gives a module the same twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)


# Two products of 4 units in each of 2 heads, for each pair of 5 positions.
ATTENTION = 2 * 20 * (5 * 8 * 32 + 2 * 2 * 5 * 5 * 4)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (encoder(), ATTENTION + 2 * 100 * 2 * 8 * 12),
        (First(nn.MultiheadAttention(8, 2, batch_first=True), 3), ATTENTION),
        # Two layers in two directions, the second of which takes both.
        (
            First(nn.LSTM(8, 3, num_layers=2, bidirectional=True, batch_first=True)),
            2 * 100 * 2 * 12 * ((8 + 3) + (6 + 3)),
        ),
        (First(nn.GRU(8, 3, batch_first=True)), 2 * 100 * 9 * (8 + 3)),
        (Twice(nn.Bilinear(8, 8, 3)), 2 * 100 * 8 * 8 * 3),
    ],
)
def test_operations_of_attention_and_recurrence_are_counted(net: nn.Module, expected: int) -> None:
    runner = ForwardRunner(net.eval(), positions())
    assert cost_of(runner).flops == expected
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_operations_of_recurrence_on_a_gpu_are_those_on_a_processor(kind: type[nn.RNNBase]) -> None:
    """Of what a GPU runs in one call of all layers, tensors without data have the shapes."""
    net = kind(8, 3, num_layers=2, bidirectional=True, batch_first=True).eval()
    expected = cost_of(ForwardRunner(First(net), positions())).flops

    class OnGpu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            weights = [weight.to("meta") for weight in net._flat_weights]
            state, mode = torch.empty(4, 20, 3, device="meta"), 2 if kind is nn.LSTM else 3
            cell = state if kind is nn.LSTM else None
            sizes = (mode, 3, 0, 2, True, 0.0, False, True, [], None)
            torch.ops.aten._cudnn_rnn(x.to("meta"), weights, 4, None, state, cell, *sizes)
            return x

    assert cost_of(ForwardRunner(OnGpu(), positions())).flops == expected > 0


def test_an_encoder_layer_that_a_map_is_cheaper_than_becomes_linear() -> None:
    """Its operations were none, so that whatever took its place was larger."""
    net = nn.Sequential(encoder(), nn.Linear(8, 3)).eval()
    found = linearize(net, positions(), max_drop=10.0)
    assert "0" in found.components
    assert found.costs[-1].flops < found.cost_before.flops
