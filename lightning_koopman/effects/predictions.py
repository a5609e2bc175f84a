"""Predicts what altering each component does to the outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_koopman.effects.alterations import (
    altered_output,
    altered_weights,
    check_alterations,
    check_samples_first,
    regressor_sites,
    state_sites,
    whole_operator,
)
from lightning_koopman.effects.linear_map import LinearFit, LinearMap, from_operator
from lightning_koopman.effects.scoring import Outputs
from lightning_koopman.koopman.chain import jackknife
from lightning_koopman.network.forward_runner import ForwardFn, Runner, UnitMoments, rows_by_sample
from lightning_koopman.network.hook_points import Alteration, Site, find_module
from lightning_koopman.network.isolation import undisturbed
from lightning_koopman.report.effects import KINDS, Effects, Kind, Scale, mean_share
from lightning_koopman.report.report import CreditReport


class Shift(NamedTuple):
    """One displacement of a batch.

    Attributes:
        component: Index of the component that is altered.
        kind: How.
        rows: By component whose output it moves of itself, shape ``(n_samples, D)``. These are several
            where components share weights.
    """

    component: int
    kind: Kind
    rows: Mapping[int, Tensor]


class Displacements:
    """Displacements by alterations, a batch at a time.

    Call :meth:`update` with the states of a first run over all batches, then :meth:`solve`.
    """

    def __init__(
        self,
        runner: Runner,
        report: CreditReport,
        kinds: Sequence[Kind],
        initial: Mapping[str, Tensor] | None,
        strength: float,
    ) -> None:
        self._runner, self._report, self._kinds = runner, report, kinds
        self._initial, self._strength = initial, strength
        self._sites = state_sites(report)
        self._moments = UnitMoments()
        self._fits: dict[str, LinearFit] = {}
        self._maps: dict[str, LinearMap] = {}
        self._fitted: dict[str, LinearMap] = {}
        self._operators: dict[str, LinearMap] = {}
        self._ridges: dict[str, float] = {}
        self._groups = _sharing_weights(runner, report)

    def update(self, values: Mapping[Site, Tensor]) -> None:
        """Take the states of one batch."""
        check_samples_first(self._report, values)
        self._moments.update(values)
        if "linear" not in self._kinds:
            return
        for name in self._report.components:
            sources = [values[site] for site in regressor_sites(self._report, name)]
            target = values[self._sites[name]]
            if name not in self._fits:
                shapes = [x.shape[1:] for x in sources]
                operator = whole_operator(self._report, name, shapes, target.shape[1:])
                width = 0 if operator is None else max(x[0].numel() for x in sources)
                self._fits[name] = LinearFit(max(256, width))
                if operator is not None:
                    self._operators[name] = from_operator(operator, target.shape[1:], len(sources))
                    self._ridges[name] = operator.tikhonov
            self._fits[name].update(sources, target)

    def solve(self) -> None:
        """Take the report's operators as maps, or fit them; fit the leverages of the samples."""
        for name, fit in self._fits.items():
            self._fitted[name] = fit.solve(self._ridges.get(name))
        self._maps = self._fitted | self._operators

    def spread(self, component: int) -> Tensor:
        """Give the standard deviation of output noise."""
        site = self._sites[self._report.components[component]]
        return self._strength * self._moments.std(site)

    def shifts(
        self, batch: Any, values: Mapping[Site, Tensor], n_samples: int, draws: int
    ) -> list[Shift]:
        """Displace every component's output by every kind, but ``output_noise``."""
        found = []
        for kind in self._kinds:
            if kind in ("linear", "skip"):
                for i, name in enumerate(self._report.components):
                    moved = self._moved(kind, name, values)
                    found.append(Shift(i, kind, {i: rows_by_sample(moved, n_samples, name)}))
            elif kind != "output_noise":
                once = kind == "reinit" and self._initial is not None
                each = 1 if once else min(draws, n_samples)
                for turn in range(max(len(group) for group in self._groups)):
                    altered = [group[turn] for group in self._groups if turn < len(group)]
                    rows = self._weights_altered(kind, altered, batch, values, n_samples, each)
                    for group in self._groups:
                        if turn < len(group):
                            found.append(Shift(group[turn], kind, {j: rows[j] for j in group}))
        return found

    def _moved(self, kind: Kind, name: str, values: Mapping[Site, Tensor]) -> Tensor:
        output = values[self._sites[name]]
        alter = altered_output(kind, name, self._report, self._moments, self._maps, self._strength)
        moved = alter(output, values).to(output.device) - output
        if kind == "linear":
            sources = [values[site] for site in regressor_sites(self._report, name)]
            # A sample that decides its own prediction wholly says nothing about any other.
            own = (1 - self._fitted[name].leverage(sources)).clamp_min(1e-6)
            moved = moved / own.reshape(-1, *[1] * (moved.ndim - 1))
        return moved

    def _weights_altered(
        self,
        kind: Kind,
        altered: Sequence[int],
        batch: Any,
        values: Mapping[Site, Tensor],
        n_samples: int,
        draws: int,
    ) -> list[Tensor]:
        """Alter components' weights in one pass, with what each of them takes in held as it was."""
        names, parts = self._report.components, self._report.parts
        given: dict[int, Tensor] = {}

        def held(i: int, site: Site) -> Alteration:
            def alter(output: Tensor, _: Mapping[Site, Tensor]) -> Tensor:
                given[i] = output.detach().clone()
                return values[site].clone()

            return alter

        sites = [self._sites[name] for name in names]
        alters = {site.call: held(i, site) for i, site in enumerate(sites)}
        moved: list[Tensor] = []
        for draw in range(draws):
            with ExitStack() as stack:
                for i in altered:
                    stack.enter_context(
                        altered_weights(
                            kind, self._runner.model, parts[names[i]], self._initial, self._strength
                        )
                    )
                self._runner.run_batch(batch, alter=alters)
            for i, (name, site) in enumerate(zip(names, sites, strict=True)):
                rows = rows_by_sample(given[i] - values[site], n_samples, name)
                if draw == 0:
                    moved.append(rows)
                else:
                    moved[i][draw::draws] = rows[draw::draws]
        return moved


