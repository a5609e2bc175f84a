"""How wide a state vector may be: what ``max_dim`` of 64, 128 and 256 keeps, repeats, finds and costs.

``python benchmarks/widths.py docs/widths.md`` with the extra ``benchmarks`` and ``OMP_NUM_THREADS=1``;
it takes about twenty minutes of a core.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import decisions_networks
import drift
import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from speed_monitor import table
from speed_networks import digits, paired, resnet, six_convolutions
from torch import nn

from lightning_koopman import CreditReport, Options, credit_report
from lightning_koopman.network.runs.forward import default_forward

WIDTHS = (64, 128, 256)
NUMBERS = ("credit", "gain", "nonlinearity")
FOUND = [(family, seed, 10) for family in ("vit", "resnet", "minilm") for seed in (20, 21)]
"""Networks and faults of the drift benchmark that have states wider than 64."""

Data = Sequence[Any]


def wide_mlp() -> nn.Module:
    """An MLP 784-512-512-512-384-256-10."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise((784, 512, 512, 512, 384, 256)):
        layers.append(nn.Sequential(nn.Linear(before, after), nn.ReLU()))
    return nn.Sequential(*layers, nn.Linear(256, 10))


def networks() -> Iterator[tuple[str, nn.Module, Data, Data]]:
    """Name, trained network, and two disjoint sets of batches that it was not trained on."""
    torch.manual_seed(0)
    images, classes = digits(5000)
    train = list(zip(images[:2500].split(250), classes[:2500].split(250), strict=True))
    kinds: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "MLP 784-512-512-512-384-256-10": (wide_mlp, 10),
        "six convolutions of 32 to 128 channels": (six_convolutions, 4),
        "ResNet of 8 blocks of 16 to 128 channels": (lambda: resnet(16), 4),
    }
    for name, (build, epochs) in kinds.items():
        network = build()
        decisions_networks.train(network, train, epochs, 0, 2e-3)
        yield name, network.eval(), images[2500:3700].split(100), images[3700:4900].split(100)
    for name, load in (
        ("MiniLM", decisions_networks.minilm),
        ("EfficientNet-lite0", decisions_networks.efficientnet),
    ):
        network, split = load()
        yield name, network.eval(), split["choose"], split["test"]


def order_of(first: Any, second: Any) -> float:
    """Rank correlation over the components that have both numbers."""
    return float(spearmanr(first, second, nan_policy="omit")[0])


def between(first: CreditReport, second: CreditReport) -> list[str]:
    """Rank correlation of the numbers of two reports, and their typical distance over their spread."""
    cells = []
    for name in NUMBERS:
        a, b = (np.asarray(getattr(report, name), dtype=float) for report in (first, second))
        both = np.isfinite(a) & np.isfinite(b)
        apart = np.median(np.abs(a - b)[both]) / a[both].std()
        cells.append(f"{order_of(a, b):.2f}, {apart:.3f}")
    return cells


def kept() -> str:
    rows = []
    for name, network, choose, test in networks():

        @torch.no_grad()
        def forward(network: nn.Module = network, batches: Data = choose) -> None:
            for batch in batches:
                default_forward(network, batch)

        def report(width: int, batches: Data = choose, network: nn.Module = network) -> CreditReport:
            return credit_report(network, batches, max_samples=1024, options=Options(max_dim=width))

        reports = {width: (report(width), report(width, test)) for width in WIDTHS}
        for width, (first, second) in reports.items():
            seen = functools.partial(credit_report, network, choose, options=Options(max_dim=width))
            cost = paired(forward, seen, 3)
            share, widest = np.asarray(first.variance_kept), reports[WIDTHS[-1]][0]
            order = [order_of(getattr(first, number), getattr(widest, number)) for number in NUMBERS]
            rows.append([
                name, first.n_samples, width, f"{share.min():.3f}, {share.mean():.3f}",
                f"{np.nanmean(first.r2):.3f}", *between(first, second), f"{cost['ratio']:.2f}",
                " ".join(f"{rho:.2f}" for rho in order),
            ])  # fmt: skip
            print(rows[-1], flush=True)
    heads = (
        "network | samples | max_dim | variance kept, least and mean | held-out R² | credit | gain | "
        "nonlinearity | report / forward | order as with 256"
    )
    return table(heads, rows)


def finds() -> str:
    rows = []
    for width in WIDTHS:
        found = pd.concat([drift.cases(job, width) for job in FOUND])
        mine = found[found["method"] == "drift (suspicion)"]
        alarms = found[found["fault"] == drift.SAME]
        shares = [drift.percent(mine[name], mine) for name in ("top1", "top3", "marked")]
        rows.append([width, len(mine), *shares, drift.percent(alarms["marked"], alarms)])
        print(rows[-1], flush=True)
    return table("max_dim | faults | top1 | top3 | marked | marked without a fault", rows)


PAGE = """# How wide a state may be

Written by `benchmarks/widths.py`. States wider than `max_dim` are pooled and projected on as many POD
directions. Narrow states cost less, in time with the second to third power, and need fewer samples; wide
ones leave less out. The default was 256 up to 0.2.0 and is 128 now, for what stands on this page: drift
finds and marks more, numbers repeat alike (rank correlations of .94 to 1, at 256 of .84 to 1), and a
report takes a third to two fifths of the time on top of the passes. What it gives up is variance, most
in MiniLM, of whose least kept state 128 directions hold 57 % and 256 hold 68 %, and a plain layer of 129
to 256 units is no longer seen whole. What is left out of a state counts as unexplained and nonlinear in
what reads it, and does not count in what gives it; reports say it in a note where it is more than a
hundredth, and `max_dim=256` is there for who has the samples (640 or more).

## What is kept, and how well it repeats

Trained networks, and samples that they were not trained on. *Variance kept* is of the state in which
least is kept, and the mean over all. *Held-out R²* is the mean over components; it is about the
directions that are kept, and so not the same quantity in each row. `credit`, `gain` and `nonlinearity`
were measured a second time on other samples, as many: the first figure is the rank correlation of the
two measurements over the components, the second their median distance over the spread of the
components. *Report / forward* is a report as it is by default. *Order as with 256* is the rank
correlation of the three numbers with those at 256: credits and gains are means over directions, and
which directions there are is part of what they say.

{states}

## What drift finds

The networks, faults and samples of [the page of drift](drift.md) with states wider than 64: two ViTs,
two ResNets, and MiniLM twice.

{faults}
"""


def main() -> None:
    """Measure and write."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    decisions_networks.CACHE.mkdir(exist_ok=True)
    text = PAGE.format(states=kept(), faults=finds())
    Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
