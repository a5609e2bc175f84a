"""Finds which positions of padded sequences hold data, and which states have these positions."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.network.axes.input_data import has_positions, is_mask
from lightning_koopman.network.axes.recorded import Recorded
from lightning_koopman.network.axes.rows import RowForm, by_sample, n_positions
from lightning_koopman.network.tensors import by_name, parts_of, tensors_inside, varies

Valid = Mapping[str, Tensor]
"""Which positions hold data, by name: masks ``(n_samples, positions)`` or lengths ``(n_samples,)``."""

# Masks of other things than padding: entries that a loss counts or that are to be predicted, heads.
_OTHER_MASKS = ("masked", "loss", "label", "indices", "head", "mlm")
_LENGTHS = re.compile(r"((x|in|input|seq|sequence|src|source|text|token|audio|frame)s?_)?(len|length)s?")


def valid_positions(batch: Any) -> dict[str, Tensor]:
    """Find which positions of padded sequences hold data: masks, or the length of each sequence.

    On the CPU, what holds other numbers than 0 and 1 is no mask. A device is not asked, for that would
    wait for it: there, such a mask leaves out nothing.

    Example:
        >>> valid_positions({"ids": torch.ones(1, 3), "attention_mask": torch.tensor([[1, 1, 0]])})
        {'attention_mask': tensor([[ True,  True, False]])}
    """
    found: dict[str, Tensor] = {}
    if isinstance(batch, Tensor):
        return found
    named = by_name(batch).items()
    given = {name.lower(): value for name, value in named if isinstance(name, str)}
    tensors = {word: value for word, value in given.items() if isinstance(value, Tensor)}
    data = [value.shape for word, value in tensors.items() if "mask" not in word and value.ndim]
    for word, value in tensors.items():
        if _LENGTHS.fullmatch(word) and value.ndim == 1:
            found[word] = value
        if "mask" in word and value.ndim == 2 and not any(other in word for other in _OTHER_MASKS):
            # Others say which positions see which.
            n_samples, size = value.shape
            if data and not any(s[0] == n_samples or s[:2] == (size, n_samples) for s in data):
                continue
            valid = (value == 0) if "pad" in word else (value != 0)
            fits = ((value == 0) | (value == 1)).all() & ~_is_causal(valid)
            if value.device.type != "cpu" or bool(fits):
                # Where a sample would hold no data, and none is full, it marks the other thing.
                is_turned = (~valid).all(dim=1).any() & ~valid.all(dim=1).any()
                found[word] = (valid ^ is_turned) | ~fits
    for inner in parts_of(batch):
        found = valid_positions(inner) | found
    return found


def _is_causal(mask: Tensor) -> Tensor:
    """Check whether a mask says that each position sees those before it."""
    if mask.shape[0] != mask.shape[1] or len(mask) < 2:
        return mask.new_zeros(())
    before = torch.ones_like(mask).tril()
    return (mask == before).all() | (mask != before).all()


def with_padding(
    forms: Mapping[str, RowForm], records: Sequence[Recorded], valid: Valid, batch: Any
) -> dict[str, RowForm]:
    """Let forms say what tells which of their positions hold data: of the batch, or a state's lengths.

    Of several, as of what an encoder and a decoder take, that is one of as many positions by which the
    data that a state's positions are of is padded. Padding is the same everywhere.
    """
    packed = lengths_of(records)
    if not (valid or packed):
        return dict(forms)
    data = list(tensors_inside(batch))
    told = {**valid, **packed}
    named = _names_in(batch)
    names = {
        i: named[id(t)] for i, t in enumerate(data) if named.get(id(t), "").lower() not in {"", *told}
    }

    @functools.cache
    def told_up_to(name: str, size: int) -> tuple[Tensor, dict[int, bool]]:
        """Return a mask of so many positions, and which data it says are padded."""
        mask = told[name] if told[name].ndim > 1 else up_to(told[name], size)
        return mask, {i: known for i, d in enumerate(data) if (known := _pads(mask, d)) is not None}

    of = {record.name: record for record in records}

    @functools.cache
    def whose(name: str) -> frozenset[int]:
        """Find the tensors of the batch whose positions a packed state was made of."""
        record = of.get(name)
        if record is None:
            return frozenset()
        return record.positions or frozenset().union(*map(whose, record.sources or ()))

    def is_about(name: str, size: int, record: Recorded) -> bool | None:
        """Check whether a mask is about a state's positions; ``None`` where nothing says so."""
        mask, known = told_up_to(name, size)
        if name in packed and record.positions and (theirs := whose(name)).isdisjoint(record.positions):
            # A sequence may have been packed of what no tensor of the batch holds.
            return False if theirs else None
        own = known.keys() & record.positions or known.keys()
        # Where nothing tells, what is padded by it may be in no tensor of the batch. Lengths that leave
        # out positions of all samples may be about fewer than there are.
        is_sure = name in packed or valid[name].ndim > 1 or bool(mask[:, -1].any())
        may_be = is_sure and not any(known.values())
        return any(known[i] for i in own) or (None if may_be else False)

    def padded(record: Recorded, form: RowForm) -> RowForm:
        """Find what tells which of a state's positions hold data."""
        size = n_positions(record.tensor, form)
        if not size or record.lengths is not None:
            return form
        shape = by_sample(record.tensor, form).shape
        masks = {name: told_up_to(name, size)[0] for name in told}
        fit = [n for n, m in masks.items() if m.shape == (shape[0], size) and _longest(told[n]) <= size]
        about = {name: is_about(name, size, record) for name in fit}
        best = [name for name in fit if about[name]] or [n for n in fit if about[n] is None]
        if not best:
            return form
        # Of what all data agree with, that which leaves out most, and "mask" may be of anything. Where
        # none leaves out any, that of the name most like the data's.
        own, others = (
            [names[i] for i in range(len(data)) if i in names and (i in record.positions) == is_own]
            for is_own in (True, False)
        )
        name = min(
            best,
            key=lambda name: (
                name == "mask",
                int(masks[name].sum()),
                _likeness(name, others) - _likeness(name, own) if own else 0,
            ),
        )
        return replace(form, padding=name)

    return {name: padded(of[name], form) if name in of else form for name, form in forms.items()}


