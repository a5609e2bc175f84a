"""Bits per weight are those of all weight matrices: attention and recurrent layers are rounded, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_koopman import bit_widths
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
