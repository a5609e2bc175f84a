"""A norm or an activation goes with the component before it, unless its raw output is read as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import CreditReport, component_effects, credit_report
from lightning_koopman.network.capture.stages import Stages
from lightning_koopman.network.flow.provenance import Provenance

SAMPLES, BATCHES = 500, 5


def around(net: Any, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.head(x + net.branch(net.norm(x)))


def around_as_function(net: Any, x: Tensor) -> Tensor:
    """The same, where nobody sees the norm run."""
    x = net.first(x)
    return net.head(x + net.branch(type(net.norm).forward(net.norm, x)))


def network(join: Callable[..., Tensor], norm: nn.Module) -> Any:
    torch.manual_seed(1)
    parts = {"first": nn.Linear(6, 8), "norm": norm, "branch": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
    return wired(join, **parts).eval()


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list((3 * torch.randn(SAMPLES, 6, generator=generator)).chunk(BATCHES))


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.ReLU(), nn.Tanh(), nn.Sigmoid()])
def test_a_connection_around_a_norm_reads_what_the_component_gave(
    batches: list[Tensor], norm: nn.Module
) -> None:
    report = credit_report(network(around, norm), batches)
    expected = credit_report(network(around_as_function, norm), batches)
    assert report.components == ("first", "branch", "head")
    # What is given to the head is all that it reads, and it is linear.
    assert report.r2[[0, 2]] == pytest.approx(1.0, abs=1e-6)
    assert report.r2 == pytest.approx(expected.r2, abs=1e-9)
    assert report.credit == pytest.approx(expected.credit, abs=1e-9)
    assert report.parts["first"] == ("first",)
    assert report.n_samples == SAMPLES
    # What only the branch reads is part of no component, and what it holds is told.
    told = (
        "parameters in no component: norm.weight (8), norm.bias (8)" in note for note in report.notes
    )
    assert any(told) == isinstance(norm, nn.LayerNorm)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.ReLU()])
def test_a_connection_may_be_added_by_a_module(batches: list[Tensor], norm: nn.Module) -> None:
    def added(net: Any, x: Tensor) -> Tensor:
        x = net.first(x)
        return net.head(net.add(net.branch(net.norm(x)), x))

    net = network(added, norm)
    net.add = Add()
    report, expected = credit_report(net, batches), credit_report(network(around, norm), batches)
    assert report.parts == {"first": ("first",), "branch": ("branch",), "head": ("head",)}
    assert report.reads == expected.reads
    assert report.credit == pytest.approx(expected.credit, abs=1e-9)
    skip, same = (
        component_effects(each, batches, each_report, ("skip",)).values["skip"]
        for each, each_report in ((net, report), (network(around, norm), expected))
    )
    assert skip == pytest.approx(same, rel=1e-6)


class Together(nn.Module):
    """Puts two values together, as what it is called with says."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return together(a, b)


def together(a: Tensor, b: Tensor) -> Tensor:
    return a * torch.sigmoid(b) + b


BRANCHES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "two layers": lambda net, x: net.head(net.join(net.branch(x), net.other(x))),
    "the other way": lambda net, x: net.head(net.join(net.other(x), net.branch(x))),
    "behind an activation": lambda net, x: net.head(net.join(net.branch(x).relu(), net.other(x))),
    "heads": lambda net, x: net.join(net.head(net.branch(x)), net.head(net.other(x))),
}


def either_way(batches: list[Any], run: Callable[[Any, Tensor, Tensor], Tensor]) -> CreditReport:
    """Report on a network that puts values together by a module; a function has to give the same."""

    def net() -> Any:
        torch.manual_seed(0)
        layers = {"first": nn.Linear(6, 8), "branch": nn.Linear(8, 8), "other": nn.Linear(8, 8)}

        def forward(m: Any, x: Tensor, more: Tensor | None = None) -> Tensor:
            return run(m, m.first(x), x if more is None else more)

        return wired(forward, **layers, head=nn.Linear(8, 3)).eval()

    by_module, by_function = net(), net()
    by_module.join, by_function.join = Together(), together
    report, expected = credit_report(by_module, batches), credit_report(by_function, batches)
    assert (report.components, report.parts) == (expected.components, expected.parts)
    assert report.reads == expected.reads
    assert report.credit == pytest.approx(expected.credit, abs=1e-9)
    skip, same = (
        component_effects(each, batches, each_report, ("skip",)).values["skip"]
        for each, each_report in ((by_module, report), (by_function, expected))
    )
    assert skip == pytest.approx(same, rel=1e-6)
    return report


