"""Turns recorded tensors into rows: batch axis, layout, pooling."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman.network.arguments import check_each
from lightning_koopman.network.axes.batch_axes import Place
from lightning_koopman.network.axes.input_data import is_edge_index
from lightning_koopman.network.axes.row_order import (
    NO_ORDERS,
    Orders,
    have_met,
    rows_found,
    sample_places,
)
from lightning_koopman.network.names import is_sum
from lightning_koopman.network.tensors import all_tensors, need_not_wait, tensors_inside


class Pick(NamedTuple):
    """One of several positions: the first, the last, or one that a tensor tells.

    Attributes:
        axis: That the positions were along, of three.
        size: How many there were.
        is_last: Whether it is the last one.
        by_data: Whether a tensor says which one, as of sequences of differing length.
        places: Which one it is of each sample, where they differ; it is then the last that holds data if
            that is what the batch says.
        is_moved: Whether functions put other positions in its place before, or made it of several.
        of_batch: Whether the axis is known to be the first one of the batch's tensors, or not to be, and
            whether the second.
    """

    axis: int
    size: int
    is_last: bool
    by_data: bool
    places: tuple[int, ...] = ()
    is_moved: bool = False
    of_batch: tuple[bool | None, ...] = (None, None)


Picks = Mapping[str, Pick]
"""What was picked of states, by their labels; those of which more positions are held are not in."""

NO_PICKS: Picks = MappingProxyType({})


@dataclass(frozen=True)
class Recorded:
    """One state as a module gave it.

    Attributes:
        name: Of the component, or of the network input.
        module: That gave the tensor, or that took it where it is an input.
        tensor: The state; padded, with the batch axis first, where it was a packed sequence.
        lengths: Valid length of each sequence where it was packed, else ``None``.
        sources: The states it was computed from, directly; ``None`` where the data was not followed.
        from_float: Whether the component took a floating-point tensor.
        is_loss: Whether it compares other states with data that no other component takes.
        is_frozen: Whether its component has parameters, and none of them is trained.
        merged: The axes that were merged into the tensor's first one, outermost first; empty where
            merges of several kinds met, ``None`` where none was seen.
        ignores_data: Whether no data of the batch reaches it, though its component was given some or
            took no floating-point tensor: position embeddings, as a rule.
        is_idle: Whether it is known to be made of nothing but what the network holds itself, such as a
            grid or learned queries.
        is_input: Whether it is what the network takes in.
        is_further: Whether it is returned and made of one state by what no component does.
        from_data: Whether data of the batch are known to reach it.
        is_behind: Whether the components' common ancestor had returned before.
        is_pairwise: Whether it has a value for each pair of samples in the batch.
        holds: The states that are mixed into it, where it is an input.
        orders: Which rows its rows are, where the network took rows in another order, and which met.
        second_orders: The same, where samples are along the second axis of the batch.
        places: Where the two first axes of the batch are, as far as that is known.
        picks: The states of which one position alone is in it.
        positions: The tensors of the batch, by number, whose positions it has, of several that have any.
    """

    name: str
    module: nn.Module
    tensor: Tensor
    lengths: Tensor | None = None
    sources: frozenset[str] | None = None
    from_float: bool = True
    is_loss: bool = False
    is_frozen: bool = False
    ignores_data: bool = False
    is_idle: bool = False
    is_input: bool = False
    is_further: bool = False
    from_data: bool = False
    is_behind: bool = False
    is_pairwise: bool = False
    holds: frozenset[str] = frozenset()
    merged: tuple[int, ...] | None = None
    orders: Orders = field(default_factory=dict)
    second_orders: Orders = field(default_factory=dict)
    places: tuple[Place | None, ...] = (None, None)
    picks: Picks = field(default_factory=dict)
    positions: frozenset[int] = frozenset()

    @property
    def is_part(self) -> bool:
        """Whether its rows are known to be some of those that there were."""
        order = self.orders.get(self.tensor.shape[0])
        return order is not None and not order.is_of_all

    def in_order(self, form: RowForm) -> Tensor:
        """Return the tensor with its rows in the order of the batch."""
        if not self._may_be_out_of_order(form):
            return self.tensor
        places = sample_places(*form.rows_of(self.tensor), self._orders(form))
        if places is None:
            return self.tensor
        return self.tensor.detach().index_select(form.batch_axis, places.to(self.tensor.device))

    def strays(self, form: RowForm) -> bool:
        """Check whether rows are known not to be those of all samples, each as often as others."""
        if not self._may_be_out_of_order(form):
            return False
        n_rows, samples = form.rows_of(self.tensor)
        found = rows_found(n_rows, samples, self._orders(form))
        return found is not None and not torch.equal(found.sort()[0], samples.sort()[0])

    def is_swapped(self, form: RowForm, n_samples: int) -> bool:
        """Check whether samples are a row each, but in an order of which no more is known.

        They lie further apart than neighbours do, as where a network stacks halves of a batch and turns
        them.
        """
        place, shape = self.places[form.of_axis], self.tensor.shape
        if place is None or place.axis != form.batch_axis or place.inner == 1:
            return False
        return shape[place.axis] == n_samples and n_samples not in self._orders(form)

    def mixes(self, form: RowForm) -> bool:
        """Check whether rows of several samples were put together."""
        if not self._may_be_out_of_order(form):
            return False
        n_rows, samples = form.rows_of(self.tensor)
        known = self._orders(form)
        orders = (known.get(size) for size in {n_rows, int(samples.max()) + 1})
        mixed = any(order is not None and order.is_of_all and order.mixed for order in orders)
        return mixed or (form.group == 1 and self.merged is not None and self.meet(n_rows))

    def meet(self, n_rows: int) -> bool:
        """Check whether several of that many rows, which axes were merged into, were put together."""
        return have_met(self.orders, n_rows)

    def may_be_turned(self, form: RowForm) -> bool:
        """Check whether samples may as well be along the second axis, for all that is known."""
        shape, is_data = self.tensor.shape, self.from_data and not self.is_idle
        is_square = len(shape) > 2 and shape[0] == shape[1] > 1 and form.group == 1
        is_first = form.batch_axis == 0 and self.lengths is None and not callable(form.reduce)
        return is_data and is_square and is_first and self.places[form.of_axis] is None

    def _may_be_out_of_order(self, form: RowForm) -> bool:
        if not self._orders(form) or not self.tensor.numel():
            return False
        # Of two axes of one size, orders are told along the first, unless more is known.
        is_first = form.batch_axis == 0 or self.tensor.shape[0] != self.tensor.shape[1]
        return is_first or self.places[form.of_axis] == (form.batch_axis, 1)

    def _orders(self, form: RowForm) -> Orders:
        return self.second_orders if form.of_axis else self.orders


def with_lengths_in_order(recorded: Recorded) -> Recorded:
    """Put packed sequences, and their lengths, in the order of the batch."""
    lengths, form = recorded.lengths, RowForm()
    if lengths is None or not recorded.orders:
        return recorded
    of_lengths = replace(recorded, tensor=lengths)
    return replace(
        recorded, tensor=recorded.in_order(form), lengths=of_lengths.in_order(form), orders=NO_ORDERS
    )


Reduction = Literal["pool", "flatten", "mean", "last", "cls"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)

Reduce = Reduction | Callable[[Tensor], Any]
"""How the spatial or sequence axes of a state become part of one row per sample."""

_POOLED_CELLS = 16
_STRIP = 64  # values of which pooling by strips is faster than by one product
_POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}
_FINEST = (
    4  # values a kept direction: held-out R² of a small ResNet's blocks rose by .01 to .03 from 1 to 4
)
_CHANNEL_COUNTS: tuple[tuple[Any, str, str | None], ...] = (
    (nn.modules.conv._ConvNd, "out_channels", "in_channels"),
    (nn.modules.batchnorm._BatchNorm, "num_features", "num_features"),
    (nn.modules.instancenorm._InstanceNorm, "num_features", "num_features"),
    (nn.GroupNorm, "num_channels", "num_channels"),
    (nn.Linear, "out_features", "in_features"),
    (nn.Embedding, "embedding_dim", None),
    (nn.LayerNorm, "normalized_shape", "normalized_shape"),
)
"""Where layers say how many channels they give, and how many they take."""


@dataclass(frozen=True)
class RowForm:
    """How one state's tensor becomes rows, settled on the first pass.

    Attributes:
        batch_axis: Which axis holds the samples.
        group: How many entries of that axis belong to one sample.
        run: How many of these are neighbours, before those of the next sample come; 0 if all are.
        channels_first: Whether the axis behind the batch, not the last, holds the channels.
        grid: Cells that the spatial or sequence axes are pooled to.
        reduce: What is done with these axes.
        picked: The position that the network goes on with alone; it is kept behind the others, which are
            pooled.
        is_alone: Whether nothing but that position is kept.
        by_data: Whether that is the last one that holds data, wherever the padding is.
        padding: Name of what says which positions hold data, see :mod:`.padding`.
        is_input: Whether it is what the network takes in, whose bits tell the folds.
        of_batch: Whether several entries belong to each row of the batch.
        of_axis: Which axis of the batch's tensors the samples are along.
        is_placed: Whether the network adds it to all samples alike, see :func:`.padding.with_places`.
    """

    batch_axis: int = 0
    group: int = 1
    run: int = 0
    channels_first: bool = False
    grid: tuple[int, ...] = ()
    reduce: Reduce = "pool"
    picked: Literal[0, -1] | None = None
    is_alone: bool = False
    by_data: bool = False
    padding: str | None = None
    is_input: bool = False
    of_batch: bool = False
    of_axis: int = 0
    is_placed: bool = False

    def samples(self, n_rows: int, n_samples: int) -> Tensor:
        """Return the sample of each entry of the batch axis, in any batch."""
        return torch.arange(n_rows, device="cpu") // (self.run or n_rows // n_samples) % n_samples

    def rows_of(self, tensor: Tensor) -> tuple[int, Tensor]:
        """Count the rows along the axis of samples, and return the sample of each."""
        n_rows = tensor.shape[self.batch_axis]
        return n_rows, self.samples(n_rows, max(1, n_rows // self.group))

    def in_batch(self, tensor: Tensor, batch: Any) -> RowForm:
        """Return the form of a batch whose samples may have other numbers of rows each."""
        if self.run > 1 or self.batch_axis or not self.of_batch or not tensor.ndim:
            return self
        given = rows_given(batch)
        group = len(tensor) // max(1, given)
        alike = group == self.group or group * given != len(tensor)
        return self if alike else replace(self, group=group)

    def width(self, tensor: Tensor) -> int:
        """Return how many values each row has, where the user does not reduce them otherwise."""
        values = by_sample(tensor, self) if tensor.ndim else tensor.view(1, 1)
        if callable(self.reduce) or self.reduce == "flatten" or values.ndim <= 2:
            return values[0].numel() if len(values) else 0
        channels = values.shape[1 if self.channels_first else -1]
        cells = math.prod(self.grid) if self.reduce == "pool" else 1
        return channels * (1 if self.is_alone else cells + (self.picked is not None))

    def rows(self, tensor: Tensor, valid: Tensor | None = None) -> Tensor:
        """Apply the form; of sequences, use what a mask or lengths say holds data."""
        if tensor.ndim == 0 or tensor.numel() == 0:
            raise ValueError(
                f"a state of shape {tuple(tensor.shape)} is no row of values per sample; leave the "
                "component out, or the batch if it is empty"
            )
        if self.is_placed:
            tensor = tensor[None] if tensor.ndim == 2 else tensor
            tensor = tensor if valid is None else tensor.expand(len(valid), -1, -1)
        # copy=True even where nothing changes: a later in-place module may overwrite the tensor.
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        if callable(self.reduce):
            values = self.reduce(tensor.detach())
            if not isinstance(values, Tensor) or values.ndim == 0:
                raise ValueError(f"reduce gave {type(values).__name__}; it must give one row per sample")
            return values.detach().reshape(values.shape[0], -1).to(dtype, copy=True)
        values = by_sample(tensor.detach(), self)
        if values.ndim <= 2 or self.reduce == "flatten":
            return values.reshape(values.shape[0], -1).to(dtype, copy=True)
        if not self.channels_first:
            values = values.movedim(-1, 1)
        mask = None if valid is None else _mask_of(values, valid)
        if self.picked is not None:
            return self._with_picked(values, mask, dtype)
        reduced = self._reduced(values, mask)
        own = reduced.untyped_storage()._cdata != tensor.untyped_storage()._cdata
        return reduced.to(dtype, copy=not own).flatten(1)

    def _with_picked(self, values: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Keep the picked position, behind what the others become, or alone."""
        picked = _last(values, mask) if self.by_data else values[:, :, self.picked]
        if self.is_alone:
            return picked.to(dtype, copy=True)
        others = slice(1, None) if self.picked == 0 else slice(0, -1)
        if self.by_data and mask is not None:
            places = torch.arange(mask.shape[1], device=mask.device)
            is_other = mask & (places != last_valid(mask)[:, None])
            mask, others = is_other | (mask & ~is_other.any(dim=1, keepdim=True)), slice(None)
        # A sequence of one has no others.
        others = others if values.shape[2] > 1 else slice(None)
        mask = None if mask is None else mask[..., others]
        reduced = self._reduced(values[..., others], mask)
        return torch.cat([reduced.flatten(1).to(dtype), picked.to(dtype)], dim=1)

    def _reduced(self, values: Tensor, valid: Tensor | None) -> Tensor:
        """Reduce the axes behind the channels: ``(n_samples, channels, …)``."""
        if self.reduce == "mean":
            return _cell_means(values.flatten(2), 1, valid)
        if self.reduce == "pool":
            # Rank above 5 only where axes are folded, which loses nothing that pooling would keep.
            values = values.flatten(4) if values.ndim > 5 else values
            if valid is not None:
                return _cell_means(values, self.grid[0], valid)
            if tuple(values.shape[2:]) == self.grid:
                return values
            wide = values.to(torch.promote_types(values.dtype, torch.float32))
            # A product is faster where positions are neighbours in memory, but its last digits depend on
            # how many samples there are.
            if len(self.grid) == 1 or self.is_input or not wide.is_contiguous():
                return _POOLS[len(self.grid)](wide, self.grid)
            return _pooled(wide, self.grid)
        if values.ndim != 3:
            raise ValueError(
                f"reduce={self.reduce!r} takes sequences, but a state has {values.ndim - 2} axes beside "
                "samples and channels; use 'mean', 'flatten' or a callable there"
            )
        return values[:, :, 0] if self.reduce == "cls" else _last(values, valid)


