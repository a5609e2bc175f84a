"""Weights are rounded wherever they are kept, and numbers are those of the rounded weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

from lightning_koopman import bit_widths, component_effects
from lightning_koopman.effects.replacements import quantized_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao warns of kernels for other machines


class Renamed(nn.Module):
    """Shows its weight under another name in a state_dict, or not at all."""

    def __init__(self, shown: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

        def rename(module: nn.Module, found: dict[str, Tensor], prefix: str, _: object) -> None:
            weight = found.pop(f"{prefix}linear.weight")
            if shown:
                found[f"{prefix}W"] = weight

        self._register_state_dict_hook(rename)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def network(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), middle, nn.Tanh(), nn.Linear(6, 3)).eval()


def data(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    drawn = torch.randn(96, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(drawn.to(dtype).split(32))


def test_weights_beside_buffers_that_repeat_one_number_in_memory_are_rounded_alike() -> None:
    rounded = []
    for repeats in (True, False):
        torch.manual_seed(1)
        net = network(Pair())
        shift = torch.ones(1).expand(6) if repeats else torch.ones(6)
        net[2].register_buffer("shift", shift)
        new = bit_widths(net, data(), average=4.0).apply(net)
        assert torch.equal(new[2].shift, torch.ones(6))
        rounded.append(torch.cat([parameter.flatten() for parameter in new.parameters()]))
    assert torch.equal(*rounded)
    before = torch.cat([parameter.flatten() for parameter in net.parameters()])
    assert not torch.equal(rounded[0], before)


def by_hand(net: nn.Sequential, place: int, bits: int) -> float:
    """Put a plain layer with the rounded weight in place; return the change over the variance."""
    other, layer = copy.deepcopy(net), nn.Linear(6, net[place].out_features)
    layer.load_state_dict({
        "weight": quantized_weights(net, bits)[f"{place}.weight"],
        "bias": net[place].bias.detach(),
    })
    other[place] = layer
    with torch.no_grad():
        own, altered = (torch.cat([each(x) for x in data()]).double() for each in (net, other))
    moved = (altered - own).square().sum(1).mean()
    return float(moved / (own - own.mean(0)).square().sum(1).mean())


@pytest.mark.parametrize("wrap", [spectral_norm, parametrizations.spectral_norm], ids=["old", "new"])
def test_a_spectral_norm_gives_the_rounded_weight(wrap: Callable[[nn.Module], nn.Module]) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    net = network(wrap(nn.Linear(6, 6)))
    # The estimate of the norm lags behind, as after steps of training.
    with torch.no_grad():
        weights = dict(net[2].named_parameters())
        next(w for name, w in weights.items() if "orig" in name).add_(0.3 * torch.randn(6, 6))
        net(data()[0])
    found = bit_widths(net, data(), bits=(8, 4), average=6.0)
    hand = [by_hand(net, 2, bits) for bits in (8, 4)]
    assert found.effects[1] == pytest.approx(hand, rel=1e-2)
    before = copy.deepcopy(net.state_dict())
    assert bit_widths(net.train(), data(), bits=(8, 4), average=6.0).bits == found.bits
    new = found.apply(net).eval()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    net.eval()
    bits = found.bits[1]
    new(data()[0])
    torch.testing.assert_close(new[2].weight, quantized_weights(net, bits)["2.weight"])
    assert len(new[2].weight[0].unique()) <= 6 < 2**bits


@pytest.mark.parametrize("shown", [True, False])
def test_weights_that_a_state_dict_does_not_show_are_rounded(shown: bool) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    net = network(Renamed(shown))
    found = bit_widths(net, data(), bits=(8, 2), average=4.0)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[2].linear.weight.copy_(quantized_weights(net, 2)["2.linear.weight"])
        own, altered = (torch.cat([each(x) for x in data()]).double() for each in (net, other))
    moved = (altered - own).square().sum(1).mean() / (own - own.mean(0)).square().sum(1).mean()
    assert found.effects[1, 1] == pytest.approx(float(moved), rel=1e-3)
    new = found.apply(net)
    wanted = quantized_weights(net, found.bits[1])["2.linear.weight"]
    assert torch.equal(new[2].linear.weight, wanted)


@pytest.mark.parametrize("shown", [True, False])
def test_a_replacement_goes_by_either_name(shown: bool) -> None:
    net = network(Renamed(shown))
    names = ["2.linear.bias"] + ["2.W"] * shown
    zeros = {name: torch.zeros_like(net.state_dict()[name]) for name in names}
    found = component_effects(
        net, data(), replacements={"none": zeros}, components=["2"], how="measured"
    )
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[2].linear.bias.zero_()
        if shown:
            other[2].linear.weight.zero_()
        own, altered = (torch.cat([each(x) for x in data()]).double() for each in (net, other))
    moved = (altered - own).square().sum(1).mean() / (own - own.mean(0)).square().sum(1).mean()
    assert found.values["none"] == pytest.approx([float(moved)], rel=1e-3)


def test_what_is_made_for_the_state_dict_alone_is_refused() -> None:
    net = network(nn.Linear(6, 6))
    net[2]._register_state_dict_hook(lambda m, found, p, _: found.update({f"{p}sum": m.weight.sum()}))
    own = {name: value.clone() for name, value in net.state_dict().items()}
    replacements = {"own": own, "other": own | {"2.sum": torch.zeros(())}}
    found = component_effects(net, data(), replacements=replacements, kinds=[], how="measured")
    assert found.values["own"].tolist() == [0.0, 0.0, 0.0]
    assert found.doubts["own"] == ((), (), ())
    assert found.doubts["other"] == ((), ("refused",), ())
    assert any("'2.sum', which is made for the state_dict alone" in note for note in found.notes)


@pytest.mark.parametrize(
    ("derive", "why"),
    [
        (lambda m: parametrize.register_parametrization(m, "weight", Symmetric()), "cannot be set"),
        (parametrizations.orthogonal, "makes another weight"),
    ],
)
def test_a_weight_that_cannot_be_set_keeps_its_bits(
    derive: Callable[[nn.Module], nn.Module], why: str
) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    net = network(derive(nn.Linear(6, 6)))
    found = bit_widths(net, data(), average=4.0)
    assert found.components == ("0", "4")
    (note,) = found.notes
    assert note.startswith("'2' keeps its weights: '2.weight' is derived by ")
    assert why in note
    assert "replacements=" not in note
    with pytest.raises(ValueError, match=r"the weights of \('2',\) cannot be rounded: .*name other"):
        bit_widths(net, data(), average=4.0, components=["2"])


def test_a_replacement_of_a_weight_that_cannot_be_set_is_refused_for_it_alone() -> None:
    net = network(parametrizations.orthogonal(nn.Linear(6, 6)))
    weights = {f"{i}.weight": torch.ones_like(net[i].weight) for i in (0, 2)}
    found = component_effects(net, data(), replacements={"ones": weights}, kinds=[], how="measured")
    assert found.doubts["ones"] == ((), ("refused",), ())
    assert any("pass what it is derived from" in note for note in found.notes)


@pytest.mark.parametrize("frozen", [False, True])
def test_scripted_parts_are_left_as_they_are(frozen: bool) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh()).eval())
    net = network(torch.jit.freeze(scripted) if frozen else scripted)
    before = copy.deepcopy(net.state_dict())
    found = bit_widths(net, data(), average=4.0)
    assert found.components == ("0", "4")
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_a_part_of_a_component_may_be_scripted() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    inner = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    net = network(nn.Sequential(inner, nn.Linear(6, 6)))
    before = copy.deepcopy(net.state_dict())
    names = ["0", "2", "4"]
    report = bit_widths(net, data(), average=4.0).components
    assert {"0", "4"} <= {*report}
    found = component_effects(net, data(), kinds=["weight_noise"], components=names, how="measured")
    assert (found.values["weight_noise"] > 0).all()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_double_precision_is_rounded_to_the_same_integers() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    net = network(nn.Linear(6, 6))
    single = quantized_weights(net, 4)
    found = quantized_weights(net.double(), 4)
    assert all(weight.dtype == torch.float64 for weight in found.values())
    assert all(torch.equal(found[name], weight.double()) for name, weight in single.items())
    assert bit_widths(net, data(torch.float64), average=4.0).components == ("0", "2", "4")


def test_weights_that_are_quantised_already_stay() -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    net = network(nn.Linear(6, 6))
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig(), filter_fn=lambda m, name: name == "2")
    found = bit_widths(net, data(), average=4.0)
    assert found.components == ("0", "4")
    assert any(n.startswith("'2' keeps its weights: they are not stored") for n in found.notes)


def test_weights_that_are_quantised_already_count_as_they_are_stored() -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    net = network(Pair())
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig(), filter_fn=lambda m, name: name == "2.first")
    found = bit_widths(net, data(), average=4.0)
    assert found.weights == (36, 36, 18)
    (note,) = found.notes
    assert note.startswith("36 of 126 weights of the components")
    # Eight, and a scale and an offset for each row of six.
    bits = float(note.split(" keep ")[1].split(" bits")[0])
    assert 8 < bits < 8 + 64 / 6 + 0.1
