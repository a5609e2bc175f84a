"""Five interventions on one component at a time, and their measured effects.

The effect is the mean KL divergence of the altered outputs from the original ones. Only what lies behind
the component runs again, from the recorded states: exact where components form a chain.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

KINDS = ("linear", "reinit", "weight_noise", "output_noise", "skip")
NOISE = 0.3  # of the standard deviation, of weights and of outputs
RIDGE = 1e-4
DIRECTIONS = 256  # wider states are cut to as many principal directions
DRAWS = {"linear": 1, "reinit": 1, "skip": 1, "weight_noise": 10, "output_noise": 5}
Alteration = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def states(network: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The input and every component's output."""
    found = [x]
    for block in network:
        found.append(block(found[-1]))
    return found


def rest(network: nn.Sequential, i: int, x: Tensor) -> Tensor:
    """Logits from the output of component ``i``, counted from 1."""
    for block in list(network)[i:]:
        x = block(x)
    return x


def divergence(original: Tensor, altered: Tensor) -> Tensor:
    p, q = original.double().log_softmax(-1), altered.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and orthonormal basis of the flattened state's leading directions."""
    x = x.flatten(1).double()
    mean = x.mean(0)
    if x.shape[1] <= DIRECTIONS:
        return mean, torch.eye(x.shape[1], dtype=torch.float64)
    _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))
    return mean, vectors[:, -DIRECTIONS:].flip(1)


def solve(cxx: Tensor, cxy: Tensor, ridge: float) -> Tensor:
    """Ridge regression from moments; the ridge is in units of the mean variance."""
    values, vectors = torch.linalg.eigh(cxx)
    keep = values > values[-1] * 1e-10
    values, vectors = values[keep], vectors[:, keep]
    return vectors @ ((vectors.T @ cxy) / (values + ridge * cxx.diagonal().mean())[:, None])


class Linearised:
    """The component's linear operator in its place, fitted on pairs of states."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        (self.mean_x, basis_x), (self.mean_y, basis_y) = principal(x), principal(y)
        a = (x.flatten(1).double() - self.mean_x) @ basis_x
        b = (y.flatten(1).double() - self.mean_y) @ basis_y
        operator = solve(a.T @ a / len(a), a.T @ b / len(a), RIDGE)
        self.matrix, self.shape = basis_x @ operator @ basis_y.T, y.shape[1:]

    def __call__(self, x: Tensor) -> Tensor:
        y = (x.flatten(1).double() - self.mean_x) @ self.matrix + self.mean_y
        return y.float().reshape(-1, *self.shape)


def noisy(block: nn.Module, generator: torch.Generator) -> nn.Module:
    altered = copy.deepcopy(block)
    with torch.no_grad():
        for p in altered.parameters():
            if p.numel() > 1:
                p += NOISE * p.std() * torch.randn(p.shape, generator=generator)
    return altered


def with_state(block: nn.Module, state: dict[str, Tensor], index: int) -> nn.Module:
    """Copy component ``index`` (from 0) with its part of a whole network's state."""
    prefix = f"{index}."
    altered = copy.deepcopy(block)
    altered.load_state_dict({
        k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)
    })
    return altered.eval()


def alterations(
    network: nn.Sequential,
    initial: dict[str, Tensor],
    probe: list[Tensor],
    i: int,
    kind: str,
    seed: int,
) -> list[Alteration]:
    """One function per draw, from a component's input and output to its altered output.

    ``linear``: the operator fitted on probe data; ``reinit``: the component's own initial weights and
    buffers; ``weight_noise``: Gaussian, 0.3 of each parameter tensor's standard deviation;
    ``output_noise``: Gaussian, 0.3 of each unit's standard deviation; ``skip``: the input in place of
    the output where shapes agree, the output's mean otherwise.
    """
    block = network[i - 1]
    generator = torch.Generator().manual_seed(seed * 1000 + i)
    if kind == "linear":
        swapped = Linearised(probe[i - 1], probe[i])
        return [lambda x, y: swapped(x)]
    if kind == "reinit":
        fresh = with_state(block, initial, i - 1)
        return [lambda x, y: fresh(x)]
    if kind == "weight_noise":
        drawn = [noisy(block, generator) for _ in range(DRAWS[kind])]
        return [lambda x, y, altered=altered: altered(x) for altered in drawn]
    if kind == "output_noise":
        std = NOISE * probe[i].std(0)
        return [lambda x, y: y + std * torch.randn(y.shape, generator=generator)] * DRAWS[kind]
    if probe[i].shape[1:] == probe[i - 1].shape[1:]:
        return [lambda x, y: x]
    mean = probe[i].mean(0)
    return [lambda x, y: mean.expand_as(y)]


@torch.no_grad()
def measure(
    network: nn.Sequential, initial: dict[str, Tensor], probe: list[Tensor], x: Tensor
) -> dict[str, np.ndarray]:
    """Effects of every kind, shape (components, 4).

    Columns: mean over all of ``x`` and two sets of draws (the effect); first half of ``x`` with the
    first set; second half with the second; probe data with a third set. The last three are for ceilings.
    """
    test = states(network, x)
    half = len(x) // 2
    effects: dict[str, np.ndarray] = {}
    for kind in KINDS:
        rows = []
        for i in range(1, len(network) + 1):
            found = []
            for seed, where in ((1, test), (2, test), (3, probe)):
                draws = [
                    divergence(where[-1], rest(network, i, alter(where[i - 1], where[i])))
                    for alter in alterations(network, initial, probe, i, kind, seed)
                ]
                found.append(torch.stack(draws).mean(0))
            first, second, third = found
            mean = (first.mean() + second.mean()) / 2
            rows.append([mean, first[:half].mean(), second[half:].mean(), third.mean()])
        effects[kind] = np.array(rows, dtype=float)
    return effects
