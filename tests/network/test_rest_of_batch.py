"""What the first component leaves of a batch, where a step calls parts by a method of its own."""

from typing import Any

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import credit_report

X = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
BATCHES = list(X.split(100))


def couple(m: Any, a: Tensor, b: Tensor) -> Tensor:
    """Two additive couplings: each half in turn is moved by a function of the other one."""
    b = b + m.second(torch.tanh(m.first(a)))
    return m.last(b)


def halves(m: Any, x: Tensor) -> Tensor:
    return couple(m, *x.chunk(2, dim=1))


def flow(forward: Any = halves) -> Any:
    torch.manual_seed(0)
    parts = {"first": nn.Linear(2, 6), "second": nn.Linear(6, 2), "last": nn.Linear(2, 2)}
    return wired(forward, **parts).eval()


def r2_by_hand(inputs: Tensor, outputs: Tensor) -> float:
    """Return what share of the variance a regression explains in samples that it was not fitted to."""
    inputs, outputs = (t.detach().double() for t in (inputs, outputs))
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    ways = torch.linalg.lstsq(inputs[:300], outputs[:300]).solution
    left = outputs[300:] - inputs[300:] @ ways
    return 1 - float(left.square().sum() / (outputs[300:] - outputs[300:].mean(0)).square().sum())


def test_the_rest_of_a_batch_explains_what_it_goes_into():
    model = flow()
    report = credit_report(model, BATCHES, forward_fn=halves, tikhonov=0.0)
    a, b = X.chunk(2, dim=1)
    hidden = torch.tanh(model.first(a))
    moved = model.second(hidden)
    reads = torch.cat([moved, X], dim=1)
    assert report.r2[-1] == pytest.approx(r2_by_hand(reads, model.last(b + moved)), abs=1e-6)
    # Without the half that is moved, nearly nothing would be left to explain.
    assert r2_by_hand(moved, model.last(b + moved)) < 0.5
    assert not any(note.startswith("data of the batch") for note in report.notes)


@pytest.mark.parametrize("how", ["chunks in the step", "two tensors", "strided"])
def test_a_method_of_its_own_gives_what_forward_gives(how):
    def strided(m: Any, x: Tensor) -> Tensor:
        return couple(m, x[:, ::2], x[:, 1::2])

    ways: dict[str, tuple[Any, Any, Any]] = {
        "chunks in the step": (halves, lambda m, x: couple(m, *x.chunk(2, dim=1)), BATCHES),
        "two tensors": (couple, lambda m, xy: couple(m, *xy), [b.chunk(2, dim=1) for b in BATCHES]),
        "strided": (strided, strided, BATCHES),
    }
    forward, step, batches = ways[how]
    called = (lambda m, xy: m(*xy)) if how == "two tensors" else None
    expected = credit_report(flow(forward), batches, forward_fn=called)
    report = credit_report(flow(forward), batches, forward_fn=step)
    assert report.reference.states == expected.reference.states
    assert report.reference.widths == expected.reference.widths
    assert (report.reads, report.notes) == (expected.reads, expected.notes)
    np.testing.assert_allclose(report.r2, expected.r2, atol=1e-9)
    np.testing.assert_allclose(report.credit, expected.credit, atol=1e-9)


@pytest.mark.parametrize("way", ["forward", "step"])
@pytest.mark.parametrize("before", [Tensor.clone, lambda x: 3 * x, lambda x: x.flip(1)])
def test_data_that_change_before_they_are_split_keep_their_other_half(before, way):
    def changed(m: Any, x: Tensor) -> Tensor:
        return halves(m, before(x))

    report = credit_report(flow(changed), BATCHES, forward_fn=None if way == "forward" else changed)
    assert report.r2[-1] > 0.999
    assert any(note.startswith("data of the batch go into last changed") for note in report.notes)


def test_targets_that_a_step_compares_with_outputs_are_no_inputs():
    def step(m: Any, batch: Any) -> Tensor:
        x, y = batch
        out = m["head"](torch.tanh(m["deep"](torch.relu(m["base"](x)))))
        off = (out - y).abs()
        m["loss"](out, y), m["metric"](out - y), off.mean()
        return out

    def without(m: Any, batch: Any) -> Tensor:
        return m["head"](torch.tanh(m["deep"](torch.relu(m["base"](batch[0])))))

    torch.manual_seed(0)
    model = nn.ModuleDict({
        "base": nn.Linear(4, 6),
        "deep": nn.Linear(6, 6),
        "head": nn.Linear(6, 2),
        "loss": nn.SmoothL1Loss(reduction="none"),
        "metric": nn.Identity(),
    })
    batches = [(x, x[:, :2].square()) for x in BATCHES]
    report = credit_report(model, batches, forward_fn=step)
    expected = credit_report(model, batches, forward_fn=without)
    assert report.reference.states == ("input", "base", "deep", "head")
    assert report.reference.widths[0] == 4
    np.testing.assert_allclose(report.credit, expected.credit, atol=1e-12)


def test_steps_of_a_cell_are_no_input_twice():
    def go_on(m: Any, state: Tensor, now: Tensor) -> Tensor:
        return torch.tanh(m.layer(torch.cat([state, now], dim=1)))

    def run(m: Any, x: Tensor) -> Tensor:
        state = m.begin(x[:, 0])
        for step in range(1, 3):
            state = m.cell(state, x[:, step])
        return m.head(state)

    torch.manual_seed(0)
    cell = wired(go_on, layer=nn.Linear(8, 6))
    model = wired(run, begin=nn.Linear(2, 6), cell=cell, head=nn.Linear(6, 3))
    batches = list(torch.randn(600, 3, 2).split(100))
    for called in (None, run):
        report = credit_report(model, batches, forward_fn=called, components=["begin", "cell", "head"])
        assert report.reference.widths[0] == 6
