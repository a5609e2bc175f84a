"""Memory and processor time of reports, each in a process of its own.

Run ``python benchmarks/speed_memory.py report components=12 width=256 samples=2000`` for one figure.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from captum.attr import LayerConductance
from torch import Tensor, nn

from lightning_koopman import Options, credit_report
from lightning_koopman.koopman.credit import compute_credits
from lightning_koopman.koopman.moments import Layout, accumulate
from lightning_koopman.koopman.options import DEFAULTS
from lightning_koopman.koopman.states import pod_basis

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
        for layer in net.children():
            if isinstance(layer, nn.Linear):
                LayerConductance(net, layer).attribute(rows, target=0, n_steps=50)
    return peak() - before, time.process_time() - start - (forward if kind == "report" else 0)


def measured(kind: str, repeats: int = 1, **given: int) -> tuple[float, float]:
    """The same in new processes, by medians; memory with the allocator's threshold fixed.

    Left alone, glibc moves the size from which blocks are mapped, and given back, with what was freed
    before, by which peaks of one and the same report differ by up to a tenth. Fixed, it costs time.
    """
    command = [sys.executable, "-W", "ignore", __file__, kind]
    command += [f"{name}={value}" for name, value in given.items()]
    found = []
    for _ in range(repeats):
        for place, threshold in enumerate(({"MALLOC_MMAP_THRESHOLD_": "131072"}, {})):
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env=os.environ | threshold
            )
            found.append(float(done.stdout.split()[-2:][place]))
    return statistics.median(found[::2]), statistics.median(found[1::2])


def moments_mib(components: int, width: int, folds: int = 5) -> float:
    """Size of the sums, by the formula in ``docs/speed.md``."""
    kept = min(width, DEFAULTS.max_dim)
    layout = Layout((kept,) * (components + 1), folds)
    return 8 * folds * layout.size / MIB


def on_paper(
    blocks: int = 32, width: int = 4096, hidden: int = 11008, tokens: int = 2048, processes: int = 64
) -> dict[str, float]:
    """What a measurement of a transformer would take: bytes by layout, seconds by what is timed here.

    Its states are the embedding and what each block gives, pooled over the tokens and projected on
    ``max_dim`` directions; each process sees its share of 4,096 samples.
    """
    states, kept, samples, first = blocks + 2, DEFAULTS.max_dim, 4096, 2 * DEFAULTS.max_dim
    layout = Layout((kept,) * states, 5)
    small = Layout((kept,) * 5, 5)
    moments = small.zeros()
    rows = [torch.randn(first * 4, kept) for _ in small.dims]
    accumulate(small, moments, rows, torch.arange(first * 4) % 5)

    def seconds(run: Callable[[], object]) -> float:
        taken = []
        for _ in range(5):
            start = time.process_time()
            run()
            taken.append(time.process_time() - start)
        return statistics.median(taken)

    basis = seconds(lambda: pod_basis(torch.randn(first, width), kept))
    fit = seconds(lambda: compute_credits(small, moments)) / 4
    parameters = blocks * (4 * width**2 + 3 * width * hidden) + 2 * 32000 * width
    products = 2 * sum(
        kept**2 * (0.625 if i == j else 1) for i, j in layout.pairs
    )  # the square ones by strips
    return {
        "parameters, 10^9": parameters / 1e9,
        "forward pass, TFLOP a sample": 2 * parameters * tokens / 1e12,
        "projections and products, GFLOP a sample": (2 * states * width * kept + products) / 1e9,
        "states read for pooling, GB a sample": 2 * states * tokens * width / 1e9,
        "rows that wait in each process, MB": 4 * samples / processes * states * width / 1e6,
        "first rows that each process is sent, MB": 4 * first * states * width / 1e6,
        "bases that each process is sent, MB": 4 * states * width * kept / 1e6,
        "sums that are added up over all processes, MB each": 8 * layout.folds * layout.size / 1e6,
        "POD bases in the first process, s": basis * states,
        "credits in the first process, s": fit * (states - 1),
    }


if __name__ == "__main__":
    given = {name: int(value) for name, value in (option.split("=") for option in sys.argv[2:])}
    print(*probe(sys.argv[1], **given))
