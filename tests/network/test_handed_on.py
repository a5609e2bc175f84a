"""Modules that hand on what they take beside what they make, and what they take without using it."""

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import component_effects, credit_report
from lightning_koopman.network.flow.made import Given

ROWS = torch.randn(600, 6, generator=torch.Generator().manual_seed(1)).split(100)
SIZES = {"a": (6, 16), "b": (16, 8), "c": (8, 8)}


class Layer(nn.Module):
    """Reads one entry of a dictionary and writes one, into the dictionary itself or into a copy."""

    def __init__(self, sizes: tuple[int, int], read: str, written: str, how: str) -> None:
        super().__init__()
        self.layer, self.read, self.written, self.how = nn.Linear(*sizes), read, written, how

    def forward(self, entries):
        made = torch.tanh(self.layer(entries if self.how == "tensor" else entries[self.read]))
        if self.how == "tensor":
            return made
        if self.how == "copy":
            return {**entries, self.written: made}
        entries[self.written] = made
        return entries


def layers(how: str) -> nn.Module:
    """A network whose last layer writes the entry that it reads anew."""
    torch.manual_seed(0)
    named = {"a": ("x", "h"), "b": ("h", "g"), "c": ("g", "g")}
    parts = {name: Layer(SIZES[name], *entries, how) for name, entries in named.items()}
    return wired(lambda m, given: m.c(m.b(m.a(given))), **parts)


def passed(how: str):
    return None if how == "tensor" else lambda model, x: model({"x": x})["g"]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("how", ["copy", "in place"])
def test_entries_that_are_handed_on_are_no_states(how, inference):
    expected = credit_report(layers("tensor"), ROWS)
    with torch.inference_mode(inference):
        report = credit_report(layers(how), ROWS, forward_fn=passed(how))
    assert (report.components, report.widths) == (("a", "b", "c"), (16, 8, 8))
    assert (report.reads, report.notes) == (expected.reads, expected.notes)
    for name in ("r2", "credit", "gain"):
        np.testing.assert_allclose(getattr(report, name), getattr(expected, name), atol=1e-6)


@pytest.mark.parametrize("how", ["copy", "in place"])
def test_entries_that_nothing_reads_are_no_inputs(how):
    def with_targets(model, x):
        return model({"target": 3 * x[:, :2], "kind": torch.arange(len(x)) % 7, "x": x})["g"]

    expected = credit_report(layers("tensor"), ROWS)
    report = credit_report(layers(how), ROWS, forward_fn=with_targets)
    np.testing.assert_allclose(report.credit, expected.credit, atol=1e-6)
    assert report.notes == expected.notes


@pytest.mark.parametrize("how", ["copy", "in place"])
def test_effects_are_about_what_a_module_makes(how):
    expected = component_effects(layers("tensor"), ROWS, kinds=("skip", "output_noise"))
    effects = component_effects(
        layers(how), ROWS, kinds=("skip", "output_noise"), forward_fn=passed(how)
    )
    for kind in ("skip", "output_noise"):
        # The last one writes the entry that it reads: skipped, that stays what it was.
        np.testing.assert_allclose(effects.values[kind], expected.values[kind], rtol=1e-5)
    assert (effects.values["skip"] > 0.1).all()


def test_tensors_of_a_tuple_that_are_handed_on_are_no_states():
    class Points(nn.Module):
        """Takes positions and features, and gives the positions on."""

        def __init__(self, width: int, first: bool) -> None:
            super().__init__()
            self.layer, self.first = nn.Linear(width + 3, 8), first

        def forward(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            places, features = given if self.first else given[::-1]
            made = torch.tanh(self.layer(torch.cat([places, features], 1)))
            return (places, made) if self.first else (made, places)

    reports = []
    for first in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(Points(3, first), Points(8, first), Points(8, first))
        pairs = [(x[:, :3], x[:, 3:]) if first else (x[:, 3:], x[:, :3]) for x in ROWS]
        report = credit_report(model, pairs, forward_fn=lambda m, pair: m(pair))
        assert report.widths == (8, 8, 8)
        reports.append(report)
    # The order of the inputs tells the folds.
    np.testing.assert_allclose(reports[0].r2, reports[1].r2, atol=5e-3)


@pytest.mark.parametrize("inference", [False, True])
def test_a_tensor_that_is_written_to_is_made(inference):
    with torch.inference_mode(inference):
        x, y = torch.ones(2, 3), torch.zeros(2, 3)
        given = Given(((x, y), {}))
        assert given.first_made((x, 2 * x), x) is not x
        assert given.first_made((x, y), x) is x
        x.add_(1)
        assert given.first_made((x, 2 * x), x) is x
        assert given.passes(y)


def test_what_a_component_takes_and_does_not_use_is_not_read():
    class Ignores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return torch.relu(self.layer(x))

    torch.manual_seed(0)
    model = wired(
        lambda m, x: m.last(m.block(m.first(x[:, 3:]), m.time(x[:, :3]))) + m.time.out,
        time=nn.Linear(3, 8), first=nn.Linear(3, 8), block=Ignores(), last=nn.Linear(8, 4),
    )  # fmt: skip
    model.time.out = 0.0
    report = credit_report(model, ROWS)
    assert report.reads["block"] == ("first",)


@pytest.mark.parametrize("learned", [False, True])
def test_what_compares_samples_ends_the_chain_before_it(learned):
    class Similar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if learned:
                self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, x) * (self.scale if learned else 1.0)

    def network(*last: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8), *last)

    expected, rows = credit_report(network(), ROWS), torch.cat(ROWS)
    for size in (100, 40, 90):
        report = credit_report(network(Similar()), rows.split(size))
        assert (report.components, report.widths) == (("0", "2"), (32, 8))
        np.testing.assert_allclose(report.credit, expected.credit, atol=1e-6)
        told = "these compare the samples of a batch with one another, so left out: 3"
        assert (told in report.notes) == learned


def test_as_many_units_as_samples_are_no_comparison():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 100), nn.Tanh(), nn.Linear(100, 100), nn.ReLU())
    report = credit_report(model, ROWS)
    assert report.widths == (100, 100)
    assert report.parts["2"] == ("2", "3")


def test_a_module_that_calls_itself_is_altered_as_any_other():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor, again: bool = True) -> tuple[Tensor, int]:
            x = torch.tanh(self.layer(x))
            return self(x, again=False) if again else (x, 0)

    torch.manual_seed(0)
    model = wired(lambda m, x: m.last(m.twice(x)[0]), twice=Twice(), last=nn.Linear(6, 2))
    effects = component_effects(model, ROWS, kinds=("skip", "output_noise"))
    assert all(np.isfinite(values).all() for values in effects.values.values())
