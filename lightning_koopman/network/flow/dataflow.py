"""Follows, through one pass, which states and which data each tensor was computed from, by labels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_koopman.network.access.watch import Watcher, flat, kept_out_of_the_pass
from lightning_koopman.network.axes.batch_axes import BatchAxes, Place
from lightning_koopman.network.axes.input_data import has_positions
from lightning_koopman.network.axes.merged import MergedAxes
from lightning_koopman.network.axes.met import MetRows
from lightning_koopman.network.axes.order import NO_ORDERS, Orders
from lightning_koopman.network.axes.pairs import PairedRows
from lightning_koopman.network.axes.picks import PickedPositions
from lightning_koopman.network.axes.recorded import NO_PICKS, Picks
from lightning_koopman.network.axes.row_order import RowOrders
from lightning_koopman.network.flow.labelled_sums import LabelledSums, OnSum
from lightning_koopman.network.flow.shared_memory import LabelsByView
from lightning_koopman.network.operators import (
    LOOK_UPS,
    SHAPE_ONLY,
    Operator,
    by_place,
)
from lightning_koopman.network.tensors import (
    address_of,
    all_tensors,
    are_data,
    has_places,
    is_all_of_memory,
    is_underived,
)

# These make coordinates, of nothing. What others make so may be written to by code that nobody sees.
_COORDINATES = frozenset({"arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices"})

# These read entries of their first argument at places that another one holds.
_LOOK_UP = LOOK_UPS | {"embedding", "take"}

# These may drop at random, and are marked so, but do not where a network is evaluated.
_MAY_DROP = ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_rnn", "rrelu")

BATCH, OWN, CHANCE, UNKNOWN = "batch:", "own", "chance", "unknown"
"""Labels of the batch's tensors, of what the network holds and of coordinates, of random numbers, and of
what came from elsewhere, as data do that went through NumPy."""

ORIGINS = frozenset({OWN, CHANCE, UNKNOWN})
"""Labels of what is neither data of the batch nor a state."""

_NOTHING: frozenset[str] = frozenset()

_OF_FUNCTIONS = Operator("of_functions", "of_functions")
"""Stands for operators that take functions, of which torch tells nothing."""


class DataFlow(Watcher):
    """Labels that travel with the data, as long as the mode is entered.

    Every operator that torch runs passes on the labels of what it reads to what it writes. Tensors that
    share memory share labels, until a part of it is written to. Values are never touched, gradients
    never needed, and what cannot be followed (a round trip through NumPy, a kernel that torch does not
    know of) only loses its labels.

    Args:
        origins: Whether there are labels of coordinates, which operators make of nothing, of random
            numbers, and of what was read without a label, and orders of rows.
        on_mix: Called with what an operator reads, where that is several tensors, their labels, the
            operator's name, and what it gave; says of which ones the labels go no further.
        on_sum: Called with each sum of what was labelled that an operator is about to go on with, unless
            it adds or weighs alone.

    Attributes:
        error: What went wrong in the bookkeeping; from then on nothing is labelled.
        read: Memory that operators read, by its address.
        idle: Labels of what is made of nothing but what the network holds.
        lookups: How often entries of the network's own tables were read at places that states chose.

    Example:
        >>> flow, x = DataFlow(), torch.ones(3)
        >>> flow.label([x], "input")
        >>> with flow:
        ...     y = (2 * x).relu()
        >>> flow.labels([y, torch.ones(3)])
        frozenset({'input'})
    """

    def __init__(
        self,
        *,
        origins: bool = False,
        on_mix: Callable[[Sequence[Tensor], Sequence[frozenset[str]], str, Any], set[int]] | None = None,
        on_sum: OnSum | None = None,
    ) -> None:
        super().__init__()
        self.read: set[int] = set()
        self.idle: Set[str] = frozenset()
        self.lookups = 0
        self._origins, self._on_mix, self._on_sum = origins, on_mix, on_sum
        self._labels: dict[int, frozenset[str]] = {}
        self._parts: dict[int, LabelsByView] = {}
        self._written: dict[int, LabelsByView] = {}
        self._writes = map(str, itertools.count())
        # A weak reference keeps a storage's address from being given to another one.
        self._alive: dict[int, Any] = {}
        # Memory that held one value all over before an operator wrote to it.
        self._blank: set[int] = set()
        self._axes = BatchAxes(self._keep_address)
        self._positions: dict[int, BatchAxes] = {}
        self._merged = MergedAxes(self._keep_address)
        self._paired = PairedRows(self._keep_address)
        self._sums = LabelledSums(self._keep_address)
        self._picks = PickedPositions(self._of_batch, self._keep_address)
        # By which axis of the batch is taken for that of the samples.
        self._rows = [self._rows_along(0)]
        self._met = MetRows(self._rows[0].of, self._merged.of, self._axes, self._keep_address)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied weak reference frees a storage twice, which ends the interpreter.
        return DataFlow, ()

    def _of_batch(self, tensor: Tensor, axis: int) -> tuple[bool | None, ...]:
        """Tell whether an axis is the first one of the batch's tensors, and whether the second."""
        return tuple(self._axes.is_along(tensor, axis, which) for which in range(2))

    def _rows_along(self, which: int) -> RowOrders:
        rows = self._merged.of, self._axes, which
        return RowOrders(self._is_data, self._is_own, *rows, self._keep_address)

    @kept_out_of_the_pass()
    def begin_axes(self, tensors: Iterable[Tensor]) -> None:
        """Follow the first axes of the batch's tensors, too."""
        self._axes.begin(list(tensors))
        if self._axes.is_square and len(self._rows) == 1:
            self._rows.append(self._rows_along(1))

    @kept_out_of_the_pass()
    def begin_positions(self, tensors: Sequence[Tensor]) -> None:
        """Follow whose positions there are, where several of the batch's tensors have any."""
        have = {place: tensor for place, tensor in enumerate(tensors) if has_positions(tensor)}
        for place, tensor in have.items() if len(have) > 1 else ():
            self._positions[place] = BatchAxes(self._keep_address)
            self._positions[place].begin_at(tensor, axis=1)

    @kept_out_of_the_pass(frozenset())
    def positions(self, tensor: Tensor) -> frozenset[int]:
        """Find the tensors of the batch, by number, whose positions a tensor has."""
        axes = self._positions.items()
        return frozenset(place for place, each in axes if each.find(tensor, 0) is not None)

    @kept_out_of_the_pass((None, None))
    def places(self, tensor: Tensor) -> tuple[Place | None, ...]:
        """Find the two first axes of the batch in a tensor."""
        return tuple(self._axes.find(tensor, which) for which in range(2))

    @kept_out_of_the_pass(NO_PICKS)
    def picks(self, tensor: Tensor) -> Picks:
        """Find of which states a tensor holds one position alone."""
        return self._picks.of(tensor)

    @kept_out_of_the_pass()
    def label(self, value: Any, name: str, *, beside: bool = False) -> None:
        """Replace the labels of all tensors in a value by one, or put one ``beside`` them."""
        for tensor in all_tensors(value):
            self._set(tensor, frozenset({name}) | (self._get(tensor) if beside else _NOTHING))

    @kept_out_of_the_pass()
    def label_part(self, tensor: Tensor, name: str, *, beside: bool = False) -> None:
        """Do as :meth:`label`, and leave the labels of others that share a tensor's memory."""
        self._set_part(tensor, frozenset({name}) | (self._get(tensor) if beside else _NOTHING))

    @kept_out_of_the_pass(_NOTHING)
    def labels(self, value: Any) -> frozenset[str]:
        """Read the labels of all tensors in a value."""
        return _NOTHING.union(*(self._get(tensor) for tensor in all_tensors(value)))

    @kept_out_of_the_pass()
    def merged(self, tensor: Tensor) -> tuple[int, ...] | None:
        """Read which axes were merged into a tensor's first one, outermost first.

        They are empty where merges of several kinds met, and ``None`` where none was seen.
        """
        has_first = tensor.ndim and not tensor.is_nested
        return self._merged.of(tensor).get(tensor.shape[0]) if has_first else None

    @kept_out_of_the_pass(NO_ORDERS)
    def orders(self, tensor: Tensor, which: int = 0) -> Orders:
        """Read which rows a tensor's rows are, where operators took them in another order.

        Samples are taken to be along one of the two first axes of the batch.
        """
        rows = self._rows[min(which, len(self._rows) - 1)]
        return {**rows.of(tensor), **self._met.of(tensor)}

    @kept_out_of_the_pass()
    def begin(self, tensor: Tensor) -> None:
        """Let a tensor's rows count as those of the batch, if they are no order of all of them."""
        for rows in self._rows:
            rows.begin(tensor)

    def writes(self, tensor: Tensor) -> frozenset[str]:
        """Return the latest writes in place to the memory that a tensor views."""
        written = self._written.get(address_of(tensor)) if self._written else None
        return _NOTHING if written is None else written.of(tensor)

    def pairs(self, tensor: Tensor) -> bool:
        """Check whether each of a tensor's rows met all of as many others in what it was made of."""
        return len(tensor) in self._paired.of(tensor)

    @kept_out_of_the_pass()
    def sum_in(self, tensor: Tensor) -> int | None:
        """Find which sum of what was labelled, or what became of such a sum alone, a tensor is, if any.

        It is the same one where numbers alone weigh or shift it.
        """
        return self._sums.number(tensor)

    def as_added(self, tensor: Tensor) -> Tensor:
        """Return a sum with its axes in the order that they had when it was added up."""
        return self._sums.as_added(tensor)

    @kept_out_of_the_pass()
    def label_sum(self, tensor: Tensor, name: str) -> None:
        """Replace the labels of a sum, and of what is the same but for numbers, by one."""
        self.label(tensor, name)
        for address in self._sums.alike(tensor):
            if address not in self._parts:
                self._labels[address] = frozenset({name})

    def _is_data(self, tensor: Tensor) -> bool:
        return not self._held(tensor) <= ORIGINS

    def _is_own(self, tensor: Tensor) -> bool:
        return self._get(tensor) == {OWN}

    @kept_out_of_the_pass()
    def precede(self, op: Operator, args: tuple[Any, ...], kwargs: Any) -> None:
        """Note what a tensor holds before an operator writes to it, or goes on with it."""
        if self._on_sum is not None:
            self._sums.show(self._on_sum, op, args, kwargs)
        written = flat((*args, *kwargs.values())) if self._origins and op.written else ()
        self._blank = {address_of(t) for t in written if not self._get(t) and _is_one_value(t)}

    def follow_functions(self, given: Any, out: Any) -> None:
        """Pass on what labels no operator within passed on."""
        known = [tensor for tensor in flat([out]) if not self.labels(tensor)]
        self.follow(_OF_FUNCTIONS, (), dict(enumerate(flat(given))), known)

    @kept_out_of_the_pass()
    def follow(self, op: Operator, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        """Pass labels on from what an operator read to what it wrote."""
        given = flat((*args, *kwargs.values())) if op.name not in SHAPE_ONLY else ()
        lost = _overwritten(op, args, kwargs) if op.written else ()
        kept = [(t, i in lost) for i, t in enumerate(given) if i not in lost or not is_all_of_memory(t)]
        reads, known = [tensor for tensor, _ in kept], self._known(op, kept, out)
        # What a part holds is lost as well, but not what is told of all its memory.
        ends = {place for place, (_, is_lost) in enumerate(kept) if is_lost}
        placed = by_place(op, args, kwargs)
        for followed in (self._axes, *self._positions.values()) if reads else ():
            followed.follow(op, placed, reads, out)
        if self._origins and reads:
            self._picks.follow(op, placed, reads, [of - ORIGINS for of in known], out)
            if self._merged:
                self._met.follow(op, placed, reads, out)
            sorts, *_ = [rows.follow(op, placed, reads, out) for rows in self._rows]
            if sorts:
                reads, known = _without_sorts(reads, known, sorts)
                ends = set()
        if self._on_mix is not None and len(known) > 1:
            ends |= self._on_mix(reads, known, op.name, out)
        labels = _NOTHING.union(*(of for i, of in enumerate(known) if i not in ends))
        if self._origins:
            unlabelled = [reads[i] for i, of in enumerate(known) if not of and i not in ends]
            labels |= self._new_labels(op, args, unlabelled)
            if reads and not labels and any(_may_vary(tensor, op) for tensor in flat([out])):
                # Of one value all over, functions make coordinates, as masks of what is before.
                labels = frozenset({OWN})
            # A mask says which entries count, and is nothing that is added up.
            data = [_NOTHING if i in ends else of - ORIGINS for i, of in enumerate(known)]
            self._sums.follow(op, args, reads, data, out)
            self._paired.follow(op, reads, known, out, ORIGINS | self.idle)
            self.lookups += op.name in _LOOK_UP and _is_lookup(reads, known)
        if op.written:
            self._label_written(op, args, kwargs, labels)
        places = {address_of(tensor) for tensor in reads}
        self.read |= places - {0}
        # A view keeps the labels of what it views.
        made = [tensor for tensor in flat([out]) if address_of(tensor) not in places]
        for tensor in made:
            self._set(tensor, labels)
        grows, written = not self._rows[0].is_whole_again, flat([out]) if op.written else made
        self._merged.follow(op, args, reads, written, out, grows=grows)

    def _new_labels(
        self, op: Operator, args: tuple[Any, ...], unlabelled: Sequence[Tensor]
    ) -> frozenset[str]:
        """Return the labels of what an operator makes of nothing, or of what has no labels."""
        labels = set[str]()
        if op.may_draw and not _is_off(op.name, args):
            labels.add(CHANCE)
        elif op.name in _COORDINATES:
            labels.add(OWN)
        if not all(address_of(t) in self._blank or _is_one_value(t) for t in unlabelled):
            labels.add(UNKNOWN)
        return frozenset(labels)

    def _label_written(
        self, op: Operator, args: tuple[Any, ...], kwargs: Any, labels: frozenset[str]
    ) -> None:
        """Let what an operator wrote in place have labels."""
        written = (args[place] if place < len(args) else kwargs.get(name) for place, name in op.written)
        for tensor in flat(written):
            self._set_part(tensor, labels)
            # What is viewed otherwise from now on holds the same values.
            if not op.turns_in_place:
                self._note_write(tensor)

    def _known(
        self, op: Operator, kept: Sequence[tuple[Tensor, bool]], out: Any
    ) -> list[frozenset[str]]:
        """Read the labels of what an operator reads, of all the memory where it only writes or views."""
        if not self._parts:
            return [self._get(tensor) for tensor, _ in kept]
        places = {address_of(tensor) for tensor, _ in kept}
        views = op.is_view and all(address_of(tensor) in places for tensor in flat([out]))
        return [self._held(t) if views or is_lost else self._get(t) for t, is_lost in kept]

    def _held(self, tensor: Tensor) -> frozenset[str]:
        """Return all labels that a tensor's memory may have, in whatever part."""
        parts = self._parts.get(address_of(tensor))
        return self._get(tensor) if parts is None else parts.held

    def _note_write(self, tensor: Tensor) -> None:
        address, write = address_of(tensor), frozenset({next(self._writes)})
        if not address or is_all_of_memory(tensor):
            self._written[address] = LabelsByView(write)
        else:
            self._written.setdefault(address, LabelsByView(_NOTHING)).set(tensor, write)

    def _get(self, tensor: Tensor) -> frozenset[str]:
        address = address_of(tensor)
        parts = self._parts.get(address)
        return self._labels.get(address, _NOTHING) if parts is None else parts.of(tensor)

    def _set(self, tensor: Tensor, labels: frozenset[str]) -> None:
        address = address_of(tensor)
        if address == 0:
            return
        parts = self._parts.get(address)
        if parts is not None and not is_all_of_memory(tensor):
            parts.set(tensor, labels)
        elif labels or address in self._labels or parts is not None:
            self._parts.pop(address, None)
            self._labels[address] = labels
        else:
            return
        self._keep_address(tensor, address)

    def _set_part(self, tensor: Tensor, labels: frozenset[str]) -> None:
        """Replace the labels of a tensor, and leave those of others that share its memory."""
        address = address_of(tensor)
        before = self._labels.get(address, _NOTHING)
        if address and address not in self._parts and labels != before and not is_all_of_memory(tensor):
            self._forget_freed()
            self._parts[address] = LabelsByView(before)
        self._set(tensor, labels)

    def _forget_freed(self) -> None:
        """Let go of what is told by views, which takes room, where nobody holds the memory."""
        for known in (self._parts, self._written):
            for address in known.keys() & self._alive.keys():
                if self._alive[address].expired():
                    del known[address]

    def _keep_address(self, tensor: Tensor, address: int | None = None) -> None:
        address = address_of(tensor) if address is None else address
        if address not in self._alive:
            self._alive[address] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _is_one_value(tensor: Tensor) -> bool:
    """Check whether a tensor holds one value all over; a single number is hardly ever data."""
    if tensor.numel() < 2 or torch._is_zerotensor(tensor):
        return True
    # To ask a DTensor is a collective, which the other processes may be in no place for.
    may_ask = is_underived(tensor) and has_places(tensor) and are_data(tensor)
    return may_ask and bool((tensor == tensor[(0,) * tensor.ndim]).all())


def _may_vary(tensor: Tensor, op: Operator) -> bool:
    """Check whether a tensor has several values, as it may where an operator wrote one to a part."""
    return not _is_one_value(tensor) or (bool(op.written) and not is_all_of_memory(tensor))


def _overwritten(op: Operator, args: tuple[Any, ...], kwargs: Any) -> set[int]:
    """Find places of tensors that an operator is given to write over, without reading them."""
    of_self = op.full_name in ("copy_", "fill_", "zero_")
    # Of what draws, the second one takes what is drawn.
    of_second = op.name == "rrelu_with_noise"
    given = [*((i < 1 if of_self else of_second and i == 1, arg) for i, arg in enumerate(args))]
    given += [(keyword == "out", arg) for keyword, arg in kwargs.items()]
    tensors = [(is_written, tensor) for is_written, arg in given for tensor in flat([arg])]
    return {i for i, (is_written, t) in enumerate(tensors) if is_written and not t.is_nested}


def _is_off(name: str, args: tuple[Any, ...]) -> bool:
    """Check whether an operator that may draw random numbers draws none."""
    # Of nested tensors, torch asks for dropout in eval mode, too.
    evaluated = name == "native_dropout" and len(args) > 2 and args[2] is False
    return evaluated or name.startswith(_MAY_DROP)


def _without_sorts(
    reads: Sequence[Tensor], known: Sequence[frozenset[str]], sorts: Sequence[Tensor]
) -> tuple[list[Tensor], list[frozenset[str]]]:
    """Leave out data that all rows are sorted by, but not states, which may choose experts so."""
    left = []
    for tensor, labels in zip(reads, known, strict=True):
        if any(tensor is index for index in sorts):
            labels = frozenset(n for n in labels - ORIGINS if not n.startswith(BATCH))
            if not labels:
                continue
        left.append((tensor, labels))
    return [tensor for tensor, _ in left], [labels for _, labels in left]


def _is_lookup(reads: Sequence[Tensor], known: Sequence[frozenset[str]]) -> bool:
    """Check whether the entries of a table that the network holds are chosen by states."""
    if len(reads) < 2:
        return False
    table = reads[0]
    is_table = known[0] == {OWN} and table.is_floating_point() and table.ndim > 1
    # Integers of the batch are tokens, positions or steps in time.
    chosen = (name for labels in known[1:] for name in labels - ORIGINS)
    return is_table and not all(name.startswith(BATCH) for name in chosen)
