"""Everything that might predict an effect, one number per component, from probe data.

``baselines``: what a user could compute instead. ``reported``: what this package's report holds.
``candidates``: second-order predictions written apart from it, with and without backward passes.
"""

import time
import warnings
from typing import Any

import numpy as np
import torch
from captum.attr import LayerConductance
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F
from validity_effects import KINDS, NOISE, Linearised, alterations, principal, rest, solve

from lightning_koopman import Options, component_effects, credit_report

Numbers = dict[str, np.ndarray]
LISTED = (
    *("conductance, mean abs", "conductance, norm", "Jacobian, Frobenius", "Jacobian, log-volume"),
    *("gradient × weight", "gradient × weight, per sample", "weight norm", "1 − CKA"),
    *("depth, early first", "effective rank", "distance from initialisation"),
    *("relative distance from initialisation", "parameter count"),
)
ADDED = ("Fisher × weight²", "Fisher × std²", "Jacobian Fisher noise")
REPORTED = (
    *(
        f"{name}, {mode}"
        for mode in ("none", "whiten")
        for name in ("credit", "gain", "nonlinearity", "sensitivity")
    ),
)
PREDICTED = ("predicted effect",)
MATCHED = ("tangent energy", "tangent volume", "tangent amplitude")
CHAINS = ("closed metric", "chain volume")
CREDITS = ("tangent volume5", "tangent volume4", "chain volume5")
CONDUCTANCE, JACOBIANS, GRADIENTS, LOCAL = 200, 200, 400, 1000  # samples of each


def conductance(network: nn.Sequential, x: Tensor) -> tuple[list[float], list[float]]:
    target = network(x).argmax(1)
    mean_abs, norm = [], []
    for block in network:
        a = LayerConductance(network, block).attribute(
            x, target=target, n_steps=16, internal_batch_size=2048
        )
        a = a.detach().flatten(1)
        mean_abs.append(a.abs().mean().item())
        norm.append(a.norm(dim=1).mean().item())
    return mean_abs, norm


def parameter_sensitivity(network: nn.Sequential, x: Tensor, y: Tensor) -> Numbers:
    """Per component, summed over its parameters.

    Gradient × weight squared of the mean loss and per sample; and the diagonal of the Fisher
    information (labels drawn from the model) times w² and times the variance of weight noise.
    """
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    buffers = dict(network.named_buffers())

    def loss(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, (p, buffers), (a[None],)), b[None])

    with torch.no_grad():
        p = network(x).softmax(-1)
    drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(5))[:, 0]
    mean, square, fisher = ({k: torch.zeros_like(v) for k, v in parameters.items()} for _ in range(3))
    per_sample = vmap(grad(loss), (None, 0, 0))
    for chosen in torch.arange(len(x)).split(64):
        true, sampled = (per_sample(parameters, x[chosen], labels[chosen]) for labels in (y, drawn))
        for k in parameters:
            mean[k] += true[k].sum(0) / len(x)
            square[k] += true[k].square().sum(0) / len(x)
            fisher[k] += sampled[k].square().sum(0) / len(x)
    names = ("gradient × weight", "gradient × weight, per sample", *ADDED[:2])
    found = {name: np.zeros(len(network)) for name in names}
    for k, w in parameters.items():
        std = NOISE * w.std().item() if w.numel() > 1 else 0.0
        terms = ((mean[k] * w).square(), square[k] * w.square(), fisher[k] * w.square())
        for name, term in zip(names, (*terms, 0.5 * std**2 * fisher[k]), strict=True):
            found[name][int(k.split(".")[0])] += term.sum().item()
    return found


def root_fisher(p: Tensor) -> Tensor:
    """A square root of the softmax's Fisher information diag(p) − p pᵀ, shape (n, C, C)."""
    return torch.diag_embed(p.sqrt()) - p.sqrt()[:, :, None] * p[:, None, :]


def one_minus_cka(a: Tensor, b: Tensor) -> float:
    a, b = (s.flatten(1) - s.flatten(1).mean(0) for s in (a, b))
    k, m = a @ a.T, b @ b.T
    return 1 - ((k * m).sum() / (k.norm() * m.norm())).item()


def effective_rank(x: Tensor) -> float:
    p = torch.linalg.svdvals((x.flatten(1) - x.flatten(1).mean(0)).double()).square()
    p = p / p.sum()
    return torch.exp(-(p * p.clamp_min(1e-300).log()).sum()).item()


