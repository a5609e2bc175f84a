"""Follows which axes were merged into the first ones of tensors, as samples and positions are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.network.operators import VIEWS, Operator
from lightning_koopman.network.tensors import address_of

Merges = dict[int, tuple[int, ...]]
"""Which axes were merged into one, outermost first, by its size; none where merges of two kinds met."""


class MergedAxes:
    """Which axes were merged into the first ones of tensors, by their memory, as views share it."""

    def __init__(self, keep: Callable[[Tensor], None]) -> None:
        self._keep = keep
        self._of: dict[int, Merges] = {}

    def __bool__(self) -> bool:
        return bool(self._of)

    def of(self, tensor: Tensor) -> Merges:
        """Return what was merged into first axes of a tensor's memory."""
        return self._of.get(address_of(tensor), {})

    def follow(
        self,
        op: Operator,
        args: Sequence[Any],
        reads: Sequence[Tensor],
        written: Iterable[Tensor],
        out: Any,
        *,
        grows: bool,
    ) -> None:
        """Pass on which axes were merged, to all that an operator has written.

        What does not ``grow`` is put together of the parts of one tensor, to no more than it was.
        """
        merged = self._joined(reads)
        if merged and _picks_rows(op.name, args) and isinstance(out, Tensor) and out.ndim:
            merged[out.shape[0]] = ()
        axes = _merged_axes(op.name, args, out) if grows and isinstance(out, Tensor) else ()
        for tensor in written if self._of else ():
            self._set(tensor, merged)
        if axes:
            # What was read may be merged itself.
            place = 1 if axes[0] < 0 else 0
            inner = merged.get(axes[place]) or axes[place : place + 1]
            self._set(out, {**merged, out.shape[0]: (*axes[:place], *inner, *axes[place + 1 :])})

    def _joined(self, reads: Iterable[Tensor]) -> Merges:
        found: Merges = {}
        for tensor in reads if self._of else ():
            for size, axes in self.of(tensor).items():
                # Rows that were picked say nothing of how those beside them came about.
                before = found.get(size) or axes
                found[size] = before if axes in ((), before) else ()
        return found

    def _set(self, tensor: Tensor, merged: Merges) -> None:
        if (address := address_of(tensor)) and (merged or address in self._of):
            if address not in self._of:
                self._keep(tensor)
            self._of[address] = merged


def _picks_rows(name: str, args: Sequence[Any]) -> bool:
    """Check whether an operator takes rows in an order of its own."""
    if name == "index_select":
        return args[1] in (0, -args[0].ndim)
    index = args[1][0] if name == "index" and args[1] else None
    if index is None:
        return False
    # Neighbours that are named for each row are in its place.
    return bool(index.dtype == torch.bool or index.numel() == max(index.shape, default=1))


def _merged_axes(name: str, args: Sequence[Any], out: Tensor) -> tuple[int, ...]:
    """Return the axes that an operator merged into the first one of what it gave, outermost first.

    How often it repeated one is negative, for that is no axis of samples.
    """
    if not args or out.is_nested or not out.ndim:
        return ()
    if name == "cat":
        dim = args[1] if len(args) > 1 else 0
        sizes = {part.shape[0] if part.ndim == out.ndim else 0 for part in args[0]}
        stacked = dim in (0, -out.ndim) and len(sizes) == 1 and 0 not in sizes and len(args[0]) > 1
        return (-len(args[0]), *sizes) if stacked else ()
    if name == "repeat":
        alike = len(args[1]) == args[0].ndim and args[1][0] > 1 and args[0].shape[0] > 1
        return (-args[1][0], args[0].shape[0]) if alike else ()
    if name not in VIEWS or args[0].is_nested:
        return ()
    # Entries are read one after the other, so an axis may also be merged in part.
    axes, left = list[int](), out.shape[0]
    for size in args[0].shape:
        axes.append(math.gcd(size, left))
        left //= max(1, axes[-1])
        if axes[-1] != size or left <= 1:
            break
    axes = [size for size in axes if size > 1]
    return tuple(axes) if left == 1 and len(axes) > 1 else ()
