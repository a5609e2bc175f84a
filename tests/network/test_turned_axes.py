"""Samples are found wherever a network puts them: behind positions, in one view after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import component_effects, credit_report

N, T = 30, 7


def tagger(first: bool, flat: str) -> nn.Module:
    """A recurrent tagger: samples or positions first, flattened before its linear layers or not."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        h, _ = m.rnn(x if first else x.transpose(0, 1))
        if flat == "turned back":
            h = h.transpose(0, 1)
        if flat:
            h = h.reshape(-1, 8)
        y = m.out(torch.tanh(m.low(h)))
        return y if first or flat else y.transpose(0, 1)

    torch.manual_seed(0)
    return wired(run, rnn=nn.LSTM(5, 8, batch_first=first), low=nn.Linear(8, 6), out=nn.Linear(6, 3))


def pairs(how: str, width: int = 8) -> nn.Module:
    """One encoder on two inputs, one after the other or in one call, and a head that compares."""

    def run(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        def encode(x: Tensor) -> Tensor:
            return m.b(torch.tanh(m.a(x)))

        if how == "two calls":
            a, b = encode(x), encode(y)
        elif how == "cat":
            a, b = encode(torch.cat([x, y])).chunk(2)
        elif how == "stack":
            a, b = encode(torch.stack([x, y]).flatten(0, 1)).unflatten(0, (2, -1))
        else:
            a, b = encode(torch.stack([x, y], 1).flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
        return m.head(2 * a - b)

    torch.manual_seed(0)
    return wired(run, a=nn.Linear(5, width), b=nn.Linear(width, width), head=nn.Linear(width, 3))


def sequences(n: int = 300, t: int = T) -> Tensor:
    return torch.randn(n, t, 5, generator=torch.Generator().manual_seed(1))


def two(n: int = 320) -> list[Tensor]:
    return list(torch.randn(2, n, 5, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("first", "flat"), [(False, ""), (True, "flat"), (False, "flat"), (False, "turned back")]
)
def test_positions_may_come_first_and_be_flattened(first, flat):
    x = sequences()
    plain = credit_report(tagger(True, ""), x.split(N))
    report = credit_report(tagger(first, flat), x.split(N))
    assert report.n_samples == 300
    assert report.credit == pytest.approx(plain.credit, abs=1e-4)
    assert report.r2 == pytest.approx(plain.r2, abs=1e-3)
    # What reads a linear function of a position is linear, in the right order of rows alone.
    assert report.r2[1] > 0.999


# Eight units for eight samples, as wide as the batch is long, are no axis of samples.
@pytest.mark.parametrize("size", [40, 8])
@pytest.mark.parametrize("how", ["cat", "stack", "neighbours"])
def test_two_inputs_in_one_call_are_those_of_two_calls(how, size):
    batches = list(zip(*(x.split(size) for x in two()), strict=True))
    plain, report = (credit_report(pairs(h), batches) for h in ("two calls", how))
    assert report.n_samples == 320
    assert report.credit == pytest.approx(plain.credit, abs=1e-4)
    assert report.r2[2] > 0.999


def test_two_flattened_sequences_in_one_call_are_those_of_two_calls():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        pair = torch.cat([x.flatten(0, 1), -x.flatten(0, 1)])
        halves = m.low(pair).unflatten(1, (2, 3)).flatten(0, 1)  # two rows for each that there was
        a, b = m.out(halves.tanh()).reshape(2, len(x), -1)
        return m.head(2 * a - b)

    torch.manual_seed(0)
    model = wired(run, low=nn.Linear(5, 6), out=nn.Linear(3, 2), head=nn.Linear(28, 3))
    report = credit_report(model, sequences(400).split(40), max_dim=64)
    assert report.components == ("low", "out", "head")
    assert report.n_samples == 400
    assert report.r2[0] > 0.99
    assert report.r2[2] > 0.99


def test_an_experts_share_of_positions_is_no_sample():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.inp(x).flatten(0, 1)
        taken = (torch.arange(len(h)) % T < 2).nonzero()[:, 0].flip(0)  # twice as many as samples
        return m.out(h.index_add(0, taken, m.expert(h[taken])).unflatten(0, (-1, T)).mean(1))

    model = wired(run, inp=nn.Linear(5, 6), expert=nn.Linear(6, 6), out=nn.Linear(6, 3))
    report = credit_report(model, sequences().split(N))
    assert report.components == ("inp", "out")
    assert any("left out: expert (60, 6)" in note for note in report.notes)


def test_sorted_positions_are_no_samples():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.inp(x).flatten(0, 1)
        order = h[:, 0].argsort()
        return m.out(
            torch.empty_like(h).index_copy(0, order, m.mixed(h[order])).unflatten(0, (-1, T)).mean(1)
        )

    model = wired(run, inp=nn.Linear(5, 6), mixed=nn.Linear(6, 6), out=nn.Linear(6, 3))
    report = credit_report(model, sequences().split(N))
    assert report.components == ("inp", "out")


def effects(model: nn.Module, batches: Any, *kinds: str) -> dict[str, np.ndarray]:
    found = component_effects(model, batches, None, kinds, how="both", scale="relative")
    return {kind: np.stack([found.values[kind], found.predicted[kind]]) for kind in kinds}


def test_predicted_effects_know_the_samples_of_two_inputs():
    batches = list(zip(*(x.split(40) for x in two()), strict=True))
    initial = pairs("cat").state_dict()
    initial = {name: 0.5 * value for name, value in initial.items()}

    def reinit(how: str) -> np.ndarray:
        model = pairs(how)
        report = credit_report(model, batches)
        found = component_effects(
            model,
            batches,
            report,
            ["reinit"],
            how="predicted",
            initial=initial,
            scale="relative",
            probes=3,
        )
        return found.values["reinit"]

    assert reinit("cat") == pytest.approx(reinit("neighbours"), rel=1e-4)


# With 14 positions, twice the seven samples, the first axis could be taken for two entries of each.
@pytest.mark.parametrize("t", [5, 14])
def test_effects_of_positions_first_are_those_of_samples_first(t):
    x = sequences(70, t)
    kinds = ("skip", "linear", "output_noise")
    plain, turned = (effects(tagger(first, ""), x.split(7), *kinds) for first in (True, False))
    for kind in ("skip", "linear"):
        assert turned[kind] == pytest.approx(plain[kind], rel=1e-3, abs=1e-6)
    assert turned["output_noise"] == pytest.approx(plain["output_noise"], rel=0.3)


def test_outputs_with_positions_first_are_refused_by_effects():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.rnn(x)[0])

    model = wired(run, rnn=nn.LSTM(5, 8), out=nn.Linear(8, 3))
    x = [part.transpose(0, 1) for part in sequences().split(N)]
    with pytest.raises(
        ValueError, match="'rnn' gives the samples along the second axis; put them first"
    ):
        component_effects(model, x)
    turned = component_effects(model, x, forward_fn=lambda model, batch: model(batch).transpose(0, 1))
    assert turned.n_samples == 300


@pytest.mark.parametrize("given_first", [True, False])
def test_effects_of_as_many_samples_as_positions_are_those_of_any_other_number(given_first):
    """Outputs have the samples first, whatever the layers between, and the batch, have."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.rnn(m.low(x.transpose(0, 1) if given_first else x))[0]
        return m.out(h).transpose(0, 1)

    torch.manual_seed(0)
    model = wired(run, low=nn.Linear(5, 6), rnn=nn.LSTM(6, 8), out=nn.Linear(8, 3))
    x = sequences(60, 6)
    found = []
    for n in (6, 20):
        batches = [part if given_first else part.transpose(0, 1) for part in x.split(n)]
        kinds = ["skip", "linear"]
        found.append(component_effects(model, batches, kinds=kinds, components=["low", "rnn", "out"]))
    square, other = found
    assert square.n_samples == other.n_samples == 60
    for kind in ("skip", "linear"):
        np.testing.assert_allclose(square.values[kind], other.values[kind], rtol=1e-3, atol=1e-9)


def test_effects_of_as_many_samples_as_outputs_are_those_of_any_other_number():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.mid(m.rnn(x)[0][-1]).tanh())

    torch.manual_seed(0)
    model = wired(run, rnn=nn.RNN(5, 8), mid=nn.Linear(8, 8), out=nn.Linear(8, 3))
    x, kinds = sequences(60, 6).transpose(0, 1), ["skip", "linear"]
    square, other = (component_effects(model, x.split(n, 1), kinds=kinds) for n in (3, 20))
    assert square.n_samples == other.n_samples == 60
    for kind in kinds:
        np.testing.assert_allclose(square.values[kind], other.values[kind], rtol=1e-3, atol=1e-9)


def test_effects_cut_no_batch_along_what_may_be_positions():
    """There are more of these than samples that effects look at."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.mid(m.rnn(x)[0][-1]).tanh())

    torch.manual_seed(0)
    model = wired(run, rnn=nn.RNN(5, 8), mid=nn.Linear(8, 8), out=nn.Linear(8, 3))
    x = [sequences(60, 40).transpose(0, 1)]
    few, all_of_them = (component_effects(model, x, kinds=["skip"], samples=n) for n in (30, 512))
    assert few.n_samples == all_of_them.n_samples == 60
    np.testing.assert_array_equal(few.values["skip"], all_of_them.values["skip"])


def test_outputs_of_as_many_samples_as_positions_are_refused_with_positions_first():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.rnn(x)[0])

    model = wired(run, rnn=nn.LSTM(5, 8), out=nn.Linear(8, 3))
    x = [part.transpose(0, 1) for part in sequences(60, 6).split(6)]
    with pytest.raises(ValueError, match="'rnn' gives the samples along the second axis"):
        component_effects(model, x)


def test_items_of_sets_one_behind_the_other_are_no_samples():
    def run(m: nn.Module, sets: list[Tensor]) -> Tensor:
        items = m.item(torch.cat(sets)).relu()
        return m.head(torch.stack([part.sum(0) for part in items.split([len(x) for x in sets])]))

    model = wired(run, item=nn.Linear(4, 8), head=nn.Linear(8, 3))
    sets = [torch.randn(1 + i % 5, 4) for i in range(60)]
    with pytest.raises(
        ValueError, match=r"'head' alone has one row per sample.*left out: input \(90, 4\)"
    ):
        credit_report(model, [sets[:30], sets[30:]], forward_fn=lambda model, batch: model(batch))


def test_embeddings_of_all_nodes_of_which_the_batch_picks_some_are_no_chain():
    def run(m: nn.Module, pairs: Tensor) -> Tensor:
        nodes = m.mix(m.table)
        return (nodes[pairs[:, 0]] * nodes[pairs[:, 1]]).sum(-1)

    model = wired(run, mix=nn.Linear(8, 8))
    model.table = nn.Parameter(torch.randn(35, 8))
    with pytest.raises(ValueError, match="'mix' is all that the chain holds, and reads no floating-"):
        credit_report(model, list(torch.randint(0, 35, (400, 2)).split(100)))


class Masked(nn.Module):
    """An encoder that is told which positions hold data by an argument, not by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.high((self.low(x).relu() * mask[..., None]).sum(1))


def test_a_mask_among_the_arguments_counts_in_the_first_batch_too():
    generator = torch.Generator().manual_seed(0)
    x, model = torch.randn(200, T, 4, generator=generator), Masked()
    mask = (torch.arange(T) < torch.randint(1, T + 1, (200, 1), generator=generator)).float()
    whole, parts = (
        credit_report(model, list(zip(x.split(n), mask.split(n), strict=True)), reduce="mean")
        for n in (200, 20)
    )
    named = credit_report(model, [{"x": x, "mask": mask}], reduce="mean")
    assert parts.credit == pytest.approx(whole.credit, abs=1e-6)
    assert named.credit == pytest.approx(whole.credit, abs=1e-6)
