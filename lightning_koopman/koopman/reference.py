r"""What a network did on some samples, to be held against what it, or another, does on others.

Per component, drift is the share of variance that the operator of the reference leaves unexplained on
new states, less the share that an operator fitted to these leaves. Both are held out by the same folds:
of the reference there is one operator without each fold, and a sample that is in both sets of samples is
in the same fold of both. What a finite sample adds to the error of an operator is read off how far the
residuals of two operators agree, and taken off both shares. So drift is about 0 in the mean where the
component does what it did and the states are distributed as they were, over the same samples or others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lightning_koopman.koopman.chain import jackknife
from lightning_koopman.koopman.moments import Covariances, Layout, covariances
from lightning_koopman.koopman.options import DEFAULTS, Options
from lightning_koopman.koopman.regression import dots, solve_each
from lightning_koopman.koopman.states import Basis
from lightning_koopman.network.capture.plan import Plan
from lightning_koopman.network.names import is_sum

RIDGE = 3e-2
"""Ridge weight of the operators that drift is read from, in units of the regressors' mean variance.

The operator of the reference meets inputs that are not distributed as those it was fitted to, and what
it says of directions that hardly varied then must not count.
"""


_Fits = tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]


class FoldFits:
    """Operators and means of every step without each fold, fitted when they are first asked for.

    Most reports are never held against anything, and the fits take as long as the credits do. Until
    then the moments are kept, which the fits are made from.
    """

    def __init__(
        self,
        layout: Layout,
        moments: Tensor,
        center: Sequence[Tensor],
        given: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> None:
        self._given: tuple[Any, ...] | None = (layout, moments, center, given)
        self._found: _Fits | None = None

    @classmethod
    def known(cls, operators: Sequence[Tensor], means: Sequence[Tensor], variance: Tensor) -> FoldFits:
        """Return fits that were made before."""
        fits = cls.__new__(cls)
        fits._given, fits._found = None, (tuple(operators), tuple(means), variance)
        return fits

    def __call__(self) -> _Fits:
        """Return the operators, the means that go with them, and the variance of the input."""
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
        fits: What gives :attr:`operators`, :attr:`means` and :attr:`variance`.
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
        return tuple(name for name in self.states[1:] if not is_sum(name))

    @property
    def operators(self) -> tuple[Tensor, ...]:
        """For each step, its operators without each fold, ``(folds, d_in, d_out)``, float32."""
        return self.fits()[0]

    @property
    def means(self) -> tuple[Tensor, ...]:
        """For each state, its means without each fold, ``(folds, d_i)``."""
        return self.fits()[1]

    @property
    def variance(self) -> Tensor:
        """Variance of the network's input over all coordinates, ``(1,)``; NaN where no file held it."""
        return self.fits()[2]

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
    layout: Layout,
    moments: Tensor,
    center: Sequence[Tensor],
    given: Mapping[int, Tensor] = MappingProxyType({}),
) -> _Fits:
    """Fit every step without each fold, but those that are given.

    Returns operators, their means, and the input's variance.
    """
    rest = covariances(layout, moments.sum(dim=0), without=moments)

    def fitted(i: int, read: Sequence[int]) -> Tensor:
        if (matrix := given.get(i)) is not None:
            return matrix.expand(len(moments), *matrix.shape)
        return solve_each(*rest.normal_equations(read, i), RIDGE)

    steps = enumerate(layout.parents[1:], start=1)
    operators = tuple(fitted(i, read).float() for i, read in steps)
    means = tuple(mean + offset for mean, offset in zip(rest.means, center, strict=True))
    return operators, means, rest.variances[0].sum(dim=1).mean(dim=0, keepdim=True)


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
    n_samples: int,
    fitted: Sequence[Tensor],
) -> Shares:
    """Hold the operators of a reference against the moments of new states in its coordinates.

    ``n_samples`` is how many samples the reference was measured on. ``fitted`` are the operators of the
    new states, see :func:`fold_operators`.
    """
    total = moments.sum(dim=0)
    counts = moments[:, 0]
    held = ((counts > 0) & (total[0] - counts >= 2)).nonzero()[:, 0]
    if len(held) < 2:
        raise ValueError(
            f"{int(total[0])} samples arrived, all in one fold; take more, of differing inputs"
        )
    about = [mean - offset for mean, offset in zip(means, center, strict=True)]
    if len(held) < len(moments):
        moments, fitted = moments[held], [operators[held] for operators in fitted]
    tests, rest = covariances(layout, moments), covariances(layout, total, without=moments)
    everything = covariances(layout, total)
    count = float(everything.count)
    # By step and fold: squared errors of old operators, their products with those of the mean operator,
    # both of new ones, and the squares that they are of; what all operators leave of all samples; the
    # squares of the new mean operator, in the unit of the ridge; and those of what the component gives.
    sums, wholes, sizes, given = [], [], [], []
    for i, read in enumerate(layout.parents[1:], start=1):
        x_old, x_new, x = (torch.cat([m[p] for p in read], 1) for m in (about, rest.means, tests.means))
        old = Affine(operators[i - 1].double(), x_old, about[i])
        new = Affine(fitted[i - 1].double(), x_new, rest.means[i])
        c_xx, c_xy = tests.normal_equations(read, i)
        y, variance = tests.means[i], tests.variances[i].sum(dim=1)
        moved = (y - rest.means[i]).square().sum(dim=1)
        both, c_yx = ((old, old.mean()), (new, new.mean())), c_xy.mT.contiguous()
        parts = [part for one, mean in both for part in one.of(held).errors(c_xx, c_yx, x, y, mean)]
        sums.append(tests.count * torch.stack([variance + part for part in (*parts, moved)]))
        wholes.append([count * part for part in _over_all(everything, read, i, both)])
        unit, entries = torch.cat([everything.variances[p] for p in read]), both[1][1].entries
        sizes.append(count * float(unit.sum() * (entries @ entries)) / max(1, len(unit)))
        given.append(count * float((everything.means[i] + center[i]).square().sum()))
    squares = torch.stack(sums, dim=2)
    folds = [torch.stack(each, dim=1) for each in zip(*wholes, strict=True)]
    crossed, squares = squares[[1, 3]].sum(dim=1), squares[[0, 2, 4]]
    errors = squares[:2].sum(dim=1)
    lasting = torch.stack([_lasting(*each) for each in zip(errors, crossed, folds, strict=True)])
    squares[:2] *= lasting[:, None]
    whole, counts = squares.sum(dim=1), moments[:, 0]
    # An output that no longer varies leaves no variance to take shares of, but the old operator misses
    # it all the same: its share is the largest that there is. Where nothing that a component reads
    # varies any more either, nothing can be told.
    alive = whole[0] > _CONSTANT * torch.tensor(given, dtype=torch.float64, device="cpu")
    dead = (whole[2] <= _CONSTANT * whole[0]) & alive
    constant = [False, *dead.tolist()]
    behind = [all(constant[p] for p in read) for read in layout.parents[1:]]
    known = ~(dead & torch.tensor(behind, device="cpu"))

    def variation(errors: Tensor) -> Tensor:
        return torch.where(dead, _CONSTANT * errors[0], errors[2])

    def shares(errors: Tensor) -> Tensor:
        squares = variation(errors)
        return torch.where(known & (squares > 0), errors[:2] / squares, torch.nan)

    value, without = shares(whole), shares(whole[:, None] - squares)
    stderr = jackknife(value[0] - value[1], without[0] - without[1], float(counts.sum()), counts)
    # The jackknife above takes operators as given. What their own samples' chance does to the errors is
    # paired by fold too, so that it cancels over samples that are in both.
    gaps = [share * each[:-1] for share, each in zip(lasting, folds, strict=True)]
    if len(gaps[0]) == len(gaps[1]):  # else there is a fold without new samples, and nothing to pair
        gaps = [gaps[0] - gaps[1]]
    chanced = torch.stack([(len(gap) - 1) * gap.var(dim=0, correction=0) for gap in gaps]).sum(dim=0)
    # Where samples are few, a ridge shrinks operators as one of about 1 / lasting times its weight would
    # with many. What differing numbers of samples make of that is in no share above.
    few, many = sorted((n_samples, int(total[0])))
    weights = (1 - few / many) * RIDGE * (1 / lasting[0] - 1 / lasting[1])
    shrunk = weights * torch.tensor(sizes, dtype=torch.float64, device="cpu")
    stderr = (stderr.square() + (chanced + shrunk.square()) / variation(whole).square()).sqrt()
    return Shares(value[0], value[1], stderr, len(held) - 1)


