"""Finds what a batch holds as targets, and tells whether these are the classes of outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from lightning_koopman.network.tensors import by_name, tensors_inside

TARGET_KEYS = ("labels", "label", "targets", "target", "y")
"""Where targets are looked for in a batch whose parts have names, or that is an object."""

IGNORED = -100
"""The target of what has none, as loss functions take it."""

TOKENS = "input_ids"
"""Where a language model's tokens are in such a batch."""


def find_target(batch: Any) -> Tensor | None:
    """Find the target in a batch as data loaders commonly give it."""
    if is_row(batch):
        found = batch[1]
    elif (told := by_name(batch)) or isinstance(batch, Tensor | tuple | list):
        found = next((told[key] for key in TARGET_KEYS if key in told), None)
    else:
        # Objects of other classes, as those of graphs and of tables, hold it as an attribute.
        found = next((t for key in TARGET_KEYS if (t := getattr(batch, key, None)) is not None), None)
    return found if isinstance(found, Tensor) else None


def is_row(batch: Any) -> bool:
    """Check whether a batch is an input with more beside it, in order, and no name tells its targets."""
    in_order = isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence)
    return in_order and len(batch) > 1 and by_name(batch).keys().isdisjoint(TARGET_KEYS)


class TargetSearch:
    """Finds where batches hold targets: first behind the input in what the network is not called with.

    Lengths, times and ids are integers as labels are, but the network takes them. One that is called
    with all there is may be so with its targets: a row per position, as in teacher forcing, is taken for
    these, and so is whatever it is if a loss comes back. In a mapping, names tell. Where labels are the
    tokens, the loss tells whether they are to be given back or predicted one position before.
    """

    def __init__(self, batch: Any = None) -> None:
        self._batch = batch
        self._entries = list(batch) if is_row(batch) else []
        self._taken: set[int] = set()
        self._gives_loss = False
        self._gives_back: bool | None = None

    def see_taken(self, given: Any) -> None:
        """Look at what an outermost call of the network takes, before it runs."""
        shapes = {entry.shape for entry in self._entries[1:] if isinstance(entry, Tensor)}
        tensors = [t.cpu() for t in tensors_inside(given) if not t.is_nested and t.shape in shapes]
        for place, entry in enumerate(self._entries):
            if place and isinstance(entry, Tensor) and any(_are_equal(entry.cpu(), t) for t in tensors):
                self._taken.add(place)

    def see_given(self, returned: Any) -> None:
        """Look at what an outermost call of the network gives."""
        numbers = [t.detach() for t in tensors_inside(returned) if t.is_floating_point()]
        losses = [number for number in numbers if not number.ndim]
        self._gives_loss |= bool(losses)
        target = find_target(self._batch)
        if not losses or target is None or not self.guesses:
            return
        placed = without_single(target.cpu(), 2)
        if (moved := self.where_predicted(self._batch, placed)) is not placed:
            for logits in numbers:
                if logits.shape[:-1] == moved.shape and logits.shape[-1] > int(placed.max()):
                    own, behind = (_has_loss(logits.cpu(), each, losses) for each in (placed, moved))
                    self._gives_back = own if own != behind else self._gives_back

    @property
    def guesses(self) -> bool:
        """Whether no loss has told where labels that are the tokens stand beside the outputs."""
        return self._gives_back is None

    def where_predicted(self, batch: Any, target: Tensor) -> Tensor:
        """Return targets of a batch as they stand beside the outputs.

        A causal language model is given its own input for labels, and predicts at each position the
        next one.
        """
        given = by_name(batch).get(TOKENS)
        placed = without_single(target, 2)
        if not isinstance(given, Tensor) or given.ndim != 2 or given.shape != placed.shape:
            return target
        counts = placed >= 0
        if self._gives_back or not counts.any() or (given.cpu() != placed)[counts].any():
            return target
        return torch.cat([placed[:, 1:], torch.full_like(placed[:, :1], IGNORED)], dim=1)

    def target_of(self, batch: Any) -> Tensor | None:
        """Return the targets of a batch like the one that was seen."""
        if not is_row(batch):
            return find_target(batch)
        place = next((k for k in range(1, len(batch)) if k not in self._taken), None)
        target = batch[1 if place is None else place]
        if not isinstance(target, Tensor):
            return None
        told = target.is_floating_point() or self._gives_loss or target.numel() > len(target)
        return target if place is not None or told else None


