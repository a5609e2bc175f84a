"""Mixtures of experts whose first batch sends all samples to the same ones."""

from typing import Any

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import credit_report
from lightning_koopman.measurement.overview import describe_components
from lightning_koopman.network.components import in_turns

ALONE = (
    "the network sends samples to one part or another, in the first batch all of them to these, so left "
    "out: "
)


def by_places(m: Any, h: Tensor, kind: Tensor) -> Tensor:
    given = torch.zeros_like(h)
    for k, expert in enumerate(m.experts):
        places = (kind == k).nonzero()[:, 0]
        if len(places):
            given = given.index_add(0, places, expert(h[places]))
    return given


def by_mask(m: Any, h: Tensor, kind: Tensor) -> Tensor:
    given = torch.zeros_like(h)
    for k, expert in enumerate(m.experts):
        if (mask := kind == k).any():
            given[mask] = expert(h[mask])
    return given


def by_sorting(m: Any, h: Tensor, kind: Tensor) -> Tensor:
    order = kind.argsort(stable=True)
    parts = h[order].split(torch.bincount(kind, minlength=3).tolist())
    given = [expert(part) for expert, part in zip(m.experts, parts, strict=True) if len(part)]
    return torch.cat(given)[order.argsort()]


def one_layer() -> nn.Module:
    return nn.Linear(8, 8)


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def mixture(send: Any, expert: Any = one_layer) -> Any:
    """Make a network that sends each sample to one of three experts, by its first hidden unit."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.inp(x).tanh()
        kind = (h[:, 0] > 0).long() + (h[:, 0] > 0.5).long()
        return m.out(h + send(m, h, kind))

    torch.manual_seed(0)
    experts = nn.ModuleList(expert() for _ in range(3))
    return wired(forward, inp=nn.Linear(4, 8), experts=experts, out=nn.Linear(8, 2)).eval()


def batches(net: Any) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return mixed batches, and for each expert two batches of which all samples go to it."""
    x = torch.randn(800, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        unit = net.inp(x).tanh()[:, 0]
    kind = (unit > 0).long() + (unit > 0.5).long()
    return list(x[:120].split(40)), [list(x[120:][kind[120:] == k][:80].split(40)) for k in range(3)]


@pytest.mark.parametrize("expert", [one_layer, two_layers])
@pytest.mark.parametrize("send", [by_places, by_mask, by_sorting])
@pytest.mark.parametrize("k", [0, 2])
def test_it_does_not_matter_which_batch_comes_first(send, expert, k):
    net = mixture(send, expert)
    mixed, pure = batches(net)
    last = credit_report(net, [*mixed, *pure[k]], max_samples=None)
    first = credit_report(net, [*pure[k], *mixed], max_samples=None)
    assert first.components == last.components == ("inp", "out")
    assert first.n_samples == last.n_samples == 200
    np.testing.assert_allclose(first.credit, last.credit, atol=1e-8)
    np.testing.assert_allclose(first.r2, last.r2, atol=1e-8)
    assert any(note.startswith("without one row for each") for note in last.notes)
    names = ["experts.{}"] if expert is one_layer else ["experts.{}.0", "experts.{}.2"]
    assert ALONE + ", ".join(name.format(k) for name in names) in first.notes


@pytest.mark.parametrize("send", [by_places, by_mask, by_sorting])
def test_experts_that_come_last_may_be_sent_all_samples_first(send):
    net = mixture(send)
    net.out = nn.Identity()
    mixed, pure = batches(net)
    last = credit_report(net, [*mixed, *pure[1]], max_samples=None)
    first = credit_report(net, [*pure[1], *mixed], max_samples=None)
    assert first.components == last.components == ("inp", "output")
    np.testing.assert_allclose(first.credit, last.credit, atol=1e-8)
    np.testing.assert_allclose(first.r2, last.r2, atol=1e-8)


@pytest.mark.parametrize("send", [by_places, by_mask, by_sorting])
def test_each_batch_may_be_of_one_expert(send):
    net = mixture(send)
    _, pure = batches(net)
    report = credit_report(net, [batch for k in (1, 0, 2) for batch in pure[k]], max_samples=None)
    assert (report.components, report.n_samples) == (("inp", "out"), 240)
    assert not any("never ran" in note for note in report.notes)


def test_an_expert_that_gets_a_whole_batch_later_is_no_reason_to_stop():
    net = mixture(by_places)
    _, pure = batches(net)
    both = torch.cat([pure[0][0], pure[1][0][:20]])
    report = credit_report(net, [both, *pure[2], *pure[0]], max_samples=None)
    assert (report.components, report.n_samples) == (("inp", "out"), 220)


def test_of_many_experts_several_may_get_as_many_samples_by_chance():
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.inp(x).tanh()
        weights, kinds = m.gate(h).softmax(dim=-1).topk(2)
        given = torch.zeros_like(h)
        for k, expert in enumerate(m.experts):
            rows, place = (kinds == k).nonzero(as_tuple=True)
            given = given.index_add(0, rows, weights[rows, place, None] * expert(h[rows]))
        return m.out(h + given)

    torch.manual_seed(0)
    parts = {"inp": nn.Linear(16, 8), "gate": nn.Linear(8, 60, bias=False), "out": nn.Linear(8, 2)}
    net = wired(forward, **parts, experts=nn.ModuleList(one_layer() for _ in range(60))).eval()
    data = torch.randn(200, 16)
    with torch.no_grad():
        counts = torch.bincount(net.gate(net.inp(data[:100]).tanh()).topk(2).indices.flatten())
    assert int(counts.bincount()[1:].max()) > 5
    report = credit_report(net, data.split(100))
    assert (report.components, report.n_samples) == (("inp", "gate", "out"), 200)
    few = credit_report(net, data.split(20), max_samples=None)
    np.testing.assert_allclose(report.credit, few.credit, atol=1e-8)


def test_the_overview_says_the_same():
    net = mixture(by_places)
    _, pure = batches(net)
    overview = describe_components(net, pure[0])
    assert ALONE + "experts.0" in overview.notes
    assert {row.name: row.state for row in overview.rows}["experts.0"] is None


def test_what_is_named_stays():
    net = mixture(by_places)
    _, pure = batches(net)
    report = credit_report(net, pure[0], components=["inp", "experts.0", "out"])
    assert report.components == ("inp", "experts.0", "out")


def test_members_of_a_list_that_run_on_the_rows_as_they_come_stay():
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(m.experts[0](m.inp(x)).tanh())

    experts = nn.ModuleList(one_layer() for _ in range(3))
    net = wired(forward, inp=nn.Linear(4, 8), experts=experts, out=nn.Linear(8, 2))
    assert credit_report(net, batches(net)[0]).components == ("inp", "experts.0", "out")


def test_layers_of_which_one_is_left_out_stay_whatever_the_order_of_rows():
    def forward(m: Any, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        h = m.inp(x)[order]
        return m.out(m.experts[1](m.experts[0](h).tanh())[order.argsort()])

    experts = nn.ModuleList(one_layer() for _ in range(3))
    net = wired(forward, inp=nn.Linear(4, 8), experts=experts, out=nn.Linear(8, 2))
    report = credit_report(net, batches(net)[0])
    assert report.components == ("inp", "experts.0", "experts.1", "out")


def test_turns_are_told_by_lists_kinds_and_what_is_read():
    experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.GELU(), nn.LayerNorm(2)])
    net = wired(lambda m, x: x, experts=experts, a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    chosen = ["a", "b", "experts.0", "experts.1", "experts.3"]

    def told(ran: dict[str, set[str]], moved: str) -> set[str]:
        return set(in_turns(net, chosen, ran, [moved]))

    assert told({"a": set(), "experts.0": {"a"}}, "experts.0") == {"experts.0", "experts.1"}
    # Both ran.
    assert told({"experts.1": set(), "experts.0": set()}, "experts.0") == set()
    # Alone of its kind.
    assert told({"experts.3": set()}, "experts.3") == set()
    # In no list.
    assert told({"a": set()}, "a") == set()
