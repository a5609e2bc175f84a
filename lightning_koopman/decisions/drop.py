"""Which components may be dropped, one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_koopman.decisions.steps import (
    Seen,
    Step,
    Steps,
    as_fields,
    check_max_drop,
    cost_of,
    failure_with,
    is_finite,
    is_within,
    look_at,
    loss_of,
    run_whole,
    told_apart,
)
from lightning_koopman.decisions.swaps import Skipped, copied_with, swapped
from lightning_koopman.effects.scoring import Measured, Metric, Outputs, over_draws
from lightning_koopman.network.access.isolation import undisturbed
from lightning_koopman.network.arguments import INTEGER, check_given
from lightning_koopman.network.runs.forward import ForwardFn
from lightning_koopman.network.runs.forward_runner import ForwardRunner, runner_on
from lightning_koopman.report.effects import Scale
from lightning_koopman.report.report import CreditReport
from lightning_koopman.report.text import Fitted


@dataclass(frozen=True, eq=False, repr=False)
class DropOrder(Steps):
    """Components in the order in which they may be dropped, and what was measured after each.

    Attributes:
        remaining: By step and candidate, the effect of dropping it beside those already gone, shape
            ``(steps, len(candidates))``; NaN for those that are gone.
        swaps: What is put in each candidate's place.
    """

    remaining: NDArray[np.float64]
    swaps: Mapping[str, Skipped]

    @property
    def dropped(self) -> tuple[str, ...]:
        """The first components of the order, as many as keep the loss within ``max_drop``."""
        return self.components[: self.within]

    def apply(self, model: nn.Module, steps: int | None = None) -> nn.Module:
        """Return a copy of the network without the components that go.

        Args:
            model: The network that the order was measured on, or one of the same architecture; it is
                left alone.
            steps: How many of ``components`` go; ``None`` drops those in ``dropped``.

        Returns:
            A new network, to be fine-tuned or saved with
            :func:`lightning_koopman.decisions.swaps.save_shrunk`.

        Raises:
            ValueError: If the order has fewer steps.
        """
        check_given(INTEGER, steps=steps)
        count = self.within if steps is None else steps
        if not 0 <= count <= len(self.components):
            raise ValueError(f"steps is {steps}; the order has {len(self.components)}")
        swaps = [self.swaps[name] for name in self.components[:count]]
        return copied_with(model, [Skipped(**swap.options()) for swap in swaps])

    @property
    def verdict(self) -> str:
        """What may go, in one line."""
        if not self.candidates:
            return "No component can be dropped: each stays for the reason that stands above."
        if not self.components:
            return "Nothing can go: no outputs were finite without it."
        if not self.dropped:
            return (
                f"Nothing can go within {self.max_drop:g} {self._unit()}: the first costs "
                f"{self.loss[0]:.3g}."
            )
        whole, left = self.cost_before.parameters, self.costs[self.within - 1].parameters
        gone = f" ({1 - left / whole:.0%} of the parameters)" if whole else ""
        return (
            f"{self.within} of {len(self.candidates)} can go within {self.max_drop:g} "
            f"{self._unit()}{gone}: {', '.join(self.dropped)}."
        )

    @property
    def next_step(self) -> str:
        """What to do next, in one line."""
        # Also where outputs are not finite whichever goes.
        if not self.components:
            return "Next: linearize, which puts linear maps in place of components."
        if not self.dropped:
            return "Next: linearize, a larger max_drop, or tuning of .apply(model, steps=1)."
        return "Next: .apply(model) gives the network without them; measure it on other data."

    def __repr__(self) -> str:
        return (
            f"DropOrder({self.within} of {len(self.candidates)} within {self.max_drop:g}: "
            f"{', '.join(self.dropped) or 'nothing'})"
        )

    def __rich__(self) -> Fitted:
        return self._table("Dropped one after the other", self.verdict, self.next_step)


def drop_order(
    model: nn.Module,
    batches: Iterable[Any],
    report: CreditReport | None = None,
    *,
    components: str | Sequence[str] | None = None,
    max_drop: float = 0.01,
    steps: int | None = None,
    metric: Metric | None = None,
    scale: Scale | None = None,
    samples: int = 512,
    forward_fn: ForwardFn | None = None,
) -> DropOrder:
    """Drop components of a trained network one after the other, the one that matters least first.

    A component is dropped by giving on what it takes in, so only one whose output has its input's shape
    can go; the others are named with the reason. Each step measures, for all components that are left,
    how far the outputs move from those of the whole network if it went too, and drops the one that moves
    them least. One without which the outputs or the metric are not finite is never chosen, and a note
    says so. One pass over the samples per step and component that is left.

    Args:
        model: Any module; it is left exactly as it was found.
        batches: Data to measure on: tensors, tuples of input and target, or mappings.
        report: Names the components; ``None`` chooses them as :func:`lightning_koopman.credit_report`
            does.
        components: Names or glob patterns of those that may go; ``None`` tries all.
        max_drop: Largest loss: drop of the metric, or where there is none, effect on the outputs. The
            order ends with the first step that exceeds it.
        steps: Number of steps, whatever the loss is; ``None`` goes by ``max_drop``.
        metric: Called as ``metric(outputs, targets)``, larger is better; ``None`` takes the accuracy
            where targets are class indices, and none otherwise.
        scale: What effects are measured in: ``"kl"`` (mean KL divergence in nats from the original to
            the altered class distribution) or ``"relative"`` (mean squared change over the outputs'
            variance); ``None`` takes ``"kl"`` where targets are class indices.
        samples: Most samples that are looked at, from everywhere in ``batches``, as in
            :func:`lightning_koopman.credit_report`.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.

    Returns:
        The order, what was measured after each step, and the point where the loss is exceeded.

    Raises:
        ValueError: If an argument is out of range, no sample arrives, or a component is unknown.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 2))
        >>> _ = nn.init.eye_(net[1].weight), nn.init.zeros_(net[1].bias)
        >>> x = torch.randn(200, 4)
        >>> order = drop_order(net, [(x, net(x).argmax(1))])
        >>> order.dropped[0], float(order.effect[0])
        ('1', 0.0)
    """
    check_max_drop(max_drop)
    check_given(INTEGER, steps=steps)
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}; it must be 1 or above, or None to go by max_drop")
    runner = runner_on(model, batches, samples, forward_fn)
    with undisturbed(model):
        calls, outputs, refused = run_whole(runner, report, components, scale, metric)
        swaps = _droppable(runner, calls, refused)
        order, remaining, unknown = _order(runner, outputs, swaps, max_drop, steps)
        before = cost_of(runner)
    return DropOrder(
        **as_fields(order, outputs, told_apart(unknown, "dropped")),
        cost_before=before,
        candidates=tuple(swaps),
        refused=refused,
        max_drop=max_drop,
        remaining=np.reshape(remaining, (len(order), len(swaps))),
        swaps=swaps,
    )


def _droppable(
    runner: ForwardRunner, components: Mapping[str, tuple[str, ...]], refused: dict[str, str]
) -> dict[str, Skipped]:
    """Find out by one pass which components can be skipped; those that cannot join the ``refused``."""
    seen = look_at(runner, components)
    swaps = {}
    for name, calls in components.items():
        if name in refused:
            continue
        # What follows a block and belongs to it, such as pooling, may change the shape: it then stays.
        parts = [calls[:count] for count in range(len(calls), 0, -1)]
        reasons = [_refusal([seen[call] for call in part]) for part in parts]
        fitting = [part for part, reason in zip(parts, reasons, strict=True) if not reason]
        if not fitting:
            refused[name] = reasons[-1]
            continue
        swap = Skipped(fitting[0], isinstance(seen[fitting[0][0]].given, tuple))
        if why := failure_with(runner, swap):
            refused[name] = f"without which the network fails ({why})"
        else:
            swaps[name] = swap
    return swaps


def _refusal(calls: Sequence[Seen]) -> str:
    """Say why modules that run one after the other cannot be skipped, or nothing."""
    taken, given = calls[0].taken, [call.given for call in calls]
    if (runs := max(call.runs for call in calls)) != 1:
        return f"which runs {runs} times in one pass"
    if not all(call.in_place for call in calls):
        return "which the network does not call where it is registered, so nothing can take its place"
    # The first is what something else takes the place of; what gives a tuple behind it would stay none.
    if isinstance(given[0], tuple) and len(given[0]) == 1:
        given[0] = given[0][0]
    if taken is None:
        return "which takes no floating-point tensor"
    if others := [value for value in given if not isinstance(value, Tensor)]:
        return f"which gives {type(others[0]).__name__} and not one tensor"
    if taken.shape != given[-1].shape:
        return f"which turns {tuple(taken.shape[1:])} into {tuple(given[-1].shape[1:])}"
    return ""


def _order(
    runner: ForwardRunner,
    outputs: Outputs,
    swaps: Mapping[str, Skipped],
    max_drop: float,
    steps: int | None,
) -> tuple[list[Step], list[list[float]], list[str]]:
    """Drop the component whose loss moves the outputs least, again and again; return all effects.

    What comes back last are those that were left for there was no finite number to choose them by.
    """
    order: list[Step] = []
    remaining: list[list[float]] = []
    unknown: list[str] = []
    for _ in range(len(swaps) if steps is None else min(steps, len(swaps))):
        gone = [swaps[step.name] for step in order]
        tried: dict[str, Measured] = {}
        for name, swap in swaps.items():
            if swap not in gone:
                with swapped(runner.model, [*gone, swap]):
                    tried[name] = over_draws([outputs.compare(runner.stream())])
        unknown = [name for name in tried if not is_finite(tried[name], outputs)]
        if len(unknown) == len(tried):
            break
        known = [name for name in tried if name not in unknown]
        best = min(known, key=lambda name: tried[name].effect)
        with swapped(runner.model, [*gone, swaps[best]]):
            order.append(Step(best, tried[best], cost_of(runner)))
        remaining.append([tried[name].effect if name in tried else math.nan for name in swaps])
        if steps is None and not is_within(loss_of(tried[best], outputs), max_drop):
            break
    return order, remaining, unknown
