"""Errors of measured effects: over samples, over draws, and of a paired difference."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import chi2, sem
from torch import Tensor

from lightning_koopman.effects.scoring import Change, Outputs, kl_divergence, over_draws


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(n_samples: int = 90, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.arange(n_samples) % 3
    before = normal(n_samples, 3, seed=seed) + 2 * torch.nn.functional.one_hot(targets, 3)
    return before, before + normal(n_samples, 3, seed=seed + 1), targets


def outputs(before: Tensor, targets: Tensor | None, scale: str, size: int = 40) -> Outputs:
    parts = before.split(size)
    labels = [None] * len(parts) if targets is None else targets.split(size)
    return Outputs(parts, list(zip(parts, labels, strict=True)), scale, None)


def test_the_error_of_a_mean_divergence_is_scipys() -> None:
    before, after, targets = logits()
    change = outputs(before, targets, "kl").compare(after.split(40))
    found = over_draws([change])
    by_sample = kl_divergence(before, after).numpy()
    assert found.effect == pytest.approx(by_sample.mean(), rel=1e-12)
    assert found.effect == change.effect
    assert found.effect_stderr == pytest.approx(sem(by_sample), rel=1e-12)


def test_samples_without_a_target_have_a_divergence_but_are_neither_right_nor_wrong() -> None:
    before, after, targets = logits()
    targets[::4] = -100
    change = outputs(before, targets, "kl").compare(after.split(40))
    assert change.effect == pytest.approx(float(kl_divergence(before, after).mean()), rel=1e-12)
    counts = targets >= 0
    right = (after.argmax(1) == targets)[counts].double().mean()
    assert change.metric == pytest.approx(float(right), rel=1e-12)


def test_the_square_of_a_relative_displacement_is_the_effect() -> None:
    before, after = normal(90, 2, 3), normal(90, 2, 3, seed=1)
    given = outputs(before, None, "relative")
    moved = given.displacement(after.split(40))
    expected = (after - before) / (before - before.mean(0)).square().sum().sqrt()
    torch.testing.assert_close(moved, expected.flatten(), rtol=1e-12, atol=0)
    assert given.compare(after.split(40)).effect == pytest.approx(float(moved.square().sum()), rel=1e-12)


@pytest.mark.parametrize("axis", [1, 2])
def test_products_of_displacements_are_those_of_half_the_fisher_information(axis: int) -> None:
    before, one, other = (normal(30, 5, 4, seed=seed) for seed in range(3))
    targets = torch.zeros(30, 5, dtype=torch.long)
    targets[:, 3:] = -100
    laid_out = [each.movedim(2, axis) for each in (before, before + one, before + other)]
    given = outputs(laid_out[0], targets, "kl", size=10)
    found = [given.displacement(each.split(10)) for each in laid_out[1:]]
    p, a, b = (each[:, :3] for each in (before.softmax(2), one, other))
    expected = ((p * a * b).sum(2) - (p * a).sum(2) * (p * b).sum(2)).mean() / 2
    assert float(found[0] @ found[1]) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("are_probabilities", [False, True])
def test_displacements_however_large_have_the_products_of_the_fisher_information(
    are_probabilities: bool,
) -> None:
    """Of the root of half of it with a vector, for both endings in closed form, by the logits."""
    before, after, targets = logits()
    vectors = normal(90, 3, seed=2)
    p, moved = before.softmax(1), after.log_softmax(1) - before.log_softmax(1)
    expected = p.sqrt() * vectors * (moved - (p * moved).sum(1, keepdim=True)) / math.sqrt(2)
    own, other = (t.softmax(1) if are_probabilities else t for t in (before, after))
    given = outputs(own, targets, "kl", size=90)
    found = given.metric_root(own, vectors, 0) * given.change(other, own)
    torch.testing.assert_close(found.sum(1), expected.sum(1), rtol=1e-9, atol=1e-12)


def test_the_error_of_a_relative_change_is_that_of_a_ratio() -> None:
    # Both the change and the variance it is divided by vary from sample to sample.
    before, after = normal(400, 2) ** 3, normal(400, 2) ** 3 + 0.3 * normal(400, 2, seed=1) ** 3
    found = over_draws([outputs(before, None, "relative").compare(after.split(40))])
    a, b = before.numpy(), after.numpy()

    def relative(keep: np.ndarray) -> float:
        return ((b - a)[keep] ** 2).sum() / ((a[keep] - a[keep].mean(axis=0)) ** 2).sum()

    n = len(a)
    assert found.effect == pytest.approx(relative(np.ones(n, bool)), rel=1e-12)
    without = np.array([relative(np.arange(n) != i) for i in range(n)])
    jackknife = math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    assert found.effect_stderr == pytest.approx(jackknife, rel=0.03)
    unlike = sem(((b - a) ** 2).sum(axis=1)) / ((a - a.mean(axis=0)) ** 2).sum() * n
    assert abs(found.effect_stderr - unlike) > 0.1 * jackknife


def test_the_error_of_a_change_of_accuracy_is_paired() -> None:
    before, after, targets = logits(300)
    found = over_draws([outputs(before, targets, "kl").compare(after.split(40))])
    was, now = (before.argmax(1) == targets).numpy(), (after.argmax(1) == targets).numpy()
    lost, won, n = int((was & ~now).sum()), int((now & ~was).sum()), len(was)
    assert lost > won > 0
    # The closed form of discordant pairs.
    expected = math.sqrt((lost + won - (lost - won) ** 2 / n) / (n * (n - 1)))
    assert found.metric == pytest.approx(now.mean())
    assert found.metric_stderr == pytest.approx(expected, rel=1e-12)
    unpaired = math.hypot(sem(was), sem(now))
    assert found.metric_stderr < 0.9 * unpaired


def test_positions_of_one_sample_are_one_unit() -> None:
    before, after, targets = logits()
    alone = over_draws([outputs(before, targets, "kl").compare(after.split(40))])
    b, a = (t[:, :, None].expand(-1, -1, 5) for t in (before, after))
    together = over_draws([outputs(b, targets[:, None].expand(-1, 5), "kl").compare(a.split(40))])
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_samples_of_unequal_length_weigh_by_their_positions() -> None:
    parts = [normal(20, 3, length, seed=length) for length in (2, 7)]
    altered = [part + 0.5 * normal(*part.shape, seed=9) for part in parts]
    targets = [torch.zeros(20, part.shape[2], dtype=torch.long) for part in parts]
    given = Outputs(parts, list(zip(parts, targets, strict=True)), "kl", None)
    found = over_draws([given.compare(altered)])
    sums = np.concatenate([kl_divergence(p, a).sum(1) for p, a in zip(parts, altered, strict=True)])
    lengths = np.repeat([2.0, 7.0], 20)
    assert found.effect == pytest.approx(sums.sum() / lengths.sum(), rel=1e-12)
    rest = sums - found.effect * lengths
    assert found.effect_stderr == pytest.approx(math.sqrt(40 * rest.var(ddof=1)) / lengths.sum())
    was, now = (np.concatenate([(p.argmax(1) == 0).sum(1) for p in each]) for each in (parts, altered))
    assert (given.metric, found.metric) == (was.sum() / 180, pytest.approx(now.sum() / 180))
    rest = now - was - (found.metric - given.metric) * lengths
    assert found.metric_stderr == pytest.approx(math.sqrt(40 * rest.var(ddof=1)) / lengths.sum())


@pytest.mark.parametrize("scale", ["kl", "relative"])
@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_wide_outputs_are_compared_piece_by_piece(
    scale: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = normal(30, 5, 4), normal(30, 5, 4, seed=1)
    targets = torch.zeros(30, 4, dtype=torch.long)
    whole = outputs(before, targets, scale).compare(after.split(40))
    monkeypatch.setattr("lightning_koopman.effects.means._VALUES_AT_ONCE", at_once)
    pieces = outputs(before, targets, scale).compare(after.split(40))
    np.testing.assert_allclose(pieces.moved, whole.moved, rtol=1e-13)
    np.testing.assert_allclose(pieces.whole, whole.whole, rtol=1e-13)


def test_of_altered_outputs_one_batch_is_kept_at_a_time() -> None:
    before, after, targets = logits()
    given, held = outputs(before, targets, "kl", size=10), list[weakref.ref[Tensor]]()

    def altered() -> Iterator[Tensor]:
        for part in after.split(10):
            assert not [ref for ref in held if ref() is not None]
            own = part.clone()
            held.append(weakref.ref(own))
            yield own
            del own

    expected = kl_divergence(before, after).mean()
    assert given.compare(altered()).effect == pytest.approx(float(expected), rel=1e-12)
    assert len(held) == 9


def test_altered_outputs_of_another_shape_are_refused() -> None:
    before, after, targets = logits()
    given = outputs(before, targets, "kl")
    with pytest.raises(ValueError, match=r"outputs of shape \(40, 2\), otherwise of \(40, 3\), which"):
        given.compare(after[:, :2].split(40))


def test_outputs_of_other_numbers_of_axes_are_refused() -> None:
    parts = [normal(40, 3), normal(40, 3, 2)]
    given = Outputs(parts, parts, "relative", None)
    with pytest.raises(ValueError, match=r"shapes \(3,\) and \(3, 2\) per sample arrived"):
        given.compare(parts)


def change(moved: Tensor) -> Change:
    return Change(moved, torch.ones_like(moved), 0.5)


def test_draws_add_the_error_of_their_mean_in_quadrature() -> None:
    moved = normal(5, 60).exp() * normal(5, 1, seed=1).exp()
    found = over_draws([change(row) for row in moved])
    by_sample, by_draw = moved.mean(0).numpy(), moved.mean(1).numpy()
    assert found.effect == pytest.approx(float(moved.mean()), rel=1e-12)
    assert found.effect_stderr == pytest.approx(math.hypot(sem(by_sample), sem(by_draw)), rel=1e-12)
    equal = over_draws([change(moved[0])] * 4)
    assert equal.effect_stderr == pytest.approx(sem(moved[0].numpy()), rel=1e-12)


def test_the_error_is_the_spread_over_fresh_samples_and_draws() -> None:
    def fresh(seed: int) -> tuple[float, float]:
        samples, draws = normal(1, 50, seed=seed), normal(6, 1, seed=1000 + seed)
        moved = 3 + samples + draws + normal(6, 50, seed=2000 + seed)
        found = over_draws([change(row) for row in moved])
        return found.effect, found.effect_stderr

    effects, errors = np.array([fresh(seed) for seed in range(400)]).T
    # The variance that both factors share, 1/300 of 0.19, is counted twice.
    assert np.sqrt((errors**2).mean()) == pytest.approx(effects.std(ddof=1), rel=0.1)


def test_what_has_no_error_has_none() -> None:
    before, after, targets = logits()
    assert math.isnan(over_draws([change(normal(1))]).effect_stderr)
    batches = list(zip([before], [targets], strict=True))
    given = Outputs([before], batches, "kl", lambda outputs, targets: 7.0)
    found = over_draws([given.compare([after])])
    assert found.metric == pytest.approx(7)
    assert math.isnan(found.metric_stderr)
    assert over_draws([given.compare([before])]).effect_stderr == 0


def in_batches(moved: Tensor, n_batches: int) -> Change:
    batch = torch.arange(n_batches).repeat_interleave(len(moved) // n_batches)
    return Change(moved, torch.ones_like(moved), 0.5, batch=batch)


def test_where_batches_differ_by_more_than_chance_the_error_is_that_of_their_means() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(10, 1, dtype=torch.float64, generator=generator)
    noise = torch.randn(10, 50, dtype=torch.float64, generator=generator)
    moved = (3 + means + 0.5 * noise).flatten()
    found = over_draws([in_batches(moved, 10)])
    expected = sem(moved.view(10, 50).mean(dim=1).numpy())
    assert found.effect_stderr == pytest.approx(expected, rel=1e-12)
    assert over_draws([change(moved)]).effect_stderr == pytest.approx(sem(moved.numpy()), rel=1e-12)
    assert expected > 5 * sem(moved.numpy())
    # Groups that each used a mean of their own lie within a batch.
    group = torch.arange(50).repeat_interleave(10)
    shifted = in_batches(moved, 10)
    apart = over_draws([shifted.by_group(shifted, 0.1, group)])
    assert apart.effect_stderr == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n_batches", [2, 3, 6, 20])
def test_batches_take_the_place_of_samples_beyond_the_99th_percentile_of_chi_square(
    n_batches: int,
) -> None:
    size, freedom = 10, n_batches - 1
    n, percentile = n_batches * size, float(chi2.ppf(0.99, freedom)) / freedom
    apart = torch.arange(n_batches, dtype=torch.float64) - (n_batches - 1) / 2
    noise = normal(n_batches, size)
    noise -= noise.mean(dim=1, keepdim=True)
    # The variance from batches over that from samples is the ratio, by the definitions of both.
    squares, rest = float(apart.square().sum()), float(noise.square().sum()) * n / (n - 1)
    for ratio, is_beyond in ((0.97 * percentile, False), (1.03 * percentile, True)):
        between = size**2 * squares * n_batches / freedom - ratio * size * squares * n / (n - 1)
        moved = (noise + math.sqrt(ratio * rest / between) * apart[:, None]).flatten()
        alone = over_draws([change(moved)]).effect_stderr
        found = over_draws([in_batches(moved, n_batches)]).effect_stderr
        assert (found / alone) ** 2 == pytest.approx(ratio if is_beyond else 1, rel=1e-9)


def test_a_metric_that_falls_in_some_batches_alone_has_the_error_of_their_means() -> None:
    before, _, targets = logits(400)
    after = torch.where(torch.arange(400)[:, None] % 100 < 50, -before, before)
    found = over_draws([outputs(before, targets, "kl", 50).compare(after.split(50))])
    gained = (after.argmax(1) == targets).double() - (before.argmax(1) == targets).double()
    expected = sem(gained.view(8, 50).mean(dim=1).numpy())
    assert found.metric_stderr == pytest.approx(expected, rel=1e-12)
    assert expected > 5 * sem(gained.numpy())


def test_batches_of_independent_samples_change_no_error_but_once_in_a_hundred() -> None:
    generator = torch.Generator().manual_seed(0)
    changed = 0
    for _ in range(1000):
        moved = torch.rand(160, dtype=torch.float64, generator=generator)
        alone, found = over_draws([change(moved)]), over_draws([in_batches(moved, 8)])
        assert found.effect_stderr >= alone.effect_stderr
        changed += found.effect_stderr > alone.effect_stderr
    assert 2 <= changed <= 22
    one = over_draws([in_batches(moved, 1)])
    assert one.effect_stderr == over_draws([change(moved)]).effect_stderr
