"""What is returned of the last state, a part or with weights of its own, is what the chain ends with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import Options, component_effects, credit_report

EXACT = Options(tikhonov=0.0)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(400, 6, dtype=torch.float64, generator=generator).split(50))


def network(end: Callable[[Any, Tensor], Any]) -> Any:
    torch.manual_seed(0)
    net = wired(lambda m, x: end(m, m.head(m.body(x))), body=nn.Linear(6, 7), head=nn.Linear(7, 4))
    net.p, net.scale = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.rand(4) + 0.5)
    net.register_buffer("wide", torch.randn(4, 5))
    return net.double().eval()


def volume(run: Callable[[Tensor], Tensor]) -> float:
    """Log-volume per output direction of a function that is linear but for a shift."""
    basis = torch.eye(6, dtype=torch.float64)
    with torch.no_grad():
        jacobian = run(basis) - run(torch.zeros_like(basis))
    r = torch.linalg.matrix_rank(jacobian)
    return float(torch.linalg.svdvals(jacobian)[:r].log().mean())


OTHERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a slice": lambda m, y: y[:, :2],
    "a column": lambda m, y: y[:, 1:2],
    "a column as numbers": lambda m, y: y[:, 1],
    "a product": lambda m, y: y @ m.p,
    "a scale": lambda m, y: y * m.scale,
    "a wider product with a buffer": lambda m, y: y @ m.wide,
    "a slice in a mapping": lambda m, y: {"mean": y[:, 2:]},
    "a slice beside a hidden state": lambda m, y: (y[:, :3], y.argmax(1)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_chain_ends_with_what_is_returned(kind: str) -> None:
    net = network(OTHERS[kind])

    def run(x: Tensor) -> Tensor:
        given = net(x)
        first: Tensor = next(iter(given.values())) if isinstance(given, dict) else given
        first = first[0] if isinstance(first, tuple) else first
        return first.reshape(len(x), -1)

    report = credit_report(net, batches(), options=EXACT)
    assert report.components == ("body", "head", "output")
    assert report.total == pytest.approx(volume(run), abs=1e-6)
    assert report.widths[-1] == run(torch.cat(batches())).shape[1]


@pytest.mark.parametrize("given", ["as a report", "not at all"])
def test_effects_are_about_what_is_returned(given: str) -> None:
    net = network(OTHERS["a slice"])
    report = credit_report(net, batches()) if given == "as a report" else None
    found = component_effects(net, batches(), report, ["skip"])
    x = torch.cat(batches())
    with torch.no_grad():
        outputs = net(x)
        skipped = net.head(net.body(x).mean(0, keepdim=True).expand(len(x), -1))[:, :2]
    share = (skipped - outputs).square().sum() / (outputs - outputs.mean(0)).square().sum()
    assert found.values["skip"][0] == pytest.approx(float(share), rel=1e-3)


POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "the last one": lambda y: y[:, -1],
    "the first one": lambda y: y.select(1, 0),
    "their mean": lambda y: y.mean(1),
    "the mean of some": lambda y: y[:, 1:].mean(1),
    "a sum with weights": lambda y: torch.einsum("ntk,t->nk", y, torch.tensor([1.0, 2.0, 4.0]).to(y)),
    "two of three": lambda y: y[:, :2],
    "one number": lambda y: y[:, 1, 0],
}


def scores(order: str, pick: Callable[[Tensor], Tensor]) -> Any:
    """Make a network of sequences whose scores of all positions become what ``pick`` makes of them."""

    def run(m: Any, x: Tensor) -> Tensor:
        axis = int(order == "samples first")
        h = m.body(x if axis else x.transpose(0, 1))
        y = m.head(h + h.mean(axis, keepdim=True))
        return pick(y if axis else y.transpose(0, 1))

    torch.manual_seed(0)
    return wired(run, body=nn.Linear(2, 5), head=nn.Linear(5, 4)).double().eval()


@pytest.mark.parametrize("pick", POSITIONS)
@pytest.mark.parametrize("order", ["samples first", "time first"])
def test_the_chain_ends_with_the_positions_that_are_returned(pick: str, order: str) -> None:
    net = scores(order, POSITIONS[pick])
    report = credit_report(net, [batch.view(-1, 3, 2) for batch in batches()], options=EXACT)

    def run(x: Tensor) -> Tensor:
        return net(x.view(-1, 3, 2)).reshape(len(x), -1)

    assert (report.n_samples, report.components) == (400, ("body", "head", "output"))
    assert report.total == pytest.approx(volume(run), abs=1e-6)


def test_the_chain_ends_with_the_mean_over_an_image() -> None:
    def net(end: Callable[[Tensor], Tensor], *more: nn.Module) -> Any:
        torch.manual_seed(0)
        parts = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 1), *more)
        return wired(lambda m, x: end(m.parts(x)), parts=parts).eval()

    images = list(torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(1)).split(50))
    by_hand = credit_report(net(lambda y: y.mean((2, 3))), images)
    by_module = credit_report(net(lambda y: y, nn.AdaptiveAvgPool2d(1), nn.Flatten()), images)
    assert by_hand.components == (*by_module.components, "output")
    assert by_hand.widths[-1] == by_module.widths[-1] == 4
    assert by_hand.total == pytest.approx(by_module.total, abs=0.1)


SAME: dict[str, Callable[[Any, Tensor], Any]] = {
    "as it is": lambda m, y: y,
    "in single precision": lambda m, y: y.float(),
    "in half precision": lambda m, y: y.half(),
    "in two parts": lambda m, y: y.chunk(2, 1),
    "a part beside all of it": lambda m, y: (y[:, :2], y),
    "as probabilities": lambda m, y: y.softmax(1),
    "as classes": lambda m, y: y.argmax(1),
    "behind an activation": lambda m, y: torch.tanh(y),
    "shifted": lambda m, y: y + m.scale,
    "turned off in part": lambda m, y: (m.scale - torch.inf).where(m.scale > 1, y),
}


@pytest.mark.parametrize("kind", SAME)
def test_all_of_the_last_state_is_no_state_of_its_own(kind: str) -> None:
    report = credit_report(network(SAME[kind]), batches(), options=EXACT)
    assert report.components == ("body", "head")


def test_components_that_were_named_are_taken_to_the_letter() -> None:
    report = credit_report(network(OTHERS["a slice"]), batches(), components=["body", "head"])
    assert report.components == ("body", "head")
