"""Which masks and lengths of a batch are about which states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_koopman import CreditReport, Options, component_effects, credit_report

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


def report_of(net: nn.Module, masks: dict[str, Tensor], **given: Tensor) -> CreditReport:
    named = {**given, **masks}
    batches = [
        dict(zip(named, parts, strict=True))
        for parts in zip(*(tensor.split(60) for tensor in named.values()), strict=True)
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
