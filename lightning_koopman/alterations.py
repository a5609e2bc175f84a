"""Ways to alter a component: its weights, its output, or a linear map in its place."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.effects import KINDS
from lightning_koopman.linear_map import LinearMap
from lightning_koopman.module_tree import clean_name
from lightning_koopman.report import CreditReport
from lightning_koopman.report_sites import check_parts, regressor_sites, state_sites
from lightning_koopman.runs import UnitMoments
from lightning_koopman.sites import Alteration, Site, find_module


def check_alterations(
    report: CreditReport,
    kinds: Sequence[str],
    components: Sequence[str] | None,
    strength: float,
    draws: int,
) -> None:
    """Refuse alterations that cannot be carried out, before any work is done.

    Args:
        report: What was measured on the model.
        kinds: Which alterations.
        components: Which components; ``None`` takes all.
        strength: Noise, as a share of the standard deviation.
        draws: Number of draws.

    Raises:
        ValueError: If one is out of range.
    """
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
    """Alter a component's weights while a context lasts.

    Args:
        kind: ``"reinit"`` or ``"weight_noise"``; any other leaves the weights alone.
        model: The model.
        calls: Module calls that the component is made of.
        initial: ``state_dict`` of the whole network, for ``"reinit"``; ``None`` draws anew.
        strength: Standard deviation of noise, as a share of each parameter tensor's own.

    Returns:
        The context.
    """
    if kind == "reinit":
        return reinitialised(model, calls, initial)
    if kind == "weight_noise":
        return noisy_weights(model, calls, strength)
    return nullcontext()


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
        maps: What :func:`~lightning_koopman.report_sites.linear_maps` gave.
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
