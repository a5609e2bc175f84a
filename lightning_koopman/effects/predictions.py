"""Predicts what altering each component does to the outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from lightning_koopman.effects.alterations import Alterations
from lightning_koopman.effects.linear_map import LinearFit
from lightning_koopman.effects.scoring import Outputs
from lightning_koopman.koopman.chain import jackknife
from lightning_koopman.network.forward_runner import ForwardFn, rows_by_sample
from lightning_koopman.network.hook_points import Alteration, HookPoint, find_module
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


class Displacements(Alterations):
    """Displacements by alterations, a batch at a time.

    Call :meth:`update` with the states of a first run over all batches, then :meth:`solve`.
    """

    def update(self, values: Mapping[HookPoint, Tensor]) -> None:
        """Take the states that one batch has in the network as it is."""
        super().update(values)
        if "linear" in self._kinds and not self.fits:
            for name in self._report.components:
                widths = [math.prod(self.shape(point)) for point in self.sources(name)]
                self.fits[name] = LinearFit(max(256, *widths) if self.operator(name) else 256)
        self.update_fits(values)

    def solve(self) -> None:
        """Fit the maps, with the ridge weights of the report's operators where these are used."""
        for name, fit in self.fits.items():
            operator = self.operator(name)
            self.maps[name] = fit.solve(None if operator is None else operator.tikhonov)
        self._groups = self._sharing_weights()

    def shifts(
        self, number: int, values: Mapping[HookPoint, Tensor], n_samples: int, draws: int
    ) -> list[Shift]:
        """Displace every component's output by every kind, but ``output_noise``."""
        found = []
        for kind in self._kinds:
            if kind in ("linear", "skip"):
                for i, name in enumerate(self._report.components):
                    moved = self._moved(kind, name, values)
                    found.append(Shift(i, kind, {i: rows_by_sample(moved, n_samples, name)}))
            elif kind != "output_noise":
                each = 1 if self.draws_nothing(kind) else min(draws, n_samples)
                for turn in range(max(len(group) for group in self._groups)):
                    groups = [group for group in self._groups if turn < len(group)]
                    altered = [group[turn] for group in groups]
                    rows = self._weights_altered(kind, altered, number, values, n_samples, each)
                    found += [Shift(g[turn], kind, {j: rows[j] for j in g}) for g in groups]
        return found

    def changes(
        self, gradients: Sequence[Tensor | None], shifts: Sequence[Shift], n_samples: int
    ) -> Tensor:
        """Squared change of one combination of the outputs, shape ``(n_samples, components, kinds)``."""
        names = self._report.components
        change = torch.zeros(n_samples, len(names), len(self._kinds), dtype=torch.float64)
        rows = {
            i: rows_by_sample(gradient, n_samples, names[i])
            for i, gradient in enumerate(gradients)
            if gradient is not None
        }
        for shift in shifts:
            moved = [
                torch.einsum("nd,nd->n", rows[j], delta.to(rows[j]))
                for j, delta in shift.rows.items()
                if j in rows
            ]
            if moved:
                total = torch.stack(moved).sum(dim=0).double()
                change[:, shift.component, self._kinds.index(shift.kind)] += total.square().cpu()
        if "output_noise" in self._kinds:
            for i, gradient in enumerate(gradients):
                if gradient is not None:
                    noise = gradient * self.spread(names[i]).to(gradient.device)
                    squares = rows_by_sample(noise, n_samples, names[i]).square().sum(dim=1)
                    change[:, i, self._kinds.index("output_noise")] += squares.double().cpu()
        return change

    def _moved(self, kind: Kind, name: str, values: Mapping[HookPoint, Tensor]) -> Tensor:
        output = values[self.points[name]]
        moved = self.output(kind, name)(output, values).to(output.device) - output
        if kind == "linear":
            sources = [values[point] for point in self.sources(name)]
            moved = -self.maps[name].left_out(sources, -moved)
        return moved

    def _weights_altered(
        self,
        kind: Kind,
        altered: Sequence[int],
        number: int,
        values: Mapping[HookPoint, Tensor],
        n_samples: int,
        draws: int,
    ) -> list[Tensor]:
        """Alter components' weights in one pass, with what each of them takes in held as it was."""
        names = self._report.components
        given: dict[str, Tensor] = {}

        def held(name: str) -> Alteration:
            def alter(output: Tensor, _: Mapping[HookPoint, Tensor]) -> Tensor:
                given[name] = output.detach().clone()
                return values[self.points[name]].clone()

            return alter

        alters = {self.points[name].call: held(name) for name in names}
        moved: list[Tensor] = []
        for draw in range(draws):
            with self.weights(kind, [names[i] for i in altered]):
                self.runner.run_batch(number, alter=alters)
            for i, name in enumerate(names):
                rows = rows_by_sample(given[name] - values[self.points[name]], n_samples, name)
                if draw == 0:
                    moved.append(rows)
                else:
                    moved[i][draw::draws] = rows[draw::draws]
        return moved

    def _sharing_weights(self) -> list[list[int]]:
        """Group components that hold weights in common, directly or through others."""
        groups: list[tuple[set[int], list[int]]] = []
        for i, name in enumerate(self._report.components):
            calls = self._report.parts[name]
            modules = [find_module(self.runner.model, call)[0] for call in calls]
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
            at least one per batch, and over its samples.
        scale: Unit of the effects; ``None`` takes ``"kl"`` where targets are class indices,
            ``"relative"`` otherwise.
        probes: Most backward passes per batch. Outputs of more values per sample are not taken one by
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
    if probes < 1:
        raise ValueError(f"probes is {probes}; at least one backward pass is needed")
    local = Displacements(
        model, batches, report, kinds,
        initial=initial, strength=strength, draws=draws, forward_fn=forward_fn,
    )  # fmt: skip
    runner = local.runner
    with undisturbed(model):
        given = runner.run(local.points.values(), update=local.update)
        outputs = Outputs(given, runner.batches, scale)
        local.solve()
        torch.manual_seed(_OTHER_DRAWS + seed)
        each = math.ceil(draws / len(runner.batches))
        folds = report.folds
        summed = torch.zeros(folds, len(report.components), len(kinds), dtype=torch.float64)
        counts = torch.zeros(folds, dtype=torch.float64)
        reached = torch.zeros(len(report.components), dtype=torch.bool)
        for number in range(len(runner.batches)):
            output, values = runner.run_batch(number, local.points.values())
            # Before the pass with gradients: weights that are altered in between spoil its graph.
            shifts = local.shifts(number, values, len(output), each)
            output, handles = _tracked(local, number, report.components)
            # Samples that share a draw share a fold, so that errors cover the draws too.
            fold = (number * each + torch.arange(len(output)) % min(each, len(output))) % folds
            counts += torch.bincount(fold, minlength=folds)
            for gradients, share in _pulled_back(output, handles, outputs, probes):
                changes = local.changes(gradients, shifts, len(output))
                summed.index_add_(0, fold, changes, alpha=share)
                reached |= torch.tensor([g is not None for g in gradients])
    summed = torch.where(reached[:, None], summed / outputs.shares.sum(), torch.nan)
    effect, stderr, influence_stderr = _with_errors(summed, counts)
    predicted = Effects(
        values={kind: effect[:, column] for column, kind in enumerate(kinds)},
        stderr={kind: stderr[:, column] for column, kind in enumerate(kinds)},
        influence_stderr=influence_stderr,
        scale=outputs.scale,
        strength=strength,
        n_samples=outputs.n_samples,
    )
    notes = list(report.notes)
    if not reached.all():
        names = (repr(n) for n, found in zip(report.components, reached, strict=True) if not found)
        notes.append(
            f"no gradient leads from the outputs to {', '.join(names)}, so no effect is predicted there"
        )
    if (size := given[0][0].numel()) > probes:
        notes.append(
            f"effects are predicted from {probes} random combinations of the {size} outputs a sample"
        )
    return dataclasses.replace(report, effects=predicted, notes=tuple(notes))


