"""Do the standard errors of effects hold? Writes docs/calibration-effects.md.

Run from the repository: `python benchmarks/calibration_effects.py` (minutes on one core).
"""

import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lightning_koopman import component_effects
from lightning_koopman.report.effects import KINDS, Effects

PAGE = Path(__file__).parent.parent / "docs" / "calibration-effects.md"
RESAMPLINGS, SIZES, LARGE, QUANTILE, NORMAL = 100, (300, 1000), 50_000, 2.776, 1.96
WIDTHS = (10, 24, 24, 16)


def trained() -> tuple[nn.Sequential, dict[str, torch.Tensor]]:
    """A ReLU network on Gaussian data that can be drawn without end, and its initial weights."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(WIDTHS)]
    net = nn.Sequential(*blocks, nn.Linear(WIDTHS[-1], 5))
    initial = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(4000, WIDTHS[0])
    y = (x @ torch.randn(10, 5) + 0.5 * x.relu() @ torch.randn(10, 5)).argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval(), initial


def measure(
    net: nn.Sequential, initial: dict[str, torch.Tensor], n: int, seed: int, how: str, **more: int
) -> Effects:
    x = torch.randn(n, WIDTHS[0], generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = net(x).argmax(1)
    batches = list(zip(x.split(n // 6), y.split(n // 6), strict=True))
    names = [str(i) for i in range(len(net))]
    return component_effects(
        net,
        batches,
        None,
        KINDS,
        how=how,
        samples=n,
        components=names,
        initial=initial,
        seed=seed,
        **more,
    )


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    net, initial = trained()
    columns = [(how, n) for how in ("predicted", "measured") for n in SIZES]
    shares: dict[tuple[str, str, int], str] = {}
    accuracies: dict[tuple[str, int], str] = {}
    truths = {
        "predicted": measure(net, initial, LARGE, 10**6, "predicted", draws=1200, probes=5),
        "measured": measure(net, initial, LARGE, 10**6, "measured", draws=60),
    }
    for how, n in columns:
        truth = truths[how]
        found = [measure(net, initial, n, seed, how) for seed in range(RESAMPLINGS)]
        for kind in KINDS:
            held = [
                np.abs(e.values[kind] - truth.values[kind])
                <= (QUANTILE if how == "predicted" else NORMAL) * e.stderr[kind]
                for e in found
            ]
            # What a linear head leaves is rounding, whose size no resampling tells.
            shares[kind, how, n] = " ".join(
                "–" if kind == "linear" and i == len(net) - 1 else f"{share:.2f}"
                for i, share in enumerate(np.mean(held, axis=0))
            )
            if how == "measured":
                lost = truth.metric[kind] - truth.metric_before
                kept = [
                    np.abs(e.metric[kind] - e.metric_before - lost) <= NORMAL * e.metric_stderr[kind]
                    for e in found
                ]
                accuracies[kind, n] = " ".join(f"{share:.2f}" for share in np.mean(kept, axis=0))
    heads = " | ".join(f"{how}, n = {n}" for how, n in columns)
    rows = "".join(
        f"| `{kind}` | {' | '.join(shares[kind, how, n] for how, n in columns)} |\n" for kind in KINDS
    )
    lost = "".join(
        f"| `{kind}` | {' | '.join(accuracies[kind, n] for n in SIZES)} |\n" for kind in KINDS
    )
    sizes = " | ".join(f"n = {n}" for n in SIZES)
    text = f"""# Do the error bars of effects hold?

Written by `benchmarks/calibration_effects.py`. A {"-".join(map(str, WIDTHS))}-5 ReLU network on Gaussian
data that can be drawn without end, {RESAMPLINGS} resamplings per size, in six batches, with the
defaults of `component_effects`; large-sample values from {LARGE:,} samples, with 1,200 draws and all
outputs where they are predicted and 60 draws where they are measured. An interval is the value ±
{QUANTILE} standard errors where it is predicted (Student's t, 4 degrees of freedom), ± {NORMAL} where
it is measured. Share of 95 % intervals that hold the large-sample value, components in order:

| kind | {heads} |
|---|{"---|" * len(columns)}
{rows}
Where `skip` puts in a mean (here in all components but the second, whose shapes agree), the error of
that mean counts where it is measured, and not where it is predicted. The operators that `linear` swaps
in and the spreads of noise are taken as known, and the draws of altered weights are few, one per batch
where effects are predicted, five where they are measured: such intervals are somewhat too narrow.

The same for the accuracy that is lost, where it is measured. There the mean that `skip` puts in is taken
as known:

| kind | {sizes} |
|---|{"---|" * len(SIZES)}
{lost}"""
    PAGE.write_text(text.rstrip() + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
