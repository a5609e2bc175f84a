"""What forward passes are run with: hook points that are read and replaced, and sums that stream."""

import dataclasses
from typing import NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_koopman.network.forward_runner import MeanAndSpread, default_forward, to_device
from lightning_koopman.network.hook_points import HookPoint, HookPoints, replace_tensor


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("sizes", [(60,), (1, 17, 42), (0, 30, 0, 30)])
def test_streamed_mean_and_spread_are_numpys(sizes, offset):
    rows = offset + torch.randn(60, 3, 2, generator=torch.Generator().manual_seed(0)).double()
    streamed = MeanAndSpread(rows.split(sizes))
    assert streamed.count == 60
    np.testing.assert_allclose(streamed.mean, rows.numpy().mean(axis=0), rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(streamed.std, rows.numpy().std(axis=0), rtol=1e-12)


@pytest.mark.parametrize("at_once", [1, 5, 2**18])
def test_streamed_means_are_over_axes_that_vary_too(at_once, monkeypatch):
    """Whatever is taken at once, and in whatever part an axis first varies."""
    monkeypatch.setattr("lightning_koopman.network.forward_runner._VALUES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    for shapes, axes in (
        ([(9, 2, 3), (4, 2, 3), (7, 5, 3)], (0, 1)),
        ([(9, 3, 4, 5), (4, 3, 4, 6), (7, 3, 2, 5)], (0, 2, 3)),
        ([(9, 3, 4, 5), (4, 3, 2, 5), (7, 3, 4, 6)], (0, 2, 3)),
        ([(9, 3), (4, 2)], (0, 1)),
        ([(9,), (4,)], (0,)),
    ):
        parts = [3 + torch.randn(shape, generator=generator) for shape in shapes]
        streamed = MeanAndSpread(parts)
        kept = [k for k in range(parts[0].ndim) if k not in axes]
        flat = [part.double().permute(*axes, *kept).flatten(0, len(axes) - 1) for part in parts]
        rows = torch.cat(flat).numpy()
        assert streamed.count == len(rows)
        np.testing.assert_allclose(streamed.mean.flatten(), rows.mean(axis=0).flatten(), rtol=1e-13)
        np.testing.assert_allclose(streamed.std.flatten(), rows.std(axis=0).flatten(), rtol=1e-12)
        assert streamed.mean.expand_as(parts[-1]).shape == parts[-1].shape
    with pytest.raises(ValueError, match=r"shape \(2,\) and of shape \(3, 4\) per sample arrived"):
        MeanAndSpread([torch.zeros(5, 3, 4), torch.zeros(5, 2)])


def test_hook_points_read_and_replace_nested_outputs():
    old = torch.ones(2)
    value = {"a": torch.tensor([1]), "b": [old]}
    assert replace_tensor(value, old, torch.zeros(2))["b"][0].sum() == 0
    assert value["b"][0].sum() == 2
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    with HookPoints(net, [HookPoint("in", "1"), HookPoint("out", "1")]) as points:
        points.start_pass()
        x = -torch.ones(1, 2)
        net[1](x)
    assert points.values[HookPoint("in", "1")].sum() == -2
    assert points.values[HookPoint("out", "1")].sum() == 0


def test_tensors_are_replaced_in_any_container():
    old, new = torch.zeros(2), torch.ones(2)

    @dataclasses.dataclass
    class Kept:
        name: str
        value: torch.Tensor

    class Pair(NamedTuple):
        a: torch.Tensor
        b: str

    held = replace_tensor(Kept("x", old), old, new)
    assert (held.name, held.value) == ("x", new)
    assert type(held) is Kept
    assert replace_tensor(Pair(old, "b"), old, new) == Pair(new, "b")
    assert replace_tensor({"n": 1, "x": old}, old, new) == {"n": 1, "x": new}
    assert replace_tensor([old], old, new) == [new]


def test_hook_points_without_a_tensor_are_named_and_no_hook_stays():
    class Words(nn.Module):
        def forward(self, x):
            return "words"

    model = nn.ModuleDict({"words": Words()})
    for arguments, words in (
        ({"read": [HookPoint("out", "words")]}, "'words' has no floating-point tensor to read"),
        (
            {"alter": {HookPoint("out", "words"): lambda given, _: given}},
            "'words' gave str with no tensor to replace",
        ),
    ):
        with pytest.raises(ValueError, match=words), HookPoints(model, **arguments):
            model["words"](torch.ones(1))
    assert not model["words"]._forward_hooks


def test_entries_that_what_forward_calls_does_not_take_are_told():
    class Thin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, **kwargs: Tensor) -> Tensor:
            return self.inner(**kwargs)

    batch = {"input": torch.ones(2, 3), "target": torch.ones(2)}
    said = "all of which Thin.forward says it takes, but it raised .*'target'.*forward_fn=lambda"
    with pytest.raises(ValueError, match=said):
        default_forward(Thin(), batch)
    assert default_forward(Thin(), {"input": torch.ones(2, 3)}).shape == (2, 2)


def test_batches_that_move_in_place_are_kept():
    @dataclasses.dataclass
    class Graphs:
        nodes: Tensor

        def to(self, device: torch.device) -> None:
            self.nodes = self.nodes.to(device)

    batch = Graphs(torch.ones(2, 3))
    moved, one = to_device((batch, 1), torch.device("cpu"))
    assert torch.equal(moved.nodes, batch.nodes)
    assert one == 1


@pytest.mark.parametrize("kind", [nn.Module, L.LightningModule])
def test_a_module_without_a_pass_of_its_own_says_how_to_give_one(kind):
    class Bare(kind):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

    model, x = Bare(), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"Bare has no forward\(\) of its own; say how to run it"):
        default_forward(model, x)
    model.forward = model.net.forward
    assert default_forward(model, x).shape == (4, 2)
    assert default_forward(torch.jit.script(model.net), x).shape == (4, 2)
