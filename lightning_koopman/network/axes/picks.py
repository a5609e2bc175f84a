"""Single positions that a network goes on with: finds them, and keeps them in the rows of states."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_koopman.network.axes.moves import move
from lightning_koopman.network.axes.order import places_like
from lightning_koopman.network.axes.recorded import NO_PICKS, Pick, Picks, Recorded
from lightning_koopman.network.axes.rows import RowForm, by_sample, last_valid, n_positions
from lightning_koopman.network.operators import (
    BATCH_NORMS,
    BY_VALUE,
    LAST_AXES_NORMS,
    LOOK_UPS,
    PRODUCTS,
    VIEWS,
    Operator,
)
from lightning_koopman.network.tensors import address_of, all_tensors, is_all_of_memory, view_of_memory

# These leave all entries in place.
_IN_PLACE = frozenset({
    *BY_VALUE,
    *BATCH_NORMS,
    *("copy", "detach", "alias", "unsqueeze", "squeeze", "expand", "stack", "native_dropout"),
})
_PICKS = frozenset({
    *("select", "slice", "unbind", "split", "split_with_sizes", "index", "index_select", "gather"),
})
_TURN = frozenset({"transpose", "permute", "t", "numpy_T"})


OfBatch = Callable[[Tensor, int], tuple[bool | None, ...]]
"""Tells whether an axis of a tensor is the first of the batch's tensors, and whether the second."""


class PickedPositions:
    """What was picked of which states, for all tensors of one pass, by their memory, as views share it.

    Args:
        of_batch: Tells whether an axis of a tensor is one of the batch's.
        keep: Called with each tensor of which something is known, so that its address is not given to
            another.
    """

    def __init__(self, of_batch: OfBatch, keep: Callable[[Tensor], None]) -> None:
        self._of_batch, self._keep = of_batch, keep
        # Views have picks of their own, beside those of all of the memory.
        self._of: dict[int, dict[Any, Picks]] = {}
        # Of which states views hold other positions than theirs, with the number of these.
        self._moved: dict[int, dict[Any, Moves]] = {}

    def of(self, tensor: Tensor) -> Picks:
        """Return what a tensor holds one position of."""
        if tensor.is_nested or not (known := self._of.get(address_of(tensor))):
            return NO_PICKS
        return known.get(view_of_memory(tensor), known.get(None, NO_PICKS))

    def follow(
        self,
        op: Operator,
        args: Sequence[Any],
        reads: Sequence[Tensor],
        known: Sequence[frozenset[str]],
        out: Any,
    ) -> None:
        """Pass on what was picked from what an operator read, of ``known`` labels, to what it wrote."""
        places = {address_of(tensor) for tensor in reads}

        def written() -> Iterator[tuple[int, Tensor, bool]]:
            for tensor in all_tensors(out):
                if (address := address_of(tensor)) and not tensor.is_nested:
                    is_part = not is_all_of_memory(tensor) if op.is_in_place else address in places
                    yield address, tensor, is_part

        # A part that is written to is where it was in its memory.
        parts = {(at, view_of_memory(t)) for at, t, is_part in written() if is_part and op.is_in_place}
        before = self._moved_before(reads, known, but=parts)
        pairs = zip(reads, known, strict=True)
        data = [(tensor, labels) for tensor, labels in pairs if labels and not tensor.is_nested]
        shapes = [tensor.shape for tensor in all_tensors(out) if not tensor.is_nested]
        moved = before
        if data and shapes:
            rule = _Moving(op, args, [tensor for tensor, _ in data], shapes[0], self._of_batch)
            moved |= {(label, size) for t, labels in data for size in rule.sizes(t) for label in labels}
        for address, tensor, is_part in written():
            if not (moved or address in self._moved):
                continue
            of = self._moved.get(address, {}) if is_part else {}
            if is_part and op.is_in_place:
                # Whoever views what was written to finds it there.
                of = {view: moves | moved for view, moves in {None: _NO_MOVES, **of}.items()}
            self._moved[address] = {**of, view_of_memory(tensor) if is_part else None: moved}
            self._keep(tensor)
        picked = _picked(op, args, out)
        if not (picked or self._of):
            return
        joined = self._joined(reads, known)
        for address, tensor, is_part in written():
            told = joined
            if (pick := picked.get(id(tensor))) is not None:
                pick = pick._replace(of_batch=self._of_batch(args[0], pick.axis))
                told = {n: pick._replace(is_moved=(n, pick.size) in before) for n in known[0]}
                told |= self.of(reads[0])
            if told or address in self._of:
                picks = self._of.get(address, {}) if is_part else {}
                if is_part and op.is_in_place:
                    picks = {view: _agreeing(each, told, known) for view, each in picks.items()}
                self._of[address] = {**picks, view_of_memory(tensor) if is_part else None: told}
                self._keep(tensor)

    def _moved_before(
        self, reads: Sequence[Tensor], known: Sequence[frozenset[str]], but: Collection[Any]
    ) -> Moves:
        """Return the positions, of which states, that are in other places in what is read."""
        found = set[tuple[str, int]]()
        for tensor, labels in zip(reads, known, strict=True):
            address = address_of(tensor)
            if not labels or tensor.is_nested or not (of := self._moved.get(address)):
                continue
            if (address, view := view_of_memory(tensor)) not in but:
                moves = of.get(view, of.get(None, _NO_MOVES))
                found |= {move for move in moves if move[0] in labels}
        return frozenset(found)

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


