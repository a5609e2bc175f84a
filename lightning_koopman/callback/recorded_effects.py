"""What altering each component does, measured on calls that were recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from lightning_koopman.effects.alterations import altered_parts
from lightning_koopman.effects.component_effects import effects_on
from lightning_koopman.network.forward_runner import ForwardRunner
from lightning_koopman.network.replay import Step
from lightning_koopman.report.effects import Effects
from lightning_koopman.report.report import CreditReport

SAMPLES = 512
"""Most samples that effects are measured on."""


def passes(report: CreditReport, kinds: Sequence[str]) -> int:
    """Return how many passes over the samples effects take: as it is, each altered, and once again."""
    return len(report.components) * len(kinds) + 2


def measure_effects(
    model: nn.Module,
    steps: Sequence[Step],
    report: CreditReport,
    kinds: Sequence[str],
    around: Callable[[], AbstractContextManager[Any]],
    *,
    samples: float = SAMPLES,
) -> Effects:
    """Measure effects by running recorded steps again, of which the last call gives the outputs.

    Taken are whole steps, as many as hold so many samples, and at least one.
    """
    taken, n_rows = list(steps[:1]), sum(step.n_rows for step in steps[:1])
    for step in steps[1:]:
        n_rows += step.n_rows
        if n_rows > min(samples, SAMPLES):
            break
        taken.append(step)

    def forward(_: nn.Module, step: Step) -> Any:
        with around():
            return step.run()[-1]

    # What the outputs should have been, nobody recorded.
    targets = [None] * len(taken)
    runner = ForwardRunner(model, taken, forward)
    return effects_on(runner, altered_parts(report), kinds, how="measured", targets=targets)


def pooled(found: Sequence[Effects]) -> Effects:
    """Average the effects that processes measured, each on samples of its own."""
    sizes = np.array([each.n_samples for each in found], dtype=float)
    weights = sizes / sizes.sum()

    def mean(kind: str) -> Any:
        return sum(w * each.values[kind] for w, each in zip(weights, found, strict=True))

    def error(kind: str) -> Any:
        squares = [(w * each.stderr[kind]) ** 2 for w, each in zip(weights, found, strict=True)]
        return np.sqrt(sum(squares))

    first = found[0]
    doubts = {
        kind: tuple(
            tuple(dict.fromkeys(word for each in found for word in each.doubts_of(kind, i)))
            for i in range(len(first.components))
        )
        for kind in first.kinds
    }
    return replace(
        first,
        values={kind: mean(kind) for kind in first.kinds},
        stderr={kind: error(kind) for kind in first.kinds},
        n_samples=int(sizes.sum()),
        doubts=doubts,
    )
