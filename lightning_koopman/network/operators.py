"""What torch tells of its operators, and which ones do alike, where it does not tell."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

SHAPE_ONLY = frozenset({
    *(f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")),
    *(f"new_{kind}" for kind in ("zeros", "ones", "empty", "full", "empty_strided")),
})
"""Read a tensor's shape, never its values."""

COPIES = frozenset({"clone", "_to_copy"})
"""Copy a tensor."""

BY_VALUE = frozenset({
    *COPIES,
    *("elu", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid_forward", "rrelu_with_noise"),
    *("_prelu_kernel", "masked_fill"),
})
"""Go on with one tensor, value by value, and not every torch says so of them."""

BATCH_NORMS = frozenset({
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    "cudnn_batch_norm",
})

LAST_AXES_NORMS = frozenset({"native_layer_norm", "_fused_rms_norm"})

VIEWS = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "flatten"})
"""Let entries, which stay in order, have other axes."""

LOOK_UPS = frozenset({"index", "index_select", "gather"})
"""Read entries of their first argument at places that another one holds."""

PUTS = frozenset({"index_add", "index_copy", "index_put", "scatter", "scatter_add", "scatter_reduce"})
"""Put entries into their first argument at places that another one holds."""

PRODUCTS = {
    **{"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_sparse_mm": 0, "_sparse_addmm": 1},
    # Of sparse matrices, inference mode shows nothing else.
    "matmul": 0,
}
"""Multiply matrices: where they have the left one, before the right one."""

DISTANCES = frozenset({"_cdist_forward", "_euclidean_dist"})
"""Compare each row of one tensor with all of another."""


class Operator(NamedTuple):
    """One of torch's operators.

    Attributes:
        name: Without what marks that it writes in place; one for all that are ``index_put``.
        full_name: As torch has it.
        is_in_place: Whether it writes in place what it gives, by its name.
        is_view: Whether it gives a view of what it reads.
        is_pointwise: Whether torch says that it makes each entry of those in the same place.
        may_draw: Whether torch says that it draws random numbers.
        turns_in_place: Whether it writes no values in place, but lets a tensor view others.
        written: Arguments that it writes to, by place and name.
        dims: Where among its arguments it is told of axes; behind all where it is not.
        usual_dims: What it is told of axes where that argument is left out.
        func: The operator itself, as torch shows it.
    """

    name: str
    full_name: str
    is_in_place: bool = False
    is_view: bool = False
    is_pointwise: bool = False
    may_draw: bool = False
    turns_in_place: bool = False
    written: tuple[tuple[int, str], ...] = ()
    dims: int = 0
    usual_dims: Any = None
    func: Any = None


@functools.lru_cache(maxsize=4096)
def operator_of(func: Any) -> Operator:
    """Return what is known of an operator that torch shows."""
    arguments, tags = func._schema.arguments, func.tags
    full_name = func._schema.name.rpartition("::")[2]
    name = full_name.rstrip("_")
    by_place = list(enumerate(arguments))
    told = ("dim", "dims", "dimension")
    dims = next((i for i, each in by_place if each.name in told), len(arguments))
    return Operator(
        name="index_put" if "index_put" in name else name,
        full_name=full_name,
        is_in_place=name != full_name,
        is_view=func.is_view,
        is_pointwise=torch.Tag.pointwise in tags,
        may_draw=torch.Tag.nondeterministic_seeded in tags,
        turns_in_place=torch.Tag.inplace_view in tags,
        written=tuple(
            (i, each.name) for i, each in by_place if getattr(each.alias_info, "is_write", False)
        ),
        dims=dims,
        usual_dims=arguments[dims].default_value if dims < len(arguments) else None,
        func=func,
    )


def by_place(op: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return what an operator is given with all that has a name in its place."""
    if not kwargs or op.func is None:
        return args
    left = op.func._schema.arguments[len(args) :]
    return (*args, *(kwargs.get(each.name, each.default_value) for each in left))
