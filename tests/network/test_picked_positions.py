"""States of which the network goes on with one position alone, against rows made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

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
    "by mask": (lambda h: h[:, torch.arange(30) == 29].squeeze(1), -1),
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


def padded_batches(longest: int, *, named: str = "attention_mask") -> list[dict[str, Tensor]]:
    """Return 6 batches of 100 padded samples; those of the first are ``longest``, if not 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 30, 6, generator=generator, dtype=torch.float64)
    lengths = torch.randint(5, 31, (600, 1), generator=generator)
    lengths[:100] = longest or lengths[:100]
    mask = torch.arange(30) < lengths
    return [{"x": a, named: m} for a, m in zip(x.split(100), mask.split(100), strict=True)]


def by_gather(h: Tensor, mask: Tensor) -> Tensor:
    return h.gather(1, (mask.sum(1) - 1)[:, None, None].expand(-1, 1, h.shape[-1])).squeeze(1)


def by_mark(h: Tensor, mask: Tensor) -> Tensor:
    return h[torch.arange(30) == mask.sum(1, keepdim=True) - 1].view(len(h), -1, 6)[:, -1]


LAST_OF_DATA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda h, mask: h[torch.arange(len(h)), mask.sum(1) - 1],
    "from the end": lambda h, mask: h[torch.arange(len(h)), mask.sum(1) - 31],
    "turned": lambda h, mask: h.transpose(0, 1)[mask.sum(1) - 1, torch.arange(len(h))],
    "with an axis": lambda h, mask: h[torch.arange(len(h))[:, None], mask.sum(1)[:, None] - 1].squeeze(
        1
    ),
    "gather": by_gather,
    "mark": by_mark,
}


