"""Other weights in a component's place: made by libraries, put also where weights are derived."""

import copy
import sys

import numpy as np
import pytest
import torch
from effect_nets import batched, data, mlp
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_koopman import bit_widths, component_effects
from lightning_koopman.effects.alterations import Alterations
from lightning_koopman.effects.derived_weights import reset, weight_now
from lightning_koopman.effects.replacements import pruned_weights, quantized_weights


def rounded(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Symmetric round-to-nearest, by NumPy: the largest weight of a group has the largest integer."""
    blocks = weight.reshape(-1, group)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / ((2**bits - 1) / 2)
    whole = np.clip(np.round(blocks / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (whole * scale).reshape(weight.shape)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (3, 4), (2, 2)])
def test_quantised_weights_are_rounded_to_nearest(bits, group):
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Conv1d(6, 4, 2))
    before = [parameter.clone() for parameter in net.parameters()]
    found = quantized_weights(net, bits, group_size=group)
    assert list(found) == ["0.weight", "2.weight"]
    for name, weight in found.items():
        plain = net.state_dict()[name].numpy()
        expected = rounded(plain, bits, group or plain[0].size)
        # A weight halfway between two integers may go either way.
        differs = ~np.isclose(weight.numpy(), expected, rtol=1e-4, atol=1e-6)
        assert differs.mean() <= 0.05
        assert weight.dtype == net.state_dict()[name].dtype
        assert all(len(set(row.tolist())) <= 2**bits for row in weight.flatten(1)) or group
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_precision_are_rounded_to_nearest(dtype):
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 64)).to(dtype)
    plain = net[0].weight.detach().float().numpy()
    found = quantized_weights(net, 8)["0.weight"]
    assert found.dtype == dtype
    expected = torch.from_numpy(rounded(plain, 8, 256)).to(dtype).double()
    # A weight halfway between two integers may go either way: next to none is.
    assert ((found.double() - expected).abs() > 1e-6).double().mean() < 1e-3


@pytest.mark.parametrize(("net", "group"), [(nn.Linear(1, 6), None), (nn.Linear(4, 3), 1)])
def test_weights_with_a_scale_of_their_own_are_moved_by_half_a_step_at_most(net, group):
    pytest.importorskip("torchao", reason="torchao is not installed")
    found = quantized_weights(net, 4, group_size=group)["weight"]
    assert found.shape == net.weight.shape
    step = net.weight.detach().abs() / 7.5
    torch.testing.assert_close((found - net.weight).abs() / step, torch.full(found.shape, 0.5))


def test_fewer_bits_move_the_outputs_more_and_predictions_follow():
    pytest.importorskip("torchao", reason="torchao is not installed")
    net, (x, y) = mlp(), data()
    weights = {f"int{bits}": quantized_weights(net, bits) for bits in (8, 4, 2)}
    found = component_effects(net, batched(x, y), kinds=[], replacements=weights, how="both", probes=9)
    assert found.kinds == ("int8", "int4", "int2")
    assert (found.values["int8"] < found.values["int4"]).all()
    assert (found.values["int4"] < found.values["int2"]).all()
    np.testing.assert_allclose(found.predicted["int8"], found.values["int8"], rtol=0.1)
    alone = component_effects(net, batched(x, y), replacements=weights)
    assert alone.how == {"skip": "measured"} | dict.fromkeys(weights, "predicted")
    # Weights are replaced component by component, so what has no bits has no effect.
    only = {"int4": {k: v for k, v in weights["int4"].items() if k[0] == "2"}}
    part = component_effects(net, batched(x, y), kinds=[], replacements=only, how="measured")
    np.testing.assert_array_equal(part.values["int4"] > 0, [False, True, False])


def test_pruned_weights_are_the_smallest_of_each_layer():
    net = mlp()
    found = pruned_weights(net, 0.25)
    for name, weight in found.items():
        plain = net.state_dict()[name]
        count = round(0.25 * plain.numel())
        least = plain.abs().flatten().argsort()[:count]
        expected = plain.flatten().clone()
        expected[least] = 0
        assert torch.equal(weight.flatten(), expected)
    assert not any(weight.count_nonzero() for weight in pruned_weights(net, 1).values())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, nn.utils.weight_norm, lambda m: prune.identity(m, "weight")],
    ids=["parametrised", "weight_norm", "pruned"],
)
def test_derived_weights_are_replaced_by_the_name_of_the_weight(wrap):
    x, y = data()
    plain, other = mlp(), mlp(7)
    weights = {k: v for k, v in other.state_dict().items() if k.endswith("weight") and v.ndim == 2}
    how = {"kinds": [], "replacements": {"other": weights}, "components": ["0", "2", "5"]}
    expected = component_effects(plain, batched(x, y), **how)
    derived = mlp()
    for i in (0, 2, 5):
        wrap(derived[i])
    state = {name: value.clone() for name, value in derived.state_dict().items()}
    found = component_effects(derived, batched(x, y), **how)
    np.testing.assert_allclose(found.values["other"], expected.values["other"], rtol=1e-4)
    assert all(torch.equal(value, state[name]) for name, value in derived.state_dict().items())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [nn.utils.weight_norm, nn.utils.spectral_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)],
    ids=["weight_norm", "spectral_norm", "pruned"],
)
def test_derived_weights_are_rounded_as_they_are_and_not_as_the_last_call_left_them(wrap):
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    net = nn.Sequential(wrap(nn.Linear(8, 6)), nn.Tanh(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    # Found by no call of the network, so that the hook has not derived the weight anew.
    found, pruned = quantized_weights(net, 8)["0.weight"], pruned_weights(net, 0.5)["0.weight"]
    x = torch.randn(100, 8)
    chosen = bit_widths(net, [x], bits=(8,), average=8)
    rounded_net = chosen.apply(net)
    with torch.no_grad():
        own, new = net(x).double(), rounded_net(x).double()
    weight = net[0].weight.detach()
    step = 2 * weight.abs().amax(1, keepdim=True) / 255
    assert ((found - weight).abs() <= 0.51 * step).all()
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])
    effect = (new - own).square().sum() / (own - own.mean(0)).square().sum()
    assert chosen.effect == pytest.approx(float(effect), rel=1e-3)
    assert effect < 1e-3


def test_errors_say_what_arrived_and_what_to_do(monkeypatch):
    net, (x, y) = mlp(), data()

    def refused(message, weights):
        with pytest.raises(ValueError, match=message):
            component_effects(net, batched(x, y), kinds=[], replacements={"other": weights})

    refused("'other' holds '7.weight', which Sequential does not", {"7.weight": torch.ones(1)})
    wrong = {"0.weight": torch.ones(1)}
    refused(r"other has shape \(1,\) for '0.weight', which needs shape \(12, 5\)", wrong)
    with pytest.raises(ValueError, match="9 bits are asked for; weights are rounded to 2 to 8 bits"):
        quantized_weights(net, 9)
    with pytest.raises(ValueError, match=r"bits is 2\.5; it must be an integer"):
        quantized_weights(net, 2.5)
    with pytest.raises(ValueError, match="amount is 2; it is the share of weights to prune"):
        pruned_weights(net, 2)
    pytest.importorskip("torchao", reason="torchao is not installed")
    with pytest.raises(ValueError, match=r"group_size is 3, but each output of '0.weight' has 5 in"):
        quantized_weights(net, 4, group_size=3)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-koopman\[quantize\]'"):
        quantized_weights(net, 4)


def plain(layer):
    return layer


@pytest.mark.parametrize("derive", [plain, parametrizations.weight_norm])
def test_a_layer_in_two_blocks_has_its_weights_replaced_in_both(derive):
    torch.manual_seed(0)
    layer = derive(nn.Linear(6, 6))
    net = nn.Sequential(
        nn.Sequential(layer, nn.Tanh()), nn.Sequential(nn.LayerNorm(6), layer), nn.Linear(6, 3)
    )
    x = torch.randn(200, 6)
    # Of a layer at two places, other libraries name the first.
    halved = {"half": pruned_weights(net, 0.5)}
    assert [key for key in halved["half"] if key.startswith("1.")] == []
    effects = component_effects(
        net, x.split(50), kinds=[], replacements=halved, how="measured", components=["0", "1"]
    )
    with torch.no_grad():
        before, altered = net(x), copy.deepcopy(net)
        weight = halved["half"]["0.0.weight"]
        altered[0][0].weight = nn.Parameter(weight) if derive is plain else weight
        after = altered(x)
    expected = float((after - before).square().sum() / (before - before.mean(0)).square().sum())
    assert expected > 0.01
    assert effects.values["half"] == pytest.approx([expected, expected], rel=1e-3)


def test_quantised_weights_of_a_network_may_be_replaced_by_others_of_their_class():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torch.manual_seed(0)
    net, other = (nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)) for _ in range(2))
    for each in (net, other):
        torchao.quantize_(each, torchao.Int8WeightOnlyConfig())
    x = torch.randn(100, 8)
    with torch.no_grad():
        own, swapped = net(x).double(), other[2](net[:2](x)).double()
    weights = {"other": other.state_dict()}
    found = component_effects(net, [x], kinds=[], replacements=weights, how="measured")
    expected = (swapped - own).square().sum() / (own - own.mean(0)).square().sum()
    assert found.values["other"][1] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_weights_are_replaced_and_put_back_exactly(dtype):
    torch.manual_seed(0)
    net = nn.Linear(100, 100, dtype=dtype)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    after = {name: p + 1e-12 * torch.randn_like(p) for name, p in before.items()}
    model = nn.Sequential(net)
    given = {f"0.{name}": weight for name, weight in after.items()}
    alterations = Alterations(model, {"0": ("0",)}, ["other"], replacements={"other": given})
    with alterations.weights.altered("other", ["0"]):
        assert all(torch.equal(p, after[name]) for name, p in net.named_parameters())
        assert not torch.equal(net.weight, before["weight"])
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_noise_on_weights_is_a_share_of_their_standard_deviation(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 200, bias=False, dtype=dtype))
    before = net[0].weight.detach().clone()
    spread = float((before - before.mean()).abs().square().mean().sqrt())
    alterations = Alterations(net, {"0": ("0",)}, ["weight_noise"], strength=0.2)
    with alterations.weights.altered("weight_noise", ["0"]):
        moved = (net[0].weight.detach() - before) / (0.2 * spread)
    parts = torch.view_as_real(moved).flatten(0, 1).T if moved.is_complex() else moved.flatten()[None]
    # Independent parts that add up to one.
    expected = torch.eye(len(parts), dtype=torch.float64) / len(parts)
    torch.testing.assert_close(parts @ parts.T / moved.numel(), expected, rtol=0.02, atol=0.01)


class DrawsAll(nn.Module):
    """Draws what it holds anew in one loop, as many networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.ones(4, 4)), nn.Linear(4, 4)

    def reset_parameters(self) -> None:
        for child in self.children():
            child.reset_parameters()
        for weight in self._parameters.values():
            nn.init.xavier_uniform_(weight)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weights_that_are_derived_are_drawn_anew_as_plain_ones(wrap, dim):
    plain, part = DrawsAll(), wrap(DrawsAll(), "weight", dim)
    with torch.no_grad():
        for each in (plain, part):
            torch.manual_seed(0)
            assert reset(each, "part")
    torch.testing.assert_close(weight_now(part, "weight"), plain.weight.detach())
    torch.testing.assert_close(part.inner.weight, plain.inner.weight)
