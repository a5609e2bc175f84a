"""Credits, gains and what else is reported per component, from moments."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lightning_koopman.koopman.alignment import Alignment, OneByOneError, align
from lightning_koopman.koopman.chain import (
    R2,
    Split,
    Step,
    bias,
    fit_steps,
    held_out_folds,
    jackknife,
    refit_steps,
    relimited,
    split_chain,
)
from lightning_koopman.koopman.moments import Layout
from lightning_koopman.koopman.operator import KoopmanOperator
from lightning_koopman.koopman.options import DEFAULTS, Normalize, Options
from lightning_koopman.koopman.regression import alive, held_out_errors, spectrum


def align_split(
    split: Split,
    operators: Sequence[Tensor],
    steps: Sequence[Step],
    columns: Sequence[int],
    targets: Sequence[int] | None,
) -> Alignment:
    """Align the operators of all samples, of one fold, or of several at once."""
    directions = split.directions
    if targets is not None:
        chosen = torch.eye(directions.shape[-2], device="cpu").to(directions)[:, list(targets)]
        directions = chosen.expand(*directions.shape[:-2], *chosen.shape)
    # Whitened without a fold, an output may have fewer directions than over all samples.
    present = [column for column in columns if column < directions.shape[-1]]
    parents = split.layout.parents[1:]
    blocks = [
        [step.within_limits(block, p) for block, p in zip(split.blocks(i, matrix), read, strict=True)]
        for i, (step, matrix, read) in enumerate(zip(steps, operators, parents, strict=True), start=1)
    ]
    return align(blocks, directions[..., present], parents)


def mean_volumes(chain: Alignment, expected: Alignment | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean log-volume behind each state, and where it is not that of what was expected."""
    if expected is not None and chain.rank != expected.rank:
        means = torch.full(chain.log_volumes.shape[:-1], torch.nan, dtype=torch.float64, device="cpu")
        return means, means.isnan()
    means = chain.log_volumes.nanmean(dim=-1)
    lost = means.isnan()
    if expected is not None:
        lost |= (chain.log_volumes.isnan() != expected.log_volumes.isnan()).any(dim=-1)
    return means, lost


def volumes(split: Split, chain: Alignment, expected: Alignment | None = None) -> dict[str, Tensor]:
    """Read credit, gain, sensitivity and total off an alignment; NaN where another was expected."""
    components = split.layout.components
    means, lost = mean_volumes(chain, expected)
    sizes = []
    for i in components:
        spread = split.train.variances[i].clamp_min(0).sqrt()[..., None]
        sizes.append(torch.linalg.matrix_norm(spread * chain.jacobian(i)).log())
    sensitivity = torch.stack(sizes, dim=-1)
    # A dead branch has no gain; the gain of what stands behind it is that over what carries.
    means, lost = means[..., (0, *components)], lost[..., (0, *components)]
    gains, before, known = [], means[..., 0], ~means.isnan()
    for i in range(1, len(components) + 1):
        gains.append(before - means[..., i])
        before = torch.where(known[..., i], means[..., i], before)
    moved = lost[..., 1:] | lost[..., :-1] & known[..., :-1]
    return {
        "credit": means.masked_fill(lost, torch.nan)[..., 1:],
        "gain": torch.stack(gains, dim=-1).masked_fill(moved, torch.nan),
        "sensitivity": sensitivity.masked_fill(~known[..., 1:], torch.nan),
        "total": means[..., 0],
    }


def refitted_volumes(
    split: Split,
    operators: Sequence[Tensor],
    steps: Sequence[Step],
    targets: Sequence[int] | None,
    expected: Alignment,
) -> dict[str, Tensor]:
    """Read the same off alignments without each fold, ``(folds, …)``."""
    kept = expected.kept
    try:
        refitted = align_split(split, operators, steps, kept, targets)
        return volumes(split, refitted, expected)
    except OneByOneError:
        each = []
        for place in range(len(split.train.count)):
            one = split.fold(place)
            own = [operator[place] for operator in operators]
            each.append(volumes(one, align_split(one, own, steps, kept, targets), expected))
        return {name: torch.stack([found[name] for found in each]) for name in each[0]}


