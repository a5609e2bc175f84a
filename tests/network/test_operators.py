"""What is told of torch's operators is what torch does, and lists of them name none that it has not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_koopman.network import operators
from lightning_koopman.network.access import watch
from lightning_koopman.network.access.watch import Watcher
from lightning_koopman.network.axes import batch_axes, met, moves, pairs, picks
from lightning_koopman.network.capture import sums
from lightning_koopman.network.flow import dataflow, labelled_sums
from lightning_koopman.network.operators import Operator, operator_of

MODULES = [operators, watch, batch_axes, met, moves, pairs, picks, sums, labelled_sums, dataflow]
LISTS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": value
    for module in MODULES
    for name, value in vars(module).items()
    if name.isupper() and isinstance(value, frozenset | dict) and {*map(type, value)} == {str}
}
OTHERS = {"dataflow.ORIGINS", "moves._VALUES", "watch._AUTOCASTS"}
OF_SOME_VERSIONS = {"_fused_rms_norm"}


@pytest.mark.parametrize("name", sorted(LISTS.keys() - OTHERS))
def test_lists_name_operators_that_torch_has(name):
    known = {schema.name.rpartition("::")[2] for schema in torch._C._jit_get_all_schemas()}
    assert {*LISTS[name]} - OF_SOME_VERSIONS <= known


class Seen(Watcher):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Operator, Any, Any]] = []

    def follow(self, op: Operator, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        self.found.append((op, args, out))


X, OUT = torch.arange(-24.0, 24.0).view(2, 2, 3, 4)
AT, ROW = torch.tensor([0]), torch.ones(1, 3, 4)
CALLS: dict[str, tuple[Callable[[Tensor], Any], dict[str, Any]]] = {
    "entries": (lambda x: x.relu(), {"name": "relu", "is_pointwise": True}),
    "in place": (lambda x: x.relu_(), {"name": "relu", "is_in_place": True, "is_pointwise": True}),
    "a view": (lambda x: x.select(1, 2), {"name": "select", "is_view": True}),
    "chance": (lambda x: torch.rand_like(x), {"name": "rand_like", "may_draw": True}),
    "another view": (
        lambda x: x.transpose_(1, 2),
        {"name": "transpose", "is_in_place": True, "turns_in_place": True},
    ),
    "put": (
        lambda x: x.index_put_([AT], ROW),
        {"name": "index_put", "is_in_place": True},
    ),
    "to given memory": (lambda x: torch.exp(x, out=OUT), {"name": "exp"}),
}


@pytest.mark.parametrize("kind", CALLS)
def test_what_is_told_of_an_operator_is_what_it_does(kind):
    call, told = CALLS[kind]
    x = X.clone()
    with Seen() as seen:
        call(x)
    op, args, out = seen.found[0]
    known = op._asdict()
    assert {name: known[name] for name in told} == told
    views = out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert views == (op.is_view or op.is_in_place)
    # What has another version was written to.
    changed = [i for i, arg in enumerate(args) if arg is x and arg._version]
    assert changed == [place for place, name in op.written if name != "out"]


def test_where_an_operator_is_told_of_axes():
    for func, dims, usual in [
        (torch.ops.aten.softmax.int, 1, None),
        (torch.ops.aten.sort.default, 1, -1),
        (torch.ops.aten.cat.default, 1, 0),
        (torch.ops.aten.relu.default, 1, None),
    ]:
        op = operator_of(func)
        assert (op.dims, op.usual_dims) == (dims, usual)


def test_operators_that_put_at_places_have_one_name():
    names = [torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_, torch.ops.aten.index_put]
    assert {operator_of(func.default).name for func in names} == {"index_put"}
    assert [operator_of(func.default).is_in_place for func in names] == [True, True, False]
