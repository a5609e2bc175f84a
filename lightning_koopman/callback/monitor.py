"""A Lightning shell: when to capture, where to log; nothing numerical."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from lightning_koopman.callback.budget import Budget
from lightning_koopman.callback.effects_in_time import EffectsInTime
from lightning_koopman.callback.harmless import HarmlessCallback, never_in_the_way, release_memory
from lightning_koopman.callback.loggers import CreditWriter
from lightning_koopman.callback.recorded_effects import parts_in
from lightning_koopman.callback.trainer_facts import (
    data_part,
    first_loader,
    is_dealt_out,
    last_step,
    logged_step,
    may_be_last,
    may_change_weights,
    may_skip_validation,
    may_validate_last,
    monitored_keys,
    refuse_sharded_weights,
    samples_for_rank,
    steps_ahead,
    trained_parameters,
)
from lightning_koopman.callback.watched_samples import HELD_BYTES, WatchedSamples
from lightning_koopman.callback.watched_state import WatchedState
from lightning_koopman.koopman.options import DEFAULTS, Options, takes_options
from lightning_koopman.measurement.drift import drift_from
from lightning_koopman.measurement.measurement import Measurement, NoSamplesError, merge_processes
from lightning_koopman.measurement.processes import agree_on_latest, gather
from lightning_koopman.network.access.hooks import seconds_in_hooks
from lightning_koopman.network.access.isolation import (
    following_stops_compiler,
    has_compiled_functions,
    is_compiled,
    plain_numerics,
    undisturbed,
)
from lightning_koopman.network.access.signals import came_from_signal
from lightning_koopman.network.arguments import INTEGER, check_given
from lightning_koopman.network.axes.padding import valid_positions
from lightning_koopman.network.components import named_components, norms_beside
from lightning_koopman.network.runs.recording import BYTES_KEPT, Recording
from lightning_koopman.network.runs.steps import Step
from lightning_koopman.report.drift import Drift
from lightning_koopman.report.effects import Kind, check_kinds
from lightning_koopman.report.report import CreditReport
from lightning_koopman.report.saved import ReportFormatError

_HISTORY_SAVED = 100

_FIRST_FIGURES = 0.3
"""Seconds that the figures of a report take, until they were drawn once: Matplotlib is imported then."""


@dataclass
class _Recorded:
    """Calls that may be run again, whether of training steps, and the samples that were measured."""

    calls: Recording | None = None
    of_training: bool = False
    samples: WatchedSamples = field(default_factory=WatchedSamples)


def _is_last_batch(trainer: Any) -> bool:
    """Check whether a training's validation ends with this batch, as far as the loop knows by now."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    return bool(trainer.state.fn == "fit" and loop.batch_progress.is_last_batch)


