"""A small LightningModule, its data and a Trainer without noise, shared by the Lightning tests."""

import importlib
from typing import Any

import lightning as L
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class LitNet(L.LightningModule):
    def __init__(self, width: int = 16, *, freeze_norm: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(8, width),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Dropout(0.3),
            nn.Linear(width, 12),
            nn.Tanh(),
            nn.Linear(12, 3),
        )
        self.forward_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forward_calls += 1
        return self.net(x)

    def on_train_epoch_start(self) -> None:
        if self.hparams["freeze_norm"]:
            self.net[1].eval()
            self.net[1].requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def small_module(namespace: str = "lightning.pytorch") -> Any:
    """Make a class of small LightningModules with their data, in either of Lightning's namespaces."""

    class Small(importlib.import_module(namespace).LightningModule):
        def __init__(self, width: int = 16) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

        def train_dataloader(self) -> DataLoader:
            return loaders()[0]

        def val_dataloader(self) -> DataLoader:
            return loaders()[1]

    return Small


def dataset(n_samples: int = 160, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_samples, 8, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(dim=1))


def loaders(**options: Any) -> tuple[DataLoader, DataLoader]:
    train = DataLoader(dataset(), batch_size=40, shuffle=True, **options)
    return train, DataLoader(dataset(seed=1), batch_size=50)


def quiet_trainer(folder: Any, callbacks: list[Any], kind: Any = L.Trainer, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 2,
        "default_root_dir": folder,
    }
    return kind(callbacks=callbacks, **(defaults | options))


class Stops(L.Callback):
    """Ends a training behind its second epoch, which no one knew to be the last."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == 1


def newest(monitor: Any) -> Any:
    assert monitor.report is not None
    return monitor.report


def events(folder: Any) -> EventAccumulator:
    """Read what TensorBoard's files in a folder, or in one file, hold."""
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
