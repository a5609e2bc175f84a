"""What effects are about where components are named."""

from typing import Any

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import component_effects, credit_report


def hidden(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = torch.tanh(m.a(x))
    return h, torch.tanh(m.b(h)), m.end(torch.tanh(m.b(h)))


def heads(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    g = torch.tanh(m.b(torch.tanh(m.a(x))))
    return m.end(g), m.other(g)


def run_of(returns: Any, **more: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    parts = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "end": nn.Linear(8, 3), **more}
    return wired(returns, **parts).eval(), list(torch.randn(300, 8).split(50))


def skipped(model: nn.Module, batches: list[Tensor], name: str) -> float:
    """Return what skipping a linear layer does to the heads, each over its own variance, by hand."""
    x, layer = torch.cat(batches), model.get_submodule(name)

    def skip(_: nn.Module, given: Any, output: Tensor) -> Tensor:
        return given[0] if given[0].shape == output.shape else output.mean(0).expand_as(output)

    with torch.no_grad():
        before = model(x)
        handle = layer.register_forward_hook(skip)
        after = model(x)
        handle.remove()
    pairs = zip(before, after, strict=True)
    moved = [(now - was).square().sum() / (was - was.mean(0)).square().sum() for was, now in pairs]
    return float(torch.stack(moved).mean())


@pytest.mark.parametrize("named", [None, ["a", "b", "end", "other"], 1, nn.Linear])
def test_heads_that_are_named_count_as_those_that_are_chosen(named):
    model, batches = run_of(heads, other=nn.Linear(8, 4))
    effects = component_effects(model, batches, components=named)
    expected = [skipped(model, batches, name) for name in effects.components]
    assert effects.components == ("a", "b", "end", "other")
    np.testing.assert_allclose(effects.values["skip"], expected, rtol=1e-4)
    assert effects.values["skip"][2:].sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("returns", [hidden, heads])
def test_with_and_without_a_report_on_named_components_effects_are_the_same(returns):
    model, batches = run_of(returns, other=nn.Linear(8, 4))
    named = ["a", "b", "end"]
    without = component_effects(model, batches, components=named)
    report = credit_report(model, batches, components=named)
    with_it = component_effects(model, batches, report)
    rows = [without.components.index(name) for name in with_it.components]
    np.testing.assert_allclose(without.values["skip"][rows], with_it.values["skip"], rtol=1e-6)
    assert without.notes == with_it.notes


def test_a_named_end_behind_which_heads_go_on_is_told_with_a_report_too():
    model, batches = run_of(heads, other=nn.Linear(8, 4))
    told = "effects are about the first of 2 tensors that the model returns, of shape (50, 3); "
    report = credit_report(model, batches, components=["a", "b"])
    for given in (None, report):
        named = ["a", "b"] if given is None else None
        effects = component_effects(model, batches, given, components=named)
        assert effects.notes[0].startswith(told)
    assert component_effects(model, batches).notes[0].startswith("effects are averaged over 2 outputs")
