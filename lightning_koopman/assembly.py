"""Makes a report of a chain's numbers: each gets its name, and dropped directions a note."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_koopman.credit import Credits
from lightning_koopman.report import CreditReport


def build_report(
    components: Sequence[str],
    credits: Credits,
    *,
    n_samples: int,
    variance_kept: Sequence[float] | None = None,
    notes: Sequence[str] = (),
    step: int | None = None,
    folds: int = 5,
    delay: int = 1,
) -> CreditReport:
    """Give the numbers of a chain their names.

    Args:
        components: Names, in order of execution.
        credits: The numbers.
        n_samples: Number of samples they rest on.
        variance_kept: Share of variance in each state vector; ``None`` means all.
        notes: Sentences for the reader.
        step: Training step the weights belong to.
        folds: Number of folds that the error bars rest on.
        delay: How many states before it each operator took at least.

    Returns:
        The report.
    """
    notes = list(notes)
    lost = [components[i - 1] for i in credits.lost if i > 0]
    if credits.lost:
        notes.append(
            f"{credits.alignment.rank} output directions reach back to the input; others "
            f"({_spans(credits.dropped)}) are lost at {', '.join(map(repr, lost)) or 'the input'} and "
            "were dropped"
        )
    values: dict[str, Any] = {name: _numpy(tensor) for name, tensor in credits.values.items()}
    return CreditReport(
        components=tuple(components),
        **values,
        stderr={name: _numpy(tensor) for name, tensor in credits.stderr.items()},
        directions=credits.alignment.rank,
        n_samples=n_samples,
        total=credits.total,
        total_stderr=credits.total_stderr,
        volumes=_numpy(credits.volumes),
        widths=tuple(operator.matrix.shape[1] for operator in credits.operators),
        variance_kept=np.array(variance_kept or [1.0] * len(components), dtype=np.float64),
        tikhonov=np.array([operator.tikhonov for operator in credits.operators]),
        condition=np.array([operator.condition for operator in credits.operators]),
        stable=credits.stable.cpu().numpy(),
        notes=tuple(notes),
        operators=dict(zip(components, credits.operators, strict=True)),
        step=step,
        folds=folds,
        delay=delay,
    )


def _spans(numbers: Sequence[int]) -> str:
    """Write ascending runs short: 3, 5 to 9."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join(" to ".join(map(str, run)) for run in runs)


def _numpy(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().cpu().numpy().astype(np.float64)
