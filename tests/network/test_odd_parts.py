"""Scripted, quantised, lazy and nested parts, and calls that are no passes of the network."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_koopman import component_effects, credit_report
from lightning_koopman.network.components import named_components

# Scripting and quantisation by torch.jit and torch.ao are on their way out, and say so.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def samples() -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.randn(400, 6).split(50))


class Act(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.inner(x)


def net(wrap: Callable[[nn.Module], Any]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), wrap(Act()), wrap(Scaled()), nn.Linear(8, 3)).eval()


def test_scripted_parts_are_measured_as_wholes():
    scripted, plain = net(torch.jit.script), net(lambda module: module)
    for names in (None, ["0", "2", "3"]):
        given = credit_report(scripted, samples(), components=names)
        expected = credit_report(plain, samples(), components=["0", "2", "3"] if names else None)
        assert given.components == expected.components == ("0", "2", "3")
        np.testing.assert_allclose(given.credit, expected.credit, atol=1e-6)


def quantised(static: bool) -> tuple[nn.Module, nn.Module]:
    """A network and what quantisation makes of it."""
    torch.manual_seed(0)
    # What a quantised Tanh gives fills all 8 bits, of which products overflow where there is no VNNI.
    relu = nn.ReLU()
    layers = nn.Sequential(nn.Linear(6, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, 3)).eval()
    if not static:
        return layers, torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, dtype=torch.qint8)
    stubs = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
    ready = nn.Sequential(stubs[0], *copy.deepcopy(layers), stubs[1]).eval()
    ready.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    torch.ao.quantization.prepare(ready, inplace=True)
    ready(torch.cat(samples()))
    plain = nn.Sequential(nn.Identity(), *layers, nn.Identity()).eval()
    return plain, torch.ao.quantization.convert(ready)


@pytest.mark.parametrize("static", [False, True])
def test_quantised_parts_are_nearly_what_they_were(static):
    if static and "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("no engine for static quantisation here")
    plain, small = quantised(static)
    given, expected = credit_report(small, samples()), credit_report(plain, samples())
    assert given.components == expected.components or static
    assert len(given.components) >= 3
    assert given.total == pytest.approx(expected.total, abs=0.1)


def test_a_depth_of_a_quantised_network_is_refused():
    with pytest.raises(ValueError, match="depth is 1, but a depth takes modules with parameters"):
        named_components(quantised(static=False)[1], 1)


@pytest.mark.parametrize("once", [True, False])
def test_lazy_modules_get_their_weights_from_the_first_batch(once):
    torch.manual_seed(0)
    lazy = nn.Sequential(nn.LazyLinear(8), nn.Dropout(), nn.LazyLinear(3)).train()
    batches = samples()
    report = credit_report(lazy, iter(batches) if once else batches)
    assert report.n_samples == 400
    assert lazy.training
    assert all(module.training for module in lazy)
    assert [type(module) for module in lazy] == [nn.Linear, nn.Dropout, nn.Linear]
    np.testing.assert_allclose(report.credit, credit_report(lazy, batches).credit, atol=1e-12)


def test_lazy_modules_get_their_weights_from_what_effects_are_measured_on():
    torch.manual_seed(0)
    lazy, batches = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3)), samples()
    effects = component_effects(lazy, batches)
    assert effects.components == ("0", "2")
    np.testing.assert_allclose(effects.values["skip"], component_effects(lazy, batches).values["skip"])


def padded() -> nn.Module:
    """A transformer encoder that takes the fast path of padded sequences."""

    def run(m: Any, x: Tensor, padding: Tensor) -> Tensor:
        return m.head(m.encoder(m.embed(x), src_key_padding_mask=padding).mean(1))

    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    return wired(run, embed=nn.Linear(6, 8), encoder=encoder, head=nn.Linear(8, 3))


def test_nested_tensors_become_padded_rows():
    lengths = torch.randint(2, 8, (50,))
    lengths[0] = 7
    padding = torch.arange(7)[None] >= lengths[:, None]
    batches = [(torch.randn(50, 7, 6), padding) for _ in range(4)]
    report = credit_report(padded(), batches)
    assert report.components == ("embed", "encoder.layers.0", "encoder.layers.1", "head")
    assert report.n_samples == 200
    assert np.isfinite(report.credit).all()


@pytest.mark.filterwarnings("ignore:.*samples are few")
def test_nested_tensors_of_the_batch_itself_count_as_those_that_a_component_gives():
    """Nothing stands before the encoder, so what its first layer takes is a nested batch."""
    torch.manual_seed(0)
    lengths = torch.randint(2, 8, (400,))
    lengths[::50] = 7
    padding = torch.arange(7)[None] >= lengths[:, None]
    x = torch.randn(400, 7, 8).masked_fill(padding[..., None], 0)
    batches = list(zip(x.split(50), padding.split(50), strict=True))

    def run(m: Any, x: Tensor, padding: Tensor) -> Tensor:
        given = m.encoder(m.front(x), src_key_padding_mask=padding)
        return m.head((given * ~padding[..., None]).sum(1) / (~padding).sum(1, keepdim=True))

    same = nn.Linear(8, 8)
    nn.init.eye_(same.weight)
    nn.init.zeros_(same.bias)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    parts = {"encoder": nn.TransformerEncoder(layer, 2), "head": nn.Linear(8, 3)}
    alone, behind = (
        credit_report(wired(run, front=front, **parts).eval(), batches)
        for front in (nn.Identity(), same)
    )
    assert alone.components == ("encoder.layers.0", "encoder.layers.1", "head")
    assert behind.components == ("front", *alone.components)
    assert alone.r2 == pytest.approx(behind.r2[1:], abs=0.01)
    assert alone.credit == pytest.approx(behind.credit[1:], abs=0.01)


class Cutting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        given = super().forward(x)
        return torch.nested.nested_tensor([
            row.view(2, 3) if i else row.view(3, 2) for i, row in enumerate(given)
        ])


def test_nested_tensors_with_two_axes_that_differ_are_refused():
    parts = {"first": nn.Linear(6, 6), "cut": Cutting(), "head": nn.Linear(6, 2)}
    jagged = wired(lambda m, x: (m.cut(x), m.head(m.first(x)))[1], **parts)
    with pytest.raises(ValueError, match="the state of 'cut' is a nested tensor whose samples have the"):
        credit_report(jagged, samples())


def fake(model: nn.Module, x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x))


def meta(model: nn.Module, x: Tensor) -> None:
    weights = {name: value.to("meta") for name, value in model.named_parameters()}
    torch.func.functional_call(model, weights, (x.to("meta"),))


CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "vmap": lambda model, x: torch.func.vmap(model)(x),
    "jacobians": lambda model, x: torch.func.vmap(torch.func.jacrev(model))(x[:4]),
    "forward mode": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "gradient": lambda model, x: torch.func.grad(lambda z: model(z).sum())(x),
    "fake": fake,
    "meta": meta,
    "trace": lambda model, x: torch.jit.trace(model, x),
    "graph": lambda model, x: make_fx(model)(x),
    "export": lambda model, x: torch.export.export(model, (x,)),
}


@pytest.mark.parametrize("kind", CALLS)
def test_calls_under_a_transform_are_no_passes(kind):
    if kind == "export" and torch.__version__ < "2.7":
        pytest.skip("torch 2.6 exports no module that carries hooks, whosever they are")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    expected = credit_report(model, samples())

    def step(model: nn.Module, x: Tensor) -> None:
        if kind != "graph":
            CALLS[kind](model, x)
        model(x)
        if kind == "graph":
            CALLS[kind](model, x)

    given = credit_report(model, samples(), forward_fn=step)
    np.testing.assert_array_equal(given.credit, expected.credit)
    assert given.notes == expected.notes


def test_parameters_in_no_component_are_listed():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    assert not any("parameters in" in note for note in credit_report(model, samples()).notes)
    model.shift = nn.Parameter(torch.zeros(1, 1234))
    assert "parameters in no component: shift (1,234)" in credit_report(model, samples()).notes


class Sparse(nn.Linear):
    """A layer of rows that are mostly zeros, as of baskets or adjacencies."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(x.to_sparse(), self.weight.T) + self.bias


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_data_are_read_as_they_are_written_out(layout: torch.layout) -> None:
    def network(first: type[nn.Linear]) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(first(20, 8), nn.Tanh(), nn.Linear(8, 3)).eval()

    written = [x[:, :1] * (x > 1) for x in torch.randn(400, 20).split(100)]
    data = [x.to_sparse(layout=layout) for x in written]
    found, expected = credit_report(network(Sparse), data), credit_report(network(nn.Linear), written)
    np.testing.assert_allclose(found.credit, expected.credit, atol=1e-6)
    np.testing.assert_allclose(found.r2, expected.r2, atol=1e-6)
    kinds = ["skip", "linear", "weight_noise", "output_noise"]
    effects = component_effects(network(Sparse), data, kinds=kinds)
    plain = component_effects(network(nn.Linear), written, kinds=kinds)
    for kind in kinds:
        np.testing.assert_allclose(effects.values[kind], plain.values[kind], rtol=1e-4, atol=1e-9)
