"""What altering each component does to the outputs: measured where that costs less, else predicted."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_koopman.effects.alterations import (
    NONE_TO_ALTER,
    SHIFT,
    Alterations,
    Tell,
    altered_parts,
    counted_as_in,
    counted_in,
    padded_sequences,
)
from lightning_koopman.effects.altered_weights import Weights
from lightning_koopman.effects.returned import (
    Ends,
    choose_outputs,
    only_classes,
    run_followed,
    settle_units,
)
from lightning_koopman.effects.scoring import Change, Measured, Metric, Outputs, over_draws
from lightning_koopman.effects.second_order import SecondOrder, predict
from lightning_koopman.koopman.options import DEFAULTS
from lightning_koopman.measurement.measurement import Measurement
from lightning_koopman.network.access.hooks import attach
from lightning_koopman.network.access.isolation import fast_path, seed_all, undisturbed
from lightning_koopman.network.arguments import INTEGER, NUMBER, STATE_DICT, check_given, check_type
from lightning_koopman.network.axes.graphs import index_of_samples, row_counts, samples_of_rows
from lightning_koopman.network.axes.padding import Valid, valid_positions
from lightning_koopman.network.components import Components, matching
from lightning_koopman.network.names import call_of, listed
from lightning_koopman.network.runs.forward import ForwardFn
from lightning_koopman.network.runs.forward_runner import ForwardRunner, runner_on
from lightning_koopman.network.runs.hook_points import Alteration, HookPoint
from lightning_koopman.report.effects import SATURATED, Effects, Scale, set_effect
from lightning_koopman.report.report import REPORT, CreditReport

How = Literal["auto", "measured", "predicted", "both"]

_CHEAPER_MEASURED = ("skip", "linear", "output_noise")
"""Kinds that a single pass per component measures."""

_DRAWS = 5
"""Draws per component, of kinds that draw weights, where they are measured."""


def component_effects(
    model: nn.Module,
    batches: Iterable[Any],
    report: CreditReport | None = None,
    kinds: Sequence[str] = ("skip",),
    *,
    how: How = "auto",
    samples: int = 512,
    components: Components | Sequence[Components] | None = None,
    replacements: Mapping[str, Weights] | None = None,
    sets: Iterable[Collection[str]] = (),
    initial: Weights | None = None,
    strength: float = 0.3,
    draws: int | None = None,
    metric: Metric | None = None,
    scale: Scale | None = None,
    probes: int = 2,
    forward_fn: ForwardFn | None = None,
    seed: int = 0,
) -> Effects:
    """Tell what altering each component of a trained network does to its outputs.

    The kinds, for a component that turns what it takes in, x, into y:

    * ``skip``: y becomes x where the shapes agree, else its mean over samples. Modules behind a block
      that belong to it and change the shape, such as pooling, stay, and run on x. Of several tensors,
      each that reaches the outputs becomes the one that is taken at the same place, if as many are taken
      as given, or its mean.
    * ``linear``: y becomes the ridge regression of y on the leading 256 directions of x, fitted on these
      samples; each sample is predicted as if it had been left out of the fit. Of several tensors, x and
      y are the first (doubts ``inputs`` and ``outputs``).
    * ``output_noise``: Gaussian noise of ``strength`` times each unit's standard deviation is added to
      y.
    * ``weight_noise``: Gaussian noise of ``strength`` times its own standard deviation is added to each
      parameter tensor of more than one entry.
    * ``reinit``: weights and buffers go back to ``initial``, or are drawn anew by ``reset_parameters``.
    * each name in ``replacements``: weights and buffers become those of the given ``state_dict``.

    **Measured**, a component is altered and the network runs again: one pass per component, times draws
    for kinds that draw. Where a mean is put in, a second pass, in which groups of samples use means
    moved towards their own, tells its share of the effect's error; that of the accuracy is without it.
    **Predicted**, all components are altered at once, each on the input that it has in the network as
    it is. The network's Jacobian J, by backward passes, turns what that does to the component's output,
    δ, into z = Jδ, and the mean of zᵀ M z is the effect to second order: M is half the softmax's Fisher
    information for ``"kl"``, the identity over the outputs' variance for ``"relative"``. A pass over all
    samples, one with gradients, a backward pass per probe, and one more pass per kind that alters
    weights do for all components, and for all sets of them (:meth:`Effects.of`). Components that hold
    weights in common take passes of their own, as do those whose weights are used past them, by an
    embedding or a function; one more pass over the first batch shows which. Another one alters a single
    component for each sample there, and a note tells where a prediction is off by a factor of 4 or more,
    as where gradients are stand-ins (straight-through roundings, spikes).

    The outputs are what the report's chain ends with: what its last components lead to among what the
    model returns, and what it returns that mixes several of them; where a function chose that end
    (``output=``), the tensors that it takes, or, of a report read from a file, which holds no function,
    the first tensor that the model returns. Over several heads effects are averaged, each in units of
    its own standard deviation. Where the targets are classes of one of them, that
    one alone counts; where they are of several of one shape, these. A note says so, and what leads to
    none of the outputs that count has no effect: NaN, not 0.

    A module that runs several times is altered in all its calls by the kinds that touch weights, and by
    the others in the one that its row names: ``block#1`` is the second. Where one pass calls the whole
    network several times (two inputs, augmented views, steps of a loop), calls are counted anew in each,
    as in the report: a row is about that call in each of them, and so are means, deviations and linear
    maps. A call in which a component gives a tensor of another shape than in the first is left as it is,
    and a note says so.

    The model is left exactly as it was found, gradients included, also when an exception flies.

    Args:
        model: A trained network.
        batches: Data: tensors, tuples of input and target, or mappings.
        report: A report on the model, whose components are altered; without one, they are found by one
            pass over the first batch.
        kinds: Which alterations; replacements come on top.
        how: ``"measured"``, ``"predicted"``, ``"both"`` side by side, or ``"auto"``: measured for
            ``skip``, ``linear`` and ``output_noise``, which costs less, and predicted for the others.
        samples: Most samples that are looked at, from everywhere in ``batches``, as in
            :func:`lightning_koopman.credit_report`.
        components: Names or glob patterns of components; without a report whatever
            :func:`lightning_koopman.credit_report` takes.
        replacements: Other weights for the network, by a name of your own: a ``state_dict`` of it, or
            the part of one that differs. :mod:`lightning_koopman.effects.replacements` makes common
            ones.
        sets: Sets of components that are also altered together, where the kind is measured.
        initial: ``state_dict`` of the network at its initialisation, for ``reinit``.
        strength: Noise, as a share of the standard deviation.
        draws: Draws of kinds that draw: per component where they are measured (by default 5 of weights
            and one of output noise), in all where they are predicted, but one per batch at least.
        metric: Called as ``metric(outputs, targets)`` over all batches; ``None`` takes the accuracy
            where targets are class indices, and none otherwise.
        scale: Unit of the effects; ``None`` takes ``"kl"`` (mean KL divergence in nats from the original
            to the altered class distribution) where targets are class indices, ``"relative"`` (mean
            squared change over the outputs' variance) otherwise.
        probes: Most backward passes per batch for predictions. Outputs of more values per sample are
            taken in so many random combinations; the mean is the same, with noise.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.
        seed: Seed of everything that is drawn.

    Returns:
        The effects; ``dataclasses.replace(report, effects=...)`` puts them beside the credits.

    Raises:
        ValueError: If an argument is out of range, the report does not belong to the model, no component
            can be altered in any of these ways, or there is nothing to predict from: the outputs carry
            no gradient. Where some can, a note says why others cannot, whose numbers are NaN.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x = torch.randn(300, 4)
        >>> effects = component_effects(net, [(x, net(x).argmax(1))])
        >>> effects.components, effects.scale, effects.how
        (('0', '2'), 'kl', {'skip': 'measured'})
        >>> bool(effects.metric["skip"][1] < effects.metric_before)
        True
    """
    check_given(REPORT, report=report)
    check_given((Mapping, "state_dicts by name, as {'pruned': weights}"), replacements=replacements)
    state_dicts = {f"replacements[{name!r}]": each for name, each in (replacements or {}).items()}
    check_type(STATE_DICT, **state_dicts)
    check_given(STATE_DICT, initial=initial)
    check_type((Iterable, "a list of kinds, such as ['skip', 'linear']"), kinds=kinds)
    check_type((Iterable, "a list of sets of components"), sets=sets)
    runner = runner_on(model, batches, samples, forward_fn)
    left_out: list[str] = []
    if report is not None:
        parts, ends = _chosen(altered_parts(report), components), Ends.of(report)
        runner.counted_in = counted_as_in(model, report)
    else:
        parts, ends, left_out = _found(runner, components)
    found = effects_on(
        runner,
        parts,
        kinds if isinstance(kinds, str) else (*kinds, *(replacements or ())),
        ends=ends,
        how=how,
        replacements=replacements,
        sets=sets,
        initial=initial,
        strength=strength,
        draws=draws,
        metric=metric,
        scale=scale,
        probes=probes,
        seed=seed,
    )
    notes: list[str] = []
    if left_out:
        notes.append(f"no effects of {listed(left_out)}: credit_report leaves them out, and says why")
    return dataclasses.replace(found, notes=(*notes, *found.notes))


def effects_on(
    runner: ForwardRunner,
    parts: Mapping[str, Sequence[str]],
    kinds: Sequence[str],
    *,
    ends: Ends,
    how: How = "auto",
    replacements: Mapping[str, Weights] | None = None,
    sets: Iterable[Collection[str]] = (),
    initial: Weights | None = None,
    strength: float = 0.3,
    draws: int | None = None,
    metric: Metric | None = None,
    scale: Scale | None = None,
    probes: int = 2,
    seed: int = 0,
    target_of: Callable[[Any], Tensor | None] | None = None,
    valid_of: Callable[[Any], Valid] = valid_positions,
    given_of: Callable[[Any], Any] = lambda batch: batch,
    targets: Callable[[Sequence[Tensor], Sequence[Tensor | None]], Sequence[Tensor | None]]
    | None = None,
) -> Effects:
    """Compute effects with whatever runs the network: on data, or on calls that were recorded.

    ``parts`` holds the module calls of each component, see :func:`altered_parts`, and ``ends`` what the
    network ends with. ``target_of`` finds the targets of a batch, where the batch itself and what the
    network takes of it do not tell, ``valid_of`` which of its positions hold data, and ``given_of`` what
    the network is given in it; ``targets`` is called with the outputs of all batches and with the
    targets, and returns those that count.
    """
    check_type(INTEGER, probes=probes, draws=1 if draws is None else draws, seed=seed)
    check_type(NUMBER, strength=strength)
    for name, value in (("probes", probes), ("draws", 1 if draws is None else draws)):
        if value < 1:
            raise ValueError(f"{name} is {value}; at least one is needed")
    if how not in get_args(How):
        raise ValueError(f"how is {how!r}; choose one of {get_args(How)}")
    alterations = Alterations(
        runner.model,
        parts,
        kinds,
        replacements=replacements,
        initial=initial,
        strength=strength,
    )
    kinds, rows = alterations.kinds, _rows(alterations.names, sets)
    to_measure = [
        k for k in kinds if how in ("measured", "both") or (how == "auto" and k in _CHEAPER_MEASURED)
    ]
    to_predict = [k for k in kinds if how == "both" or k not in to_measure]
    last = [point.call for point in alterations.outputs.values()]
    with undisturbed(runner.model), padded_sequences(runner.model) as nesting:
        outputs: list[Tensor] = []
        rounds: Sequence[Mapping[HookPoint, Tensor]]
        again = list[Tensor]()
        unlike, index = 0, None

        def tell_of(number: int) -> Tell:
            # What a recorded step was given is copied to be looked at, which only graphs need.
            batch = None if index is None else given_of(runner.batches[number])
            packed = runner.packed
            return lambda n: packed[n] if n in packed else samples_of_rows(index, n, batch)

        for number in runner.until_enough(outputs):
            if number:
                output, rounds = runner.run_batch(number, alterations.read)
            else:
                first, led, search = run_followed(runner, alterations.read, parts.values(), ends)
                target_of = search.target_of if target_of is None else target_of
                target = target_of(runner.batches[0])
                about = choose_outputs(runner, first, led, target, scale, metric, are_named=ends.named)
                output = runner.form.outputs(first.given, runner.batches[0])
                kept = runner.form.places or ()
                placed = first.placed[kept[0]] if len(kept) == 1 else (None, None)
                if others := row_counts(first.values.values()) - {len(output)}:
                    index = index_of_samples(others, {len(output)}, given_of(runner.batches[0]))
                alterations.settle(first, output, placed, tell_of(0))
                rounds = [first.values]
                # Further tensors were read in the first call alone, and not where they are taken.
                if first.n_rounds > 1 or not alterations.has_read_all:
                    repeated, rounds = runner.run_batch(0, alterations.read)
                    again.append(repeated.detach().cpu())
            unlike += sum(call in last for call in runner.unlike)
            alterations.update(rounds, len(output), tell_of(number))
            outputs.append(output.detach().cpu())
        settle_units(runner, outputs, *again)
        assert target_of is not None
        known: Sequence[Tensor | None] = runner.targets_of(outputs, target_of)
        notes = [*about.notes, *runner.notes]
        if unlike:
            notes.append(
                f"{unlike} calls of components gave tensors of another shape than in the first call of "
                "the network in the same pass, and were left as they are"
            )
        if targets is not None:
            known = targets(outputs, known)
        else:
            known, doubted = only_classes(runner, outputs, known, scale, metric, search)
            notes += doubted
        valid = [valid_of(batch) for batch in runner.batches]
        before = Outputs(outputs, runner.batches, scale, metric, known, tuple(notes), valid, search)
        alterations.solve()
        refused = _refused(alterations, [k for k in to_predict if k not in to_measure])
        notes = [*before.notes, *refused]
        repeated = again[0] if again else runner.run_batch(0)[0].detach().cpu()
        unsteady = _unsteadiness(repeated, outputs, before)
        if nesting:
            notes += _changed_by_padding(runner, outputs[0])
        measured = {
            kind: _measure(alterations, runner, before, kind, rows, draws, seed) for kind in to_measure
        }
        second = {}
        if to_predict:
            second = predict(
                alterations, runner, before, to_predict, draws=draws, probes=probes, seed=seed
            )
    size = outputs[0][0].numel()
    if second and size > probes:
        notes.append(f"predicted from {probes} random combinations of the {size} outputs per sample")
    notes += _far_off(second)
    unseen = {n for n, point in alterations.outputs.items() if point.call in about.unseen}
    predicted = {
        kind: _with_sets(each, alterations.names, rows, unseen) for kind, each in second.items()
    }
    found = predicted | {kind: (each[0], each[1]) for kind, each in measured.items()}
    both = {kind: effects for kind, effects in predicted.items() if kind in measured}
    reached = {
        name for each in second.values() for name in itertools.compress(alterations.names, each.reached)
    }
    partly = {n for n, point in alterations.inputs.items() if point in first.beside}
    seen = np.array([1.0 if set(members) - unseen else math.nan for members in rows.values()])
    effects = Effects(
        components=tuple(rows),
        values={kind: found[kind][0] * seen for kind in kinds},
        stderr={kind: found[kind][1] * seen for kind in kinds},
        how={kind: "measured" if kind in measured else "predicted" for kind in kinds},
        scale=before.scale,
        n_samples=before.n_samples,
        strength=strength,
        metric_before=before.metric,
        metric={kind: each[2] * seen for kind, each in measured.items() if before.has_metric},
        metric_stderr={kind: each[3] * seen for kind, each in measured.items() if before.has_metric},
        predicted={kind: values * seen for kind, (values, _) in both.items()},
        predicted_stderr={kind: stderr * seen for kind, (_, stderr) in both.items()},
        sets={name: members for name, members in rows.items() if len(members) > 1},
        folds={kind: each.folds for kind, each in second.items()},
        pairs={kind: each.pairs for kind, each in second.items()},
        notes=tuple(notes),
    )
    told = functools.partial(_doubts, effects, alterations, unsteady, partly, reached, unseen)
    doubts = {kind: tuple(told(kind, name) for name in rows) for kind in kinds}
    return dataclasses.replace(effects, doubts=doubts)


def _refused(alterations: Alterations, only_predicted: Sequence[str]) -> list[str]:
    """Say which components cannot be altered in which ways; an error where none can in any."""
    for kind in only_predicted:
        for name, why in alterations.unsettled.items():
            alterations.refused[kind].setdefault(name, why)
    found: dict[tuple[str, str], list[str]] = {}
    for kind, names in alterations.refused.items():
        for name, why in names.items():
            found.setdefault((name, why), []).append(kind)
    if all(len(names) == len(alterations.names) for names in alterations.refused.values()):
        name, message = next(iter(found))
        if any(alterations.weights.altered_by(kind) for kind in found[name, message]) and only_predicted:
            message += "; or alter weights alone, with how='measured'"
        raise ValueError(message)
    notes: list[str] = []
    for (name, why), kinds in found.items():
        notes.append(f"no effect {', '.join(kinds)} of {name!r}: {why}")
    return notes


def _far_off(second: Mapping[str, SecondOrder]) -> list[str]:
    """Say of which components predictions do not hold over the first batch."""
    notes: list[str] = []
    for kind, each in second.items():
        if each.far_off is not None:
            name, ratio = each.far_off
            notes.append(
                f"over the first batch, {kind} of {name!r} is predicted to have {ratio:.2g} times the "
                "effect that it has when altered alone; predictions are far off where gradients are "
                "stand-ins, as those of roundings and spikes, or changes are large: measure with "
                "how='measured'"
            )
    return notes


def _changed_by_padding(runner: ForwardRunner, output: Tensor) -> list[str]:
    """Say so where a network gives something else as soon as it leaves out what is padded."""
    notes: list[str] = []
    masks: list[Any] = []

    def see(_: nn.Module, args: Any, kwargs: Any) -> None:
        masks.append(args[2] if len(args) > 2 else kwargs.get("src_key_padding_mask"))

    with ExitStack() as hooks, fast_path(True):
        for module in runner.model.modules():
            if isinstance(module, nn.TransformerEncoder):
                hooks.enter_context(attach(module, before=see))
        nested = runner.run_batch(0)[0].detach().cpu()
    # Where none was given, what differs is rounding.
    if any(mask is not None for mask in masks) and not _are_close(nested, output):
        notes.append(
            "in eval mode nn.TransformerEncoder leaves out padding, and effects are measured with "
            "padding computed, as in training: the outputs differ, so mask positions where they are "
            "pooled"
        )
    return notes


def _found(
    runner: ForwardRunner, components: Components | Sequence[Components] | None
) -> tuple[dict[str, tuple[str, ...]], Ends, list[str]]:
    """Find the components of a network and where it ends, by a pass over the first batch.

    What comes back last are those that have no state in the chain.
    """
    measurement = Measurement(runner.model, components, DEFAULTS)
    with runner.as_found(runner.batches[0]):
        measurement.run(runner.model, runner.batches[:1], runner.forward_fn)
    assert measurement.plan is not None
    if not (measurement.parts if components is None else measurement.capture.parts):
        raise ValueError(NONE_TO_ALTER)
    runner.counted_in = counted_in(runner.model, measurement.capture.chosen)
    known = measurement.capture.parts
    last = tuple(dict.fromkeys(map(call_of, measurement.plan.states[-1])))
    if components is None:
        # What the chain begins with, as embeddings, is a state.
        parts = measurement.parts
        there = {*parts, *map(call_of, itertools.chain(*measurement.plan.states))}
        return parts, Ends.among(known, last), [name for name in known if name not in there]
    return known, Ends.among(known, last, measurement.capture.chosen, named=True), []


def _chosen(parts: Mapping[str, Any], components: Any) -> dict[str, tuple[str, ...]]:
    """Pick components of a report by names or glob patterns."""
    if components is None:
        return dict(parts)
    chosen, strangers = matching(parts, components)
    if strangers:
        raise ValueError(f"the report has no components {strangers[0]!r}; it has {tuple(parts)}")
    return {name: calls for name, calls in parts.items() if name in chosen}


def _rows(names: Sequence[str], sets: Iterable[Collection[str]]) -> dict[str, tuple[str, ...]]:
    """Return what is altered together, by name: each component alone, then the sets."""
    rows: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    for given in sets:
        known = isinstance(given, Collection) and not isinstance(given, str) and set(given) <= set(names)
        if not known or len(set(given)) < 2:
            raise ValueError(f"sets holds {given!r}; each must hold two or more of {tuple(names)}")
        members = tuple(name for name in names if name in given)
        rows["+".join(members)] = members
    return rows


def _measure(
    alterations: Alterations,
    runner: ForwardRunner,
    before: Outputs,
    kind: str,
    rows: Mapping[str, Sequence[str]],
    draws: int | None,
    seed: int,
) -> NDArray[np.float64]:
    """Alter what belongs together in one way, and return the fields of :class:`Measured` for each."""
    number = 1 if kind == "output_noise" else _DRAWS
    number = 1 if alterations.draws_nothing(kind) else draws or number
    found = []
    for i, members in enumerate(rows.values()):
        if not alterations.refused[kind].keys().isdisjoint(members):
            found.append(Measured(*[math.nan] * 4))
            continue
        # The generators' states are the user's: undisturbed puts them back.
        seed_all(seed + i)
        altered = functools.partial(_change, alterations, runner, before, kind, members)
        drawn = [altered() for _ in range(number)]
        measured, groups = over_draws(drawn), alterations.groups()
        own = torch.cat(groups)
        if any(alterations.puts_mean(kind, name) for name in members) and own.any():
            apart = over_draws([drawn[0].by_group(altered(groups), SHIFT, own)])
            measured = measured._replace(effect_stderr=apart.effect_stderr)
        found.append(measured)
    return np.array(found).T


def _change(
    alterations: Alterations,
    runner: ForwardRunner,
    before: Outputs,
    kind: str,
    members: Sequence[str],
    groups: Sequence[Tensor] = (),
) -> Change:
    """Run a network in which some components are altered in one way, and compare the outputs."""
    alter: dict[HookPoint, Alteration] = {}
    read: list[HookPoint] = []
    if not alterations.weights.altered_by(kind):
        # In a set, the input of a component is not what its linear map was fitted to.
        left_out = len(members) == 1
        for name in members:
            alter |= alterations.altering(kind, name, left_out=left_out, groups=groups)
        read = [p for name in members if kind != "output_noise" for p in alterations.taken_by(name)]
    with alterations.weights.altered(kind, members):
        return before.compare(runner.stream(read, alter))


def _with_sets(
    found: SecondOrder,
    names: Sequence[str],
    rows: Mapping[str, Sequence[str]],
    unseen: Collection[str],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return second-order effects with their errors, of each component and then of the sets.

    Those that lead to none of the outputs add nothing to a set.
    """
    together = []
    for members in list(rows.values())[len(names) :]:
        places = [names.index(name) for name in members if name not in unseen]
        together.append(set_effect(found.pairs, found.folds, places))
    values, stderr = np.array(together).reshape(-1, 2).T
    return np.append(found.values, values), np.append(found.stderr, stderr)


def _unsteadiness(again: Tensor, outputs: Sequence[Tensor], before: Outputs) -> float:
    """Return the effect of nothing at all: by how much the network changes when asked twice.

    ``again`` are the outputs of the first batch when it ran once more.
    """
    if _are_close(again, outputs[0]):
        return 0.0
    moved = before.compare([again, *outputs[1:]]).effect
    return moved * before.n_samples / max(1, len(again))


def _are_close(one: Tensor, other: Tensor) -> bool:
    """Check whether outputs are equal but for rounding."""
    # Some are NaN or infinite where they do not count.
    atol = 1e-5 * float(other.abs().nan_to_num(0.0, 0.0).max()) if other.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, 1e-3, atol, equal_nan=True)


