"""Runs a model on batches as data loaders give them, while hook points are read or replaced."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_koopman.network.access.isolation import random_states_kept, seed_all
from lightning_koopman.network.arguments import INTEGER, check_type
from lightning_koopman.network.axes.batch_axes import Place
from lightning_koopman.network.axes.forms import has_batch_second
from lightning_koopman.network.flow.dataflow import DataFlow
from lightning_koopman.network.names import further_name
from lightning_koopman.network.runs.forward import (
    ForwardFn,
    check_arguments,
    default_forward,
    device_of,
    to_device,
)
from lightning_koopman.network.runs.hook_points import Alteration, HookPoint, HookPoints
from lightning_koopman.network.runs.samples import first_samples, samples_in, spread
from lightning_koopman.network.tensors import (
    all_tensors,
    exact_device,
    first_tensor,
    plain,
    tensors_inside,
)

OUTPUT_BYTES = 2**30
"""Outputs are kept until they take so many bytes: a language model's fill any memory."""

NO_SAMPLES = (
    "no sample arrived: the batches were empty (a generator gives its batches only once: pass a list or "
    "a DataLoader)"
)


def _ordinary(value: Any, *, copy: bool) -> Any:
    """Copy tensors that were made under inference mode, of which autograd would save none, or all."""
    if isinstance(value, Tensor):
        return value.clone() if copy or value.is_inference() else value
    if isinstance(value, dict):
        return {name: _ordinary(part, copy=copy) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_ordinary(part, copy=copy) for part in value)
    return value


@dataclass(frozen=True)
class OutputForm:
    """Which of the tensors that a model returns are its outputs, and how they are laid out.

    Attributes:
        places: The tensors, side by side; ``None`` takes the first that has samples, which single
            numbers, as losses are, have not.
        units: What each of several outputs side by side is divided by.
        widths: How many values each of them has for a sample of the first batch.
        class_axis: Where the outputs are several with the same classes, the axis of these in each:
            classes are then the last axis, and which output it is the one before.
        by_position: Whether the first axis holds the positions of each sample, one sample after the
            other; samples are then the first axis, and positions the second.
    """

    places: tuple[int, ...] | None = None
    units: tuple[float, ...] = ()
    widths: tuple[int, ...] = ()
    class_axis: int | None = None
    by_position: bool = False

    def outputs(self, given: Any, batch: Any) -> Tensor:
        """Find the outputs in what the model returned for a batch."""
        tensors = list(tensors_inside(given))
        if self.places is None:
            return next(tensor for tensor in tensors if has_samples(tensor))
        found = [tensors[place] for place in self.places]
        if any(tensor.is_nested for tensor in found):
            raise ValueError(
                "the network returns a nested tensor, whose samples have shapes of their own and do not "
                "compare; let forward_fn give a row per sample, as model(batch).mean(dim=1), or pad it, "
                "as model(batch).to_padded_tensor(0.0), beside targets padded with -100"
            )
        if self.class_axis is not None:
            return torch.stack([part.movedim(self.class_axis, -1) for part in found], dim=-2)
        if len(found) > 1:
            parts = zip(found, self.units, strict=True)
            return torch.cat([part.reshape(len(part), -1) / unit for part, unit in parts], dim=1)
        if self.by_position:
            return found[0].reshape(samples_in(batch), -1, *found[0].shape[1:])
        return found[0]

    def targets(self, target: Tensor, output: Tensor) -> Tensor:
        """Lay targets out as the outputs are."""
        if self.class_axis is not None and self.places is not None:
            return target[..., None].expand(*target.shape, len(self.places))
        if self.by_position and target.numel() == output.shape[:2].numel():
            return target.reshape(output.shape[:2])
        return target

    def are_by_position(self, targets: Tensor) -> bool:
        """Check whether targets, laid out as the outputs are, are those of positions of a sample."""
        return targets.ndim - (self.class_axis is not None) > 1


class Followed(NamedTuple):
    """What was seen as the data of a batch was followed.

    Attributes:
        given: What the model returned.
        values: What was read.
        n_rounds: How often calls were counted anew.
        merged: Which axes were merged into the first axis of that.
        places: Where the two first axes of the batch are in that, see :meth:`DataFlow.places`.
        made: For each of some calls, which of the tensors returned were made of what it gave.
        axes: For each of the tensors returned, which axes were merged into its first one.
        placed: For each of them, where the two first axes of the batch are in it.
        beside: Where further tensors that vary were given beside the one that was read.
        further: Tensors beside the first of some calls, and which of the tensors returned they led to.
        last: For each of all calls, the last one of its component.
    """

    given: Any
    values: Mapping[HookPoint, Tensor]
    n_rounds: int
    merged: dict[HookPoint, Any]
    places: dict[HookPoint, tuple[Place | None, ...]]
    made: dict[str, list[int]]
    axes: list[tuple[int, ...] | None]
    placed: list[tuple[Place | None, ...]]
    beside: frozenset[HookPoint]
    further: dict[HookPoint, list[int]]
    last: dict[str, str]