RANK_SHARE = 1e-4
"""Share of the mean variance, of the directions that vary at all, at which one counts by half in a
state's rank."""


def state_ranks(whole: Split, steps: Sequence[Step]) -> tuple[Tensor, list[int]]:
    """Count how many directions of the state behind each component vary: smoothly, and at all."""
    # A direction of variance v counts v² / (v² + t²). So the rank moves smoothly with the data, and
    # units that wake in one sample of a million do not count.
    ranks, known, layout = [], [], whole.layout
    for i in range(1, len(layout.dims)):
        if i < len(steps) and layout.parents[i + 1] == (i,):
            # This state is the regressor of the next step, whose spectrum is at hand.
            values = steps[i].values
        else:
            values = torch.linalg.eigvalsh(whole.train[i, i])
            values = values[alive(values)]
        squares = (values / (RANK_SHARE * values.mean())).square()
        ranks.append(float((squares / (1 + squares)).sum()))
        known.append(len(values))
    return torch.tensor(ranks, dtype=torch.float64, device="cpu"), known


def undetermined(whole: Split, steps: Sequence[Step], known: Sequence[int]) -> tuple[int, ...]:
    """Find components whose states those beside them tell too, where ``known`` directions vary.

    Which of the states a step goes by is then no matter of data, but of the ridge weight alone.
    """
    layout, found, ranks = whole.layout, set[int](), dict(enumerate(known, start=1))

    def n_alive(states: Sequence[int]) -> int:
        # In units of their own, for a state that is small beside others tells what it tells.
        variances = [whole.train.variances[p] for p in states]
        sizes = torch.cat([values.sum().expand(values.shape) for values in variances])
        unit = torch.where(sizes > 0, sizes, 1.0).rsqrt()
        joint = whole.train.beside(states) * unit[:, None] * unit
        return int(alive(torch.linalg.eigvalsh(joint)).sum())

    above, parts = [set[int]()], [set[int]()]
    for i, step in enumerate(steps, start=1):
        read = layout.parents[i]
        above.append(set(read).union(*(above[p] for p in read)))
        parts.append({i} if i in layout.components else set[int]().union(*(parts[p] for p in read)))
        # Of fewer samples than directions, each looks like a sum of others.
        if len(read) == 1 or step.is_given or sum(layout.dims[p] for p in read) >= whole.count:
            continue
        if 0 in read and 0 not in ranks:
            ranks[0] = n_alive([0])
        if len(step.values) == sum(ranks[p] for p in read):
            continue
        for p in read:
            if not parts[p]:
                continue
            # What a state is made of has its say through that state as well, which changes no credit.
            beside = [q for q in read if q != p and p not in above[q]]
            shared = ranks[p] + n_alive(beside) - n_alive([*beside, p]) if beside else 0
            if 2 * shared >= ranks[p] > 0:
                found |= {c for c in parts[p] if any(c not in {q, *above[q]} for q in read if q != p)}
    return tuple(sorted(found))


def refitted_ranks(split: Split, known: Sequence[int]) -> Tensor:
    """Count the same without each fold, ``(folds, L)``, where ``known`` directions vary at all."""
    components = split.layout.components
    ranks = torch.zeros(len(split.train.count), len(components), dtype=torch.float64, device="cpu")
    for column, i in enumerate(components):
        if count := known[i - 1]:
            unit = RANK_SHARE * split.train.variances[i].sum(dim=1)[:, None, None] / count
            # Σ v² / (v² + t²) = d - tr (1 + C² / t²)⁻¹, which takes no eigenvalues.
            scaled = split.train[i, i] / torch.where(unit > 0, unit, 1.0)
            identity = torch.eye(scaled.shape[1], device="cpu").to(scaled)
            factor = torch.linalg.cholesky(torch.baddbmm(identity, scaled, scaled), upper=True)
            inverse = torch.cholesky_inverse(factor, upper=True)
            ranks[:, column] = len(identity) - inverse.diagonal(dim1=1, dim2=2).sum(dim=1)
    return ranks


