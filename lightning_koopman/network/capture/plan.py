"""Settles, after the first pass, which states make the chain and what each of them reads."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.network.axes.padding import Valid, lengths_of, with_padding, with_places
from lightning_koopman.network.axes.picks import keeping_picked
from lightning_koopman.network.axes.rows import (
    Recorded,
    ReduceOption,
    RowForm,
    batch_size,
    by_sample,
    row_forms,
    rows_given,
    rows_without_samples,
)
from lightning_koopman.network.names import call_of, is_sum, module_of
from lightning_koopman.network.tensors import varies


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """Name the first few of many things."""
    shown = separator.join(items[:6])
    return shown if len(items) <= 6 else f"{shown}{separator}and {len(items) - 6} more"


def sources_of(records: Sequence[Recorded], notes: list[str]) -> dict[str, set[str]]:
    """Find which states each one was computed from."""
    sources: dict[str, set[str]] = {}
    before = set[str]()
    unknown = []
    for record in records:
        read = before if record.sources is None else record.sources & sources.keys()
        may_be_lost = record.from_float and not (record.is_input or record.is_idle)
        if before and not read and may_be_lost and varies(record.tensor):
            unknown.append(record.name)
            read = before
        sources[record.name] = {*read}
        before = {record.name}
    if unknown:
        notes.append(
            f"where the input of {listed(unknown)} comes from could not be followed; each is taken to "
            "read what ran right before it"
        )
    return sources


def chain_ends(
    records: Sequence[Recorded],
    sources: Mapping[str, set[str]],
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
        read = {name for r in readers for name in sources[r.name]}
        return [r.name for r in own if r.name not in read]

    unread = unread_by(own)
    ends = [name for name in unread if name in reaching]
    if reaching and not ends:
        # All that is returned is read by something; what leads nowhere does not count as reading it.
        used = reaching | {r.name for r in own if r.is_behind}
        live = _reached(used & sources.keys(), sources)
        ends = [n for n in unread_by([r for r in own if r.name in live]) if n in reaching]
    if not ends:
        return _ends_of_calls([r.name for r in own], frozen, unread, sources)
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


def by_call(
    records: Sequence[Recorded], returned: Mapping[str, frozenset[str]], in_losses: frozenset[str]
) -> tuple[list[Recorded], dict[str, list[Recorded]], dict[str, frozenset[str]], frozenset[str]]:
    """Let one record stand for each module call, and say which of its tensors make its state.

    These are the ones that are read, or else those that are returned, or else the first.
    """
    calls: dict[str, list[Recorded]] = {}
    for record in records:
        calls.setdefault(call_of(record.name), []).append(record)
    read = frozenset().union(*(record.sources or () for record in records))
    reaching = in_losses.union(*returned.values())
    chosen, tensors = [], {}
    for call, given in calls.items():
        first = next((record for record in given if record.name == call), given[0])
        inside = [r for r in given if r.name in read]
        # Beside ones that others read, those that are returned are weights of attention and the like.
        also = [
            r for r in given if r.name in reaching and r not in inside and (r is first or not inside)
        ]
        inside = sorted(inside + also, key=lambda record: record is not first) or [first]
        tensors[call] = inside
        sources = inside[0].sources
        sources = None if sources is None else frozenset(map(call_of, sources)) - {call}
        chosen.append(replace(inside[0], name=call, sources=sources))
    made_of = {name: frozenset(map(call_of, names)) for name, names in returned.items()}
    # What an input holds and nothing else reads is no state of its own.
    held = frozenset[str]().union(*(r.holds for r in records)) - read - reaching
    chosen = [record for record in chosen if record.name not in held]
    return chosen, tensors, made_of, frozenset(map(call_of, in_losses))


def ends_of(
    records: Sequence[Recorded],
    returned: Mapping[str, frozenset[str]],
    in_losses: frozenset[str],
    batch: Any,
) -> list[str]:
    """List the states that the chain of the components chosen by default would end with."""
    fitting = _with_fitting_ends(records, batch)
    records, _, returned, in_losses = by_call(fitting, returned, in_losses)
    sources, losses = without_sums(sources_of(records, [])), _losses(records, returned, None)
    for name in losses:
        _bypass(name, sources)
    own = [r for r in records if r.name in sources and r.name not in losses]
    return chain_ends(own, sources, returned, in_losses)


def without_sums(sources: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Let what reads sums of states read what these were made of."""
    apart = {name: set(read) for name, read in sources.items()}
    for name in filter(is_sum, sources):
        _bypass(name, apart)
    return apart


