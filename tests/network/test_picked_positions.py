"""States of which the network goes on with one position alone, against rows made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman import CreditReport, Options, credit_report

MAX_DIM = 40


class Mixing(nn.Module):
    """Two layers at every position, which running means mix, and a head on what is picked of them."""

    def __init__(self, pick: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.pick = pick

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)).cumsum(1)
        return self.head(self.pick(self.b(h)))


class TimeFirst(Mixing):
    """The same, with positions along the first axis."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.transpose(0, 1).contiguous())).cumsum(0)
        return self.head(self.b(h)[-1])


def report_of(net: nn.Module, reduce: Any = "pool") -> CreditReport:
    x = torch.randn(600, 30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = Options(max_dim=MAX_DIM, reduce=reduce, tikhonov=1e-4)
    return credit_report(net.double(), x.split(100), options=options)


class Beside:
    """The position that is picked, behind principal directions of what the others are pooled to."""

    def __init__(self, place: int) -> None:
        self.place, self.directions = place, torch.empty(0)

    def __call__(self, t: Tensor) -> Tensor:
        others = t[:, 1:] if self.place == 0 else t[:, :-1]
        cells = F.adaptive_avg_pool1d(others.transpose(1, 2), 27).flatten(1)
        picked = t[:, self.place]
        if not len(self.directions):
            # A basis is fitted to twice as many samples as it may have directions.
            first = cells[: 2 * MAX_DIM]
            _, _, vh = torch.linalg.svd(first - first.mean(0), full_matrices=False)
            self.directions = vh[: MAX_DIM - picked.shape[1]].T
        return torch.cat([cells @ self.directions, picked], dim=1)


def kept(place: int) -> dict[str, Any]:
    """Return what becomes of the states by hand."""
    return {"b": lambda t: t[:, place], "head": "pool", "a": Beside(place), "*": Beside(place)}


def assert_same(given: CreditReport, expected: CreditReport) -> None:
    assert given.widths == expected.widths
    for name in ("credit", "gain", "sensitivity"):
        np.testing.assert_allclose(
            getattr(given, name), getattr(expected, name), atol=1e-5, err_msg=name
        )
    # The bits of x_0 choose the folds, and a mean summed in another order has other bits.
    np.testing.assert_allclose(given.r2, expected.r2, atol=3e-2)


PICKS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "last": (lambda h: h[:, -1], -1),
    "class token": (lambda h: h[:, 0], 0),
    "slice": (lambda h: h[:, -1:].squeeze(1), -1),
    "first slice": (lambda h: h[:, :1].flatten(1), 0),
    "by index": (lambda h: h[torch.arange(len(h)), torch.full((len(h),), 29)], -1),
    "index_select": (lambda h: h.index_select(1, torch.tensor([29]))[:, 0], -1),
    "behind more": (lambda h: F.layer_norm(h, (6,)).transpose(0, 1)[-1] * 2, -1),
}


@pytest.mark.parametrize("name", PICKS)
def test_the_position_that_a_network_goes_on_with_is_kept(name: str) -> None:
    pick, place = PICKS[name]
    net = Mixing(pick)
    given = report_of(net)
    assert_same(given, report_of(net, kept(place)))
    if name != "behind more":
        # The head is linear in what it takes.
        assert given.r2[-1] > 0.999


@pytest.mark.parametrize("place", [0, -1])
def test_the_credit_of_what_a_linear_head_reads_is_the_volume_of_its_weights(place: int) -> None:
    net = Mixing(lambda h: h[:, place]).double()
    x = torch.randn(600, 30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    report = credit_report(net, x.split(100), options=Options(max_dim=MAX_DIM))
    volume = float(torch.linalg.svdvals(net.head.weight.detach()).log().mean())
    assert report.credit[1] == pytest.approx(volume, abs=1e-6)
    assert report.r2[-1] == pytest.approx(1, abs=1e-9)


def last_of_data(h: Tensor, mask: Tensor) -> Tensor:
    return h[torch.arange(len(h)), mask.sum(1) - 1]


@pytest.mark.parametrize("pick", [lambda h, mask: h[:, -1], last_of_data], ids=["last", "of data"])
def test_what_is_picked_is_what_the_network_reads_of_padded_samples(pick: Any) -> None:
    """The first batch is all data, so that both pick the same place of it."""

    class Padded(Mixing):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            self.pick = lambda h: pick(h, attention_mask)
            return super().forward(x)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 30, 6, generator=generator, dtype=torch.float64)
    lengths = torch.randint(5, 31, (600, 1), generator=generator)
    lengths[:100] = 30
    mask = torch.arange(30) < lengths
    batches = [{"x": a, "attention_mask": m} for a, m in zip(x.split(100), mask.split(100), strict=True)]
    report = credit_report(Padded(None).double(), batches, options=Options(max_dim=MAX_DIM))
    assert report.widths == (MAX_DIM, 6, 3)
    assert report.r2[-1] > 0.999


def test_a_batch_of_sequences_of_one_is_read_as_well() -> None:
    x = torch.randn(600, 30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = Mixing(lambda h: h[:, -1]).double()
    report = credit_report(net, [*x.split(100), x[:50, :1]], options=Options(max_dim=MAX_DIM))
    assert report.n_samples == 650
    assert report.r2[-1] > 0.999


def test_positions_along_the_first_axis_are_alike() -> None:
    net, turned = Mixing(lambda h: h[:, -1]), TimeFirst(lambda h: h)
    turned.load_state_dict(net.state_dict())
    given, expected = report_of(turned), report_of(net)
    assert given.widths == expected.widths
    np.testing.assert_allclose(given.credit, expected.credit, atol=1e-5)


@pytest.mark.parametrize(
    "pick",
    [
        lambda h: h.mean(1),
        lambda h: h[:, -1] + h.mean(1),
        lambda h: h[:, -1] + h[:, 0],
        lambda h: h[:, 3],
        lambda h: torch.stack(h.unbind(1)).sum(0),
        lambda h: h[:, -1].clone().add_(h[:, 2]),
    ],
)
def test_where_more_than_that_is_read_nothing_is_kept(pick: Callable[[Tensor], Tensor]) -> None:
    """The states are those of a network that pools, whose widths are known."""
    assert report_of(Mixing(pick)).widths == report_of(Mixing(lambda h: h.sum(1))).widths


def test_what_is_returned_as_well_is_read_whole() -> None:
    class Both(Mixing):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            b = torch.tanh(self.b(torch.tanh(self.a(x)).cumsum(1)))
            return self.head(b[:, -1]), b

    assert report_of(Both(lambda h: h)).widths[1] == MAX_DIM


def test_states_before_that_are_small_enough_stay_whole() -> None:
    net, x = Mixing(lambda h: h[:, -1]), torch.randn(300, 4, 6)
    report = credit_report(net, x.split(100), options=Options(max_dim=MAX_DIM))
    assert report.widths == (24, 6, 3)
    assert report.r2[-1] == pytest.approx(1, abs=1e-6)
