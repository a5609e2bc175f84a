"""Follows, through one pass, which states and which data each tensor was computed from, by labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence, Set
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_koopman.network.access.watch import Watcher, flat, kept_out_of_the_pass
from lightning_koopman.network.axes.batch_axes import BatchAxes, Place
from lightning_koopman.network.axes.input_data import has_positions
from lightning_koopman.network.axes.picks import PickedPositions
from lightning_koopman.network.axes.row_order import NO_ORDERS, Orders, RowOrders
from lightning_koopman.network.axes.rows import NO_PICKS, Picks
from lightning_koopman.network.flow.shared_memory import LabelsByView
from lightning_koopman.network.tensors import (
    address_of,
    all_tensors,
    are_data,
    has_places,
    is_all_of_memory,
    is_underived,
    view_of_memory,
)

# These read a tensor's shape, never its values.
_SHAPE_ONLY = frozenset({
    *(f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")),
    *(f"new_{kind}" for kind in ("zeros", "ones", "empty", "full", "empty_strided")),
})

# These make coordinates, of nothing. What others make so may be written to by code that nobody sees.
_COORDINATES = frozenset({"arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices"})

# These read entries of their first argument at places that another one holds.
_LOOK_UP = frozenset({"embedding", "index", "index_select", "gather", "take"})

# These go on with one tensor, value by value or nearly so, and not every torch says so of them.
_GO_ON = frozenset({
    *("leaky_relu", "elu", "hardtanh", "hardswish", "_prelu_kernel", "log_sigmoid_forward"),
    *("rrelu_with_noise", "clone", "_to_copy", "index_put", "_index_put_impl", "masked_fill"),
    *("native_layer_norm", "native_group_norm", "_fused_rms_norm"),
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
})

# These may weigh or shift what they read by numbers, and no more.
_BY_NUMBERS = frozenset({"add", "sub", "rsub", "mul", "div", "neg", "clone", "_to_copy"})

# These add up, weigh or shut out what they read, so that a sum may go on behind them.
_LINEAR = _BY_NUMBERS | {"masked_fill", "where", "index_put", "_index_put_impl"}

# These view a part of a tensor, which what is done to it then goes on from.
_CUT = frozenset({"select", "slice", "split", "split_with_sizes", "unbind"})

# These put what they read beside something else.
_BESIDE = frozenset({"cat", "stack", "copy", "index_put", "_index_put_impl"})

# These add up two tensors, of which they read the first as it is.
_ADD = frozenset({"add", "sub", "rsub", "lerp", "addcmul", "addcdiv"})

# These may drop at random, and are marked so, but do not where a network is evaluated.
_MAY_DROP = ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_rnn", "rrelu")

BATCH, OWN, CHANCE, UNKNOWN = "batch:", "own", "chance", "unknown"
"""Labels of the batch's tensors, of what the network holds and of coordinates, of random numbers, and of
what came from elsewhere, as data do that went through NumPy."""

ORIGINS = frozenset({OWN, CHANCE, UNKNOWN})
"""Labels of what is neither data of the batch nor a state."""

_NOTHING: frozenset[str] = frozenset()

OnSum = Callable[[Tensor, str, int, bool], None]
"""Takes a sum, the operator that takes it, its place among the tensors that this reads, and whether the
operator may give what counts as a sum itself, or holds it."""


class _OfFunctions:
    """Stands for operators that take functions, of which no schema tells anything."""

    _schema = SimpleNamespace(name="of_functions", is_mutable=False, arguments=())
    tags = ()
    is_view = False


class DataFlow(Watcher):
    """Labels that travel with the data, as long as the mode is entered.

    Every operator that torch runs passes on the labels of what it reads to what it writes. Tensors that
    share memory share labels, until a part of it is written to. Values are never touched, gradients
    never needed, and what cannot be followed (a round trip through NumPy, a kernel that torch does not
    know of) only loses its labels.

    Args:
        origins: Whether there are labels of coordinates, which operators make of nothing, of random
            numbers, and of what was read without a label, and orders of rows.
        on_mix: Called with what an operator reads, where that is several tensors, their labels, and the
            operator's name; says of which ones the labels go no further.
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
        on_mix: Callable[[Sequence[Tensor], Sequence[frozenset[str]], str], set[int]] | None = None,
        on_sum: OnSum | None = None,
    ) -> None:
        super().__init__()
        self.read: set[int] = set()
        self.idle: Set[str] = frozenset()
        self.lookups = 0
        self._origins, self._on_mix, self._on_sum = origins, on_mix, on_sum
        self._labels: dict[int, frozenset[str]] = {}
        self._parts: dict[int, LabelsByView] = {}
        self._merged: dict[int, dict[int, tuple[int, ...]]] = {}
        self._written: dict[int, LabelsByView] = {}
        self._writes = map(str, itertools.count())
        self._paired: dict[int, frozenset[int]] = {}
        # A weak reference keeps a storage's address from being given to another one.
        self._alive: dict[int, Any] = {}
        # Memory that held one value all over before an operator wrote to it.
        self._blank: set[int] = set()
        # Memory that holds a sum of what labels stand for, or what became of one alone, by its address;
        # of one number where it is the same sum, but for numbers that it was weighed or shifted by.
        self._sums: dict[int, int] = {}
        # How such a sum viewed its memory as it was added up.
        self._views: dict[int, tuple[Any, ...]] = {}
        self._numbers = itertools.count()
        self._axes = BatchAxes(self._keep_address)
        self._positions: dict[int, BatchAxes] = {}
        self._picks = PickedPositions(self._of_batch, self._keep_address)
        # By which axis of the batch is taken for that of the samples.
        self._rows = [self._rows_along(0)]

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied weak reference frees a storage twice, which ends the interpreter.
        return DataFlow, ()

    def _of_batch(self, tensor: Tensor, axis: int) -> tuple[bool | None, ...]:
        """Tell whether an axis is the first one of the batch's tensors, and whether the second."""
        return tuple(self._axes.is_along(tensor, axis, which) for which in range(2))

    def _rows_along(self, which: int) -> RowOrders:
        def is_along(tensor: Tensor, axis: int) -> bool | None:
            return self._axes.is_along(tensor, axis, which)

        return RowOrders(self._is_data, self._is_own, self._merges, is_along, self._keep_address)

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

    def merged(self, tensor: Tensor) -> tuple[int, ...] | None:
        """Read which axes were merged into a tensor's first one, outermost first.

        They are empty where merges of several kinds met, and ``None`` where none was seen.
        """
        if self.error is not None or tensor.is_nested or not tensor.ndim:
            return None
        return self._merges(tensor).get(tensor.shape[0])

    def _merges(self, tensor: Tensor) -> dict[int, tuple[int, ...]]:
        return self._merged.get(address_of(tensor), {})

    @kept_out_of_the_pass(NO_ORDERS)
    def orders(self, tensor: Tensor, which: int = 0) -> Orders:
        """Read which rows a tensor's rows are, where operators took them in another order.

        Samples are taken to be along one of the two first axes of the batch.
        """
        return self._rows[min(which, len(self._rows) - 1)].told(tensor)

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
        return len(tensor) in self._paired.get(address_of(tensor), ())

    @kept_out_of_the_pass()
    def sum_in(self, tensor: Tensor) -> int | None:
        """Find which sum of what was labelled, or what became of such a sum alone, a tensor is, if any.

        It is the same one where numbers alone weigh or shift it.
        """
        return self._sums.get(address_of(tensor)) if is_all_of_memory(tensor) else None

    def as_added(self, tensor: Tensor) -> Tensor:
        """Return a sum with its axes in the order that they had when it was added up."""
        view = self._views.get(address_of(tensor))
        if view is None or view == view_of_memory(tensor):
            return tensor
        place, shape, strides = view
        whole = tensor.as_strided(shape, strides, place)
        return tensor if whole.is_contiguous() and tensor.is_contiguous() else whole

    @kept_out_of_the_pass()
    def label_sum(self, tensor: Tensor, name: str) -> None:
        """Replace the labels of a sum, and of what is the same but for numbers, by one."""
        self.label(tensor, name)
        number = self.sum_in(tensor)
        for address, other in self._sums.items():
            if other == number and address not in self._parts:
                self._labels[address] = frozenset({name})

    def _is_data(self, tensor: Tensor) -> bool:
        return not self._held(tensor) <= ORIGINS

    def _is_own(self, tensor: Tensor) -> bool:
        return self._get(tensor) == {OWN}

    @kept_out_of_the_pass()
    def precede(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        """Note what a tensor holds before an operator writes to it, or goes on with it."""
        if self._on_sum is not None and self._sums:
            self._show_sums(self._on_sum, func, args, kwargs)
        written = flat((*args, *kwargs.values())) if self._origins and func._schema.is_mutable else ()
        self._blank = {address_of(t) for t in written if not self._get(t) and _is_one_value(t)}

    @kept_out_of_the_pass()
    def follow(self, func: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        """Pass labels on from what an operator read to what it wrote."""
        name, given = func._schema.name.rpartition("::")[2], flat((*args, *kwargs.values()))
        lost = _overwritten(name, args, kwargs) if func._schema.is_mutable else ()
        kept = [(t, i in lost) for i, t in enumerate(given) if i not in lost or not is_all_of_memory(t)]
        reads = [tensor for tensor, _ in kept]
        # What a part holds is lost as well, but not what is told of all its memory.
        over = {place for place, (_, is_lost) in enumerate(kept) if is_lost}
        known = [] if name in _SHAPE_ONLY else self._known(func, kept, out)
        if known:
            for followed in (self._axes, *self._positions.values()):
                followed.follow(func, args, reads, out)
        if self._origins and known:
            self._picks.follow(func, args, reads, [of - ORIGINS for of in known], out)
            for rows in self._rows if self._merged else ():
                rows.follow_met(name, args, reads, out, by_entry=torch.Tag.pointwise in func.tags)
            sorts, *_ = [rows.follow(name, args, reads, out) for rows in self._rows]
            if sorts:
                reads, known = _without_sorts(reads, known, sorts)
                over = set()
        if self._origins and name in _LOOK_UP and len(known) > 1:
            self.lookups += _is_lookup(reads, known)
        ends = set[int]()
        if self._on_mix is not None and len(known) > 1:
            ends = self._on_mix(reads, known, name)
        ends |= over
        labels = _NOTHING.union(*(of for i, of in enumerate(known) if i not in ends))
        if self._origins:
            if torch.Tag.nondeterministic_seeded in func.tags and not _is_off(name, args):
                labels |= {CHANCE}
            elif name in _COORDINATES:
                labels |= {OWN}
            unlabelled = (reads[i] for i, of in enumerate(known) if not of and i not in ends)
            if not all(address_of(t) in self._blank or _is_one_value(t) for t in unlabelled):
                labels |= {UNKNOWN}
            elif reads and not labels and any(_may_vary(t, func) for t in flat([out])):
                # Of one value all over, functions make coordinates, as masks of what is before.
                labels = frozenset({OWN})
        if self._origins:
            # A mask says which entries count, and is nothing that is added up.
            own = [_NOTHING if i in ends else of - ORIGINS for i, of in enumerate(known)]
            self._note_sum(name, func, args, reads, own, out)
        if func._schema.is_mutable:
            self._label_written(func, args, kwargs, labels)
        places = {address_of(tensor) for tensor in reads}
        if name not in _SHAPE_ONLY:
            self.read |= places - {0}
        # A view keeps the labels of what it views.
        made = [tensor for tensor in flat([out]) if address_of(tensor) not in places]
        for tensor in made:
            self._set(tensor, labels)
        if self._origins and known and (sizes := self._paired_by(name, reads, known, out)):
            for tensor in flat([out]):
                if address := address_of(tensor):
                    self._paired[address] = sizes
                    self._keep_address(tensor, address)
        self._follow_merges(name, args, reads, out, flat([out]) if func._schema.is_mutable else made)

    def _label_written(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, labels: frozenset[str]
    ) -> None:
        """Let what an operator wrote in place have labels."""
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in flat([named.get(argument.name)]):
                    self._set_part(tensor, labels)
                    # What is viewed otherwise from now on holds the same values.
                    if torch.Tag.inplace_view not in func.tags:
                        self._note_write(tensor)

    def _follow_merges(
        self,
        name: str,
        args: tuple[Any, ...],
        reads: Sequence[Tensor],
        out: Any,
        written: Iterable[Tensor],
    ) -> None:
        """Pass on which axes were merged, to all that an operator has written."""
        merged = {} if name in _SHAPE_ONLY else self._merges_of(reads)
        if merged and _picks_rows(name, args) and isinstance(out, Tensor) and out.ndim:
            merged[out.shape[0]] = ()
        for tensor in written:
            self._set_merged(tensor, merged)
        # Parts of one tensor are put together to no more than it was.
        grows = isinstance(out, Tensor) and not self._rows[0].is_whole_again
        if grows and (axes := _merged_axes(name, args, out)):
            # What was read may be merged itself.
            place = 1 if axes[0] < 0 else 0
            whole = (
                *axes[:place],
                *(merged.get(axes[place]) or axes[place : place + 1]),
                *axes[place + 1 :],
            )
            self._set_merged(out, {**merged, out.shape[0]: whole})

    def follow_functions(self, given: Any, out: Any) -> None:
        """Pass on what labels no operator within passed on."""
        known = [tensor for tensor in flat([out]) if not self.labels(tensor)]
        self.follow(_OfFunctions, (), dict(enumerate(flat(given))), known)

    def _show_sums(self, show: OnSum, func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        """Show sums that an operator goes on with otherwise than to add or to weigh them."""
        name = func._schema.name.rpartition("::")[2].rstrip("_")
        # What is copied to memory of another order is no longer laid out as what was added up.
        turns = kwargs.get("memory_format") not in (None, torch.preserve_format)
        is_view = func.is_view and (name not in _CUT or _leaves_all(name, args))
        is_kept = name in _LINEAR or name in _SHAPE_ONLY or is_view
        tensors = list(flat((*args, *kwargs.values())))
        # A square, as x * x.
        is_kept &= name != "mul" or len({address_of(tensor) for tensor in tensors}) == len(tensors)
        if is_kept and not turns:
            return
        goes_on = torch.Tag.pointwise in func.tags or name in _GO_ON | _BESIDE
        goes_on |= _is_per_position(func, args, kwargs)
        for place, tensor in enumerate(tensors):
            if self.sum_in(tensor) is not None and not (is_kept and self.as_added(tensor) is tensor):
                show(tensor, name, place, goes_on)

    def _note_sum(
        self,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        reads: Sequence[Tensor],
        known: Sequence[frozenset[str]],
        out: Any,
    ) -> None:
        """Note whether an operator gave a sum of what labels stand for, or went on with one alone."""
        plain = name.rstrip("_")
        data = [(address_of(t), of) for t, of in zip(reads, known, strict=False) if of]
        # A norm that is written out multiplies a sum by what it made of this one alone.
        alone = len({of for _, of in data}) == 1
        goes_on = alone and (torch.Tag.pointwise in func.tags or plain in _GO_ON)
        before = [self._sums[address] for address, _ in data if address in self._sums]
        is_sum = goes_on and bool(before)
        is_same = is_sum and plain in _BY_NUMBERS and all(t.numel() < 2 for t in reads[1:])
        is_sum |= plain in _ADD and len(data) == 2 and bool(known[0])
        if name in ("sum", "mean"):
            # Of what was stacked, or written side by side, along one axis.
            is_sum = args[0].ndim == out.ndim + 1 and any(len(of) > 1 for _, of in data)
        for written in flat([out]):
            if is_sum and is_all_of_memory(written) and (address := address_of(written)):
                self._sums[address] = before[0] if is_same else next(self._numbers)
                if has_places(written):
                    self._views[address] = view_of_memory(written)
                self._keep_address(written, address)
                # Of what a norm gives beside, nothing goes on.
                break
            if func._schema.is_mutable:
                self._sums.pop(address_of(written), None)

    def _merges_of(self, reads: Iterable[Tensor]) -> dict[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}
        for tensor in reads:
            for size, axes in self._merges(tensor).items():
                # Rows that were picked say nothing of how those beside them came about.
                before = found.get(size) or axes
                found[size] = before if axes in ((), before) else ()
        return found

    def _paired_by(
        self, name: str, reads: Sequence[Tensor], known: Sequence[frozenset[str]], out: Any
    ) -> frozenset[int]:
        """Return how many rows met each other in what an operator gave, or in what it read."""
        sizes = frozenset[int]()
        if self._paired:
            sizes = sizes.union(*(self._paired.get(address_of(tensor), ()) for tensor in reads))
        if isinstance(out, Tensor) and _may_hold_pairs(out):
            own = ORIGINS | self.idle
            data = [None if of <= own else read for of, read in zip(known, reads, strict=True)]
            size = _n_paired(name, data, out)
            sizes = sizes | {size} if size > 1 else sizes
        return sizes

    def _set_merged(self, tensor: Tensor, merged: dict[int, tuple[int, ...]]) -> None:
        address = address_of(tensor)
        if address and (merged or address in self._merged):
            self._merged[address] = merged
            self._keep_address(tensor, address)

    def _known(self, func: Any, kept: Sequence[tuple[Tensor, bool]], out: Any) -> list[frozenset[str]]:
        """Read the labels of what an operator reads, of all the memory where it only writes or views."""
        if not self._parts:
            return [self._get(tensor) for tensor, _ in kept]
        places = {address_of(tensor) for tensor, _ in kept}
        views = func.is_view and all(address_of(tensor) in places for tensor in flat([out]))
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


def _is_per_position(func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Check whether an operator gives numbers by position, as norms divide what they are of by."""
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    dims, tensor = named.get("dim"), args[0] if args else None
    if not (named.get("keepdim") and isinstance(tensor, Tensor)):
        return False
    axes = [axis % tensor.ndim for axis in ([dims] if isinstance(dims, int) else dims or ())]
    # Channels come last, but for those of images.
    return axes == [tensor.ndim - 1] or (axes == [1] and tensor.ndim > 3)


def _leaves_all(name: str, args: tuple[Any, ...]) -> bool:
    """Check whether a slice is one of everything, as older torch makes of `:` beside other indices."""
    if name != "slice":
        return False
    given: list[Any] = [*args, *(0, None, None, 1)[len(args) - 1 :]]
    tensor, axis, start, end, step = given
    return bool(not start and step == 1 and (end is None or end >= tensor.shape[axis]))


def _is_one_value(tensor: Tensor) -> bool:
    """Check whether a tensor holds one value all over; a single number is hardly ever data."""
    if tensor.numel() < 2 or torch._is_zerotensor(tensor):
        return True
    # To ask a DTensor is a collective, which the other processes may be in no place for.
    may_ask = is_underived(tensor) and has_places(tensor) and are_data(tensor)
    return may_ask and bool((tensor == tensor[(0,) * tensor.ndim]).all())


def _may_vary(tensor: Tensor, func: Any) -> bool:
    """Check whether a tensor has several values, as it may where an operator wrote one to a part."""
    return not _is_one_value(tensor) or (func._schema.is_mutable and not is_all_of_memory(tensor))


_OVERWRITE = {"copy_", "fill_", "zero_"}


def _overwritten(name: str, args: tuple[Any, ...], kwargs: Any) -> set[int]:
    """Find places of tensors that an operator is given to write over, without reading them."""
    # Of what draws, the second one takes what is drawn.
    of_self, of_second = name in _OVERWRITE, name.startswith("rrelu_with_noise")
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
    table = reads[0]
    is_table = known[0] == {OWN} and table.is_floating_point() and table.ndim > 1
    # Integers of the batch are tokens, positions or steps in time.
    chosen = (name for labels in known[1:] for name in labels - ORIGINS)
    return is_table and not all(name.startswith(BATCH) for name in chosen)


def _picks_rows(name: str, args: tuple[Any, ...]) -> bool:
    """Check whether an operator takes rows in an order of its own."""
    if name == "index_select":
        return args[1] in (0, -args[0].ndim)
    index = args[1][0] if name == "index" and args[1] else None
    if index is None:
        return False
    # Neighbours that are named for each row are in its place.
    return bool(index.dtype == torch.bool or index.numel() == max(index.shape, default=1))


_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_cdist_forward", "_euclidean_dist"})


def _may_hold_pairs(tensor: Tensor) -> bool:
    """Check whether a tensor has two axes of one size in front, or behind one of heads."""
    if tensor.is_nested:
        return False
    shape = tensor.shape
    return len(shape) > 1 and (shape[0] == shape[1] or (len(shape) == 3 and shape[1] == shape[2]))


def _n_paired(name: str, reads: Sequence[Tensor | None], out: Tensor) -> int:
    """Return how many rows of data an operator puts to each of as many others; 0 where it does not.

    It does as it multiplies two tensors of data, combines them along axes of their own, or takes rows
    apart that were repeated. What it reads is ``None`` where that is no data.
    """
    data = [t for t in reads if t is not None and has_places(t)]
    if name in _PRODUCTS:
        both = all(read is not None for read in reads[-2:])
        return out.shape[-1] if both and out.shape[-1] == out.shape[-2] else 0
    if name in _VIEWS:
        size = out.shape[0]
        apart = size == out.shape[1] and any(read.shape[:1] == (size * size,) for read in data)
        return size if apart else 0
    for read in data:
        # Expanded along one of two axes, as x[None] and x[:, None] are, whatever combines them later.
        alike = read.ndim > 2 and read.shape[0] == read.shape[1] and read.shape[:2] == out.shape[:2]
        if alike and (read.stride(0) == 0) != (read.stride(1) == 0):
            return read.shape[0]
    spread = [_spread_axes(read, out) for read in data] if len(data) > 1 else []
    for one, other in itertools.combinations(spread, 2):
        for axis in one - other:
            if any(out.shape[axis] == out.shape[k] for k in other - one):
                return out.shape[axis]
    return 0


def _spread_axes(tensor: Tensor, out: Tensor) -> set[int]:
    """Find the axes of an operator's output along which something that it read is the same."""
    missing = out.ndim - tensor.ndim
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    alike = {missing + axis for axis, (size, stride) in enumerate(sizes) if size == 1 or stride == 0}
    return {axis for axis in alike | {*range(missing)} if axis >= 0 and out.shape[axis] > 1}


_VIEWS = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "flatten"})


def _merged_axes(name: str, args: tuple[Any, ...], out: Tensor) -> tuple[int, ...]:
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
    if name not in _VIEWS or args[0].is_nested:
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
