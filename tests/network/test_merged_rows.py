"""Positions of samples that are merged into the first axis, and meet again, are those of one sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import CreditReport, credit_report

SAMPLES, POINTS, UNITS = 240, 5, 6
MIXES: dict[str, Callable[[Tensor, int, int], Tensor]] = {}
"""How rows ``(samples * points, units)`` are put together with others of their sample."""


def way(mix: Callable[[Tensor, int, int], Tensor]) -> Callable[[Tensor, int, int], Tensor]:
    MIXES[mix.__name__] = mix
    return mix


def pairs(n: int, points: int, *, own: bool = False) -> tuple[Tensor, Tensor]:
    """Return edges from each point of a sample to each other one."""
    edges = [(i, j) for i in range(points) for j in range(points) if own or i != j]
    first, second = torch.tensor(edges).T
    start = points * torch.arange(n)[:, None]
    return (first + start).flatten(), (second + start).flatten()


def in_sets(h: Tensor, n: int, points: int) -> Tensor:
    """Return what all ways do: twice each row, and the others of its sample."""
    sets = h.view(n, points, -1)
    return (sets + sets.sum(1, keepdim=True)).flatten(0, 1)


@way
def mean_of_views(h: Tensor, n: int, points: int) -> Tensor:
    sets = h.view(n, points, -1)
    return (sets + points * sets.mean(1, keepdim=True)).reshape(n * points, -1)


@way
def product_of_views(h: Tensor, n: int, points: int) -> Tensor:
    sets = h.view(n, points, -1)
    return h + (torch.ones(n, points, points) @ sets).view_as(h)


@way
def first_of_views(h: Tensor, n: int, points: int) -> Tensor:
    sets = h.view(n, points, -1)
    total = sets[:, :1]
    for k in range(1, points):
        total = total + sets[:, k : k + 1]
    return (sets + total).flatten(0, 1)


@way
def pooled(h: Tensor, n: int, points: int) -> Tensor:
    of = torch.arange(n).repeat_interleave(points)
    return h + torch.zeros(n, h.shape[1]).index_add(0, of, h)[of]


@way
def index_add(h: Tensor, n: int, points: int) -> Tensor:
    source, target = pairs(n, points)
    return 2 * h + torch.zeros_like(h).index_add_(0, target, h[source])


@way
def index_add_alone(h: Tensor, n: int, points: int) -> Tensor:
    source, target = pairs(n, points, own=True)
    return torch.zeros_like(h).index_add_(0, target, h[source]).add(h)


@way
def sums_alone(h: Tensor, n: int, points: int) -> Tensor:
    # What is put to zeros has nothing beside it that tells how rows were merged.
    source, target = pairs(n, points, own=True)
    source, target = torch.cat([source, torch.arange(len(h))]), torch.cat([target, torch.arange(len(h))])
    return h.new_zeros(h.shape).index_put_((target,), h.index_select(0, source), accumulate=True)


@way
def scatter_add(h: Tensor, n: int, points: int) -> Tensor:
    source, target = pairs(n, points)
    return 2 * h + torch.zeros_like(h).scatter_add(0, target[:, None].expand(-1, h.shape[1]), h[source])


@way
def neighbours(h: Tensor, n: int, points: int) -> Tensor:
    _, source = pairs(n, points, own=True)
    source = torch.cat([source.view(n * points, -1), torch.arange(len(h))[:, None]], 1)
    return h[source].sum(1)


@way
def adjacency(h: Tensor, n: int, points: int) -> Tensor:
    return h + torch.block_diag(*[torch.ones(points, points)] * n) @ h


@way
def sparse_adjacency(h: Tensor, n: int, points: int) -> Tensor:
    return h + torch.sparse.mm(torch.block_diag(*[torch.ones(points, points)] * n).to_sparse(), h)


def sets_of(mix: Callable[[Tensor, int, int], Tensor], *, flat: bool, bend: bool = True) -> nn.Module:
    """Return a network that takes all points as rows, or sets as they are, with the same weights."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        n, points, _ = x.shape
        h = m.a(x.flatten(0, 1) if flat else x)
        h = torch.tanh(h) if bend else h
        h = mix(h.reshape(n * points, -1), n, points)
        h = m.b(h if flat else h.view(n, points, -1))
        return m.c(torch.tanh(h) if bend else h).view(n, points, -1).mean(1)

    return network(run)


