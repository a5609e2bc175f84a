"""Searches which components become linear, in which form, for the least cost that a loss admits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lightning_koopman.decisions.linear_maps import Group, Maps
from lightning_koopman.decisions.steps import Cost, Step, cost_of, is_finite, is_within, loss_of
from lightning_koopman.decisions.swaps import swapped
from lightning_koopman.effects.scoring import Measured, Outputs, over_draws
from lightning_koopman.network.runs.forward_runner import ForwardRunner
from lightning_koopman.network.runs.hook_points import find_module

Measure = Callable[[ForwardRunner, Cost], float]


class Option(NamedTuple):
    """A component that may become linear, in one of its forms."""

    name: str
    form: Group


class Search:
    """Takes components one after the other, as long as the loss is admitted."""

    def __init__(
        self,
        runner: ForwardRunner,
        outputs: Outputs,
        maps: Maps,
        max_drop: float,
        measure: Measure,
        budget: float,
        allow_larger: bool,
    ) -> None:
        self._runner, self.outputs, self._maps = runner, outputs, maps
        self._max_drop, self._measure, self._allow_larger = max_drop, measure, allow_larger
        self._whole = cost_of(runner)
        self._cost = measure(runner, self._whole)
        self._enough = budget * self._cost
        self._follows = functools.cache(functools.partial(_follows, runner.model))
        self._tried: dict[frozenset[Option], tuple[Measured, Cost, float]] = {}
        self.chosen: list[Option] = []

    def run(self, calls: Mapping[str, tuple[str, ...]]) -> list[Step]:
        """Return the steps to the cheapest network, whose components are then in ``chosen``."""
        self._order = list(calls)
        forms = {name: self._maps.forms(own, self._allow_larger) for name, own in calls.items()}
        options = [Option(name, form) for name, own in forms.items() for form in own]
        none: list[Option] = []
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

    def groups(self, chosen: Sequence[Option]) -> list[Group]:
        """Find the modules that become one map each; a bare linear layer by itself stays."""
        groups: list[Group] = []
        for _, form in sorted(chosen, key=lambda option: self._order.index(option.name)):
            last = groups[-1] if groups else None
            alike = last is not None and last.axis == form.axis
            if last and alike and self._follows(last.calls[-1], form.calls[0]):
                groups[-1] = Group((*last.calls, *form.calls), form.axis)
            else:
                groups.append(form)
        model = self._runner.model
        return [group for group in groups if not is_layer(model, group.calls, (nn.Linear,))]

    def _replaced(self, chosen: Sequence[Option]) -> list[Option]:
        """Return those that a map takes the place of."""
        calls = {call for group in self.groups(chosen) for call in group.calls}
        return [option for option in chosen if option.form.calls[0] in calls]

    def _try(self, chosen: Sequence[Option]) -> tuple[Step, float]:
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

    def _admitted(self, option: Option, step: Step, after: float, least: float) -> bool:
        """Check whether a step keeps the loss, and makes the network cheaper and nothing larger."""
        bare = not self.groups([option])
        gains = after < least or (after == least and not bare)
        if not gains or self._larger(step.cost):
            gains = self._allow_larger and not bare
        return gains and self._fits(step)

    def _take_least(self, options: Sequence[Option]) -> list[Option]:
        """Take the option that costs the outputs least per cost saved, again and again."""
        chosen: list[Option] = []
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

    def take(self, options: Sequence[Option]) -> list[Option]:
        """Take those options that are admitted, in the given order."""
        chosen: list[Option] = []
        least = self._cost
        for option in options:
            if option.name in dict(chosen) or least <= self._enough:
                continue
            step, after = self._try([*chosen, option])
            if self._admitted(option, step, after, least):
                chosen, least = [*chosen, option], after
        return chosen

    def _exchange(self, options: Sequence[Option], chosen: list[Option]) -> list[Option]:
        """Add options, or take them in place of one, whichever are best, until none are better."""
        while self._worth(chosen)[0] > self._enough:
            fitting = [new for new in self._near(options, chosen) if self._fits(self._try(new)[0])]
            best = min(fitting, key=self._worth, default=chosen)
            if self._worth(best) >= self._worth(chosen):
                break
            chosen = best
        return chosen

    def _saving(self, chosen: list[Option]) -> list[Option]:
        """Leave out what saves nothing: it was taken as it might have become one map with another."""
        for option in chosen:
            rest = [other for other in chosen if other is not option]
            if self._worth(rest)[0] <= self._worth(chosen)[0] and (
                not rest or self._fits(self._try(rest)[0])
            ):
                return self._saving(rest)
        return chosen

    def _worth(self, chosen: Sequence[Option]) -> tuple[float, float]:
        """Return what is to be small: the cost and, of choices that cost as much, the effect."""
        if not chosen:
            return math.inf if self._allow_larger else self._cost, 0.0
        step, after = self._try(chosen)
        return after, step.measured.effect

    def _near(self, options: Sequence[Option], chosen: list[Option]) -> list[list[Option]]:
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


LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_layer(model: nn.Module, calls: Sequence[str], kinds: tuple[type[nn.Module], ...]) -> bool:
    """Check whether calls are those of one layer by itself, of one of some kinds."""
    return len(calls) == 1 and type(find_module(model, calls[0])[0]) in kinds


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
