"""How far a network's outputs moved: KL divergence, relative squared change, and a metric."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.effects import Scale

Metric = Callable[[Tensor, Tensor], Any]

_TARGET_KEYS = ("labels", "label", "targets", "target", "y")


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
                f"keys {_TARGET_KEYS}"
            )
        classes = targets is not None and _are_classes(given[0], targets[0])
        scale = scale or ("kl" if classes else "relative")
        if scale == "kl" and not classes and given[0].ndim > 2:
            raise ValueError(
                f"outputs of shape {tuple(given[0].shape)} arrived with no class indices to tell their "
                "class axis; give targets, or choose scale='relative'"
            )
        score = metric or (accuracy if classes else None)
        before = cls(given, targets, scale, score, float("nan"))
        return cls(given, targets, scale, score, before._score(given))

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return sum(len(output) for output in self.outputs)

    def compare(self, altered: Iterable[Tensor]) -> tuple[float, float]:
        """Measure how far altered outputs lie from these.

        Args:
            altered: One tensor a batch, in the same order.

        Returns:
            The mean change, and the metric of the altered outputs.

        Raises:
            ValueError: If the outputs never vary, so that no change is relative to anything.
        """
        others = tuple(altered)
        score = self._score(others)
        pairs = list(zip(self.outputs, others, strict=True))
        if self.scale == "kl":
            total = sum(float(kl_divergence(a, b, self.axis).sum()) for a, b in pairs)
        else:
            total = sum(float((b.double() - a.double()).square().sum()) for a, b in pairs)
        return total / self.whole, score

    @functools.cached_property
    def axis(self) -> int:
        """Axis of the classes, where the scale is ``"kl"``."""
        return class_axis(self.outputs[0], None if self.targets is None else self.targets[0])

    @functools.cached_property
    def whole(self) -> float:
        """What summed changes are divided by: the number of distributions, or the outputs' variance.

        Raises:
            ValueError: If the outputs never vary, so that no change is relative to anything.
        """
        if self.scale == "kl":
            return float(sum(a.numel() // a.shape[self.axis] for a in self.outputs))
        mean = sum(a.double().sum(dim=0) for a in self.outputs) / self.n_samples
        variance = sum(float((a.double() - mean).square().sum()) for a in self.outputs)
        if variance == 0:
            raise ValueError("the outputs are constant, so no change is relative to anything")
        return variance

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


def kl_divergence(original: Tensor, altered: Tensor, axis: int = 1) -> Tensor:
    """KL divergence between the class distributions of two sets of logits.

    Args:
        original: Logits, classes along ``axis``.
        altered: Logits, the same shape.
        axis: The class axis.

    Returns:
        KL(original ‖ altered) in nats, float64, the shape without the class axis.

    Example:
        >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])).tolist()
        [0.0]
    """
    p, q = original.double().log_softmax(axis), altered.double().log_softmax(axis)
    # xlogy-like: a class of probability 0 adds nothing, also where q is -inf.
    terms = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0)
    return terms.sum(axis)


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of samples (or positions) whose largest logit is the target's.

    Args:
        outputs: Logits.
        targets: Class indices.

    Returns:
        Between 0 and 1.
    """
    return float((outputs.argmax(class_axis(outputs, targets)) == targets).double().mean())


def class_axis(outputs: Tensor, targets: Tensor | None) -> int:
    """Find the axis of the classes: 1, unless the targets' shape says it is the last.

    Args:
        outputs: Logits.
        targets: Class indices, if known.

    Returns:
        The axis.
    """
    last = targets is not None and targets.shape == outputs.shape[:-1]
    return outputs.ndim - 1 if last else 1


def find_target(batch: Any) -> Tensor | None:
    """Find the target in a batch as data loaders commonly give it.

    Args:
        batch: A tuple or list of input and target, or a mapping with a key such as ``labels``.

    Returns:
        The target, or ``None``.
    """
    target = None
    if isinstance(batch, Mapping):
        target = next((batch[key] for key in _TARGET_KEYS if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        target = batch[1]
    return target if isinstance(target, Tensor) else None


def _are_classes(output: Tensor, target: Tensor) -> bool:
    if target.is_floating_point() or target.is_complex() or output.ndim < 2:
        return False
    without = (output.shape[0], *output.shape[2:])
    return target.shape in (torch.Size(without), output.shape[:-1])
