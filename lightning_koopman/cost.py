"""What a network costs: parameters, floating-point operations and latency."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_koopman.forward import ForwardFn, default_forward, to_device
from lightning_koopman.isolation import undisturbed


@dataclass(frozen=True)
class Cost:
    """What one forward pass of a network costs.

    Attributes:
        parameters: Number of parameters.
        flops: Floating-point operations of one pass over the batch, as
            ``torch.utils.flop_counter`` counts them: matrix products and convolutions.
        seconds: Median time of one pass over the batch.
    """

    parameters: int
    flops: int
    seconds: float


def measure_costs(
    models: list[nn.Module], batch: Any, *, forward_fn: ForwardFn | None = None, repeats: int = 30
) -> list[Cost]:
    """Measure several networks on the same batch, taking turns so that all see the same machine.

    Args:
        models: The networks.
        batch: What ``forward_fn`` takes.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.
        repeats: Number of timed passes.

    Returns:
        One cost a network.
    """
    forward = default_forward if forward_fn is None else forward_fn
    seconds: list[list[float]] = [[] for _ in models]
    flops = []
    for model in models:
        with undisturbed(model), FlopCounterMode(display=False) as counter:
            forward(model, _placed(model, batch))
        flops.append(counter.get_total_flops())
    for _ in range(repeats):
        for model, taken in zip(models, seconds, strict=True):
            given = _placed(model, batch)
            with undisturbed(model):
                start = time.perf_counter()
                forward(model, given)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - start)
    return [
        Cost(sum(p.numel() for p in model.parameters()), count, statistics.median(taken))
        for model, count, taken in zip(models, flops, seconds, strict=True)
    ]


def _placed(model: nn.Module, batch: Any) -> Any:
    return to_device(batch, next((p.device for p in model.parameters()), torch.device("cpu")))
