"""How far a network's outputs moved: KL divergence, relative squared change, and a metric."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.changes import Change
from lightning_koopman.class_scores import (
    TARGET_KEYS,
    accuracy,
    are_classes,
    class_axis,
    find_target,
    kl_divergence,
)
from lightning_koopman.effects import Scale

Metric = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Outputs:
    """A network's outputs, to set altered ones against.

    Attributes:
        outputs: One tensor a batch.
        targets: One tensor a batch; ``None`` where batches hold none.
        scale: What changes are measured in.
        score: Gives the metric of outputs against targets; ``None`` where there is none.
        metric: The metric of these outputs; NaN where there is none.
    """

    outputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...] | None
    scale: Scale
    score: Metric | None
    metric: float

    @classmethod
    def of(
        cls,
        outputs: Iterable[Tensor],
        batches: Sequence[Any],
        scale: Scale | None,
        metric: Metric | None,
    ) -> Outputs:
        """Gather outputs and targets, and settle how they are compared.

        Args:
            outputs: One tensor a batch.
            batches: What gave them.
            scale: As in :func:`~lightning_koopman.intervene`.
            metric: As there.

        Returns:
            The outputs.

        Raises:
            ValueError: If no batch arrived, an argument is out of range, or a metric has no targets.
        """
        given = tuple(outputs)
        if not given:
            raise ValueError("no sample arrived: the batches were empty")
        found = [find_target(batch) for batch in batches]
        targets = (
            None if any(t is None for t in found) else tuple(t.cpu() for t in found if t is not None)
        )
        if scale not in (None, "kl", "relative"):
            raise ValueError(f"scale is {scale!r}; choose 'kl' or 'relative'")
        if metric is not None and targets is None:
            raise ValueError(
                "a metric needs targets; give batches as (input, target) or as mappings with one of the "
                f"keys {TARGET_KEYS}"
            )
        classes = targets is not None and are_classes(given[0], targets[0])
        scale = scale or ("kl" if classes else "relative")
        if scale == "kl" and not classes and given[0].ndim > 2:
            raise ValueError(
                f"outputs of shape {tuple(given[0].shape)} arrived with no class indices to tell their "
                "class axis; give targets, or choose scale='relative'"
            )
        score = metric or (accuracy if classes else None)
        before = cls(given, targets, scale, score, float("nan"))
        if before.classes is None:
            return replace(before, metric=before._score(given))
        # Counted by sample, for batches of sequences may differ in length.
        return replace(before, metric=float(before.right.sum() / before.classes.sum()))

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return sum(len(output) for output in self.outputs)

    def compare(self, altered: Iterable[Tensor]) -> Change:
        """Measure how far altered outputs lie from these.

        Args:
            altered: One tensor a batch, in the same order.

        Returns:
            The change by sample, and the metric of the altered outputs.

        Raises:
            ValueError: If the outputs never vary, so that no change is relative to anything.
        """
        others = tuple(altered)
        gained = None
        if self.classes is None or self.targets is None:
            metric = self._score(others)
        else:
            right = _right(others, self.targets)
            metric, gained = float(right.sum() / self.classes.sum()), right - self.right
        pairs = zip(self.outputs, others, strict=True)
        if self.scale == "kl":
            moved = [_by_sample(kl_divergence(a, b, self.axis)) for a, b in pairs]
        else:
            moved = [_by_sample((b.double() - a.double()).square()) for a, b in pairs]
        return Change(torch.cat(moved), self.shares, metric, gained, self.classes)

    @functools.cached_property
    def classes(self) -> Tensor | None:
        """How many classes each sample has, float64; ``None`` where the metric is not the accuracy."""
        if self.score is not accuracy or self.targets is None:
            return None
        return torch.cat([_by_sample(torch.ones_like(t)) for t in self.targets])

    @functools.cached_property
    def right(self) -> Tensor:
        """How many of each sample's classes are right, float64, where the metric is the accuracy."""
        assert self.targets is not None
        return _right(self.outputs, self.targets)

    @functools.cached_property
    def axis(self) -> int:
        """Axis of the classes, where the scale is ``"kl"``."""
        return class_axis(self.outputs[0], None if self.targets is None else self.targets[0])

    @functools.cached_property
    def shares(self) -> Tensor:
        """What each sample adds to :attr:`whole`, shape ``(n_samples,)``, float64.

        Raises:
            ValueError: If the outputs never vary, so that no change is relative to anything.
        """
        if self.scale == "kl":
            return torch.cat([_by_sample(torch.ones_like(a.select(self.axis, 0))) for a in self.outputs])
        mean = sum(a.double().sum(dim=0) for a in self.outputs) / self.n_samples
        shares = torch.cat([_by_sample((a.double() - mean).square()) for a in self.outputs])
        if not shares.any():
            raise ValueError("the outputs are constant, so no change is relative to anything")
        return shares

    @property
    def whole(self) -> float:
        """What summed changes are divided by: the number of distributions, or the outputs' variance."""
        return float(self.shares.sum())

    def metric_root(self, output: Tensor, vectors: Tensor) -> Tensor:
        """Apply a root B of the quadratic form that small changes are measured by.

        The change by a small displacement z of the outputs is ``|Bᵀz|²``, summed over samples, over
        :attr:`whole`. For the KL divergence ``B Bᵀ = (diag p - p pᵀ) / 2``, half the softmax's Fisher
        information; for the relative change B is the identity.

        Args:
            output: What the network gave.
            vectors: The same shape.

        Returns:
            ``B @ vectors``, the same shape.
        """
        if self.scale == "relative":
            return vectors
        p = output.detach().softmax(self.axis)
        scaled = p.sqrt() * vectors
        return (scaled - p * scaled.sum(self.axis, keepdim=True)) / math.sqrt(2)

    def _score(self, outputs: Sequence[Tensor]) -> float:
        if self.score is None or self.targets is None:
            return float("nan")
        return float(self.score(torch.cat(list(outputs)), torch.cat(list(self.targets))))


def _right(outputs: Iterable[Tensor], targets: Iterable[Tensor]) -> Tensor:
    """Count the classes of every sample that are right, shape ``(n_samples,)``."""
    pairs = zip(outputs, targets, strict=True)
    return torch.cat([_by_sample(o.argmax(class_axis(o, t)) == t) for o, t in pairs])


def _by_sample(values: Tensor) -> Tensor:
    return values.double().reshape(len(values), -1).sum(dim=1)