def _names_in(batch: Any) -> dict[int, str]:
    """Find what the tensors of a batch are called, by their ``id``."""
    if isinstance(batch, Tensor):
        return {}
    found = {id(value): name for name, value in by_name(batch).items() if isinstance(name, str)}
    for inner in parts_of(batch):
        found |= _names_in(inner)
    return found


def _likeness(name: str, others: Iterable[str]) -> int:
    """Count the letters that a name and the most alike of others begin with."""
    pairs = (zip(name, other.lower(), strict=False) for other in others)
    begins = (itertools.takewhile(lambda pair: pair[0] == pair[1], each) for each in pairs)
    return max((len(list(each)) for each in begins), default=0)


def with_places(
    records: Sequence[Recorded], valid: Valid, varying: Collection[str] = ()
) -> dict[str, Recorded]:
    """Give what is added to all samples alike, as position embeddings, a row for each of them.

    So it is where samples are padded apart, for means over what holds data then differ, or where it is
    among what is known to be ``varying`` in later batches.
    """
    found = {}
    for record in records:
        if not is_added_to_all(record):
            continue
        tensor = record.tensor[None] if record.tensor.ndim == 2 else record.tensor
        masks = masks_of(tensor.shape[1], valid)
        is_known = record.name in varying
        counts = {len(m) for m in masks if is_known or bool((m != m[:1]).any())}
        if len(counts) == 1 and len(tensor) in (1, n_samples := counts.pop()):
            spread = tensor.expand(n_samples, -1, -1)
            found[record.name] = replace(record, tensor=spread, is_idle=False, ignores_data=False)
    return found


def is_added_to_all(record: Recorded) -> bool:
    """Check whether a state gives each position something else, and all samples the same.

    It is the network's own, or of integers that are the same for all samples.
    """
    tensor = record.tensor
    if not record.is_idle:
        of_integers = not (record.from_float or record.sources)
        if not of_integers or len(tensor) < 2 or varies(tensor):
            return False
    return (
        tensor.ndim in (2, 3) and len(tensor) > 0 and varies(tensor if tensor.ndim == 2 else tensor[0])
    )


def masks_of(size: int, valid: Valid) -> list[Tensor]:
    """Return the masks of so many positions, also those that lengths stand for."""
    masks = (each if each.ndim > 1 else up_to(each, size) for each in valid.values())
    return [mask for mask in masks if mask.shape[1] == size]


def valid_outputs(
    valid: Sequence[Valid],
    outputs: Sequence[Tensor],
    targets: Sequence[Tensor | None],
    class_axis: int | None,
) -> list[Tensor | None]:
    """Return which positions of outputs hold data, of as many axes as they have, if that is known.

    Whatever has a target counts, but for those that are the same at all positions without data.
    """
    for axis in (1, 2) if outputs[0].ndim > 2 else ():
        shapes = [(len(output), output.shape[axis]) for output in outputs]
        told, untold = dict[str, list[Tensor]](), dict[str, list[Tensor]]()
        for name in valid[0] if axis != class_axis else ():
            masks = _fitting([each.get(name) for each in valid], shapes)
            pairs = zip(masks, targets, strict=False)
            padded = [None if target is None else _pads(mask, target) for mask, target in pairs]
            if masks and False not in padded:
                (told if True in padded else untold)[name] = masks
        if len(untold) > 1:
            untold.pop("mask", None)
        if told or len(untold) == 1:
            masks = min(
                (told or untold).values(), key=lambda masks: sum(int(mask.sum()) for mask in masks)
            )
            ends = [1] * (outputs[0].ndim - axis - 1)
            return [mask.view(len(mask), *[1] * (axis - 1), mask.shape[1], *ends) for mask in masks]
    return [None] * len(outputs)


def _fitting(valid: Sequence[Tensor | None], shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return masks of such shapes, or none; the longest of all samples has all positions."""
    masks, is_sure = list[Tensor](), False
    for each, (n_samples, size) in zip(valid, shapes, strict=True):
        if each is None or len(each) != n_samples or _longest(each) > size:
            return []
        if each.ndim > 1 and each.shape[1] != size:
            return []
        is_sure |= each.ndim > 1 or _longest(each) == size
        masks.append((each if each.ndim > 1 else up_to(each, size)).cpu())
    return masks if is_sure else []


def lengths_of(records: Iterable[Recorded]) -> dict[str, Tensor]:
    """Return the lengths of packed and nested sequences, by the states that these are."""
    return {record.name: record.lengths for record in records if record.lengths is not None}


def up_to(lengths: Tensor, size: int) -> Tensor:
    """Return the mask of so many positions that lengths stand for."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _longest(valid: Tensor) -> int:
    """Count the positions that hold data in the sample that has most, by a mask or lengths."""
    return max(1, int((valid.sum(dim=1) if valid.ndim > 1 else valid).max()))


def _pads(mask: Tensor, data: Tensor) -> bool | None:
    """Check whether a mask says which positions of data are padding; ``None`` where it may not."""
    if not has_positions(data):
        return None
    if data.shape[:2] != mask.shape:
        data = data.transpose(0, 1)
    if data.shape[:2] != mask.shape or not (len(mask) == 1 or varies(data)) or is_mask(data):
        return None
    padding = data[~mask.to(data.device)]
    return bool((padding == padding[:1]).all())
