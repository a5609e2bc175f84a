"""Orders of rows: which row each one was before, and what several of them come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """Which rows of a tensor before it the rows of a tensor are.

    Attributes:
        rows: Their places there, -1 for rows of none.
        base: How many rows there were.
        moved: Whether rows were picked on the way, so that another batch may have another order.
        mixed: Whether rows of several orders were put together.
    """

    rows: Tensor
    base: int
    moved: bool = True
    mixed: bool = False

    @property
    def is_of_all(self) -> bool:
        """Whether it may be an order of all rows that there were."""
        return len(self.rows) == self.base

    @property
    def holds_all(self) -> bool:
        """Whether it may be an order of all rows that there were, each as often as the others."""
        return self.base > 0 and len(self.rows) > 0 and len(self.rows) % self.base == 0

    @property
    def is_own(self) -> bool:
        """Whether each row is in its own place."""
        return self.is_of_all and torch.equal(self.filled(), places_like(self.base, self.rows))

    @property
    def is_undone(self) -> bool:
        """Whether each row is in its own place, and will be so in every batch."""
        return not (self.moved or self.mixed) and self.is_own

    def filled(self) -> Tensor:
        """Return the places, their own for rows of none."""
        return torch.where(self.rows < 0, places_like(len(self.rows), self.rows), self.rows)


Orders = Mapping[int, Order]
"""Orders by the number of rows that an axis must have for them."""

NO_ORDERS: Orders = MappingProxyType({})

ROW = 0
"""In place of a number of rows: that of a single one, without an axis of its own."""

MET = -1
"""In place of a number of rows: those that axes were merged into, and of which several then met."""


def agreed(size: int, found: Sequence[Order], plain: bool) -> Order | None:
    """Return the order of rows that were put together row by row, some of them ``plain`` ones."""
    first = found[0]
    if not plain and all(order.rows is first.rows for order in found):
        return first
    rows, differ = first.rows, False
    others = [order.rows for order in found[1:]]
    bases = {order.base for order in found}
    if plain:
        others.append(places_like(size, rows))
        bases.add(size)
    if len(bases) > 1:
        return None
    for other in others:
        other = other.to(rows)
        differ = differ or bool(((rows >= 0) & (other >= 0) & (rows != other)).any())
        rows = torch.where(rows < 0, other, rows)
    if differ and first.base != size:
        return None
    if differ:
        own = plain or any(order.is_own for order in found)
        rows = places_like(size, rows) if own else first.filled()
    moved, mixed = any(order.moved for order in found), any(order.mixed for order in found)
    return Order(rows, first.base, moved, differ or mixed)


def have_met(orders: Orders, n_rows: int) -> bool:
    """Check whether several of that many rows, which axes were merged into, were put together."""
    return MET in orders and n_rows in orders[MET].rows


def are_different(places: Tensor) -> bool:
    """Check whether no place is there twice."""
    return bool((places.sort()[0].diff() != 0).all())


def same(orders: Orders, others: Orders) -> bool:
    """Check whether orders are the very same ones."""
    alike = orders.keys() == others.keys()
    return alike and all(order.rows is others[size].rows for size, order in orders.items())


def without(orders: Orders, size: int) -> Orders:
    """Leave out the order of so many rows."""
    return {s: order for s, order in orders.items() if s != size}


def places_like(count: int, like: Tensor) -> Tensor:
    """Number so many places from 0 on, where another tensor is."""
    return torch.arange(count, device=like.device)


def sample_places(n_rows: int, samples: Tensor, orders: Orders) -> Tensor | None:
    """Return which row to put where, so that rows are those of ``samples``; ``None`` if all are.

    An order that is none of all samples cannot be undone, and leaves rows where they are.
    """
    own = rows_found(n_rows, samples, orders)
    if own is None or torch.equal(own, samples) or not torch.equal(own.sort()[0], samples.sort()[0]):
        return None
    places = torch.empty_like(samples)
    places[samples.argsort(stable=True)] = own.argsort(stable=True)
    return places


def rows_found(n_rows: int, samples: Tensor, orders: Orders) -> Tensor | None:
    """Return the sample that each row is of, if an order tells; in order they are ``samples``."""
    n_samples = int(samples.max()) + 1 if len(samples) else 0
    if (order := orders.get(n_rows)) is not None and order.base == n_samples:
        return torch.where(order.rows.cpu() < 0, samples, order.rows.cpu())
    if (order := orders.get(n_samples)) is not None and order.is_of_all:
        return order.filled().cpu()[samples]
    return None