def _agreeing(picks: Picks, told: Picks, known: Sequence[frozenset[str]]) -> Picks:
    """Return what was picked in memory, where what was written to a part of it is not of others."""
    labels = frozenset[str]().union(*known)
    return {n: pick for n, pick in picks.items() if n not in labels or told.get(n) == pick}


Moves = frozenset[tuple[str, int]]
"""Labels of states with sizes of axes, along which positions were moved, or met."""

_NO_MOVES: Moves = frozenset()


class _Moving:
    """Tells the sizes of the axes of what an operator reads along which it moves what is there.

    Positions there are moved, or meet. Of an operator that no rule is about, those are all axes.
    """

    def __init__(
        self,
        op: Operator,
        args: Sequence[Any],
        data: Sequence[Tensor],
        out: Sequence[int],
        of_batch: OfBatch,
    ) -> None:
        self._of_batch = of_batch
        self._name, self._is_in_place = op.name, op.is_pointwise or op.name in _IN_PLACE
        self._args, self._data, self._out = args, data, tuple(out)
        dims = args[op.dims] if op.dims < len(args) else op.usual_dims
        self._dims: Sequence[int] = [dims] if isinstance(dims, int) else dims or ()

    def sizes(self, read: Tensor) -> Sequence[int]:
        shape, name, out = tuple(read.shape), self._name, self._out
        if self._is_in_place:
            # Of what meets itself, as in pairs, each position meets all.
            return [size for size in shape if out.count(size) > shape.count(size)]
        if name in _TURN:
            # Afterwards nobody tells axes of one size apart, but for those of the batch.
            untold = [size for k, size in enumerate(shape) if True not in self._of_batch(read, k)]
            return [size for size in untold if untold.count(size) > 1]
        if name in VIEWS:
            return _cut(shape, out)
        if name in PRODUCTS or name == "linear":
            return self._multiplied(read)
        if name in LAST_AXES_NORMS:
            return shape[-len(self._args[1]) :]
        if name == "index" and read is self._args[0]:
            indices = zip(shape, self._args[1], strict=False)
            return [size for size, index in indices if index is not None]
        if name == "slice" and out == shape:
            return ()
        axes = self._dims or range(read.ndim)
        return [shape[axis] for axis in axes if -read.ndim <= axis < read.ndim]

    def _multiplied(self, read: Tensor) -> tuple[int, ...]:
        """Return what is summed over, and all where states meet."""
        left, right = self._args[PRODUCTS.get(self._name, 0) :][:2]
        if read is not left and read is not right:
            return ()
        if all(any(side is tensor for tensor in self._data) for side in (left, right)):
            return tuple(read.shape)
        return (read.shape[-1],) if read is left else tuple(read.shape[-2:])


def _cut(shape: Sequence[int], out: Sequence[int]) -> Sequence[int]:
    """Return the sizes of axes that another shape has not, but for those merged with ones before."""
    places, inner = dict[int, int](), 1
    for size in reversed(out):
        if size > 1:
            places[inner] = size
        inner *= size
    cut, inner = list[int](), 1
    for size in reversed(shape):
        if size > 1 and places.get(inner, 1) % size:
            cut.append(size)
        inner *= size
    return cut


