"""Parts of components that are called in place of the whole, or belong to several components."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import component_effects, credit_report, drift
from lightning_koopman.measurement.overview import describe_components
from lightning_koopman.network.components import named_components


class ByParts(nn.Module):
    """Calls the parts of its head one by one, but the head itself never."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        norm, layer = self.head
        return layer(norm(self.body(x)))


class Block(nn.Module):
    def __init__(self, position: nn.Module) -> None:
        super().__init__()
        self.position, self.layer = position, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x + self.position(x)))


class SharedPart(nn.Module):
    """Two blocks hold one and the same layer, which the network holds too, and may call itself."""

    def __init__(self, *, calls: bool) -> None:
        super().__init__()
        self.position = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(self.position), Block(self.position)])
        self.head = nn.Linear(8, 3)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.position(x)) if self.calls else x
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class NormAct(nn.BatchNorm1d):
    """A normalisation layer with its activation inside."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop, self.act = nn.Dropout(0.1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class Several(nn.Module):
    """Gives a loss before its state, as quantisers do, and an index behind it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.layer(x)
        return (y - x).square().mean(), y, y.argmax(dim=1)


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 3)
        self.middle = Several(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x))[1])


def made(make) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def rows(width: int) -> list[Tensor]:
    return list(torch.randn(800, width, generator=torch.Generator().manual_seed(1)).split(100))


def test_parts_that_are_called_in_place_of_the_whole_are_components():
    model, batches = made(ByParts), rows(6)
    report = credit_report(model, batches)
    assert report.components == ("body.0", "body.2", "head.1")
    assert not any("never ran" in note for note in report.notes)
    named = credit_report(model, batches, components=["body.1", "body.3", "head.1"])
    np.testing.assert_allclose(report.credit, named.credit, atol=1e-12)
    assert report.types == ("Linear", "Linear", "Linear")
    assert report.parameters == (112, 272, 51)
    shapes = {row.name: row.shape for row in describe_components(model, batches).rows}
    assert shapes == {"body.0": (100, 16), "body.2": (100, 16), "head.1": (100, 3)}


def test_such_parts_have_effects_and_drift(tmp_path):
    model, batches = made(ByParts), rows(6)
    report = credit_report(model, batches)
    effects = component_effects(model, batches, report, ["linear", "skip"])
    assert effects.values["linear"][2] == pytest.approx(0, abs=1e-5)
    whole = made(ByParts)
    whole.forward = lambda x: whole.head(whole.body(x))
    same = component_effects(whole, batches, credit_report(whole, batches), ["linear", "skip"])
    assert effects.values["skip"][1] == pytest.approx(same.values["skip"][1], rel=1e-6)
    report.save_reference(tmp_path / "before.safetensors")
    with torch.no_grad():
        model.head[1].weight.mul_(-1)
    assert drift(tmp_path / "before.safetensors", model, batches).culprit == "head.1"


def test_a_whole_that_is_called_speaks_for_its_parts():
    model = made(ByParts)
    model.forward = lambda x: model.head(model.body(x))
    assert credit_report(model, rows(6)).components == ("body.0", "body.2", "head")


@pytest.mark.parametrize("calls", [False, True])
def test_a_part_of_several_components_counts_where_it_is_called_outside_of_them(calls):
    model, batches = made(lambda: SharedPart(calls=calls)), rows(8)
    assert list(named_components(model)) == ["blocks.0", "blocks.1", "head"]
    report = credit_report(model, batches)
    outside = ("position",) if calls else ()
    assert report.components == (*outside, "blocks.0", "blocks.1", "head")
    assert report.notes == ()
    if not calls:
        named = credit_report(model, batches, components=["blocks.0", "blocks.1", "head"])
        np.testing.assert_allclose(report.credit, named.credit, atol=1e-12)
    else:
        # The call outside of the blocks, which takes the data themselves, is linear.
        assert report.r2[0] == pytest.approx(1, abs=1e-6)
        assert report.reads["position"] == ("input",)


