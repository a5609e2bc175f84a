"""Predicts what altering components does to the outputs, to second order, by backward passes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from lightning_koopman.effects.alterations import Alterations
from lightning_koopman.effects.scoring import Outputs
from lightning_koopman.network.access.isolation import seed_all
from lightning_koopman.network.access.signals import came_from_signal
from lightning_koopman.network.runs.forward_runner import ForwardRunner
from lightning_koopman.network.runs.hook_points import Alteration, HookPoint
from lightning_koopman.report.effects import with_folds

_FOLDS = 5
"""Parts that samples are dealt out to, for error bars."""

_OTHER_DRAWS = 1_000_003
"""Added to the seed, so that noise differs from that of effects measured with the same seed."""

Handles = Mapping[HookPoint, list[Tensor]]
"""What gradients are asked for: what is given at some points, in each call of the network."""

Gradients = Mapping[HookPoint, Sequence[Tensor | None]]
"""Of what is given at some points, in each call of the network."""

Moved = Mapping[int, Mapping[HookPoint, Sequence[Tensor]]]
"""By altered component, the rows by which what is given at some points is displaced, by call."""

_ROUNDING = 10.0
"""Changes within so many times what outputs are rounded to tell nothing of a prediction."""

_FAR = 4.0
"""A prediction that is so many times as large as what is seen, or as small, is far off."""

_SUSPECT = 2.0
"""The same where few samples show it, which are then asked for all."""

_SHOW_ONE = 4
"""Samples at least that show a component."""

_TRIED = 3
"""Components at most that are displaced in all samples because few samples showed them far off."""

_END = HookPoint("out", "")
"""Where the network's outputs themselves are, as if they were given at a point."""


class SecondOrder(NamedTuple):
    """Second-order effects of one kind.

    Attributes:
        values: Effect per component; NaN where no gradient leads from the outputs to it.
        stderr: Delete-one-fold jackknife errors.
        pairs: Each fold's part of H, shape ``(folds, L, L)``.
        folds: Samples of each fold.
        reached: Whether a gradient leads from the outputs to a component.
        far_off: A component whose effect on the first batch is predicted to be another one by far than
            it has when altered alone, and how many times as large it is predicted.
    """

    values: NDArray[np.float64]
    stderr: NDArray[np.float64]
    pairs: NDArray[np.float64]
    folds: NDArray[np.float64]
    reached: NDArray[np.bool_]
    far_off: tuple[str, float] | None


