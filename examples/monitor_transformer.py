"""Watch the blocks of a transformer encoder that reads each digit as 8 tokens, its rows of 8 pixels.

No component is named: the monitor finds the embedding, the encoder's blocks and the head by itself. Two
tables are printed, of the first measurement and of the last: what leaving each block out costs
(``skip``), what it adds (``gain``), and how well a linear map stands in for it (``R²``).

Run ``python monitor_transformer.py --out FOLDER``, then ``tensorboard --logdir FOLDER``.
"""

import argparse

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_koopman import KoopmanCreditMonitor


class RowTransformer(L.LightningModule):
    """Classifies images of shape ``(n_samples, 8, 8)``, one row per token."""

    def __init__(self, width=32, depth=3):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.1 * torch.randn(8, width))
        block = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=64, dropout=0.1, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        tokens = self.encoder(self.embed(images) + self.position)
        return self.head(tokens.mean(dim=1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        correct = self(batch[0]).argmax(dim=1) == batch[1]
        self.log("val_accuracy", correct.float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(out, epochs):
    L.seed_everything(0)
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)
    digits = TensorDataset(images, torch.tensor(data.target))
    train, val = random_split(digits, [0.5, 0.5])
    monitor = KoopmanCreditMonitor(every_n_epochs=4)
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=[monitor], default_root_dir=out, log_every_n_steps=5
    )
    trainer.fit(
        RowTransformer(), DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=128)
    )
    print(monitor.history[0])
    print(monitor.report)
    print(f"val_accuracy {trainer.callback_metrics['val_accuracy']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="koopman_examples", help="folder for all that is written")
    parser.add_argument("--epochs", type=int, default=8)
    main(**vars(parser.parse_args()))
