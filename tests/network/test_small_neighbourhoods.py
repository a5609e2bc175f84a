"""Beside one input every network is linear: operators explain it, credits add up to its Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small import wired
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman import CreditReport, Options, credit_report

pytestmark = pytest.mark.filterwarnings("ignore")


def integrated() -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.encode(x)
        for step in range(3):
            h = h + m.field(torch.cat([h, torch.full_like(h[:, :1], step / 3)], 1)) / 3
        return m.decode(h)

    field = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 8))
    return wired(run, encode=nn.Linear(10, 8), field=field, decode=nn.Linear(8, 3))


def highway() -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        for gate, part in zip(m.gates, m.parts, strict=True):
            share = gate(x).sigmoid()
            x = share * part(x).tanh() + (1 - share) * x
        return m.last(x)

    gates, parts = (nn.ModuleList(nn.Linear(10, 10) for _ in range(3)) for _ in range(2))
    return wired(run, gates=gates, parts=parts, last=nn.Linear(10, 3))


def subtracted() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(12, 16)
            self.back, self.ahead = nn.Linear(16, 12), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = F.softplus(self.body(x))
            return self.back(h), self.ahead(h)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        forecast = torch.zeros(len(x), 4, dtype=x.dtype)
        for block in m.blocks:
            back, ahead = block(x)
            x, forecast = x - back, forecast + ahead
        return forecast

    return wired(run, blocks=nn.ModuleList(Block() for _ in range(3)))


def dilated() -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        x, skips = m.first(x[:, None]), []
        for k, (wide, narrow, beside) in enumerate(zip(m.wide, m.narrow, m.beside, strict=True)):
            a, b = wide(F.pad(x, (2**k, 0))).chunk(2, 1)
            gated = a.tanh() * b.sigmoid()
            x = x + narrow(gated)
            skips.append(beside(gated))
        return m.last(F.softplus(sum(skips)))[:, :, -1]

    def convolutions(given: int, made: int, **how: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Conv1d(given, made, 1, **how) for _ in range(3))

    wide = nn.ModuleList(nn.Conv1d(4, 8, 2, dilation=2**k) for k in range(3))
    parts = {"narrow": convolutions(4, 4), "beside": convolutions(4, 6), "last": nn.Conv1d(6, 3, 1)}
    return wired(run, first=nn.Conv1d(1, 4, 1), wide=wide, **parts)


def attentive() -> nn.Module:
    """Picks, step by step, from the features by a mask that it makes of what it found before."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        found, prior, output = m.parts[0](x).tanh()[:, 4:], torch.ones_like(x), 0
        for part, mask in zip(m.parts[1:], m.masks, strict=True):
            chosen = torch.softmax(mask(found) * prior, 1)
            prior = prior * (1.3 - chosen)
            h = part(x * chosen).tanh()
            output, found = output + h[:, :4], h[:, 4:]
        return m.last(output)

    parts = nn.ModuleList(nn.Linear(10, 8) for _ in range(3))
    masks = nn.ModuleList(nn.Linear(4, 10) for _ in range(2))
    return wired(run, parts=parts, masks=masks, last=nn.Linear(4, 2))


def squeezed() -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.first(x.view(-1, 1, 4, 4)).tanh()
        x = x * m.up(m.down(x.mean((2, 3))).tanh()).sigmoid()[:, :, None, None]
        return m.last((m.second(x).tanh() + x).mean((2, 3)))

    first, second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
    ends = {"down": nn.Linear(6, 2), "up": nn.Linear(2, 6), "last": nn.Linear(6, 3)}
    return wired(run, first=first, second=second, **ends)


def looped() -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 6)
        for part in x.view(len(x), 4, 3).unbind(1):
            h, c = m.cell(m.embed(part), (h, c))
        return m.last(h)

    return wired(run, embed=nn.Linear(3, 5), cell=nn.LSTMCell(5, 6), last=nn.Linear(6, 2))


def weighed_by_data() -> nn.Module:
    """Layers whose weights another part of the network makes, for each sample."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        weights = m.make(x[:, :4]).view(-1, 5, 6)
        return m.last(torch.bmm(weights, m.embed(x[:, 4:])[:, :, None])[:, :, 0].tanh())

    make = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 30))
    return wired(run, make=make, embed=nn.Linear(8, 6), last=nn.Linear(5, 2))


def encoder() -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.embed(x.view(len(x), 4, 3))
        for layer in m.layers:
            h = layer(h)
        return m.last(h.mean(1))

    made = (nn.TransformerEncoderLayer(4, 2, 8, 0.0, F.gelu, batch_first=True) for _ in range(2))
    return wired(run, embed=nn.Linear(3, 4), layers=nn.ModuleList(made), last=nn.Linear(4, 2))


def u_shaped() -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        a = m.down(x.view(-1, 1, 4, 4)).tanh()
        b = m.middle(F.avg_pool2d(a, 2)).tanh()
        return m.last(torch.cat([m.up(b), a], 1))[:, 0, ::2, ::3].flatten(1)

    parts = {"middle": nn.Conv2d(4, 6, 3, padding=1), "up": nn.ConvTranspose2d(6, 3, 2, 2)}
    return wired(run, down=nn.Conv2d(1, 4, 3, padding=1), last=nn.Conv2d(7, 1, 1), **parts)


NETWORKS: dict[Callable[[], nn.Module], int] = {
    integrated: 10,
    highway: 10,
    subtracted: 12,
    dilated: 12,
    attentive: 10,
    squeezed: 16,
    looped: 12,
    weighed_by_data: 12,
    encoder: 12,
    u_shaped: 16,
}
WHOLE = Options(reduce="flatten", max_dim=256, errors=False)


def beside(model: nn.Module, x: Tensor, n_samples: int = 600) -> CreditReport:
    """Report on inputs that differ from one by little."""
    inputs = x + 1e-4 * torch.randn(n_samples, x.shape[1], dtype=x.dtype)
    return credit_report(model, inputs.split(100), options=WHOLE, max_samples=None)


@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
def test_total_credit_is_the_log_volume_of_the_jacobian(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    x = torch.randn(1, NETWORKS[make], dtype=torch.float64)
    report = beside(model, x)
    jacobian = torch.autograd.functional.jacobian(model, x)[0, :, 0]
    # The ridge moves volumes by less.
    assert report.total == pytest.approx(float(torch.linalg.svdvals(jacobian).log().mean()), abs=0.01)
    # What an operator does not read would be missing here.
    assert report.r2.min() > 1 - 1e-5
    assert report.chain_r2.min() > 1 - 1e-5


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_outputs_that_vary_by_little_beside_their_mean_are_no_sums(offset: float) -> None:
    # A tenth of a part in ten thousand of the last state's positions, added up, is rounding.
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.last(m.first(x[:, None]).tanh())[:, :, -1]

    torch.manual_seed(0)
    model = wired(run, first=nn.Conv1d(1, 6, 3), last=nn.Conv1d(6, 3, 1)).double()
    with torch.no_grad():
        model.last.bias += offset
    batches = torch.randn(600, 12, dtype=torch.float64).split(100)
    report = credit_report(model, batches, options=WHOLE, max_samples=None)
    assert report.reads["output"] == ("last",)
    assert report.r2[-1] == pytest.approx(1, abs=1e-6)
