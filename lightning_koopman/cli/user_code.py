"""Imports the model and the data that a user named on the command line."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_koopman.network.weights import Checkpoint, Weights, apply_checkpoint, load_checkpoint

_HOOKS = ("lightning.pytorch.core.hooks", "pytorch_lightning.core.hooks")


def build_model(
    name: str,
    hyper_parameters: Mapping[str, Any],
    origin: str = "from the hyperparameters in the checkpoint",
) -> nn.Module:
    """Build the model that the user named, or return it where it stands in the module already."""
    found = _named_object(name)
    if not isinstance(found, nn.Module):
        try:
            found = found(**_accepted(found, hyper_parameters))
        except TypeError as error:
            raise ValueError(
                f"{name} cannot be built {origin} ({error}); name a function that builds it"
            ) from None
    if not isinstance(found, nn.Module):
        raise ValueError(f"{name} gives an object of type {type(found).__name__}, not a torch.nn.Module")
    # As Lightning does before it loads weights.
    make: Any = getattr(found, "configure_model", None)
    if hasattr(found, "training_step") and make is not None and make.__module__ not in _HOOKS:
        make()
    return found


def build_trained(
    name: str, ckpt: str, trust: bool, weights: Weights = "saved"
) -> tuple[nn.Module, Checkpoint]:
    """Build a model from its checkpoint's hyperparameters, with the checkpoint's weights."""
    checkpoint = load_checkpoint(ckpt, trust=trust, weights=weights)
    model = build_model(name, checkpoint.hyper_parameters)
    apply_checkpoint(model, checkpoint)
    return model, checkpoint


def build_batches(name: str, hyper_parameters: Mapping[str, Any] | None = None) -> Iterable[Any]:
    """Build the data to measure on."""
    return _validation_batches(_build_data(name, hyper_parameters or {}), name)


def fit_and_choose(
    name: str, hyper_parameters: Mapping[str, Any]
) -> tuple[Iterable[Any] | None, Iterable[Any]]:
    """Build the batches to fit on, where a training loader gives such, and those to choose on."""
    found = _build_data(name, hyper_parameters)
    has_training = hasattr(found, "train_dataloader")
    fitted = _of_stage(found, name, "fit", "train_dataloader") if has_training else None
    return fitted, _validation_batches(found, name)


def _build_data(name: str, hyper_parameters: Mapping[str, Any]) -> Any:
    found = _named_object(name)
    if callable(found):
        saved = hyper_parameters if hasattr(found, "val_dataloader") else {}
        try:
            found = found(**_accepted(found, saved))
        except TypeError as error:
            raise ValueError(f"{name} cannot be called without arguments ({error})") from None
    return found


def _validation_batches(found: Any, name: str) -> Iterable[Any]:
    if hasattr(found, "val_dataloader"):
        found = _of_stage(found, name, "validate", "val_dataloader")
    if isinstance(found, list | tuple) and found:
        first = found[0]
        found = first if hasattr(first, "__iter__") and hasattr(first, "dataset") else found
    if not isinstance(found, Iterable):
        raise ValueError(
            f"{name} gives an object of type {type(found).__name__}, which holds no batches"
        )
    return found


def _of_stage(found: Any, name: str, stage: str, loader: str) -> Any:
    """Return what a data module gives for a stage."""
    make = getattr(found, loader)
    # Lightning's own classes have every loader, to raise an error that speaks of the Trainer.
    if getattr(make, "__module__", None) in _HOOKS:
        raise ValueError(
            f"{name} has no {loader}; name a DataModule that has one, or a function that gives batches"
        )
    found.prepare_data()
    found.setup(stage)
    return make()


def _named_object(name: str) -> Any:
    """Import what the user named as pkg.mod:attribute, pkg.mod.attribute or pkg/mod.py:attribute."""
    module_name, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if module_name.endswith(".py"):
        module_name = os.path.relpath(module_name).removesuffix(".py").replace(os.sep, ".")
    if not module_name or not attribute or module_name.startswith("."):
        raise ValueError(
            f"{name!r} names nothing in this folder or below; write pkg.mod:Name, or pkg/mod.py:Name"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # What the user's own module fails to import is another matter.
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"{name} names the module {error.name!r}, which is neither in this folder nor installed; "
            "check how it is spelt, and where you are"
        ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name in dir(found) if not name.startswith("_")]
            close = difflib.get_close_matches(part, public)
            meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"{module_name} has no {attribute!r}{meant}")
        found = getattr(found, part)
    return found


def _accepted(found: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a class or function names, or all if it takes any."""
    named = inspect.signature(found).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in named.values())
    return {k: v for k, v in arguments.items() if takes_all or k in named}
