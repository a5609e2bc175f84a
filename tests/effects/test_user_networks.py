"""Effects in networks that draw in eval mode, derive their weights or run under checkpoints."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_koopman import credit_report, intervene, predict_effects
from lightning_koopman.network.forward_runner import ForwardRunner


class Sampling(nn.Module):
    """Draws from every global generator, also behind its last component but one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.tanh(self.a(x)) + torch.randn(len(x), 8)
        x = torch.tanh(self.b(x)) + torch.from_numpy(np.random.randn(len(x), 8)).float()
        return self.c(x) * (1 + torch.rand(len(x), 4)) + random.random()


@pytest.fixture
def sampling():
    torch.manual_seed(0)
    batches = torch.randn(400, 6).split(100)
    model = Sampling().eval()
    return model, batches, credit_report(model, batches)


def test_weak_noise_changes_nothing_in_a_network_that_draws(sampling):
    model, batches, report = sampling
    kinds = ["output_noise", "weight_noise"]
    measured = intervene(model, batches, report, kinds, strength=1e-6, draws=2)
    predicted = predict_effects(model, batches, report, kinds, strength=1e-6)
    assert 0 < measured.effect.min() <= measured.effect.max() < 1e-10
    for column, kind in enumerate(kinds):
        # Of the same size: what the network draws is the same in both.
        np.testing.assert_allclose(predicted.effects.values[kind], measured.effect[:, column], rtol=2)


def test_a_batch_has_its_own_random_numbers_in_every_run_and_the_users_go_on(sampling):
    model, batches, _ = sampling
    runner = ForwardRunner(model, [batches[0], batches[0]])
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    with torch.no_grad():
        first, second = runner.run(), runner.run()
    assert torch.equal(torch.rand(5), expected)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.allclose(first[0], first[1])
