"""Runs a model on batches as data loaders commonly give them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

ForwardFn = Callable[[nn.Module, Any], Any]


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch as data loaders commonly give it.

    Args:
        model: Any module.
        batch: A tensor; a tuple or list that begins with the inputs, as many as the model's ``forward``
            needs; or a mapping of keyword arguments, from which those that ``forward`` takes are used.

    Returns:
        What the model returns.

    Raises:
        ValueError: If the batch is none of these.
    """
    if isinstance(batch, Tensor | PackedSequence):
        return model(batch)
    if isinstance(batch, Mapping):
        return _call_by_name(model, batch)
    if isinstance(batch, tuple | list) and batch:
        needed = _positional(model)
        if 1 < needed <= len(batch):
            return model(*batch[:needed])
        return default_forward(model, batch[0])
    raise ValueError(
        f"a batch of type {type(batch).__name__} arrived; pass tensors, tuples or mappings, or say how "
        "to run the model with forward_fn=lambda model, batch: ..."
    )


def _positional(model: nn.Module) -> int:
    """How many arguments a model's ``forward`` cannot do without."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _call_by_name(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return model(**batch)
    given = {name: value for name, value in batch.items() if name in parameters}
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind is not inspect.Parameter.VAR_POSITIONAL and name not in given
    ]
    if not given or missing:
        raise ValueError(
            f"the batch has the entries {list(batch)}, but {type(model).__name__}.forward takes "
            f"{list(parameters)}; say how to run the model with forward_fn=lambda model, batch: ..."
        )
    return model(**given)


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of a nested batch.

    Args:
        value: Tensor, or tuples, lists and mappings of them; anything else is left alone.
        device: Where to.

    Returns:
        The batch, with its containers' types kept.
    """
    if hasattr(value, "to") and callable(value.to):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: to_device(part, device) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(part, device) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(to_device(part, device) for part in value)
    return value
