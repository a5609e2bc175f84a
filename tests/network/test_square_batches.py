"""Batches of as many samples as positions are those of any other size, whichever of the two is first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from small import wired
from torch import Tensor, nn
from torch.nn.functional import unfold
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_koopman import component_effects, credit_report

T = 8
D = 6

NETWORKS: dict[str, Callable[..., Any]] = {}
"""Networks whose head reads a linear function of the state before it, by what they do with positions."""


def net(make: Callable[..., Any]) -> Callable[..., Any]:
    NETWORKS[make.__name__] = make
    return make


def back(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def head(m: Any, h: Tensor, first: bool) -> Tensor:
    """Read all positions: the state before is told from one with other positions in its places."""
    h = m.high(torch.tanh(h) if m.bends else h)
    return m.out((h if first else back(h)).flatten(1))


def parts(**more: nn.Module) -> dict[str, nn.Module]:
    linear = {"low": nn.Linear(D, D), "high": nn.Linear(D, 4), "out": nn.Linear(4 * T, 3)}
    return {**linear, **more}


def built(run: Callable[..., Tensor], **more: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    model = wired(run, **parts(**{name: make() for name, make in more.items()}))
    model.bends = False
    return model


def start(x: Tensor, first: bool, given: bool) -> Tensor:
    """Bring positions first, unless they are or the samples shall be."""
    return x if first or given else back(x)


@net
def plain(first: bool, given: bool) -> Any:
    return built(lambda m, x: head(m, m.low(start(x, first, given)), first))


@net
def flipped(first: bool, given: bool) -> Any:
    def run(m: Any, x: Tensor) -> Tensor:
        return head(m, m.low(start(x, first, given)).flip(1 if first else 0), first)

    return built(run)


@net
def rolled(first: bool, given: bool) -> Any:
    def run(m: Any, x: Tensor) -> Tensor:
        return head(m, m.low(start(x, first, given)).roll(2, 1 if first else 0), first)

    return built(run)


@net
def picked(first: bool, given: bool) -> Any:
    def run(m: Any, x: Tensor) -> Tensor:
        h, order = m.low(start(x, first, given)), torch.arange(T).roll(3)
        return head(m, h[:, order] if first else h[order], first)

    return built(run)


@net
def shifted(first: bool, given: bool) -> Any:
    """Each position beside the one before it."""

    def run(m: Any, x: Tensor) -> Tensor:
        h, axis = m.low(start(x, first, given)), 1 if first else 0
        one, rest = h.split([1, T - 1], axis)
        return head(m, h - 0.3 * torch.cat([rest, one], axis), first)

    return built(run)


@net
def turned_rnn(first: bool, given: bool) -> Any:
    """Both ways, by hand."""

    def run(m: Any, x: Tensor) -> Tensor:
        h, axis = m.low(start(x, first, given)), 1 if first else 0
        return head(m, m.there(h)[0] + m.again(h.flip(axis))[0].flip(axis), first)

    return built(
        run, there=lambda: nn.RNN(D, D, batch_first=first), again=lambda: nn.RNN(D, D, batch_first=first)
    )


@net
def gru(first: bool, given: bool) -> Any:
    def run(m: Any, x: Tensor) -> Tensor:
        return head(m, m.rnn(m.low(start(x, first, given)))[0], first)

    return built(run, rnn=lambda: nn.GRU(D, D, batch_first=first))


@net
def lstm(first: bool, given: bool) -> Any:
    def run(m: Any, x: Tensor) -> Tensor:
        axis = 1 if first else 0
        return head(m, m.rnn(m.low(start(x, first, given)).flip(axis))[0].flip(axis), first)

    return built(run, rnn=lambda: nn.LSTM(D, D, batch_first=first))


@net
def attention(first: bool, given: bool) -> Any:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.low(start(x, first, given)).flip(1 if first else 0)
        return head(m, h + m.attention(h, h, h)[0], first)

    return built(run, attention=lambda: nn.MultiheadAttention(D, 2, batch_first=first))


@net
def transformer(first: bool, given: bool) -> Any:
    def run(m: Any, x: Tensor) -> Tensor:
        return head(m, m.layer(m.low(start(x, first, given)).flip(1 if first else 0)), first)

    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(D, 2, 12, dropout=0.0, batch_first=first)

    return built(run, layer=layer)


@net
def sorted_samples(first: bool, given: bool) -> Any:
    """Samples that are really in another order between two layers, and positions that are, too."""

    def run(m: Any, x: Tensor) -> Tensor:
        axis = 1 if first else 0
        h = m.low(start(x, first, given)).flip(axis)
        order = h.select(axis, 0)[:, 0].argsort()
        h = h[order] if first else h[:, order]
        h = m.high(torch.tanh(h) if m.bends else h)
        h = h[order.argsort()] if first else h[:, order.argsort()]
        return m.out((h if first else back(h)).flatten(1))

    return built(run)


@net
def sorted_for_good(first: bool, given: bool) -> Any:
    """Samples that stay in another order; nothing needs to bring them back."""

    def run(m: Any, x: Tensor) -> Tensor:
        axis = 1 if first else 0
        h = m.low(start(x, first, given))
        order = h.select(axis, 0)[:, 0].argsort()
        return head(m, h[order] if first else h[:, order], first)

    return built(run)


@net
def sorted_around_rnn(first: bool, given: bool) -> Any:
    """Samples in another order, and positions turned, in a network that says which are first."""

    def run(m: Any, x: Tensor) -> Tensor:
        axis = 1 if first else 0
        h = m.rnn(m.low(start(x, first, given)).flip(axis))[0].flip(axis)
        order = h.select(axis, 0)[:, 0].argsort()
        h = m.high(h.index_select(1 - axis, order)).index_select(1 - axis, order.argsort())
        return m.out((h if first else back(h)).flatten(1))

    return built(run, rnn=lambda: nn.RNN(D, D, batch_first=first))


@net
def flattened(first: bool, given: bool) -> Any:
    """All positions of all samples in one axis between two layers."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.rnn(start(x, first, given))[0]
        h = m.high(m.low(h.reshape(-1, D))).unflatten(0, h.shape[:2])
        return m.out((h if first else back(h)).flatten(1))

    return built(run, rnn=lambda: nn.RNN(D, D, batch_first=first))


