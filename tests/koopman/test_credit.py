"""Credits, their error bars and the fitted chain, against dense NumPy computations fold by fold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from scipy.stats import t as student
from torch import Tensor

from lightning_koopman.koopman import chain, regression
from lightning_koopman.koopman.chain import fit_steps, split_chain
from lightning_koopman.koopman.credit import (
    QUANTITIES,
    Credits,
    compute_credits,
    samples_needed,
    unseen_shifts,
)
from lightning_koopman.koopman.moments import Layout, accumulate
from lightning_koopman.koopman.options import Options
from lightning_koopman.koopman.regression import RIDGE_GRID, choose_ridge, is_settled, solve

WIDTHS = [(5, 5, 5), (7, 4, 6, 5), (3, 9, 12, 8), (12, 10, 3, 10, 8)]


def linear_states(
    widths: Sequence[int], n: int = 400, seed: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weights of a linear chain and the states that flow through it."""
    rng = np.random.default_rng(seed)
    weights = [rng.standard_normal((a, b)) / np.sqrt(a) for a, b in itertools.pairwise(widths)]
    biases = [rng.standard_normal(b) for b in widths[1:]]
    states = [rng.standard_normal((n, widths[0])) + 1]
    for weight, bias in zip(weights, biases, strict=True):
        states.append(states[-1] @ weight + bias)
    return weights, states


def tanh_states(
    widths: Sequence[int], n: int = 400, seed: int = 0, noise: float = 0.0
) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    states = [rng.standard_normal((n, widths[0])) + 0.3]
    for a, b in itertools.pairwise(widths):
        states.append(np.tanh(states[-1] @ rng.standard_normal((a, b)) / np.sqrt(a)))
        states[-1] += noise * rng.standard_normal(states[-1].shape)
    return states


def summed(
    states: Sequence[np.ndarray],
    folds: int | np.ndarray = 5,
    delay: int = 1,
    links: tuple[tuple[int, ...], ...] = (),
) -> tuple[Layout, Tensor]:
    """Moments of all samples."""
    fold_of = np.arange(len(states[0])) % folds if isinstance(folds, int) else folds
    layout = Layout(tuple(x.shape[1] for x in states), int(fold_of.max()) + 1, delay, links)
    moments = layout.zeros()
    accumulate(layout, moments, [torch.from_numpy(x) for x in states], torch.from_numpy(fold_of))
    return layout, moments


def run(
    states: Sequence[np.ndarray],
    *,
    folds: int | np.ndarray = 5,
    delay: int = 1,
    links: tuple[tuple[int, ...], ...] = (),
    center: Sequence[Tensor] | None = None,
    **options: Any,
) -> Credits:
    """Credits of all samples at once; folds by row number unless given."""
    layout, moments = summed(states, folds, delay, links)
    return compute_credits(layout, moments, Options(**options), center=center)


def assert_same(
    given: Credits, other: Credits, names: Sequence[str] = QUANTITIES, atol: float = 1e-9
) -> None:
    for name in names:
        assert torch.allclose(
            given.values[name], other.values[name], rtol=0, atol=atol, equal_nan=True
        ), name
        assert torch.allclose(
            given.stderr[name], other.stderr[name], rtol=0, atol=atol, equal_nan=True
        ), name
    assert given.total == pytest.approx(other.total, abs=atol, nan_ok=True)


