"""A model and data through the whole chain."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_koopman.koopman.lifts import Observables
from lightning_koopman.koopman.options import Normalize, Options
from lightning_koopman.measurement.measurement import Measurement
from lightning_koopman.network.components import Components
from lightning_koopman.network.forward_runner import (
    ForwardFn,
    check_arguments,
    default_forward,
    to_device,
)
from lightning_koopman.network.isolation import random_states_kept
from lightning_koopman.network.rows import ReduceOption
from lightning_koopman.report.report import CreditReport


def credit_report(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    components: Components | Sequence[Components] | None = None,
    forward_fn: ForwardFn | None = None,
    rank: int | None = None,
    tikhonov: float | None = None,
    max_dim: int = 256,
    reduce: ReduceOption = "pool",
    output: str | Callable[[Any], Any] | None = None,
    folds: int = 5,
    normalize: Normalize = "none",
    delay: int = 1,
    targets: Sequence[int] | None = None,
    observables: Observables = None,
    seed: int = 0,
    step: int | None = None,
) -> CreditReport:
    """Measure the Koopman credit of every component of a model.

    The model runs once over the batches, in eval mode and without gradients, and is left exactly as it
    was found. Memory does not grow with the number of samples.

    Args:
        model: Any module; Lightning is not needed.
        batches: Iterable of tensors, of tuples whose first entry is the input, of mappings of keyword
            arguments, or of whatever the model takes whole; a ``DataLoader`` is one.
        components: Names or glob patterns of ``model.named_modules()``, types of modules, or a depth in
            the module tree; ``None`` chooses.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.
        rank: Most output directions to align; ``None`` takes all that reach back to the input.
        tikhonov: Ridge weight in units of the regressors' mean variance; ``None`` picks, for
            every component, the largest up to 1e-2 that at most doubles its held-out error.
        max_dim: States wider than this are pooled and projected on their leading POD directions.
        reduce: What becomes of spatial and sequence axes: ``"pool"`` (to a small grid where the state
            is wide), ``"flatten"``, ``"mean"``, ``"last"`` (position that holds data), ``"cls"`` (the
            first position), or a callable from the tensor to one row a sample; or a mapping from glob
            patterns of names to any of these. Padding that the batch marks (``attention_mask``,
            ``lengths``, …) is left out of pools and means.
        output: What the chain ends with: the name of a module, or a callable from what the model
            returns to a tensor; ``None`` takes all that the network returns, several heads side by side.
        folds: Number of folds for held-out R² and error bars.
        normalize: Coordinates of every state: as they are (``"none"``), each unit over its standard
            deviation (``"rms"``) or whitened (``"whiten"``).
        delay: Step delay: how many earlier states each operator sees, beside those that the data flow
            links.
        targets: Output units of interest, not with ``"whiten"``; ``None`` takes the leading POD
            directions of the output.
        observables: Lifts every state but the output into further coordinates, in which an operator can
            follow what is nonlinear (EDMD): ``"polynomial"`` (products of two), ``"rff"`` (``max_dim``
            random Fourier features) or ``"rbf"`` (as many Gaussian bumps), each beside the state
            itself and fixed by the first ``2 * max_dim`` samples; or a callable from rows
            ``(n_samples, d)`` to rows. Credits are then about these coordinates.
        seed: Chooses the folds and the random features.
        step: Training step the weights belong to, for the report.

    Returns:
        The report.

    Raises:
        ValueError: If no sample arrives, no component runs, a state is not finite or changes its shape,
            or an argument is out of range.

    Example:
        >>> import torch
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
    check_arguments(model, batches)
    options = Options(
        max_dim=max_dim,
        reduce=reduce,
        output=output,
        seed=seed,
        rank=rank,
        tikhonov=tikhonov,
        folds=folds,
        normalize=normalize,
        delay=delay,
        targets=targets,
        observables=observables,
    )
    batches = _with_weights(model, batches, forward_fn)
    measurement = Measurement(model, components, options)
    measurement.run(model, batches, forward_fn)
    return measurement.report(step=step)


def _with_weights(
    model: nn.Module, batches: Iterable[Any], forward_fn: ForwardFn | None
) -> Iterable[Any]:
    """Run once over the first batch where lazy modules have no weights yet, so that they get them."""
    if not any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        return batches
    with random_states_kept(batches):
        rest = iter(batches)
        first = list(itertools.islice(rest, 1))
    modes = [(module, module.training) for module in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
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
