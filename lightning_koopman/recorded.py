"""One recorded state, and the names of those that are no component's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

INPUT = "input"
"""Name of the state before the first component."""

OUTPUT = "output"
"""Name of the last state where it is no component's."""


@dataclass(frozen=True)
class Recorded:
    """One state as a module gave it.

    Attributes:
        name: Of the component, or of the network input.
        module: That gave the tensor, or that took it where it is an input.
        tensor: The state; padded, with the batch axis first, where it was a packed sequence.
        lengths: Valid length of each sequence where it was packed, else ``None``.
        sources: The states it was computed from, directly; ``None`` where the data was not followed.
        from_float: Whether the component took a floating-point tensor.
    """

    name: str
    module: nn.Module
    tensor: Tensor
    lengths: Tensor | None = None
    sources: frozenset[str] | None = None
    from_float: bool = True
