"""What is read off a module tree: names as the user wrote them, norms, parameters."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.RMSNorm,
)


_WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What wrappers call the module they wrap."""


def clean_name(name: str) -> str:
    """Strip what ``torch.compile``, FSDP and activation checkpointing add to a dotted module name.

    Args:
        name: Key of ``named_modules()``.

    Returns:
        The name the user wrote.

    Example:
        >>> clean_name("net._orig_mod.0")
        'net.0'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def clean_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Go through a model's submodules under the names that the user wrote.

    Args:
        model: Any module.

    Yields:
        Name and module, each module once, without the model itself.
    """
    for name, module in model.named_modules():
        # A wrapper and the module it wraps share one name: the inner one speaks for both.
        if clean_name(name) and unwrapped(module) is module:
            yield clean_name(name), module


def unwrapped(module: nn.Module) -> nn.Module:
    """Find the module that the user wrote inside of wrappers.

    Args:
        module: Any module.

    Returns:
        What ``torch.compile``, FSDP or activation checkpointing wrapped, else the module itself.
    """
    inner = next((part for name, part in module.named_children() if name in _WRAPPED), None)
    return module if inner is None else unwrapped(inner)


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
