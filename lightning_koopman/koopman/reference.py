r"""What a network did on some samples, to be held against what it, or another, does on others.

Per component, drift is the share of variance that the operator of the reference leaves unexplained on
new states, less the share that an operator fitted to these leaves. Both are held out by the same folds:
of the reference there is one operator without each fold, and a sample that is in both sets of samples is
in the same fold of both. What a finite sample adds to the error of an operator is the spread of the
operators without each fold; it is taken off both shares. So drift is 0 in the mean where the component
does what it did and the states are distributed as they were, over the same samples or over others, few
or many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_koopman.koopman.chain import jackknife
from lightning_koopman.koopman.moments import Covariances, Layout, covariances
from lightning_koopman.koopman.options import DEFAULTS, Options
from lightning_koopman.koopman.regression import solve
from lightning_koopman.koopman.states import Basis
from lightning_koopman.network.plan import Plan

RIDGE = 3e-2
"""Ridge weight of the operators that drift is read from, in units of the regressors' mean variance.

The operator of the reference meets inputs that are not distributed as those it was fitted to, and what
it says of directions that hardly varied then must not count.
"""


class FoldFits:
    """Operators and means of every step without each fold, fitted when they are first asked for.

    Most reports are never held against anything, and the fits take as long as the credits do. Until
    then the moments are kept, which the fits are made from.
    """

    def __init__(self, layout: Layout, moments: Tensor, center: Sequence[Tensor]) -> None:
        self._given: tuple[Layout, Tensor, Sequence[Tensor]] | None = (layout, moments, center)
        self._found: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    @classmethod
    def known(cls, operators: Sequence[Tensor], means: Sequence[Tensor]) -> FoldFits:
        """Return fits that were made before."""
        fits = cls.__new__(cls)
        fits._given, fits._found = None, (tuple(operators), tuple(means))
        return fits

    def __call__(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the operators and the means that go with them."""
        if self._found is None:
            assert self._given is not None
            self._found, self._given = fold_operators(*self._given), None
        return self._found


@dataclass(frozen=True, eq=False)
class Reference:
    """A chain as it was measured once: coordinates, operators and means.

    Attributes:
        states: Names of the states x_0 … x_L.
        widths: Their widths before reduction.
        parents: For each step 1 … L, the states that it reads, the nearest first.
        basis: Coordinates of the state vectors.
        fits: What gives :attr:`operators` and :attr:`means`.
        n_samples: Number of samples measured.
        options: How states became rows.
        modules: Names of the modules chosen as components.
        named: Whether the user named them.
        calls: By state, the module calls recorded for it; more than one are joined.
        grids: By module call, the cells that its spatial or sequence axes are pooled to.
        parts: By state, the module calls that its component is made of.
        step: Training step of the weights, if known.
        functions: Options that were functions of the user's, which no file holds.
    """

    states: tuple[str, ...]
    widths: tuple[int, ...]
    parents: tuple[tuple[int, ...], ...]
    basis: Basis
    fits: FoldFits
    n_samples: int
    options: Options = DEFAULTS
    modules: tuple[str, ...] = ()
    named: bool = False
    calls: tuple[tuple[str, ...], ...] = ()
    grids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    step: int | None = None
    functions: tuple[str, ...] = ()

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components."""
        return self.states[1:]

    @property
    def operators(self) -> tuple[Tensor, ...]:
        """For each step, its operators without each fold, ``(folds, d_in, d_out)``, float32."""
        return self.fits()[0]

    @property
    def means(self) -> tuple[Tensor, ...]:
        """For each state, its means without each fold, ``(folds, d_i)``."""
        return self.fits()[1]

    def coordinates(self, plan: Plan) -> Plan:
        """Return another network's plan, with what its states must share with the reference."""
        self.check_names(plan.names, self.states)
        forms = {
            name: replace(form, grid=self.grids.get(name, form.grid))
            for name, form in plan.forms.items()
        }
        return replace(plan, forms=forms, links=self.parents)

    def check_names(self, names: Sequence[str], expected: Sequence[str]) -> None:
        """Refuse components or states that are not those of the reference."""
        if tuple(names) == tuple(expected):
            return
        missing = [name for name in expected if name not in names]
        extra = [name for name in names if name not in expected]
        if not (missing or extra):
            raise ValueError(
                f"the network runs its components in the order {list(names)}, the reference's in the "
                f"order {list(expected)}; only the same chain compares"
            )
        raise ValueError(
            f"the network's components are not the reference's: missing {missing}, not in the reference "
            f"{extra}. Compare networks with the same module names, or measure the reference anew"
        )

    def check_widths(self, widths: Sequence[int]) -> None:
        """Refuse states of other widths than those of the reference."""
        for name, here, there in zip(self.states, widths, self.widths, strict=True):
            if here != there:
                raise ValueError(
                    f"component {name!r} gives {here} values per sample, in the reference {there}. Give "
                    "samples of the same shape to a network of the same widths"
                )


