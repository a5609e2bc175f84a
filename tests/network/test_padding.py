"""Which masks and lengths of a batch are about which states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_koopman import CreditReport, Options, component_effects, credit_report
from lightning_koopman.network.axes.padding import valid_outputs, valid_positions

N, T = 300, 8


def padded(n_positions: int, seed: int, *, is_left: bool = False) -> tuple[Tensor, Tensor]:
    """Return samples that zeros are padded with, and which positions hold data."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, n_positions, 4, generator=generator, dtype=torch.float64)
    lengths = torch.randint(2, n_positions + 1, (N, 1), generator=generator)
    valid = torch.arange(n_positions) < lengths
    valid = valid.flip(1) if is_left else valid
    return torch.where(valid[..., None], x, 0), valid


def mean_of(x: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid[..., None], x, 0).sum(1) / valid.sum(1, keepdim=True)


class TwoSides(nn.Module):
    """Linear layers on two sequences; the second one is given the mean of the first one's data.

    Means over each one's own data are linear in one another, and over other positions they are not.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.mix, self.out = (nn.Linear(4, 4) for _ in range(4))
        self.double()

    def forward(self, src: Tensor, tgt: Tensor, src_valid: Tensor, **_: Tensor) -> Tensor:
        context = mean_of(self.a(src), src_valid)
        return self.out(self.mix(self.b(tgt) + context[:, None]))


class TimeFirst(TwoSides):
    def forward(self, src: Tensor, tgt: Tensor, src_valid: Tensor, **_: Tensor) -> Tensor:
        context = mean_of(self.a(src.transpose(0, 1)).transpose(0, 1), src_valid)
        return self.out(self.mix(self.b(tgt.transpose(0, 1)) + context)).transpose(0, 1)


def report_of(net: nn.Module, masks: dict[str, Tensor], size: int = 60, **given: Tensor) -> CreditReport:
    named = {**given, **masks}
    batches = [
        dict(zip(named, parts, strict=True))
        for parts in zip(*(tensor.split(size) for tensor in named.values()), strict=True)
    ]
    return credit_report(net, batches, options=Options(reduce="mean", tikhonov=1e-8))


@pytest.mark.parametrize("kind", [TwoSides, TimeFirst])
@pytest.mark.parametrize("n_second", [T, T + 3])
@pytest.mark.parametrize("names", ["src_mask, tgt_mask", "tgt_mask, src_mask", "src_len, tgt_pad_mask"])
def test_each_state_has_the_mask_of_its_own_positions(kind: Any, n_second: int, names: str) -> None:
    (src, of_src), (tgt, of_tgt) = padded(T, 0), padded(n_second, 1)
    # Lengths are known where they are as long as the positions.
    of_src[::60] = True
    known = {
        "src_mask": of_src,
        "tgt_mask": of_tgt.long(),
        "src_len": of_src.sum(1),
        "tgt_pad_mask": ~of_tgt,
    }
    masks = {name: known[name] for name in names.split(", ")}
    report = report_of(kind(), masks, src=src, tgt=tgt, src_valid=of_src)
    assert report.r2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("size", [1, 60])
@pytest.mark.parametrize("first", ["padded", "whole", "one"])
@pytest.mark.parametrize("order", [1, -1])
def test_each_state_has_its_own_mask_whatever_the_first_batch_shows(
    size: int, first: str, order: int
) -> None:
    lengths = {"padded": (T - 2, T - 4), "whole": (T, T), "one": (T, T - 4)}[first]
    sides = padded(T, 0), padded(T, 1)
    for (data, valid), length in zip(sides, lengths, strict=True):
        valid[:size] = torch.arange(T) < length
        data[:size] = data[:1].where(valid[:size, :, None], 0) + torch.arange(size)[:, None, None]
        data[:size].masked_fill_(~valid[:size, :, None], 0)
    (source, of_source), (target, of_target) = sides
    # Of what a decoder takes, names of encoders know nothing.
    masks = {"attention_mask": of_source, "decoder_attention_mask": of_target}
    masks = dict([*masks.items()][::order])
    net = wired(
        lambda m, ids, decoder_ids, valid, **_: m.inner(ids, decoder_ids, valid), inner=TwoSides()
    )
    report = report_of(net, masks, size, ids=source, decoder_ids=target, valid=of_source)
    assert report.r2 == pytest.approx(1, abs=1e-6)


def test_a_mask_of_one_side_says_nothing_of_the_other() -> None:
    class Averaging(TwoSides):
        def forward(self, src: Tensor, tgt: Tensor, src_valid: Tensor, **_: Tensor) -> Tensor:
            context = mean_of(self.a(src), src_valid)
            return self.out(self.mix(self.b(tgt) + context[:, None]).mean(1))

    (src, of_src), (tgt, _) = padded(T, 0), padded(T, 1)
    report = report_of(Averaging(), {"src_mask": of_src}, src=src, tgt=tgt, src_valid=of_src)
    assert report.r2 == pytest.approx(1, abs=1e-6)


def test_a_mask_is_about_what_is_padded_whatever_else_has_as_many_positions() -> None:
    """Numbers of positions are no data, nor are targets that are padded as the data are."""
    src, of_src = padded(T, 0, is_left=True)
    further = {"labels": torch.where(of_src, 1, -100), "place": torch.arange(T).expand(N, T)}
    given = {**further, "src": src, "tgt": src, "src_valid": of_src}
    report = report_of(TwoSides(), {"mask": of_src}, **given)
    assert report.r2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("is_shown", [True, False])
def test_a_mask_of_what_is_to_be_predicted_is_not_of_padding_beside_one_that_is(is_shown: bool) -> None:
    (src, of_src), drawn = padded(T, 0), torch.rand(N, T, generator=torch.Generator().manual_seed(4))
    noise = torch.randn(src.shape, generator=torch.Generator().manual_seed(3), dtype=src.dtype)
    src = src if is_shown else torch.where(of_src[..., None], src, noise)
    masks = {"mask": drawn < 0.3, "attention_mask": of_src}
    report = report_of(TwoSides(), masks, src=src, tgt=src, src_valid=of_src)
    assert report.r2 == pytest.approx(1, abs=1e-6)


def test_padding_that_no_tensor_shows_is_left_out_as_the_mask_says() -> None:
    src, of_src = padded(T, 0)
    noise = torch.randn(src.shape, generator=torch.Generator().manual_seed(3), dtype=src.dtype)
    src = torch.where(of_src[..., None], src, noise)
    report = report_of(TwoSides(), {"mask": of_src}, src=src, tgt=src, src_valid=of_src)
    assert report.r2 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["src_mask", "other"])
def test_lengths_of_packed_sequences_are_not_those_of_what_is_beside_them(name: str) -> None:
    """What a GRU gives has lengths of its own, where the batch has a mask, too."""

    class Beside(TwoSides):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 4, batch_first=True).double()

        def forward(self, src: Tensor, tgt: Tensor, src_valid: Tensor, **_: Tensor) -> Tensor:
            lengths = src_valid.sum(1)
            packed = pack_padded_sequence(src, lengths, batch_first=True, enforce_sorted=False)
            context = self.rnn(packed)[1][-1]
            return self.out(self.mix(self.b(tgt) + context[:, None]))

    (src, of_src), (tgt, _) = padded(T, 0), padded(T, 1)
    report = report_of(Beside(), {name: of_src}, src=src, tgt=tgt, src_valid=of_src)
    # All of the positions beside it are averaged.
    r2 = dict(zip(report.components, report.r2, strict=True))
    assert [r2[part] for part in ("mix", "out")] == pytest.approx([1, 1], abs=1e-6)


class LastOfPacked(nn.Module):
    """Goes on with the last hidden state alone: what was packed itself is read by nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.rnn = nn.Linear(4, 4), nn.RNN(4, 4, batch_first=True)
        self.mid, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.emb(x), n, batch_first=True, enforce_sorted=False)
        return self.out(self.mid(self.rnn(packed)[1][-1]))


