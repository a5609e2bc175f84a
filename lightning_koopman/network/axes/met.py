"""Follows where rows meet that axes were merged into, as positions of one sample do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.network.axes.batch_axes import BatchAxes
from lightning_koopman.network.axes.moves import MOVES, SUMS, adds_up
from lightning_koopman.network.axes.order import (
    MET,
    NO_ORDERS,
    ROW,
    Order,
    Orders,
    are_different,
    places_like,
)
from lightning_koopman.network.operators import COPIES, PRODUCTS, PUTS, Operator
from lightning_koopman.network.tensors import address_of, all_tensors, view_of_memory

_COPIES = COPIES | {"copy"}


class MetRows:
    """How many rows were merged of several axes, of which some met, for all tensors of one pass.

    Args:
        orders: Returns the orders of a tensor's rows.
        merges: Tells which axes were merged into first ones of a tensor's memory, by their sizes.
        axes: Tells where samples are in tensors, as far as that is known.
        keep: Called with each tensor of which something is known, so that its address is not given to
            another.
    """

    def __init__(
        self,
        orders: Callable[[Tensor], Orders],
        merges: Callable[[Tensor], Mapping[int, tuple[int, ...]]],
        axes: BatchAxes,
        keep: Callable[[Tensor], None],
    ) -> None:
        self._orders, self._merges, self._axes, self._keep = orders, merges, axes, keep
        self._of: dict[int, frozenset[int]] = {}

    def of(self, tensor: Tensor) -> Orders:
        """Return in the form of an order which numbers of rows met before."""
        met = self._of.get(address_of(tensor))
        rows = torch.tensor(sorted(met), device="cpu") if met else None
        return NO_ORDERS if rows is None else {MET: Order(rows, 0, moved=False)}

    def follow(self, op: Operator, args: Sequence[Any], reads: Sequence[Tensor], out: Any) -> None:
        """Pass on which rows met, and note those that an operator lets meet."""
        if any(tensor.is_nested for tensor in reads):
            return
        places = {address_of(tensor) for tensor in reads}
        made = [t for t in all_tensors(out) if address_of(t)]
        if not op.is_in_place:
            made = [t for t in made if address_of(t) not in places]
        if not made:
            return
        met = frozenset[int]().union(*(self._of.get(place, ()) for place in places))
        for tensor in reads if op.name not in _COPIES else ():
            split = {size for size in self._known_merges(tensor) if self._is_split(tensor, size)}
            # Where samples go that are but moved is told.
            split -= {self._axes.size(0)} if op.name in MOVES else set()
            if split and op.is_pointwise and made[0].numel() == tensor.numel():
                same = (other for other in reads if address_of(other) == address_of(tensor))
                if all(view_of_memory(other) == view_of_memory(tensor) for other in same):
                    continue
            met |= split
        source = _added_up(op.name, args)
        if source is not None and op.name in (PUTS | SUMS) and (merges := self._merges(source)):
            met |= set() if self._goes_back(op.name, args) else {*merges}
        elif source is not None and source.ndim:
            met |= {len(source)} & self._known_merges(source)
        for tensor in made:
            if met or address_of(tensor) in self._of:
                self._of[address_of(tensor)] = met
                self._keep(tensor)

    def _goes_back(self, name: str, args: Sequence[Any]) -> bool:
        """Check whether rows are put where they were taken from, as those of experts are."""
        target, index, source = args[0], *args[1 if name == "index_put" else 2 :][:2]
        indices = all_tensors(index)
        places = _whole_rows(indices[0]) if len(indices) == 1 else None
        if places is None or not source.ndim or len(places) != len(source):
            return False
        plain = Order(places_like(len(places), source), len(places))
        order = self._orders(source).get(len(places), plain)
        alike = order.base == len(target) and torch.equal(order.rows.to(places), places)
        return alike and are_different(places)

    def _known_merges(self, tensor: Tensor) -> set[int]:
        """Return numbers of rows that are known to be merged of several axes."""
        merges = self._merges(tensor).items()
        return {size for size, axes in merges if sum(abs(length) > 1 for length in axes) > 1}

    def _is_split(self, tensor: Tensor, size: int) -> bool:
        """Check whether rows of some number are along several axes of a tensor, and are not a part."""
        if not tensor.ndim or any(length % size == 0 for length in tensor.shape):
            return False
        held = tensor.untyped_storage().nbytes() // tensor.element_size()
        if all(count < size or count % size for count in (tensor.numel(), held)):
            # Such as a mean over all rows.
            return False
        known = self._orders(tensor)
        order = known.get(ROW, known.get(len(tensor)))
        return order is None or order.base != size


def _added_up(name: str, args: Sequence[Any]) -> Tensor | None:
    """Return what an operator adds up rows of, or takes some of more than once, if it does."""
    found: Any = None
    if name in PRODUCTS:
        right = args[PRODUCTS[name] + 1]
        found = right if right.ndim == 2 else None
    elif adds_up(name, args):
        found = args[2 if name == "index_put" else 3]
    elif name in ("index", "index_select") and args[0].ndim:
        by_name = name == "index_select"
        indices = [args[2]] if by_name else all_tensors(args[1])
        is_first = args[1] in (0, -args[0].ndim) if by_name else args[1][0] is not None
        if len(indices) == 1 and is_first and indices[0].ndim:
            index = indices[0]
            is_mask = index.dtype in (torch.bool, torch.uint8)
            once = index.ndim == 1 if is_mask else index.numel() == max(index.shape)
            found = None if once and (is_mask or are_different(index.flatten())) else args[0]
    return found if isinstance(found, Tensor) else None


def _whole_rows(index: Tensor) -> Tensor | None:
    """Return the rows that an index with an entry for each value names, if it names whole ones."""
    if index.ndim < 2:
        return index.reshape(-1)
    rows = index.flatten(1)
    alike = rows.shape[1] > 0 and bool((rows == rows[:, :1]).all())
    return rows[:, 0] if alike else None
