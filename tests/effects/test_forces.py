"""Networks that differentiate their own outputs, as those that give forces from an energy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from lit import LitNet, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_koopman import KoopmanCreditMonitor, component_effects
from lightning_koopman.callback import effects_in_time
from lightning_koopman.network.runs.hook_points import HookPoint, HookPoints


class Forces(nn.Module):
    """Gives the gradient of an energy, which residual blocks and a head make of the positions."""

    def __init__(self, *, with_energy: bool = False) -> None:
        super().__init__()
        self.with_energy = with_energy
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(2)
        )
        self.wide, self.head = nn.Linear(6, 9), nn.Linear(9, 1)
        for p in self.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=generator)

    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            h = x
            for block in self.blocks:
                h = h + block(h)
            energy = self.head(torch.tanh(self.wide(h)))
            forces = -torch.autograd.grad(energy.sum(), x)[0]
            return (energy, forces) if self.with_energy else forces


def batches() -> list[Tensor]:
    return list(torch.randn(200, 6, generator=torch.Generator().manual_seed(1)).split(50))


def by_hand(net: Forces, put: Mapping[nn.Module, Callable[[Tensor, Tensor], Tensor]]) -> float:
    """Return the effect of what plain hooks put in the place of what modules give."""
    x = torch.cat(batches())
    before = net(x)
    handles = [
        module.register_forward_hook(lambda m, args, output, new=new: new(args[0], output))
        for module, new in put.items()
    ]
    after = net(x)
    for handle in handles:
        handle.remove()
    moved = (after - before).square().mean(dim=0).sum()
    return float(moved / before.var(dim=0, correction=0).sum())


COMPONENTS = ["blocks.0", "blocks.1", "wide", "head"]


def test_effects_of_skipping_are_those_of_plain_hooks() -> None:
    net = Forces().eval()
    found = component_effects(net, batches(), components=COMPONENTS, kinds=["skip"])
    means: list[Tensor] = []
    net.wide.register_forward_hook(lambda m, args, output: means.append(output.detach().mean(dim=0)))
    net(torch.cat(batches()))
    expected = [
        by_hand(net, {net.blocks[0]: lambda given, _: given}),
        by_hand(net, {net.blocks[1]: lambda given, _: given}),
        by_hand(net, {net.wide: lambda _, output: means[0] + 0 * output}),
        by_hand(net, {net.head: lambda _, output: 0 * output}),
    ]
    assert found.components == tuple(COMPONENTS)
    np.testing.assert_allclose(found.values["skip"], expected, rtol=1e-4)
    assert found.doubts["skip"] == ((), (), (), ())
    # Where the energy is a number, forces are none, whichever number it is.
    assert expected[2] == expected[3]
    assert found.stderr["skip"][2] == pytest.approx(found.stderr["skip"][3])


def test_what_is_linear_has_no_effect_when_made_linear() -> None:
    net = Forces().eval()
    sets = [COMPONENTS[:2]]
    found = component_effects(net, batches(), components=COMPONENTS, kinds=["linear"], sets=sets)
    assert np.all(found.values["linear"][2:4] < 1e-6)
    fits = []
    for block in net.blocks:
        given: list[Tensor] = []
        handle = block.register_forward_pre_hook(lambda m, args, to=given: to.append(args[0].detach()))
        net(torch.cat(batches()))
        handle.remove()
        x = nn.functional.pad(given[0].double(), (0, 1), value=1.0)
        fits.append(torch.linalg.lstsq(x, block(given[0]).detach().double()).solution.float())
    put = {
        block: lambda given, _, fit=fit: given @ fit[:-1] + fit[-1]
        for block, fit in zip(net.blocks, fits, strict=True)
    }
    # Of one alone, values are those of maps without the sample, and gradients those of one map.
    alone = [by_hand(net, {block: put[block]}) for block in net.blocks]
    np.testing.assert_allclose(found.values["linear"][:2], alone, rtol=0.05)
    np.testing.assert_allclose(found.values["linear"][4], by_hand(net, put), rtol=0.01)


def test_what_frees_the_graph_of_its_own_is_measured_not_predicted() -> None:
    net = Forces(with_energy=True).eval()
    how: dict[str, Any] = {"components": COMPONENTS, "kinds": ["weight_noise"]}
    with pytest.raises(ValueError, match=r"a backward pass of its own, .* measure with how='measured'"):
        component_effects(net, batches(), **how)
    measured = component_effects(net, batches(), how="measured", **how)
    assert np.all(measured.values["weight_noise"] > 0)


@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
def test_what_is_put_in_place_takes_no_gradient(value: float) -> None:
    layer = nn.Identity()
    alter: dict[HookPoint, Any] = {HookPoint("out", "0"): lambda output, _: torch.ones(()).expand(2)}
    net = nn.Sequential(layer)
    x = torch.tensor([value, 2.0], requires_grad=True)
    with HookPoints(net, alter=alter):
        given = net(x)
    assert torch.equal(given.detach(), torch.ones(2))
    (first,) = torch.autograd.grad((given / 0).sum(), x, create_graph=True)
    assert torch.equal(first, torch.zeros(2))
    assert not net(x.detach()).requires_grad


class Field(LitNet):
    """Leaves it to its steps to let torch follow gradients, and to ask for those of the positions."""

    def __init__(self, *, step_asks: bool) -> None:
        super().__init__()
        self.net, self.step_asks = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), step_asks

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.step_asks else x.detach().requires_grad_()
        return -torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self(batch.requires_grad_()) - batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self(batch.clone().requires_grad_())


@pytest.mark.filterwarnings("ignore:the Trainer has no logger")
@pytest.mark.filterwarnings("ignore:Attribute .* removed from hparams")
@pytest.mark.parametrize("step_asks", [False, True])
def test_what_a_step_follows_gradients_for_has_effects(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, step_asks: bool
) -> None:
    monkeypatch.setattr(effects_in_time, "_FEW", 1e3)  # seconds, for cores may be busy
    torch.manual_seed(0)
    net, monitor = Field(step_asks=step_asks), KoopmanCreditMonitor(on_error="raise", figures=False)
    data = DataLoader(torch.cat(batches()), 50)  # type: ignore[arg-type]
    quiet_trainer(tmp_path, [monitor], max_epochs=1).fit(net, data, data)
    assert monitor.report is not None
    assert monitor.report.effects is not None
    x = torch.cat(batches()).requires_grad_()
    before = net(x).detach()
    # What is left out gives its mean, behind which forces are none.
    expected = float(before.square().mean(dim=0).sum() / before.var(dim=0, correction=0).sum())
    np.testing.assert_allclose(monitor.report.effects.values["skip"], expected, rtol=1e-4)