def unseen_shifts(
    whole: Split, linear: Sequence[bool], steps: Sequence[Step], widths: Sequence[int]
) -> Tensor:
    """Compute how far the log-volume behind each state may move if directions that never varied wake.

    States have as many directions as ``widths`` says.
    """
    # It concerns states read by a linear step, whose ridge weight is so small that directions too rare
    # to be seen in so many samples would count in full. Were u of them to join k with weights like
    # theirs, the log-volume would grow by log(1 + u / k) / 2 per direction; a 95 % interval just reaches
    # so far. What a linear step gives out has no directions but those it reads.
    from scipy.special import stdtrit  # most of a second to import, and torch has no such quantile

    layout = whole.layout
    shifts = torch.zeros(len(layout.dims), dtype=torch.float64, device="cpu")
    unseen, quantile = [widths[0]], float(stdtrit(layout.folds - 1, 0.975))
    for i, step in enumerate(steps, start=1):
        read, known = layout.parents[i], len(step.values)
        # States that are added up count each for itself, others as they are fitted, side by side.
        alone = [((p,), step.n_varying(p, widths[p])) for p in read]
        asleep = 0
        for states, varying in alone if step.is_given else [(read, known)]:
            # Not what a linear step cannot give anyway.
            missing = min(sum(unseen[p] for p in states), sum(widths[p] for p in states) - varying)
            missing = max(missing, 0)
            counts = step.is_given or (linear[i - 1] and step.tikhonov < 1 / whole.count)
            if counts and missing and varying:
                for p in states:
                    shifts[p] = math.log1p(missing / varying) / 2 / quantile
            asleep += missing
        unseen.append(asleep if linear[i - 1] else widths[i])
    return shifts


class StateError(ValueError):
    """What a network gives, with these weights on these samples, cannot be credited."""


QUANTITIES = ("credit", "gain", "nonlinearity", "sensitivity", "r2", "chain_r2", "rank")
"""Names of the numbers reported for every component."""

MAX_RIDGE_SHIFT = 0.5
"""Nats per direction that a stable credit may move, or its standard error if that is more, if the ridge
weight moves tenfold."""

LINEAR = 1e-6
"""Share of the variance that a step may leave unexplained and count as linear: rounding, and a unit that
wakes in one sample, whose weights no other sample tells."""


@dataclass(frozen=True)
class Credits:
    """Every number of a chain of L components, with its error bar.

    Attributes:
        values: By quantity, shape ``(L,)`` each.
        stderr: Standard errors, the same names and shapes: the delete-one-fold jackknife, with the ridge
            weight chosen anew in every replicate, and in quadrature the bias of a finite sample and what
            directions never seen could do.
        volumes: log|R_i[j, j]| behind each component, by output direction, shape ``(L, r)``.
        total: Log-volume of the whole network, in nats per direction.
        total_stderr: Its standard error.
        stable: Whether the credit moves by no more than :data:`MAX_RIDGE_SHIFT`, or its error, when
            every ridge weight moves tenfold, and it is not undetermined.
        operators: One per component; where it reads several states, its regressors are these states
            side by side, the nearest first.
        alignment: The aligned chain over all samples.
        undetermined: Indices of the components whose states others tell that are read beside them.
        sums_r2: By state that is a sum and was fitted, how much of it what it reads explains.
        lost: Indices of the components behind which an output direction stops to matter.
        dropped: The output directions that are lost there: units of ``targets`` where these were given,
            else places among the leading POD directions, from 0.
    """

    values: dict[str, Tensor]
    stderr: dict[str, Tensor]
    volumes: Tensor
    total: float
    total_stderr: float
    stable: Tensor
    operators: tuple[KoopmanOperator, ...]
    alignment: Alignment
    undetermined: tuple[int, ...]
    sums_r2: Mapping[int, float]
    lost: tuple[int, ...]
    dropped: tuple[int, ...]


