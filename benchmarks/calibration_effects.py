"""Do the standard errors of predicted effects hold? Writes docs/calibration-effects.md.

Run from the repository: `python benchmarks/calibration_effects.py` (minutes on one core).
"""

import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lightning_koopman import credit_report, predict_effects
from lightning_koopman.report.effects import KINDS, Effects

PAGE = Path(__file__).parent.parent / "docs" / "calibration-effects.md"
RESAMPLINGS, SIZES, LARGE, QUANTILE = 200, (300, 1000), 50_000, 2.776
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
    net: nn.Sequential, initial: dict[str, torch.Tensor], n: int, seed: int, draws: int
) -> Effects:
    x = torch.randn(n, WIDTHS[0], generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = net(x).argmax(1)
    batches = list(zip(x.split(n // 6), y.split(n // 6), strict=True))
    report = credit_report(net, x.split(n // 6), components=[str(i) for i in range(len(net))])
    found = predict_effects(net, batches, report, KINDS, initial=initial, draws=draws, seed=seed).effects
    assert found is not None
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    net, initial = trained()
    truth = measure(net, initial, LARGE, 10**6, 1200)
    shares: dict[tuple[str, int], list[str]] = {}
    for n in SIZES:
        found = [measure(net, initial, n, seed, 20) for seed in range(RESAMPLINGS)]
        for kind in (*KINDS, "influence"):
            own = kind == "influence"
            right = truth.influence if own else truth.values[kind]
            held = [
                np.abs((e.influence if own else e.values[kind]) - right)
                <= QUANTILE * (e.influence_stderr if own else e.stderr[kind])
                for e in found
            ]
            # What a linear head leaves is rounding, whose size no resampling tells.
            shares[kind, n] = [
                "–" if kind == "linear" and i == len(right) - 1 else f"{share:.2f}"
                for i, share in enumerate(np.mean(held, axis=0))
            ]
    heads = " | ".join(f"n = {n}" for n in SIZES)
    rows = "".join(
        f"| `{kind}` | {' | '.join(' '.join(shares[kind, n]) for n in SIZES)} |\n"
        for kind in (*KINDS, "influence")
    )
    text = f"""# Do the error bars of predicted effects hold?

Written by `benchmarks/calibration_effects.py`. A {"-".join(map(str, WIDTHS))}-5 ReLU network on Gaussian
data that can be drawn without end, {RESAMPLINGS} resamplings per size with 20 draws of altered weights;
large-sample values from {LARGE:,} samples and 1,200 draws. An interval is the value ± {QUANTILE}
standard errors (Student's t, 4 degrees of freedom). Share of 95 % intervals that hold
the large-sample value, components in order:

| number | {heads} |
|---|{"---|" * len(SIZES)}
{rows}
The intervals are somewhat too narrow: the operators that `linear` swaps in and the means that `skip`
puts in place are taken as known, and 20 draws of altered weights are few.
"""
    PAGE.write_text(text.rstrip() + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
