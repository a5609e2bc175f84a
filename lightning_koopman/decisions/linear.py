"""Which components may become linear, so that the network gets smaller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lightning_koopman.decisions.linear_maps import Maps
from lightning_koopman.decisions.linear_search import LINEAR, Measure, Search, is_layer
from lightning_koopman.decisions.steps import (
    Steps,
    as_fields,
    check_max_drop,
    cost_of,
    explained,
    refuse_samples,
    run_whole,
    told_apart,
)
from lightning_koopman.decisions.swaps import check_copyable, copied_with
from lightning_koopman.decisions.timing import compare_times, least_seconds
from lightning_koopman.effects.scoring import Metric
from lightning_koopman.network.access.isolation import is_compiled, random_states_kept, undisturbed
from lightning_koopman.network.arguments import INTEGER, NUMBER, check_type
from lightning_koopman.network.names import listed
from lightning_koopman.network.runs.forward import ForwardFn, check_batches, check_model
from lightning_koopman.network.runs.forward_runner import ForwardRunner, runner_on
from lightning_koopman.report.effects import Scale
from lightning_koopman.report.report import CreditReport
from lightning_koopman.report.text import Fitted

CostName = Literal["flops", "parameters", "seconds"]


@dataclass(frozen=True, eq=False, repr=False)
class Linearized(Steps):
    """A network with linear components, and what that saved and lost.

    Attributes:
        model: The new network; all of ``components`` are linear in it.
        seconds: Time of one pass over the first batch, before and after, on one thread: what few of the
            passes stay below, for other work on the machine only makes them longer.
        slower: Whether it is slower beyond the error of that.
    """

    model: nn.Module
    seconds: tuple[float, float]
    slower: bool

    @property
    def within(self) -> int:
        """Number of steps: the loss of the last one is admitted, whatever those before it lose."""
        return len(self.components)

    @property
    def larger(self) -> tuple[str, ...]:
        """What the new network needs more of: ``"parameters"``, ``"FLOPs"``, ``"time"``."""
        if not self.components:
            return ()
        after, before = self.costs[-1], self.cost_before
        found = {
            "parameters": after.parameters > before.parameters,
            "FLOPs": after.flops > before.flops,
            "time": self.slower,
        }
        return tuple(name for name, more in found.items() if more)

    @property
    def verdict(self) -> str:
        """What became linear, in one line."""
        if not self.candidates:
            return "Nothing can become linear: all components stay, for the reasons above."
        if not self.components:
            return (
                f"Nothing became linear within {self.max_drop:g} {self._unit()}: what could loses more, "
                "or saves nothing."
            )
        return (
            f"{len(self.components)} of {len(self.candidates)} are linear within {self.max_drop:g} "
            f"{self._unit()}: {', '.join(self.components)}."
        )

    @property
    def next_step(self) -> str:
        """What to do next, in one line."""
        if not self.components:
            larger = ", or a larger max_drop" if self.candidates else ""
            return f"Next: drop_order, which drops blocks whole{larger}."
        return "Next: measure .model on data that nothing was chosen on, and write it with save_shrunk."

    @property
    def headline(self) -> str:
        """The costs after as shares of those before; first of all, what became larger."""
        warning = f"LARGER ({', '.join(self.larger)}): " if self.larger else ""
        after = self.costs[-1] if self.costs else self.cost_before
        return (
            f"{warning}{_share(after.parameters, self.cost_before.parameters)} parameters, "
            f"{_share(after.flops, self.cost_before.flops)} FLOPs, "
            f"{1000 * self.seconds[1]:.3g} ms per batch after {1000 * self.seconds[0]:.3g} ms"
        )

    def __repr__(self) -> str:
        return f"Linearized({self.headline}; linear: {', '.join(self.components) or 'nothing'})"

    def __rich__(self) -> Fitted:
        title = f"{self.headline}\nMade linear one after the other"
        return self._table(title, self.verdict, self.next_step)


def _share(after: int, before: int) -> str:
    return f"{after / before:.0%} of the" if before else f"{after:,} after 0"


def linearize(
    model: nn.Module,
    batches: Iterable[Any],
    report: CreditReport | None = None,
    *,
    components: str | Sequence[str] | None = None,
    max_drop: float = 0.01,
    cost: CostName = "flops",
    budget: float = 0.0,
    allow_larger: bool = False,
    fit_batches: Iterable[Any] | None = None,
    metric: Metric | None = None,
    scale: Scale | None = None,
    samples: int = 512,
    variance: float = 0.999,
    max_dim: int = 256,
    forward_fn: ForwardFn | None = None,
) -> Linearized:
    """Replace components by linear layers, as long as the network gets smaller and loses little.

    A component becomes the ridge regression of its own output on the leading POD directions of its own
    input: of whole tensors, or where it has positions (tokens, pixels), of the channels of one, alike at
    all of them; the latter alone where no position depends on later ones, as in language models. It is
    stored as one ``nn.Linear``, or as two with a narrow state between them where that takes fewer
    operations. Activations and normalisations that count as part of it go with it. Neighbours in one
    ``nn.Sequential`` become a single map. A bare ``nn.Linear`` stays, unless it becomes part of one.

    Components are taken one after the other, whichever moves the outputs least per cost saved, measured
    anew for all that are left after each, as long as the loss is admitted and nothing gets larger.
    They are also taken from the last to the first and from the first to the last, for neighbours that
    become one map save more than each alone. The cheapest of the three networks is then improved: one
    more component, or two that become one map, are added or take the place of one, whichever is cheapest
    and admitted (of those as cheap, whichever moves the outputs least), until nothing is better. Each
    network takes one pass over the samples: of ``n`` components about ``n k`` until ``k`` are linear,
    then up to ``2 (n - k) k`` for each improvement.

    Args:
        model: Any module; it is left exactly as it was found.
        batches: Data: tensors, tuples of input and target, or mappings. Without ``fit_batches``, maps
            are fitted on those at even places, and components chosen on the others.
        report: Names the components; ``None`` chooses them as :func:`lightning_koopman.credit_report`
            does.
        components: Names or glob patterns of those that may become linear; ``None`` tries all.
        max_drop: Largest loss: drop of the metric, or where there is none, effect on the outputs.
        cost: What is to be saved: ``"flops"``, ``"parameters"`` or ``"seconds"``.
        budget: Share of the original cost that is enough.
        allow_larger: Whether the network may need more parameters, operations or time than before;
            components then become linear also where that saves nothing.
        fit_batches: Data to fit maps on; all of ``batches`` is then for choosing.
        metric: Called as ``metric(outputs, targets)``, larger is better; ``None`` takes the accuracy
            where targets are class indices, and none otherwise.
        scale: What effects are measured in, as in :func:`lightning_koopman.drop_order`.
        samples: Most samples that components are chosen on.
        variance: Share of the predicted variance that a pair of layers keeps.
        max_dim: Most POD directions of an input.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.

    Returns:
        The new network, and what was measured after each step.

    Raises:
        ValueError: If an argument is out of range, there are too few samples or batches, a component
            that was named cannot become linear, or the network got slower and ``allow_larger`` is false.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(6, 16), nn.Identity(), nn.Linear(16, 16), nn.Linear(16, 3))
        >>> small = linearize(net, torch.randn(400, 6).split(100), max_drop=1e-4, allow_larger=True)
        >>> small.costs[-1].flops < small.cost_before.flops
        True
    """
    check_model(model)
    if is_compiled(model):
        raise ValueError("the model went through torch.compile; linearize the module it was made from")
    check_copyable(model)
    check_max_drop(max_drop)
    check_type(NUMBER, variance=variance, budget=budget)
    check_type(INTEGER, max_dim=max_dim)
    if max_dim < 1:
        raise ValueError(f"max_dim is {max_dim}; a linear map needs at least one direction of its input")
    if not 0 < variance <= 1:
        raise ValueError(f"variance is {variance}; it must lie above 0 and at most at 1")
    if not 0 <= budget < 1:
        raise ValueError(f"budget is {budget}; it is a share of the original {cost}, from 0 to below 1")
    fit_on, choose_on = _two_parts(batches, fit_batches)
    runner = runner_on(model, choose_on, samples, forward_fn)
    with undisturbed(model):
        calls, outputs, refused = run_whole(runner, report, components, scale, metric, fit_on)
        fitting = ForwardRunner(model, fit_on, forward_fn)
        with explained(fitting):
            refuse_samples(fitting, fitting.run_batch(0)[0])
        maps = Maps(fitting, max_dim, variance)
        calls = maps.look_at(calls)
        refused = maps.check({n: c for n, c in calls.items() if n not in refused}, runner) | refused
        if components is not None and refused:
            name, why = next(iter(refused.items()))
            raise ValueError(f"{name!r} cannot become linear: {why}")
        search = Search(runner, outputs, maps, max_drop, _measure_of(cost), budget, allow_larger)
        steps = search.run({name: c for name, c in calls.items() if name not in refused})
        before = cost_of(runner)
        swaps = [] if not steps else maps.swaps(search.groups(search.chosen))
        seconds, slower = compare_times(runner, swaps)
    candidates = tuple(name for name in calls if name not in refused)
    notes = told_apart(search.unknown, "linear")
    if not steps and candidates and all(is_layer(model, calls[n], LINEAR) for n in candidates):
        notes.append(
            f"{listed(candidates)}: no activation of its own belongs to any of these, for one that is a "
            "function, such as torch.relu, or that several layers share, stays; where each layer has a "
            "module, such as nn.ReLU(), it becomes linear together with it"
        )
    found = Linearized(
        **as_fields(steps, search.outputs, notes),
        cost_before=before,
        candidates=candidates,
        refused=refused,
        max_drop=max_drop,
        model=copied_with(model, swaps),
        seconds=seconds,
        slower=slower,
    )
    if found.larger and not allow_larger:
        raise ValueError(
            f"with {', '.join(found.components)} linear the network is slower: {found.headline}. Set "
            "allow_larger to get it all the same, or cost to 'seconds' to save time"
        )
    return found


def _two_parts(batches: Iterable[Any], fit_batches: Iterable[Any] | None) -> tuple[list[Any], Any]:
    """Return batches to fit on, and others to choose on."""
    check_batches(batches if fit_batches is None else fit_batches)
    if fit_batches is not None:
        with random_states_kept(fit_batches):
            fit_on = list(fit_batches)
        if not fit_on:
            raise ValueError("fit_batches holds no batch; give some to fit maps on, or leave it out")
        return fit_on, batches
    with random_states_kept(batches):
        given = list(batches)
    if len(given) == 1:
        raise ValueError("one batch arrived, but maps are fitted on one and chosen on another; give two")
    return given[::2], given[1::2]


def _measure_of(cost: CostName) -> Measure:
    """Return what measures the cost that is to be saved."""
    if cost == "seconds":
        return lambda runner, _: least_seconds(runner)
    if cost in ("flops", "parameters"):
        return lambda _, found: float(getattr(found, cost))
    raise ValueError(f"cost is {cost!r}; choose 'flops', 'parameters' or 'seconds'")