def _leave_out_sums(
    records: Sequence[Recorded],
    forms: Mapping[str, RowForm],
    sources: dict[str, set[str]],
    n_samples: int,
) -> None:
    """Take out of the graph sums without a row for each sample, and those that do not vary."""
    for record in records:
        if is_sum(record.name) and record.name in sources:
            rows = by_sample(record.tensor, forms[record.name])
            tells = n_samples == 1 or varies(rows)
            fits = len(rows) == n_samples and tells and not record.strays(forms[record.name])
            if not fits:
                _bypass(record.name, sources)


def _losses(
    records: Sequence[Recorded], returned: Mapping[str, frozenset[str]], end: str | None
) -> list[str]:
    return [r.name for r in records if r.is_loss and r.name != end and r.name not in returned]


def _ends_of_calls(
    own: Sequence[str], frozen: set[str], unread: Sequence[str], sources: Mapping[str, set[str]]
) -> list[str]:
    """List the ends of a step that calls its parts one by one.

    A frozen part behind a trained one is an end, unless it also runs on what nothing trained gave, as
    perceptual losses do on targets.
    """
    trained = [name for name in own if name not in frozen]
    behind = _reached((source for name in trained for source in sources[name]), sources)
    fed = {name for name in own if not frozen.issuperset(_reached(sources[name], sources) & set(own))}
    compared = {module_of(name) for name in frozen - fed}
    heads = [n for n in unread if n in frozen & fed and module_of(n) not in compared]
    covered = _reached(heads, sources) - set(heads)
    ends = [n for n in own if n in heads or (n in trained and n not in behind)]
    return [name for name in ends if name not in covered] or list(unread)


def _reached(start: Iterable[str], sources: Mapping[str, set[str]]) -> set[str]:
    """Follow what states were computed from, back to the inputs."""
    reached, front = set(), list(start)
    while front:
        name = front.pop()
        if name not in reached:
            reached.add(name)
            front.extend(sources[name])
    return reached


def leave_out_unfit(
    records: Sequence[Recorded],
    forms: Mapping[str, RowForm],
    sources: dict[str, set[str]],
    kept: Collection[str],
    n_samples: int,
    notes: list[str],
    in_turns: Collection[str],
    is_whole: bool,
) -> list[str]:
    """Take out of the graph what holds no row per sample, or the same for every sample; return these."""
    constant, misfit, alone, swapped = [], [], [], []
    for record in records:
        if record.name in kept or record.name not in sources or callable(forms[record.name].reduce):
            continue
        shape = tuple(record.tensor.shape)
        rows = by_sample(record.tensor, forms[record.name])
        alike = len(rows) == 1 or not varies(rows)
        apart = record.is_idle or alike or shape[0] != n_samples
        # A single sample tells of nothing that it is the same for others, but of what no data reach.
        if record.is_idle if n_samples == 1 else record.ignores_data and apart:
            sources[record.name] = set()
            constant.append(record.name)
        elif not sources[record.name] and n_samples > 1 and alike:
            constant.append(record.name)
        elif len(rows) != n_samples or record.strays(forms[record.name]):
            misfit.append(f"{record.name} {shape}")
        elif is_whole and record.is_swapped(forms[record.name], n_samples):
            swapped.append(record.name)
        elif record.name in in_turns:
            alone.append(record.name)
        else:
            continue
        _bypass(record.name, sources)
    if misfit:
        notes.append(f"without one row for each of {n_samples} samples, so left out: {listed(misfit)}")
    if swapped:
        notes.append(
            "the network puts samples in another order, in a way that is not followed, so left out: "
            f"{listed(swapped)}"
        )
    if alone:
        notes.append(
            "the network sends samples to one part or another, in the first batch all of them to these, "
            f"so left out: {listed(alone)}"
        )
    return constant


