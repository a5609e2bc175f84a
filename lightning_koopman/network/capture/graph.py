"""Tells which states each state reads, where the chain ends, and which states stand side by side."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any

from lightning_koopman.network.axes.recorded import Recorded
from lightning_koopman.network.names import is_sum, listed, module_of
from lightning_koopman.network.tensors import varies

_MOST_READ = 6
"""Most states that one step reads; further ones are left out and named."""

_MOST_READ_BY_ENDS = 12
"""The same for a last step that stands for several heads."""


class Graph(dict[str, set[str]]):
    """Of each state, in order of execution, the states that it was computed from."""

    def take_out(self, *names: str) -> None:
        """Take states out; what read one of them reads what that was computed from."""
        for name in names:
            own = self.pop(name)
            for read in self.values():
                if name in read:
                    read.remove(name)
                    read.update(own)

    def without_sums(self) -> Graph:
        """Let what reads sums of states read what these were made of."""
        apart = Graph({name: {*read} for name, read in self.items()})
        apart.take_out(*filter(is_sum, self))
        return apart

    def reached(self, start: Iterable[str]) -> set[str]:
        """Follow what states were computed from, back to the inputs."""
        reached, front = set(), list(start)
        while front:
            name = front.pop()
            if name not in reached:
                reached.add(name)
                front.extend(self[name])
        return reached

    def leading_to(self, ends: Iterable[str]) -> Graph:
        """Keep what leads to some states."""
        reached = self.reached(ends)
        return Graph({name: read for name, read in self.items() if name in reached})


def graph_of(records: Sequence[Recorded], notes: list[str]) -> Graph:
    """Find which states each one was computed from."""
    graph = Graph()
    before = set[str]()
    unknown = []
    for record in records:
        read = before if record.sources is None else record.sources & graph.keys()
        may_be_lost = record.from_float and not (record.is_input or record.is_idle)
        if before and not read and may_be_lost and varies(record.tensor):
            unknown.append(record.name)
            read = before
        graph[record.name] = {*read}
        before = {record.name}
    if unknown:
        notes.append(
            f"where the input of {listed(unknown)} comes from could not be followed; each is taken to "
            "read what ran right before it"
        )
    return graph


def chain_ends(
    records: Sequence[Recorded],
    graph: Graph,
    returned: Mapping[str, frozenset[str]],
    in_losses: frozenset[str],
    in_turns: Set[str] = frozenset(),
) -> list[str]:
    """List the states that no component reads and that what the network returned is made of.

    Losses count, which see heads that are not returned. Where no single call returned, these are all
    that nothing reads. Where trained ones are among them, frozen ones (teachers, perceptual losses,
    metric networks) do not count.
    """
    own = [r for r in records if not r.is_input and r.name not in returned]
    frozen = {r.name for r in own if r.is_frozen}
    reaching = in_losses.union(*returned.values())

    def unread_by(readers: Sequence[Recorded]) -> list[str]:
        read = {name for r in readers for name in graph[r.name]}
        return [r.name for r in own if r.name not in read]

    unread = unread_by(own)
    ends = [name for name in unread if name in reaching]
    if reaching and not ends:
        # All that is returned is read by something; what leads nowhere does not count as reading it.
        used = reaching | {r.name for r in own if r.is_behind}
        live = graph.reached(used & graph.keys())
        ends = [n for n in unread_by([r for r in own if r.name in live]) if n in reaching]
    if not ends:
        return _ends_of_calls([r.name for r in own], frozen, unread, graph)
    ends = [name for name in ends if name not in frozen] or ends
    # What a returned tensor is made of may be no state by itself: a sum of branches is not the branches,
    # nor are samples that one of several experts got.
    further = {r.name for r in records if r.is_further}
    of_one = {
        name
        for name, made_of in returned.items()
        if len(made_of) == 1 and not made_of & in_turns and name not in further
    }
    alone = {name for each in of_one for name in returned[each]}
    mixed = {
        name: made_of & set(ends)
        for name, made_of in returned.items()
        if name not in of_one
        and made_of & set(ends)
        # Ends put together and one of them hold what these ends hold.
        and not (made_of <= set(ends) and made_of & alone)
    }
    covered = {part for parts in mixed.values() for part in parts}
    return [*(name for name in ends if name not in covered), *mixed]


def _ends_of_calls(
    own: Sequence[str], frozen: set[str], unread: Sequence[str], graph: Graph
) -> list[str]:
    """List the ends of a step that calls its parts one by one.

    A frozen part behind a trained one is an end, unless it also runs on what nothing trained gave, as
    perceptual losses do on targets.
    """
    trained = [name for name in own if name not in frozen]
    behind = graph.reached(source for name in trained for source in graph[name])
    fed = {name for name in own if not frozen.issuperset(graph.reached(graph[name]) & set(own))}
    compared = {module_of(name) for name in frozen - fed}
    heads = [n for n in unread if n in frozen & fed and module_of(n) not in compared]
    covered = graph.reached(heads) - set(heads)
    ends = [n for n in own if n in heads or (n in trained and n not in behind)]
    return [name for name in ends if name not in covered] or list(unread)


def in_order(graph: Graph, ends: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Join states that are alike in the graph, and put them so that each reads earlier ones only."""
    readers: dict[str, set[str]] = {name: set() for name in graph}
    depth: dict[str, int] = {}
    for name, read in graph.items():
        depth[name] = 1 + max((depth[source] for source in read), default=-1)
        for source in read:
            readers[source].add(name)
    calls = Counter(module_of(name) for name in graph)
    # What the ends alone read of a module that runs in a loop: an output of each of its steps.
    last = {name for name in graph if readers[name] and readers[name] <= {*ends}}
    steps = {m for m, count in Counter(map(module_of, last)).items() if count > _MOST_READ}

    def joined(*, by_module: bool) -> list[list[str]]:
        alike: dict[Any, list[str]] = {}
        for name, read in graph.items():
            kind: Any = frozenset(readers[name])
            if by_module and calls[module_of(name)] > 1:
                kind = (module_of(name), depth[name])
                if name in last and module_of(name) in steps:
                    kind = (module_of(name), "last")
            kind = name if is_sum(name) else kind
            kind = "input" if not read else "end" if name in ends else kind
            alike.setdefault(kind, []).append(name)
        return list(alike.values())

    order = _sorted(joined(by_module=True), graph) or _sorted(joined(by_module=False), graph)
    assert order is not None, "what the same states read never reads itself"
    return order


