"""Reads weights from checkpoints safely, averaged ones among them."""

from __future__ import annotations

import glob
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from lightning_koopman.network.arguments import check_each, check_type
from lightning_koopman.network.components import clean_name

Weights = Literal["saved", "averaged", "current"]


class CheckpointError(ValueError):
    """A checkpoint cannot be used."""


def _chosen_weights(path: Path, content: Mapping[str, Any], weights: Weights) -> Any:
    """Return the weights asked for.

    Lightning's ``WeightAveraging`` and ``EMAWeightAveraging`` save the averaged weights as
    ``state_dict`` and the others as ``current_model_state``; once the training has ended, only the
    averaged ones. ``StochasticWeightAveraging`` saves the current weights as ``state_dict`` and the
    averaged ones in the callback's state.
    """
    saved = content.get("state_dict", content)
    states = content.get("callbacks")
    found = list(states.values()) if isinstance(states, Mapping) else []
    states = [state for state in found if isinstance(state, Mapping)]
    swa = next((s for s in states if isinstance(s.get("average_model_state"), Mapping)), None)
    ended = any(set(state) == {"latest_update_step"} for state in states)
    if weights == "saved":
        return saved
    if weights == "current":
        if ended and "current_model_state" not in content:
            raise CheckpointError(
                f"{path} was saved after weight averaging had ended and holds only averaged weights; "
                "ask for the saved or the averaged ones"
            )
        return content.get("current_model_state", saved)
    if weights != "averaged":
        raise ValueError(f"weights is {weights!r}; choose 'saved', 'averaged' or 'current'")
    if "current_model_state" in content or ended:
        return saved
    if swa is None:
        raise CheckpointError(
            f"{path} holds no averaged weights, only a state_dict; leave out --weights (weights='saved')"
        )
    count = swa.get("n_averaged")
    if not (isinstance(count, int) and count > 0):
        raise CheckpointError(
            f"{path} was saved before StochasticWeightAveraging began; ask for the current weights"
        )
    averaged = swa["average_model_state"]
    if any(str(name).endswith("running_var") for name in averaged):
        raise CheckpointError(
            f"{path} holds averaged weights without their BatchNorm statistics, which "
            "StochasticWeightAveraging collects when the training ends; evaluate the last checkpoint as "
            "saved, or ask for the current weights"
        )
    return averaged


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one step of a training.

    Attributes:
        path: The file.
        step: Number of optimiser steps taken; ``None`` where the file does not say.
        state_dict: Tensors by name.
        hyper_parameters: What a LightningModule saved of its arguments.
        data_hyper_parameters: What a LightningDataModule saved of its own.
        swaps: What stands in place of components of the network that was saved, if it was shrunk.
    """

    path: Path
    step: int | None
    state_dict: Mapping[str, Tensor]
    hyper_parameters: Mapping[str, Any]
    data_hyper_parameters: Mapping[str, Any]
    swaps: Sequence[Any] | None = None


def find_checkpoints(
    checkpoints: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[Path]:
    """Resolve paths and glob patterns."""
    given = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else checkpoints
    check_type((Iterable, "a path, or a list of paths"), checkpoints=given)
    given = list(given)
    check_each((str | os.PathLike, "a path"), checkpoints=given)
    found: dict[Path, None] = {}
    patterns = [os.fspath(name) for name in given]
    for place, pattern in enumerate(patterns):
        # Brackets in the name of a file or folder that is there are no pattern.
        whole = glob.escape(pattern) if os.path.lexists(pattern) else pattern
        if os.path.isdir(pattern) and not _is_sharded(Path(pattern)):
            whole, patterns[place] = (os.path.join(each, "**", "*.ckpt") for each in (whole, pattern))
        matched = glob.glob(whole, recursive=True) if glob.has_magic(whole) else [pattern]
        found |= dict.fromkeys(map(Path, sorted(matched, key=_by_number)))
    if not found:
        raise CheckpointError(f"no checkpoint matches {patterns}")
    return list(found)


def _by_number(name: str) -> list[str | int]:
    """Return what puts ``epoch_2.pt`` before ``epoch_10.pt``: without a step, places count."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]


_METRIC = re.compile(r"(?!epoch=|step=)[\w.]+=([-+\d.]|nan|inf)")
_COUNTED = re.compile(r"(^|[^A-Za-z])(epoch|step)=\d.*[^A-Za-z\d.=][A-Za-z]\w*$")
# The end and the beginning of "epoch=1-val/loss=0.30.ckpt", one name to whoever logs "val/loss".


