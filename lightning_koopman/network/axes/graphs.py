"""Tells which sample each row is of where rows are nodes of graphs, or edges between them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.network.tensors import has_places, is_real, tensors_inside


def is_edge_index(tensor: Tensor) -> bool:
    """Check whether a tensor may say which nodes of a graph each edge joins."""
    is_pairs = has_places(tensor) and tensor.ndim == 2 and len(tensor) == 2
    return is_pairs and tensor.dtype == torch.int64


def counts_graphs(tensor: Tensor) -> bool:
    """Check whether a tensor may say which graph of a batch each node belongs to, in order."""
    if tensor.dtype != torch.int64 or tensor.ndim != 1 or not len(tensor) or int(tensor[0]):
        return False
    steps = tensor.diff()
    return bool(((steps == 0) | (steps == 1)).all()) and bool((steps == 0).any())


def n_graphs(tensors: Sequence[Tensor]) -> int | None:
    """Count the graphs of a batch that holds the ends of edges and the graph of each node."""
    if not any(map(is_edge_index, tensors)):
        return None
    rows = {tensor.shape[:1] for tensor in tensors if is_real(tensor) and has_places(tensor)}
    found = (int(t[-1]) + 1 for t in tensors if t.shape[:1] in rows - {(2,)} and counts_graphs(t))
    return next(found, None)


def is_of_edges(tensor: Tensor, indices: Sequence[Tensor]) -> bool:
    """Check whether a tensor has a row for each edge of an index."""
    return not tensor.is_nested and any(tensor.shape[:1] == index.shape[1:] for index in indices)


def pooling_index(states: Sequence[Tensor], returned_rows: Collection[int], batch: Any) -> int | None:
    """Find what tells the samples of rows where the last state, or what is returned, has fewer."""
    return index_of_samples(row_counts(states), row_counts(states[-1:]).union(returned_rows), batch)


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
