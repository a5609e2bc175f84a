"""Old operators against new states: explicit regressions on explicit folds, in NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from oracles import Array, ridge
from scipy import stats
from torch import Tensor

from lightning_koopman.koopman.moments import Layout, accumulate
from lightning_koopman.koopman.reference import (
    RIDGE,
    Shares,
    beyond_error,
    fold_operators,
    unexplained,
)

FOLDS = 4


def moments_of(
    layout: Layout, states: Sequence[Array], folds: Array, center: Sequence[Tensor]
) -> Tensor:
    moments = layout.zeros()
    tensors = [torch.from_numpy(state) for state in states]
    accumulate(layout, moments, tensors, torch.from_numpy(folds), center)
    return moments


def shares_of(
    layout: Layout, old: Sequence[Array], new: Sequence[Array], old_folds: Array, new_folds: Array
) -> Shares:
    center = [torch.from_numpy(state.mean(0)) + 0.3 for state in old]
    reference = fold_operators(layout, moments_of(layout, old, old_folds, center), center)[:2]
    moments = moments_of(layout, new, new_folds, center)
    fitted, *_ = fold_operators(layout, moments, center)
    return unexplained(layout, moments, center, *reference, len(old[0]), fitted)


def chain(
    rng: np.random.Generator, n: int, widths: Sequence[int] = (4, 5, 3), shift: float = 0.0
) -> list[Array]:
    """States that each depend on those before, not quite linearly."""
    weights = np.random.default_rng(1)
    states = [rng.normal(size=(n, widths[0])) + shift]
    for width in widths[1:]:
        read = np.concatenate(states[-2:], axis=1)
        made = np.tanh(read @ weights.normal(size=(read.shape[1], width)) / 2) + 2
        states.append(made + 0.3 * rng.normal(size=made.shape))
    return states


class Affine:
    """Ridge regression with an intercept."""

    def __init__(self, x: Array, y: Array) -> None:
        self.matrix, self.x, self.y = ridge(x, y, RIDGE), x.mean(0), y.mean(0)

    def __call__(self, x: Array) -> Array:
        return self.y + (x - self.x) @ self.matrix


def lasting(operators: Sequence[Affine], x: Array, y: Array, folds: Array) -> float:
    """The share of held-out errors that very many samples would leave, pair by pair of operators."""
    residuals = [y - operator(x) for operator in operators]
    count, products, squares = len(operators), 0.0, 0.0
    for g, h in itertools.permutations(range(count), 2):
        # Both saw the sample; with two folds, one did.
        chosen = (folds != g) & (folds != h) if count > 2 else folds != g
        products += (residuals[g][chosen] * residuals[h][chosen]).sum() / max(1, count - 2)
    for g in range(count):
        squares += (residuals[g][folds != g] ** 2).sum()
    if count == 2:
        squares = (squares * sum((residuals[g][folds == g] ** 2).sum() for g in range(2))) ** 0.5
    agreement = min(max(products / squares, 0.01), 1.0)
    return agreement / (count - 1 - (count - 2) * agreement)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("delay", "links"), [(1, ()), (2, ()), (1, ((0,), (1, 0)))])
def test_shares_and_errors_are_those_of_explicit_regressions_on_explicit_folds(
    rng: np.random.Generator, delay: int, links: tuple[tuple[int, ...], ...], count: int
) -> None:
    old, new = chain(rng, 24), chain(rng, 120, shift=0.4)
    new[1] += 0.5
    old_folds, new_folds = np.arange(24) % count, rng.integers(0, count, 120)
    if count > 2 and delay > 1:
        # A fold of a single sample counts as the others do.
        new_folds[np.flatnonzero(new_folds == 3)[1:]] = 0
    layout = Layout((4, 5, 3), count, delay, links)
    found, most = shares_of(layout, old, new, old_folds, new_folds), 0.0
    for i, read in ((1, (0,)), (2, layout.parents[2])):
        assert len(read) == (1 if layout.parents[2] == (1,) or i == 1 else 2)
        x, y = np.concatenate([new[p] for p in read], axis=1), new[i]
        old_x, old_y = np.concatenate([old[p] for p in read], axis=1), old[i]
        before = [Affine(old_x[old_folds != f], old_y[old_folds != f]) for f in range(count)]
        now = [Affine(x[new_folds != f], y[new_folds != f]) for f in range(count)]
        squares = np.zeros((count, 3))
        for f in range(count):
            inside = new_folds == f
            fits = (before[f](x[inside]), now[f](x[inside]), y[~inside].mean(0))
            squares[f] = [((y[inside] - fit) ** 2).sum() for fit in fits]
        kept = np.array([lasting(each, x, y, new_folds) for each in (before, now)])
        assert ((kept > 0.3) & (kept < 1)).all()
        value = kept * squares[:, :2].sum(0) / squares[:, 2].sum()
        without = squares.sum(0) - squares
        rest = (kept * without[:, :2] / without[:, 2:]) @ [1, -1]
        # The jackknife of folds of unequal size (Busing et al. 1999).
        h = 120 / np.bincount(new_folds)
        drift = value @ [1, -1]
        pseudo = h * drift - (h - 1) * rest
        centre = count * drift - ((1 - 1 / h) * rest).sum()
        jackknife = (((pseudo - centre) ** 2) / (h - 1)).mean()
        weight = RIDGE * x.var(0).mean() * (1 / kept[0] - 1 / kept[1])
        size = (np.mean([fit.matrix for fit in now], axis=0) ** 2).sum()
        # The reference has 24 samples.
        shrunk = (1 - 24 / 120) * 120 * weight * size / squares[:, 2].sum()
        whole = np.array([[((y - fit(x)) ** 2).sum() for fit in fits] for fits in (before, now)])
        whole *= kept[:, None]
        apart = (whole[0] - whole[1]) / squares[:, 2].sum()
        chance = (count - 1) / count * ((apart - apart.mean()) ** 2).sum()
        assert [float(found.old[i - 1]), float(found.new[i - 1])] == pytest.approx(value, abs=1e-6)
        stderr = (jackknife + chance + shrunk**2) ** 0.5
        assert float(found.stderr[i - 1]) == pytest.approx(stderr, rel=1e-5)
        most = max(most, shrunk / stderr)
    assert found.freedom == count - 1
    # Else the errors would not show it.
    assert most > 5e-3


def test_a_fold_without_new_samples_leaves_its_old_operator_one_that_sees_all(
    rng: np.random.Generator,
) -> None:
    (old_x, old_y), (x, y) = ([s[0], s[1]] for s in (chain(rng, 90, (4, 5)), chain(rng, 60, (4, 5))))
    old_folds, folds = np.arange(90) % FOLDS, np.arange(60) % (FOLDS - 1)
    found = shares_of(Layout((4, 5), FOLDS), [old_x, old_y], [x, y], old_folds, folds)
    before = [Affine(old_x[old_folds != f], old_y[old_folds != f]) for f in range(FOLDS)]
    now = [Affine(x[folds != f], y[folds != f]) for f in range(FOLDS - 1)]
    squares = np.zeros(3)
    for f in range(FOLDS - 1):
        inside = folds == f
        fits = (before[f](x[inside]), now[f](x[inside]), y[~inside].mean(0))
        squares += [((y[inside] - fit) ** 2).sum() for fit in fits]
    expected = [lasting(each, x, y, folds) * e for each, e in zip((before, now), squares, strict=False)]
    shares = [float(found.old[0]), float(found.new[0])]
    assert shares == pytest.approx(np.array(expected) / squares[2], abs=1e-6)
    assert found.freedom == FOLDS - 2
    assert np.isfinite(found.stderr).all()


@pytest.mark.parametrize(("n_old", "n_new"), [(60, 600), (600, 60), (200, 200)])
def test_on_other_samples_drift_is_zero_in_the_mean_however_many_they_are(
    n_old: int, n_new: int
) -> None:
    rng, drifts = np.random.default_rng(3), []
    for _ in range(40):
        folds = [np.arange(n) % FOLDS for n in (n_old, n_new)]
        found = shares_of(Layout((4, 5, 3), FOLDS), chain(rng, n_old), chain(rng, n_new), *folds)
        drifts.append((found.old - found.new).numpy())
    mean, error = np.mean(drifts, 0), np.std(drifts, 0) / 40**0.5
    assert (np.abs(mean) < 4 * error + 0.003).all()


@pytest.mark.parametrize(("n_old", "n_new"), [(40, 40), (60, 60), (60, 500), (500, 60)])
def test_few_samples_leave_the_share_that_is_noise(n_old: int, n_new: int) -> None:
    # By construction: 24 variables through an orthogonal matrix, and noise of a third of the variance.
    rng, count, width = np.random.default_rng(5), 5, 24
    weights = np.linalg.qr(rng.normal(size=(width, width)))[0]
    found = []
    for _ in range(40):
        x = [rng.normal(size=(n, width)) for n in (n_old, n_new)]
        old, new = ([z, z @ weights + rng.normal(size=z.shape) / 2**0.5] for z in x)
        folds = [np.arange(n) % count for n in (n_old, n_new)]
        shares = shares_of(Layout((width, width), count), old, new, *folds)
        found.append([float(shares.old[0]), float(shares.new[0])])
    mean, error = np.mean(found, 0), np.std(found, 0) / 40**0.5
    # The ridge leaves up to .01 more.
    assert np.abs(mean - 1 / 3).max() < 0.02 + 4 * error.max()
    assert abs(mean[0] - mean[1]) < 0.01 + 4 * error.max()


def test_a_component_that_only_moved_its_mean_has_drifted(rng: np.random.Generator) -> None:
    old, new = chain(rng, 300), chain(rng, 300)
    new[2] += 1.0
    folds = np.arange(300) % FOLDS
    found = shares_of(Layout((4, 5, 3), FOLDS), old, new, folds, folds)
    drift = found.old - found.new
    assert beyond_error(drift, found.stderr, found.freedom).tolist() == [False, True]
    # A shift of 1 in each of three units, over their variance.
    assert float(drift[1]) == pytest.approx(3 / new[2].var(0).sum(), rel=0.1)


def test_a_constant_state_has_no_share_and_no_mark(rng: np.random.Generator) -> None:
    states, folds = chain(rng, 100), np.arange(100) % FOLDS
    constant = [states[0], np.ones_like(states[1]), states[2]]
    found = shares_of(Layout((4, 5, 3), FOLDS), constant, constant, folds, folds)
    assert np.isnan(found.old[0])
    assert not beyond_error(found.old - found.new, found.stderr, found.freedom)[0]


@pytest.mark.parametrize("noise", [0.0, 1e-8], ids=["exact", "rounding"])
def test_an_output_that_no_longer_varies_is_marked_and_what_reads_it_is_not(
    rng: np.random.Generator, noise: float
) -> None:
    states, folds = chain(rng, 100), np.arange(100) % FOLDS
    # The old operators miss the constant by what the state was away from it. With rounding, one sample
    # in a fold of its own differs, as another kernel makes the last batch differ.
    dead = [np.full_like(states[1], 2.0), np.full_like(states[2], -1.0)]
    dead[0][7] += noise
    found = shares_of(Layout((4, 5, 3), FOLDS), states, [states[0], *dead], folds, folds)
    drift = found.old - found.new
    assert float(drift[0]) == pytest.approx(1e12)
    assert np.isnan(drift[1])
    assert beyond_error(drift, found.stderr, found.freedom).tolist() == [True, False]


def test_a_constant_that_moved_by_rounding_alone_is_not_marked(rng: np.random.Generator) -> None:
    states, folds = chain(rng, 100), np.arange(100) % FOLDS
    constant = [states[0], np.full_like(states[1], 2.0), states[2]]
    moved = [states[0], np.full_like(states[1], 2.0 * (1 + 1e-7)), states[2]]
    found = shares_of(Layout((4, 5, 3), FOLDS), constant, moved, folds, folds)
    assert not beyond_error(found.old - found.new, found.stderr, found.freedom)[0]


@pytest.mark.parametrize("beside", [0, 1], ids=["alone", "but for one, which no operator is fitted to"])
def test_samples_in_one_fold_alone_are_too_few(rng: np.random.Generator, beside: int) -> None:
    states = chain(rng, 100)
    folds, alone = np.arange(100) % FOLDS, np.array([0, 0, 0, 0, beside])
    few = [state[:5] for state in states]
    with pytest.raises(
        ValueError, match="5 samples arrived, all in one fold; take more, of differing inputs"
    ):
        shares_of(Layout((4, 5, 3), FOLDS), states, few, folds, alone)


def test_marks_are_those_of_benjamini_and_hochberg(rng: np.random.Generator) -> None:
    for _ in range(20):
        drift, stderr = rng.normal(size=12) * 3, rng.uniform(0.2, 1.0, 12)
        marks = beyond_error(torch.from_numpy(drift), torch.from_numpy(stderr), 4)
        p = stats.false_discovery_control(stats.t.sf(drift / stderr, 4))
        assert marks.tolist() == (p <= 0.05).tolist()
    unknown = torch.tensor([torch.nan, 1.0], dtype=torch.float64)
    assert beyond_error(unknown, torch.full((2,), 1e-3, dtype=torch.float64), 4).tolist() == [
        False,
        True,
    ]


def test_rounding_is_no_change() -> None:
    drift = torch.tensor([1e-7, 1e-3], dtype=torch.float64)
    assert beyond_error(drift, torch.full((2,), 1e-10, dtype=torch.float64), 4).tolist() == [False, True]
