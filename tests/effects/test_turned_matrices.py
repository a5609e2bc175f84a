"""Matrices that are stored with their inputs along the first axis, or in modules of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_koopman import bit_widths
from lightning_koopman.effects.replacements import pruned_weights, quantized_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao warns of kernels for other machines


class Turned(nn.Module):
    """A linear layer whose weight is (inputs, outputs), as ``Conv1D`` of transformers."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out))
        self.bias = nn.Parameter(torch.randn(d_out))
        self.register_buffer("runs", torch.zeros(1))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        self.runs += 1
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


class Plain(nn.Module):
    """A linear layer of one's own, with another name for its weight."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(d_out, d_in))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.kernel)


class Otherwise(nn.Module):
    """Does something else with its one matrix."""

    def __init__(self, how: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(8, 8)), how

    def forward(self, x: Tensor) -> Any:
        return self.how(x, self.weight)


def by_hand(weight: Tensor, bits: int, axis: int) -> Tensor:
    """Round to nearest with one scale for all inputs of an output, in float64."""
    scale = weight.double().abs().amax(dim=axis, keepdim=True) / ((2**bits - 1) / 2)
    whole = (weight.double() / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return whole * scale


def assert_rounded(found: Tensor, weight: Tensor, bits: int, axis: int) -> None:
    # A weight halfway between two integers may go either way.
    near = torch.isclose(found.double(), by_hand(weight.detach(), bits, axis), rtol=1e-4, atol=1e-6)
    assert near.double().mean() > 0.98
    assert found.shape == weight.shape


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("d_out", [5, 16])
def test_turned_matrices_are_rounded_per_output(bits: int, d_out: int) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    layer, linear = Turned(16, d_out), nn.Linear(16, d_out)
    linear.weight.data = layer.weight.detach().T.contiguous()
    found = quantized_weights(nn.Sequential(layer), bits)
    assert list(found) == ["0.weight"]
    assert_rounded(found["0.weight"], layer.weight, bits, axis=0)
    assert torch.equal(found["0.weight"], quantized_weights(linear, bits)["weight"].T)
    groups = quantized_weights(layer, bits, group_size=4)["weight"]
    assert torch.equal(groups, quantized_weights(linear, bits, group_size=4)["weight"].T)
    with pytest.raises(ValueError, match="each output of 'weight' has 16 inputs"):
        quantized_weights(layer, bits, group_size=5)
    assert int((pruned_weights(layer, 0.5)["weight"] == 0).sum()) == 16 * d_out // 2


def test_linear_layers_of_ones_own_are_rounded_whatever_their_weight_is_called() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    layer = Plain(16, 6)
    assert_rounded(quantized_weights(layer, 4)["kernel"], layer.kernel, 4, axis=1)
    half = Plain(16, 6).bfloat16()
    assert quantized_weights(half, 4)["kernel"].dtype == torch.bfloat16


def test_looking_at_a_module_leaves_no_trace() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    layer = Turned(16, 5).train()
    state = torch.get_rng_state()
    quantized_weights(layer, 4)
    assert (layer.seen, float(layer.runs), layer.training) == ([], 0.0, True)
    assert torch.equal(state, torch.get_rng_state())


OTHERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "activation": lambda x, w: torch.tanh(x @ w),
    "skipped": lambda x, w: x + x @ w,
    "table": lambda x, w: x + w[: len(x)],
    "lookup": lambda x, w: w[x.long()],
    "scores": lambda x, w: (x @ w).softmax(-1),
    "several": lambda x, w: (x @ w, x),
    "fails": lambda x, w: x.no_such_thing,
    "no tensor": lambda x, w: None,
}


@pytest.mark.parametrize("how", OTHERS.values(), ids=OTHERS.keys())
def test_matrices_that_something_else_is_done_with_stay(how: Callable[[Tensor, Tensor], Any]) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    assert quantized_weights(nn.Sequential(Otherwise(how), nn.Linear(2, 3)), 4).keys() == {"1.weight"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Embedding(8, 8),
        lambda: nn.LayerNorm((8, 8)),
        lambda: nn.LazyLinear(3),
        lambda: Plain(4, 3).to("meta"),
        lambda: torch.jit.script(nn.Linear(3, 3)),
        lambda: nn.ParameterList([nn.Parameter(torch.randn(8, 8))]),
    ],
)
def test_modules_that_cannot_be_asked_stay(make: Callable[[], nn.Module]) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    assert quantized_weights(nn.Sequential(nn.Linear(2, 3), make()), 4).keys() == {"0.weight"}


def test_turned_weights_may_be_derived() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    layer = parametrizations.weight_norm(Turned(16, 5))
    assert_rounded(quantized_weights(layer, 4)["weight"], layer.weight, 4, axis=0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(Turned(4, 16), nn.ReLU(), Plain(16, 16), nn.ReLU(), Turned(16, 3))
    return net.eval()


def test_bits_are_chosen_for_turned_matrices_too() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    net, x = network(), torch.randn(90, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        batches = [(part, net(part).argmax(-1)) for part in x.split(30)]
    found = bit_widths(net, batches, average=4.0)
    assert found.weights == (64, 256, 48)
    assert found.notes == ()
    assert found.average <= 4.0
    new = found.apply(net)
    for name, key, axis in (("0", "weight", 0), ("2", "kernel", 1), ("4", "weight", 0)):
        bits = dict(zip(found.components, found.bits, strict=True))[name]
        assert_rounded(
            getattr(new.get_submodule(name), key), getattr(net.get_submodule(name), key), bits, axis
        )


def test_gpt2_is_rounded_per_output_of_its_layers() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    transformers = pytest.importorskip("transformers", "5", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12, "vocab_size": 40}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    net = transformers.GPT2LMHeadModel(config).eval()
    found = quantized_weights(net, 4)
    layers = [
        f"transformer.h.{i}.{part}"
        for i in (0, 1)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert found.keys() == {f"{layer}.weight" for layer in layers} | {"lm_head.weight"}
    for layer in layers:
        assert_rounded(found[f"{layer}.weight"], net.get_submodule(layer).weight, 4, axis=0)
    ids = [torch.randint(40, (6, 10), generator=torch.Generator().manual_seed(k)) for k in range(3)]
    widths = bit_widths(
        net, [{"input_ids": part} for part in ids], components=["transformer.h.*"], average=4.0
    )
    assert widths.weights == (16 * (48 + 16) + 2 * 16 * 64,) * 2
    assert widths.notes == ()