def called(group: Sequence[str], ran: Iterable[str], inputs: Collection[str]) -> str:
    """Name a state: ``a+b`` where a few were joined, ``module.*`` where many are all of a module.

    Where many are all calls of one module, they are ``module#*``.
    Many inputs, as the steps of a sequence that one cell takes in turn, are the input.
    """
    if len(group) > 2 and all(name in inputs for name in group):
        return module_of(group[0])
    module = module_of(group[0])
    if len(group) > 2 and {name for name in ran if module_of(name) == module} == set(group):
        return f"{module}#*"
    prefix, dot, _ = group[0].rpartition(".")
    while dot and len(group) > 2:
        if {name for name in ran if name.startswith(f"{prefix}.")} == set(group):
            return f"{prefix}.*"
        prefix, dot, _ = prefix.rpartition(".")
    return "+".join(group)


def _sorted(groups: list[list[str]], graph: Graph) -> tuple[tuple[str, ...], ...] | None:
    """Sort groups by execution, behind all that they read; nothing where they read one another."""
    order: list[tuple[str, ...]] = []
    known: set[str] = set()
    while groups:
        ready = (g for g in groups if all(graph[name] <= known for name in g))
        group = next(ready, None)
        if group is None:
            return None
        groups.remove(group)
        order.append(tuple(group))
        known.update(group)
    return tuple(order)


def links_between(states: Sequence[Sequence[str]], graph: Graph) -> tuple[tuple[int, ...], ...]:
    """Return, for each state but the first, the places of those that it reads, the nearest first."""
    place = {name: i for i, group in enumerate(states) for name in group}
    return tuple(
        tuple(sorted({place[source] for name in group for source in graph[name]}, reverse=True))
        for group in states[1:]
    )


def nearest_links(
    links: Sequence[tuple[int, ...]], n_ends: int, widths: Sequence[int], max_dim: int
) -> tuple[tuple[int, ...], ...]:
    """Keep of many states that a step reads the nearest ones, and those that nothing else would read."""
    most_by_ends = max(_MOST_READ, min(2 * n_ends, _MOST_READ_BY_ENDS))
    cut = [_nearest(read, _MOST_READ, widths, _MOST_READ * max_dim) for read in links[:-1]]
    cut += [_nearest(read, most_by_ends, widths, _MOST_READ * max_dim) for read in links[-1:]]
    known = {p for read in cut for p in read}
    return tuple(
        (*left, *(p for p in read[len(left) :] if p not in known))
        for left, read in zip(cut, links, strict=True)
    )


def _nearest(read: tuple[int, ...], most: int, widths: Sequence[int], wide: int) -> tuple[int, ...]:
    """Keep the nearest states that are read, ``most`` of them, or all that are no wider together."""
    fit = sum(total <= wide for total in itertools.accumulate(widths[p] for p in read))
    return read[: max(most, fit)]


def notes_on(
    states: Sequence[tuple[str, ...]],
    names: Sequence[str],
    links: Sequence[Sequence[int]],
    cut: Sequence[Sequence[int]],
    inputs: Set[str],
) -> list[str]:
    """Tell what was joined, which states are read past others, and which are not read any more."""
    notes = []
    each = zip(names, states, strict=True)
    joined = [name for name, group in each if len(group) > 1 and not inputs >= set(group)]
    if joined:
        notes.append(
            f"components side by side were joined into one state: {listed(joined)}; their credit is "
            "shared"
        )
    skips, beyond = [], []
    for i, (read, left) in enumerate(zip(links, cut, strict=True), start=1):
        further = [p for p in read if p != i - 1]
        kept = [names[p] for p in left if p != i - 1]
        if kept:
            skips.append(f"{names[i]} reads {', '.join(reversed(kept))} too")
        if len(further) > len(kept):
            beyond.append(f"{names[i]} ({len(left)} of {len(read)})")
    if beyond:
        notes.append(
            "of many states, operators read the nearest, and what only the others bring counts as "
            f"unexplained: {listed(beyond)}"
        )
    if skips:
        notes.append(f"the data skips components, and the operators follow it: {listed(skips, '; ')}")
    return notes
