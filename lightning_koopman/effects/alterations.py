"""What altering a component means: kinds, hook points, replaced outputs and weights."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_koopman.effects.derived_weights import reset
from lightning_koopman.effects.linear_map import LinearFit, LinearMap
from lightning_koopman.koopman.operator import KoopmanOperator
from lightning_koopman.network.components import clean_name
from lightning_koopman.network.forward_runner import (
    ForwardFn,
    ForwardRunner,
    MeanAndSpread,
    rows_by_sample,
)
from lightning_koopman.network.hook_points import Alteration, HookPoint, find_module
from lightning_koopman.network.rows import INPUT, OUTPUT
from lightning_koopman.report.effects import KINDS, Kind
from lightning_koopman.report.report import CreditReport


def check_components(report: CreditReport, components: Sequence[str] | None) -> None:
    """Refuse components that the report has not, and states that no single module call gives."""
    if not report.parts:
        read = (state for states in report.reads.values() for state in states)
        joined = [state for state in dict.fromkeys((*read, *report.components)) if _is_joined(state)]
        if joined:
            raise ValueError(
                f"the states {joined} were joined from what runs side by side, so no module alone gives "
                "them. Measure a report on components that run one after the other, with "
                "components=[...], or on one of several heads, with output=."
            )
        if report.components[-1] == OUTPUT:
            raise ValueError(
                "the report ends with what the network returns, which no module alone gives (a sum of "
                "branches, a skip around the last layer). Let it end with a module, by output=."
            )
        raise ValueError(
            "the report does not say which modules its components are made of; measure it with "
            "credit_report or the callback"
        )
    strangers = [name for name in components or () if name not in report.components]
    if isinstance(components, str) or strangers:
        raise ValueError(
            f"the report has no components {strangers or components!r}; it has {report.components}"
        )


def _is_joined(state: str) -> bool:
    """Check whether a state's name says that several modules give it."""
    return "+" in state or state.endswith(".*")


