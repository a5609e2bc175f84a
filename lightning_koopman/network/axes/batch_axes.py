"""Follows where the first axes of the batch's tensors are in what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_koopman.network.operators import DISTANCES, PRODUCTS, PUTS, Operator
from lightning_koopman.network.tensors import address_of, all_tensors, is_all_of_memory

_PICKS = frozenset({"flip", "gather", "index_select", "roll", "sort", "topk"})


class Place(NamedTuple):
    """Where an axis of the batch is.

    Attributes:
        axis: Of the tensor.
        inner: How many entries further along it the next entry is, where axes were merged; else 1.
    """

    axis: int
    inner: int = 1


class BatchAxes:
    """Where the first axis of the batch's tensors is, and the second where both are of one size.

    It is known by the distance of its entries in memory, as views share it. What no rule tells is not
    known, and what several tensors tell otherwise, as values of pairs of samples do, is not either.

    Args:
        keep: Called with each tensor of which something is known, so that its address is not given to
            another.

    Attributes:
        is_square: Whether a tensor of the batch has as many entries along the second axis as along the
            first.
    """

    def __init__(self, keep: Callable[[Tensor], None]) -> None:
        self._keep = keep
        self.is_square = False
        self._sizes: dict[int, int] = {}
        self._steps: dict[int, dict[int, int]] = {}
        # Where the batch's tensors begin in their memory.
        self._begin: dict[int, int | None] = {}

    def begin_at(self, tensor: Tensor, axis: int) -> None:
        """Follow one axis of one tensor, in place of the first axes of the batch's tensors."""
        self._sizes = {0: tensor.shape[axis]}
        if address_of(tensor):
            self._set(tensor, {0: _step(tensor, Place(axis))}, is_part=True)

    def begin(self, tensors: Sequence[Tensor]) -> None:
        """Let these be the batch's tensors."""
        tensors = [t for t in tensors if address_of(t) and not t.is_nested and t.ndim]
        if not tensors:
            return
        size = tensors[0].shape[0]
        tensors = [tensor for tensor in tensors if tensor.shape[0] == size]
        self.is_square = any(tensor.shape[1:2] == (size,) for tensor in tensors)
        self._sizes = dict.fromkeys(range(2), size)
        for tensor in tensors:
            # What has one axis of this size has the samples there, whichever of two they are in others.
            second = 1 if tensor.shape[1:2] == (size,) else 0
            steps = {0: _step(tensor, Place(0)), 1: _step(tensor, Place(second))}
            self._set(tensor, steps, is_part=True)
            address, begin = address_of(tensor), int(tensor.storage_offset()) * tensor.element_size()
            # Of windows of one series, nobody knows which one a view is of.
            self._begin[address] = begin if self._begin.get(address, begin) == begin else None

    def find(self, tensor: Tensor, which: int) -> Place | None:
        """Find an axis of the batch in a tensor."""
        steps = {} if tensor.is_nested else self._steps.get(address_of(tensor), {})
        return _place(tensor, steps.get(which, 0))

    def tell(self, tensor: Tensor, axis: int, which: int) -> None:
        """Let an axis be one of the batch, if it is not known which one is."""
        if self.find(tensor, which) is None and address_of(tensor) and is_all_of_memory(tensor):
            step = _step(tensor, Place(axis))
            self._set(tensor, {**self._steps.get(address_of(tensor), {}), which: step}, is_part=False)

    def size(self, which: int) -> int:
        """Return how many entries an axis of the batch has."""
        return self._sizes.get(which, 0)

    def entries(self, tensor: Tensor, which: int) -> Tensor | None:
        """Return along an axis of the batch the place of each entry of a tensor, if memory tells it."""
        place, count = self.find(tensor, which), self.size(which)
        if place is None:
            return None
        step, width = _step(tensor, place), tensor.element_size()
        is_whole = tensor.untyped_storage().nbytes() % (step * count) == 0
        begin = self._begin.get(address_of(tensor), 0 if is_whole else None)
        if begin is None:
            # A part of some samples, nobody knows which.
            return None
        first = int(tensor.storage_offset()) * width - begin
        found, inner = torch.full([1] * tensor.ndim, first, device=tensor.device), first % step
        for stride, axis in sorted((stride, axis) for axis, stride in enumerate(tensor.stride())):
            reach = stride * width * (tensor.shape[axis] - 1)
            if inner + reach < step:
                # All are of one entry of the axis.
                inner += reach
                continue
            places = torch.arange(tensor.shape[axis], device=tensor.device) * stride * width
            found = found + places.view(-1, *[1] * (tensor.ndim - axis - 1))
        return (found // step % count).expand(tensor.shape)

    def is_along(self, tensor: Tensor, axis: int, which: int) -> bool | None:
        """Tell whether a tensor's axis is one of the batch, or known to be another of that size."""
        place, size = self.find(tensor, which), tensor.shape[axis]
        if place is None:
            other = self.find(tensor, 1 - which) == (axis, 1)
            return False if other and size == self._sizes[which] else None
        if place.inner > 1 or (place.axis == axis and size > self._sizes[which]):
            return None
        return place.axis == axis

    def follow(self, op: Operator, args: Sequence[Any], reads: Sequence[Tensor], out: Any) -> None:
        """Pass on what is known from what an operator read to what it wrote."""
        if not self._steps:
            return
        known = [
            (read, steps)
            for read in reads
            if (steps := self._steps.get(address_of(read))) and not read.is_nested
        ]
        addresses = {address_of(read) for read in reads}
        if not known and not op.written:
            return
        rule: _Rule | None = None
        for tensor in [out] if isinstance(out, Tensor) else all_tensors(out):
            address = address_of(tensor)
            if address and not tensor.is_nested and (op.written or address not in addresses):
                rule = rule or _Rule(op, args, self._sizes)
                steps = {}
                for which in self._sizes if self.is_square else (0,):
                    found = set[int]()
                    for read, of in known:
                        place = _place(read, of.get(which, 0))
                        axis = None if place is None else rule.axis(read, place, which, tensor)
                        if place is not None and axis is not None:
                            found.add(_step(tensor, Place(axis, place.inner)))
                    if len(found) == 1:
                        steps[which] = found.pop()
                self._set(tensor, steps, is_part=bool(op.written) and not is_all_of_memory(tensor))

    def _set(self, tensor: Tensor, steps: dict[int, int], *, is_part: bool) -> None:
        address = address_of(tensor)
        before = self._steps.get(address, {})
        if is_part:
            unlike = {which for which in before.keys() & steps if before[which] != steps[which]}
            steps = {**before, **steps, **dict.fromkeys(unlike, 0)}
        if steps or before:
            self._steps[address] = steps
            self._keep(tensor)


class _Rule:
    """Tells where an operator leaves an axis of what it reads."""

    def __init__(self, op: Operator, args: Sequence[Any], sizes: dict[int, int]) -> None:
        self._name, self._args, self._sizes = op.name, args, sizes
        self._by_entry = op.is_pointwise or op.name in ("copy", "repeat")
        dims = args[op.dims] if op.dims < len(args) else op.usual_dims
        self._dims: Sequence[int] = [dims] if isinstance(dims, int) else dims or ()

    def axis(self, read: Tensor, place: Place, which: int, out: Tensor) -> int | None:
        """Return the axis of what was written that one of what was read became."""
        axis = self._axis(read, place, which, out)
        return axis if axis is not None and 0 <= axis < out.ndim and out.shape[axis] > 1 else None

    def _axis(self, read: Tensor, place: Place, which: int, out: Tensor) -> int | None:
        axis, name, args, more = place.axis, self._name, self._args, out.ndim - read.ndim
        if name in PRODUCTS:
            left, right = args[PRODUCTS[name] :][:2]
            if read is left or read is right:
                # That of the other matrix is summed over.
                summed = read.ndim - (1 if read is left else 2)
                return None if axis == summed else axis
            return axis + more
        if self._by_entry:
            alike = out.shape[axis + more] == read.shape[axis]
            return axis + more if alike or name == "repeat" else None
        if name == "stack":
            dim = (args[1] if len(args) > 1 else 0) % out.ndim
            return axis + (axis >= dim)
        if name == "embedding":
            return axis if read is args[1] else axis + args[1].ndim - 1 if axis else None
        if name == "index":
            return self._indexed(read, place, which)
        if name == "_pack_padded_sequence":
            is_rows = place == (0 if args[2] else 1, 1) and out.is_floating_point()
            return 0 if is_rows else None
        if "_dot_product_" in name and not (read is args[0] or axis < read.ndim - 2):
            # Keys and values are summed over.
            return None
        if name in DISTANCES or (name == "linear" and axis == read.ndim - 1):
            return None
        dims = {dim % read.ndim for dim in self._dims} if name != "cat" else set[int]()
        if name in _PICKS and axis in dims and not self._is_pure(read, place, which):
            return None
        if not more:
            alike = out.shape[axis] == read.shape[axis]
            return axis if alike or name == "cat" or name in _PICKS or name in PUTS else None
        if more == -len(dims) and axis not in dims:
            return axis - sum(dim < axis for dim in dims)
        return None

    def _is_pure(self, read: Tensor, place: Place, which: int) -> bool:
        """Check whether an axis was merged with no other."""
        return place.inner == 1 and read.shape[place.axis] <= self._sizes[which]

    def _indexed(self, read: Tensor, place: Place, which: int) -> int | None:
        source, given = self._args[:2]
        indices = [(axis, index) for axis, index in enumerate(given) if index is not None]
        if len(indices) != 1:
            return None
        start, index = indices[0]
        is_mask, axis = index.dtype in (torch.bool, torch.uint8), place.axis
        if read is not source:
            return None if is_mask else start + axis
        taken, given_back = (index.ndim, 1) if is_mask else (1, index.ndim)
        if axis < start:
            return axis
        if axis >= start + taken:
            return axis - taken + given_back
        return start if taken == given_back == 1 and self._is_pure(read, place, which) else None


def _step(tensor: Tensor, place: Place) -> int:
    """Return how many bytes further the next entry is."""
    return tensor.stride(place.axis) * tensor.element_size() * place.inner


def _place(tensor: Tensor, step: int) -> Place | None:
    """Find along which axis entries are so far from one another."""
    found, longest = None, 0
    width = tensor.element_size()
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        stride *= width
        if size > 1 and longest <= stride <= step < stride * size and step % stride == 0:
            found = None if stride == longest else Place(axis, step // stride)
            longest = stride
    return found
