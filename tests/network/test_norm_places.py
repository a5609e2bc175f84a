"""A norm counts by where it is applied; in which order modules are registered decides nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from lit import quiet_trainer
from small import wired
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_koopman import (
    CreditReport,
    KoopmanCreditMonitor,
    Options,
    component_effects,
    credit_report,
    drift,
)
from lightning_koopman.measurement.overview import describe_components

WIDTH = 6
EXACT = Options(tikhonov=0.0)


def norm() -> nn.Module:
    """Make a norm that scales and shifts in eval mode, so that products of matrices tell the truth."""
    made = nn.BatchNorm1d(WIDTH)
    nn.init.uniform_(made.weight, 0.5, 2.0)
    nn.init.normal_(made.bias)
    made.running_mean, made.running_var = torch.randn(WIDTH), torch.rand(WIDTH) + 0.5
    return made


def block() -> nn.Module:
    return wired(lambda m, x: m.second(m.first(x)), first=linear(), second=linear())


def linear(out: int = WIDTH) -> nn.Module:
    return nn.Linear(WIDTH, out)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(400, WIDTH, dtype=torch.float64, generator=generator).split(50))


class Case(NamedTuple):
    """A pass, what makes its parts, the components that it is made of, and its Jacobian."""

    run: Callable[..., Any]
    makers: dict[str, Callable[[], nn.Module]]
    components: tuple[str, ...]
    parts: dict[str, tuple[str, ...]]


def alone(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names}


def listed(m: Any, x: Tensor) -> Tensor:
    for one, layer in zip(m.norms, m.layers, strict=True):
        x = layer(one(x))
    return m.head(x)


def beside_blocks(m: Any, x: Tensor) -> Tensor:
    for one, each in zip(m.norms, m.blocks, strict=True):
        x = one(each(x))
    return m.head(x)


FC, NORM, HEAD = {"fc": linear}, {"norm": norm}, {"head": lambda: linear(3)}
CASES = {
    "at the start": Case(
        lambda m, x: m.head(m.fc(m.norm(x))),
        FC | NORM | HEAD,
        ("norm", "fc", "head"),
        alone("norm", "fc", "head"),
    ),
    "behind a layer": Case(
        lambda m, x: m.head(m.norm(m.fc(x))),
        FC | NORM | HEAD,
        ("fc", "head"),
        {"fc": ("fc", "norm"), "head": ("head",)},
    ),
    "behind the last layer": Case(
        lambda m, x: m.norm(m.fc(m.a(x))),
        {"a": linear} | FC | NORM,
        ("a", "fc"),
        {"a": ("a",), "fc": ("fc", "norm")},
    ),
    "behind a sum": Case(
        lambda m, x: m.head(m.norm(m.a(x) + m.b(x))),
        {"a": linear, "b": linear} | NORM | HEAD,
        ("a+b", "norm", "head"),
        alone("a", "b", "norm", "head"),
    ),
    "behind a sum with the input": Case(
        lambda m, x: m.head(m.norm(x + m.fc(x))),
        FC | NORM | HEAD,
        ("fc", "norm", "head"),
        alone("fc", "norm", "head"),
    ),
    "behind what is no module": Case(
        lambda m, x: m.head(m.norm(2 * m.fc(x))),
        FC | NORM | HEAD,
        ("fc", "norm", "head"),
        alone("fc", "norm", "head"),
    ),
    "behind a block": Case(
        lambda m, x: m.head(m.norm(m.block(m.fc(x)))),
        FC | NORM | {"block": block} | HEAD,
        ("fc", "block", "norm", "head"),
        alone("fc", "block", "norm", "head"),
    ),
    "within a connection around it": Case(
        lambda m, x: m.head((h := m.fc(x)) + m.b(m.norm(h))),
        FC | NORM | {"b": linear} | HEAD,
        ("fc", "b", "head"),
        alone("fc", "b", "head"),
    ),
    "twice, once behind a layer": Case(
        lambda m, x: m.head(m.norm(m.fc(m.norm(x)))),
        FC | NORM | HEAD,
        ("norm", "fc", "head"),
        {"norm": ("norm",), "fc": ("fc", "norm#1"), "head": ("head",)},
    ),
    "in front of what holds all others": Case(
        lambda m, x: m.net(m.norm(x)),
        NORM | {"net": lambda: nn.Sequential(linear(), linear(3))},
        ("norm", "net.0", "net.1"),
        alone("norm", "net.0", "net.1"),
    ),
    "in a list": Case(
        listed,
        {
            "norms": lambda: nn.ModuleList([norm(), norm()]),
            "layers": lambda: nn.ModuleList([linear(), linear()]),
        }
        | HEAD,
        ("norms.0", "layers.0", "layers.1", "head"),
        {
            "norms.0": ("norms.0",),
            "layers.0": ("layers.0", "norms.1"),
            "layers.1": ("layers.1",),
            "head": ("head",),
        },
    ),
    "in a list beside blocks": Case(
        beside_blocks,
        {
            "norms": lambda: nn.ModuleList([norm(), norm()]),
            "blocks": lambda: nn.ModuleList([block(), block()]),
        }
        | HEAD,
        ("blocks.0", "blocks.1", "head"),
        {"blocks.0": ("blocks.0", "norms.0"), "blocks.1": ("blocks.1", "norms.1"), "head": ("head",)},
    ),
}


def network(case: Case, order: tuple[str, ...] | None = None) -> Any:
    torch.manual_seed(0)
    made = {name: make() for name, make in case.makers.items()}
    return wired(case.run, **{name: made[name] for name in order or made}).double().eval()


def volume(net: nn.Module) -> float:
    """Log-volume per output direction of a network that is linear but for a shift."""
    basis = torch.eye(WIDTH, dtype=torch.float64)
    with torch.no_grad():
        jacobian = net(basis) - net(torch.zeros_like(basis))
    return float(torch.linalg.slogdet(jacobian.T @ jacobian)[1]) / 2 / jacobian.shape[1]


@pytest.mark.parametrize("kind", CASES)
def test_where_a_norm_is_applied_decides_and_where_it_is_registered_does_not(kind: str) -> None:
    case = CASES[kind]
    orders = list(itertools.permutations(case.makers))
    reports = [credit_report(net := network(case, order), batches(), options=EXACT) for order in orders]
    for order, report in zip(orders, reports, strict=True):
        assert report.components == case.components, order
        assert report.parts == case.parts, order
        assert report.reads == reports[0].reads
        assert report.total == pytest.approx(volume(net), abs=1e-7)
        np.testing.assert_allclose(report.credit, reports[0].credit, atol=1e-9)
        np.testing.assert_allclose(report.r2, 1.0, atol=1e-6)


@pytest.mark.parametrize("last", [nn.ReLU, nn.Identity])
def test_in_a_sequence_with_its_layer_it_is_the_same_as_beside_it(last: type[nn.Module]) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.act(m.norm(m.fc(x))))

    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "norm": nn.LayerNorm(WIDTH),
        "act": last(),
        "fc": linear(),
        "head": linear(3),
    }
    apart = wired(run, **parts)
    together = wired(
        lambda m, x: m.head(m.body(x)),
        body=nn.Sequential(parts["fc"], parts["norm"], parts["act"]),
        head=parts["head"],
    )
    apart, together = apart.double().eval(), together.double().eval()
    found, expected = credit_report(apart, batches()), credit_report(together, batches())
    assert found.components == ("fc", "head")
    assert expected.components == ("body.0", "head")
    for quantity in ("credit", "gain", "r2", "sensitivity"):
        np.testing.assert_array_equal(getattr(found, quantity), getattr(expected, quantity))


def test_a_norm_that_a_layer_gives_to_is_altered_with_it_and_one_at_the_start_by_itself() -> None:
    case = CASES["twice, once behind a layer"]
    swapped = network(case, ("head", "norm", "fc"))
    report = credit_report(swapped, batches(), options=EXACT)
    found = component_effects(swapped, batches(), report, ["skip"])
    x = torch.cat(batches())
    with torch.no_grad():
        outputs = swapped(x)
        # What is as wide as its input passes it on.
        past_norm = swapped.head(swapped.norm(swapped.fc(x)))
        past_layer = swapped.head(swapped.norm(x))
    spread = (outputs - outputs.mean(0)).square().sum()
    expected = [float((past - outputs).square().sum() / spread) for past in (past_norm, past_layer)]
    assert found.values["skip"][:2] == pytest.approx(expected, rel=1e-3)


def test_what_is_described_is_what_is_reported() -> None:
    case = CASES["at the start"]
    rows = describe_components(network(case), batches()).rows
    assert [row.name for row in rows] == list(case.components)


def test_a_norm_that_never_runs_is_told() -> None:
    net = network(Case(lambda m, x: m.head(m.fc(x)), FC | NORM | HEAD, (), {}))
    assert "never ran, so left out: 'norm'" in credit_report(net, batches()).notes


def test_references_from_when_norms_behind_layers_were_not_named_still_compare() -> None:
    net = network(CASES["behind a layer"])
    report = credit_report(net, batches())
    assert report.reference is not None
    old = replace(report, reference=replace(report.reference, modules=("fc", "head")))
    assert np.abs(drift(old, net, batches()).drift).max() < 1e-9


class Own(nn.BatchNorm1d):
    """A norm of somebody's own, which may do anything."""


class PreNorm(L.LightningModule):
    """Normalises what a network beside the norm takes, and trains nothing to speak of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.norm = nn.Sequential(linear(), linear(3)), Own(WIDTH)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(self.norm(batch[0])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.filterwarnings("ignore")
def test_a_training_that_is_watched_reports_a_norm_in_front_of_the_network(tmp_path: Any) -> None:
    monitor = KoopmanCreditMonitor()
    data = DataLoader(TensorDataset(torch.cat(batches()).float()), batch_size=50)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor]).fit(PreNorm(), data)
    report: CreditReport = monitor.history[-1]
    assert report.components == ("norm", "net.0", "net.1")
