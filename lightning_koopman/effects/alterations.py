"""What altering a component means: its output or its weights, replaced while a context lasts."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_koopman.effects.altered_weights import AlteredWeights, Weights
from lightning_koopman.effects.derived_weights import UnalterableError
from lightning_koopman.effects.linear_map import LinearFit, LinearMap
from lightning_koopman.effects.means import MeanAndSpread
from lightning_koopman.network.access.isolation import fast_path
from lightning_koopman.network.axes.batch_axes import Place
from lightning_koopman.network.axes.forms import (
    are_second_of_batch,
    form_of,
    gives_batch_second,
    has_batch_second,
)
from lightning_koopman.network.axes.graphs import row_counts
from lightning_koopman.network.axes.rows import RowForm, by_sample
from lightning_koopman.network.components import clean_name, common_ancestor
from lightning_koopman.network.names import module_of
from lightning_koopman.network.runs.forward_runner import Followed
from lightning_koopman.network.runs.hook_points import Alteration, HookPoint, find_module
from lightning_koopman.report.effects import KINDS
from lightning_koopman.report.report import CreditReport

Tell = Callable[[int], Tensor | None]
"""Tells the sample of each of so many rows, as of nodes of graphs, or of steps of packed sequences."""

_GROUPS, _GROUP_SIZE = 32, 8
"""How many groups samples make, about, and how many samples each, at least, to tell a mean's error."""

MAP_BYTES = 2**33
"""Most bytes that linear maps of all components may take together."""

NONE_TO_ALTER = (
    "no component reads another one, so the chain has none that could be altered; those that you name "
    "are, by component_effects(model, batches, components=[...]) without a report"
)
"""Why there are no effects of a network such as one of embeddings alone."""

UNUSED_INITIAL = "initial weights are given, but the effect of going back to them is not asked for"
"""Why initial weights are refused where nothing is done with them."""

SHIFT = 0.2
"""How far a mean is moved towards that of a group: so little that the outputs follow along a line."""


def altered_parts(report: CreditReport) -> dict[str, tuple[str, ...]]:
    """Return the module calls of every component that can be altered, in order of execution."""
    reference = report.reference
    if not report.parts and reference is not None and reference.modules and not reference.parts:
        raise ValueError(NONE_TO_ALTER)
    if not report.parts:
        raise ValueError(
            "the report does not say which modules its components are made of; measure it with "
            "credit_report or the callback"
        )
    # What is joined into one state is altered one by one.
    single = set(report.components) <= set(report.parts)
    return {n: calls for n, calls in report.parts.items() if not single or n in report.components}


def counted_in(model: nn.Module, names: Iterable[str]) -> nn.Module | None:
    """Find the module in which calls of components are counted: the one that holds all that were chosen.

    So they are where a report is made, too, in which its calls in one pass are rows of the same states.
    """
    modules = {clean_name(name): module for name, module in model.named_modules()}
    return common_ancestor(model, [modules[name] for name in names if name in modules])


def counted_as_in(model: nn.Module, report: CreditReport) -> nn.Module | None:
    """Find the module in which the calls that a report names were counted."""
    if report.reference is not None and report.reference.modules:
        return counted_in(model, report.reference.modules)
    return counted_in(model, {module_of(call) for own in report.parts.values() for call in own})


