"""How far alterations move a component's own output, on the input that it receives unaltered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor

from lightning_koopman.alterations import altered_output, altered_weights
from lightning_koopman.effects import Kind
from lightning_koopman.linear_map import LinearFit, LinearMap, from_operator
from lightning_koopman.report import CreditReport
from lightning_koopman.report_sites import (
    check_samples_first,
    regressor_sites,
    state_sites,
    whole_operator,
)
from lightning_koopman.runs import Runner, UnitMoments, rows_by_sample
from lightning_koopman.sites import Alteration, Site, find_module


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

    Args:
        runner: Runs the model.
        report: What was measured on it.
        kinds: Which alterations.
        initial: ``state_dict`` of the network at its initialisation, for ``reinit``.
        strength: Noise, as a share of the standard deviation.
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
        """Take the states of one batch.

        Args:
            values: Tensors by site.
        """
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
        """Give the standard deviation of output noise.

        Args:
            component: Index of the component.

        Returns:
            One number a value of a sample, in the shape of a sample.
        """
        site = self._sites[self._report.components[component]]
        return self._strength * self._moments.std(site)

    def shifts(
        self, batch: Any, values: Mapping[Site, Tensor], n_samples: int, draws: int
    ) -> list[Shift]:
        """Displace every component's output by every kind, but ``output_noise``.

        Args:
            batch: The batch.
            values: Its states.
            n_samples: Its samples.
            draws: Number of draws of altered weights; each is for a share of the samples.

        Returns:
            The displacements.
        """
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
