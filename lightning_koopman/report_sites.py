"""Where the states of a report are read in the model, and maps between these tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_koopman.linear_map import LinearFit, LinearMap, from_operator
from lightning_koopman.operator import KoopmanOperator
from lightning_koopman.recorded import INPUT
from lightning_koopman.report import CreditReport
from lightning_koopman.runs import Runner, rows_by_sample
from lightning_koopman.sites import Site


def check_parts(report: CreditReport) -> None:
    """Refuse a report whose states are not each given by one module call.

    Args:
        report: The report.

    Raises:
        ValueError: If components were joined into one state, or no module calls are known.
    """
    if report.parts:
        return
    read = (state for states in report.reads.values() for state in states)
    joined = [state for state in dict.fromkeys((*read, *report.components)) if "+" in state]
    if joined:
        raise ValueError(
            f"the states {joined} were joined from what runs side by side, so no module alone gives "
            "them. Measure a report on components that run one after the other, with components=[...]."
        )
    raise ValueError(
        "the report does not say which modules its components are made of; measure it with "
        "credit_report or the callback"
    )


def state_sites(report: CreditReport) -> dict[str, Site]:
    """Tell where each state is read.

    Args:
        report: A report that knows its parts.

    Returns:
        Sites by state, x_0 first.
    """
    sites = {name: Site("out", calls[-1]) for name, calls in report.parts.items()}
    first = next(iter(report.parts))
    if first in report.components:
        return {INPUT: Site("in", report.parts[first][0])} | sites
    return sites


def linear_maps(
    report: CreditReport,
    components: Sequence[str],
    shapes: Mapping[Site, tuple[int, ...]],
    fit_on: Runner | None,
    *,
    seed: int = 0,
) -> dict[str, LinearMap]:
    """Take the report's operators where they act on whole tensors, and fit maps where they do not.

    Args:
        report: Has the operators.
        components: Which components.
        shapes: Shape of one sample at every site.
        fit_on: Runs the model on data to fit maps on, if there are any.
        seed: Chooses the folds.

    Returns:
        A map a component, from the states its operator takes, the nearest first.

    Raises:
        ValueError: If a map must be fitted and there is no data for it.
    """
    sites = state_sites(report)
    maps: dict[str, LinearMap] = {}
    fits: dict[str, LinearFit] = {}
    for name in components:
        sources = [shapes[site] for site in regressor_sites(report, name)]
        operator = whole_operator(report, name, sources, shapes[sites[name]])
        if operator is None:
            fits[name] = LinearFit(seed=seed)
        else:
            maps[name] = from_operator(operator, shapes[sites[name]], len(sources))
    if not fits:
        return maps
    if fit_on is None:
        raise ValueError(
            f"the operators of {list(fits)} act on reduced states or tensors of several axes, or are "
            "missing, so they give no whole tensor; pass fit_batches with data to fit maps on, other "
            "than what effects are measured on"
        )

    def update(values: Mapping[Site, Tensor]) -> None:
        for name, fit in fits.items():
            fit.update([values[site] for site in regressor_sites(report, name)], values[sites[name]])

    fit_on.run(sites.values(), update=update)
    return maps | {name: fit.solve() for name, fit in fits.items()}


def whole_operator(
    report: CreditReport,
    name: str,
    sources: Sequence[Sequence[int]],
    target: Sequence[int],
) -> KoopmanOperator | None:
    """Give a component's operator where it acts on the tensors as they are.

    The report does not tell in what order the axes of a tensor became a row, so only tensors of one
    axis will do.

    Args:
        report: Has the operators.
        name: The component.
        sources: Shapes of one sample of what the operator takes.
        target: That of what it gives.

    Returns:
        The operator, or ``None``.
    """
    operator = report.operators.get(name)
    widths = (sum(map(math.prod, sources)), math.prod(target))
    if operator is None or tuple(operator.matrix.shape) != widths:
        return None
    flat = all(sum(size > 1 for size in shape) <= 1 for shape in (*sources, target))
    return operator if flat else None


def regressor_sites(report: CreditReport, name: str) -> list[Site]:
    """Tell where the regressors of a component's operator are read.

    Args:
        report: A report that knows its parts.
        name: The component.

    Returns:
        Sites, the nearest first; only the nearest in a report read from JSON.
    """
    sites = state_sites(report)
    order = list(sites)
    earlier = order[: order.index(name)][::-1]
    return [sites[state] for state in report.reads.get(name, earlier[:1])]


def check_samples_first(report: CreditReport, values: Mapping[Site, Tensor]) -> None:
    """Refuse states whose first axis does not hold an equal number of entries for each sample.

    Args:
        report: A report that knows its parts.
        values: The states of one batch, by site.

    Raises:
        ValueError: If one does not.
    """
    sites = state_sites(report)
    n_samples = len(values[sites[report.components[-1]]])
    for name in report.components:
        rows_by_sample(values[sites[name]], n_samples, name)
