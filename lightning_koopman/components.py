"""Chooses which modules are the network's components."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

Components = str | type[nn.Module] | int
"""A name or glob pattern, a type, or a depth in the module tree."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.RMSNorm,
)


def clean_name(name: str) -> str:
    """Strip what ``torch.compile`` adds to a dotted module name.

    Args:
        name: Key of ``named_modules()``.

    Returns:
        The name the user wrote.

    Example:
        >>> clean_name("net._orig_mod.0")
        'net.0'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def clean_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Go through a model's submodules under the names that the user wrote.

    Args:
        model: Any module.

    Yields:
        Name and module, each module once, without the model itself.
    """
    for name, module in model.named_modules():
        # A compiled submodule and the module it wraps share one name: the inner one speaks for both.
        if clean_name(name) and not hasattr(module, "_orig_mod"):
            yield clean_name(name), module


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
        chosen = dict(_automatic(model))
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
        and (isinstance(module, _NORMS) or not has_parameters(module))
    ]


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a normalisation layer.

    Args:
        module: Any module.

    Returns:
        True for batch, layer, group, instance and RMS normalisation.
    """
    return isinstance(module, _NORMS)


def has_parameters(module: nn.Module) -> bool:
    """Tell whether a module or any part of it has parameters.

    Args:
        module: Any module.

    Returns:
        True if there is at least one.
    """
    return next(module.parameters(), None) is not None


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


def _children(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    return [
        (clean_name(f"{prefix}.{name}" if prefix else name), child)
        for name, child in module.named_children()
        if has_parameters(child)
    ]


def _automatic(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    name, node = "", model
    children = _children(node, name)
    while len(children) == 1:
        name, node = children[0]
        children = _children(node, name)
    if not children:
        if has_parameters(node):
            yield name or type(node).__name__, node
        return
    parts = list(_opened(children, towers=not isinstance(node, _CONTAINERS)))
    # Two towers such as encoder and decoder say little: look one level into them.
    if len(parts) < 3:
        deeper = [inner for part in parts for inner in _open_wrapper(*part)]
        parts = deeper if len(deeper) > len(parts) else parts
    previous_is_leaf = False
    for part_name, module in parts:
        if is_norm(module) and previous_is_leaf:
            continue
        previous_is_leaf = not any(True for _ in module.children())
        yield part_name, module


def _open_wrapper(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    children = _children(module, name)
    while len(children) == 1:
        (name, module) = children[0]
        if not _children(module, name):
            return [(name, module)]
        children = _children(module, name)
    if isinstance(module, _CONTAINERS):
        return list(_opened(children))
    return [(name, module)]


def _opened(
    children: list[tuple[str, nn.Module]], *, towers: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    kinds = [type(child) for _, child in children]
    stages = {type(child) for _, child in children if _is_stage(child)}
    for name, child in children:
        # Members of a list are blocks; two attributes of one type are an encoder and a decoder.
        repeats = kinds.count(type(child)) > (2 if towers else 1)
        opens = type(child) in stages if repeats else _holds_blocks(child)
        if isinstance(child, _CONTAINERS) or opens:
            yield from _opened(_children(child, name))
        else:
            yield name, child


def _holds_blocks(module: nn.Module) -> bool:
    """Tell whether a list of at least two composite modules sits somewhere inside."""
    for part in module.modules():
        if isinstance(part, nn.Sequential | nn.ModuleList):
            composite = [c for c in part.children() if has_parameters(c) and any(c.children())]
            if len(composite) >= 2:
                return True
    return False


def _is_stage(module: nn.Module) -> bool:
    """Tell whether a module is little more than a list of blocks, as stages of vision networks are."""
    # A block has weights in at least two places, unlike the convolutions of an inverted bottleneck; and
    # the list is the module's own, unlike that of a mixture of experts further in.
    everything = sum(p.numel() for p in module.parameters())
    for part in module.children():
        if not isinstance(part, nn.Sequential | nn.ModuleList):
            continue
        blocks = list(part.children())
        alike = len(blocks) > 1 and len({type(block) for block in blocks}) == 1
        if (
            alike
            and not isinstance(blocks[0], _CONTAINERS)
            and all(_weighted_leaves(block) > 1 for block in blocks)
            and 2 * sum(p.numel() for p in part.parameters()) > everything
        ):
            return True
    return False


def _weighted_leaves(module: nn.Module) -> int:
    return sum(
        has_parameters(part) and not is_norm(part) and not any(part.children())
        for part in module.modules()
    )
