"""Replaces components by linear layers, within a drop of a metric."""

from __future__ import annotations

import copy
import functools
import io
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_koopman.effects.alterations import check_components
from lightning_koopman.effects.linear_map import LinearFit, LinearMap
from lightning_koopman.effects.scoring import Metric, Outputs
from lightning_koopman.network.components import clean_name
from lightning_koopman.network.forward_runner import (
    NO_SAMPLES,
    ForwardFn,
    ForwardRunner,
    default_forward,
    device_of,
    to_device,
)
from lightning_koopman.network.hook_points import HookPoint, attach, find_module
from lightning_koopman.network.isolation import is_compiled, random_states_kept, undisturbed
from lightning_koopman.network.weights import CheckpointError, apply_checkpoint, load_checkpoint
from lightning_koopman.report.report import CreditReport
from lightning_koopman.report.saved import write_atomically


@dataclass(frozen=True)
class Cost:
    """What one forward pass of a network costs.

    Attributes:
        parameters: Number of parameters.
        flops: Floating-point operations of one pass over the batch, as
            ``torch.utils.flop_counter`` counts them: matrix products and convolutions.
        seconds: Median time of one pass over the batch.
    """

    parameters: int
    flops: int
    seconds: float


def measure_costs(
    models: list[nn.Module], batch: Any, *, forward_fn: ForwardFn | None = None, repeats: int = 30
) -> list[Cost]:
    """Measure several networks on the same batch, taking turns so that all see the same machine."""
    forward = default_forward if forward_fn is None else forward_fn
    seconds: list[list[float]] = [[] for _ in models]
    flops = []
    for model in models:
        with undisturbed(model), FlopCounterMode(display=False) as counter:
            forward(model, to_device(batch, device_of(model)))
        flops.append(counter.get_total_flops())
    for _ in range(repeats):
        for model, taken in zip(models, seconds, strict=True):
            given = to_device(batch, device_of(model))
            with undisturbed(model):
                start = time.perf_counter()
                forward(model, given)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                taken.append(time.perf_counter() - start)
    return [
        Cost(sum(p.numel() for p in model.parameters()), count, statistics.median(taken))
        for model, count, taken in zip(models, flops, seconds, strict=True)
    ]


class LinearComponent(nn.Module):
    """One ``nn.Linear``, or two with a narrow state between them, in place of a component."""

    def __init__(
        self,
        in_features: int,
        shape: Sequence[int],
        rank: int | None = None,
        replaces: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.in_features, self.shape, self.rank = in_features, tuple(shape), rank
        self.replaces = tuple(replaces)
        out_features = int(torch.Size(self.shape).numel())
        self.layers: nn.Module = (
            nn.Linear(in_features, out_features)
            if rank is None
            else nn.Sequential(nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features))
        )

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Apply the map."""
        flat: Tensor = self.layers(x.flatten(1))
        return flat.reshape(-1, *self.shape)

    def extra_repr(self) -> str:
        """Return what it stands for, as text."""
        return f"shape={self.shape}, replaces={self.replaces}"


def put_in_place(model: nn.Module, component: LinearComponent) -> None:
    """Put a linear component where the first module it replaces is, and nothing where the others are."""
    raw = {clean_name(name): name for name, _ in model.named_modules()}
    first, *others = component.replaces
    model.set_submodule(raw[first], component)
    for name in others:
        model.set_submodule(raw[name], nn.Identity())


def _copied(model: nn.Module) -> nn.Module:
    """Copy a network, also where a module holds a tensor with a graph, as a weight that it derives."""
    held = (value for module in model.modules() for value in vars(module).values())
    graphs = [t for t in held if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in graphs})


def linear_components(model: nn.Module) -> list[LinearComponent]:
    """List a network's linear components."""
    return [module for module in model.modules() if isinstance(module, LinearComponent)]