class Alterations:
    """Ways to alter the components of a network, once :meth:`update` has seen its states.

    Attributes:
        names: The components, in order of execution.
        inputs: Where each component's own input is read.
        outputs: Where its output is.
        further: By component, where other tensors are that it gives and that reach the outputs.
        kinds: All kinds; the names of replacements are among them.
        weights: Alters them, for the kinds that do.
        maps: Linear maps from own input to output, by component, once :meth:`solve` has fitted them.
        refused: By kind and component, why it cannot be altered in that way.
        unsettled: By component, why its samples cannot be told apart.
        sizes: Samples of each batch that was seen.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[str, Sequence[str]],
        kinds: Sequence[str],
        *,
        replacements: Mapping[str, Weights] | None = None,
        initial: Weights | None = None,
        strength: float = 0.3,
    ) -> None:
        replacements = replacements or {}
        if clashing := sorted(set(replacements) & set(KINDS)):
            raise ValueError(f"replacements are named {clashing}, which are kinds; name them otherwise")
        known = (*KINDS, *replacements)
        if not kinds:
            raise ValueError(f"kinds names nothing; choose some of {known}")
        if unknown := kinds if isinstance(kinds, str) else [k for k in kinds if k not in known]:
            raise ValueError(f"unknown kinds {unknown!r}; give a list of some of {known}")
        if initial is not None and "reinit" not in kinds:
            raise ValueError(UNUSED_INITIAL)
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; it must be a finite number, 0 or above")
        self._model, self._parts, self.kinds = model, parts, tuple(dict.fromkeys(kinds))
        self._strength = strength
        self.names = tuple(parts)
        self.inputs = {name: HookPoint("in", calls[0]) for name, calls in parts.items()}
        self.outputs = {name: HookPoint("out", calls[-1]) for name, calls in parts.items()}
        self.further: dict[str, tuple[HookPoint, ...]] = {}
        # Components of which other tensors than the first lead to the outputs, and that does not.
        self._aside: set[str] = set()
        # Outputs of modules within components, at one of which these may be skipped, until it is known.
        self._within: dict[str, list[HookPoint]] = {}
        self._skipped_at: dict[str, HookPoint] = {}
        self.weights = AlteredWeights(model, parts, replacements, initial, strength)
        self._forms: defaultdict[HookPoint, RowForm] = defaultdict(RowForm)
        self._units: defaultdict[HookPoint, MeanAndSpread] = defaultdict(MeanAndSpread)
        self._fits: dict[str, LinearFit] = {}
        self.sizes: list[int] = []
        # The sample of each row where rows are nodes of graphs, or steps of packed sequences, by batch
        # and count of rows; and the points of such rows.
        self._told: dict[tuple[int, int], Tensor] = {}
        self._have_told: set[HookPoint] = set()
        # By point, in how many calls of the network it was in each batch.
        self._rounds: defaultdict[HookPoint, list[int]] = defaultdict(list)
        self._means: set[str] = set()
        self.maps: dict[str, LinearMap] = {}
        self.refused: dict[str, dict[str, str]] = {kind: {} for kind in self.kinds}
        self.unsettled: dict[str, str] = {}

    @property
    def read(self) -> list[HookPoint]:
        """What :meth:`update` wants to see."""
        more = itertools.chain(*self.further.values(), *self._within.values(), self._skipped_at.values())
        outputs = [*self.outputs.values(), *more]
        taken = self.names if {"linear", "skip"} & {*self.kinds} else ()
        return [*(point for name in taken for point in self.taken_by(name)), *outputs]

    @property
    def has_read_all(self) -> bool:
        """Whether the first call of the network, before :meth:`settle`, has read all there is to see."""
        return not self.further and not self._within

    def altered(self, kind: str, name: str) -> HookPoint:
        """Return where a kind alters a component: at its output, or within it.

        Modules that follow and belong to it may change the shape, as pooling does. They then run on what
        it takes, if it is skipped.
        """
        return self._skipped_at.get(name, self.outputs[name]) if kind == "skip" else self.outputs[name]

    def all_altered(self, kind: str, name: str) -> tuple[HookPoint, ...]:
        """Return all tensors of a component that a kind alters; what is made linear is the first."""
        further = () if kind == "linear" else self.further.get(name, ())
        return (self.altered(kind, name), *further)

    def taken_by(self, name: str) -> list[HookPoint]:
        """Return what a component takes, of which each is what would pass on one that it gives."""
        return [self.inputs[name], *(self._taken_for(name, p) for p in self.further.get(name, ()))]

    def _taken_for(self, name: str, point: HookPoint) -> HookPoint:
        """Return what a component takes in the place of a tensor that it gives."""
        return self.inputs[name]._replace(place=point.place)

    def settle(
        self, first: Followed, output: Tensor, placed: tuple[Place | None, ...], tell: Tell
    ) -> None:
        """Find where the samples are in each state, as the first batch shows.

        ``placed`` is where the two first axes of the batch are in the outputs.
        """
        values, places = first.values, first.places
        self._note_told(0, [values], tell)
        self._have_told = {p for p, v in values.items() if self._is_told(0, v) and len(v) != len(output)}
        modules = {name: find_module(self._model, calls[-1])[0] for name, calls in self._parts.items()}
        turned = any(map(has_batch_second, modules.values()))
        known = [(name, point) for name, point in self.outputs.items() if point in values]
        of_axis = int(are_second_of_batch((modules[n], values[p], places[p]) for n, p in known))

        def form(name: str, point: HookPoint, module: nn.Module) -> RowForm:
            value = values[point]
            if point in self._have_told:
                return RowForm()
            second = gives_batch_second(module, value)
            return form_of(
                name,
                value,
                len(output),
                first.merged.get(point),
                second=second,
                turned=turned,
                place=places[point][of_axis],
            )

        for name, module in modules.items():
            for point in (self.outputs[name], self.inputs[name]):
                if (value := values.get(point)) is None or value.is_nested:
                    continue
                alike = output.ndim > 1 and output.shape[1:2] == value.shape[1:2]
                # Of as many samples as positions, either may be first; of as many as units, samples are.
                is_first = placed[of_axis] == (0, 1) or len(value) != len(output)
                alike = alike and not (len(output) == output.shape[1] and is_first)
                if alike and gives_batch_second(module, value):
                    raise ValueError(
                        f"the outputs have shape {tuple(output.shape)}, and {name!r} gives the samples "
                        "along the second axis; put them first in the outputs, with forward_fn=lambda "
                        "model, batch: model(batch).transpose(0, 1), and in the targets"
                    )
        self._refuse_turned(values, output)
        for name in self.names:
            try:
                for point in (self.outputs[name], self.inputs[name]):
                    if (value := values.get(point)) is not None:
                        self._check_samples(name, point, value, 0, len(output))
                        self._forms[point] = form(name, point, modules[name])
            except ValueError as error:
                self._unsettle(name, error)
                continue
            own = ((p, find_module(self._model, p.call)[0]) for p in sorted(first.further))
            others = {p: form(name, p, m) for p, m in own if p.call in self._parts[name]}
            if others and not first.made[self._parts[name][-1]]:
                self._aside.add(name)
            # What has no row per sample is not a sample's, and stays.
            others = {
                p: f
                for p, f in others.items()
                if p in self._have_told or len(by_sample(values[p], f)) == len(output)
            }
            self._forms.update(others)
            if others:
                self.further[name] = tuple(others)
            beside_last = any(point.call == self.outputs[name].call for point in others)
            changes_shape = "skip" in self.kinds and not self._passes(values, name, self.outputs[name])
            if changes_shape and not beside_last:
                self._within[name] = [HookPoint("out", call) for call in self._parts[name][-2::-1]]
        for (kind, name), reason in self.weights.unsettable(self.kinds).items():
            self.refused[kind][name] = str(reason)

    def _refuse_turned(self, values: Mapping[HookPoint, Tensor], output: Tensor) -> None:
        """Refuse outputs of which the second axis has as many entries as components have samples."""
        given = [values[p].shape for p in self.outputs.values() if not values[p].is_nested]
        turned = {shape[:1] for shape in given} == {output.shape[1:2]}
        if turned and not any(len(output) in shape[:2] for shape in given):
            raise ValueError(
                f"the outputs have shape {tuple(output.shape)}, and components give {output.shape[1]} "
                "samples, as the second axis of the outputs does; put samples first in them, with "
                "forward_fn=lambda model, batch: model(batch).transpose(0, 1), and in the targets"
            )

    def _unsettle(self, name: str, error: ValueError) -> None:
        """Leave a component alone whose samples cannot be told apart, but for its weights."""
        self.unsettled.setdefault(name, str(error))
        for kind in self.kinds:
            if not self.weights.altered_by(kind):
                self.refused[kind].setdefault(name, self.unsettled[name])

    def update(self, rounds: Sequence[Mapping[HookPoint, Tensor]], n_samples: int, tell: Tell) -> None:
        """Take the states that one batch has in the network as it is, in each call of the network."""
        for name, points in self._within.items():
            fitting = [point for point in points if self._passes(rounds[0], name, point)]
            if fitting:
                self._skipped_at[name] = fitting[0]
                self._forms[fitting[0]] = self._forms[self.inputs[name]]
                self._have_told |= {fitting[0]} if self.inputs[name] in self._have_told else set()
        self._note_told(len(self.sizes), rounds, tell)
        self._within = {}
        self.sizes.append(n_samples)
        for point in {point for values in rounds for point in values}:
            self._rounds[point].append(sum(point in values for values in rounds))
        for values in rounds:
            self._update(values, n_samples)

    def _note_told(self, number: int, rounds: Sequence[Mapping[HookPoint, Tensor]], tell: Tell) -> None:
        """Keep what is told of the samples that rows are about."""
        states = itertools.chain.from_iterable(values.values() for values in rounds)
        for length in row_counts(states):
            if (samples := tell(length)) is not None:
                self._told[number, length] = samples.cpu()

    def _is_told(self, number: int, tensor: Tensor) -> bool:
        return bool(tensor.ndim) and not tensor.is_nested and (number, len(tensor)) in self._told

    def _check_samples(
        self, name: str, point: HookPoint, tensor: Tensor, number: int, n_samples: int
    ) -> None:
        """Refuse a state that has the samples neither along the first nor along the second axis.

        What its rows are about may be told instead: if it was in the first batch, it must be in each.
        """
        if tensor.is_nested:
            raise ValueError(
                f"{name!r} gave a nested tensor, in which nothing can be put in a sample's place; let "
                "it be padded, or choose other components"
            )
        shape, have_told = tensor.shape, point in self._have_told
        if have_told and self._is_told(number, tensor):
            return
        first = bool(shape) and n_samples > 0 and shape[0] % n_samples == 0
        if have_told or (not first and (len(shape) < 2 or not n_samples or shape[1] != n_samples)):
            raise ValueError(
                f"{name!r} gave a tensor of shape {tuple(shape)} for {n_samples} samples of the output, "
                "so effects cannot be told apart by sample; choose components with the samples along "
                "one of the first two axes"
            )

    def _passes(self, values: Mapping[HookPoint, Tensor], name: str, point: HookPoint) -> bool:
        """Check whether what a component takes has the shape of what is given somewhere in it."""
        source = self._taken_for(name, point)
        return source in values and values[source].shape == values[point].shape

    def _update(self, values: Mapping[HookPoint, Tensor], n_samples: int) -> None:
        for name in self.names:
            source, point = self.inputs[name], self.outputs[name]
            if point not in values or name in self.unsettled:
                continue
            try:
                for read in (point, source):
                    if read in values:
                        number = len(self.sizes) - 1
                        self._check_samples(name, read, values[read], number, n_samples)
            except ValueError as error:
                self._unsettle(name, error)
                continue
            self._update_one(name, values)

    def _update_one(self, name: str, values: Mapping[HookPoint, Tensor]) -> None:
        asked = {kind for kind in self.kinds if name not in self.refused[kind]}
        further = [point for point in self.further.get(name, ()) if point in values]
        skipped = [self.altered("skip", name), *further] if "skip" in asked else []
        averaged = [point for point in skipped if not self._passes(values, name, point)]
        noisy = [self.outputs[name], *further] if "output_noise" in asked else []
        try:
            for point in dict.fromkeys((*noisy, *averaged)):
                self._units[point].update(self._rows(values, point))
        except ValueError as error:
            for kind in {"output_noise", "skip"} & {*self.kinds}:
                self.refused[kind].setdefault(name, str(error))
        if averaged:
            self._means.add(name)
        if "linear" in asked:
            try:
                self._update_fit(name, values, self._rows(values, self.outputs[name]))
            except UnalterableError as error:
                self.refused["linear"][name] = str(error)
                self._fits.pop(name, None)

    def _update_fit(self, name: str, values: Mapping[HookPoint, Tensor], output: Tensor) -> None:
        if self.inputs[name] not in values:
            raise UnalterableError(
                f"{name!r} takes no floating-point tensor, or one of a dictionary, so nothing linear "
                "can take its place; leave it out with components=[...], or leave out the kind 'linear'"
            )
        if name in self._aside:
            raise UnalterableError(
                f"the first tensor that {name!r} gives leads to none of the outputs, and what is made "
                "linear is the first; leave it out with components=[...], or leave out the kind 'linear'"
            )
        given = self._rows(values, self.inputs[name])
        fit = self._fits.setdefault(name, LinearFit())
        if len(given) != len(output) or not fit.takes(given, output):
            raise UnalterableError(
                f"{name!r} takes {tuple(given.shape)} and gives {tuple(output.shape)}, other shapes "
                "than in the batch before or another number of samples, so no linear map can take its "
                "place; pad all batches alike, or leave out the kind 'linear'"
            )
        fit.update(given, output)
        if sum(each.nbytes for each in self._fits.values()) > MAP_BYTES:
            raise UnalterableError(
                f"with that of {name!r}, which gives {output[0].numel()} values per sample, linear maps "
                f"would take {MAP_BYTES / 2**30:.0f} GiB and more; choose fewer with components=[...], "
                "or leave out the kind 'linear'"
            )

    def solve(self) -> None:
        """Fit the linear maps, and refuse means and deviations of a single row."""
        for name in self.names:
            points = (self.outputs[name], *self.further.get(name, ()), self.altered("skip", name))
            if any(self._units[p].count == 1 for p in points if p in self._units):
                for kind in {"output_noise", *(["skip"] if name in self._means else [])} & {*self.kinds}:
                    self.refused[kind].setdefault(
                        name, f"one row of {name!r} arrived, whose mean is itself; pass more samples"
                    )
        self.maps |= {name: fit.solve() for name, fit in self._fits.items()}
        self._fits = {}

    def puts_mean(self, kind: str, name: str) -> bool:
        """Return whether a mean over samples takes the place of what a component gives."""
        return kind == "skip" and name in self._means

    def groups(self) -> list[Tensor]:
        """Return the group of each sample, by batch; a group lies within a batch."""
        groups, first = [], 0
        for size in self.sizes:
            count = max(1, min(size // _GROUP_SIZE, round(_GROUPS * size / sum(self.sizes))))
            groups.append(first + torch.arange(size, device="cpu") % count)
            first += count
        return groups

    def draws_nothing(self, kind: str) -> bool:
        """Return whether a kind has no random part."""
        return kind != "output_noise" and not self.weights.draws(kind)

    def altering(
        self, kind: str, name: str, *, left_out: bool = True, groups: Iterable[Tensor] = ()
    ) -> dict[HookPoint, Alteration]:
        """Return what takes the place of what a component gives, for the kinds that touch no weights.

        A linear map predicts every sample as if it had been fitted without it, if ``left_out``, which
        holds where the component's input is what it was when the map was fitted. With the groups of all
        batches, which then are run once and in order, the mean that takes the place of an output is
        moved towards that of a sample's group by the share :data:`SHIFT`.
        """
        points = self.all_altered(kind, name)
        if kind == "linear":
            return {point: self._mapped(name, point, left_out) for point in points}
        if kind == "output_noise":
            return {point: self._noisy(point) for point in points}
        return {point: self._skipped(self._taken_for(name, point), point, groups) for point in points}

    def _mapped(self, name: str, point: HookPoint, left_out: bool) -> Alteration:
        """Put what a linear map of a component's input gives in its output's place."""
        axis, fitted = self._forms[point].batch_axis, self.maps[name]

        def linear(output: Tensor, values: Mapping[HookPoint, Tensor]) -> Tensor:
            given = fitted.projected(self._rows(values, self.inputs[name]))
            mapped, constant = fitted(given), output.movedim(axis, 0).detach()
            residual = constant - mapped.detach()
            if left_out:
                residual = fitted.left_out(given.detach(), residual)
            new = constant - residual
            # What a network that differentiates itself is to follow is the map, not what it predicts.
            new = new + (mapped - mapped.detach()) if mapped.requires_grad else new
            return new.movedim(0, axis)

        return linear

    def _skipped(self, source: HookPoint, point: HookPoint, groups: Iterable[Tensor]) -> Alteration:
        """Put what was taken in a tensor's place, or its mean where that has another shape."""
        averaged = self._averaged(point, groups)

        def skipped(output: Tensor, values: Mapping[HookPoint, Tensor]) -> Tensor:
            if source in values and values[source].shape == output.shape:
                return values[source]
            return averaged(output, values)

        return skipped

    def _averaged(self, point: HookPoint, groups: Iterable[Tensor]) -> Alteration:
        """Put its mean in a tensor's place, moved towards that of a sample's group if there are any."""
        form = self._forms[point]
        each = enumerate(zip(groups, self._rounds[point], strict=False))
        by_batch = ((number, group) for number, (group, times) in each for _ in range(times))

        def averaged(output: Tensor, _: Mapping[HookPoint, Tensor]) -> Tensor:
            rows = output.detach().movedim(form.batch_axis, 0)
            mean = self._units[point].mean.to(output)
            if (here := next(by_batch, None)) is not None:
                number, groups_here = here
                own = self._told_of(point, number, rows)
                own = form.samples(len(rows), len(groups_here)) if own is None else own
                mean = torch.lerp(mean, _means_of(rows, groups_here[own], mean), SHIFT)
            return mean.expand_as(rows).movedim(0, form.batch_axis)

        return averaged

    def _noisy(self, point: HookPoint) -> Alteration:
        """Add noise to a tensor, in units of its standard deviation."""
        generator = torch.Generator()
        # Draws on its own from here on: what the network itself draws must stay what it was.
        generator.manual_seed(int(torch.randint(2**62, (), device="cpu")))

        def noisy(output: Tensor, _: Mapping[HookPoint, Tensor]) -> Tensor:
            shape, exact = output.shape, torch.float64
            noise = torch.randn(shape, dtype=exact, generator=generator, device="cpu").to(output.device)
            return output + self.times_spread(point, noise)

        return noisy

    def times_spread(self, point: HookPoint, values: Tensor) -> Tensor:
        """Return values, laid out as a tensor is, times the standard deviation of the noise on it."""
        axis = self._forms[point].batch_axis
        spread = self._strength * self._units[point].std.to(values.device)
        return (spread * values.movedim(axis, 0)).movedim(0, axis)

    def _told_of(self, point: HookPoint, number: int, tensor: Tensor) -> Tensor | None:
        """Return the sample that each row of a tensor is about, if a batch tells it."""
        return self._told[number, len(tensor)] if point in self._have_told else None

    def rows_by_sample(self, name: str, point: HookPoint, tensor: Tensor, number: int) -> Tensor:
        """Return one row per sample of a batch of what lies at a point of a component.

        Where samples are of unlike numbers of nodes or steps, zeros fill them up.
        """
        n_samples, form = self.sizes[number], self._forms[point]
        self._check_samples(name, point, tensor, number, n_samples)
        if (own := self._told_of(point, number, tensor)) is not None:
            counts = own.bincount(minlength=n_samples)
            rows = tensor.new_zeros(n_samples, int(counts.max()), *tensor.shape[1:])
            rows[own.to(tensor.device), _places_within(own, counts).to(tensor.device)] = tensor
        else:
            rows = by_sample(tensor, replace(form, group=tensor.shape[form.batch_axis] // n_samples))
        rows = rows.reshape(n_samples, -1)
        return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()

    def laid_out(self, name: str, point: HookPoint, rows: Tensor, tensor: Tensor, number: int) -> Tensor:
        """Return one row per sample as what lies at a point of a component, such as ``tensor``, does."""
        # Counted from 1, for zeros may fill rows up.
        numbers = torch.arange(1, tensor.numel() + 1, dtype=torch.float64, device="cpu")
        places = self.rows_by_sample(name, point, numbers.view(tensor.shape), number)
        places = places.long().to(rows.device)
        flat = rows.new_empty(tensor.numel())
        flat[places[places > 0] - 1] = rows[places > 0]
        return flat.view(tensor.shape).to(tensor)

    def _rows(self, values: Mapping[HookPoint, Tensor], point: HookPoint) -> Tensor:
        return values[point].movedim(self._forms[point].batch_axis, 0)


@contextmanager
def padded_sequences(model: nn.Module) -> Generator[bool, None, None]:
    """Let encoders of torch compute on padded sequences, for nested tensors cannot be altered.

    What comes is whether there are such encoders.
    """
    nesting = any(getattr(module, "use_nested_tensor", False) for module in model.modules())
    before = torch.backends.mha.get_fastpath_enabled()
    with fast_path(before and not nesting):
        yield nesting and before


def _places_within(samples: Tensor, counts: Tensor) -> Tensor:
    """Return which row of its sample each row is."""
    order = samples.argsort(stable=True)
    starts = (counts.cumsum(0) - counts)[samples[order]]
    return torch.empty_like(order).index_copy_(
        0, order, torch.arange(len(order), device=order.device) - starts
    )


def _means_of(rows: Tensor, groups: Tensor, like: Tensor) -> Tensor:
    """Return for each row the mean of its group, in units as those of another mean."""
    own = groups.to(rows.device)
    means = torch.empty_like(rows)
    for group in groups.unique():  # type: ignore[no-untyped-call]
        mean = rows[own == group].mean(dim=0, dtype=torch.float64)
        varying = [k for k, size in enumerate(mean.shape) if size != like.shape[k]]
        means[own == group] = (mean.mean(dim=varying, keepdim=True) if varying else mean).to(rows)
    return means
