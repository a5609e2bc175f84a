"""``reduce=`` against states computed by hand, padding, half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import CreditReport, KoopmanCredit, Options, credit_report


class PerPosition(nn.Module):
    """Two layers at every position of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.b(torch.tanh(self.a(x)))

    def states(self, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [x, self.a(x), self.forward(x)]


def by_hand(states: list[Tensor]) -> CreditReport:
    metric = KoopmanCredit(["a", "b"])
    metric.update(states)
    return metric.report()


def assert_same(given: CreditReport, expected: CreditReport) -> None:
    for name in ("credit", "gain", "sensitivity"):
        np.testing.assert_allclose(
            getattr(given, name), getattr(expected, name), atol=1e-7, err_msg=name
        )
    # The bits of x_0 choose the folds, and a mean summed in another order has other bits.
    np.testing.assert_allclose(given.r2, expected.r2, atol=2e-3)


@pytest.mark.parametrize(
    ("reduce", "row"),
    [
        ("flatten", lambda t: t.flatten(1)),
        ("mean", lambda t: t.mean(1)),
        ("last", lambda t: t[:, -1]),
        ("cls", lambda t: t[:, 0]),
        (lambda t: t.amax(1), lambda t: t.amax(1)),
    ],
)
def test_a_reduction_gives_the_rows_computed_by_hand(
    reduce: Any, row: Callable[[Tensor], Tensor]
) -> None:
    net, x = PerPosition().double(), torch.randn(300, 5, 3, dtype=torch.float64)
    given = credit_report(net, x.split(50), options=Options(reduce=reduce))
    assert_same(given, by_hand([row(state) for state in net.states(x)]))


def test_a_reduction_by_pattern_leaves_the_others_alone() -> None:
    net, x = PerPosition().double(), torch.randn(300, 5, 3, dtype=torch.float64)
    given = credit_report(
        net, x.split(50), options=Options(reduce={"a": "mean", "b*": lambda t: t[:, 2]})
    )
    x0, a, b = net.states(x)
    assert_same(given, by_hand([x0.movedim(-1, 1).flatten(1), a.mean(1), b[:, 2]]))


def test_a_pattern_that_matches_no_component_is_refused() -> None:
    net, x = PerPosition(), torch.randn(60, 5, 3)
    with pytest.raises(
        ValueError, match=r"reduce holds 'bb', which matches no component\. Close matches: 'b'\."
    ):
        credit_report(net, x.split(20), reduce={"a": "mean", "bb": "last", "*": "pool"})
    with pytest.raises(ValueError, match=r"reduce holds 'encoder\.\*', which .* 'input', 'a', 'b'\."):
        credit_report(net, x.split(20), reduce={"encoder.*": "mean"})
    with pytest.raises(ValueError, match=r"reduce\[0\] is 1; it must be a name or glob pattern"):
        Options(reduce={1: "mean"})  # type: ignore[dict-item]


@pytest.mark.parametrize("reduce", ["mean", "last"])
def test_padding_is_left_out_at_any_padded_length(reduce: Any) -> None:
    """Batches of several lengths, each padded to its own longest."""
    net = PerPosition().double()
    batches, states = [], []
    for length in (6, 4, 9):
        x = torch.randn(120, length, 3, dtype=torch.float64)
        lengths = torch.randint(1, length + 1, (120,))
        mask = torch.arange(length) < lengths[:, None]
        x[~mask] = 1e3
        batches.append({"x": x, "attention_mask": mask.long()})
        rows = []
        for state in net.states(x):
            valid = [sample[:n] for sample, n in zip(state, lengths.tolist(), strict=True)]
            rows.append(torch.stack([s.mean(0) if reduce == "mean" else s[-1] for s in valid]))
        states.append(rows)
    given = credit_report(net, batches, options=Options(reduce=reduce))
    assert_same(given, by_hand([torch.cat(rows) for rows in zip(*states, strict=True)]))


def test_batches_of_differing_length_pool_by_default_and_cannot_be_flattened() -> None:
    net, batches = PerPosition(), [torch.randn(100, n, 3) for n in (6, 4, 9)]
    assert np.isfinite(credit_report(net, batches).credit).all()
    with pytest.raises(ValueError, match="input has 12 values per sample in batch 1, but 18 before"):
        credit_report(net, batches, options=Options(reduce="flatten"))


def test_a_reduction_that_needs_a_sequence_says_so() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    with pytest.raises(ValueError, match="reduce='last' takes sequences, but a state has 2 axes"):
        credit_report(net, [torch.randn(20, 1, 8, 8)], options=Options(reduce="last"))


class Tokens(nn.Module):
    """An image, its patches with a token before them, and a head on that."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.mix, self.head = nn.Conv2d(1, 5, 2, 2), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True).tanh(), tokens], dim=1)
        return self.head(torch.tanh(self.mix(tokens))[:, 0])


@pytest.mark.parametrize("way", ["cls", "last"])
def test_a_reduction_of_sequences_leaves_images_before_them_pooled(way: Any) -> None:
    net, batches = Tokens(), torch.randn(300, 1, 6, 6).split(100)
    given = credit_report(net, batches, options=Options(reduce=way))
    named: Any = {"mix": way}
    assert_same(given, credit_report(net, batches, options=Options(reduce=named)))
    assert given.widths[1] == 5


def test_a_callable_must_give_a_tensor() -> None:
    with pytest.raises(ValueError, match="reduce gave list; it must give one row per sample"):
        credit_report(
            PerPosition(), [torch.randn(20, 5, 3)], options=Options(reduce=lambda t: t.tolist())
        )


@pytest.mark.parametrize(("first", "told"), [(slice(5), 5), (slice(1), 1), (slice(3, 40), 37)])
def test_a_callable_that_leaves_samples_out_is_refused(first: slice, told: int) -> None:
    message = rf"gave {told} rows of 'input', of shape \(60, 5, 3\), for the 60 samples of the first"
    with pytest.raises(ValueError, match=message):
        credit_report(PerPosition(), torch.randn(180, 5, 3).split(60), reduce=lambda t: t[first])
    with pytest.raises(ValueError, match=r"reduce gave .* rows of 'b', of shape \(60, 5, 2\)"):
        credit_report(PerPosition(), [torch.randn(60, 5, 3)], reduce={"b": lambda t: t[first]})


class TimeFirst(nn.Module):
    """A recurrent network with the samples along the second axis, and a layer at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Merged(PerPosition):
    """Items of sets, one behind the other."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.b(torch.tanh(self.a(x.flatten(0, 1))))


@pytest.mark.parametrize(
    ("net", "shape", "reduce"),
    [
        (TimeFirst(), (5, 60, 3), lambda t: t[-1]),
        (Merged(), (60, 5, 3), lambda t: t.reshape(60, 5, -1).amax(1)),
        (PerPosition(), (60, 5, 3), lambda t: t.flip(0).sum(1)),
    ],
    ids=["time first", "merged", "sum"],
)
def test_a_callable_may_find_the_samples_wherever_they_are(
    net: nn.Module, shape: tuple[int, ...], reduce: Callable[[Tensor], Tensor]
) -> None:
    assert credit_report(net, [torch.randn(shape)] * 2, reduce=reduce).n_samples == 120


@pytest.mark.parametrize(("dtype", "close"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision_gives_about_the_same_report(dtype: torch.dtype, close: float) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(600, 6)
    whole = credit_report(net, x.split(100), options=Options(tikhonov=1e-6))
    half = credit_report(net.to(dtype), x.to(dtype).split(100), options=Options(tikhonov=1e-6))
    assert half.components == whole.components
    np.testing.assert_allclose(half.credit, whole.credit, atol=close)
    np.testing.assert_allclose(half.r2, whole.r2, atol=close)


class PaddedEncoder(nn.Module):
    """A padded encoder; what its mask is called says nothing."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.inp, self.encoder = nn.Linear(6, 8), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        h = self.encoder(self.inp(x), src_key_padding_mask=m)
        valid = (~m[:, : h.shape[1]])[..., None]
        return self.head((h * valid).sum(1) / valid.sum(1))


class Named(PaddedEncoder):
    """The same, where the argument's name does say it."""

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        return super().forward(x, padding_mask)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", [PaddedEncoder, Named])
def test_a_mask_without_a_name_leaves_padding_out_of_all_states(kind: type[PaddedEncoder]) -> None:
    torch.manual_seed(0)
    net, batches = kind(), []
    for _ in range(6):
        m = torch.arange(7) >= torch.randint(2, 7, (40, 1))
        batches.append((10 * torch.randn(40, 7, 6), m))
    given = credit_report(net, batches)
    # What a mapping says of padding is taken by its name.
    expected = credit_report(
        net,
        [{"x": x, "padding_mask": m} for x, m in batches],
        forward_fn=lambda model, batch: model(*batch.values()),
    )
    assert given.components == expected.components
    assert_same(given, expected)
    filled = [(x.masked_fill(m[..., None], 5.0), m) for x, m in batches]
    assert_same(credit_report(net, filled), expected)


@pytest.mark.parametrize("prompts", [0, 3])
def test_positions_that_a_mask_is_not_about_are_told(prompts: int) -> None:
    class Prompted(nn.Module):
        """Puts learned positions in front of a sequence."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
            self.beside = nn.Linear(3, 2)
            self.prompts = nn.Parameter(torch.randn(prompts, 8))

        def forward(self, x: Tensor, image: Tensor, attention_mask: Tensor) -> Tensor:
            h = torch.cat([self.prompts.expand(len(x), -1, -1), self.first(x)], 1)
            return self.last(h) + self.beside(image).mean(1, keepdim=True)

    torch.manual_seed(0)
    mask = torch.arange(6) < torch.randint(2, 7, (400, 1))
    # The mask is about none of the images.
    parts = {"x": torch.randn(400, 6, 3), "image": torch.randn(400, 5, 3), "attention_mask": mask}
    batches = [{name: part[i : i + 100] for name, part in parts.items()} for i in range(0, 400, 100)]
    notes = credit_report(Prompted(), batches).notes
    told = "the batch has a mask, and last, made of what it is about, have other positions"
    assert any(told in note for note in notes) == (prompts > 0)
    assert any("the batch has a mask" in note for note in notes) == (prompts > 0)