@pytest.mark.parametrize("size", [N, 30, 7])
def test_lengths_of_packed_sequences_count_in_every_batch(size: int) -> None:
    """Whatever stands where there is no data, and though none of the chain's states is packed."""
    x, valid = padded(T, 0)
    lengths, noise = valid.sum(1), torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    filled, net = torch.where(valid[..., None], x, noise.double()), LastOfPacked().double()
    report = credit_report(net, list(zip(filled.split(size), lengths.split(size), strict=True)))
    named = [{"x": a, "lengths": b} for a, b in zip(x.split(size), lengths.split(size), strict=True)]
    told = credit_report(net, named, forward_fn=lambda net, batch: net(batch["x"], batch["lengths"]))
    assert report.components == told.components == ("emb", "rnn", "mid", "out")
    assert report.r2 == pytest.approx(told.r2, abs=1e-6)
    assert report.r2[1] > 0.75
    assert report.credit == pytest.approx(told.credit, abs=1e-6)


def test_lengths_of_packed_sequences_are_not_those_of_longer_data_beside_them() -> None:
    def run(net: nn.Module, batch: Any) -> Tensor:
        x, n, y = batch
        packed = pack_padded_sequence(net.emb(x), n, batch_first=True, enforce_sorted=False)
        return net.mid(net.rnn(packed)[1][-1]) + net.head(net.beside(y).flatten(1))

    x, valid = padded(T, 0)
    y = torch.randn(N, T + 1, 4, generator=torch.Generator().manual_seed(1)).double()
    net = LastOfPacked()
    net.beside, net.head = nn.Linear(4, 4), nn.Linear(4 * (T + 1), 4)
    batches = list(zip(x.split(30), valid.sum(1).split(30), y.split(30), strict=True))
    report = credit_report(net.double(), batches, forward_fn=run)
    place = next(i for i, name in enumerate(report.components) if "head" in name)
    assert report.r2[place] == pytest.approx(1, abs=1e-6)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("is_fast", [True, False])
