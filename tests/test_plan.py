"""What the chain is made of: links, joins, the output of interest, reductions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import credit_report


class LinearResidual(nn.Module):
    """x + b(a(x)) three times at leaf granularity, all of it linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(6)).double()

    def forward(self, x: Tensor) -> Tensor:
        for a, b in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = x + b(a(x))
        return x


def residual() -> tuple[LinearResidual, list[Tensor]]:
    torch.manual_seed(0)
    return LinearResidual(), list(torch.randn(400, 5, dtype=torch.float64).split(100))


def test_a_linear_residual_chain_has_the_volume_of_its_dense_jacobian() -> None:
    net, batches = residual()
    report = credit_report(net, batches, output=lambda given: given, tikhonov=0.0)
    assert report.components[-1] == "output"
    dense = torch.eye(5, dtype=torch.float64)
    for a, b in zip(net.layers[::2], net.layers[1::2], strict=True):
        dense = (torch.eye(5, dtype=torch.float64) + b.weight @ a.weight) @ dense
    expected = float(torch.linalg.slogdet(dense.detach())[1]) / 5
    assert report.total == pytest.approx(expected, abs=1e-8)
    assert float(report.r2.min()) > 1 - 1e-9


def test_the_output_of_interest_may_be_a_module() -> None:
    net, batches = residual()
    assert credit_report(net, batches, output="layers.3").components[-1] == "layers.3"
    with pytest.raises(ValueError, match="output is 'layer', which is no module of LinearResidual"):
        credit_report(net, batches, output="layer")


def test_an_unknown_reduction_is_refused() -> None:
    net, batches = residual()
    with pytest.raises(ValueError, match="reduce holds 'sum'; choose one of"):
        credit_report(net, batches, reduce={"layers.*": "sum"})
