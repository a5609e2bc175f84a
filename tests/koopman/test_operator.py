"""Koopman operators against SciPy's least squares, explicit ridge and explicit folds."""

from __future__ import annotations

from functools import partial

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from lightning_koopman.koopman.operator import KoopmanOperator, fit_operator
from lightning_koopman.koopman.regression import (
    RIDGE_GRID,
    check_tikhonov,
    held_out_errors,
    solve,
    spectrum,
)
from lightning_koopman.koopman.states import sample_keys

SHAPES = [(200, 5, 3), (200, 3, 8), (60, 12, 12), (40, 1, 1)]


def noisy_pair(n: int, d_in: int, d_out: int, seed: int, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator, dtype=torch.float64) + 2
    weight = torch.randn(d_in, d_out, generator=generator, dtype=torch.float64)
    y = x @ weight + noise * torch.randn(n, d_out, generator=generator, dtype=torch.float64) - 1
    return x, y


def relu_pair(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Snapshots with dead, duplicate and constant units, as ReLU layers give them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.relu(torch.randn(n, 6, generator=generator, dtype=torch.float64))
    x = torch.cat(
        [hidden, hidden[:, :2], torch.zeros(n, 3).double(), torch.full((n, 1), 0.3).double()], 1
    )
    y = torch.tanh(hidden @ torch.randn(6, 4, generator=generator, dtype=torch.float64))
    return x, y


def fold_of(x: Tensor, folds: int = 5, seed: int = 0) -> np.ndarray:
    return (sample_keys(x, seed) % folds).numpy()


@pytest.mark.parametrize("tikhonov", [0.0, 1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_operator_is_that_of_gelsd_or_of_the_normal_equations(
    shape: tuple[int, int, int], seed: int, tikhonov: float
) -> None:
    x, y = noisy_pair(*shape, seed)
    order = torch.randperm(len(x))
    for operator in (
        fit_operator(x, y, tikhonov=tikhonov),
        fit_operator(x[order], y[order], tikhonov=tikhonov),
        fit_operator(x, y, tikhonov=tikhonov, folds=None),
    ):
        expected = oracles.ridge(x.numpy(), y.numpy(), tikhonov)
        assert np.allclose(operator.matrix.numpy(), expected, rtol=0, atol=1e-10)
        assert (operator.rank, operator.tikhonov) == (shape[1], tikhonov)
        condition = np.linalg.cond(x.numpy() - x.numpy().mean(0)) ** 2
        assert operator.condition == pytest.approx(condition, rel=1e-8)
    assert np.isnan(operator.r2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_rank_deficient_snapshots_it_is_the_minimum_norm_solution(seed: int) -> None:
    x, y = relu_pair(300, seed)
    operator = fit_operator(x, y, tikhonov=0.0)
    assert np.allclose(
        operator.matrix.numpy(), oracles.least_squares(x.numpy(), y.numpy()), rtol=0, atol=1e-10
    )
    assert operator.rank == 6
    r2 = oracles.held_out_r2(x.numpy(), y.numpy(), fold_of(x), oracles.least_squares)
    assert operator.r2 == pytest.approx(r2, abs=1e-10)
    # Duplicates share the weight evenly, dead and constant units get none.
    assert torch.allclose(operator.matrix[:2], operator.matrix[6:8], rtol=0, atol=1e-10)
    assert not operator.matrix[8:].any()


@pytest.mark.parametrize("folds", [None, 5])
@pytest.mark.parametrize("dead", [0, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_wide_relu_snapshots_leave_the_residual_of_gelsd(
    dead: int, seed: int, folds: int | None
) -> None:
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.standard_normal((1500, 170)), 0)
    y = np.maximum(x @ rng.standard_normal((170, 140)) / 13 - 0.5, 0)
    if dead:
        x[:, :dead], x[:, 100:110] = 0, x[:, 60:70]
    operator = fit_operator(torch.from_numpy(x), torch.from_numpy(y), tikhonov=0.0, folds=folds)
    centred = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(centred[1] - centred[0] @ oracles.least_squares(x, y))
    residual = np.linalg.norm(centred[1] - centred[0] @ operator.matrix.numpy())
    assert residual == pytest.approx(expected, rel=1e-9)
    assert operator.rank == (140 if dead else 170)


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e9, 1e11])
def test_cholesky_and_the_eigenbasis_give_one_solution(condition: float) -> None:
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    c_xx = turn @ torch.diag(torch.logspace(0, -np.log10(condition), 8).double()) @ turn.T
    expected = torch.randn(8, 3, dtype=torch.float64)
    for tikhonov in (0.0, 1e-3):
        c_xy = c_xx @ expected + tikhonov * c_xx.diagonal().mean() * expected
        given = solve(c_xx, c_xy, tikhonov)
        assert torch.allclose(given, expected, rtol=0, atol=1e-14 * condition)
        assert torch.allclose(
            given, spectrum(c_xx, c_xy).matrix(tikhonov), rtol=0, atol=1e-14 * condition
        )


def test_units_without_variance_get_no_weight() -> None:
    c_xx = torch.diag(torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64))
    c_xy = torch.tensor([[1.0], [0.0], [3.0]], dtype=torch.float64)
    given = solve(c_xx, c_xy, 0.0)
    assert torch.allclose(given, torch.tensor([[0.5], [0.0], [3.0]]).double(), rtol=1e-15, atol=0)
    assert given[1] == 0
    assert not solve(torch.zeros(3, 3).double(), torch.zeros(3, 1).double(), 0.0).any()


@pytest.mark.parametrize("tikhonov", [0.0, 0.1])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_limited_rank_gives_reduced_rank_regression(rank: int, tikhonov: float) -> None:
    x, y = noisy_pair(150, 5, 4, 3)
    operator = fit_operator(x, y, tikhonov=tikhonov, rank=rank)
    expected = oracles.reduced_rank(x.numpy(), y.numpy(), rank, tikhonov)
    assert np.allclose(operator.matrix.numpy(), expected, rtol=0, atol=1e-9)
    assert np.linalg.matrix_rank(operator.matrix.numpy(), tol=1e-9) == rank
    assert operator.rank == rank


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("tikhonov", [0.0, 0.01])
@pytest.mark.parametrize("folds", [2, 5, 8, 100])
def test_r2_is_held_out_fold_by_fold(folds: int, tikhonov: float, rank: int | None) -> None:
    x, y = noisy_pair(80, 5, 4, 1)  # into 100 folds, so that no row falls into some
    operator = fit_operator(x, y, tikhonov=tikhonov, rank=rank, folds=folds)
    fit = (
        partial(oracles.ridge, tikhonov=tikhonov)
        if rank is None
        else partial(oracles.reduced_rank, rank=rank, tikhonov=tikhonov)
    )
    expected = oracles.held_out_r2(x.numpy(), y.numpy(), fold_of(x, folds), fit)
    assert operator.r2 == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("folds", [None, 5])
@pytest.mark.parametrize("noise", [5.0, 1e-2, 1e-3])
def test_the_ridge_weight_at_most_doubles_the_error_expected_on_other_data(
    noise: float, folds: int | None
) -> None:
    x, y = noisy_pair(60, 20, 3, 0, noise=noise)
    operator = fit_operator(x, y, folds=folds)
    expected = oracles.doubling_ridge(x.numpy(), y.numpy(), RIDGE_GRID)
    assert operator.tikhonov == pytest.approx(expected, rel=1e-6)
    assert (operator.tikhonov == RIDGE_GRID[-1]) == (noise > 1)
    solved = fit_operator(x, y, tikhonov=operator.tikhonov)
    assert torch.allclose(operator.matrix, solved.matrix, rtol=0, atol=1e-9)


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_linear_gaussian_pair_has_the_r2_of_theory(noise: float, seed: int) -> None:
    n, d_in, d_out = 4000, 6, 4
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((d_in, d_out))
    x = rng.standard_normal((n, d_in))
    y = x @ weight + noise * rng.standard_normal((n, d_out))
    signal = (weight**2).sum()
    theory = signal / (signal + d_out * noise**2)
    operator = fit_operator(torch.from_numpy(x), torch.from_numpy(y))
    assert operator.r2 == pytest.approx(
        theory, abs=4 * (1 - theory) * (2 / n) ** 0.5 + (1 - theory) * 2 * d_in / n
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_noiseless_pair_is_recovered_exactly(shape: tuple[int, int, int]) -> None:
    x, y = noisy_pair(*shape, 0, noise=0.0)
    operator = fit_operator(x, y)
    assert operator.r2 == pytest.approx(1, abs=1e-9)
    assert torch.allclose(operator.predict(x), y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("exponent", [-30, -15, 15, 30])
def test_affine_maps_of_the_inputs_leave_r2_as_it_is(exponent: int, seed: int) -> None:
    x, y = noisy_pair(100, 6, 3, seed)
    shift = torch.randn(6, dtype=torch.float64)
    scale = 10.0**exponent
    given, moved = fit_operator(x, y), fit_operator(scale * (x + shift), y)
    # The folds follow the rows' bits, so they differ: compare on one and the same split.
    folds = fold_of(scale * (x + shift))
    expected = oracles.held_out_r2(
        x.numpy(), y.numpy(), folds, partial(oracles.ridge, tikhonov=moved.tikhonov)
    )
    assert moved.r2 == pytest.approx(expected, abs=1e-9)
    assert moved.rank == given.rank
    same = fit_operator(x, y, tikhonov=moved.tikhonov)
    assert torch.allclose(moved.singular_values * scale, same.singular_values, rtol=1e-9)
    assert moved.condition == pytest.approx(same.condition, rel=1e-6)
    assert torch.allclose(moved.predict(scale * (x + shift)), same.predict(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("exponent", [-470, -300, 300, 490])
def test_the_ridge_weight_is_that_of_other_units_however_large_or_small(exponent: int) -> None:
    x, _ = noisy_pair(100, 6, 3, 0)
    for y in (x[:, :3], x[:, :3] + 0.003 * torch.sin(3 * x[:, 3:])):
        given, moved = fit_operator(x, y), fit_operator(x * 2.0**exponent, y * 2.0**exponent)
        assert given.tikhonov < 1e-2
        assert moved.tikhonov == pytest.approx(given.tikhonov, rel=1e-6)
        assert torch.allclose(moved.matrix, given.matrix, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_logabsdet_is_slogdet_of_a_square_operator(seed: int) -> None:
    x, y = noisy_pair(100, 5, 5, seed)
    operator = fit_operator(x, y, tikhonov=0.0)
    assert operator.logabsdet == pytest.approx(np.linalg.slogdet(operator.matrix.numpy())[1], abs=1e-10)
    values = np.linalg.svd(operator.matrix.numpy(), compute_uv=False)
    assert np.allclose(operator.singular_values.numpy(), values, rtol=1e-12)


def test_singular_values_count_above_a_share_of_the_largest_alone() -> None:
    def logabsdet(*values: float) -> float:
        k = len(values)
        return KoopmanOperator(
            torch.diag(torch.tensor(values).double()), torch.zeros(k), torch.zeros(k), 1.0, 0.0, k, 1.0
        ).logabsdet

    assert logabsdet(10.0, 5.0, 1.2e-7) == pytest.approx(np.log(6e-6), rel=1e-6)
    assert logabsdet(10.0, 5.0, 0.8e-7) == pytest.approx(np.log(50), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e8 / 3])
@pytest.mark.parametrize("n", [20, 513])
def test_a_constant_target_has_no_r2_and_no_volume(value: float, n: int) -> None:
    x, _ = noisy_pair(n, 4, 1, 0)
    operator = fit_operator(x, torch.full((n, 2), value, dtype=torch.float64))
    assert np.isnan(operator.r2)
    assert not operator.matrix.any()
    assert operator.logabsdet == -np.inf
    assert torch.allclose(operator.predict(x), torch.tensor(value, dtype=torch.float64), rtol=1e-15)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3])
def test_constant_regressors_explain_nothing(value: float) -> None:
    _, y = noisy_pair(513, 4, 2, 0)
    x = torch.full((513, 3), value, dtype=torch.float64)
    x[:, 0] += torch.arange(513) % 2 * 1e-300  # distinct rows, so that there are folds
    operator = fit_operator(x, y)
    assert operator.rank == 0
    assert operator.condition == 1
    assert not operator.matrix.any()
    assert np.isnan(operator.r2) or operator.r2 <= 0


def test_two_samples_leave_nothing_to_hold_out() -> None:
    x, y = noisy_pair(2, 3, 2, 0)
    operator = fit_operator(x, y, tikhonov=0.0)
    assert np.isnan(operator.r2)
    assert np.isnan(fit_operator(x, y).r2)
    assert torch.allclose(operator.predict(x), y, rtol=0, atol=1e-9)


def test_rows_of_equal_content_are_never_held_out_from_their_copies() -> None:
    x = torch.randn(40, 30, dtype=torch.float64)
    y = torch.randn(40, 2, dtype=torch.float64)
    once = fit_operator(x, y, tikhonov=1e-3)
    copied = fit_operator(x.repeat(3, 1), y.repeat(3, 1), tikhonov=1e-3)
    # Random splits of copies would make pure noise look predictable.
    assert copied.r2 == pytest.approx(once.r2, abs=1e-9)
    assert once.r2 < 0


def test_single_precision_snapshots_are_fitted_in_double() -> None:
    x, y = noisy_pair(100, 5, 3, 0)
    operator = fit_operator(x.float(), y.float(), tikhonov=0.0)
    assert operator.matrix.dtype == torch.float64
    expected = oracles.least_squares(x.float().double().numpy(), y.float().double().numpy())
    assert np.allclose(operator.matrix.numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [12, 60])
def test_errors_in_sample_and_on_other_data_equal_the_explicit_sums(n: int) -> None:
    x, y = noisy_pair(n + 20, 11, 3, 0)
    x, y = x - x[:n].mean(0), y - y[:n].mean(0)
    problem = spectrum(x[:n].T @ x[:n] / n, x[:n].T @ y[:n] / n)
    test_x, test_y, variance = x[n:], y[n:], float(y[:n].square().sum() / n)
    given = problem.residual([0.0, 0.3], variance)
    for tikhonov, error in zip([0.0, 0.3], given.tolist(), strict=True):
        matrix = problem.matrix(tikhonov)
        explicit = float((y[:n] - x[:n] @ matrix).square().sum() / n)
        assert error == pytest.approx(explicit, rel=1e-10, abs=1e-12)
        other = held_out_errors(
            matrix, test_x.T @ test_x / 20, test_x.T @ test_y / 20, test_y.square().sum() / 20
        )
        left = float((test_y - test_x @ matrix).square().sum() / 20)
        assert other.tolist() == [pytest.approx(left, rel=1e-10)]
    errors = problem.expected_error(variance, n).tolist()
    expected = [oracles.expected_error(x[:n].numpy(), y[:n].numpy(), t) for t in RIDGE_GRID[17:]]
    assert errors[17:] == pytest.approx(expected, rel=1e-6)
    # Without a ridge, as many directions and a mean as there are samples leave nothing to tell.
    assert (errors[0] == np.inf) == (n == 12)


def test_predict_refuses_another_width() -> None:
    operator = fit_operator(*noisy_pair(50, 4, 2, 0))
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\); expected \(n_samples, 4\)"):
        operator.predict(torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"x has shape \(4,\); expected"):
        operator.predict(torch.ones(4))


def test_bad_input_is_refused_with_what_arrived() -> None:
    x, y = noisy_pair(20, 4, 3, 0)
    with pytest.raises(ValueError, match=r"x has shape \(20, 4\) and y \(19, 3\)"):
        fit_operator(x, y[:-1])
    with pytest.raises(ValueError, match=r"x has shape \(20,\) and y \(20, 3\)"):
        fit_operator(x[:, 0], y)
    with pytest.raises(ValueError, match="1 of at least 2 samples arrived for an operator"):
        fit_operator(x[:1], y[:1])
    with pytest.raises(ValueError, match="0 of at least 2 samples arrived"):
        fit_operator(x[:0], y[:0])
    with pytest.raises(ValueError, match=r"rank is 4; for a \(4, 3\) operator it lies between 1 and 3"):
        fit_operator(x, y, rank=4)
    with pytest.raises(ValueError, match="rank is 0"):
        fit_operator(x, y, rank=0)
    with pytest.raises(ValueError, match="folds is 1; held-out R² needs at least 2"):
        fit_operator(x, y, folds=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["x", "y"])
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    data = dict(zip("xy", noisy_pair(20, 4, 3, 0), strict=True))
    data[name][3, 1] = value
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity; remove those rows"):
        fit_operator(**data)


@pytest.mark.parametrize("tikhonov", [-1.0, float("nan"), float("inf")])
def test_a_ridge_weight_must_be_finite_and_not_negative(tikhonov: float) -> None:
    with pytest.raises(
        ValueError, match=f"tikhonov is {tikhonov}; it must be a finite number, 0 or above"
    ):
        check_tikhonov(tikhonov)
    with pytest.raises(ValueError, match="tikhonov is"):
        fit_operator(torch.ones(3, 2), torch.ones(3, 2), tikhonov=tikhonov)
