"""Follows sums of what has labels, such as residual streams, up to what goes on with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.network.access.watch import flat
from lightning_koopman.network.operators import (
    BATCH_NORMS,
    BY_VALUE,
    COPIES,
    LAST_AXES_NORMS,
    SHAPE_ONLY,
    Operator,
)
from lightning_koopman.network.tensors import (
    address_of,
    has_places,
    is_all_of_memory,
    view_of_memory,
)

# These go on with one tensor, value by value or nearly so.
_GO_ON = BY_VALUE | BATCH_NORMS | LAST_AXES_NORMS | {"native_group_norm", "index_put"}

# These may weigh or shift what they read by numbers, and no more.
_BY_NUMBERS = COPIES | {"add", "sub", "rsub", "mul", "div", "neg"}

# These add up, weigh or shut out what they read, so that a sum may go on behind them.
_LINEAR = _BY_NUMBERS | {"masked_fill", "where", "index_put"}

# These view a part of a tensor, which what is done to it then goes on from.
_CUT = frozenset({"select", "slice", "split", "split_with_sizes", "unbind"})

# These put what they read beside something else.
_BESIDE = frozenset({"cat", "stack", "copy", "index_put"})

# These add up two tensors, of which they read the first as it is.
_ADD = frozenset({"add", "sub", "rsub", "lerp", "addcmul", "addcdiv"})


OnSum = Callable[[Tensor, str, int, bool], None]
"""Takes a sum, the operator that takes it, its place among the tensors that this reads, and whether the
operator may give what counts as a sum itself, or holds it."""


class LabelledSums:
    """Which memory holds a sum of what labels stand for, or what became of one alone."""

    def __init__(self, keep: Callable[[Tensor], None]) -> None:
        self._keep = keep
        # By address, and of one number where it is the same sum, but for numbers that weigh or shift it.
        self._sums: dict[int, int] = {}
        # How such a sum viewed its memory as it was added up.
        self._views: dict[int, tuple[Any, ...]] = {}
        self._numbers = itertools.count()

    def number(self, tensor: Tensor) -> int | None:
        """Return the number of the sum that a tensor is, if it is one."""
        return self._sums.get(address_of(tensor)) if is_all_of_memory(tensor) else None

    def alike(self, tensor: Tensor) -> list[int]:
        """Return the addresses of what is the same as a sum, but for numbers."""
        number = self.number(tensor)
        return [address for address, other in self._sums.items() if other == number]

    def as_added(self, tensor: Tensor) -> Tensor:
        """Return a sum with its axes in the order that they had when it was added up."""
        view = self._views.get(address_of(tensor))
        if view is None or view == view_of_memory(tensor):
            return tensor
        place, shape, strides = view
        whole = tensor.as_strided(shape, strides, place)
        return tensor if whole.is_contiguous() and tensor.is_contiguous() else whole

    def show(self, on_sum: OnSum, op: Operator, args: tuple[Any, ...], kwargs: Any) -> None:
        """Show sums that an operator goes on with otherwise than to add or to weigh them."""
        if not self._sums:
            return
        # What is copied to memory of another order is no longer laid out as what was added up.
        turns = kwargs.get("memory_format") not in (None, torch.preserve_format)
        is_view = op.is_view and (op.name not in _CUT or _leaves_all(op.name, args))
        is_kept = op.name in _LINEAR or op.name in SHAPE_ONLY or is_view
        tensors = list(flat((*args, *kwargs.values())))
        # A square, as x * x.
        is_kept &= op.name != "mul" or len({*map(address_of, tensors)}) == len(tensors)
        if is_kept and not turns:
            return
        goes_on = op.is_pointwise or op.name in _GO_ON or op.name in _BESIDE
        goes_on |= _is_per_position(op, args, kwargs)
        for place, tensor in enumerate(tensors):
            if self.number(tensor) is not None and not (is_kept and self.as_added(tensor) is tensor):
                on_sum(tensor, op.name, place, goes_on)

    def follow(
        self,
        op: Operator,
        args: tuple[Any, ...],
        reads: Sequence[Tensor],
        known: Sequence[frozenset[str]],
        out: Any,
    ) -> None:
        """Note whether an operator gave a sum of what labels stand for, or went on with one alone."""
        data = [(address_of(t), of) for t, of in zip(reads, known, strict=False) if of]
        # A norm that is written out multiplies a sum by what it made of this one alone.
        alone = len({of for _, of in data}) == 1
        goes_on = alone and (op.is_pointwise or op.name in _GO_ON)
        before = [self._sums[address] for address, _ in data if address in self._sums]
        is_sum = goes_on and bool(before)
        is_same = is_sum and op.name in _BY_NUMBERS and all(t.numel() < 2 for t in reads[1:])
        is_sum |= op.name in _ADD and len(data) == 2 and bool(known[0])
        if op.name in ("sum", "mean"):
            # Of what was stacked, or written side by side, along one axis.
            is_sum = args[0].ndim == out.ndim + 1 and any(len(of) > 1 for _, of in data)
        for written in flat([out]):
            if is_sum and is_all_of_memory(written) and (address := address_of(written)):
                self._sums[address] = before[0] if is_same else next(self._numbers)
                if has_places(written):
                    self._views[address] = view_of_memory(written)
                self._keep(written)
                # Of what a norm gives beside, nothing goes on.
                break
            if op.written:
                self._sums.pop(address_of(written), None)


def _is_per_position(op: Operator, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Check whether an operator gives numbers by position, as norms divide what they are of by."""
    arguments = (argument.name for argument in op.func._schema.arguments) if op.func else ()
    named = dict(zip(arguments, args, strict=False)) | kwargs
    dims, tensor = named.get("dim"), args[0] if args else None
    if not (named.get("keepdim") and isinstance(tensor, Tensor)):
        return False
    axes = [axis % tensor.ndim for axis in ([dims] if isinstance(dims, int) else dims or ())]
    # Channels come last, but for those of images.
    return axes == [tensor.ndim - 1] or (axes == [1] and tensor.ndim > 3)


def _leaves_all(name: str, args: tuple[Any, ...]) -> bool:
    """Check whether a slice is one of everything, as older torch makes of `:` beside other indices."""
    if name != "slice":
        return False
    given: list[Any] = [*args, *(0, None, None, 1)[len(args) - 1 :]]
    tensor, axis, start, end, step = given
    return bool(not start and step == 1 and (end is None or end >= tensor.shape[axis]))
