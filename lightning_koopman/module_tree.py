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