class ForwardRunner:
    """Runs a model over the same batches again and again.

    Attributes:
        batches: The batches; once :meth:`until_enough` went over them, those that it came to.
        form: What the outputs are.
        notes: What a reader must know of the samples that were looked at.
        counted_in: Where calls are counted anew, see :class:`HookPoints`.
        unlike: The calls whose outputs were left alone for their shape in the run before, once for each.
        packed: Of packed sequences that were read then, the sample of each row, see :class:`HookPoints`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward_fn: ForwardFn | None = None,
        *,
        samples: int | None = None,
    ) -> None:
        with random_states_kept(batches):
            if samples is not None:
                batches = first_samples(batches, samples, may_be_second=has_batch_second(model))
            self.model, self.batches = model, list(batches)
        self.forward_fn = default_forward if forward_fn is None else forward_fn
        self.form = OutputForm()
        self.notes: list[str] = []
        self.counted_in: nn.Module | None = None
        self.unlike: list[str] = []
        self.packed: Mapping[int, Tensor | None] = {}
        self._writes: bool | None = None
        self._device = device_of(model)
        if exact_device(self._device) != self._device:
            raise ValueError(
                f"the model is on {self._device}, which has no float64; reports are made on the CPU "
                "then, but altering components needs the model there: call model.cpu() first"
            )

    def stream(
        self,
        read: Iterable[HookPoint] = (),
        alter: Mapping[HookPoint, Alteration] | None = None,
        update: Callable[[Mapping[HookPoint, Tensor]], None] | None = None,
    ) -> Iterator[Tensor]:
        """Run once over all batches, and give the outputs of one after the other."""
        read = list(read)
        for number in range(len(self.batches)):
            output, rounds = self.run_batch(number, read, alter)
            if update is not None:
                for values in rounds:
                    update(values)
                    del values
            del rounds  # not while whoever takes the outputs looks at them
            yield output.detach()

    def run(
        self, read: Iterable[HookPoint] = (), alter: Mapping[HookPoint, Alteration] | None = None
    ) -> list[Tensor]:
        """Run once over all batches, and return the outputs of all of them, on the CPU."""
        return [output.cpu() for output in self.stream(read, alter)]

    def until_enough(self, outputs: Sequence[Tensor]) -> Iterator[int]:
        """Count batches until the outputs that are collected of them take :data:`OUTPUT_BYTES`.

        Batches that this does not come to are let go of.
        """
        for number in range(len(self.batches)):
            if sum(output.nbytes for output in outputs) >= OUTPUT_BYTES:
                self.batches = self.batches[:number]
                self.notes.append(
                    f"the outputs of {sum(map(len, outputs))} samples take "
                    f"{OUTPUT_BYTES / 2**30:.0f} GiB and more, so only these are looked at"
                )
                return
            yield number

    def run_followed(self, read: Iterable[HookPoint], parts: Iterable[Sequence[str]]) -> Followed:
        """Run over the first batch and follow the data; ``parts`` are the calls of each component."""
        last = {call: own[-1] for own in parts for call in own}
        made: dict[str, list[int]] = {call: [] for call in last.values()}
        beside, others = set[HookPoint](), dict[str, tuple[HookPoint, Tensor]]()
        with DataFlow() as flow:

            def label(point: HookPoint, tensor: Tensor) -> None:
                name = further_name(point.call, point.place)
                if name in others:
                    return
                others[name] = point, plain(tensor).detach().clone()
                flow.label_part(tensor, name, beside=True)

            # Of calls that others continue, the further tensors alone go on by themselves.
            labelled: dict[HookPoint, Alteration] = {HookPoint("out", call): _as_it_is for call in last}
            labelled |= {HookPoint("out", call): _labels_once(flow, call) for call in made}
            given, rounds = self._run(0, read, labelled, beside, label, flow)
        returned, values = list(tensors_inside(given)), dict(rounds[0])
        further: dict[HookPoint, list[int]] = {}
        for place, tensor in enumerate(returned):
            labels = flow.labels(tensor)
            for call in labels & made.keys():
                made[call].append(place)
            for name in labels & others.keys():
                point, value = others[name]
                values[point] = value
                further.setdefault(point, []).append(place)
        merged = {point: flow.merged(value) for point, value in values.items()}
        places = {point: flow.places(value) for point, value in values.items()}
        axes, placed = map(flow.merged, returned), map(flow.places, returned)
        return Followed(
            given=given,
            values=values,
            n_rounds=len(rounds),
            merged=merged,
            places=places,
            made=made,
            axes=[*axes],
            placed=[*placed],
            beside=frozenset(beside),
            further=further,
            last=last,
        )

    def targets_of(
        self, outputs: Sequence[Tensor], target_of: Callable[[Any], Tensor | None]
    ) -> list[Tensor | None]:
        """Return the targets of each batch, if it has any, as they belong to its outputs."""
        pairs = zip(map(target_of, self.batches), outputs, strict=True)
        return [None if target is None else self.form.targets(target, o) for target, o in pairs]

    def run_batch(
        self,
        number: int,
        read: Iterable[HookPoint] = (),
        alter: Mapping[HookPoint, Alteration] | None = None,
    ) -> tuple[Tensor, Sequence[Mapping[HookPoint, Tensor]]]:
        """Run once over one batch, with random numbers that are its own and alike in every run.

        A network that draws in eval mode would otherwise differ from itself as much as by an alteration.
        What was read comes back by call of ``counted_in``.
        """
        given, rounds = self._run(number, read, alter)
        return self.form.outputs(given, self.batches[number]), rounds

    def _run(
        self,
        number: int,
        read: Iterable[HookPoint],
        alter: Mapping[HookPoint, Alteration] | None,
        beside: set[HookPoint] | None = None,
        label: Callable[[HookPoint, Tensor], None] | None = None,
        flow: DataFlow | None = None,
    ) -> tuple[Any, Sequence[Mapping[HookPoint, Tensor]]]:
        read = list(read)
        batch = to_device(self.batches[number], self._device)
        as_found: AbstractContextManager[None] = nullcontext()
        if torch.is_grad_enabled():
            # Backward passes need what was written.
            batch = _ordinary(batch, copy=self._writes is True)
        else:
            as_found = self.as_found(batch)
        if flow is not None:
            flow.begin_axes(all_tensors(batch))
        points = HookPoints(self.model, read, alter, beside, label, self.counted_in)
        with random_states_kept(), as_found, points:
            seed_all(number)
            given = self.forward_fn(self.model, batch)
            self.unlike, self.packed = points.unlike, points.packed
        if first_tensor(given) is None:
            raise ValueError(
                f"the model gave {type(given).__name__} with no floating-point tensor; return the "
                "outputs from forward_fn"
            )
        if not any(map(has_samples, tensors_inside(given))):
            raise ValueError(
                f"the model gave {type(given).__name__} with single numbers alone, as losses are; "
                "return the outputs from forward_fn"
            )
        for point in read:
            # What takes no floating-point tensor has nothing to read there.
            if point.end == "out" and not point.place and point not in points.rounds[0]:
                raise ValueError(
                    f"{point.call!r} did not run, though the report names it; pass the model and the "
                    "forward_fn that the report was measured with"
                )
        return given, points.rounds

    @contextmanager
    def as_found(self, batch: Any) -> Generator[None, None, None]:
        """Put back what a pass writes into its batch, which the next one takes again."""
        tensors = () if self._writes is False else tensors_inside(batch)
        kept = [(t, t._version, plain(t).detach().clone()) for t in tensors if not t.is_inference()]
        try:
            yield
        finally:
            written = [(tensor, copy) for tensor, version, copy in kept if tensor._version != version]
            # What the first pass leaves alone, the others do.
            self._writes = self._writes or (bool(written) if kept else self._writes)
            for tensor, copy in written:
                plain(tensor).detach().copy_(copy)


def has_samples(tensor: Tensor) -> bool:
    """Return whether a tensor may be outputs of a network; single numbers, as losses are, are none."""
    return tensor.is_floating_point() and tensor.ndim > 0


def _as_it_is(output: Tensor, _: Mapping[HookPoint, Tensor]) -> Tensor:
    return output


def _labels_once(flow: DataFlow, call: str) -> Alteration:
    """Label what a call gives where calls are counted first."""
    labelled: list[None] = []

    def alter(output: Tensor, _: Mapping[HookPoint, Tensor]) -> Tensor:
        if not labelled:
            flow.label(output, call, beside=True)
            labelled.append(None)
        return output

    return alter


def with_weights(
    model: nn.Module, batches: Iterable[Any], forward_fn: ForwardFn | None
) -> Iterable[Any]:
    """Run once over the first batch where lazy modules have no weights yet, so that they get them."""
    if not any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        return batches
    with random_states_kept(batches):
        rest = iter(batches)
        first = list(itertools.islice(rest, 1))
    modes = [(module, module.training) for module in model.modules()]
    device = device_of(model)
    model.eval()
    try:
        with torch.no_grad():
            for batch in first:
                (default_forward if forward_fn is None else forward_fn)(model, to_device(batch, device))
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.train(mode)
    return itertools.chain(first, rest) if rest is batches else batches


def runner_on(
    model: nn.Module, batches: Iterable[Any], samples: int, forward_fn: ForwardFn | None
) -> ForwardRunner:
    """Return what runs a model on samples from everywhere in the data."""
    check_type(INTEGER, samples=samples)
    if samples < 1:
        raise ValueError(f"samples is {samples}; at least one is needed")
    check_arguments(model, batches, forward_fn)
    batches = spread(with_weights(model, batches, forward_fn), samples)
    runner = ForwardRunner(model, batches, forward_fn, samples=samples)
    if not runner.batches:
        raise ValueError(NO_SAMPLES)
    return runner