def _picked(op: Operator, args: Sequence[Any], out: Any) -> dict[int, Pick]:
    """Return which positions an operator picks of its first argument, by the id of what holds them.

    It is run on where each entry is along each axis as well, see :mod:`.moves`.
    """
    source = args[0] if args else None
    if op.name not in _PICKS or not isinstance(source, Tensor) or source.is_nested or source.ndim != 3:
        return {}
    parts, shape = all_tensors(out), source.shape
    picks = [
        (part, axis)
        for part in enumerate(parts)
        for axis, size in enumerate(shape)
        if size > 1 and part[1].numel() and part[1].numel() * size == source.numel()
    ]
    told = [
        all_tensors(move(op, args, out, lambda _, at=at: at))  # type: ignore[misc]
        for at in (_places(source) if picks else ())
    ]
    found = dict[int, Pick]()
    for (i, part), axis in picks:
        at, first, second = (told[k][i].flatten() for k in (axis, *({0, 1, 2} - {axis})))
        n_second = shape[max({0, 1, 2} - {axis})]
        each = at.view(-1, n_second)
        are_all = torch.equal(first * n_second + second, places_like(len(at), at))
        if are_all and bool((each == each[:, :1]).all()):
            pick = _pick_of(axis, shape[axis], each[:, 0].tolist(), is_told=op.name in LOOK_UPS)
            found |= {} if pick is None else {id(part): pick}
    return found


def _places(tensor: Tensor) -> Iterator[Tensor]:
    """Return where each entry is along each axis."""
    for axis, size in enumerate(tensor.shape):
        ends = [1] * (tensor.ndim - axis - 1)
        yield places_like(size, tensor).view(-1, *ends).expand(tensor.shape)


def _pick_of(axis: int, size: int, places: Sequence[int], *, is_told: bool) -> Pick | None:
    """Return what picks these positions along an axis, of each sample."""
    first = places[0]
    if any(place != first for place in places) or (is_told and first not in (0, size - 1)):
        return Pick(axis, size, True, True, tuple(places))
    return Pick(axis, size, first > 0, is_told) if first in (0, size - 1) else None


def keeping_picked(
    forms: Mapping[str, RowForm],
    records: Sequence[Recorded],
    read: Mapping[str, Pick | None],
    max_dim: int,
    valid: Mapping[str, Tensor],
) -> dict[str, RowForm]:
    """Keep the position that a network goes on with alone, as of a class token.

    What is picked of is that position, unless it is ``read`` otherwise as well, as by a loss. States
    before it that have as many positions, or that functions mixed before it was picked, keep it behind
    the others if they are too wide to be kept whole. One that differs by sample is kept if it is the
    last ``valid`` one.
    """
    known = {record.name: record for record in records if record.name in forms}
    readers: dict[str, list[Recorded]] = {name: [] for name in known}
    for record in records:
        for source in record.sources or ():
            readers.setdefault(source, []).append(record)

    def positions(name: str) -> int:
        """Count the positions that are pooled."""
        return n_positions(known[name].tensor, forms[name]) if forms[name].reduce == "pool" else 0

    def is_of(pick: Pick, name: str) -> bool:
        form, sizes = forms[name], [*known[name].tensor.shape]
        # Axes may have been swapped on the way, which shows in sizes if these differ.
        axis = 0 if form.batch_axis else 2 if form.channels_first else 1
        if (of_samples := pick.of_batch[form.of_axis]) is not None:
            if of_samples:
                return False
            del sizes[form.batch_axis]
        is_along = pick.axis == axis or sizes.count(pick.size) == 1
        return pick.size == positions(name) and is_along and (not pick.places or is_last(pick, name))

    def is_last(pick: Pick, name: str) -> bool:
        """Check whether what differs by sample is the last position that holds data."""
        said = valid.get(forms[name].padding or name)
        if said is None:
            return False
        return pick.places == tuple((last_valid(said) if said.ndim > 1 else said - 1).tolist())

    picked: dict[str, Pick] = {}
    for name in known:
        found = {reader.picks.get(name) for reader in readers[name]}
        found |= {read[name]} if name in read else set()
        pick = found.pop() if len(found) == 1 else None
        if pick is not None and is_of(pick, name):
            picked[name] = pick
    kept = dict[str, RowForm]()

    def keep_beside(name: str) -> None:
        """Keep a position behind the others, where these are pooled."""
        if by_sample(known[name].tensor, forms[name])[0].numel() > max_dim:
            grid = (min(*forms[name].grid, picked[name].size - 1),)
            kept[name] = _with_pick(replace(forms[name], grid=grid), picked[name])

    for name, pick in picked.items():
        if pick.is_moved:
            keep_beside(name)
        else:
            kept[name] = _with_pick(forms[name], pick, is_alone=True)
    left, seen = [*picked], {*picked}
    while left:
        name = left.pop()
        size = picked[name].size
        for source in {*(known[name].sources or ())} & known.keys() - seen:
            if positions(source) == size:
                seen.add(source)
                left.append(source)
                picked[source] = picked[name]
                keep_beside(source)
    return {**forms, **kept}


def _with_pick(form: RowForm, pick: Pick, *, is_alone: bool = False) -> RowForm:
    place: Literal[0, -1] = -1 if pick.is_last else 0
    return replace(form, picked=place, is_alone=is_alone, by_data=pick.is_last and pick.by_data)