def _has_loss(logits: Tensor, target: Tensor, losses: Sequence[Tensor]) -> bool:
    """Check whether one of some losses is the cross-entropy with these targets."""
    rows = logits.float().flatten(0, -2)
    found = float(functional.cross_entropy(rows, target.flatten(), ignore_index=IGNORED))
    return any(math.isclose(float(loss), found, rel_tol=1e-3) for loss in losses)


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def without_single(target: Tensor, ndim: int) -> Tensor:
    """Drop axes of size 1, the last ones first, from targets that have more axes than ``ndim``."""
    # The first axis is that of samples, of which there may be one.
    while target.ndim > max(ndim, 1) and 1 in target.shape[1:]:
        target = target.squeeze(max(k for k, size in enumerate(target.shape) if size == 1))
    return target


def as_classes(output: Tensor, target: Tensor) -> Tensor:
    """Return targets as classes of an output have their axes, where axes of size 1 are all that differs.

    Beside a single output per sample or position they stay as they are: there they are no classes.
    """
    if output.ndim < 2:
        return target
    placed = without_single(target, output.ndim - 1)
    fits = placed.shape in _shapes_of_classes(output)
    return placed if fits and output.shape[class_axis(output, placed)] > 1 else target


def _shapes_of_classes(output: Tensor) -> tuple[torch.Size, torch.Size]:
    return torch.Size((output.shape[0], *output.shape[2:])), output.shape[:-1]


def are_classes(output: Tensor, target: Tensor) -> bool:
    """Return whether targets are class indices of what a network gives."""
    if target.is_floating_point() or target.is_complex() or output.ndim < 2:
        return False
    target = as_classes(output, target)
    if target.shape not in _shapes_of_classes(output):
        return False
    size = output.shape[class_axis(output, target)]
    # A single output is one logit. Of positions, some may be marked as none of the classes.
    return size > 1 and (output.ndim > 2 or not len(target) or int(target.max()) < size)


def class_axis(outputs: Tensor, targets: Tensor | None) -> int:
    """Find the axis of the classes: 1, unless the targets' shape says it is the last."""
    last = targets is not None and targets.shape == outputs.shape[:-1]
    return outputs.ndim - 1 if last else 1


def are_among(targets: Tensor, n_classes: int) -> Tensor:
    """Return which targets are one of the classes, as those of padding are not."""
    return (targets >= 0) & (targets < n_classes)


