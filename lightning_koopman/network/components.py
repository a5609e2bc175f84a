"""Chooses the network parts that count as components."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.swa_utils import AveragedModel

from lightning_koopman.network.arguments import check_type

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

    Example:
        >>> clean_name("net._orig_mod.0")
        'net.0'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def clean_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Go through a model's submodules under the names that the user wrote."""
    for name, module in model.named_modules():
        # A wrapper and the module it wraps share one name: the inner one speaks for both.
        if clean_name(name) and unwrapped(module) is module:
            yield clean_name(name), module


def first_name(model: nn.Module, name: str) -> str:
    """Return the first name of a module that is registered in several places, or the name given."""
    every = {clean_name(n): unwrapped(m) for n, m in model.named_modules(remove_duplicate=False)}
    return next((first for first, m in clean_modules(model) if m is every.get(name)), name)


def unwrapped(module: nn.Module) -> nn.Module:
    """Find the module that the user wrote inside of wrappers."""
    inner = next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
    return module if inner is None else unwrapped(inner)


def is_norm(module: nn.Module) -> bool:
    """Check whether a module is a normalisation layer."""
    return isinstance(module, _NORMS)


def has_parameters(module: nn.Module) -> bool:
    """Check whether a module or any part of it has parameters."""
    return next(module.parameters(), None) is not None


def has_weights(module: nn.Module) -> bool:
    """Check whether a module or any part of it has parameters, or packed weights in their place."""
    return has_parameters(module) or any(map(_is_quantised, module.modules()))


def _is_quantised(module: nn.Module) -> bool:
    """Check whether a module holds quantised weights, which are no parameters."""
    return ".quantized." in f"{type(module).__module__}." and (
        callable(getattr(module, "weight", None)) or hasattr(module, "_all_weight_values")
    )


def n_weights(*modules: nn.Module) -> int:
    """Count the parameters of modules, each once; those of lazy modules do not exist yet."""
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    return sum(p.numel() for p in parameters if not is_lazy(p))


def is_frozen(module: nn.Module, trained: Collection[int] | None = None) -> bool:
    """Check whether a module has parameters, of which none is trained, or is among those that are."""
    return has_parameters(module) and not any(
        p.requires_grad and (trained is None or id(p) in trained) for p in module.parameters()
    )


_UNCALLED = (nn.ModuleList, nn.ModuleDict)
"""Lists and dictionaries of modules are never called themselves."""

_CONTAINERS = (nn.Sequential, *_UNCALLED)


