"""Training batches that are kept to be run once more, where there is no validation loop."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


class KeptBatches:
    """Copies of an epoch's first batches.

    Attributes:
        batches: The copies, on the CPU.
    """

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self._n_samples = 0

    def take(self, batch: Any, *, most: int) -> None:
        """Copy a batch, unless those before it hold enough samples.

        Args:
            batch: Tensors, nested as loaders give them.
            most: How many samples are enough.
        """
        if self._n_samples < most:
            kept = apply_to_collection(batch, Tensor, lambda t: t.detach().to("cpu", copy=True))
            self.batches.append(kept)
            self._n_samples += batch_size(batch)


def batch_size(batch: Any) -> int:
    """Count the samples of a batch by its longest first axis.

    Args:
        batch: Tensors, nested as loaders give them.

    Returns:
        At least 1.
    """
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda t: sizes.append(t.shape[0] if t.ndim else 1))
    return max(sizes, default=1)
