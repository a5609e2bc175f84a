"""Effects on outputs by position, of which some hold no data, against sums by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_koopman import component_effects

N, T, C = 120, 9, 4


class Tagger(nn.Module):
    """Layers at every position; the outputs have their classes last, or first."""

    def __init__(self, *, first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, C)
        self.first = first
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return out.transpose(1, 2) if self.first else out

    def without_b(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(torch.tanh(self.a(x))))


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(T) < torch.randint(1, 6, (N, 1), generator=generator)
    valid[::60] = True
    x = torch.randn(N, T, 3, generator=generator, dtype=torch.float64)
    return torch.where(valid[..., None], x, 3.0), valid


def batches_of(**tensors: Tensor) -> list[dict[str, Tensor]]:
    parts = zip(*(tensor.split(60) for tensor in tensors.values()), strict=True)
    return [dict(zip(tensors, part, strict=True)) for part in parts]


def effects_of(net: nn.Module, batches: Any, **options: Any) -> Any:
    return component_effects(net, batches, forward_fn=lambda model, b: model(b["x"]), **options)


def relative(own: Tensor, other: Tensor, valid: Tensor, axis: int = 0) -> float:
    """Return the share of the variance by hand, about the mean of each position or of all."""
    w = valid[..., None].double()
    over = (0,) if axis == 0 else (0, 1)
    mean = (own * w).sum(over, keepdim=True) / w.sum(over, keepdim=True).clamp_min(1)
    return float(((other - own).square() * w).sum() / ((own - mean).square() * w).sum())


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", ["mask", "lengths"])
def test_positions_without_data_count_for_nothing(name: str, first: bool) -> None:
    (x, valid), net = data(), Tagger(first=first)
    told = {"mask": valid, "lengths": valid.sum(1)}[name]
    with torch.no_grad():
        expected = relative(net(x).transpose(1, 2) if first else net(x), net.without_b(x), valid)
    found = effects_of(net, batches_of(x=x, **{name: told}))
    assert found.values["skip"][1] == pytest.approx(expected, rel=1e-6)
    # Else it would be another one.
    assert effects_of(net, batches_of(x=x)).values["skip"][1] > 1.5 * expected


def test_where_batches_have_other_numbers_of_positions_one_mean_is_for_all() -> None:
    (x, valid), net = data(), Tagger()
    batches = batches_of(x=x, mask=valid)
    batches[1:] = [{"x": b["x"][:, :7], "mask": b["mask"][:, :7]} for b in batches[1:]]
    short = valid.clone()
    short[60:, 7:] = False
    with torch.no_grad():
        expected = relative(net(x), net.without_b(x), short, axis=1)
    assert effects_of(net, batches).values["skip"][1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("beside", [False, True])
def test_samples_of_packed_batches_are_sequences(beside: bool) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.a, self.out = nn.GRU(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: PackedSequence) -> Tensor:
            return self.out(torch.tanh(self.a(self.rnn(x)[1][-1])))

    lengths = torch.randint(2, 8, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    series = [
        torch.randn(n, 3, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(lengths)
    ]
    packed = [pack_sequence(series[i : i + 50], enforce_sorted=False) for i in range(0, 300, 50)]
    batches = [(part, torch.randn(50)) for part in packed] if beside else packed
    found = component_effects(
        Reads(), batches, forward_fn=lambda net, b: net(b[0] if beside else b), scale="relative"
    )
    assert found.n_samples == 300


@pytest.mark.parametrize("padding", [0, -100])
@pytest.mark.parametrize(
    ("how", "kind"), [("measured", "skip"), ("predicted", "skip"), ("predicted", "weight_noise")]
)
def test_classes_of_positions_without_data_count_for_nothing(padding: int, how: Any, kind: str) -> None:
    """The truth is the same network on the positions with data alone, each as a sample."""
    (x, valid), net = data(), Tagger()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        classes = (net(x) + torch.randn(N, T, C, generator=generator)).argmax(-1)
    labels = torch.where(valid, classes, padding)
    options = {"kinds": (kind,), "how": how, "probes": C * T, "draws": 1}
    found = effects_of(net, [{"x": x, "mask": valid, "labels": labels}], **options)
    expected = effects_of(net, [{"x": x[valid], "labels": classes[valid]}], **options)
    assert found.scale == expected.scale == "kl"
    # Others are replaced by the mean of each position, padding or not.
    of = slice(1, 2) if kind == "skip" else slice(None)
    np.testing.assert_allclose(found.values[kind][of], expected.values[kind][of], rtol=1e-6)
    if how == "measured":
        assert found.metric_before == pytest.approx(expected.metric_before, abs=1e-9)
        assert found.metric[kind][1] == pytest.approx(expected.metric[kind][1], abs=1e-9)


def test_predictions_leave_out_what_measurements_do() -> None:
    """The same changes of the same positions, over a variance that is that of each position."""
    (x, valid), net = data(), Tagger()
    options = {"kinds": ("weight_noise",), "how": "predicted", "probes": C * T, "draws": 1}
    found = effects_of(net, [{"x": x, "mask": valid}], **options).values["weight_noise"]
    rows = effects_of(net, [{"x": x[valid]}], **options).values["weight_noise"]
    with torch.no_grad():
        outputs, w = net(x), valid[..., None].double()
    of_rows = (outputs[valid] - outputs[valid].mean(0)).square().sum()
    mean = (outputs * w).sum(0) / w.sum(0)
    np.testing.assert_allclose(
        found * float(((outputs - mean).square() * w).sum()), rows * float(of_rows), rtol=1e-6
    )


def test_what_has_a_target_counts_whatever_the_mask_says() -> None:
    (x, valid), net = data(), Tagger()
    labels = torch.randint(0, C, (N, T), generator=torch.Generator().manual_seed(2))
    masked = effects_of(net, batches_of(x=x, mask=valid, labels=labels))
    plain = effects_of(net, batches_of(x=x, labels=labels))
    np.testing.assert_array_equal(masked.values["skip"], plain.values["skip"])


def test_of_several_masks_that_may_be_the_outputs_none_is_taken() -> None:
    (x, valid), net = data(), Tagger()
    two = effects_of(net, batches_of(x=x, src_mask=valid, tgt_mask=data(1)[1]))
    plain = effects_of(net, batches_of(x=x))
    np.testing.assert_array_equal(two.values["skip"], plain.values["skip"])


def test_of_several_masks_that_of_the_targets_is_taken() -> None:
    (x, valid), net = data(), Tagger()
    labels = torch.where(valid, torch.randint(0, C, (N, T)), 0)
    both = batches_of(x=x, src_mask=data(1)[1], tgt_mask=valid, labels=labels)
    one = batches_of(x=x, tgt_mask=valid, labels=labels)
    np.testing.assert_array_equal(
        effects_of(net, both).values["skip"], effects_of(net, one).values["skip"]
    )
