"""Rows that a network sorts, shuffles or turns are those of their samples again, or are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import wired
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, conv1d, dropout, embedding, interpolate, pad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_koopman import credit_report
from lightning_koopman.network.axes.row_order import RowOrders
from lightning_koopman.network.flow.dataflow import DataFlow

BETWEEN: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {}
"""How a middle layer is given rows in another order, and what it gives is brought back."""


def way(run: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    BETWEEN[run.__name__] = run
    return run


def sorts(x: Tensor) -> Tensor:
    return x[:, 0].argsort()


@way
def index(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    p = sorts(x)
    return b(h[p])[p.argsort()]


@way
def index_select(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    p = sorts(x)
    return b(h.index_select(0, p)).index_select(0, p.argsort())


@way
def gather(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    p = sorts(x)[:, None].expand_as(h)
    return b(h.gather(0, p)).gather(0, p.argsort(0))


@way
def scatter(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    p = sorts(x)[:, None].expand_as(h)
    return torch.zeros_like(h).scatter(0, p, b(h.gather(0, p)))


@way
def index_put(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    p, y = sorts(x), torch.empty_like(h)
    y[p] = b(h[p])
    return y


@way
def index_add(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    p = sorts(x)
    return torch.zeros_like(h).index_add(0, p, b(h[p]))


@way
def index_copy(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    p = sorts(x)
    return torch.zeros_like(h).index_copy_(0, p, b(h[p]))


@way
def embedded(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    p = sorts(x)
    return embedding(p.argsort(), b(embedding(p, h)))


@way
def flip(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return b(h.flip(0)).flip(0)


@way
def roll(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return b(h.roll(1, 0)).roll(-1, 0)


@way
def slices(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    z = b(torch.cat([h[-7:], h[:-7]]))
    return torch.cat([z[7:], z[:7]])


@way
def single_rows(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    order = sorted(range(len(x)), key=x[:, 0].tolist().__getitem__)
    z = b(torch.stack([h[i] for i in order])).unbind()
    return torch.stack([z[order.index(i)] for i in range(len(x))])


@way
def single_rows_with_an_axis(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    order = sorts(x).tolist()
    z = b(torch.cat([h[i][None] for i in order]))
    return torch.vstack([z[order.index(i)] for i in range(len(x))])


@way
def single_columns(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    order, turned = sorts(x).tolist(), h.t()
    z = b(torch.stack([turned[:, i] for i in order], 1).t()).t()
    return torch.stack([z[:, order.index(i)] for i in range(len(x))])


@way
def index_second(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    p = sorts(x)
    return b(h.t()[:, p].t())[p.argsort()]


@way
def index_third_of_four(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    p = sorts(x)
    return b(h[None, None][:, :, p][0, 0]).t()[:, p.argsort()].t()


@way
def gather_second(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    p = sorts(x).expand(h.shape[::-1])
    return torch.zeros_like(h.t()).scatter(1, p, b(h.t().gather(1, p).t()).t()).t()


@way
def flip_second(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return b(h.t().flip(1).t()).t().flip(0, 1).flip(0).t()


@way
def roll_second(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return b(h.t().roll((0, 1), (0, 1)).t()).t().roll(-1, 1).t()


@way
def slices_second(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    z = b(torch.cat(h.t().split([7, len(h) - 7], 1)[::-1], 1).t()).t()
    return torch.cat([z[:, -7:], z[:, :-7]], 1).t()


@way
def interleaved(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    y, half = torch.empty_like(h), len(h) // 2
    y[::2], y[1::2] = h[half:], h[:half]
    z, y = b(y), torch.empty_like(h)
    y[half:], y[:half] = z[::2], z[1::2]
    return y


@way
def two_in_one(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    y, p = h.new_empty(len(h), 2, h.shape[1]), sorts(x)
    y[:, 0], y[:, 1] = h[p], -h[p]
    return b(y[:, 0])[p.argsort()]


@way
def rot90(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return b(h.rot90(2).flip(1)).flip(1).rot90(-2)


@way
def rot90_to_columns(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return b(h.rot90(-1).t()).t().rot90(1)


@way
def flat_roll(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return b(h.flatten().roll(12).view_as(h)).roll(-12)


@way
def flat_flip(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return b(h.flatten().flip(0).view_as(h).flip(1)).flip(0)


@way
def flat_index(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    p, units = sorts(x), torch.arange(h.shape[1])
    z = b(h.flatten()[(p[:, None] * h.shape[1] + units).flatten()].view_as(h))
    return z.view(-1)[p.argsort()[:, None] * h.shape[1] + units]


@way
def take(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    p, units = sorts(x), torch.arange(h.shape[1])
    z = b(h.take((p[:, None] * h.shape[1] + units).flatten()).view_as(h))
    return z.take(p.argsort()[:, None] * h.shape[1] + units)


@way
def put(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    places = sorts(x)[:, None] * h.shape[1] + torch.arange(h.shape[1])
    return torch.zeros_like(h).put_(places, b(h.take(places)))


@way
def halves(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    z = b(h.view(2, -1, h.shape[1]).flip(0).reshape(h.shape))
    return z.view(2, -1, h.shape[1]).flip(0).reshape(h.shape)


@way
def halves_stacked(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    one, two = h.view(2, -1, h.shape[1])
    one, two = b(torch.stack([two, one]).view_as(h)).view(2, -1, h.shape[1])
    return torch.cat([two, one])


@way
def neighbours(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    z = b(h.view(-1, 2, h.shape[1]).flip(1).reshape(h.shape))
    return z.view(-1, 2, h.shape[1])[:, [1, 0]].reshape(h.shape)


@way
def slice_scatter(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    y = torch.zeros_like(h).slice_scatter(h[-7:], 0, 0, 7).slice_scatter(h[:-7], 0, 7)
    return b(y).roll(-7, 0)


@way
def select_scatter(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    for i in range(len(h)):
        y = y.select_scatter(h[i], 0, len(h) - 1 - i)
    return b(y).flip(0)


@way
def masked_scatter(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return h.new_zeros(h.shape).masked_scatter(torch.ones_like(h) > 0, b(h.flip(0)).flatten()).flip(0)


@way
def product(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    order = torch.eye(len(h))[sorts(x)]
    return order.t() @ b(order @ h)


@way
def product_from_the_right(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    order = torch.eye(len(h)).roll(3, 0)
    return torch.einsum("ij,jk->ik", order.t(), b((h.t() @ order.t()).t()))


@way
def sparse_product(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    order = torch.eye(len(h))[sorts(x)].to_sparse()
    return torch.sparse.mm(order.t(), b(torch.sparse.mm(order, h)))


@way
def strided(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    n, d = h.shape
    z = b(torch.cat([h.as_strided((n - 3, d), (d, 1), 3 * d), h[:3]]))
    return torch.cat([z[-3:], z.as_strided((n - 3, d), (d, 1))])


@way
def different_rows(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return b(torch.unique(h, dim=0))


@way
def never_back(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return b(h[sorts(x)])


@way
def sorted_twice(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return b(h[sorts(x)][x[:, 1].argsort()])


@way
def at_random(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return b(h[torch.randperm(len(h))])


def network(between: Callable[[nn.Module, Tensor, Tensor], Tensor], width: int = 4) -> Any:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(between(m.b, m.a(x), x))

    torch.manual_seed(0)
    return wired(run, a=nn.Linear(4, width), b=nn.Linear(width, width), c=nn.Linear(width, 4))


def plain(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return b(h)


def samples(n: int = 300) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_a_linear_layer_is_linear_in_whatever_order_its_rows_are(between):
    # The last batch is smaller than the others.
    model, batches = network(between), samples().split(64)
    report = credit_report(model, batches)
    expected = credit_report(network(plain), batches)
    assert report.r2[1:] == pytest.approx(1, abs=1e-6)
    assert report.credit == pytest.approx(expected.credit, abs=1e-5)
    assert report.notes == expected.notes
    # By hand: the last two layers are square matrices.
    weights = [torch.linalg.slogdet(part.weight.double())[1].item() for part in (model.b, model.c)]
    assert report.gain[1:] == pytest.approx([w / 4 for w in weights], abs=1e-3)


def by_halves(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    m = x[:, 0] > 0
    z, y = b(torch.cat([h[m], h[~m]])), torch.empty_like(h)
    y[m], y[~m] = z[: m.sum()], z[m.sum() :]
    return y


def by_buffer(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    m, y = x[:, 0] > 0, torch.empty_like(h)
    y[: m.sum()], y[m.sum() :] = h[m], h[~m]
    return b(y)


def by_masks(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    m = x[:, :1] > 0
    z = b(torch.cat([h[m[:, 0]], h[~m[:, 0]]]))
    z, w = z.split([int(m.sum()), int((~m).sum())])
    return torch.zeros_like(h).masked_scatter(m, z).masked_scatter(~m, w)


def by_selections(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    m = (x[:, :1] > 0).expand_as(h)
    z, n = b(torch.cat([h.masked_select(m), h[~m]]).view_as(h)), int(m[:, 0].sum())
    return torch.zeros_like(h).masked_scatter(m, z[:n]).masked_scatter(~m, z[n:])


def by_values(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    v, p = x[:, 0].sort()
    return b(h[p] + v[:, None])[p.argsort()]


def test_rows_beside_themselves_in_another_order_are_those_of_their_samples():
    """In all batches, though none of the states is an order of the samples."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        h, p = m.a(x), sorts(x)
        own, other = m.b(torch.cat([h, h[p]])).chunk(2)
        return m.c(own + 2 * other[p.argsort()])

    torch.manual_seed(0)
    model = wired(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 3))
    report = credit_report(model, samples().split(60))
    assert report.components == ("a", "b", "c")
    assert report.r2 == pytest.approx(1, abs=1e-6)


