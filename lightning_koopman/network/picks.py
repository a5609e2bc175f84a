"""Single positions that a network goes on with: finds them, and keeps them in the rows of states."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_koopman.network.rows import (
    NO_PICKS,
    Pick,
    Picks,
    Recorded,
    RowForm,
    by_sample,
    last_valid,
    n_positions,
)
from lightning_koopman.network.tensors import (
    address_of,
    all_tensors,
    is_all_of_memory,
    view_of_memory,
)

# These put other positions in the place of each, or make it of several, along the axis that they name.
_ALONG_AXIS = frozenset({
    *("flip", "roll", "sort", "topk", "_softmax", "_log_softmax", "_fft_r2c", "_fft_c2r", "_fft_c2c"),
    *("cumsum", "cumprod", "cummax", "cummin", "_cummax_helper", "_cummin_helper", "logcumsumexp"),
})


class PickedPositions:
    """What was picked of which states, for all tensors of one pass, by their memory, as views share it.

    Args:
        keep: Called with each tensor of which something is known, so that its address is not given to
            another.
    """

    def __init__(self, keep: Callable[[Tensor], None]) -> None:
        self._keep = keep
        # Views have picks of their own, beside those of all of the memory.
        self._of: dict[int, dict[Any, Picks]] = {}
        # Of which states memory holds other positions than theirs, with the number of these.
        self._moved: dict[int, frozenset[tuple[str, int]]] = {}

    def of(self, tensor: Tensor) -> Picks:
        """Return what a tensor holds one position of."""
        if tensor.is_nested or not (known := self._of.get(address_of(tensor))):
            return NO_PICKS
        return known.get(view_of_memory(tensor), known.get(None, NO_PICKS))

    def follow(
        self, name: str, args: Sequence[Any], reads: Sequence[Tensor], known: Any, out: Any
    ) -> None:
        """Pass on what was picked from what an operator read, of ``known`` labels, to what it wrote."""
        plain = name.removesuffix("_")
        moved = self._follow_moves(plain, args, reads, known, out)
        pick = _picked(plain, args, out)
        if pick is None and not self._of:
            return
        told: Picks
        if pick is not None:
            told = {n: pick._replace(is_moved=(n, pick.size) in moved) for n in known[0]}
            told |= self.of(reads[0])
        else:
            told = self._joined(reads, known)
        places = {address_of(tensor) for tensor in reads}
        for tensor in all_tensors(out):
            address = address_of(tensor)
            if not address or tensor.is_nested or not (told or address in self._of):
                continue
            is_part = address in places if plain == name else not is_all_of_memory(tensor)
            before = self._of.get(address, {}) if is_part else {}
            self._of[address] = {**before, view_of_memory(tensor) if is_part else None: told}
            self._keep(tensor)

    def _follow_moves(
        self, name: str, args: Sequence[Any], reads: Sequence[Tensor], known: Any, out: Any
    ) -> frozenset[tuple[str, int]]:
        """Pass on of which states positions were moved, or met, and of how many."""
        sizes = _moving(name, args, sum(map(bool, known)))
        if not (sizes or self._moved):
            return frozenset()
        moved = frozenset[tuple[str, int]]().union(*(self._moved.get(address_of(t), ()) for t in reads))
        moved |= {(label, size) for labels in known for label in labels for size in sizes}
        for tensor in all_tensors(out):
            if (address := address_of(tensor)) and (moved or address in self._moved):
                self._moved[address] = moved
                self._keep(tensor)
        return moved

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


def _moving(name: str, args: Sequence[Any], n_data: int) -> Sequence[int]:
    """Return the sizes of the axes along which an operator moves positions, or lets them meet."""
    source = next((arg for arg in args if isinstance(arg, Tensor) and not arg.is_nested), None)
    if source is None or source.ndim < 2:
        return ()
    if name == "convolution" or "_pool" in name:
        return source.shape[2:]
    if name.startswith("_scaled_dot_product") or (name in ("bmm", "baddbmm") and n_data > 1):
        return source.shape[-2:-1]
    if name in _ALONG_AXIS:
        place = 2 if name in ("roll", "topk") else 1
        axes = args[place] if len(args) > place else range(source.ndim)
        axes = [axes] if isinstance(axes, int) else axes
        return [source.shape[axis] for axis in axes if not isinstance(axis, bool)]
    return ()


def _picked(name: str, args: Sequence[Any], out: Any) -> Pick | None:
    """Return which position an operator picks of its first argument, if it does."""
    source = args[0] if args else None
    if not (isinstance(source, Tensor) and isinstance(out, Tensor)) or source.is_nested:
        return None
    if source.ndim != 3:
        return None
    axis, places = 0, [0]
    if name == "select":
        axis, places = args[1], [args[2]]
    elif name == "slice":
        axis = args[1] if len(args) > 1 else 0
        if out.shape[axis] != 1:
            return None
        places = [(args[2] if len(args) > 2 else None) or 0]
    elif name == "index_select" and args[2].numel() == 1:
        axis, places = args[1], args[2].tolist()
    elif name in ("index", "gather"):
        axis, told = (_indexed if name == "index" else _gathered)(*args[:3])
        places = [] if told is None else told.flatten().tolist()
    else:
        return None
    size = source.shape[axis]
    if size < 2 or not places:
        return None
    places = [place % size for place in places]
    first, is_told = places[0], name in ("index", "index_select", "gather")
    if any(place != first for place in places) or (is_told and first not in (0, size - 1)):
        return Pick(axis % 3, size, True, True, tuple(places))
    return Pick(axis % 3, size, first > 0, is_told) if first in (0, size - 1) else None


def _indexed(source: Tensor, given: Sequence[Tensor | None]) -> tuple[int, Tensor | None]:
    """Return the axis along which tensors pick one position of each sample, and which."""
    indices = [(axis, index) for axis, index in enumerate(given) if index is not None]
    axis, places = indices[-1]
    if len(indices) == 1 and places.dtype == torch.bool:
        is_one = places.shape == source.shape[:2] and bool((places.sum(dim=1) == 1).all())
        return 1, places.int().argmax(dim=1) if is_one else None
    if len(indices) == 1 and places.numel() == 1:
        return axis, places
    if len(indices) == 2 and all(index.ndim == 1 for _, index in indices):
        for (along, samples), (axis, places) in (indices, indices[::-1]):
            if torch.equal(samples, torch.arange(source.shape[along], device="cpu").to(samples)):
                return axis, places
    return axis, None


def _gathered(source: Tensor, axis: int, index: Tensor) -> tuple[int, Tensor | None]:
    """Return the axis along which one position of each sample is picked, and which, of all channels."""
    places = index.movedim(axis, 0)
    is_one = len(places) == 1 and index.shape[-1] == source.shape[-1] and axis % 3 < 2
    is_one = is_one and bool((places == places[..., :1]).all())
    return axis, places[0, :, 0] if is_one else None


def keeping_picked(
    forms: Mapping[str, RowForm],
    records: Sequence[Recorded],
    read: Collection[str],
    max_dim: int,
    valid: Mapping[str, Tensor],
) -> dict[str, RowForm]:
    """Keep the position that a network goes on with alone, as of a class token.

    What is picked of is that position, unless it is ``read`` otherwise as well. States before it that
    have as many positions, or that functions mixed before it was picked, keep it behind the others if
    they are too wide to be kept whole. One that differs by sample is kept if it is the last ``valid``
    one.
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
        form, shape = forms[name], known[name].tensor.shape
        # Axes may have been swapped on the way, which shows in sizes if these differ.
        axis = 0 if form.batch_axis else 2 if form.channels_first else 1
        is_along = pick.axis == axis or tuple(shape).count(pick.size) == 1
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
        pick = found.pop() if len(found) == 1 else None
        if name not in read and pick is not None and is_of(pick, name):
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
