"""Freeze what stopped changing: a small callback of your own that reads ``monitor.history``.

A component counts as settled when its credit has, for some measurements in a row, moved by less than
twice its standard error or than a tolerance. (The tolerance is needed because credits close to the
output have errors near 0, and those of a network trained on cross-entropy never quite stand still.)
Settled components are frozen from the input on, because only then does the backward pass end earlier.
The last component is never frozen: its credit is 0 by definition.

The same training runs twice, plain and with freezing, and both are printed side by side: parameters
updated, CPU seconds in backward passes and in the whole training, and accuracy. The whole training
includes the monitor's own work, which on a network as small as this one is more than freezing saves.
That work does not grow with the length of an epoch; what is saved does.

Run ``python early_freezing.py --out FOLDER``.
"""

import argparse
import time
from math import hypot

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_koopman import KoopmanCreditMonitor


class FreezeSettled(L.Callback):
    """Freezes components, from the input on, whose credit stopped changing beyond its error.

    Args:
        monitor: The monitor of the same Trainer, placed before this callback.
        patience: How many measurements in a row have to agree with the one before them all.
        tolerance: A change below this many nats counts as none, whatever the error.
    """

    def __init__(self, monitor, patience=2, tolerance=0.1):
        self.monitor, self.patience, self.tolerance = monitor, patience, tolerance
        self.frozen_at = {}

    def on_validation_epoch_end(self, trainer, pl_module):
        recent = self.monitor.history[-self.patience - 1 :]
        if trainer.sanity_checking or len(recent) <= self.patience:
            return
        report = recent[-1]
        for i, component in enumerate(report.components[:-1]):
            if component in self.frozen_at:
                continue
            if not self._settled(recent, i):
                break
            # A component may be several modules, such as a linear layer, its norm and a ReLU.
            for name in report.parts[component]:
                pl_module.get_submodule(name).requires_grad_(False)
            self.frozen_at[component] = trainer.current_epoch + 1

    def _settled(self, reports, i):
        before = reports[0]
        return all(
            report.trusted[i]
            and abs(report.credit[i] - before.credit[i])
            <= max(self.tolerance, 2 * hypot(report.stderr["credit"][i], before.stderr["credit"][i]))
            for report in reports[1:]
        )


class Costs(L.Callback):
    """Adds up parameters updated and CPU seconds in backward passes and in the whole training."""

    def __init__(self):
        self.updates, self.backward_s, self.fit_s = 0, 0.0, 0.0

    def on_train_start(self, trainer, pl_module):
        self.fit_s = -time.process_time()

    def on_before_backward(self, trainer, pl_module, loss):
        self.updates += sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        self.backward_s -= time.process_time()

    def on_after_backward(self, trainer, pl_module):
        self.backward_s += time.process_time()

    def on_train_end(self, trainer, pl_module):
        self.fit_s += time.process_time()


class Classifier(L.LightningModule):
    def __init__(self, width=192):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 10),
        )

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("accuracy", (self.net(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def train(parts, out, epochs, seed, callbacks):
    """Train from the same weights in the same data order every time, and give costs and accuracy."""
    L.seed_everything(seed, verbose=False)
    costs = Costs()
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, costs],
        logger=CSVLogger(out, name="freezing" if callbacks else "plain"),
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=10,
    )
    loaders = [DataLoader(part, batch_size=64, shuffle=i == 0) for i, part in enumerate(parts)]
    model = Classifier()
    trainer.fit(model, *loaders[:2])
    return costs, trainer.test(model, loaders[2], verbose=False)[0]["accuracy"]


def main(out, epochs, every, patience, tolerance, seed):
    pixels, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    parts = random_split(digits, [0.5, 0.35, 0.15], torch.Generator().manual_seed(0))

    plain, plain_accuracy = train(parts, out, epochs, seed, [])
    monitor = KoopmanCreditMonitor(every_n_epochs=every)
    freeze = FreezeSettled(monitor, patience, tolerance)
    frozen, frozen_accuracy = train(parts, out, epochs, seed, [monitor, freeze])

    print(monitor.report)
    for component, epoch in freeze.frozen_at.items():
        print(f"{component} frozen after epoch {epoch} of {epochs}")
    if not freeze.frozen_at:
        print("nothing settled, so nothing was frozen")
    print(f"{'':27}{'plain':>10}{'freezing':>10}")
    for name, attribute, scale in (
        ("millions of updates", "updates", 1e6),
        ("CPU s in backward passes", "backward_s", 1),
        ("CPU s in the training", "fit_s", 1),
    ):
        values = [getattr(costs, attribute) / scale for costs in (plain, frozen)]
        print(f"{name:27}{values[0]:10.2f}{values[1]:10.2f}  {values[1] / values[0] - 1:+.0%}")
    print(f"{'test accuracy':27}{plain_accuracy:10.3f}{frozen_accuracy:10.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="koopman_examples", help="folder for all that is written")
    parser.add_argument("--epochs", type=int, default=45)
    parser.add_argument("--every", type=int, default=3, help="epochs between two measurements")
    parser.add_argument("--patience", type=int, default=2, help="measurements that have to agree")
    parser.add_argument("--tolerance", type=float, default=0.1, help="nats that count as no change")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