def save_linearized(
    model: nn.Module, path: str | os.PathLike[str], *, more: Mapping[str, Any] | None = None
) -> None:
    """Write a network with linear components as a checkpoint that :func:`load_linearized` reads."""
    swaps = [
        {
            "in_features": component.in_features,
            "shape": list(component.shape),
            "rank": component.rank,
            "replaces": list(component.replaces),
        }
        for component in linear_components(model)
    ]
    # torch.save destroys the file first, and tells of a full disk by an internal error.
    content = io.BytesIO()
    torch.save(dict(more or {}) | {"state_dict": model.state_dict(), "linearized": swaps}, content)
    with write_atomically(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_linearized(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Read a network with linear components.

    Args:
        model: A network of the architecture that was linearised; it is left alone.
        path: File written by :func:`save_linearized`.

    Returns:
        A new network, with the weights in the file.

    Raises:
        CheckpointError: If the file is no such checkpoint or does not fit the model.
    """
    checkpoint = load_checkpoint(path)
    swaps = torch.load(path, map_location="cpu", weights_only=True).get("linearized")
    if not isinstance(swaps, list):
        raise CheckpointError(f"{os.fspath(path)} holds no linear components; load it as usual")
    new = _copied(model)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    held = sum(tensor.numel() for tensor in checkpoint.state_dict.values())
    for swap in swaps:
        try:
            with torch.device("meta"):
                component = LinearComponent(**swap)
            # A file may claim any width, so nothing is allocated before this.
            if sum(p.numel() for p in component.parameters()) > held:
                raise ValueError("it is larger than the file")
            put_in_place(new, component.to_empty(device="cpu").to(dtype))
        except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{os.fspath(path)} does not fit {type(model).__name__}: a linear component cannot be "
                f"put in its place ({type(error).__name__}: {error})"
            ) from None
    apply_checkpoint(new, checkpoint)
    return new


def groups_to_replace(
    model: nn.Module, report: CreditReport, components: Sequence[str], merge: bool
) -> list[list[str]]:
    """Find the modules that become one map each."""
    groups: list[list[str]] = []
    for name in report.components:
        calls = list(report.parts[name])
        if name not in components:
            continue
        if merge and groups and _follows(model, groups[-1][-1], calls[0]):
            groups[-1] += calls
        else:
            groups.append(calls)
    bare = [len(g) == 1 and type(find_module(model, g[0])[0]) is nn.Linear for g in groups]
    return [group for group, already in zip(groups, bare, strict=True) if not already]


def _follows(model: nn.Module, call: str, following: str) -> bool:
    """Whether two modules are neighbours in one Sequential, so that nothing else sees between them."""
    parent = call.rpartition(".")[0]
    if parent != following.rpartition(".")[0] or not isinstance(
        find_module(model, parent)[0], nn.Sequential
    ):
        return False
    order = [child for child, _ in find_module(model, parent)[0].named_children()]
    places = [order.index(name.rpartition(".")[2]) for name in (call, following) if "#" not in name]
    return len(places) == 2 and places[1] - places[0] == 1


def check_replaceable(calls: Sequence[str], runner: ForwardRunner) -> None:
    """Run one batch to see that each module runs once, takes one tensor and gives one."""
    model = runner.model
    seen: dict[str, int] = dict.fromkeys(calls, 0)

    def look(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen[name] += 1
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(tensors) != 1 or not args or tensors[0] is not args[0] or not isinstance(output, Tensor):
            raise ValueError(
                f"{name!r} takes {len(tensors)} tensors and gives {type(output).__name__}; only a "
                "module that takes one tensor first and gives one can become linear"
            )

    with ExitStack() as hooks:
        for call in calls:
            module, number = find_module(model, call)
            if number:
                raise ValueError(
                    f"{call!r} is a module's second call; only modules that run once can go"
                )
            hooks.enter_context(attach(module, after=functools.partial(look, call)))
        ForwardRunner(model, runner.batches[:1], runner.forward_fn).run()
    repeated = [name for name, count in seen.items() if count != 1]
    if repeated:
        raise ValueError(
            f"{repeated} run {[seen[name] for name in repeated]} times in one pass; only modules that "
            "run once can become linear. Give each place a module of its own."
        )


def linearize(
    model: nn.Module,
    report: CreditReport,
    components: Sequence[str],
    batches: Iterable[Any],
    *,
    merge: bool = True,
    variance: float = 0.999,
    max_dim: int = 256,
    forward_fn: ForwardFn | None = None,
    seed: int = 0,
) -> nn.Module:
    """Replace components of a trained network by linear layers.

    A component becomes the ridge regression of its own whole output on the leading POD directions of
    its own input, fitted on ``batches``. It is stored as one ``nn.Linear``, or as two with a narrow
    state between them where that takes fewer operations. Activations and normalisations that the report
    counts as part of it go with it.

    Neighbours in one ``nn.Sequential`` become a single map from the first one's input to the last one's
    output. A component that is a bare ``nn.Linear`` stays as it is, unless it is merged.

    Args:
        model: The network that the report was measured on; it is left alone.
        report: Names the modules that the components are made of.
        components: Which components.
        batches: Data to fit on.
        merge: Whether neighbours become one map.
        variance: Share of the predicted variance that a pair of layers keeps.
        max_dim: Most POD directions of an input.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.
        seed: Chooses the folds that the ridge weight is picked on.

    Returns:
        A new network. Its ``state_dict`` is saved as usual, and loaded into another network linearised
        alike; :func:`load_linearized` builds one from the original.

    Raises:
        ValueError: If an argument is out of range, no sample arrives, or a component cannot be
            replaced: it runs several times, shares a module, takes several tensors or gives no tensor.
    """
    if is_compiled(model):
        raise ValueError("the model went through torch.compile; linearize the module it was made from")
    check_components(report, components)
    if not 0 < variance <= 1:
        raise ValueError(f"variance is {variance}; it must lie above 0 and at most at 1")
    runner = ForwardRunner(model, batches, forward_fn)
    if not runner.batches:
        raise ValueError(NO_SAMPLES)
    groups = groups_to_replace(model, report, components, merge)
    ends = [(HookPoint("in", group[0]), HookPoint("out", group[-1])) for group in groups]
    fits = [LinearFit(max_dim, seed=seed) for _ in groups]

    def update(values: Mapping[HookPoint, Tensor]) -> None:
        for (source, target), fit in zip(ends, fits, strict=True):
            fit.update([values[source]], values[target])

    with undisturbed(model):
        check_replaceable([call for group in groups for call in group], runner)
        if groups:
            runner.run([point for pair in ends for point in pair], update=update)
    new = _copied(model)
    with random_states_kept():  # new layers draw weights before they are given theirs
        for group, fit in zip(groups, fits, strict=True):
            like = next(find_module(model, group[0])[0].parameters(), torch.empty(0))
            put_in_place(new, as_component(fit.solve(), group, variance).to(like))
    return new


@dataclass(frozen=True, eq=False)
class Linearized:
    """A linearised network, and what that saved and lost.

    Attributes:
        model: The new network.
        components: The components that were replaced.
        metric: Metric before and after, on the data that the components were chosen on; NaN where
            there is none.
        change: Effect on the outputs, as in :class:`lightning_koopman.report.effects.Effects`.
        before: Cost of the original network.
        after: Cost of the new one.
    """

    model: nn.Module = field(repr=False)
    components: tuple[str, ...]
    metric: tuple[float, float]
    change: float
    before: Cost
    after: Cost

    def __rich__(self) -> Table:
        table = Table(
            title=f"Linear now: {', '.join(self.components) or 'nothing'}",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for name in ("", "before", "after"):
            table.add_column(name, justify="right" if name else "left")
        table.add_row("metric", *(f"{value:.4f}" for value in self.metric))
        table.add_row("parameters", f"{self.before.parameters:,}", f"{self.after.parameters:,}")
        table.add_row("FLOPs a batch", f"{self.before.flops:,}", f"{self.after.flops:,}")
        seconds = (self.before.seconds, self.after.seconds)
        table.add_row("ms a batch", *(f"{1000 * value:.3f}" for value in seconds))
        return table


def linearize_within(
    model: nn.Module,
    report: CreditReport,
    fit_batches: Iterable[Any],
    choose_batches: Iterable[Any],
    *,
    max_drop: float = 0.01,
    metric: Metric | None = None,
    forward_fn: ForwardFn | None = None,
    **options: Any,
) -> Linearized:
    """Replace as many components as keep the metric within a drop.

    Components are tried one after the other, those of least reported nonlinearity first; each is kept
    if the metric of the network with all kept so far stays within the drop.
    """
    if not max_drop >= 0:
        raise ValueError(f"max_drop is {max_drop}; it must be 0 or above")
    with random_states_kept(fit_batches):
        fit_on = list(fit_batches)
    runner = ForwardRunner(model, choose_batches, forward_fn)
    with undisturbed(model):
        before = Outputs(runner.run(), runner.batches, None, metric)
    chosen: list[str] = []
    best, change, after = model, 0.0, before.metric
    for i in np.argsort(report.nonlinearity, kind="stable"):
        tried = [name for name in report.components if name in {*chosen, report.components[i]}]
        candidate = linearize(model, report, tried, fit_on, forward_fn=forward_fn, **options)
        with undisturbed(candidate):
            moved = before.compare(ForwardRunner(candidate, runner.batches, forward_fn).run())
        drop = moved.effect if np.isnan(before.metric) else before.metric - moved.metric
        if drop <= max_drop:
            chosen, best, change, after = tried, candidate, moved.effect, moved.metric
    costs = measure_costs([model, best], runner.batches[0], forward_fn=forward_fn)
    return Linearized(best, tuple(chosen), (before.metric, after), change, *costs)


def as_component(linear_map: LinearMap, replaces: Sequence[str], variance: float) -> LinearComponent:
    """Make a module of a map: two thin layers where they take fewer operations, else one."""
    left, right, bias = linear_map.factors(variance)
    d_in, rank, d_out = left.shape[0], left.shape[1], right.shape[1]
    thin = rank * (d_in + d_out) < d_in * d_out
    module = LinearComponent(d_in, linear_map.shape, rank if thin else None, replaces).double()
    if thin:
        weights = {"0.weight": left.T, "1.weight": right.T, "1.bias": bias}
    else:
        matrix, bias = linear_map.dense()
        weights = {"weight": matrix.T, "bias": bias}
    module.layers.load_state_dict(weights)
    return module
