"""How many bits the weights of each component keep, under a budget."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from lightning_koopman.decisions.steps import is_finite, run_whole, told_apart
from lightning_koopman.decisions.swaps import copied_with
from lightning_koopman.effects.alterations import Alterations
from lightning_koopman.effects.replacements import is_stored_otherwise, other_matrices, rounded_weights
from lightning_koopman.effects.scoring import Measured, Metric, Outputs, over_draws
from lightning_koopman.network.access.isolation import is_expanded, undisturbed
from lightning_koopman.network.arguments import INTEGER, NUMBER, check_each, check_given, check_type
from lightning_koopman.network.names import module_of
from lightning_koopman.network.runs.forward import ForwardFn
from lightning_koopman.network.runs.forward_runner import ForwardRunner, runner_on
from lightning_koopman.network.runs.hook_points import find_module
from lightning_koopman.report.effects import UNITS, Scale
from lightning_koopman.report.report import CreditReport
from lightning_koopman.report.text import Fitted, Shown, with_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False, repr=False)
class BitWidths(Shown):
    """Numbers of bits for the weights of each component, and what the network does with them.

    Attributes:
        components: Names, in order of execution.
        bits: By component, the number of bits that was chosen.
        weights: By component, how many weights have them.
        options: The numbers of bits that there were to choose from.
        average: Bits per weight, over all weight matrices of the components: those that no layer
            multiplies by (tables, matrices of modules that do more than that) keep the bits that they
            have, and a note says so.
        budget: Bits per weight that were admitted, over those that are rounded.
        effects: Effect on the outputs of giving one component that many bits, the rest of the network as
            it is, shape ``(components, options)``.
        effects_stderr: Standard errors of the effects over samples.
        effect: Effect on the outputs with all of ``bits``, measured.
        effect_stderr: Its standard error.
        metric: Metric with all of ``bits``; NaN where there is none.
        metric_stderr: Standard error of its difference from ``metric_before``, paired over samples.
        metric_before: Metric of the network as it is.
        alike: The measured effect of giving all components the most bits that ``budget`` admits for all,
            by that number.
        solver: Which of the ways found the bits, see :func:`bit_widths`.
        scale: Unit of effects, ``"kl"`` or ``"relative"``.
        n_samples: Samples that all of this was measured on.
        group_size: Inputs that share a scale; ``None`` is all of an output channel.
        notes: What a reader must know of the outputs that were looked at.
        parts: By component, the modules that hold its weights.
    """

    components: tuple[str, ...]
    bits: tuple[int, ...]
    weights: tuple[int, ...]
    options: tuple[int, ...]
    average: float
    budget: float
    effects: NDArray[np.float64]
    effects_stderr: NDArray[np.float64]
    effect: float
    effect_stderr: float
    metric: float
    metric_stderr: float
    metric_before: float
    alike: Mapping[int, float]
    solver: str
    scale: Scale
    n_samples: int
    group_size: int | None
    notes: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]

    def apply(self, model: nn.Module) -> nn.Module:
        """Return a copy of the network with the weights that the integers stand for.

        The numbers are those that a quantised network computes with; they are stored as before, for
        kernels of three bits are the business of a runtime.

        Args:
            model: The network that the bits were chosen on; it is left alone.

        Returns:
            A new network.
        """
        new = copied_with(model, [])
        inside = [call for own in self.parts.values() for call in own]
        rounded = {b: rounded_weights(model, b, self.group_size, inside) for b in {*self.bits}}
        kinds = {_kind(option): weights for option, weights in rounded.items()}
        alterations = Alterations(new, self.parts, tuple(kinds), replacements=kinds)
        with ExitStack() as altered:
            for name, option in zip(self.components, self.bits, strict=True):
                altered.enter_context(alterations.weights.altered(_kind(option), [name]))
            tensors = [tensor for calls in self.parts.values() for tensor in _held(new, calls)]
            values = [tensor.detach().clone() for tensor in tensors]
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                if is_expanded(tensor):
                    tensor.data = value
                tensor.copy_(value)
        return new

    def to_frame(self) -> DataFrame:
        """Return the choice as a pandas table, one row per component.

        Returns:
            The component, its number of weights, the bits that were chosen, and for each number of bits
            the effect with its standard error.
        """
        import pandas

        rows = {"component": self.components, "weights": self.weights, "bits": self.bits}
        for column, option in enumerate(self.options):
            rows[f"effect_{option}"] = tuple(self.effects[:, column])
            rows[f"effect_{option}_stderr"] = tuple(self.effects_stderr[:, column])
        return pandas.DataFrame(rows)

    def plot(self, ax: Any = None) -> tuple[Figure, Any]:
        """Draw the effect of each number of bits per component, those that were chosen filled.

        Args:
            ax: Matplotlib axes to draw on; ``None`` makes a figure.

        Returns:
            The figure and its axes.
        """
        from lightning_koopman.report.drawing import plot_bits, visible

        return plot_bits(self, f"effect [{UNITS[self.scale]}]", visible(ax))

    @property
    def verdict(self) -> str:
        """What was chosen and what it costs, in one line."""
        beside = [f"{b} bits everywhere {value:.2g}" for b, value in self.alike.items()]
        name = "metric" if math.isnan(self.metric_stderr) else "accuracy"
        lost = (
            "" if math.isnan(self.metric) else f", {name} {self.metric_before:.4f} → {self.metric:.4f}"
        )
        return (
            f"{self.average:.2f} bits per weight: effect {self.effect:.2g} {UNITS[self.scale]}{lost} "
            f"({', '.join(beside)})."
        )

    @property
    def next_step(self) -> str:
        """What to do next, in one line."""
        return (
            "Next: .apply(model) gives the network; measure it on other data, then set these bits in "
            "your quantiser."
        )

    def __repr__(self) -> str:
        chosen = ", ".join(f"{name}: {b}" for name, b in zip(self.components, self.bits, strict=True))
        return f"BitWidths({self.average:.2f} bits per weight, effect {self.effect:.2g}; {chosen})"

    def __rich__(self) -> Fitted:
        columns = {
            "component": self.components,
            "weights": [f"{n:,}" for n in self.weights],
            "bits": [f"{b}" for b in self.bits],
        }
        columns |= {
            f"effect at {option}": list(map(with_share, *found))
            for option, *found in zip(self.options, self.effects.T, self.effects_stderr.T, strict=True)
        }
        title = f"Bits per component, {self.n_samples} samples"
        notes = [f"Note: {note}" for note in self.notes]
        lines = list(map(escape, (*notes, self.verdict, self.next_step)))
        return Fitted(title, columns, (), (), lines)


def bit_widths(
    model: nn.Module,
    batches: Iterable[Any],
    report: CreditReport | None = None,
    *,
    bits: Sequence[int] = (8, 4, 3, 2),
    average: float = 3.0,
    components: str | Sequence[str] | None = None,
    group_size: int | None = None,
    metric: Metric | None = None,
    scale: Scale | None = None,
    samples: int = 512,
    forward_fn: ForwardFn | None = None,
) -> BitWidths:
    """Choose how many bits the weights of each component keep, so many per weight on average.

    Weights are rounded by :func:`lightning_koopman.effects.replacements.quantized_weights`. One pass
    over the samples per component and number of bits measures its effect e, and how it moves every
    output, z. The effect of several components together is taken to be the sum of
    ``H_ij = cos(z_i, z_j) sqrt(e_i e_j)`` over all pairs, in the metric of the softmax's Fisher
    information, or of squares. Two choices are made: the exact one for single effects alone, an integer
    programme (``"milp"``, by SciPy's HiGHS), and the best that changes of one or two components find
    from there for all pairs (``"exchange"``). Both networks are measured and improved: of all changes of
    one or two components within the budget, those with the least sum over all pairs are measured, as
    many as there are components, and the best of them is kept (``"measured"``), until none is better.
    The network whose outputs then move less is taken.

    Args:
        model: Any module; it is left exactly as it was found.
        batches: Data to measure on: tensors, tuples of input and target, or mappings.
        report: Names the components; ``None`` chooses them as :func:`lightning_koopman.credit_report`
            does. Those that hold no layer with weights to be rounded, or such as are quantised already
            or derived from others that cannot be set so, keep theirs.
        bits: Numbers of bits to choose from, 2 to 8.
        average: Bits per weight, over the weights of all components that are rounded.
        components: Names or glob patterns of those that are rounded; ``None`` takes all.
        group_size: Inputs that share a scale; ``None`` takes all of an output channel.
        metric: Called as ``metric(outputs, targets)``; ``None`` takes the accuracy where targets are
            class indices, and none otherwise.
        scale: What effects are measured in, as in :func:`lightning_koopman.drop_order`.
        samples: Most samples that are looked at, from everywhere in ``batches``, as in
            :func:`lightning_koopman.credit_report`.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.

    Returns:
        The bits, all effects, and what the network with these bits does.

    Raises:
        ValueError: If an argument is out of range, no sample arrives, or nothing can be rounded.
        ImportError: If ``torchao`` is missing.
    """
    check_each(INTEGER, bits=bits)
    check_type(NUMBER, average=average)
    check_given(INTEGER, group_size=group_size)
    options = tuple(sorted({*bits}, reverse=True))
    if not options or not min(options) <= average:
        raise ValueError(
            f"average is {average}, below all numbers of bits to choose from, {tuple(bits)}; raise it, "
            "or add a smaller one"
        )
    runner = runner_on(model, batches, samples, forward_fn)
    with undisturbed(model):
        calls, outputs, refused = run_whole(runner, report, components, scale, metric)
        calls = {name: own for name, own in calls.items() if name not in refused}
        inside = [module_of(call) for own in calls.values() for call in own]
        rounded = {option: rounded_weights(model, option, group_size, inside) for option in options}
        parts, sizes = _with_weights(calls, rounded[options[0]])
        otherwise = "they are not stored as the numbers that they stand for, as those quantised already"
        for name in (name for name in calls if name not in parts):
            if any(map(is_stored_otherwise, _held(model, calls[name]))):
                refused[name] = otherwise
        # Those of tables alone keep their weights, too, but have them.
        bare = [own for name, own in calls.items() if name not in parts and name not in refused]
        if not parts:
            raise ValueError(
                f"none of {tuple(calls)} holds a linear, convolutional, attention or recurrent layer, "
                "whose weights could be rounded; name other components"
            )
        altered = _Rounded(runner, outputs, parts, rounded)
        refused |= (stay := altered.unsettable())
        if len(stay) == len(parts):
            raise ValueError(
                f"the weights of {tuple(parts)} cannot be rounded: {next(iter(stay.values()))}; name "
                "other components"
            )
        parts = {name: own for name, own in parts.items() if name not in stay}
        tried = {name: [altered.alone(name, option) for option in options] for name in parts}
        notes = list(outputs.notes)
        for name, row in tried.items():
            odd = [b for b, (m, _) in zip(options, row, strict=True) if not is_finite(m, outputs)]
            notes.extend(text for b in odd for text in told_apart([name], f"rounded to {b} bits"))
        names = tuple(name for name, row in tried.items() if any(is_finite(m, outputs) for m, _ in row))
        if not names:
            raise ValueError(
                f"with any of {tuple(parts)} rounded, outputs or metric are not finite, so nothing can "
                "be chosen; give other batches or larger numbers of bits"
            )
        counts = np.array([sizes[name] for name in names], dtype=np.float64)
        found = [tried[name] for name in names]
        effects = np.array([[measured.effect for measured, _ in row] for row in found])
        known = np.array([[is_finite(measured, outputs) for measured, _ in row] for row in found])
        costs, allowed = np.outer(counts, options), average * counts.sum()
        if np.where(known, costs, np.inf).min(axis=1).sum() > allowed * (1 + 1e-12):
            raise ValueError(
                f"average is {average}, and with so few bits outputs or metric are not finite; admit "
                "more"
            )
        ranked = np.where(known, effects, np.inf)
        pairs = _pairs(ranked, torch.stack([z for row in found for _, z in row]))

        @functools.cache  # a choice comes up again, near the next one
        def together(places: tuple[int, ...]) -> Measured:
            return altered.together(dict(zip(names, (options[k] for k in places), strict=True)))

        exact = solve_exactly(ranked, costs, allowed)
        chosen = {"milp": exact, "exchange": exchange(pairs, costs, allowed, exact)}
        improved = {
            solver: improve(pairs, costs, allowed, (start, together(start)), together)
            for solver, start in chosen.items()
        }
        solver = min(improved, key=lambda name: _rank(improved[name][1]))
        places, best = improved[solver]
        most = next(b for b in options if b <= average)
        alike = {most: altered.together(dict.fromkeys(names, most)).effect}
    final = tuple(options[k] for k in places)
    for name, why in refused.items():
        notes.append(f"{name!r} keeps its weights: {why}")
    parts = {name: parts[name] for name in names}
    modules = [find_module(model, call)[0] for own in (*parts.values(), *bare) for call in own]
    kept = other_matrices(modules)
    size, spent = sum(p.numel() for p in kept), sum(8 * _nbytes(p) for p in kept)
    if kept:
        notes.append(
            f"{size:,} of {size + int(counts.sum()):,} weights of the components are in no layer that "
            f"can be rounded and keep {spent / size:.3g} bits; the bits per weight count them, the "
            "budget does not"
        )
    return BitWidths(
        components=names,
        bits=final,
        weights=tuple(int(n) for n in counts),
        options=options,
        average=float((np.dot(final, counts) + spent) / (counts.sum() + size)),
        budget=average,
        effects=effects,
        effects_stderr=np.array([[measured.effect_stderr for measured, _ in row] for row in found]),
        effect=best.effect,
        effect_stderr=best.effect_stderr,
        metric=best.metric,
        metric_stderr=best.metric_stderr,
        metric_before=outputs.metric,
        alike=alike,
        solver=solver if places == chosen[solver] else "measured",
        scale=outputs.scale,
        n_samples=outputs.n_samples,
        group_size=group_size,
        notes=tuple(notes),
        parts=parts,
    )


def _held(model: nn.Module, calls: Iterable[str]) -> list[Tensor]:
    """Return the parameters and buffers of some modules, each once."""
    modules = [find_module(model, call)[0] for call in calls]
    held = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return list({id(tensor): tensor for tensor in held}.values())


def _with_weights(
    calls: Mapping[str, tuple[str, ...]], weights: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    """Keep the components that hold weights to be rounded, each module once, and count their weights."""
    parts: dict[str, tuple[str, ...]] = {}
    sizes: dict[str, int] = {}
    taken: set[str] = set()
    for name, own in calls.items():
        # What the first call gives may be no state, as where a loop begins with zeros.
        modules = list(dict.fromkeys(map(module_of, own)))
        keys = {key for key in weights for m in modules if key.startswith(f"{m}.")} - taken
        if keys:
            parts[name] = tuple(modules)
            sizes[name] = sum(weights[key].numel() for key in keys)
            taken |= keys
    return parts, sizes


def _nbytes(weight: Tensor) -> int:
    """Return the size of a weight as it is stored."""
    flatten = getattr(weight, "__tensor_flatten__", None) if is_stored_otherwise(weight) else None
    return sum(_nbytes(getattr(weight, name)) for name in flatten()[0]) if flatten else weight.nbytes


class _Rounded:
    """Runs a network with some of its weights rounded."""

    def __init__(
        self,
        runner: ForwardRunner,
        outputs: Outputs,
        parts: Mapping[str, Sequence[str]],
        rounded: Mapping[int, Mapping[str, Tensor]],
    ) -> None:
        kinds = {_kind(option): weights for option, weights in rounded.items()}
        self._alterations = Alterations(runner.model, parts, tuple(kinds), replacements=kinds)
        self._runner, self._outputs = runner, outputs

    def unsettable(self) -> dict[str, str]:
        """Say why the weights of components cannot be set to others."""
        found = self._alterations.weights.unsettable(self._alterations.kinds)
        return {name: error.why for (_, name), error in found.items()}

    def alone(self, name: str, option: int) -> tuple[Measured, Tensor]:
        """Round one component: the effect, and how that moves the outputs, in the metric of effects."""
        with self._alterations.weights.altered(_kind(option), [name]):
            given = self._runner.run()
        return over_draws([self._outputs.compare(given)]), self._outputs.displacement(given)

    def together(self, bits: Mapping[str, int]) -> Measured:
        """Round all components, each to its number of bits."""
        with ExitStack() as altered:
            for name, option in bits.items():
                altered.enter_context(self._alterations.weights.altered(_kind(option), [name]))
            return over_draws([self._outputs.compare(self._runner.stream())])


def _kind(option: int) -> str:
    return f"int{option}"


def _pairs(effects: NDArray[np.float64], moved: Tensor) -> NDArray[np.float64]:
    """Return H over components and options, shape ``(L, B, L, B)``, with the effects on its diagonal.

    What must not be chosen has an infinite effect, and none together with others.
    """
    known = np.isfinite(effects).reshape(-1)
    moved = torch.where(torch.from_numpy(known)[:, None], moved, 0.0)
    unit = moved / moved.norm(dim=1, keepdim=True).clamp_min(1e-300)
    sizes = np.sqrt(np.where(known, effects.reshape(-1), 0.0))
    pairs = (unit @ unit.T).numpy() * np.outer(sizes, sizes)
    np.fill_diagonal(pairs, effects.reshape(-1))
    return np.asarray(pairs.reshape(*effects.shape, *effects.shape))


def solve_exactly(
    effects: NDArray[np.float64], costs: NDArray[np.float64], allowed: float
) -> tuple[int, ...]:
    """Choose one option per row, at the least sum of effects, by an integer programme.

    An option whose effect is infinite is not chosen.

    Example:
        >>> effects = np.array([[0.0, 5.0], [0.0, 1.0]])
        >>> solve_exactly(effects, np.array([[4.0, 2.0], [4.0, 2.0]]), 6.0)
        (0, 1)
    """
    rows, options = effects.shape
    one_each = np.kron(np.eye(rows), np.ones(options))
    known = np.isfinite(effects)
    while True:
        weights = np.where(known, effects, 0.0)
        found = milp(
            weights.reshape(-1) / max(weights.max(), 1e-300),
            integrality=np.ones(effects.size),
            bounds=Bounds(0, known.reshape(-1).astype(float)),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(costs.reshape(1, -1), -np.inf, allowed * (1 + 1e-12)),
            ],
            options={"mip_rel_gap": 0.0},
        )
        chosen = found.x.reshape(rows, options).argmax(axis=1)
        # What alone has more effect than a whole choice is in no better one, and beside it the others
        # would be lost in the solver's tolerance.
        too_much = known & (weights > weights[range(rows), chosen].clip(min=0).sum())
        if not too_much.any():
            return tuple(int(k) for k in chosen)
        known &= ~too_much


def changes(
    costs: NDArray[np.float64], allowed: float, chosen: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Give all choices that differ in one row or two and cost no more than is allowed."""
    rows, options = costs.shape
    for count in (1, 2):
        for which in itertools.combinations(range(rows), count):
            others = [[k for k in range(options) if k != chosen[row]] for row in which]
            for places in itertools.product(*others):
                new = list(chosen)
                for row, place in zip(which, places, strict=True):
                    new[row] = place
                if costs[range(rows), new].sum() <= allowed * (1 + 1e-12):
                    yield tuple(new)


def summed(pairs: NDArray[np.float64], chosen: Sequence[int]) -> float:
    """Sum over all pairs of rows."""
    everyone = range(len(chosen))
    return float(pairs[everyone, chosen][:, everyone, chosen].sum())


def exchange(
    pairs: NDArray[np.float64], costs: NDArray[np.float64], allowed: float, start: Sequence[int]
) -> tuple[int, ...]:
    """Improve a choice for the sum over all pairs by changes of one row or two, until none helps."""
    chosen = tuple(start)
    while True:
        near = changes(costs, allowed, chosen)
        best = min(near, key=lambda new: summed(pairs, new), default=chosen)
        if not summed(pairs, best) < summed(pairs, chosen) * (1 - 1e-9):
            return chosen
        chosen = best


def _rank(measured: Measured) -> float:
    """Return what is to be small: an effect, and more than any where it is not finite."""
    return measured.effect if math.isfinite(measured.effect) else math.inf


def improve(
    pairs: NDArray[np.float64],
    costs: NDArray[np.float64],
    allowed: float,
    start: tuple[tuple[int, ...], Measured],
    measure: Callable[[tuple[int, ...]], Measured],
) -> tuple[tuple[int, ...], Measured]:
    """Improve a choice by what is measured of the most promising changes, until none helps."""
    chosen, now = start
    while True:
        near = sorted(changes(costs, allowed, chosen), key=lambda new: summed(pairs, new))
        tried = {new: measure(new) for new in near[: len(costs)]}
        best = min(tried, key=lambda new: _rank(tried[new]), default=chosen)
        if best == chosen or not _rank(tried[best]) < _rank(now):
            return chosen, now
        chosen, now = best, tried[best]