@net
def flattened_by_sample(first: bool, given: bool) -> Any:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.rnn(start(x, first, given))[0]
        h = m.high(m.low((h if first else back(h)).reshape(-1, D)))
        return m.out(h.reshape(-1, T * 4))

    return built(run, rnn=lambda: nn.RNN(D, D, batch_first=first))


TURNING = ("turned_rnn", "gru", "lstm", "attention", "transformer", "sorted_around_rnn", "flattened")
"""Those with a module that says that samples are second: batches may be so, too."""


def sequences(given: bool, sizes: Sequence[int]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), T, D, generator=draw)
    return [part.transpose(0, 1).contiguous() if given else part for part in x.split(sizes)]


# As many samples as positions at the beginning, and at the end alone.
SIZES = {"first": (T, T, *(40,) * 12), "last": (*(40,) * 12, T)}
CASES = [(name, False) for name in NETWORKS] + [(name, True) for name in TURNING]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("name", "given"), CASES)
def test_positions_first_are_those_of_samples_first(name, given, sizes):
    make = NETWORKS[name]
    report = credit_report(make(False, given), sequences(given, sizes))
    twin = credit_report(make(True, False), sequences(False, sizes))
    assert report.components == twin.components
    assert report.n_samples == twin.n_samples == sum(sizes)
    assert report.r2[-1] == pytest.approx(1, abs=1e-5)
    assert report.r2 == pytest.approx(twin.r2, abs=1e-3)
    assert report.credit == pytest.approx(twin.credit, abs=1e-3)
    assert report.notes == twin.notes


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_samples_first_do_not_depend_on_the_size_of_batches(make):
    report, other = (
        credit_report(make(True, False), sequences(False, sizes)) for sizes in ((T,) * 60, (40,) * 12)
    )
    assert report.components == other.components
    assert report.r2[-1] == pytest.approx(1, abs=1e-5)
    assert report.r2 == pytest.approx(other.r2, abs=1e-3)
    assert report.credit == pytest.approx(other.credit, abs=1e-3)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("first", [True, False])
