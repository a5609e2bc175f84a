"""Rows are gathered, reduced and added up: one basis, whatever the batches."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_koopman import CreditReport
from lightning_koopman.koopman.options import Options
from lightning_koopman.koopman.states import fit_basis, pod_basis, sample_keys
from lightning_koopman.measurement.accumulator import Accumulator
from lightning_koopman.network.runs.samples import spread_over


class Gathered(Accumulator):
    """Keeps the state vectors, in place of their moments."""

    def __init__(self, max_dim: int, seed: int = 0, observables: Any = None, **how: Any) -> None:
        super().__init__(Options(max_dim=max_dim, seed=seed, observables=observables), **how)
        self.blocks: list[tuple[list[Tensor], Tensor]] = []

    def _sum(self, states: list[Tensor], keys: Tensor) -> None:
        # What is handed over is overwritten by what comes next.
        self.blocks.append(([state.clone() for state in states], keys))

    @property
    def sizes(self) -> list[int]:
        return [len(keys) for _, keys in self.blocks]

    @property
    def states(self) -> list[Tensor]:
        return [torch.cat(column) for column in zip(*(states for states, _ in self.blocks), strict=True)]

    @property
    def keys(self) -> Tensor:
        return torch.cat([torch.empty(0).long(), *(keys for _, keys in self.blocks)])


def reduced(gathered: Gathered, states: dict[str, Tensor], batch: int) -> Gathered:
    """Stream in batches and gather what comes out."""
    for parts in zip(*(rows.split(batch) for rows in states.values()), strict=True):
        gathered.push(dict(zip(states, parts, strict=True)))
    gathered.flush()
    return gathered


@pytest.mark.parametrize("batch", [1, 5, 16, 37, 100])
def test_batch_size_changes_neither_basis_nor_rows(batch):
    states = {"input": torch.randn(100, 6).double(), "wide": torch.randn(100, 20).double()}
    given, other = (reduced(Gathered(8), states, size) for size in (100, batch))
    assert torch.equal(given.keys, other.keys)
    for a, b in zip(given.states, other.states, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_first", [10, 64])
def test_wide_states_are_projected_on_their_principal_directions(n_first):
    max_dim = n_first // 2
    scales = torch.logspace(0, -3, 40, dtype=torch.float64)
    rows = torch.randn(200, 40, dtype=torch.float64) * scales + 3
    reducer = Gathered(max_dim)
    given = reduced(reducer, {"input": torch.randn(200, 3), "wide": rows}, 7).states[1].numpy()
    first = rows[:n_first].numpy()
    _, values, vh = np.linalg.svd(first - first.mean(0), full_matrices=False)
    kept = min(max_dim, n_first - 1)
    projected = rows.numpy() @ vh[:kept].T
    assert given.shape == (200, kept)
    # Directions are defined up to sign.
    assert np.allclose(np.abs(given), np.abs(projected), rtol=0, atol=1e-7)
    share = (values[:kept] ** 2).sum() / (values**2).sum()
    assert reducer.basis.kept_variance[1] == pytest.approx(share, abs=1e-10)
    assert reducer.basis.kept_variance[0] == 1
    # What is reported is about all samples, not about those that the directions were chosen by.
    of_all = projected.var(0).sum() / rows.numpy().var(0).sum()
    assert reducer._spreads is not None
    assert reducer.basis.kept(reducer._spreads, 200) == pytest.approx((1, of_all), abs=1e-10)
    assert reducer.basis is not None
    assert [len(center) for center in reducer.basis.center] == [3, kept]
    assert torch.allclose(reducer.basis.center[1], torch.from_numpy(given[:n_first].mean(0)), atol=1e-9)


def test_a_wide_state_that_never_moves_keeps_one_value():
    states = {"input": torch.randn(50, 3), "dead": torch.zeros(50, 30)}
    given = reduced(Gathered(8), states, 10)
    assert given.states[1].shape == (50, 1)
    assert not given.states[1].any()


def test_rows_are_handed_on_in_full_blocks_and_never_hoarded(monkeypatch):
    monkeypatch.setattr("lightning_koopman.measurement.accumulator._MOST_ROWS", 32)
    reducer = Gathered(8)
    given = torch.randn(150, 3)
    for rows in given.split(5):
        reducer.push({"input": rows, "a": rows[:, :2]})
    # The basis takes 2 * max_dim rows, which are gathered in it with what follows, into larger blocks.
    assert reducer.sizes == [32, 32, 32, 32]
    reducer.flush()
    reducer.flush()
    assert reducer.sizes[4:] == [22]
    assert torch.equal(reducer.states[0], given)


def test_blocks_of_wide_states_take_bounded_memory(monkeypatch):
    monkeypatch.setattr("lightning_koopman.measurement.accumulator._MOST_VALUES", 1000)
    reducer = Gathered(8)
    states = {"input": torch.randn(40, 20), "a": torch.randn(40, 20)}
    for _ in range(3):
        reducer.push(states)
    # A row gathered is the input and two reduced states: 20 + 8 + 8 values.
    assert reducer.sizes == 4 * [1000 // 36]


def test_states_that_change_their_shape_are_refused():
    reducer = Gathered(8)
    first = {"input": torch.randn(5, 3), "a": torch.randn(5, 2)}
    reducer.push(first)
    for states, message in (
        (first | {"a": torch.randn(4, 2)}, "'a' has 4 rows in batch 1, but 'input' has 5"),
        (first | {"a": torch.randn(5, 7)}, "'a' has 7 values per sample in batch 2, but 2 before"),
    ):
        with pytest.raises(ValueError, match=message):
            reducer.push(states)


@pytest.mark.parametrize("agreed", [True, False])
def test_rows_that_were_held_until_a_basis_was_agreed_on_come_out_the_same(agreed):
    generator = torch.Generator().manual_seed(0)
    states = {
        name: torch.randn(50, width, generator=generator, dtype=torch.float64)
        for name, width in (("input", 12), ("a", 9))
    }
    reducer = Gathered(4, shared=True)
    for first in range(0, 50, 7):
        reducer.push({name: x[first : first + 7] for name, x in states.items()})
    assert reducer.waits
    assert not reducer.blocks
    for places in ([3], [6, 7], [0, 13, 14, 49], range(50)):
        rows = reducer.held_rows(places)
        assert all(map(torch.equal, rows, [x[[*places]] for x in states.values()]))
    # 2 * max_dim rows from everywhere fix the bases, here or elsewhere.
    chosen = [2, 8, 14, 20, 27, 33, 39, 45]
    basis = fit_basis([x[chosen] for x in states.values()], 4)
    if agreed:
        reducer.basis = basis
    reducer.flush()
    assert reducer.basis is not None
    for own, expected in zip(reducer.basis.vectors, basis.vectors, strict=True):
        assert torch.equal(own, expected)
    alone = Gathered(4)
    alone.basis = basis
    alone = reduced(alone, states, 50)
    assert torch.equal(reducer.keys, alone.keys)
    assert torch.equal(alone.keys, sample_keys(states["input"]))
    for found, expected in zip(reducer.states, alone.states, strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_held", [12, 24, 60])
def test_bases_of_sorted_samples_are_fitted_to_some_of_all_that_are_held(n_held):
    """Each of six kinds varies in directions of its own, and comes in one piece."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(60) // 10
    x = torch.randn(60, 6, 3, generator=generator) * (kind[:, None, None] == torch.arange(6)[:, None])
    states = {"input": torch.randn(60, 2, generator=generator), "a": x.flatten(1)}
    # So many rows as bases take are held in any case.
    held = Gathered(6, hold=n_held * 4 * (2 + 2 + 18) - 1 if n_held > 12 else 1)
    reduced(held, states, 4)
    assert held.basis is not None
    expected, share = pod_basis(x.flatten(1)[:n_held][spread_over(12, n_held)], 6)
    expected = expected.float()
    assert torch.equal(held.basis.vectors[1], expected)
    assert held.basis.kept_variance[1] == share
    # All rows are there, in their order, and so is what tells how much of them is kept.
    assert torch.allclose(torch.cat([s[1] for s, _ in held.blocks]), x.flatten(1) @ expected, atol=1e-5)
    assert torch.equal(held.keys, sample_keys(states["input"]))
    centred = x.flatten(1) - x.flatten(1).mean(dim=0)
    kept = float((centred @ expected).square().sum() / centred.square().sum())
    assert held.basis.kept(held._spreads, 60)[1] == pytest.approx(kept, 1e-5)
    assert held.n_samples == 60