def _bypass(name: str, sources: dict[str, set[str]]) -> None:
    """Take a state out of the graph; what read it reads what it was computed from."""
    own = sources.pop(name)
    for read in sources.values():
        if name in read:
            read.remove(name)
            read.update(own)


def _without(
    names: Sequence[str], records: Sequence[Recorded], sources: dict[str, set[str]]
) -> list[Recorded]:
    """Take several states out of the graph, and return the others."""
    for name in names:
        _bypass(name, sources)
    return [record for record in records if record.name not in names]


def leading_to(
    ends: Sequence[str], sources: dict[str, set[str]], inputs: Collection[str], notes: list[str]
) -> dict[str, set[str]]:
    """Keep what leads to the ends of the chain; of the rest, what is no input is told."""
    reached = _reached(ends, sources)
    aside = [n for n in sources if n not in reached and n not in inputs and not is_sum(n)]
    if aside:
        notes.append(
            f"this report is about {listed(ends)}; left out, for nothing leads from there to it: "
            f"{listed(aside)}; choose another output with output="
        )
    return {name: read for name, read in sources.items() if name in reached}


def _passed(
    ends: Sequence[str],
    sources: Mapping[str, set[str]],
    inputs: Collection[str],
    returned: Mapping[str, frozenset[str]],
) -> list[str]:
    """List what the first tensor returned is made of, where these are on the way to the ends alone."""
    # Behind it may be hidden states and caches, which are no outputs.
    first, made_of = next(iter(returned.items()), ("", frozenset[str]()))
    if first in ends or not made_of.isdisjoint(ends):
        return []
    return [name for name in sources if name in made_of and name not in inputs]


