"""What decisions have in common: components that give way one after the other, each step measured."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape
from torch import Tensor, nn
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from lightning_koopman.decisions.swaps import Swap, put_back, registrations, swapped
from lightning_koopman.effects.alterations import altered_parts
from lightning_koopman.effects.returned import (
    Ends,
    choose_outputs,
    only_classes,
    run_followed,
    settle_units,
)
from lightning_koopman.effects.scoring import Measured, Metric, Outputs
from lightning_koopman.effects.targets import find_target
from lightning_koopman.network.access.hooks import attach_in
from lightning_koopman.network.access.isolation import fast_path
from lightning_koopman.network.arguments import NUMBER, check_given, check_type
from lightning_koopman.network.capture.capture import Capture
from lightning_koopman.network.capture.plan import ends_of
from lightning_koopman.network.components import matching
from lightning_koopman.network.runs.forward_runner import ForwardRunner
from lightning_koopman.network.runs.hook_points import find_module
from lightning_koopman.network.tensors import first_tensor
from lightning_koopman.report.effects import UNITS, Scale
from lightning_koopman.report.report import REPORT, CreditReport
from lightning_koopman.report.text import Fitted, Shown, with_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


_ROUNDING = 1e-12
"""A difference of two accuracies is off by less."""

SINGLE_SAMPLES = (
    "batches holds single samples, whose first axis would be taken for that of samples; pass "
    "DataLoader(batches, batch_size=256)"
)


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: Number of parameters.
        flops: Operations of one pass over the first batch, as ``torch.utils.flop_counter`` counts them:
            those of matrix products and convolutions, also where attention or an LSTM makes them.
    """

    parameters: int
    flops: int


