"""Find the part that broke: drift and its baselines over 150 faults, and false alarms without a fault.

``python benchmarks/drift.py`` writes docs/drift.md; ``--seeds`` and ``--families`` choose others.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from drift_networks import FAMILIES, FAULTS, batches, break_part, networks
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_koopman import CreditReport, Options
from lightning_koopman.koopman.reference import Reference
from lightning_koopman.measurement.drift import drift_since
from lightning_koopman.measurement.measurement import Measurement

Array = NDArray[np.float64]


OPTIONS = Options(max_dim=128)
"""States wider than this are projected: it makes 200 reports cheap enough for two cores."""


class Watched(Measurement):
    """A measurement that also keeps the rows of every state."""

    def __init__(
        self, model: nn.Module, data: Sequence[Any], reference: Reference | None = None
    ) -> None:
        super().__init__(model, None, OPTIONS)
        if reference is not None:
            self.follow(reference)
        self.kept: list[list[Tensor]] = []
        self.run(model, data)

    def push(self, rows: Mapping[str, Tensor], links: tuple[tuple[int, ...], ...] = ()) -> None:
        self.kept.append([block.clone() for block in rows.values()])
        super().push(rows, links)

    def arrays(self) -> list[Array]:
        return [torch.cat(blocks).double().numpy() for blocks in zip(*self.kept, strict=True)]


def cka(x: Array, y: Array) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019)."""
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) < x.shape[1]:
        gram_x, gram_y = x @ x.T, y @ y.T
        return float((gram_x * gram_y).sum() / np.linalg.norm(gram_x) / np.linalg.norm(gram_y))
    cross = np.linalg.norm(x.T @ y) ** 2
    return float(cross / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y))


def rise(values: Sequence[float]) -> Array:
    """What each state adds to the one before it, x_0 included."""
    return np.diff(np.asarray(values))


def moved(old: Array, new: Array) -> float:
    """How far the means and standard deviations of units are from what they were, in mean square."""
    floor = 1e-3 * old.std()
    spread = old.std(0) + floor
    means, spreads = (new.mean(0) - old.mean(0)) / spread, np.log((new.std(0) + floor) / spread)
    return float((means**2 + spreads**2).mean())


def scores(
    report: CreditReport, watched: Watched, before: list[Array], same: list[Array]
) -> tuple[dict[str, Array], NDArray[np.bool_]]:
    """How suspicious each component is to each method, and which of them drift marks.

    ``before`` are the states of the network as it was over the samples of the reference, ``same`` those
    over the new samples.
    """
    assert report.reference is not None
    result, after, new = drift_since(report.reference, watched), watched.report(), watched.arrays()
    apart = [1 - cka(a, b) for a, b in zip(same, new, strict=True)]
    units = [moved(a, b) for a, b in zip(before, new, strict=True)]
    return {
        "drift": result.drift,
        "old operator's residual alone": result.old,
        "1 − CKA with the old model": np.array(apart[1:]),
        "rise of 1 − CKA with the old model": rise(apart),
        "unit statistics": np.array(units[1:]),
        "rise of unit statistics": rise(units),
        **{
            f"Δ{name}": np.abs(getattr(after, name) - getattr(report, name))
            for name in ("credit", "gain", "nonlinearity")
        },
    }, result.changed


def cases(family: str, seed: int, faults: int) -> pd.DataFrame:
    """Break ``faults`` components of one network, kinds and places in turn, and rank them."""
    before, after = networks(family, seed)
    new = batches(family, "new")
    measured = Watched(before, batches(family, "reference"))
    report, old, same = measured.report(), measured.arrays(), Watched(before, new).arrays()
    assert report.reference is not None
    names = report.components
    rng = np.random.default_rng(seed)
    places = list(itertools.islice(itertools.cycle(rng.permutation(len(names))), faults))
    rows = []
    for number, place in enumerate(places):
        fault = FAULTS[number % len(FAULTS)]
        broken = break_part(after, names[place], fault, 1000 * seed + number)
        watched = Watched(broken, new, report.reference)
        found, changed = scores(report, watched, old, same)
        for method, values in found.items():
            order = np.argsort(-np.nan_to_num(values, nan=-np.inf))
            rank = int(np.flatnonzero(order == place)[0])
            row = {"family": family, "seed": seed, "fault": fault, "place": place, "method": method}
            rows.append(row | {"top1": rank == 0, "top3": rank < 3, "marked": changed[place]})
    # Without a fault: the same weights on other samples, and all weights a little further on.
    for method, network in (("none", before), ("trained on", after)):
        marks = drift_since(report.reference, Watched(network, new, report.reference)).changed
        for place, marked in enumerate(marks):
            row = {"family": family, "seed": seed, "fault": method, "place": place, "method": "drift"}
            rows.append(row | {"marked": marked})
    return pd.DataFrame(rows)


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12, 13])
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--out", default="drift.csv")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tables = []
    for family, seed in itertools.product(given.families, given.seeds):
        tables.append(cases(family, seed, given.faults))
        pd.concat(tables).to_csv(given.out, index=False)
        summary(pd.concat(tables))


def summary(table: pd.DataFrame) -> None:
    """Print shares with standard errors."""
    broken = table[table["fault"].isin(FAULTS)]
    for group in ("family", "fault"):
        print(broken[broken["method"] == "drift"].groupby(group)[["top1", "top3", "marked"]].mean())
    print(broken.groupby("method")[["top1", "top3"]].agg(["mean", "sem"]).round(3))
    print(
        table[~table["fault"].isin(FAULTS)].groupby(["family", "fault"])["marked"].agg(["mean", "size"])
    )


if __name__ == "__main__":
    main()
