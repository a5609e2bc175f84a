"""The modules of a network that hooks hang on: components, and what may become or continue one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from lightning_koopman.network.axes.recorded import Recorded
from lightning_koopman.network.components import (
    automatic_components,
    clean_modules,
    clean_name,
    common_ancestor,
    first_name,
    has_weights,
    in_turns,
    inside_of,
    is_norm,
    n_weights,
    named_components,
    norms_beside,
    of_lists,
    transparent_modules,
    with_output,
)
from lightning_koopman.network.names import module_of


class Chosen:
    """Chooses once, by the module tree alone, which modules may give states.

    Attributes:
        model: The network.
        named: Whether the user named the components, which are then taken to the letter; only an
            automatic choice merges activations.
        components: By name; the first pass adds parts of them that it calls in place of the whole.
        end: Name of the module whose output the chain ends with, if one was named.
        norms: Those of the components that belong to others where they run right behind a layer.
        listed: The norms, by id, that do so behind whole blocks, too.
        inner: Parts of components by name, which count where they are called and these are not; and
            which of these, by id, each is inside of.
        opened: The components, by id, of which parts stand for themselves.
        transparent: Modules that continue a component, as activations do.
        inner_transparent: The same inside of components, with those, by id, that each is inside of.
        tables: Modules that are components where states choose entries of them, as quantisers do.
        ancestor: The innermost module that holds all components, if it is one that can be called.
        names: Of all modules, by id.
    """

    def __init__(self, model: nn.Module, components: Any, output: str | None) -> None:
        self.model, self.named = model, components is not None
        self.components = named_components(model, components)
        self.end = output if output is None else first_name(model, output)
        if self.end is not None:
            self.components = with_output(model, self.components, self.end)
        # Which of them belong to a layer shows in the first pass.
        norms = {} if self.named else norms_beside(model, self.components)
        self.listed = of_lists(model, norms.values())
        self.norms = {name: norm for name, norm in norms.items() if name != self.end}
        self.components |= self.norms
        self.inner = {} if self.named else self._find_inner()
        self.opened: set[int] = set()
        self.inner_transparent = self._find_inner_transparent()
        self.transparent = [] if self.named else transparent_modules(model, self.components)
        self.tables = {} if self.named else self._find_tables()
        self._holders = [*self.components.values(), *self.transparent]
        self.names = {id(module): clean_name(name) for name, module in model.named_modules()}
        self.ancestor = common_ancestor(model, self.components.values())

    def _find_inner(self) -> dict[str, tuple[nn.Module, set[int]]]:
        owners = inside_of(self.components.values())
        names = {id(module): name for name, module in clean_modules(self.model)}
        parts = (part for m in self.components.values() for _, part in automatic_components(m))
        inner = (part for part in parts if id(part) in owners and not is_norm(part))
        return {names[id(part)]: (part, owners[id(part)]) for part in inner}

    def _find_inner_transparent(self) -> list[tuple[nn.Module, set[int]]]:
        owners, parts = inside_of(self.components.values()), dict[int, dict[str, nn.Module]]()
        for name, (part, within) in self.inner.items():
            for owner in within:
                parts.setdefault(owner, {})[name] = part
        found = {
            id(module): (module, owners[id(module)])
            for component in self.components.values()
            if id(component) in parts
            for module in transparent_modules(component, parts[id(component)])
            if not is_norm(module)
        }
        return list(found.values())

    def _find_tables(self) -> dict[str, nn.Module]:
        """List modules without weights that hold tables outside of components, such as codebooks."""
        inside = inside_of(self.components.values()).keys()
        own = {id(module) for module in self.components.values()}
        return {
            name: module
            for name, module in clean_modules(self.model)
            if id(module) not in inside
            and not has_weights(module)
            and own.isdisjoint(map(id, module.modules()))
            and not isinstance(module, ScriptModule)
            and any(buffer.is_floating_point() and buffer.ndim > 1 for buffer in module.buffers())
        }

    @property
    def candidates(self) -> dict[str, nn.Module]:
        """All modules, by name, of which the first pass may make components."""
        parts = {name: part for name, (part, _) in self.inner.items()}
        return {**self.components, **parts, **self.tables}

    @property
    def whole(self) -> dict[str, nn.Module]:
        """Those of the components that are so from the beginning, but for norms."""
        others = {*self.inner, *self.tables, *self.norms}
        return {name: module for name, module in self.components.items() if name not in others}

    def holds(self, module: nn.Module) -> bool:
        """Check whether a module is, or may continue, a component that is known from the beginning."""
        return any(module is own for own in self._holders)

    def takers(self, known: Collection[Any] | None) -> list[nn.Module]:
        """Find the modules outside of components that may take sums of states, or are ``known`` to."""
        if self.ancestor is None:
            return []
        if known is not None:
            return [module for module in self.ancestor.modules() if id(module) in known]
        others = {id(self.ancestor)}
        others |= {id(p) for m in self.components.values() for p in m.modules() if p is not m}
        return [module for module in self.ancestor.modules() if id(module) not in others]

    def open(self, name: str) -> None:
        """Let a part of a component be one."""
        if name not in self.components:
            self.components[name], within = self.inner[name]
            self.opened |= within

    def in_turns(self, records: Iterable[Recorded]) -> frozenset[str]:
        """Find the components that the network sends samples to in turns, by what one pass recorded."""
        ran: dict[str, set[str]] = {}
        moved = set[str]()
        for record in records:
            name = module_of(record.name)
            if name in self.components:
                ran.setdefault(name, set()).update(map(module_of, record.sources or ()))
                moved |= {name} if record.orders else set()
        return in_turns(self.model, self.components, ran, moved)

    def n_weights(
        self, components: Iterable[Iterable[str]], parts: Mapping[str, Iterable[str]]
    ) -> tuple[int, ...]:
        """Count the parameters of components, each given by its calls, which have parts."""
        modules = dict(clean_modules(self.model)) | self.components
        named = [{module_of(p) for c in calls for p in parts.get(c, (c,))} for calls in components]
        return tuple(n_weights(*(modules[n] for n in names if n in modules)) for names in named)

    def homeless(self, parts: Mapping[str, Iterable[str]], silent: Collection[str]) -> dict[str, int]:
        """Count the parameters that are in no component, by name, where components were not named."""
        if self.named:
            return {}
        called = {module_of(call) for calls in parts.values() for call in calls}
        # A norm of what something else reads as well is part of the step of what takes it.
        apart = {id(m) for name, m in self.norms.items() if name not in called and name not in silent}
        holders = [module for module in self._holders if id(module) not in apart]
        held = {id(parameter) for module in holders for parameter in module.parameters()}
        return {
            clean_name(name): 0 if is_lazy(parameter) else parameter.numel()
            for name, parameter in self.model.named_parameters()
            if id(parameter) not in held
        }

    def told(self, silent: Collection[str], used: Collection[str]) -> list[str]:
        """Return what a reader must know of components that ran in no pass, of which some were used."""
        ran = [module for name, module in self.components.items() if name not in silent]
        held = {id(parameter) for module in ran for parameter in module.parameters()}
        unread, read = list[str](), list[str]()
        for name in silent:
            weights = list(self.components[name].parameters())
            # They may be those of a component that ran, as of embeddings that others share.
            if not weights or not held.issuperset(map(id, weights)):
                (read if name in used else unread).append(name)
        notes = []
        if unread:
            notes.append(f"never ran, so left out: {', '.join(map(repr, unread))}")
        if read:
            notes.append(
                "used by their weights alone, or where no call can be recorded, so left out: "
                f"{', '.join(map(repr, read))}"
            )
        return notes