def predict(
    alterations: Alterations,
    runner: ForwardRunner,
    before: Outputs,
    kinds: Sequence[str],
    *,
    draws: int | None,
    probes: int,
    seed: int,
) -> dict[str, SecondOrder]:
    """Predict effects of some kinds.

    Per batch that takes one pass with gradients, a backward pass from it for each probe, and for every
    kind that alters weights one pass per draw, in which all components are altered at once, each on the
    input that it has in the network as it is; those that hold weights in common take turns. Those whose
    weights are also used elsewhere, as the first batch shows, take passes of their own. The first batch
    runs once more, with one component altered for each sample, which tells whether gradients are what
    they claim.
    """
    size, n_batches = len(alterations.names), len(runner.batches)
    pairs = {kind: torch.zeros(_FOLDS, size, size, dtype=torch.float64, device="cpu") for kind in kinds}
    folds = {kind: torch.zeros(_FOLDS, dtype=torch.float64, device="cpu") for kind in kinds}
    reached = torch.zeros(size, dtype=torch.bool, device="cpu")
    # One draw has no spread, so a single batch has two.
    each = max(1, -(-(draws or 2) // n_batches))
    beyond: dict[str, frozenset[int]] = {}
    far_off: dict[str, tuple[str, float] | None] = {}
    for number in range(n_batches):
        seed_all(_OTHER_DRAWS + seed + number)
        output, handles, rounds = _tracked(alterations, kinds, runner, number)
        count, exact = len(output), output[0].numel() <= probes
        found = _pulled_back(output, handles, before, number, probes)
        points = [alterations.all_altered("output_noise", name) for name in alterations.names]
        given = [[g for point in own for g in found[0].get(point, ())] for own in points]
        reached |= torch.tensor([any(g is not None for g in calls) for calls in given], device="cpu")
        # The weights that are altered from here on would spoil the graph.
        end = output.detach()
        del output, handles
        for kind in kinds:
            drawn = kind != "output_noise" and not alterations.draws_nothing(kind)
            place = torch.arange(count, device="cpu")
            # Samples that share a draw share a fold, so that errors cover the draws too.
            place = place % min(each, count) + number * each if drawn else place
            fold = place % _FOLDS
            folds[kind] += torch.bincount(fold, minlength=_FOLDS)
            moved: Moved = {}
            if kind != "output_noise":
                moved = _displacements(alterations, runner, kind, before, number, rounds, each, beyond)
                if not number and alterations.weights.altered_by(kind):
                    apart = {i: m for i, m in moved.items() if reached[i] and i not in beyond[kind]}
                    far_off[kind] = _far_off(alterations, runner, kind, before, found, apart, end)
            for gradients in found:
                if kind == "output_noise":
                    squares = _noise_squares(alterations, gradients, number)
                    change = torch.diag_embed(squares)
                else:
                    z = _changes(alterations, kind, gradients, moved, number)
                    # What is drawn for one component is independent of what is drawn for another.
                    change = (
                        torch.diag_embed(z.square())
                        if kind == "weight_noise"
                        else z[:, :, None] * z[:, None]
                    )
                pairs[kind].index_add_(0, fold, change, alpha=1.0 if exact else 1.0 / len(found))
    return {
        kind: _finished(alterations, kind, pairs[kind], folds[kind], reached, before, far_off.get(kind))
        for kind in kinds
    }


def _far_off(
    alterations: Alterations,
    runner: ForwardRunner,
    kind: str,
    before: Outputs,
    found: Sequence[Gradients],
    moved: Moved,
    end: Tensor,
) -> tuple[str, float] | None:
    """Hold what is predicted against how the first batch changes where one component alone is displaced.

    In a first pass each sample shows one component, so that all take no more than one. Of what is off
    there, the farthest first, each is displaced in all samples, until one is far off: that is returned.
    """
    n_samples = len(end)
    rounding = end.reshape(n_samples, -1) * (_ROUNDING * torch.finfo(end.dtype).eps)

    def beyond(times: float, shown: Tensor) -> dict[int, float]:
        """Return how many times too much is predicted of what is off, if each sample shows one."""
        change = before.change(_displaced(alterations, runner, kind, moved, shown), end)
        parts = {i: moved[i] for i in set(shown.tolist())}
        squares = torch.zeros(3, n_samples, dtype=torch.float64, device="cpu")
        for gradients in found:
            z = _changes(alterations, kind, gradients, parts, 0)
            squares[0] += z.gather(1, shown[:, None])[:, 0].square()
            for k, rows in enumerate((change.reshape(n_samples, -1), rounding), 1):
                z = _changes(alterations, kind, gradients, {0: {_END: [rows]}}, 0)
                squares[k] += z[:, 0].square()
        sums = {i: squares[:, shown == i].sum(dim=1).tolist() for i in parts}
        # Rounding tells nothing, nor does NaN: outputs that do not count may be infinite.
        ratios = {i: p / max(s, r) for i, (p, s, r) in sums.items() if max(p, s) > r}
        return {i: ratio for i, ratio in ratios.items() if ratio < 1 / times or ratio > times}

    testable = list(moved)
    if not testable:
        return None
    shown = torch.tensor(testable[:: -(-len(testable) * _SHOW_ONE // n_samples)], device="cpu")
    first = beyond(_SUSPECT, shown.repeat(-(-n_samples // len(shown)))[:n_samples])
    for i in sorted(first, key=lambda i: -abs(math.log(max(first[i], 1e-300))))[:_TRIED]:
        if again := beyond(_FAR, torch.full((n_samples,), i, device="cpu")):
            return alterations.names[i], again[i]
    return None


def _displaced(
    alterations: Alterations, runner: ForwardRunner, kind: str, moved: Moved, shown: Tensor
) -> Tensor:
    """Run the first batch with one component displaced for each sample, and return the outputs."""
    owners = {p: name for name in alterations.names for p in alterations.all_altered(kind, name)}
    rows: dict[HookPoint, list[Tensor]] = {}
    for i, parts in moved.items():
        for point, calls in parts.items():
            own = [torch.where((shown == i).to(call.device)[:, None], call, 0) for call in calls]
            sums = zip(rows[point], own, strict=True) if point in rows else ()
            rows[point] = [a + b for a, b in sums] or own

    def displaced(point: HookPoint) -> Alteration:
        calls = iter(rows[point])

        def alter(output: Tensor, _: Mapping[HookPoint, Tensor]) -> Tensor:
            return output + alterations.laid_out(owners[point], point, next(calls), output, 0)

        return alter

    return runner.run_batch(0, (), {point: displaced(point) for point in rows})[0]


def _finished(
    alterations: Alterations,
    kind: str,
    pairs: Tensor,
    sizes: Tensor,
    reached: Tensor,
    before: Outputs,
    far_off: tuple[str, float] | None,
) -> SecondOrder:
    pairs = pairs / before.shares.sum()
    refused = alterations.refused[kind]
    altered = torch.tensor([name not in refused for name in alterations.names], device="cpu")
    reached = reached & altered
    pairs[:, ~reached] = torch.nan
    pairs[:, :, ~reached] = torch.nan
    if alterations.weights.altered_by(kind):
        # To alter one of those that share weights is to alter the others: there is no sum.
        for group in alterations.weights.sharing():
            for i in group:
                pairs[:, i, [j for j in group if j != i]] = torch.nan
    values, stderr = with_folds(pairs.diagonal(dim1=1, dim2=2), sizes)
    return SecondOrder(
        values.numpy(), stderr.numpy(), pairs.numpy(), sizes.numpy(), reached.numpy(), far_off
    )


def _displacements(
    alterations: Alterations,
    runner: ForwardRunner,
    kind: str,
    before: Outputs,
    number: int,
    rounds: Sequence[Mapping[HookPoint, Tensor]],
    draws: int,
    beyond: dict[str, frozenset[int]],
) -> Moved:
    """Displace each component by altering it on the input that it has as it is.

    ``beyond`` remembers, by kind, the components whose weights are used outside of them, too.
    """
    names = alterations.names
    settled = [i for i, name in enumerate(names) if name not in alterations.unsettled]
    owners = {p: names[i] for i in settled for p in alterations.all_altered(kind, names[i])}
    by_call = {point: [values for values in rounds if point in values] for point in owners}
    moved: dict[int, dict[HookPoint, list[Tensor]]] = {}
    if not alterations.weights.altered_by(kind):
        for i, name in enumerate(names):
            if name in alterations.refused[kind]:
                continue
            alter_each = alterations.altering(kind, name)
            moved[i] = {point: [] for point in alter_each}
            for point, alter_one in alter_each.items():
                for values in by_call[point]:
                    output = values[point]
                    move = alter_one(output, values).to(output.device) - output
                    moved[i][point].append(alterations.rows_by_sample(name, point, move, number))
        return moved
    given: dict[HookPoint, list[Tensor]] = {}

    def held(point: HookPoint) -> Alteration:
        def alter(output: Tensor, _: Mapping[HookPoint, Tensor]) -> Tensor:
            given[point].append(output.detach().clone())
            return by_call[point][len(given[point]) - 1][point].clone()

        return alter

    alter = {point: held(point) for point in owners}
    inputs = [alterations.inputs[names[i]] for i in settled]

    def run(altered: Iterable[int], read: Sequence[HookPoint] = ()) -> tuple[Tensor, list[Tensor]]:
        """Alter some; return the outputs, and all that must not change but by those that are altered."""
        given.update({point: [] for point in owners})
        turned = [names[i] for i in altered if names[i] not in alterations.refused[kind]]
        with alterations.weights.altered(
            kind, [name for name in turned if name not in alterations.unsettled]
        ):
            output, taken = runner.run_batch(number, read, alter)
        return output, [output, *(values[p] for values in taken for p in read if p in values)]

    def differs(seen: Sequence[Tensor]) -> bool:
        pairs = zip(seen, as_it_is, strict=True)
        return not all(a.shape == b.shape and torch.allclose(a, b, 0, 0, True) for a, b in pairs)

    groups = alterations.weights.sharing()
    known = beyond.get(kind)
    if known is None or known:
        end, as_it_is = run((), inputs)
    draws = 1 if alterations.draws_nothing(kind) else min(draws, alterations.sizes[number])
    together = [[i for i in turn if i is not None] for turn in itertools.zip_longest(*groups)]
    turns = [[i for i in turn if i not in (known or ())] for turn in together]
    within = {i: {names[j] for j in group} for group in groups for i in group}
    for altered_now in filter(None, [*turns, *([i] for i in known or ())]):
        rows: dict[HookPoint, list[Tensor]] = {}
        for draw in range(draws):
            output, seen = run(altered_now, inputs)
            if known is None and differs(seen):
                # Their weights are used past components: tied to an embedding, by a function, or in a
                # call of which nothing depends on the sample.
                each = itertools.chain(*together)
                beyond[kind] = frozenset(i for i in each if differs(run([i], inputs)[1]))
                again = (alterations, runner, kind, before, number, rounds, draws, beyond)
                return _displacements(*again)
            new: dict[HookPoint, list[Tensor]] = {}
            for point, name in owners.items():
                pairs = zip(given[point], by_call[point], strict=True)
                moves = [altered - values[point] for altered, values in pairs]
                new[point] = [alterations.rows_by_sample(name, point, m, number) for m in moves]
            if known:
                new[_END] = [before.change(output, end).reshape(len(end), -1)]
            for point, calls in new.items():
                for kept, drawn in zip(rows.setdefault(point, calls), calls, strict=True):
                    kept[draw::draws] = drawn[draw::draws]
        for i in altered_now:
            everywhere = i in (known or ())
            moved[i] = {p: r for p, r in rows.items() if everywhere or owners.get(p) in within[i]}
    beyond.setdefault(kind, frozenset())
    return moved


def _changes(
    alterations: Alterations, kind: str, gradients: Gradients, moved: Moved, number: int
) -> Tensor:
    """Change of one combination of a batch's outputs, shape ``(n_samples, components)``."""
    names, n_samples = alterations.names, alterations.sizes[number]
    rows = {
        (point, k): alterations.rows_by_sample(name, point, gradient, number)
        for name in names
        for point in alterations.all_altered(kind, name)
        for k, gradient in enumerate(gradients.get(point, ()))
        if gradient is not None
    }
    ends = enumerate(gradients[_END])
    rows |= {(_END, k): own.reshape(n_samples, -1) for k, own in ends if own is not None}
    change = torch.zeros(n_samples, len(names), dtype=torch.float64, device="cpu")
    for i, parts in moved.items():
        each = ((rows.get((p, k)), delta) for p, calls in parts.items() for k, delta in enumerate(calls))
        for own, delta in each:
            if own is not None:
                change[:, i] += torch.einsum("nd,nd->n", own, delta.to(own)).double().cpu()
    return change


def _noise_squares(alterations: Alterations, gradients: Gradients, number: int) -> Tensor:
    """Mean squared change of one combination of a batch's outputs by output noise, the same shape."""
    shape = alterations.sizes[number], len(alterations.names)
    change = torch.zeros(shape, dtype=torch.float64, device="cpu")
    for i, name in enumerate(alterations.names):
        for point in alterations.all_altered("output_noise", name):
            for gradient in gradients.get(point, ()):
                if gradient is not None:
                    noise = alterations.times_spread(point, gradient)
                    rows = alterations.rows_by_sample(name, point, noise, number)
                    change[:, i] += rows.square().sum(dim=1).double().cpu()
    return change


def _tracked(
    alterations: Alterations, kinds: Sequence[str], runner: ForwardRunner, number: int
) -> tuple[Tensor, Handles, Sequence[Mapping[HookPoint, Tensor]]]:
    """Run with gradients: the output, what to ask gradients for, and the states as they are."""
    settled = [name for name in alterations.names if name not in alterations.unsettled]
    altered = (point for k in kinds for name in settled for point in alterations.all_altered(k, name))
    own = (p for name in settled for p in alterations.all_altered("output_noise", name))
    handles: dict[HookPoint, list[Tensor]] = {point: [] for point in (*own, *altered)}

    def track(point: HookPoint) -> Alteration:
        def alter(output: Tensor, _: Mapping[HookPoint, Tensor]) -> Tensor:
            # Of several tensors, one may be made of another within the component.
            handle = output.clone() if output.requires_grad else output.detach().requires_grad_()
            handles[point].append(handle)
            # What follows may change its input in place.
            return handle.clone()

        return alter

    alter = {point: track(point) for point in handles}
    read = dict.fromkeys((*alterations.read, *handles))
    with torch.enable_grad(), _no_reentrant_checkpoints():
        output, rounds = runner.run_batch(number, read, alter)
    if not output.requires_grad:
        raise ValueError(
            "the outputs carry no gradient, so no effect can be predicted; give a forward_fn that "
            "neither detaches them nor runs under torch.no_grad or torch.inference_mode, or measure "
            "with how='measured'"
        )
    return output, handles, rounds


def _pulled_back(
    output: Tensor, handles: Handles, outputs: Outputs, batch: int, probes: int
) -> list[Gradients]:
    """Return the gradients of enough combinations of a batch's outputs: all of them, or random ones."""
    size = output[0].numel()
    exact, number = size <= probes, min(size, probes)
    found: list[Gradients] = []
    for k in range(number):
        if exact:
            vectors = torch.zeros_like(output).reshape(len(output), -1)
            vectors[:, k] = 1.0
        else:
            vectors = torch.randint(0, 2, output.shape, device="cpu").to(output) * 2 - 1
        weights = outputs.metric_root(output, vectors.reshape(output.shape), batch)
        try:
            asked = [handle for calls in handles.values() for handle in calls]
            given = iter(
                torch.autograd.grad(
                    output, asked, weights, retain_graph=k + 1 < number, allow_unused=True
                )
            )
            pulled = {point: [next(given) for _ in calls] for point, calls in handles.items()}
            found.append({**pulled, _END: [weights]})
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or came_from_signal(error):
                raise
            if "checkpoint" in str(error).lower():
                raise ValueError(
                    "the network runs under activation checkpoints that let no gradients of states "
                    f"through ({error}); switch them off, or use torch.utils.checkpoint with "
                    "use_reentrant=False"
                ) from error
            if "backward through the graph a second time" in str(error):
                raise ValueError(
                    "the network runs a backward pass of its own, which frees what effects are "
                    "predicted from; measure with how='measured'"
                ) from error
            if "modified by an inplace operation" in str(error):
                raise ValueError(
                    "the network overwrites what its own gradients need, so no effect can be predicted; "
                    "measure with how='measured'"
                ) from error
            # Functions of the network's own may be written for a single backward pass.
            raise ValueError(
                "effects are predicted by backward passes, several of them over one graph, and this one "
                f"failed ({type(error).__name__}: {error}); measure with how='measured'"
            ) from error
    return found


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
