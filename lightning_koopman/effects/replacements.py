"""Common other weights for a network, made by the libraries that people make them with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune
from torch.nn.utils.parametrize import ParametrizationList

from lightning_koopman.effects.derived_weights import derived_weights, in_mode, weight_now
from lightning_koopman.network.access.isolation import undisturbed
from lightning_koopman.network.arguments import INTEGER, NUMBER, check_type
from lightning_koopman.network.components import clean_name
from lightning_koopman.network.sharded import is_spread

_MOST_BITS = 8

_WITH_PRODUCTS = (
    *(nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, nn.MultiheadAttention),
    *(nn.RNNBase, nn.RNNCellBase),
)
_TABLES = (nn.Embedding, nn.EmbeddingBag)


def quantized_weights(
    model: nn.Module, bits: int, *, group_size: int | None = None
) -> dict[str, Tensor]:
    """Round the weights of linear, convolutional, attention and recurrent layers to a few bits.

    Those are the weight matrices of ``nn.Linear``, ``nn.Bilinear``, convolutions, ``nn.RNN``,
    ``nn.LSTM``, ``nn.GRU`` and their cells, and ``nn.MultiheadAttention``, and the one matrix of any
    other module that multiplies by it and may add a bias, whichever way round it is stored (``Conv1D``
    of transformers): it is called on a few rows to see that. Biases, embeddings and what other modules
    hold stay. Symmetric round-to-nearest to integers with one scale per output channel, or
    per group of ``group_size`` neighbouring inputs of it, by ``torchao``: what weight-only quantisation
    does before any calibration. All are rounded in single precision, whatever theirs is; those that are
    complex or quantised already stay.

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
    return rounded_weights(model, bits, group_size)


def rounded_weights(
    model: nn.Module, bits: int, group_size: int | None, modules: Iterable[str] = ("",)
) -> dict[str, Tensor]:
    """Round the weights of some modules, by default of all; groups need not divide those of others."""
    check_type(INTEGER, bits=bits)
    if not 2 <= bits <= _MOST_BITS:
        raise ValueError(f"{bits} bits are asked for; weights are rounded to 2 to {_MOST_BITS} bits")
    try:
        from torchao.quantization import quant_primitives as primitives
    except ImportError as error:
        raise ImportError(
            f"quantised weights are made by torchao, which cannot be imported ({error}): "
            "pip install 'lightning-koopman[quantize]'"
        ) from error
    found = {}
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    inside = tuple(f"{module}." if module else "" for module in modules)
    for name, weight, groups_along_first in _weights(model):
        if not name.startswith(inside):
            continue
        turned = _turned(weight, groups_along_first)
        # Half precision would round the scales, and the integers twice.
        rows = turned.flatten(1).float()
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
            whole, block, scale, zero, torch.int8, lowest, highest, output_dtype=torch.float32
        )[:, :size].to(weight.dtype)
        found[name] = _turned_back(again.reshape(turned.shape), groups_along_first)
    return found


def _turned(weight: Tensor, groups: int) -> Tensor:
    """Put outputs along the first axis of a weight that has inputs there, in so many groups, if any."""
    if not groups:
        return weight
    inputs, outputs = weight.shape[:2]
    grouped = weight.reshape(groups, inputs // groups, outputs, *weight.shape[2:])
    return grouped.transpose(1, 2).flatten(0, 1)


def _turned_back(weight: Tensor, groups: int) -> Tensor:
    """Put the inputs of a weight along its first axis again."""
    return _turned(weight, groups).contiguous()


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
    check_type(NUMBER, amount=amount)
    if not 0 <= amount <= 1:
        raise ValueError(f"amount is {amount}; it is the share of weights to prune, between 0 and 1")
    found = {}
    for name, weight, _ in _weights(model):
        layer = nn.Module()
        layer.weight = nn.Parameter(weight.clone())
        prune.L1Unstructured.apply(layer, "weight", amount=float(amount))  # type: ignore[no-untyped-call]
        found[name] = layer.weight.detach()
    return found


def _weights(model: nn.Module) -> list[tuple[str, Tensor, int]]:
    """Find the matrices of layers that multiply by them, and in how many groups inputs come first."""
    # In train mode, what a weight is derived by may change as it is asked for.
    with in_mode(model, False):
        return [
            (clean_name(f"{name}.{key}" if name else key), weight_now(module, key), groups)
            for name, module in model.named_modules()
            for key, groups in _multiplied(module).items()
        ]


def _multiplied(module: nn.Module) -> dict[str, int]:
    """Find a module's own matrices that it multiplies by, also where they are derived from others.

    With each comes in how many groups inputs lie along its first axis, none where outputs do.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    derived = derived_weights(module)
    sources = {f"{key}{end}" for key in derived for end in ("_g", "_v", "_orig")}
    names = [name for name in dict.fromkeys((*module._parameters, *derived)) if name not in sources]
    with in_mode(module, False):
        own = {name: weight for name in names if (weight := getattr(module, name, None)) is not None}
    own = {name: weight for name, weight in own.items() if not is_lazy(weight) and weight.ndim > 1}
    own = {name: weight for name, weight in own.items() if not is_stored_otherwise(weight)}
    own = {name: weight for name, weight in own.items() if not weight.is_complex()}
    if isinstance(module, _WITH_PRODUCTS):
        groups = module.groups if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
        return {name: groups for name in own if "weight" in name}
    if len(own) != 1 or {*module._modules} - {"parametrizations"} or isinstance(module, _TABLES):
        return {}
    ((name, weight),) = own.items()
    which = next((turned for turned in (False, True) if _is_product(module, weight, turned)), None)
    return {} if which is None else {name: int(which)}


def is_stored_otherwise(weight: Tensor) -> bool:
    """Check whether a weight is not stored as the numbers that it stands for, as a quantised one."""
    derived = type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return weight.is_quantized or (derived and not is_spread(weight))


def _is_product(module: nn.Module, weight: Tensor, turned: bool) -> bool:
    """Check on a few rows whether a module does nothing but multiply by a matrix and add a bias."""
    if weight.ndim != 2 or not weight.is_floating_point():
        return False
    matrix = weight.detach() if turned else weight.detach().T
    drawn = torch.randn(4, len(matrix), generator=torch.Generator().manual_seed(0), device="cpu")
    with undisturbed(module):
        try:
            rows = drawn.to(matrix)
            bias = module.forward(torch.zeros_like(rows))
            given, product = module.forward(rows), rows @ matrix
            off, size = (given - bias - product).norm(), torch.maximum(product.norm(), bias.norm())
            near = off <= torch.finfo(weight.dtype).eps ** 0.5 * size
            return given.shape == product.shape and bool(product.any()) and bool(near)
        except Exception:  # other people's code, on rows that it was not made for
            return False


def other_matrices(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Find the matrices that modules hold beside those of layers that multiply by them, each once."""
    held = {id(part): part for module in modules for part in module.modules()}.values()
    layers = [part for part in held if _multiplied(part)]
    # What a weight is derived from is in a module of its own, or beside it.
    known = {id(p) for layer in layers for p in layer._parameters.values()}
    lists = [
        part for layer in layers for part in layer.modules() if isinstance(part, ParametrizationList)
    ]
    known |= {id(p) for part in lists for p in part.parameters()}
    found = {id(p): p for part in held for p in part._parameters.values() if p is not None}
    others = [p for key, p in found.items() if key not in known and p.ndim > 1]
    return [p for p in others if p.is_floating_point() or p.is_complex()]
