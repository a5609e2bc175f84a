"""Your own LightningModule and Trainer, watched: ``python own_trainer.py FOLDER``.

Two lines are new, marked below. Afterwards ``tensorboard --logdir FOLDER`` shows the credits evolve.
"""

import sys

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_koopman import KoopmanCreditMonitor


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10)
        )

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    L.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    train, val = random_split(digits, [0.6, 0.4])
    monitor = KoopmanCreditMonitor(every_n_epochs=2)  # new
    folder = sys.argv[1] if len(sys.argv) > 1 else "koopman_examples"
    trainer = L.Trainer(max_epochs=10, default_root_dir=folder, callbacks=[monitor], log_every_n_steps=5)
    trainer.fit(Classifier(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, 256))
    print(monitor.report)  # new
