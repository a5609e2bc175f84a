"""Linear maps in place of module calls: which there may be, and fitting them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.decisions.steps import failure_with, look_at
from lightning_koopman.decisions.swaps import LinearComponent, Repeated
from lightning_koopman.effects.linear_map import LinearFit, LinearMap
from lightning_koopman.network.access.hooks import attach_in
from lightning_koopman.network.access.isolation import random_states_kept
from lightning_koopman.network.runs.forward_runner import ForwardRunner
from lightning_koopman.network.runs.hook_points import HookPoint, find_module
from lightning_koopman.report.text import counted

_POSITIONS = 64
"""Positions of a sample that a map of channels is fitted on, at most."""
_LEAST_RANK = 16
"""Maps of whole tensors are not tried where so few directions need more parameters than before."""


@dataclass(frozen=True)
class Group:
    """Module calls that become one map: of whole tensors, or of an axis of channels at each position."""

    calls: tuple[str, ...]
    axis: int | None


class Maps:
    """Linear maps in place of module calls, each fitted when it is first asked for."""

    def __init__(self, runner: ForwardRunner, max_dim: int, variance: float) -> None:
        self._runner, self._max_dim, self._variance = runner, max_dim, variance
        self._swaps: dict[Group, LinearComponent] = {}

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

    def forms(self, calls: tuple[str, ...], everything: bool) -> list[Group]:
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
        whole = [Group(calls, None)] if tried else []
        return [*whole, *(Group(part, axis) for part in alike[:1])]

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

    def swaps(self, groups: Sequence[Group]) -> list[LinearComponent]:
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