def fold_operators(
    layout: Layout, moments: Tensor, center: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Fit every step without each fold; return the operators and the means that go with them."""
    total = moments.sum(dim=0)
    trains = [covariances(layout, total, without=row) for row in moments]
    operators = tuple(
        torch.stack([solve(*_problem(train, layout, i), RIDGE).float().cpu() for train in trains])
        for i in range(1, len(layout.dims))
    )
    means = tuple(
        torch.stack([(train.means[i] + offset.to(train.means[i])).cpu() for train in trains])
        for i, offset in enumerate(center)
    )
    return operators, means


def _problem(given: Covariances, layout: Layout, i: int) -> tuple[Tensor, Tensor]:
    """Return the covariance of what a step reads, and its cross-covariance with what the step gives."""
    read = layout.parents[i]
    c_xy = torch.cat([given[p, i] for p in read])
    return torch.cat([torch.cat([given[p, q] for q in read], dim=1) for p in read]), c_xy


Affine = tuple[Tensor, Tensor, Tensor]
"""An operator with the means that it acts about: ``y_mean + (x - x_mean) @ matrix``."""


@dataclass(frozen=True)
class Shares:
    """Shares of variance that old and new operators leave unexplained, each of shape ``(L,)``.

    Attributes:
        old: Left by the operators of the reference.
        new: Left by operators fitted to the new states.
        stderr: Standard error of the difference.
        freedom: Degrees of freedom of that error.
    """

    old: Tensor
    new: Tensor
    stderr: Tensor
    freedom: int


def unexplained(
    layout: Layout,
    moments: Tensor,
    center: Sequence[Tensor],
    operators: Sequence[Tensor],
    means: Sequence[Tensor],
    own: Sequence[Tensor] | None = None,
) -> Shares:
    """Hold the operators of a reference against the moments of new states in its coordinates.

    ``own`` are the operators of the new states, where :func:`fold_operators` found them before.
    """
    folds, steps = len(moments), range(1, len(layout.dims))
    total = moments.sum(dim=0)
    held = [f for f in range(folds) if moments[f, 0] > 0 and float(total[0] - moments[f, 0]) >= 2]
    if len(held) < 2:
        raise ValueError(f"{int(total[0])} samples arrived, all in one fold; take more")
    about = [mean.to(moments) - offset.to(moments) for mean, offset in zip(means, center, strict=True)]
    old = [
        [_affine(matrices[f].to(moments), [mean[f] for mean in about], layout, i) for f in range(folds)]
        for i, matrices in zip(steps, operators, strict=True)
    ]
    fitted = fold_operators(layout, moments, center)[0] if own is None else own
    new: list[list[Affine]] = [[] for _ in steps]
    # Squared errors of old and new operators, and the squares that they are of.
    sums = torch.zeros(3, len(held), len(steps), dtype=torch.float64)
    for row, fold in enumerate(held):
        train = covariances(layout, total, without=moments[fold])
        test = covariances(layout, moments[fold])
        for i in steps:
            new[i - 1].append(_affine(fitted[i - 1][fold].to(moments), train.means, layout, i))
            problem = _problem(test, layout, i)
            moved = (test.means[i] - train.means[i]).square().sum()
            variance = float(test.variances[i].sum())
            sums[0, row, i - 1] = variance + _error(*problem, test, layout, i, old[i - 1][fold])
            sums[1, row, i - 1] = variance + _error(*problem, test, layout, i, new[i - 1][-1])
            sums[2, row, i - 1] = variance + float(moved)
        sums[:, row] *= test.count
    everything = covariances(layout, total)
    found = [_over_folds(everything, layout, i, (old[i - 1], new[i - 1])) for i in steps]
    excess = everything.count * torch.tensor([more for more, _ in found], dtype=torch.float64).T

    def shares(errors: Tensor, size: float) -> Tensor:
        variance = errors[2]
        return torch.where(variance > 0, (errors[:2] - size * excess) / variance, torch.nan)

    whole = sums.sum(dim=1)
    value = shares(whole, 1.0)
    counts = moments[held, 0].cpu()
    parts = counts / counts.sum()
    rest = [shares(whole - sums[:, row], 1 - float(part)) for row, part in enumerate(parts)]
    count = float(counts.sum())
    stderr = jackknife(value[0] - value[1], [r[0] - r[1] for r in rest], count, counts)
    # The jackknife above takes operators as given. What their own samples' chance does to the errors is
    # paired by fold too, so that it cancels over samples that are in both.
    chance = torch.tensor([squared for _, squared in found], dtype=torch.float64).sqrt()
    chance = chance * everything.count / whole[2]
    # What was taken off counts as uncertain in full: with a ridge, samples of differing number shrink
    # the operators differently too, which the spread does not show.
    correction = (excess[0] - excess[1]) / whole[2]
    stderr = (stderr.square() + chance.square() + correction.square()).sqrt()
    return Shares(value[0], value[1], stderr, len(held) - 1)


def _affine(matrix: Tensor, means: Sequence[Tensor], layout: Layout, i: int) -> Affine:
    return matrix, torch.cat([means[p] for p in layout.parents[i]]), means[i]


def _error(
    c_xx: Tensor, c_xy: Tensor, given: Covariances, layout: Layout, i: int, operator: Affine
) -> float:
    """Compute the squared error per sample, less the variance of the target about its own mean."""
    matrix, x_mean, y_mean = operator
    x = torch.cat([given.means[p] for p in layout.parents[i]])
    missed = given.means[i] - y_mean - (x - x_mean) @ matrix
    return float((matrix * (c_xx @ matrix - 2 * c_xy)).sum() + missed.square().sum())


def _over_folds(
    given: Covariances, layout: Layout, i: int, both: Sequence[Sequence[Affine]]
) -> tuple[list[float], float]:
    """Compute what chance adds to the errors of old and new operators, and how it moves their gap.

    The first is the summed squared distance of the operators' predictions from their mean; the second
    the jackknife variance of the gap between the errors, over the folds that the operators leave out.
    """
    c_xx, c_xy = _problem(given, layout, i)
    x = torch.cat([given.means[p] for p in layout.parents[i]])
    spreads, errors = [], []
    for operators in both:
        matrices = torch.stack([matrix for matrix, _, _ in operators])
        at_mean = torch.stack([y_mean + (x - x_mean) @ matrix for matrix, x_mean, y_mean in operators])
        products = c_xx @ matrices
        apart, off = matrices - matrices.mean(dim=0), at_mean - at_mean.mean(dim=0)
        spreads.append(float((apart * (products - products.mean(dim=0))).sum() + off.square().sum()))
        missed = (given.means[i] - at_mean).square().sum(dim=1)
        errors.append((matrices * (products - 2 * c_xy)).sum(dim=(1, 2)) + missed)
    if len(errors[0]) != len(errors[1]):
        # A fold without new samples: nothing to pair.
        return spreads, float(sum((len(e) - 1) * e.var(correction=0) for e in errors))
    difference = errors[0] - errors[1]
    return spreads, float((len(difference) - 1) * difference.var(correction=0))


_ROUNDING = 1e-6
"""Shares of variance that states in single precision do not tell from 0."""


def beyond_error(drift: Tensor, stderr: Tensor, freedom: int, level: float = 0.05) -> Tensor:
    """Return which drifts are above 0 beyond error; at most a share of ``level`` of them wrongly.

    Each is held against Student's t, and the p-values of all components against the line of Benjamini
    and Hochberg. Where nothing changed, no component at all is marked in 1 - ``level`` of the networks.

    References:
        Benjamini & Hochberg (1995), J. R. Stat. Soc. B 57, 289-300.
    """
    from scipy.special import stdtr  # most of a second to import

    known = torch.isfinite(drift) & torch.isfinite(stderr)
    t = (drift - _ROUNDING) / stderr.clamp_min(torch.finfo(torch.float64).tiny)
    p = torch.where(known, torch.from_numpy(stdtr(freedom, -t.numpy())), 1.0)
    ordered, order = p.sort()
    line = level * torch.arange(1, len(p) + 1, dtype=torch.float64) / max(1, int(known.sum()))
    below = (ordered <= line).nonzero()
    changed = torch.zeros(len(p), dtype=torch.bool)
    if len(below):
        changed[order[: int(below[-1]) + 1]] = True
    return changed