def test_encoders_that_pack_what_they_take_are_read_as_those_that_do_not(is_fast: bool) -> None:
    class Transformer(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, batch_first=batch_first)
            self.out, self.batch_first = nn.Linear(4, 3), batch_first

        def forward(self, src: Tensor, tgt: Tensor, **pad: Tensor) -> Tensor:
            if not self.batch_first:
                src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
            of_src, of_tgt = pad["src_pad_mask"], pad["tgt_pad_mask"]
            masks = {"src_key": of_src, "tgt_key": of_tgt, "memory_key": of_src}
            masks = {f"{name}_padding_mask": mask for name, mask in masks.items()}
            out = self.out(self.body(src, tgt, **masks))
            return out if self.batch_first else out.transpose(0, 1)

    (src, of_src), (tgt, of_tgt) = padded(T, 0), padded(T, 1)
    masks = {"tgt_pad_mask": ~of_tgt, "src_pad_mask": ~of_src}
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(is_fast)
    try:
        first, second = (
            report_of(Transformer(way).double().eval(), masks, src=src, tgt=tgt) for way in (True, False)
        )
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    np.testing.assert_allclose(first.credit, second.credit, atol=1e-6)
    np.testing.assert_allclose(first.r2, second.r2, atol=1e-6)


class Attending(nn.Module):
    """Attention among positions that hold data; gives all positions, their mean, or the last one."""

    def __init__(self, gives: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.gives = gives
        self.double()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        scores = (h @ h.transpose(1, 2)).masked_fill(~mask[:, None], -torch.inf)
        h = torch.tanh(self.b(h + scores.softmax(-1) @ h))
        if self.gives == "mean":
            return self.out(mean_of(h, mask))
        return self.out(h if self.gives == "all" else h[torch.arange(len(h)), mask.sum(1) - 1])


@pytest.mark.parametrize("gives", ["all", "mean", "last"])
@pytest.mark.parametrize("name", ["mask", "lengths"])
def test_padding_further_changes_nothing(gives: str, name: str) -> None:
    """But for how many cells there are, which is told by how many positions there are."""
    x, valid = padded(T, 0)
    x[0], valid[0] = 1.0, True
    net, found = Attending(gives), []
    for more in (0, 5):
        wide, mask = F.pad(x, (0, 0, 0, more)), F.pad(valid, (0, more))
        told = {"mask": mask, "lengths": mask.sum(1)}[name]
        parts = zip(wide.split(60), mask.split(60), told.split(60), strict=True)
        batches = [{"x": a, "valid": b, name: c} for a, b, c in parts]
        options: Any = {"forward_fn": lambda net, batch: net(batch["x"], batch["valid"])}
        report = credit_report(net, batches, options=Options(reduce="mean"), **options)
        found.append((report, component_effects(net, batches, **options)))
    (one, effects), (other, effects_of_other) = found
    assert one.widths == other.widths
    np.testing.assert_allclose(one.credit, other.credit, atol=1e-9)
    np.testing.assert_allclose(one.r2, other.r2, atol=1e-9)
    # Lengths of which none is that of the outputs may be about something else.
    if name == "mask" or gives != "all":
        of_both = (each.values["skip"] for each in (effects, effects_of_other))
        np.testing.assert_allclose(*of_both, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "longest"), [("mask", T - 2), ("lengths", T - 2), ("lengths", T)])
