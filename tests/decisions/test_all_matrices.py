"""Bits per weight are those of all weight matrices: attention and recurrent layers are rounded, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_koopman import bit_widths, component_effects, linearize
from lightning_koopman.decisions.swaps import load_shrunk, save_shrunk
from lightning_koopman.effects.alterations import Alterations
from lightning_koopman.effects.replacements import pruned_weights, quantized_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao warns of kernels for other machines


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 8, 2, bidirectional=True, proj_size=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Table(nn.Module):
    """Multiplies by a matrix of its own, behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.own = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ self.own


def network(middle: type[nn.Module], width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), middle(), nn.Linear(width, 3)).eval()


def data(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(60, 5, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [(part, net(part).argmax(-1)) for part in x.split(20)]


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Round to nearest with one scale per row, the largest weight at the end of the integers."""
    scale = weight.abs().amax(dim=1, keepdim=True) / ((2**bits - 1) / 2)
    return (weight * (1 / scale)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


@pytest.mark.parametrize("middle", [Attending, Recurrent])
def test_every_matrix_of_a_layer_is_rounded_by_row(middle):
    pytest.importorskip("torchao", reason="torchao is not installed")
    net = network(middle)
    matrices = {name: p.detach() for name, p in net.named_parameters() if p.ndim > 1}
    assert len(matrices) > 3
    found = quantized_weights(net, 4)
    assert {*found} == {*matrices}
    for name, weight in matrices.items():
        near = torch.isclose(found[name], rounded(weight, 4), rtol=1e-4, atol=1e-6)
        assert near.double().mean() > 0.98


@pytest.mark.parametrize("middle", [Attending, Recurrent])
def test_the_average_is_that_of_all_weights_and_the_network_has_it(middle):
    pytest.importorskip("torchao", reason="torchao is not installed")
    net = network(middle)
    found = bit_widths(net, data(net), average=4.0)
    matrices = {name: p for name, p in net.named_parameters() if p.ndim > 1}
    assert sum(found.weights) == sum(p.numel() for p in matrices.values())
    assert found.notes == ()
    given = dict(zip(found.components, found.bits, strict=True))
    new = found.apply(net)
    for name, weight in matrices.items():
        bits = given[name.split(".")[0]]
        altered = new.get_parameter(name)
        assert not torch.equal(altered, weight)
        assert max(len(row.unique()) for row in altered) <= 2**bits


def test_matrices_that_cannot_be_rounded_count_as_wide_as_they_are():
    pytest.importorskip("torchao", reason="torchao is not installed")
    net = network(Table, 5)
    found = bit_widths(net, data(net), average=4.0)
    assert found.weights == (32, 64, 15)
    spent = 32 * found.bits[0] + 64 * found.bits[1] + 15 * found.bits[2]
    assert spent <= 4.0 * 111
    assert found.average == pytest.approx((spent + 32 * 40) / (111 + 40))
    assert any(note.startswith("40 of 151 weights") and "keep 32 bits" in note for note in found.notes)
    assert f"{found.average:.2f} bits per weight" in str(found)


def test_an_embedding_that_is_a_component_of_its_own_counts_as_wide_as_it_is():
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    found = bit_widths(net, torch.randint(9, (60, 2)).split(20), average=4.0)
    assert found.weights == (64, 24)
    spent = 64 * found.bits[0] + 24 * found.bits[1]
    assert found.average == pytest.approx((spent + 32 * 36) / (64 + 24 + 36))
    assert any(note.startswith("36 of 124 weights") for note in found.notes)


@pytest.mark.parametrize(
    "derive", [parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm]
)
def test_what_a_weight_is_derived_from_is_no_matrix_of_its_own(derive):
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), derive(nn.Linear(8, 8)), nn.Linear(8, 3)).eval()
    assert list(quantized_weights(net, 4)) == ["0.weight", "1.weight", "2.weight"]
    assert bit_widths(net, data(net), average=4.0).notes == ()


def test_attention_is_pruned_in_each_of_its_matrices():
    found = pruned_weights(network(Attending), 0.5)
    assert {name: float((w == 0).float().mean()) for name, w in found.items()} == dict.fromkeys(
        found, 0.5
    )
    assert "1.attention.in_proj_weight" in found


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_are_rounded_by_output_channel(groups):
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    # Its weight has the inputs of all groups along the first axis.
    layer = nn.ConvTranspose2d(6, 4, 3, groups=groups)
    found = quantized_weights(nn.Sequential(layer), 3)["0.weight"]
    assert found.shape == layer.weight.shape
    per_group = 4 // groups
    for output in range(4):
        group, place = divmod(output, per_group)
        rows = slice(group * (6 // groups), (group + 1) * (6 // groups))
        own, expected = found[rows, place].flatten(), layer.weight[rows, place].detach().reshape(1, -1)
        near = torch.isclose(own, rounded(expected, 3)[0], rtol=1e-4, atol=1e-6)
        assert near.double().mean() > 0.95
        assert len(own.unique()) <= 8


class Spectral(nn.Module):
    """A Fourier layer: its weight is complex, what it takes and gives is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8, dtype=torch.cfloat) / 8)

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(x, dim=1)
        return torch.fft.irfft(torch.einsum("bki,kio->bko", modes, self.weight), n=x.shape[1], dim=1)


def test_complex_weights_count_as_wide_as_they_are():
    pytest.importorskip("torchao", reason="torchao is not installed")
    net = network(Spectral)
    found = bit_widths(net, data(net), average=4.0)
    assert found.weights == (32, 24)
    spent = 32 * found.bits[0] + 24 * found.bits[1] + 64 * 192
    assert found.average == pytest.approx(spent / (32 + 24 + 192))
    assert any(n.startswith("192 of 248 weights") and "keep 64 bits" in n for n in found.notes)


def test_noise_on_complex_weights_moves_both_parts_by_its_share_in_all():
    net = network(Spectral)
    weight, moved = net[1].weight.detach().clone(), []
    alterations = Alterations(net, {"1": ("1",)}, ["weight_noise"], strength=0.5)
    torch.manual_seed(0)
    for _ in range(50):
        with alterations.weights.altered("weight_noise", ["1"]):
            moved.append(net[1].weight.detach() - weight)
    assert torch.equal(net[1].weight, weight)
    both = torch.view_as_real(torch.stack(moved)).square().mean((0, 1, 2, 3))
    variance = (weight - weight.mean()).abs().square().mean()
    expected = 0.25 * float(variance) / 2
    assert both.tolist() == pytest.approx([expected, expected], rel=0.05)
    effects = component_effects(net, data(net), kinds=["weight_noise"], components=["1"])
    assert effects.values["weight_noise"][0] > 0


def test_complex_layers_become_linear_and_go_round(tmp_path):
    net = nn.Sequential(Spectral(), nn.Flatten(), nn.Linear(40, 3))
    x = torch.randn(300, 5, 8, generator=torch.Generator().manual_seed(1))
    found = linearize(net, x.split(100), components=["0"], allow_larger=True, max_drop=1e-6)
    assert found.components == ("0",)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), net(x), rtol=1e-3, atol=1e-4)
        save_shrunk(found.model, tmp_path / "linear.ckpt")
        assert torch.equal(load_shrunk(net, tmp_path / "linear.ckpt")(x), found.model(x))


def test_layers_narrower_than_what_they_take_become_linear():
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6).bfloat16()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.bfloat16()).float()

    torch.manual_seed(0)
    net = nn.Sequential(Narrow(), nn.Linear(6, 3))
    found = linearize(net, torch.randn(300, 6).split(100), components=["0"], allow_larger=True)
    assert found.components == ("0",)
