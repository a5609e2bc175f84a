"""Models, checkpoints and data through the whole chain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.capture import INPUT, Capture, undisturbed
from lightning_koopman.chain import Normalize
from lightning_koopman.credit import check_options
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
            return pool(tensor, max_dim, channels_first=has_channels_first(tensor, module))

        check_options(**{k: v for k, v in options.items() if k not in ("targets", "quantities")})
        self.capture = Capture(model, components, keep=keep)
        self.n_samples = 0
        self._reducer = StateReducer(max_dim, seed=seed)
        self._options = options | {"seed": seed}
        self._metric: KoopmanCredit | None = None
        self._silent: list[str] = []

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
        kept = self._reducer.kept_variance[1:]
        return self._metric.report(variance_kept=kept, notes=notes, step=step)

    def _take(self, ready: Iterator[Any]) -> None:
        for snapshots in ready:
            if self._metric is None:
                self._metric = KoopmanCredit(
                    self._reducer.names[1:],
                    dims=self._reducer.dims,
                    center=self._reducer.center,
                    **self._options,
                ).to(snapshots.keys.device)
            self._metric.update(snapshots.states, snapshots.keys)


def credit_report(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    components: str | Sequence[str] | None = None,
    forward_fn: ForwardFn | None = None,
    rank: int | None = None,
    tikhonov: float | None = None,
    max_dim: int = 256,
    folds: int = 5,
    normalize: Normalize = "none",
    delay: int = 1,
    targets: Sequence[int] | None = None,
    seed: int = 0,
    step: int | None = None,
) -> CreditReport:
    """Measure the Koopman credit of every component of a model.

    The model runs once over the batches, in eval mode and without gradients, and is left exactly as it
    was found. Memory does not grow with the number of samples.

    Args:
        model: Any module; Lightning is not needed.
        batches: Iterable of tensors, of tuples whose first entry is the input, or of mappings of keyword
            arguments; a ``DataLoader`` is one.
        components: Names or glob patterns of ``model.named_modules()``; ``None`` chooses.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.
        rank: Most output directions to align; ``None`` takes all that reach back to the input.
        tikhonov: Ridge weight in units of the regressors' mean variance; ``None`` picks one a
            component by held-out R².
        max_dim: States wider than this are pooled and projected on their leading POD directions.
        folds: Number of folds for held-out R² and error bars.
        normalize: Coordinates of every state: as they are (``"none"``), each unit over its standard
            deviation (``"rms"``) or whitened (``"whiten"``).
        delay: Step delay: how many earlier states each operator sees.
        targets: Output units of interest; ``None`` takes the leading POD directions of the output.
        seed: Chooses the folds.
        step: Training step the weights belong to, for the report.

    Returns:
        The report.

    Raises:
        ValueError: If no sample arrives, no component runs, a state is not finite or changes its shape,
            or an argument is out of range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> report = credit_report(net, torch.randn(500, 4).split(100))
        >>> report.components
        ('0', '2')
        >>> bool(abs(report.gain.sum() - report.total) < 1e-9)
        True

    References:
        Liang et al. (2022), arXiv 2212.00998.
    """
    measurement = Measurement(
        model,
        components,
        max_dim=max_dim,
        seed=seed,
        rank=rank,
        tikhonov=tikhonov,
        folds=folds,
        normalize=normalize,
        delay=delay,
        targets=targets,
    )
    run = default_forward if forward_fn is None else forward_fn
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with undisturbed(model), measurement.capture:
        for batch in batches:
            measurement.capture.start_pass()
            run(model, to_device(batch, device))
            measurement.end_pass()
    return measurement.report(step=step)


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