# Linear chains: everything is known.


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("widths", [*WIDTHS, (6, 5, 4, 4), (8, 3, 2)], ids=str)
def test_a_linear_chain_has_its_weights_and_the_volumes_of_their_product(
    widths: tuple[int, ...], seed: int
) -> None:
    weights, states = linear_states(widths, seed=seed)
    credits, rank = run(states, tikhonov=0.0), min(widths)
    outputs = oracles.pod(states[-1], rank)
    assert credits.alignment.rank == rank
    total = oracles.log_volume(oracles.dense_product([*weights, outputs]))
    assert credits.total * rank == pytest.approx(total, abs=1e-8)
    if len(set(widths)) == 1:
        expected = np.linalg.slogdet(oracles.dense_product(weights))[1]
        assert credits.total * rank == pytest.approx(expected, abs=1e-8)
    for i, (before, after, operator) in enumerate(
        zip(states, states[1:], credits.operators, strict=False)
    ):
        predicted = operator.predict(torch.from_numpy(before)).numpy()
        assert np.allclose(predicted, after, rtol=0, atol=1e-8)
        if min(widths[: i + 1]) == widths[i]:  # the state spans its space, which identifies the weights
            assert np.allclose(operator.matrix.numpy(), weights[i], rtol=0, atol=1e-8)
        if i and min(widths[: i + 1]) == widths[i]:
            volume = oracles.log_volume(oracles.dense_product([*weights[i:], outputs]))
            assert float(credits.values["credit"][i - 1]) * rank == pytest.approx(volume, abs=1e-8)
    # The default finds no need of a ridge, and nothing nonlinear.
    credits = run(states)
    assert [operator.tikhonov for operator in credits.operators] == [0] * len(weights)
    assert float(credits.values["nonlinearity"].abs().max()) < 1e-9
    assert float((1 - credits.values["chain_r2"]).abs().max()) < 1e-9
    expected = [oracles.effective_rank(state) for state in states[1:]]
    assert credits.values["rank"].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("normalize", ["none", "rms", "whiten"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_gains_sum_to_the_total(widths: tuple[int, ...], seed: int, normalize: Any) -> None:
    credits = run(tanh_states(widths, seed=seed), normalize=normalize)
    assert float(credits.values["gain"].sum()) == pytest.approx(credits.total, abs=1e-9)
    assert credits.alignment.rank == min(widths)
    assert torch.allclose(credits.volumes.mean(1), credits.values["credit"], rtol=0, atol=1e-12)
    gains = [torch.linalg.slogdet(k).logabsdet / len(k) for k in credits.alignment.operators]
    assert torch.allclose(torch.stack(gains), credits.values["gain"], rtol=0, atol=1e-9)
    assert not credits.values["credit"][-1:].any()


# Every number against loops in NumPy.


@pytest.mark.parametrize("tikhonov", [0.0, 1e-2])
@pytest.mark.parametrize(("rank", "folds"), [(1, 2), (2, 5), (4, "uneven"), (4, "gap")])
def test_all_numbers_are_those_of_dense_jacobians_and_explicit_folds(
    rank: int, folds: int | str, tikhonov: float
) -> None:
    states = tanh_states((6, 8, 5, 4), n=203, noise=0.1)
    fold_of = np.arange(203) % folds if isinstance(folds, int) else np.arange(203) ** 2 % 7 % 4
    # A fold without samples counts as absent.
    dealt = np.array([0, 1, 3, 4])[fold_of] if folds == "gap" else fold_of
    credits = run(states, folds=dealt, tikhonov=tikhonov, rank=rank)
    fit = partial(oracles.ridge, tikhonov=tikhonov)
    expected = oracles.credits(states, rank, fit)
    for name in ("credit", "gain", "sensitivity"):
        assert np.allclose(credits.values[name].numpy(), expected[name], rtol=0, atol=1e-9), name
    assert credits.total == pytest.approx(float(expected["total"]), abs=1e-9)
    for i in range(1, 4):
        r2 = oracles.held_out_r2(states[i - 1], states[i], fold_of, fit)
        assert float(credits.values["r2"][i - 1]) == pytest.approx(r2, abs=1e-10)
        assert float(credits.values["nonlinearity"][i - 1]) == pytest.approx(1 - r2, abs=1e-10)
        errors, totals = oracles.chain_fold_errors(states, i, fold_of, fit)
        chain_r2 = 1 - errors.sum() / totals.sum()
        assert float(credits.values["chain_r2"][i - 1]) == pytest.approx(chain_r2, abs=1e-10)
    for numbers in (credits.values, credits.stderr):
        for name in QUANTITIES:
            assert (numbers[name].dtype, numbers[name].shape) == (torch.float64, (3,)), name
            assert bool(torch.isfinite(numbers[name]).all()), name
    if folds == "gap":
        assert_same(credits, run(states, folds=fold_of, tikhonov=tikhonov, rank=rank))


@pytest.mark.parametrize("tikhonov", [None, 1e-3])
def test_folds_left_out_at_once_give_what_each_alone_gives(
    monkeypatch: pytest.MonkeyPatch, tikhonov: float | None
) -> None:
    states = tanh_states((6, 8, 5, 4), noise=0.02)
    states[1][:, 3] = np.where(np.arange(len(states[1])) < 2, 1.0, 0.0)
    folds = np.arange(len(states[0])) ** 2 % 7 % 5
    given = run(states, folds=folds, tikhonov=tikhonov, delay=2)
    monkeypatch.setattr(chain, "_VALUES_AT_ONCE", 0)
    assert_same(given, run(states, folds=folds, tikhonov=tikhonov, delay=2))


@pytest.mark.parametrize("dealt", [2, 5, "uneven"])
@pytest.mark.parametrize("tikhonov", [0.0, 1e-2])
def test_error_bars_are_the_explicit_jackknife_and_bias(tikhonov: float, dealt: int | str) -> None:
    n, rank, uneven = 200, 3, dealt == "uneven"
    states = tanh_states((6, 8, 5, 4), n=n, noise=0.2)
    fold_of = np.arange(n) % dealt if isinstance(dealt, int) else np.arange(n) ** 2 % 7 % 4
    folds = np.unique(fold_of)
    sizes = [int((fold_of == fold).sum()) for fold in folds]
    credits = run(states, folds=fold_of, tikhonov=tikhonov, rank=rank)
    fit = partial(oracles.ridge, tikhonov=tikhonov)

    def spread(whole: float, without: list[float]) -> float:
        return oracles.jackknife(whole, without, sizes) if uneven else oracles.plain_jackknife(without)

    def bar(whole: float, without: list[float]) -> float:
        return float(np.hypot(spread(whole, without), oracles.jackknife_bias(whole, without, sizes)))

    whole = oracles.credits(states, rank, fit)
    without = [oracles.credits([x[fold_of != fold] for x in states], rank, fit) for fold in folds]
    for name in ("credit", "gain", "sensitivity"):
        for i in range(3):
            expected = bar(whole[name][i], [w[name][i] for w in without])
            assert float(credits.stderr[name][i]) == pytest.approx(expected, abs=1e-9), name
    assert credits.total_stderr == pytest.approx(
        bar(whole["total"], [w["total"] for w in without]), abs=1e-9
    )
    for name, table in {
        "r2": [oracles.fold_errors(states[i - 1], states[i], fold_of, fit) for i in range(1, 4)],
        "chain_r2": [oracles.chain_fold_errors(states, i, fold_of, fit) for i in range(1, 4)],
    }.items():
        for i, (errors, totals) in enumerate(table):
            left_out = [
                1 - (errors.sum() - e) / (totals.sum() - t) for e, t in zip(errors, totals, strict=True)
            ]
            r2 = 1 - errors.sum() / totals.sum()
            seen = states[i : i + 2] if name == "r2" else states[i + 1 :]
            gap = (oracles.in_sample_r2(seen, 0, fit) - r2) / 4
            expected = float(np.hypot(spread(r2, left_out), gap))
            assert float(credits.stderr[name][i]) == pytest.approx(expected, abs=1e-9), name
    assert torch.allclose(credits.stderr["nonlinearity"], credits.stderr["r2"], rtol=0, atol=1e-12)


def test_every_replicate_of_a_nearly_linear_step_picks_its_own_ridge_weight() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((120, 6)) * np.logspace(0, -1.5, 6)
    y = x @ rng.standard_normal((6, 4)) + 2e-2 * rng.standard_normal((120, 4))
    fold_of = np.arange(120) ** 2 % 7 % 4
    folds = np.unique(fold_of)

    def pick(rows: np.ndarray) -> float:
        return oracles.doubling_ridge(x[rows], y[rows], RIDGE_GRID)

    def volume(rows: np.ndarray, tikhonov: float) -> float:
        fit = partial(oracles.ridge, tikhonov=tikhonov)
        return float(oracles.credits([x[rows], y[rows]], 4, fit)["total"])

    credits = run([x, y], folds=fold_of)
    weight = pick(fold_of >= 0)
    assert credits.operators[0].tikhonov == pytest.approx(weight, rel=1e-6)
    own = [pick(fold_of != fold) for fold in folds]
    assert len({weight, *own}) == 1 + len(folds)
    assert 0 < min(own) < max(own) < RIDGE_GRID[-1]
    whole = volume(fold_of >= 0, weight)
    without = [volume(fold_of != fold, t) for fold, t in zip(folds, own, strict=True)]
    sizes = [int((fold_of == fold).sum()) for fold in folds]
    expected = np.hypot(
        oracles.jackknife(whole, without, sizes), oracles.jackknife_bias(whole, without, sizes)
    )
    assert credits.total == pytest.approx(whole, abs=1e-7)
    assert credits.total_stderr == pytest.approx(float(expected), rel=1e-5)
    # R² is held out under the weight over all samples.
    fit = partial(oracles.ridge, tikhonov=weight)
    r2 = oracles.held_out_r2(x, y, fold_of, fit)
    assert float(credits.values["r2"][0]) == pytest.approx(r2, abs=1e-10)


@pytest.mark.parametrize("normalize", ["none", "whiten"])
@pytest.mark.parametrize("tikhonov", [None, 1e-3])
def test_without_errors_the_values_are_the_same_and_the_error_bars_are_open(
    tikhonov: float | None, normalize: Any
) -> None:
    states = tanh_states((6, 8, 5, 4), noise=0.1)
    given, bare = (run(states, tikhonov=tikhonov, normalize=normalize, errors=e) for e in (True, False))
    for name in QUANTITIES:
        assert torch.equal(given.values[name], bare.values[name]), name
        assert bool(torch.isnan(bare.stderr[name]).all()), name
        assert not bool(torch.isnan(given.stderr[name]).any()), name
    assert (given.total, np.isnan(bare.total_stderr)) == (bare.total, True)
    assert torch.equal(given.stable, bare.stable)


@pytest.mark.parametrize(
    ("errors", "expected", "settled"),
    [
        ([1, 1, 1.5, 3], 1e-6 * 100 ** (1 / 3), False),  # 2 lies a third of the way from 1.5 to 3
        ([math.inf, 1, 1.5, 3], 1e-6 * 100 ** (1 / 3), False),  # as many directions as samples
        ([1, 1, 1, 2], 1e-4, False),
        ([1, 1, 1, 1.4], 1e-4, True),
        ([1, 3, 4, 5], 0.0, False),
        ([1e-9, 1e-9, 1e-9, 1], 0.0, False),  # rounding
        ([1e-11, 1e-11, 1e-11, 1], 0.0, True),
        ([0.0, 0.0, 0.0, 0.0], 0.0, True),
        ([math.inf] * 4, 0.0, True),
        ([2e-9, 2e-9, 4e-9, 1], 1e-6, False),
    ],
)
def test_a_ridge_weight_at_most_doubles_what_is_left_unexplained(
    monkeypatch: pytest.MonkeyPatch, errors: list[float], expected: float, settled: bool
) -> None:
    monkeypatch.setattr(regression, "RIDGE_GRID", (0.0, 1e-8, 1e-6, 1e-4))
    table = torch.tensor(errors, dtype=torch.float64)
    assert choose_ridge(table) == pytest.approx(expected, rel=1e-12)
    assert is_settled(table) == settled


def test_operators_carry_the_offsets_that_the_moments_were_summed_about() -> None:
    _, states = linear_states((4, 4, 3))
    center = [x[:7].mean(0) + 0.1 for x in states]
    credits = run(
        [x - c for x, c in zip(states, center, strict=True)],
        center=[torch.from_numpy(c) for c in center],
    )
    for before, after, operator in zip(states, states[1:], credits.operators, strict=False):
        assert np.allclose(operator.predict(torch.from_numpy(before)).numpy(), after, rtol=0, atol=1e-6)
        assert np.allclose(operator.y_mean.numpy(), after.mean(0), rtol=0, atol=1e-12)


def test_targets_credit_the_named_outputs() -> None:
    weights, states = linear_states((6, 6, 5))
    credits = run(states, targets=[3, 0], tikhonov=0.0)
    columns = [weights[1][:, [3, 0]], oracles.dense_product(weights)[:, [3, 0]]]
    assert float(credits.values["credit"][0]) == pytest.approx(
        oracles.log_volume(columns[0]) / 2, abs=1e-8
    )
    assert credits.total == pytest.approx(oracles.log_volume(columns[1]) / 2, abs=1e-8)
    # The first target's share is the norm of its own column.
    assert float(credits.volumes[0, 0]) == pytest.approx(
        np.log(np.linalg.norm(columns[0][:, 0])), abs=1e-8
    )


@pytest.mark.parametrize("targets", [[1, 4], [4, 1], [4, 2, 1, 0]])
def test_a_target_that_never_varies_is_dropped_and_the_others_are_kept(targets: list[int]) -> None:
    _, states = linear_states((6, 6, 5))
    states[-1][:, 4] = 2.5
    alive = [t for t in targets if t != 4]
    credits = run(states, targets=targets)
    assert credits.dropped == (4,)
    assert credits.lost == (1,)
    assert credits.alignment.rank == len(alive)
    assert_same(credits, run(states, targets=alive))


def test_replicates_follow_the_directions_that_are_kept() -> None:
    # Outputs 0 and 1 are copies; with 2 they span two directions, in every replicate the same two.
    _, states = linear_states((6, 6, 5), n=200)
    states[-1][:, 1] = states[-1][:, 0]
    credits = run(states, targets=[0, 1, 2], folds=4, tikhonov=1e-4)
    assert credits.dropped == (1,)
    expected = run(states, targets=[0, 2], folds=4, tikhonov=1e-4)
    assert_same(credits, expected)
    for name in ("credit", "gain", "sensitivity"):
        assert torch.isfinite(credits.stderr[name]).all()


def test_whitened_outputs_that_narrow_without_a_fold_give_no_error_bar() -> None:
    # The last output varies in one fold only, so one replicate whitens one direction less.
    _, states = linear_states((6, 6, 3), n=120)
    states[-1][:, 2] = np.where(np.arange(120) % 4 == 0, states[-1][:, 2], 1.0)
    credits = run(states, folds=np.arange(120) % 4, normalize="whiten")
    assert credits.alignment.rank == 3
    assert torch.isnan(credits.stderr["credit"][0])


# What the numbers must not depend on.


@pytest.mark.parametrize("normalize", ["none", "rms", "whiten"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_permuting_or_rotating_hidden_units_changes_nothing(
    widths: tuple[int, ...], normalize: Any
) -> None:
    states, rng = tanh_states(widths, noise=0.05), np.random.default_rng(1)
    given = run(states, normalize=normalize)
    permuted = [x[:, rng.permutation(x.shape[1])] for x in states[:-1]] + [states[-1]]
    assert_same(given, run(permuted, normalize=normalize))
    if normalize != "rms":
        turned = [x @ np.linalg.qr(rng.standard_normal((x.shape[1],) * 2))[0] for x in states]
        names = [name for name in QUANTITIES if name != "sensitivity"]
        assert_same(given, run(turned, normalize=normalize), names)


def test_whitened_states_that_tell_each_other_ignore_units_that_never_vary() -> None:
    # The last step reads both branches and what is exactly made of them.
    x, first, second, last = tanh_states((3, 4, 5, 2), noise=0.05)
    mixed = first @ np.random.default_rng(1).standard_normal((4, 4)) + second[:, :4]
    links = ((), (0,), (1, 2), (1, 2))
    given = run([x, first, second, mixed, last], normalize="whiten", links=links)
    idle = np.concatenate([first, np.ones((len(first), 2))], axis=1)
    other = run([x, idle, second, mixed, last], normalize="whiten", links=links)
    assert given.undetermined == other.undetermined == (3,)
    for name in QUANTITIES:
        torch.testing.assert_close(given.values[name], other.values[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_whitened_numbers_ignore_any_invertible_change_of_hidden_coordinates(
    widths: tuple[int, ...],
) -> None:
    states = tanh_states(widths, n=600, noise=0.05)
    rng = np.random.default_rng(1)
    changed = [
        x @ (np.eye(x.shape[1]) + 0.3 * rng.standard_normal((x.shape[1],) * 2)) + 1 for x in states[:-1]
    ]
    given = run(states, normalize="whiten", tikhonov=0.0)
    other = run([*changed, states[-1]], normalize="whiten", tikhonov=0.0)
    assert_same(given, other, ["credit", "gain", "r2", "nonlinearity", "chain_r2", "rank"], atol=1e-8)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_whitened_output_directions_are_the_leading_principal_ones(rank: int) -> None:
    _weights, states = linear_states((8, 7, 5), n=500)
    credits = run(states, normalize="whiten", tikhonov=0.0, rank=rank)
    leading = states[-1] @ oracles.pod(states[-1], rank)
    expected = oracles.canonical_correlations(states[1], leading)
    assert float(credits.values["credit"][0]) == pytest.approx(np.log(expected).mean(), abs=1e-8)
    noisy = [x + 0.5 * np.random.default_rng(5).standard_normal(x.shape) for x in states]
    credits = run(noisy, normalize="whiten", tikhonov=0.0, rank=rank)
    leading = noisy[-1] @ oracles.pod(noisy[-1], rank)
    expected = oracles.canonical_correlations(noisy[1], leading)
    assert float(credits.values["credit"][0]) == pytest.approx(np.log(expected).mean(), abs=1e-8)
    assert expected.max() < 0.99


@pytest.mark.parametrize("shape", [(5, 5), (7, 4), (4, 7)], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_whitened_operators_have_canonical_correlations(shape: tuple[int, int], seed: int) -> None:
    states = tanh_states(shape, seed=seed, noise=0.3)
    split = split_chain(*summed(states), None, "whiten")
    values = torch.linalg.svdvals(solve(*split.normal_equations(1), 0.0)).numpy()
    expected = oracles.canonical_correlations(*states)
    assert np.allclose(values, expected, rtol=0, atol=1e-9)
    credits = run(states, normalize="whiten", tikhonov=0.0)
    assert credits.total == pytest.approx(
        np.log(expected).mean() if shape[0] >= shape[1] else credits.total
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_rms_numbers_ignore_the_rescaling_of_relu_units(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = [rng.standard_normal(shape) for shape in ((5, 8), (8, 7), (7, 4))]
    x = rng.standard_normal((400, 5))

    def flow(given: list[np.ndarray]) -> list[np.ndarray]:
        first = np.maximum(x @ given[0], 0)
        second = np.maximum(first @ given[1], 0)
        return [x, first, second, second @ given[2]]

    scales = [np.exp(rng.uniform(-3, 3, 8)), np.exp(rng.uniform(-3, 3, 7))]
    rescaled = [
        weights[0] * scales[0],
        weights[1] / scales[0][:, None] * scales[1],
        weights[2] / scales[1][:, None],
    ]
    given, other = run(flow(weights), normalize="rms"), run(flow(rescaled), normalize="rms")
    assert_same(given, other)
    assert np.allclose(flow(weights)[-1], flow(rescaled)[-1], rtol=0, atol=1e-9)
    plain = [run(flow(w), normalize="none").values["credit"][0] for w in (weights, rescaled)]
    assert abs(float(plain[0] - plain[1])) > 0.1


@pytest.mark.parametrize("exponent", [-30, -10, 10, 30])
@pytest.mark.parametrize("normalize", ["none", "rms", "whiten"])
def test_the_scale_of_the_inputs_moves_only_the_first_gain(exponent: int, normalize: Any) -> None:
    states = tanh_states((6, 8, 5, 4), noise=0.1)
    scale = 10.0**exponent
    shift = np.random.default_rng(3).standard_normal(6)
    given = run(states, normalize=normalize)
    other = run([scale * (states[0] + shift), *states[1:]], normalize=normalize)
    assert_same_but_first = [name for name in QUANTITIES if name != "gain"]
    for name in assert_same_but_first:
        assert torch.allclose(given.values[name], other.values[name], rtol=0, atol=1e-9), name
        assert torch.allclose(given.stderr[name], other.stderr[name], rtol=0, atol=1e-9), name
    moved = np.log(scale) if normalize == "none" else 0.0
    assert other.total + moved == pytest.approx(given.total, abs=1e-9)
    assert torch.allclose(other.values["gain"][1:], given.values["gain"][1:], rtol=0, atol=1e-9)


# Error bars as statistics.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["credit", "r2", "gain"])
def test_error_bars_match_the_spread_over_repeated_samples(name: str) -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((4, 5)) / 2, rng.standard_normal((5, 3))]

    def sample() -> list[np.ndarray]:
        x = rng.standard_normal((400, 4))
        hidden = np.tanh(x @ weights[0]) + 0.3 * rng.standard_normal((400, 5))
        return [x, hidden, hidden @ weights[1] + 0.5 * rng.standard_normal((400, 3))]

    runs = [run(sample(), folds=10, tikhonov=0.0) for _ in range(60)]
    spread = torch.stack([c.values[name][0] for c in runs]).std()
    reported = torch.stack([c.stderr[name][0] for c in runs]).pow(2).mean().sqrt()
    assert 0.7 < float(reported / spread) < 1.5


# Step delay.


def residual_states(n: int, seed: int, delay: int) -> tuple[list[list[np.ndarray]], list[np.ndarray]]:
    """A linear chain with skips over up to ``delay`` steps, excited at every state.

    The excitation is orthogonal, in the sample, to all states before it, so that least squares finds
    the weights exactly.
    """
    rng = np.random.default_rng(seed)
    widths = (4, 5, 4, 6, 3)
    blocks = [
        [rng.standard_normal((widths[i - lag], widths[i])) / 2 for lag in range(1, min(delay, i) + 1)]
        for i in range(1, len(widths))
    ]
    states = [rng.standard_normal((n, widths[0]))]
    states[0] -= states[0].mean(0)
    for i, step in enumerate(blocks, start=1):
        state = sum(states[i - lag] @ block for lag, block in enumerate(step, start=1))
        noise = rng.standard_normal(state.shape) if i < len(widths) - 1 else np.zeros(state.shape)
        before = np.hstack([np.ones((n, 1)), *states])
        noise -= before @ np.linalg.lstsq(before, noise)[0]
        states.append(state + noise)
    return blocks, states


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("delay", [2, 3])
def test_delayed_operators_and_jacobians_of_a_residual_chain_are_exact(delay: int, seed: int) -> None:
    blocks, states = residual_states(300, seed, delay)
    credits = run(states, delay=delay, tikhonov=0.0)
    for step, operator in zip(blocks, credits.operators, strict=True):
        assert np.allclose(operator.matrix.numpy(), np.vstack(step), rtol=0, atol=1e-8)
    outputs = oracles.pod(states[-1], 3)
    for start in range(len(states)):
        width = states[start].shape[1]
        unit = [np.zeros((width, x.shape[1])) for x in states[:start]] + [np.eye(width)]
        for i in range(start, len(blocks)):
            unit.append(sum(unit[i - lag] @ block for lag, block in enumerate(blocks[i])))
        volume = oracles.log_volume(unit[-1] @ outputs)
        assert float(credits.alignment.log_volumes[start].sum()) == pytest.approx(volume, abs=1e-8)
    assert float(credits.values["gain"].sum()) == pytest.approx(credits.total, abs=1e-9)


@pytest.mark.parametrize("normalize", ["none", "rms", "whiten"])
def test_links_to_all_states_in_reach_are_a_delay(normalize: Any) -> None:
    states = [x + 0.5 for x in residual_states(200, 0, 3)[1]]
    rng = np.random.default_rng(2)
    states = [x + 0.3 * rng.standard_normal(x.shape) for x in states]
    given = run(states, delay=2, normalize=normalize)
    other = run(states, links=((), (0,), (1,), (2,)), normalize=normalize)
    assert_same(given, other)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_long_skip_that_is_linked_gives_the_dense_jacobians(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = ((5, 6), (6, 4), (4, 7), (7, 3))
    weights = [rng.standard_normal(shape) / 2 for shape in shapes]
    skip = rng.standard_normal((6, 3))
    states = [rng.standard_normal((300, 5))]
    for i, weight in enumerate(weights):
        state = states[-1] @ weight + (states[1] @ skip if i == 3 else 0)
        if i < 3:  # excited, so that the weights are identified
            noise = rng.standard_normal(state.shape)
            before = np.hstack([np.ones((300, 1)), *states])
            state = state + noise - before @ np.linalg.lstsq(before, noise)[0]
        states.append(state)
    credits = run(states, links=((), (), (), (1,)), tikhonov=0.0)
    assert np.allclose(credits.operators[3].matrix.numpy(), np.vstack([weights[3], skip]), atol=1e-8)
    outputs = oracles.pod(states[-1], 3)
    after_first = oracles.dense_product(weights[1:]) + skip
    expected = [
        weights[0] @ after_first,
        after_first,
        oracles.dense_product(weights[2:]),
        weights[3],
        np.eye(3),
    ]
    for state, jacobian in enumerate(expected):
        given = float(credits.alignment.log_volumes[state].sum())
        assert given == pytest.approx(oracles.log_volume(jacobian @ outputs), abs=1e-8)
    unlinked = run(states, tikhonov=0.0)
    assert float(unlinked.values["r2"][3]) < 0.999 < float(credits.values["r2"][3])


def test_delayed_r2_is_held_out_over_all_regressors() -> None:
    _blocks, states = residual_states(150, 0, 2)
    states = [x + 0.5 * np.random.default_rng(i).standard_normal(x.shape) for i, x in enumerate(states)]
    fold_of = np.arange(150) % 5
    credits = run(states, delay=2, tikhonov=1e-3)
    fit = partial(oracles.ridge, tikhonov=1e-3)
    for i in range(1, 5):
        regressors = np.hstack([states[i - lag] for lag in range(1, min(2, i) + 1)])
        expected = oracles.held_out_r2(regressors, states[i], fold_of, fit)
        assert float(credits.values["r2"][i - 1]) == pytest.approx(expected, abs=1e-10)
    # From state 3 on: state 4 from (3, 2). From state 2 on: first 3 from (2, 1), then 4 from (3̂, 2).
    errors = totals = 0.0
    for fold in range(5):
        train, test = fold_of != fold, fold_of == fold
        means = [x[train].mean(0) for x in states]
        centred = [x - m for x, m in zip(states, means, strict=True)]

        solved = {
            i: fit(np.hstack([centred[i - 1][train], centred[i - 2][train]]), centred[i][train])
            for i in (3, 4)
        }
        third = np.hstack([centred[2][test], centred[1][test]]) @ solved[3]
        fourth = np.hstack([third, centred[2][test]]) @ solved[4]
        errors += ((centred[4][test] - fourth) ** 2).sum()
        totals += (centred[4][test] ** 2).sum()
    assert float(credits.values["chain_r2"][1]) == pytest.approx(1 - errors / totals, abs=1e-10)


# Directions that never varied may wake.


def relu_then_linear(n: int, awake: bool, seed: int = 0) -> list[np.ndarray]:
    """A hidden state of 6 units, two of which never wake or hardly, and a linear head."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, 4))
    hidden = np.maximum(x @ generator.normal(size=(4, 6)), 0)
    hidden[:, 4:] = 0
    if awake:
        hidden[:20, 4], hidden[20:40, 5] = 2e-4, 2e-4
    return [x, hidden, hidden @ np.linalg.qr(generator.normal(size=(6, 3)))[0]]


def test_before_an_exactly_linear_step_the_error_tells_of_directions_never_seen() -> None:
    asleep, awake = run(relu_then_linear(400, False)), run(relu_then_linear(400, True))
    known = math.log(6 / 4) / 2 / student.ppf(0.975, 4)
    assert float(asleep.stderr["credit"][0]) == pytest.approx(known, abs=1e-6)
    assert float(asleep.stderr["gain"][1]) == pytest.approx(known, abs=1e-6)
    assert float(asleep.stderr["gain"][0]) >= known
    moved = float((awake.values["credit"] - asleep.values["credit"])[0])
    assert moved == pytest.approx(math.log(6 / 4) / 2, rel=0.1)
    # In the large-sample limit of this state the two units are awake, and nothing is left to wake.
    everything = relu_then_linear(400, True)
    everything[1][:, 4:] = np.abs(np.random.default_rng(1).normal(size=(400, 2)))
    everything[2] = everything[1] @ np.random.default_rng(2).normal(size=(6, 3))
    assert float(run(everything).stderr["credit"][0]) < 1e-6


def test_noise_on_units_reaches_directions_that_were_never_seen_where_units_share_them() -> None:
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))[0]
    reach = student.ppf(0.975, 4)
    for matrix, shared in ((np.eye(6), False), (turn, True)):
        given = [relu_then_linear(400, awake) for awake in (False, True)]
        asleep, awake = (run([x, hidden @ matrix, y]) for x, hidden, y in given)
        moved = float((awake.values["sensitivity"] - asleep.values["sensitivity"])[0])
        known = math.log(6 / 4) / 2 / reach if shared else 0.0
        error, rest = (float(credits.stderr["sensitivity"][0]) for credits in (asleep, awake))
        assert error == pytest.approx(math.hypot(known, rest), rel=0.1)
        # Units that are asleep get no noise.
        assert (moved > 0.1) == shared
        assert moved < reach * error


def test_what_linear_steps_cannot_give_is_not_taken_for_unseen() -> None:
    _, states = linear_states((4, 9, 3))  # the 9 units span 4 directions, and never more
    assert float(run(states).stderr["credit"].max()) < 1e-6
    dead = [np.hstack([states[0], np.zeros((len(states[0]), 1))]), *states[1:]]
    credits, unseen = run(dead), math.log(5 / 4) / 2 / student.ppf(0.975, 4)
    assert float(credits.stderr["credit"][0]) == pytest.approx(unseen, abs=1e-6)
    assert credits.total_stderr == pytest.approx(unseen, abs=1e-6)
    _, narrow = linear_states((4, 3, 3))
    narrow[0] = dead[0] * 1.0
    narrow[1] = states[0] @ np.random.default_rng(1).standard_normal((4, 3))
    narrow[2] = narrow[1] @ np.random.default_rng(2).standard_normal((3, 3))
    credits = run(narrow)
    assert float(credits.stderr["credit"].max()) < 1e-6
    assert credits.total_stderr == pytest.approx(unseen, abs=1e-6)


@pytest.mark.parametrize(
    ("share", "linear", "counts"), [(0.99, True, True), (1.01, True, False), (0.0, False, False)]
)
def test_unseen_directions_count_before_linear_steps_with_hardly_a_ridge(
    share: float, linear: bool, counts: bool
) -> None:
    rng = np.random.default_rng(0)
    x = np.hstack([rng.standard_normal((50, 3)), np.zeros((50, 4))])
    states = [x, x[:, :1], rng.standard_normal((50, 2))]
    layout, moments = summed(states, 4)
    whole = split_chain(layout, moments, None, "none")
    first, second = fit_steps(whole, 0.0)
    steps = [replace(first, tikhonov=share / 50), second]
    shifts = unseen_shifts(whole, [linear, True], steps, layout.dims)
    assert shifts.dtype == torch.float64
    # Three directions of the input are known, and four are not; the one of the next state is.
    expected = math.log(7 / 3) / 2 / student.ppf(0.975, 3) if counts else 0.0
    assert shifts.tolist() == pytest.approx([expected, 0, 0], rel=1e-14)


# Rounding reaches no output.


def as_recorded(states: Sequence[np.ndarray], dtype: Any) -> list[np.ndarray]:
    return [x.astype(dtype) for x in states]


def states_of_two_depths(spread: float, n: int = 400) -> tuple[np.ndarray, list[np.ndarray]]:
    """The head of b, and x, a, b and both heads; where x spreads little, all is near linear."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 6))
    a = np.tanh(spread * x @ rng.standard_normal((6, 12)))
    b = np.tanh(a @ rng.standard_normal((12, 12)) / 2)
    head = rng.standard_normal((12, 3))
    return head, [x, a, b, np.hstack([a @ rng.standard_normal((12, 3)), b @ head])]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("spread", [1.0, 0.1, 0.03])
def test_a_head_that_a_state_does_not_reach_is_not_credited_for_its_rounding(
    spread: float, dtype: Any
) -> None:
    head, states = states_of_two_depths(spread)
    credits = run(as_recorded(states, dtype), links=((), (), (1,)))
    assert credits.operators[2].tikhonov == 0
    jacobian = np.hstack([np.zeros((12, 3)), head]) @ oracles.pod(states[-1], 6)
    # Three directions are carried by b: the first, for any three of them are independent.
    expected = oracles.log_volume(jacobian[:, :3]) / 3
    assert float(credits.values["credit"][1]) == pytest.approx(expected, abs=2e-3)
    assert credits.volumes[1].isnan().tolist() == [False] * 3 + [True] * 3
    assert credits.alignment.rank == 6
    assert bool(credits.stable[1])
    assert 0 < float(credits.stderr["credit"][1]) < 0.5


def states_of_low_rank(n: int = 400) -> list[np.ndarray]:
    """The states x, a, b, a + b, with a and b of two directions each, and b a function of x - a."""
    rng = np.random.default_rng(0)

    def branch(x: np.ndarray) -> np.ndarray:
        hidden = np.maximum(x @ rng.standard_normal((6, 16)) / 2, 0)
        return hidden @ rng.standard_normal((16, 2)) @ rng.standard_normal((2, 6)) / 4

    x = rng.standard_normal((n, 6))
    a = branch(x)
    b = branch(x - a)
    return [x, a, b, a + b]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_state_carries_no_more_directions_than_it_varies_in(dtype: Any) -> None:
    states = states_of_low_rank()
    credits = run(as_recorded(states, dtype), links=((), (0,), (1,)))
    outputs = oracles.pod(states[-1], 4)
    # The sum hands on b as it is, seen in the two directions that it has.
    own = oracles.pod(states[2], 2)
    expected = oracles.log_volume((own @ own.T @ outputs)[:, :2]) / 2
    assert float(credits.values["credit"][1]) == pytest.approx(expected, abs=1e-5)
    for state in (0, 1):
        assert credits.volumes[state].isnan().tolist() == [False] * 2 + [True] * 2
    assert credits.alignment.rank == 4


@pytest.mark.parametrize("normalize", ["none", "rms", "whiten"])
@pytest.mark.parametrize("kind", ["two depths", "low rank"])
def test_states_in_single_precision_have_the_numbers_of_those_in_double(
    kind: str, normalize: Any
) -> None:
    states = states_of_low_rank() if kind == "low rank" else states_of_two_depths(0.1)[1]
    links = ((), (0,) if kind == "low rank" else (), (1,))
    single, double = (
        run(as_recorded(states, dtype), links=links, normalize=normalize)
        for dtype in (np.float32, np.float64)
    )
    assert single.alignment.rank == double.alignment.rank
    assert torch.equal(single.stable, double.stable)
    assert bool(single.values["credit"].isfinite().all())
    assert bool(single.stderr["credit"].isfinite().all())
    assert_same(single, double, ("credit", "gain"), atol=2e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("gain", [1e-3, 1e-6])
def test_a_branch_that_counts_for_little_keeps_all_its_directions(gain: float, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 6))
    branch = np.tanh(2 * x @ rng.standard_normal((6, 6)))
    credits = run(as_recorded([x, branch, x + gain * branch], dtype), links=((), (0,)))
    assert credits.alignment.rank == 6
    assert float(credits.values["credit"][0]) == pytest.approx(np.log(gain), abs=0.02)
    assert not bool(credits.volumes[0].isnan().any())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("constant", [False, True])
def test_a_state_that_is_read_for_nothing_has_no_credit(constant: bool, dtype: Any) -> None:
    x, a, b, heads = states_of_two_depths(1.0)[1]
    idle = np.full_like(b, 1 / 3) if constant else b
    credits = run(as_recorded([x, a, idle, heads[:, :3]], dtype), links=((), (), (1,)))
    alone = run([x, a, heads[:, :3]])
    assert math.isnan(float(credits.values["credit"][1]))
    found = credits.values["credit"][[0, 2]]
    assert torch.allclose(found, alone.values["credit"], rtol=0, atol=1e-5)
    assert credits.alignment.rank == 3


# Degenerate states, each with a stated answer.


def degenerate_states(kind: str, n: int = 300) -> list[np.ndarray]:
    states = tanh_states((6, 8, 5, 4), n=n, noise=0.05)
    hidden = states[1]
    if kind == "dead":
        hidden[:, [1, 4]] = 0
    elif kind == "duplicate":
        hidden[:, [1, 4]] = hidden[:, [0, 0]]
    elif kind == "constant":
        hidden[:, [1, 4]] = 1 / 3
    return states


@pytest.mark.parametrize("normalize", ["none", "rms", "whiten"])
@pytest.mark.parametrize("delay", [1, 2])
@pytest.mark.parametrize("kind", ["dead", "constant"])
def test_units_that_never_move_count_as_absent(kind: str, delay: int, normalize: Any) -> None:
    states = degenerate_states(kind)
    absent = [states[0], np.delete(states[1], [1, 4], axis=1), *states[2:]]
    # Ridge weights count in mean variances, which absent units do not lower: compare without one.
    options = {"normalize": normalize, "delay": delay, "tikhonov": 0.0}
    given, other = run(states, **options), run(absent, **options)
    assert_same(given, other)
    assert given.values["rank"].tolist() == pytest.approx([6, 5, 4], abs=0.01)


@pytest.mark.parametrize("normalize", ["none", "rms", "whiten"])
def test_duplicate_units_lower_the_rank_and_break_nothing(normalize: Any) -> None:
    states = degenerate_states("duplicate")
    once = [states[0], np.delete(states[1], [1, 4], axis=1), *states[2:]]
    given, other = (run(s, normalize=normalize, tikhonov=0.0) for s in (states, once))
    for found in (given, other):
        assert found.values["rank"].tolist() == pytest.approx([6, 5, 4], abs=0.01)
    # What flows from the input to the output is the same; how the copies share it is another matter.
    assert given.total == pytest.approx(other.total, abs=1e-8)
    for name in ("r2", "chain_r2"):
        assert torch.allclose(given.values[name][1:], other.values[name][1:], rtol=0, atol=1e-8)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e8 / 3])
@pytest.mark.parametrize("normalize", ["none", "rms", "whiten"])
@pytest.mark.parametrize("delay", [1, 2])
def test_behind_a_dead_middle_state_there_is_no_number(value: float, normalize: Any, delay: int) -> None:
    states = tanh_states((6, 8, 5, 4), noise=0.05)
    states[2] = np.full_like(states[2], value)
    credits = run(states, normalize=normalize, delay=delay)
    assert credits.values["rank"].tolist() == pytest.approx([8, 0, 4], abs=0.01)
    assert torch.isnan(credits.values["r2"][1])
    if delay == 1:
        assert credits.alignment.rank == 0
        assert credits.lost == (2,)
        assert np.isnan(credits.total)
        for name in ("credit", "gain", "sensitivity"):
            assert bool(torch.isnan(credits.values[name]).all())
            assert credits.values[name].dtype == torch.float64
        assert float(credits.values["r2"][2]) == pytest.approx(0, abs=0.05)
        assert float(credits.values["r2"][2]) <= 1e-12


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3])
@pytest.mark.parametrize("normalize", ["none", "rms", "whiten"])
def test_a_constant_output_is_refused(value: float, normalize: Any) -> None:
    states = tanh_states((6, 8, 4), n=300)
    states[-1] = np.full_like(states[-1], value)
    with pytest.raises(
        ValueError, match=r"output of the last component is constant over all 300 samples"
    ):
        run(states, normalize=normalize)


@pytest.mark.parametrize("n", [3, 6, 12])
def test_fewer_samples_than_units_leave_finite_numbers_or_none(n: int) -> None:
    states = tanh_states((30, 40, 20), n=n)
    credits = run(states, folds=3)
    assert credits.values["rank"].tolist() == pytest.approx([n - 1, n - 1], abs=0.01)
    assert credits.alignment.rank == n - 1
    expected = oracles.credits(
        states, n - 1, partial(oracles.ridge, tikhonov=credits.operators[0].tikhonov)
    )
    if credits.operators[0].tikhonov == credits.operators[1].tikhonov:
        assert credits.total == pytest.approx(float(expected["total"]), abs=1e-6)
    assert float(credits.values["r2"].max()) < 1


@pytest.mark.parametrize(("n", "normalize"), [(2, "none"), (2, "rms"), (2, "whiten"), (50, "none")])
def test_samples_in_one_fold_or_two_in_all_are_fitted_but_not_judged(n: int, normalize: Any) -> None:
    credits = run(
        tanh_states((4, 5, 3), n=n), folds=5 if n == 2 else np.ones(n, int), normalize=normalize
    )
    assert credits.alignment.rank == min(n - 1, 3)
    assert bool(torch.isfinite(credits.values["credit"]).all())
    assert bool(torch.isnan(credits.values["r2"]).all())
    assert not bool(credits.stable.any())
    for name in QUANTITIES:
        assert bool(torch.isnan(credits.stderr[name]).all())


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_samples_are_refused(n: int) -> None:
    layout = Layout((3, 2), 5)
    moments = layout.zeros()
    accumulate(
        layout, moments, [torch.ones(n, 3).double(), torch.ones(n, 2).double()], torch.zeros(n).long()
    )
    with pytest.raises(ValueError, match=f"{n} of at least 2 samples arrived; pass more"):
        compute_credits(layout, moments)


@pytest.mark.parametrize("targets", [[4], [-1], [0, 0], []])
def test_targets_must_be_distinct_outputs(targets: list[int]) -> None:
    with pytest.raises(ValueError, match=r"targets is .*; name each output at most once, from 0 to 3"):
        run(tanh_states((6, 8, 4), n=30), targets=targets)


def test_a_constant_input_credits_the_rest_only() -> None:
    states = tanh_states((6, 8, 4), noise=0.05)
    states[0] = np.full_like(states[0], 0.1)
    credits = run(states)
    assert (credits.alignment.rank, credits.operators[0].condition) == (0, 1)
    assert np.isnan(credits.total)
    assert float(credits.values["r2"][0]) <= 1e-12


def test_samples_needed_are_twice_the_regressors_in_every_training_split() -> None:
    assert samples_needed(Layout((10, 20, 5), 5)) == 50  # 2 × 20 × 5/4
    assert samples_needed(Layout((10, 20, 5), 5, 2)) == 75
    assert samples_needed(Layout((3, 2), 2)) == 12


def test_a_credit_that_hangs_on_the_ridge_weight_is_not_called_stable() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 6)) * 10.0 ** -np.arange(6.0)  # ill-conditioned regressors
    hidden = x @ rng.standard_normal((6, 6))
    y = hidden @ np.linalg.inv(np.vander(np.linspace(0.5, 1, 6)))
    assert not bool(run([x, hidden, y], tikhonov=1e-4).stable.all())
    _, states = linear_states((5, 5, 5))
    assert bool(run(states).stable.all())


def spread_states(variances: Sequence[float], n: int = 200) -> list[np.ndarray]:
    """Uncorrelated units of given variances, which two components hand on as they are."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((n, len(variances)))
    basis = np.linalg.qr(noise - noise.mean(0))[0] * np.sqrt(n)
    return [basis * np.sqrt(variances)] * 3


@pytest.mark.parametrize(
    ("variances", "tikhonov", "targets", "stable"),
    [
        # K = c / (c + t m), where m is the mean variance.
        ([1.0], 0.0770, None, True),
        ([1.0], 0.0785, None, False),
        # No ridge at all is held against 1e-8.
        ([1.0, 3.0e-9], 0.0, None, True),
        ([1.0, 2.8e-9], 0.0, None, False),
        # Only what is aligned counts.
        ([1.0, 100.0], 0.0016, [0], False),
        ([1.0, 100.0], 0.0016, [1], True),
        # A direction of fifty gets lost, and the others stay where they are.
        ([1.0] * 49 + [2e-11], 1e-3, None, False),
    ],
)
def test_a_stable_credit_moves_by_half_a_nat_at_most(
    variances: list[float], tikhonov: float, targets: list[int] | None, stable: bool
) -> None:
    credits = run(spread_states(variances), tikhonov=tikhonov, targets=targets)
    assert credits.alignment.rank == len(targets or variances)
    assert float(credits.stderr["credit"][0]) < 0.01
    assert bool(credits.stable[0]) == stable


@pytest.mark.parametrize("normalize", ["rms", "whiten"])
def test_operators_are_in_the_coordinates_of_the_states_themselves(normalize: Any) -> None:
    states = tanh_states((6, 8, 5, 4), noise=0.1)
    given = run(states, normalize=normalize, tikhonov=0.0)
    plain = run(states, normalize="none", tikhonov=0.0)
    for one, other in zip(given.operators, plain.operators, strict=True):
        assert torch.allclose(one.matrix, other.matrix, rtol=0, atol=1e-10)


def test_operators_carry_their_r2_rank_and_condition() -> None:
    states = tanh_states((6, 8, 5, 4), noise=0.1)
    states[1][:, 3] = 0
    credits = run(states, tikhonov=1e-4)
    assert [operator.r2 for operator in credits.operators] == credits.values["r2"].tolist()
    assert [operator.rank for operator in credits.operators] == [6, 7, 5]
    for state, operator in zip(states, credits.operators, strict=False):
        singular = np.linalg.svd(state - state.mean(0), compute_uv=False)
        expected = (singular[0] / singular[operator.rank - 1]) ** 2
        assert operator.condition == pytest.approx(expected, rel=1e-9)
        assert operator.tikhonov == pytest.approx(1e-4)
