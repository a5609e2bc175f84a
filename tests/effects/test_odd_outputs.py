"""What is NaN or infinite has no effect of 0."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from effect_nets import batched, data, mlp
from small import around
from torch import Tensor, nn

from lightning_koopman import bit_widths, component_effects, drop_order, linearize
from lightning_koopman.effects.scoring import Outputs, kl_divergence

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("odd", [[NAN, 0.0, 0.0], [INF, 0.0, 0.0], [-INF, -INF, -INF]])
def test_a_divergence_from_or_to_what_is_no_distribution_is_nan(odd: list[float]):
    own = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, 1.0]])
    other = torch.tensor([odd, [1.0, 0.0, 1.0]])
    for pair in ((own, other), (other, own), (other, other)):
        found = kl_divergence(*pair)
        assert math.isnan(found[0])
        assert not found[1]


def test_classes_that_are_ruled_out_count_as_they_do():
    # By hand: p = (1/2, 1/2, 0), q = (1/4, 3/4, 0), then q = (1, 0, 0).
    p, q = torch.tensor([[0.0, 0.0, -INF]]), torch.tensor([[0.0, math.log(3.0), -INF]])
    truth = 0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0)
    assert float(kl_divergence(p, q)[0]) == pytest.approx(truth)
    assert math.isinf(kl_divergence(p, torch.tensor([[0.0, -INF, -INF]]))[0])
    own = Outputs([p], [(p, torch.zeros(1, dtype=torch.long))], "kl")
    assert own.compare([q]).effect == pytest.approx(truth)


def spoiled(value: float) -> tuple[nn.Module, list[list[Tensor]]]:
    batches = batched(*data())
    batches[2][0] = batches[2][0].clone()
    batches[2][0][7] = value
    return mlp(), batches


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("scale", ["kl", "relative"])
def test_a_network_whose_outputs_are_nan_is_refused_by_batch(value: float, scale):
    net, batches = spoiled(value)
    with pytest.raises(ValueError, match="outputs of batch 2 hold NaN, with which no others compare"):
        component_effects(net, batches, scale=scale)
    with pytest.raises(ValueError, match="outputs of batch 2 hold NaN"):
        drop_order(net, batches, scale=scale)
    with pytest.raises(ValueError, match="outputs of batch 1 hold NaN"):
        linearize(net, [batches[0], batches[0], batches[1], batches[2]], scale=scale)


def test_infinite_outputs_are_called_so():
    net, batches = mlp(), batched(*data())
    with torch.no_grad():
        net[-1].bias[0] = INF
    with pytest.raises(ValueError, match="outputs of batch 0 hold infinity"):
        drop_order(net, batches)


def test_bits_are_not_chosen_for_a_network_whose_outputs_are_nan():
    pytest.importorskip("torchao", reason="torchao is not installed")
    net, batches = spoiled(NAN)
    with pytest.raises(ValueError, match="outputs of batch 2 hold NaN"):
        bit_widths(net, batches)


@pytest.mark.parametrize("scale", ["kl", "relative"])
def test_an_alteration_that_makes_outputs_nan_has_no_effect_of_0(scale):
    torch.manual_seed(0)
    positive, root = around(5, lambda m, x: m.inner(x).exp()), around(5, lambda m, x: m.inner(x.sqrt()))
    net = nn.Sequential(positive, root, nn.Linear(5, 5), nn.Linear(5, 3)).eval()
    found = component_effects(net, batched(*data()), scale=scale, sets=[{"0", "2"}], how="both")
    assert np.isnan(found.values["skip"]).tolist() == [True, False, False, False, True]
    assert found.doubts["skip"][0] == found.doubts["skip"][4] == ("infinite",)
    assert found.doubts["skip"][1] == ()
    assert "infinite (skip)" in str(found)
    assert "gradient" not in str(found)


def test_a_prediction_that_is_nan_is_not_for_want_of_a_gradient():
    torch.manual_seed(0)

    class Twice(nn.Module):
        """Is NaN where its weight is not what it was."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 5)
            self.register_buffer("known", self.inner.weight.detach().clone(), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            same = torch.equal(self.inner.weight, self.known)
            return self.inner(x) * (1.0 if same else NAN)

    net = nn.Sequential(Twice(), nn.Tanh(), nn.Linear(5, 3)).eval()
    found = component_effects(net, batched(*data()), kinds=["weight_noise"], components=["0", "2"])
    assert found.how == {"weight_noise": "predicted"}
    assert found.doubts["weight_noise"][0] == ("infinite",)
    assert np.isfinite(found.values["weight_noise"][1])


class Padded(nn.Module):
    """Gives NaN where nothing is asked for, and may turn its answer around with each call."""

    def __init__(self, turns: bool) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.turns, self.calls = turns, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        given = self.head(torch.tanh(self.inner(x))) * (-1.0 if self.turns and self.calls % 2 else 1.0)
        return torch.where(torch.arange(x.shape[1])[:, None] < 4, given, NAN)


@pytest.mark.parametrize("turns", [False, True])
def test_positions_without_a_target_may_be_nan_of_a_network_that_is_unsteady_or_not(turns: bool):
    torch.manual_seed(0)
    net = Padded(turns).eval()
    x = torch.randn(40, 6, 5, generator=torch.Generator().manual_seed(2))
    targets = (x[..., 0] > 0).long()
    targets[:, 4:] = -100
    found = component_effects(net, [(x, targets)], components=["inner", "head"])
    assert np.isfinite(found.values["skip"]).all()
    assert any("unsteady" in words for words in found.doubts["skip"]) == turns
