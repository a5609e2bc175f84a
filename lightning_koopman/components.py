"""Finds the modules that are the network's components, by name, type, depth or choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_koopman.automatic import automatic_components
from lightning_koopman.module_tree import clean_modules, has_parameters, is_norm

Components = str | type[nn.Module] | int
"""A name or glob pattern, a type, or a depth in the module tree."""


def named_components(
    model: nn.Module, components: Components | Sequence[Components] | None = None
) -> dict[str, nn.Module]:
    """Choose the modules that are reported as components.

    Without ``components``, the module tree is walked as a person would draw it: wrappers around a single
    child are unwrapped; ``Sequential``, ``ModuleList`` and ``ModuleDict`` are opened, as are modules
    that hold a list of blocks; of modules that repeat, only stages (little more than a list of blocks)
    are opened; modules without parameters belong to the component before them.

    Args:
        model: Any module.
        components: Names or glob patterns of ``model.named_modules()``, types of modules, or a depth:
            1 takes the model's own children, 2 theirs where they have any, and so on; ``None`` chooses.

    Returns:
        Modules by name, in order of registration. The order of execution is known only after a
        forward pass.

    Raises:
        ValueError: If a name, type or depth matches no module, if two chosen modules are nested, or if
            the model has no parameters to choose by.
        TypeError: If something else is given.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> list(named_components(net))
        ['0', '2']
        >>> list(named_components(net, nn.ReLU))
        ['1']
    """
    modules = dict(clean_modules(model))
    if components is None:
        chosen = dict(automatic_components(model))
    else:
        single = isinstance(components, str | type | int)
        chosen = _matching(modules, [components] if single else components)  # type: ignore[arg-type, list-item]
    if components is not None and not chosen:
        raise ValueError("components names nothing; leave it out to choose automatically")
    if not chosen:
        raise ValueError(
            f"found no component in {type(model).__name__}: it has no submodule with parameters. "
            "Name the modules to report with components=[...]."
        )
    for inner in chosen:
        outer, dot, _ = inner.rpartition(".")
        while dot and outer not in chosen:
            outer, dot, _ = outer.rpartition(".")
        if dot:
            raise ValueError(
                f"components overlap: {inner!r} is part of {outer!r}. Choose one of the two."
            )
    return chosen


def transparent_modules(model: nn.Module, chosen: dict[str, nn.Module]) -> list[nn.Module]:
    """List the modules that belong to whichever component runs right before them.

    These are leaves without parameters (activations, dropout, pooling, flatten) and normalisation
    layers outside of every component.

    Args:
        model: The module that the components were chosen from.
        chosen: The result of :func:`named_components`.

    Returns:
        Modules, in order of registration.
    """
    inside = {id(part) for module in chosen.values() for part in module.modules()}
    return [
        module
        for module in model.modules()
        if id(module) not in inside
        and module is not model
        and not any(True for _ in module.children())
        and (is_norm(module) or not has_parameters(module))
    ]


def with_output(model: nn.Module, chosen: Mapping[str, nn.Module], output: str) -> dict[str, nn.Module]:
    """Add the module whose output a chain ends with, unless it is, or holds, a component.

    Args:
        model: The module that the components were chosen from.
        chosen: The result of :func:`named_components`.
        output: Name of the module.

    Returns:
        The components.

    Raises:
        ValueError: If there is no such module, or it is part of a component.
    """
    modules = dict(clean_modules(model))
    if output not in modules:
        raise ValueError(
            f"output is {output!r}, which is no module of {type(model).__name__}. "
            f"It has {', '.join(map(repr, list(modules)[:8]))}."
        )
    for name in chosen:
        if output.startswith(name + "."):
            raise ValueError(
                f"output {output!r} is part of component {name!r}. Name finer components with "
                "components=[...], or a later output."
            )
    covered = any(name == output or name.startswith(output + ".") for name in chosen)
    return dict(chosen) if covered else {**chosen, output: modules[output]}


def common_ancestor(model: nn.Module, chosen: Iterable[nn.Module]) -> nn.Module | None:
    """Find the innermost module that holds all components, if it is one that can be called.

    Args:
        model: The module that the components were chosen from.
        chosen: The components.

    Returns:
        The module.
    """
    wanted = {id(module) for module in chosen}
    ancestor = None
    for module in model.modules():
        inside = {id(part) for part in module.modules() if part is not module}
        if wanted <= inside and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            ancestor = module
    return ancestor


def _matching(modules: dict[str, nn.Module], wanted: Sequence[Components]) -> dict[str, nn.Module]:
    found: set[str] = set()
    for item in wanted:
        if isinstance(item, str):
            matches = {name for name in modules if name == item or fnmatchcase(name, item)}
            trouble = f"no module is called {item!r}. {_hint(item, modules)}"
        elif isinstance(item, type) and issubclass(item, nn.Module):
            matches = {name for name, module in modules.items() if isinstance(module, item)}
            kinds = sorted({type(module).__name__ for module in modules.values()})
            trouble = f"no module is of type {item.__name__}. The model has {', '.join(kinds)}."
        elif isinstance(item, int) and not isinstance(item, bool):
            matches = _at_depth(modules, item)
            trouble = f"depth is {item}; the model's own children are at depth 1."
        else:
            raise TypeError(
                f"components holds {item!r}; give names, glob patterns, types of nn.Module, or a depth"
            )
        if not matches:
            raise ValueError(trouble)
        found |= matches
    return {name: module for name, module in modules.items() if name in found}


def _at_depth(modules: dict[str, nn.Module], depth: int) -> set[str]:
    """Choose the modules with parameters at a depth, and above it those that have no further parts."""
    chosen = set()
    for name, module in modules.items():
        level = name.count(".") + 1
        # Lists and dictionaries of modules are never called themselves.
        called = not isinstance(module, nn.ModuleList | nn.ModuleDict)
        if has_parameters(module) and (
            (level == depth and called)
            or (level < depth and not any(True for _ in module.children()))
            or (
                level == depth + 1
                and name.rpartition(".")[0] in modules
                and isinstance(modules[name.rpartition(".")[0]], nn.ModuleList | nn.ModuleDict)
            )
        ):
            chosen.add(name)
    return chosen


def _hint(pattern: str, modules: dict[str, nn.Module]) -> str:
    close = difflib.get_close_matches(pattern, modules, n=3, cutoff=0.4)
    if close:
        return f"Close matches: {', '.join(map(repr, close))}."
    return f"The model has {', '.join(map(repr, list(modules)[:8]))}."