def _doubts(
    effects: Effects,
    alterations: Alterations,
    unsteady: float,
    partly: set[str],
    reached: set[str],
    unseen: set[str],
    kind: str,
    name: str,
) -> tuple[str, ...]:
    """Return the reasons not to believe one number."""
    members = effects.sets.get(name, (name,))
    if unseen.issuperset(members):
        return ("elsewhere",)
    if not alterations.refused[kind].keys().isdisjoint(members):
        return ("refused",)
    value = float(effects.values[kind][effects.components.index(name)])
    maps = [alterations.maps[n] for n in members] if kind == "linear" else []
    is_predicted = effects.how[kind] == "predicted"
    marks = {
        "saturated": is_predicted and effects.scale == "kl" and value > SATURATED,
        "samples": any(float(fitted.leverage.mean()) > 0.5 for fitted in maps),
        "leverage": any(float((fitted.leverage > 0.95).double().mean()) > 0.05 for fitted in maps),
        "infinite": not math.isfinite(value) and (not is_predicted or name in reached),
        "gradient": is_predicted and name not in reached and name not in effects.sets,
        "inputs": kind == "linear" and not partly.isdisjoint(members),
        "outputs": kind == "linear" and any(n in alterations.further for n in members),
        "unsteady": unsteady > 0 and not value > 10 * unsteady,
    }
    return tuple(word for word, marked in marks.items() if marked)
