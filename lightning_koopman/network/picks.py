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
        pick = _picked(plain, args, out)
        if pick is None and not self._of:
            return
        told: Picks
        if pick is not None:
            told = dict.fromkeys(known[0], pick) | dict(self.of(reads[0]))
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
    have as many positions, and are too wide to be kept whole, keep it behind the others, which attention
    or recurrence bring to it. One that differs by sample is kept if it is the last ``valid`` one.
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
    kept = {name: _with_pick(forms[name], pick, is_alone=True) for name, pick in picked.items()}
    left, seen = [*picked], {*picked}
    while left:
        name = left.pop()
        size = picked[name].size
        for source in {*(known[name].sources or ())} & known.keys() - seen:
            if positions(source) == size:
                seen.add(source)
                left.append(source)
                picked[source] = picked[name]
                if by_sample(known[source].tensor, forms[source])[0].numel() > max_dim:
                    grid = (min(*forms[source].grid, size - 1),)
                    kept[source] = _with_pick(replace(forms[source], grid=grid), picked[name])
    return {**forms, **kept}


def _with_pick(form: RowForm, pick: Pick, *, is_alone: bool = False) -> RowForm:
    place: Literal[0, -1] = -1 if pick.is_last else 0
    return replace(form, picked=place, is_alone=is_alone, by_data=pick.is_last and pick.by_data)
