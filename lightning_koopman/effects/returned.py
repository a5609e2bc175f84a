"""Chooses what counts as the outputs among the tensors that a network returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_koopman.effects.means import MeanAndSpread
from lightning_koopman.effects.scoring import Metric
from lightning_koopman.effects.targets import (
    NO_CLASSES,
    Fit,
    TargetSearch,
    are_classes,
    are_scores,
    as_classes,
    class_axis,
    may_be_scores,
)
from lightning_koopman.network.access.hooks import attach_in
from lightning_koopman.network.axes.forms import has_batch_second
from lightning_koopman.network.axes.recorded import Recorded
from lightning_koopman.network.capture.capture import Capture
from lightning_koopman.network.flow.dataflow import DataFlow
from lightning_koopman.network.names import OUTPUT, module_of
from lightning_koopman.network.runs.forward_runner import (
    Followed,
    ForwardRunner,
    OutputForm,
    has_samples,
)
from lightning_koopman.network.runs.hook_points import HookPoint, find_module
from lightning_koopman.network.runs.samples import samples_in
from lightning_koopman.network.tensors import first_tensor, tensors_inside
from lightning_koopman.report.effects import Scale
from lightning_koopman.report.report import CreditReport


class Ends(NamedTuple):
    """What a chain ends with.

    Attributes:
        calls: Module calls.
        mixed: Names of tensors that the network returned, made of several states.
        modules: Names of the components that these were told from, where the user named them.
        named: Whether the user is known to have named them, so that the network may go on behind them.
        function: What takes the end from what the model returns, where the user chose it so.
    """

    calls: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    modules: tuple[str, ...] | None = None
    named: bool = False
    function: Callable[[Any], Any] | None = None

    @classmethod
    def among(
        cls,
        parts: Mapping[str, Sequence[str]],
        names: Sequence[str],
        modules: tuple[str, ...] | None = None,
        *,
        named: bool = False,
    ) -> Ends:
        """Find the states that a chain ends with among its module calls; nothing if any is neither."""
        mixed = tuple(name for name in names if name not in parts)
        if not {module_of(name) for name in mixed} <= {OUTPUT, "returned"}:
            return cls()
        return cls(tuple(parts[name][-1] for name in names if name in parts), mixed, modules, named)

    @classmethod
    def of(cls, report: CreditReport) -> Ends:
        """Find what the chain of a report ends with; nothing where an unknown function gave it."""
        last, reference = report.components[-1], report.reference
        names = [last] if last in report.parts else last.split("+")
        if last.endswith(".*") and last not in report.parts:
            names = [name for name in report.parts if name.startswith(last[:-1])]
        elif last.endswith("#*"):
            names = [name for name in report.parts if module_of(name) == module_of(last)]
        if reference is None:
            modules: tuple[str, ...] | None = tuple(dict.fromkeys(map(module_of, report.parts)))
            # What a function of the user's gave has the same name as the first tensor returned.
            unknown = names == [OUTPUT]
        else:
            modules = reference.modules if reference.named else None
            unknown = callable(reference.options.output) or "output" in reference.functions
        if unknown and OUTPUT not in report.parts:
            output = None if reference is None else reference.options.output
            return cls(function=output if callable(output) else None)
        return cls.among(report.parts, names, modules, named=reference is not None and reference.named)


def run_followed(
    runner: ForwardRunner,
    read: Iterable[HookPoint],
    components: Iterable[Sequence[str]],
    ends: Ends,
) -> tuple[Followed, list[tuple[str, list[int]]], TargetSearch]:
    """Run over the first batch, and find which tensors each component and each end led to.

    Components are the calls of their modules. The search for targets has seen what the outermost calls
    of modules that hold any of them take and give.
    """
    # Calls of components stand behind ends, for they know where these begin.
    calls, search = [*((end,) for end in ends.calls), *components], TargetSearch(runner.batches[0])
    depth: list[None] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        if not depth:
            search.see_taken((args, kwargs))
        depth.append(None)

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        depth.pop()
        if not depth:
            search.see_given(output)

    parts = {find_module(runner.model, own[-1])[0] for own in calls}
    hang = attach_in(runner.model)
    with ExitStack() as hooks:
        for module in runner.model.modules():
            if not parts.isdisjoint(module.modules()):
                hooks.enter_context(hang(module, before=before, after=after, first=True))
        return *_run_followed(runner, read, calls, ends), search


def _run_followed(
    runner: ForwardRunner, read: Iterable[HookPoint], calls: Sequence[Sequence[str]], ends: Ends
) -> tuple[Followed, list[tuple[str, list[int]]]]:
    if not ends.mixed:
        followed = runner.run_followed(read, calls)
        taken = [] if ends.function is None else _taken_by(ends.function, followed.given)
        return followed, _led_to(followed, ends.calls) + [(OUTPUT, [place]) for place in taken]
    flow = DataFlow()

    def keep(tensor: Tensor, recorded: Recorded) -> None:
        if recorded.name in ends.mixed:
            flow.label(tensor, recorded.name, beside=True)

    # Names count what the network returns, of which forward_fn may give a part, or something else.
    capture = Capture(runner.model, ends.modules, keep=keep)
    with capture, flow:
        capture.start_pass(runner.batches[0])
        followed = runner.run_followed(read, calls)
        capture.end_pass()
    led = _led_to(followed, ends.calls)
    labels = [flow.labels(tensor) for tensor in tensors_inside(followed.given)]
    led += [(name, [k for k, known in enumerate(labels) if name in known]) for name in ends.mixed]
    return followed, led


def _taken_by(function: Callable[[Any], Any], given: Any) -> list[int]:
    """Find which of the tensors that a model returned a function makes its result of."""
    # Of another forward_fn than the report's it may be no function at all.
    with DataFlow() as flow, suppress(Exception):
        for place, tensor in enumerate(tensors_inside(given)):
            flow.label_part(tensor, str(place))
        return sorted(map(int, flow.labels(first_tensor(function(given)))))
    return []


def _led_to(followed: Followed, calls: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Return which tensors some calls led to, by each tensor that they give."""
    led, further = [], sorted(followed.further.items())
    for call in calls:
        led.append((call, followed.made[call]))
        led += [(call, found) for point, found in further if followed.last[point.call] == call]
    return led


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
        notes: What a reader must know of it.
        unseen: The calls that lead to none of the outputs, but to other tensors or nowhere.
    """

    notes: tuple[str, ...]
    unseen: frozenset[str]


def choose_outputs(
    runner: ForwardRunner,
    followed: Followed,
    ends: Iterable[tuple[str, Sequence[int]]],
    target: Tensor | None,
    scale: Scale | None,
    metric: Metric | None,
    *,
    are_named: bool = False,
) -> Choice:
    """Choose the outputs among what a model returned for the first batch, and tell the runner.

    ``followed`` tells which tensors each call led to, and ``ends`` which each end did. The first that
    each end led to counts, side by side, in units in which each varies alike. Where the targets are
    classes of some of them, those alone count, as if each were a position; with a metric, the first of
    these. A single one that holds a row per position is laid out by sample, unless a metric is to read
    it.
    """
    tensors, made, notes = list(tensors_inside(followed.given)), followed.made, list[str]()
    possible = [place for place, tensor in enumerate(tensors) if has_samples(tensor)]
    led = [(end, [p for p in found if p in possible]) for end, found in ends]
    places, units, widths = list[int](), tuple[float, ...](), tuple[int, ...]()
    for _, found in led:
        if not {*found} & {*places}:
            places.extend(found[:1])
    kept, axis = sorted(places) or possible[:1], None
    # Behind components that were named, one end may lead to several heads.
    forks = are_named and places == possible[:1] and any(len(found) > 1 for _, found in led)
    if (not places and len(possible) > 1) or forks:
        notes.append(
            f"effects are about the first of {len(possible)} tensors that the model returns, of shape "
            f"{tuple(tensors[kept[0]].shape)}; return another from forward_fn to see those on it"
        )
    for end in (end for end, found in led if places and not found):
        notes.append(f"the model does not return what {end!r} gives, so effects on it are not seen")
    if len(places) > 1:
        chosen, axis = _which_count([tensors[p] for p in kept], target, scale, metric)
        kept = [kept[k] for k in chosen]
    named = ", ".join(dict.fromkeys(end for end, found in led if {*found} & {*kept}))
    if len(kept) < len(places):
        which = "one" if len(kept) == 1 else f"{len(kept)}"
        notes.append(
            f"effects are about {which} of {len(places)} outputs, that of {named}; return another from "
            "forward_fn to see those on it"
        )
    on_the_way = any({possible[0], kept[0]} <= {*found} for found in made.values())
    if len(places) == 1 and kept[0] > possible[0] and on_the_way and named != OUTPUT:
        notes.append(
            f"effects are about the output of {named}, which is not the first of {len(possible)} "
            "tensors that the model returns; return another from forward_fn to see those on it"
        )
    if axis is not None:
        notes.append(
            f"effects are averaged over {len(kept)} outputs, those of {named}, which are of one shape"
        )
    elif len(kept) > 1:
        notes.append(
            f"effects are averaged over {len(kept)} outputs, those of {named}, each in units of its own "
            "standard deviation"
        )
        units = tuple(_spread([tensors[place].reshape(len(tensors[place]), -1)]) for place in kept)
        widths = tuple(tensors[place][0].numel() for place in kept)
    by_position = len(kept) == 1 and metric is None and _holds_positions(runner, followed, kept[0])
    # A call that gives several tensors may lead there by another one than the first.
    seen = {followed.last[p.call] for p, found in followed.further.items() if {*found} & {*kept}}
    runner.form = OutputForm(tuple(kept), units, widths, axis, by_position)
    unseen = {c for c, found in made.items() if found and c not in seen and not {*found} & {*kept}}
    # What is not returned led nowhere, as does what is made of arrays: there the outputs move with it.
    led_on = {followed.last[point.call] for point in followed.further}
    lost = [call for call, found in made.items() if not found and call not in led_on]
    return Choice(tuple(notes), frozenset(unseen.union(c for c in lost if _moves_nothing(runner, c))))


def settle_units(runner: ForwardRunner, outputs: Sequence[Tensor], *again: Tensor) -> None:
    """Let outputs side by side count in units of their own deviation over all batches.

    Those of other sizes in each batch stay in units of the first one. Outputs that were taken ``again``
    are brought to the same units.
    """
    form = runner.form
    if not form.units or len({output.shape[1:] for output in outputs}) > 1:
        return
    parts = [torch.split(output, list(form.widths), dim=1) for output in (*outputs, *again)]
    spreads = [_spread(own) for own in zip(*parts[: len(outputs)], strict=True)]
    for own in parts:
        for part, spread in zip(own, spreads, strict=True):
            part /= spread
    units = tuple(unit * spread for unit, spread in zip(form.units, spreads, strict=True))
    runner.form = replace(form, units=units)


def _spread(parts: Iterable[Tensor]) -> float:
    """Return the standard deviation of an output's samples; 1 where there is none to divide by."""
    spread = float(MeanAndSpread(parts).std.square().sum().sqrt())
    return spread if 0 < spread < math.inf else 1.0


