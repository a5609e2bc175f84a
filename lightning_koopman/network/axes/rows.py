"""Turns the tensor of a state into rows: batch axis, layout, pooling."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_koopman.network.arguments import check_each
from lightning_koopman.network.axes.input_data import rows_given
from lightning_koopman.network.tensors import need_not_wait

Reduction = Literal["pool", "flatten", "mean", "last", "cls"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)

Reduce = Reduction | Callable[[Tensor], Any]
"""How the spatial or sequence axes of a state become part of one row per sample."""

ReduceOption = Reduce | Mapping[str, Reduce]

_STRIP = 64  # values of which pooling by strips is faster than by one product
_POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


def check_reduce(reduce: Any) -> None:
    """Refuse reductions that do not exist."""
    if isinstance(reduce, Mapping):
        check_each((str, "a name or glob pattern"), reduce=list(reduce))
    for way in reduce.values() if isinstance(reduce, Mapping) else [reduce]:
        if way not in REDUCTIONS and not callable(way):
            raise ValueError(f"reduce holds {way!r}; choose one of {REDUCTIONS} or give a callable")


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
