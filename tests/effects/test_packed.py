"""Effects of recurrent layers on packed sequences, whose rows are steps, one sample after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_koopman import component_effects
from lightning_koopman.network.runs.hook_points import HookPoint, HookPoints
from lightning_koopman.report.effects import Effects

WIDTH, STEPS = 6, 7


class Reader(nn.Module):
    """A recurrent layer on packed sequences, of which a head reads the last state or the mean of all."""

    def __init__(self, *, reads: str = "last", packs: bool = True, layers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.LSTM(4, WIDTH, layers, batch_first=True, bidirectional=layers > 1)
        self.head = nn.Linear(2 * WIDTH if layers > 1 else WIDTH, 2)
        self.reads, self.packs = reads, packs

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        given: Any = x
        if self.packs:
            given = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        states, (last, _) = self.rnn(given)
        if self.reads == "last":
            return self.head(torch.cat([*last[-2:]], dim=1) if len(last) > 1 else last[0])
        states = pad_packed_sequence(states, batch_first=True)[0]
        return self.head(states.sum(dim=1) / lengths[:, None])


def batches(*, equal: bool = False) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, STEPS, 4, generator=generator)
    lengths = torch.randint(1, STEPS + 1, (60,), generator=generator)
    lengths = torch.full_like(lengths, STEPS) if equal else lengths
    return list(zip(x.split(20), lengths.split(20), strict=True))


def effects_of(net: nn.Module, given: Any, *kinds: Any, **options: Any) -> Effects:
    return component_effects(net, given, kinds=kinds, forward_fn=lambda m, batch: m(*batch), **options)


def test_skipping_puts_the_mean_of_all_steps_and_of_last_states():
    for reads in ("last", "all"):
        net = Reader(reads=reads, layers=2).eval()
        effects = effects_of(net, batches(), "skip")
        with torch.no_grad():
            before = torch.cat([net(*batch) for batch in batches()])
            packed = [
                pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
                for x, lengths in batches()
            ]
            given = [net.rnn(each) for each in packed]
            mean = torch.cat([states.data for states, _ in given]).mean(dim=0)
            last = torch.cat([states for _, (states, _) in given], dim=1).mean(dim=1, keepdim=True)

            def put(
                _: nn.Module, args: Any, output: Any, mean: Tensor = mean, last: Tensor = last
            ) -> Any:
                states, (own, cell) = output
                data = mean.expand_as(states.data)
                return PackedSequence(data, *states[1:]), (last.expand_as(own), cell)

            with net.rnn.register_forward_hook(put):
                after = torch.cat([net(*batch) for batch in batches()])
        moved = (after - before).square().mean(dim=0).sum()
        expected = float(moved / before.var(dim=0, correction=0).sum())
        assert effects.values["skip"][0] == pytest.approx(expected, rel=1e-4)


def moved_weights(net: nn.Module) -> dict[str, dict[str, Tensor]]:
    weights = {key: 1.01 * value for key, value in net.state_dict().items() if "rnn.weight" in key}
    return {"moved": weights}


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("reads", ["last", "all"])
def test_predicted_changes_of_weights_are_the_measured_ones_where_they_are_small(reads, equal):
    net = Reader(reads=reads)
    found = effects_of(net, batches(equal=equal), replacements=moved_weights(net), how="both")
    assert found.predicted["moved"][0] == pytest.approx(found.values["moved"][0], rel=0.05)
    assert not any("predicted to have" in note for note in found.notes)


def test_sequences_of_one_length_have_the_effects_that_they_have_if_they_are_not_packed():
    packed, plain = (Reader(packs=packs) for packs in (True, False))
    kinds = ("skip", "output_noise", "weight_noise")
    for how in ("measured", "predicted"):
        one, other = (
            effects_of(net, batches(equal=True), *kinds[: 1 if how == "measured" else 3], how=how)
            for net in (packed, plain)
        )
        for kind in one.kinds:
            np.testing.assert_allclose(one.values[kind], other.values[kind], rtol=1e-4)
            np.testing.assert_allclose(one.stderr[kind], other.stderr[kind], rtol=1e-3)


def test_a_linear_map_is_of_each_step_or_refused_where_steps_lead_nowhere():
    (note,) = effects_of(Reader(), batches(), "linear").notes
    assert "no effect linear of 'rnn': the first tensor that 'rnn' gives leads to none" in note
    found = effects_of(Reader(reads="all"), batches(), "linear")
    assert 0 < found.values["linear"][0] < 1
    assert found.values["linear"][1] < 1e-9


def test_packed_sequences_of_as_many_steps_and_other_samples_tell_nothing():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, WIDTH, batch_first=True)

        def forward(self, x: Tensor, *lengths: Tensor) -> Tensor:
            ends = [
                self.rnn(pack_padded_sequence(x, each, batch_first=True, enforce_sorted=False))[1][0]
                for each in lengths
            ]
            return ends[0] - ends[1]

    x, one = torch.randn(4, 3, 4), torch.tensor([3, 1, 2, 1])
    calls = [HookPoint("out", call) for call in ("rnn", "rnn#1")]
    with HookPoints(net := Two(), calls) as points:
        net(x, one, one.flip(0))
    assert points.packed == {7: None}
    with HookPoints(net, calls) as points:
        net(x, one, one)
    assert points.packed[7].tolist() == [0, 2, 1, 3, 0, 2, 0]
