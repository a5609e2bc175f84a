"""Which components may become linear, so that the network gets smaller."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_koopman.decisions.steps import (
    Cost,
    Step,
    Steps,
    as_fields,
    check_max_drop,
    cost_of,
    explained,
    failure_with,
    is_finite,
    is_within,
    look_at,
    loss_of,
    refuse_samples,
    run_whole,
    told_apart,
)
from lightning_koopman.decisions.swaps import (
    LinearComponent,
    Repeated,
    check_copyable,
    copied_with,
    swapped,
)
from lightning_koopman.effects.linear_map import LinearFit, LinearMap
from lightning_koopman.effects.scoring import Measured, Metric, Outputs, over_draws
from lightning_koopman.network.access.hooks import attach_in
from lightning_koopman.network.access.isolation import is_compiled, random_states_kept, undisturbed
from lightning_koopman.network.arguments import INTEGER, NUMBER, check_type
from lightning_koopman.network.names import listed
from lightning_koopman.network.runs.forward import ForwardFn, check_batches, check_model
from lightning_koopman.network.runs.forward_runner import ForwardRunner, runner_on
from lightning_koopman.network.runs.hook_points import HookPoint, find_module
from lightning_koopman.report.effects import Scale
from lightning_koopman.report.report import CreditReport
from lightning_koopman.report.text import Fitted, counted

CostName = Literal["flops", "parameters", "seconds"]
_Measure = Callable[[ForwardRunner, Cost], float]
_POSITIONS = 64
"""Positions of a sample that a map of channels is fitted on, at most."""
_LEAST_RANK = 16
"""Maps of whole tensors are not tried where so few directions need more parameters than before."""
_SLOWER = 1.02
"""A network counts as slower beyond this ratio, and beyond the error of what was measured."""
_PASSES = (12, 24, 48)
"""After how many passes of both networks it is asked which one is slower; the last answer stands."""
_QUANTILE, _ERRORS = 0.15, 1.8
"""Times are compared where few passes are shorter, for other work only makes passes longer: within so
many standard errors of the quantile."""


@dataclass(frozen=True, eq=False, repr=False)
class Linearized(Steps):
    """A network with linear components, and what that saved and lost.

    Attributes:
        model: The new network; all of ``components`` are linear in it.
        seconds: Time of one pass over the first batch, before and after, on one thread: what few of the
            passes stay below, for other work on the machine only makes them longer.
        slower: Whether it is slower beyond the error of that.
    """

    model: nn.Module
    seconds: tuple[float, float]
    slower: bool

    @property
    def within(self) -> int:
        """Number of steps: the loss of the last one is admitted, whatever those before it lose."""
        return len(self.components)

    @property
    def larger(self) -> tuple[str, ...]:
        """What the new network needs more of: ``"parameters"``, ``"FLOPs"``, ``"time"``."""
        if not self.components:
            return ()
        after, before = self.costs[-1], self.cost_before
        found = {
            "parameters": after.parameters > before.parameters,
            "FLOPs": after.flops > before.flops,
            "time": self.slower,
        }
        return tuple(name for name, more in found.items() if more)

    @property
    def verdict(self) -> str:
        """What became linear, in one line."""
        if not self.candidates:
            return "Nothing can become linear: all components stay, for the reasons above."
        if not self.components:
            return (
                f"Nothing became linear within {self.max_drop:g} {self._unit()}: what could loses more, "
                "or saves nothing."
            )
        return (
            f"{len(self.components)} of {len(self.candidates)} are linear within {self.max_drop:g} "
            f"{self._unit()}: {', '.join(self.components)}."
        )

    @property
    def next_step(self) -> str:
        """What to do next, in one line."""
        if not self.components:
            larger = ", or a larger max_drop" if self.candidates else ""
            return f"Next: drop_order, which drops blocks whole{larger}."
        return "Next: measure .model on data that nothing was chosen on, and write it with save_shrunk."

    @property
    def headline(self) -> str:
        """The costs after as shares of those before; first of all, what became larger."""
        warning = f"LARGER ({', '.join(self.larger)}): " if self.larger else ""
        after = self.costs[-1] if self.costs else self.cost_before
        return (
            f"{warning}{_share(after.parameters, self.cost_before.parameters)} parameters, "
            f"{_share(after.flops, self.cost_before.flops)} FLOPs, "
            f"{1000 * self.seconds[1]:.3g} ms per batch after {1000 * self.seconds[0]:.3g} ms"
        )

    def __repr__(self) -> str:
        return f"Linearized({self.headline}; linear: {', '.join(self.components) or 'nothing'})"

    def __rich__(self) -> Fitted:
        title = f"{self.headline}\nMade linear one after the other"
        return self._table(title, self.verdict, self.next_step)


def _share(after: int, before: int) -> str:
    return f"{after / before:.0%} of the" if before else f"{after:,} after 0"


def linearize(
    model: nn.Module,
    batches: Iterable[Any],
    report: CreditReport | None = None,
    *,
    components: str | Sequence[str] | None = None,
    max_drop: float = 0.01,
    cost: CostName = "flops",
    budget: float = 0.0,
    allow_larger: bool = False,
    fit_batches: Iterable[Any] | None = None,
    metric: Metric | None = None,
    scale: Scale | None = None,
    samples: int = 512,
    variance: float = 0.999,
    max_dim: int = 256,
    forward_fn: ForwardFn | None = None,
) -> Linearized:
    """Replace components by linear layers, as long as the network gets smaller and loses little.

    A component becomes the ridge regression of its own output on the leading POD directions of its own
    input: of whole tensors, or where it has positions (tokens, pixels), of the channels of one, alike at
    all of them; the latter alone where no position depends on later ones, as in language models. It is
    stored as one ``nn.Linear``, or as two with a narrow state between them where that takes fewer
    operations. Activations and normalisations that count as part of it go with it. Neighbours in one
    ``nn.Sequential`` become a single map. A bare ``nn.Linear`` stays, unless it becomes part of one.

    Components are taken one after the other, whichever moves the outputs least per cost saved, measured
    anew for all that are left after each, as long as the loss is admitted and nothing gets larger.
    They are also taken from the last to the first and from the first to the last, for neighbours that
    become one map save more than each alone. The cheapest of the three networks is then improved: one
    more component, or two that become one map, are added or take the place of one, whichever is cheapest
    and admitted (of those as cheap, whichever moves the outputs least), until nothing is better. Each
    network takes one pass over the samples: of ``n`` components about ``n k`` until ``k`` are linear,
    then up to ``2 (n - k) k`` for each improvement.

    Args:
        model: Any module; it is left exactly as it was found.
        batches: Data: tensors, tuples of input and target, or mappings. Without ``fit_batches``, maps
            are fitted on those at even places, and components chosen on the others.
        report: Names the components; ``None`` chooses them as :func:`lightning_koopman.credit_report`
            does.
        components: Names or glob patterns of those that may become linear; ``None`` tries all.
        max_drop: Largest loss: drop of the metric, or where there is none, effect on the outputs.
        cost: What is to be saved: ``"flops"``, ``"parameters"`` or ``"seconds"``.
        budget: Share of the original cost that is enough.
        allow_larger: Whether the network may need more parameters, operations or time than before;
            components then become linear also where that saves nothing.
        fit_batches: Data to fit maps on; all of ``batches`` is then for choosing.
        metric: Called as ``metric(outputs, targets)``, larger is better; ``None`` takes the accuracy
            where targets are class indices, and none otherwise.
        scale: What effects are measured in, as in :func:`lightning_koopman.drop_order`.
        samples: Most samples that components are chosen on.
        variance: Share of the predicted variance that a pair of layers keeps.
        max_dim: Most POD directions of an input.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.

    Returns:
        The new network, and what was measured after each step.

    Raises:
        ValueError: If an argument is out of range, there are too few samples or batches, a component
            that was named cannot become linear, or the network got slower and ``allow_larger`` is false.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(6, 16), nn.Identity(), nn.Linear(16, 16), nn.Linear(16, 3))
        >>> small = linearize(net, torch.randn(400, 6).split(100), max_drop=1e-4, allow_larger=True)
        >>> small.costs[-1].flops < small.cost_before.flops
        True
    """
    check_model(model)
    if is_compiled(model):
        raise ValueError("the model went through torch.compile; linearize the module it was made from")
    check_copyable(model)
    check_max_drop(max_drop)
    check_type(NUMBER, variance=variance, budget=budget)
    check_type(INTEGER, max_dim=max_dim)
    if max_dim < 1:
        raise ValueError(f"max_dim is {max_dim}; a linear map needs at least one direction of its input")
    if not 0 < variance <= 1:
        raise ValueError(f"variance is {variance}; it must lie above 0 and at most at 1")
    if not 0 <= budget < 1:
        raise ValueError(f"budget is {budget}; it is a share of the original {cost}, from 0 to below 1")
    fit_on, choose_on = _two_parts(batches, fit_batches)
    runner = runner_on(model, choose_on, samples, forward_fn)
    with undisturbed(model):
        calls, outputs, refused = run_whole(runner, report, components, scale, metric, fit_on)
        fitting = ForwardRunner(model, fit_on, forward_fn)
        with explained(fitting):
            refuse_samples(fitting, fitting.run_batch(0)[0])
        maps = _Maps(fitting, max_dim, variance)
        calls = maps.look_at(calls)
        refused = maps.check({n: c for n, c in calls.items() if n not in refused}, runner) | refused
        if components is not None and refused:
            name, why = next(iter(refused.items()))
            raise ValueError(f"{name!r} cannot become linear: {why}")
        search = _Search(runner, outputs, maps, max_drop, _measure_of(cost), budget, allow_larger)
        steps = search.run({name: c for name, c in calls.items() if name not in refused})
        before = cost_of(runner)
        swaps = [] if not steps else maps.swaps(search.groups(search.chosen))
        seconds, slower = _compare_times(runner, swaps)
    candidates = tuple(name for name in calls if name not in refused)
    notes = told_apart(search.unknown, "linear")
    if not steps and candidates and all(_is_layer(model, calls[n], _LINEAR) for n in candidates):
        notes.append(
            f"{listed(candidates)}: no activation of its own belongs to any of these, for one that is a "
            "function, such as torch.relu, or that several layers share, stays; where each layer has a "
            "module, such as nn.ReLU(), it becomes linear together with it"
        )
    found = Linearized(
        **as_fields(steps, search.outputs, notes),
        cost_before=before,
        candidates=candidates,
        refused=refused,
        max_drop=max_drop,
        model=copied_with(model, swaps),
        seconds=seconds,
        slower=slower,
    )
    if found.larger and not allow_larger:
        raise ValueError(
            f"with {', '.join(found.components)} linear the network is slower: {found.headline}. Set "
            "allow_larger to get it all the same, or cost to 'seconds' to save time"
        )
    return found


_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_layer(model: nn.Module, calls: Sequence[str], kinds: tuple[type[nn.Module], ...]) -> bool:
    """Check whether calls are those of one layer by itself, of one of some kinds."""
    return len(calls) == 1 and type(find_module(model, calls[0])[0]) in kinds


def _two_parts(batches: Iterable[Any], fit_batches: Iterable[Any] | None) -> tuple[list[Any], Any]:
    """Return batches to fit on, and others to choose on."""
    check_batches(batches if fit_batches is None else fit_batches)
    if fit_batches is not None:
        with random_states_kept(fit_batches):
            fit_on = list(fit_batches)
        if not fit_on:
            raise ValueError("fit_batches holds no batch; give some to fit maps on, or leave it out")
        return fit_on, batches
    with random_states_kept(batches):
        given = list(batches)
    if len(given) == 1:
        raise ValueError("one batch arrived, but maps are fitted on one and chosen on another; give two")
    return given[::2], given[1::2]


@dataclass(frozen=True)
class _Group:
    """Module calls that become one map: of whole tensors, or of an axis of channels at each position."""

    calls: tuple[str, ...]
    axis: int | None


class _Option(NamedTuple):
    """A component that may become linear, in one of its forms."""

    name: str
    form: _Group


class _Maps:
    """Linear maps in place of module calls, each fitted when it is first asked for."""

    def __init__(self, runner: ForwardRunner, max_dim: int, variance: float) -> None:
        self._runner, self._max_dim, self._variance = runner, max_dim, variance
        self._swaps: dict[_Group, LinearComponent] = {}

    def look_at(self, components: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """Run one batch to see what components are made of, less what several share, as a pooling."""
        self._seen = look_at(self._runner, components)
        return {name: self._own(calls) for name, calls in components.items()}

    def _find_varying(self, components: Iterable[Sequence[str]], choosing: ForwardRunner) -> None:
        """Find what has another shape per sample in some batches, which no map of whole tensors fits.

        And what takes hardly any of the rows that maps are fitted on, as an expert that is never chosen.
        """
        ends = [(HookPoint("in", own[0]), HookPoint("out", own[-1])) for own in components]
        shapes: dict[HookPoint, set[torch.Size]] = {point: set() for pair in ends for point in pair}
        rows: dict[str, int] = {source.call: 0 for source, _ in ends}

        def update(values: Mapping[HookPoint, Tensor], fits: bool) -> None:
            for point in shapes.keys() & values.keys():
                shapes[point].add(values[point].shape[1:])
            for source, _ in ends if fits else ():
                rows[source.call] += len(values[source]) if source in values else 0

        for runner in (self._runner, choosing):
            seen = functools.partial(update, fits=runner is self._runner)
            for _ in runner.stream(shapes, update=seen):
                pass
        self._varying = {point.call for point, found in shapes.items() if len(found) > 1}
        self._with_few = {call: count for call, count in rows.items() if count < 2}

    def _own(self, calls: tuple[str, ...]) -> tuple[str, ...]:
        """Leave out what also runs elsewhere behind the first call, and all behind that."""
        shared = (i for i, call in enumerate(calls) if i and self._seen[call].runs != 1)
        return calls[: next(shared, len(calls))]

    def check(
        self, components: Mapping[str, tuple[str, ...]], choosing: ForwardRunner
    ) -> dict[str, str]:
        """Find why components cannot become linear, for which others are run than maps are fitted on."""
        found = {name: self._refusal(calls) for name, calls in components.items()}
        refused = {name: reason for name, reason in found.items() if reason}
        left = {name: calls for name, calls in components.items() if name not in refused}
        self._find_varying(left.values(), choosing)
        for name, calls in left.items():
            if calls[0] in self._with_few:
                count = counted(self._with_few[calls[0]], "row")
                refused[name] = f"it takes {count} of the data to fit maps on, of at least 2"
            elif not self._varying.isdisjoint(calls) and not self.forms(calls, everything=True):
                refused[name] = "what it takes or gives has not one shape in all batches"
            elif why := failure_with(self._runner, Repeated(calls, self._seen[calls[-1]].given)):
                refused[name] = f"the network fails without it ({why})"
        return refused

    def _refusal(self, names: Sequence[str]) -> str:
        calls = [self._seen[name] for name in names]
        taken = calls[0].taken
        # The network takes apart what a module gives in the middle, too.
        given = next((c.given for c in calls if not isinstance(c.given, Tensor)), calls[-1].given)
        if calls[0].runs != 1:
            return f"it runs {calls[0].runs} times in one pass"
        if not all(call.in_place for call in calls):
            return "the network does not call it where it is registered, so nothing can take its place"
        if not all(call.alone for call in calls):
            return "it takes more than one tensor, or no floating-point tensor first"
        if not isinstance(given, Tensor) or taken is None or min(taken.ndim, given.ndim) < 2:
            return f"it gives {type(given).__name__}, not one tensor of rows"
        rows = [len(call.given) for call in calls if call.given.ndim]
        if not len(taken):
            return "no row of the first batch comes to it"
        if len(taken) not in rows:
            return f"it turns {len(taken)} rows into {len(given)}"
        return ""

    def forms(self, calls: tuple[str, ...], everything: bool) -> list[_Group]:
        """Return what may become one map: whole tensors, or the channels at every position.

        What follows a component and belongs to it, such as pooling, may change the positions: it stays
        then.
        """
        module = find_module(self._runner.model, calls[0])[0]
        convolves = any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules())
        axis = 1 if convolves else -1
        taken = self._places(self._seen[calls[0]].taken, axis)
        parts = [calls[:count] for count in range(len(calls), 0, -1)]
        given = [self._places(self._seen[part[-1]].given, axis) for part in parts]
        alike = [p for p, places in zip(parts, given, strict=True) if taken[1:] and places == taken]
        tensors = (self._seen[calls[0]].taken, self._seen[calls[-1]].given)
        least = _LEAST_RANK * sum(tensor[0].numel() for tensor in tensors if tensor is not None)
        modules = [find_module(self._runner.model, call)[0] for call in calls]
        own = {id(p): p.numel() for part in modules for p in part.parameters()}
        tried = everything or least < sum(own.values()) or not alike
        tried = tried and given[0][:1] == taken[:1] and self._varying.isdisjoint(calls)
        tried = tried and self._looks_ahead(calls, 2 if convolves else 1)
        whole = [_Group(calls, None)] if tried else []
        return [*whole, *(_Group(part, axis) for part in alike[:1])]

    def _looks_ahead(self, calls: tuple[str, ...], axis: int) -> bool:
        """Check whether sequences are read in both directions; a map of whole ones would do so.

        Where a position must not depend on later ones, as in causal language models, it would show the
        network what it is to predict.
        """
        before, given = self._seen[calls[0]].taken, self._seen[calls[-1]].given
        assert before is not None
        if before.ndim != 3 or given.ndim != 3 or not 1 < before.shape[axis] == given.shape[axis]:
            return True

        def change(_: nn.Module, args: Any, kwargs: Any) -> Any:
            new = args[0].clone()
            new.select(axis, -1).copy_(args[0].select(axis, 0))
            return (new, *args[1:]), kwargs

        first = find_module(self._runner.model, calls[0])[0]
        with attach_in(self._runner.model)(first, before=change):
            moved = look_at(self._runner, {"": calls})[calls[-1]].given - given
        size = float(given.abs().max()) * torch.finfo(given.dtype).eps
        return bool(moved.narrow(axis, 0, before.shape[axis] - 1).abs().max() > 100 * size)

    @staticmethod
    def _places(tensor: Any, axis: int) -> list[int]:
        """Return the sizes of all axes but that of channels."""
        sizes = list(tensor.shape)
        del sizes[axis]
        return sizes

    def swaps(self, groups: Sequence[_Group]) -> list[LinearComponent]:
        """Return what takes the place of groups of modules."""
        missing = [group for group in groups if group not in self._swaps]
        if missing:
            ends = [(HookPoint("in", g.calls[0]), HookPoint("out", g.calls[-1])) for g in missing]
            fits = [LinearFit(self._max_dim) for _ in missing]

            def update(values: Mapping[HookPoint, Tensor]) -> None:
                for (source, target), fit, group in zip(ends, fits, missing, strict=True):
                    fit.update(_rows(values[source], group.axis), _rows(values[target], group.axis))

            for _ in self._runner.stream([point for pair in ends for point in pair], update=update):
                pass
            for group, fit in zip(missing, fits, strict=True):
                taken = self._seen[group.calls[0]].taken
                assert taken is not None
                # Parameters may be complex, as of spectral convolutions, or narrower than what is taken.
                own = find_module(self._runner.model, group.calls[0])[0].parameters()
                like = next(filter(torch.is_floating_point, own), taken)
                swap = as_component(fit.solve(), group.calls, group.axis, self._variance)
                self._swaps[group] = swap.to(like.device, torch.promote_types(like.dtype, taken.dtype))
        return [self._swaps[group] for group in groups]


def _rows(values: Tensor, axis: int | None) -> Tensor:
    """Return one row per sample, or the channels of some positions of each."""
    if axis is None:
        return values
    rows = values.movedim(axis, -1).flatten(1, -2)
    step = -(-rows.shape[1] // _POSITIONS)
    return rows[:, ::step].flatten(0, 1)


class _Search:
    """Takes components one after the other, as long as the loss is admitted."""

    def __init__(
        self,
        runner: ForwardRunner,
        outputs: Outputs,
        maps: _Maps,
        max_drop: float,
        measure: _Measure,
        budget: float,
        allow_larger: bool,
    ) -> None:
        self._runner, self.outputs, self._maps = runner, outputs, maps
        self._max_drop, self._measure, self._allow_larger = max_drop, measure, allow_larger
        self._whole = cost_of(runner)
        self._cost = measure(runner, self._whole)
        self._enough = budget * self._cost
        self._follows = functools.cache(functools.partial(_follows, runner.model))
        self._tried: dict[frozenset[_Option], tuple[Measured, Cost, float]] = {}
        self.chosen: list[_Option] = []

    def run(self, calls: Mapping[str, tuple[str, ...]]) -> list[Step]:
        """Return the steps to the cheapest network, whose components are then in ``chosen``."""
        self._order = list(calls)
        forms = {name: self._maps.forms(own, self._allow_larger) for name, own in calls.items()}
        options = [_Option(name, form) for name, own in forms.items() for form in own]
        none: list[_Option] = []
        found = (none, self._take_least(options), self.take(options[::-1]), self.take(options))
        best = self._exchange(options, min(found, key=lambda chosen: self._worth(chosen)[0]))
        self.chosen = best if self._allow_larger else self._saving(best)
        return [self._try(self.chosen[: count + 1])[0] for count in range(len(self.chosen))]

    @property
    def unknown(self) -> list[str]:
        """Components with which the outputs or the metric were never finite."""
        seen, known = set[str](), set[str]()
        for which, (measured, *_) in self._tried.items():
            names = {name for name, _ in which}
            seen |= names
            known |= names if is_finite(measured, self.outputs) else set()
        return [name for name in self._order if name in seen - known]

    def groups(self, chosen: Sequence[_Option]) -> list[_Group]:
        """Find the modules that become one map each; a bare linear layer by itself stays."""
        groups: list[_Group] = []
        for _, form in sorted(chosen, key=lambda option: self._order.index(option.name)):
            last = groups[-1] if groups else None
            alike = last is not None and last.axis == form.axis
            if last and alike and self._follows(last.calls[-1], form.calls[0]):
                groups[-1] = _Group((*last.calls, *form.calls), form.axis)
            else:
                groups.append(form)
        model = self._runner.model
        return [group for group in groups if not _is_layer(model, group.calls, (nn.Linear,))]

    def _replaced(self, chosen: Sequence[_Option]) -> list[_Option]:
        """Return those that a map takes the place of."""
        calls = {call for group in self.groups(chosen) for call in group.calls}
        return [option for option in chosen if option.form.calls[0] in calls]

    def _try(self, chosen: Sequence[_Option]) -> tuple[Step, float]:
        """Measure the network in which the chosen components are linear, in whatever order, once."""
        which = frozenset(chosen)
        if which not in self._tried:
            with swapped(self._runner.model, self._maps.swaps(self.groups(chosen))):
                measured = over_draws([self.outputs.compare(self._runner.stream())])
                cost = cost_of(self._runner)
                self._tried[which] = measured, cost, self._measure(self._runner, cost)
        measured, cost, after = self._tried[which]
        return Step(chosen[-1].name, measured, cost), after

    def _larger(self, cost: Cost) -> bool:
        return cost.parameters > self._whole.parameters or cost.flops > self._whole.flops

    def _fits(self, step: Step) -> bool:
        """Check whether the loss of a step is admitted, and nothing larger that may not be."""
        kept = is_within(loss_of(step.measured, self.outputs), self._max_drop)
        kept = kept and is_finite(step.measured, self.outputs)
        return kept and (self._allow_larger or not self._larger(step.cost))

    def _admitted(self, option: _Option, step: Step, after: float, least: float) -> bool:
        """Check whether a step keeps the loss, and makes the network cheaper and nothing larger."""
        bare = not self.groups([option])
        gains = after < least or (after == least and not bare)
        if not gains or self._larger(step.cost):
            gains = self._allow_larger and not bare
        return gains and self._fits(step)

    def _take_least(self, options: Sequence[_Option]) -> list[_Option]:
        """Take the option that costs the outputs least per cost saved, again and again."""
        chosen: list[_Option] = []
        least, effect = self._cost, 0.0
        left = list(options)
        while left and least > self._enough:
            tried = {option: self._try([*chosen, option]) for option in left}
            if not self._allow_larger:
                left = [o for o in left if not self._larger(tried[o][0].cost) or not self.groups([o])]
            fitting = [o for o in left if self._admitted(o, *tried[o], least)]
            if not fitting:
                break
            paid = {o: max(tried[o][0].measured.effect - effect, 0.0) for o in fitting}
            saved = {o: max(least - tried[o][1], 1e-9 * self._cost) for o in fitting}
            best = min(fitting, key=lambda o: (paid[o] / saved[o], tried[o][0].measured.effect))
            step, least = tried[best]
            effect = step.measured.effect
            chosen.append(best)
            left = [option for option in left if option.name != best.name]
        return chosen

    def take(self, options: Sequence[_Option]) -> list[_Option]:
        """Take those options that are admitted, in the given order."""
        chosen: list[_Option] = []
        least = self._cost
        for option in options:
            if option.name in dict(chosen) or least <= self._enough:
                continue
            step, after = self._try([*chosen, option])
            if self._admitted(option, step, after, least):
                chosen, least = [*chosen, option], after
        return chosen

    def _exchange(self, options: Sequence[_Option], chosen: list[_Option]) -> list[_Option]:
        """Add options, or take them in place of one, whichever are best, until none are better."""
        while self._worth(chosen)[0] > self._enough:
            fitting = [new for new in self._near(options, chosen) if self._fits(self._try(new)[0])]
            best = min(fitting, key=self._worth, default=chosen)
            if self._worth(best) >= self._worth(chosen):
                break
            chosen = best
        return chosen

    def _saving(self, chosen: list[_Option]) -> list[_Option]:
        """Leave out what saves nothing: it was taken as it might have become one map with another."""
        for option in chosen:
            rest = [other for other in chosen if other is not option]
            if self._worth(rest)[0] <= self._worth(chosen)[0] and (
                not rest or self._fits(self._try(rest)[0])
            ):
                return self._saving(rest)
        return chosen

    def _worth(self, chosen: Sequence[_Option]) -> tuple[float, float]:
        """Return what is to be small: the cost and, of choices that cost as much, the effect."""
        if not chosen:
            return math.inf if self._allow_larger else self._cost, 0.0
        step, after = self._try(chosen)
        return after, step.measured.effect

    def _near(self, options: Sequence[_Option], chosen: list[_Option]) -> list[list[_Option]]:
        """List what one more option or two that become one map make of a choice, or of it less one."""
        added = [[option] for option in options]
        added += [[a, b] for a in options for b in options if len(self.groups([a, b])) == 1]
        near = []
        for rest in (chosen, *([o for o in chosen if o is not gone] for gone in chosen)):
            for more in added:
                new = self._replaced([*rest, *more])
                if not dict(more).keys() & dict(rest).keys() and set(more) <= {*new} - {*chosen}:
                    near.append(new)
        return near


def _follows(model: nn.Module, call: str, following: str) -> bool:
    """Whether two modules are neighbours in one Sequential, so that nothing else sees between them."""
    parent = call.rpartition(".")[0]
    if parent != following.rpartition(".")[0] or not isinstance(
        find_module(model, parent)[0], nn.Sequential
    ):
        return False
    order = list(find_module(model, parent)[0]._modules)
    places = [order.index(name.rpartition(".")[2]) for name in (call, following)]
    return places[1] - places[0] == 1


def as_component(
    linear_map: LinearMap, replaces: Sequence[str], axis: int | None, variance: float
) -> LinearComponent:
    """Make a module of a map: two thin layers where they take fewer operations, else one."""
    left, right, bias = linear_map.factors(variance)
    d_in, rank, d_out = left.shape[0], left.shape[1], right.shape[1]
    thin = rank * (d_in + d_out) < d_in * d_out
    # A new layer draws weights before it is given its own.
    with random_states_kept(), torch.device("cpu"):
        module = LinearComponent(d_in, linear_map.shape, rank if thin else None, replaces, axis).double()
    if thin:
        weights = {"0.weight": left.T, "1.weight": right.T, "1.bias": bias}
    else:
        matrix, bias = linear_map.dense()
        weights = {"weight": matrix.T, "bias": bias}
    module.layers.load_state_dict(weights)
    return module


def _measure_of(cost: CostName) -> _Measure:
    """Return what measures the cost that is to be saved."""
    if cost == "seconds":
        return lambda runner, _: _least_seconds(runner)
    if cost in ("flops", "parameters"):
        return lambda _, found: float(getattr(found, cost))
    raise ValueError(f"cost is {cost!r}; choose 'flops', 'parameters' or 'seconds'")


@contextmanager
def _on_one_thread() -> Generator[None, None, None]:
    """Compute on one thread: where cores are busy, several wait for each other longer than they work."""
    threads = torch.get_num_threads()
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if threads > 1:
            torch.set_num_threads(threads)


def _least_seconds(runner: ForwardRunner) -> float:
    with _on_one_thread():
        return min(_seconds(runner) for _ in range(10))


def _seconds(runner: ForwardRunner) -> float:
    start = time.perf_counter()
    runner.run_batch(0)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _compare_times(
    runner: ForwardRunner, swaps: Sequence[LinearComponent]
) -> tuple[tuple[float, float], bool]:
    """Time both networks in turns, so that both see the same machine; see if the new one is slower."""
    if not swaps:
        seconds = _least_seconds(runner)
        return (seconds, seconds), False
    times: list[tuple[float, float]] = []
    with _on_one_thread():
        for count in _PASSES:
            while len(times) < count:
                pair = {}
                # Whichever runs second finds the caches as the first one left them.
                for new in (False, True) if len(times) % 2 == 0 else (True, False):
                    with swapped(runner.model, swaps if new else []):
                        pair[new] = _seconds(runner)
                times.append((pair[False], pair[True]))
            before, after = np.sort(times, axis=0).T
            middle, error = count * _QUANTILE, _ERRORS * math.sqrt(count * _QUANTILE * (1 - _QUANTILE))
            low, high = max(0, math.floor(middle - error)), math.ceil(middle + error)
            slower = after[low] > _SLOWER * before[high]
            if slower or after[high] < _SLOWER * before[low]:
                break
    typical = np.quantile(times, _QUANTILE, axis=0)
    return (float(typical[0]), float(typical[1])), bool(slower)
