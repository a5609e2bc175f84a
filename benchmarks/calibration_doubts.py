"""How often is a number with a doubt wrong, and one without right? Writes docs/calibration-doubts.md.

Small networks on digits that can be drawn without end; what is right is the value over many samples. Run
from the repository: `python benchmarks/calibration_doubts.py` (two minutes on one core).
"""

import warnings
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from calibration import Digits
from torch import Tensor, nn

from lightning_koopman import CreditReport, Options, credit_report

PAGE = Path(__file__).parent.parent / "docs" / "calibration-doubts.md"
SIZES, DRAWS, LARGE, STEPS = (96, 128, 256, 512, 2048), 6, 60_000, (0, 400)
CONCERNS = ("r2", "chain_r2", "ridge", "lost")
OFF = {"credit": 0.1, "gain": 0.1, "sensitivity": 0.1, "nonlinearity": 0.05, "r2": 0.05}
"""How far from its large-sample value a number is wrong: nats per direction, or shares of variance."""


class Residual(nn.Module):
    """Two layers and a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        return x + self.b(torch.relu(self.a(x)))


class Tokens(nn.Module):
    """A transformer that reads the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(8, 16), nn.Linear(16, 10)
        layers = (nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(3))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Average the last layer over rows."""
        h = self.inp(x.view(-1, 8, 8))
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean(1))


class Steep(nn.Module):
    """A layer whose units turn over many times between samples."""

    def __init__(self, before: int, after: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(before, after), scale

    def forward(self, x: Tensor) -> Tensor:
        """Apply a sine."""
        return torch.sin(self.scale * self.linear(x))


def plain(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Stack dense layers."""
    blocks = [nn.Sequential(nn.Linear(a, b), act()) for a, b in pairwise(widths[:-1])]
    return nn.Sequential(*blocks, nn.Linear(*widths[-2:]))


def convolutions() -> nn.Sequential:
    """Stack three convolutions and a head."""
    sizes = ((1, 8, 1), (8, 8, 1), (8, 16, 2))
    blocks = [nn.Sequential(nn.Conv2d(a, b, 3, s, 1), nn.ReLU()) for a, b, s in sizes]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *blocks, nn.Flatten(), nn.Linear(256, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": lambda: plain(64, 48, 48, 32, 10),
    "ReLU, narrow": lambda: plain(64, 24, 24, 24, 24, 24, 10),
    "tanh, deep": lambda: plain(64, 48, 48, 48, 48, 48, 10, act=nn.Tanh),
    "bottleneck": lambda: plain(64, 32, 6, 32, 64, act=nn.Tanh),
    "residual": lambda: nn.Sequential(
        nn.Linear(64, 32), *[Residual(32) for _ in range(4)], nn.Linear(32, 10)
    ),
    "tokens": Tokens,
    "convolutions": convolutions,
    "sines": lambda: nn.Sequential(Steep(64, 32, 4.0), Steep(32, 32, 2.0), nn.Linear(32, 10)),
    "sines, steep": lambda: nn.Sequential(
        Steep(64, 32, 2.0), Steep(32, 32, 12.0), Steep(32, 32, 2.0), nn.Linear(32, 10)
    ),
}


def trained(make: Callable[[], nn.Module], digits: Digits, steps: int) -> nn.Module:
    """Train on digits, or on the images themselves where the network gives images."""
    torch.manual_seed(0)
    network = make().double()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = digits.draw(128, generator)
        given = network(x)
        classes = given.shape[1] == 10
        loss = nn.functional.cross_entropy(given, y) if classes else (given - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def measured(network: nn.Module, digits: Digits, n: int, seed: int) -> CreditReport:
    """Measure on new samples."""
    generator = torch.Generator().manual_seed(seed)
    batches = [digits.draw(min(2048, n - i), generator)[0] for i in range(0, n, 2048)]
    return credit_report(network, batches, max_samples=n, options=Options(max_dim=48))


def main() -> None:
    """Count wrong numbers, with each doubt and without any."""
    warnings.simplefilter("ignore")
    digits = Digits()
    counts: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for name, make in NETWORKS.items():
        for steps in STEPS:
            network = trained(make, digits, steps)
            truth = measured(network, digits, LARGE, 5)
            for n in SIZES:
                for draw in range(DRAWS):
                    report = measured(network, digits, n, 100 + draw)
                    for quantity, off in OFF.items():
                        far = np.abs(getattr(report, quantity) - getattr(truth, quantity))
                        wrong = ~(far <= off)
                        for i, words in enumerate(report.doubts):
                            for word in words:
                                counts[quantity, word].append(bool(wrong[i]))
                            own = report.doubts_about(quantity)[i]
                            counts[quantity, "marked" if own else "unmarked"].append(bool(wrong[i]))
                            counts[quantity, "row" if words else "no row"].append(bool(wrong[i]))
            print(name, steps, truth.r2.round(2), truth.chain_r2.round(2), flush=True)
    write(counts)


def share(found: list[bool]) -> str:
    """Write a share and what it is of."""
    return f"{np.mean(found):.3f} of {len(found):,}" if found else "none marked"


def write(counts: dict[tuple[str, str], list[bool]]) -> None:
    """Write the page."""
    heads = ("number", "marked", "not marked", *CONCERNS, "any doubt in its row", "no doubt in its row")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for quantity in OFF:
        kinds = ("marked", "unmarked", *CONCERNS, "row", "no row")
        cells = [share(counts[quantity, kind]) for kind in kinds]
        lines.append(f"| `{quantity}` | {' | '.join(cells)} |")
    table = "\n".join(lines)
    PAGE.write_text(
        f"""# Do doubts mark what is wrong?

Written by `benchmarks/calibration_doubts.py`. {len(NETWORKS)} small networks, new and trained, on
Gaussian digits that can be drawn without end; {DRAWS} samples each of
{", ".join(map(str, SIZES))}. A number is wrong where it lies further than 0.1 nats per direction
(credit, gain, sensitivity) or 0.05 of the variance (nonlinearity, R²) from its value over {LARGE:,}
samples, or is NaN. Share of wrong numbers, by doubt:

{table}

- *Marked* are numbers that carry a question mark: a doubt that is about them. The columns of single
  doubts count all numbers in rows with that doubt, whatever it is about.
- `ridge` tells wrong credits and sensitivities. It is not held against gains, in which the errors of two
  credits cancel: of those in its rows hardly more are wrong than of others. `r2` tells wrong gains, and
  R² and nonlinearity themselves: so low an R² is itself too low, as a rule, for want of samples.
- The value over many samples is that of the linear operators. Where these describe a component badly
  (`r2`, `chain_r2`), credit and gain are about something else than the network, however sure they are:
  such a doubt stands also where the number is right in the sense of this table.
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
