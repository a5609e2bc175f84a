"""Networks that set the attributes of objects anew, as those of graph libraries do."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import component_effects, credit_report
from lightning_koopman.network.access.isolation import undisturbed
from lightning_koopman.network.runs.forward import to_device


class Sample(SimpleNamespace):
    x: Tensor


@dataclass
class Told:
    x: Tensor


class Moving(Sample):
    """Moves in place, and returns nothing."""

    def to(self, device: Any, **_: Any) -> None:
        self.x = self.x.to(device)


class Stored:
    """Keeps its attributes in a dictionary, which a copy has one of its own of."""

    def __init__(self, x: Tensor) -> None:
        vars(self)["store"] = {"x": x}

    def __getattr__(self, name: str) -> Any:
        try:
            return vars(self)["store"][name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)["store"][name] = value

    def __copy__(self) -> "Stored":
        made = Stored(self.x)
        vars(made)["store"] |= vars(self)["store"]
        return made


class Stubborn(Sample):
    def __copy__(self) -> None:
        raise RuntimeError("one of a kind")


PARTS: dict[str, Callable[[], nn.Module]] = {
    "a": lambda: nn.Linear(6, 6),
    "b": lambda: nn.Linear(6, 6),
    "head": lambda: nn.Linear(6, 3),
}


def network(forward: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    return wired(forward, **{name: make() for name, make in PARTS.items()}).eval()


def on_tensors(m: Any, x: Tensor) -> Tensor:
    return m.head(m.b(m.a(x).tanh()).relu())


def on_objects(m: Any, data: Any) -> Tensor:
    data.x = m.a(data.x).tanh()
    data.x = m.b(data.x).relu()
    return m.head(data.x)


def giving_objects(m: Any, data: Any) -> Any:
    data.x = on_objects(m, data)
    return data


TENSORS = list(torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).split(50))
KINDS = ["skip", "linear", "output_noise"]


@pytest.mark.parametrize(
    ("kind", "forward"),
    [*((kind, on_objects) for kind in (Sample, Told, Moving, Stored)), (Sample, giving_objects)],
)
def test_each_pass_takes_the_batch_as_it_was(kind, forward):
    plain, net, batches = network(on_tensors), network(forward), [kind(x=x) for x in TENSORS]
    given = {"forward_fn": lambda m, data: m(data)}
    expected, report = credit_report(plain, TENSORS), credit_report(net, batches, **given)
    np.testing.assert_allclose(report.credit, expected.credit, atol=1e-9)
    for how in ("measured", "predicted"):
        one = component_effects(plain, TENSORS, expected, KINDS, how=how)
        other = component_effects(net, batches, expected, KINDS, how=how, **given)
        for each in KINDS:
            np.testing.assert_allclose(other.values[each], one.values[each], rtol=1e-5)
    assert all(data.x is x for data, x in zip(batches, TENSORS, strict=True))


def test_what_refuses_to_be_copied_is_run_as_it_is():
    data = Stubborn(x=TENSORS[0])
    assert to_device(data, torch.device("cpu")) is data
    (copied,) = to_device([Sample(x=TENSORS[0])], torch.device("cpu"))
    assert copied.x is TENSORS[0]


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.state, self.before = (
            nn.Linear(6, 6),
            Sample(x=torch.zeros(1)),
            Sample(x=torch.zeros(1)),
        )
        self.state.calls = 0
        del self.before.x

    def forward(self, x: Tensor) -> Tensor:
        self.state.x, self.before.x = self.lin(x), x
        self.state.calls += 1
        return self.state.x


@pytest.mark.parametrize("fails", [False, True])
def test_tensors_that_objects_of_a_module_hold_are_put_back(fails):
    net = nn.Sequential(Holder())
    x = net[0].state.x
    try:
        with undisturbed(net):
            net(TENSORS[0])
            assert net[0].state.x is not x
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert net[0].state.x is x
    assert not hasattr(net[0].before, "x")
    # Whose objects these are, and what else they count, is not known here.
    assert net[0].state.calls == 1
