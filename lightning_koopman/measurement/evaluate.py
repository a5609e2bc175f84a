"""A model and data through the whole chain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import nn

from lightning_koopman.koopman.options import DEFAULTS, Options, takes_options
from lightning_koopman.measurement.accumulator import MaxSamples
from lightning_koopman.measurement.measurement import FIRST_CHECK, Measurement
from lightning_koopman.network.arguments import INTEGER, check_given
from lightning_koopman.network.components import Components
from lightning_koopman.network.runs.forward import ForwardFn, check_arguments
from lightning_koopman.network.runs.forward_runner import with_weights
from lightning_koopman.network.runs.samples import spread
from lightning_koopman.report.report import CreditReport


@takes_options(excitation="component_effects(…, kinds=['output_noise']) measures what noise does")
def credit_report(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    components: Components | Sequence[Components] | None = None,
    forward_fn: ForwardFn | None = None,
    max_samples: MaxSamples = "enough",
    step: int | None = None,
    options: Options = DEFAULTS,
) -> CreditReport:
    """Measure the Koopman credit of every component of a model.

    The model runs once over the batches, in eval mode and without gradients, and is left exactly as it
    was found. Memory does not grow with the number of samples.

    Data may come sorted, as by class, so samples are taken from everywhere: of a ``DataLoader`` that
    goes through its data in order single samples, of a list or tuple whole batches, in an order of which
    any that come first are spread over all. Whatever else gives batches should give them in random
    order.

    ``"enough"`` stops after 512, 1024 or 2048 samples where the standard errors of all credits are at
    most 0.05 nats and enough for states so wide, and at 4096, or at what states so wide need if that is
    more. Whether to stop earlier is only asked where the passes so far took much longer than to answer,
    so small networks see 4096.

    Args:
        model: Any module; Lightning is not needed.
        batches: Iterable of tensors, of tuples whose first entry is the input, of mappings of keyword
            arguments, or of whatever the model takes whole; a ``DataLoader`` is one.
        components: Names or glob patterns of ``model.named_modules()``, types of modules, of whose
            matches the outermost count, or a depth in the module tree; ``None`` chooses.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.
        max_samples: Most samples to look at; ``"enough"`` as told above, ``None`` all.
        step: Training step the weights belong to, for the report.
        options: How states become rows, and rows become credits.

    Returns:
        The report.

    Raises:
        ValueError: If no sample arrives, no component runs, a state is not finite or changes its shape,
            or an argument is out of range.
        TypeError: If ``components`` holds something else, or ``options`` is no ``Options``.

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
    check_arguments(model, batches, forward_fn)
    check_given(INTEGER, step=step)
    batches = with_weights(model, batches, forward_fn)
    counts = isinstance(max_samples, int | np.integer) and max_samples > 0
    if max_samples not in ("enough", None) and not counts:
        raise ValueError(
            f"max_samples is {max_samples!r}; give a number of 1 or above, 'enough', or None for all"
        )
    batches = spread(batches, FIRST_CHECK if max_samples == "enough" else max_samples)
    measurement = Measurement(model, components, options, max_samples=max_samples)
    measurement.run(model, batches, forward_fn)
    if (varying := measurement.varying) and not isinstance(batches, Iterator):
        # Once more, now that it is known what varies behind the first batch.
        measurement = Measurement(model, components, options, max_samples=max_samples, varying=varying)
        measurement.run(model, batches, forward_fn)
    return measurement.report(step=step)
