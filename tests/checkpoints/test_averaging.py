"""Checkpoints of trainings with weight averaging, as Lightning writes them."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lit import quiet_trainer, small_module
from torch import Tensor, nn

from lightning_koopman import EvaluationError, evaluate_checkpoints
from lightning_koopman.network.weights import CheckpointError, load_checkpoint

averaging = pytest.importorskip(
    "lightning.pytorch.callbacks.weight_averaging", reason="this Lightning has no WeightAveraging"
)


Plain = small_module()


class Normed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(16))


class Seen(L.Callback):
    """Copies the weights that the training itself has when each checkpoint is written."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights.append(next(pl_module.parameters()).detach().clone())


def fit(folder: Path, callback: L.Callback, model: L.LightningModule, **options: Any) -> Seen:
    torch.manual_seed(0)
    seen = Seen()
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    options |= {"enable_checkpointing": True, "limit_val_batches": 0}
    trainer = quiet_trainer(folder, [callback, seen, saving], **options)
    trainer.fit(model)
    trainer.save_checkpoint(folder / "end.ckpt")
    return seen


def first(path: Path, weights: Any) -> Tensor:
    return next(iter(load_checkpoint(path, weights=weights).state_dict.values()))


def test_ema_checkpoints_hold_both(tmp_path):
    callback = averaging.EMAWeightAveraging(decay=0.5)
    seen = fit(tmp_path, callback, Plain(), max_epochs=2)
    path = tmp_path / "epoch=1.ckpt"
    assert torch.equal(first(path, "current"), seen.weights[1])
    assert torch.equal(first(path, "averaged"), first(path, "saved"))
    assert not torch.equal(first(path, "averaged"), first(path, "current"))
    reports = {
        weights: evaluate_checkpoints(Plain(), path, [torch.randn(90, 8)], weights=weights)[0]
        for weights in ("saved", "averaged", "current")
    }
    assert reports["averaged"].total == pytest.approx(reports["saved"].total, abs=0.5)
    assert reports["averaged"].source["options"] != reports["current"].source["options"]


def test_swa_checkpoints_hold_both_once_averaging_began(tmp_path):
    seen = fit(tmp_path, StochasticWeightAveraging(0.1, swa_epoch_start=2), Plain(), max_epochs=5)
    early, late = tmp_path / "epoch=0.ckpt", tmp_path / "epoch=3.ckpt"
    with pytest.raises(CheckpointError, match=r"epoch=0\.ckpt was saved before Stochastic.* began"):
        load_checkpoint(early, weights="averaged")
    assert torch.equal(first(late, "current"), seen.weights[3])
    # An epoch's weights enter the average when the next one starts.
    expected = torch.stack(seen.weights[:3]).mean(dim=0)
    torch.testing.assert_close(first(late, "averaged"), expected)


def test_swa_with_batch_norm_has_no_statistics_for_the_average(tmp_path):
    fit(tmp_path, StochasticWeightAveraging(0.1, swa_epoch_start=1), Normed(), max_epochs=3)
    with pytest.raises(CheckpointError, match=r"without their BatchNorm statistics.*current weights"):
        load_checkpoint(tmp_path / "epoch=1.ckpt", weights="averaged")
    assert load_checkpoint(tmp_path / "epoch=1.ckpt", weights="current")


def test_weights_that_are_not_there_are_named(tmp_path):
    torch.save({"state_dict": Plain().state_dict(), "global_step": 1}, tmp_path / "a.ckpt")
    with pytest.raises(EvaluationError, match=r"a\.ckpt holds no averaged weights.*leave out --weights"):
        evaluate_checkpoints(Plain(), tmp_path, [torch.randn(90, 8)], weights="averaged")
    content = {"state_dict": Plain().state_dict(), "callbacks": {"EMA": {"latest_update_step": 3}}}
    torch.save(content, tmp_path / "ended.ckpt")
    with pytest.raises(CheckpointError, match=r"ended\.ckpt was saved after weight averaging had ended"):
        load_checkpoint(tmp_path / "ended.ckpt", weights="current")
    assert load_checkpoint(tmp_path / "ended.ckpt", weights="averaged")
    with pytest.raises(ValueError, match="weights is 'best'; choose 'saved', 'averaged' or 'current'"):
        load_checkpoint(tmp_path / "a.ckpt", weights="best")  # type: ignore[arg-type]