@dataclass(frozen=True)
class Affine:
    """One operator per fold, with the means that it acts about: ``y_mean + (x - x_mean) @ matrix``."""

    matrices: Tensor
    x_means: Tensor
    y_means: Tensor

    def of(self, folds: Tensor) -> Affine:
        """Return those of some folds."""
        if len(folds) == len(self.matrices):
            return self
        return Affine(self.matrices[folds], self.x_means[folds], self.y_means[folds])

    def at(self, x: Tensor) -> Tensor:
        """Return what each operator makes of a state of its own, or of one and the same."""
        return self.y_means + ((x - self.x_means)[:, None] @ self.matrices)[:, 0]

    @property
    def entries(self) -> Tensor:
        """All entries, by columns, as solvers give them."""
        return self.matrices.mT.flatten(-2)

    def mean(self) -> Affine:
        """Return their mean, as one operator."""
        x = self.x_means.mean(dim=0)
        return Affine(self.matrices.mT.mean(dim=0).mT, x, self.at(x).mean(dim=0))

    def errors(
        self, c_xx: Tensor, c_yx: Tensor, x: Tensor, y: Tensor, mean: Affine
    ) -> tuple[Tensor, Tensor]:
        """Compute the squared errors per sample, and the products with those of the mean operator.

        Both are less the variance of the target about its own mean.
        """
        matrices = self.matrices.mT
        rest, fitted = torch.baddbmm(c_yx, matrices, c_xx, beta=-1), dots(matrices, c_yx)
        missed = y - self.at(x)
        also_missed = y - mean.y_means - (x - mean.x_means) @ mean.matrices
        squares = dots(matrices, rest) + missed.square().sum(dim=1)
        products = rest.flatten(1) @ mean.entries + (missed * also_missed).sum(dim=1)
        return squares - fitted, products - fitted


