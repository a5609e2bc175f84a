"""Each measurement of a training held against the one before it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from lit import LitNet, loaders, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_koopman import KoopmanCreditMonitor, Options, credit_report, drift

pytestmark = pytest.mark.filterwarnings("ignore:the Trainer has no logger")


class Training(LitNet):
    """Trains the last layer alone, or nothing."""

    def __init__(self, rate: float) -> None:
        super().__init__(width=24)
        self.rate = rate
        self.net = nn.Sequential(
            nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)
        )
        self.net[:3].requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net[4].parameters(), lr=self.rate)


def trained(folder: Any, rate: float, **given: Any) -> KoopmanCreditMonitor:
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(every_n_epochs=1, on_error="raise", figures=False, **given)
    trainer = quiet_trainer(folder, [monitor], max_epochs=4)
    trainer.fit(Training(rate), *loaders())
    return monitor


@pytest.mark.parametrize("max_dim", [256, 6])
def test_weights_that_stay_do_not_drift(tmp_path: Any, max_dim: int) -> None:
    monitor = trained(tmp_path, 0.0, options=Options(max_dim=max_dim))
    # The last report is about the coordinates of its own weights, which here are those of the others.
    assert len(monitor.drifts) == 3
    for found in monitor.drifts[:2]:
        assert found.drift == pytest.approx(np.zeros(3), abs=1e-6)
        assert not found.changed.any()


class Stops(Training):
    def on_train_epoch_end(self) -> None:
        self.trainer.should_stop = self.current_epoch == 2


def test_a_training_that_stops_early_keeps_the_drift_of_its_last_report(tmp_path: Any) -> None:
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(every_n_epochs=1, on_error="raise", figures=False)
    quiet_trainer(tmp_path, [monitor], max_epochs=9).fit(Stops(0.5), *loaders())
    assert monitor.report is not None
    assert monitor.report.effects is not None  # it was completed when the training had ended
    assert monitor.report.step == monitor.drifts[-1].step == 12
    np.testing.assert_array_equal(monitor.report.drift, monitor.drifts[-1].drift)


def test_the_component_that_learns_drifts_and_the_frozen_ones_do_not(tmp_path: Any) -> None:
    monitor = trained(tmp_path, 0.5)
    for found in monitor.drifts:
        assert found.drift[:2] == pytest.approx(np.zeros(2), abs=1e-6)
        assert found.drift[2] > 1e-3
        assert found.culprit in (None, "net.4")
    assert [found.since for found in monitor.drifts] == [4, 8, 12]
    assert [found.step for found in monitor.drifts] == [8, 12, 16]


def test_the_drift_is_that_of_the_function_of_the_same_name(tmp_path: Any) -> None:
    # An independent way: the network of the first report, kept aside, against the network as it ends.
    class Kept(Training):
        def on_validation_end(self) -> None:
            if not self.trainer.sanity_checking and self.current_epoch == 0:
                self.first = copy.deepcopy(self.net)

    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(every_n_epochs=3, on_error="raise", figures=False)
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=3)
    model = Kept(0.5)
    trainer.fit(model, *loaders())
    data = [batch[0] for batch in loaders()[1]]
    expected = drift(credit_report(model.first, data), model.net, data)
    (found,) = monitor.drifts
    assert found.drift == pytest.approx(expected.drift, abs=1e-6)
    assert found.stderr == pytest.approx(expected.stderr, abs=1e-6)


def test_states_whose_directions_turned_have_no_drift_but_credits_as_ever(tmp_path: Any) -> None:
    # A wide state of a layer that is drawn anew: what was kept of it holds little of what it is now.
    class Redrawn(Training):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                nn.init.orthogonal_(self.net[0].weight, generator=torch.Generator().manual_seed(5))

    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(
        every_n_epochs=1, on_error="raise", figures=False, options=Options(max_dim=3)
    )
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=3)
    trainer.fit(Redrawn(0.0), *loaders())
    first = monitor.drifts[0]
    assert np.isnan(first.drift[:2]).all()
    assert all(np.isfinite(report.credit).all() for report in monitor.history)


def test_without_drift_nothing_of_it_is_there(tmp_path: Any) -> None:
    monitor = trained(tmp_path, 0.5, drift=False)
    assert monitor.drifts == []


class Mix(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + x.roll(1, dims=1))


class Sequences(Training):
    """Runs on sequences, of which the first position, alone held valid, is the same in all of them."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self.net[1] = Mix()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.net(batch["x"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch["x"]).square().mean()


@pytest.mark.filterwarnings("ignore:60 samples are few")
def test_samples_of_one_input_have_no_drift_but_reports(tmp_path: Any) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(60, 3, 8), torch.tensor([[1, 0, 0]]).expand(60, 3)
    x[:, 0] = 1.0
    monitor = KoopmanCreditMonitor(every_n_epochs=1, on_error="raise", figures=False, effects=())
    samples = [{"x": one, "mask": held} for one, held in zip(x, mask, strict=True)]
    quiet_trainer(tmp_path, [monitor]).fit(Sequences(), DataLoader(samples, 30), DataLoader(samples, 30))
    assert len(monitor.history) == 3
    assert monitor.drifts == []