def network(run: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    return wired(run, a=nn.Linear(3, UNITS), b=nn.Linear(UNITS, UNITS), c=nn.Linear(UNITS, 2))


def points() -> Tensor:
    return torch.randn(SAMPLES, POINTS, 3, generator=torch.Generator().manual_seed(0))


def report_of(run: Callable[..., Any]) -> CreditReport:
    return credit_report(network(run), points().split(48))


@pytest.mark.parametrize("mix", MIXES)
def test_all_ways_to_mix_do_the_same(mix):
    h = torch.randn(4 * POINTS, UNITS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if mix not in ("adjacency", "sparse_adjacency", "product_of_views", "pooled"):
        assert torch.allclose(MIXES[mix](h, 4, POINTS), in_sets(h, 4, POINTS), rtol=0, atol=1e-12)
    h = h.float()
    assert torch.allclose(MIXES[mix](h, 4, POINTS), in_sets(h, 4, POINTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mix", MIXES)
def test_a_linear_layer_behind_points_that_met_is_linear(mix):
    report = credit_report(sets_of(MIXES[mix], flat=True, bend=False), points().split(48))
    assert (report.n_samples, report.components) == (SAMPLES, ("a", "b", "c", "output"))
    assert list(report.widths) == [POINTS * UNITS, POINTS * UNITS, POINTS * 2, 2]
    assert report.r2 == pytest.approx(1, abs=1e-6)
    assert not report.notes


@pytest.mark.parametrize("mix", MIXES)
def test_points_as_rows_give_the_report_of_sets(mix):
    rows = credit_report(sets_of(MIXES[mix], flat=True), points().split(48))
    sets = credit_report(sets_of(in_sets, flat=False), points().split(48))
    assert rows.n_samples == sets.n_samples == SAMPLES
    assert rows.r2 == pytest.approx(sets.r2, abs=1e-4)
    assert rows.credit == pytest.approx(sets.credit, abs=1e-3)
    assert rows.stderr["credit"] == pytest.approx(sets.stderr["credit"], abs=1e-2)


@pytest.mark.parametrize("mix", ["index_add_alone", "sums_alone", "scatter_add"])
def test_points_put_together_behind_a_layer_that_took_sets_are_those_of_their_samples(mix):
    def run(m: nn.Module, x: Tensor) -> Tensor:
        n, points, _ = x.shape
        return m.c(MIXES[mix](m.b(m.a(x).flatten(0, 1)), n, points)).view(n, points, -1).mean(1)

    report = report_of(run)
    assert (report.n_samples, report.components) == (SAMPLES, ("a", "b", "c", "output"))
    assert report.r2 == pytest.approx(1, abs=1e-6)


def test_points_that_are_added_to_the_next_one_are_those_of_their_samples():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x.flatten(0, 1))
        last = torch.arange(len(h)) % POINTS == POINTS - 1
        source = torch.arange(len(h))[~last]
        return m.c(m.b(h + torch.zeros_like(h).index_add(0, source + 1, h[source])))

    report = report_of(run)
    assert report.n_samples == SAMPLES
    assert report.r2 == pytest.approx(1, abs=1e-6)


def test_rows_in_another_order_behind_are_those_of_their_samples():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x.flatten(0, 1)).view(len(x), POINTS, UNITS)
        return m.c(m.b(h.transpose(0, 1).reshape(-1, UNITS)))

    report = report_of(run)
    assert report.n_samples == SAMPLES
    assert report.r2 == pytest.approx(1, abs=1e-6)


def frames(m: nn.Module, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(x.flatten(0, 1))).relu()).view(len(x), POINTS, 2)


def scored_together(m: nn.Module, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(x.flatten(0, 1))).relu()).view(len(x), POINTS, 2).mean(1)


