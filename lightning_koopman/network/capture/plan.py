"""Settles, after the first pass, which states make the chain and what each of them reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.network.axes.forms import batch_size, row_forms, rows_without_samples
from lightning_koopman.network.axes.input_data import rows_given
from lightning_koopman.network.axes.padding import (
    Valid,
    is_added_to_all,
    lengths_of,
    with_padding,
    with_places,
)
from lightning_koopman.network.axes.picks import keeping_picked
from lightning_koopman.network.axes.recorded import Pick, Recorded
from lightning_koopman.network.axes.rows import ReduceOption, RowForm, by_sample
from lightning_koopman.network.capture.graph import (
    Graph,
    called,
    chain_ends,
    graph_of,
    in_order,
    links_between,
    nearest_links,
    notes_on,
)
from lightning_koopman.network.names import call_of, is_sum, listed, module_of
from lightning_koopman.network.tensors import varies


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
        places: Those that are added to all samples alike, whose means may differ by padding.
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
    in_losses: Mapping[str, Pick | None],
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
    given = _with_fitting_ends(records, batch)
    read = {**in_losses, **dict.fromkeys(_read_by_caller(given, returned))}
    records, tensors, returned, reach_losses = by_call(given, returned, in_losses)
    ran = [record.name for record in records]
    if end is not None and end not in ran:
        raise ValueError(
            f"the output of interest {end!r} did not run in the forward pass; what ran is {ran}"
        )
    records, forms, n_samples, placed = _with_forms(
        given, records, tensors, read, batch, valid, reduce, max_dim, varying
    )
    if (count := rows_without_samples(n_samples, batch)) is not None:
        notes.append(
            f"the network runs on {n_samples} rows for the {count} samples of the first batch, and each "
            "row counts as a sample, also those that it adds to every batch, as of a memory bank; let "
            "forward_fn call the components on the rows of the batch alone"
        )
    graph = graph_of(records, notes)
    if not named:
        records = _without_comparisons(records, graph, returned, end, notes)
    mixed = {r.name for r in records if r.mixes(forms[r.name]) or r.strays(forms[r.name])}
    untold = [r.name for r in records if r.may_be_turned(forms[r.name])]
    turned = {
        r.name
        for r in records
        if module_of(r.name) in in_turns and any(order.is_of_all for order in r.orders.values())
    }
    own = [r for r in records if not is_sum(r.name)]
    apart = graph.without_sums()
    ends = [end] if end is not None else chain_ends(own, apart, returned, reach_losses, turned)
    for name in graph.keys() & returned.keys() - {*ends}:
        del graph[name]
    constant: list[str] = []
    kept = {ends[-1]} if len(ends) == 1 else set()
    if named:
        # Named ones stay; data beside them, as features of edges beside nodes, need not.
        kept = {record.name for record in records if not record.is_input}
    if not named or any(not graph[name] for name in kept & graph.keys()):
        # Positions that vary, for all that is known, may have no mask that is about them.
        kept |= {*varying} - {record.name for record in records if record.is_idle}
        kept |= {*placed, *(record.name for record in records if is_sum(record.name))}
        constant = leave_out_unfit(
            records, forms, graph, kept, n_samples, notes, turned, n_samples == rows_given(batch)
        )
    _leave_out_sums(records, forms, graph, n_samples)
    ends = [name for name in ends if name in graph] or [*graph][-1:]
    if not ends:
        raise ValueError(
            f"no state has one row for each sample, so nothing can be credited: {'; '.join(notes)}. "
            "Give the samples an axis of their own, the first, or reduce states to one row per sample "
            "with reduce=."
        )
    inputs = {record.name for record in records if record.is_input}
    graph = _leading_to(ends, graph, inputs, notes)
    if end is None:
        _note_first_returned(ends, graph, inputs, returned, notes)
    # What is mixed once stays mixed.
    met = [name for name in graph if name in mixed - inputs and not mixed & graph[name]]
    _note_rows(met, [name for name in untold if name in graph], notes)
    states = in_order(graph, ends)
    names = tuple(called(group, ran, inputs) for group in states)
    links = links_between(states, graph)
    width = {record.name: forms[record.name].width(record.tensor) for record in records}
    widths = [min(max_dim, sum(width[name] for name in group)) for group in states]
    cut = nearest_links(links, len(ends), widths, max_dim)
    notes += notes_on(states, names, links, cut, inputs)
    held = {name for r in given if r.name in graph for name in r.holds} - graph.keys()
    if held:
        notes.append(
            f"what {listed(sorted(held))} gave is part of the input x_0, as components take it, and has "
            "no credit of its own"
        )
    recorded = tuple(tuple(r.name for name in group for r in tensors[name]) for group in states)
    # Sorted data may vary in later batches alone.
    reached = {r.name for r in records if (r.from_data or r.is_input) and not r.ignores_data}
    return Plan(
        recorded,
        names,
        links=cut,
        forms=forms,
        notes=tuple(notes),
        constant=tuple(constant),
        alike=tuple(name for name in constant if name in reached),
        places=frozenset(r.name for r in records if r.name in constant and is_added_to_all(r)),
        in_turns=in_turns - {module_of(name) for group in recorded for name in group},
    )


def _with_forms(
    given: Sequence[Recorded],
    records: Sequence[Recorded],
    tensors: dict[str, list[Recorded]],
    read: Mapping[str, Pick | None],
    batch: Any,
    valid: Valid,
    reduce: ReduceOption,
    max_dim: int,
    varying: Collection[str],
) -> tuple[list[Recorded], dict[str, RowForm], int, set[str]]:
    """Settle how all that was recorded becomes rows, and leave out of calls what has not one per sample.

    Returns the records of calls, forms, how many samples there are, and what is added to all alike.
    """
    records = _ignoring(records)
    places = with_places(records, valid, varying)
    records = [places.get(record.name, record) for record in records]
    ran = {record.name for record in records}
    beside = [r for inside in tensors.values() for r in inside if r.name not in ran]
    forms = row_forms([*records, *beside], batch, reduce, max_dim)
    forms = with_padding(forms, [places.get(record.name, record) for record in given], valid, batch)
    placed = {name for name in places if forms[name].padding is not None}
    forms |= {name: replace(forms[name], is_placed=True) for name in placed}
    forms = keeping_picked(forms, given, read, max_dim, {**valid, **lengths_of(given)})
    # Counted as for the forms: what tells positions from samples may be part of the input alone.
    n_samples, _ = batch_size([*records, *beside], batch)
    for call, (first, *rest) in tensors.items():
        fit = [r for r in rest if len(by_sample(r.tensor, forms[r.name])) == n_samples]
        tensors[call] = [first, *fit]
    return records, forms, n_samples, placed


def _read_by_caller(records: Sequence[Recorded], returned: Mapping[str, frozenset[str]]) -> set[str]:
    """List the states that are read by whoever gets what the network returned.

    Lists of hidden states, which components go on with, are given beside what the network is about.
    """
    names = {record.name for record in records}
    taken = frozenset[str]().union(*(record.sources or () for record in records))
    last = {name: of for name, of in returned.items() if name in names or not of <= taken}
    return {state for name, of in (last or returned).items() if name not in names for state in of}


def by_call(
    records: Sequence[Recorded], returned: Mapping[str, frozenset[str]], in_losses: Collection[str]
) -> tuple[list[Recorded], dict[str, list[Recorded]], dict[str, frozenset[str]], frozenset[str]]:
    """Let one record stand for each module call, and say which of its tensors make its state.

    These are the ones that are read, or else those that are returned, or else the first.
    """
    calls: dict[str, list[Recorded]] = {}
    for record in records:
        calls.setdefault(call_of(record.name), []).append(record)
    read = frozenset().union(*(record.sources or () for record in records))
    reaching = frozenset(in_losses).union(*returned.values())
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
    in_losses: Collection[str],
    batch: Any,
) -> list[str]:
    """List the states that the chain of the components chosen by default would end with."""
    fitting = _with_fitting_ends(records, batch)
    records, _, returned, reach_losses = by_call(fitting, returned, in_losses)
    graph, losses = graph_of(records, []).without_sums(), _losses(records, returned, None)
    graph.take_out(*losses)
    own = [r for r in records if r.name in graph]
    return chain_ends(own, graph, returned, reach_losses)


def _leave_out_sums(
    records: Sequence[Recorded],
    forms: Mapping[str, RowForm],
    graph: Graph,
    n_samples: int,
) -> None:
    """Take out of the graph sums without a row for each sample, and those that do not vary."""
    for record in records:
        if is_sum(record.name) and record.name in graph:
            rows = by_sample(record.tensor, forms[record.name])
            tells = n_samples == 1 or varies(rows)
            fits = len(rows) == n_samples and tells and not record.strays(forms[record.name])
            if not fits:
                graph.take_out(record.name)


def _losses(
    records: Sequence[Recorded], returned: Mapping[str, frozenset[str]], end: str | None
) -> list[str]:
    return [r.name for r in records if r.is_loss and r.name != end and r.name not in returned]


def leave_out_unfit(
    records: Sequence[Recorded],
    forms: Mapping[str, RowForm],
    graph: Graph,
    kept: Collection[str],
    n_samples: int,
    notes: list[str],
    in_turns: Collection[str],
    is_whole: bool,
) -> list[str]:
    """Take out of the graph what holds no row per sample, or the same for every sample; return these."""
    constant, misfit, alone, swapped = [], [], [], []
    for record in records:
        if record.name in kept or record.name not in graph or callable(forms[record.name].reduce):
            continue
        shape = tuple(record.tensor.shape)
        rows = by_sample(record.tensor, forms[record.name])
        alike = len(rows) == 1 or not varies(rows)
        apart = record.is_idle or alike or shape[0] != n_samples
        # A single sample tells of nothing that it is the same for others, but of what no data reach.
        if record.is_idle if n_samples == 1 else record.ignores_data and apart:
            graph[record.name] = set()
            constant.append(record.name)
        elif not graph[record.name] and n_samples > 1 and alike:
            constant.append(record.name)
        elif len(rows) != n_samples or record.strays(forms[record.name]):
            misfit.append(f"{record.name} {shape}")
        elif is_whole and record.is_swapped(forms[record.name], n_samples):
            swapped.append(record.name)
        elif record.name in in_turns:
            alone.append(record.name)
        else:
            continue
        graph.take_out(record.name)
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


def _without_comparisons(
    records: Sequence[Recorded],
    graph: Graph,
    returned: Mapping[str, frozenset[str]],
    end: str | None,
    notes: list[str],
) -> list[Recorded]:
    """Take losses, and what compares samples with one another, out of the graph; return the others."""
    losses = _losses(records, returned, end)
    if losses:
        notes.append(f"these compare what the network gives with targets, so left out: {listed(losses)}")
    pairwise = [r.name for r in records if r.is_pairwise and r.name not in (end, *losses)]
    if pairwise:
        notes.append(
            f"these compare the samples of a batch with one another, so left out: {listed(pairwise)}"
        )
    graph.take_out(*losses, *pairwise)
    return [record for record in records if record.name in graph]


def _leading_to(ends: Sequence[str], graph: Graph, inputs: Collection[str], notes: list[str]) -> Graph:
    """Keep what leads to the ends of the chain; of the rest, what is no input is told."""
    kept = graph.leading_to(ends)
    aside = [n for n in graph if n not in kept and n not in inputs and not is_sum(n)]
    if aside:
        notes.append(
            f"this report is about {listed(ends)}; left out, for nothing leads from there to it: "
            f"{listed(aside)}; choose another output with output="
        )
    return kept


def _note_first_returned(
    ends: Sequence[str],
    graph: Graph,
    inputs: Collection[str],
    returned: Mapping[str, frozenset[str]],
    notes: list[str],
) -> None:
    """Tell where the first tensor returned is made of what is on the way to the ends alone."""
    # Behind it may be hidden states and caches, which are no outputs.
    first, made_of = next(iter(returned.items()), ("", frozenset[str]()))
    passed = [name for name in graph if name in made_of and name not in inputs]
    if passed and first not in ends and made_of.isdisjoint(ends):
        notes.append(
            f"this report is about {listed(ends)}; the first tensor that the network returns is made of "
            f"{listed(passed)}, and counts only as far as that leads there; choose another output with "
            "output="
        )


def _note_rows(met: Sequence[str], untold: Sequence[str], notes: list[str]) -> None:
    """Tell of states with rows of several samples, and of those whose axis of samples is a guess."""
    if met:
        notes.append(
            f"rows of several samples meet in {listed(met)}, and operators see one of them, so what the "
            "others do counts as unexplained and as nonlinear"
        )
    if untold:
        notes.append(
            f"samples may be along the first or the second axis of {listed(untold)}, which are of one "
            "size, and are taken to be along the first; take batches of another size where they are not"
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
