"""A state as a module gave it, and in which order its rows are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_koopman.network.axes.batch_axes import Place
from lightning_koopman.network.axes.order import (
    NO_ORDERS,
    Orders,
    have_met,
    rows_found,
    sample_places,
)
from lightning_koopman.network.axes.rows import RowForm


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
