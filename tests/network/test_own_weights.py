"""Containers with weights of their own are components, and what derives a weight is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules_qat, get_default_qat_qconfig, prepare_qat
from torch.nn.utils import parametrizations, parametrize

from lightning_koopman import credit_report, drop_order
from lightning_koopman.network.components import named_components


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(6, 6) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.own)


class Fused(nn.Sequential):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.own = nn.Parameter(torch.randn(6, 6) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(x @ self.own))


class Listed(nn.ModuleList):
    """Is never called: its weights are used by what holds it."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__(parts)
        self.scale = nn.Parameter(torch.ones(1))


class Adapted(nn.Module):
    """Adds a product of two thin matrices to a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a @ self.b


def data() -> list[Tensor]:
    return list(torch.randn(120, 6, generator=torch.Generator().manual_seed(1)).split(40))


def test_a_container_with_weights_of_its_own_is_a_module_like_any() -> None:
    reports = []
    for kind in (Plain, Fused):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), kind(), kind(), nn.Linear(6, 3))
        reports.append(credit_report(net, data()))
    plain, fused = reports
    assert fused.components == plain.components == ("0", "1", "2", "3")
    assert fused.credit.tolist() == plain.credit.tolist()
    assert fused.notes == plain.notes


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (Fused(nn.ReLU()), ["0", "1", "2"]),
        (Fused(nn.BatchNorm1d(6)), ["0", "1", "2"]),
        (Listed([nn.Linear(6, 6), nn.Linear(6, 6)]), ["0", "1.0", "1.1", "2"]),
        (nn.Sequential(nn.Linear(6, 6), nn.ReLU()), ["0", "1.0", "2"]),
    ],
)
def test_other_containers_are_opened(part: nn.Module, names: list[str]) -> None:
    net = nn.Sequential(nn.Linear(6, 6), part, nn.Linear(6, 3))
    assert [*named_components(net)] == names


@pytest.mark.filterwarnings("ignore")
def test_fused_layers_of_quantisation_aware_training_are_components() -> None:
    layers = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    names = []
    for groups in ([], [["0", "1"], ["2", "3"]]):
        torch.manual_seed(0)
        net = nn.Sequential(*layers).train()
        net.qconfig = get_default_qat_qconfig("fbgemm")
        net = prepare_qat(fuse_modules_qat(net, groups) if groups else net)
        names.append([*named_components(net)])
    assert names[0] == names[1] == ["0", "2", "4"]


@pytest.mark.parametrize("wrapped", [1, 3])
@pytest.mark.parametrize(
    "derive",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: parametrize.register_parametrization(layer, "weight", Adapted()),
    ],
    ids=["weight norm", "spectral norm", "adapted"],
)
def test_what_derives_a_weight_is_no_component(
    derive: Callable[[nn.Module], nn.Module], wrapped: int
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    for layer in [*net][:wrapped]:
        derive(layer)
    report = credit_report(net, data())
    assert report.components == ("0", "1", "2")
    assert report.notes == ()
    order = drop_order(net, data(), steps=1)
    assert order.candidates == ("0", "1", "2")
    assert not order.refused


def test_a_weight_of_the_network_itself_may_be_derived() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
            self.own = nn.Parameter(torch.randn(6, 6))
            parametrizations.spectral_norm(self, "own")

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(torch.tanh(self.first(x)) @ self.own))

    torch.manual_seed(0)
    net = Whole().eval()
    report = credit_report(net, data())
    assert report.components == ("first", "last")
    with torch.no_grad():
        parametrize.remove_parametrizations(net.eval(), "own")
    assert report.credit.tolist() == credit_report(net, data()).credit.tolist()