class Padded(Mixing):
    def __init__(self, of_data: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(lambda h: of_data(h, self.mask))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        self.mask = attention_mask
        return super().forward(x)


@pytest.mark.parametrize("longest", [30, 20, 0])
@pytest.mark.parametrize("name", ["last", *LAST_OF_DATA])
def test_what_is_picked_is_what_the_network_reads_of_padded_samples(name: str, longest: int) -> None:
    """The first batch may be all data, so that all pick the same place of it."""
    pick = LAST_OF_DATA.get(name, lambda h, mask: h[:, -1])
    net = Padded(pick).double()
    report = credit_report(net, padded_batches(longest), options=Options(max_dim=MAX_DIM))
    assert report.widths == (MAX_DIM, 6, 3)
    assert report.r2[-1] > 0.999


@pytest.mark.parametrize(
    "pick",
    [
        lambda h, mask: h[torch.arange(len(h)), mask.sum(1) - 2],
        lambda h, mask: h[torch.arange(len(h)), (7 * torch.arange(len(h))) % 30],
        lambda h, mask: h.gather(1, torch.arange(6).expand(len(h), 1, 6)).squeeze(1),
        lambda h, mask: h[mask & (mask.cumsum(1) <= 2)].view(len(h), 2, 6).sum(1),
    ],
    ids=["not the last", "by place", "of each channel", "two"],
)
def test_other_positions_that_differ_by_sample_are_pooled_as_before(pick: Any) -> None:
    report = credit_report(Padded(pick).double(), padded_batches(0), options=Options(max_dim=MAX_DIM))
    assert report.widths[1] == MAX_DIM


def test_without_a_mask_of_the_batch_nobody_knows_where_data_ends() -> None:
    class Ends(Mixing):
        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            self.pick = lambda h: LAST_OF_DATA["index"](h, ends)
            return super().forward(x)

    batches = padded_batches(0, named="ends")
    report = credit_report(Ends(lambda h: h).double(), batches, options=Options(max_dim=MAX_DIM))
    assert report.widths[1] == MAX_DIM


@pytest.mark.parametrize("is_sorted", [True, False])
def test_the_last_step_of_packed_sequences_is_kept(is_sorted: bool) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(6, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=is_sorted)
            h, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
            return self.head(h[torch.arange(len(h)), lengths - 1])

    batches = []
    for batch in padded_batches(0):
        lengths = batch["attention_mask"].sum(1)
        batches.append((batch["x"], lengths.sort(descending=True)[0] if is_sorted else lengths))
    report = credit_report(
        Packed().double(), batches, forward_fn=lambda net, b: net(*b), options=Options(max_dim=MAX_DIM)
    )
    assert report.widths == (6, 3)
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


@pytest.mark.parametrize("whole", [False, True])
def test_a_loss_reads_of_a_head_what_it_is_computed_of(whole: bool) -> None:
    class WithLoss(Mixing):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            scores = self.head(self.b(torch.tanh(self.a(x)).cumsum(1)))
            if y is None:
                return scores[:, -1]
            return F.cross_entropy(scores.mean(1) if whole else scores[:, -1], y), scores[:, -1]

    torch.manual_seed(0)
    net = WithLoss(lambda h: h).double()
    x = torch.randn(600, 30, 6, dtype=torch.float64)
    y, options = torch.randint(3, (600,)), Options(max_dim=MAX_DIM)
    batches = [{"x": a, "y": b} for a, b in zip(x.split(100), y.split(100), strict=True)]
    trained, alone = (credit_report(net, given, options=options) for given in (batches, x.split(100)))
    place = trained.components.index("head")
    assert alone.widths[place] == 3
    assert trained.widths[place] == (MAX_DIM if whole else 3)
    if not whole:
        np.testing.assert_allclose(trained.credit, alone.credit, atol=1e-12)


@pytest.mark.parametrize("as_list", [False, True])
def test_hidden_states_that_are_returned_beside_the_output_change_nothing(as_list: bool) -> None:
    class Both(Mixing):
        def forward(self, x: Tensor) -> Any:
            a = torch.tanh(self.a(x)).cumsum(1)
            b = self.b(a)
            out = self.head(b[:, -1])
            return {"logits": out, "hidden": (a, b)} if as_list else (out, b)

    torch.manual_seed(0)
    alone = report_of(Mixing(lambda h: h[:, -1]))
    torch.manual_seed(0)
    both = report_of(Both(lambda h: h))
    # A linear head explains all of what it reads, but for the ridge.
    assert both.r2[-1] == pytest.approx(1, abs=1e-5)
    for name in ("widths", "credit", "gain", "r2"):
        np.testing.assert_allclose(getattr(both, name), getattr(alone, name), atol=1e-12, err_msg=name)


def test_what_is_returned_and_no_component_goes_on_with_is_read_whole() -> None:
    class Watched(Mixing):
        def forward(self, x: Tensor) -> Tensor:
            b = torch.tanh(self.b(torch.tanh(self.a(x)).cumsum(1)))
            # A head whose output nobody gets.
            self.head(b[:, -1])
            return b

    assert report_of(Watched(lambda h: h)).widths[-1] == MAX_DIM


def test_states_before_that_are_small_enough_stay_whole() -> None:
    net, x = Mixing(lambda h: h[:, -1]), torch.randn(300, 4, 6)
    report = credit_report(net, x.split(100), options=Options(max_dim=MAX_DIM))
    assert report.widths == (24, 6, 3)
    assert report.r2[-1] == pytest.approx(1, abs=1e-6)


HEADS = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
ORDER = torch.tensor([3, 0, 4, 1, 2])
MIX = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def shifted(h: Tensor) -> Tensor:
    """Write each position but the last in the place behind it."""
    moved = torch.zeros_like(h)
    moved[:, 1:] = h[:, :-1]
    return moved


def half_reversed(h: Tensor) -> Tensor:
    """Write half of the channels in place, over others that are in reverse."""
    turned = h.flip(1).mul_(2)
    turned[..., :3] = h[..., :3]
    return turned


def overwritten(h: Tensor, other: Callable[[Tensor], Tensor]) -> Tensor:
    """Write something else over half of the position that was picked."""
    picked = h[:, -1].clone()
    picked[:, :3] = other(h)[:, :3]
    return picked


def added_to(h: Tensor) -> Tensor:
    picked = h[:, -1].clone()
    seen = picked.view(-1, 2, 3)
    picked[:, :3] += h[:, 0, :3]
    return seen.flatten(1)


def two_rows(h: Tensor) -> Tensor:
    rows = torch.zeros(len(h), 2, 6).to(h)
    rows[:, 0], rows[:, 1] = h[:, -1], h[:, 0]
    return rows.sum(1)


def overwritten_before(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, -1] = h[:, 0]
    return h[:, -1]


MOVING: dict[str, Callable[[Tensor], Tensor]] = {
    "reversed": lambda h: h.flip(1)[:, 0],
    "rolled": lambda h: h.roll(1, dims=1)[:, 0],
    "added up": lambda h: h.cumsum(dim=1)[:, -1],
    "convolved": lambda h: F.conv1d(h.mT, torch.ones(6, 1, 3).to(h), padding=1, groups=6).mT[:, 0],
    "averaged": lambda h: F.avg_pool1d(h.mT, 3, 1, 1).mT[:, 0],
    "transformed": lambda h: torch.fft.rfft(h, dim=1).real[:, 0],
    "padded": lambda h: F.pad(h, (0, 0, 1, -1))[:, -1],
    "beside the one before": lambda h: (h + 0.5 * F.pad(h, (0, 0, 1, 0))[:, :-1])[:, -1],
    "put together": lambda h: torch.cat([h[:, 1:], h[:, :1]], dim=1)[:, 0],
    "indexed": lambda h: h[:, ORDER][:, 0],
    "index_select": lambda h: h.index_select(1, ORDER)[:, 0],
    "gathered": lambda h: h.gather(1, ORDER[:, None].expand_as(h))[:, 0],
    "scattered": lambda h: torch.zeros_like(h).scatter(1, ORDER[:, None].expand_as(h), h)[:, 0],
    "stacked": lambda h: torch.stack([h[:, i] for i in ORDER], dim=1)[:, 0],
    "multiplied": lambda h: (MIX @ h)[:, 0],
    "multiplied behind": lambda h: (h.mT @ MIX).mT[:, 0],
    "reversed beside itself": lambda h: (h.flip(1) + h @ HEADS)[:, 0],
    "one layer over positions": lambda h: F.linear(h.mT, MIX).mT[:, -1],
    "off the mean": lambda h: (h - h.mean(dim=1, keepdim=True))[:, 0],
    "off the first": lambda h: (h - h[:, :1] / 2)[:, -1],
    "cut otherwise": lambda h: h.reshape(-1, 6, 5).mT[:, 0],
    "differences": lambda h: h.diff(dim=1, prepend=torch.zeros_like(h[:, :1]))[:, -1],
    "in rows of two": lambda h: F.pad(h, (0, 0, 0, 1)).view(-1, 2, 3, 6).mT.mT.sum(1)[:, -1],
    "turned and back": lambda h: h.flip(1).transpose(1, 2).contiguous().mT[:, 0],
    "written shifted": lambda h: shifted(h)[:, -1],
    "written in part": lambda h: half_reversed(h)[:, 0],
    "overwritten by the first": lambda h: overwritten(h, lambda h: h[:, 0]),
    "overwritten by the mean": lambda h: overwritten(h, lambda h: h.mean(1)),
    "added to": added_to,
    "two rows": two_rows,
    "overwritten before": overwritten_before,
    "channels of as many": lambda h: torch.cat([h[..., :5].mT, h[..., 5:].mT], dim=1).mT[:, 0],
    "turned square": lambda h: F.linear(h[..., :5].mT[:, 0], MIX)[:, [0, 1, 2, 3, 4, 0]],
}


@pytest.mark.parametrize("moving", MOVING)
def test_of_what_functions_moved_other_positions_count_than_the_one_picked(moving: str):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(MOVING[moving](self.a(x)))

    torch.manual_seed(0)
    net = Net().double()
    x = torch.randn(600, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    report = credit_report(net, x.split(100))
    behind = torch.autograd.functional.jacobian(lambda h: net.head(MOVING[moving](h)), x[:1])[0]
    assert report["a"].chain_r2 == pytest.approx(1)
    volume = oracles.log_volume(behind.flatten(1).numpy().T)
    assert report["a"].credit == pytest.approx(volume / 3, abs=1e-6)


def by_heads(h: Tensor) -> Tensor:
    heads = h.view(-1, 5, 2, 3).transpose(1, 2) * torch.tensor([1.0, 2.0]).view(2, 1, 1).to(h)
    return heads.transpose(1, 2).reshape(h.shape)


def rotated(h: Tensor) -> Tensor:
    angles, (a, b) = torch.linspace(0, 1, 5).to(h)[:, None], h.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


def halves_written(h: Tensor) -> Tensor:
    written = torch.zeros_like(h)
    written[..., :3], written[..., 3:] = h[..., 3:], h[..., :3]
    return written


STAYING: dict[str, Callable[[Tensor], Tensor]] = {
    "weighed": lambda h: h * HEADS[0] + HEADS[1],
    "multiplied": lambda h: h + h @ HEADS,
    "a layer": lambda h: F.linear(h, HEADS),
    "summed over channels": lambda h: torch.einsum("btc,cd->btd", h, HEADS),
    "off the mean of channels": lambda h: h + h.mean(dim=-1, keepdim=True),
    "heads": by_heads,
    "rotated": rotated,
    "halves written": halves_written,
    "all in one axis": lambda h: h.reshape(-1, 6).mul(2).view(h.shape),
    "turned and back": lambda h: h.transpose(0, 1).contiguous().mul(2).transpose(0, 1),
    "in place": lambda h: h.clone().mul_(HEADS[0]).add_(h),
    "one of three": lambda h: (h @ HEADS.repeat(1, 3)).view(-1, 5, 3, 6).unbind(2)[1],
    "a norm": lambda h: F.batch_norm(h.mT, HEADS[0], HEADS[1].exp()).mT,
    "samples indexed": lambda h: h[torch.arange(len(h)).flip(0)],
    "samples reversed": lambda h: h.flip(0).mul(2).flip(0),
}


@pytest.mark.parametrize("staying", STAYING)
def test_functions_that_leave_positions_in_place_leave_the_one_picked_alone(staying: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(STAYING[staying](self.a(x))[:, -1])

    torch.manual_seed(0)
    net = Net().double()
    x = torch.randn(600, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    report = credit_report(net, x.split(100))
    behind = torch.func.jacrev(lambda h: net.head(STAYING[staying](h[None])[:, -1])[0])(x[0])[:, -1]
    assert report.widths == (6, 3)
    assert report["a"].chain_r2 == pytest.approx(1)
    assert report["a"].credit == pytest.approx(
        oracles.log_volume(behind.detach().numpy().T) / 3, abs=1e-6
    )


def test_attention_by_a_function_lets_all_positions_count():
    torch.manual_seed(0)
    net = Mixing(lambda h: F.scaled_dot_product_attention(h, h, h)[:, 0])
    assert report_of(net).widths[-2] == MAX_DIM
