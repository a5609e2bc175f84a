"""Scores what altering a network does to its outputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_koopman.effects.means import MeanAndSpread, chunks, rows_at_once
from lightning_koopman.effects.targets import (
    IGNORED,
    TARGET_KEYS,
    TargetSearch,
    are_among,
    are_classes,
    as_classes,
    class_axis,
    find_target,
)
from lightning_koopman.network.arguments import check_given
from lightning_koopman.network.axes.padding import Valid, valid_outputs, valid_positions
from lightning_koopman.report.effects import Scale


def kl_divergence(original: Tensor, altered: Tensor, axis: int = 1) -> Tensor:
    """KL divergence between the class distributions of two sets of logits.

    Example:
        >>> import torch
        >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])).tolist()
        [0.0]
    """
    return _over_classes(_divergence, axis, original, altered)


def _over_classes(function: Callable[..., Tensor], axis: int, *outputs: Tensor) -> Tensor:
    """Apply a function to rows of classes, a few at once; what comes back has no axis of classes."""
    moved = [each.movedim(axis, -1) for each in outputs]
    rows = [each.reshape(-1, each.shape[-1]) for each in moved]
    parts = zip(*(torch.split(part, rows_at_once(part)) for part in rows), strict=True)
    return torch.cat([function(*part) for part in parts]).view(moved[0].shape[:-1])


def _divergence(original: Tensor, altered: Tensor) -> Tensor:
    p, q = original.double().log_softmax(1), altered.double().log_softmax(1)
    # xlogy-like: a class of probability 0 adds nothing, also where q is -inf.
    return torch.where(p.exp() == 0, 0.0, p.exp() * (p - q)).sum(1)


def _squares(original: Tensor, altered: Tensor) -> Tensor:
    """Sum the squared differences of each sample from another, or from one and the same."""
    original = original.expand_as(altered)
    total = torch.zeros(len(altered), dtype=torch.float64, device=altered.device)
    for place in chunks(altered):
        total[place[0]] += _by_sample((altered[place].double() - original[place].double()).square())
    return total


@dataclass(frozen=True, eq=False)
class Change:
    """How far a network's altered outputs lie from its own. Samples are rows of the outputs.

    Attributes:
        moved: What each sample adds to the change, shape ``(n_samples,)``, float64.
        whole: What each sample adds to that which changes are divided by, the same shape.
        metric: Metric of the altered outputs; NaN where there is none.
        gained: How many more of a sample's classes are right, the same shape; ``None`` where the metric
            is not the accuracy, so that nothing is known of it by sample.
        classes: How many classes each sample has, the same shape; one, unless it has positions.
        batch: The number of each sample's batch, the same shape; ``None`` where all are independent.
    """

    moved: Tensor
    whole: Tensor
    metric: float
    gained: Tensor | None = None
    classes: Tensor | None = None
    batch: Tensor | None = None

    @property
    def effect(self) -> float:
        """The change of the outputs: a mean over samples, or a share of their variance."""
        return float(self.moved.sum() / self.whole.sum())

    def by_group(self, shifted: Change, shift: float, groups: Tensor) -> Change:
        """Return the changes of groups of samples as if each had used its own mean, not that of all.

        ``shifted`` is the change where the mean was moved by a share ``shift`` of the way to that of the
        group, along which the outputs are taken to follow a line. How much groups differ is the error of
        the effect and of the mean at once, for to first order both are means over groups.
        """
        moved = self.moved + (shifted.moved - self.moved) / shift
        zeros = moved.new_zeros(int(groups.max()) + 1)
        whole, batch = zeros.index_add(0, groups, self.whole), None
        if self.batch is not None:
            # A group lies within a batch.
            batch = self.batch.new_zeros(len(zeros)).index_copy(0, groups, self.batch)
        return Change(zeros.index_add(0, groups, moved), whole, math.nan, batch=batch)


class Measured(NamedTuple):
    """An alteration's effect and the metric after it, with their standard errors.

    Attributes:
        effect: Mean over draws.
        effect_stderr: Its error.
        metric: Mean over draws; NaN where there is none.
        metric_stderr: Error of its difference from the metric before; NaN where that is no accuracy.
    """

    effect: float
    effect_stderr: float
    metric: float
    metric_stderr: float


def over_draws(draws: Sequence[Change]) -> Measured:
    r"""Average the changes that one alteration made in several draws.

    With t the sum of ``whole``, and r what a sample's ``moved``, averaged over draws, exceeds the effect
    times its ``whole`` by, the variance is :math:`\tfrac{n}{n-1} \sum r^2 / t^2`. Where all samples
    weigh alike, that is the variance of a mean, elsewhere that of a ratio of two sums. Batches whose
    sums of r differ by more than independent samples would have it in 99 of 100 cases, as where data
    come in order, take the place of samples. With several draws, the variance of their mean is added.

    Example:
        >>> moved = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
        >>> found = over_draws([Change(moved, torch.ones_like(moved), float("nan"))])
        >>> found.effect, round(found.effect_stderr, 6) == round(float(moved.std()) / 2, 6)
        (3.0, True)
    """
    whole, batch = draws[0].whole, draws[0].batch
    effect, effect_stderr = _ratio(torch.stack([draw.moved for draw in draws]), whole, batch)
    metric = sum(draw.metric for draw in draws) / len(draws)
    gained = [draw.gained for draw in draws if draw.gained is not None]
    metric_stderr = math.nan
    if gained and draws[0].classes is not None:
        metric_stderr = _ratio(torch.stack(gained), draws[0].classes, batch)[1]
    return Measured(effect, effect_stderr, metric, metric_stderr)


def _ratio(parts: Tensor, whole: Tensor, batch: Tensor | None) -> tuple[float, float]:
    """Sums of parts, shape ``(draws, n_samples)``, over the sum of the whole: mean and error."""
    total, n_samples = whole.sum(), len(whole)
    ratios = parts.sum(dim=1) / total
    value = ratios.mean()
    if n_samples < 2:
        return float(value), math.nan
    variance = _variance(parts.mean(dim=0) - value * whole, batch) / total.square()
    if len(ratios) > 1:
        variance = variance + ratios.var() / len(ratios)
    return float(value), float(variance.sqrt())


def _variance(rest: Tensor, batch: Tensor | None) -> Tensor:
    """Return the variance of a sum over samples, or over batches that differ by more than chance."""
    alone, freedom = _scatter(rest), 0 if batch is None else int(batch.max())
    if batch is None or not freedom:
        return alone
    together = _scatter(rest.new_zeros(freedom + 1).index_add(0, batch, rest))
    # The 99th percentile of chi-square over its degrees of freedom, after Wilson and Hilferty (1931).
    most = (1 - 2 / (9 * freedom) + 2.326 * math.sqrt(2 / (9 * freedom))) ** 3
    return together if bool(together > most * alone) else alone


def _scatter(rest: Tensor) -> Tensor:
    return rest.square().sum() * len(rest) / (len(rest) - 1)


Metric = Callable[[Tensor, Tensor], Any]

PROBABILITIES = (
    "the outputs are class probabilities, so divergences are between these, and what an alteration "
    "makes of one that is not above 0 counts as the smallest number above it"
)
"""What a reader must know where a network ends with a softmax."""


NEXT_TOKENS = (
    "labels are the input_ids, so each position's target is the next one, as causal language models "
    "predict it; of a network that gives the tokens themselves, call them otherwise in the batch than "
    "input_ids, with a forward_fn that hands them over"
)
"""What a reader must know where targets are moved by one position."""


class Outputs:
    """A network's outputs, to set altered ones against.

    Attributes:
        scale: What changes are measured in.
        metric: The metric of these outputs; NaN where there is none.
        has_metric: Whether there is one.
        metric_name: ``"accuracy"``, or ``"metric"`` where another one was given or there is none.
        n_samples: Number of samples.
        notes: What a reader must know of what they are.
    """

    def __init__(
        self,
        outputs: Iterable[Tensor],
        batches: Sequence[Any],
        scale: Scale | None,
        metric: Metric | None = None,
        targets: Sequence[Tensor | None] | None = None,
        notes: tuple[str, ...] = (),
        valid: Sequence[Valid] | None = None,
        search: TargetSearch | None = None,
    ) -> None:
        check_given((Callable, "a function, called as metric(outputs, targets)"), metric=metric)
        all_notes = list(notes)
        self._outputs = tuple(outputs)
        found = [find_target(batch) for batch in batches] if targets is None else targets
        known = tuple(t.cpu() for t in found if t is not None)
        self._targets = known if len(known) == len(found) else None
        if scale not in (None, "kl", "relative"):
            raise ValueError(f"scale is {scale!r}; choose 'kl' or 'relative'")
        if metric is not None and self._targets is None:
            raise ValueError(
                "a metric needs targets; give batches as (input, target) or as mappings with one of the "
                f"keys {TARGET_KEYS}"
            )
        first = self._outputs[0]
        target = None if self._targets is None else as_classes(first, self._targets[0])
        classes = target is not None and are_classes(first, target)
        self.scale: Scale = scale or ("kl" if classes else "relative")
        if self.scale == "kl" and not classes and first.ndim > 2:
            raise ValueError(
                f"outputs of shape {tuple(first.shape)} arrived with no class indices to tell their "
                "class axis; give targets, or choose scale='relative'"
            )
        self._axis = class_axis(first, target)
        if self.scale == "kl" and first.ndim > 1 and first.shape[self._axis] == 1:
            raise ValueError(
                f"outputs of shape {tuple(first.shape)} arrived, whose classes are one; choose "
                "scale='relative', or let forward_fn return one output per class"
            )
        self._metric = metric
        placed: list[Tensor | None] = [None] * len(batches)
        if classes and self._targets is not None:
            pairs = zip(self._outputs, self._targets, strict=True)
            placed = [as_classes(output, target) for output, target in pairs]
        # By batch, which positions hold data; nothing where that is not known.
        valid = list(map(valid_positions, batches)) if valid is None else valid
        axis = self._axis if classes or self.scale == "kl" else None
        self._valid = valid_outputs(valid, self._outputs, placed, axis)
        # By batch, which positions have a target; nothing where each sample is one.
        self._counts: tuple[Tensor, ...] | None = None
        if classes:
            marked = [
                (batch, _marked(target, held, self._axis))
                for batch, target, held in zip(batches, placed, self._valid, strict=True)
                if target is not None
            ]
            search = search or TargetSearch()
            moved = tuple(search.where_predicted(batch, target) for batch, target in marked)
            are_moved = any(m is not target for m, (_, target) in zip(moved, marked, strict=True))
            if are_moved and search.guesses:
                all_notes.append(NEXT_TOKENS)
            counts = tuple(are_among(target, first.shape[self._axis]) for target in moved)
            if first.ndim > 2 and any(bool(c.any()) for c in counts):
                self._counts = counts
            if metric is None:
                self._targets = moved
        self._check_finite()
        self._are_probabilities = self.scale == "kl" and self._sum_to_one()
        if self._are_probabilities:
            all_notes.append(PROBABILITIES)
        self.notes = tuple(all_notes)
        self.has_metric = classes or metric is not None
        sizes = [*map(len, self._outputs)]
        self.n_samples = sum(sizes)
        number, count = torch.arange(len(sizes), device="cpu"), torch.tensor(sizes, device="cpu")
        self._batches = number.repeat_interleave(count)
        # Of the accuracy, what each sample adds to it: its right classes, and all its classes.
        self._right = self._classes = None
        self.metric, self.metric_name = math.nan, "metric"
        if classes and metric is None and self._targets is not None:
            self.metric_name = "accuracy"
            # Counted by sample, for batches of sequences may differ in length.
            self._right = torch.cat([self._right_of(k, o) for k, o in enumerate(self._outputs)])
            size = first.shape[self._axis]
            self._classes = torch.cat([_by_sample(are_among(t, size)) for t in self._targets])
            self.metric = float(self._right.sum() / self._classes.sum())
        elif self.has_metric:
            self.metric = self._metric_of(self._outputs)

    def compare(self, altered: Iterable[Tensor]) -> Change:
        """Measure how far altered outputs lie from these, batch by batch; only a metric keeps them."""
        moved: list[Tensor] = []
        right: list[Tensor] = []
        kept: list[Tensor] = []
        others = iter(altered)
        for batch, own in enumerate(self._outputs):
            other = next(others)
            if own.shape != other.shape:
                raise ValueError(
                    f"altered, the network gives outputs of shape {tuple(other.shape)}, otherwise of "
                    f"{tuple(own.shape)}, which do not compare; return others from forward_fn"
                )
            if self.scale == "kl":
                own = self._logits(own.to(other.device))
                divergence = kl_divergence(own, self._logits(other), self._axis).cpu()
                moved.append(_by_sample(self._counted(batch, divergence)))
            else:
                own = self._filled(batch, own.to(other.device))
                moved.append(_squares(own, self._filled(batch, other)).cpu())
            if self._right is not None:
                right.append(self._right_of(batch, other.cpu()))
            elif self.has_metric:
                kept.append(other.cpu())
            del other  # not while the next one is made
        change, gained, metric = torch.cat(moved), None, math.nan
        if self._right is not None and self._classes is not None:
            gained = torch.cat(right)
            metric, gained = float(gained.sum() / self._classes.sum()), gained - self._right
        elif kept:
            metric = self._metric_of(kept)
        return Change(change, self.shares, metric, gained, self._classes, self._batches)

    @functools.cached_property
    def shares(self) -> Tensor:
        """What each sample adds to what summed changes are divided by, float64."""
        if self.scale == "kl":
            return torch.cat([
                _by_sample(self._counted(k, torch.ones_like(a.select(self._axis, 0))))
                for k, a in enumerate(self._outputs)
            ])
        mean = _mean([self._filled(k, a) for k, a in enumerate(self._outputs)])
        shares = torch.cat([_squares(mean, self._filled(k, a)) for k, a in enumerate(self._outputs)])
        if not shares.any():
            raise ValueError("the outputs are constant, so no change is relative to anything")
        return shares

    def _counted(self, batch: int, values: Tensor) -> Tensor:
        """Put 0 where a position has no target; ``values`` are without the axis of classes."""
        # A product would make NaN of an infinity that does not count.
        return values if self._counts is None else torch.where(self._counts[batch], values, 0.0)

    @functools.cached_property
    def _middle(self) -> Tensor:
        """Mean of each unit over what holds data; where sizes vary, over positions as well."""
        marked = next(where for where in self._valid if where is not None)
        alike = len({output.shape[1:] for output in self._outputs}) == 1
        over = [axis for axis, size in enumerate(marked.shape) if axis == 0 or (size > 1 and not alike)]
        count, total = torch.zeros((), device="cpu"), torch.zeros((), dtype=torch.float64, device="cpu")
        for output, where in zip(self._outputs, self._valid, strict=True):
            where = torch.ones_like(output, dtype=torch.bool) if where is None else where
            count = count + where.expand_as(output).sum(dim=over, keepdim=True)
            total = total + torch.where(where, output.double(), 0).sum(dim=over, keepdim=True)
        return total / count.clamp_min(1)

    def _filled(self, batch: int, output: Tensor) -> Tensor:
        """Put the mean where a position holds no data, so that nothing there counts."""
        if (where := self._valid[batch]) is None:
            return output
        return torch.where(where.to(output.device), output, self._middle.to(output))

    def _check_finite(self) -> None:
        """Refuse outputs that no others compare with; a logit of minus infinity rules out its class."""
        for batch, output in enumerate(self._outputs):
            if self.scale == "kl":
                sums = _over_classes(lambda rows: rows.double().logsumexp(1), self._axis, output)
                known = bool(self._counted(batch, sums).isfinite().all())
            else:
                known = all(bool(output[place].isfinite().all()) for place in chunks(output))
            if not known:
                kind = "NaN" if output.isnan().any() else "infinity"
                raise ValueError(
                    f"the outputs of batch {batch} hold {kind}, with which no others compare. Find the "
                    "sample or the layer with torch.autograd.set_detect_anomaly(True), or leave the "
                    "batch out."
                )

    def _sum_to_one(self) -> bool:
        """Check whether outputs are class probabilities, up to their rounding."""

        def off(rows: Tensor) -> Tensor:
            return torch.maximum((rows.double().sum(1) - 1).abs(), -rows.double().amin(1))

        sums = [_over_classes(off, self._axis, output) for output in self._outputs]
        rounding = max(1e-4, 4 * torch.finfo(self._outputs[0].dtype).eps)
        return all(bool((self._counted(k, each) <= rounding).all()) for k, each in enumerate(sums))

    def _logits(self, outputs: Tensor) -> Tensor:
        """Return what the softmax makes class probabilities of."""
        if not self._are_probabilities:
            return outputs
        return outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()

    def metric_root(self, output: Tensor, vectors: Tensor, batch: int) -> Tensor:
        """Apply a root B of the quadratic form that small changes of one batch are measured by.

        The change by a small displacement z of the outputs is ``|Bᵀz|²``, summed over samples, over
        the sum of :attr:`shares`. For the KL divergence ``B Bᵀ = (diag p - p pᵀ) / 2``, half the
        softmax's Fisher information, taken by the logits that the outputs are, or are exponentials of;
        for the relative change B is the identity.
        """
        if self.scale == "relative":
            where = self._valid[batch]
            return vectors if where is None else vectors * where.to(vectors)
        p = self._logits(output.detach()).softmax(self._axis)
        if self._counts is not None:
            vectors = vectors * self._counts[batch].unsqueeze(self._axis).to(vectors)
        scaled = p.sqrt() * vectors
        root = (scaled - p * scaled.sum(self._axis, keepdim=True)) / math.sqrt(2)
        # The logits of probabilities move by their displacement over themselves.
        tiny = torch.finfo(p.dtype).tiny
        return root / output.detach().clamp_min(tiny) if self._are_probabilities else root

    def change(self, altered: Tensor, output: Tensor) -> Tensor:
        """Return the displacement of outputs, for probabilities that of their logits times themselves.

        So :meth:`metric_root` makes no error where it is not small.
        """
        moved = self._logits(altered) - self._logits(output)
        return output * moved if self._are_probabilities else moved

    def displacement(self, altered: Iterable[Tensor]) -> Tensor:
        """Return a vector to altered outputs, whose square is the change to second order.

        For the KL divergence that is the length in half the softmax's Fisher information.
        """
        moved = []
        for batch, (own, other) in enumerate(zip(self._outputs, altered, strict=True)):
            if self.scale == "relative":
                z = self._filled(batch, other).double() - self._filled(batch, own).double()
            else:
                z = self._logits(other).double() - self._logits(own).double()
                p = self._logits(own).double().softmax(self._axis)
                z = (p / 2).sqrt() * (z - (p * z).sum(self._axis, keepdim=True))
                z = self._counted(batch, z.movedim(self._axis, 0))
            moved.append(z.flatten())
        return torch.cat(moved) / self.shares.sum().sqrt()

    def _right_of(self, batch: int, output: Tensor) -> Tensor:
        """Count the right classes of each sample of one batch."""
        assert self._targets is not None
        target = self._targets[batch]
        return _by_sample(output.argmax(class_axis(output, target)) == target)

    def _metric_of(self, outputs: Sequence[Tensor]) -> float:
        assert self._metric is not None
        assert self._targets is not None
        found = self._metric(torch.cat(list(outputs)), torch.cat(self._targets))
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError):
            size = f" of shape {tuple(found.shape)}" if hasattr(found, "shape") else ""
            raise ValueError(
                f"metric returned {type(found).__name__}{size}; let it return one number, larger where "
                "outputs are better"
            ) from None


def _mean(outputs: Sequence[Tensor]) -> Tensor:
    """Return the mean of each unit; where sizes vary, a unit is what lies along the axes that do not."""
    shapes = list(dict.fromkeys(output.shape[1:] for output in outputs))
    axes = zip(*shapes, strict=True) if len({len(shape) for shape in shapes}) == 1 else ()
    if len(shapes) > 1 and not any(len({*sizes}) == 1 for sizes in axes):
        raise ValueError(
            f"outputs of the shapes {tuple(shapes[0])} and {tuple(shapes[1])} per sample arrived, so no "
            "unit has a mean; bring all batches to one size, or give class indices as targets"
        )
    return MeanAndSpread(outputs).mean


def _marked(target: Tensor, valid: Tensor | None, axis: int) -> Tensor:
    """Mark targets of positions that hold no data."""
    return target if valid is None else torch.where(valid.squeeze(axis), target, IGNORED)


def _by_sample(values: Tensor) -> Tensor:
    """Sum over all axes but the first."""
    return values.double().reshape(len(values), -1).sum(dim=1)
