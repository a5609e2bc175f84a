"""Tells which sample each row of a tensor is of, where a network puts rows in another order."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.network.axes.batch_axes import BatchAxes
from lightning_koopman.network.axes.moves import MOVES, may_move_samples, move, rows_along, values_moved
from lightning_koopman.network.axes.order import (
    MET,
    NO_ORDERS,
    ROW,
    Order,
    Orders,
    agreed,
    are_different,
    in_one,
    places_like,
    same,
    without,
)
from lightning_koopman.network.operators import COPIES, PRODUCTS, PUTS, VIEWS, Operator
from lightning_koopman.network.tensors import (
    address_of,
    all_tensors,
    dense,
    is_all_of_memory,
    view_of_memory,
)

_SLICES = frozenset({"slice", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"})
_ADDS = frozenset({"index_add", "index_reduce", "scatter_add", "scatter_reduce"})
_PUTS = PUTS | _ADDS
_SCANS = frozenset({"cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"})
_COPIES = COPIES | {"copy"}


class RowOrders:
    """The orders of rows of all tensors of one pass, by their memory, as views share it.

    Rows are told along the axis of the samples, or the first one where that is not known; those that
    are picked or put somewhere also along the second of three. Of operators that move entries in other
    ways, the numbers of rows are moved instead, see :mod:`.moves`. What is not told apart (neighbours of
    each row that are picked or put one by one) counts as in order.

    Args:
        is_data: Tells whether a tensor is made of the batch.
        is_fixed: Tells whether an index is the same for every batch of this size.
        merges: Tells which axes were merged into first ones of a tensor's memory, by their sizes.
        axes: Tells where samples are in tensors, as far as that is known.
        which: By which axis of the batch's tensors samples are told.
        keep: Called with each tensor that has orders, so that its address is not given to another.

    Attributes:
        is_whole_again: Whether the last operator put together the parts of one tensor.
    """

    is_whole_again = False

    def __init__(
        self,
        is_data: Callable[[Tensor], bool],
        is_fixed: Callable[[Tensor], bool],
        merges: Callable[[Tensor], Mapping[int, tuple[int, ...]]],
        axes: BatchAxes,
        which: int,
        keep: Callable[[Tensor], None],
    ) -> None:
        self._is_data, self._is_fixed, self._merges, self._keep = is_data, is_fixed, merges, keep
        self._axes, self._which = axes, which
        # Views that are slices have orders of their own, beside those of all of the memory.
        self._of: dict[int, dict[Any, Orders]] = {}
        self._met: dict[int, frozenset[int]] = {}

    def of(self, tensor: Tensor) -> Orders:
        """Return the orders of a tensor's rows."""
        if tensor.is_nested or not (known := self._of.get(address_of(tensor))):
            return NO_ORDERS
        return known.get(view_of_memory(tensor), known.get(None, NO_ORDERS))

    def told(self, tensor: Tensor) -> Orders:
        """Return the orders of a tensor's rows, and which rows that axes were merged into met before."""
        known = self.of(tensor)
        if not (met := self._met.get(address_of(tensor))):
            return known
        return {**known, MET: Order(torch.tensor(sorted(met), device="cpu"), 0, moved=False)}

    def begin(self, tensor: Tensor) -> None:
        """Let rows of samples that were drawn, some of them again, count as those of a batch."""
        orders = self.of(tensor)
        drawn = [s for s, o in orders.items() if o.is_of_all and not are_different(o.filled())]
        if drawn:
            self._of[address_of(tensor)] = {None: {s: orders[s] for s in orders.keys() - {*drawn}}}

    def _is_along(self, tensor: Tensor, axis: int) -> bool | None:
        """Tell whether samples are along an axis and no other one, ``None`` where this is not known."""
        is_along = self._axes.is_along(tensor, axis, self._which)
        return is_along and not self._is_part(tensor, axis)

    def _is_part(self, tensor: Tensor, axis: int) -> bool:
        """Check whether samples are along this axis and another one, as if they were cut into parts."""
        if self._axes.find(tensor, self._which) != (axis, 1):
            return False
        size, stride = tensor.shape[axis], tensor.stride(axis)
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        is_cut = size < self._axes.size(self._which) and (size * stride) in (
            step for count, step in steps if count > 1
        )
        return is_cut and self._axes.entries(tensor, self._which) is not None

    def follow(
        self, op: Operator, args: Sequence[Any], reads: Sequence[Tensor], out: Any
    ) -> Sequence[Tensor]:
        """Pass orders on from what an operator read to what it wrote.

        Returned are indices that put all rows in another order: nothing is made of their values. What
        takes some rows may treat these otherwise than others.
        """
        self._indices: list[Tensor] = []
        self.is_whole_again = False
        if any(tensor.is_nested for tensor in reads):
            return ()
        found = self._multiplied(op.name, args, out)
        if found is None and not all(map(address_of, reads)):
            return ()
        found = self._changed(op.name, args, out) if found is None else found
        found = self._moved(op, args, out) if found is None else found
        if found is None:
            if not self._of:
                return ()
            joined = self._joined(reads)
            found = [(tensor, joined) for tensor in all_tensors(out)]
        places = {address_of(tensor) for tensor in reads}
        for tensor, orders in found:
            written = op.is_in_place or address_of(tensor) not in places
            self._set(tensor, orders, is_view=not written)
        return self._indices

    def follow_met(self, op: Operator, args: Sequence[Any], reads: Sequence[Tensor], out: Any) -> None:
        """Remember where rows meet that axes were merged into, as positions of a sample do."""
        if any(tensor.is_nested for tensor in reads):
            return
        places = {address_of(tensor) for tensor in reads}
        made = [t for t in all_tensors(out) if address_of(t)]
        if not op.is_in_place:
            made = [t for t in made if address_of(t) not in places]
        if not made:
            return
        met = frozenset[int]().union(*(self._met.get(place, ()) for place in places))
        for tensor in reads if op.name not in _COPIES else ():
            split = {size for size in self._known_merges(tensor) if self._is_split(tensor, size)}
            # Where samples go that are but moved is told.
            split -= {self._axes.size(self._which)} if op.name in MOVES else set()
            if split and op.is_pointwise and made[0].numel() == tensor.numel():
                same = (other for other in reads if address_of(other) == address_of(tensor))
                if all(view_of_memory(other) == view_of_memory(tensor) for other in same):
                    continue
            met |= split
        source = self._added_up(op.name, args)
        if source is not None and op.name in _PUTS and (merges := self._merges(source)):
            met |= set() if self._goes_back(op.name, args) else {*merges}
        elif source is not None and source.ndim:
            met |= {len(source)} & self._known_merges(source)
        for tensor in made:
            if met or address_of(tensor) in self._met:
                self._met[address_of(tensor)] = met
                self._keep(tensor)

    def _added_up(self, name: str, args: Sequence[Any]) -> Tensor | None:
        """Return what an operator adds up rows of, or takes some of more than once, if it does."""
        found: Any = None
        if name in PRODUCTS:
            right = args[PRODUCTS[name] + 1]
            found = right if right.ndim == 2 else None
        elif name in _ADDS:
            found = args[3]
        elif name == "index_put":
            found = args[2] if _argument(args, 3, False) else None
        elif name == "index_select" or (name == "index" and len(all_tensors(args[1])) == 1):
            by_name = name == "index_select"
            picked = (self._axis_of_rows(*args[:2]), args[2]) if by_name else self._index_of(*args[:2])
            if picked is not None and picked[0] == 0:
                once = picked[1] is not None and are_different(picked[1])
                found = None if once else args[0]
        return found if isinstance(found, Tensor) else None

    def _goes_back(self, name: str, args: Sequence[Any]) -> bool:
        """Check whether rows are put where they were taken from, as those of experts are."""
        target, index, source = args[0], *args[1 if name == "index_put" else 2 :][:2]
        indices = all_tensors(index)
        places = _rows_of_index(indices[0], 0) if len(indices) == 1 else None
        if places is None or not source.ndim or len(places) != len(source):
            return False
        order = self.of(source).get(len(places), Order(places_like(len(places), source), len(places)))
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
        known = self.of(tensor)
        order = known.get(ROW, known.get(len(tensor)))
        return order is None or order.base != size

    def _set(self, tensor: Tensor, orders: Orders, *, is_view: bool) -> None:
        address = address_of(tensor)
        if not address or tensor.is_nested or (not orders and address not in self._of):
            return
        known = self._of.setdefault(address, {})
        own = known.get(view_of_memory(tensor))
        if is_view or (own is not None and not is_all_of_memory(tensor)):
            if own is not None or not same(orders, known.get(None, NO_ORDERS)):
                known[view_of_memory(tensor)] = orders
        else:
            self._of[address] = {None: orders}
        self._keep(tensor)

    def _changed(self, name: str, args: Sequence[Any], out: Any) -> list[tuple[Tensor, Orders]] | None:
        """Return the orders that an operator made, ``None`` where it leaves rows as they are."""
        if name in _SLICES and args and isinstance(args[0], Tensor):
            return self._sliced(name, args, out)
        if name in ("sort", "topk") and isinstance(out, tuple | list):
            source, (values, index) = args[0], out
            if not source.ndim or source.numel() != len(source):
                return self._compared(name, args, out)
            return [(values, self._taken(source, 0, index.flatten())), (index, NO_ORDERS)]
        if name == "cat":
            return self._put_together(args, out)
        if name in VIEWS:
            return self._viewed(args[0], out)
        if name == "unique_dim" or name in _SCANS:
            return self._compared(name, args, out)
        if name in ("select", "unbind"):
            return self._single(name, args, out)
        if name == "stack":
            return self._stacked(args, out)
        if name == "_pack_padded_sequence":
            return self._packed(args, out)
        if name == "copy":
            return self._copied(args[0], args[1], out)
        if name in _PUTS:
            return self._put(name, args, out)
        if not (isinstance(out, Tensor) and args and isinstance(args[0], Tensor)):
            return None
        picked = self._picked(name, args, out)
        if picked is None:
            return None
        axis, index = picked
        source = args[0]
        if self._is_part(source, axis):
            return None
        if not (self.of(source) or self._is_data(source)):
            # What a table holds is as the numbers are that it is asked for.
            return None
        if index is None:
            return None if name == "index" else [(out, self._scrambled(source, axis, name))]
        indices = all_tensors(args[1:])
        fixed = name not in ("flip", "roll") and all(map(self._is_fixed, indices))
        are_all = len(index) == source.shape[axis] and are_different(index)
        if len(indices) == 1 and self._is_data(source) and are_all:
            self._indices = indices
        return [(out, self._taken(source, axis, index, moved=not fixed))]

    def _viewed(self, source: Tensor, out: Tensor) -> list[tuple[Tensor, Orders]] | None:
        """Return the orders of rows of which several were one along an axis before."""
        known = self.of(source)
        order = known.get(len(source)) if source.ndim else None
        n_rows, size = (len(out) if out.ndim else 0), (len(source) if source.ndim else 0)
        count = self._axes.size(self._which)
        if order is None or n_rows < 2 or n_rows >= size or size % n_rows:
            return None
        if size == count:
            # Memory tells where samples are now.
            self._axes.tell(source, 0, self._which)
            return None
        inner = size // n_rows
        rows, is_own = order.rows.view(n_rows, inner), order.base == size and are_different(order.rows)
        both = [(n_rows, 0, rows.div(inner, rounding_mode="floor") if is_own else rows)]
        # Of two axes of one size, the second are positions.
        if out.ndim > 1 and out.shape[1] == inner != n_rows:
            both.append((inner, 1, torch.where(rows < 0, rows, rows % inner) if is_own else rows))
        found = dict(known)
        for length, axis, numbers in both:
            told = rows_along(numbers + 1, axis)
            after = order._replace(rows=places_like(length, rows), base=length if is_own else order.base)
            if told is not None:
                found.pop(size, None)
                after = after._replace(rows=told - 1)
                if length == count and not is_own:
                    self._axes.tell(out, axis, self._which)
            elif length == count:
                after = after._replace(mixed=True)
            else:
                continue
            if not (after.is_undone if axis == 0 else after.is_own and not after.mixed):
                found[length] = after
        return [(out, found)]

    def _compared(self, name: str, args: Sequence[Any], out: Any) -> list[tuple[Tensor, Orders]] | None:
        """Return the orders where rows are sorted, or added up one behind the other, by columns."""
        source, dim = args[0], _argument(args, 2 if name == "topk" else 1, -1)
        axis = dim % max(1, source.ndim)
        size = source.shape[axis] if source.ndim else 0
        if not size or not (self._is_along(source, axis) or (axis == 0 and size in self.of(source))):
            return None
        if name != "unique_dim":
            return [(tensor, self._scrambled(source, axis, "gather")) for tensor in all_tensors(out)]
        kinds = torch.unique(source, dim=axis, return_inverse=True)[1]
        index = torch.empty(int(kinds.max()) + 1, dtype=torch.long, device=kinds.device)
        index[kinds] = places_like(size, kinds)
        return [(out[0], self._taken(source, axis, index)), *((each, NO_ORDERS) for each in out[1:])]

    def _sliced(self, name: str, args: Sequence[Any], out: Any) -> list[tuple[Tensor, Orders]] | None:
        source, dim = args[0], _argument(args, 1 if name == "slice" else 2, 0)
        axis, parts = self._axis_of_rows(source, dim, or_second=False), all_tensors(out)
        if axis is None:
            return None
        size = source.shape[axis]
        if len(parts) == 1 and parts[0].shape[axis] == size:
            return None
        rows = places_like(size, source)
        if name == "slice":
            bounds = (_argument(args, place, usual) for place, usual in ((2, 0), (3, None), (4, 1)))
            pieces = [rows[slice(*bounds)]]
        else:
            pieces = list(torch.split(rows, [part.shape[axis] for part in parts]))
        return [
            (part, self._taken(source, axis, piece, moved=False))
            for part, piece in zip(parts, pieces, strict=True)
        ]

    def _taken(self, source: Tensor, axis: int, index: Tensor, *, moved: bool = True) -> Orders:
        """Return the orders of rows that were taken along an axis."""
        known, size = self.of(source), source.shape[axis]
        before, is_along = known.get(size), self._is_along(source, axis)
        if is_along is False or (before is None and not self._is_data(source)):
            return known
        index = index.long() % max(1, size)
        merged = self._merges(source).get(size, ()) if axis == 0 else ()
        place, count = self._axes.find(source, self._which), self._axes.size(self._which)
        outer = next((n for n in itertools.accumulate(merged, operator.mul) if n in known), size)
        if before is None and (whole := known.get(outer)) is not None:
            # Of rows that lie one behind the other in those that had been moved before.
            inner = size // outer
            rows = whole.rows[:, None] * inner + places_like(inner, whole.rows)
            before = whole._replace(rows=rows.flatten(), base=whole.base * inner)
        if before is not None:
            order = before._replace(
                rows=before.rows[index.to(before.rows.device)], moved=moved or before.moved
            )
        elif len(merged) == 2 and merged[0] < 0:
            order = Order(index % merged[1], merged[1], moved)
        elif len(index) == count < size and place is not None and place.inner > 1 and axis == place.axis:
            # One of several rows of each sample, as of a class token, or so it seems.
            order = Order(index // place.inner % count, count, moved)
        else:
            order = Order(index, size, moved)
        undone = not order.mixed and order.is_own
        undone = undone and (not order.moved or (before is not None and not before.is_own))
        is_second = axis and source.shape[0] == size and not is_along
        if is_second and not (undone and before is not None):
            # Of two axes of one size, the second are positions, unless it brings rows back.
            return known
        others = {s: o for s, o in known.items() if s not in (size, outer, *merged)}
        if len(index) in others and not (merged or moved):
            # Of packed sequences, that of the samples, in whatever step.
            return others
        return others if undone else {**others, len(index): order}

    def _multiplied(
        self, name: str, args: Sequence[Any], out: Any
    ) -> list[tuple[Tensor, Orders]] | None:
        """Return the orders where a matrix that is multiplied by rows picks them, or adds some up."""
        if name not in PRODUCTS or not isinstance(out, Tensor):
            return None
        left, right = args[PRODUCTS[name] :][:2]
        if left.ndim != right.ndim:
            return None
        for rows, matrix, axis in ((right, left, right.ndim - 2), (left, right, left.ndim - 1)):
            if address_of(rows) == 0 or not self._is_data(rows):
                continue
            size, known = rows.shape[axis], self.of(rows)
            is_along = self._is_along(rows, axis)
            if not (is_along or (is_along is None and size in known)):
                continue
            marks = dense(matrix.detach()) != 0
            marks = marks.flatten(0, -3).any(dim=0) if marks.ndim > 2 else marks
            marks = marks if rows is right else marks.t()
            fixed = self._is_fixed(matrix)
            if bool((marks.sum(dim=1) == 1).all()):
                index, are_ones = marks.int().argmax(dim=1), bool((dense(matrix) <= 1).all())
                is_order = are_ones and len(index) == size and are_different(index)
                self._indices = [matrix] if is_order else []
                if len(index) == self._axes.size(self._which):
                    self._axes.tell(out, axis, self._which)
                return [(out, self._taken(rows, axis, index, moved=not fixed))]
            before = known.get(size) or Order(places_like(size, rows), size, moved=False)
            met = {size: before._replace(mixed=True)} if len(marks) == size else {}
            return [(out, {**without(known, size), **met})]
        return None

    def _moved(self, op: Operator, args: Sequence[Any], out: Any) -> list[tuple[Tensor, Orders]] | None:
        """Return the orders where an operator moves entries otherwise than by an axis of rows."""
        values = values_moved(op, args)
        if not any(
            self._is_data(tensor) and may_move_samples(op, args, tensor, self._axes, self._which)
            for tensor in values
        ):
            return None
        seen, bases = list[tuple[int, Order]](), set[int]()

        def numbers(tensor: Tensor) -> Tensor | None:
            if not self._is_data(tensor):
                return torch.zeros(tensor.shape, device=tensor.device)
            told = self._entries(tensor)
            if told is None:
                return None
            rows, base, order = told
            seen.extend(order)
            bases.add(base)
            return rows.float() + 1

        told = move(op, args, numbers)
        if told is None or len(bases) != 1 or bases == {1}:
            return None
        base = bases.pop()
        others = self._joined(values)
        for size, _ in seen:
            others = without(others, size)
        indices = [t for t in all_tensors(args) if all(t is not value for value in values)]
        fixed = all(map(self._is_fixed, indices))
        orders, found = [order for _, order in seen], list[tuple[Tensor, Orders]]()
        for tensor, each in zip(all_tensors(out), told, strict=True):
            laid = self._laid_out(tensor, each.long() - 1, base, orders, others, fixed=fixed)
            if laid is None:
                return None
            found.append((tensor, laid))
            self._indices = indices if (each > 0).all() and each.numel() == values[0].numel() else []
        return found

    def _entries(self, tensor: Tensor) -> tuple[Tensor, int, list[tuple[int, Order]]] | None:
        """Return which row each entry of a tensor is of, of how many, and the orders that tell."""
        known = self.of(tensor)
        if (row := known.get(ROW)) is not None:
            return row.rows.view([1] * tensor.ndim).expand(tensor.shape), row.base, [(ROW, row)]
        place, count = self._axes.find(tensor, self._which), self._axes.size(self._which)
        axis = 0 if place is None else place.axis
        if not tensor.ndim:
            return None
        size = tensor.shape[axis]
        ends = [1] * (tensor.ndim - axis - 1)
        is_alone = place is None or (place.inner == 1 and not self._is_part(tensor, axis))
        if is_alone and (order := known.get(size)) is not None:
            return order.rows.view(-1, *ends).expand(tensor.shape), order.base, [(size, order)]
        if place is None:
            return places_like(size, tensor).view(-1, *ends).expand(tensor.shape), size, []
        entries = self._axes.entries(tensor, self._which)
        if entries is None or (order := known.get(count)) is None:
            return None if entries is None else (entries, count, [])
        return (order.rows[entries], order.base, [(count, order)]) if order.is_of_all else None

    def _laid_out(
        self,
        tensor: Tensor,
        numbers: Tensor,
        base: int,
        seen: Sequence[Order],
        others: Orders,
        *,
        fixed: bool,
    ) -> Orders | None:
        """Return the orders of what holds entries of some rows, ``None`` where these stay in place."""
        place = self._axes.find(tensor, self._which)
        if not seen and place is not None and base == self._axes.size(self._which):
            entries = self._axes.entries(tensor, self._which)
            if entries is not None and bool(((numbers == entries) | (numbers < 0)).all()):
                return None
        axes = [*range(tensor.ndim)]
        axes.sort(key=lambda axis: place is None or axis != place.axis)
        told = ((axis, rows_along(numbers + 1, axis)) for axis in axes)
        axis, rows = next(((k, each) for k, each in told if each is not None), (0, None))
        if rows is None and tensor.is_contiguous() and tensor.numel() % base == 0:
            rows = rows_along(numbers.reshape(base, -1) + 1, 0)
        moved, mixed = not fixed or any(o.moved for o in seen), any(o.mixed for o in seen)
        if rows is None:
            return {**others, base: Order(places_like(base, numbers), base, moved, mixed=True)}
        is_whole = len(rows) == tensor.shape[axis] == self._axes.size(self._which)
        if is_whole and are_different(rows[rows > 0]):
            self._axes.tell(tensor, axis, self._which)
        order = Order(rows - 1, base, moved, mixed)
        # Where some rows are of none yet, others may be added there.
        undone = not mixed and order.is_own and bool(rows.all())
        undone = undone and (not moved or any(not o.is_own for o in seen))
        return others if undone else {**others, len(rows): order}

    def _scrambled(self, source: Tensor, axis: int, name: str) -> Orders:
        """Return the orders where rows are made of several ones, or of neighbours that are named."""
        size, known = source.shape[axis], self.of(source)
        if self._is_along(source, axis) is False:
            return known
        others = without(known, size)
        if name != "gather" or not (size in known or self._is_data(source)):
            return others
        return {**others, size: Order(places_like(size, source), size, mixed=True)}

    def _put_together(self, args: Sequence[Any], out: Tensor) -> list[tuple[Tensor, Orders]] | None:
        parts = [part for part in args[0] if part.ndim == out.ndim]
        axis = self._axis_of_rows(out, _argument(args, 1, 0))
        if axis is None or not self._of or self._is_along(out, axis) is False:
            return None
        known = [
            of.get(part.shape[axis], of.get(ROW) if part.shape[axis] == 1 else None)
            for part, of in ((part, self.of(part)) for part in parts)
        ]
        if not any(order is not None for order in known):
            return None
        rows, bases = [], set()
        for part, order in zip(parts, known, strict=True):
            if order is not None:
                rows.append(order.rows)
                bases.add(order.base)
            elif self._is_data(part):
                rows.append(places_like(part.shape[axis], part))
                bases |= {part.shape[axis]} if part.shape[axis] else set()
            else:
                rows.append(torch.full_like(places_like(part.shape[axis], part), -1))
        sizes = {part.shape[axis] for part in parts}
        # Steps of packed sequences have that of the samples, too.
        steps = len(sizes) > 1
        others = {
            size: order
            for size, order in self._joined(parts).items()
            if size not in {*sizes, ROW} or (steps and order.is_of_all and not order.mixed)
        }
        if len(bases) != 1:
            return [(out, others)]
        order = in_one(rows, bases.pop(), [order for order in known if order is not None])
        self.is_whole_again = order.is_of_all
        return [(out, others if order.is_undone else {**others, out.shape[axis]: order})]

    def _single(self, name: str, args: Sequence[Any], out: Any) -> list[tuple[Tensor, Orders]] | None:
        """Remember which row a row was."""
        source = args[0]
        axis = self._axis_of_rows(source, _argument(args, 1, 0), or_second=False)
        size = 0 if axis is None else source.shape[axis]
        if axis is None or size < 2 or not self._is_data(source):
            return None
        if self._is_along(source, axis) is False:
            return None
        known, parts = self.of(source), all_tensors(out)
        first = args[2] % size if name == "select" else 0
        before = known.get(size) or Order(places_like(size, source), size, moved=False)
        return [
            (part, {**without(known, size), ROW: before._replace(rows=before.rows[i : i + 1])})
            for i, part in enumerate(parts, start=first)
        ]

    def _stacked(self, args: Sequence[Any], out: Tensor) -> list[tuple[Tensor, Orders]] | None:
        """Put single rows together, along whatever axis."""
        known = [self.of(part).get(ROW) for part in args[0]]
        rows = [order for order in known if order is not None]
        others = without(self._joined(args[0]), ROW)
        alike = len(rows) == len(known) and len({order.base for order in rows}) == 1
        if not alike:
            return [(out, others)] if rows else None
        order = in_one([each.rows for each in rows], rows[0].base, rows)
        return [(out, others if order.is_undone else {**others, len(rows): order})]

    def _packed(self, args: Sequence[Any], out: Any) -> list[tuple[Tensor, Orders]]:
        source, (data, sizes) = args[0], out
        n_samples = source.shape[0 if args[2] else 1]
        known = self.of(source)
        before = known.get(n_samples)
        if before is None and not self._is_data(source):
            return [(data, known)]
        steps = torch.cat([torch.arange(size, device=source.device) for size in sizes.tolist()])
        order = Order(steps, n_samples, moved=False)
        if before is not None:
            order = before._replace(rows=before.rows[steps.to(before.rows.device)])
        return [(data, {len(steps): order} | dict(known))]

    def _copied(self, target: Tensor, source: Tensor, out: Tensor) -> list[tuple[Tensor, Orders]] | None:
        if is_all_of_memory(target):
            return [(out, self._joined([source]))]
        size, known = target.shape[0] if target.ndim else 0, self.of(source)
        order, row = known.get(size), target[:1] if size else target
        if ROW in known and target.is_contiguous():
            order, size, row = known[ROW], 1, target
        width, step = row.numel(), target.stride(0) if size > 1 else 0
        if order is None or source.ndim != target.ndim or not width or not row.is_contiguous():
            return None
        whole = target.untyped_storage().nbytes() // target.element_size() // width
        # One of several positions of all rows lies in memory as every other row does.
        if step > width and (step % width or whole != order.base):
            return None
        before = self._of.get(address_of(target), {}).get(None, NO_ORDERS)
        places = (target.storage_offset() + step * places_like(size, target)) // width
        rows = self._placed(before, whole, self._is_data(target), places, order, adds=False)
        self._of[address_of(target)] = {None: rows}
        self._keep(target)
        return []

    def _put(self, name: str, args: Sequence[Any], out: Any) -> list[tuple[Tensor, Orders]] | None:
        """Return the orders of what rows were put into."""
        target, source = args[0], args[2 if name == "index_put" else 3]
        if not isinstance(source, Tensor):
            return None
        if name == "index_put":
            indices, adds = all_tensors(args[1]), bool(_argument(args, 3, False))
            found = self._index_of(target, args[1], source) if len(indices) == 1 else None
            axis, places = (None, None) if found is None else found
        else:
            indices, adds = [args[2]], name in _ADDS
            axis = self._axis_of_rows(target, args[1], beside=source)
            places = None if axis is None else _rows_of_index(args[2], axis)
        if axis is None or places is None:
            return None
        if self._is_along(target, axis) is False:
            return [(out, self._joined([target, source]))]
        known, order = self.of(source), None
        if source.ndim == target.ndim and source.shape[axis] == len(places):
            plain = Order(places_like(len(places), source), len(places), moved=False)
            order = known.get(len(places), plain)
        elif len(places) == 1 and source.ndim == target.ndim - 1:
            # Torch leaves out the axis of a single row.
            order = known.get(1, known.get(ROW))
        if order is None or not self._is_data(source):
            return [(out, self.of(target))]
        fixed = all(map(self._is_fixed, indices))
        if len(places) == target.shape[axis] and are_different(places):
            self._indices = indices
        known = self._placed(
            {**without(without(known, len(places)), ROW), **self.of(target)},
            target.shape[axis],
            self._is_data(target),
            places,
            order._replace(moved=order.moved or not fixed),
            adds=adds,
            undoes=not fixed,
        )
        return [(out, known)]

    def _placed(
        self,
        known: Orders,
        size: int,
        is_data: bool,
        places: Tensor,
        order: Order,
        *,
        adds: bool,
        undoes: bool = False,
    ) -> Orders:
        """Return orders where rows of a known order were put into some places."""
        before = known.get(size)
        if before is None and is_data:
            before = Order(places_like(size, order.rows), size, moved=False)
        places = places.long().to(order.rows.device) % max(1, size)
        if len(places) > size or not are_different(places):
            # Sums over several rows, as over neighbours, are of the row that they are put into.
            return known
        if before is not None and before.base != order.base:
            return known
        rows = torch.full((size,), -1, device=order.rows.device)
        rows = rows if before is None else before.rows.to(rows).clone()
        old = rows[places]
        mixed = adds and bool(((old >= 0) & (old != order.rows)).any())
        if not mixed:
            rows[places] = order.rows
        moved = order.moved or (before is not None and before.moved)
        mixed = mixed or order.mixed or (before is not None and before.mixed)
        after = Order(rows, order.base, moved, mixed)
        if not mixed and after.is_own and (not after.moved or (undoes and not order.is_own)):
            return without(known, size)
        return {**known, size: after}

    def _axis_of_rows(
        self, tensor: Tensor, dim: int, *, or_second: bool = True, beside: Tensor | None = None
    ) -> int | None:
        """Return an axis along which rows are told, if it is one; what is put there may tell, too."""
        axis = dim % max(1, tensor.ndim)
        if axis == 0 or (or_second and axis == 1 and tensor.ndim == 3):
            return axis if tensor.ndim else None
        for told in (tensor, beside):
            if told is not None and told.ndim == tensor.ndim:
                is_along = self._is_along(told, axis)
                if is_along or (is_along is None and told.shape[axis] in self.of(told)):
                    return axis
        return None

    def _picked(self, name: str, args: Sequence[Any], out: Tensor) -> tuple[int, Tensor | None] | None:
        """Return the axis along which an operator takes rows, and which; no index if it mixes them."""
        source = args[0]
        if name == "index":
            found = self._index_of(source, args[1])
            if found is None or found[1] is None or len(found[1]) == out.shape[found[0]]:
                return found
            return found[0], None
        if name == "index_select":
            axis = self._axis_of_rows(source, args[1])
            return None if axis is None else (axis, args[2].reshape(-1))
        if name == "gather":
            axis = self._axis_of_rows(source, args[1], or_second=False)
            return None if axis is None else (axis, _rows_of_index(args[2], axis))
        if name == "embedding" and args[1].numel() == max(args[1].shape, default=1):
            return 0, args[1].reshape(-1)
        if name not in ("flip", "roll") or not source.ndim:
            return None
        dims = args[1] if name == "flip" else _argument(args, 2, ())
        if name == "roll" and source.ndim == 1:
            dims = [0]
        for dim, by in zip(dims, args[1], strict=False):
            axis = self._axis_of_rows(source, dim, or_second=False)
            if axis is not None and self._is_along(source, axis) is not False:
                places = places_like(source.shape[axis], source)
                return axis, places.flip(0) if name == "flip" else places.roll(by)
        return None

    def _index_of(
        self, tensor: Tensor, indices: Sequence[Tensor | None], beside: Tensor | None = None
    ) -> tuple[int, Tensor | None] | None:
        """Return the axis of rows that is indexed, and by which rows, if they can be told."""
        first = next((k for k, index in enumerate(indices) if index is not None), None)
        axis = None if first is None else self._axis_of_rows(tensor, first, beside=beside)
        if axis is None:
            return None
        index = indices[axis]
        assert index is not None
        if index.dtype in (torch.bool, torch.uint8):
            return axis, index.nonzero()[:, 0] if index.ndim == 1 else None
        if not index.ndim:
            return None
        return axis, index.reshape(-1) if index.numel() == max(index.shape) else None

    def _joined(self, reads: Sequence[Tensor]) -> Orders:
        """Return the orders of what is made of several tensors, row by row."""
        orders = [self.of(tensor) for tensor in reads]
        known = [each for each in orders if each]
        if not known:
            return NO_ORDERS
        in_order = [
            self._sizes(tensor) - each.keys() for tensor, each in zip(reads, orders, strict=True)
        ]
        joined = {}
        for size in {size for each in known for size in each}:
            found = [each[size] for each in known if size in each]
            order = agreed(size, found, any(size in sizes for sizes in in_order))
            if order is not None:
                joined[size] = order
        return joined

    def _sizes(self, tensor: Tensor) -> set[int]:
        """Return how many rows a tensor of data may have, as far as their order is told."""
        if not self._is_data(tensor):
            return set()
        merged = self._merges(tensor).get(tensor.shape[0], ()) if tensor.ndim else ()
        return {*tensor.shape[: 1 if tensor.ndim < 3 else 2], *merged}


def _rows_of_index(index: Tensor, axis: int) -> Tensor | None:
    """Return the rows that an index with an entry for each value names, if it names whole ones."""
    if index.ndim < 2:
        return index.reshape(-1)
    rows = index.movedim(axis, 0).flatten(1)
    alike = rows.shape[1] > 0 and bool((rows == rows[:, :1]).all())
    return rows[:, 0] if alike else None


def _argument(args: Sequence[Any], place: int, usual: Any) -> Any:
    return args[place] if len(args) > place and args[place] is not None else usual
