"""Settles, after the first pass, which states make the chain and what each of them reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.graph import leading_to, leave_out_unfit, listed, sources_of
from lightning_koopman.pooling import (
    RowForm,
)
from lightning_koopman.recorded import INPUT, Recorded
from lightning_koopman.row_forms import ReduceOption, row_forms

_MOST_READ = 6
"""Most states that one step reads; further ones are left out and named."""


@dataclass(frozen=True)
class Plan:
    """The chain, frozen for all later passes.

    Attributes:
        states: Names recorded for each state x_0 … x_L; more than one are joined side by side.
        links: For each step i = 1 … L, the states it reads.
        forms: How each recorded tensor becomes rows.
        notes: What a reader of the report must know.
    """

    states: tuple[tuple[str, ...], ...]
    links: tuple[tuple[int, ...], ...]
    forms: Mapping[str, RowForm]
    notes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the states; ``a+b`` where parallel components were joined."""
        return tuple("+".join(group) for group in self.states)

    @cached_property
    def recorded(self) -> frozenset[str]:
        """Everything recorded that is part of a state."""
        return frozenset(name for group in self.states for name in group)

    def join(self, rows: Mapping[str, Tensor], batch: int = 0) -> dict[str, Tensor]:
        """Put the rows of one pass into the states of the chain.

        Args:
            rows: Rows by recorded name.
            batch: Number of the pass, for errors.

        Returns:
            Rows by state, in the order of the chain.

        Raises:
            ValueError: If something that ran in the first pass did not run in this one.
        """
        expected = [name for group in self.states for name in group]
        missing = [name for name in expected if name not in rows]
        if missing:
            raise ValueError(
                f"batch {batch} ran the components {tuple(rows)}, the batches before it "
                f"{tuple(expected)} (difference: {missing}). Choose components that run in every pass "
                "with components=[...]."
            )
        joined = {}
        for name, group in zip(self.names, self.states, strict=True):
            counts = {part: rows[part].shape[0] for part in group}
            if len(set(counts.values())) > 1:
                raise ValueError(
                    f"parallel components gave differing numbers of rows: {counts}. Rows are samples; "
                    "name other components with components=[...]."
                )
            blocks = [rows[part] for part in group]
            joined[name] = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
        return joined


def make_plan(
    records: Sequence[Recorded],
    *,
    batch: Any = None,
    end: str | None = None,
    named: bool = False,
    reduce: ReduceOption = "pool",
    max_dim: int = 256,
) -> Plan:
    """Settle the chain.

    Components that do not depend on one another and are equally deep in the graph are joined into one
    state; a state that is read further down than by the next step is linked to it.

    Args:
        records: Everything recorded in the first pass, in order of execution.
        batch: What the pass ran on.
        end: Name of the last state; ``None`` takes what ran last.
        named: Whether the user named the components, so that none may be left out for its shape.
        reduce: How spatial and sequence axes are reduced, or that by glob pattern.
        max_dim: Wider states are pooled.

    Returns:
        The plan.

    Raises:
        ValueError: If ``end`` did not run.
    """
    notes: list[str] = []
    by_name = {record.name: record for record in records}
    last = end if end is not None else records[-1].name
    if last not in by_name:
        raise ValueError(
            f"the output of interest {last!r} did not run in the forward pass; what ran is "
            f"{list(by_name)}"
        )
    forms = row_forms(records, batch, reduce, max_dim)
    sources = sources_of(records, notes)
    if not named:
        leave_out_unfit(records, forms, sources, last, batch, notes)
    sources = leading_to(last, sources, notes)
    depth: dict[str, int] = {}
    for name, read in sources.items():
        depth[name] = 1 + max((depth[source] for source in read), default=-1)
    groups: list[list[str]] = [[] for _ in range(depth[last] + 1)]
    for name, level in depth.items():
        groups[level].append(name)
    states = tuple(tuple(group) for group in groups)
    links = tuple(
        tuple(sorted({depth[source] for name in group for source in sources[name]}, reverse=True))
        for group in states[1:]
    )
    plan = Plan(states, links, forms, ())
    cut = tuple(read[:_MOST_READ] for read in links)
    return replace(plan, links=cut, notes=(*notes, *_graph_notes(plan)))


def in_a_row(records: Sequence[Recorded]) -> list[Recorded]:
    """Make a plain chain of what ran, whatever is known of the data flow.

    Args:
        records: Everything recorded in the first pass.

    Returns:
        The records without sources, and without network inputs but the first.
    """
    inner = [r for i, r in enumerate(records) if i == 0 or not r.name.startswith(INPUT)]
    return [replace(record, sources=None) for record in inner]


def _graph_notes(plan: Plan) -> list[str]:
    notes = []
    joined = [name for name, group in zip(plan.names, plan.states, strict=True) if len(group) > 1]
    if joined:
        notes.append(
            f"components side by side were joined into one state: {listed(joined)}; their credit is "
            "shared"
        )
    skips = []
    for i, read in enumerate(plan.links, start=1):
        further = [plan.names[p] for p in read if p != i - 1]
        kept = further[: _MOST_READ - 1]
        if kept:
            skips.append(f"{plan.names[i]} reads {', '.join(reversed(kept))} too")
        if len(further) > len(kept):
            notes.append(
                f"{plan.names[i]!r} reads {len(further) + 1} states; the furthest "
                f"{len(further) - len(kept)} were left out"
            )
    if skips:
        notes.append(f"the data skips components, and the operators follow it: {listed(skips, '; ')}")
    return notes
