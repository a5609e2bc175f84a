"""Runs a model on a batch as data loaders give it, and refuses what is no model or no batches."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset, IterableDataset

from lightning_koopman.network.arguments import check_given
from lightning_koopman.network.tensors import is_wrapper, need_not_wait

ForwardFn = Callable[[nn.Module, Any], Any]


def check_arguments(model: object, batches: object, forward_fn: object) -> None:
    """Refuse what is no model, what would not give batches when iterated, and what runs none."""
    check_model(model)
    check_batches(batches)
    check_given((Callable, "a function, called as forward_fn(model, batch)"), forward_fn=forward_fn)


def check_model(model: object) -> None:
    """Refuse what is no model."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ValueError(f"model is the class {model.__name__}; pass an instance, {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model has type {type(model).__name__}; it must be a torch.nn.Module")


def check_batches(batches: object) -> None:
    """Refuse what would not give batches when iterated."""
    kind = type(batches).__name__
    if isinstance(batches, Tensor):
        raise ValueError(
            f"batches is one tensor of shape {tuple(batches.shape)}, whose rows would each be taken "
            "for a batch; pass an iterable of batches, such as x.split(256) or [x]"
        )
    if hasattr(batches, "__array__"):
        raise ValueError(
            f"batches is one table of numbers ({kind}), whose rows or columns would each be taken for a "
            "batch; pass tensors, such as torch.as_tensor(x, dtype=torch.float32).split(256)"
        )
    if isinstance(batches, Mapping):
        raise ValueError(
            f"batches is a mapping ({kind}), whose keys would each be taken for a batch; pass [batch] "
            "for a single batch, or one of the loaders that it holds"
        )
    tensors = batches if isinstance(batches, tuple | list) else ()
    # Batches of inputs alone differ in neither.
    kinds = {(t.ndim, t.is_floating_point()) for t in tensors if isinstance(t, Tensor)}
    if len(kinds) > 1 and all(isinstance(t, Tensor) for t in tensors):
        raise ValueError(
            f"batches is a {kind} of tensors of the shapes {tuple(tensors[0].shape)}, "
            f"{tuple(tensors[1].shape)}, …, each of which would be taken for a batch; pass [(x, y)] "
            "for a single batch of an input and its target"
        )
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise ValueError(
            f"batches is a dataset ({kind}), whose samples would each be taken for a batch; pass "
            "DataLoader(dataset, batch_size=256)"
        )
    if hasattr(batches, "val_dataloader"):
        raise ValueError(
            f"batches is a DataModule ({kind}); pass one of its loaders: call prepare_data() and "
            'setup("validate"), then pass val_dataloader()'
        )
    if not (isinstance(batches, Iterable) or hasattr(batches, "__getitem__")):
        raise ValueError(
            f"batches has type {kind}; it must be an iterable of batches, such as a DataLoader"
        )


_LIGHTNING = ("lightning.pytorch.core.module", "pytorch_lightning.core.module")


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch as data loaders give it; what cannot be mapped is handed over whole."""
    # A LightningModule's own passes on to that of torch, which is missing.
    own = getattr(type(model), "forward", None)
    if "forward" not in vars(model) and getattr(own, "__module__", None) in (
        "torch.nn.modules.module",
        *_LIGHTNING,
    ):
        raise ValueError(
            f"{type(model).__name__} has no forward() of its own; say how to run it with "
            "forward_fn=lambda model, batch: model.net(batch[0]), or pass the network inside it"
        )
    if isinstance(batch, Mapping):
        return _call_by_name(model, batch)
    if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence) and batch:
        needed = _positional(model)
        if 1 < needed <= len(batch):
            return model(*batch[:needed])
        first = batch[0]
        # Inputs that come apart from their targets: ((a, b), y).
        if isinstance(first, tuple | list) and 1 < needed == len(first):
            return model(*first)
        alone = type(first) in (tuple, list) and len(first) == 1
        batch = first[0] if alone else first
        if isinstance(batch, Mapping):
            return _call_by_name(model, batch)
    if isinstance(batch, Tensor | PackedSequence):
        return model(batch)
    return _call_whole(model, batch, f"a batch of type {type(batch).__name__} arrived")


def _call_whole(model: nn.Module, batch: Any, arrived: str) -> Any:
    try:
        return model(batch)
    except Exception as error:
        raise ValueError(
            f"{arrived} and was handed over whole, but {type(model).__name__} raised "
            f"{type(error).__name__}: {error}; say how to run the model with "
            "forward_fn=lambda model, batch: ..."
        ) from error


def _positional(model: nn.Module) -> int:
    """How many arguments a model's ``forward`` cannot do without."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _call_by_name(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if takes_all and (_positional(model) != 1 or next(iter(parameters)) in batch):
        try:
            return model(**batch)
        except TypeError as error:
            raise ValueError(
                f"a batch with the entries {list(batch)} arrived, all of which "
                f"{type(model).__name__}.forward says it takes, but it raised {error}; say how to run "
                "the model with forward_fn=lambda model, batch: ..."
            ) from error
    given = {name: value for name, value in batch.items() if name in parameters}
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind is not inspect.Parameter.VAR_POSITIONAL and name not in given
    ]
    if (not given or takes_all) and _positional(model) == 1:
        return _call_whole(
            model, batch, f"a batch with the entries {list(batch)}, none of which forward takes, arrived"
        )
    if not given or missing:
        raise ValueError(
            f"the batch has the entries {list(batch)}, but {type(model).__name__}.forward takes "
            f"{list(parameters)}; say how to run the model with forward_fn=lambda model, batch: ..."
        )
    return model(**given)


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of a nested batch; nothing waits for what goes to a GPU."""
    value = _own(value)
    if hasattr(value, "to") and callable(value.to):
        ordered = isinstance(value, Tensor | PackedSequence) and need_not_wait(device)
        moved = value.to(device, non_blocking=True) if ordered else value.to(device)
        # Objects of a user's may move in place, and return nothing.
        return value if moved is None else moved
    if isinstance(value, Mapping):
        return {name: to_device(part, device) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(part, device) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(to_device(part, device) for part in value)
    return value


def _own(value: Any) -> Any:
    """Copy an object whose attributes a network may set anew, as graph libraries have it."""
    if not is_wrapper(value) and (not dataclasses.is_dataclass(value) or isinstance(value, type)):
        return value
    try:
        return copy.copy(value)
    except Exception:
        # Whoever refuses to be copied is not to be kept from being run.
        return value


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's first parameter is."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
