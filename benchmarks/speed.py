"""Measures what a report costs against the forward pass, and an operator fit against other solvers.

Run ``python benchmarks/speed.py docs/speed.md`` with the ``benchmarks`` extra and
``OMP_NUM_THREADS=1``; it takes about half an hour. The figures in that file are written by this script.
Seconds are the processor's, of this process; both sides of a ratio are measured in turn in one run, and
the median is taken over neighbours. Names of sections behind the file measure these alone anew, such as
``memory slopes``.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import speed_memory
import speed_networks
import torch
from speed_monitor import demo, epochs, minutes, table, verdict
from speed_page import PAGE


def reports() -> str:
    rows = []
    for name, model, batches, target, repeats in speed_networks.cases():
        found, enough = speed_networks.against_forward(model, batches, repeats)
        floors = speed_networks.floors(model, batches)
        floor = 1 + sum(floors.values()) / found["base"]
        rows.append([
            name,
            f"{sum(map(len, batches)):,}",
            f"{found['base']:.3f}",
            f"{found['other']:.3f}",
            f"{found['ratio']:.2f} ({found['low']:.2f} … {found['high']:.2f})",
            f"≤ {target}",
            f"{floor:.2f} = 1 + " + " + ".join(f"{s / found['base']:.2f}" for s in floors.values()),
            verdict(found["ratio"] <= target),
            f"{enough['ratio']:.2f} ({enough['samples']:,})",
        ])
        print(rows[-1], flush=True)
    heads = (
        "network | samples | forward, s | report, s | ratio (range) | target | floor |  | "
        "of enough samples"
    )
    return table(heads, rows)


def conductance() -> str:
    ours = speed_memory.measured("report", 3, components=12, width=256, samples=2000)
    theirs = speed_memory.measured("conductance", 3, components=12, width=256, samples=2000)
    small = speed_networks.against_conductance()
    return table(
        "network | samples | Captum | report | ratio | target | ",
        [
            [
                "MLP 64-256-128-64-10, seconds", small["samples"], f"{small['other']:.2f}",
                f"{small['base']:.3f}", f"{small['ratio']:.0f} × faster", "≥ 80",
                verdict(small["ratio"] >= 80),
            ],
            [
                "12 layers of width 256, seconds", 2000, f"{theirs[1]:.1f}", f"{ours[1]:.2f}",
                f"{theirs[1] / ours[1]:.0f} × faster", "≥ 80", verdict(theirs[1] >= 80 * ours[1]),
            ],
            [
                "the same, memory in MiB", 2000, f"{theirs[0]:.0f}", f"{ours[0]:.0f}",
                f"1 / {theirs[0] / ours[0]:.1f}", "≤ 1 / 5", verdict(theirs[0] >= 5 * ours[0]),
            ],
        ],
    )  # fmt: skip


def fits() -> str:
    import speed_fits  # with solvers that no other section needs

    columns, sizes = {}, [(n, d) for d in (64, 256, 1024) for n in (10000, 50000)]
    for samples, width in sizes:
        columns[samples, width] = speed_fits.timed(samples, width, 7 if width < 1024 else 3)
        print(samples, width, columns[samples, width], flush=True)
    names = list(next(iter(columns.values())))
    rows = [[name, *(f"{columns[size][name]:.3f}" for size in sizes)] for name in names]
    ours, rest = names[0], names[3:]
    ratios = [columns[size][ours] / min(columns[size][name] for name in rest) for size in sizes]
    rows.append([
        f"**{ours} / fastest other**",
        *(f"{ratio:.2f}, {verdict(ratio < 1)}" for ratio in ratios),
    ])
    heads = "processor seconds | " + " | ".join(f"n = {n:,}, d = {d}" for n, d in sizes)
    return table(heads, rows)


def residuals() -> str:
    import speed_fits

    rows = []
    for width in (64, 256):
        for kind in (speed_fits.FULL, speed_fits.DEAD, speed_fits.LINEAR):
            found = speed_fits.residuals(10000, width, kind)
            rows.append([
                width, kind,
                *(f"{v:.0f}" if "by " in name else f"{v:.0e}" for name, v in found.items()),
                verdict(found["fit_operator"] <= 1e-9),
            ])  # fmt: skip
    heads = "d | ReLU snapshots | " + " | ".join(found) + " | ≤ 1e-9"
    return table(heads, rows)


def memory() -> str:
    rows = []
    for components, width, samples in (
        (12, 256, 2000), (12, 256, 20000), (12, 256, 200000),
        (6, 256, 2000), (24, 256, 2000), (48, 256, 2000), (12, 64, 2000), (12, 128, 2000),
        (100, 768, 2000),
    ):  # fmt: skip
        extra, seconds = speed_memory.measured(
            "report", 3, components=components, width=width, samples=samples
        )
        sums = speed_memory.moments_mib(components, width)
        rows.append([components, width, f"{samples:,}", f"{sums:.0f}", f"{extra:.0f}", f"{seconds:.2f}"])
        print(rows[-1], flush=True)
    spread = abs(float(rows[2][4]) / float(rows[0][4]) - 1)
    large = float(rows[-1][4])
    return (
        table("components | width | samples | sums, MiB | peak, MiB | seconds on top", rows)
        + f"\n\nFrom 2,000 to 200,000 samples the peak moves by {100 * spread:.1f} % (target 5: "
        f"{verdict(spread <= 0.05)}). 100 components of width 768 take {large / 1024:.2f} GiB "
        f"(target 2: {verdict(large <= 2048)})."
    )


def slopes() -> str:
    """How seconds and memory grow with one size at a time: least squares between logarithms."""
    usual = {"components": 12, "width": 128, "samples": 2000, "folds": 5}
    rows = []
    for name, sizes in (
        ("components", (6, 12, 24, 48)),
        ("width", (32, 64, 128)),
        ("samples", (2000, 20000, 200000)),
        ("folds", (2, 5, 10, 20)),
    ):
        found = [speed_memory.measured("report", **usual | {name: size}) for size in sizes]
        x = np.log(sizes)
        grown = [float(np.polyfit(x, np.log(values), 1)[0]) for values in zip(*found, strict=True)]
        rows.append([
            name,
            ", ".join(f"{size:,}" if name == "samples" else str(size) for size in sizes),
            ", ".join(f"{seconds:.2f}" for _, seconds in found),
            f"{grown[1]:.2f}",
            ", ".join(f"{memory:.0f}" for memory, _ in found),
            f"{round(grown[0], 2) + 0.0:.2f}",  # no -0.00
        ])
        print(rows[-1], flush=True)
    return table("against | sizes | seconds on top | slope | peak, MiB | slope", rows)


def large() -> str:
    rows = [[name, f"{value:,.2f}"] for name, value in speed_memory.on_paper().items()]
    return table("a transformer of 32 blocks on 64 processes | ", rows)


def main(target: Path, chosen: Sequence[str]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    before = target.read_text(encoding="utf-8") if target.exists() else ""
    page = PAGE.replace("<torch>", torch.__version__)
    for section in (reports, epochs, demo, minutes, conductance, fits, residuals, memory, slopes, large):
        mark = f"<!-- {section.__name__} -->\n"
        if chosen and section.__name__ not in chosen:
            found = before.partition(mark)[2].partition("<!-- end -->")[0]
        else:
            torch.manual_seed(0)
            found = f"\n{section()}\n\n"
            print(section.__name__, found, flush=True)
        page = page.replace(mark, mark + found)
    target.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    # What watching takes while the user's code runs is counted by it.
    time.perf_counter = time.process_time
    main(Path(sys.argv[1]), sys.argv[2:])
