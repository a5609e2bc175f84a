"""Finds which positions of padded sequences hold data, and which states have these positions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.network.input_data import has_positions, is_mask
from lightning_koopman.network.rows import Recorded, RowForm, by_sample, n_positions
from lightning_koopman.network.tensors import parts_of, tensors_inside, varies

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
    if not isinstance(batch, Mapping):
        for inner in () if isinstance(batch, Tensor) else parts_of(batch):
            found = valid_positions(inner) | found
        return found
    given = {name.lower(): value for name, value in batch.items() if isinstance(name, str)}
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

    def is_about(mask: Tensor, record: Recorded) -> bool:
        """Check whether a mask may be about a state's positions."""
        known = {i: is_padded for i, d in enumerate(data) if (is_padded := _pads(mask, d)) is not None}
        own = known.keys() & record.positions
        # Where nothing tells, what is padded by it may be in no tensor of the batch.
        return not own or any(known[i] for i in own) or not any(known.values())

    def told_by(record: Recorded, form: RowForm) -> str | None:
        """Find what tells which of a state's positions hold data."""
        if not record.tensor.ndim or record.lengths is not None:
            return None
        n_samples, size = len(by_sample(record.tensor, form)), n_positions(record.tensor, form)
        masks = {name: each if each.ndim > 1 else up_to(each) for name, each in valid.items()}
        masks |= {name: up_to(each, size) for name, each in packed.items()}
        fit = [name for name, mask in masks.items() if mask.shape == (n_samples, size)]
        about = [name for name in fit or valid if is_about(masks[name], record)]
        # Of what all data agree with, that which leaves out most.
        return min(about, key=lambda name: int(masks[name].sum()), default=None)

    of = {record.name: record for record in records}
    return {
        name: replace(form, padding=told_by(of[name], form)) if name in of else form
        for name, form in forms.items()
    }


def valid_outputs(
    valid: Valid, output: Tensor, target: Tensor | None, class_axis: int | None
) -> Tensor | None:
    """Return which positions of outputs hold data, of as many axes as they have, if that is known.

    Whatever has a target counts, but for those that are the same at all positions without data.
    """
    for axis in range(1, min(output.ndim, 3)) if output.ndim > 2 else ():
        shape = (len(output), output.shape[axis])
        masks = (each if each.ndim > 1 else up_to(each) for each in valid.values())
        fit = [mask.cpu() for mask in masks if mask.shape == shape and axis != class_axis]
        padded = [None if target is None else _pads(mask, target) for mask in fit]
        told = [mask for mask, is_padded in zip(fit, padded, strict=True) if is_padded]
        open_ = [mask for mask, is_padded in zip(fit, padded, strict=True) if is_padded is None]
        if told or len(open_) == 1:
            found = min(told or open_, key=lambda mask: int(mask.sum()))
            return found.view(*(size if k in (0, axis) else 1 for k, size in enumerate(output.shape)))
    return None


def lengths_of(records: Iterable[Recorded]) -> dict[str, Tensor]:
    """Return the lengths of packed and nested sequences, by the states that these are."""
    return {record.name: record.lengths for record in records if record.lengths is not None}


def up_to(lengths: Tensor, size: int | None = None) -> Tensor:
    """Return the mask that lengths stand for, of as many positions as the longest or ``size``."""
    size = int(lengths.max()) if size is None else size
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def _pads(mask: Tensor, data: Tensor) -> bool | None:
    """Check whether a mask says which positions of data are padding; ``None`` where it may not."""
    if not has_positions(data):
        return None
    if data.shape[:2] != mask.shape:
        data = data.transpose(0, 1)
    if data.shape[:2] != mask.shape or not varies(data) or is_mask(data):
        return None
    padding = data[~mask.to(data.device)]
    return bool((padding == padding[:1]).all())
