"""Replaces weights of components while a context lasts, by others, by new draws or by noise on them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_koopman.effects.derived_weights import (
    UnalterableError,
    derived_weights,
    reset,
    set_derived,
)
from lightning_koopman.network.access.isolation import is_expanded, random_states_kept
from lightning_koopman.network.access.signals import signals_wait
from lightning_koopman.network.components import clean_name
from lightning_koopman.network.names import module_of
from lightning_koopman.network.runs.hook_points import find_module
from lightning_koopman.network.tensors import is_underived

Weights = Mapping[str, Tensor]


class AlteredWeights:
    """Ways to alter the weights of the components of a network."""

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[str, Sequence[str]],
        replacements: Mapping[str, Weights],
        initial: Weights | None,
        strength: float,
    ) -> None:
        self._model, self._parts, self._strength = model, parts, strength
        self._initial = None if initial is None else _cleaned(initial)
        self._replacements = {kind: _cleaned(weights) for kind, weights in replacements.items()}
        for kind, weights in self._replacements.items():
            _check_names(kind, weights, model)
            self._replacements[kind] = _under_all_names(weights, model)

    def altered_by(self, kind: str) -> bool:
        """Return whether a kind alters weights, not outputs."""
        return kind in ("reinit", "weight_noise") or kind in self._replacements

    def draws(self, kind: str) -> bool:
        """Return whether a kind draws random weights."""
        return kind == "weight_noise" or (kind == "reinit" and self._initial is None)

    @contextmanager
    def altered(self, kind: str, names: Iterable[str]) -> Generator[None, None, None]:
        """Alter components' weights while the context lasts, for the kinds that touch weights."""
        calls = [call for name in names for call in self._parts[name] if self.altered_by(kind)]
        modules = {module_of(call): find_module(self._model, call)[0] for call in calls}
        with _restored(modules.values()), torch.no_grad():
            try:
                self._set_weights(kind, modules)
            except Exception as error:
                found = {name: _of_other_classes([module]) for name, module in modules.items()}
                if isinstance(error, ValueError) or not any(found.values()):
                    raise
                kinds = {type(weight).__name__: None for own in found.values() for weight in own}
                named = ", ".join(repr(name) for name, own in found.items() if own)
                raise UnalterableError(
                    f"{named} holds weights of the class {', '.join(kinds)}, which cannot be altered so "
                    f"({type(error).__name__})",
                    "ask for it before weights are made such, as by quantising, or leave the kind out",
                ) from error
            yield

    def _set_weights(self, kind: str, modules: Mapping[str, nn.Module]) -> None:
        """Alter the weights of some modules, by name."""
        if kind == "weight_noise":
            for parameter in {id(p): p for m in modules.values() for p in m.parameters()}.values():
                is_complex = parameter.is_complex()
                if parameter.numel() > 1 and (parameter.is_floating_point() or is_complex):
                    dtype = torch.complex128 if is_complex else torch.float64
                    noise = torch.randn(parameter.shape, dtype=dtype, device="cpu").to(parameter)
                    parameter.add_(self._strength * parameter.std() * noise)
        for name, module in modules.items():
            if kind in self._replacements:
                _replace(name, module, self._replacements[kind], kind)
            elif kind == "reinit" and self._initial is not None:
                _replace(name, module, self._initial, "initial", complete=True)
            elif kind == "reinit":
                _draw_anew(name, module)

    def unsettable(self, kinds: Iterable[str]) -> dict[tuple[str, str], UnalterableError]:
        """Find the components whose weights cannot be set as some kind asks, by kind and component."""
        found = {}
        for kind in filter(self.altered_by, kinds):
            for name in self._parts:
                held = (find_module(self._model, call)[0] for call in self._parts[name])
                if kind == "weight_noise" and not _of_other_classes(held):
                    continue
                try:
                    with random_states_kept(), self.altered(kind, [name]):
                        pass
                except UnalterableError as error:
                    found[kind, name] = error
        return found

    def sharing(self) -> list[list[int]]:
        """Group components that hold weights in common, directly or through others."""
        groups: list[tuple[set[int], list[int]]] = []
        for i, name in enumerate(self._parts):
            modules = [find_module(self._model, call)[0] for call in self._parts[name]]
            own = {id(t) for m in modules for t in (*m.parameters(), *m.buffers())}
            apart = [group for group in groups if not group[0] & own]
            joined = [group for group in groups if group[0] & own]
            members = sorted([i, *(j for _, group in joined for j in group)])
            groups = [*apart, (own.union(*(ids for ids, _ in joined)), members)]
        return [members for _, members in groups]


@contextmanager
def _restored(modules: Iterable[nn.Module]) -> Generator[None, None, None]:
    """Put back every parameter and buffer of some modules, the objects and their values."""
    parts = {id(part): part for module in modules for part in module.modules()}.values()
    saved: list[tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]] = [
        (own, copy.copy(own), {key: t.detach().clone() for key, t in own.items() if t is not None})
        for part in parts
        for own in (part._parameters, part._buffers)
    ]
    held = [own[key] for own, _, values in saved for key in values]
    expanded = [(tensor, tensor.data) for tensor in held if is_expanded(tensor)]
    with signals_wait():
        try:
            for tensor, data in expanded:
                tensor.data = data.clone()
            yield
        finally:
            with torch.no_grad():
                for own, before, values in saved:
                    # Those of a scripted module stay the objects that they are.
                    if isinstance(own, dict):
                        own.clear()
                        own.update(before)
                    for key, value in values.items():
                        own[key].copy_(value)
                for tensor, data in expanded:
                    tensor.data = data


