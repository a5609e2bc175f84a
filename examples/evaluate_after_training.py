"""Train without the monitor, keep checkpoints, and see afterwards how the credits moved.

Nothing has to be planned before the training: any folder of Lightning checkpoints or bare state dicts
will do. The same from the shell:
``lightning-koopman evaluate --model pkg.mod:Model --data pkg.mod:batches --ckpt 'runs/**/*.ckpt'``.

Run ``python evaluate_after_training.py --out FOLDER``, then ``tensorboard --logdir FOLDER``.
"""

import argparse
from math import hypot
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_koopman import evaluate_checkpoints


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def train(model, data, out, epochs):
    """Train, and give the folder of one checkpoint every second epoch."""
    checkpoints = ModelCheckpoint(every_n_epochs=2, save_top_k=-1)
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=[checkpoints], logger=CSVLogger(out), log_every_n_steps=5
    )
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))
    return Path(checkpoints.dirpath)


def print_moves(reports):
    """Print credits by step and how far they moved, but for the last one, which is 0 by definition."""
    first, last = reports[0], reports[-1]
    print("credit at step " + "".join(f"{report.step:>8}" for report in reports) + "   moved by")
    for i, component in enumerate(last.components[:-1]):
        moved = last.credit[i] - first.credit[i]
        error = hypot(first.stderr["credit"][i], last.stderr["credit"][i])
        verdict = "" if abs(moved) > 2 * error else ", within twice its error"
        values = "".join(f"{report.credit[i]:8.3f}" for report in reports)
        print(f"{component:15}{values}   {moved:+.3f} ± {error:.3f}{verdict}")


def main(out, epochs):
    L.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    seen, unseen = random_split(digits, [0.6, 0.4])
    model = Classifier()
    checkpoints = train(model, seen, out, epochs)
    reports = evaluate_checkpoints(
        model, checkpoints, DataLoader(unseen, batch_size=256), logdir=checkpoints.parent / "credits"
    )
    print_moves(reports)
    print(reports[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="koopman_examples", help="folder for all that is written")
    parser.add_argument("--epochs", type=int, default=10)
    main(**vars(parser.parse_args()))
