"""Tells which sample each row of a tensor is of, where a network puts rows in another order."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.network.axes.batch_axes import BatchAxes
from lightning_koopman.network.axes.moves import (
    axes_met,
    axes_moved,
    chooses,
    move,
    narrowed,
    puts,
    rows_along,
    values_moved,
)
from lightning_koopman.network.axes.order import (
    NO_ORDERS,
    ROW,
    Order,
    Orders,
    agreed,
    are_different,
    places_like,
    same,
    without,
)
from lightning_koopman.network.operators import PRODUCTS, VIEWS, Operator
from lightning_koopman.network.tensors import (
    address_of,
    all_tensors,
    dense,
    is_all_of_memory,
    view_of_memory,
)

Found = list[tuple[Tensor, Orders]]
"""Tensors that an operator gave, with the orders of their rows."""


class RowOrders:
    """The orders of rows of all tensors of one pass, by their memory, as views share it.

    Rows are told along the axis of the samples, or the first one where that is not known. What moves
    entries is run on the numbers of rows as well, see :mod:`.moves`; all else leaves rows in place, but
    for products with matrices that put them in another order, and what puts several together.

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

    def of(self, tensor: Tensor) -> Orders:
        """Return the orders of a tensor's rows."""
        if tensor.is_nested or not (known := self._of.get(address_of(tensor))):
            return NO_ORDERS
        return known.get(view_of_memory(tensor), known.get(None, NO_ORDERS))

    def begin(self, tensor: Tensor) -> None:
        """Let rows of samples that were drawn, some of them again, count as those of a batch."""
        orders = self.of(tensor)
        drawn = [s for s, o in orders.items() if o.is_of_all and not are_different(o.filled())]
        if drawn:
            self._of[address_of(tensor)] = {None: {s: orders[s] for s in orders.keys() - {*drawn}}}

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
        found = self._changed(op, args, out) if found is None else found
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

    def _changed(self, op: Operator, args: Sequence[Any], out: Any) -> Found | None:
        """Return the orders that an operator made, ``None`` where it leaves rows as they are."""
        if op.name in VIEWS:
            return self._viewed(args[0], out)
        if op.name == "copy":
            return self._copied(args[0], args[1], out)
        if (met := axes_met(op, args)) is not None:
            tensor, axes = met
            axis = self._axis_of_rows(tensor, axes) if self._is_data(tensor) else None
            if axis is None or axis not in axes:
                return None
            mixed = self._mixed(self._rows(tensor, axis), without(self.of(tensor), tensor.shape[axis]))
            return [(each, mixed) for each in all_tensors(out)]
        return self._moved(op, args, out)

    # Where rows are, and which ones.

    def _axis_of_rows(self, tensor: Tensor, axes: Collection[int]) -> int | None:
        """Find the axis of a tensor's rows that moves along some axes may concern."""
        if ROW in self.of(tensor):
            return 0
        place = self._axes.find(tensor, self._which)
        if place is not None:
            is_part = tensor.shape[place.axis] % (self._axes.size(self._which) * place.inner)
            return place.axis if place.axis in axes or is_part else None
        for axis in sorted(axes):
            size, first = tensor.shape[axis], tensor.shape[0]
            is_told = (axis == 1 and tensor.ndim == 3) or size in self.of(tensor)
            # Of two axes of one size, the second are positions.
            is_rows = axis == 0 or (is_told and size != first)
            if is_rows and self._axes.is_along(tensor, axis, self._which) is not False:
                return axis
        return None

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

    def _rows(self, tensor: Tensor, axis: int) -> Order:
        """Return the order of the rows along an axis."""
        known, size = self.of(tensor), tensor.shape[axis]
        if size in known:
            return known[size]
        merged, rows = self._merges(tensor).get(size, ()) if axis == 0 else (), places_like(size, tensor)
        outer = next((n for n in itertools.accumulate(merged, operator.mul) if n in known), None)
        if outer is not None:
            # Of rows that lie one behind the other in those that had been moved before.
            whole, inner = known[outer], size // outer
            rows = torch.where(whole.rows < 0, -size, whole.rows)[:, None] * inner + rows[:inner]
            return whole._replace(rows=rows.flatten().clamp_min(-1), base=whole.base * inner)
        repeated = len(merged) == 2 and merged[0] < 0
        return Order(rows % merged[1], merged[1], False) if repeated else Order(rows, size, False)

    def _entries(self, tensor: Tensor, axes: Collection[int]) -> tuple[Tensor, int, Order] | None:
        """Return which row each entry is of, from 1 on, and the order that tells, of how many rows."""
        known = self.of(tensor)
        if (row := known.get(ROW)) is not None and len(row.rows):
            return (row.rows + 1).view([1] * tensor.ndim).expand(tensor.shape), ROW, row
        if not tensor.ndim:
            return None
        place, count = self._axes.find(tensor, self._which), self._axes.size(self._which)
        axis = self._axis_of_rows(tensor, axes) if place is None else place.axis
        if axis is None:
            return None
        size, met = tensor.shape[axis], known.get(count)
        if place is not None and met is not None and met.mixed and size > met.base:
            # Rows that have met, with others beside them, are in no order any more.
            return None
        if place is not None and (self._is_part(tensor, axis) or (size not in known and size % count)):
            entries = self._axes.entries(tensor, self._which)
            order = known.get(count, Order(places_like(count, tensor), count, False))
            if entries is None or not order.is_of_all:
                return None
            return order.rows[entries] + 1, count, order
        order = self._rows(tensor, axis)
        ends = [1] * (tensor.ndim - axis - 1)
        return (order.rows + 1).view(-1, *ends).expand(tensor.shape), size, order

    # What operators do to them.

    def _moved(self, op: Operator, args: Sequence[Any], out: Any) -> Found | None:
        """Return the orders where an operator moves entries, of which the numbers of rows tell."""
        values = values_moved(op, args)
        data = [tensor for tensor in values if self._is_data(tensor)]
        if not data or (puts(op) and all(tensor is values[0] for tensor in data)):
            return None
        if len(values) == 1 and ROW in self.of(values[0]) and "pad" not in op.name:
            return [(tensor, self.of(values[0])) for tensor in all_tensors(out)]
        axes = [axes_moved(op, args, tensor) for tensor in data]
        if all(self._axis_of_rows(*each) is None for each in zip(data, axes, strict=True)):
            # Indices along other axes have rows of their own.
            by_index, joined = op.name.startswith("index"), self._joined(values)
            return [(tensor, joined) for tensor in all_tensors(out)] if by_index else None
        entries = [self._entries(*each) for each in zip(data, axes, strict=True)]
        known = [each for each in entries if each is not None]
        if len(known) < len(data):
            return None
        orders, others = [order for *_, order in known], self._left(op, values, data, known)
        if len({order.base for order in orders}) > 1:
            return [(tensor, others) for tensor in all_tensors(out)]

        def numbers(tensor: Tensor) -> Tensor:
            rows = next((rows for t, (rows, *_) in zip(data, known, strict=True) if t is tensor), None)
            if rows is None:
                return torch.zeros(1, dtype=torch.long, device=tensor.device).expand(tensor.shape)
            return rows.long().to(tensor.device)

        told = move(op, args, out, numbers)
        if told is None:
            # Sums over several rows, as over neighbours, are of the row that they are put into.
            return [(tensor, {**others, **self.of(args[0])}) for tensor in all_tensors(out)]
        indices = [t for t in all_tensors(args) if all(t is not value for value in values)]
        fixed = all(map(self._is_fixed, indices)) and not chooses(op)
        before = Order(
            orders[0].rows,
            orders[0].base,
            moved=not fixed or any(order.moved for order in orders),
            mixed=told[1] or any(order.mixed for order in orders),
        )
        found = Found()
        for tensor, each in zip(all_tensors(out), told[0], strict=True):
            if each is None:
                found.append((tensor, NO_ORDERS))
                continue
            if indices and any(_are_all(each, numbers(value)) for value in data):
                self._indices = indices
            order = self._laid_out(tensor, each, before, data[0])
            if order is None:
                return None
            settled = self._settled(order, others, [] if fixed else orders)
            is_row = tensor.ndim < data[0].ndim and len(order.rows) == 1
            found.append((tensor, {**others, ROW: order} if is_row else settled))
        return found

    def _left(
        self,
        op: Operator,
        values: Sequence[Tensor],
        data: Sequence[Tensor],
        known: Sequence[tuple[Tensor, int, Order]],
    ) -> Orders:
        """Return the orders that what an operator moves has beside those of the rows that it moves."""
        sizes = {size for _, size, _ in known}
        # Steps of packed sequences have that of the samples, too.
        steps = "pack" in op.name or (op.name == "cat" and len(sizes) > 1)
        sizes |= {1} if ROW in sizes else {ROW}
        for tensor in data:
            for merged in (axes for size, axes in self._merges(tensor).items() if size in sizes):
                sizes = sizes.union(merged, itertools.accumulate(merged, operator.mul))
        joined = self._joined(values).items()
        return {s: order for s, order in joined if s not in sizes or (steps and order.is_of_all)}

    def _laid_out(self, tensor: Tensor, numbers: Tensor, before: Order, source: Tensor) -> Order | None:
        """Return the order of what holds entries of some rows, ``None`` where these stay in place.

        Rows of entries are counted from 1, and 0 is for none.
        """
        base, count = before.base, self._axes.size(self._which)
        few = narrowed(numbers)
        if tensor.ndim < source.ndim and few.numel() and bool((few == few.max()).all()):
            # A row without an axis of its own.
            return before._replace(rows=few.flatten()[:1] - 1)
        place, after = (self._axes.find(t, self._which) for t in (source, tensor))
        first = 0 if after is None else after.axis

        def along() -> tuple[int, Tensor | None]:
            axes = sorted(range(tensor.ndim), key=lambda axis: axis != first)
            told = ((axis, rows_along(numbers, axis)) for axis in axes)
            return next(((axis, rows) for axis, rows in told if rows is not None), (0, None))

        axis, rows = along()
        if place is not None and base > count and (rows is None or len(rows) == count):
            # Rows of one sample each, or one of several rows of each sample, as of a class token.
            numbers = torch.where(numbers > 0, (numbers - 1) // place.inner % count + 1, 0)
            base, (axis, rows) = count, along()
        if after is not None and base == count and (rows is None or len(rows) > base):
            entries = self._axes.entries(tensor, self._which) if before.is_undone else None
            if entries is not None and bool(((numbers == entries + 1) | (numbers == 0)).all()):
                return None
        if rows is None and tensor.is_contiguous() and tensor.numel() % max(1, base) == 0:
            rows = rows_along(numbers.reshape(base, -1), 0)
        if rows is None:
            return before._replace(rows=places_like(base, numbers), base=base, mixed=True)
        rows, is_told = rows - 1, place is not None or ROW in self.of(source)
        is_told = is_told and tensor.ndim > 0 and len(rows) == tensor.shape[axis] == count
        if is_told and are_different(rows[rows >= 0]):
            self._axes.tell(tensor, axis, self._which)
        return before._replace(rows=rows, base=base)

    def _settled(self, order: Order, others: Orders, before: Sequence[Order]) -> Orders:
        """Return orders with one more, but for that of rows that are in place in every batch.

        They are so where indices that differ by batch have undone an order of those ``before``.
        """
        self.is_whole_again = order.is_of_all
        undone = not order.mixed and order.is_own
        # Where some rows are of none yet, others may be added there; experts add each to its own.
        undone &= any(not o.is_own for o in before) if order.moved else bool((order.rows >= 0).all())
        size, row = len(order.rows), {ROW: order} if len(order.rows) == 1 else {}
        return others if undone else {**others, size: order, **row}

    def _mixed(self, order: Order, others: Orders) -> Orders:
        """Return orders where several rows of an order were put together."""
        rows = places_like(order.base, order.rows)
        return {**others, order.base: order._replace(rows=rows, mixed=True)}

    def _viewed(self, source: Tensor, out: Tensor) -> Found | None:
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

    def _multiplied(self, name: str, args: Sequence[Any], out: Any) -> Found | None:
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
            is_along = self._axes.is_along(rows, axis, self._which)
            if not (is_along or (is_along is None and size in known)) or self._is_part(rows, axis):
                continue
            marks = dense(matrix.detach()) != 0
            marks = marks.flatten(0, -3).any(dim=0) if marks.ndim > 2 else marks
            marks = marks if rows is right else marks.t()
            before, others = self._rows(rows, axis), without(known, size)
            if bool((marks.sum(dim=1) == 1).all()):
                taken = before.rows[marks.int().argmax(dim=1).to(before.rows.device)]
                fixed = self._is_fixed(matrix)
                order = before._replace(rows=taken, moved=before.moved or not fixed)
                if _are_all(taken, before.rows) and bool((dense(matrix) <= 1).all()):
                    self._indices = [matrix]
                if len(taken) == self._axes.size(self._which):
                    self._axes.tell(out, axis, self._which)
                return [(out, self._settled(order, others, [] if fixed else [before]))]
            return [(out, self._mixed(before, others) if len(marks) == size else others)]
        return None

    def _copied(self, target: Tensor, source: Tensor, out: Tensor) -> Found | None:
        """Return the orders of what rows were copied into, also of all memory where that is a part."""
        if is_all_of_memory(target):
            return [(out, self._joined([source]))]
        place, count = self._axes.find(source, self._which), self._axes.size(self._which)
        is_within = address_of(source) == address_of(target)
        if is_within and place is not None and place.axis and source.shape[place.axis] % count:
            # Circular pads put some rows beside all.
            return [(out, self._mixed(Order(places_like(count, target), count), NO_ORDERS))]
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
        held = self._of.get(address_of(target), {}).get(None, NO_ORDERS)
        before = held.get(whole)
        if before is not None and before.base != order.base:
            return []
        plain = places_like(whole, order.rows)
        rows = plain if self._is_data(target) else torch.full_like(plain, -1)
        rows = rows if before is None else before.rows.to(rows, copy=True)
        places = (target.storage_offset() + step * places_like(size, order.rows)) // width
        rows[places] = order.rows
        seen = [order] if before is None else [order, before]
        moved, mixed = any(o.moved for o in seen), any(o.mixed for o in seen)
        after = Order(rows, order.base, moved, mixed)
        self._of[address_of(target)] = {
            None: without(held, whole) if after.is_undone else {**held, whole: after}
        }
        self._keep(target)
        return []

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
            if size == ROW and any(ROW not in self.of(t) and self._is_data(t) for t in reads):
                # A row that is put to others, as the first one that is taken off all, is in each.
                continue
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


def _are_all(numbers: Tensor, before: Tensor) -> bool:
    """Check whether all numbers that there were are there again, in whatever order."""
    if numbers.numel() != before.numel():
        return False
    few = narrowed(numbers), narrowed(before)
    pair = few if few[0].numel() == few[1].numel() else (numbers, before)
    return torch.equal(*(each.flatten().sort()[0] for each in pair))