def test_no_more_is_taken_than_told_and_samples_are_hashed_by_the_seed():
    x = torch.randn(9, 3, dtype=torch.float64)
    for most in (0, 1, 5):
        reducer = Gathered(3, seed=7, shared=True, max_samples=most)
        reducer.push({"input": x, "a": 2 * x})
        # No state is wider than max_dim, so there is nothing to wait for.
        assert not reducer.waits
        reducer.flush()
        assert (reducer.n_seen, reducer.n_samples) == (9, most)
        assert torch.equal(reducer.keys, sample_keys(x[:most], 7))


def test_processes_wait_for_one_lift_but_not_for_a_function():
    for observables, waits in (("rff", True), (lambda x: x.square(), False), (None, False)):
        reducer = Gathered(8, shared=True, observables=observables)
        reducer.push({"input": torch.randn(40, 3), "a": torch.randn(40, 2)})
        assert reducer.waits is waits
        assert (reducer.basis is None) is waits


def wide_report(n_samples: int, observables: Any) -> tuple[CreditReport, list[str]]:
    generator = torch.Generator().manual_seed(n_samples)
    accumulator = Accumulator(Options(max_dim=8, observables=observables))
    x = torch.randn(n_samples, 30, generator=generator, dtype=torch.float64)
    accumulator.push({"x_0": x, "a": x.tanh(), "b": x[:, :9].sin(), "c": x[:, :3]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = accumulator.credit_report(())
    return report, [str(w.message) for w in caught if "samples are few" in str(w.message)]


@pytest.mark.parametrize(
    ("observables", "width"),
    [(None, 8), ("polynomial", 44), ("rff", 16), ("rbf", 16), (lambda x: torch.cat([x, x * x], 1), 16)],
    ids=["none", "polynomial", "rff", "rbf", "function"],
)
@pytest.mark.parametrize("n_samples", [4, 7])
def test_the_number_of_samples_advised_is_enough_once_it_is_taken(n_samples, observables, width):
    # Twice the widest regressors that more samples could give, in four folds of five.
    enough = math.ceil(2 * width * 5 / 4)
    report, warned = wide_report(n_samples, observables)
    note = f"{n_samples} samples are few for states this wide; take {enough} or more"
    assert warned == [note]
    assert note in report.notes
    report, warned = wide_report(enough, observables)
    assert warned == []
    assert "samples are few" not in "".join(report.notes)


def test_a_basis_is_held_to_what_it_keeps_of_all_samples():
    torch.manual_seed(0)
    # Of few rows, directions keep much that others do not have.
    rows = torch.randn(600, 30) @ torch.diag(torch.linspace(3, 1, 30))
    first = Accumulator(Options(max_dim=10))
    first.push({"input": rows[:, :2], "wide": rows})
    own, lasting = first.moments() and first.basis, first.lasting_basis
    assert own is not None
    assert lasting is not None
    vectors = own.vectors[1]
    assert vectors is not None
    centred = (rows - rows.mean(dim=0)).double()
    kept = float((centred @ vectors.double()).square().sum() / centred.square().sum())
    assert lasting.kept_variance == (1.0, pytest.approx(kept, rel=1e-5))
    assert lasting.kept_variance[1] < own.kept_variance[1] - 0.05

    def later(states: Tensor, earlier: Any) -> Accumulator:
        again = Accumulator(Options(max_dim=10))
        again.earlier = earlier
        again.push({"input": states[:, :2], "wide": states})
        again.flush()
        return again

    # The same samples after some training: the directions are as good as before.
    moved = rows + 0.5 * torch.randn(600, 30)
    again = later(moved, lasting)
    assert torch.equal(again.basis.vectors[1], vectors)
    assert again.lasting_basis.kept_variance == lasting.kept_variance
    assert not torch.equal(later(moved, own).basis.vectors[1], vectors)
    # Turned, they are not.
    assert not torch.equal(later(rows.flip(1), lasting).basis.vectors[1], vectors)


def test_nothing_measured_has_no_basis_to_last():
    assert Accumulator(Options()).lasting_basis is None