def test_lengths_that_reach_no_last_position_are_not_about_it_and_masks_are(
    name: str, longest: int
) -> None:
    """No data are padded by them here, so that lengths may be about fewer positions."""
    generator = torch.Generator().manual_seed(3)
    src = torch.randn(N, T, 4, generator=generator, dtype=torch.float64)
    valid = torch.arange(T) < torch.randint(2, longest + 1, (N, 1), generator=generator)
    valid[::60, :longest] = True
    told = {"mask": valid, "lengths": valid.sum(1)}[name]
    counted = valid if name == "mask" or longest == T else torch.ones_like(valid)
    report = report_of(TwoSides(), {name: told}, src=src, tgt=src, src_valid=counted)
    assert report.r2 == pytest.approx(1, abs=1e-6)


def test_lengths_of_more_positions_than_a_state_has_are_not_about_it() -> None:
    class Pools(TwoSides):
        def forward(self, src: Tensor, tgt: Tensor, src_valid: Tensor, **_: Tensor) -> Tensor:
            pooled = torch.tanh(self.a(src)).unflatten(1, (T // 2, 2)).mean(2)
            return self.out(self.b(pooled).mean(1))

    src, of_src = padded(T, 0)
    of_src[::60] = True
    report = report_of(Pools(), {"lengths": of_src.sum(1)}, src=src, tgt=src, src_valid=of_src)
    assert dict(zip(report.components, report.r2, strict=True))["out"] == pytest.approx(1, abs=1e-6)


class Placed(nn.Module):
    """Adds a vector of each position to those of tokens, outside of its components."""

    def __init__(self, has_samples: bool) -> None:
        super().__init__()
        self.has_samples = has_samples
        self.tokens, self.places = nn.Embedding(20, 8), nn.Embedding(10, 8)
        self.layer, self.head = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, ids: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        places = torch.arange(ids.shape[1])
        y = self.layer(self.tokens(ids) + self.places(places[None] if self.has_samples else places))
        if lengths is not None:
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return self.head(y.tanh().mean(1) if mask is None else mean_of(y.tanh(), mask.bool()))


@pytest.mark.parametrize("has_samples", [True, False])
@pytest.mark.parametrize("reduce", ["mean", "pool"])
@pytest.mark.parametrize("told_by", ["lengths", "mask"])
@pytest.mark.parametrize("first_is_padded", [True, False])
def test_what_is_added_to_each_position_is_read_where_samples_are_padded_apart(
    told_by: str, reduce: Any, has_samples: bool, first_is_padded: bool
) -> None:
    torch.manual_seed(0)
    net, ids, lengths = (
        Placed(has_samples).eval(),
        torch.randint(1, 20, (900, 10)),
        torch.randint(2, 11, (900,)),
    )
    lengths[::100] = 10
    if not first_is_padded:
        lengths[:200] = 10
    mask = torch.arange(10) < lengths[:, None]
    told = lengths if told_by == "lengths" else mask.long()
    parts = zip((ids * mask).split(100), told.split(100), strict=True)
    batches: list[dict[str, Tensor]] = [{"ids": i, told_by: t} for i, t in parts]
    # Nothing says that a batch is not padded.
    full = [{"ids": ids} for ids in torch.randint(1, 20, (400, 10)).split(100)]
    options = Options(reduce=reduce, errors=False)
    report = credit_report(net, [*batches, *full], options=options, max_samples=None)
    assert report.reads["layer"] == ("tokens+places",)
    assert report.r2[0] == pytest.approx(1, abs=1e-9)
    for given in (full, [{**batch, "mask": torch.ones(100, 10)} for batch in full]):
        whole = credit_report(net, given, options=options)
        assert whole.reads["layer"] == ("tokens",)
        assert whole.notes[0] == "the same for every sample, so left out: places"
    # Of what comes once alone, nothing is read again.
    once = credit_report(net, iter(batches), options=options, max_samples=None)
    left = "the same for every sample of the first batch, so left out, though not in later ones: places"
    assert any(note.startswith(left) for note in once.notes) != first_is_padded


def test_what_is_added_to_each_position_is_read_where_samples_come_one_by_one() -> None:
    torch.manual_seed(0)
    net, ids, lengths = (
        Placed(True).eval(),
        torch.randint(1, 20, (400, 10)),
        torch.randint(2, 11, (400,)),
    )
    mask = (torch.arange(10) < lengths[:, None]).long()
    batches = [{"ids": i, "mask": m} for i, m in zip((ids * mask).split(1), mask.split(1), strict=True)]
    options = Options(reduce="mean", errors=False)
    report = credit_report(net, batches, options=options, max_samples=None)
    assert report.reads["layer"] == ("tokens+places",)
    assert report.r2[0] == pytest.approx(1, abs=1e-9)


class GivenPlaces(Placed):
    """Is given the numbers of positions, and of segments, of which all are of one."""

    def forward(self, ids: Tensor, mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        places = torch.arange(10) if position_ids is None else position_ids
        h = self.tokens(ids) + self.places(places)
        if position_ids is not None:
            h = h + self.tokens(0 * position_ids)
        return mean_of(self.layer(h), mask.bool())


@pytest.mark.parametrize("first_is_padded", [True, False])
def test_positions_that_are_given_count_as_those_that_the_network_has(first_is_padded: bool) -> None:
    torch.manual_seed(0)
    lengths = torch.randint(2, 11, (900,))
    lengths[:100] = lengths[:100] if first_is_padded else 10
    mask = torch.arange(10) < lengths[:, None]
    given = {"ids": torch.randint(1, 20, (900, 10)) * mask, "mask": mask.long()}
    net, options, totals = GivenPlaces(True).eval(), Options(reduce="mean", errors=False), []
    for own in (given, {**given, "position_ids": torch.arange(10).expand(900, 10)}):
        batches = [{k: v[i : i + 100] for k, v in own.items()} for i in range(0, 900, 100)]
        report = credit_report(net, batches, options=options, max_samples=None)
        assert "tokens+places" in {name for names in report.reads.values() for name in names}
        totals.append(report.total)
    assert totals[1] == pytest.approx(totals[0], abs=1e-6)


class Biased(nn.Module):
    """Adds a number for each two positions to scores, as relative embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.layer = nn.Embedding(11, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(6)
        scores = x @ x.mT + self.bias(places[:, None] - places + 5).mean(2)
        weights = scores.masked_fill(attention_mask[:, None] == 0, -1e9).softmax(2)
        return self.layer(mean_of(weights @ x, attention_mask.bool()))


def test_what_is_the_same_for_every_two_positions_is_left_out_whatever_the_padding() -> None:
    torch.manual_seed(0)
    mask = torch.ones(400, 6)
    mask[100:] = (torch.arange(6) < torch.randint(2, 7, (300, 1))).float()
    parts = zip(torch.randn(400, 6, 4).split(100), mask.split(100), strict=True)
    batches = [{"x": x, "attention_mask": m} for x, m in parts]
    report = credit_report(Biased().eval(), batches, max_samples=None)
    assert report.notes[0] == "the same for every sample, so left out: bias"


def drawn_masks(*shape: int) -> tuple[Tensor, Tensor]:
    """Return two masks of which the second leaves out more."""
    lengths = torch.arange(shape[0])[:, None] % (shape[1] - 1) + 2
    places = torch.arange(shape[1])
    return places < lengths, places < lengths - 1


def test_masks_of_outputs_are_those_that_targets_are_padded_by() -> None:
    wide, narrow = drawn_masks(12, 5)
    output = torch.randn(12, 5, 3)
    marked = torch.where(wide, torch.arange(60).view(12, 5), -100)
    padded_too = torch.where(narrow, torch.arange(60).view(12, 5), -100)

    def found(
        named: dict[str, Tensor], target: Tensor | None = None, given: Tensor = output, axis: int = 2
    ) -> Tensor | None:
        (mask,) = valid_outputs([named], [given], [target], axis)
        return mask

    def is_mask(mask: Tensor | None, expected: Tensor) -> bool:
        return mask is not None and torch.equal(mask, expected)

    # Targets tell, and of those that they agree with that which leaves out most.
    for order in (("a", "b"), ("b", "a")):
        both = {name: {"a": wide, "b": narrow}[name] for name in order}
        assert is_mask(found(both, marked), wide[..., None])
        assert is_mask(found(both, padded_too), narrow[..., None])
        assert found(both) is None
    # Without them, one must be alone, but for what is called "mask" and may be of anything.
    assert is_mask(found({"mask": wide}), wide[..., None])
    assert is_mask(found({"mask": wide, "other": narrow}), narrow[..., None])
    assert found({"mask": wide, "other": narrow, "third": wide}) is None
    assert found({"mask": wide[:6]}) is None
    assert found({"mask": wide[:, :4]}) is None
    # Positions are not classes, of which there may be as many.
    square = torch.randn(12, 5, 5)
    assert is_mask(found({"mask": wide}, given=square, axis=1), wide[:, None])
    assert is_mask(found({"mask": wide}, given=square, axis=2), wide[..., None])
    assert is_mask(found({"mask": wide}, given=torch.randn(12, 5, 3, 2)), wide[..., None, None])


def test_lengths_are_those_of_outputs_where_some_batch_has_a_sample_as_long() -> None:
    lengths = torch.tensor([1, 3, 5]), torch.tensor([2, 4])

    def found(*sizes: int) -> list[Tensor | None]:
        outputs = [torch.randn(len(n), size, 3) for n, size in zip(lengths, sizes, strict=True)]
        return valid_outputs([{"lengths": n} for n in lengths], outputs, [None, None], 2)

    by_hand = [
        torch.tensor([[[place < n] for place in range(size)] for n in each.tolist()])
        for each, size in zip(lengths, (5, 6), strict=True)
    ]
    masks = found(5, 6)
    assert all(m is not None and torch.equal(m, hand) for m, hand in zip(masks, by_hand, strict=True))
    # None is so long, and one is longer than there are positions.
    assert found(6, 6) == found(5, 3) == [None, None]
    assert all(mask is not None for mask in found(6, 4))


def test_masks_of_which_positions_see_which_are_none_of_padding() -> None:
    valid = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    causal = torch.ones(3, 3).tril()
    data = torch.randn(3, 3, 2)
    assert valid_positions({"x": data, "mask": causal}) == {}
    assert valid_positions({"x": data, "mask": 1 - causal}) == {}
    assert torch.equal(valid_positions({"x": data, "mask": valid})["mask"], valid == 1)
    # One of as many positions as no data have samples is of positions alone, and the next one counts.
    further = {"src_mask": causal, "mask": valid.repeat(2, 1)[:4], "x_len": torch.arange(4)}
    found = valid_positions({"x": torch.randn(4, 3, 2), **further})
    assert list(found) == ["mask", "x_len"]
    assert torch.equal(found["x_len"], torch.arange(4))
