"""Masks and what the network adds to them, handed on from block to block beside hidden states."""

from typing import Any

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import credit_report
from lightning_koopman.network.axes.input_data import is_mask, shuts_out

WIDTH, LENGTH = 8, 6
GENERATOR = torch.Generator().manual_seed(0)
LENGTHS = torch.randint(3, LENGTH + 1, (600, 1), generator=GENERATOR)
MASK = (torch.arange(LENGTH) < LENGTHS).long()
TOKENS = torch.randint(1, 9, (600, LENGTH), generator=GENERATOR) * MASK
BATCHES = list(zip(TOKENS.split(100), MASK.split(100), strict=True))


class Block(nn.Module):
    """Attends, with positions that all blocks share; the first one makes what is added to scores."""

    def __init__(self, positions: nn.Parameter, low: float, hand_on: bool) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.positions, self.low, self.hand_on = positions, low, hand_on

    def forward(self, hidden: Tensor, mask: Tensor | None, bias: Tensor | None) -> Any:
        if bias is None:
            # Nothing tells that zeros are no data.
            bias = self.positions + torch.zeros(LENGTH, LENGTH)
            if mask is not None:
                bias = bias + (1 - mask[:, None].float()) * self.low
        ask, key, value, out = self.maps
        scores = ask(hidden) @ key(hidden).mT / WIDTH**0.5 + bias
        hidden = hidden + out(scores.softmax(dim=-1) @ value(hidden))
        return hidden, bias if self.hand_on else None


def network(low: float = -1e9, *, hand_on: bool = True) -> Any:
    torch.manual_seed(0)
    positions = nn.Parameter(0.3 * torch.randn(1, LENGTH, LENGTH))

    def run(m: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden, bias = m.table(tokens), None
        for block in (m.first, m.second, m.third):
            hidden, bias = block(hidden, mask, bias)
        return m.head(hidden[:, 0])

    blocks = {name: Block(positions, low, hand_on) for name in ("first", "second", "third")}
    table = nn.Embedding(9, WIDTH)
    return wired(run, table=table, **blocks, head=nn.Linear(WIDTH, 3)).eval()


def report_of(model: Any, *, padded: bool = True) -> Any:
    batches = BATCHES if padded else TOKENS.split(100)
    called = (lambda m, batch: m(*batch)) if padded else None
    return credit_report(model, batches, forward_fn=called)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("low", [-1e9, -1e4, torch.finfo(torch.float32).min])
def test_what_blocks_hand_on_is_as_if_each_made_its_own(low, padded):
    expected = report_of(network(low, hand_on=False), padded=padded)
    report = report_of(network(low), padded=padded)
    assert report.reference.calls == tuple((name,) for name in report.reference.states)
    assert (report.reads, report.notes) == (expected.reads, expected.notes)
    np.testing.assert_allclose(report.r2, expected.r2, atol=1e-9)
    np.testing.assert_allclose(report.credit, expected.credit, atol=1e-9)


def test_what_the_network_makes_of_a_mask_is_no_input():
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
            return hidden + (self.map(hidden) @ hidden.mT + bias).softmax(dim=-1) @ hidden

    def run(m: Any, tokens: Tensor) -> Tensor:
        bias = m.positions + torch.where(tokens == 0, -1e4, 0.0)[:, None]
        return m.head(m.second(m.first(m.table(tokens), bias), bias).mean(dim=1))

    torch.manual_seed(0)
    parts = {"first": Attend(), "second": Attend(), "head": nn.Linear(WIDTH, 3)}
    model = wired(run, table=nn.Embedding(9, WIDTH), **parts).eval()
    model.positions = nn.Parameter(torch.randn(1, LENGTH, LENGTH))
    report = credit_report(model, TOKENS.split(100))
    assert report.reference.states == ("table", "first", "second", "head")
    assert report.reference.parents == ((0,), (1,), (2,))


def test_a_second_state_with_values_far_below_zero_stays_one():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one, other = (layer(x) for layer in self.layers)
            return one, 1e5 * other

    def run(m: Any, x: Tensor) -> Tensor:
        one, other = m.two(x)
        return m.head(torch.cat([one, 1e-5 * other], dim=1))

    torch.manual_seed(0)
    model = wired(run, two=Two(), head=nn.Linear(2 * WIDTH, 3))
    report = credit_report(model, list(torch.randn(600, WIDTH).split(100)))
    assert report.reference.widths == (WIDTH, 2 * WIDTH, 3)


def test_scores_are_shut_out_where_samples_differ_in_nothing_else():
    shut = torch.tensor([[0.0, -1e9, -1e9], [0.0, 0.0, -1e9], [0.0, 0.0, 0.0]])
    held = torch.tensor([0.5, -2.0, 3.0])
    assert shuts_out(shut)
    assert is_mask(shut)
    assert shuts_out(shut + held)
    assert is_mask(shut + held)
    assert shuts_out(torch.where(shut < 0, -torch.inf, held))
    # Of a single sample it cannot be told, nor where some of what is let through differs.
    assert not shuts_out((shut + held)[:1])
    assert not shuts_out(shut + held + torch.tensor([[0.0], [0.0], [1e-3]]))
    # The same for all is no mask.
    assert not shuts_out(held.expand(3, 3))
    assert not is_mask(held.expand(3, 3))
    assert not shuts_out((shut < 0).float())
    assert not shuts_out(torch.zeros(0, 3))
    assert not shuts_out(torch.tensor(-1e9))
