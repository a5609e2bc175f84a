"""Find the part that broke, without the old weights and without the old samples.

A small network learns handwritten digits, and a reference of it is saved: a file of linear operators
and means that holds no weights and no samples. Training goes on for a little, so
that all weights move, and then a tenth of the weights of one block change their sign. The network still
answers, less well; which block is to blame is read from the reference and samples that neither training
nor the reference saw.

Run ``python find_the_fault.py --out FOLDER``.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from lightning_koopman import credit_report, drift


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x):
        return x + self.body(x)


def train(network, x, y, epochs, rate):
    optimizer = torch.optim.AdamW(network.parameters(), rate)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(network(x[chosen]), y[chosen]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(network, x, y):
    return float((network(x).argmax(dim=1) == y).float().mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs", help="folder for the reference")
    folder = Path(parser.parse_args().out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels))
    x, y = torch.tensor(pixels / 16).float()[order], torch.tensor(labels)[order]
    first, second = slice(0, 900), slice(900, None)

    blocks = [Block(48) for _ in range(8)]
    network = nn.Sequential(nn.Linear(64, 48), *blocks, nn.Linear(48, 10))
    train(network, x[first], y[first], epochs=20, rate=2e-3)
    path = folder / "reference.safetensors"
    credit_report(network, x[first].split(300)).save_reference(path)

    # Later: training went on, and something happened to block 5.
    train(network, x[first], y[first], epochs=1, rate=2e-4)
    before = accuracy(network, x[second], y[second])
    weight = network[5].body[1].weight
    with torch.no_grad():
        weight[torch.rand_like(weight) < 0.1] *= -1
    after = accuracy(network, x[second], y[second])
    print(f"accuracy {before:.3f}; a fault in component 5 makes that {after:.3f}")
    print(drift(path, network, x[second].split(300)))


if __name__ == "__main__":
    main()
