"""What ``trainer.validate`` gives: a report as complete as the last one of a training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lit import LitNet, dataset, loaders, newest, quiet_trainer

from lightning_koopman import CreditReport, KoopmanCreditMonitor, component_effects

pytestmark = pytest.mark.filterwarnings("ignore:the Trainer has no logger")


def monitor_of(**given: Any) -> KoopmanCreditMonitor:
    return KoopmanCreditMonitor(on_error="raise", figures=False, **given)


def same(one: CreditReport, other: CreditReport) -> None:
    np.testing.assert_allclose(one.credit, other.credit)
    assert one.effects is not None
    assert other.effects is not None
    assert (one.effects.scale, one.effects.n_samples) == (other.effects.scale, other.effects.n_samples)
    for kind, values in one.effects.values.items():
        np.testing.assert_allclose(values, other.effects.values[kind], rtol=1e-5)
        np.testing.assert_allclose(one.effects.stderr[kind], other.effects.stderr[kind], rtol=1e-5)


def test_validation_alone_gives_the_effects_of_the_network(tmp_path: Any) -> None:
    torch.manual_seed(0)
    monitor, model = monitor_of(effects=["skip", "linear"]), LitNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = quiet_trainer(tmp_path, [monitor])
    trainer.validate(model, loaders()[1], verbose=False)
    found = newest(monitor).effects
    assert found is not None
    expected = component_effects(model.net, loaders()[1], kinds=["skip", "linear"], how="measured")
    assert (found.scale, found.n_samples) == ("kl", len(dataset(seed=1)))
    for kind in ("skip", "linear"):
        assert found.values[kind] == pytest.approx(expected.values[kind], rel=1e-4)
        for name, value in zip(found.components, found.values[kind], strict=True):
            assert float(trainer.callback_metrics[f"koopman/{kind}/{name}"]) == pytest.approx(value)
    assert found.metric_before == expected.metric_before
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_validation_behind_a_training_gives_its_last_report_again(tmp_path: Any) -> None:
    torch.manual_seed(0)
    monitor, model = monitor_of(), LitNet()
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=2)
    trainer.fit(model, *loaders())
    last = newest(monitor)
    for _ in range(2):
        trainer.validate(model, loaders()[1], verbose=False)
        assert newest(monitor) is not last
        same(newest(monitor), last)


def test_a_checkpoint_that_is_validated_has_its_own_effects(tmp_path: Any) -> None:
    torch.manual_seed(0)
    trained, model = monitor_of(), LitNet()
    trainer = quiet_trainer(tmp_path, [trained], max_epochs=1)
    trainer.fit(model, *loaders())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    monitor = monitor_of()
    other = quiet_trainer(tmp_path, [monitor])
    other.validate(LitNet(), loaders()[1], ckpt_path=str(tmp_path / "saved.ckpt"), verbose=False)
    same(newest(monitor), newest(trained))
    assert newest(monitor).step == newest(trained).step


class Moody(LitNet):
    """Computes between two of its calls what a replay of them would not."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.net[4:](2 * self.net[:4](batch[0]))


def test_where_calls_cannot_be_run_again_a_note_says_why(tmp_path: Any) -> None:
    torch.manual_seed(0)
    monitor = monitor_of()
    quiet_trainer(tmp_path, [monitor]).validate(Moody(), loaders()[1], verbose=False)
    report = newest(monitor)
    assert report.effects is None
    assert [note for note in report.notes if note.startswith("effects were not measured: ")]
