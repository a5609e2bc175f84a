"""Networks that give class probabilities, or logarithms of these, have the effects of their logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from effect_nets import batched
from torch import Tensor, nn

from lightning_koopman import component_effects, drop_order
from lightning_koopman.decisions.steps import component_calls, find_outputs
from lightning_koopman.effects.scoring import PROBABILITIES, Outputs
from lightning_koopman.network.runs.forward_runner import runner_on

KINDS = ("skip", "linear", "output_noise", "weight_noise")


class Chain(nn.Module):
    """Layers of their own, and what is done to the logits of the last one."""

    def __init__(self, ending: nn.Module, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)])
        self.head, self.ending = nn.Linear(5, classes), ending

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.ending(2 * self.head(x))


def chain(ending: nn.Module) -> nn.Module:
    return Chain(ending).double().eval()


def data(n: int = 120) -> list[list[Tensor]]:
    x = torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return batched(x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long(), 40)


HIDDEN = [f"layers.{k}" for k in range(3)]


@pytest.mark.parametrize("ending", [nn.Softmax(1), nn.LogSoftmax(1)], ids=["softmax", "log_softmax"])
@pytest.mark.parametrize("how", ["measured", "predicted"])
def test_effects_are_those_of_the_logits(ending: nn.Module, how):
    own, other = (
        component_effects(
            chain(end), data(), kinds=KINDS, how=how, components=HIDDEN, probes=3, draws=12
        )
        for end in (nn.Identity(), ending)
    )
    assert own.scale == other.scale == "kl"
    for kind in KINDS:
        np.testing.assert_allclose(other.values[kind], own.values[kind], rtol=1e-6, atol=1e-14)
        np.testing.assert_allclose(other.stderr[kind], own.stderr[kind], rtol=1e-6, atol=1e-14)
    assert (PROBABILITIES in other.notes) == isinstance(ending, nn.Softmax)
    assert PROBABILITIES not in own.notes
    assert own.metric_before == other.metric_before


def test_the_divergence_is_the_one_by_hand():
    net = chain(nn.Softmax(1))
    found = component_effects(net, data(), components=HIDDEN)
    x = torch.cat([a for a, _ in data()])
    with torch.no_grad():
        p = net(x)
        net.layers[1] = nn.Identity()

        def skipped(x: Tensor) -> Tensor:
            a = torch.tanh(net.layers[0](x))
            return net.ending(2 * net.head(torch.tanh(net.layers[2](torch.tanh(a)))))

        q = skipped(x)
    truth = float((p * (p / q).log()).sum(1).mean())
    assert found.of("layers.1", "skip")[0] == pytest.approx(truth, rel=1e-9)


def test_decisions_measure_and_add_up_as_of_logits():
    own, other = (drop_order(chain(end), data(), max_drop=1.0) for end in (nn.Identity(), nn.Softmax(1)))
    assert own.components == other.components
    np.testing.assert_allclose(other.effect, own.effect, rtol=1e-6)
    assert PROBABILITIES in other.notes
    displaced = []
    for ending in (nn.Identity(), nn.Softmax(1)):
        net = chain(ending)
        runner = runner_on(net, data(), 512, None)
        calls, ends = component_calls(runner, None, None)
        outputs = find_outputs(runner, calls, ends, None, None)[0]
        with torch.no_grad():
            net.layers[0].weight.mul_(1.1)
        displaced.append(outputs.displacement(runner.run()))
    torch.testing.assert_close(displaced[1], displaced[0])


def outputs_of(values: Sequence[Tensor], targets: Sequence[Tensor] | None = None, **options) -> Outputs:
    found = [torch.zeros(len(v), dtype=torch.long) for v in values] if targets is None else targets
    return Outputs(values, list(zip(values, found, strict=True)), **{"scale": "kl", **options})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_are_known_in_every_precision(dtype):
    p = torch.randn(50, 200, generator=torch.Generator().manual_seed(1)).softmax(1).to(dtype)
    assert outputs_of([p]).notes == (PROBABILITIES,)
    assert outputs_of([p[:30], p[30:]]).notes == (PROBABILITIES,)


def test_one_sample_that_is_none_tells_that_they_are_logits():
    p = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)).softmax(1)
    # It sums to 1, but holds a number below 0.
    odd = torch.cat([p, torch.tensor([[1.5, -0.5, 0.0, 0.0]])])
    assert outputs_of([p, odd]).notes == ()
    assert outputs_of([p, 0.9 * p]).notes == ()
    assert outputs_of([p], scale="relative").notes == ()


def test_positions_without_a_target_do_not_tell():
    p = torch.randn(6, 7, 4, generator=torch.Generator().manual_seed(1)).softmax(2)
    targets = torch.zeros(6, 7, dtype=torch.long)
    targets[:, 5:] = -100
    p[:, 5:] = torch.nan
    found = outputs_of([p], [targets])
    assert found.notes == (PROBABILITIES,)
    assert not found.compare([p]).effect


def test_a_class_of_probability_0_counts_as_the_smallest_number():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    truth = 0.5 * np.log(0.5) + 0.5 * (np.log(0.5) - np.log(torch.finfo(torch.float32).tiny))
    assert outputs_of([p]).compare([q]).effect == pytest.approx(truth, rel=1e-6)
    assert outputs_of([p]).compare([p]).effect == pytest.approx(0.0, abs=1e-12)
    # So does what an alteration puts below 0, and what is left is taken to sum to 1.
    below = torch.tensor([[1.2, -0.2, 0.0]])
    assert outputs_of([p]).compare([below]).effect == pytest.approx(truth + 0.5 * np.log(1.2), rel=1e-6)
