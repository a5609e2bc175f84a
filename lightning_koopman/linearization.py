"""Turns chosen components of a trained network into linear layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from lightning_koopman.cost import Cost, measure_costs
from lightning_koopman.forward import ForwardFn
from lightning_koopman.isolation import is_compiled, random_states_kept, undisturbed
from lightning_koopman.linear_component import LinearComponent, put_in_place
from lightning_koopman.linear_map import LinearFit, LinearMap
from lightning_koopman.replaceable import check_replaceable, groups_to_replace
from lightning_koopman.report import CreditReport
from lightning_koopman.report_sites import check_parts
from lightning_koopman.runs import Runner
from lightning_koopman.scoring import Metric, Outputs
from lightning_koopman.sites import Site, find_module


def linearize(
    model: nn.Module,
    report: CreditReport,
    components: Sequence[str],
    batches: Iterable[Any],
    *,
    merge: bool = True,
    variance: float = 0.999,
    max_dim: int = 256,
    forward_fn: ForwardFn | None = None,
    seed: int = 0,
) -> nn.Module:
    """Replace components of a trained network by linear layers.

    A component becomes the ridge regression of its own whole output on the leading POD directions of
    its own input, fitted on ``batches``. It is stored as one ``nn.Linear``, or as two with a narrow
    state between them where that takes fewer operations. Activations and normalisations that the report
    counts as part of it go with it.

    Neighbours in one ``nn.Sequential`` become a single map from the first one's input to the last one's
    output. A component that is a bare ``nn.Linear`` stays as it is, unless it is merged.

    Args:
        model: The network that the report was measured on; it is left alone.
        report: Says what the components are made of.
        components: Which components.
        batches: Data to fit on.
        merge: Whether neighbours become one map.
        variance: Share of the predicted variance that a pair of layers keeps.
        max_dim: Most POD directions of an input.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.
        seed: Chooses the folds that the ridge weight is picked on.

    Returns:
        A new network. Its ``state_dict`` is saved as usual, and loaded into another network linearised
        alike; :func:`~lightning_koopman.linear_component.load_linearized` builds one from the original.

    Raises:
        ValueError: If an argument is out of range, no sample arrives, or a component cannot be
            replaced: it runs several times, shares a module, takes several tensors or gives no tensor.
    """
    _check(model, report, components, variance)
    runner = Runner(model, batches, forward_fn)
    if not runner.batches:
        raise ValueError("no sample arrived: the batches were empty")
    groups = groups_to_replace(model, report, components, merge)
    with undisturbed(model):
        check_replaceable([call for group in groups for call in group], runner)
        maps = _fitted(runner, groups, max_dim, seed)
    new = copy.deepcopy(model)
    with random_states_kept():  # new layers draw weights before they are given theirs
        for group, linear_map in zip(groups, maps, strict=True):
            like = next(find_module(model, group[0])[0].parameters(), torch.empty(0))
            put_in_place(new, as_component(linear_map, group, variance).to(like))
    return new


@dataclass(frozen=True, eq=False)
class Linearized:
    """A linearised network, and what that saved and lost.

    Attributes:
        model: The new network.
        components: The components that were replaced.
        metric: Metric before and after, on the data that the components were chosen on; NaN where
            there is none.
        change: Effect on the outputs, as in :class:`~lightning_koopman.interventions.Interventions`.
        before: Cost of the original network.
        after: Cost of the new one.
    """

    model: nn.Module = field(repr=False)
    components: tuple[str, ...]
    metric: tuple[float, float]
    change: float
    before: Cost
    after: Cost

    def __rich__(self) -> Table:
        table = Table(
            title=f"Linear now: {', '.join(self.components) or 'nothing'}",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for name in ("", "before", "after"):
            table.add_column(name, justify="right" if name else "left")
        table.add_row("metric", *(f"{value:.4f}" for value in self.metric))
        table.add_row("parameters", f"{self.before.parameters:,}", f"{self.after.parameters:,}")
        table.add_row("FLOPs a batch", f"{self.before.flops:,}", f"{self.after.flops:,}")
        seconds = (self.before.seconds, self.after.seconds)
        table.add_row("ms a batch", *(f"{1000 * value:.3f}" for value in seconds))
        return table


def linearize_within(
    model: nn.Module,
    report: CreditReport,
    fit_batches: Iterable[Any],
    choose_batches: Iterable[Any],
    *,
    max_drop: float = 0.01,
    metric: Metric | None = None,
    forward_fn: ForwardFn | None = None,
    **options: Any,
) -> Linearized:
    """Replace as many components as keep the metric within a drop.

    Components are tried one after the other, those of least reported nonlinearity first; each is kept
    if the metric of the network with all kept so far stays within the drop.

    Args:
        model: The network that the report was measured on; it is left alone.
        report: The report.
        fit_batches: Data to fit on.
        choose_batches: Other data, to measure the metric on.
        max_drop: Largest drop of the metric. Without a metric, largest relative squared change.
        metric: Called as ``metric(outputs, targets)``, higher is better; ``None`` takes the accuracy
            where targets are class indices.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.
        options: Passed on to :func:`linearize`.

    Returns:
        The new network with its measurements.

    Raises:
        ValueError: As :func:`linearize`, or if ``max_drop`` is negative.
    """
    if not max_drop >= 0:
        raise ValueError(f"max_drop is {max_drop}; it must be 0 or above")
    with random_states_kept(fit_batches):
        fit_on = list(fit_batches)
    runner = Runner(model, choose_batches, forward_fn)
    with undisturbed(model):
        before = Outputs.of(runner.run(), runner.batches, None, metric)
    chosen: list[str] = []
    best, change, after = model, 0.0, before.metric
    for i in np.argsort(report.nonlinearity, kind="stable"):
        tried = [name for name in report.components if name in {*chosen, report.components[i]}]
        candidate = linearize(model, report, tried, fit_on, forward_fn=forward_fn, **options)
        with undisturbed(candidate):
            moved = before.compare(Runner(candidate, runner.batches, forward_fn).run())
        drop = moved.effect if np.isnan(before.metric) else before.metric - moved.metric
        if drop <= max_drop:
            chosen, best, change, after = tried, candidate, moved.effect, moved.metric
    costs = measure_costs([model, best], runner.batches[0], forward_fn=forward_fn)
    return Linearized(best, tuple(chosen), (before.metric, after), change, *costs)


def as_component(linear_map: LinearMap, replaces: Sequence[str], variance: float) -> LinearComponent:
    """Make a module of a map: two thin layers where they take fewer operations, else one.

    Args:
        linear_map: A map from a single tensor, fitted on data.
        replaces: Names of the modules it stands for.
        variance: Share of the predicted variance that two layers keep.

    Returns:
        The module, float64.
    """
    left, right, bias = linear_map.factors(variance)
    d_in, rank, d_out = left.shape[0], left.shape[1], right.shape[1]
    thin = rank * (d_in + d_out) < d_in * d_out
    module = LinearComponent(d_in, linear_map.shape, rank if thin else None, replaces).double()
    if thin:
        weights = {"0.weight": left.T, "1.weight": right.T, "1.bias": bias}
    else:
        matrix, bias = linear_map.dense()
        weights = {"weight": matrix.T, "bias": bias}
    module.layers.load_state_dict(weights)
    return module


def _check(model: nn.Module, report: CreditReport, components: Sequence[str], variance: float) -> None:
    if is_compiled(model):
        raise ValueError("the model went through torch.compile; linearize the module it was made from")
    check_parts(report)
    strangers = [name for name in components if name not in report.components]
    if isinstance(components, str) or strangers:
        raise ValueError(
            f"the report has no components {strangers or components!r}; it has {report.components}"
        )
    if not 0 < variance <= 1:
        raise ValueError(f"variance is {variance}; it must lie above 0 and at most at 1")


def _fitted(runner: Runner, groups: Sequence[Sequence[str]], max_dim: int, seed: int) -> list[LinearMap]:
    ends = [(Site("in", group[0]), Site("out", group[-1])) for group in groups]
    fits = [LinearFit(max_dim, seed=seed) for _ in groups]

    def update(values: Mapping[Site, Tensor]) -> None:
        for (source, target), fit in zip(ends, fits, strict=True):
            fit.update([values[source]], values[target])

    if groups:
        runner.run([site for pair in ends for site in pair], update=update)
    return [fit.solve() for fit in fits]