def automatic_components(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Walk the module tree and choose, as :func:`named_components` tells."""
    previous_is_leaf = False
    for name, module in _parts(model):
        if is_norm(module) and previous_is_leaf:
            continue
        previous_is_leaf = is_leaf(module)
        yield name, module


def norms_beside(model: nn.Module, chosen: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """List the norms in no other component.

    Where a norm is registered says nothing about where it runs; the first pass does.
    """
    others = {name: module for name, module in chosen.items() if not is_norm(module)}
    outside = {id(module) for module in transparent_modules(model, others)}
    return {
        name: module
        for name, module in clean_modules(model)
        if id(module) in outside and is_norm(module) and has_weights(module)
    }


def of_lists(model: nn.Module, norms: Iterable[nn.Module]) -> frozenset[int]:
    """Find the norms, by id, that stand in lists beside what they follow: whole blocks, too.

    Others belong to single layers alone.
    """
    named = {id(part) for _, part in _parts(model)}
    return frozenset(map(id, norms)) - named


def is_leaf(module: nn.Module) -> bool:
    """Check whether a module has no parts; those of quantised ones are packed weights."""
    return _is_quantised(module) or not any(True for _ in _own_children(module))


def _own_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Walk through what a module holds, but for what a weight is derived by, which gives no state."""
    for name, child in module.named_children():
        if name != "parametrizations" or not is_parametrized(module):
            yield name, child


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Walk the module tree down to what a person would name."""
    tree = _Tree(model)
    name, node = "", model
    children = tree.children(node, name)
    # A training holds networks side by side, of which some are copies that it does not train.
    copies = _copies(children) if hasattr(model, "training_step") else []
    children = [pair for pair in children if pair not in copies]
    while len(children) == 1:
        name, node = children[0]
        children = tree.children(node, name)
    if not children:
        if has_weights(node):
            yield name or type(node).__name__, node
        yield from copies
        return
    tree.compare(node, but=[copy for _, copy in copies])
    parts = list(tree.opened(children, towers=not isinstance(node, _CONTAINERS)))
    # Two towers such as encoder and decoder say little: look one level into them.
    if len(parts) < 3:
        deeper = [inner for part in parts for inner in tree.open_wrapper(*part)]
        parts = deeper if len(deeper) > len(parts) else parts
    yield from (*parts, *copies)


def _copies(networks: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """List copies of others that are not trained beside them: teachers, targets, averaged weights."""

    def is_trained(module: nn.Module) -> bool:
        return not (is_frozen(module) or isinstance(module, AveragedModel))

    trained = {type(module) for _, module in networks if is_trained(module)}
    return [
        (name, module)
        for name, module in networks
        if not is_trained(module) and not trained.isdisjoint(map(type, (module, *module.children())))
    ]


class _Tree:
    """A module tree: what is in it but once, what repeats, and how far its parts are opened."""

    def __init__(self, model: nn.Module) -> None:
        # The model itself, and what a wrapper around all of it holds, has no name.
        self._names = {id(unwrapped(model)): ""}
        self._names |= {id(module): name for name, module in clean_modules(model)}
        self._alike: dict[type, list[tuple[nn.Module, bool]]] = {}
        self._stages: set[type] = set()

    def children(self, module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
        """Return a module's own parts with weights, under their names in the model.

        A module that is registered in several places, as an encoder beside the whole that it is part of,
        belongs to the first of them.
        """
        # The parts of a scripted module take no hooks.
        if isinstance(module, torch.jit.ScriptModule):
            return []
        named = [
            (clean_name(f"{prefix}.{name}" if prefix else name), unwrapped(child))
            for name, child in _own_children(module)
        ]
        return [(name, child) for name, child in named if self._holds_weights(name, child)]

    def _holds_weights(self, name: str, module: nn.Module) -> bool:
        """Check whether a module, or any part of it that belongs nowhere else, has weights."""
        if self._names.get(id(module)) != name:
            return False
        return any(
            self._names.get(id(part)) == clean_name(inner)
            and (next(part.parameters(recurse=False), None) is not None or _is_quantised(part))
            for inner, part in module.named_modules(prefix=name)
        )

    def compare(self, root: nn.Module, but: Sequence[nn.Module]) -> None:
        """Find what repeats below a module, ``but`` in copies of it."""
        copied = {id(part) for copy in but for part in copy.modules()}
        for parent in (module for module in root.modules() if id(module) not in copied):
            for child in (c for c in parent.children() if id(c) not in copied):
                of_list = isinstance(parent, _CONTAINERS)
                self._alike.setdefault(type(child), []).append((child, of_list))
        self._stages = {
            type(module) for module in root.modules() if module is not root and _is_stage(module)
        }

    def open_wrapper(self, name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """Look into a tower, through wrappers around a single child."""
        children = self.children(module, name)
        while len(children) == 1:
            (name, module) = children[0]
            if not self.children(module, name):
                return [(name, module)]
            children = self.children(module, name)
        if _is_container(module):
            return list(self.opened(children))
        return [(name, module)]

    def opened(
        self, children: list[tuple[str, nn.Module]], *, towers: bool = False
    ) -> Iterator[tuple[str, nn.Module]]:
        """Go through modules, and into those that are lists of what a person would name."""
        kinds = [type(child) for _, child in children]
        for name, child in children:
            # Members of a list are blocks; two attributes of one type are an encoder and a decoder.
            repeats = kinds.count(type(child)) > (2 if towers else 1) or self._is_block(child)
            opens = type(child) in self._stages or (not repeats and _holds_blocks(child))
            inner = self.children(child, name)
            if isinstance(child, torch.jit.ScriptModule):
                yield name, child
            elif isinstance(child, nn.ModuleList) and all(_is_only_norm(part) for _, part in inner):
                # Each belongs to a block in a list beside this one.
                continue
            elif _is_one_layer(child) and not isinstance(child, nn.Sequential):
                # A list is never called itself: its layer stands for it.
                yield inner[-1]
            elif (_is_container(child) and not _is_one_layer(child)) or opens:
                yield from self.opened(inner)
            else:
                yield name, child

    def _is_block(self, module: nn.Module) -> bool:
        """Check whether modules of the same type stand elsewhere, in a list or at least twice."""
        inside = {id(part) for part in module.modules()}
        others = [of_list for other, of_list in self._alike[type(module)] if id(other) not in inside]
        return any(others) or len(others) > 1


def _is_container(module: nn.Module) -> bool:
    """Check whether a module is a container that computes with no weights of its own."""
    own = next(module.parameters(recurse=False), None) is not None
    return isinstance(module, _CONTAINERS) and (_is_list(module) or not own)


def _is_list(module: nn.Module) -> bool:
    """Check whether a module is a list or a dictionary of others, which is never called."""
    return isinstance(module, _UNCALLED) and type(module).forward is nn.Module.forward


def _is_only_norm(module: nn.Module) -> bool:
    """Check whether a module is a normalisation layer, or a wrapper around one."""
    return is_norm(module) or (not is_leaf(module) and all(map(is_norm, module.children())))


def _is_one_layer(module: nn.Module) -> bool:
    """Check whether a container holds one layer behind its norm, as downsampling and transitions do."""
    parts = [part for part in module.children() if has_weights(part)]
    return (
        isinstance(module, nn.Sequential | nn.ModuleList)
        and len(parts) > 1
        and all(is_norm(part) for part in parts[:-1])
        and not is_norm(parts[-1])
        and is_leaf(parts[-1])
    )


def _holds_blocks(module: nn.Module) -> bool:
    """Check whether a list of composite modules sits somewhere inside, or a sequence of at least two."""
    for part in module.modules():
        if isinstance(part, nn.Sequential | nn.ModuleList):
            composite = [c for c in part.children() if has_weights(c) and any(c.children())]
            if len(composite) >= (1 if isinstance(part, nn.ModuleList) else 2):
                return True
    return False


def _is_stage(module: nn.Module) -> bool:
    """Check whether a module is little more than blocks, as stages of vision networks are."""
    if isinstance(module, _CONTAINERS):
        return False
    own = [part for part in module.children() if has_weights(part)]
    if _are_blocks(own) and any(_shape(a) == _shape(b) for a, b in itertools.pairwise(own)):
        return True
    # The list is the module's own, unlike that of a mixture of experts further in.
    return any(
        isinstance(part, nn.Sequential | nn.ModuleList)
        and _are_blocks(list(part.children()))
        and 2 * n_weights(part) > n_weights(module)
        for part in own
    )


def _are_blocks(modules: Sequence[nn.Module]) -> bool:
    """Check whether modules are of one type and have weights in at least two places each."""
    # Unlike the convolutions of an inverted bottleneck.
    alike = len(modules) > 1 and len({type(module) for module in modules}) == 1
    return (
        alike
        and not isinstance(modules[0], _CONTAINERS)
        and all(_weighted_leaves(module) > 1 for module in modules)
    )


def _shape(module: nn.Module) -> list[type]:
    return [type(part) for part in module.modules()]


def _weighted_leaves(module: nn.Module) -> int:
    return sum(
        has_weights(part) and not is_norm(part) and not any(part.children()) for part in module.modules()
    )


Components = str | type[nn.Module] | int
"""A name, a glob pattern or a type, whose outermost matches count, or a depth in the module tree."""


def named_components(
    model: nn.Module, components: Components | Sequence[Components] | None = None
) -> dict[str, nn.Module]:
    """Choose the modules that are reported as components.

    Without ``components``, the module tree is walked as a person would draw it: wrappers around a single
    child are unwrapped; ``Sequential``, ``ModuleList`` and ``ModuleDict`` are opened, unless they
    compute with weights of their own, as are modules that hold a list of blocks; of modules that repeat,
    only stages (little more than a list of blocks) are opened; modules without parameters belong to the
    component before them. Of these, the first pass makes components of those that look entries of a
    table of their own up where states choose them. Norms belong to the layer registered before them, as
    long as no pass shows where they run.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> list(named_components(net))
        ['0', '2']
        >>> list(named_components(net, nn.ReLU))
        ['1']
    """
    modules = dict(clean_modules(model))
    if components is None:
        chosen = dict(automatic_components(model))
        shared = inside_of(chosen.values())
        # What is part of another one too belongs to it.
        chosen = {name: module for name, module in chosen.items() if id(module) not in shared}
    else:
        single = isinstance(components, str | type) or not isinstance(components, Iterable)
        chosen = _matching(model, modules, [components] if single else components)  # type: ignore[arg-type, list-item]
    if components is not None and not chosen:
        raise ValueError("components names nothing; leave it out to choose automatically")
    if not chosen:
        raise ValueError(
            f"found no component in {type(model).__name__}: it has no submodule with parameters. "
            "Name the modules to report with components=[...]."
        )
    if numbered := [name for name in chosen if "#" in name]:
        raise ValueError(
            f"{numbered[0]!r} holds a '#', which tells the calls of one module apart (name#1); rename "
            "the module, or name others with components=[...]"
        )
    # By the modules themselves, for one may be registered in several places.
    names, holders = {id(module): name for name, module in chosen.items()}, inside_of(chosen.values())
    for name, module in chosen.items():
        if id(module) in holders:
            outer = names[next(iter(holders[id(module)]))]
            raise ValueError(
                f"components overlap: {name!r} is part of {outer!r}. Choose one of the two."
            )
    return chosen


def inside_of(modules: Iterable[nn.Module]) -> dict[int, set[int]]:
    """Find what is inside of some modules, and of which of them, by ``id``."""
    found: dict[int, set[int]] = {}
    for module in modules:
        for part in module.modules():
            if part is not module:
                found.setdefault(id(part), set()).add(id(module))
    return found


def transparent_modules(model: nn.Module, chosen: dict[str, nn.Module]) -> list[nn.Module]:
    """List the modules that belong to whichever component runs right before them.

    These are leaves without parameters (activations, dropout, pooling, flatten) and normalisation
    layers outside of every component, whatever these hold that has no parameters.
    """
    inside = {id(part) for module in chosen.values() for part in module.modules()}
    inside |= inside_of(m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)).keys()
    found = []
    for module in model.modules():
        if id(module) in inside or module is model:
            continue
        weighted = [part for part in module.children() if has_weights(part)]
        leaf = isinstance(module, torch.jit.ScriptModule) or is_leaf(module)
        if (is_norm(module) and not weighted) or (leaf and not has_weights(module)):
            found.append(module)
            inside |= inside_of([module]).keys()
    return found


def in_turns(
    model: nn.Module, chosen: Iterable[str], ran: Mapping[str, Collection[str]], moved: Iterable[str]
) -> frozenset[str]:
    """Find components that a network sends samples to in turns, as experts of a mixture.

    They are in members of one list, of which none reads another and some did not run. ``ran`` says what
    each component read that did, and ``moved`` which of them took rows as the network put them.
    """
    modules, found = dict(clean_modules(model)), set[str]()
    for name in moved:
        path = name.split(".")
        for depth in range(1, len(path)):
            holder = ".".join(path[:depth])
            if not isinstance(modules.get(holder), _UNCALLED):
                continue
            members: dict[str, set[str]] = {}
            for other in chosen:
                if other.startswith(f"{holder}."):
                    members.setdefault(other.split(".")[depth], set()).add(other)
            kind = type(modules.get(f"{holder}.{path[depth]}"))
            members = {k: m for k, m in members.items() if type(modules.get(f"{holder}.{k}")) is kind}
            everything = set[str]().union(*members.values())
            apart = all(
                (everything - own).isdisjoint(ran[part])
                for own in members.values()
                for part in own & ran.keys()
            )
            if apart and any(own.isdisjoint(ran) for own in members.values()):
                found |= everything
    return frozenset(found)


def with_output(model: nn.Module, chosen: Mapping[str, nn.Module], output: str) -> dict[str, nn.Module]:
    """Add the module whose output a chain ends with, unless it is, or holds, a component."""
    modules = dict(clean_modules(model))
    if output not in modules:
        raise ValueError(
            f"output is {output!r}, which is no module of {type(model).__name__}. "
            f"It has {', '.join(map(repr, list(modules)[:8]))}."
        )
    for name in chosen:
        if output.startswith(name + "."):
            raise ValueError(
                f"output {output!r} is part of component {name!r}. Name finer components with "
                "components=[...], or a later output."
            )
    covered = any(name == output or name.startswith(output + ".") for name in chosen)
    return dict(chosen) if covered else {**chosen, output: modules[output]}


def common_ancestor(model: nn.Module, chosen: Iterable[nn.Module]) -> nn.Module | None:
    """Find the innermost module that holds all components, if it is one that can be called."""
    wanted = {id(module) for module in chosen}
    ancestor = None
    for module in model.modules():
        inside = {id(part) for part in module.modules() if part is not module}
        if wanted <= inside and not isinstance(module, _UNCALLED):
            ancestor = module
    return ancestor


def around_of(model: nn.Module, ancestor: nn.Module | None) -> list[nn.Module]:
    """Find the modules around another one, or else the model, that can be called."""
    if ancestor is None:
        return [model]
    return [
        module
        for module in model.modules()
        if module is not ancestor
        and any(part is ancestor for part in module.modules())
        and not isinstance(module, _UNCALLED)
    ]


def _matching(
    model: nn.Module, modules: dict[str, nn.Module], wanted: Sequence[Components]
) -> dict[str, nn.Module]:
    found: set[str] = set()
    for item in wanted:
        if isinstance(item, str):
            matches = {first_name(model, item)} & modules.keys()
            matches |= _outermost({n: m for n, m in modules.items() if fnmatchcase(n, item)})
            trouble = f"no module is called {item!r}. {hint(item, modules)}"
        elif isinstance(item, type) and issubclass(item, nn.Module):
            matches = _outermost({n: m for n, m in modules.items() if isinstance(m, item)})
            kinds = sorted({type(module).__name__ for module in modules.values()})
            trouble = f"no module is of type {item.__name__}. The model has {', '.join(kinds)}."
        elif isinstance(item, int) and not isinstance(item, bool):
            matches = _at_depth(modules, item)
            trouble = f"depth is {item}; the model's own children are at depth 1."
            if item > 0 and not any(map(has_parameters, modules.values())):
                trouble = (
                    f"depth is {item}, but a depth takes modules with parameters, and "
                    f"{type(model).__name__} has none, as quantised models. Name modules with "
                    "components=[...]."
                )
        else:
            raise TypeError(
                f"components holds {item!r}; give names, glob patterns, types of nn.Module, or a depth"
            )
        if not matches:
            raise ValueError(trouble)
        found |= matches
    return {name: module for name, module in modules.items() if name in found}


def _outermost(found: dict[str, nn.Module]) -> set[str]:
    """Leave out lists that hold others, for they are never called, and what is part of others."""
    called = {name: m for name, m in found.items() if not _is_list(m)} or found
    inside = inside_of(called.values())
    return {name for name, module in called.items() if id(module) not in inside}


def _at_depth(modules: dict[str, nn.Module], depth: int) -> set[str]:
    """Choose the modules with parameters at a depth, and above it those that have no further parts."""
    chosen = set()
    for name, module in modules.items():
        level, parent = name.count(".") + 1, modules.get(name.rpartition(".")[0])
        if has_parameters(module) and (
            (level == depth and not isinstance(module, _UNCALLED))
            or (level < depth and is_leaf(module))
            or (level == depth + 1 and isinstance(parent, _UNCALLED))
        ):
            chosen.add(name)
    return chosen


def hint(pattern: str, modules: Collection[str]) -> str:
    """Return what a pattern that matches nothing may have meant."""
    close = difflib.get_close_matches(pattern, modules, n=3, cutoff=0.4)
    if close:
        return f"Close matches: {', '.join(map(repr, close))}."
    return f"The model has {', '.join(map(repr, list(modules)[:8]))}."


def matching(names: Iterable[str], components: str | Collection[str]) -> tuple[set[str], list[str]]:
    """Return which names are meant by names or glob patterns, of which one may come alone.

    The second that comes back are those that match none.

    Example:
        >>> matching(["a.0", "a.1", "b"], ["a.*", "c"])[1]
        ['c']
    """
    given = [components] if isinstance(components, str) else components
    check_type((Collection, "names or glob patterns of components"), components=given)
    check_type((str, "a name or glob pattern"), **{f"components[{i}]": p for i, p in enumerate(given)})
    if not given:
        raise ValueError("components names nothing; leave it out to choose automatically")
    found = {p: {name for name in names if name == p or fnmatchcase(name, p)} for p in given}
    return set().union(*found.values()), [p for p, meant in found.items() if not meant]
