"""What components give may be mappings of a class of its own, which stay what they are when altered."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import component_effects, credit_report
from lightning_koopman.network.runs.hook_points import replace_tensor
from lightning_koopman.network.tensors import all_tensors


class AttrDict(dict):
    __getattr__ = dict.__getitem__


class SelfDict(dict):
    """Its attributes are its entries, the same dictionary."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Mirrored(dict):
    """Keeps each entry as an attribute too."""

    def __init__(self, **entries: Any) -> None:
        for name, entry in entries.items():
            setattr(self, name, entry)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        super().__setitem__(name, value)


class User(collections.UserDict):
    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


class Frozen(Mapping):
    """Holds its entries elsewhere, and takes no others."""

    def __init__(self, *args: Any, **entries: Any) -> None:
        self.held = dict(*args, **entries)

    def __getitem__(self, name: str) -> Any:
        return self.held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)

    def __getattr__(self, name: str) -> Any:
        if name == "held":
            raise AttributeError(name)
        return self.held[name]


class Shared(Frozen, MutableMapping):
    """A shallow copy of it shares its entries with it."""

    def __setitem__(self, name: str, value: Any) -> None:
        self.held[name] = value

    def __delitem__(self, name: str) -> None:
        del self.held[name]


class Cloned(Shared):
    """Has a size of its own, and is neither true nor false, as those of tensordict."""

    def __init__(self, *args: Any, **entries: Any) -> None:
        super().__init__(*args, **entries)
        self.size: int | None = None

    def clone(self, *, recurse: bool) -> Cloned:
        assert not recurse
        made = Cloned(self.held)
        made.size = self.size
        return made

    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")


KINDS = [dict, AttrDict, SelfDict, Mirrored, User, Shared, Cloned, collections.OrderedDict]


class Stage(nn.Module):
    def __init__(self, kind: Any, width: int) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(width, 8), kind

    def forward(self, x: Any) -> Any:
        return self.kind(h=torch.tanh(self.layer(x if isinstance(x, Tensor) else taken(x, self.kind))))


def taken(value: Any, kind: Any) -> Tensor:
    assert type(value) is kind
    return value.h if hasattr(kind, "__getattr__") or "h" in vars_of(value) else value["h"]


def vars_of(value: Any) -> dict[str, Any]:
    return getattr(value, "__dict__", {})


class Net(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.a, self.b, self.c, self.kind = Stage(kind, 4), Stage(kind, 8), nn.Linear(8, 2), kind

    def forward(self, x: Tensor) -> Tensor:
        return self.c(taken(self.b(self.a(x)), self.kind))


def effects(kind: Any) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    net = Net(kind).eval()
    batches = list(torch.randn(200, 4, generator=torch.Generator().manual_seed(1)).split(50))
    report = credit_report(net, batches, components=["a", "b", "c"])
    kinds = ["skip", "output_noise", "linear"]
    return component_effects(net, batches, report, kinds=kinds).values


@pytest.mark.parametrize("kind", KINDS[1:])
def test_effects_are_those_of_a_network_that_gives_dictionaries(kind: Any) -> None:
    expected = effects(dict)
    for name, found in effects(kind).items():
        np.testing.assert_array_equal(found, expected[name])


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_is_replaced_in_a_copy_of_the_same_class(kind: Any) -> None:
    old, new, other = torch.zeros(2), torch.ones(2), torch.zeros(3)
    given = kind(a=other, h=old)
    if kind is Cloned:
        given.size = 2
    made, one = replace_tensor((given, 1), old, new)
    assert one == 1
    assert type(made) is kind
    assert list(made) == ["a", "h"]
    assert made["h"] is taken(made, kind) is new
    assert made["a"] is other
    assert given["h"] is taken(given, kind) is old
    assert vars_of(made).get("size", 2) == 2
    nested = kind(a=other, deep=[given])
    made = replace_tensor(nested, old, new)
    assert made["deep"][0]["h"] is new
    assert nested["deep"][0]["h"] is old


def test_what_can_neither_be_copied_nor_written_to_becomes_a_plain_dictionary() -> None:
    old, new = torch.zeros(2), torch.ones(2)
    given = Frozen(a=1, h=old)
    assert replace_tensor(given, old, new) == {"a": 1, "h": new}
    assert given["h"] is old


def test_what_holds_no_such_tensor_is_given_as_it_is() -> None:
    given = AttrDict(h=torch.zeros(2))
    assert replace_tensor(given, torch.zeros(2), torch.ones(2)) is given


@dataclasses.dataclass
class Output(collections.OrderedDict):
    """As transformers has it: a dataclass whose fields are its entries."""

    h: Tensor
    states: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                self[field.name] = value


@dataclasses.dataclass
class Late:
    """Has a field that its constructor does not take."""

    scale: float
    h: Tensor = dataclasses.field(init=False)


@dataclasses.dataclass(frozen=True)
class Checked:
    h: Tensor
    twice: dataclasses.InitVar[bool]


def test_dataclasses_keep_what_they_are_made_of() -> None:
    old, new, other = torch.zeros(2), torch.ones(2), torch.zeros(3)
    made = replace_tensor(Output(other, (other, old)), old, new)
    assert type(made) is Output
    assert made.states[1] is made["states"][1] is new
    assert made.h is made["h"] is other
    late = Late(2.0)
    late.h = old
    made = replace_tensor(late, old, new)
    assert (type(made), made.scale) == (Late, 2.0)
    assert made.h is new
    assert late.h is old
    made = replace_tensor(checked := Checked(old, True), old, new)
    assert type(made) is Checked
    assert [t is new for t in all_tensors(made)] == [True]
    assert checked.h is old
