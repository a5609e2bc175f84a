"""A module goes with the component whose output it takes as it was given, whoever runs between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import wired
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman import component_effects, credit_report
from lightning_koopman.report.report import CreditReport


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(600, 8, generator=generator).split(100))


def network(forward: Callable[..., Any], **more: nn.Module) -> Any:
    torch.manual_seed(1)
    parts = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
    return wired(forward, **parts, **more).eval()


def assert_alike(report: CreditReport, expected: CreditReport) -> None:
    assert report.components == expected.components
    assert (report.reads, report.parts) == (expected.reads, expected.parts)
    assert report.r2 == pytest.approx(expected.r2, abs=1e-7)
    assert report.credit == pytest.approx(expected.credit, abs=1e-6)


WRITTEN: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "a sum": (lambda y, h: y.add_(h), lambda y, h: y + h),
    "a gate": (lambda y, h: y.mul_(torch.sigmoid(h)), lambda y, h: y * torch.sigmoid(h)),
    "an activation": (lambda y, h: F.elu_(y), lambda y, h: F.elu(y)),
    "into its memory": (lambda y, h: torch.add(y, h, out=y), lambda y, h: y + h),
    "a part": (
        lambda y, h: y[:, :4].add_(h[:, :4]),
        lambda y, h: torch.cat([y[:, :4] + h[:, :4], y[:, 4:]], dim=1),
    ),
}


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("behind", [nn.ReLU(), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Dropout()])
def test_what_is_written_to_an_output_is_no_part_of_its_component(kind: str, behind: nn.Module) -> None:
    write, make = WRITTEN[kind]

    def written(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        y = m.b(h)
        write(y, h)
        return m.head(m.behind(y))

    def made(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        return m.head(m.behind(make(m.b(h), h)))

    net, expected = network(written, behind=behind), network(made, behind=behind)
    report, other = credit_report(net, data()), credit_report(expected, data())
    assert report.parts["b"] == ("b",)
    assert_alike(report, other)
    found = component_effects(net, data(), report, ("skip", "linear"))
    true = component_effects(expected, data(), other, ("skip", "linear"))
    for effect in ("skip", "linear"):
        assert found.values[effect] == pytest.approx(true.values[effect], rel=1e-4, abs=1e-9)


def test_the_layers_of_a_residual_block_are_those_of_its_sum_written_out() -> None:
    def report(in_place: bool) -> CreditReport:
        def forward(m: Any, x: Tensor) -> Tensor:
            x = m.relu(m.bn0(m.stem(x)))
            out = m.bn2(m.conv2(m.relu(m.bn1(m.conv1(x)))))
            if in_place:
                out += x
            else:
                out = out + x
            return m.head(m.relu(out).flatten(1))

        torch.manual_seed(0)
        convs = {f"conv{i}": nn.Conv2d(4, 4, 3, padding=1, bias=False) for i in (1, 2)}
        norms = {f"bn{i}": nn.BatchNorm2d(4) for i in range(3)}
        stem, head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(64, 3)
        net = wired(forward, stem=stem, **convs, **norms, relu=nn.ReLU(inplace=True), head=head).eval()
        images = torch.randn(600, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        return credit_report(net, images.split(100))

    assert report(True).parts["conv2"] == ("conv2", "bn2")
    assert_alike(report(True), report(False))


def test_a_view_changed_in_place_is_what_it_was() -> None:
    def viewed(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        h.unsqueeze_(1).squeeze_(1)
        return m.head(m.relu(h))

    def plain(m: Any, x: Tensor) -> Tensor:
        return m.head(m.relu(m.a(x)))

    report = credit_report(network(viewed, relu=nn.ReLU()), data())
    assert report.parts["a"] == ("a", "relu")
    assert_alike(report, credit_report(network(plain, relu=nn.ReLU()), data()))


def one_by_one(m: Any, x: Tensor) -> Tensor:
    return m.head(m.r1(m.a(x)) * m.r2(m.b(x)))


def both_then_both(m: Any, x: Tensor) -> Tensor:
    a, b = m.a(x), m.b(x)
    return m.head(m.r1(a) * m.r2(b))


def crossed(m: Any, x: Tensor) -> Tensor:
    a, b = m.a(x), m.b(x)
    b, a = m.r2(b), m.r1(a)
    return m.head(a * b)


def by_keyword(m: Any, x: Tensor) -> Tensor:
    return m.head(m.r1(input=m.a(x)) * m.r2(input=m.b(x)))


@pytest.mark.parametrize("forward", [both_then_both, crossed, by_keyword])
def test_an_activation_goes_with_its_component_whenever_it_runs(forward: Callable[..., Any]) -> None:
    report = credit_report(network(forward, r1=nn.ReLU(), r2=nn.ReLU()), data())
    expected = credit_report(network(one_by_one, r1=nn.ReLU(), r2=nn.ReLU()), data())
    assert (report.parts["a"], report.parts["b"]) == (("a", "r1"), ("b", "r2"))
    assert_alike(report, expected)


def test_an_activation_of_a_state_that_others_read_as_it_was_is_no_part_of_it() -> None:
    def late(m: Any, x: Tensor) -> Tensor:
        a = m.a(x)
        return m.head(m.b(a) + m.relu(a))

    def function(m: Any, x: Tensor) -> Tensor:
        a = m.a(x)
        return m.head(m.b(a) + F.relu(a))

    report = credit_report(network(late, relu=nn.ReLU()), data())
    assert report.parts["a"] == ("a",)
    assert_alike(report, credit_report(network(function), data()))


def test_a_network_that_runs_its_only_part_past_its_hooks_ends_in_what_it_returns() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.f, self.g = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.tanh(self.b(x))
            return self.f(z) * torch.sigmoid(self.g(z))

    def run(forward: Callable[..., Any]) -> CreditReport:
        torch.manual_seed(0)
        return credit_report(wired(forward, cell=Cell()).eval(), data())

    report, expected = run(lambda m, x: m.cell.forward(x)), run(lambda m, x: m.cell(x))
    assert report.components[-1] == "output"
    assert report.widths[-1] == 5
    assert_alike(report, expected)


def test_who_looks_at_a_forward_that_is_listened_to_sees_the_forward() -> None:
    def looks(m: Any, x: Tensor) -> Tensor:
        seen.append((m.inner.forward.__name__, m.inner.forward.__code__.co_argcount))
        return m.inner.forward(x)

    seen: list[Any] = []
    credit_report(wired(looks, inner=nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))).eval(), data())
    assert {*seen} == {("forward", 2)}
