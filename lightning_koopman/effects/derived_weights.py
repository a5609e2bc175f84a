"""Sets weights, or draws them anew, where they are derived from others that are trained."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


class UnalterableError(ValueError):
    """A component cannot be altered in some way, through no fault of an argument.

    Attributes:
        why: The reason, without what to do about it.
    """

    def __init__(self, why: str, what_to_do: str = "") -> None:
        super().__init__(f"{why}; {what_to_do}" if what_to_do else why)
        self.why = why


_POWER_ITERATIONS = 15
"""As many as torch makes for a new spectral norm."""


_WHAT_TO_PASS = "pass what it is derived from, in a state_dict of this network (initial=, replacements=)"


def derived_weights(part: nn.Module) -> dict[str, Any]:
    """Return what derives weights of a module itself, by the weight's name."""
    found: dict[str, Any] = {}
    if isinstance(part, torch.jit.ScriptModule):
        return found
    parametrizations = part._modules.get("parametrizations")
    if parametrize.is_parametrized(part) and isinstance(parametrizations, nn.ModuleDict):
        found.update(parametrizations.items())
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm):
            found[hook.name] = hook
        elif isinstance(hook, BasePruningMethod):
            found[hook._tensor_name] = hook
    return found


def weight_now(part: nn.Module, key: str) -> Tensor:
    """Return a module's own weight as its next call finds it.

    What a hook derives it from may have changed since the last call, as by a step of an optimizer.
    """
    source = derived_weights(part).get(key)
    by_hook = isinstance(source, WeightNorm | SpectralNorm | BasePruningMethod)
    weight: Tensor = _derived(part, source) if by_hook else getattr(part, key).detach()
    return weight


def reset(part: nn.Module, name: str) -> bool:
    """Draw a module's own weights anew by its ``reset_parameters``; return whether it has one.

    Where weights are derived, a plain copy is drawn anew, and the weights that are trained are set so
    that those of the copy result.
    """
    derived = derived_weights(part)
    target = _plain(part, derived) if derived else part
    drawn = getattr(target, "reset_parameters", None) or getattr(target, "_reset_parameters", None)
    if not callable(drawn):
        return False
    drawn()
    if derived:
        for own, new in ((part._parameters, target._parameters), (part._buffers, target._buffers)):
            for key, tensor in own.items():
                if tensor is not None and (drawn_anew := new.get(key)) is not None:
                    tensor.copy_(drawn_anew)
        for key, source in derived.items():
            _set(part, key, source, getattr(target, key).detach(), f"{name}.{key}")
            _follow(part, source)
    return True


def _plain(part: nn.Module, derived: Mapping[str, Any]) -> nn.Module:
    """Copy a module's own tensors into one of its original class, without what derives weights."""
    plain: nn.Module = object.__new__(parametrize.type_before_parametrizations(part))
    plain.__dict__.update({key: value for key, value in vars(part).items() if key not in derived})
    weights = {key: getattr(part, key) for key in derived}
    own = {key: value for key, value in part._parameters.items() if value is not None}
    originals = {f"{key}{end}" for key in derived for end in ("_g", "_v", "_orig")}
    plain._parameters = {key: None for key in part._parameters if key not in own} | {
        key: nn.Parameter(value.detach().clone(), requires_grad=False)
        for key, value in {**weights, **own}.items()
        if key not in originals
    }
    plain._buffers = {k: None if b is None else b.clone() for k, b in part._buffers.items()}
    plain._modules = {key: child for key, child in part._modules.items() if key != "parametrizations"}
    return plain


def set_derived(part: nn.Module, key: str, source: Any, weight: Tensor, name: str) -> None:
    """Set the weights that one is derived from so that it results; refuse where another one does."""
    # In train mode, estimates would move on.
    with in_mode(part, False):
        before = _derived(part, source)
        _set(part, key, source, weight, name)
        estimate = _estimate(part, key, source)
        if estimate is not None and (found := _derived(part, source)).any():
            # A spectral norm divides by an estimate, which is a multiple of this vector.
            estimate.div_((weight * found).sum() / found.square().sum())
        off, moved = (_derived(part, source) - weight).norm(), (before - weight).norm()
    if off > 0.01 * moved + torch.finfo(weight.dtype).eps ** 0.5 * weight.norm():
        steps = list(source) if isinstance(source, parametrize.ParametrizationList) else [source]
        how = ", ".join(type(step).__name__ for step in steps)
        raise UnalterableError(
            f"{name!r} is derived by {how}, which makes another weight of the one that is asked for",
            _WHAT_TO_PASS,
        )


def _set(part: nn.Module, key: str, source: Any, weight: Tensor, name: str) -> None:
    """Set the weights that one is derived from."""
    if isinstance(source, parametrize.ParametrizationList):
        value: Any = weight
        for step in reversed(list(source)):
            try:
                value = step.right_inverse(value)  # type: ignore[operator]
            except Exception as error:  # other people's code, or none at all
                raise UnalterableError(
                    f"{name!r} is derived by {type(step).__name__}, which cannot be set to another "
                    f"weight ({type(error).__name__}: {error})",
                    _WHAT_TO_PASS,
                ) from error
        if source.is_tensor:
            source.original.copy_(value)
        else:
            for i, tensor in enumerate(value):
                getattr(source, f"original{i}").copy_(tensor)
    elif isinstance(source, WeightNorm):
        getattr(part, f"{key}_g").copy_(torch.norm_except_dim(weight, 2, source.dim))
        getattr(part, f"{key}_v").copy_(weight)
    else:
        getattr(part, f"{key}_orig").copy_(weight)


def _derived(part: nn.Module, source: Any) -> Tensor:
    """Return the weight that results."""
    found: Tensor
    if isinstance(source, BasePruningMethod):
        found = source.apply_mask(part)  # type: ignore[no-untyped-call]
    elif isinstance(source, SpectralNorm):
        found = source.compute_weight(part, do_power_iteration=part.training)
    else:
        found = source.compute_weight(part) if isinstance(source, WeightNorm) else source()
    return found.detach()


def _estimate(part: nn.Module, key: str, source: Any) -> Tensor | None:
    """Find the vector that a spectral norm estimates a norm with."""
    if isinstance(source, SpectralNorm):
        return part.get_buffer(f"{key}_u")
    steps = list(source) if isinstance(source, parametrize.ParametrizationList) else []
    # Of a vector, the norm is not estimated.
    known = len(steps) == 1 and isinstance(steps[0], _SpectralNorm)
    return steps[0]._buffers.get("_u") if known else None


def _follow(part: nn.Module, source: Any) -> None:
    """Let running estimates, as of the largest singular value, follow a weight that was drawn anew."""
    holder = source if isinstance(source, nn.Module) else part
    if any(True for _ in holder.buffers()):
        with in_mode(part, True):
            for _ in range(_POWER_ITERATIONS):
                _derived(part, source)


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Generator[None, None, None]:
    """Put a module and its parts in train or eval mode while the context lasts; no method is called."""
    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    before = [(part, part.training) for part in parts]
    try:
        for part in parts:
            part.training = training
        yield
    finally:
        for part, mode in before:
            part.training = mode
