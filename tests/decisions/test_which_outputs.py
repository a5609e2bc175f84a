"""Decisions about networks that return several tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import bit_widths, credit_report, drop_order, linearize


def two_heads(returns: Any, *, scale: float = 1.0) -> nn.Module:
    """Return a network with a block for each of its two heads."""

    def run(m: nn.Module, x: Tensor) -> Any:
        h = m.body(x).relu()
        return returns(m.policy(h + m.left(h).relu()), scale * m.value(h + m.right(h).relu()))

    torch.manual_seed(0)
    blocks = {name: nn.Linear(6, 6) for name in ("left", "right")}
    parts = {"body": nn.Linear(8, 6), **blocks, "policy": nn.Linear(6, 3), "value": nn.Linear(6, 1)}
    return wired(run, **parts).eval()


def data(model: nn.Module, returns_first: int) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(240, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [(part, model(part)[returns_first].argmax(1)) for part in x.split(120)]


@pytest.mark.parametrize("with_report", [False, True])
def test_the_head_whose_classes_are_known_counts_wherever_it_stands(with_report):
    model = two_heads(lambda p, v: (v, p))
    batches = data(model, 1)
    report = credit_report(model, batches) if with_report else None
    order = drop_order(model, batches, report, max_drop=1.0)
    assert order.scale == "kl"
    assert order.metric_before == pytest.approx(1.0)
    assert order.candidates == ("left",)
    elsewhere = "it leads to none of the outputs that are looked at"
    assert {name: why for name, why in order.refused.items() if why == elsewhere} == {
        "right": elsewhere,
        "value": elsewhere,
    }
    assert order.notes[0].startswith("effects are about one of 2 outputs, that of policy")
    assert "Note: effects are about one of 2 outputs" in " ".join(str(order).split())
    relative = drop_order(model, batches, report, max_drop=1.0, scale="relative", steps=1)
    assert (relative.scale, relative.metric_before) == ("relative", pytest.approx(1.0))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_without_targets_each_head_counts_alike_whatever_its_scale(scale):
    """A step takes the block that all heads together can do without, averaged over heads."""
    model = two_heads(lambda p, v: (p, v), scale=scale)
    x = torch.randn(240, 8, generator=torch.Generator().manual_seed(1))
    order = drop_order(model, [x], max_drop=10.0, steps=1)
    left, right = order.candidates.index("left"), order.candidates.index("right")
    found = [order.remaining[0, left], order.remaining[0, right]]
    expected = []
    with torch.no_grad():
        before, h = model(x), model.body(x).relu()
        for gone in ("left", "right"):
            parts = {n: h + (h if n == gone else getattr(model, n)(h)).relu() for n in ("left", "right")}
            after = model.policy(parts["left"]), scale * model.value(parts["right"])
            shares = [
                float((a - b).double().square().sum() / (b - b.mean(0)).double().square().sum())
                for a, b in zip(after, before, strict=True)
            ]
            expected.append(sum(shares) / 2)
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_metric_is_given_the_first_output():
    model = two_heads(lambda p, v: (p, v))
    x, y = torch.randn(240, 8), torch.randn(240, 3)

    def metric(outputs: Tensor, targets: Tensor) -> Tensor:
        return -(outputs - targets).square().mean()

    order = drop_order(model, [(x, y)], metric=metric, max_drop=10.0, steps=1)
    with torch.no_grad():
        assert order.metric_before == pytest.approx(float(metric(model(x)[0], y)))
    assert order.candidates == ("left",)


def test_linearize_and_bit_widths_leave_what_is_not_looked_at():
    model = two_heads(lambda p, v: (v, p))
    batches = data(model, 1)
    small = linearize(model, batches, max_drop=1.0, allow_larger=True)
    assert {"right", "value"} <= {*small.refused}
    assert not {"right", "value"} & {*small.components}
    pytest.importorskip("torchao")
    chosen = bit_widths(model, batches, bits=(8, 4), average=6.0)
    assert chosen.components == ("body", "left", "policy")
    note = "'value' keeps its weights: it leads to none of the outputs that are looked at"
    assert note in chosen.notes
    assert note in " ".join(str(chosen).split())
    new = chosen.apply(model)
    assert torch.equal(new.right.weight, model.right.weight)
    assert not torch.equal(new.left.weight, model.left.weight)


def test_a_loss_module_inside_the_network_is_no_end():
    def run(m: nn.Module, x: Tensor, y: Tensor) -> Any:
        h = m.a(x)
        logits = m.b(h.relu())
        return {"features": h, "loss": m.loss(logits, y), "logits": logits}

    torch.manual_seed(0)
    parts = {"a": nn.Linear(6, 6), "b": nn.Linear(6, 3), "loss": nn.CrossEntropyLoss()}
    model = wired(run, **parts).eval()
    x = torch.randn(200, 6)
    with torch.no_grad():
        y = model.b(model.a(x).relu()).argmax(1)
    order = drop_order(model, [{"x": x, "y": y}], max_drop=1.0)
    assert order.scale == "kl"
    assert order.metric_before == pytest.approx(1.0)
    assert math.isfinite(order.effect[0])
    assert order.notes[0].startswith("effects are about the output of b, which is not the first of 2")


@pytest.mark.parametrize("with_report", [False, True])
def test_a_mixture_counts_beside_the_head_that_the_network_ends_with(with_report):
    """Behind a latent, which comes first; by hand, the block that goes first moves the least."""

    def run(m: nn.Module, x: Tensor) -> Any:
        z = m.enc(x).tanh()
        return z, m.dec(z + m.left(z)), z * m.cls(z + m.right(z))

    torch.manual_seed(0)
    widths = {"enc": (8, 5), "left": (5, 5), "dec": (5, 8), "right": (5, 5), "cls": (5, 5)}
    model = wired(run, **{name: nn.Linear(*ends) for name, ends in widths.items()}).eval()
    x = torch.randn(240, 8, generator=torch.Generator().manual_seed(1))
    report = credit_report(model, [x]) if with_report else None
    order = drop_order(model, [x], report, max_drop=10.0, steps=1)
    with torch.no_grad():
        z = model.enc(x).tanh()
        own = {"left": model.dec(z + model.left(z)), "right": z * model.cls(z + model.right(z))}
        gone = {"left": model.dec(2 * z), "right": z * model.cls(2 * z)}
    expected = {
        name: float((gone[name] - y).square().sum() / (y - y.mean(0)).square().sum()) / 2
        for name, y in own.items()
    }
    assert {*order.candidates} >= {"left", "right"}
    found = {name: order.remaining[0, order.candidates.index(name)] for name in expected}
    assert found == pytest.approx(expected, rel=1e-4)
    assert not [name for name, why in order.refused.items() if "none of the outputs" in why]
    assert order.notes[0].startswith("effects are averaged over 2 outputs, those of dec, output#2")


def test_what_has_fewer_rows_than_samples_is_an_end_with_and_without_a_report():
    """Means and maxima of pairs of samples are no states, so the last component is the end."""

    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = m.first(x).relu()
        pairs = m.head(h + m.block(h).relu()).view(-1, 2, 4)
        return pairs.mean(1), pairs.amax(1)[:, :2]

    torch.manual_seed(0)
    model = wired(run, first=nn.Linear(8, 6), block=nn.Linear(6, 6), head=nn.Linear(6, 4)).eval()
    batches = list(torch.randn(240, 8, generator=torch.Generator().manual_seed(1)).split(120))
    report = credit_report(model, batches)
    assert report.components == ("first", "block", "head")
    own, other = (drop_order(model, batches, each, max_drop=9.0) for each in (None, report))
    assert own.notes == other.notes
    assert own.effect == pytest.approx(other.effect, rel=1e-9)
