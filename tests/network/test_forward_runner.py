"""What forward passes are run with: hook points that are read and replaced."""

import dataclasses
from typing import NamedTuple

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_koopman.network.runs.forward import default_forward, to_device
from lightning_koopman.network.runs.hook_points import HookPoint, HookPoints, replace_tensor


def test_hook_points_read_and_replace_nested_outputs():
    old = torch.ones(2)
    value = {"a": torch.tensor([1]), "b": [old]}
    assert replace_tensor(value, old, torch.zeros(2))["b"][0].sum() == 0
    assert value["b"][0].sum() == 2
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    with HookPoints(net, [HookPoint("in", "1"), HookPoint("out", "1")]) as points:
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
