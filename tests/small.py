"""A small network, its batches and its checkpoints; users of commands name this text as their module."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def batches() -> list[Tensor]:
    return list(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).split(20))


def save(path: Path, step: Any = 1, scale: float = 1.0, **more: Any) -> Path:
    """Write a checkpoint of the network, with other first weights where a scale is given."""
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(scale)
    known = {} if step is None else {"global_step": step}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": model.state_dict(), **known, **more}, path)
    return path


def wired(forward: Callable[..., Any], **parts: nn.Module) -> Any:
    """Make a network of modules by name, and of a pass that says how they hang together."""
    model = type("Wired", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


def around(size: int, forward: Callable[..., Any]) -> Any:
    """Make a module of a linear layer ``inner``, and of a pass that says what is done with it."""
    return wired(forward, inner=nn.Linear(size, size))


class Both(nn.Module):
    """Gives two tensors, of the widths ``a`` and ``b``."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, a), nn.Linear(6, b)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.a(x)), torch.tanh(self.b(x))
