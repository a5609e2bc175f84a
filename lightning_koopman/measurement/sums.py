"""States in, a report out: what the accumulator and the metric share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_koopman.koopman.credit import Credits, samples_needed
from lightning_koopman.koopman.moments import Layout
from lightning_koopman.report.report import CreditReport, build_report


def report_on(
    layout: Layout,
    credits: Credits,
    components: Sequence[str],
    *,
    n_samples: int,
    delay: int,
    variance_kept: Sequence[float] | None,
    notes: Sequence[str],
    step: int | None,
    enough: int | None,
) -> CreditReport:
    """Return the report on a chain, and say where the samples are few."""
    notes, needed = list(notes), samples_needed(layout)
    if n_samples < needed:
        enough = needed if enough is None else enough
        note = f"{n_samples} samples are few for states this wide; take {enough} or more"
        warnings.warn(note, stacklevel=3)
        notes.append(note)
    return build_report(
        components,
        credits,
        n_samples=n_samples,
        variance_kept=variance_kept,
        notes=notes,
        step=step,
        folds=layout.folds,
        delay=delay,
    )


def check_states(rows: Sequence[Tensor], names: Sequence[str], layout: Layout) -> None:
    """Refuse states that do not fit each other or the layout, or are not finite."""
    if len(rows) != len(names):
        raise ValueError(f"{len(rows)} states arrived; expected {len(names)}: {tuple(names)}")
    for name, row, width in zip(names, rows, layout.dims, strict=True):
        if row.shape != (rows[0].shape[0], width):
            raise ValueError(
                f"state {name!r} has shape {tuple(row.shape)}; expected ({rows[0].shape[0]}, {width})"
            )
    if not all_finite(rows):
        for name, row in zip(names, rows, strict=True):
            if not bool(torch.isfinite(row).all()):
                raise ValueError(f"state {name!r} holds NaN or infinity; leave that batch out")


def all_finite(blocks: Sequence[Tensor]) -> bool:
    """Check whether all values are finite; a finite sum has finite terms, and is found faster."""
    sums = torch.stack([block.sum().to(blocks[0]) for block in blocks])
    return all(map(math.isfinite, sums.tolist()))
