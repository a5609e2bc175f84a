"""Measures what a report costs against the forward pass, and an operator fit against other solvers.

Run ``python benchmarks/speed.py docs/speed.md``; the figures in that file are written by this script.
Only ratios of one run mean anything on a shared machine: variants are interleaved, medians taken.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import scipy.linalg
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from lightning_koopman import credit_report, fit_operator

REPEATS = 3


def medians(variants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each variant, repeats interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(REPEATS):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report_against_forward(model: nn.Module, batches: list[Tensor]) -> tuple[float, float]:
    """Median seconds of the plain forward pass and of a report over the same batches."""
    model.eval()

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(batch)

    found = medians({"forward": forward, "report": lambda: credit_report(model, batches)})
    return found["forward"], found["report"]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True, dropout=0.0)
    return nn.Sequential(
        nn.Linear(16, 256),
        nn.TransformerEncoder(layer, 6, enable_nested_tensor=False),
        nn.Linear(256, 10),
    )


def fits(n_samples: int, width: int) -> dict[str, float]:
    """Median seconds of each solver on ReLU snapshots."""
    x = torch.relu(torch.randn(n_samples, width, dtype=torch.float64))
    y = torch.relu(x @ torch.randn(width, width, dtype=torch.float64) / width**0.5)
    return medians({
        "fit_operator, λ given": lambda: fit_operator(x, y, tikhonov=1e-8),
        "fit_operator, λ from the grid": lambda: fit_operator(x, y),
        "scikit-learn Ridge": lambda: Ridge(1e-8).fit(x.numpy(), y.numpy()),
        "LAPACK gelsd": lambda: scipy.linalg.lstsq(x.numpy(), y.numpy(), lapack_driver="gelsd"),
    })


def main(target: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    lines = [
        "# Speed",
        "",
        "Written by `benchmarks/speed.py`. One machine without a GPU, shared with other work, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}; medians of {REPEATS} "
        "interleaved repeats, so trust the ratios, not the seconds.",
        "",
        "## One report over all components against the plain forward pass",
        "",
        "| network | samples | forward, s | report, s | ratio | target |",
        "|---|---|---|---|---|---|",
    ]
    cases = [
        ("MLP 64-256-128-64-10", mlp(), torch.randn(4096, 64).split(256), "6"),
        ("MLP 64-256-128-64-10", mlp(), torch.randn(50000, 64).split(256), "6"),
        (
            "transformer encoder, 6 layers, 64 tokens",
            encoder(),
            torch.randn(512, 64, 16).split(64),
            "1.3",
        ),
    ]
    for name, model, batches, goal in cases:
        forward, report = report_against_forward(model, list(batches))
        count = sum(len(batch) for batch in batches)
        lines.append(
            f"| {name} | {count} | {forward:.3f} | {report:.3f} | {report / forward:.2f} | {goal} |"
        )
    lines += ["", "## Operator fit, 10,000 samples", ""]
    lines += ["`fit_operator` also fits each of 5 folds for the held-out R², which the others lack.", ""]
    lines += ["| width | solver | seconds |", "|---|---|---|"]
    for width in (64, 256):
        lines += [f"| {width} | {name} | {found:.3f} |" for name, found in fits(10000, width).items()]
    Path(target).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
