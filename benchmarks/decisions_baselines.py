"""What others rank components by: numbers from gradients, weights and states."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman.network.runs.forward import default_forward

Array = NDArray[np.float64]
Batches = list[tuple[Any, Tensor]]
Replacements = Mapping[int, Mapping[str, Tensor]]


def one_by_one(batches: Batches, count: int) -> Iterable[tuple[Any, Tensor]]:
    """Give the first samples alone."""
    for x, y in batches:
        for i in range(len(y)):
            if count == 0:
                return
            count -= 1
            rows = {k: v[i : i + 1] for k, v in x.items()} if isinstance(x, dict) else x[i : i + 1]
            yield rows, y[i : i + 1]


def own_parameters(net: nn.Module, name: str) -> dict[str, nn.Parameter]:
    return {f"{name}.{key}": p for key, p in net.get_submodule(name).named_parameters()}


def from_gradients(
    net: nn.Module, batches: Batches, names: Sequence[str], rounded: Replacements, count: int = 256
) -> dict[str, Array]:
    """Numbers per component from the loss's gradient at single samples.

    ``taylor`` and ``gradient × weight`` rank blocks; ``hawq`` (the Fisher's trace over the number of
    weights, times the square of what rounding does to them) and ``(g·Δ)²`` rank bits, with a column per
    number of bits.
    """
    parameters = {name: own_parameters(net, name) for name in names}
    wanted = {id(p): p for part in parameters.values() for p in part.values()}
    was = [p.requires_grad for p in net.parameters()]
    net.requires_grad_(True)
    moved = {
        name: [{k: w[k] - part[k].detach() for k in part if k in w} for w in rounded.values()]
        for name, part in parameters.items()
    }
    trace, times = np.zeros(len(names)), np.zeros((2, len(names)))
    along = np.zeros((len(names), len(rounded)))
    used = 0
    for x, y in one_by_one(batches, count):
        loss = F.cross_entropy(default_forward(net, [x, y]), y)
        gradients = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
        used += 1
        for i, name in enumerate(names):
            g = {k: gradients[id(p)] for k, p in parameters[name].items()}
            product = [g[k] * p.detach() for k, p in parameters[name].items()]
            times[0, i] += sum(float(each.sum()) for each in product) ** 2
            times[1, i] += sum(float(each.abs().sum()) for each in product)
            trace[i] += sum(float(g[k].square().sum()) for k in moved[name][0])
            for column, delta in enumerate(moved[name]):
                along[i, column] += sum(float((g[k] * delta[k]).sum()) for k in delta) ** 2
    for p, wants in zip(net.parameters(), was, strict=True):
        p.requires_grad_(wants)
    size = np.array([sum(d.numel() for d in moved[name][0].values()) for name in names])
    error = np.array([
        [sum(float(d.square().sum()) for d in c.values()) for c in moved[n]] for n in names
    ])
    norm = [sum(float(p.square().sum()) for p in part.values()) for part in parameters.values()]
    return {
        "taylor": times[0] / used,
        "gradient × weight": times[1] / used,
        "magnitude": np.array(norm),
        "hawq": (trace / used / np.maximum(size, 1))[:, None] * error,
        "(g·Δ)²": along / used / 2,
        "MSE": error / np.maximum(size, 1)[:, None],
        "weight norm": np.repeat(np.array(norm)[:, None], len(rounded), axis=1),
    }


def block_influence(net: nn.Module, batches: Batches, names: Sequence[str]) -> Array:
    """One minus the cosine between what a block takes and gives, per position (Men et al. 2024)."""
    found: dict[str, list[float]] = {name: [] for name in names}

    def look(name: str, args: Any, output: Any) -> None:
        a, b = args[0], output[0] if isinstance(output, tuple) else output
        axis = 1 if a.ndim == 4 else -1
        found[name].append(float(1 - F.cosine_similarity(a, b, dim=axis).mean()))

    hooks = [
        net.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: look(name, args, output)
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            default_forward(net, batch)
    for hook in hooks:
        hook.remove()
    return np.array([np.mean(found[name]) for name in names])
