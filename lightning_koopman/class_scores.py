"""Scores of classes: how far two sets lie apart, how many are right, where classes and targets are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TARGET_KEYS = ("labels", "label", "targets", "target", "y")
"""Where targets are looked for in a batch that is a mapping."""


def kl_divergence(original: Tensor, altered: Tensor, axis: int = 1) -> Tensor:
    """KL divergence between the class distributions of two sets of logits.

    Args:
        original: Logits, classes along ``axis``.
        altered: Logits, the same shape.
        axis: The class axis.

    Returns:
        KL(original ‖ altered) in nats, float64, the shape without the class axis.

    Example:
        >>> import torch
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
        target = next((batch[key] for key in TARGET_KEYS if key in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        target = batch[1]
    return target if isinstance(target, Tensor) else None


def are_classes(output: Tensor, target: Tensor) -> bool:
    """Tell whether targets are class indices of what a network gives.

    Args:
        output: What the network gives.
        target: The targets of the same batch.

    Returns:
        True for whole numbers in the output's shape without one axis.
    """
    if target.is_floating_point() or target.is_complex() or output.ndim < 2:
        return False
    without = (output.shape[0], *output.shape[2:])
    return target.shape in (torch.Size(without), output.shape[:-1])