class Fit(NamedTuple):
    """How the targets that one process has fit its outputs.

    Attributes:
        width: Classes that the outputs have room for; 0 where the targets cannot be these.
        largest: Largest target that is one of them.
        usual: Targets that are the most frequent one.
        right: Targets that are the largest output.
        n_targets: All targets that are classes: one per sample, or per position.
        marked: Whether targets were found to be none of the classes, as -100 is.
        found: Whether there were targets at all.
    """

    width: int = 0
    largest: int = 0
    usual: int = 0
    right: int = 0
    n_targets: int = 0
    marked: bool = False
    found: bool = True

    @classmethod
    def of(
        cls, outputs: Sequence[Tensor], targets: Sequence[Tensor | None], by_position: bool = False
    ) -> Fit:
        """Compare the targets of each batch with its outputs: one per sample, or one per position."""
        known = [t for t in targets if t is not None]
        if len(known) < len(targets):
            return cls(found=bool(known))
        if by_position:
            return cls._of_positions(outputs, known)
        shapes = {o.shape[1:] for o in outputs}
        width = outputs[0].shape[-1] if outputs[0].ndim > 1 else 0
        # Of several outputs with the same classes, the targets stand there as often.
        alike = all(o.shape[:-1] == t.shape for o, t in zip(outputs, known, strict=True))
        every = torch.cat([t.reshape(len(t), -1)[:, 0] for t in known]).long()
        marked, every = bool((every < 0).any()), every[every != IGNORED]
        fits = width > 1 and len(shapes) == 1 and alike and len(every) > 0
        if not fits or not 0 <= every.min() <= every.max() < width:
            return cls(marked=marked)
        right = sum(int((o.argmax(-1) == t).sum()) for o, t in zip(outputs, known, strict=True))
        right //= outputs[0].shape[1:-1].numel()
        usual = int(every.bincount().max())
        return cls(width, int(every.max()), usual, right, len(every), marked)

    @classmethod
    def _of_positions(cls, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Fit:
        pairs = list(zip(outputs, targets, strict=True))
        if not all(are_classes(o, t) for o, t in pairs):
            return cls(found=False)
        widths = {o.shape[class_axis(o, t)] for o, t in pairs}
        width, every = max(widths), torch.cat([t.reshape(-1) for t in targets]).long()
        classes = every[are_among(every, width)]
        # One that is too large may mark what is none of the classes, as 255 does in pictures; beside a
        # single class, it is another class, which some write as 255.
        n_large, n_classes = (len(part.unique()) for part in (every[every >= width], classes))  # type: ignore[no-untyped-call]
        if len(widths) > 1 or n_large > 1 or (n_large == 1 and n_classes < 2):
            return cls()
        right = sum(int((o.argmax(class_axis(o, t)) == t).sum()) for o, t in pairs)
        most = (int(classes.max()), int(classes.bincount().max())) if len(classes) else (-1, 0)
        return cls(width, *most, right, len(classes), len(classes) < len(every))


def are_scores(fits: Sequence[Fit]) -> bool:
    """Decide whether outputs are class scores, from what each process found.

    Integers that are small enough are not enough: an autoencoder has them beside its outputs, too. There
    must be one output per class, or the largest one is the target's more often than if the most
    frequent target were always named, by more than chance gives once in a million networks.
    """
    if not (width := _width(fits)):
        return False
    if max(fit.largest for fit in fits) + 1 == width:
        return True
    right, usual = sum(fit.right for fit in fits), sum(fit.usual for fit in fits)
    # Chernoff's bound on the chance of so many, where so many are expected.
    return right > usual and right * math.log(right / usual) - right + usual > math.log(1e6)


_OUTPUTS_PER_CLASS = 4
"""Most outputs per class that was seen, for integers to be taken for classes without further ado."""


def may_be_scores(fits: Sequence[Fit]) -> bool:
    """Check whether outputs may be class scores, where more than chance says that they are.

    They are not where there are many more outputs than classes, as of a reconstruction beside labels,
    and the largest output is the target's no more often than by chance.
    """
    if any(fit.marked for fit in fits):
        return True
    if not (width := _width(fits)):
        return False
    right, count = sum(fit.right for fit in fits), sum(fit.n_targets for fit in fits)
    # One output that is always the largest may happen to be what the most frequent label is.
    usual = sum(fit.usual for fit in fits)
    told = count < width or (right * width > 2 * count and (right > usual or usual == count))
    return width <= _OUTPUTS_PER_CLASS * (max(fit.largest for fit in fits) + 1) or told


def _width(fits: Sequence[Fit]) -> int:
    """Return how many classes there is room for, if all agree."""
    widths = {fit.width for fit in fits}
    return widths.pop() if len(widths) == 1 else 0


NO_CLASSES = "the integer targets of the batches are no classes of the outputs, so changes are relative"
"""What a reader must know where targets beside outputs look like classes of them."""
