"""Common other weights for a network, made by the libraries that people make them with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_koopman.network.components import clean_name

_MOST_BITS = 8


def quantized_weights(
    model: nn.Module, bits: int, *, group_size: int | None = None
) -> dict[str, Tensor]:
    """Round the weights of linear and convolutional layers to integers of a few bits.

    Symmetric round-to-nearest with one scale per output channel, or per group of ``group_size``
    neighbouring inputs of it, by ``torchao``: what weight-only quantisation does before any calibration.

    Args:
        model: The network; it is left alone.
        bits: Number of bits, 2 to 8.
        group_size: Inputs that share a scale; ``None`` takes all of an output channel.

    Returns:
        By name in ``model.state_dict()``, the weights that the integers stand for; for
        ``component_effects(replacements=...)``.

    Raises:
        ValueError: If the bits are out of range, or a layer's inputs do not divide into the groups.
        ImportError: If ``torchao`` is missing.
    """
    if not 2 <= bits <= _MOST_BITS:
        raise ValueError(f"bits is {bits}; weights are rounded to 2 to {_MOST_BITS} bits")
    try:
        from torchao.quantization import quant_primitives as primitives
    except ImportError as error:
        raise ImportError(
            f"quantised weights are made by torchao, which cannot be imported ({error}): "
            "pip install 'lightning-koopman[quantize]'"
        ) from error
    found = {}
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for name, weight in _weights(model):
        rows = weight.flatten(1)
        size = rows.shape[1] if group_size is None else group_size
        if size < 1 or rows.shape[1] % size:
            raise ValueError(
                f"group_size is {group_size}, but each output of {name!r} has {rows.shape[1]} inputs; "
                "choose a divisor of that, or None"
            )
        groups = rows.reshape(-1, size)
        if size == 1:
            # One value a group is taken for one group of all; a zero beside it leaves its scale alone.
            groups = nn.functional.pad(groups, (0, 1))
        block = (1, groups.shape[1])
        scale, zero = primitives.choose_qparams_affine(
            groups, primitives.MappingType.SYMMETRIC, block, torch.int8, lowest, highest
        )
        whole = primitives.quantize_affine(groups, block, scale, zero, torch.int8, lowest, highest)
        again = primitives.dequantize_affine(
            whole, block, scale, zero, torch.int8, lowest, highest, output_dtype=weight.dtype
        )[:, :size]
        found[name] = again.reshape(weight.shape)
    return found


def pruned_weights(model: nn.Module, amount: float) -> dict[str, Tensor]:
    """Set the smallest weights of each linear and convolutional layer to zero.

    By ``torch.nn.utils.prune``, by magnitude within each layer.

    Args:
        model: The network; it is left alone.
        amount: Share of each layer's weights, between 0 and 1.

    Returns:
        By name in ``model.state_dict()``, the pruned weights; for
        ``component_effects(replacements=...)``.

    Raises:
        ValueError: If the amount is no such share.

    Example:
        >>> layer = nn.Sequential(nn.Linear(4, 2, bias=False))
        >>> int((pruned_weights(layer, 0.5)["0.weight"] == 0).sum())
        4
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount is {amount}; it is the share of weights to prune, between 0 and 1")
    found = {}
    for name, weight in _weights(model):
        layer = nn.Module()
        layer.weight = nn.Parameter(weight.clone())
        prune.L1Unstructured.apply(layer, "weight", amount=float(amount))  # type: ignore[no-untyped-call]
        found[name] = layer.weight.detach()
    return found


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Find the weights of linear and convolutional layers, also where they are derived from others."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            yield clean_name(f"{name}.weight" if name else "weight"), module.weight.detach()
