"""Tells which components, and which data of the batch, a value of the pass was computed from."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_koopman.dataflow import DataFlow
from lightning_koopman.tensors import all_tensors

_BATCH = "batch:"


class Origins:
    """Where the values of one pass come from, as long as the data is followed.

    Attributes:
        error: What kept the data from being followed, if anything did.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._flow: DataFlow | None = None
        self._batch: Any = None
        self._claimed: dict[str, str] = {}

    def start_pass(self, batch: Any) -> None:
        """Forget the pass before.

        Args:
            batch: What the new pass runs on.
        """
        self._batch, self._claimed = batch, {}
        self._label_batch()

    def follow(self) -> None:
        """Begin to follow the data."""
        self._flow = DataFlow()
        self._label_batch()
        self._flow.__enter__()

    def leave(self) -> None:
        """Stop following the data; safe to call twice."""
        flow, self._flow = self._flow, None
        if flow is not None:
            flow.__exit__()
            self.error = flow.error

    def _label_batch(self) -> None:
        if self._flow is not None:
            for i, tensor in enumerate(all_tensors(self._batch)):
                self._flow.label(tensor, f"{_BATCH}{i}")

    def of(self, value: Any) -> frozenset[str] | None:
        """Tell which states a value was computed from.

        Args:
            value: Tensors, nested as modules give them.

        Returns:
            Names of the states nearest to it; ``None`` where the data is not followed.
        """
        if self._flow is None:
            return None
        known = {self._claimed.get(label, label) for label in self._flow.labels(value)}
        return frozenset(name for name in known if not name.startswith(_BATCH))

    def is_fresh(self, tensor: Tensor) -> bool | None:
        """Tell whether a tensor is data of the batch that was not claimed before.

        Args:
            tensor: What a component takes.

        Returns:
            ``None`` where nothing is known of it.
        """
        labels = None if self._flow is None else self._flow.labels(tensor)
        if not labels:
            return None
        return all(name.startswith(_BATCH) and name not in self._claimed for name in labels)

    def claim(self, tensor: Tensor, name: str) -> None:
        """Let whatever a network input was made of count as that input from now on.

        Args:
            tensor: The network input.
            name: Its name.
        """
        if self._flow is not None:
            if not self._flow.labels(tensor):
                self._flow.label(tensor, name)
            self._claimed |= {label: name for label in self._flow.labels(tensor)}

    def mark(self, value: Any, name: str) -> None:
        """Let a value count as a state.

        Args:
            value: What the component gave.
            name: Name of the state.
        """
        if self._flow is not None:
            self._flow.label(value, name)

    def may_hold(self, tensor: Tensor, name: str) -> bool:
        """Tell whether a tensor may have been computed from a state.

        Args:
            tensor: The tensor.
            name: Name of the state.

        Returns:
            False only where the data was followed and did not come from there.
        """
        if self._flow is None:
            return True
        labels = self._flow.labels(tensor)
        return self._flow.error is not None or name in labels