def _cleaned(weights: Weights) -> dict[str, Tensor]:
    return {clean_name(name): tensor for name, tensor in weights.items()}


def _held_by(module: nn.Module, name: str = "") -> dict[str, Tensor]:
    """Return a module's parameters and buffers by name, also those that its state_dict does not show."""
    own = (module.named_parameters, module.named_buffers)
    return _cleaned(dict(itertools.chain(*(of(prefix=name, remove_duplicate=False) for of in own))))


def _check_names(kind: str, weights: Weights, model: nn.Module) -> None:
    """Refuse weights under names that the network does not have."""
    known = {*_cleaned(model.state_dict()), *_held_by(model)}
    for name, part in model.named_modules():
        known |= {clean_name(f"{name}.{key}" if name else key) for key in derived_weights(part)}
    if strangers := [name for name in weights if name not in known]:
        raise ValueError(
            f"the replacement {kind!r} holds {strangers[0]!r}, which {type(model).__name__} does not; "
            "pass a state_dict of the same network"
        )


def _under_all_names(weights: Weights, model: nn.Module) -> dict[str, Tensor]:
    """Give weights of modules that are registered at several places under the names of all of them."""
    places: dict[int, list[str]] = {}
    for name, part in model.named_modules(remove_duplicate=False):
        places.setdefault(id(part), []).append(clean_name(f"{name}." if name else ""))
    found = dict(weights)
    for names in (names for names in places.values() if len(names) > 1):
        for key, tensor in weights.items():
            for name in (name for name in names if key.startswith(name)):
                found |= {other + key[len(name) :]: tensor for other in names} | {key: tensor}
    return {**found, **weights}


def _draw_anew(name: str, module: nn.Module) -> None:
    """Draw a module's weights anew."""
    # Each is set by the module whose weights it derives.
    lists = [part for part in module.modules() if isinstance(part, ParametrizationList)]
    deriving = {id(part) for derived in lists for part in derived.modules()}
    # As they are built: attention has the last word on the layer that it holds.
    for inner, part in reversed([*module.named_modules(prefix=name)]):
        if id(part) in deriving or reset(part, inner):
            continue
        if any(parameter is not None for parameter in part._parameters.values()):
            raise UnalterableError(
                f"{inner!r} ({type(part).__name__}) has parameters but no reset_parameters; pass the "
                "weights it started from with initial=state_dict"
            )


def _replace(
    name: str, module: nn.Module, weights: Weights, argument: str, *, complete: bool = False
) -> None:
    """Put given weights and buffers in a module's place; those that are not given stay."""
    shown = {clean_name(f"{name}.{inner}"): t for inner, t in module.state_dict(keep_vars=True).items()}
    known = _held_by(module, name)
    # A state_dict may show a weight under another name, or not at all.
    held = {id(tensor) for tensor in known.values()}
    known |= {key: tensor for key, tensor in shown.items() if id(tensor) in held}
    for key, tensor in known.items():
        if key in weights or (complete and key in shown):
            _check_shape(key, weights.get(key), tensor.shape, argument)
            given = weights[key]
            tensor.copy_(given if type(given) is type(tensor) else _dense(given))
    for inner, part in module.named_modules(prefix=name):
        for key, source in derived_weights(part).items():
            whole = clean_name(f"{inner}.{key}")
            if whole in weights:
                known[whole] = getattr(part, key).detach()
                _check_shape(whole, weights[whole], known[whole].shape, argument)
                set_derived(part, key, source, _dense(weights[whole]).to(known[whole]), whole)
    others = [key for key in weights if key.startswith(f"{name}.") and key not in known]
    now = _cleaned(module.state_dict(prefix=f"{name}.")) if others else {}
    for key in others:
        if isinstance(weights[key], Tensor) and not _are_equal(now.get(key), weights[key]):
            raise UnalterableError(
                f"{argument} has a tensor for {key!r}, which is made for the state_dict alone, so that "
                "nothing is set by it; pass a state_dict without it"
            )


def _are_equal(one: Tensor | None, other: Tensor) -> bool:
    return isinstance(one, Tensor) and torch.equal(_dense(one), _dense(other).to(_dense(one)))


def _check_shape(key: str, given: Tensor | None, shape: torch.Size, argument: str) -> None:
    if given is None or given.shape != shape:
        found = "nothing" if given is None else f"shape {tuple(given.shape)}"
        raise ValueError(
            f"{argument} has {found} for {key!r}, which needs shape {tuple(shape)}; pass a "
            "state_dict of the same network"
        )


def _of_other_classes(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Find the weights that are of classes derived from torch's tensors, as of quantised ones."""
    return [p for m in modules for p in m.parameters() if not is_underived(p)]


def _dense(tensor: Tensor) -> Tensor:
    """Return the numbers that a quantised tensor stands for."""
    plain = is_underived(tensor) and not tensor.is_quantized
    return tensor if plain else tensor.dequantize()
