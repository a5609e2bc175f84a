"""A component that is given a mapping beside its input is left out by its input, as without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import component_effects, linearize


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, options: Any = None, /, **more: Any) -> Tensor:
        return x + 0.2 * torch.tanh(self.inner(x))


class Net(nn.Module):
    def __init__(self, *options: Any, **more: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.options, self.more = options, more
        self.first, self.blocks = nn.Linear(3, 4), nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, *self.options, **self.more)
        return self.head(x)


def samples() -> Tensor:
    return torch.randn(512, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "net", [Net({}), Net(options={}), Net(scale={"by": 1.0}), Net({"mask": torch.ones(128, 4)})]
)
def test_options_beside_an_input_change_no_effect(net: Net) -> None:
    found = component_effects(net, samples().split(128), kinds=("skip", "linear"))
    expected = component_effects(Net(), samples().split(128), kinds=("skip", "linear"))
    with torch.no_grad():
        x, outputs = net.first(samples()), net(samples())
        skipped = net.head(net.blocks[1](x))
    share = (skipped - outputs).square().sum() / (outputs - outputs.mean(0)).square().sum()
    assert found.components[1] == "blocks.0"
    assert found.values["skip"][1] == pytest.approx(float(share), rel=1e-4)
    for kind in ("skip", "linear"):
        assert found.values[kind] == pytest.approx(expected.values[kind], rel=1e-5, abs=1e-12)
    assert found.notes == expected.notes


def test_linearize_looks_at_components_that_are_given_options() -> None:
    found = linearize(Net({}), samples().split(128), max_drop=1.0)
    expected = linearize(Net(), samples().split(128), max_drop=1.0)
    assert found.candidates == expected.candidates