@pytest.mark.parametrize("kind", BRANCHES)
def test_branches_may_be_put_together_by_a_module(batches: list[Tensor], kind: str) -> None:
    report = either_way(batches, lambda net, h, _: BRANCHES[kind](net, h))
    assert {"branch", "other"} <= set(report.parts)


BESIDE: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "itself": lambda net, h, x: net.head(net.join(h := net.branch(h), torch.tanh(h))),
    "data": lambda net, h, x: net.head(net.join(net.branch(h), x[:, :1])),
    "data at the end": lambda net, h, x: net.join(net.head(net.branch(h)), x[:, :3]),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_a_module_may_put_a_component_together_with(batches: list[Tensor], kind: str) -> None:
    report = either_way(batches, BESIDE[kind])
    assert report.parts["branch"] == ("branch",)
    read = report.reads[report.components[-1]]
    beyond = [name for sum_ in read for name in report.reads.get(sum_, ()) if sum_.startswith("sum")]
    assert ("input" in [*read, *beyond]) == kind.startswith("data")


def test_a_module_may_put_positions_together_with_data_that_nothing_else_takes() -> None:
    generator = torch.Generator().manual_seed(1)
    x, more = (torch.randn(SAMPLES, 3, width, generator=generator) for width in (6, 1))
    batches = [{"x": a, "more": b} for a, b in zip(x.chunk(BATCHES), more.chunk(BATCHES), strict=True)]
    report = either_way(batches, lambda net, h, more: net.head(net.join(net.branch(h), more)))
    assert report.parts["branch"] == ("branch",)
    assert report.reads["head"] == ("branch", "input+input#1")


def test_a_module_may_pool_a_component_by_weights_of_data(batches: list[Tensor]) -> None:
    class Pooling(nn.Module):
        def forward(self, h: Tensor, weights: Tensor) -> Tensor:
            return (h * weights[..., None]).sum(1)

    torch.manual_seed(0)
    parts = {"first": nn.Linear(2, 8), "pool": Pooling(), "head": nn.Linear(8, 3)}
    net = wired(lambda m, x: m.head(m.pool(m.first(x), x[..., 0].exp())), **parts).eval()
    report = credit_report(net, [batch.view(-1, 3, 2) for batch in batches])
    assert report.parts == {"first": ("first", "pool"), "head": ("head",)}


def test_what_weighed_a_later_stage_is_read_with_it(batches: list[Tensor]) -> None:
    """A function has to give the same, where no stage is a state of its own."""

    class Pooling(nn.Module):
        def forward(self, h: Tensor, weights: Tensor) -> Tensor:
            return pooled(h, weights)

    def pooled(h: Tensor, weights: Tensor) -> Tensor:
        return (h * weights[..., None]).sum(1)

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.first(m.stem(x))
        return m.head(m.pool(h, x[..., 0].exp())) + m.other(torch.tanh(h).sum(1))

    def net(pool: Any) -> Any:
        torch.manual_seed(0)
        layers = {"stem": nn.Linear(2, 8), "first": nn.Linear(8, 8)}
        model = wired(run, **layers, head=nn.Linear(8, 3), other=nn.Linear(8, 3)).eval()
        model.pool = pool
        return model

    given = [batch.view(-1, 3, 2) for batch in batches]
    report, expected = (credit_report(net(pool), given) for pool in (Pooling(), pooled))
    assert report.parts["first"] == ("first",)
    assert report.reads["head+other"] == ("first", "input")
    assert report.reads == expected.reads
    assert report.credit == pytest.approx(expected.credit, abs=1e-9)


def test_effects_alter_what_both_read(batches: list[Tensor]) -> None:
    net = network(around, nn.LayerNorm(8))
    found = component_effects(net, batches, credit_report(net, batches), ("skip",))
    x = torch.cat(batches)
    with torch.no_grad():
        outputs = net(x)
        first = net.first(x).mean(0).expand(SAMPLES, 8)
        skipped = net.head(first + net.branch(net.norm(first)))
    share = (skipped - outputs).square().sum() / (outputs - outputs.mean(0)).square().sum()
    assert found.values["skip"][0] == pytest.approx(float(share), rel=1e-4)


