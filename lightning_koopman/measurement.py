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
from lightning_koopman.report import CreditReport
from lightning_koopman.states import StateReducer, has_channels_first, pool

ForwardFn = Callable[[nn.Module, Any], Any]


class Measurement:
    """One report in the making: captured states in, moments kept, a report out.

    Args:
        model: The module to watch.
        components: Names or patterns, as in :func:`lightning_koopman.components.named_components`.
        max_dim: Largest state vector kept.
        seed: Chooses the folds.
        options: Passed on to :class:`KoopmanCredit`.

    Attributes:
        capture: The hooks; enter it around a forward pass, then call :meth:`end_pass`.
        n_samples: Samples taken so far.
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
        self.n_samples = 0
        self.seconds = 0.0
        self._reducer = StateReducer(max_dim, seed=seed)
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
        self.n_samples += next(iter(states.values())).shape[0]
        self._take(self._reducer.push(states))

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