def _over_all(
    given: Covariances, read: Sequence[int], i: int, pairs: Sequence[tuple[Affine, Affine]]
) -> list[Tensor]:
    """Compute the squared errors of operators over all samples, and last that of their mean."""
    c_xx, c_xy = given.normal_equations(read, i)
    x = torch.cat([given.means[p] for p in read])
    found = []
    for operator, mean in pairs:
        matrices, missed = operator.matrices.mT, given.means[i] - operator.at(x)
        products, fitted = matrices @ c_xx, operator.entries @ c_xy.T.flatten()
        errors = dots(matrices, products) - 2 * fitted + missed.square().sum(dim=1)
        of_mean = (products.flatten(1) @ mean.entries - 2 * fitted).mean()
        of_mean = of_mean + missed.mean(dim=0).square().sum()
        found.append(given.variances[i].sum() + torch.cat([errors, of_mean[None]]))
    return found


def _lasting(own: Tensor, crossed: Tensor, whole: Tensor) -> Tensor:
    """Compute the share of held-out errors that operators of very many samples would leave.

    ``own`` are the errors, ``crossed`` their products with those of the mean operator, and ``whole`` the
    errors of each operator, and last of the mean one, over all samples.
    """
    folds = len(whole) - 1
    seen = whole[:-1].sum(dim=0) - own
    # Products of the residuals of two operators, summed over those of which one saw the sample, or both.
    once = folds * crossed - own
    both = folds**2 * whole[-1] - own - seen - 2 * once
    agreement = both / (seen * (folds - 2)) if folds > 2 else once / (seen * own).sqrt()
    # Less than 0.01 is noise of far too few samples, and the errors of a drift are divided by it.
    agreement = agreement.nan_to_num(nan=1.0).clamp(0.01, 1)
    return agreement / (folds - 1 - (folds - 2) * agreement)


_CONSTANT = 1e-12
"""Share of squares below which single precision does not tell them from 0."""

_ROUNDING = 1e-6
"""Shares of variance that states in single precision do not tell from 0."""


def beyond_error(drift: Tensor, stderr: Tensor, freedom: int) -> Tensor:
    """Return which drifts are above 0 beyond error; at most 5 % of them wrongly.

    Each is held against Student's t, and the p-values of all components against the line of Benjamini
    and Hochberg. Where nothing changed, no component at all is marked in 95 % of the networks.

    References:
        Benjamini & Hochberg (1995), J. R. Stat. Soc. B 57, 289-300.
    """
    from scipy.special import stdtr  # most of a second to import

    known = torch.isfinite(drift) & torch.isfinite(stderr)
    t = (drift - _ROUNDING) / stderr.clamp_min(torch.finfo(torch.float64).tiny)
    p = torch.where(known, torch.from_numpy(stdtr(freedom, -t.numpy())), 1.0)
    ordered, order = p.sort()
    rank = torch.arange(1, len(p) + 1, dtype=torch.float64, device="cpu")
    line = 0.05 * rank / max(1, int(known.sum()))
    below = (ordered <= line).nonzero()
    changed = torch.zeros(len(p), dtype=torch.bool, device="cpu")
    if len(below):
        changed[order[: int(below[-1]) + 1]] = True
    return changed
