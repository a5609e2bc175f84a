"""Do 95 % intervals hold the large-sample value? Writes docs/calibration.md and docs/calibration.png.

A ReLU network is trained on samples of a known distribution: Gaussians, one per digit, with the means
and covariances of scikit-learn's digits. New samples can then be drawn without end. Run from the
repository: `python benchmarks/calibration.py` (a few minutes on one core).
"""

from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import t as student
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_koopman.koopman.credit import Credits, compute_credits, samples_needed
from lightning_koopman.koopman.moments import Layout, accumulate

DOCS = Path(__file__).parent.parent / "docs"
WIDTHS = (64, 128, 128, 64, 10)
SAMPLES = (64, 128, 256, 512, 1024, 2048)
LARGE, RESAMPLINGS, FOLDS = 300_000, 200, 5
QUANTITIES = ("credit", "gain", "nonlinearity", "sensitivity", "r2", "chain_r2", "rank")


class Digits:
    """Gaussians in place of the ten digits."""

    def __init__(self) -> None:
        pixels, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(pixels / 16), torch.tensor(labels)
        self.means = torch.stack([x[y == c].mean(0) for c in range(10)])
        spread = [torch.cov(x[y == c].T) + 1e-4 * torch.eye(64, dtype=x.dtype) for c in range(10)]
        self.roots = torch.linalg.cholesky(torch.stack(spread))

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw samples and their labels."""
        labels = torch.randint(0, 10, (n,), generator=generator)
        noise = torch.randn(n, 64, 1, generator=generator, dtype=torch.float64)
        return self.means[labels] + (self.roots[labels] @ noise)[:, :, 0], labels


def train(digits: Digits) -> nn.Sequential:
    torch.manual_seed(0)
    pairs = list(pairwise(WIDTHS))
    blocks = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairs[:-1]]
    network = nn.Sequential(*blocks, nn.Linear(*pairs[-1])).double()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(600):
        x, y = digits.draw(128, generator)
        loss = nn.functional.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


@torch.no_grad()
def measure(network: nn.Sequential, digits: Digits, n: int, seed: int) -> Credits:
    generator = torch.Generator().manual_seed(seed)
    layout = Layout(WIDTHS, FOLDS)
    moments = layout.zeros()
    for start in range(0, n, 4096):
        size = min(4096, n - start)
        states = [digits.draw(size, generator)[0]]
        for block in network:
            states.append(block(states[-1]))
        folds = torch.randint(0, FOLDS, (size,), generator=generator)
        accumulate(layout, moments, states, folds)
    return compute_credits(layout, moments)


def main() -> None:
    torch.set_num_threads(1)
    digits = Digits()
    network = train(digits)
    truth = measure(network, digits, LARGE, 5)
    width = student.ppf(0.975, FOLDS - 1)
    covered: dict[tuple[str, int], Tensor] = {}
    off: dict[int, Tensor] = {}
    error: dict[int, Tensor] = {}
    for n in SAMPLES:
        runs = [measure(network, digits, n, 1000 + r) for r in range(RESAMPLINGS)]
        for name in QUANTITIES:
            inside = [
                (run.values[name] - truth.values[name]).abs() <= width * run.stderr[name] + 1e-9
                for run in runs
            ]
            covered[name, n] = torch.stack(inside).double().mean(0)
        inside_total = [abs(run.total - truth.total) <= width * run.total_stderr for run in runs]
        covered["total", n] = torch.tensor([sum(inside_total) / len(runs)], dtype=torch.float64)
        off[n] = torch.stack([(r.values["credit"] - truth.values["credit"]).abs() for r in runs]).mean(0)
        error[n] = torch.stack([run.stderr["credit"] for run in runs]).mean(0)
        print(n, {name: covered[name, n].tolist() for name in (*QUANTITIES, "total")}, flush=True)
    draw(covered, off, error)
    write(covered, off, error, truth)


def draw(covered: dict, off: dict, error: dict) -> None:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhspan(0.90, 0.99, color="#dddddd", label="90 to 99 %")
    for name in ("credit", "gain", "nonlinearity", "sensitivity", "chain_r2"):
        # The last two cover nearly always: see the page.
        left.plot(SAMPLES, [float(covered[name, n][:2].mean()) for n in SAMPLES], "o-", label=name)
    left.set(xscale="log", xlabel="samples", ylabel="coverage, first two components", ylim=(0, 1.03))
    left.legend(fontsize="small")
    for i in range(3):
        right.plot(SAMPLES, [float(off[n][i]) for n in SAMPLES], "o-", label=f"component {i + 1}")
        right.plot(SAMPLES, [float(error[n][i]) for n in SAMPLES], ":", color=f"C{i}")
    right.set(xscale="log", yscale="log", xlabel="samples", ylabel="credit, nats per direction")
    right.set_title(
        "mean distance from the large-sample value; dotted: standard error", fontsize="medium"
    )
    right.axvline(samples_needed(Layout(WIDTHS, FOLDS)), color="black", linewidth=0.8, linestyle="--")
    right.legend(fontsize="small")
    figure.savefig(DOCS / "calibration.png", dpi=110)


def write(covered: dict, off: dict, error: dict, truth: Credits) -> None:
    needed = samples_needed(Layout(WIDTHS, FOLDS))
    lines = [
        "# Do the error bars hold?",
        "",
        "Written by `benchmarks/calibration.py`. A 64-128-128-64-10 ReLU network, trained on Gaussian "
        f"digits that can be drawn without end; {RESAMPLINGS} resamplings per size; large-sample values "
        f"from {LARGE:,} samples. An interval is the value ± 2.78 standard errors (Student's t, "
        f"{FOLDS - 1} degrees of freedom).",
        "",
        "Share of 95 % intervals that hold the large-sample value, components in order:",
        "",
        "| number | " + " | ".join(f"n = {n}" for n in SAMPLES) + " |",
        "|---" * (len(SAMPLES) + 1) + "|",
    ]
    for name in (*QUANTITIES, "total"):
        cells = [" ".join(f"{float(v):.2f}" for v in covered[name, n]) for n in SAMPLES]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += [
        "",
        "![coverage, and how far credits move with n](calibration.png)",
        "",
        "How far the credit lies from its large-sample value, in nats per direction, mean over "
        "resamplings (in brackets the mean standard error):",
        "",
        "| n | " + " | ".join(f"component {i + 1}" for i in range(4)) + " |",
        "|---" * 5 + "|",
    ]
    for n in SAMPLES:
        cells = [f"{float(a):.3f} ({float(b):.3f})" for a, b in zip(off[n], error[n], strict=True)]
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    values = ", ".join(f"{float(v):.3f}" for v in truth.values["credit"])
    lines += [
        "",
        f"Large-sample credits: {values}. The report warns below {needed} samples for this network.",
        "",
        NOTES,
    ]
    (DOCS / "calibration.md").write_text("\n".join(lines), encoding="utf-8")


NOTES = """## What makes them hold

