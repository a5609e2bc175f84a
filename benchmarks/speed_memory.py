"""Memory and processor time of reports, each in a process of its own.

Run ``python benchmarks/speed_memory.py report components=12 width=256 samples=2000`` for one figure.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from captum.attr import LayerConductance
from torch import Tensor, nn

from lightning_koopman import Options, credit_report
from lightning_koopman.koopman.moments import Layout

MIB = 2**20


def chain(components: int, width: int) -> nn.Module:
    """Layers of one width, each followed by a ReLU."""
    parts = [part for _ in range(components) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*parts).eval()


def peak() -> float:
    """Largest memory of this process so far, in MiB; Linux alone tells it apart from the parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def probe(kind: str, components: int, width: int, samples: int, folds: int = 5) -> tuple[float, float]:
    """Memory in MiB and processor seconds, a report's both on top of its forward pass."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net, generator = chain(components, width), torch.Generator().manual_seed(0)

    def batches() -> Iterator[Tensor]:
        for _ in range(samples // 250):
            yield torch.randn(250, width, generator=generator)

    # What is imported or cached at first use is not part of either.
    credit_report(chain(1, 8), [torch.randn(100, 8)])
    start = time.process_time()
    with torch.no_grad():
        for batch in batches():
            net(batch)
    forward, before = time.process_time() - start, peak()
    start = time.process_time()
    if kind == "report":
        credit_report(net, batches(), max_samples=None, options=Options(folds=folds))
    else:
        rows = torch.cat(list(batches()))
        for layer in net:
            if isinstance(layer, nn.Linear):
                LayerConductance(net, layer).attribute(rows, target=0, n_steps=50)
    return peak() - before, time.process_time() - start - (forward if kind == "report" else 0)


def measured(kind: str, repeats: int = 1, **given: int) -> tuple[float, float]:
    """The same in new processes: medians, for peaks differ by some 20 MiB from one to the next."""
    options, found = [f"{name}={value}" for name, value in given.items()], []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, kind, *options],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.append([float(value) for value in done.stdout.split()[-2:]])
    memory, seconds = (statistics.median(values) for values in zip(*found, strict=True))
    return memory, seconds


def moments_mib(components: int, width: int, folds: int = 5) -> float:
    """Size of the sums, by the formula in ``docs/speed.md``."""
    kept = min(width, 256)
    layout = Layout((kept,) * (components + 1), folds)
    return 8 * folds * layout.size / MIB


if __name__ == "__main__":
    given = {name: int(value) for name, value in (option.split("=") for option in sys.argv[2:])}
    print(*probe(sys.argv[1], **given))