def by_largest(b: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    v, p = x[:, 0].topk(len(x))
    return b(torch.cat([h[p][:, 1:], v[:, None]], 1))[p.argsort()]


@pytest.mark.parametrize("how", ["chunk", "repeat", "index"])
def test_rows_of_one_of_two_views_are_those_of_their_samples(how):
    """Where the network puts one of the views in another order between two layers."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        h, p = m.a(x), sorts(x)
        both = m.b(h.repeat(2, 1) if how == "repeat" else torch.cat([h, -h]))
        one = both[p + len(x)] if how == "index" else both.chunk(2)[1][p]
        return m.c(m.d(one)[p.argsort()])

    torch.manual_seed(0)
    parts = {name: nn.Linear(4, 4) for name in "abd"}
    report = credit_report(wired(run, **parts, c=nn.Linear(4, 3)), samples().split(60))
    assert report.components == ("a", "b", "d", "c")
    assert report.r2 == pytest.approx(1, abs=1e-6)


BY_VALUES = [by_halves, by_buffer, by_masks, by_selections, by_values, by_largest]


@pytest.mark.parametrize("between", BY_VALUES)
@pytest.mark.parametrize("first", ["mixed", "sorted"])
def test_rows_that_their_values_chose_are_those_of_their_samples(between, first):
    """Also where they say nothing in the first batch, and are in order there."""
    x = samples()
    if first == "sorted":
        head = x[:64]
        x = torch.cat([head[head[:, 0].argsort(descending=between is not by_values)], x[64:]])
    report = credit_report(network(between), x.split(64))
    assert report.r2[1:] == pytest.approx(1, abs=1e-6)
    assert not any("dead" in note or note.startswith("rows of") for note in report.notes)


def recurrent(kind: Callable[..., nn.Module], first: bool, takes: str, by_hand: bool) -> Any:
    """A network on sequences of unlike lengths, which sorts its batch itself or lets torch do so."""

    def run(m: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        e = m.emb(x)
        if by_hand:
            lengths, p = lengths.sort(descending=True, stable=True)
            e = e[p]
        e = e if first else e.transpose(0, 1)
        packed = pack_padded_sequence(e, lengths, batch_first=first, enforce_sorted=by_hand)
        out, state = m.rnn(packed)
        state = state[0] if kind is nn.LSTM else state
        z = state[-1]
        if takes == "outputs":
            out, lengths = pad_packed_sequence(out, batch_first=first)
            z = out.sum(1 if first else 0) / lengths[:, None]
        z = m.mid(z)
        return m.out(z[p.argsort()] if by_hand else z)

    torch.manual_seed(0)
    rnn = kind(4, 8, 2, batch_first=first)
    return wired(run, emb=nn.Linear(3, 4), rnn=rnn, mid=nn.Linear(8, 6), out=nn.Linear(6, 2))


# With batches of eight, several steps of few sequences have as many rows as there are samples.
@pytest.mark.parametrize(
    ("kind", "first", "takes", "size"),
    [
        (nn.LSTM, True, "state", 8),
        (nn.LSTM, False, "state", 40),
        (nn.LSTM, True, "outputs", 40),
        (nn.LSTM, False, "outputs", 8),
        (nn.GRU, False, "state", 8),
        (nn.GRU, True, "outputs", 8),
    ],
)
def test_sequences_sorted_by_hand_are_those_that_torch_sorts(kind, first, takes, size):
    draw = torch.Generator().manual_seed(2)
    x, lengths = torch.randn(120, 5, 3, generator=draw), torch.randint(1, 6, (120,), generator=draw)
    batches = list(zip(x.split(size), lengths.split(size), strict=True))
    report, expected = (
        credit_report(recurrent(kind, first, takes, by), batches) for by in (True, False)
    )
    assert report.components == expected.components
    assert report.r2 == pytest.approx(expected.r2, abs=1e-4)
    assert report.credit == pytest.approx(expected.credit, abs=1e-3)
    assert report.notes == expected.notes
    assert report.r2[-1] > 1 - 1e-6


@pytest.mark.parametrize("how", ["embedding", "index"])
def test_what_a_table_holds_is_in_the_order_of_the_numbers(how):
    def run(m: nn.Module, ids: Tensor, x: Tensor) -> Tensor:
        p = x[:, 0].argsort()
        e = m.table.weight[ids[p]] if how == "index" else m.table(ids[p])
        return m.c(torch.cat([m.a(e), m.b(x[p])], 1))

    torch.manual_seed(0)
    parts = {"table": nn.Embedding(40, 4), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    x, ids = samples(), torch.arange(300) % 40
    batches = list(zip(ids.split(60), x.split(60), strict=True))
    report = credit_report(wired(run, **parts, c=nn.Linear(8, 3)), batches)
    assert report.r2[-1] == pytest.approx(1, abs=1e-6)


MEETS = "rows of several samples meet in {}, and operators see one of them, so what the others do counts"


@pytest.mark.parametrize("how", ["beside", "added", "nearest", "by_column"])
def test_rows_of_several_samples_are_told_where_they_meet(how):
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        other = h.roll(1, 0)
        if how == "nearest":
            other = h[(torch.cdist(h, h) + 1e9 * torch.eye(len(h))).argmin(1)]
        elif how == "by_column":
            other = h.gather(0, h.detach().argsort(0))
        return m.c(m.b(torch.cat([h, other], 1) if how == "beside" else torch.cat([h + other, h], 1)))

    torch.manual_seed(0)
    model = wired(run, a=nn.Linear(4, 4), b=nn.Linear(8, 6), c=nn.Linear(6, 3))
    report = credit_report(model, samples().split(64))
    # What is behind reads rows that each have their place, and is not named.
    assert [note for note in report.notes if note.startswith("rows of")] == [
        MEETS.format("b") + " as unexplained and as nonlinear"
    ]
    assert report.r2[1] < 0.95
    assert report.r2[2] == pytest.approx(1, abs=1e-6)


def test_rows_and_rolled_ones_in_one_call_are_two_states_of_each_sample():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x)
        own, other = m.b(torch.cat([h, h.roll(1, 0)])).chunk(2)
        return m.c(own - other)

    torch.manual_seed(0)
    model = wired(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 3))
    report = credit_report(model, samples().split(64))
    assert report.r2[1] == pytest.approx(1, abs=1e-6)
    assert [note for note in report.notes if note.startswith(MEETS.format("c"))]


def test_a_mixed_input_is_an_input():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.b(m.a(0.7 * x + 0.3 * x.roll(1, 0)))

    torch.manual_seed(0)
    report = credit_report(wired(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), samples().split(64))
    assert report.r2 == pytest.approx(1, abs=1e-6)
    assert not [note for note in report.notes if note.startswith("rows of")]


ADDED = [
    "stable",
    "product",
    "sparse",
    "from_the_right",
    "running",
    "by_column",
    "solved",
    "solved_turned",
]
WINDOWS = ["windows", "strided_windows", "convolved", "pooled", "all_around", "transformed", "resized"]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("how", ADDED + WINDOWS)
def test_rows_of_several_samples_are_told_where_something_adds_or_compares_them(how):
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h, n = torch.tanh(m.a(x)), len(x)
        mean = torch.ones(n, n).tril().softmax(1)
        z = {
            "product": lambda: mean @ h,
            "sparse": lambda: torch.sparse.mm(mean.to_sparse_csr(), h),
            "from_the_right": lambda: (h.t() @ mean.t()).t(),
            "running": lambda: h.cumsum(0),
            "by_column": lambda: h.sort(0).values,
            "stable": lambda: h.sort(stable=True, dim=0).values,
            "solved": lambda: torch.linalg.solve(torch.eye(n).roll(1, 0), h),
            "solved_turned": lambda: torch.linalg.solve(torch.eye(n).roll(1, 0), h.t(), left=False).t(),
            "windows": lambda: pad(h, (0, 0, 1, 1)).unfold(0, 3, 1).mean(2),
            "strided_windows": lambda: (
                pad(h, (0, 0, 0, 1)).as_strided((n, 2, h.shape[1]), (h.shape[1],) * 2 + (1,)).sum(1)
            ),
            "convolved": lambda: conv1d(h.t(), torch.ones(4, 1, 3) / 3, padding=1, groups=4).t(),
            "transformed": lambda: torch.fft.fft(h, dim=0).real,
            "resized": lambda: interpolate(h.t()[None], scale_factor=0.5)[0].t().repeat(2, 1),
            "pooled": lambda: avg_pool1d(h.t(), 3, 1, 1).t(),
            "all_around": lambda: pad(h.t()[None], (0, 2), mode="circular")[0, :, 2:].t(),
        }[how]()
        return m.c(m.b(z))

    torch.manual_seed(0)
    model = wired(run, a=nn.Linear(4, 4), b=nn.Linear(4, 6), c=nn.Linear(6, 3))
    report = credit_report(model, samples().split(60))
    assert report.notes == (MEETS.format("b") + " as unexplained and as nonlinear",)
    assert report.r2[1] < 0.5
    assert report.r2[2] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("how", ["padded", "product", "repeated"])
def test_rows_that_take_the_place_of_others_are_left_out_and_what_they_lead_to_is_told(how):
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        if how == "padded":
            h = pad(h, (0, 0, 3, -3))
        elif how == "product":
            h = torch.eye(len(h))[torch.arange(len(h)) // 2] @ h
        else:
            h = h.repeat_interleave(2, 0)[: len(h)]
        return m.c(m.b(h))

    torch.manual_seed(0)
    model = wired(run, a=nn.Linear(4, 4), b=nn.Linear(4, 6), c=nn.Linear(6, 3))
    report = credit_report(model, samples().split(60))
    assert report.notes == (
        "without one row for each of 60 samples, so left out: b (60, 6)",
        MEETS.format("c") + " as unexplained and as nonlinear",
    )


@pytest.mark.parametrize("how", ["roll", "flip", "window", "pad", "put", "chosen"])
def test_positions_that_are_moved_leave_samples_where_they_are(how):
    def moved(h: Tensor) -> Tensor:
        n, s, d = h.shape
        if how == "roll":
            return h.roll((1, 2), (1, 2))
        if how == "flip":
            return h.view(n * 2, s // 2, d).flip(1).view(n, s, d)
        if how == "window":
            return (
                h
                .view(n, 2, s // 2, d)
                .transpose(1, 2)
                .reshape(n * s // 2, 2, d)
                .rot90(1, (1, 2))
                .reshape(n, s, d)
            )
        if how == "pad":
            return pad(h, (1, -1, 1, -1))
        if how == "put":
            return (
                torch
                .zeros_like(h)
                .slice_scatter(h[:, 1:], 1, 0, s - 1)
                .select_scatter(h[:, 0], 1, s - 1)
            )
        return h[torch.arange(n)[:, None], torch.arange(s).flip(0)]

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(moved(m.b(moved(m.a(x)))))

    torch.manual_seed(0)
    model = wired(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 3))
    x = torch.randn(240, 6, 4, generator=torch.Generator().manual_seed(1))
    # As many positions as samples are in the last batch.
    report = credit_report(model, [*x[:234].split(26), x[234:]], components=["a", "b", "c"])
    assert report.n_samples == 240
    assert report.r2 == pytest.approx(1, abs=1e-6)
    assert not [note for note in report.notes if "rows" in note or "order" in note]


@pytest.mark.parametrize("size", [6, 50])
@pytest.mark.parametrize("how", ["samples", "within", "roll", "roll_all", "turned", "product"])
def test_rows_of_which_each_sample_has_several_are_followed_as_a_whole(how, size):
    """Also as many as there are samples."""

    def moved(h: Tensor, x: Tensor) -> Tensor:
        n, s, d = h.shape
        rows, order = h.flatten(0, 1), x[:, 0, 0].argsort()
        return {
            "samples": lambda: rows[(order[:, None] * s + torch.arange(s)).flatten()].view(n, s, d),
            "within": lambda: rows.view(n, s, d).flip(1).flatten(0, 1).view(n, s, d),
            "roll": lambda: rows.roll(2 * s, 0).view(n, s, d),
            "roll_all": lambda: h.roll(s * d),
            "turned": lambda: h.rot90(2, (0, 1)),
            "product": lambda: torch.einsum("mn,nsd->msd", torch.eye(n).flip(0), h),
        }[how]()

    torch.manual_seed(0)
    model = wired(
        lambda m, x: m.c(m.b(moved(m.a(x), x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 3)
    )
    x = torch.randn(600, 6, 4, generator=torch.Generator().manual_seed(1))
    report = credit_report(model, x.split(size), components=["a", "b", "c"])
    assert report.n_samples == 600
    assert report.r2 == pytest.approx(1, abs=1e-6)


def test_rows_of_several_samples_that_take_one_place_are_told():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        n, s, _ = x.shape
        rows = m.a(x).flatten(0, 1)[x[..., 0].flatten().argsort()]
        return m.c(m.b(rows.view(n, s, 4)))

    torch.manual_seed(0)
    model = wired(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 3))
    x = torch.randn(600, 6, 4, generator=torch.Generator().manual_seed(1))
    report = credit_report(model, x.split(50), components=["a", "b", "c"])
    assert report.r2[1] < 0.1
    assert any(note.startswith(MEETS.format("b")) for note in report.notes)


def test_rows_drawn_with_replacement_are_left_out_or_told():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        h = m.b(h[torch.arange(len(h)) // 2]) if m.where == "inside" else m.b(h)
        return m.c(h if m.where == "inside" else h[torch.arange(len(h)) // 2])

    notes = {}
    for where in ("inside", "end"):
        torch.manual_seed(0)
        model = wired(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 3))
        model.where = where
        notes[where] = credit_report(model, samples().split(50)).notes
    assert notes["inside"][0] == "without one row for each of 50 samples, so left out: b (50, 4)"
    assert notes["end"][0].startswith(MEETS.format("c"))


def test_an_input_of_drawn_rows_is_an_input():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.b(m.a(x[torch.arange(len(x)) // 2]))

    torch.manual_seed(0)
    report = credit_report(wired(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), samples().split(50))
    assert report.r2 == pytest.approx(1, abs=1e-6)
    assert not [note for note in report.notes if "rows" in note or "row for" in note]


def test_positions_turned_back_to_front_stay_where_they_are():
    """Along other axes than that of the samples, nothing is undone."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x).transpose(0, 1)
        return m.c(m.b(h.flip(0) if m.turned else h).transpose(0, 1))

    x = torch.randn(200, 7, 4, generator=torch.Generator().manual_seed(1))
    reports = []
    for turned in (True, False):
        torch.manual_seed(0)
        rnn = nn.RNN(4, 4)
        model = wired(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 3), rnn=rnn)
        model.turned = turned
        reports.append(credit_report(model, x.split(20), components=["a", "b", "c"], reduce="last"))
    # The last position of one is made of the first of the other.
    assert reports[1].r2 == pytest.approx(1, abs=1e-6)
    assert reports[0].r2[1] < 0.1