def _in_order(sources: Mapping[str, set[str]], ends: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Join states that are alike in the graph, and put them so that each reads earlier ones only."""
    readers: dict[str, set[str]] = {name: set() for name in sources}
    depth: dict[str, int] = {}
    for name, read in sources.items():
        depth[name] = 1 + max((depth[source] for source in read), default=-1)
        for source in read:
            readers[source].add(name)
    calls = Counter(module_of(name) for name in sources)
    # What the ends alone read of a module that runs in a loop: an output of each of its steps.
    last = {name for name in sources if readers[name] and readers[name] <= {*ends}}
    steps = {m for m, count in Counter(map(module_of, last)).items() if count > _MOST_READ}

    def joined(*, by_module: bool) -> list[list[str]]:
        alike: dict[Any, list[str]] = {}
        for name, read in sources.items():
            kind: Any = frozenset(readers[name])
            if by_module and calls[module_of(name)] > 1:
                kind = (module_of(name), depth[name])
                if name in last and module_of(name) in steps:
                    kind = (module_of(name), "last")
            kind = name if is_sum(name) else kind
            kind = "input" if not read else "end" if name in ends else kind
            alike.setdefault(kind, []).append(name)
        return list(alike.values())

    order = _sorted(joined(by_module=True), sources) or _sorted(joined(by_module=False), sources)
    assert order is not None, "what the same states read never reads itself"
    return order


def _called(group: Sequence[str], ran: Iterable[str], inputs: Collection[str]) -> str:
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


def _sorted(
    groups: list[list[str]], sources: Mapping[str, set[str]]
) -> tuple[tuple[str, ...], ...] | None:
    """Sort groups by execution, behind all that they read; nothing where they read one another."""
    order: list[tuple[str, ...]] = []
    known: set[str] = set()
    while groups:
        ready = (g for g in groups if all(sources[name] <= known for name in g))
        group = next(ready, None)
        if group is None:
            return None
        groups.remove(group)
        order.append(tuple(group))
        known.update(group)
    return tuple(order)


_MOST_READ = 6
"""Most states that one step reads; further ones are left out and named."""

_MOST_READ_BY_ENDS = 12
"""The same for a last step that stands for several heads."""


class UnlikeRowsError(ValueError):
    """Says that what stands side by side has not one row per sample each."""


@dataclass(frozen=True)
class Plan:
    """The chain, frozen for all later passes.

    Attributes:
        states: Names recorded for each state x_0 … x_L; more than one are joined side by side.
        names: Names of the states themselves.
        links: For each step i = 1 … L, the states it reads.
        forms: How each recorded tensor becomes rows.
        notes: What a reader of the report must know beside what :attr:`constant` says.
        constant: Names that are left out for they were the same for all samples of the first batch.
        alike: Those of them that data reach.
        places: Those that the network makes of what it holds itself.
        in_turns: Components that get other samples in each batch, or none.
    """

    states: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    links: tuple[tuple[int, ...], ...]
    forms: Mapping[str, RowForm]
    notes: tuple[str, ...]
    constant: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()
    places: frozenset[str] = frozenset()
    in_turns: frozenset[str] = frozenset()

    def told(self, varying: Collection[str] = ()) -> list[str]:
        """Return what a reader must know, if later batches showed that some constants vary."""
        notes = []
        if same := [name for name in self.constant if name not in varying]:
            notes.append(f"the same for every sample, so left out: {listed(same)}")
        if varying:
            notes.append(
                "the same for every sample of the first batch, so left out, though not in later ones: "
                f"{listed([*varying])}; shuffle the data"
            )
        return [*notes, *self.notes]

    @cached_property
    def recorded(self) -> frozenset[str]:
        """Everything recorded that is part of a state."""
        return frozenset(name for group in self.states for name in group)

    @cached_property
    def sums(self) -> dict[str, list[str]]:
        """By sum, what was recorded of all that it reads."""
        return {
            name: [part for p in read for part in self.states[p]]
            for (name, *_), read in zip(self.states[1:], self.links, strict=True)
            if is_sum(name)
        }

    @cached_property
    def _placed(self) -> frozenset[str]:
        return frozenset(name for name in self.recorded if self.forms[name].is_placed)

    def expand(self, rows: dict[str, Any]) -> None:
        """Give what is alike for all samples a row for each, where no padding told them apart."""
        for name in self._placed & rows.keys():
            if len(rows[name]) == 1:
                count = max(len(block) for block in rows.values() if block is not None)
                rows[name] = rows[name].expand(count, -1)

    def check_rows(self, rows: Mapping[str, Tensor]) -> None:
        """Refuse a pass in which what stands side by side has unlike numbers of rows."""
        for group in self.states:
            counts = {part: len(rows[part]) for part in group if part in rows}
            if len(set(counts.values())) > 1:
                raise UnlikeRowsError(
                    f"parallel components gave differing numbers of rows: {counts}. Rows are samples; "
                    "end the chain at one output with output=, or name other components with "
                    "components=[...]."
                )

    def join(self, rows: Mapping[str, Tensor], batch: int = 0) -> dict[str, Tensor]:
        """Put the rows of one pass into the states of the chain."""
        expected = [name for group in self.states for name in group]
        missing = [name for name in expected if name not in rows]
        if missing:
            raise ValueError(
                f"batch {batch} ran the components {listed(list(rows))}, the batches before it "
                f"{listed(expected)} (difference: {listed(missing)}). Choose components that run "
                "equally often in every pass with components=[...]."
            )
        joined = {}
        for name, group in zip(self.names, self.states, strict=True):
            blocks = [rows[part] for part in group]
            joined[name] = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
        return joined


def make_plan(
    records: Sequence[Recorded],
    *,
    batch: Any,
    named: bool,
    max_dim: int,
    returned: Mapping[str, frozenset[str]],
    in_losses: frozenset[str],
    in_turns: frozenset[str],
    valid: Valid,
    end: str | None = None,
    reduce: ReduceOption = "pool",
    varying: Collection[str] = (),
) -> Plan:
    """Settle the chain: states in order of execution, each step linked to what it reads.

    States are joined side by side where the same states read them, as are calls of one module that do
    not depend on one another, all that has no source, and all that the chain ends with.
    """
    notes: list[str] = []
    records = _with_fitting_ends(records, batch)
    given = records
    # What is returned and no state itself is read by whoever gets it.
    read = in_losses.union(*(of for name, of in returned.items() if all(r.name != name for r in given)))
    records, tensors, returned, in_losses = by_call(records, returned, in_losses)
    by_name = {record.name: record for record in records}
    if end is not None and end not in by_name:
        raise ValueError(
            f"the output of interest {end!r} did not run in the forward pass; what ran is "
            f"{list(by_name)}"
        )
    records = _ignoring(records)
    placed = with_places(records, valid, varying)
    records = [placed.get(record.name, record) for record in records]
    beside = [r for inside in tensors.values() for r in inside if r.name not in by_name]
    forms = row_forms([*records, *beside], batch, reduce, max_dim)
    forms = with_padding(forms, [placed.get(record.name, record) for record in given], valid, batch)
    placed = {name: record for name, record in placed.items() if forms[name].padding is not None}
    forms |= {name: replace(forms[name], is_placed=True) for name in placed}
    forms = keeping_picked(forms, given, read, max_dim, {**valid, **lengths_of(given)})
    # Counted as for the forms: what tells positions from samples may be part of the input alone.
    n_samples, _ = batch_size([*records, *beside], batch)
    if (count := rows_without_samples(n_samples, batch)) is not None:
        notes.append(
            f"the network runs on {n_samples} rows for the {count} samples of the first batch, and each "
            "row counts as a sample, also those that it adds to every batch, as of a memory bank; let "
            "forward_fn call the components on the rows of the batch alone"
        )
    for call, (first, *rest) in tensors.items():
        fit = [r for r in rest if len(by_sample(r.tensor, forms[r.name])) == n_samples]
        tensors[call] = [first, *fit]
    sources = sources_of(records, notes)
    losses = _losses(records, returned, end)
    if losses and not named:
        notes.append(f"these compare what the network gives with targets, so left out: {listed(losses)}")
        records = _without(losses, records, sources)
    pairwise = [r.name for r in records if r.is_pairwise and r.name != end and r.name in sources]
    if pairwise and not named:
        notes.append(
            f"these compare the samples of a batch with one another, so left out: {listed(pairwise)}"
        )
        records = _without(pairwise, records, sources)
    mixed = {r.name for r in records if r.mixes(forms[r.name]) or r.strays(forms[r.name])}
    untold = [r.name for r in records if r.may_be_turned(forms[r.name])]
    turned = {
        r.name
        for r in records
        if module_of(r.name) in in_turns and any(order.is_of_all for order in r.orders.values())
    }
    own = [r for r in records if not is_sum(r.name)]
    apart = without_sums(sources)
    ends = [end] if end is not None else chain_ends(own, apart, returned, in_losses, turned)
    for name in set(sources) & set(returned) - set(ends):
        del sources[name]
    constant: list[str] = []
    kept = {ends[-1]} if len(ends) == 1 else set()
    if named:
        # Named ones stay; data beside them, as features of edges beside nodes, need not.
        kept = {record.name for record in records if not record.is_input}
    if not named or any(not sources[name] for name in kept & sources.keys()):
        # Positions that vary, for all that is known, may have no mask that is about them.
        kept |= {*varying} - {record.name for record in records if record.is_idle}
        kept |= {*placed, *(record.name for record in records if is_sum(record.name))}
        constant = leave_out_unfit(
            records, forms, sources, kept, n_samples, notes, turned, n_samples == rows_given(batch)
        )
    _leave_out_sums(records, forms, sources, n_samples)
    ends = [name for name in ends if name in sources] or [*sources][-1:]
    if not ends:
        raise ValueError(
            f"no state has one row for each sample, so nothing can be credited: {'; '.join(notes)}. "
            "Give the samples an axis of their own, the first, or reduce states to one row per sample "
            "with reduce=."
        )
    inputs = {record.name for record in records if record.is_input}
    sources = leading_to(ends, sources, inputs, notes)
    if end is None and (passed := _passed(ends, sources, inputs, returned)):
        notes.append(
            f"this report is about {listed(ends)}; the first tensor that the network returns is made of "
            f"{listed(passed)}, and counts only as far as that leads there; choose another output with "
            "output="
        )
    # What is mixed once stays mixed.
    if met := [name for name in sources if name in mixed - inputs and not mixed & sources[name]]:
        notes.append(
            f"rows of several samples meet in {listed(met)}, and operators see one of them, so what the "
            "others do counts as unexplained and as nonlinear"
        )
    if untold := [name for name in untold if name in sources]:
        notes.append(
            f"samples may be along the first or the second axis of {listed(untold)}, which are of one "
            "size, and are taken to be along the first; take batches of another size where they are not"
        )
    states = _in_order(sources, ends)
    place = {name: i for i, group in enumerate(states) for name in group}
    links = tuple(
        tuple(sorted({place[source] for name in group for source in sources[name]}, reverse=True))
        for group in states[1:]
    )
    names = tuple(_called(group, by_name, inputs) for group in states)
    limits = [_MOST_READ] * (len(links) - 1) + [max(_MOST_READ, min(2 * len(ends), _MOST_READ_BY_ENDS))]
    width = {record.name: forms[record.name].width(record.tensor) for record in records}
    widths = [min(max_dim, sum(width[name] for name in group)) for group in states]
    cut = tuple(
        _nearest(read, most, widths, _MOST_READ * max_dim)
        for read, most in zip(links, limits, strict=False)
    )
    # What nothing would read any more is not left out.
    known = {p for read in cut for p in read}
    cut = tuple(
        (*left, *(p for p in read[len(left) :] if p not in known))
        for left, read in zip(cut, links, strict=False)
    )
    notes += _graph_notes(states, names, links, cut, inputs)
    held = {name for r in given if r.name in sources for name in r.holds} - sources.keys()
    if held:
        notes.append(
            f"what {listed(sorted(held))} gave is part of the input x_0, as components take it, and has "
            "no credit of its own"
        )
    whole = tuple(tuple(r.name for name in group for r in tensors[name]) for group in states)
    # Sorted data may vary in later batches alone.
    reached = {r.name for r in records if (r.from_data or r.is_input) and not r.ignores_data}
    return Plan(
        whole,
        names,
        links=cut,
        forms=forms,
        notes=tuple(notes),
        constant=tuple(constant),
        alike=tuple(name for name in constant if name in reached),
        places=frozenset(r.name for r in records if r.name in constant and r.is_idle),
        in_turns=in_turns - {module_of(name) for group in whole for name in group},
    )


def _with_fitting_ends(records: Sequence[Recorded], batch: Any) -> Sequence[Recorded]:
    """Leave out what is returned of the last state, unless it has as many samples as the states."""
    states = [record for record in records if not record.is_further]
    n_samples, _ = batch_size(states, batch)

    def fits(end: Recorded) -> bool:
        alike = batch_size([*states, end], batch)[0] == n_samples
        return alike and n_samples in end.tensor.shape[:2]

    return [record for record in records if not record.is_further or fits(record)]


def _ignoring(records: Sequence[Recorded]) -> Sequence[Recorded]:
    """Mark what is made of the network's own tensors as ignoring the data, unless everything is."""
    if all(record.ignores_data or record.is_idle for record in records):
        return records
    return [replace(r, ignores_data=r.ignores_data or r.is_idle) for r in records]


def in_a_row(records: Iterable[Recorded], returned: Collection[str]) -> list[Recorded]:
    """Make a plain chain of what ran but for what was returned, whatever is known of the data flow."""
    own = [record for record in records if record.name not in returned]
    inner = [r for i, r in enumerate(own) if i == 0 or not (r.is_input or call_of(r.name) != r.name)]
    return [replace(record, sources=None) for record in inner]


def _nearest(read: tuple[int, ...], most: int, widths: Sequence[int], wide: int) -> tuple[int, ...]:
    """Keep the nearest states that are read, ``most`` of them, or all that are no wider together."""
    fit = sum(total <= wide for total in itertools.accumulate(widths[p] for p in read))
    return read[: max(most, fit)]


def _graph_notes(
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
