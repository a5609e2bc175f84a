"""Which states each one is computed from, and which of them lead to the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_koopman.pooling import (
    RowForm,
    by_sample,
)
from lightning_koopman.recorded import INPUT, Recorded
from lightning_koopman.row_forms import batch_size


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """Name the first few of many things.

    Args:
        items: Their names.
        separator: Put between them.

    Returns:
        Six of them at most, and how many more there are.
    """
    shown = separator.join(items[:6])
    return shown if len(items) <= 6 else f"{shown}{separator}and {len(items) - 6} more"


def sources_of(records: Sequence[Recorded], notes: list[str]) -> dict[str, set[str]]:
    """Tell which states each one was computed from.

    Args:
        records: Everything recorded in the first pass, in order of execution.
        notes: Where to say what could not be followed.

    Returns:
        Names by name; what ran right before it, where nobody followed the data.
    """
    sources: dict[str, set[str]] = {}
    previous: str | None = None
    unknown = []
    for record in records:
        if record.sources is None:
            sources[record.name] = set() if previous is None else {previous}
        else:
            sources[record.name] = set(record.sources) & set(sources)
            lost = not sources[record.name] and record.from_float and previous is not None
            if lost and not record.name.startswith(INPUT) and _varies(record):
                unknown.append(record.name)
                assert previous is not None
                sources[record.name] = {previous}
        previous = record.name
    if unknown:
        notes.append(
            f"where the input of {listed(unknown)} comes from could not be followed; each is taken to "
            "read what ran right before it"
        )
    return sources


def _varies(record: Recorded) -> bool:
    tensor = record.tensor
    return tensor.shape[0] > 1 and bool((tensor != tensor[:1]).any()) if tensor.ndim else False


def leave_out_unfit(
    records: Sequence[Recorded],
    forms: Mapping[str, RowForm],
    sources: dict[str, set[str]],
    last: str,
    batch: Any,
    notes: list[str],
) -> None:
    """Take out of the graph what holds no row a sample, or the same for every sample.

    Args:
        records: Everything recorded in the first pass.
        forms: How each becomes rows.
        sources: The graph, changed in place.
        last: Name of the last state, which stays.
        batch: What the pass ran on.
        notes: Where to say what was left out.
    """
    n_samples, _ = batch_size(records, batch)
    constant, misfit = [], []
    for record in records:
        if record.name == last or callable(forms[record.name].reduce):
            continue
        rows = by_sample(record.tensor, forms[record.name].batch_axis, forms[record.name].group)
        if not sources[record.name] and n_samples > 1 and (len(rows) == 1 or not _varies(record)):
            constant.append(record.name)
        elif len(rows) != n_samples:
            misfit.append(f"{record.name} {tuple(record.tensor.shape)}")
        else:
            continue
        own = sources.pop(record.name)
        for read in sources.values():
            if record.name in read:
                read.remove(record.name)
                read.update(own)
    if constant:
        notes.append(f"the same for every sample, so left out: {listed(constant)}")
    if misfit:
        notes.append(f"without one row for each of {n_samples} samples, so left out: {listed(misfit)}")


def leading_to(last: str, sources: dict[str, set[str]], notes: list[str]) -> dict[str, set[str]]:
    """Keep what leads to the output.

    Args:
        last: Name of the last state.
        sources: The graph.
        notes: Where to say what was left out.

    Returns:
        Its part that the last state depends on.
    """
    reached, front = {last}, [last]
    while front:
        for name in sources[front.pop()]:
            if name not in reached:
                reached.add(name)
                front.append(name)
    aside = [name for name in sources if name not in reached]
    if aside:
        notes.append(
            f"nothing leads from here to the output of {last!r}, so left out: {listed(aside)}; choose "
            "another output with output="
        )
    return {name: read for name, read in sources.items() if name in reached}
