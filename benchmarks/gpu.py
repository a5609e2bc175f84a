"""Measures on a GPU what a report costs beside the forward passes that it rides on.

``python benchmarks/gpu.py docs/gpu.md`` prints that page and writes it to the path given. Weights and
data are random, and the networks are written out here, so nothing is downloaded. ``--tiny`` runs the
same on small networks, on the CPU too, to see that it works.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_koopman as lk
from lightning_koopman.koopman.credit import compute_credits
from lightning_koopman.measurement.measurement import Measurement, merge_processes

Batches = list[Tensor]


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut."""

    def __init__(self, taken: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(taken, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or taken != 4 * width:
            conv = nn.Conv2d(taken, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def resnet50(depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> nn.Module:
    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    stages: list[nn.Module] = []
    taken = width
    for place, depth in enumerate(depths):
        blocks = []
        for number in range(depth):
            stride = 2 if place and not number else 1
            blocks.append(Bottleneck(taken, width << place, stride))
            taken = 4 * width << place
        stages.append(nn.Sequential(*blocks))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(taken, classes)]
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *stages, *head)


class Attention(nn.Module):
    """Self-attention over all positions, or over those before."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=self.causal)
        return self.proj(mixed.transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    """One layer of a transformer, norms first."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """ViT-B/16 unless told otherwise."""

    def __init__(self, size: int = 224, patch: int = 16, width: int = 768, depth: int = 12) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, width // 64, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class GPT(nn.Module):
    """GPT-2 (124 million parameters) unless told otherwise; gives logits for the last position."""

    def __init__(
        self, words: int = 50257, length: int = 1024, width: int = 768, depth: int = 12
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(length, width)
        self.h = nn.Sequential(*(Block(width, width // 64, causal=True) for _ in range(depth)))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        return self.lm_head(self.ln_f(self.h(x))[:, -1])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    wait(device)
    start = time.perf_counter()
    result = run()
    wait(device)
    return time.perf_counter() - start, result


def forward_seconds(model: nn.Module, batches: Batches, device: torch.device, repeats: int = 3) -> float:
    def run() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    timed(run, device)
    return statistics.median(timed(run, device)[0] for _ in range(repeats))


def peak(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else float("nan")


def row(
    name: str, model: nn.Module, batches: Batches, device: torch.device, **options: Any
) -> tuple[list[str], Measurement, lk.CreditReport]:
    """Time forward passes, the passes of a report and its fits, and give the measurement too."""
    model = model.to(device).eval()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    forward = forward_seconds(model, batches, device)
    plain = peak(device)
    passes, fits = [], []
    for _ in range(3):  # the first one warms up
        measurement = Measurement(model, options=lk.Options(**options))
        passes.append(timed(lambda m=measurement: m.run(model, batches), device)[0])
        seconds, report = timed(measurement.report, device)
        fits.append(seconds)
    along, after = statistics.median(passes[1:]), statistics.median(fits[1:])
    cells = [
        name,
        f"{measurement.n_samples:,}",
        str(len(report.components)),
        f"{forward:.2f}",
        f"{along:.2f}",
        f"{after:.2f}",
        f"{along / forward:.2f}",
        f"{(along + after) / forward:.2f}",
        f"{peak(device) - plain:,.0f}",
    ]
    return cells, measurement, report


def networks(
    tiny: bool, device: torch.device
) -> Iterator[tuple[str, nn.Module, Batches, dict[str, Any]]]:
    """Make each network, its batches on the device and the options it is measured with."""
    torch.manual_seed(0)
    count, size, pixels = (8, 40, 32) if tiny else (32, 64, 224)
    images = [torch.randn(size, 3, pixels, pixels, device=device) for _ in range(count)]
    small = {"max_dim": 16} if tiny else {}
    resnet = resnet50((1, 1), 8, 10) if tiny else resnet50()
    yield "ResNet-50", resnet, images, small
    vit = ViT(32, 8, 64, 2) if tiny else ViT()
    yield "ViT-B/16", vit, images, small
    gpt = GPT(100, 16, 64, 2) if tiny else GPT()
    words, length = (100, 16) if tiny else (50257, 256)
    texts = [torch.randint(0, words, (size, length), device=device) for _ in range(count)]
    yield "GPT-2, 256 positions", gpt, texts, {"reduce": "last"} | small


def credits_apart(a: lk.CreditReport, b: lk.CreditReport) -> str:
    return f"{abs(a.credit - b.credit).max():.1e}"


def extras(tiny: bool, device: torch.device) -> Iterator[tuple[str, str]]:
    """Time on a ViT what goes beyond one report."""
    _, model, batches, options = list(networks(tiny, device))[1]
    _, measurement, report = row("", model, batches, device, **options)
    forward = forward_seconds(model, batches, device)
    layout, moments = measurement._laid_out(), measurement._moments
    assert moments is not None
    assert measurement.basis is not None
    center = measurement.basis.center
    for place in ("cpu", str(device)):
        held, about = moments.to(place), [offset.to(place) for offset in center]
        run = functools.partial(compute_credits, layout, held, measurement.options, center=about)
        seconds = [timed(run, device)[0] for _ in range(2)][1]
        yield f"fits with the sums on {place}", f"{seconds:.2f} s"
    half = copy.deepcopy(model).bfloat16()
    halved = [batch.bfloat16() for batch in batches]
    other = lk.credit_report(half, halved, options=lk.Options(**options))
    yield "bf16 against float32: largest difference of a credit", f"{credits_apart(report, other)} nats"
    if not tiny:
        compiled = torch.compile(model)
        seconds = forward_seconds(compiled, batches, device)
        yield "torch.compile: forward", f"{seconds:.2f} s"
        took, other = timed(
            lambda: lk.credit_report(compiled, batches, options=lk.Options(**options)), device
        )
        yield "torch.compile: report, whose passes are eager", f"{took:.2f} s"
        yield "torch.compile against eager: largest difference of a credit", credits_apart(report, other)
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        shared = Measurement(model, options=lk.Options(**options), shared=True)
        shared.run(model, batches)
        took, _ = timed(lambda: merge_processes(shared, device), device)
        # Bases of processes are of samples from everywhere, as those of one that holds its rows.
        alone = Measurement(model, options=lk.Options(**options), hold=2**40)
        alone.run(model, batches)
        yield f"{backend}, one process: agreeing on bases and adding up", f"{took:.2f} s"
        yield (
            f"{backend} against none: largest difference of a credit",
            credits_apart(alone.report(), shared.report()),
        )
        dist.destroy_process_group()
    few = batches[: max(1, 512 // len(batches[0]))]
    if "component_effects" in lk.__all__:
        for how in ("measured", "predicted"):
            took, _ = timed(lambda h=how: lk.component_effects(model, few, report, how=h), device)
            samples = len(few) * len(few[0])
            passes = took / (forward * len(few) / len(batches))
            yield f"effects, {how}, {samples} samples", f"{took:.2f} s, {passes:.1f} passes over them"
    if "drift" in lk.__all__:
        took, _ = timed(lambda: lk.drift(report, model, batches), device)
        yield "drift", f"{took:.2f} s, {took / forward:.2f} passes"


HEAD = """# On a GPU

Written by `benchmarks/gpu.py`, in one command: `python benchmarks/gpu.py docs/gpu.md`. {device}, torch
{torch}. Weights and data are random, batches lie on the device, single precision is without TF32
unless said, and times are medians of warm runs. A report is forward passes with hooks on and rows
added up, and then fits. `pytest -m gpu` holds numbers, training, compiled models and NCCL to those
without; no batch waits for the device, which two tests count.
"""
HEADS = ["network", "samples", "components", "forward, s", "passes of a report, s", "fits, s"]
HEADS += ["passes / forward", "report / forward", "more memory at the peak, MiB"]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, nargs="?", help="file that the table is written to")
    parser.add_argument("--tiny", action="store_true", help="small networks, to see that it works")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.tiny:
        parser.error("torch sees no CUDA device; --tiny runs small networks on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines: list[str] = []

    def tell(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if arguments.path is not None:
            arguments.path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    tell(HEAD.format(device=name, torch=torch.__version__))
    tell(f"| {' | '.join(HEADS)} |\n|{' --- |' * len(HEADS)}")
    warnings.simplefilter("ignore")
    for title, model, batches, options in networks(arguments.tiny, device):
        tell(f"| {' | '.join(row(title, model, batches, device, **options)[0])} |")
        half = model.bfloat16()
        halved = [b.bfloat16() if b.is_floating_point() else b for b in batches]
        tell(f"| {' | '.join(row(f'{title}, bf16', half, halved, device, **options)[0])} |")
        del model, half, batches, halved
        gc.collect()
    tell("\n| ViT-B/16, float32 | |\n| --- | --- |")
    for what, value in extras(arguments.tiny, device):
        tell(f"| {what} | {value} |")


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False
    main()
