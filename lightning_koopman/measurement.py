"""One report in the making: captured passes in, a report out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.capture import INPUT, Capture, undisturbed
from lightning_koopman.metric import KoopmanCredit
from lightning_koopman.moments import recentred
from lightning_koopman.processes import Share, agree_on_basis, agreed, exchange, sum_moments
from lightning_koopman.report import CreditReport
from lightning_koopman.states import StateReducer, has_channels_first, pool

ForwardFn = Callable[[nn.Module, Any], Any]


class Measurement:
    """One report in the making: captured states in, moments kept, a report out.

    Args:
        model: The module to watch.
        components: Names or patterns, as in :func:`lightning_koopman.components.named_components`.
        max_dim: Largest state vector kept.
        max_samples: Most samples taken; ``None`` takes all that arrive.
        hold: Whether processes share the samples, so that :meth:`merge_processes` follows.
        seed: Chooses the folds.
        options: Passed on to :class:`KoopmanCredit`.

    Attributes:
        capture: The hooks; enter it around a forward pass, then call :meth:`end_pass`.
        n_seen: Samples that arrived so far.
        n_samples: Samples taken so far, at most ``max_samples``.
        seconds: Time spent so far on everything but the forward passes themselves.

    Raises:
        ValueError: If the components cannot be chosen or an option is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        components: str | Sequence[str] | None = None,
        *,
        max_dim: int = 256,
        max_samples: int | None = None,
        hold: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        def keep(tensor: Tensor, module: nn.Module) -> Tensor:
            start = time.perf_counter()
            rows = pool(tensor, max_dim, channels_first=has_channels_first(tensor, module))
            self.seconds += time.perf_counter() - start
            return rows

        # Made and thrown away: its checks belong before the first batch, not behind the last.
        KoopmanCredit(seed=seed, **options)
        self.capture = Capture(model, components, keep=keep)
        self.n_seen = self.n_samples = 0
        self.seconds = 0.0
        self._max_samples = max_samples
        self._reducer = StateReducer(max_dim, seed=seed, hold=hold)
        self._options = options | {"seed": seed}
        self._metric: KoopmanCredit | None = None
        self._silent: list[str] = []

    def run(self, model: nn.Module, batches: Iterable[Any], forward_fn: ForwardFn | None = None) -> None:
        """Send batches through a model that is left exactly as it was found.

        Args:
            model: The module, on its device.
            batches: What ``forward_fn`` takes.
            forward_fn: Called as ``forward_fn(model, batch)``; ``None`` is :func:`default_forward`.

        Raises:
            ValueError: As :meth:`end_pass` does.
        """
        forward = default_forward if forward_fn is None else forward_fn
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        with undisturbed(model), self.capture:
            for batch in batches:
                self.capture.start_pass()
                forward(model, to_device(batch, device))
                self.end_pass()

    def end_pass(self) -> None:
        """Take what the capture recorded in the pass that just ended.

        Raises:
            ValueError: If no component ran, or the states do not fit those before.
        """
        silent = self.capture.silent
        states = self.capture.end_pass()
        if len(states) < 2:
            raise ValueError(
                f"no component ran in the forward pass; chosen were {list(self.capture.components)}. "
                "Check forward_fn, or name modules that the pass calls with components=[...]."
            )
        self._silent = silent
        arrived = next(iter(states.values())).shape[0]
        most = arrived if self._max_samples is None else max(0, self._max_samples - self.n_samples)
        self._take(self._reducer.push(states, most))
        self.n_seen += arrived
        self.n_samples += min(arrived, most)

    def share(self) -> Share:
        """Tell what the other processes must know of this one's samples.

        Returns:
            The share; its tensors are on the CPU.
        """
        if not self._reducer.waits:
            self._take(self._reducer.flush())
        center = tuple(offset.cpu() for offset in self._reducer.center)
        return Share(self._reducer.names, self._reducer.widths, self.n_samples, center)

    def merge(self, shares: Sequence[Share], device: torch.device) -> None:
        """Add up the samples of all processes; collectives that each of them must join.

        Args:
            shares: The shares of all ranks, of which one at least holds samples.
            device: Where the sum is made.

        Raises:
            Exception: What went wrong here, once the other processes know of it.
        """
        common, reducer, error = agreed(shares), self._reducer, None
        own = tuple(offset.cpu() for offset in reducer.center)
        reducer.expect(common.names, common.widths)
        if not common.center:
            reducer.fix(agree_on_basis(reducer.first_rows, shares, reducer.max_dim))
            try:
                self._take(reducer.flush())
            except Exception as failure:
                error = failure
        start = time.perf_counter()
        self._sum_up(common.center or tuple(reducer.center), own, device, error)
        self.seconds += time.perf_counter() - start

    def _sum_up(
        self,
        center: tuple[Tensor, ...],
        own: tuple[Tensor, ...],
        device: torch.device,
        error: Exception | None,
    ) -> None:
        """Move this process's moments to the common centre and add all of them up."""
        dims = tuple(offset.shape[0] for offset in center)
        names, options = self._reducer.names[1:], self._options
        whole = KoopmanCredit(names, dims=dims, center=center, **options).to(device)
        assert whole.layout is not None
        moments = whole.moments if self._metric is None else self._metric.moments.to(device)
        if own and self._metric is not None:
            shifts = [(a - b).to(moments) for a, b in zip(own, center, strict=True)]
            moments = recentred(whole.layout, moments, shifts)
        whole.moments = sum_moments(moments, error)
        if not self._reducer.kept_variance:
            self._reducer.kept_variance = (1.0,) * len(dims)
        self._metric = whole

    def report(self, *, step: int | None = None) -> CreditReport:
        """Finish and compute the report.

        Args:
            step: Training step the weights belong to.

        Returns:
            The report.

        Raises:
            ValueError: If fewer than two samples were seen.
        """
        self._take(self._reducer.flush())
        if self._metric is None:
            raise ValueError("no sample arrived: the batches were empty")
        notes = []
        if self._silent:
            notes.append(f"never ran, so left out: {', '.join(map(repr, self._silent))}")
        if self._reducer.names[0] != INPUT:
            notes.append(
                f"{self._reducer.names[0]!r} takes no floating-point input, so its output is x_0 and it "
                "has no credit of its own"
            )
        start = time.perf_counter()
        kept = self._reducer.kept_variance[1:]
        report = self._metric.report(variance_kept=kept, notes=notes, step=step)
        self.seconds += time.perf_counter() - start
        return dataclasses.replace(report, parts=dict(self.capture.parts))

    def _take(self, ready: Iterator[Any]) -> None:
        start = time.perf_counter()
        for snapshots in ready:
            if self._metric is None:
                self._metric = KoopmanCredit(
                    self._reducer.names[1:],
                    dims=self._reducer.dims,
                    center=self._reducer.center,
                    **self._options,
                ).to(snapshots.keys.device)
            self._metric.update(snapshots.states, snapshots.keys)
        self.seconds += time.perf_counter() - start


