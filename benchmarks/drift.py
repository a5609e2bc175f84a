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

from lightning_koopman import CreditReport, credit_report, drift
from lightning_koopman.koopman.options import Options
from lightning_koopman.measurement.measurement import Measurement

Array = NDArray[np.float64]


class States(Measurement):
    """Keeps the rows of every state, in place of their moments."""

    def __init__(self, model: nn.Module, data: Sequence[Any]) -> None:
        super().__init__(model, None, Options())
        self.kept: list[Mapping[str, Tensor]] = []
        self.run(model, data)

    def push(self, rows: Mapping[str, Tensor]) -> None:
        self.kept.append(dict(rows))

    def arrays(self) -> list[Array]:
        names = list(self.kept[0])
        return [torch.cat([part[name] for part in self.kept]).double().numpy() for name in names]


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


def scores(
    report: CreditReport, before: nn.Module, found: nn.Module, old: list[Array], new_data: Sequence[Any]
) -> tuple[dict[str, Array], Array]:
    """How suspicious each component is to each method, and which of them drift marks."""
    result = drift(report, found, new_data)
    new = States(found, new_data).arrays()
    beside = States(before, new_data).arrays()
    after = credit_report(found, new_data)
    apart = [1 - cka(a, b) for a, b in zip(beside, new, strict=True)]
    moved = []
    for a, b in zip(old, new, strict=True):
        spread = a.std(0) + 1e-3 * a.std()
        means, spreads = (b.mean(0) - a.mean(0)) / spread, np.log((b.std(0) + 1e-3 * a.std()) / spread)
        moved.append(float((means**2 + spreads**2).mean()))
    return {
        "drift": result.drift,
        "old operator's residual alone": result.old,
        "CKA with the old model": np.array(apart[1:]),
        "rise of 1 − CKA": rise(apart),
        "unit statistics": np.array(moved[1:]),
        "rise of unit statistics": rise(moved),
        "Δcredit": np.abs(after.credit - report.credit),
        "Δgain": np.abs(after.gain - report.gain),
        "Δnonlinearity": np.abs(after.nonlinearity - report.nonlinearity),
    }, result.changed


def cases(family: str, seed: int, faults: int) -> pd.DataFrame:
    """Break ``faults`` components of one network, kinds and places in turn, and rank them."""
    before, after = networks(family, seed)
    reference, new = batches(family, "reference"), batches(family, "new")
    report = credit_report(before, reference)
    old = States(before, reference).arrays()
    names = report.components
    rng = np.random.default_rng(seed)
    places = list(itertools.islice(itertools.cycle(rng.permutation(len(names))), faults))
    rows = []
    for number, place in enumerate(places):
        fault = FAULTS[number % len(FAULTS)]
        broken = break_part(after, names[place], fault, 1000 * seed + number)
        found, changed = scores(report, before, broken, old, new)
        for method, values in found.items():
            order = np.argsort(-np.nan_to_num(values, nan=-np.inf))
            rank = int(np.flatnonzero(order == place)[0])
            row = {"family": family, "seed": seed, "fault": fault, "place": place, "method": method}
            rows.append(row | {"top1": rank == 0, "top3": rank < 3, "marked": changed[place]})
    # Without a fault: the same weights on other samples, and all weights a little further on.
    for method, network in (("none", before), ("trained on", after)):
        found = drift(report, network, new)
        for place, marked in enumerate(found.changed):
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