def given_places(m: nn.Module, x: Tensor) -> Tensor:
    h = m.a(x.flatten(0, 1)).view(len(x), POINTS, UNITS)
    return m.c(m.b((h + torch.linspace(-1, 1, POINTS)[:, None]).relu().flatten(0, 1)))


def two_views(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    z = m.c(m.b(m.a(torch.cat([x[:, 0], x[:, 1]]))).relu())
    return nn.functional.normalize(z, dim=-1).chunk(2)


def channels_in_time(m: nn.Module, x: Tensor) -> Tensor:
    # Rows are along the second axis where time comes first.
    h = m.a(x.flatten(0, 1)).unsqueeze(1).expand(-1, 3, -1).transpose(0, 1)
    return m.c(m.b((h * torch.arange(3.0)[:, None, None]).tanh().cumsum(0)[-1]))


def over_the_batch(m: nn.Module, x: Tensor) -> Tensor:
    h = m.a(x.flatten(0, 1))
    return m.c(m.b((h - h.mean(0)) / h.std(0)).relu())


def units_first(m: nn.Module, x: Tensor) -> Tensor:
    return m.c(m.b((torch.eye(UNITS) @ m.a(x.flatten(0, 1)).t()).t()).relu())


def by_experts(m: nn.Module, x: Tensor) -> Tensor:
    h = m.a(x.flatten(0, 1))
    total = torch.zeros_like(h)
    for sign in (-1, 1):
        (own,) = torch.where(sign * h[:, 0] > 0)
        total = total.index_add_(0, own, sign * h[own])
    return m.c(m.b(total).relu())


KEPT = [
    *(frames, scored_together, given_places, two_views),
    *(channels_in_time, over_the_batch, units_first, by_experts),
]


@pytest.mark.parametrize("run", KEPT)
def test_rows_that_never_meet_are_samples(run):
    report = report_of(run)
    assert report.n_samples == SAMPLES * (2 if run is two_views else POINTS)
    assert not [note for note in report.notes if note.startswith("rows of")]


def test_rows_that_meet_and_of_which_samples_are_not_known_are_told():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = mean_of_views(torch.tanh(m.a(x.flatten(0, 1))), *x.shape[:2])
        # Which rows a sorted one lies between says nothing of its sample.
        return m.c(m.b(h[h[:, 0].argsort()]))

    report = report_of(run)
    assert report.n_samples == SAMPLES * POINTS
    assert [note for note in report.notes if note.startswith("rows of several samples meet in b,")]


def test_an_embedding_that_is_part_of_a_merged_input_tells_positions_from_samples() -> None:
    reports = []
    for flat in (False, True):

        def run(m: nn.Module, x: Tensor, kind: Tensor, flat: bool = flat) -> Tensor:
            h = torch.cat([x[..., [1]], m.e(kind)], dim=-1)
            h = h.view(-1, 5) if flat else h
            return m.b(torch.tanh(m.a(h))).view(len(x), 4, 2)

        torch.manual_seed(0)
        model = wired(run, e=nn.Embedding(6, 4), a=nn.Linear(5, 6), b=nn.Linear(6, 2))
        batches = [(torch.randn(32, 4, 2), torch.randint(0, 6, (32, 4))) for _ in range(10)]
        reports.append(credit_report(model, batches, forward_fn=lambda m, batch: m(*batch)))
    plain, merged = reports
    assert plain.n_samples == merged.n_samples == 320
    assert merged.components == plain.components
    assert merged.r2 == pytest.approx(plain.r2, abs=1e-4)
    assert merged.credit == pytest.approx(plain.credit, abs=1e-3)
    assert merged.notes == plain.notes
