"""Reads checkpoints, which are not trusted, and puts their weights into a model."""

from __future__ import annotations

import glob
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.averaging import CheckpointError as CheckpointError
from lightning_koopman.averaging import Weights as Weights
from lightning_koopman.averaging import chosen_weights
from lightning_koopman.module_tree import clean_name


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one moment of a training.

    Attributes:
        path: The file.
        step: Number of optimiser steps taken; ``None`` where the file does not say.
        state_dict: Tensors by name.
        hyper_parameters: What a LightningModule saved of its arguments.
        data_hyper_parameters: What a LightningDataModule saved of its own.
    """

    path: Path
    step: int | None
    state_dict: Mapping[str, Tensor]
    hyper_parameters: Mapping[str, Any]
    data_hyper_parameters: Mapping[str, Any]


def find_checkpoints(
    checkpoints: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[Path]:
    """Resolve paths and glob patterns.

    Args:
        checkpoints: A path or pattern (``**`` crosses folders), or several. A folder means the ``.ckpt``
            files below it.

    Returns:
        Distinct paths. A path without wildcards is kept even where no file is there.

    Raises:
        CheckpointError: If nothing is left.
    """
    given = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else list(checkpoints)
    found: dict[Path, None] = {}
    for pattern in (os.fspath(name) for name in given):
        if os.path.isdir(pattern) and not _is_sharded(Path(pattern)):
            pattern = os.path.join(pattern, "**", "*.ckpt")
        names = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        found |= dict.fromkeys(map(Path, names))
    if not found:
        raise CheckpointError(f"no checkpoint matches {given}")
    return list(found)


def run_names(paths: Sequence[Path]) -> list[str]:
    """Name the training that each checkpoint belongs to.

    Args:
        paths: Checkpoints; those of one folder belong to one training.

    Returns:
        For each, its folder below the deepest folder common to all, without the ``checkpoints`` in which
        Lightning puts every run's files. Empty where there is one folder only.
    """
    folders = [os.path.dirname(os.path.abspath(path)) for path in paths]
    if len(set(folders)) < 2:
        return [""] * len(folders)
    stripped = [os.path.dirname(f) if os.path.basename(f) == "checkpoints" else f for f in folders]
    if len(set(stripped)) == len(set(folders)):
        folders = stripped
    common = os.path.commonpath(folders)
    return [Path(os.path.relpath(folder, common)).as_posix() for folder in folders]


def load_checkpoint(
    path: str | os.PathLike[str], *, trust: bool = False, weights: Weights = "saved"
) -> Checkpoint:
    """Read a checkpoint of Lightning, or a bare ``state_dict``, onto the CPU.

    Args:
        path: The file.
        trust: Unpickle whatever the file holds. It may then run any code; leave this off for files
            that are not your own.
        weights: What stands in ``state_dict`` (``"saved"``), or, of a training with weight averaging,
            the ``"averaged"`` or the ``"current"`` weights.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If the file is missing, damaged, not a checkpoint, needs to be trusted, or does
            not hold the weights asked for.
    """
    path = Path(path)
    if _is_sharded(path):
        raise CheckpointError(
            f"{path} is a sharded checkpoint; merge it into one file first: "
            "python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error):
            raise CheckpointError(
                f"{path} holds more than weights ({_refused(error)}), which could run code. If you "
                "made the file yourself, allow it with --trust-checkpoint (trust_checkpoint=True)"
            ) from None
        raise CheckpointError(f"{path} is damaged: {error}") from None
    except Exception as error:  # the unpickler raises anything at all on bytes that are no checkpoint
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path} cannot be read ({reason})") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    tensors = chosen_weights(path, content, weights)
    if not isinstance(tensors, Mapping) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise CheckpointError(f"{path} holds no state_dict of tensors")
    step = content.get("global_step")
    saved = [content.get(key) for key in ("hyper_parameters", "datamodule_hyper_parameters")]
    own, of_data = (entry if isinstance(entry, Mapping) else {} for entry in saved)
    return Checkpoint(
        path=path,
        step=step if type(step) is int and 0 <= step < 2**63 else None,
        state_dict={clean_name(str(name)): value for name, value in tensors.items()},
        hyper_parameters=own,
        data_hyper_parameters=of_data,
    )


def apply_checkpoint(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights into a model.

    Args:
        model: Changed in place, unless the checkpoint does not fit.
        checkpoint: The weights.

    Raises:
        CheckpointError: If names or shapes differ; the first difference is named.
    """
    expected = {clean_name(name): (name, value) for name, value in model.state_dict().items()}
    for name, (_, value) in expected.items():
        if name not in checkpoint.state_dict:
            raise CheckpointError(
                f"{checkpoint.path} does not fit {type(model).__name__}: it lacks {name!r}"
            )
        saved = _described(checkpoint.state_dict[name])
        if isinstance(value, Tensor) and saved != (own := _described(value)):
            raise CheckpointError(
                f"{checkpoint.path} does not fit {type(model).__name__}: {name!r} has {saved}, "
                f"the model's {own}"
            )
    for name in checkpoint.state_dict:
        if name not in expected:
            raise CheckpointError(
                f"{checkpoint.path} does not fit {type(model).__name__}: the model has no {name!r}"
            )
    model.load_state_dict({expected[name][0]: value for name, value in checkpoint.state_dict.items()})


def _described(tensor: Tensor) -> str:
    """Tell a tensor's shape, and what else would keep it from being copied into another."""
    if tensor.is_nested:
        return "nested tensors"
    kinds = {
        "quantized": tensor.is_quantized,
        "complex": tensor.is_complex(),
        "no values": tensor.is_meta,
        str(tensor.layout): tensor.layout is not torch.strided,
    }
    more = [kind for kind, applies in kinds.items() if applies]
    return f"shape {tuple(tensor.shape)}" + (f" ({', '.join(more)})" if more else "")


def _is_sharded(path: Path) -> bool:
    return path.is_dir() and (path / ".metadata").exists()


def _refused(error: BaseException) -> str:
    """Name what the safe unpickler refused, without its advice to switch safety off."""
    for line in str(error).splitlines():
        if "GLOBAL" in line or "Unsupported" in line:
            return line.strip().split(". ")[0][:160]
    return "an object of another kind"