def _moves_nothing(runner: ForwardRunner, call: str) -> bool:
    """Check whether the outputs stay as they are, to the last bit, when what a call gives changes."""
    are_tensors: list[bool] = []

    def see(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        are_tensors.append(isinstance(output, Tensor) and output.numel() > 0)

    def change(output: Tensor, _: Mapping[HookPoint, Tensor]) -> Tensor:
        return 1 - 2 * output

    alter, module = {HookPoint("out", call): change}, find_module(runner.model, call)[0]
    inside, weights = {*module.modules()}, {id(p) for p in module.parameters()}
    others = (part for part in runner.model.modules() if part not in inside)
    if any(id(p) in weights for part in others for p in part._parameters.values()):
        return False  # its weights may count where others use them
    with attach_in(runner.model)(module, after=see):
        for number in range(len(runner.batches)):
            own = runner.run_batch(number)[0]
            try:
                changed = runner.run_batch(number, (), alter)[0]
            except Exception:  # the network's own code may refuse other numbers
                return False
            if not torch.equal(own, changed):
                return False
    # In another call its weights may count.
    return all(are_tensors) and len(are_tensors) == 2 * len(runner.batches)


def _holds_positions(runner: ForwardRunner, followed: Followed, place: int) -> bool:
    """Check whether a tensor returned has the positions of all samples in its first axis, merged."""
    axes = followed.axes[place] or (0,)
    # Where a module has the samples along the second axis, a batch does not tell how many there are.
    return axes[0] == samples_in(runner.batches[0]) and not has_batch_second(runner.model)


def _which_count(
    outputs: Sequence[Tensor], target: Tensor | None, scale: Scale | None, metric: Metric | None
) -> tuple[list[int], int | None]:
    """Choose among several outputs, and find the axis of their classes where several have the same."""
    fitting = [] if target is None else [k for k, o in enumerate(outputs) if are_classes(o, target)]
    if target is not None and len({outputs[k].shape for k in fitting}) > 1:
        # Features beside scores: both have room for all classes.
        placed = {k: as_classes(outputs[k], target).cpu() for k in fitting}
        fits = {k: [Fit.of([outputs[k].cpu()], [t], t.ndim > 1)] for k, t in placed.items()}
        told = [k for k in fitting if are_scores(fits[k])]
        scored = told or [k for k in fitting if may_be_scores(fits[k])]
        fitting = [k for k in scored if outputs[k].shape == outputs[scored[0]].shape]
    if not fitting:
        only = scale == "kl" or metric is not None or len({len(output) for output in outputs}) > 1
        return list(range(1 if only else len(outputs))), None
    if len(fitting) == 1 or metric is not None:
        return fitting[:1], None
    return fitting, class_axis(outputs[fitting[0]], target)


def only_classes(
    runner: ForwardRunner,
    outputs: Sequence[Tensor],
    targets: Sequence[Tensor | None],
    scale: Scale | None,
    metric: Metric | None,
    search: TargetSearch,
) -> tuple[Sequence[Tensor | None], tuple[str, ...]]:
    """Leave out targets that look like the classes of outputs which are no class scores, and say so.

    That is a question where nobody said what changes are measured in.
    """
    known = [target.cpu() for target in targets if target is not None]
    if scale is not None or metric is not None or len(known) < len(targets):
        return targets, ()
    if not all(map(_one_each, runner.batches, outputs, known)):
        return [None] * len(targets), (NO_CLASSES,)
    if not are_classes(outputs[0], known[0]):
        return targets, ()
    known = [as_classes(o, t) for o, t in zip(outputs, known, strict=True)]
    placed = [search.where_predicted(b, t) for b, t in zip(runner.batches, known, strict=True)]
    if may_be_scores([Fit.of(outputs, placed, runner.form.are_by_position(known[0]))]):
        return targets, ()
    return [None] * len(targets), (NO_CLASSES,)


def _one_each(batch: Any, output: Tensor, target: Tensor) -> bool:
    """Check whether integers may be one for each sample, or position of these."""
    if target.is_floating_point() or not target.ndim or target.numel() > len(target):
        return True
    shape = output.shape[:-1]
    return len(target) in (samples_in(batch), *shape, shape.numel())
