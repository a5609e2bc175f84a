"""Chooses components where none are named: the module tree as a person would draw it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_koopman.module_tree import clean_name, has_parameters, is_norm, unwrapped

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def automatic_components(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Walk the module tree and choose, as :func:`~lightning_koopman.components.named_components` tells.

    Args:
        model: Any module.

    Yields:
        Name and module, in order of registration; nothing if there are no parameters.
    """
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


def _children(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    return [
        (clean_name(f"{prefix}.{name}" if prefix else name), unwrapped(child))
        for name, child in module.named_children()
        if has_parameters(child)
    ]


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
