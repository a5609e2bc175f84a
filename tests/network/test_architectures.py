"""A finite report for whatever people train, without options; families are in test_families.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman import CreditReport, Options, credit_report

pytestmark = pytest.mark.filterwarnings("ignore")

Case = tuple[nn.Module, list[Any]]


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def block(a: int, b: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU())

        self.d1, self.d2, self.mid = block(1, 4), block(4, 8), block(8, 8)
        self.u2, self.u1, self.out = block(16, 4), block(8, 4), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        u = F.interpolate(self.mid(F.max_pool2d(b, 2)), scale_factor=2)
        u = F.interpolate(self.u2(torch.cat([u, b], 1)), scale_factor=2)
        return self.out(self.u1(torch.cat([u, a], 1)))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b1 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.b2, self.head = nn.Conv2d(8, 4, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(torch.cat([self.b1(x), self.b2(x)], 1).mean((2, 3)))


class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = F.relu(adjacency @ self.a(x))
        return self.c(F.relu(adjacency @ self.b(x)))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gate, self.out = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inp(x))
        chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y[chosen == i] = expert(x[chosen == i])
        return self.out(y)


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], batch_first: bool) -> None:
        super().__init__()
        self.r1, self.r2 = (kind(w, 8, batch_first=batch_first) for w in (6, 8))
        self.head, self.batch_first = nn.Linear(8, 3), batch_first

    def forward(self, x: Tensor) -> Tensor:
        y = self.r2(self.r1(x)[0])[0]
        return self.head(y[:, -1] if self.batch_first else y[-1])


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][0][-1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(12, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x), self.right(y)], 1).relu())


def randn(*shape: int) -> list[Any]:
    return [torch.randn(*shape) for _ in range(4)]


def plain() -> dict[str, Callable[[], Case]]:
    layer = {"d_model": 16, "nhead": 2, "dim_feedforward": 32}
    return {
        "LSTM, batch second": lambda: (Recurrent(nn.LSTM, False), randn(7, 40, 6)),
        "GRU, batch first": lambda: (Recurrent(nn.GRU, True), randn(40, 7, 6)),
        "LSTM, packed": lambda: (
            Packed(),
            [(torch.randn(40, 7, 6), torch.randint(1, 8, (40,))) for _ in range(4)],
        ),
        "TransformerEncoder": lambda: (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer, batch_first=True), 3),
            randn(60, 5, 16),
        ),
        "Transformer": lambda: (
            nn.Transformer(16, 2, 2, 2, 32, batch_first=True),
            [(torch.randn(60, 5, 16), torch.randn(60, 4, 16)) for _ in range(4)],
        ),
        "MultiheadAttention": lambda: (Attention(), randn(60, 7, 6)),
        "U-Net": lambda: (UNet(), randn(60, 1, 16, 16)),
        "Inception": lambda: (Inception(), randn(60, 3, 8, 8)),
        "graph network": lambda: (
            GraphNet(),
            [(torch.randn(80, 6), (torch.rand(80, 80) > 0.9).float()) for _ in range(4)],
        ),
        "sparse mixture of experts": lambda: (Experts(), randn(80, 6)),
        "two towers": lambda: (
            Towers(),
            [(torch.randn(80, 4), torch.randn(80, 5)) for _ in range(4)],
        ),
        "autoencoder": lambda: (
            nn.Sequential(nn.Linear(10, 3), nn.ReLU(), nn.Linear(3, 10)),
            randn(100, 10),
        ),
    }


def check(model: nn.Module, batches: list[Any]) -> CreditReport:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = credit_report(model, batches, options=Options(max_dim=64))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(report.components) >= 2
    for quantity in ("credit", "gain", "r2", "chain_r2", "sensitivity"):
        assert np.isfinite(getattr(report, quantity)).all(), quantity
    assert report.gain.sum() == pytest.approx(report.total)
    return report


@pytest.mark.parametrize("name", plain())
def test_plain_networks_give_a_finite_report(name: str) -> None:
    torch.manual_seed(0)
    check(*plain()[name]())


def test_skips_are_linked_and_parallel_components_joined() -> None:
    unet = check(*plain()["U-Net"]())
    assert unet.reads["u2.0"] == ("mid.0", "d2.0")
    assert unet.reads["u1.0"] == ("u2.0", "d1.0")
    inception = check(*plain()["Inception"]())
    assert inception.components == ("stem", "b1+b2", "head")
    assert any("joined into one state: b1+b2" in note for note in inception.notes)
    towers = check(*plain()["two towers"]())
    assert towers.components == ("left+right", "head")


class LinearUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d1, self.d2, self.mid = nn.Linear(12, 9), nn.Linear(9, 7), nn.Linear(7, 7)
        self.u2, self.u1, self.out = nn.Linear(14, 6), nn.Linear(15, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.d1(x)
        b = self.d2(a)
        return self.out(self.u1(torch.cat([self.u2(torch.cat([self.mid(b), b], 1)), a], 1)))


class LinearInception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b1, self.b2 = nn.Linear(12, 9), nn.Linear(9, 5), nn.Linear(9, 4)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([self.b1(x), self.b2(x)], 1))


class LinearTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(11, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x), self.right(y)], 1))


@pytest.mark.parametrize(
    ("kind", "widths"), [(LinearUNet, [12]), (LinearInception, [12]), (LinearTowers, [4, 5])]
)
def test_a_linear_network_has_the_log_volume_of_its_dense_jacobian(
    kind: type[nn.Module], widths: list[int]
) -> None:
    torch.manual_seed(0)
    model = kind().double()
    batches = [tuple(torch.randn(100, w, dtype=torch.float64) for w in widths) for _ in range(5)]
    report = credit_report(model, batches, forward_fn=lambda net, batch: net(*batch))
    jacobian = torch.autograd.functional.jacobian(model, tuple(b[:1] for b in batches[0]))
    dense = torch.cat([j[0, :, 0] for j in jacobian], dim=1)
    volume = float(torch.linalg.svdvals(dense).log().mean())
    assert report.total == pytest.approx(volume, abs=1e-9)
    assert report.gain.sum() == pytest.approx(volume, abs=1e-9)
