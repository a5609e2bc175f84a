"""Which weights a checkpoint of a training with weight averaging holds, and where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Weights = Literal["saved", "averaged", "current"]


class CheckpointError(ValueError):
    """A checkpoint cannot be used."""


def chosen_weights(path: Path, content: Mapping[str, Any], weights: Weights) -> Any:
    """Find the weights asked for.

    Lightning's ``WeightAveraging`` and ``EMAWeightAveraging`` save the averaged weights as
    ``state_dict`` and the others as ``current_model_state``; once the training has ended, only the
    averaged ones. ``StochasticWeightAveraging`` saves the current weights as ``state_dict`` and the
    averaged ones in the callback's state.

    Args:
        path: The file, for errors.
        content: What it holds: a checkpoint, or a bare state dict.
        weights: Which of them.

    Returns:
        The state dict.

    Raises:
        CheckpointError: If the file does not hold these weights.
        ValueError: If ``weights`` is none of the three words.
    """
    saved = content.get("state_dict", content)
    swa, ended = _callback_states(content)
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


def _callback_states(content: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, bool]:
    """Give the state of StochasticWeightAveraging, and whether there is one of WeightAveraging."""
    states = content.get("callbacks")
    found = list(states.values()) if isinstance(states, Mapping) else []
    states = [state for state in found if isinstance(state, Mapping)]
    swa = next((s for s in states if isinstance(s.get("average_model_state"), Mapping)), None)
    return swa, any(set(state) == {"latest_update_step"} for state in states)