def test_sequences_are_packed_whatever_the_size_of_batches(first, sizes):
    report, other = (packed_report(first, False, split) for split in (sizes, (sum(sizes) // 8,) * 8))
    assert report.components == other.components
    assert report.r2 == pytest.approx(other.r2, abs=1e-3)
    assert report.credit == pytest.approx(other.credit, abs=1e-3)


def test_packed_sequences_of_batches_with_positions_first_are_those_of_samples_first():
    report, twin = (packed_report(False, given, (T,) * 60) for given in (True, False))
    assert report.r2 == pytest.approx(twin.r2, abs=1e-3)
    assert report.credit == pytest.approx(twin.credit, abs=1e-3)


def packed_report(first: bool, given: bool, sizes: Sequence[int]) -> Any:
    def run(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        h = m.low(start(x, first, given))
        packed = pack_padded_sequence(h, lengths, batch_first=first, enforce_sorted=False)
        h, _ = pad_packed_sequence(m.rnn(packed)[0], batch_first=first, total_length=T)
        return head(m, h, first)

    lengths = torch.randint(1, T + 1, (sum(sizes),), generator=torch.Generator().manual_seed(2))
    batches = list(zip(sequences(given, sizes), lengths.split(sizes), strict=True))
    return credit_report(built(run, rnn=lambda: nn.GRU(D, D, batch_first=first)), batches)


def test_effects_know_the_samples_where_positions_are_first():
    kinds = ("skip", "linear")

    def effects(first: bool) -> Any:
        model = flipped(first, False)
        model.bends = True
        return component_effects(model, sequences(False, (T,) * 20), None, kinds, how="both")

    turned, plain = effects(False), effects(True)
    for kind in kinds:
        assert turned.values[kind] == pytest.approx(plain.values[kind], rel=1e-3, abs=1e-6)
        assert turned.predicted[kind] == pytest.approx(plain.predicted[kind], rel=1e-3, abs=1e-6)


def behind_unfollowed(first: bool) -> Any:
    """Windows of one value each, in axes of their own."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.low(x)
        h = unfold(h[None], 1).view_as(h)
        return m.out(m.high(h if first else m.rnn(back(h))[0]).sum(1))

    more = {} if first else {"rnn": nn.RNN(D, D)}
    torch.manual_seed(0)
    return wired(run, low=nn.Linear(D, D), high=nn.Linear(D, 4), out=nn.Linear(4, 3), **more)


NOTE = (
    "samples may be along the first or the second axis of high, which are of one size, and are taken to "
    "be along the first; take batches of another size where they are not"
)


def test_samples_are_said_to_be_taken_first_behind_what_is_not_followed():
    square, other = (
        credit_report(behind_unfollowed(True), sequences(False, (size,) * 40)) for size in (T, 5)
    )
    assert NOTE in square.notes
    assert [note for note in square.notes if note != NOTE] == list(other.notes)


def test_samples_are_not_guessed_where_a_module_has_them_second():
    match = r"'high', of shape \(8, 8, 4\), belong to which of the 8 samples"
    with pytest.raises(ValueError, match=match):
        credit_report(behind_unfollowed(False), sequences(False, (T,) * 20))


def beside(kind: str, given: bool) -> Any:
    """Sequences, and a further tensor of the same samples, which a network takes its own way."""

    def run(m: Any, x: Tensor, c: Tensor) -> Tensor:
        first = not given
        if kind == "rows":
            order = c[:, 0].argsort()
            e = m.mid(m.emb(c)[order])[order.argsort()]
            h = m.rnn(m.low(x))[0] + (e[:, None] if first else e)
            return m.out((h if first else back(h)).flatten(1))
        if kind == "turned":
            e = m.rnn(back(m.emb(c)))[0][-1]
        else:
            lengths = 2 + (c[:, 0, :2] > 0).sum(1)
            packed = pack_padded_sequence(m.emb(c), lengths, batch_first=True, enforce_sorted=False)
            e = m.rnn(packed)[1][-1]
        return m.out(m.low(x).flatten(1)) + m.mid(e)

    rnn = nn.RNN(D, D, batch_first=not given and kind != "turned")
    linear = {"low": nn.Linear(D, D), "emb": nn.Linear(3, D), "out": nn.Linear(T * D, 3)}
    torch.manual_seed(0)
    return wired(run, **linear, rnn=rnn, mid=nn.Linear(D, D if kind == "rows" else 3))


@pytest.mark.parametrize(("kind", "given"), [("rows", True), ("turned", False), ("packed", False)])
def test_further_tensors_have_the_samples_first_in_batches_of_whatever_size(kind, given):
    draw = torch.Generator().manual_seed(3)
    shape = (480, 3) if kind == "rows" else (480, 5, 3)
    c = torch.randn(shape, generator=draw)
    reports = []
    for turned, split in ((given, (T,) * 60), (False, (40,) * 12)):
        torch.manual_seed(0)
        batches = list(zip(sequences(turned, split), c.split(split), strict=True))
        reports.append(credit_report(beside(kind, turned), batches))
    report, other = reports
    assert report.components == other.components
    assert report.r2 == pytest.approx(other.r2, abs=1e-3)
    assert report.credit == pytest.approx(other.credit, abs=1e-3)
    assert report.notes == other.notes
