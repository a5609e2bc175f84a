"""Parts of memory, told by views of it: which were taken, what each is made of, what lies in others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_koopman.network.tensors import (
    address_of,
    all_tensors,
    has_places,
    is_real,
    memory_layout,
)


class Coverage:
    """Which parts of some tensors were taken, told by views of their memory."""

    def __init__(self) -> None:
        self._taken: dict[tuple[int, torch.dtype], _Marks] = {}

    def clear(self) -> None:
        """Forget what was taken."""
        self._taken.clear()

    def open(self, whole: Tensor) -> None:
        """Get ready to note which parts of a tensor are taken."""
        if (key := _memory(whole)) is not None:
            self._taken.setdefault(key, _Marks())

    def add(self, part: Tensor) -> None:
        """Note a view as taken."""
        if (key := _memory(part)) is not None:
            self._taken.setdefault(key, _Marks()).of(part)[...] = 1

    def knows(self, part: Tensor) -> bool:
        """Check whether a view is one of a tensor of which parts were taken."""
        return _memory(part) in self._taken

    def misses(self, part: Tensor) -> bool:
        """Check whether there is more in a view than was taken."""
        key = _memory(part)
        return key in self._taken and not bool(self._taken[key].of(part).all())


class LabelsByView:
    """The labels of parts of a memory, told by views of it.

    Attributes:
        held: All labels that any part has, or had.

    Example:
        >>> x = torch.zeros(4, 3)
        >>> labels = LabelsByView(frozenset({"x"}))
        >>> labels.set(x[:, :2], frozenset({"past"}))
        >>> [sorted(labels.of(part)) for part in (x, x[:, 0], x[:, 2])]
        [['past', 'x'], ['past'], ['x']]
    """

    def __init__(self, whole: frozenset[str]) -> None:
        self.held, self._known, self._marks = whole, {whole: 0}, _Marks()

    def of(self, part: Tensor) -> frozenset[str]:
        """Read the labels of a view."""
        if not (has_places(part) and self._marks.may_hold(part)):
            return self.held
        marks, known = self._marks.of(part), [*self._known]
        found = {int(marks.min()), int(marks.max())} if marks.size else set()
        if len(found) > 1:
            found = {*np.flatnonzero(np.bincount(marks.ravel())).tolist()}
        return frozenset[str]().union(*(known[mark] for mark in found))

    def set(self, part: Tensor, labels: frozenset[str]) -> None:
        """Replace the labels of a view."""
        if not labels <= self.held:
            self.held |= labels
        if len(self._known) > np.iinfo(_MARK).max or not self._marks.may_hold(part):
            # Of too many parts, each may be any.
            self._known, self._marks = {self.held: 0}, _Marks()
        else:
            self._marks.of(part)[...] = self._known.setdefault(labels, len(self._known))


_MARK = np.uint16
_MOST_MARKS = 2**24
"""Marks that are kept of one memory, 32 MiB of them."""


class _Marks:
    """A number for each place of a memory, by views; 0 where none was written.

    Places are as long as all views have in common, in bytes: of rows, one number is kept for each.
    """

    def __init__(self) -> None:
        self._unit, self._start, self._values = 0, 0, np.zeros(0, dtype=_MARK)

    def may_hold(self, part: Tensor) -> bool:
        """Check whether the marks of a memory of which this is a view are few enough."""
        if not part.numel():
            return True
        begin, axes, run = memory_layout(part)
        unit = math.gcd(self._unit, begin, run, *(step for _, step in axes))
        return part.untyped_storage().nbytes() <= _MOST_MARKS * unit

    def of(self, part: Tensor) -> np.ndarray:
        """Return the marks of a view, to be read and written."""
        if not part.numel():
            return np.zeros(0, dtype=_MARK)
        begin, axes, run = memory_layout(part)
        unit = math.gcd(self._unit, begin, run, *(step for _, step in axes))
        if (finer := self._unit // unit) > 1:
            self._start, self._values = self._start * finer, self._values.repeat(finer)
        self._unit, begin = unit, begin // unit
        axes = [*((size, step // unit) for size, step in axes), (run // unit, 1)]
        self._make_room(begin, begin + 1 + sum((size - 1) * step for size, step in axes))
        width = self._values.itemsize
        return np.ndarray(
            shape=[size for size, _ in axes],
            dtype=_MARK,
            buffer=self._values,
            offset=(begin - self._start) * width,
            strides=[step * width for _, step in axes],
        )

    def _make_room(self, begin: int, end: int) -> None:
        held = len(self._values)
        start, stop = (self._start, self._start + held) if held else (begin, end)
        # Each time as much again, for loops write one part after the other.
        start = max(0, begin - held) if begin < start else start
        stop = end + held if end > stop else stop
        if stop - start > held:
            values = np.zeros(stop - start, dtype=_MARK)
            before = self._start - start if held else 0
            values[before : before + held] = self._values
            self._start, self._values = start, values


def further_tensors(value: Any, first: Tensor, given: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """Find what a module gives beside the first tensor and does not pass on, and its places.

    Parts of one tensor, such as means and variances, are each one of its own.

    Example:
        >>> x, mask, loss = torch.ones(2, 3), torch.zeros(2), torch.zeros(())
        >>> [place for place, _ in further_tensors((loss, x, mask, 2 * mask, x[:, 0]), x, [mask])]
        [3]
        >>> [place for place, _ in further_tensors((x[:, :2], x[:, 2:]), x[:, :2], [])]
        [1]
    """
    seen: dict[int, list[Tensor]] = {}
    for tensor in (first, *given):
        seen.setdefault(address_of(tensor), []).append(tensor)
    found = []
    for place, tensor in enumerate(filter(is_real, all_tensors(value))):
        held = tensor.ndim and tensor.numel() and not tensor.is_nested and not tensor.is_quantized
        known = seen.setdefault(address_of(tensor), [])
        if held and not (known and _lies_in(tensor, known)):
            known.append(tensor)
            found.append((place, tensor))
    return found


def same_view(part: Tensor, old: Tensor, new: Tensor) -> Tensor | None:
    """Return the part of a tensor that a view is of another one of its shape, if all of it lies there.

    Example:
        >>> x = torch.arange(6.0).view(2, 3)
        >>> same_view(x[:, -1], x, 10 * x).tolist()
        [20.0, 50.0]
    """
    if part is old:
        return new
    if address_of(part) != address_of(old) or part.dtype != old.dtype or not part.numel():
        return None
    if not all(type(t) is Tensor and has_places(t) for t in (part, old)) or not _lies_in(part, [old]):
        return None
    first = part.storage_offset() - old.storage_offset()
    if new.stride() == old.stride():
        return new.as_strided(part.size(), part.stride(), new.storage_offset() + first)
    places = torch.empty(_span(old), dtype=torch.int64, device=old.device)
    numbers = torch.arange(old.numel(), device=old.device).view(old.shape)
    places.as_strided(old.size(), old.stride()).copy_(numbers)
    return new.reshape(-1)[places.as_strided(part.size(), part.stride(), first)]


def _lies_in(part: Tensor, others: Iterable[Tensor]) -> bool:
    """Check whether all of a view is in others of the same memory; it is, where that takes too long."""
    marks, others = _Marks(), list(others)
    if not all(address_of(t) and has_places(t) and marks.may_hold(t) for t in (*others, part)):
        return True
    for other in others:
        marks.of(other)[...] = 1
    return bool(marks.of(part).all())


def _span(tensor: Tensor) -> int:
    """Return how many places of memory lie between the first and the last value of a tensor."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * step for size, step in pairs) if tensor.numel() else 0


def _memory(tensor: Tensor) -> tuple[int, torch.dtype] | None:
    """Tell the memory of a tensor from others'; nothing where it has none of its own."""
    if not has_places(tensor):
        return None
    memory, end = tensor.untyped_storage(), tensor.storage_offset() + _span(tensor)
    return (memory._cdata, tensor.dtype) if end * tensor.element_size() <= memory.nbytes() else None