def compute_credits(
    layout: Layout,
    moments: Tensor,
    options: Options = DEFAULTS,
    *,
    center: Sequence[Tensor] | None = None,
    given: Mapping[int, Tensor] = MappingProxyType({}),
) -> Credits:
    """Compute all numbers of a chain from its moments, where operators of some steps may be given."""
    # Many small factorisations follow, one after the other, in which a GPU would only wait.
    moments = moments.cpu()
    center = None if center is None else [offset.cpu() for offset in center]
    targets, rank, normalize = options.targets, options.rank, options.normalize
    errors = options.errors is not False
    _check(layout, moments, targets)
    total = moments.sum(dim=0)
    whole = split_chain(layout, moments, None, normalize, total)
    if whole.output_rank == 0:
        raise StateError(
            f"the output of the last component is constant over all {int(whole.count)} samples, so "
            "nothing can be credited for it. Check the data, or end the chain earlier with components=."
        )
    groups = held_out_folds(layout, moments, normalize, total)
    steps = fit_steps(whole, options.tikhonov, given if normalize == "none" else {})
    sums_r2 = {i: _r2_of(whole, i, steps[i - 1]) for i in layout.sums if not steps[i - 1].is_given}
    asked = whole.output_rank if targets is None else len(targets)
    asked = asked if rank is None else min(asked, rank)
    chain = align_split(whole, [step.matrix for step in steps], steps, range(asked), targets)
    kept = chain.kept
    smoothed = align_split(whole, [step.smoothed for step in steps], steps, kept, targets)
    means, lost = mean_volumes(smoothed, chain)
    components = list(layout.components)
    shift = means.masked_fill(lost, torch.nan)[components]
    ranks, known = state_ranks(whole, steps)
    values = volumes(whole, chain) | {"rank": ranks[[i - 1 for i in components]]}
    r2, without, rest = R2(whole, steps), list[dict[str, Tensor]](), list[Tensor]()
    held_out = [torch.empty(0, dtype=torch.float64, device="cpu")]
    for group in groups:
        split = split_chain(layout, moments, group, normalize, total)
        operators, own = refit_steps(split, steps, anew=errors)
        r2.hold_out(split, operators)
        held_out.append(split.test.count)
        if not errors:
            continue
        rest.append(refitted_ranks(split, known))
        limited = steps if normalize == "none" else relimited(split, steps)
        without.append(refitted_volumes(split, own, limited, targets, chain))
    values |= r2.values()
    stderr = {name: torch.full_like(value, torch.nan) for name, value in values.items()}
    if errors and sum(map(len, groups)) > 1:
        replicates = {name: torch.cat([each[name] for each in without]) for name in without[0]}
        replicates |= {"rank": torch.cat(rest)} | r2.replicates()
        sizes, gaps = torch.cat(held_out), r2.gaps()
        for name, value in values.items():
            spread = jackknife(value, replicates[name], whole.count, sizes)
            gap = gaps[name] if name in gaps else bias(value, replicates[name], whole.count, sizes)
            stderr[name] = (spread.square() + gap.square()).sqrt()
        explained = dict(zip(components, values["r2"].tolist(), strict=True)) | sums_r2
        linear = [explained.get(i, 1.0) >= 1 - LINEAR for i in range(1, len(layout.dims))]
        unseen = unseen_shifts(whole, linear, steps, layout.dims)
        shifts, before = unseen[components], unseen[[0, *components[:-1]]]
        # Noise is on the units that vary, of whose directions some may not.
        units = [int(alive(variance).sum()) for variance in whole.train.variances]
        for name, extra in (
            ("credit", shifts),
            ("gain", (shifts.square() + before.square()).sqrt()),
            ("sensitivity", unseen_shifts(whole, linear, steps, units)[components]),
            ("total", unseen[0]),
        ):
            stderr[name] = (stderr[name].square() + extra.square()).sqrt()
    allowed = stderr["credit"].nan_to_num(0) if not errors else stderr["credit"]
    stable = (shift - values["credit"]).abs() <= allowed.clamp_min(MAX_RIDGE_SHIFT)
    beside = undetermined(whole, steps, known)
    stable[[components.index(i) for i in beside]] = False
    return Credits(
        values={name: values[name] for name in QUANTITIES},
        stderr={name: stderr[name] for name in QUANTITIES},
        volumes=chain.log_volumes[components],
        total=float(values["total"]),
        total_stderr=float(stderr["total"]),
        stable=stable,
        operators=_operators(layout, moments, whole, steps, values["r2"], normalize, center),
        alignment=chain,
        undetermined=tuple(1 + components.index(i) for i in beside),
        sums_r2=sums_r2,
        # What is lost at a sum is lost on the way to the component that comes next.
        lost=tuple(dict.fromkeys(i and 1 + bisect_left(components, i) for i in chain.lost)),
        dropped=tuple((targets or range(asked))[c] for c in range(asked) if c not in kept),
    )