def merge_processes(
    measurement: Measurement | None, device: torch.device, error: Exception | None = None
) -> None:
    """Let each process's measurement hold the samples of all; collectives.

    Each process must call this once, whatever happened to it.

    Args:
        measurement: This process's measurement; ``None`` where it failed.
        device: Where the collectives run.
        error: What kept this process from taking its samples, if anything did.

    Raises:
        Exception: The error given, once all others know of it.
        ProcessError: If another process failed.
        ValueError: If no process took a sample.
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
        raise ValueError("no sample arrived: the batches were empty in every process")
    assert measurement is not None
    measurement.merge(shares, device)


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch as data loaders commonly give it.

    Args:
        model: Any module.
        batch: A tensor, a tuple or list whose first entry is the input, or a mapping of keyword
            arguments.

    Returns:
        What the model returns.

    Raises:
        ValueError: If the batch is none of these.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list) and batch:
        return default_forward(model, batch[0])
    raise ValueError(
        f"a batch of type {type(batch).__name__} arrived; pass tensors, tuples or mappings, or say how "
        "to run the model with forward_fn=lambda model, batch: ..."
    )


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of a nested batch.

    Args:
        value: Tensor, or tuples, lists and mappings of them; anything else is left alone.
        device: Where to.

    Returns:
        The batch, with its containers' types kept.
    """
    if hasattr(value, "to") and callable(value.to):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: to_device(part, device) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(part, device) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(to_device(part, device) for part in value)
    return value
