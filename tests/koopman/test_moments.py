"""Streaming moments against covariances computed at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_koopman.koopman.moments import Covariances, Layout, accumulate, covariances


def chain(n: int, dims: tuple[int, ...], seed: int = 0, offset: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dims[0], generator=generator, dtype=torch.float64) + offset
    states = [x]
    for a, b in itertools.pairwise(dims):
        weight = torch.randn(a, b, generator=generator, dtype=torch.float64) / a**0.5
        states.append(torch.tanh(states[-1] @ weight))
    return states


def gathered(layout: Layout, states: list[Tensor], folds: Tensor) -> Tensor:
    moments = layout.zeros()
    accumulate(layout, moments, states, folds)
    return moments


@pytest.mark.parametrize("delay", [1, 2, 3])
@pytest.mark.parametrize("dims", [(4, 3, 5, 2), (1, 1, 1, 1), (2, 6, 3, 3)], ids=str)
def test_covariances_are_those_of_numpy(dims: tuple[int, ...], delay: int) -> None:
    states = chain(60, dims, offset=0.3)
    layout = Layout(dims, 3, delay)
    moments = gathered(layout, states, torch.arange(60) % 3)
    given = covariances(layout, moments.sum(dim=0))
    joint = np.cov(torch.cat(states, dim=1).numpy(), rowvar=False, bias=True)
    edges = np.cumsum([0, *dims])
    assert given.count == 60
    for i, j in layout.pairs:
        expected = joint[edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
        assert np.allclose(given[i, j].numpy(), expected, rtol=0, atol=1e-12)
        assert torch.allclose(given[j, i], given[i, j].T, rtol=1e-12, atol=1e-14)
    for mean, state in zip(given.means, states, strict=True):
        assert torch.allclose(mean, state.mean(0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_states_many_rows_and_an_offset_agree_with_numpy(dtype: torch.dtype) -> None:
    # So wide and long that symmetric products are computed in part and mirrored.
    states = [state.to(dtype) for state in chain(900, (150, 201, 4), offset=2.0)]
    center = [state.double().mean(0) + 0.01 for state in states]
    layout, folds = Layout((150, 201, 4), 3), torch.arange(900) % 3
    moments = layout.zeros()
    accumulate(layout, moments, states, folds, center)
    given = covariances(layout, moments.sum(dim=0))
    joint = np.cov(torch.cat(states, dim=1).double().numpy(), rowvar=False, bias=True)
    edges = np.cumsum([0, *layout.dims])
    for i, j in layout.pairs:
        expected = joint[edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
        assert np.allclose(given[i, j].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("group_width", [20, 32, 1536])
@pytest.mark.parametrize("nearest", [8, 12])
def test_many_states_side_by_side_have_the_covariances_of_numpy(
    nearest: int, group_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a dense network: each step reads as many states before it as it may, the last one two more.
    monkeypatch.setattr("lightning_koopman.koopman.moments._GROUP_WIDTH", group_width)
    dims = (2, 3, 1, 2, 3, 2, 1, 2, 3, 2, 2, 1, 2, 4)
    links = tuple(tuple(range(max(0, i - nearest), i)) for i in range(1, len(dims)))
    links = (*links[:-1], (1, *links[-1][1:]))
    states, folds = chain(90, dims, offset=0.5), torch.arange(90) % 3
    layout = Layout(dims, 3, 0, links)
    moments = gathered(layout, states, folds)
    total, edges = moments.sum(dim=0), np.cumsum([0, *dims])
    given, values = covariances(layout, total, without=moments), torch.cat(states, dim=1)
    joints = [torch.cov(values[folds != k].T, correction=0) for k in range(3)]
    for i, read in enumerate(layout.parents[1:], start=1):
        units = [unit for p in read for unit in range(edges[p], edges[p + 1])]
        c_xx, c_xy = given.normal_equations(read, i)
        c_xz = given.across(read, len(dims) - 1)
        for k, joint in enumerate(joints):
            y, z = joint[units, edges[i] : edges[i + 1]], joint[units, edges[-2] :]
            for found, expected in ((c_xx[k], joint[units][:, units]), (c_xy[k], y), (c_xz[k], z)):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("about", [None, 0, 2])
def test_what_is_left_out_and_the_variances_are_those_of_the_samples(about: int | None) -> None:
    states = chain(50, (4, 3, 2), offset=3.0)
    folds = torch.arange(50) % 5
    layout = Layout((4, 3, 2), 5)
    moments = gathered(layout, states, folds)
    means = None if about is None else [s[folds == about].mean(0) for s in states]
    given = covariances(layout, moments.sum(0), without=moments[1], about=means)
    rest = [s[folds != 1] for s in states]
    means = [s.mean(0) for s in rest] if means is None else means
    apart = [(s - mean).numpy() for s, mean in zip(rest, means, strict=True)]
    assert given.count == 40
    for i, j in layout.pairs:
        assert np.allclose(given[i, j].numpy(), apart[i].T @ apart[j] / 40, rtol=0, atol=1e-11)
    for i, variances in enumerate(given.variances):
        assert np.allclose(variances.numpy(), (apart[i] ** 2).mean(0), rtol=0, atol=1e-11)
        assert torch.equal(given.means[i], means[i]) or about is None


@pytest.mark.parametrize("dealt", [1, 3])
def test_a_centre_is_taken_off_every_state_and_the_states_stay(dealt: int) -> None:
    states, folds = chain(40, (4, 3, 2), offset=5.0), torch.arange(40) % dealt
    layout = Layout((4, 3, 2), 3)
    center = [torch.linspace(1, 2, s.shape[1], dtype=torch.float64) for s in states]
    given, before = layout.zeros(), [s.clone() for s in states]
    accumulate(layout, given, states, folds, center)
    assert all(map(torch.equal, states, before))
    expected = gathered(layout, [s - c for s, c in zip(states, center, strict=True)], folds)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)
    # States in single precision are summed in double.
    single, double = layout.zeros(), layout.zeros()
    accumulate(layout, single, [s.float() for s in states], folds, center)
    accumulate(layout, double, [s.float().double() for s in states], folds, center)
    torch.testing.assert_close(single, double, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("width", "n"), [(65, 300), (128, 300), (129, 100), (129, 300), (200, 300)])
def test_products_of_a_wide_state_are_those_of_numpy_on_both_sides(width: int, n: int) -> None:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layout = Layout((width, 1), 2)
    given = gathered(layout, [x, x[:, :1]], torch.zeros(n, dtype=torch.int64))
    products = given[0, layout.slices[0, 0]].view(width, width).numpy()
    assert np.allclose(products, x.numpy().T @ x.numpy(), rtol=0, atol=1e-10)


def test_of_a_state_that_no_step_reads_the_diagonal_is_enough() -> None:
    states, folds = chain(40, (4, 3, 6)), torch.arange(40) % 4
    whole, small = Layout((4, 3, 6), 4), Layout((4, 3, 6), 4, squares=(2,))
    assert small.size == whole.size - 36 + 6
    rows = [gathered(layout, states, folds) for layout in (whole, small)]
    full = covariances(whole, rows[0].sum(0), without=rows[0][2])
    part = covariances(small, rows[1].sum(0), without=rows[1][2])
    assert torch.allclose(part.variances[2], full.variances[2], rtol=0, atol=1e-14)
    assert torch.allclose(part[1, 2], full[1, 2], rtol=0, atol=1e-14)


@pytest.mark.parametrize("delay", [1, 2])
def test_pairs_kept_are_those_within_the_delay_and_with_the_output(delay: int) -> None:
    layout = Layout((1, 1, 1, 1), 2, delay)
    expected = {(i, j) for i in range(4) for j in range(i, 4) if j - i <= delay or j == 3}
    assert set(layout.pairs) == expected
    assert layout.size == 1 + 4 + len(expected)
    assert layout.zeros().shape == (2, layout.size)
    assert layout.zeros().dtype == torch.float64


@pytest.mark.parametrize("dims", [(4, 3, 5, 2), (7, 7), (256,) * 13], ids=str)
@pytest.mark.parametrize("folds", [2, 5])
def test_memory_follows_the_documented_formula(dims: tuple[int, ...], folds: int) -> None:
    layout = Layout(dims, folds)
    products = sum(a * b for a, b in itertools.pairwise(dims)) + sum(d * d for d in dims)
    with_output = sum(d * dims[-1] for d in dims[:-2])
    moments = layout.zeros()
    assert moments.nbytes == 8 * folds * (1 + sum(dims) + products + with_output)
    # Samples fill it, and never make it grow.
    accumulate(layout, moments, [torch.ones(9, d) for d in dims], torch.arange(9) % folds)
    assert moments.nbytes == 8 * folds * layout.size


def test_links_add_to_the_states_that_a_step_reads() -> None:
    layout = Layout((1, 1, 1, 1, 1), 2, 1, ((), (), (0,), (3, 1)))
    assert layout.parents == ((), (0,), (1,), (2, 0), (3, 1))
    for i, read in enumerate(layout.parents):
        for p in read:
            assert (p, i) in layout.pairs
            assert all((min(p, q), max(p, q)) in layout.pairs for q in read)
    full = ((), (0,), (1, 0), (2, 1, 0))
    assert Layout((1,) * 5, 2, 1, full).parents == Layout((1,) * 5, 2, 4).parents


def test_a_fold_without_samples_stays_zero() -> None:
    states = chain(10, (3, 2))
    layout = Layout((3, 2), 3)
    moments = gathered(layout, states, torch.ones(10, dtype=torch.int64))
    assert moments[:, 0].tolist() == [0, 10, 0]
    assert not moments[[0, 2]].any()
    empty = covariances(layout, moments[0])
    assert empty.count == 0
    assert not empty[0, 1].any()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 7.7, 1e8 / 3, -1e-30])
@pytest.mark.parametrize("n", [7, 100, 1000])
def test_a_constant_unit_has_exactly_no_covariance(value: float, n: int) -> None:
    states = chain(n, (3, 4, 2))
    states[1][:, 2] = value
    layout = Layout((3, 4, 2), 3)
    moments = layout.zeros()
    for rows in torch.arange(n).split(13):
        accumulate(layout, moments, [s[rows] for s in states], rows % 3)
    given = covariances(layout, moments.sum(0))
    assert not given[1, 1][2].any()
    assert not given[1, 1][:, 2].any()
    assert not given[0, 1][:, 2].any()
    assert not given[1, 2][2].any()
    assert given[1, 1].diagonal()[[0, 1, 3]].min() > 1e-3
    assert float(given.means[1][2]) == pytest.approx(value)


def test_a_unit_far_from_zero_is_not_taken_for_constant() -> None:
    states = chain(200, (3, 2))
    states[0] = states[0] + 1e5
    layout = Layout((3, 2), 2)
    given = covariances(layout, gathered(layout, states, torch.arange(200) % 2).sum(0))
    expected = states[0].var(0, correction=0)
    assert torch.allclose(given[0, 0].diagonal(), expected, rtol=1e-3)


def test_squares_beyond_double_precision_are_refused_or_count_as_constant() -> None:
    states, layout = chain(50, (3, 2)), Layout((3, 2), 2)

    def of_scale(scale: float) -> Covariances:
        rows = [states[0] * scale, states[1]]
        return covariances(layout, gathered(layout, rows, torch.arange(50) % 2).sum(0))

    with pytest.raises(ValueError, match="so large that their squares are beyond double precision"):
        of_scale(1e155)
    for exponent in (-400, 400):
        expected = torch.cov(states[0].T, correction=0)
        assert torch.allclose(of_scale(2.0**exponent)[0, 0] / 2.0 ** (2 * exponent), expected)
    assert not of_scale(1e-160)[0, 0].any()


def test_layouts_that_serve_no_operator_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of at least 2 states arrived; pass the state before"):
        Layout((3,), 5)
    with pytest.raises(ValueError, match=r"dims is \[3, 0, 2\]; each is the width of a state"):
        Layout((3, 0, 2), 5)
    with pytest.raises(ValueError, match="folds is 1; held-out R² needs at least 2"):
        Layout((3, 2), 1)
    with pytest.raises(ValueError, match="delay is 3; with 2 components it must lie between 1 and 2"):
        Layout((3, 2, 2), 5, 3)
    with pytest.raises(ValueError, match="delay is 0"):
        Layout((3, 2, 2), 5, 0)
    with pytest.raises(ValueError, match="links has 1 entries for 2 steps"):
        Layout((3, 2, 2), 5, 1, ((0,),))
    with pytest.raises(ValueError, match=r"links of step 1 are \(1,\); a step reads states 0 … 0 only"):
        Layout((3, 2, 2), 5, 1, ((1,), ()))
