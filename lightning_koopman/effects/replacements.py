"""Common other weights for a network, made by the libraries that people make them with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import ParametrizationList

from lightning_koopman.effects.derived_weights import derived_weights
from lightning_koopman.network.components import clean_name

_MOST_BITS = 8

_WITH_PRODUCTS = (
    *(nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, nn.MultiheadAttention),
    *(nn.RNNBase, nn.RNNCellBase),
)


def quantized_weights(
    model: nn.Module, bits: int, *, group_size: int | None = None
) -> dict[str, Tensor]:
    """Round the weights of linear, convolutional, attention and recurrent layers to a few bits.

    Those are the weight matrices of ``nn.Linear``, ``nn.Bilinear``, convolutions, ``nn.RNN``,
    ``nn.LSTM``, ``nn.GRU`` and their cells, and ``nn.MultiheadAttention``; biases, embeddings and what
    other modules hold stay. Symmetric round-to-nearest to integers with one scale per output channel, or
    per group of ``group_size`` neighbouring inputs of it, by ``torchao``: what weight-only quantisation
    does before any calibration.

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
    """Set the smallest weights of each weight matrix to zero, of those that are rounded by the above.

    By ``torch.nn.utils.prune``, by magnitude within each matrix.

    Args:
        model: The network; it is left alone.
        amount: Share of each matrix's weights, between 0 and 1.

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
    """Find the matrices of layers that multiply by them, also where they are derived from others."""
    for name, module in model.named_modules():
        if not isinstance(module, _WITH_PRODUCTS):
            continue
        derived = derived_weights(module)
        sources = {f"{key}{end}" for key in derived for end in ("_g", "_v", "_orig")}
        for key in dict.fromkeys((*module._parameters, *derived)):
            weight = getattr(module, key, None)
            if key not in sources and "weight" in key and weight is not None and weight.ndim > 1:
                yield clean_name(f"{name}.{key}" if name else key), weight.detach()


def other_matrices(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Find the matrices that modules hold beside those of layers that multiply by them, each once."""
    held = {id(part): part for module in modules for part in module.modules()}.values()
    layers = [part for part in held if isinstance(part, _WITH_PRODUCTS)]
    # What a weight is derived from is in a module of its own, or beside it.
    known = {id(p) for layer in layers for p in layer._parameters.values()}
    lists = [
        part for layer in layers for part in layer.modules() if isinstance(part, ParametrizationList)
    ]
    known |= {id(p) for part in lists for p in part.parameters()}
    found = {id(p): p for part in held for p in part._parameters.values() if p is not None}
    return [p for key, p in found.items() if key not in known and p.ndim > 1 and p.is_floating_point()]