class _NoModules(ModuleTracker):
    """Tells the counter of no module, for that takes hooks on gradients, which not all networks bear.

    Some differentiate in their forward, or take views of weights that ask for gradients.
    """

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(given: Sequence[int], ih: Sequence[int], hh: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(given[:-1]) * (math.prod(ih) + math.prod(hh))


def _all_recurrent(given: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    return 2 * math.prod(given[:-1]) * sum(math.prod(each) for each in weights if len(each) == 2)


def _bilinear(rows: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(rows[:-1]) * math.prod(weight)


# What processors run these by, and torch's own counter knows nothing of.
_UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent,
    torch.ops.aten._cudnn_rnn: _all_recurrent,
    torch.ops.aten._trilinear: _bilinear,
}


def cost_of(runner: ForwardRunner) -> Cost:
    """Measure what a network costs."""
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    counter.mod_tracker = _NoModules()
    # A fused operation counts as none.
    with fast_path(False), counter:
        runner.run_batch(0)
    return Cost(sum(p.numel() for p in runner.model.parameters()), counter.get_total_flops())


@dataclass(frozen=True)
class Step:
    """One component that gave way, with those before it, and what that did."""

    name: str
    measured: Measured
    cost: Cost


@dataclass(frozen=True, eq=False, repr=False)
class Steps(Shown):
    """Components that gave way one after the other, and what was measured after each.

    Entry ``k`` of an array is about the network in which the first ``k + 1`` of ``components`` gave way.

    Attributes:
        components: Names, in the order in which they gave way.
        effect: Change of the outputs from those of the whole network, shape ``(steps,)``.
        effect_stderr: Standard errors of the effects over samples.
        metric: Metric after each step; NaN where there is none.
        metric_stderr: Standard errors of its difference from ``metric_before``, paired over samples; NaN
            where the metric is not the accuracy.
        metric_before: Metric of the network as it is.
        metric_name: ``"accuracy"``, or ``"metric"`` where another one was given or there is none.
        costs: Parameters and operations after each step.
        cost_before: The same of the network as it is.
        candidates: All components that could give way, in order of execution.
        refused: By name, why a component cannot.
        max_drop: Loss that was admitted: drop of the metric, or effect where there is none.
        scale: Unit of effects, ``"kl"`` or ``"relative"``.
        n_samples: Samples that effects and metrics were measured on.
        notes: What a reader must know of the outputs that were looked at.
    """

    components: tuple[str, ...]
    effect: NDArray[np.float64]
    effect_stderr: NDArray[np.float64]
    metric: NDArray[np.float64]
    metric_stderr: NDArray[np.float64]
    metric_before: float
    metric_name: str
    costs: tuple[Cost, ...]
    cost_before: Cost
    candidates: tuple[str, ...]
    refused: Mapping[str, str]
    max_drop: float
    scale: Scale
    n_samples: int
    notes: tuple[str, ...]

    @property
    def loss(self) -> NDArray[np.float64]:
        """Drop of the metric after each step, or the effect where there is no metric."""
        return self.effect if math.isnan(self.metric_before) else self.metric_before - self.metric

    @property
    def within(self) -> int:
        """Number of steps, from the first on, that keep the loss within ``max_drop``."""
        return sum(1 for _ in itertools.takewhile(lambda x: is_within(x, self.max_drop), self.loss))

    def to_frame(self) -> DataFrame:
        """Return the steps as a pandas table.

        Returns:
            One row per step: the component that gave way, the effect and the metric from then on with
            their standard errors, what the network then costs, and whether the loss is within
            ``max_drop``.
        """
        import pandas

        return pandas.DataFrame({
            "step": range(1, len(self.components) + 1),
            "component": self.components,
            "effect": self.effect,
            "effect_stderr": self.effect_stderr,
            "metric": self.metric,
            "metric_stderr": self.metric_stderr,
            "parameters": [cost.parameters for cost in self.costs],
            "flops": [cost.flops for cost in self.costs],
            "within": [i < self.within for i in range(len(self.components))],
        })

    def plot(self, ax: Any = None) -> tuple[Figure, Any]:
        """Draw the loss after each step, with its standard error and the loss that was admitted.

        Args:
            ax: Matplotlib axes to draw on; ``None`` makes a figure.

        Returns:
            The figure and its axes.
        """
        from lightning_koopman.report.drawing import plot_steps, visible

        no_metric = math.isnan(self.metric_before)
        label = f"effect [{UNITS[self.scale]}]" if no_metric else f"{self.metric_name} that is lost"
        stderr = self.effect_stderr if no_metric else self.metric_stderr
        return plot_steps(self, stderr, label, visible(ax))

    def _unit(self) -> str:
        if not math.isnan(self.metric_before):
            return "of accuracy" if self.metric_name == "accuracy" else "of the metric"
        return UNITS[self.scale]

    def _table(self, title: str, *lines: str) -> Fitted:
        """Lay the steps out, those beyond the loss that was admitted dim, with lines below."""
        no_metric, name = math.isnan(self.metric_before), self.metric_name
        before = "" if no_metric else f", {name} {self.metric_before:.4f} as it was"
        # A line below the table has the unit in full.
        unit = UNITS[self.scale].replace(" the outputs'", "")
        columns: dict[str, Sequence[str]] = {
            "component": self.components,
            f"effect ({unit})": list(map(with_share, self.effect, self.effect_stderr)),
        }
        if not no_metric:
            columns[name] = [
                "" if math.isnan(value) else f"{value:.4f}" + ("" if math.isnan(e) else f"±{e:.4f}")
                for value, e in zip(self.metric, self.metric_stderr, strict=True)
            ]
        if own := self.cost_before.parameters:
            columns["parameters left"] = [f"{cost.parameters / own:.0%}" for cost in self.costs]
        if own := self.cost_before.flops:
            columns["FLOPs left"] = [f"{cost.flops / own:.0%}" for cost in self.costs]
        styles = [None if i < self.within else "dim" for i in range(len(self.components))]
        stays = [f"Stays: {escape(name)}, {escape(why)}" for name, why in self.refused.items()]
        title = f"{title}, {self.n_samples} samples{before}"
        notes = [f"Note: {escape(note)}" for note in self.notes]
        return Fitted(title, columns, (), styles, [*stays, *notes, *map(escape, lines)])


def as_fields(steps: Sequence[Step], outputs: Outputs, notes: Iterable[str]) -> dict[str, Any]:
    """Return what was measured step by step as fields of :class:`Steps`, with ``notes`` on it."""
    measured = np.array([step.measured for step in steps]).reshape(-1, len(Measured._fields))
    names = ("effect", "effect_stderr", "metric", "metric_stderr")
    return {
        "components": tuple(step.name for step in steps),
        **dict(zip(names, measured.T, strict=True)),
        "metric_before": outputs.metric,
        "metric_name": outputs.metric_name,
        "costs": tuple(step.cost for step in steps),
        "scale": outputs.scale,
        "n_samples": outputs.n_samples,
        "notes": (*outputs.notes, *notes),
    }


def loss_of(measured: Measured, outputs: Outputs) -> float:
    """Return the drop of the metric, or the effect where there is no metric."""
    return measured.effect if math.isnan(outputs.metric) else outputs.metric - measured.metric


def is_finite(measured: Measured, outputs: Outputs) -> bool:
    """Check whether an effect and the loss are numbers that others can be compared with."""
    return math.isfinite(measured.effect) and math.isfinite(loss_of(measured, outputs))


def told_apart(names: Iterable[str], how: str) -> list[str]:
    """Say of components that they were not chosen, for there is no number to choose them by."""
    notes: list[str] = []
    for name in names:
        notes.append(f"with {name!r} {how}, outputs or metric are not finite, so it was not chosen")
    return notes


def is_within(loss: float, max_drop: float) -> bool:
    """Check whether a loss is admitted; 0.93 − 0.92, which is 0.01 but for rounding, is within 0.01."""
    return loss <= max_drop + _ROUNDING


def check_max_drop(max_drop: float) -> None:
    """Refuse a loss below 0."""
    check_type(NUMBER, max_drop=max_drop)
    if not max_drop >= 0:
        raise ValueError(f"max_drop is {max_drop}; it must be 0 or above")


@contextmanager
def explained(runner: ForwardRunner, before: Sequence[Any] = ()) -> Generator[None, None, None]:
    """Tell what may be wrong with the data, of which ``before`` comes first, where a network fails."""
    try:
        yield
    except Exception as error:
        first, given = runner.batches[0], [*before, *runner.batches]
        target = find_target(first)
        lone = isinstance(error, TypeError) and target is not None and not target.ndim
        if lone or (_given(runner, first) is None and _given_one(runner) is not None):
            raise ValueError(SINGLE_SAMPLES) from error
        if len(given) == 2 and all(isinstance(t, Tensor) and t.ndim for t in given):
            alike = len(given[0]) == len(given[1]) and given[0].shape != given[1].shape
            if alike and [_given(runner, t) is None for t in given] == [False, True]:
                runs, fails = (tuple(t.shape) for t in given)
                raise ValueError(
                    f"the network runs on a tensor of shape {runs}, but on one of shape {fails} raised "
                    f"{type(error).__name__}: {error}; if they are an input and its target, pass "
                    "[(x, y)], for each would be taken for a batch"
                ) from error
        raise


def refuse_samples(runner: ForwardRunner, output: Tensor) -> None:
    """Refuse samples of one axis: a network takes it for features, and gives no row for each of them."""
    taken = first_tensor(runner.batches[0])
    if taken is not None and taken.ndim == 1 and len(taken) != len(output):
        one = _given_one(runner)
        if one is not None and one.shape == (1, *output.shape):
            raise ValueError(SINGLE_SAMPLES)


def _given(runner: ForwardRunner, batch: Any) -> Tensor | None:
    """Run the network on another batch; return its outputs, or nothing where it fails."""
    try:
        return ForwardRunner(runner.model, [batch], runner.forward_fn).run_batch(0)[0]
    except Exception:  # other people's code, which failed before
        return None


def _given_one(runner: ForwardRunner) -> Tensor | None:
    """Run the network as if the first batch were a sample."""
    try:
        batch = default_collate(runner.batches[:1])
    except Exception:  # of kinds that no loader takes
        return None
    return _given(runner, batch)


def run_whole(
    runner: ForwardRunner,
    report: CreditReport | None,
    components: str | Sequence[str] | None,
    scale: Scale | None,
    metric: Metric | None,
    before: Sequence[Any] = (),
) -> tuple[dict[str, tuple[str, ...]], Outputs, dict[str, str]]:
    """Run the network as it is, on data of which ``before`` comes first.

    Return the module calls of components, the outputs, and why components that lead elsewhere stay.
    """
    with explained(runner, before):
        calls, ends = _component_calls(runner, report, components)
        outputs, refused = _find_outputs(runner, calls, ends, scale, metric)
    return calls, outputs, refused


def _component_calls(
    runner: ForwardRunner, report: CreditReport | None, components: str | Sequence[str] | None
) -> tuple[dict[str, tuple[str, ...]], Ends]:
    """Find the module calls that each component is made of, in order of execution.

    The second that comes back is what the network ends with, where that is known.
    """
    check_given(REPORT, report=report)
    if report is not None:
        calls, ends = altered_parts(report), Ends.of(report)
    else:
        capture = Capture(runner.model, keep=lambda tensor, recorded: recorded)
        with capture:
            capture.start_pass(runner.batches[0])
            runner.run_batch(0)
            records = list(capture.end_pass().values())
        calls, ends = capture.parts, Ends()
        if capture.untraced is None:
            returned, in_losses = capture.returned.made_of, capture.returned.in_losses
            ends = Ends.among(calls, ends_of(records, returned, in_losses, runner.batches[0]))
    if components is None:
        return calls, ends
    chosen, strangers = matching(calls, components)
    if strangers:
        raise ValueError(
            f"no component is called {strangers!r}; there are {tuple(calls)}. Others than those chosen "
            "by default are named by a report on them"
        )
    return {name: own for name, own in calls.items() if name in chosen}, ends


def _find_outputs(
    runner: ForwardRunner,
    calls: Mapping[str, Sequence[str]],
    ends: Ends,
    scale: Scale | None,
    metric: Metric | None,
) -> tuple[Outputs, dict[str, str]]:
    """Run the network as it is; return its outputs, and why components that lead elsewhere stay."""
    last = {name: own[-1] for name, own in calls.items()}
    first, led, search = run_followed(runner, (), calls.values(), ends)
    target = search.target_of(runner.batches[0])
    about = choose_outputs(runner, first, led, target, scale, metric)
    outputs: list[Tensor] = []
    for number in runner.until_enough(outputs):
        outputs.append(runner.run_batch(number)[0].detach().cpu())
    settle_units(runner, outputs)
    refuse_samples(runner, outputs[0])
    targets = runner.targets_of(outputs, search.target_of)
    known, doubted = only_classes(runner, outputs, targets, scale, metric, search)
    notes = (*about.notes, *runner.notes, *doubted)
    why = "it leads to none of the outputs that are looked at"
    refused = {name: why for name, call in last.items() if call in about.unseen}
    return Outputs(outputs, runner.batches, scale, metric, known, notes, search=search), refused


class _Witness(nn.Module):
    """Stands where a module is registered, passes for it, and lets it do what it does."""

    def __init__(self, module: nn.Module, seen: Seen) -> None:
        super().__init__()
        self._modules["module"], self._seen = module, seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._seen.in_place = True
        return self._modules["module"](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_modules"]["module"], name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The type that a network finds if it asks for it."""
        return type(vars(self)["_modules"]["module"])


@dataclass
class Seen:
    """What one pass showed of a module.

    Attributes:
        runs: How often it ran.
        in_place: Whether the network called what is registered under its name.
        taken: The first floating-point tensor that it took, if any.
        alone: Whether that was its first argument, and no other argument was a tensor.
        given: What it gave.
    """

    runs: int = 0
    in_place: bool = False
    taken: Tensor | None = None
    alone: bool = False
    given: Any = None


def look_at(runner: ForwardRunner, components: Mapping[str, Sequence[str]]) -> dict[str, Seen]:
    """Run one batch and see what the modules of components take and give, by module call."""
    seen = {call: Seen() for calls in components.values() for call in calls}

    def before(call: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        seen[call].taken = first_tensor((args, kwargs))
        seen[call].alone = len(tensors) == 1 and bool(args) and args[0] is seen[call].taken

    def after(call: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen[call].runs += 1
        seen[call].given = output

    hang = attach_in(runner.model)
    with ExitStack() as hooks:
        modules = {call: find_module(runner.model, call)[0] for call in seen}
        for call, module in modules.items():
            ends = (functools.partial(before, call), functools.partial(after, call))
            hooks.enter_context(hang(module, before=ends[0], after=ends[1]))
        hooks.enter_context(_witnessed(runner.model, modules, seen))
        runner.run_batch(0)
    return seen


@contextmanager
def _witnessed(
    model: nn.Module, modules: Mapping[str, nn.Module], seen: Mapping[str, Seen]
) -> Generator[None, None, None]:
    """See which modules are called where they are registered."""
    places = [(place, call) for call, m in modules.items() for place in registrations(model, m)]
    with put_back(model, modules.values()):
        for (parts, key), call in places:
            parts[key] = _Witness(modules[call], seen[call])
        yield


def failure_with(runner: ForwardRunner, swap: Swap) -> str:
    """Say how a network fails on one batch with a swap in place, or nothing."""
    try:
        with swapped(runner.model, [swap]):
            runner.run_batch(0)
    except Exception as error:  # the network's own code may raise anything
        return f"{type(error).__name__}: {error}"
    return ""