def _tracked(
    local: Displacements, number: int, components: Sequence[str]
) -> tuple[Tensor, list[Tensor]]:
    """Run with gradients: the output, and each component's output to ask gradients for."""
    handles: dict[str, Tensor] = {}

    def track(name: str) -> Alteration:
        def alter(output: Tensor, _: Mapping[HookPoint, Tensor]) -> Tensor:
            handles[name] = output if output.requires_grad else output.detach().requires_grad_()
            # What follows may change its input in place.
            return handles[name].clone()

        return alter

    alter = {local.points[name].call: track(name) for name in components}
    with torch.enable_grad(), _no_reentrant_checkpoints():
        output, _ = local.runner.run_batch(number, alter=alter)
    if not output.requires_grad:
        raise ValueError(
            "the outputs carry no gradient, so no effect can be predicted; give a forward_fn that "
            "neither detaches them nor runs under torch.no_grad or torch.inference_mode"
        )
    return output, [handles[name] for name in components]


@contextmanager
def _no_reentrant_checkpoints() -> Generator[None, None, None]:
    """Call what ``torch.utils.checkpoint`` would run without a graph, and again in a backward pass.

    Gradients of states in between cannot be asked for there. Those that are not reentrant can stay.
    """

    def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
        return function(*args)

    own = vars(CheckpointFunction).get("apply")
    setattr(CheckpointFunction, "apply", staticmethod(apply))  # ruff: ignore[set-attr-with-constant] - mypy takes it for a method
    try:
        yield
    finally:
        del CheckpointFunction.apply
        if own is not None:
            setattr(CheckpointFunction, "apply", own)  # ruff: ignore[set-attr-with-constant]


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
        try:
            found = torch.autograd.grad(
                output, handles, weights, retain_graph=k + 1 < number, allow_unused=True
            )
        except RuntimeError as error:
            if "checkpoint" not in str(error).lower():
                raise
            raise ValueError(
                "the network runs under activation checkpoints that let no gradients of states through "
                f"({error}); switch them off, or use torch.utils.checkpoint with use_reentrant=False"
            ) from error
        yield found, 1.0 if exact else 1.0 / number


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
