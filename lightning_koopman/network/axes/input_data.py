"""Tells what the tensors that a component takes hold of a batch: all of its data, a part, or a mask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.network.axes.graphs import is_edge_index
from lightning_koopman.network.tensors import all_tensors, has_places, is_real, varies


def is_mask(tensor: Tensor) -> bool:
    """Check whether a tensor holds nothing but 0 and 1, or 0 and what no softmax lets through.

    What it lets through may also be what the network adds, the same for all samples.
    """
    if not tensor.numel() or shuts_out(tensor):
        return True
    low = tensor.amin()
    marks = tensor == torch.where(low < _SHUT_OUT, low, 1)
    if not bool((marks | (tensor == 0)).all()):
        return False
    # A single 1 in each row is a class.
    return tensor.ndim != 2 or tensor.shape[1] < 2 or not bool((tensor.sum(dim=1) == 1).all())


def are_zeros_and_ones(tensor: Tensor) -> bool:
    """Check whether a floating-point tensor holds both numbers, and no other one."""
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    zeros, ones = tensor == 0, tensor == 1
    return bool(zeros.any()) and bool(ones.any()) and bool((zeros | ones).all())


_GATING = frozenset({"mul", "where", "masked_fill", "masked_scatter", "index_put", "_index_put_impl"})
"""Operators that weigh or shut out what they read, by what is beside it."""


def gates(
    operator: str,
    tensor: Tensor,
    states: Sequence[Tensor],
    data: Sequence[Tensor],
    batch: Iterable[Tensor],
    out: Any,
) -> bool:
    """Check whether numbers made of ``data`` weigh or shut out all of a state, and not its positions.

    One number per sample does, and one per unit or channel, if no sequence of the batch is as long and
    no softmax shuts out what is put in.
    """
    known = (tensor, *states, *data)
    if operator not in _GATING or any(t.is_nested or not t.ndim for t in known):
        return False
    count = len(data[0])
    if any(len(t) != count or t.numel() > tensor.numel() for t in data):
        return False
    if tensor.numel() == count:
        return True
    n_axes = max((t.ndim for t in states), default=0)
    # Of states with positions, units are along the last axis, and channels of images along the second.
    axis = 1 if n_axes != 3 else 2
    is_by_unit = tensor.ndim == n_axes and tensor.shape[axis] * count == tensor.numel()
    if not is_by_unit or len(tensor) != count or not isinstance(out, Tensor) or shuts_some_out(out):
        return False
    own = {t.data_ptr() for t in data}
    plain = (t for t in batch if not t.is_nested and t.data_ptr() not in own)
    kept = (t for t in plain if t.ndim > 2 or (t.ndim == 2 and (n_axes > 2 or not is_real(t))))
    return tensor.shape[axis] not in {size for t in kept for size in t.shape[1:]}


def has_positions(tensor: Tensor) -> bool:
    """Check whether a tensor may hold data at several positions of each sample."""
    is_plain = has_places(tensor) and tensor.dtype != torch.bool
    return is_plain and tensor.ndim > 1 and tensor.shape[1] > 1


def shuts_out(tensor: Tensor) -> bool:
    """Check whether samples differ in nothing but in which scores no softmax lets through."""
    if not tensor.is_floating_point() or tensor.is_nested or tensor.ndim < 2 or len(tensor) < 2:
        return False
    out = tensor < _SHUT_OUT
    return shuts_some_out(tensor) and bool((out | (tensor == tensor.amax(dim=0))).all())


def shuts_some_out(tensor: Tensor) -> bool:
    """Check whether there are scores that no softmax lets through."""
    return tensor.is_floating_point() and bool((tensor < _SHUT_OUT).any())


_SHUT_OUT = -1e3
"""What is below this, added to a score, is a mask."""


_TOO_LARGE = 1e15
"""What is beyond this stands for infinity, as in scores that a softmax is to ignore."""


def holds_numbers(tensor: Tensor) -> bool:
    """Check whether all values of a tensor are numbers that can be summed and squared."""
    return bool((tensor.abs() < _TOO_LARGE).all())


def are_alike(other: Tensor, first: Tensor) -> bool:
    """Check whether a tensor may hold data of the same samples as another one, and is no mask."""
    if any(t.is_quantized or not has_places(t) for t in (other, first)):
        return False
    if not other.ndim or other.shape[:1] != first.shape[:1] or not holds_numbers(other):
        return False
    return max(other.ndim, first.ndim) < 3 or not is_mask(other)


def is_integer_data(other: Tensor, first: Tensor) -> bool:
    """Check whether a tensor holds integers that tell samples apart, beside a floating-point one."""
    if is_real(other) or other.dtype == torch.bool or other.is_complex() or first.is_nested:
        return False
    if not other.ndim or other.shape[:1] != first.shape[:1] or not varies(other) or is_mask(other):
        return False
    # Positions, and the numbers of graphs that rows belong to, count up; lengths say how far.
    steps = other.diff()
    if bool(((steps == 0) | (steps == 1)).all()) and (other.ndim > 1 or not bool(other[0])):
        return False
    return other.ndim > 1 or first.ndim < 3 or int(other.max()) not in first.shape[1:]


_PROBED = 16
"""Samples by which it is told whether a tensor holds all of another one."""

_SAME = 1e-4
"""Share of the largest value that offsets and factors may leave."""


def holds_all_of(tensor: Tensor, data: Tensor) -> bool:
    """Check whether a tensor is data but for offsets, factors and order, or has them beside others."""
    both = tensor, data
    if not all(t.is_floating_point() and has_places(t) for t in both):
        return True
    if not data.numel() or tensor.shape[:1] != data.shape[:1]:
        return False
    if tensor.numel() != data.numel():
        return _has_beside(tensor, data)
    # A network may move data to a device by itself.
    few = (t[:_PROBED].detach().cpu().double() for t in (data, tensor))
    given, made = (t.reshape(len(t), -1) for t in few)
    rounding = max(_SAME, *(4 * torch.finfo(t.dtype).eps for t in both))
    if torch.equal(given[:2].sort(dim=1).values, made[:2].sort(dim=1).values):
        return True
    if len(given) < 3:
        # Any two samples have a factor for each value, so one must do for all.
        given, made = given.reshape(-1, 1), made.reshape(-1, 1)
    given, made = given - given.mean(dim=0), made - made.mean(dim=0)
    squares = given.square().sum(dim=0)
    factor = (given * made).sum(dim=0) / torch.where(squares > 0, squares, 1.0)
    rest = (made - factor * given).abs().max()
    return bool(rest <= rounding * made.abs().max()) and bool(((factor != 0) | (squares == 0)).all())


def _has_beside(tensor: Tensor, data: Tensor) -> bool:
    """Check whether a tensor has data at some place along an axis, as concatenation puts them."""
    if tensor.ndim != data.ndim:
        return False
    tensor, data = tensor[:2].detach().cpu(), data[:2].detach().to("cpu", tensor.dtype)
    for axis in range(1, data.ndim):
        size, room = data.shape[axis], tensor.shape[axis] - data.shape[axis]
        alike = (
            tensor.shape[:axis] == data.shape[:axis]
            and tensor.shape[axis + 1 :] == data.shape[axis + 1 :]
        )
        if alike and any(torch.equal(tensor.narrow(axis, i, size), data) for i in range(room + 1)):
            return True
    return False


def rows_given(batch: Any) -> int:
    """Count the rows of the first tensor of a batch that has any, of a graph not those of its edges."""
    tensors = [tensor for tensor in all_tensors(batch) if tensor.ndim]
    return next((len(t) for t in tensors if not is_edge_index(t)), len(tensors[0]) if tensors else 0)