def step(draw: torch.Generator, t: Tensor, key: Tensor, ways: int) -> tuple[Tensor, Tensor]:
    """Put rows in another order, in one of many ways; ``key`` goes with them and decides."""
    n, how = len(t), int(torch.randint(ways, (), generator=draw))
    p = torch.randperm(n, generator=draw)
    k = int(torch.randint(1, n, (), generator=draw))
    both = torch.cat([t, key[:, None]], 1)
    if how == 0:
        both = both[p]
    elif how == 1:
        both = both.flip(0)
    elif how == 2:
        both = both.roll(k, 0)
    elif how == 3:
        both = torch.cat([both[k:], both[:k]])
    elif how == 4:
        m = both[:, 1] > 0
        both = torch.cat([both[m], both[~m]])
    elif how == 5:
        both = torch.zeros_like(both).index_add(0, p, both)
    elif how == 6:
        parts = both.split([k, n - k])
        both = torch.empty_like(both)
        both[p[:k]], both[p[k:]] = parts
    elif how == 7:
        new = torch.empty_like(both)
        new[k:], new[:k] = both[: n - k], both[n - k :]
        both = new
    elif how == 8:
        both = torch.stack(both.unbind()[::-1])
    elif how == 9:
        both = both.unsqueeze(0).expand(3, -1, -1)[:, p].transpose(0, 1)[:, 1]
    elif how == 10:
        new = torch.empty_like(both)
        for i in range(n):
            new[p[i] if k % 2 else int(p[i])] = both[i]
        both = new
    elif how == 11:
        both = both.t().clone().t()[both[:, 1].argsort()].sin().asin()
    elif how == 12:
        both = both.rot90(2).flip(1) if k % 2 else both.rot90(1).flip(0).t().flip(0)
    elif how == 13:
        both = both.roll(k * both.shape[1])
    elif how == 14:
        both = both.flatten()[(p[:, None] * both.shape[1] + torch.arange(both.shape[1])).flatten()]
        both = both.view(n, -1)
    elif how == 15:
        both = torch.zeros_like(both).put(p[:, None] * both.shape[1] + torch.arange(both.shape[1]), both)
    elif how == 16:
        both = torch.eye(n)[p] @ both if k % 2 else (both.t() @ torch.eye(n)[:, p]).t()
    elif how == 17:
        both = torch.sparse.mm(torch.eye(n)[p].to_sparse(), both)
    elif how == 18:
        new = torch.zeros_like(both).slice_scatter(both[n - k :], 0, 0, k)
        both = new.slice_scatter(both[: n - k], 0, k)
    elif how == 19:
        m = (both[:, 1:2] > 0).expand_as(both)
        both = torch.cat([both.masked_select(m), both.masked_select(~m)]).view_as(both)
    elif how == 20 and n % 2 == 0:
        parts = both.view(2, -1, both.shape[1]) if k % 2 else both.view(n // 2, 2, -1)
        both = parts.flip(1 - k % 2).reshape(both.shape)
    elif how == 21:
        both = pad(both[k:], (0, 0, 0, k)) + pad(both[:k], (0, 0, n - k, 0))
    return both[:, :-1], both[:, -1]


# The last: what was cut into equal parts before is cut into others.
@pytest.mark.parametrize(
    ("ways", "seed"),
    [*((12, seed) for seed in [*range(60), 1231]), *((22, seed) for seed in range(120))],
)
def test_orders_are_those_of_rows_that_carry_their_own_numbers(ways, seed):
    draw = torch.Generator().manual_seed(seed)
    n = int(torch.randint(4, 30, (), generator=draw))
    # Small, so that a round trip through the sine changes nothing.
    numbers = torch.arange(n) / 100
    x = torch.cat([numbers[:, None], torch.randn(n, 1, generator=draw).clamp(-1, 1)], 1)
    flow = DataFlow(origins=True)
    flow.label(x, "batch:0")
    flow.begin_axes([x])
    with flow:
        t, key = x, x[:, 1]
        for _ in range(int(torch.randint(1, 6, (), generator=draw))):
            t, key = step(draw, t, key, ways)
        t = t * 1
    assert flow.error is None
    order = flow.orders(t).get(n)
    rows = torch.arange(n) if order is None else order.filled()
    assert order is None or (order.base == n and not order.mixed)
    assert rows.tolist() == (t[:, 0] * 100).round().long().tolist()


def followed(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[DataFlow, Tensor]:
    flow = DataFlow(origins=True)
    flow.label(x, "batch:0")
    flow.begin_axes([x])
    with flow:
        out = run(x)
    assert flow.error is None
    return flow, out


@pytest.mark.parametrize("rows", [slice(4), slice(8), slice(3, None)], ids=str)
@pytest.mark.parametrize("how", ["turned", "taken"])
def test_an_order_is_told_once_of_rows_of_which_each_sample_has_several(rows, how):
    def run(x: Tensor) -> Tensor:
        h = x[torch.tensor([2, 0, 3, 1])].flatten(0, 1)[rows]
        return h.rot90(2) if how == "turned" else h.take(torch.arange(h.numel()).flip(0)).view_as(h)

    # Each entry is the number of its sample.
    flow, out = followed(run, torch.arange(4.0)[:, None, None].expand(4, 3, 2).clone())
    order = flow.orders(out)[len(out)]
    assert (order.rows // (order.base // 4)).tolist() == out[:, 0].tolist()


def test_single_values_that_are_read_and_written_have_no_rows():
    def run(x: Tensor) -> Tensor:
        weights = x.new_zeros(4)
        weights[2], weights[1] = 1, x[0, 0]
        return x @ weights * x.take(torch.tensor(3)) + x.as_strided((), ())

    for n in (5, 1):
        flow, out = followed(run, torch.randn(n, 4))
        assert n not in flow.orders(out)


def test_positions_that_are_sorted_with_those_of_other_samples_are_nowhere():
    x = torch.randn(7, 5)
    for run in (lambda x: x.flatten().sort()[0], lambda x: x.flatten().sort(stable=True)[0]):
        flow, out = followed(run, x)
        assert flow.places(out)[0] is None
    flow, out = followed(lambda x: x.sort()[0], x)
    assert flow.places(out)[0] == (0, 1)


def test_what_no_longer_tells_the_order_ends_the_measurement(monkeypatch):
    passes, begin = [], DataFlow.__enter__

    def enter(self: DataFlow) -> DataFlow:
        passes.append(self)
        return begin(self)

    def follow(self: RowOrders, *given: Any) -> Any:
        if len(passes) > 1:
            raise RuntimeError("no order")
        return own(self, *given)

    own = RowOrders.follow
    monkeypatch.setattr(DataFlow, "__enter__", enter)
    monkeypatch.setattr(RowOrders, "follow", follow)
    with pytest.raises(RuntimeError, match="no order"):
        credit_report(network(index), samples().split(64))


def test_later_passes_are_followed_only_where_rows_are_in_another_order(monkeypatch):
    passes, begin = [], DataFlow.__enter__

    def enter(self: DataFlow) -> DataFlow:
        passes.append(self)
        return begin(self)

    monkeypatch.setattr(DataFlow, "__enter__", enter)
    for between, expected in ((plain, 1), (flip, 5)):
        passes.clear()
        credit_report(network(between), samples().split(64))
        assert len(passes) == expected


@pytest.mark.parametrize("size", [32, 64])
def test_an_experts_share_of_as_many_units_as_samples_is_no_row_per_sample(size):
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.relu(m.inp(x))
        _, taken = m.gate(h).softmax(1).topk(12, dim=0)
        both = (m.one(h[taken[:, 0]]), m.two(h[taken[:, 1]]))
        for i, expert in enumerate(both):
            h = h.index_add(0, taken[:, i], expert)
        return m.out(h)

    torch.manual_seed(0)
    d = 32
    parts = dict(inp=nn.Linear(4, d), gate=nn.Linear(d, 2), one=nn.Linear(d, d), two=nn.Linear(d, d))
    model = wired(run, **parts, out=nn.Linear(d, 2))
    report = credit_report(model, samples(512).split(size))
    left = f"without one row for each of {size} samples, so left out: one (12, 32), two (12, 32)"
    assert left in report.notes
    assert not {"one", "two", "one+two"} & set(report.components)


def test_states_with_the_samples_second_are_found_where_modules_have_them_so():
    class Sums(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return self.line(h).sum(2)

        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(6, 6)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.sums(m.rnn(x.transpose(0, 1))[0]).t())

    torch.manual_seed(0)
    model = wired(run, rnn=nn.RNN(3, 6), sums=Sums(), out=nn.Linear(5, 2))
    x = torch.randn(300, 5, 3, generator=torch.Generator().manual_seed(1))
    report = credit_report(model, x.split(20), components=["rnn", "sums", "out"])
    assert report.r2[-1] == pytest.approx(1, abs=1e-6)


NOISE = "random numbers go into"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_dropout_that_is_off_draws_nothing_of_nested_tensors_either():
    def run(m: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1])[None] >= lengths[:, None]
        h = m.encoder(m.emb(x), src_key_padding_mask=padding)
        h = dropout(h, training=True) if m.drops else h
        return m.out(h.sum(1))

    draw = torch.Generator().manual_seed(1)
    x, lengths = torch.randn(240, 5, 6, generator=draw), torch.randint(2, 6, (240,), generator=draw)
    lengths[::40] = 5
    notes = {}
    for drops in (False, True):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
        encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)
        model = wired(run, emb=nn.Linear(6, 16), encoder=encoder, out=nn.Linear(16, 2)).eval()
        model.drops = drops
        batches = list(zip(x.split(40), lengths.split(40), strict=True))
        notes[drops] = [n for n in credit_report(model, batches).notes if n.startswith(NOISE)]
    assert notes[False] == []
    assert notes[True]


@pytest.mark.parametrize("parts", [2, 4])
def test_samples_that_are_put_in_each_others_place_by_axes_are_told(parts: int):
    def turned(h: Tensor, first: int) -> Tensor:
        return h.view(first, len(h) // first, -1).transpose(0, 1).reshape(len(h), -1)

    def run(m: Any, x: Tensor) -> Tensor:
        h = turned(m.inner(turned(m.first(x).tanh(), parts)), len(x) // parts)
        return m.last(h)

    layers = {"first": nn.Linear(6, 8), "inner": nn.Linear(8, 8), "last": nn.Linear(8, 3)}
    batches = torch.randn(800, 6).split(40)
    report = credit_report(wired(run, **layers), batches, max_samples=None)
    assert report.reads == {"first": ("input",), "last": ("first",)}
    plain = wired(lambda m, x: m.last(m.inner(m.first(x).tanh())), **layers)
    expected = credit_report(plain, batches, components=["first", "last"], max_samples=None)
    assert report.r2 == pytest.approx(expected.r2, abs=1e-9)
    note = "the network puts samples in another order, in a way that is not followed, so left out: inner"
    assert note in report.notes
