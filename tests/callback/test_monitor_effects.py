"""Effects that are measured on the calls that a training makes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from lit import LitNet, loaders, quiet_trainer
from torch import nn

from lightning_koopman import KoopmanCreditMonitor, component_effects
from lightning_koopman.callback.recorded_effects import pooled

pytestmark = pytest.mark.filterwarnings("ignore:the Trainer has no logger")


def trained(folder: Any, model: LitNet, **given: Any) -> tuple[KoopmanCreditMonitor, Any]:
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False, **given)
    trainer = quiet_trainer(folder, [monitor], max_epochs=2)
    trainer.fit(model, *loaders())
    return monitor, trainer


def test_the_effects_of_the_last_report_are_those_of_the_trained_network(tmp_path: Any) -> None:
    monitor, trainer = trained(tmp_path, LitNet(), every_n_epochs=1)
    assert monitor.report is not None
    assert [report.effects is None for report in monitor.history] == [True, False]
    found = monitor.report.effects
    assert found is not None
    net = trainer.lightning_module.net
    batches = [x for x, _ in loaders()[1]]
    expected = component_effects(net, batches, kinds=["skip"], scale="relative")
    assert found.components == tuple(f"net.{name}" for name in expected.components)
    assert found.values["skip"] == pytest.approx(expected.values["skip"], rel=1e-4)
    assert found.stderr["skip"] == pytest.approx(expected.stderr["skip"], rel=1e-3)
    assert found.n_samples == sum(len(x) for x in batches)
    for name, value in zip(found.components, found.values["skip"], strict=True):
        assert float(trainer.callback_metrics[f"koopman/skip/{name}"]) == pytest.approx(value)


def test_effects_of_a_training_that_ends_early_are_about_its_last_weights(tmp_path: Any) -> None:
    class Stopping(LitNet):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop = self.current_epoch == 1

    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False, max_overhead=0.0)
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=50)
    trainer.fit(Stopping(), *loaders())
    assert monitor.report is not None
    assert monitor.report.step == trainer.global_step == 8
    assert np.isfinite(monitor.report.stderr["credit"]).all()
    assert monitor.report.effects is not None
    expected = component_effects(
        trainer.lightning_module.net, [x for x, _ in loaders()[1]], scale="relative"
    )
    assert monitor.report.effects.values["skip"] == pytest.approx(expected.values["skip"], rel=1e-4)


def test_a_network_that_samples_has_no_effects_and_a_note_says_why(tmp_path: Any) -> None:
    class Sampling(LitNet):
        def __init__(self) -> None:
            super().__init__()
            self.net[3] = Noise()

    monitor, _ = trained(tmp_path, Sampling(), every_n_epochs=1)
    assert monitor.report is not None
    assert monitor.report.effects is None
    (note,) = [note for note in monitor.report.notes if "effects" in note]
    assert note.startswith("effects were not measured: ")
    assert "does not give again what it gave" in note


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


def test_none_are_measured_where_none_are_wanted(tmp_path: Any) -> None:
    monitor, trainer = trained(tmp_path, LitNet(), effects=())
    assert monitor.report is not None
    assert monitor.report.effects is None
    assert not [key for key in trainer.callback_metrics if "/skip/" in key]
    assert not [note for note in monitor.report.notes if "effects" in note]


@pytest.mark.parametrize("effects", ["skip", ["skip", "swap"]])
def test_unknown_effects_are_refused(effects: Any) -> None:
    with pytest.raises(ValueError, match=r"effects is .*; give a list of some of"):
        KoopmanCreditMonitor(effects=effects)


def test_processes_average_by_their_samples(tmp_path: Any) -> None:
    monitor, _ = trained(tmp_path, LitNet())
    assert monitor.report is not None
    first = monitor.report.effects
    assert first is not None
    n = first.n_samples
    other = dataclasses.replace(
        first, values={"skip": first.values["skip"] + 4}, n_samples=3 * n, stderr={"skip": np.zeros(3)}
    )
    found = pooled([dataclasses.replace(first, stderr={"skip": np.full(3, 0.8)}), other])
    assert found.n_samples == 4 * n
    assert found.values["skip"] == pytest.approx(first.values["skip"] + 3)
    assert found.stderr["skip"] == pytest.approx(np.full(3, 0.2))
    assert pooled([first]).values["skip"] == pytest.approx(first.values["skip"])