class KoopmanCreditMonitor(HarmlessCallback):
    """Watch the Koopman credit of every component while a network trains.

    Hooks watch the validation batches that Lightning runs anyway, and come off after each of them, so
    training is bit-identical with the callback on. The first and the last validation are measured, and
    between them as many, in even distances, as ``max_overhead`` pays for. Each measurement logs, at
    Lightning's own step, ``<prefix>/credit/<component>``, ``<prefix>/drift/<component>`` (what changed
    since the measurement before), ``<prefix>/total``, ``<prefix>/doubts`` (how many components carry
    one) and ``<prefix>/overhead`` (the share of the training's time that watching took so far). The last
    one adds ``<prefix>/skip/<component>``, the effect of leaving it out, standard errors and figures;
    others have effects, and the 1st, 2nd, 4th, 8th … figures, as far as a fifth of what is planned
    to be spent pays for them.

    ``trainer.callback_metrics`` gets every quantity of every component. A key keeps the value measured
    last; one that somebody monitors is there from the first validation on (without any, from the end of
    the first epoch on), as 0 where the first measurement fails. A callback that acts on each epoch's
    number needs ``every_n_epochs=1``. At the end of training :attr:`report` holds a report on the final
    weights.

    How the network is run is never guessed. The outermost calls that a step makes of the network's parts
    are recorded with their arguments, up to 256 MiB, and run again, in the modes (train or eval) that
    validation ran in, where more than the watched pass is needed: at the end of a training that stopped
    between validations, at the end of each epoch where there is no validation loop, it runs no component
    or processes may skip it (then on training steps, in eval mode, which a warning says), and behind
    each batch where parts went through ``torch.compile``, which take no hooks. Where the step runs code
    of its own between two calls, or a call does not give again what it gave, the watched report stands,
    and its note says why.

    Of several validation loaders the first that gives a batch is measured, which a note says; batches in
    which no component runs are left out.

    Each fit begins a new :attr:`history`, of reports, and new :attr:`drifts`. ``trainer.validate`` adds
    a report on the weights that it runs with, as complete as the last one of a training;
    ``trainer.test`` is not watched.

    With several processes (``ddp``, ``ddp_fork``, ``ddp_spawn``) the samples of all of them count, each
    once: the moments are summed over the processes, and every one of them gets the same report, which is
    the one that a single process would give, in batches as large where not all are looked at. What a
    ``DistributedSampler`` repeats to fill the last batch is left out. The error of one process ends the
    measurement in all, and nothing waits. Where a state is wider than ``max_dim``, each process keeps
    its share of ``max_samples`` rows until the end of the epoch. Under ``ddp_spawn`` and ``ddp_fork``
    the parent process gets ``trainer.callback_metrics``, loggers and checkpoints, but neither
    :attr:`history` nor :attr:`report`, which stay in the children. Strategies that shard weights (FSDP,
    model parallel) are measured while validation runs; they cannot run an extra pass. The processes of a
    tensor-parallel group run on the same samples, which count once; components whose outputs are spread
    over them are refused.

    Args:
        components: Names or glob patterns of ``pl_module.named_modules()``, of whose matches the
            outermost count; ``None`` chooses.
        figures: Whether loggers that take them get figures, a closing table and, in TensorBoard, a run
            per component, which gives each a colour of its own, and a text on what the charts show.
        effects: Which effects of altering each component on the outputs are measured, out of ``"skip"``,
            ``"linear"``, ``"reinit"``, ``"weight_noise"`` and ``"output_noise"``: for the last report of
            a training and that of ``trainer.validate``, where they may take a second in any case, and
            for others as far as 9 % of ``max_overhead`` pay for them, on up to 512 samples of the
            recorded calls. A note says so where the last have fewer than 64. They are in
            :attr:`report` and ``<prefix>/<kind>/<component>``. Where every recorded batch holds one
            integer per sample (as second entry, or under a name such as ``labels``) and these are
            classes of the outputs (as many as there are outputs, or named by the network more often than
            chance allows), effects are mean KL divergences in nats, with the accuracy that is lost;
            otherwise mean squared changes over the outputs' variance. ``report.effects.scale`` says
            which.
        drift: Whether each measurement is held against the one before, which tells the components that
            still learn: :attr:`drifts`, and ``<prefix>/drift/<component>``.
        max_overhead: Most time that watching may take, as a share of the time that the training takes
            without it, once it takes more than 1.5 seconds. Measurements are taken in even distances,
            and fewer where each takes long. Six tenths are planned to be spent, for not all that
            watching does to a training can be counted.
        every_n_epochs: Measure in every n-th epoch whatever it takes, and always in the first and the
            last.
        max_samples: Most samples a measurement looks at, over all processes. Where validation runs on
            more, batches at even distances are watched, as far as it is known how many there are.
        prefix: First part of every logged key; give each of several monitors its own.
        on_error: ``"warn"`` turns any error of the measurement into one warning; ``"raise"`` raises it.
        options: How states become rows, and rows become credits.

    Raises:
        ValueError: If an argument is out of range, or, when training starts, if a named component does
            not exist.
        TypeError: If ``options`` is no ``Options``.
    """

    @takes_options(
        excitation="effects=['output_noise'] measures what noise does",
        forward_fn="the calls that a step makes are recorded and run again",
        quantities="trainer.callback_metrics and monitor.history hold every quantity",
        top_k="name the components that are to be watched",
        layout="figures=False leaves out all but plain scalars",
        hyperparameters="logger.log_hyperparams(vars(monitor.options)) logs the options",
    )
    def __init__(
        self,
        components: str | Sequence[str] | None = None,
        *,
        figures: bool = True,
        effects: Sequence[Kind] = ("skip",),
        drift: bool = True,
        max_overhead: float = 0.05,
        every_n_epochs: int | None = None,
        max_samples: int = 4096,
        prefix: str = "koopman",
        on_error: Literal["warn", "raise"] = "warn",
        options: Options = DEFAULTS,
    ) -> None:
        super().__init__(on_error, Budget(max_overhead))
        if not (options.output is None or isinstance(options.output, str)):
            raise ValueError(
                f"output is {options.output!r}; a callback does not see what the model returns, so name "
                "a module"
            )
        check_given(INTEGER, every_n_epochs=every_n_epochs, max_samples=max_samples)
        check_kinds(effects)
        self._writer = CreditWriter(prefix, figures=figures, more=(*effects, *["drift"] * bool(drift)))
        for name, value in (("every_n_epochs", every_n_epochs), ("max_samples", max_samples)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or above")
        self.options = options
        self.components, self.effects, self.drift = components, tuple(effects), drift
        self.every_n_epochs = every_n_epochs
        self.max_samples = max_samples
        self.prefix = prefix
        self.history: list[CreditReport] = []
        self.drifts: list[Drift] = []
        self._effects = EffectsInTime(self.effects, self.budget)
        self._resuming = False
        self._start_run()

    def _start_run(self) -> None:
        """Begin a training, or an evaluation, with nothing under way."""
        self.sync_pending = False
        self._measurement: Measurement | None = None
        self._watched: Measurement | None = None
        self._failure: Exception | None = None
        self._state = WatchedState()
        self._in_hooks = 0.0
        self._due_epoch = self._final = False
        self._newest: dict[str, Tensor] = {}
        self._rides_along, self._in_batch = True, False
        # Why there is no validation to watch, for reports on training steps.
        self._why_training: str | None = None
        # What was recorded, and, until a component runs in validation, what was recorded before.
        self._recorded, self._before = _Recorded(), _Recorded()
        self._n_recorded = 0
        self._checked = False
        self._differs: str | None = None
        self._measured_at: int | None = None
        # Whether others may still change weights when training ends, and whether the module holds others
        # than the measured ones for now.
        self._open = self._elsewhere = False
        self._logged_at: int | None = None
        self._checkpoint_step: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, whenever it is made, has arguments and results; what is under way is the training's.
        kept = object.__new__(type(self))
        vars(kept).update(vars(self))
        kept._start_run()
        return vars(kept)

    @property
    def report(self) -> CreditReport | None:
        """The newest report, if there is one."""
        return self.history[-1] if self.history else None

    @property
    def state_key(self) -> str:
        """Key that keeps several monitors of one Trainer apart in its checkpoints."""
        return self._generate_state_key(prefix=self.prefix, components=self.components)

    @never_in_the_way
    def state_dict(self) -> dict[str, Any]:
        """Return the newest reports in the plain types that a safe checkpoint may hold.

        Returns:
            The history, as JSON text, and the components whose scalars are logged.
        """
        history = [json.dumps(r.to_dict()) for r in self.history[-_HISTORY_SAVED:]]
        return {"history": history, "shown": list(self._writer.shown)}

    @never_in_the_way
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the history back when training resumes; evaluation leaves it alone.

        Args:
            state_dict: What :meth:`state_dict` gave.

        Raises:
            ReportFormatError: If it is anything else.
        """
        if not self._resuming:
            return
        try:
            history = [CreditReport.from_dict(json.loads(text)) for text in state_dict["history"]]
            shown = tuple(state_dict.get("shown", ()))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ReportFormatError(
                f"the checkpoint holds no history of credits ({type(error).__name__}: {error})"
            ) from None
        self.history, self._writer.shown = history, shown

    @never_in_the_way
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the previous run: each has reports and figures of its own."""
        self._forget_run()
        self._resuming = stage == "fit"
        if self._resuming:
            self.history, self.drifts = [], []
            self._writer.reset()
        else:
            self.budget.start(0)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Remember the step that a checkpoint's weights belong to."""
        self._checkpoint_step = checkpoint.get("global_step")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a misspelt component before any work is done."""
        if self.components is not None:
            named_components(pl_module, self.components)

    @never_in_the_way
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say so where there is no validation loop to watch, or nowhere to log to."""
        self.budget.start(trainer.global_step)
        if not trainer.enable_validation:
            self._watch_training("there is no validation loop")
        elif may_skip_validation(trainer, pl_module):
            self._watch_training("processes without a batch skip validation")
        if not trainer.loggers:
            self._warn_once(
                "the Trainer has no logger; Koopman credits are kept in monitor.history only"
            )
        # Last, for it asks loggers of any kind for what they write with.
        if self._writer.draws_for(trainer.loggers):
            self.budget.expect("draw", _FIRST_FIGURES)

    def _watch_training(self, why: str) -> None:
        self._why_training = why
        self._warn_once(
            f"{why}, so Koopman credit is about training steps: their calls are run once more, in eval "
            "mode, at the end of the epoch"
        )

    @never_in_the_way
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin a measurement if one is due."""
        self._forget()
        in_training = trainer.state.fn == "fit"
        if trainer.sanity_checking or (
            in_training and (self._why_training or not self._is_due(trainer))
        ):
            return
        if may_skip_validation(trainer, pl_module):
            self._warn_once(
                "a process without a batch skips this validation, so Koopman credit cannot be measured: "
                "set allow_zero_length_dataloader_with_multiple_devices to False"
            )
            return
        if is_compiled(pl_module):
            refuse_sharded_weights(trainer)
        before, self._recorded = self._recorded, replace(self._recorded)
        final = in_training and may_validate_last(trainer)
        self._begin(trainer, pl_module, first_loader(trainer.val_dataloaders), final=final)
        self._before, self._recorded.of_training = before, False
        assert self._measurement is not None
        self._recorded.calls = Recording(
            pl_module,
            self._measurement.capture.components,
            follow_from=0 if self._rides_along else None,
        )

    @never_in_the_way
    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Put the hooks on for one batch."""
        if self._measurement is None:
            return
        if self._recorded.samples.takes(dataloader_idx, batch_idx) and self._wants_more:
            self._in_batch = True
            # Of several processes, ddp writes the buffers of the first into the others, before the step.
            if trainer.world_size == 1 and not (self._checked or self._state.is_known):
                self._state.copy_buffers(pl_module)
            self._record(batch)
            if self._rides_along:
                self._measurement.start_pass(batch)
                self._measurement.capture.__enter__()

    @never_in_the_way
    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the hooks off again and add up what they saw."""
        measurement, recording = self._measurement, self._recorded.calls
        if measurement is None:
            return
        # A step that calls the network many times may have given all samples before it ended.
        watched = dataloader_idx == self._recorded.samples.loader and self._in_batch
        step = None
        if watched:
            self._in_batch = False
            measurement.capture.remove()
            self.budget.add(seconds_in_hooks() - self._in_hooks)
            step = None if recording is None else recording.end_step()
            if step is not None and step.calls and self._batch_ran_nothing(measurement, step):
                # Compiled functions ran the components: their calls are run again, as those of modules.
                self._rides_along = self._rides_along and not has_compiled_functions(pl_module)
        left_out = watched and self._batch_ran_nothing(measurement, step)
        begins = watched and not (left_out and measurement.capture.is_first)
        if begins or self._state.is_known:
            if not self._state.is_known:
                self._state.note_modes(pl_module)
            # Now, for averaged weights may be in place for no longer than validation runs; and once more
            # at its end, for buffers that its own passes write, as statistics of batches, are as
            # validated.
            if not self._state.is_known or _is_last_batch(trainer):
                self._state.note_weights(trainer, pl_module)
        if left_out:
            self._recorded.samples.leave_out(measurement)
        if left_out or not watched:
            return
        self._before = _Recorded()
        with plain_numerics(pl_module):
            if self._rides_along:
                measurement.end_pass()
                return
            assert step is not None
            assert recording is not None
            if recording.reason is not None or not step.calls:
                self._refuse_compiled()
            measurement.replay(pl_module, [step], self._as_watched(trainer))

    def _refuse_compiled(self) -> NoReturn:
        """Say what is wrong where compiled parts cannot be measured."""
        reason = ((calls := self._recorded.calls) and calls.reason) or "none was seen"
        if following_stops_compiler():
            raise RuntimeError(
                "torch up to 2.8 does not run what it compiled where data is followed, so calls are run "
                f"again, which is not possible: {reason}. Update torch, or do not use torch.compile"
            )
        raise RuntimeError(
            f"compiled parts take no hooks, and their calls cannot be run again eagerly: {reason}"
        )

    def _batch_ran_nothing(self, measurement: Measurement, step: Step | None) -> bool:
        """Check whether a batch ended in which no component ran, and nothing went wrong."""
        if self._rides_along:
            return not measurement.capture.ran and not measurement.capture.failed
        # What could not be recorded shows at the end of the epoch where nothing was.
        recording = self._recorded.calls
        known = recording is not None and (recording.reason is None or not recording.steps)
        return known and step is not None and not step.calls

    @never_in_the_way
    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Compute the report and log it, or find that validation runs no component."""
        if self._measurement is None and not self.sync_pending:
            return
        with self._heard_by_others():
            if trainer.state.fn == "fit":
                # All processes measure the effects of the last report, or none; others have none there.
                differs = self._state.differs if self._final else self._state.differs_here
                self._elsewhere = differs(trainer, pl_module)
            if self._elsewhere:
                # Averaged weights were taken out again; when training ends they may be the final ones.
                self._final = False
            if not self._nothing_ran:
                self._check_replay(trainer, pl_module)
        measurement = self._measurement
        # Alike in all processes.
        if self._finish(trainer, pl_module, step=logged_step(trainer, self._checkpoint_step)):
            return
        if not self._rides_along:
            self._refuse_compiled()
        if trainer.state.fn != "fit":
            assert measurement is not None
            measurement.end_pass()  # which says so
        self._recorded = self._before
        # What was watched before is run again when training ends.
        if self._watched is None:
            self._watch_training("validation runs no component")
        else:
            self._warn_once(
                "validation ran no component in one epoch, which has no Koopman credit; later ones have "
                "(shown once)"
            )

    @property
    def _nothing_ran(self) -> bool:
        """Whether batches were watched, and no component ran in any of them."""
        if self._measurement is None or not self._recorded.samples.left_out:
            return False
        return self._measurement.capture.is_first

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """See that every key of ours exists, whatever was due, and became of it."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._keep_keys(trainer)

    @never_in_the_way
    def _keep_keys(self, trainer: Any) -> None:
        # Asked for once: Lightning computes all of its numbers each time.
        known = trainer.callback_metrics
        for key, value in self._newest.items():
            known.setdefault(key, value)
        for key in monitored_keys(trainer, self.prefix):
            known.setdefault(key, torch.tensor(0.0, device="cpu"))

    @never_in_the_way
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record the calls of an epoch's first steps where no validation was watched yet."""
        if batch_idx == 0:
            self._due_epoch = self._is_due(trainer, steps_ahead(trainer))
        if self.history and not self._why_training:
            return
        if batch_idx == 0 and self._due_epoch:
            parts = named_components(pl_module, self.components)
            if self.components is None:
                parts |= norms_beside(pl_module, parts)
            # A training step is followed only where it makes several calls, which the first one shows.
            follow_from = None if is_compiled(pl_module) else 1
            calls = Recording(pl_module, parts, follow_from=follow_from, ordered=False)
            self._recorded = replace(self._recorded, calls=calls, of_training=True)
            self._n_recorded = 0
        wanted = samples_for_rank(self.max_samples, data_part(trainer).count)
        recording = self._recorded.calls
        if recording is not None and not recording.full and self._n_recorded < wanted:
            self._record(batch)

    def _record(self, batch: Any) -> None:
        """Record the calls of the step that begins, and its targets."""
        self._in_hooks = seconds_in_hooks()
        if (calls := self._recorded.calls) is not None:
            calls.__enter__()
            calls.keep(parts_in(batch), valid_positions(batch))

    @never_in_the_way
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Stop recording before a backward pass computes activations again."""
        self._end_training_step()

    @never_in_the_way
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop recording where no backward pass did."""
        self._end_training_step()

    def _end_training_step(self) -> None:
        calls = self._recorded.calls
        if calls is not None and calls.recording:
            self._n_recorded += calls.end_step(lone=False).n_samples
            self.budget.add(seconds_in_hooks() - self._in_hooks)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure on the recorded training steps where there is no validation to watch."""
        self._end_epoch(trainer, pl_module)
        if self._why_training:
            self._keep_keys(trainer)

    @never_in_the_way
    def _end_epoch(self, trainer: Any, pl_module: Any) -> None:
        calls = self._recorded.calls
        if not (self._due_epoch and self._why_training) or calls is None:
            return
        if calls.steps or trainer.world_size > 1:
            loader = first_loader(trainer.train_dataloader)
            self._replay(trainer, pl_module, loader, final=may_be_last(trainer))

    @never_in_the_way
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """See that the newest report is about the final weights and has errors, and draw it."""
        if trainer.global_step == 0:
            return
        recorded = self._recorded.calls is not None
        known = self._measured_at == trainer.global_step or not recorded
        changed = known and recorded and self._state.differs(trainer, pl_module)
        self._open = bool(may_change_weights(trainer, pl_module, self))
        # What runs behind this may change them again, so these are not measured.
        self._elsewhere = changed and self._open
        if known and (self._open or not changed):
            self._complete(trainer, pl_module)
        else:
            training = self._recorded.of_training
            if training and not self._why_training:
                self._watch_training("no validation was watched")
            loader = trainer.train_dataloader if training else trainer.val_dataloaders
            self._replay(trainer, pl_module, first_loader(loader), final=True, changed=changed)
        if self._logged_at is not None and trainer.is_global_zero:
            with self.budget.apart("draw"):
                self._writer.finish(trainer.loggers, self.history, self._logged_at, self.drifts)
        release_memory()

    @never_in_the_way
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so where the final weights are not those that the newest report is about."""
        if not (self._open and self._measured_at == trainer.global_step and self.history):
            return
        if self._state.differs_here(trainer, pl_module):
            others = ", ".join(may_change_weights(trainer, pl_module, self))
            warning = (
                "weights were changed after the last Koopman credit, which is not about the final ones; "
                f"list the monitor behind what changes them ({others}), or take credit_report of these"
            )
            self.history[-1] = replace(self.history[-1], notes=(*self.history[-1].notes, warning))
            self._warn_once(warning)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the hooks off whatever happened, and let go of the model and of recorded calls."""
        # It may be about a disk that is full, or memory that lacks, and nothing may take its place.
        with suppress(Exception):
            self._forget_run()
        with suppress(Exception):
            self._writer.close(trainer.loggers)

    @never_in_the_way
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the model and of recorded calls, and close files, whatever became of the rest."""
        try:
            self._forget_run()
        finally:
            self._writer.close(trainer.loggers)

    def _forget_run(self) -> None:
        self._forget()
        self._start_run()

    @property
    def _wants_more(self) -> bool:
        """Whether a measurement is under way that has not seen its samples yet."""
        return self._measurement is not None and self._measurement.n_seen < self._recorded.samples.most

    def _begin(
        self,
        trainer: Any,
        pl_module: Any,
        loader: Any,
        like: Measurement | None = None,
        *,
        final: bool = False,
    ) -> None:
        """Start measuring this process's share of the samples that a loader gives."""
        self.sync_pending = trainer.world_size > 1
        self._final = final or trainer.state.fn != "fit"
        self._rides_along = not (is_compiled(pl_module) or following_stops_compiler())
        known = None if like is None else self._recorded.samples
        samples = WatchedSamples.of(trainer, loader, self.max_samples, like=known)
        self._recorded.samples = samples
        self._state.forget_weights()
        self._elsewhere = False
        with plain_numerics(pl_module):
            self._measurement = Measurement(
                pl_module,
                self.components,
                self.options,
                max_samples=samples.counted,
                shared=self.sync_pending,
                hold=HELD_BYTES,
                like=like,
                trained=trained_parameters(trainer, pl_module),
            )
            if data_part(trainer).count > 1 and not is_dealt_out(loader):
                self._measurement.notes.append(
                    "no DistributedSampler deals samples out to the processes: those that several of "
                    "them are given count several times, and standard errors are too small then"
                )
            # The last report is about the coordinates of its own weights.
            if self.drift and self._watched is not None and not self._final:
                self._measurement.earlier = self._watched.lasting_basis

    def _check_replay(self, trainer: Any, pl_module: Any) -> None:
        """Find out, while the weights are those of validation, whether its calls can be run again."""
        recording = self._recorded.calls
        if self._checked or self._elsewhere or recording is None:
            return
        self._checked = True
        try:
            refuse_sharded_weights(trainer)
        except RuntimeError as why:
            self._differs = str(why)
            return
        with plain_numerics(pl_module), undisturbed(pl_module), self._as_watched(trainer)():
            self._state.put_back_buffers()
            start = self.budget.clock()
            self._differs = recording.differs()
            count = sum(step.n_samples for step in recording.steps[:1])
            self._effects.seconds_a_sample = (self.budget.clock() - start) / max(1, count)

    def _as_watched(self, trainer: Any) -> Callable[[], AbstractContextManager[None]]:
        """Return what stands around recorded calls of a model that is put back behind them."""
        return self._state.around(trainer, modes=not self._recorded.of_training)

    def _replay(
        self, trainer: Any, pl_module: Any, loader: Any, *, final: bool, changed: bool = False
    ) -> None:
        """Measure once more, by running recorded calls again; no guess where they cannot be."""
        recording = self._recorded.calls
        like, reason = None if self._recorded.of_training else self._watched, self._no_replay
        if reason is not None and trainer.world_size == 1 and self.history:
            self._complete(trainer, pl_module)
            self._keep_watched(trainer, reason)
            return
        refuse_sharded_weights(trainer)
        with self._heard_by_others(), plain_numerics(pl_module):
            self._begin(trainer, pl_module, loader, like, final=final)
            assert self._measurement is not None
            self._state.note_weights(trainer, pl_module)
            if changed:
                self._measurement.notes.append(
                    "weights or batch statistics were changed after the last measurement, as by pruning "
                    "or averaging: this is about what they are now, on the same samples"
                )
            if recording is not None and recording.full:
                self._measurement.notes.append(
                    f"only the calls of {len(recording.steps)} steps were kept to be run again, within "
                    f"{BYTES_KEPT // 2**20} MiB"
                )
            if reason is not None:
                raise RuntimeError(f"the recorded calls cannot be run again: {reason}")
            # A process that never got a batch only waits for the others.
            steps = () if recording is None else recording.steps
            wanted = itertools.takewhile(lambda _: self._wants_more, steps)
            self._measurement.replay(pl_module, wanted, self._as_watched(trainer))
        # Lightning has counted the last batch already, but logs what belongs to it under its index.
        step = max(0, logged_step(trainer, None) - 1)
        self._finish(trainer, pl_module, step=step)

    @property
    def _no_replay(self) -> str | None:
        """Why recorded calls cannot be run again, if so."""
        if self._elsewhere:
            return "the weights are others than those that were measured"
        differs, calls = None if self._recorded.of_training else self._differs, self._recorded.calls
        return differs if calls is None else calls.reason or differs

    def _complete(self, trainer: Any, pl_module: Any) -> None:
        """Compute what the newest report was made without, errors and effects."""
        if self._watched is None or self._final:
            return
        self._check_replay(trainer, pl_module)
        self._final = True
        report = self._report_on(trainer, pl_module, self._watched, self._measured_at)
        if self.drifts and self.drifts[-1].step == report.step:
            report = replace(report, drift=self.drifts[-1].drift)
        self.history[-1:] = [report]
        scalars, beside = self._show(trainer, report), self._writer.beside(report)
        found = {name: value for name, value in scalars.items() if name in beside}
        if found and trainer.is_global_zero and (step := self._logged_at) is not None:
            for logger in trainer.loggers:
                self._writer.write(logger, found, step)

    def _report_on(
        self,
        trainer: Any,
        pl_module: Any,
        measurement: Measurement,
        step: int | None,
        before: Measurement | None = None,
    ) -> CreditReport:
        """Compute a report with its effects, and the drift since a measurement before."""
        with plain_numerics(pl_module), trainer.profiler.profile("[KoopmanCreditMonitor]report"):
            try:
                # In a training under way, there are errors only where they are asked for.
                errors = self._final if self.options.errors is None else self.options.errors
                report = measurement.report(step=step, errors=errors)
                if self.drift and before is not None and self.history:
                    drift = drift_from(before, measurement, since=self.history[-1].step, step=step)
                    if drift is not None:
                        self.drifts.append(drift)
                        report = replace(report, drift=drift.drift)
            except Exception:
                # The others wait for the effects of this process.
                self._with_effects(trainer, pl_module, None)
                raise
            return self._with_effects(trainer, pl_module, report) or report

    def _with_effects(
        self, trainer: Any, pl_module: Any, report: CreditReport | None
    ) -> CreditReport | None:
        """Measure effects on the recorded steps; every process must call this."""
        calls = self._recorded.calls
        known = [] if calls is None else calls.steps
        steps = self._no_replay or known or "no call was recorded"
        return self._effects.of_report(
            trainer, pl_module, report, steps, self._as_watched(trainer), final=self._final
        )

    def _keep_watched(self, trainer: Any, reason: str) -> None:
        """Let the watched report stand, and say which weights it is about."""
        report = self.history[-1]
        note = (
            f"about the weights that were validated at step {report.step}, not the final ones of step "
            f"{trainer.global_step}, for what was watched cannot be run again: {reason}"
        )
        self.history[-1] = replace(report, notes=(*report.notes, note))
        self._warn_once(f"the newest Koopman credit is {note}")

    def _merged(self, pl_module: Any) -> Measurement | None:
        """End the measurement, over the samples of all processes; every one of them must call this.

        There is none where batches came and no component ran in any.
        """
        measurement, failure, sync_pending = self._measurement, self._failure, self.sync_pending
        nothing_ran = self._nothing_ran
        self._forget()
        if sync_pending:
            try:
                merge_processes(measurement, pl_module.device, failure)
                nothing_ran = False
            except NoSamplesError:
                # All processes come here, or none.
                if not any(gather(nothing_ran)):
                    raise
                nothing_ran = True
        assert measurement is not None
        return None if nothing_ran else measurement

    @contextmanager
    def _heard_by_others(self) -> Generator[None, None, None]:
        """Keep an error where other processes wait for this one, until they hear of it in the end."""
        try:
            yield
        except Exception as error:
            if not self.sync_pending or came_from_signal(error):
                raise
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Take the hooks off and remember an error that the other processes must hear of."""
        self._give_up()
        self._failure = error

    def _forget(self) -> None:
        """Give up the measurement under way, hooks first."""
        self._give_up()
        self.sync_pending, self._failure = False, None

    def _give_up(self) -> None:
        self._in_batch = False
        try:
            if self._recorded.calls is not None:
                self._recorded.calls.close()
        finally:
            if self._measurement is not None:
                self._measurement.capture.remove()
                self._measurement = None

    def _is_due(self, trainer: Any, ahead: int = 0) -> bool:
        """Check whether something is measured now: always the first and the last time."""
        if self.every_n_epochs is None:
            due = trainer.global_step + ahead >= self.budget.due
        else:
            due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        # Whatever became of its report, all processes know that something was added up.
        first = not self.history and self._watched is None
        # Asked before an epoch, or at one of its validations.
        last = may_be_last(trainer) if ahead else may_validate_last(trainer)
        return due or first or last

    def _finish(self, trainer: Any, pl_module: Any, *, step: int) -> bool:
        """Report what was measured; check whether any component ran."""
        validating = trainer.state.fn != "fit"
        weights_step = self._checkpoint_step if validating else None
        with plain_numerics(pl_module), trainer.profiler.profile("[KoopmanCreditMonitor]report"):
            before, measurement = self._watched, self._merged(pl_module)
            if measurement is None:
                return False
            self._watched = measurement
            self._note_samples(trainer, measurement)
        # An error from here on may be this process's own: it must not measure again alone.
        self._measured_at = trainer.global_step
        try:
            weights_of = trainer.global_step if weights_step is None else weights_step
            report = self._report_on(trainer, pl_module, measurement, weights_of, before)
            del before  # let go of, its memory can be handed back below
            if self.history:
                # A three-day training must not pile up operators; the numbers stay.
                self.history[-1] = replace(self.history[-1], operators={}, reference=None)
            self.history.append(report)
            self._logged_at = step
            with trainer.profiler.profile("[KoopmanCreditMonitor]log"):
                self._log(trainer, report, step)
        finally:
            # Not each time: what the training runs on is handed back too, and must be fetched again.
            if (number := len(self.history)) & (number - 1) == 0:
                release_memory()
            if not validating:
                self._plan(trainer, pl_module)
        return True

    def _note_samples(self, trainer: Any, measurement: Measurement) -> None:
        """Say what a reader must know of the samples that were measured."""
        if self._recorded.of_training:
            measurement.notes.append(
                f"{self._why_training}, so this is about samples of training steps, whose calls were "
                "run once more in eval mode"
            )
            if (calls := self._recorded.calls) is not None and calls.n_lone:
                measurement.notes.append(
                    "calls of training steps on one sample were left out beside those on more, for they "
                    "act, draw or show something"
                )
        elif (samples := self._recorded.samples).others:
            number, count = (samples.loader or 0) + 1, len(trainer.num_val_batches)
            measurement.notes.append(
                f"measured on validation loader {number} of {count} alone; what runs on others only "
                "counts as never run"
            )

    def _plan(self, trainer: Any, pl_module: Any) -> None:
        """Find when the next measurement is due, alike in all processes."""
        if self.every_n_epochs is None:
            self.budget.plan(trainer.global_step, last_step(trainer))
            if trainer.world_size > 1:
                self.budget.due = agree_on_latest(self.budget.due, pl_module.device)

    def _log(self, trainer: Any, report: CreditReport, step: int) -> None:
        loggers = trainer.loggers if trainer.is_global_zero else []
        try:
            room = self._writer.draws_next and self.budget.has_room("draw")
            with self.budget.apart("draw") if room else nullcontext():
                self._writer.draw(loggers, self.history, step, self.drifts, figures=room)
        finally:
            scalars = self._show(trainer, report)
            # A logger that fails keeps no other from its numbers.
            with ExitStack() as stack:
                for logger in reversed(loggers):
                    stack.callback(self._writer.write, logger, scalars, step)

    def _show(self, trainer: Any, report: CreditReport) -> dict[str, float]:
        """Put all numbers of a report where callbacks look for them, and return those for loggers."""
        share = self.budget.overhead if trainer.state.fn == "fit" else None
        drift = self.drifts[-1] if self.drifts and self.drifts[-1].step == report.step else None
        scalars = self._writer.scalars(report, share, drift)
        every = {**report.to_scalars(self.prefix), **self._writer.beside(report, drift), **scalars}
        self._newest |= {name: torch.tensor(number, device="cpu") for name, number in every.items()}
        trainer.callback_metrics.update(self._newest)
        return scalars
