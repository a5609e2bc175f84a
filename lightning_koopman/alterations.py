"""Ways to alter a component: its weights, its output, or a linear map in its place."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.capture import INPUT
from lightning_koopman.components import clean_name
from lightning_koopman.linear_map import LinearFit, LinearMap, from_operator
from lightning_koopman.report import CreditReport
from lightning_koopman.runs import Runner, UnitMoments
from lightning_koopman.sites import Alteration, Site, find_module


@contextmanager
def noisy_weights(
    model: nn.Module, calls: Sequence[str], strength: float
) -> Generator[None, None, None]:
    """Add noise to a component's weights, and take it off again.

    Args:
        model: The model.
        calls: Module calls that the component is made of.
        strength: Standard deviation of the noise, as a share of each parameter tensor's own.

    Yields:
        Nothing.
    """
    modules = [find_module(model, call)[0] for call in calls]
    with _restored(modules), torch.no_grad():
        for parameter in {id(p): p for module in modules for p in module.parameters()}.values():
            if parameter.numel() > 1 and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, dtype=torch.float64).to(parameter)
                parameter.add_(strength * parameter.std() * noise)
        yield


@contextmanager
def reinitialised(
    model: nn.Module, calls: Sequence[str], initial: Mapping[str, Tensor] | None
) -> Generator[None, None, None]:
    """Put a component's weights and buffers back to their initialisation, and then restore them.

    Args:
        model: The model.
        calls: Module calls that the component is made of.
        initial: ``state_dict`` of the whole network; ``None`` calls ``reset_parameters``.

    Yields:
        Nothing.

    Raises:
        ValueError: If ``initial`` lacks a tensor, or a module with parameters cannot be reset.
    """
    names = {clean_name(name): module for name, module in model.named_modules()}
    called = list(dict.fromkeys(call.partition("#")[0] for call in calls))
    with _restored([names[name] for name in called]), torch.no_grad():
        for name in called:
            if initial is None:
                for inner, module in names[name].named_modules(prefix=name):
                    _reset(inner, module)
            else:
                _load(name, names[name], {clean_name(k): v for k, v in initial.items()})
        yield


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
        operator = report.operators.get(name)
        sources = regressor_sites(report, name)
        widths = (
            sum(math.prod(shapes[site]) for site in sources),
            math.prod(shapes[sites[name]]),
        )
        if operator is not None and tuple(operator.matrix.shape) == widths:
            maps[name] = from_operator(operator, shapes[sites[name]], len(sources))
        else:
            fits[name] = LinearFit(seed=seed)
    if not fits:
        return maps
    if fit_on is None:
        raise ValueError(
            f"the operators of {list(fits)} act on reduced states or are missing, so they give no whole "
            "tensor; pass fit_batches with data to fit maps on, other than what effects are measured on"
        )

    def update(values: Mapping[Site, Tensor]) -> None:
        for name, fit in fits.items():
            fit.update([values[site] for site in regressor_sites(report, name)], values[sites[name]])

    fit_on.run(sites.values(), update=update)
    return maps | {name: fit.solve() for name, fit in fits.items()}


def regressor_sites(report: CreditReport, name: str) -> list[Site]:
    """Tell where the regressors of a component's operator are read.

    Args:
        report: A report that knows its parts.
        name: The component.

    Returns:
        Sites, the nearest first; only the nearest where the report has no operators.

    Raises:
        ValueError: If the operator's width fits no number of states before it.
    """
    sites = state_sites(report)
    order = list(sites)
    earlier = order[: order.index(name)][::-1]
    if name not in report.operators:
        return [sites[earlier[0]]]
    if name in report.reads:
        return [sites[state] for state in report.reads[name]]
    widths = dict(zip(report.components, report.widths, strict=True))
    widths[order[0]] = report.operators[report.components[0]].matrix.shape[0]
    needed, taken = report.operators[name].matrix.shape[0], 0
    for delay, state in enumerate(earlier, start=1):
        taken += widths[state]
        if taken == needed:
            return [sites[state] for state in earlier[:delay]]
    raise ValueError(
        f"the operator of {name!r} takes {needed} values; the states before it have "
        f"{[widths[state] for state in earlier]}. Measure the report again."
    )


def altered_output(
    kind: str,
    name: str,
    report: CreditReport,
    moments: UnitMoments,
    maps: Mapping[str, LinearMap],
    strength: float,
) -> Alteration:
    """Give what takes the place of a component's output.

    Args:
        kind: ``"linear"``, ``"output_noise"`` or ``"skip"``.
        name: The component.
        report: A report that knows its parts.
        moments: Means, standard deviations and shapes at every state's site.
        maps: What :func:`linear_maps` gave.
        strength: Standard deviation of noise, as a share of each unit's own.

    Returns:
        The alteration.
    """
    sites = state_sites(report)
    if kind == "linear":
        sources = regressor_sites(report, name)
        return lambda _, values: maps[name]([values[site] for site in sources])
    if kind == "output_noise":
        spread = strength * moments.std(sites[name])

        def noisy(output: Tensor, _: Mapping[Site, Tensor]) -> Tensor:
            noise = torch.randn(output.shape, dtype=torch.float64).to(output.device)
            return output + spread.to(output.device) * noise

        return noisy
    order = list(sites)
    before = sites[order[order.index(name) - 1]]
    if moments.shapes[before] == moments.shapes[sites[name]]:
        return lambda _, values: values[before]
    mean = moments.mean(sites[name])
    return lambda output, _: mean.to(output).expand_as(output)


@contextmanager
def _restored(modules: Sequence[nn.Module]) -> Generator[None, None, None]:
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
            for own, entries, values in saved:
                own.clear()
                own.update(entries)
                for key, value in values.items():
                    own[key].copy_(value)


def _reset(name: str, module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset):
        reset()
    elif any(parameter is not None for parameter in module._parameters.values()):
        raise ValueError(
            f"{name!r} ({type(module).__name__}) has parameters but no reset_parameters; pass the "
            "weights it started from with initial=state_dict"
        )


def _load(name: str, module: nn.Module, initial: Mapping[str, Tensor]) -> None:
    for inner, tensor in module.state_dict(keep_vars=True).items():
        key = clean_name(f"{name}.{inner}")
        if key not in initial or initial[key].shape != tensor.shape:
            found = f"shape {tuple(initial[key].shape)}" if key in initial else "nothing"
            raise ValueError(
                f"initial has {found} for {key!r}, which needs shape {tuple(tensor.shape)}; pass the "
                "state_dict of the same network at its initialisation"
            )
        tensor.copy_(initial[key])
