"""Holds a network and data against a reference: which components do something else than they did."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_koopman.koopman.moments import covariances
from lightning_koopman.koopman.options import Options
from lightning_koopman.koopman.reference import FoldFits, Reference, beyond_error, unexplained
from lightning_koopman.measurement.measurement import Measurement
from lightning_koopman.network.arguments import INTEGER, check_given
from lightning_koopman.network.components import clean_modules
from lightning_koopman.network.names import is_sum
from lightning_koopman.network.runs.forward import ForwardFn, check_arguments
from lightning_koopman.network.runs.samples import spread
from lightning_koopman.report.drift import Drift
from lightning_koopman.report.report import CreditReport


def drift(
    reference: CreditReport | str | os.PathLike[str],
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward_fn: ForwardFn | None = None,
    max_samples: int | None = None,
    step: int | None = None,
    options: Options | None = None,
) -> Drift:
    """Find the components that do something else than when a reference was measured.

    Per component, the share of its output's variance that the reference's linear operator leaves
    unexplained is compared with the share that an operator fitted to the new states leaves: 0 where the
    component does what it did. Neither the old weights nor the old samples are needed. The model runs
    once over the batches, in eval mode and without gradients, and is left exactly as it was found.

    Args:
        reference: Report of the network as it was, or a file that its ``save_reference`` wrote.
        model: Network of the same components, whatever its weights.
        batches: Samples, the same as the reference's or others; as in
            :func:`lightning_koopman.credit_report`.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.
        max_samples: Most samples to take; ``None`` takes all.
        step: Training step the weights belong to, for the table.
        options: Those of the reference, needed only where it comes from a file and they hold functions
            (``reduce``, ``output``, ``observables``): a file holds none.

    Returns:
        The drift of every component, with errors and marks.

    Raises:
        ValueError: If the report has no reference, the file is none, components or widths differ, or
            too few samples arrive.

    Example:
        >>> import torch
        >>> import lightning_koopman as lk
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> report = lk.credit_report(net, torch.randn(2000, 6).split(500))
        >>> with torch.no_grad():
        ...     _ = net[2].weight.mul_(-1)
        >>> lk.drift(report, net, torch.randn(2000, 6).split(500)).culprit
        '2'
    """
    check_arguments(model, batches, forward_fn)
    check_given(INTEGER, step=step)
    check_given((Options, "Options, such as Options(max_dim=64)"), options=options)
    if max_samples is not None and not (isinstance(max_samples, int | np.integer) and max_samples > 0):
        raise ValueError(f"max_samples is {max_samples!r}; give a number of 1 or above, or None for all")
    found = _reference_of(reference)
    chosen = _with_functions(found, options)
    if found.named:
        known = dict(clean_modules(model))
        found.check_names([name for name in found.modules if name in known], found.modules)
    measurement = Measurement(
        model, list(found.modules) if found.named else None, chosen, max_samples=max_samples
    )
    measurement.follow(found)
    measurement.run(model, spread(batches, max_samples), forward_fn)
    return drift_since(found, measurement, step=step)


_LITTLE = 0.1
"""Share of the most suspicion that is little."""


def drift_since(reference: Reference, measurement: Measurement, *, step: int | None = None) -> Drift:
    """Compute the drift since a reference from what a measurement has added up, without another pass."""
    found = _of_all_states(reference, measurement, step)
    kept = np.array([not is_sum(name) for name in found.components])
    # A sum has no weights, but may scale what it adds up by some that are in no component. Behind what
    # changed, it may be marked for what it is given.
    if found.changed.any():
        suspicion = np.where(found.changed, found.suspicion, 0.0)
        kept[(suspicion > _LITTLE * suspicion.max()).argmax()] = True
    return _rows(found, kept)


def _rows(drift: Drift, kept: NDArray[np.bool_]) -> Drift:
    """Return some rows of a drift."""
    names = tuple(itertools.compress(drift.components, kept))
    arrays = ("drift", "stderr", "changed", "old", "new")
    taken = {name: getattr(drift, name)[kept] for name in arrays}
    return dataclasses.replace(drift, components=names, **taken)


def _of_all_states(reference: Reference, measurement: Measurement, step: int | None) -> Drift:
    """Compute the drift of components, and of sums of states."""
    layout, moments, center = measurement.moments()
    old = (reference.operators, reference.means, reference.n_samples)
    shares = unexplained(layout, moments, center, *old, measurement.reference().operators)
    value = shares.old - shares.new
    n_samples = int(moments[:, 0].sum())
    given = covariances(layout, moments.sum(dim=0))
    away = reference.means[0].mean(dim=0) - center[0] - given.means[0]
    variance = float(given.variances[0].sum())
    moved = float(away.square().sum()) / variance if variance else 0.0
    before = float(reference.variance)
    widened = variance / before if before else math.nan
    # Chance has means and variances differ so, a few times as much where samples come in groups, as
    # classes.
    by_chance = 4 * (1 / n_samples + 1 / max(1, reference.n_samples))
    told = widened > 0 and abs(math.log(widened)) > 0.1 + 3 * math.sqrt(by_chance)
    return Drift(
        components=reference.states[1:],
        drift=value.numpy(),
        stderr=shares.stderr.numpy(),
        changed=beyond_error(value, shares.stderr, shares.freedom).numpy(),
        old=shares.old.numpy(),
        new=shares.new.numpy(),
        n_samples=n_samples,
        step=step,
        since=reference.step,
        parts=reference.parts,
        enough=measurement.advised,
        moved=math.sqrt(moved) if moved > 0.01 + by_chance else 0.0,
        widened=math.sqrt(widened) if told else 1.0,
        reference_samples=reference.n_samples,
    )


def drift_from(
    before: Measurement, measurement: Measurement, *, since: int | None = None, step: int | None = None
) -> Drift | None:
    """Compute the drift since an earlier measurement of a training, where coordinates are the same.

    It is NaN where a component reads or gives a state that has coordinates of its own by now, and there
    is none where all samples are in one fold.
    """
    layout, moments, _ = measurement.moments()
    basis, earlier = measurement.basis, before.reference(since)
    assert basis is not None
    if int(moments[:, 0].count_nonzero()) < 2:
        return None
    if earlier.states != measurement.chain.names or earlier.parents != layout.parents[1:] or basis.lifts:
        return None
    each = zip(basis.center, earlier.means, basis.vectors, earlier.basis.vectors, strict=True)
    same = [len(center) == mean.shape[1] and _alike(now, was) for center, mean, now, was in each]
    read = layout.parents[1:]
    fits = np.array([same[i] and all(same[p] for p in reads) for i, reads in enumerate(read, start=1)])
    shapes = [(sum(layout.dims[p] for p in reads), layout.dims[i]) for i, reads in enumerate(read, 1)]
    operators = tuple(
        operator if fit else operator.new_zeros(len(operator), *shape)
        for fit, operator, shape in zip(fits, earlier.operators, shapes, strict=True)
    )
    means = tuple(
        mean if fit else mean.new_zeros(len(mean), dim)
        for fit, mean, dim in zip(same, earlier.means, layout.dims, strict=True)
    )
    fitted = FoldFits.known(operators, means, earlier.variance)
    known = dataclasses.replace(earlier, fits=fitted, parts=measurement.parts)
    found = _of_all_states(known, measurement, step)
    found = dataclasses.replace(
        found,
        drift=np.where(fits, found.drift, np.nan),
        stderr=np.where(fits, found.stderr, np.nan),
        changed=found.changed & fits,
        old=np.where(fits, found.old, np.nan),
        moved=found.moved if same[0] else 0.0,
        widened=found.widened if same[0] else 1.0,
    )
    return _rows(found, np.array([not is_sum(name) for name in found.components]))


def _alike(now: Tensor | None, was: Tensor | None) -> bool:
    """Check whether two states have the same POD directions, up to their precision."""
    if now is None or was is None:
        return now is was
    return now.shape == was.shape and torch.equal(now.cpu().float(), was.cpu().float())


def _reference_of(given: CreditReport | str | os.PathLike[str]) -> Reference:
    if isinstance(given, str | os.PathLike):
        from lightning_koopman.report.reference_file import read_reference

        return read_reference(given)
    if not isinstance(given, CreditReport):
        raise ValueError(
            f"reference has type {type(given).__name__}; give a report of credit_report, or a file "
            "that its save_reference wrote"
        )
    if given.reference is None:
        raise ValueError(
            "the report holds no reference, for JSON and measurements without errors have none; give "
            "one that was just measured, or a file that save_reference wrote"
        )
    return given.reference


def _with_functions(reference: Reference, options: Options | None) -> Options:
    """Return the options of the reference, with the functions that a file could not hold."""
    given = {} if options is None else {name: getattr(options, name) for name in reference.functions}
    if missing := [name for name in reference.functions if given.get(name) is None]:
        raise ValueError(
            f"the reference was measured with functions of yours for {missing}, which its file does not "
            "hold; pass the same again with options=Options(...)"
        )
    return dataclasses.replace(reference.options, **given)