def _r2_of(whole: Split, i: int, step: Step) -> float:
    """Return how much of a state its step explains, of the samples that it was fitted to."""
    total = whole.train.variances[i].sum().reshape(1)
    errors = held_out_errors(step.matrix, *whole.normal_equations(i), total)
    return 1 - float(errors / total) if float(total) else 1.0


def samples_needed(layout: Layout) -> int:
    """Return the number of samples below which the operators are not worth reading."""
    widest = max(sum(layout.dims[p] for p in layout.parents[i]) for i in layout.components)
    return math.ceil(2 * widest * layout.folds / (layout.folds - 1))


def _check(layout: Layout, moments: Tensor, targets: Sequence[int] | None) -> None:
    count = int(moments[:, 0].sum())
    if count < 2:
        raise ValueError(f"{count} of at least 2 samples arrived; pass more, and many for error bars")
    if targets is not None:
        outside = [t for t in targets if not 0 <= t < layout.dims[-1]]
        if outside or not targets or len(set(targets)) < len(targets):
            raise ValueError(
                f"targets is {list(targets)}; name each output at most once, from 0 to "
                f"{layout.dims[-1] - 1}"
            )


def _operators(
    layout: Layout,
    moments: Tensor,
    whole: Split,
    steps: Sequence[Step],
    r2: Tensor,
    normalize: Normalize,
    center: Sequence[Tensor] | None,
) -> tuple[KoopmanOperator, ...]:
    """Return each component's operator in the coordinates of the states themselves."""
    matrices = [step.matrix for step in steps]
    conditions = [step.condition for step in steps]
    ranks = [len(step.values) for step in steps]
    means = list(whole.train.means)
    if normalize != "none":
        plain = split_chain(layout, moments, None, "none")
        problems = [spectrum(*plain.normal_equations(i)) for i in range(1, len(layout.dims))]
        matrices = [problem.matrix(step.tikhonov) for problem, step in zip(problems, steps, strict=True)]
        conditions, ranks = [p.condition for p in problems], [len(p.values) for p in problems]
        means = list(plain.train.means)
    if center is not None:
        means = [mean + offset.to(mean) for mean, offset in zip(means, center, strict=True)]
    return tuple(
        KoopmanOperator(
            matrix=matrices[i - 1],
            x_mean=torch.cat([means[p] for p in layout.parents[i]]),
            y_mean=means[i],
            r2=float(held_out),
            tikhonov=steps[i - 1].tikhonov,
            rank=ranks[i - 1],
            condition=conditions[i - 1],
        )
        for i, held_out in zip(layout.components, r2, strict=True)
    )
