"""What altering a component means: kinds, hook points, replaced outputs and weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.effects.linear_map import LinearFit, LinearMap, from_operator
from lightning_koopman.koopman.operator import KoopmanOperator
from lightning_koopman.network.components import clean_name
from lightning_koopman.network.forward_runner import Runner, UnitMoments, rows_by_sample
from lightning_koopman.network.hook_points import Alteration, Site, find_module
from lightning_koopman.network.rows import INPUT
from lightning_koopman.report.effects import KINDS
from lightning_koopman.report.report import CreditReport


def check_parts(report: CreditReport) -> None:
    """Refuse a report whose states are not each given by one module call."""
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
    """Tell where each state is read."""
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
    """Take the report's operators where they act on whole tensors, and fit maps where they do not."""
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
    """
    operator = report.operators.get(name)
    widths = (sum(map(math.prod, sources)), math.prod(target))
    if operator is None or tuple(operator.matrix.shape) != widths:
        return None
    flat = all(sum(size > 1 for size in shape) <= 1 for shape in (*sources, target))
    return operator if flat else None


def regressor_sites(report: CreditReport, name: str) -> list[Site]:
    """Tell where the regressors of a component's operator are read."""
    sites = state_sites(report)
    order = list(sites)
    earlier = order[: order.index(name)][::-1]
    return [sites[state] for state in report.reads.get(name, earlier[:1])]


def check_samples_first(report: CreditReport, values: Mapping[Site, Tensor]) -> None:
    """Refuse states whose first axis does not hold an equal number of entries for each sample."""
    sites = state_sites(report)
    n_samples = len(values[sites[report.components[-1]]])
    for name in report.components:
        rows_by_sample(values[sites[name]], n_samples, name)


def check_alterations(
    report: CreditReport,
    kinds: Sequence[str],
    components: Sequence[str] | None,
    strength: float,
    draws: int,
) -> None:
    """Refuse alterations that cannot be carried out, before any work is done."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if isinstance(kinds, str) or unknown or not kinds:
        raise ValueError(f"unknown kinds {unknown or kinds!r}; choose from {KINDS}")
    check_parts(report)
    strangers = [name for name in components or () if name not in report.components]
    if isinstance(components, str) or strangers:
        raise ValueError(
            f"the report has no components {strangers or components!r}; it has {report.components}"
        )
    if not 0 <= strength < float("inf"):
        raise ValueError(f"strength is {strength}; it must be a finite number, 0 or above")
    if draws < 1:
        raise ValueError(f"draws is {draws}; at least one is needed")


def altered_weights(
    kind: str,
    model: nn.Module,
    calls: Sequence[str],
    initial: Mapping[str, Tensor] | None,
    strength: float,
) -> AbstractContextManager[None]:
    """Alter a component's weights while a context lasts."""
    if kind == "reinit":
        return reinitialised(model, calls, initial)
    if kind == "weight_noise":
        return noisy_weights(model, calls, strength)
    return nullcontext()


@contextmanager
def noisy_weights(
    model: nn.Module, calls: Sequence[str], strength: float
) -> Generator[None, None, None]:
    """Add noise to a component's weights, and take it off again."""
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
    """Put a component's weights and buffers back to their initialisation, and then restore them."""
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


def altered_output(
    kind: str,
    name: str,
    report: CreditReport,
    moments: UnitMoments,
    maps: Mapping[str, LinearMap],
    strength: float,
) -> Alteration:
    """Give what takes the place of a component's output."""
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
