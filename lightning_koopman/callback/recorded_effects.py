"""What altering each component does, measured on calls that were recorded."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_koopman.effects.alterations import altered_parts, counted_as_in
from lightning_koopman.effects.component_effects import effects_on
from lightning_koopman.effects.returned import Ends
from lightning_koopman.effects.targets import (
    NO_CLASSES,
    TARGET_KEYS,
    TOKENS,
    Fit,
    TargetSearch,
    are_scores,
    as_classes,
    find_target,
    is_row,
    may_be_scores,
    without_single,
)
from lightning_koopman.network.runs.forward_runner import ForwardRunner
from lightning_koopman.network.runs.hook_points import find_module
from lightning_koopman.network.runs.samples import spread_over
from lightning_koopman.network.runs.steps import Part, Step
from lightning_koopman.network.tensors import INTEGERS, by_name, parts_of, tensors_inside
from lightning_koopman.report.effects import Effects
from lightning_koopman.report.report import CreditReport

SAMPLES = 512
"""Most samples that effects are measured on."""

FEWEST = 64
"""Samples below which effects say little, so that more steps are run where there are any."""


def passes(report: CreditReport, kinds: Sequence[str]) -> int:
    """Return how many passes over the samples effects take at most: as it is, altered, and once again.

    A component that is skipped by a mean runs twice.
    """
    return len(report.components) * (len(kinds) + ("skip" in kinds)) + 2


def labels_in(batch: Any) -> dict[str, Tensor]:
    """Return what may be classes in a batch as data loaders give it, and the tokens that they may be.

    Of a batch in order, those are the integers that follow its input, and other numbers between them:
    which of these the network takes is not known yet. What then stands there is told by a mark.
    """
    if is_row(batch):
        told = list(itertools.takewhile(lambda part: isinstance(part, Tensor) and part.ndim, batch[1:]))
        if not any(map(_may_be_classes, told)):
            return {}
        told += [torch.empty(0, device="cpu")] if len(told) + 1 < len(batch) else []
        return {f"{k}": part for k, part in enumerate(told, 1)}
    target = find_target(batch)
    if target is None or not _may_be_classes(target):
        return {}
    found, tokens = {TARGET_KEYS[0]: target}, by_name(batch).get(TOKENS)
    if isinstance(tokens, Tensor) and tokens.shape == without_single(target, tokens.ndim).shape:
        found[TOKENS] = tokens
    return found


def parts_in(batch: Any) -> list[Part]:
    """Return what may be classes in a batch, or in each of its parts, as several loaders give them.

    Parts in order must be alike, for the first may also hold all inputs, and the next all targets.
    """
    told, named = labels_in(batch), by_name(batch)
    inside = [] if told or isinstance(batch, Tensor) else list(parts_of(batch))
    # A loader that has ended gives nothing beside the others.
    kinds = {tuple((t.dtype, t.ndim) for t in tensors_inside(p)) for p in inside if p is not None}
    parts = [Part.of(labels_in(part), part) for part in inside]
    several = any(part.told for part in parts) and (named or len(kinds) == 1)
    return parts if several else [Part(told)]


def _may_be_classes(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.dtype in INTEGERS and entry.ndim > 0


def _in_order(told: Mapping[str, Tensor]) -> Any:
    """Return what was kept of a batch as it stood there, with nothing for its input."""
    return (None, *told.values()) if "1" in told else told


def measure_effects(
    model: nn.Module,
    steps: Sequence[Step],
    report: CreditReport,
    kinds: Sequence[str],
    around: Callable[[], AbstractContextManager[Any]],
    *,
    samples: float,
    agree: Callable[[Fit], Sequence[Fit]],
) -> Effects:
    """Measure effects by running recorded steps again, on what the report's last components give.

    Taken are whole steps, as many as hold so many samples, or, where these are few, until they do, at
    even distances among those that call what most of them call: some may also run the network on other
    data, say to draw a picture. ``agree`` collects how the targets of all processes fit.
    """
    parts = altered_parts(report)
    modules = {find_module(model, call)[0] for calls in parts.values() for call in calls}
    whole = counted_as_in(model, report)
    steps = [step.without_strangers(modules, whole) for step in steps]
    kinds_of_step = [tuple(id(call.module) for call in step.calls) for step in steps]
    usual = Counter(kinds_of_step).most_common(1)[0][0]
    steps = [step for step, kind in zip(steps, kinds_of_step, strict=True) if kind == usual]
    count, n_samples = 1, steps[0].n_samples
    for step in steps[1:]:
        if n_samples >= min(samples, FEWEST) and n_samples + step.n_samples > min(samples, SAMPLES):
            break
        n_samples += step.n_samples
        count += 1
    taken = [steps[i] for i in spread_over(count, len(steps))]
    run_again = {module for call in taken[0].calls for module in call.module.modules()}
    for name in itertools.chain.from_iterable(parts.values()):
        if find_module(model, name)[0] not in run_again:
            raise ValueError(
                f"no recorded call runs {name!r}, which the report names: only calls of modules can be "
                "run again, not those of forward() itself or of compiled code; call the module, or "
                "what holds it"
            )

    searches = [TargetSearch(_in_order(part.told)) for part in taken[0].parts]
    for search in searches:
        search.see_taken(taken[0].revive())
    # The call that gave each tensor, in the order in which the runner sees them.
    gave: list[int] = []

    def forward(_: nn.Module, step: Step) -> Any:
        with around():
            returned = step.run()
        if not gave:
            gave.extend(k for k in reversed(range(len(returned))) for _ in tensors_inside(returned[k]))
        for search in searches:
            search.see_given(returned)
        # Where nothing tells the outputs apart, they are those of the last call.
        return returned[::-1]

    fits: list[Fit] = []

    def part_of(step: Step) -> int | None:
        return step.part_of({gave[place] for place in runner.form.places or range(len(gave))})

    def target_of(step: Step) -> Tensor | None:
        if (part := part_of(step)) is None:
            return None
        told = step.parts[part].told
        target = searches[part].target_of(_in_order(told))
        if target is None or not _may_be_classes(target):
            return None
        return searches[part].where_predicted(told, target)

    def targets(outputs: Sequence[Tensor], known: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        if sum(map(len, outputs)) < 2:
            raise ValueError("the calls that were run again hold one sample, whose mean is itself")
        pairs = zip(outputs, known, strict=True)
        known = [t if t is None else as_classes(output, t) for output, t in pairs]
        # As many targets as outputs have positions are hardly a coincidence.
        by_position = any(t is not None and runner.form.are_by_position(t) for t in known)
        fits.extend(agree(Fit.of(outputs, known, by_position)))
        told = may_be_scores(fits) if by_position else are_scores(fits)
        return known if told else [None] * len(known)

    runner = ForwardRunner(model, taken, forward)
    runner.counted_in = whole
    found = effects_on(
        runner,
        parts,
        kinds,
        ends=Ends.of(report),
        how="measured",
        target_of=target_of,
        valid_of=lambda step: step.valid,
        given_of=Step.revive,
        targets=targets,
    )
    notes = [*found.notes]
    if found.scale == "relative" and any(part_of(step) is None for step in taken):
        notes.append(
            "the batches have parts with labels of their own, and no call of the network takes one of "
            "them alone, as it came, so changes are relative; give the network the inputs of one part "
            "at a time"
        )
    elif found.scale == "relative" and any(fit.found for fit in fits):
        notes.append(NO_CLASSES)
    return replace(found, notes=tuple(notes))


def pooled(found: Sequence[Effects]) -> Effects:
    """Average the effects that processes measured, each on samples of its own."""
    sizes = np.array([each.n_samples for each in found], dtype=float)
    weights = sizes / sizes.sum()

    first, numbers = found[0], dict[str, Any]()
    for name in ("values", "stderr", "metric", "metric_stderr"):
        numbers[name] = {}
        for kind in getattr(first, name):
            parts = weights[:, None] * [getattr(each, name)[kind] for each in found]
            is_error = name.endswith("stderr")
            numbers[name][kind] = np.sqrt((parts**2).sum(axis=0)) if is_error else parts.sum(axis=0)
    doubts = {
        kind: tuple(
            tuple(dict.fromkeys(word for each in found for word in each.doubts_of(kind, i)))
            for i in range(len(first.components))
        )
        for kind in first.kinds
    }
    return replace(
        first,
        metric_before=float(weights @ [each.metric_before for each in found]),
        n_samples=int(sizes.sum()),
        doubts=doubts,
        notes=tuple(dict.fromkeys(note for each in found for note in each.notes)),
        **numbers,
    )