def test_the_earliest_stage_that_something_reads_is_the_state(batches: list[Tensor]) -> None:
    def join(net: Any, x: Tensor) -> Tensor:
        x = net.norm(net.first(x))
        return net.head(x * net.gate(x))

    parts = {"first": nn.Linear(6, 8), "norm": nn.LayerNorm(8), "gate": nn.Sigmoid()}
    torch.manual_seed(0)
    net = wired(join, **parts, head=nn.Linear(8, 3)).eval()
    report = credit_report(net, batches)
    assert report.parts["first"] == ("first", "norm")
    x = torch.cat(batches)
    with torch.no_grad():
        normed = net.norm(net.first(x)).double()
        outputs = net(x).double()
    normed, outputs = normed - normed.mean(0), outputs - outputs.mean(0)
    left = outputs - normed @ torch.linalg.lstsq(normed, outputs, driver="gelsd").solution
    in_sample = 1 - float(left.square().sum() / outputs.square().sum())
    assert report.r2[1] == pytest.approx(in_sample, abs=0.03)


class Add(nn.Module):
    """A sum as a module, as it is found where every step is one."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


def added(a: Tensor, b: Tensor) -> Tensor:
    return a + b


@pytest.mark.parametrize("as_module", [False, True])
def test_what_a_later_stage_was_made_of_beside_is_read_as_well(
    batches: list[Tensor], as_module: bool
) -> None:
    def join(net: Any, x: Tensor) -> Tensor:
        first = net.first(x)
        a = net.a(torch.relu(first))
        return net.head(torch.cat([net.b(net.add(a, first)), net.c(torch.tanh(a))], 1))

    torch.manual_seed(0)
    parts = {"first": nn.Linear(6, 8), **{name: nn.Linear(8, 8) for name in "abc"}}
    net = wired(join, **parts, head=nn.Linear(16, 3))
    net.add = Add() if as_module else added
    report = credit_report(net.eval(), batches)
    assert report.reference is not None
    assert report.reads["b+c"] == ("sum into b", "a")
    x = torch.cat(batches)
    with torch.no_grad():
        first = net.first(x)
        a = net.a(torch.relu(first))
        given = torch.cat([a, first], 1).double()
        made = torch.cat([net.b(a + first), net.c(torch.tanh(a))], 1).double()
    given, made = given - given.mean(0), made - made.mean(0)
    left = made - given @ torch.linalg.lstsq(given, made, driver="gelsd").solution
    r2 = 1 - float(left.square().sum() / made.square().sum())
    assert report.r2[report.components.index("b+c")] == pytest.approx(r2, abs=0.02)


def test_pooling_beside_a_skip_reads_what_was_given_before_it() -> None:
    """A small U-net, each step of which is a module."""

    def join(net: Any, x: Tensor) -> Tensor:
        wide = net.wide(x)
        up = nn.functional.interpolate(net.deep(net.pool(wide)), scale_factor=2)
        return net.head(torch.cat([wide, up], 1))

    torch.manual_seed(0)
    parts = {"wide": nn.Conv2d(1, 4, 3, padding=1), "pool": nn.MaxPool2d(2)}
    net = wired(join, **parts, deep=nn.Conv2d(4, 4, 1), head=nn.Conv2d(8, 1, 1)).eval()
    report = credit_report(net, [torch.randn(50, 1, 4, 4) for _ in range(8)])
    assert report.parts["wide"] == ("wide",)
    assert report.r2[[0, 2]] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("inplace", [False, True])
def test_what_nothing_else_reads_goes_with_its_component(batches: list[Tensor], inplace: bool) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace), nn.Linear(8, 3), nn.Tanh()
    report = credit_report(nn.Sequential(*layers).eval(), batches)
    assert report.parts == {"0": ("0", "1", "2"), "3": ("3", "4")}


def test_what_is_returned_beside_changes_nothing(batches: list[Tensor]) -> None:
    """Hidden states are returned for whoever asks; a report may not depend on that."""

    def alone(net: Any, x: Tensor) -> Tensor:
        return net.head(net.act(net.first(x)))

    def both(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        raw = net.first(x)
        return net.head(net.act(raw)), raw

    torch.manual_seed(0)
    layers = {"first": nn.Linear(6, 8), "act": nn.ReLU(), "head": nn.Linear(8, 3)}
    for forward in (alone, both):
        report = credit_report(wired(forward, **layers).eval(), batches)
        assert report.parts == {"first": ("first", "act"), "head": ("head",)}


def test_copies_of_stages_that_nobody_holds_are_let_go(batches: list[Tensor]) -> None:
    stages = Stages(Provenance())
    raw, act = torch.randn(4, 3), torch.randn(4, 3)
    held = torch.randn(4, 3)
    for name, tensor in (("freed", raw), ("held", held)):
        stages.add(name, (0, 0), tensor, "raw", None)
        stages.add(name, (1, 0), act, "act", None)
    del raw, tensor
    stages.forget_freed(())
    assert [stage.kept for stage in stages._stages["freed"]] == [None, "act"]
    assert [stage.kept for stage in stages._stages["held"]] == ["raw", "act"]
