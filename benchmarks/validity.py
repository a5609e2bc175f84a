"""Which numbers predict what an intervention does? Trains, measures, writes docs/validity.md and .png.

Run from the repository, with the extra ``benchmarks``:
``python benchmarks/validity.py --cache DIR --halves A B C --workers 2``, about half an hour on two
cores. What is in the cache is not measured again. On few networks: ``--architectures 2
--seeds 1 --out DIR``.
"""

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn
from validity_effects import measure, states
from validity_networks import HALVES, build, data, train
from validity_numbers import baselines, candidates, reported
from validity_page import write

STAGES = ("effects", "reports", "baselines", "candidates")


def save(path: Path, write: Callable[[BinaryIO], None]) -> None:
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        write(file)
    part.rename(path)


def trained(architecture: str, seed: int, cache: Path) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """The trained network, from the cache if it is there, and its initial ``state_dict``."""
    path = cache / f"{architecture}_{seed}.pt"
    if not path.exists():
        network, initial = train(architecture, seed)
        save(path, lambda file: torch.save(network.state_dict(), file))
        return network, initial
    network = build(architecture, seed)
    initial = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval(), initial


def run(architecture: str, seed: int, cache: Path) -> str:
    """Train and measure one network, as far as the cache does not hold it."""
    torch.set_num_threads(1)
    paths = {stage: cache / f"{architecture}_{seed}.{stage}.npz" for stage in STAGES}
    name = f"{architecture}, seed {seed}"
    if all(path.exists() for path in paths.values()):
        return f"{name}: cached"
    clock = [time.perf_counter()]
    network, initial = trained(architecture, seed, cache)
    clock.append(time.perf_counter())
    parts = data(architecture)
    probe = states(network, parts["probe"][0])

    def effects() -> dict[str, np.ndarray]:
        x, y = parts["eval"]
        start = time.perf_counter()
        found = {f"effect/{k}": v for k, v in measure(network, initial, probe, x).items()}
        # Three sets of draws, of which one is what a user would measure.
        found["seconds, measuring"] = np.array((time.perf_counter() - start) / 3)
        with torch.no_grad():
            found["accuracy"] = (network(x).argmax(1) == y).double().mean().numpy()
        return found

    stages: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        "effects": effects,
        "reports": lambda: reported(network, initial, *parts["probe"]),
        "baselines": lambda: baselines(network, initial, probe, parts["probe"][1]),
        "candidates": lambda: candidates(network, initial, probe, seed),
    }
    for stage, found in stages.items():
        if not paths[stage].exists():
            arrays = found()
            save(paths[stage], lambda file, arrays=arrays: np.savez(file, **arrays))
        clock.append(time.perf_counter())
    took = zip(("training", *STAGES), pairwise(clock), strict=True)
    return f"{name}: " + ", ".join(f"{stage} {after - before:.1f} s" for stage, (before, after) in took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--halves", nargs="+", choices=tuple(HALVES), default=list(HALVES))
    parser.add_argument("--architectures", type=int, default=8, help="the first so many of each half")
    parser.add_argument("--seeds", type=int, default=3, help="the first so many of each half")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs")
    parser.add_argument(
        "--note", default="", help="a sentence on how the cache came about, for the page"
    )
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    networks = {}
    for half in options.halves:
        architectures, seeds = HALVES[half]
        chosen = itertools.product(architectures[: options.architectures], seeds[: options.seeds])
        networks[half] = list(chosen)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=spawn) as pool:
        jobs = [pool.submit(run, a, s, options.cache) for half in networks.values() for a, s in half]
        for job in jobs:
            print(job.result(), flush=True)
    write(options.out, options.cache, networks, options.note)


if __name__ == "__main__":
    main()