def baselines(
    network: nn.Sequential, initial: dict[str, Tensor], probe: list[Tensor], labels: Tensor
) -> Numbers:
    found: dict[str, Any] = {}
    found[LISTED[0]], found[LISTED[1]] = conductance(network, probe[0][:CONDUCTANCE])
    frobenius, volume, noise = [], [], []
    root = root_fisher(probe[-1][:JACOBIANS].softmax(-1))
    for i in range(1, len(network) + 1):
        # One backward pass a class through what lies behind, for each sample.
        j = vmap(jacrev(lambda s, i=i: rest(network, i, s[None])[0]), chunk_size=64)(
            probe[i][:JACOBIANS]
        )
        j = j.flatten(2).detach()
        frobenius.append(j.flatten(1).norm(dim=1).mean().item())
        singular = torch.linalg.svdvals(j.double())[:, : min(j.shape[1] - 1, j.shape[2])]
        volume.append(singular.clamp_min(1e-8).log().mean().item())
        std = NOISE * probe[i].std(0).flatten()
        noise.append(0.5 * ((root @ j) * std).square().sum((1, 2)).mean().item())
    found[LISTED[2]], found[LISTED[3]], found[ADDED[2]] = frobenius, volume, noise
    found |= parameter_sensitivity(network, probe[0][:GRADIENTS], labels[:GRADIENTS])
    size, norm, moved, start = (np.zeros(len(network)) for _ in range(4))
    for name, p in network.named_parameters():
        i = int(name.split(".")[0])
        size[i] += p.numel()
        norm[i] += p.detach().square().sum().item()
        moved[i] += (p.detach() - initial[name]).square().sum().item()
        start[i] += initial[name].square().sum().item()
    found["weight norm"], found["parameter count"] = np.sqrt(norm), size
    found["distance from initialisation"] = np.sqrt(moved)
    found["relative distance from initialisation"] = np.sqrt(moved / start)
    few = [s[:600] for s in probe]
    found["1 − CKA"] = [one_minus_cka(few[i - 1], few[i]) for i in range(1, len(few))]
    found["depth, early first"] = -np.arange(len(network), dtype=float)
    found["effective rank"] = [effective_rank(s) for s in few[1:]]
    return {name: np.asarray(values, dtype=float) for name, values in found.items()}


