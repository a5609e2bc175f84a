"""Buffers that validation writes, and the modes it runs in: a report is about what was validated."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from lit import Stops, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_koopman import KoopmanCreditMonitor, credit_report
from lightning_koopman.network.capture.calls import Pass
from lightning_koopman.network.capture.kept_states import KeptStates

pytestmark = pytest.mark.filterwarnings("ignore:the Trainer has no logger")

X = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, :3] ** 2).argmax(1)


class Net(L.LightningModule):
    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.second = nn.Linear(6, 8), between, nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.relu(self.between(self.first(x))))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class InTrainMode(Net):
    def on_validation_model_eval(self) -> None:
        self.train()


class Scale(nn.Module):
    """Divides by a running scale that every pass updates, as observers of quantisers do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.scale = 0.9 * self.scale + 0.1 * x.detach().abs().amax()
        return x / self.scale


def fitted(folder: Any, model: Net, *callbacks: L.Callback, epochs: int = 2) -> None:
    loader = DataLoader(TensorDataset(X, Y), 64)
    quiet_trainer(folder, list(callbacks), max_epochs=epochs).fit(model, loader, loader)


def skipped_by_hand(model: Net) -> float:
    """Mean divergence where the second layer gives what it takes, in the modes that stand."""
    found = []
    with torch.no_grad():
        for x in X.split(64):
            before = model(x).double().log_softmax(1)
            hook = model.second.register_forward_hook(lambda _, args, __: args[0])
            after = model(x).double().log_softmax(1)
            hook.remove()
            found.append((before.exp() * (before - after)).sum(1))
    return float(torch.cat(found).mean())


def test_statistics_of_batches_in_train_mode_are_not_weights_that_were_changed(tmp_path):
    states = []
    for monitors in ([], [KoopmanCreditMonitor(every_n_epochs=1, on_error="raise", figures=False)]):
        torch.manual_seed(0)
        model = InTrainMode(nn.BatchNorm1d(8))
        fitted(tmp_path, model, *monitors)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    (monitor,) = monitors
    assert [report.step for report in monitor.history] == [4, 8]
    assert monitor.report.notes == ()
    # Effects are about the function that was validated, which takes the statistics of each batch.
    found = dict(zip(monitor.report.components, monitor.report.effects.values["skip"], strict=True))
    in_train, in_eval = skipped_by_hand(model.train()), skipped_by_hand(model.eval())
    assert found["second"] == pytest.approx(in_train, rel=1e-4)
    assert abs(in_train - in_eval) > 1e-2 * in_train


def test_what_was_validated_with_dropout_stays_and_its_effects_are_not_those_without(tmp_path):
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(every_n_epochs=1, on_error="raise", figures=False)
    model = InTrainMode(nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5)))
    fitted(tmp_path, model, monitor)
    assert [report.step for report in monitor.history] == [4, 8]
    # Half of the units are noise, which a linear map does not see: 0.5 of the second moment about 0.
    assert monitor.report.r2[0] < 0.6 < 0.95 < credit_report(model, X.split(64)).r2[0]
    assert monitor.report.effects is None
    assert len(monitor.report.notes) == 2
    assert "random numbers go into" in monitor.report.notes[0]
    assert "does not give again what it gave (it samples" in monitor.report.notes[1]


@pytest.mark.parametrize("max_samples", [4096, 128])
def test_buffers_that_each_pass_updates_are_not_weights_that_were_changed(max_samples, tmp_path):
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(
        every_n_epochs=1, max_samples=max_samples, on_error="raise", figures=False
    )
    fitted(tmp_path, Net(Scale()), monitor)
    assert [report.step for report in monitor.history] == [4, 8]
    assert monitor.report.notes == ()
    # The first step gives again what it gave, from the buffers that it began with.
    assert np.isfinite(monitor.report.effects.values["skip"]).all()


def test_calls_are_run_again_in_the_modes_of_validation_where_training_stopped_behind_it(tmp_path):
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(every_n_epochs=5, on_error="raise", figures=False)
    model = InTrainMode(nn.BatchNorm1d(8))
    fitted(tmp_path, model, monitor, Stops(), epochs=9)
    assert [report.step for report in monitor.history] == [4, 8]
    in_train = credit_report(model, X.split(64), forward_fn=lambda m, x: m.train()(x))
    in_eval = credit_report(model, X.split(64))
    assert monitor.report.credit == pytest.approx(in_train.credit, abs=1e-6)
    assert abs(in_train.credit - in_eval.credit).max() > 1e-3


def test_masks_that_prune_when_validation_ends_are_still_weights_that_were_changed(tmp_path):
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(every_n_epochs=1, on_error="raise", figures=False)
    pruning = ModelPruning("l1_unstructured", amount=0.3, prune_on_train_epoch_end=False)
    model = Net(nn.BatchNorm1d(8))
    fitted(tmp_path, model, pruning, monitor)
    assert monitor.report.credit == pytest.approx(credit_report(model, X.split(64)).credit, abs=1e-6)
    assert any("were changed after the last measurement" in n for n in monitor.report.notes)


@pytest.mark.parametrize("spoilt", ["_on_input", "_on_output"])
def test_an_error_of_a_hook_is_not_a_validation_that_runs_no_component(spoilt, tmp_path, monkeypatch):
    def fails(*_: Any) -> bool:
        raise RuntimeError("the hook broke")

    places = {"_on_input": (KeptStates, "add_inputs"), "_on_output": (Pass, "count")}
    monkeypatch.setattr(*places[spoilt], fails)
    monitor = KoopmanCreditMonitor(every_n_epochs=1, on_error="raise", figures=False)
    with pytest.raises(RuntimeError, match="the hook broke"):
        fitted(tmp_path, Net(nn.Identity()), monitor)


def test_buffers_are_those_of_before_the_first_batch_that_is_watched(tmp_path: Any) -> None:
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False, max_samples=64)
    loader = DataLoader(TensorDataset(X * torch.linspace(1, 9, len(X))[:, None], Y), 16)
    quiet_trainer(tmp_path, [monitor], max_epochs=1).fit(Net(Scale()), loader, loader)
    # The second of sixteen, before which the first one has changed the scale.
    assert monitor.report is not None
    assert not [note for note in monitor.report.notes if "give again" in note]
    assert monitor.report.effects is not None
