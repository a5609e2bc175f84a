"""One report in the making: forward passes in, a report out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NoReturn
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from lightning_koopman.koopman.options import Options
from lightning_koopman.koopman.reference import Reference
from lightning_koopman.measurement.accumulator import Accumulator, MaxSamples
from lightning_koopman.measurement.added_up import EXACT, AddedUp
from lightning_koopman.measurement.processes import Share, agreed, exchange
from lightning_koopman.network.access.isolation import undisturbed
from lightning_koopman.network.axes.graphs import pooled_by, pooling_index
from lightning_koopman.network.axes.padding import Valid, lengths_of, masks_of, up_to, valid_positions
from lightning_koopman.network.axes.recorded import Recorded
from lightning_koopman.network.axes.rows import by_sample, n_positions
from lightning_koopman.network.capture.capture import Capture
from lightning_koopman.network.capture.plan import Plan, UnlikeRowsError, in_a_row, make_plan
from lightning_koopman.network.components import Components, hint, is_leaf, matching
from lightning_koopman.network.names import OUTPUT, call_of, is_sum, listed, module_of
from lightning_koopman.network.runs.forward import ForwardFn, default_forward, device_of, to_device
from lightning_koopman.network.runs.samples import samples_in
from lightning_koopman.network.runs.steps import Step
from lightning_koopman.network.tensors import (
    all_tensors,
    dense,
    detached_copy,
    exact_device,
    plain,
    refuse_without_shape,
)
from lightning_koopman.report.report import CreditReport

TOLERANCE = 0.05
"""Nats per direction that the standard errors of all credits may reach for the samples to be enough."""

FIRST_CHECK = 512
"""Samples behind which it is first asked whether they are enough."""

_CHECK_WORK = 1200
# A check takes as long as 300 multiplications of a forward pass for each cubed width. It must not take
# more than a quarter of the passes before it: small networks are through with all samples by then.


_SETTLED = (
    *("capture", "plan", "apart", "joined", "_work", "_pooled", "_lengths_of", "_unmasked"),
    *("_roundings", "_untraced", "_is_joined"),
)
"""What the first pass of a measurement settles for all that are like it."""


class Measurement(Accumulator):
    """One report in the making: forward passes in, their rows added up, a report out.

    Attributes:
        capture: The hooks; enter it around a forward pass, then call :meth:`end_pass`.
        plan: The chain, frozen by the first pass.
        notes: What to say in the report beside what the measurement itself finds.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Components | Sequence[Components] | None = None,
        options: Options | None = None,
        *,
        max_samples: MaxSamples = None,
        shared: bool = False,
        hold: int = 0,
        like: Measurement | None = None,
        trained: Collection[int] | None = None,
        varying: Collection[str] = (),
    ) -> None:
        super().__init__(options or Options(), max_samples=max_samples, shared=shared, hold=hold)
        self.plan: Plan | None = None
        self.notes: list[str] = []
        self._named = components is not None
        self._batch: Any = None
        self._valid: Valid = {}
        # Packed states that tell, behind others, where these are padded: rows are made when all have
        # run. They need not be in the chain themselves.
        self._lengths_of = frozenset[str]()
        # What the calls before in this step gave.
        self._calls_before: list[list[Tensor]] = []
        # Sizes of what ran in this pass, and did not run in the first.
        self._others: dict[str, tuple[int, ...]] = {}
        # Shapes of what a call gave, and the first call of its pass; how many calls had other ones, and
        # how many batches unlike numbers of rows in parts side by side.
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._first_shapes: dict[str, tuple[int, ...]] = {}
        self._unlike_calls, self._unlike_batches = 0, 0
        # What told the folds of the first call of a step, and how many samples are of later ones.
        self._told_by: Tensor | None = None
        self._n_again = 0
        # States of other positions than the masked ones that they are made of.
        self._unmasked: list[str] = []
        # Which tensor of the batch says what graph each node belongs to, where the network pools them.
        self._pooled: int | None = None
        # States that vary, whatever the first batch says; and those that it says do not, with a sample
        # and whether any other differs from it.
        self._varying = frozenset(varying)
        self._alike: dict[str, tuple[Tensor, Tensor]] = {}
        # By sum, and output that may be one, how far its values may be off by rounding, as a share of
        # the largest of them.
        self._roundings: dict[str, float] = {}
        # By sum, what tells whether it is the same as what it reads, added up.
        self._added: dict[int, AddedUp] = {}
        self._silent: list[str] | None = None
        self._skipped: list[str] = []
        # Whether what forward_fn gives is made of several states behind the network.
        self._is_joined = False
        self._untraced: str | None = None
        self._followed: Reference | None = None
        self._next_check, self._work = FIRST_CHECK, 0.0
        if like is None:
            output = None if callable(self.options.output) else self.options.output
            self.capture = Capture(
                model, components, keep=_weakly(self._keep), output=output, trained=trained
            )
        else:
            # The same chain of the same calls, so that equal weights give equal numbers.
            vars(self).update((name, vars(like)[name]) for name in _SETTLED)
            self.capture.keep = _weakly(self._keep)

    @property
    def _known_plan(self) -> Plan:
        """The plan, which the first pass has made."""
        assert self.plan is not None
        return self.plan

    def follow(self, reference: Reference) -> None:
        """Bring all states into the coordinates of a reference, and refuse other components."""
        self._followed, self._named = reference, reference.named
        if reference.calls:
            self.capture.calls_alone = {call_of(name) for group in reference.calls for name in group}
        self.capture.sums = {name for name in reference.states if is_sum(name)}
        self.basis = reference.basis

    def run(self, model: nn.Module, batches: Iterable[Any], forward_fn: ForwardFn | None = None) -> None:
        """Send batches, as many as are needed, through a model that is left exactly as it was found."""
        forward = default_forward if forward_fn is None else forward_fn
        device = device_of(model)
        with undisturbed(model, batches), self.capture:
            for batch in batches:
                given = to_device(batch, device)
                self.start_pass(given)
                returned = forward(model, given)
                self._is_joined = self._is_joined or self.capture.joins(returned)
                if callable(self.options.output):
                    self.capture.record_end(self.options.output(returned))
                self.end_pass()
                if self._needs_no_more():
                    break

    def _needs_no_more(self) -> bool:
        """Check whether the samples are enough; after 512, 1024, 2048, … where that is cheap to know."""
        if self.n_samples == self.max_samples:
            return True
        if not self._may_stop or self.n_samples < max(self._next_check, self.advised):
            return False
        while self._next_check <= self.n_samples:
            self._next_check *= 2
        # Products over what is gathered so far would be small ones: only where it is asked at all.
        layout = self.moments()[0] if self.basis is None else self._laid_out()
        cubes = sum(sum(layout.dims[p] for p in read) ** 3 for read in layout.parents[1:])
        if self.options.errors is False or self.n_samples * self._work < _CHECK_WORK * cubes:
            return False
        try:
            credits = self.credits()
        except ValueError:  # more samples may be what is missing, and if not, the report will say so
            return False
        known = credits.values["credit"].isfinite()
        return bool((credits.stderr["credit"][known] <= TOLERANCE).all())

    def replay(
        self,
        model: nn.Module,
        steps: Iterable[Step],
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Run recorded steps again, on a model that is left exactly as it was found."""
        with undisturbed(model), self.capture:
            for step in steps:
                given = step.revive()
                self.start_pass(given)
                self._valid = step.valid
                with around():
                    step.run(given)
                self.end_pass()

    def _weights(self, name: str) -> list[Tensor]:
        module = self.capture.components.get(module_of(name))
        held = [] if module is None else [weight.detach() for weight in module.parameters()]
        return [weight for weight in held if type(weight) is Tensor and weight.is_floating_point()]

    def start_pass(self, batch: Any = None) -> None:
        """Get ready for a forward pass; the batch tells network inputs apart, and padding from data."""
        refuse_without_shape(batch)
        self._batch, self._valid, self._others = batch, valid_positions(batch), {}
        self._shapes, self._first_shapes = {}, {}
        self.capture.again, self._calls_before = _weakly(self._take_again), []
        self._told_by = None
        self.capture.start_pass(batch)

    def end_pass(self) -> None:
        """Add up what the capture recorded in the pass that just ended."""
        silent, self._skipped = self.capture.silent, self.capture.skipped
        known = silent if self._silent is None else self._silent
        self._silent = [name for name in known if name in silent]
        # Of the first pass, rows are made when what it was given is forgotten.
        self._valid = self._valid or valid_positions(self.capture.given)
        states = self.capture.end_pass()
        if len(states) == 1 and self.plan is None:
            _refuse_alone(*states)
        if not states:
            raise ValueError(
                f"no component ran in the forward pass; chosen were {list(self.capture.components)}. "
                "Check forward_fn, or name modules that the pass calls with components=[...]."
            )
        if self._is_whole(states) or not self._calls_before:
            self._take(states)

    def _is_whole(self, states: Mapping[str, Any]) -> bool:
        """Check whether a call ran the whole chain on data like those of the first call of the step.

        A step may also ask for features alone, or go on by single positions behind a past.
        """
        shapes, self._shapes = self._shapes, {}
        if self.plan is None:
            shapes = {name: tuple(record.tensor.shape) for name, record in states.items()}
        if self.plan is not None and any(not is_sum(n) for n in self.plan.recorded - states.keys()):
            return False
        self._first_shapes = self._first_shapes or shapes
        unlike = self.plan is not None and self._by_state(shapes) != self._by_state(self._first_shapes)
        self._unlike_calls += unlike
        return not unlike

    def _by_state(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the states of the chain, without the axis of their samples."""
        own = (name for name in self._known_plan.recorded & shapes.keys() if not is_sum(name))
        axes = {name: self._known_plan.forms[name].batch_axis for name in own}
        return {name: shapes[name][:axis] + shapes[name][axis + 1 :] for name, axis in axes.items()}

    def _take(self, states: dict[str, Any], *, again: bool = False) -> None:
        """Add up the states of one call of the network, in a step with others if ``again``."""
        if self.plan is None:
            states = self._make_plan(list(states.values()))
        elif self._lengths_of:
            states = self._all_rows([r for r in states.values() if r is not None])
        self._known_plan.expand(states)
        try:
            self._known_plan.check_rows(states)
        except UnlikeRowsError:
            # Parts that run on samples of their own may have as many in most batches, but not in all.
            self._unlike_batches += 1
            if self._named or 2 * self._unlike_batches > self._batches:
                raise
            return
        self._fill_in_sums(states)
        rows = self._known_plan.join(states, self._batches)
        self._refuse_others(states, rows)
        first, *_ = blocks = list(rows.values())
        # A step may call the network twice on the same data, for a loss and for a metric.
        if any(all(map(torch.equal, blocks, others)) for others in self._calls_before):
            return
        if self._followed is not None and not self.chain.names:
            self._followed.check_widths([block.shape[1] for block in rows.values()])
        before, n_rows = self._told_by, self.n_samples
        if before is not None and len(before) < samples_in(self._batch):
            # Calls on a part of the batch each are about samples of their own.
            before = None
        told_by = first if before is None else torch.cat([before, first[len(before) :]])[: len(first)]
        self._follow_sums(rows)
        self.push(rows, self._known_plan.links, told_by)
        if before is None:
            self._told_by = first
        else:
            self._n_again += self.n_samples - n_rows
        if again:
            self._calls_before.append(blocks)

    def _refuse_others(self, states: Mapping[str, Any], rows: Mapping[str, Tensor]) -> None:
        """Refuse a pass in which components ran in between that did not run in the first."""
        if not self._others:
            return
        order, n_samples = list(states), len(next(iter(rows.values())))
        # What runs behind the chain, to draw pictures, does not concern it, nor what has no row for each
        # sample, as an expert that is given some positions.
        last = max(order.index(name) for name in self._known_plan.recorded)
        others = [name for name in order[:last] if n_samples in self._others.get(name, ())]
        if others:
            raise ValueError(
                f"batch {self._batches} also ran {listed(others)}, which the first one did not, before "
                f"{order[last]!r}. Choose components that run equally often in every pass with "
                "components=[...]."
            )

    def _take_again(self, states: dict[str, Any]) -> None:
        """Add up the states of a call of the chain that another one follows in the same step."""
        if self._is_whole(states):
            self._take(states, again=True)

    def report(self, *, step: int | None = None, errors: bool | None = None) -> CreditReport:
        """Finish and compute the report, as often as asked; ``errors`` overrules the options."""
        if errors is not None and errors != self.options.errors:
            self.options, self._credits = replace(self.options, errors=errors), None
        report = self.credit_report(self._notes(), step=step)
        dead = [n for n, c in zip(report.components, report.credit, strict=True) if not math.isfinite(c)]
        notes = list(report.notes)
        if dead and math.isfinite(report.total):
            notes.append(
                f"no output direction can be followed back to {listed(dead)} (a dead branch, or one "
                "that is still zero), so its numbers are NaN; all others follow the data around it"
            )
        reference = report.reference
        if self.plan is not None and reference is not None:
            reference = replace(
                reference,
                modules=self.capture.chosen,
                named=self._named,
                calls=self.plan.states,
                grids={name: form.grid for name, form in self.plan.forms.items() if form.grid},
                parts=self.parts,
            )
        return replace(
            report,
            notes=tuple(notes),
            parts=self.parts,
            reference=reference,
            types=tuple("+".join(type(m).__name__ for m in group) for group in self._modules()),
            parameters=self.capture.n_weights(self._calls()),
        )

    def _make_plan(self, records: list[Recorded]) -> dict[str, Tensor | None]:
        """Freeze the chain that the first pass showed, and return the rows of that pass."""
        if isinstance(ways := self.options.reduce, Mapping) and ways:
            names = list(dict.fromkeys((*(record.name for record in records), *self.capture.chosen)))
            for stranger in matching(names, list(ways))[1]:
                raise ValueError(
                    f"reduce holds {stranger!r}, which matches no component. {hint(stranger, names)}"
                )
        self.plan, records, self._pooled = plan_of(
            self.capture,
            records,
            self._batch,
            named=self._named,
            end=OUTPUT if callable(self.options.output) else self.capture.end,
            reduce=self.options.reduce,
            max_dim=self.options.max_dim,
            varying=self._varying,
            valid=self._valid,
        )
        if (error := self.capture.untraced) is not None:
            self.capture.inputs.keep({record.name for record in records})
            self._untraced = (
                f"the data could not be followed ({type(error).__name__}: {error}), so each is "
                "taken to read what ran right before it"
            )
        if len(self.plan.states) < 2:
            (name,), told = self.plan.names, self.plan.told()
            self.plan = None
            if not (why := [note for note in told if note.startswith("without one row for each of")]):
                _refuse_alone(name)
            raise ValueError(
                f"{name!r} alone has one row per sample, so nothing can be credited: {'; '.join(why)}. "
                "Give the samples an axis of their own, the first, or reduce states to one row per "
                "sample with reduce=."
            )
        if self._followed is not None:
            self.plan = self._followed.coordinates(self.plan)
        self.capture.forget_sums(but=self.plan.recorded)
        told_by = {self.plan.forms[name].padding for name in self.plan.recorded}
        self._lengths_of = frozenset(lengths_of(records)) & told_by
        self._find_unmasked(records)
        rows = self._all_rows(records)
        self._check_reduced(records, rows)
        if self.options.targets is not None:
            self._refuse_mixtures(self.options.targets, records)
        for name, group in zip(self.plan.names, self.plan.states, strict=True):
            form, block = self.plan.forms[group[0]], rows[group[0]]
            if form.picked is not None and not form.is_alone and len(group) == 1 and block is not None:
                self.apart[name] = block.shape[1] // (1 + math.prod(form.grid))
            parts = [part for part in map(rows.get, group) if part is not None]
            if len(group) > 1 and len(parts) == len(group):
                self.joined[name] = tuple(part.shape[1] for part in parts)
        self._roundings = {r.name: _rounding(r) for r in records if is_sum(r.name) or r.name == OUTPUT}
        self._work = self._work_of(records) / max(
            1, *(len(block) for block in rows.values() if block is not None)
        )
        return rows

    def _follow_sums(self, rows: Mapping[str, Tensor]) -> None:
        """Find out which sums are, in all batches, those of what they read, but for a shift."""
        plan, states = self._known_plan, list(rows.values())
        for i, (name, read) in enumerate(zip(plan.names[1:], plan.links, strict=True), 1):
            if name in self._roundings and len(states[i]):
                # Of each measurement, for a training may change what a branch is multiplied by.
                known = self._added.setdefault(i, AddedUp(self._roundings[name]))
                known.see(states[i], [states[p] for p in read])

    def _fill_in_sums(self, states: dict[str, Any]) -> None:
        """Add up what a sum reads where no module took it in this pass, and was so in those before."""
        known = {self._known_plan.states[i][0]: each for i, each in self._added.items()}
        for name, parts in self._known_plan.sums.items():
            if name in known and name not in states and states.keys() >= {*parts}:
                found = known[name].filled_in([states[part] for part in parts])
                states |= {} if found is None else {name: found}

    def _weights_of_sums(self) -> dict[int, Tensor | None]:
        return {i: known.weights for i, known in self._added.items() if known.tells}

    def _check_reduced(self, records: Sequence[Recorded], rows: Mapping[str, Tensor | None]) -> None:
        """Refuse what the user's own reduction made other rows of than those of samples."""
        sizes = {len(record.tensor) for record in records if record.tensor.ndim}
        for record in records:
            form, block = self._known_plan.forms.get(record.name), rows[record.name]
            if form is None or block is None or not callable(form.reduce):
                continue
            axis = form.of_axis
            of_batch = [t.shape[axis] for t in all_tensors(self._batch) if t.ndim > axis]
            if len(block) not in sizes.union(of_batch):
                raise ValueError(
                    f"reduce gave {len(block)} rows of {record.name!r}, of shape "
                    f"{tuple(record.tensor.shape)}, for the {next(iter(of_batch), len(record.tensor))} "
                    "samples of the first batch; it must give one row per sample"
                )

    def _refuse_mixtures(self, targets: Sequence[int], records: Sequence[Recorded]) -> None:
        """Refuse targets of an output that is pooled or projected."""
        width, max_dim = 0, self.options.max_dim
        for record in records:
            if record.name in self._known_plan.states[-1]:
                form = self._known_plan.forms[record.name]
                is_whole = form.reduce == "pool" and not form.is_alone
                block = by_sample(record.tensor, form) if is_whole else form.rows(record.tensor)
                width += block[0].numel()
        if width > max_dim:
            raise ValueError(
                f"targets is {list(targets)}, but the output is wider than max_dim={max_dim}, so that "
                "its state holds mixtures of its units; raise max_dim, or, outside of a Trainer, pick "
                "the units by output=lambda returned: returned[:, [0, 1]]"
            )

    def _find_unmasked(self, records: Sequence[Recorded]) -> None:
        """Find the states that have other positions than the masked ones that they are made of."""
        masked = set[str]()
        for record in records:
            form = self._known_plan.forms.get(record.name)
            if form is None or record.name not in self._known_plan.recorded:
                continue
            valid = self._valid.get(form.padding or "")
            if valid is not None and valid.ndim > 1 and not bool(valid.all()):
                masked.add(record.name)
                continue
            is_made_of = valid is None and masked & (record.sources or frozenset())
            may_be_padded = n_positions(record.tensor, form) > 1
            if is_made_of and may_be_padded and form.reduce in ("pool", "mean", "last"):
                self._unmasked.append(record.name)

    def _work_of(self, records: Sequence[Recorded]) -> float:
        """Estimate the multiplications of one pass: each weight once per position of its output."""
        work = 0.0
        for record in records:
            component = self.capture.components.get(module_of(record.name))
            of_call = call_of(record.name) == record.name
            if component is not None and of_call and record.tensor.ndim > 1:
                first = self._known_plan.forms[record.name].channels_first
                channels = record.tensor.shape[1 if first else -1]
                weights = sum(parameter.numel() for parameter in component.parameters())
                work += weights * record.tensor.numel() / max(1, channels)
        return work

    def _all_rows(self, records: Sequence[Recorded]) -> dict[str, Tensor | None]:
        """Make rows of all states of one pass, padded ones as the lengths of any of them say."""
        lengths = lengths_of(records)
        return {r.name: self._rows(r.tensor, r, lengths) for r in records}

    def _keep(self, tensor: Tensor, recorded: Recorded) -> Any:
        self._shapes[recorded.name] = tuple(tensor.shape)
        waits = self._lengths_of and recorded.name in self._known_plan.recorded | self._lengths_of
        if self.plan is None or waits:
            # Which form the rows take is known once the whole first pass is, and lengths once a pass is.
            return replace(recorded, tensor=detached_copy(tensor))
        return self._rows(pooled_by(self._pooled, plain(dense(tensor)), self._batch), recorded)

    def _rows(
        self, tensor: Tensor, recorded: Recorded, lengths: Valid = MappingProxyType({})
    ) -> Tensor | None:
        """Make the rows of a state of the chain; of others, compare."""
        if recorded.name not in self._known_plan.recorded:
            if told := self._left_out(recorded.name, tensor):
                self._compare(recorded.name, told)
            call = call_of(recorded.name)
            known = call in self._known_plan.forms or call in self.capture.parts
            if not known and module_of(call) not in self._known_plan.in_turns:
                self._others[recorded.name] = tuple(tensor.shape[:2])
            return None
        form = self._known_plan.forms[recorded.name].in_batch(tensor, self._batch)
        if recorded.orders or recorded.second_orders:
            tensor = replace(recorded, tensor=tensor).in_order(form)
        told_by = form.padding or ""
        valid = recorded.lengths
        if valid is None and told_by in lengths:
            valid = up_to(lengths[told_by], n_positions(tensor, form))
        if valid is not None:
            return form.rows(tensor, to_device(valid, tensor.device))
        given = self._valid or (valid_positions(self.capture.given) if told_by else {})
        return form.rows(tensor, given.get(told_by))

    def _by_sample(self, name: str, tensor: Tensor) -> Tensor:
        forms = self._known_plan.forms
        return by_sample(tensor, forms[name]) if name in forms else tensor

    def _left_out(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Return what tells, by sample, whether a state varies that did not in the first batch."""
        told = list[Tensor]()
        if name in self._known_plan.alike and tensor.ndim and len(tensor):
            told.append(self._by_sample(name, tensor))
        if name in self._known_plan.places and tensor.ndim in (2, 3):
            # Means over what holds data differ where samples are padded apart.
            masks = masks_of(tensor.shape[-2], self._valid or valid_positions(self.capture.given))
            counts = {len(mask) for mask in masks}
            if len(counts) == 1 and (tensor.ndim == 2 or len(tensor) in (1, *counts)):
                told += masks
        return told

    def _compare(self, name: str, told: Sequence[Tensor]) -> None:
        """Find out whether what was left out varies; a device is not asked."""
        count, rows = max(map(len, told)), told[0]
        if len(told) > 1:
            rows = torch.cat([each.to(rows).flatten(1).expand(count, -1) for each in told], dim=1)
        first = rows[:1].detach().clone(), torch.zeros((), device="cpu")
        sample, differs = self._alike.get(name, first)
        own = sample if sample.shape[1:] == rows.shape[1:] else rows[:1]
        differs = differs.to(rows.device) + (rows != own.to(rows.device)).any()
        self._alike[name] = sample, differs

    @property
    def varying(self) -> list[str]:
        """States that were left out for they did not vary in the first batch, and did in later ones."""
        return [name for name, (_, differs) in self._alike.items() if bool(differs > 0)]

    def _note_kinds(self, notes: list[str]) -> None:
        # Later calls of a step are told by the inputs of the first.
        if not self._n_again:
            super()._note_kinds(notes)

    def _notes(self) -> list[str]:
        """Collect what a reader must know of how the states were recorded."""
        # A process that saw no batch made no plan; its report is not the one that is logged.
        notes = list(self.notes)
        if self._unmasked:
            notes.append(
                f"the batch has a mask, and {listed(self._unmasked)}, made of what it is about, have "
                "other positions, of which all are averaged: where padding is among them, they look "
                "less linear than they are"
            )
        notes += () if self.plan is None else self.plan.told(self.varying)
        if (lift := self.options.observables) is not None:
            called = lift if isinstance(lift, str) else getattr(lift, "__name__", "a function")
            notes.append(
                f"every state but the output was lifted by {called}, so credits, gains, sensitivities "
                "and R² are about the lifted coordinates"
            )
        if self._untraced is not None:
            notes.append(self._untraced)
        if self._pooled is not None:
            notes.append(
                "samples are graphs, for the network pools their nodes: states of nodes and edges were "
                "averaged over each graph, so that what takes their sums or maxima looks less linear "
                "than it is"
            )
        if self._n_again:
            notes.append(
                f"steps call the network several times: {self._n_again} of {self.n_samples} samples are "
                "later calls, and standard errors take these for samples seen again"
            )
        if self._unlike_calls:
            notes.append(
                f"{self._unlike_calls} calls of the network on data of other shapes than in the first "
                "call of their step, as by single positions behind a past, were left out"
            )
        if self._unlike_batches:
            notes.append(
                f"{self._unlike_batches} batches were left out, for parts side by side had unlike "
                "numbers of rows there, as those do that run on other samples; name components without "
                "them"
            )
        notes += self.capture.told(self._silent or ())
        if half_seen := [name for name in self.capture.inputs.half_seen if name in self.parts]:
            notes.append(
                f"data of the batch that go into {listed(half_seen)} beside states are given to no call "
                "of the whole network, so operators do not see them; let one forward() take both"
            )
        if changed := [name for name in self.capture.inputs.changed if name in self.parts]:
            notes.append(
                f"data of the batch go into {listed(changed)} changed on the way (scaled, or in part), "
                "and operators see them as they came; name what changes them as a component, or give "
                "them to forward() as they are taken"
            )
        if uncounted := list(dict.fromkeys(self.capture.origins.uncounted)):
            notes.append(
                f"integers of the batch that go into {listed(uncounted)} beside other numbers are not "
                "seen by operators; let a module of their own take them, or give floating-point numbers"
            )
        seen = {call for calls in self._calls() for call in calls}
        if noisy := [name for name in dict.fromkeys(self.capture.origins.noisy) if name in seen]:
            notes.append(
                f"random numbers go into {listed(noisy)} that operators do not see, so what they do "
                "counts as unexplained and as nonlinear"
            )
        homeless = self.capture.homeless(self._silent or ())
        if told := [f"{name} ({count:,})" for name, count in homeless.items()]:
            notes.append(f"parameters in no component: {listed(told)}")
        if self._skipped:
            notes.append(f"gave no floating-point tensor, so left out: {', '.join(self._skipped)}")
        if (first := self._begins_without_input()) is not None:
            notes.append(
                f"{first!r} takes no floating-point input that could be followed, so its output is x_0 "
                "and it has no credit of its own"
            )
        last = self.capture.returned.changes
        if self.options.output is None and last is not None and last == self.chain.names[-1]:
            notes.append(
                f"credits end with what {last!r} gives, not with what the network makes of it by "
                "itself, as by torch.tanh; let a module do that, as nn.Tanh()"
            )
        if self.options.output is None and (self.capture.returned.compares or self._is_joined):
            notes.append(
                f"credits end with what {self.chain.names[-1]!r} gives, not with what is made of it: "
                "similarities between samples, a loss, or what forward_fn computes of several states; "
                "let forward() return what has a row per sample"
            )
        if len(self.chain.names) == 2:
            (calls, *_), leaf = self._calls(), all(map(is_leaf, self._modules()[0]))
            advice = "" if leaf else f"; name its parts, as with components='{module_of(calls[0])}.*'"
            notes.append(
                f"the network has one component, {self.chain.names[1]!r}, whose credit is 0 by "
                f"definition, as of every last one{advice}"
            )
        return notes

    def _begins_without_input(self) -> str | None:
        """Name what is in x_0 that is no input of the network."""
        if self.plan is None:
            return None
        begin = dict.fromkeys(map(call_of, self.plan.states[0]))
        others = [name for name in begin if not self.plan.forms[name].is_input]
        if len(others) == len(begin):
            return self.plan.names[0]
        return "+".join(others) if others else None

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Module calls by component, also of those that a state joins with others."""
        # The first state is what all others are computed from.
        states = () if self.plan is None else self.plan.states[1:]
        inside = {call_of(name) for group in states for name in group}
        return {name: calls for name, calls in self.capture.parts.items() if name in inside}

    def _calls(self) -> list[list[str]]:
        """List the calls that each component is made of."""
        states = () if self.plan is None else self.plan.states[1:]
        return [[*dict.fromkeys(map(call_of, group))] for group in states if not is_sum(group[0])]

    def _modules(self) -> list[list[nn.Module]]:
        """Find the modules of each component."""
        known = self.capture.components
        return [[known[m] for n in calls if (m := module_of(n)) in known] for calls in self._calls()]


def plan_of(
    capture: Capture, records: Sequence[Recorded], batch: Any, *, named: bool, **options: Any
) -> tuple[Plan, list[Recorded], int | None]:
    """Plan the chain of what a pass recorded; return also the records, and what pools their nodes."""
    returned, in_losses = capture.returned.made_of, capture.returned.in_losses
    if capture.untraced is not None:
        records, returned, in_losses = in_a_row(records, returned), {}, {}
    pooled = pooling_index([r.tensor for r in records], capture.returned.rows, batch)
    records = [replace(r, tensor=pooled_by(pooled, r.tensor, batch)) for r in records]
    in_turns = frozenset() if named else capture.in_turns(records)
    plan = make_plan(
        records,
        batch=batch,
        named=named,
        returned=returned,
        in_losses=in_losses,
        in_turns=in_turns,
        **options,
    )
    return plan, records, pooled


def _refuse_alone(name: str) -> NoReturn:
    """Refuse a chain of one state that nothing reads and that reads nothing."""
    raise ValueError(
        f"{name!r} is all that the chain holds, and reads no floating-point data that vary, so nothing "
        "can be credited; name more components, or let what takes the batch be a module, and what is "
        "made of this"
    )


def _rounding(record: Recorded) -> float:
    """Return how far values of a sum may be off, as a share of the largest that were added."""
    return max(EXACT, 2 * torch.finfo(record.tensor.dtype).eps)


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a bound method that must not keep its object, so that what measured is freed at once."""
    found = WeakMethod(method)

    def call(*given: Any) -> Any:
        bound = found()
        assert bound is not None
        return bound(*given)

    return call


class NoSamplesError(ValueError):
    """No process saw a sample, which all of them learn."""


def merge_processes(
    measurement: Measurement | None, device: torch.device, error: Exception | None = None
) -> None:
    """Let each process's measurement hold the samples of all; collectives.

    Each process must call this once, whatever happened to it.
    """
    share = Share()
    try:
        if measurement is not None:
            share = measurement.share()
    except Exception as failure:
        error = failure
    if error is not None:
        share = Share(error=f"{type(error).__name__}: {error}")
    shares = exchange(share)
    if error is not None:
        raise error
    if not agreed(shares).count:
        raise NoSamplesError("no sample arrived: the batches were empty in every process")
    assert measurement is not None
    measurement.merge(shares, exact_device(device))
