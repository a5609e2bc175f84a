"""Find the part that broke: drift and its baselines over 150 faults, and false alarms without a fault.

``python benchmarks/drift.py --workers 2`` writes docs/drift.md; ``--seeds`` and ``--families`` choose
others.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from drift_networks import FAMILIES, FAULTS, batches, break_part, networks
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_koopman import CreditReport, Options
from lightning_koopman.koopman.options import DEFAULTS
from lightning_koopman.koopman.reference import Reference
from lightning_koopman.measurement.drift import drift_since
from lightning_koopman.measurement.measurement import Measurement

Array = NDArray[np.float64]


class Watched(Measurement):
    """A measurement that also keeps the rows of every state."""

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Any],
        options: Options,
        reference: Reference | None = None,
    ) -> None:
        super().__init__(model, None, options)
        if reference is not None:
            self.follow(reference)
        self.kept: list[list[Tensor]] = []
        self.run(model, data)

    def push(self, rows: Mapping[str, Tensor], *told: Any, **others: Any) -> None:
        self.kept.append([block.clone() for block in rows.values()])
        super().push(rows, *told, **others)

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
        "drift (suspicion)": result.suspicion,
        "drift as a share": result.drift,
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


def cases(job: tuple[str, int, int], max_dim: int = DEFAULTS.max_dim) -> pd.DataFrame:
    """Break ``faults`` components of one network, kinds and places in turn, and rank them."""
    family, seed, faults = job
    options = Options(max_dim=max_dim)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before, after = networks(family, seed)
    new = batches(family, "new")
    measured = Watched(before, batches(family, "reference"), options)
    report, old, same = measured.report(), measured.arrays(), Watched(before, new, options).arrays()
    reference, names = report.reference, report.components
    assert reference is not None
    kinds = itertools.cycle(FAULTS)
    # What the network makes of its last layer by itself, as MiniLM's mean, is no part that can break.
    parts = [place for place, name in enumerate(names) if name in dict(before.named_modules())]
    places = itertools.cycle(np.random.default_rng(seed).permutation(parts))
    rows: list[dict[str, Any]] = []
    for number, place, fault in zip(range(faults), places, kinds, strict=False):
        broken = break_part(after, names[place], fault, 1000 * seed + number)
        watched = Watched(broken, new, options, reference)
        found, changed = scores(report, watched, old, same)
        for method, values in found.items():
            order = np.argsort(-np.nan_to_num(values, nan=-np.inf))
            rank = int(np.flatnonzero(order == place)[0])
            row = {"family": family, "seed": seed, "fault": fault, "place": place, "method": method}
            rows.append(row | {"top1": rank == 0, "top3": rank < 3, "marked": changed[place]})
    # Without a fault: the weights of the reference on other samples, fewer and more of them, and all
    # weights a little further on.
    other = batches(family, "further")
    sound = {SAME: [(before, new), (before, other), (before, new[:1]), (before, new + other)]}
    for kind, pairs in (sound | {FURTHER: [(after, new)]}).items():
        for network, data in pairs:
            marks = drift_since(reference, Watched(network, data, options, reference)).changed
            row = {"family": family, "seed": seed, "fault": kind, "method": "drift"}
            rows.append(row | {"marked": marks.mean(), "any": bool(marks.any()), "rows": len(marks)})
    print(family, seed, flush=True)
    return pd.DataFrame(rows)


SAME, FURTHER = "none, other samples", "none, trained on"
SEEDS = dict.fromkeys(("mlp", "vit", "resnet"), (20, 21, 22, 23)) | {"minilm": (20, 21, 22)}
"""Networks that nothing was chosen on. Seeds 0 and 1 were for the ridge weight and the suspicion, and 10
to 13 for a first run, in which three permutations of units turned out to have moved no unit."""


def percent(values: pd.Series, groups: pd.DataFrame) -> str:
    """Mean over networks with its standard error."""
    means = values.astype(float).groupby([groups["family"], groups["seed"]]).mean()
    weights = values.groupby([groups["family"], groups["seed"]]).size()
    mean = float(np.average(means, weights=weights))
    error = float(((weights / weights.sum() * (means - mean)) ** 2).sum() ** 0.5)
    return f"{mean:.3f} ± {error:.3f}"


def table(found: pd.DataFrame, by: str, columns: Sequence[str]) -> str:
    """Lay shares out as Markdown."""
    lines = [f"| {by} | cases | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, part in found.groupby(by, sort=False):
        cells = [percent(part[column], part) for column in columns]
        lines.append(f"| {name} | {len(part)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(found: pd.DataFrame) -> str:
    """Write the page of the documentation."""
    broken, sound = found[found["fault"].isin(FAULTS)], found[~found["fault"].isin(FAULTS)]
    mine = broken[broken["method"] == "drift (suspicion)"]
    alarms = [
        "| without a fault | networks × samples | rows marked | any row marked |",
        "|---|---|---|---|",
    ]
    for name, part in sound.groupby("fault", sort=False):
        cells = f"{percent(part['marked'], part)} | {percent(part['any'], part)}"
        alarms.append(f"| {name} | {len(part)} | {cells} |")
    chosen = found.groupby("family", sort=False)["seed"].unique()
    seeds = "; ".join(f"{name} {', '.join(map(str, each))}" for name, each in chosen.items())
    return PAGE.format(
        count=len(mine),
        methods=table(broken, "method", ("top1", "top3")),
        families=table(mine, "family", ("top1", "top3", "marked")),
        faults=table(mine, "fault", ("top1", "top3", "marked")),
        alarms="\n".join(alarms),
        seeds=seeds,
    )


PAGE = """# Finding the part that broke