def reported(network: nn.Sequential, initial: dict[str, Tensor], x: Tensor, labels: Tensor) -> Numbers:
    """What ``credit_report`` and ``component_effects`` give with their defaults.

    Effects are predicted from the first 1000 samples, in batches of 200.
    """
    found: Numbers = {}
    names = [str(i) for i in range(len(network))]
    for mode in ("none", "whiten"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few samples, components in doubt
            options = Options(normalize=mode)
            report = credit_report(network, x.split(200), components=names, options=options)
        if report.components != tuple(names):
            raise RuntimeError(f"the report holds components {report.components}, not {names}")
        for name in ("credit", "gain", "nonlinearity", "sensitivity"):
            found[f"{name}, {mode}"] = np.asarray(getattr(report, name), dtype=float)
        found[f"believed, {mode}"] = np.asarray(report.trusted, dtype=float)
        if mode == "none":
            few = zip(x[:LOCAL].split(200), labels[:LOCAL].split(200), strict=True)
            start = time.perf_counter()
            effects = component_effects(
                network, list(few), report, KINDS, how="predicted", samples=LOCAL, initial=initial
            )
            found["seconds, predicting"] = np.array(time.perf_counter() - start)
            for kind, values in effects.values.items():
                found[f"{PREDICTED[0]}/{kind}"] = values
    return found


def displacements(
    network: nn.Sequential, initial: dict[str, Tensor], probe: list[Tensor], i: int, kind: str
) -> tuple[Tensor, Tensor]:
    """What an alteration moves a component's own output by, and the sample each row belongs to.

    ``linear``: out-of-fold residuals of the operator. ``weight_noise``: ten draws, other than those of
    the measured effects, on a third of the samples each.
    """
    n = len(probe[0])
    if kind == "linear":
        moved, fold = torch.empty_like(probe[i]), torch.arange(n) % 4
        for k in range(4):
            fit, out = fold != k, fold == k
            swapped = Linearised(probe[i - 1][fit], probe[i][fit])
            moved[out] = swapped(probe[i - 1][out]) - probe[i][out]
        return moved.flatten(1), torch.arange(n)
    alters = alterations(network, initial, probe, i, kind, seed=991)
    rows, index = [], []
    for d, alter in enumerate(alters):
        chosen = torch.arange(d % 3, n, 3) if len(alters) > 1 else torch.arange(n)
        with torch.no_grad():
            rows.append((alter(probe[i - 1][chosen], probe[i][chosen]) - probe[i][chosen]).flatten(1))
        index.append(chosen)
    return torch.cat(rows), torch.cat(index)


def jacobians(network: nn.Sequential, x: Tensor) -> list[Tensor]:
    """∂ logits / ∂ output of each component, (n, C, d): C backward passes for all components at once."""
    s, kept = x, []
    for block in network:
        s = block(s).requires_grad_(True)
        kept.append(s)
    rows = [torch.autograd.grad(s[:, c].sum(), kept, retain_graph=True) for c in range(s.shape[1])]
    return [torch.stack([r[i].flatten(1) for r in rows], 1).detach() for i in range(len(kept))]


def leading(h: Tensor) -> Tensor:
    """The C − 1 leading eigenvalues; the Fisher information has no more."""
    values = torch.linalg.eigvalsh(h).flip(0)[: len(h) - 1]
    return values.clamp_min(1e-12 * max(values[0].item(), 1e-300))


def volume(h: list[Tensor]) -> np.ndarray:
    return np.array([leading(m).log().mean().item() / 2 for m in h])


def credit(h: dict[str, list[Tensor]], kinds: tuple[str, ...] = KINDS) -> np.ndarray:
    """One number for all kinds: log-volume of A_i = Σ_k H_i^k / (√tr H_i^k Σ_j √tr H_j^k).

    Every kind enters with its component's share of that kind's total amplitude, so no scale is learned
    and no effect is used. It compares components of one network, not networks.
    """
    mixed = []
    for i in range(len(h[kinds[0]])):
        a = torch.zeros_like(h[kinds[0]][i])
        for kind in kinds:
            amplitude = h[kind][i].trace().clamp_min(0).sqrt()
            if amplitude > 0:
                a += h[kind][i] / (amplitude * sum(m.trace().sqrt() for m in h[kind]))
        mixed.append(a)
    return volume(mixed)


Moved = dict[tuple[str, int], tuple[Tensor, Tensor]]


def tangent(network: nn.Sequential, probe: list[Tensor], std: list[Tensor], moved: Moved) -> Numbers:
    """Second-order predictions with the network's own Jacobian at every sample.

    With p = softmax(x_L), F = diag(p) − p pᵀ, J_i = ∂x_L/∂x_i at the sample, δ_i^k the displacement of
    component i's output under alteration k, z = J_iᵀ δ_i^k and H_i^k = E[F^½ z zᵀ F^½] (C × C):

    - tangent energy ½ tr H_i^k = ½ E[zᵀ F z]: the KL divergence to second order, in nats;
    - tangent volume (1/2r) log det_r H_i^k over the r = C − 1 leading eigenvalues;
    - tangent amplitude E √(zᵀ F z);
    - tangent volume5: the credit of all five kinds, volume4: without ``reinit``.

    For ``output_noise`` the covariance of δ is known, so no draws are made.
    """
    n, length = len(probe[0]), len(network)
    classes = probe[-1].shape[1]
    h = {k: [torch.zeros(classes, classes, dtype=torch.float64) for _ in probe[1:]] for k in KINDS}
    amplitude = {k: np.zeros(length) for k in KINDS}
    for chosen in torch.arange(n).split(200):
        root = root_fisher(probe[-1][chosen].softmax(-1))
        for i, j in enumerate(jacobians(network, probe[0][chosen]), 1):
            rooted = root @ j
            for kind in KINDS:
                if kind == "output_noise":
                    part = rooted * std[i]
                    h[kind][i - 1] += torch.einsum("ncd,ned->ce", part, part).double() / n
                    amplitude[kind][i - 1] += part.square().sum((1, 2)).sqrt().sum().item() / n
                    continue
                rows, index = moved[kind, i]
                inside = (index >= chosen[0]) & (index <= chosen[-1])
                f = torch.einsum("ncd,nd->nc", rooted[index[inside] - chosen[0]], rows[inside]).double()
                h[kind][i - 1] += f.T @ f / len(rows)
                amplitude[kind][i - 1] += f.norm(dim=1).sum().item() / len(rows)
    found: Numbers = {}
    for kind in KINDS:
        found[f"tangent energy/{kind}"] = np.array([m.trace().item() / 2 for m in h[kind]])
        found[f"tangent volume/{kind}"] = volume(h[kind])
        found[f"tangent amplitude/{kind}"] = amplitude[kind]
    found["tangent volume5"] = credit(h)
    found["tangent volume4"] = credit(h, tuple(k for k in KINDS if k != "reinit"))
    return found


@torch.no_grad()
def chain(
    network: nn.Sequential, probe: list[Tensor], std: list[Tensor], moved: Moved, seed: int
) -> Numbers:
    """The same without backward passes: from states, local displacements and answers to local noise.

    K_i is fitted half on data, half on data whose input got Gaussian noise of 0.3 of each unit's
    standard deviation. Chain volume and chain volume5 take J_i = K_{i+1} ⋯ K_L for the Jacobian (ridge
    1e-2). Closed metric carries the mean Fisher information backward with what the operators leave:
    M_{i−1} = K_i M_i K_iᵀ + (tr(R_i M_i) / tr S_i) I, where R_i is the covariance of the answer to the
    noise that K_i does not explain and S_i that of the noise (ridge 1e-3); the number is
    ½ tr(M_i E[δ δᵀ]).
    """
    basis = [principal(s) for s in probe]
    flat = [(s.flatten(1).double() - m) @ b for s, (m, b) in zip(probe, basis, strict=True)]
    p = probe[-1].double().softmax(-1)
    metric = torch.diag(p.mean(0)) - p.T @ p / len(p)
    j = torch.eye(p.shape[1], dtype=torch.float64)
    root, generator = root_fisher(p), torch.Generator().manual_seed(4242 + seed)
    length = len(network)
    h: dict[str, list[Tensor]] = {k: [] for k in KINDS}
    closed: dict[str, list[float]] = {k: [] for k in KINDS}
    for i in range(length, 0, -1):
        b = basis[i][1]
        for kind in KINDS:
            if kind == "output_noise":
                covariance = b.T @ (std[i].double().square()[:, None] * b)
                h[kind].append((root @ (j.T @ covariance @ j) @ root.transpose(1, 2)).mean(0))
            else:
                rows, index = moved[kind, i]
                rows = rows.double() @ b
                covariance = rows.T @ rows / len(rows)
                f = (root[index] @ (rows @ j)[:, :, None])[:, :, 0]
                h[kind].append(f.T @ f / len(f))
            closed[kind].append(0.5 * (covariance * metric).sum().item())
        noise = NOISE * probe[i - 1].std(0) * torch.randn(probe[i - 1].shape, generator=generator)
        answer = network[i - 1](probe[i - 1] + noise) - probe[i]
        e = noise.flatten(1).double() @ basis[i - 1][1]
        r = answer.flatten(1).double() @ b
        x, y = flat[i - 1] - flat[i - 1].mean(0), flat[i] - flat[i].mean(0)
        xe, ye = x + e, y + r
        xe, ye = xe - xe.mean(0), ye - ye.mean(0)
        cxx = (x.T @ x + xe.T @ xe) / (2 * len(x))
        cxy = (x.T @ y + xe.T @ ye) / (2 * len(x))
        j = solve(cxx, cxy, 1e-2) @ j
        k = solve(cxx, cxy, 1e-3)
        left = r - e @ k
        spread = (left.T @ left * metric).sum() / (e * e).sum()
        metric = k @ metric @ k.T + spread * torch.eye(len(k), dtype=torch.float64)
        metric = (metric + metric.T) / 2
    found: Numbers = {}
    for kind in KINDS:
        h[kind].reverse()
        found[f"closed metric/{kind}"] = np.array(closed[kind][::-1])
        found[f"chain volume/{kind}"] = volume(h[kind])
    found["chain volume5"] = credit(h)
    return found


def candidates(
    network: nn.Sequential, initial: dict[str, Tensor], probe: list[Tensor], seed: int
) -> Numbers:
    few = [s[:LOCAL] for s in probe]
    std = [NOISE * s.std(0).flatten() for s in probe]
    moved = {
        (kind, i): displacements(network, initial, few, i, kind)
        for kind in KINDS
        if kind != "output_noise"
        for i in range(1, len(probe))
    }
    return tangent(network, few, std, moved) | chain(network, probe, std, moved, seed)