def test_a_norm_that_holds_its_activation_belongs_to_the_layer_before():
    def whole() -> nn.Module:
        layers = [nn.Linear(6, 16), NormAct(16), nn.Linear(16, 8), NormAct(8), nn.Linear(8, 3)]
        return nn.Sequential(*layers)

    def apart() -> nn.Module:
        layers = [nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.BatchNorm1d(8)]
        return nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 3))

    report, plain = (credit_report(made(make), rows(6)) for make in (whole, apart))
    assert report.components == ("0", "2", "4")
    assert report.notes == plain.notes == ()
    assert report.parts["0"] == ("0", "1")
    for name in ("credit", "r2", "chain_r2"):
        np.testing.assert_array_equal(getattr(report, name), getattr(plain, name))


def test_a_number_that_comes_before_a_state_is_not_the_state():
    model, batches = made(WithLoss), rows(6)
    plain = nn.Sequential(model.first, model.middle.layer, model.last)
    report, expected = (credit_report(net, batches) for net in (model, plain))
    assert report.components == ("first.0", "middle", "last")
    np.testing.assert_array_equal(report.credit, expected.credit)
    kinds = ["skip", "linear"]
    effects, same = (
        component_effects(net, batches, found, kinds)
        for net, found in ((model, report), (plain, expected))
    )
    for kind in kinds:
        np.testing.assert_allclose(effects.values[kind][1], same.values[kind][1], rtol=1e-6)


def test_what_gives_a_single_number_is_left_out():
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
            self.penalty = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.first(x))
            self.loss = self.measured(y)
            return self.last(y)

        def measured(self, y: Tensor) -> Tensor:
            return self.penalty(y).mean()

    class Mean(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean()

    model = made(Penalised)
    model.penalty = Mean(8, 1)
    report = credit_report(model, rows(6))
    assert report.components == ("first", "last")


def test_activations_belong_to_parts_that_are_called_in_place_of_the_whole():
    class Lazy(nn.Module):
        """Gives a function, as flows give transformations, and is itself called on nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))

        def forward(self) -> nn.Module:
            return self.net

    class Network(nn.Module):
        def __init__(self, *, lazy: bool) -> None:
            super().__init__()
            self.blocks, self.lazy = nn.ModuleList(Lazy() for _ in range(2)), lazy

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block()(x) if self.lazy else block.net(x)
            return x

    reports = []
    for lazy in (False, True):
        torch.manual_seed(0)
        reports.append(credit_report(Network(lazy=lazy), rows(6)))
    for report in reports:
        assert report.parts["blocks.0.net.0"] == ("blocks.0.net.0", "blocks.0.net.1")
        # What is linear is told to be.
        assert report.r2[[1, 3]] == pytest.approx([1, 1], abs=1e-9)
    np.testing.assert_allclose(reports[0].r2, reports[1].r2)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act, self.two = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)


class Around(nn.Module):
    """Runs the parts of blocks, and around an activation in each."""

    def __init__(self, **more: nn.Module) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList([Branch(), Branch()])
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        for block in self.blocks:
            raw = block.lin(h)
            h = raw + block.two(block.act(raw))
        return self.out(h)


def test_what_is_read_around_an_activation_in_a_block_stays_a_state_of_its_own():
    torch.manual_seed(0)
    net, batches = Around().double().eval(), torch.randn(400, 4, dtype=torch.float64).split(100)
    beside = Around(idle=nn.Identity()).double().eval()
    beside.load_state_dict(net.state_dict())
    reports = [credit_report(each, batches) for each in (net, beside)]
    for report in reports:
        assert report.parts["blocks.0.lin"] == ("blocks.0.lin",)
    # A module that nothing runs says nothing.
    assert np.array_equal(reports[0].credit, reports[1].credit)
