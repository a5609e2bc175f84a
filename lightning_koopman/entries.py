"""Which checkpoints make up a series, in what order, and which were measured before."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_koopman.checkpoints import (
    CheckpointError,
    find_checkpoints,
    load_checkpoint,
    run_names,
)
from lightning_koopman.report import CreditReport


@dataclass(frozen=True)
class Entry:
    """One checkpoint of a series.

    Attributes:
        path: The file.
        run: Name of its training.
        step: Its step, or its place among the files of its run where it tells none.
        source: What identifies the measurement.
        known: Report of an earlier evaluation that still holds.
    """

    path: Path
    run: str
    step: int
    source: Mapping[str, Any]
    known: CreditReport | None = None


def settled_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Give options as JSON would give them back, with the version that measures.

    Args:
        options: Whatever the measurement depends on.

    Returns:
        Plain values.
    """
    plain = {**options, "version": version("lightning-koopman")}
    settled: dict[str, Any] = json.loads(json.dumps(plain, default=repr, sort_keys=True))
    return settled


def list_entries(
    checkpoints: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    shard: tuple[int, int],
    trust: bool,
    settled: Mapping[str, Any],
    known: Sequence[CreditReport],
) -> tuple[list[Entry], list[str]]:
    """List the checkpoints of a shard by run and step, and what is wrong with the others.

    Args:
        checkpoints: Paths or glob patterns.
        shard: ``(i, n)`` takes every n-th file from the i-th on, counted from 1.
        trust: Whether to unpickle whatever the files hold.
        settled: What :func:`settled_options` gave.
        known: Reports of an earlier evaluation.

    Returns:
        Entries, and a message for every file that cannot be used.
    """
    paths = find_checkpoints(checkpoints)
    runs = run_names(paths)
    # The last one counts where an earlier evaluation met a file twice.
    by_path = {str(report.source.get("path")): report for report in known}
    entries, failures = [], []
    for place, (path, run) in list(enumerate(zip(paths, runs, strict=True)))[shard[0] - 1 :: shard[1]]:
        in_run = runs[:place].count(run)
        try:
            source = _source(path, settled)
            old = by_path.get(source["path"])
            if old is not None and {**old.source, "step": None} == source:
                step = old.source.get("step")
                step = step if type(step) is int else in_run
                entries.append(Entry(path, run, step, old.source, replace(old, run=run, step=step)))
                continue
            # Only the step is needed for sorting: weights of many checkpoints need not fit in memory.
            told = load_checkpoint(path, trust=trust).step
        except CheckpointError as error:
            failures.append(str(error))
            continue
        source["step"] = told
        entries.append(Entry(path, run, in_run if told is None else told, source))
    entries.sort(key=lambda entry: (entry.run, entry.step))
    return entries, failures


def _source(path: Path, settled: Mapping[str, Any]) -> dict[str, Any]:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    return {
        "path": os.path.normpath(path),
        "size": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "step": None,
        "options": dict(settled),
    }