Written by `benchmarks/drift.py`. A network is trained and a reference of it is saved. Training goes on
over other samples, so that all weights move; then one component is broken, in one of five ways. What
finds it sees the reference and samples of a third kind: neither the old weights nor the old samples.
Shares are of {count} faults, with standard errors over networks; `marked` is the share of broken
components that are marked as changed.

- **Networks**: residual MLPs, ViTs and ResNets with ten blocks on handwritten digits of 14 × 14 pixels
  (2,000 to train on, 1,000 for the reference, 1,000 to train further, 1,000 new), and MiniLM
  (`all-MiniLM-L6-v2`, real weights) on paragraphs of docstrings (600 for the reference, 320 to train
  further, 600 new). States have at most 128 directions.
- **Faults**, in all layers of one component: noise of 0.3 standard deviations on each weight; a tenth of
  the weights with the other sign; 30 % of the weights zero; biases shifted by a third of the norm of
  their unit's weights; a quarter of the units permuted.
- **Seeds**: {seeds}.
  Seeds 0 and 1 were used to choose the ridge weight and what suspicion divides by. A first run with
  seeds 10 to 13 had three permutations that moved no unit; they were 3 of its 4 misses (top-1 .973,
  top-3 .987). The benchmark was corrected and run with new seeds (top-1 .980, top-3 1.000). Then it was
  found that MiniLM's texts and their parts depended on what had been imported; they are now the same in
  every run. A run of all networks with them on 27 November 2026 gave top-1 .980 and marked .667 of
  MiniLM's faults. One of 28 November, trained anew, takes off rightly what chance adds where samples are
  few. This is one of 30 November, with MiniLM's chain as it is read since, which ends with the mean of
  its tokens (`output`): what is said of drift's ranks is the same, of others at most .04 less.

Set beforehand were top-1 of .95, top-3 of .99 and at most 5 % of false alarms.

{methods}

CKA needs the old network, which is run over the new samples. "Rise" is what a state adds to the one
before it.

## By network and by fault

{families}

{faults}

## False alarms

The weights of the reference over other samples, four sets of them: of the size of the reference's, of
the size of the samples to train further, one batch, and the first two together. A network that was
trained on has changed in truth, so its marks are no false alarms. On 30 November there was one: MiniLM's
`output` over the first two sets together (drift .004 ± .001). Its weights and texts are the same under
each of its three seeds, so that it counts three times.

{alarms}
"""


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", default="docs/drift.md")
    given = parser.parse_args()
    jobs = [
        (family, seed, given.faults)
        for family in given.families
        for seed in given.seeds or SEEDS[family]
    ]
    # The slowest first.
    jobs.sort(key=lambda job: ("minilm", "vit", "resnet", "mlp").index(job[0]))
    with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn")) as pool:
        tables = list(pool.map(cases, jobs))
    order = [FAMILIES.index(job[0]) for job in jobs]
    found = pd.concat([part for _, part in sorted(zip(order, tables, strict=True), key=lambda p: p[0])])
    text = page(found)
    print(text)
    Path(given.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
