"""Outputs with as many units as there are samples, beside values for pairs of samples."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import around, wired
from torch import Tensor, nn

from lightning_koopman import component_effects, credit_report
from lightning_koopman.network.flow.dataflow import DataFlow

ROWS = torch.randn(960, 20, generator=torch.Generator().manual_seed(0))
SIZE = 64


def grown(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(m.block(torch.tanh(m.stem(x))))


def side_by_side(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.tanh(m.stem(x))
    return torch.cat([m.inner(h), torch.tanh(m.other(h))], 1)


def beside_logits(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(m.stem(x))
    return m.last(h), torch.cat([m.inner(h), torch.tanh(m.other(h))], 1)


def network(forward: Callable[..., object]) -> nn.Module:
    torch.manual_seed(1)
    block = around(32, lambda m, x: torch.cat([x, F.normalize(m.inner(x).relu(), dim=1)], 1))
    parts = {"stem": nn.Linear(20, 32), "inner": nn.Linear(32, 32), "other": nn.Linear(32, 32)}
    if forward is grown:
        parts = {"stem": nn.Linear(20, 32), "block": block, "head": nn.Linear(64, 5)}
    return wired(forward, **parts, **({"last": nn.Linear(32, 5)} if forward is beside_logits else {}))


@pytest.mark.parametrize("forward", [grown, side_by_side, beside_logits])
def test_batches_as_large_as_an_output_is_wide_give_the_same_report(forward):
    one, same = (
        credit_report(network(forward), ROWS.split(size), max_samples=None) for size in (60, SIZE)
    )
    assert (one.components, one.widths, one.notes) == (same.components, same.widths, same.notes)
    np.testing.assert_allclose(one.credit, same.credit, atol=1e-5)
    assert one.total == pytest.approx(same.total, abs=1e-5)


def test_a_gated_layer_with_as_many_units_as_samples_belongs_to_its_component():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 2 * SIZE), nn.GLU(), nn.Linear(SIZE, 5))
    report = credit_report(model, ROWS.split(SIZE))
    assert report.parts == {"0": ("0", "1"), "2": ("2",)}


def test_effects_count_all_outputs_whatever_the_size_of_batches():
    found = [
        component_effects(network(beside_logits), ROWS.split(size), samples=960) for size in (60, SIZE)
    ]
    assert found[0].components == found[1].components == ("stem", "last", "inner", "other")
    np.testing.assert_allclose(found[0].values["skip"], found[1].values["skip"], rtol=1e-4)


def by_hand(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y[None]).square().sum(-1).sqrt()


def related(x: Tensor, y: Tensor) -> Tensor:
    size = len(x)
    both = torch.cat([x[:, None].expand(-1, size, -1), y.expand(size, -1, -1)], -1)
    return both.tanh().sum(-1)


def repeated(x: Tensor, y: Tensor) -> Tensor:
    both = torch.cat([x.repeat_interleave(len(y), 0), y.repeat(len(x), 1)], 1)
    return both.tanh().sum(1).view(len(x), len(y))


PAIRWISE = {
    "products": lambda x, y: x @ y.T,
    "scaled": lambda x, y: (3.0 * F.normalize(x) @ F.normalize(y).T).softmax(-1),
    "einsum": lambda x, y: torch.einsum("id,jd->ij", x, y),
    "linear": F.linear,
    "distances": torch.cdist,
    "kernel": lambda x, y: torch.exp(-torch.cdist(x, y).square()),
    "by hand": by_hand,
    "cosine": lambda x, y: F.cosine_similarity(x[:, None], y[None], dim=-1),
    "pairwise distance": lambda x, y: F.pairwise_distance(x[:, None], y[None]),
    "outer": lambda x, y: torch.outer(x[:, 0], y[:, 0]),
    "correlations": lambda x, y: torch.corrcoef(x + y),
    "related": related,
    "repeated": repeated,
    "masked": lambda x, y: (x @ y.T).masked_fill(torch.eye(len(x), dtype=torch.bool), -1.0),
    "written": lambda x, y: torch.zeros(len(x), len(x)).copy_(x @ y.T),
}
UNITS = {
    "cat": lambda x, y: torch.cat([x, y], 1),
    "normed": lambda x, y: F.normalize(torch.cat([x, y], 1)),
    "gate": lambda x, y: torch.cat([x, y], 1) * x.sigmoid().mean(1, keepdim=True),
    "sum": lambda x, y: torch.cat([x, y], 1) + torch.cat([y, x], 1),
    "repeat": lambda x, y: x.repeat(1, 2) + y.repeat(1, 2),
    "products of units": lambda x, y: (x[:, :8, None] * y[:, None, :4]).flatten(1).repeat(1, 2),
    "flattened": lambda x, y: torch.stack([x, y], 2).flatten(1),
    "weights": lambda x, y: torch.cat([x, y], 1) @ torch.ones(SIZE, SIZE),
}


@pytest.mark.parametrize("name", [*PAIRWISE, *UNITS])
def test_operators_tell_pairs_of_samples_from_units(name):
    x, y = ROWS[:SIZE, :20], ROWS[SIZE : 2 * SIZE, :20]
    if name in UNITS:
        x, y = torch.randn(2, SIZE, SIZE // 2).unbind()
    flow = DataFlow(origins=True)
    flow.label([x], "x")
    flow.label([y], "y")
    with flow:
        made = (PAIRWISE | UNITS)[name](x, y)
    assert made.shape == (SIZE, SIZE)
    assert flow.error is None
    assert flow.pairs(made) == (name in PAIRWISE)


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_network_that_ends_with_pairs_is_reported_up_to_what_they_are_made_of(name):
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.end(torch.tanh(m.stem(x)))
        return PAIRWISE[name](h, h.sin())

    torch.manual_seed(0)
    model = wired(run, stem=nn.Linear(20, 16), end=nn.Linear(16, 8))
    for size in (60, SIZE):
        report = credit_report(model, ROWS.split(size))
        assert (report.components, report.widths) == (("stem", "end"), (16, 8))
