"""Tells of which states a tensor holds a single position, where a network goes on with that alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_koopman.network.tensors import address_of, all_tensors, is_all_of_memory


class Pick(NamedTuple):
    """The first or the last of several positions.

    Attributes:
        axis: That the positions were along, of three.
        size: How many there were.
        is_last: Whether it is the last one.
        by_data: Whether a tensor says which one, as of sequences of differing length.
    """

    axis: int
    size: int
    is_last: bool
    by_data: bool


Picks = Mapping[str, Pick]
"""What was picked of states, by their labels; those of which more positions are held are not in."""

NO_PICKS: Picks = MappingProxyType({})


class PickedPositions:
    """What was picked of which states, for all tensors of one pass, by their memory, as views share it.

    Args:
        keep: Called with each tensor of which something is known, so that its address is not given to
            another.
    """

    def __init__(self, keep: Callable[[Tensor], None]) -> None:
        self._keep = keep
        # Views have picks of their own, beside those of all of the memory.
        self._of: dict[int, dict[Any, Picks]] = {}

    def of(self, tensor: Tensor) -> Picks:
        """Return what a tensor holds one position of."""
        if tensor.is_nested or not (known := self._of.get(address_of(tensor))):
            return NO_PICKS
        return known.get(_view(tensor), known.get(None, NO_PICKS))

    def follow(
        self, name: str, args: Sequence[Any], reads: Sequence[Tensor], known: Any, out: Any
    ) -> None:
        """Pass on what was picked from what an operator read, of ``known`` labels, to what it wrote."""
        plain = name.removesuffix("_")
        pick = _picked(plain, args, out)
        if pick is None and not self._of:
            return
        told: Picks
        if pick is not None:
            told = dict.fromkeys(known[0], pick) | dict(self.of(reads[0]))
        else:
            told = self._joined(reads, known)
        places = {address_of(tensor) for tensor in reads}
        for tensor in all_tensors(out):
            address = address_of(tensor)
            if not address or tensor.is_nested or not (told or address in self._of):
                continue
            is_part = address in places if plain == name else not is_all_of_memory(tensor)
            before = self._of.get(address, {}) if is_part else {}
            self._of[address] = {**before, _view(tensor) if is_part else None: told}
            self._keep(tensor)

    def _joined(self, reads: Sequence[Tensor], known: Sequence[frozenset[str]]) -> Picks:
        """Return what was picked of each state, in all that is made of it."""
        picks = [self.of(tensor) for tensor in reads]
        if not any(picks):
            return NO_PICKS
        joined = {}
        for label in frozenset[str]().union(*picks):
            # A state holds still what was picked for it, though its own label took the place of others.
            pairs = zip(picks, known, strict=True)
            found = {of.get(label) for of, labels in pairs if label in labels or label in of}
            if len(found) == 1 and (pick := found.pop()) is not None:
                joined[label] = pick
        return joined


def _picked(name: str, args: Sequence[Any], out: Any) -> Pick | None:
    """Return which position an operator picks of its first argument, if it does."""
    source = args[0] if args else None
    if not (isinstance(source, Tensor) and isinstance(out, Tensor)) or source.is_nested:
        return None
    if source.ndim != 3:
        return None
    axis = place = 0
    if name == "select":
        axis, place = args[1:3]
    elif name == "slice":
        axis = args[1] if len(args) > 1 else 0
        if out.shape[axis] != 1:
            return None
        place = (args[2] if len(args) > 2 else None) or 0
    elif name == "index_select" and args[2].numel() == 1:
        axis, place = args[1], int(args[2])
    elif name == "index":
        *first, index = args[1]
        axis = len(first)
        rows = [each for each in first if each is not None]
        if index is None or index.dtype == torch.bool or index.ndim > 1 or not index.numel():
            return None
        # With a place for each sample, which must be the same for all.
        each = len(rows) == 1 and rows[0].ndim == 1 and len(rows[0]) == len(source)
        if (rows or index.numel() > 1) and not (each and torch.equal(rows[0], _count(source, rows[0]))):
            return None
        if bool((index != index.reshape(-1)[0]).any()):
            return None
        place = int(index.reshape(-1)[0])
    else:
        return None
    size = source.shape[axis]
    if size < 2 or place % size not in (0, size - 1):
        return None
    return Pick(axis % 3, size, place % size == size - 1, name.startswith("index"))


def _count(tensor: Tensor, like: Tensor) -> Tensor:
    return torch.arange(len(tensor), device=like.device, dtype=like.dtype)


def _view(tensor: Tensor) -> tuple[Any, ...]:
    """Tell views of one memory apart."""
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