def _sharing_weights(runner: Runner, report: CreditReport) -> list[list[int]]:
    """Group components that hold weights in common, directly or through others."""
    groups: list[tuple[set[int], list[int]]] = []
    for i, name in enumerate(report.components):
        modules = [find_module(runner.model, call)[0] for call in report.parts[name]]
        own = {id(t) for m in modules for t in (*m.parameters(), *m.buffers())}
        apart = [group for group in groups if not group[0] & own]
        joined = [group for group in groups if group[0] & own]
        members = sorted([i, *(j for _, group in joined for j in group)])
        groups = [*apart, (own.union(*(ids for ids, _ in joined)), members)]
    return [members for _, members in groups]


_OTHER_DRAWS = 1_000_003
"""Added to the seed, so that noise differs from that of the effects measured with the same seed."""


def predict_effects(
    model: nn.Module,
    batches: Iterable[Any],
    report: CreditReport,
    kinds: Sequence[Kind] = KINDS,
    *,
    initial: Mapping[str, Tensor] | None = None,
    strength: float = 0.3,
    draws: int = 20,
    scale: Scale | None = None,
    probes: int = 32,
    forward_fn: ForwardFn | None = None,
    seed: int = 0,
) -> CreditReport:
    """Predict what altering each component would do to the outputs, without altering the network.

    An alteration displaces a component's own output, on the input that it receives in the network as
    it is, by δ. The network's Jacobian J from that output to its outputs, at every sample and by
    backward passes, turns this into z = Jδ, and the mean of zᵀ M z is the effect to second order: M is
    half the softmax's Fisher information for ``"kl"``, and the identity over the outputs' variance for
    ``"relative"``. This is the limit that Koopman operators have in a small neighbourhood of each
    sample, not the chain of operators fitted to all samples; these give δ for ``linear`` only.

    The kinds are those of :func:`lightning_koopman.intervene`. For ``linear``, δ is what the operator
    leaves of a sample that it was not fitted to (leave-one-out, on ``batches``). For ``output_noise``
    the mean over draws is exact. The weights of all components are altered in the same pass, with every
    component's input held as it was, so the work is a few forward passes, and one backward pass for
    every value that the network gives out.

    Args:
        model: The model that the report was measured on.
        batches: Data to predict on, as for :func:`lightning_koopman.intervene`; those of the report will
            do.
        report: What was measured on the model.
        kinds: Which alterations.
        initial: ``state_dict`` of the network at its initialisation, for ``reinit``; without it weights
            are drawn anew by ``reset_parameters``.
        strength: Noise, as a share of the standard deviation.
        draws: Least number of draws, for kinds that draw weights. They are spread over the batches,
            at least one a batch, and over its samples.
        scale: Unit of the effects; ``None`` takes ``"kl"`` where targets are class indices,
            ``"relative"`` otherwise.
        probes: Most backward passes a batch. Outputs of more values a sample are not taken one by
            one, but in so many random combinations; the mean is the same, with noise.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.
        seed: Seed of everything that is drawn.

    Returns:
        The report with its ``effects`` and their standard errors (delete-one-fold jackknife over samples
        and draws; operators, means and spreads that alterations are made with are taken as known). The
        model is left exactly as it was found, gradients included, also when an exception flies.

    Raises:
        ValueError: If an argument is out of range, the report does not belong to the model, a component
            cannot be re-initialised, or the outputs carry no gradient.

    Example:
        >>> from lightning_koopman import credit_report
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x, y = torch.randn(300, 4), torch.randint(0, 3, (300,))
        >>> report = predict_effects(net, [(x, y)], credit_report(net, [x]), ["skip"])
        >>> report.effects.scale, len(report.effects.values["skip"])
        ('kl', 2)
    """
    check_alterations(report, kinds, report.components, strength, draws)
    if probes < 1:
        raise ValueError(f"probes is {probes}; at least one backward pass is needed")
    runner = Runner(model, batches, forward_fn)
    local = Displacements(runner, report, kinds, initial, strength)
    sites = state_sites(report)
    with undisturbed(model):
        given = runner.run(sites.values(), update=local.update)
        outputs = Outputs.of(given, runner.batches, scale, metric=None)
        local.solve()
        torch.manual_seed(_OTHER_DRAWS + seed)
        each = math.ceil(draws / len(runner.batches))
        folds = report.folds
        summed = torch.zeros(folds, len(report.components), len(kinds), dtype=torch.float64)
        counts = torch.zeros(folds, dtype=torch.float64)
        reached = torch.zeros(len(report.components), dtype=torch.bool)
        for number, batch in enumerate(runner.batches):
            output, values = runner.run_batch(batch, sites.values())
            # Before the pass with gradients: weights that are altered in between spoil its graph.
            shifts = local.shifts(batch, values, len(output), each)
            output, handles = _tracked(runner, batch, report)
            # Samples that share a draw share a fold, so that errors cover the draws too.
            fold = (number * each + torch.arange(len(output)) % min(each, len(output))) % folds
            counts += torch.bincount(fold, minlength=folds)
            for gradients, share in _pulled_back(output, handles, outputs, probes):
                changes = _changes(gradients, shifts, kinds, local, report, len(output))
                summed.index_add_(0, fold, changes, alpha=share)
                reached |= torch.tensor([g is not None for g in gradients])
    summed = torch.where(reached[:, None], summed / outputs.whole, torch.nan)
    effect, stderr, influence_stderr = _with_errors(summed, counts)
    predicted = Effects(
        values={kind: effect[:, column] for column, kind in enumerate(kinds)},
        stderr={kind: stderr[:, column] for column, kind in enumerate(kinds)},
        influence_stderr=influence_stderr,
        scale=outputs.scale,
        strength=strength,
        n_samples=outputs.n_samples,
    )
    unreached = [n for n, found in zip(report.components, reached, strict=True) if not found]
    notes = (*report.notes, *_notes(unreached, given[0][0].numel(), probes))
    return dataclasses.replace(report, effects=predicted, notes=notes)