- **The ridge.** With the ridge weight that predicts best, credits have no large-sample value: more
  samples resolve more directions in which a state hardly varies, each with a large entry in the
  operator. On this network the second component's credit read 0.76, 1.20, 1.14, 1.32, 1.28, 1.88,
  2.59 at n = 100, 360, 1000, 2000, 5000, 20,000, 100,000, with error bars of 0.005 to 0.4. A ridge
  of 1e-2 of the mean variance gives 0.73, 0.71, 0.69, 0.69, 0.69, 0.69, 0.69. So the default is the
  largest weight up to 1e-2 that at most doubles the unexplained variance expected on other data
  (generalised cross-validation); it is 0 where a step is linear to the last digit, and 1e-2 wherever
  something is nonlinear. `tikhonov=` overrides it. The credit is then a statement about directions that
  carry at least about a hundredth of the mean variance.
- **Re-choosing** the weight in every jackknife replicate that could choose another, so that its choice
  is part of the error. Picked by held-out folds, as it was before, it varies more from replicate to
  replicate: in a network that is linear up to 1e-3, error bars of credits were then 1.4 to 2.5 times as
  large, and covered in 0.99 to 1.00 of 150 resamplings; now they cover in 0.93 to 0.98.
- **Bias.** The jackknife's own estimate of the bias of a finite sample is added in quadrature.
- **R².** Held out, it is too low by about as much as it is too high in sample; a quarter of that
  gap is added in quadrature. These intervals are wide rather than narrow: they cover nearly always.

- **Directions never seen.** A layer that is linear to the last digit (the head, as a rule) gets no
  ridge, so a unit before it that wakes in one sample of a hundred thousand moves the credit when it
  is first seen: here three units wake in 3, 17 and 23 of 300,000 samples and move the third
  component's credit by 0.013. No resampling foresees that. So where u of a state's directions never
  varied and k did, log(1 + u / k) / 2, the move if all u woke with weights like the others', is what
  a 95 % interval reaches at least. It covers always here, and is wide: ± 0.08 for a move of 0.013.
  What exactly linear layers cannot give does not count as unseen, so linear networks on full-rank
  data keep exact errors.
- **`rank`** counts directions whose variance is above a ten-thousandth of the mean, those near it in
  part. The number of directions ever seen, which it was before, only grows with samples: it was
  covered in 3 to 25 % of the resamplings for the second and third component.

## What they do not hold

- Fewer samples than the report asks for (320 here): at n = 128 credits are covered in 0.43 and
  0.79, and at n = 256 the second component's gain still in 0.89.
- Directions whose weights, once awake, are unlike those of the others.
- Ridge weights that go on falling as samples grow, as where a ReLU layer is nearly linear (R² .97 to
  .99): in ReLU networks 64-96-96-96-10, with skips and without, credits of 256 samples were up to 0.8
  below those of 30,000, with errors of 0.1 to 0.6. The doubt `ridge` marks most of such rows, not all.
- Component boundaries, the choice of `tikhonov`, and data unlike the samples are in no error bar.
"""

if __name__ == "__main__":
    main()