def _last(values: Tensor, valid: Tensor | None) -> Tensor:
    """Return the last position that holds data, wherever the padding is."""
    if valid is None:
        return values[:, :, -1]
    return values[torch.arange(len(values), device=values.device), :, last_valid(valid)]


def last_valid(valid: Tensor) -> Tensor:
    """Return the last position of each sample that holds data."""
    return (torch.arange(valid.shape[1], device=valid.device) * valid).argmax(dim=1)


def by_sample(tensor: Tensor, form: RowForm) -> Tensor:
    """Bring the samples to axis 0."""
    values = tensor.movedim(form.batch_axis, 0) if tensor.ndim > 1 else tensor.reshape(-1)
    group, run = form.group, form.run or form.group
    if group > 1 and values.shape[0] % group == 0:
        size = values.shape[0] // group
        values = values.reshape(group // run, size, run, *values.shape[1:]).transpose(0, 1)
        values = values.reshape(size, group, *values.shape[3:])
    return values if values.ndim > 1 else values[:, None]


def n_positions(tensor: Tensor, form: RowForm) -> int:
    """Count the positions of a sequence; what is none has 0."""
    shape = by_sample(tensor, form).shape if tensor.ndim else ()
    return shape[2 if form.channels_first else 1] if len(shape) == 3 else 0


def pooled_grid(shape: tuple[int, ...], max_dim: int, *, channels_first: bool) -> tuple[int, ...]:
    """Choose how far a state is pooled."""
    if len(shape) < 2:
        return ()
    channels = shape[0] if channels_first else shape[-1]
    axes = shape[1:] if channels_first else shape[:-1]
    if len(axes) > 3:
        axes = (*axes[:2], math.prod(axes[2:]))
    if channels * math.prod(axes) <= max_dim:
        return axes
    cells = min(_POOLED_CELLS, max(1, 16 * max_dim // channels))
    side = max(1, int(cells ** (1 / len(axes)) + 1e-9))
    # Few channels leave room for a finer grid, of which POD can then keep what varies most.
    side = max(side, math.ceil((_FINEST * max_dim / channels) ** (1 / len(axes)) - 1e-9))
    return tuple(min(side, size) for size in axes)


def _pooled(values: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Average ``(n, channels, …)`` over the cells of a grid, side by side, by one product."""
    sizes = tuple(values.shape[2:])
    # Strips along the first axis that are pooled alike: of the weights, most of which are zeros, fewer.
    strips = math.gcd(sizes[0], grid[0])
    if math.prod(sizes) < _STRIP * strips:
        strips = 1
    sizes, grid = (sizes[0] // strips, *sizes[1:]), (grid[0] // strips, *grid[1:])
    weights = _cell_weights(sizes, grid, values.device, values.dtype)
    # Hooks run in the user's autocast, where a product would lose half its digits.
    with torch.autocast(values.device.type, enabled=False):
        cut = values.view(*values.shape[:2], strips, math.prod(sizes))
        return F.linear(cut, weights).flatten(2)


@functools.lru_cache(maxsize=64)
def _cell_weights(
    sizes: tuple[int, ...], grid: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the weights of the positions in the average of each cell, ``(cells, positions)``.

    The cells are those of ``torch.nn.functional.adaptive_avg_pool2d``.
    """
    with torch.inference_mode(False):
        weights = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        for size, cells in zip(sizes, grid, strict=True):
            cell, place = torch.arange(cells, device="cpu")[:, None], torch.arange(size, device="cpu")
            inside = (place >= cell * size // cells) & (place < -(-(cell + 1) * size // cells))
            weights = torch.kron(weights, inside / inside.sum(dim=1, keepdim=True).double())
        return weights.to(device, dtype, non_blocking=need_not_wait(device))


def _mask_of(values: Tensor, valid: Tensor) -> Tensor | None:
    """Return which positions of ``(n, channels, length)`` hold data, where the marks are about these."""
    if valid.ndim > 1:
        return valid if (values.shape[0], *values.shape[2:]) == valid.shape else None
    if values.ndim != 3:
        return None
    size = values.shape[2]
    fits = valid.max() <= size
    # Asking a device would wait for it: there, a state of another length is used as a whole.
    if valid.device.type == "cpu" and not bool(fits):
        return None
    return (torch.arange(size, device=valid.device) < valid[:, None]) | ~fits


def _cell_means(values: Tensor, cells: int, valid: Tensor | None) -> Tensor:
    """Average sequences ``(n, channels, length)`` over equal cells of their valid positions."""
    if valid is None:
        valid = torch.ones(values.shape[0], values.shape[2], dtype=torch.bool, device=values.device)
    lengths = valid.sum(dim=1).clamp_min(1)[:, None, None]
    place = (valid.cumsum(dim=1) - 1)[:, None, :]
    cell = torch.arange(cells, device=values.device)[None, :, None]
    inside = (place >= cell * lengths // cells) & (place < -(-(cell + 1) * lengths // cells))
    weights = (inside & valid[:, None, :]).to(torch.promote_types(values.dtype, torch.float32))
    weights = weights / weights.sum(dim=2, keepdim=True).clamp_min(1)
    # Hooks run in the user's autocast, where a product would lose half its digits.
    with torch.autocast(values.device.type, enabled=False):
        means: Tensor = values.to(weights) @ weights.transpose(1, 2)
    return means


def has_channels_first(tensor: Tensor, module: nn.Module, *, is_input: bool = False) -> bool:
    """Guess the layout of a module's output, or of what it takes."""
    if tensor.ndim < 3:
        return False
    parts = [*module.modules()]
    for part in parts if is_input else reversed(parts):
        for kind, given, taken in _CHANNEL_COUNTS:
            attribute = taken if is_input else given
            if attribute is not None and isinstance(part, kind):
                count = getattr(part, attribute)
                count = count[-1] if isinstance(count, tuple) else count
                are_first, are_last = tensor.shape[1] == count, tensor.shape[-1] == count
                # A linear layer that takes as many as there are along axis 1 mixes positions, and one
                # that takes as many as a square image is wide may take patches of it.
                by_last = is_input and isinstance(part, nn.Linear | nn.LayerNorm)
                are_square = tensor.ndim == 4 and tensor.shape[-2] == count
                if are_first != are_last and (not by_last or (are_last and not are_square)):
                    return bool(are_first)
    if tensor.ndim == 4 and tensor.shape[1] == tensor.shape[2] != tensor.shape[3]:
        return False
    return tensor.ndim > 3


def pooling_index(records: Sequence[Recorded], returned_rows: Collection[int], batch: Any) -> int | None:
    """Find what tells the samples of rows where the last state, or what is returned, has fewer."""
    sizes, ends = row_counts(record.tensor for record in records), row_counts([records[-1].tensor])
    return index_of_samples(sizes, ends.union(returned_rows), batch)


def row_counts(tensors: Iterable[Tensor]) -> set[int]:
    """Collect how many rows tensors have."""
    return {len(tensor) for tensor in tensors if tensor.ndim and not tensor.is_nested}


def index_of_samples(sizes: Collection[int], ends: Collection[int], batch: Any) -> int | None:
    """Find which tensor of a batch says what sample each row belongs to, where rows are nodes of graphs.

    It holds one integer for each row of states of some ``sizes``, and they count up to one of the
    ``ends``: how many rows there are where the network has pooled them.
    """
    for place, index in enumerate(tensors_inside(batch)):
        if index.ndim == 1 and not index.is_floating_point() and len(index) in sizes:
            counts = bool((index.diff() >= 0).all()) and index[0] == 0
            if counts and int(index[-1]) + 1 in {*ends} - {len(index)}:
                return place
    return None


def samples_of_rows(place: int | None, n_rows: int, batch: Any) -> Tensor | None:
    """Return the sample of each of so many rows, of nodes or of edges between them, if it is told."""
    if place is None:
        return None
    tensors = list(tensors_inside(batch))
    index = tensors[place] if place < len(tensors) else None
    # Another batch may hold something else there.
    if index is None or index.ndim != 1 or index.is_floating_point():
        return None
    if n_rows == len(index):
        return index
    ends = next((t[0] for t in tensors if is_edge_index(t) and t.shape[1] == n_rows), None)
    return None if ends is None or not n_rows or int(ends.max()) >= len(index) else index[ends]


def pooled_by(place: int | None, tensor: Tensor, batch: Any) -> Tensor:
    """Average rows of nodes, or of edges between them, over each sample that a tensor tells, if any."""
    index = samples_of_rows(place, len(tensor), batch) if tensor.ndim else None
    if index is None:
        return tensor
    values = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
    sums = values.new_zeros(int(index.max()) + 1, *tensor.shape[1:]).index_add_(0, index, values)
    counts = index.bincount(minlength=len(sums)).clamp_min(1)
    return sums / counts.view(-1, *[1] * (tensor.ndim - 1))


ReduceOption = Reduce | Mapping[str, Reduce]


def row_forms(
    records: Sequence[Recorded], batch: Any, reduce: ReduceOption, max_dim: int
) -> dict[str, RowForm]:
    """Settle how each recorded tensor becomes rows."""
    n_samples, second = batch_size(records, batch)
    turned = any(has_batch_second(record.module) for record in records)
    given = rows_given(batch)
    of_axis = _axis_of_samples(records, batch, n_samples)
    forms, images, has_sequences = dict[str, RowForm](), list[str](), False
    for record in records:
        shape = record.tensor.shape
        if is_sum(record.name) and (form := _form_of_part(record, records, forms)) is not None:
            forms[record.name] = replace(form, is_input=False)
            continue
        chosen = _reduction(record.name, reduce)
        if callable(chosen) or not shape:
            forms[record.name] = RowForm(reduce=chosen, is_input=record.is_input, of_axis=of_axis)
            continue
        form = RowForm()
        if record.lengths is None:
            form = form_of(
                record.name,
                record.tensor,
                n_samples,
                record.merged,
                second=record.name in second,
                turned=turned,
                followed=record.sources is not None,
                picked=_is_picked(record, n_samples),
                place=record.places[of_axis],
            )
            if n_samples == 1 and form == RowForm() and _is_of_data(record):
                # Views, windows and the like of a single sample are all its own.
                form = RowForm(group=shape[0])
        values = by_sample(record.tensor, form)
        first = has_channels_first(values, record.module, is_input=record.is_input)
        grid = pooled_grid(tuple(values.shape[1:]), max_dim, channels_first=first)
        forms[record.name] = replace(
            form,
            channels_first=first,
            grid=grid,
            reduce=chosen,
            is_input=record.is_input,
            of_batch=form.group > 1 and n_samples == given and not of_axis,
            of_axis=of_axis,
        )
        if chosen in ("last", "cls"):
            images += [record.name] if values.ndim > 3 else []
            has_sequences |= values.ndim == 3
    # Where some states are sequences, others, such as images before there are tokens, are pooled.
    if has_sequences:
        forms |= {name: replace(forms[name], reduce="pool") for name in images}
    return forms


def _is_of_data(record: Recorded) -> bool:
    """Check whether a state is known to be made of data of the batch, and not of picked rows."""
    is_made = record.is_input or (record.from_data and not (record.ignores_data or record.is_idle))
    return is_made and record.sources is not None and len(record.tensor) not in record.orders


def _form_of_part(
    record: Recorded, records: Sequence[Recorded], forms: Mapping[str, RowForm]
) -> RowForm | None:
    """Find the form of what a sum is made of, if that has its shape."""
    parts = (r for r in records if r.name in (record.sources or ()) and r.name in forms)
    return next((forms[r.name] for r in parts if r.tensor.shape == record.tensor.shape), None)


def _axis_of_samples(records: Sequence[Recorded], batch: Any, n_samples: int) -> int:
    """Find which of the two first axes of the batch's tensors the samples are along."""
    shape = next((t.shape for t in all_tensors(batch) if t.ndim > 1), (0, 0))
    if shape[0] != shape[1]:
        return int(n_samples == shape[1])
    packed = (_are_at(r.places, 0) for r in records if r.lengths is not None)
    second = ((r.module, r.tensor, r.places) for r in records if r.lengths is None)
    return int(any(packed) or are_second_of_batch(second))


def are_second_of_batch(
    states: Iterable[tuple[nn.Module, Tensor, Sequence[Place | None]]],
) -> bool:
    """Check whether the samples are along the second axis of the batch, of two of one size.

    So it is where a module of torch that has samples second has that axis there, or where states have no
    other one of the two: a loop over steps, or a mean over them, leaves the samples.
    """
    known = list(states)
    left = {axis for *_, places in known for axis in range(2) if places[axis] and not places[1 - axis]}
    return left == {1} or any(_are_at(at, 1) and gives_batch_second(m, t) for m, t, at in known)


def _are_at(places: Sequence[Place | None], axis: int) -> bool:
    """Check whether the second axis of the batch is an axis of a tensor, and the first is not."""
    return places[1] == (axis, 1) != places[0]


def _is_picked(record: Recorded, n_samples: int) -> bool:
    """Check whether the rows along the first axis were picked from those of samples."""
    order = record.orders.get(record.tensor.shape[0])
    # Of three axes, the first may be positions that were turned.
    return order is not None and order.moved and (record.tensor.ndim == 2 or order.base == n_samples)


def has_batch_second(module: nn.Module) -> bool:
    """Return whether a module, or a part of it, takes the samples along the second axis."""
    return any(getattr(part, "batch_first", None) is False for part in module.modules())


def gives_batch_second(module: nn.Module, tensor: Tensor) -> bool:
    """Return whether what a module of torch gave, or was given, has the samples along axis 1."""
    of_torch = type(module).__module__.startswith("torch.nn.")
    return tensor.ndim == 3 and of_torch and has_batch_second(module)


def form_of(
    name: str,
    tensor: Tensor,
    n_samples: int,
    merged: tuple[int, ...] | None,
    *,
    second: bool,
    turned: bool,
    followed: bool = False,
    picked: bool = False,
    place: Place | None = None,
) -> RowForm:
    """Find where a state's samples are.

    ``second`` says that its module has them along axis 1, ``turned`` that any module has. Where the data
    was ``followed``, several rows are a sample's only if a merge was seen: some may be all that is left
    of many, as an expert's share of positions. Rows that were ``picked`` are along the first axis. Of
    several axes of as many entries, ``place`` says which are the samples, if that is known.
    """
    shape = tensor.shape
    untold = (
        f"which entries of {name!r}, of shape {tuple(shape)}, belong to which of the {n_samples} "
        "samples cannot be told. Take batches of another size, or leave it out with components=[...]."
    )
    if n_samples < 2 or shape[0] <= n_samples:
        merged = None
    if place in ((0, 1), (1, 1)) and shape[:2] == (n_samples, n_samples) and not second:
        return RowForm(batch_axis=place.axis)
    # Two axes are rows and units as a rule, and as many units as samples happen.
    may_be_second = second or (not picked and (turned or len(shape) > 2))
    if merged is None and may_be_second and len(shape) > 1 and shape[1] == n_samples:
        if shape[0] != n_samples or second:
            return RowForm(batch_axis=1)
        if turned and len(shape) == 3:
            raise ValueError(untold)
    if n_samples < 2 or shape[0] <= n_samples or shape[0] % n_samples:
        return RowForm()
    group = shape[0] // n_samples
    if merged is None:
        return RowForm() if followed else RowForm(group=group)
    if n_samples not in merged:
        return RowForm()
    run = math.prod(merged[merged.index(n_samples) + 1 :])
    if merged.count(n_samples) > 1:
        # Of two axes of this size, the samples are the first, unless some module has them second.
        if place is None and turned:
            raise ValueError(untold)
        run = run if place is None or place.axis else place.inner
    return RowForm(group=group, run=run if run < group else 0)


def _reduction(name: str, reduce: ReduceOption) -> Reduce:
    if not isinstance(reduce, Mapping):
        return reduce
    return next((way for glob, way in reduce.items() if fnmatchcase(name, glob)), "pool")


def check_reduce(reduce: Any) -> None:
    """Refuse reductions that do not exist."""
    if isinstance(reduce, Mapping):
        check_each((str, "a name or glob pattern"), reduce=list(reduce))
    for way in reduce.values() if isinstance(reduce, Mapping) else [reduce]:
        if way not in REDUCTIONS and not callable(way):
            raise ValueError(f"reduce holds {way!r}; choose one of {REDUCTIONS} or give a callable")


def rows_given(batch: Any) -> int:
    """Count the rows of the first tensor of a batch that has any, of a graph not those of its edges."""
    tensors = [tensor for tensor in all_tensors(batch) if tensor.ndim]
    return next((len(t) for t in tensors if not is_edge_index(t)), len(tensors[0]) if tensors else 0)


def rows_without_samples(n_samples: int, batch: Any) -> int | None:
    """Count the samples of a batch where a network runs on more rows that are no parts of these."""
    tensors = [tensor for tensor in all_tensors(batch) if tensor.ndim]
    counts, sizes = {len(t) for t in tensors} - {0}, {size for t in tensors for size in t.shape}
    alike = n_samples in sizes or any(n_samples < count or n_samples % count == 0 for count in counts)
    return None if alike else rows_given(batch) or None


def _second_axis(records: Sequence[Recorded], batch: Any) -> int | None:
    """Return the length of the batch's second axis where states have it first, and not its first."""
    plain = (t.shape[:2] for t in all_tensors(batch) if t.ndim > 1 and not t.is_nested)
    first, second = next(plain, (0, 0))
    others = [r for r in records if r.tensor.ndim and len(r.tensor) != first and not r.ignores_data]

    def has_it_first(r: Recorded) -> bool:
        told = r.sources is not None and r.merged is None and second not in r.orders
        return told and len(r.tensor) == second and r.places[0] is None

    # Fewer rows than there were may be of a mean over the samples, unless the network ends with them.
    is_more = second > first or records[-1:] == others[-1:]
    # A single sample is along an axis that nothing tells apart.
    return second if first > 1 and is_more and others and all(map(has_it_first, others)) else None


def batch_size(records: Sequence[Recorded], batch: Any) -> tuple[int, set[str]]:
    """Count the samples of the first pass, and which states have the batch on axis 1."""
    records = [record for record in records if not record.ignores_data] or records
    second = {
        record.name: record.tensor.shape[1]
        for record in records
        if record.lengths is None and gives_batch_second(record.module, record.tensor)
    }
    if second:
        return next(iter(second.values())), set(second)
    sizes = [record.tensor.shape[0] for record in records if record.tensor.ndim]
    given = rows_given(batch)

    def fits(record: Recorded) -> bool:
        shape = record.tensor.shape
        return bool(shape) and (shape[0] % given == 0 or (len(shape) > 1 and shape[1] == given))

    least = min(sizes, default=0)
    if given and least > given and all(size % least == 0 for size in sizes) and least % given == 0:
        # Several views, crops or time steps of each sample all the way: each is a row of its own, unless
        # they meet on the way, or lie in several orders, and which are of one sample is known.
        merges = [record.merged or () for record in records if record.tensor.shape[:1] == (least,)]
        known = all(given in merged for merged in merges)
        runs = {math.prod(merged[merged.index(given) + 1 :]) for merged in merges if known}
        if len(runs) < 2 and not (known and any(record.meet(least) for record in records)):
            return least, set()
    if (beside := _second_axis(records, batch)) is not None:
        return beside, set()
    if given and all(fits(record) for record in records):
        return given, set()
    # Of many experts some get as many samples as others, by chance.
    whole = [len(record.tensor) for record in records if record.tensor.ndim and not record.is_part]
    return (Counter(whole or sizes).most_common(1)[0][0] if sizes else 0), set()