def _folder_of_run(path: str, folders: set[str]) -> str:
    """Return a checkpoint's folder, or the one above those that slashes in a metric's name have made."""
    folder, name = os.path.split(path)
    above = folder
    while _METRIC.match(name) and above != os.path.dirname(above):
        above, begun = os.path.split(above)
        below = {other for other in folders if other.startswith(above + os.sep)}
        alone = above in folders and len(below) == 1
        if _COUNTED.search(begun) or os.path.basename(above) == "checkpoints" or alone:
            return above
    return folder


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return the name of the training that each checkpoint belongs to."""
    files = [os.path.abspath(path) for path in paths]
    folders = [_folder_of_run(file, set(map(os.path.dirname, files))) for file in files]
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
    """Read a checkpoint of Lightning, or a bare ``state_dict``, onto the CPU."""
    path = Path(path)
    if _is_sharded(path):
        merge = "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        if (path / "meta.pt").exists():  # Lightning's own command takes no others
            merge = "lightning.pytorch.utilities.consolidate_checkpoint FOLDER"
        raise CheckpointError(
            f"{path} is a sharded checkpoint; merge it into one file first: python -m {merge}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about how the bytes were pickled
            content = torch.load(path, map_location="cpu", weights_only=not trust)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except Exception as error:  # the unpickler raises anything at all on bytes that are no checkpoint
        _refuse(path, error)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    tensors = _chosen_weights(path, content, weights)
    if not isinstance(tensors, Mapping) or not all(isinstance(v, Tensor) for v in tensors.values()):
        found = ", ".join(repr(str(name)) for name in list(content)[:5])
        raise CheckpointError(
            f"{path} holds no state_dict of tensors but {found or 'nothing'}; name a checkpoint that "
            "the Trainer wrote, or a file of torch.save(model.state_dict(), ...)"
        )
    step, swaps = content.get("global_step"), content.get("swaps")
    saved = [content.get(key) for key in ("hyper_parameters", "datamodule_hyper_parameters")]
    own, of_data = (entry if isinstance(entry, Mapping) else {} for entry in saved)
    return Checkpoint(
        path=path,
        step=step if type(step) is int and 0 <= step < 2**63 else None,
        state_dict={clean_name(str(name)): value for name, value in tensors.items()},
        hyper_parameters=own,
        data_hyper_parameters=of_data,
        swaps=swaps if isinstance(swaps, list) else None,
    )


def apply_checkpoint(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights into a model."""
    expected = {clean_name(name): (name, value) for name, value in model.state_dict().items()}
    if checkpoint.swaps and expected.keys() != checkpoint.state_dict.keys():
        raise CheckpointError(
            f"{checkpoint.path} holds a network with dropped or linear components, which does not fit "
            f"{type(model).__name__} as it is; give the one that lightning_koopman.decisions.swaps."
            f"load_shrunk(model, {os.fspath(checkpoint.path)!r}) returns, to a command as a function "
            "that --model names"
        )
    for name, (_, value) in expected.items():
        if name not in checkpoint.state_dict:
            lacking = repr(name) + _renamed(list(expected), checkpoint.state_dict)
            raise CheckpointError(
                f"{checkpoint.path} does not fit {type(model).__name__}: it lacks {lacking}"
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
    load_weights(model, {expected[name][0]: value for name, value in checkpoint.state_dict.items()})


def _renamed(expected: Sequence[str], saved: Mapping[str, Tensor]) -> str:
    """Tell whether it is what stands before all names that differs, as where a wrapper was saved."""
    for name in saved:
        before = name.removesuffix(expected[0])
        if before and name != before and all(before + other in saved for other in expected):
            return f"; its names have {before!r} in front: save the state_dict of what is inside"
    for end in re.finditer(r"\.", expected[0]):
        before = expected[0][: end.end()]
        if all(name.startswith(before) and name[end.end() :] in saved for name in expected):
            return f"; its names lack {before!r} in front: give the part of the model that was saved"
    return ""


def load_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load a model's own names; what a LightningModule never saves stays as it was built."""
    model.load_state_dict(weights, strict=getattr(model, "strict_loading", True))


def _described(tensor: Tensor) -> str:
    """Return a tensor's shape, and what else would keep it from being copied into another."""
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


_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
"""What files of torch before 1.6 begin with, as pickle writes it."""


def _refuse(path: Path, error: Exception) -> NoReturn:
    """Raise why a file is not read, without the unpickler's advice to switch safety off."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0].partition(". ")[0]
    # Of a file that ends early torch asks for places that are not there.
    if isinstance(error, OSError) and error.filename is not None:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or reason})") from None
    with open(path, "rb") as file:
        start = file.read(32)
    # A zip file, or what torch wrote before 1.6. Advice to trust other bytes would be bad advice.
    if not start.startswith(b"PK") and _MAGIC not in start:
        raise CheckpointError(
            f"{path} is no checkpoint, or a damaged one; name a file that the Trainer or "
            "torch.save wrote"
        ) from None
    if "Weights only load failed" not in str(error):
        raise CheckpointError(f"{path} is damaged ({reason}); name another checkpoint") from None
    lines = (line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line)
    refused = next(lines, "an object of another kind").strip().split(". ")[0][:160]
    raise CheckpointError(
        f"{path} holds more than weights ({refused}), which could run code. If you made the file "
        "yourself, allow it with --trust-checkpoint (trust_checkpoint=True)"
    ) from None
