"""What the callback must know of a Trainer, its strategy and its loaders."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DistributedSampler


def logged_step(trainer: Any, checkpoint_step: int | None) -> int:
    """Find the x-axis on which Lightning itself logs, or the step of the checkpoint being validated."""
    if trainer.state.fn != "fit" and checkpoint_step is not None:
        return checkpoint_step
    counted = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return int(trainer.global_step if counted is None else counted)


def samples_for_rank(count: int, n_processes: int, rank: int = 0) -> int:
    """Count this process's part of samples that are dealt out in turn."""
    return count // n_processes + (rank < count % n_processes)


@dataclass(frozen=True)
class DataPart:
    """Which samples a process runs on.

    Attributes:
        index: Which part of the samples, counted from 0.
        count: Number of parts.
        counts: Whether they are counted in this process; of several that run on the same, one counts.
    """

    index: int
    count: int
    counts: bool = True


def data_part(trainer: Any) -> DataPart:
    """Find which samples this process runs on."""
    mesh = getattr(trainer.strategy, "device_mesh", None)
    if "tensor_parallel" not in (getattr(mesh, "mesh_dim_names", None) or ()):
        return DataPart(trainer.global_rank, trainer.world_size)
    assert mesh is not None
    parts, copies = mesh["data_parallel"], mesh["tensor_parallel"]
    return DataPart(parts.get_local_rank(), parts.size(), copies.get_local_rank() == 0)


def unrepeated_samples(loader: Any) -> int:
    """Count the samples that a loader gives in this process before a sampler begins to repeat some."""
    sampler = getattr(loader, "sampler", None)
    kind = type(sampler)
    # Subclasses may deal samples out in another way; Lightning's wrapper does not.
    if kind is not DistributedSampler and kind.__name__ != "DistributedSamplerWrapper":
        return sys.maxsize
    assert isinstance(sampler, DistributedSampler)
    return samples_for_rank(len(sampler.dataset), sampler.num_replicas, sampler.rank)  # type: ignore[arg-type]


def validation_batches(trainer: Any) -> float:
    """Count the batches that the first validation loader gives; infinity where nobody knows."""
    fitting = trainer.state.fn == "fit"
    loop = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
    counts: list[float] = loop.max_batches
    # Of loaders that give batches side by side, the shortest or the longest ends the loop.
    one_at_a_time = len(counts) == 1 or (counts and getattr(loop, "_is_sequential", False))
    return counts[0] if one_at_a_time else math.inf


def is_dealt_out(loader: Any) -> bool:
    """Check whether a loader has a sampler that deals samples out to processes."""
    batches = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    return any(hasattr(sampler, "num_replicas") for sampler in samplers)


def may_skip_validation(trainer: Any, pl_module: Any) -> bool:
    """Check whether a process may have no validation batch, for which Lightning calls no hook at all."""
    return trainer.world_size > 1 and any(
        getattr(owner, "allow_zero_length_dataloader_with_multiple_devices", False)
        for owner in (pl_module, trainer.datamodule)
    )


def refuse_sharded_weights(trainer: Any) -> None:
    """Refuse an extra pass where no process holds all weights."""
    names = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if names & {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}:
        raise RuntimeError(
            f"{type(trainer.strategy).__name__} shards the weights, which an extra pass cannot gather. "
            "Koopman credit is measured while validation runs: give the Trainer a validation loop in "
            "every epoch and compile nothing; or evaluate the saved checkpoints in one process"
        )


def trained_parameters(trainer: Any, pl_module: Any) -> frozenset[int] | None:
    """Return the ``id`` of each parameter that an optimizer updates; ``None`` if that is not known."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    found = {id(p) for group in groups for p in group["params"]}
    # Strategies may hand the optimizers tensors of their own.
    return frozenset(found) if any(id(p) in found for p in pl_module.parameters()) else None


_CHANGE_WEIGHTS = {"WeightAveraging", "StochasticWeightAveraging"}


def may_change_weights(trainer: Any, pl_module: Any, callback: Any) -> list[str]:
    """Name what may change weights at the end of a training after a callback had its turn."""
    behind = trainer.callbacks[trainer.callbacks.index(callback) + 1 :]
    found = []
    for owner in (*behind, pl_module):
        definer = next(kind for kind in type(owner).__mro__ if "on_train_end" in vars(kind))
        # Of Lightning's own, these do; what a user wrote may.
        of_user = definer.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")
        own = of_user or "on_train_end" in vars(owner)
        if (own and not isinstance(owner, type(callback))) or definer.__name__ in _CHANGE_WEIGHTS:
            found.append(type(owner).__name__)
    return found


def first_loader(loaders: Any) -> Any:
    """Find the first of several loaders."""
    while isinstance(loaders, dict | list | tuple) and loaders:
        loaders = next(iter(loaders.values() if isinstance(loaders, dict) else loaders))
    return loaders or () if isinstance(loaders, dict | list | tuple | None) else loaders


def may_be_last(trainer: Any) -> bool:
    """Check whether the epoch under way may be the training's last with a validation."""
    every = trainer.check_val_every_n_epoch or 1
    epochs = trainer.max_epochs
    return _stops(trainer, trainer.current_epoch + 1) or (
        epochs not in (None, -1) and trainer.current_epoch + 1 + every > epochs
    )


def may_validate_last(trainer: Any) -> bool:
    """Check whether the validation under way may be the training's last; not where nobody knows."""
    return may_be_last(trainer) and (
        _stops(trainer, trainer.current_epoch) or not _validates_again(trainer)
    )


def _stops(trainer: Any, epochs: int) -> bool:
    """Check whether a training that is asked to end, or took all its steps, ends after some epochs."""
    met = epochs >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    steps = trainer.max_steps
    return (trainer.should_stop and met) or (steps not in (None, -1) and trainer.global_step >= steps)


def _validates_again(trainer: Any) -> bool:
    """Check whether another validation may follow in the epoch under way."""
    loop, every = trainer.fit_loop.epoch_loop, trainer.val_check_batch
    if loop.batch_progress.is_last_batch or every == math.inf:
        return False
    left = trainer.num_training_batches - loop.batch_idx - 1
    if every is None or left == math.inf:  # validated by the clock, or a stream
        return True
    by_epoch = trainer.check_val_every_n_epoch is not None
    done = (loop.batch_idx if by_epoch else loop.total_batch_idx) + 1
    return bool(every - done % every <= left)


def last_step(trainer: Any) -> int | None:
    """Find the training's last step, as far as it is known."""
    known = trainer.estimated_stepping_batches
    return int(known) if 0 < known < math.inf else None


def steps_ahead(trainer: Any) -> int:
    """Return how many steps the epoch that begins will take at most, or 1 where nobody knows."""
    batches = trainer.num_training_batches
    return int(batches) if math.isfinite(batches) else 1


def monitored_keys(trainer: Any, prefix: str) -> set[str]:
    """Collect the keys of ours that a callback or a scheduler monitors."""
    keys = {getattr(callback, "monitor", None) for callback in trainer.callbacks}
    keys |= {getattr(config, "monitor", None) for config in trainer.lr_scheduler_configs}
    return {key for key in keys if isinstance(key, str) and key.startswith(f"{prefix}/")}
