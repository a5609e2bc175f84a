"""States inside objects of classes of somebody's own, as libraries of equivariant layers give them."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import component_effects, credit_report
from lightning_koopman.network.runs.hook_points import replace_tensor
from lightning_koopman.network.tensors import all_tensors


class Typed:
    """A tensor, and what it means."""

    def __init__(self, tensor: Tensor) -> None:
        self.kind, self.tensor = "field", tensor


@dataclass
class Told:
    tensor: Tensor


class Layer(nn.Module):
    def __init__(self, kind: type | None, width: int) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(width, 16), kind

    def forward(self, x):
        made = torch.relu(self.linear(x if self.kind is None else x.tensor))
        return made if self.kind is None else self.kind(made)


class Network(nn.Module):
    def __init__(self, kind: type | None) -> None:
        super().__init__()
        self.a, self.b, self.head = Layer(kind, 8), Layer(kind, 16), nn.Linear(16, 4)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x if self.kind is None else self.kind(x)))
        return self.head(h if self.kind is None else h.tensor)


@pytest.mark.parametrize("kind", [Typed, Told])
def test_a_network_on_objects_has_the_numbers_of_one_on_tensors(kind: type):
    torch.manual_seed(0)
    plain, objects = Network(None).eval(), Network(kind).eval()
    objects.load_state_dict(plain.state_dict())
    batches = list(torch.randn(400, 8).split(50))
    names, kinds = ["a", "b", "head"], ["skip", "linear", "output_noise"]
    expected, found = (credit_report(net, batches, components=names) for net in (plain, objects))
    assert found.components == ("a", "b", "head")
    np.testing.assert_array_equal(found.credit, expected.credit)
    np.testing.assert_array_equal(found.r2, expected.r2)
    assert found.notes == expected.notes
    effects = [component_effects(net, batches, expected, kinds) for net in (plain, objects)]
    for each in kinds:
        np.testing.assert_array_equal(effects[1].values[each], effects[0].values[each])


def test_a_tensor_is_replaced_in_a_copy_of_the_object():
    old, new = torch.zeros(2), torch.ones(2)
    given = Typed(old)
    made = replace_tensor((given, 1), old, new)
    assert made[0].tensor is new
    assert made[0].kind == "field"
    assert given.tensor is old


def test_classes_and_functions_hold_no_tensors():
    def scaled() -> None: ...

    scaled.by = torch.ones(2)
    Typed.shared = torch.ones(2)
    assert all_tensors([Typed, scaled, nn.Linear(2, 2), "x"]) == []
    assert len(all_tensors(Typed(torch.ones(1)))) == 1
    del Typed.shared