class Alterations:
    """Ways to alter the components of a report's network, once :meth:`update` has seen its states.

    Attributes:
        runner: Runs the network.
        points: Where each state is read, in order of execution.
        fits: Maps that are being fitted, by component that they end at.
        maps: Fitted maps, by component; the report's operators go before them.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        report: CreditReport,
        kinds: Sequence[Kind],
        *,
        components: Sequence[str] | None = None,
        initial: Mapping[str, Tensor] | None = None,
        strength: float = 0.3,
        draws: int = 1,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        unknown = [kind for kind in kinds if kind not in KINDS]
        if isinstance(kinds, str) or unknown or not kinds:
            raise ValueError(f"unknown kinds {unknown or kinds!r}; choose from {KINDS}")
        check_components(report, components)
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; it must be a finite number, 0 or above")
        if draws < 1:
            raise ValueError(f"draws is {draws}; at least one is needed")
        self.runner = ForwardRunner(model, batches, forward_fn)
        self._report, self._kinds, self._strength = report, kinds, strength
        self._initial = None if initial is None else {clean_name(k): v for k, v in initial.items()}
        self.points = {name: HookPoint("out", calls[-1]) for name, calls in report.parts.items()}
        first, calls = next(iter(report.parts.items()))
        if first in report.components:
            self.points = {INPUT: HookPoint("in", calls[0])} | self.points
        self._units: dict[HookPoint, MeanAndSpread] = defaultdict(MeanAndSpread)
        self.fits: dict[str, LinearFit] = {}
        self.maps: dict[str, LinearMap] = {}

    def update(self, values: Mapping[HookPoint, Tensor]) -> None:
        """Take the states that one batch has in the network as it is."""
        if {"linear", "output_noise", "skip"} & set(self._kinds):
            n_samples = len(values[self.points[self._report.components[-1]]])
            for name in self._report.components:
                rows_by_sample(values[self.points[name]], n_samples, name)
        for point, value in values.items():
            self._units[point].update(value)

    def update_fits(self, values: Mapping[HookPoint, Tensor]) -> None:
        """Take the states of one batch that maps are fitted to."""
        for name, fit in self.fits.items():
            fit.update([values[point] for point in self.sources(name)], values[self.points[name]])

    def sources(self, name: str) -> list[HookPoint]:
        """Return where the regressors of a component's operator are read."""
        states = self._report.reads.get(name, [self._before(name)])
        return [self.points[state] for state in states]

    def shape(self, point: HookPoint) -> tuple[int, ...]:
        """Return the shape of one sample."""
        return tuple(self._units[point].offset.shape)

    def spread(self, name: str) -> Tensor:
        """Return the standard deviation of a component's output noise."""
        return self._strength * self._units[self.points[name]].std

    def operator(self, name: str) -> KoopmanOperator | None:
        """Return a component's operator where it acts on the tensors as they are.

        The report does not tell in what order the axes of a tensor became a row, so only tensors of one
        axis will do.
        """
        operator = self._report.operators.get(name)
        shapes = [self.shape(point) for point in (*self.sources(name), self.points[name])]
        *widths, width = map(math.prod, shapes)
        if operator is None or tuple(operator.matrix.shape) != (sum(widths), width):
            return None
        return operator if all(sum(size > 1 for size in s) <= 1 for s in shapes) else None

    def draws_nothing(self, kind: Kind) -> bool:
        """Return whether a kind has no random part."""
        return kind in ("linear", "skip") or (kind == "reinit" and self._initial is not None)

    def output(self, kind: Kind, name: str) -> Alteration:
        """Return what takes the place of a component's output."""
        if kind == "linear":
            operator, sources = self.operator(name), self.sources(name)

            def linear(output: Tensor, values: Mapping[HookPoint, Tensor]) -> Tensor:
                inputs = [values[point] for point in sources]
                if operator is None:
                    return self.maps[name](inputs)
                rows = torch.cat([x.reshape(len(x), -1).to(operator.matrix) for x in inputs], dim=1)
                return operator.predict(rows).reshape(output.shape)

            return linear
        if kind == "output_noise":
            spread, generator = self.spread(name), torch.Generator()
            # Draws on its own from here on: what the network itself draws must stay what it was.
            generator.set_state(torch.get_rng_state())

            def noisy(output: Tensor, _: Mapping[HookPoint, Tensor]) -> Tensor:
                noise = torch.randn(output.shape, dtype=torch.float64, generator=generator)
                return output + spread.to(output.device) * noise.to(output.device)

            return noisy
        before, here = self.points[self._before(name)], self.points[name]
        if self.shape(before) == self.shape(here):
            return lambda _, values: values[before]
        mean = self._units[here].mean
        return lambda output, _: mean.to(output).expand_as(output)

    @contextmanager
    def weights(self, kind: Kind, names: Iterable[str]) -> Generator[None, None, None]:
        """Alter components' weights while the context lasts, for the kinds that touch weights."""
        calls = [call for name in names for call in self._report.parts[name]]
        modules = {
            call.partition("#")[0]: find_module(self.runner.model, call)[0]
            for call in calls
            if kind in ("reinit", "weight_noise")
        }
        with _restored(modules.values()), torch.no_grad():
            if kind == "weight_noise":
                for parameter in {id(p): p for m in modules.values() for p in m.parameters()}.values():
                    if parameter.numel() > 1 and parameter.is_floating_point():
                        noise = torch.randn(parameter.shape, dtype=torch.float64).to(parameter)
                        parameter.add_(self._strength * parameter.std() * noise)
            elif kind == "reinit":
                for name, module in modules.items():
                    _reinitialise(name, module, self._initial)
            yield

    def _before(self, name: str) -> str:
        """Return the state before a component's."""
        order = list(self.points)
        return order[order.index(name) - 1]


@contextmanager
def _restored(modules: Iterable[nn.Module]) -> Generator[None, None, None]:
    """Put back every parameter and buffer of some modules, the objects and their values."""
    parts = {id(part): part for module in modules for part in module.modules()}.values()
    saved: list[tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]] = [
        (own, copy.copy(own), {key: t.detach().clone() for key, t in own.items() if t is not None})
        for part in parts
        for own in (part._parameters, part._buffers)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for own, before, values in saved:
                own.clear()
                own.update(before)
                for key, value in values.items():
                    own[key].copy_(value)


def _reinitialise(name: str, module: nn.Module, initial: Mapping[str, Tensor] | None) -> None:
    """Put weights and buffers back to their initialisation, or draw them anew."""
    if initial is None:
        # Each is set by the module whose weights it derives.
        lists = [part for part in module.modules() if isinstance(part, ParametrizationList)]
        deriving = {id(part) for derived in lists for part in derived.modules()}
        for inner, part in module.named_modules(prefix=name):
            if id(part) in deriving or reset(part, inner):
                continue
            if any(parameter is not None for parameter in part._parameters.values()):
                raise ValueError(
                    f"{inner!r} ({type(part).__name__}) has parameters but no reset_parameters; pass "
                    "the weights it started from with initial=state_dict"
                )
        return
    for inner, tensor in module.state_dict(keep_vars=True).items():
        key = clean_name(f"{name}.{inner}")
        if key not in initial or initial[key].shape != tensor.shape:
            found = f"shape {tuple(initial[key].shape)}" if key in initial else "nothing"
            raise ValueError(
                f"initial has {found} for {key!r}, which needs shape {tuple(tensor.shape)}; pass the "
                "state_dict of the same network at its initialisation"
            )
        tensor.copy_(initial[key])