def _tracked(runner: Runner, batch: Any, report: CreditReport) -> tuple[Tensor, list[Tensor]]:
    """Run with gradients: the output, and each component's output to ask gradients for."""
    handles: dict[str, Tensor] = {}

    def track(name: str) -> Alteration:
        def alter(output: Tensor, _: Mapping[Site, Tensor]) -> Tensor:
            handles[name] = output if output.requires_grad else output.detach().requires_grad_()
            # What follows may change its input in place.
            return handles[name].clone()

        return alter

    sites = state_sites(report)
    alter = {sites[name].call: track(name) for name in report.components}
    with torch.enable_grad():
        output, _ = runner.run_batch(_ordinary(batch), alter=alter)
    if not output.requires_grad:
        raise ValueError(
            "the outputs carry no gradient, so no effect can be predicted; give a forward_fn that "
            "neither detaches them nor runs under torch.no_grad or torch.inference_mode"
        )
    return output, [handles[name] for name in report.components]


def _ordinary(value: Any) -> Any:
    """Copy tensors that were made under inference mode, of which autograd would save none."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {name: _ordinary(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_ordinary(part) for part in value)
    return value


def _pulled_back(
    output: Tensor, handles: Sequence[Tensor], outputs: Outputs, probes: int
) -> Iterator[tuple[tuple[Tensor | None, ...], float]]:
    """Gradients of enough combinations of the outputs, and the share that each counts with."""
    size = output[0].numel()
    exact = size <= probes
    number = size if exact else probes
    for k in range(number):
        if exact:
            vectors = torch.zeros_like(output).reshape(len(output), -1)
            vectors[:, k] = 1.0
        else:
            vectors = torch.randint(0, 2, output.shape).to(output) * 2 - 1
        weights = outputs.metric_root(output, vectors.reshape(output.shape))
        found = torch.autograd.grad(
            output, handles, weights, retain_graph=k + 1 < number, allow_unused=True
        )
        yield found, 1.0 if exact else 1.0 / number


def _changes(
    gradients: Sequence[Tensor | None],
    shifts: Sequence[Shift],
    kinds: Sequence[Kind],
    local: Displacements,
    report: CreditReport,
    n_samples: int,
) -> Tensor:
    """Squared change of one combination of the outputs, shape ``(n_samples, components, kinds)``."""
    change = torch.zeros(n_samples, len(gradients), len(kinds), dtype=torch.float64)
    rows = [
        None if gradient is None else rows_by_sample(gradient, n_samples, name)
        for gradient, name in zip(gradients, report.components, strict=True)
    ]
    for shift in shifts:
        moved = [
            torch.einsum("nd,nd->n", row, delta.to(row))
            for j, delta in shift.rows.items()
            if (row := rows[j]) is not None
        ]
        if moved:
            total = torch.stack(moved).sum(dim=0).double()
            change[:, shift.component, kinds.index(shift.kind)] += total.square().cpu()
    if "output_noise" in kinds:
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                noise = gradient * local.spread(i).to(gradient.device)
                squares = rows_by_sample(noise, n_samples, report.components[i]).square().sum(dim=1)
                change[:, i, kinds.index("output_noise")] += squares.double().cpu()
    return change


def _with_errors(
    summed: Tensor, counts: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Effects, their delete-one-fold errors and those of the influence, from each fold's share."""
    whole, count = summed.sum(dim=0), counts.sum()
    held_out = counts > 0
    # A fold's samples are left out of the outputs' variance, too, as if it were alike in all folds.
    rest = [
        (whole - part) * count / (count - size)
        for part, size in zip(summed[held_out], counts[held_out], strict=True)
        if size < count
    ]
    sizes = counts[held_out & (counts < count)]
    shares = [torch.from_numpy(mean_share(effect.numpy())) for effect in (whole, *rest)]
    stderr = jackknife(whole, rest, float(count), sizes)
    influence_stderr = jackknife(shares[0], shares[1:], float(count), sizes)
    return whole.numpy(), stderr.numpy(), influence_stderr.numpy()


def _notes(unreached: Sequence[str], size: int, probes: int) -> list[str]:
    notes = []
    if unreached:
        notes.append(
            f"no gradient leads from the outputs to {', '.join(map(repr, unreached))}, so no effect is "
            "predicted there"
        )
    if size > probes:
        notes.append(
            f"effects are predicted from {probes} random combinations of the {size} outputs a sample"
        )
    return notes
