"""Pooling, the frozen POD basis, and the keys that choose folds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from lightning_koopman.koopman.states import Snapshots, StateReducer, pod_basis, sample_keys
from lightning_koopman.network.rows import RowForm, has_channels_first, pooled_grid


def pool(tensor: Tensor, max_dim: int, *, channels_first: bool) -> Tensor:
    grid = pooled_grid(tuple(tensor.shape[1:]), max_dim, channels_first=channels_first)
    return RowForm(channels_first=channels_first, grid=grid).rows(tensor)


def pooled(shape: tuple[int, ...], max_dim: int, *, channels_first: bool = True) -> Tensor:
    return pool(torch.randn(shape), max_dim, channels_first=channels_first)


@pytest.mark.parametrize(
    ("shape", "max_dim", "width"),
    [
        ((5, 7), 3, 7),  # flat states are never pooled
        ((5, 2, 4, 4), 32, 32),  # narrow enough: only flattened
        ((5, 2, 16, 16), 32, 2 * 64),  # 16 cells would keep fewer than four values a direction
        ((5, 64, 28, 28), 256, 64 * 16),
        ((5, 512, 7, 7), 64, 512),  # 2 cells would do, a square grid of 1 is taken
        ((5, 3, 100), 32, 3 * 43),
        ((5, 2, 9, 9, 9), 32, 2 * 64),
        ((5, 2, 6, 6, 6, 6), 32, 2 * 64),
        ((5, 2, 3, 100), 32, 2 * 3 * 8),  # an axis shorter than the grid stays as it is
    ],
    ids=str,
)
def test_wide_grids_are_pooled_to_few_cells(shape: tuple[int, ...], max_dim: int, width: int) -> None:
    assert pooled(shape, max_dim).shape == (5, width)


def test_pooling_averages_blocks_of_pixels() -> None:
    image = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    expected = image.numpy().reshape(3, 2, 4, 2, 4, 2).mean(axis=(3, 5)).reshape(3, -1)
    assert np.allclose(pool(image, 8, channels_first=True).numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 8, 28, 28), (2, 16, 7, 9), (2, 5, 4, 6, 6)], ids=str)
def test_cells_of_images_and_volumes_are_those_of_adaptive_pooling(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    values = torch.randn(shape).to(dtype)
    rows = pool(values, 32, channels_first=True)
    side = round((rows.shape[1] / shape[1]) ** (1 / (len(shape) - 2)))
    pools = {4: nn.functional.adaptive_avg_pool2d, 5: nn.functional.adaptive_avg_pool3d}
    expected = pools[len(shape)](values.double(), [side] * (len(shape) - 2)).flatten(1)
    assert rows.shape[1] < values[0].numel()
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    assert torch.allclose(rows.double(), expected, rtol=0, atol=tolerance)
    # Also where the pass runs in autocast, whose products keep half the digits.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pool(values, 32, channels_first=True), rows)


def test_sequences_with_channels_last_are_pooled_over_time() -> None:
    sequence = torch.randn(3, 32, 5, dtype=torch.float64)
    rows = pool(sequence, 8, channels_first=False)
    expected = sequence.numpy().reshape(3, 16, 2, 5).mean(axis=2).transpose(0, 2, 1).reshape(3, -1)
    assert np.allclose(rows.numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_rows_are_at_least_single_precision(given: torch.dtype, kept: torch.dtype) -> None:
    for shape in ((4, 3), (4, 2, 8, 8)):
        assert pool(torch.ones(shape, dtype=given), 8, channels_first=True).dtype == kept


@pytest.mark.parametrize("shape", [(4, 3), (4,), (4, 2, 3)], ids=str)
def test_rows_are_a_copy(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, requires_grad=True)
    rows = pool(tensor, 100, channels_first=True)
    with torch.no_grad():
        tensor.add_(1)
    assert not rows.any()
    assert not rows.requires_grad
    assert rows.ndim == 2


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0)], ids=str)
def test_a_state_without_samples_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a state of shape \(.*\) holds no sample; rows are samples"):
        pool(torch.zeros(shape), 8, channels_first=True)


def test_the_layout_is_told_from_the_module() -> None:
    sequence, image = torch.ones(2, 3, 4), torch.ones(2, 3, 4, 4)
    assert not has_channels_first(sequence, nn.Linear(4, 4))
    assert not has_channels_first(sequence, nn.LayerNorm(4))
    assert has_channels_first(sequence, nn.Conv1d(3, 3, 1))
    assert has_channels_first(sequence, nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))
    assert has_channels_first(image, nn.ReLU())


ROWS = {
    "normal": lambda g: torch.randn(20000, 8, generator=g),
    "one column": lambda g: torch.linspace(0, 1, 20000)[:, None],
    "whole numbers": lambda g: torch.arange(20000.0)[:, None],
    "pixels": lambda g: torch.randint(0, 17, (20000, 64), generator=g).float(),
    "bytes over 255": lambda g: torch.randint(0, 256, (20000, 64), generator=g) / 255,
    "zero and one": lambda g: torch.randint(0, 2, (20000, 40), generator=g).float(),
    "minus one and one": lambda g: torch.randint(0, 2, (20000, 40), generator=g) * 2.0 - 1,
    "half precision": lambda g: torch.randn(20000, 8, generator=g).half(),
    "sparse": lambda g: torch.randn(20000, 50, generator=g) * (torch.rand(20000, 50, generator=g) < 0.1),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ROWS)
def test_keys_are_spread_evenly(kind: str, seed: int) -> None:
    rows = torch.unique(ROWS[kind](torch.Generator().manual_seed(seed)), dim=0)
    keys = sample_keys(rows, seed)
    assert int(keys.min()) >= 0
    assert len(torch.unique(keys)) == len(rows)
    for folds in (2, 3, 5, 7, 10, 64):
        counts = np.bincount((keys % folds).numpy(), minlength=folds)
        assert chisquare(counts).pvalue > 1e-4, folds


def test_keys_depend_on_content_and_seed_alone() -> None:
    rows = torch.randn(100, 5)
    keys = sample_keys(rows)
    order = torch.randperm(100)
    assert torch.equal(sample_keys(rows[order]), keys[order])
    assert torch.equal(torch.cat([sample_keys(part) for part in rows.split(7)]), keys)
    assert torch.equal(sample_keys(rows.double()), keys)
    assert torch.equal(
        sample_keys(torch.tensor([[0.0, -0.0]])), sample_keys(torch.tensor([[-0.0, 0.0]]))
    )
    assert not torch.equal(sample_keys(rows, 1), keys)
    assert len(torch.unique(sample_keys(torch.tensor([[1.0, 2.0], [2.0, 1.0]])))) == 2
    grid = torch.cartesian_prod(torch.arange(100.0), torch.arange(100.0))
    assert len(torch.unique(sample_keys(grid))) == len(grid)


def test_keys_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    sample_keys(torch.ones(3, 2))
    assert torch.equal(torch.get_rng_state(), before)


def reduced(reducer: StateReducer, states: dict[str, Tensor], batch: int) -> Snapshots:
    """Stream in batches and gather what comes out."""
    ready: list[Snapshots] = []
    for parts in zip(*(rows.split(batch) for rows in states.values()), strict=True):
        ready += list(reducer.push(dict(zip(states, parts, strict=True))))
    ready += list(reducer.flush())
    columns = zip(*(snapshots.states for snapshots in ready), strict=True)
    return Snapshots([torch.cat(c) for c in columns], torch.cat([s.keys for s in ready]))


@pytest.mark.parametrize("batch", [1, 5, 16, 37, 100])
def test_batch_size_changes_neither_basis_nor_rows(batch: int) -> None:
    states = {"input": torch.randn(100, 6).double(), "wide": torch.randn(100, 20).double()}
    given, other = (reduced(StateReducer(8), states, size) for size in (100, batch))
    assert torch.equal(given.keys, other.keys)
    for a, b in zip(given.states, other.states, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_first", [10, 64])
def test_wide_states_are_projected_on_their_principal_directions(n_first: int) -> None:
    max_dim = n_first // 2
    scales = torch.logspace(0, -3, 40, dtype=torch.float64)
    rows = torch.randn(200, 40, dtype=torch.float64) * scales + 3
    reducer = StateReducer(max_dim)
    given = reduced(reducer, {"input": torch.randn(200, 3), "wide": rows}, 7).states[1].numpy()
    first = rows[:n_first].numpy()
    _, values, vh = np.linalg.svd(first - first.mean(0), full_matrices=False)
    kept = min(max_dim, n_first - 1)
    projected = rows.numpy() @ vh[:kept].T
    assert given.shape == (200, kept)
    # Directions are defined up to sign.
    assert np.allclose(np.abs(given), np.abs(projected), rtol=0, atol=1e-7)
    share = (values[:kept] ** 2).sum() / (values**2).sum()
    assert reducer.kept_variance[1] == pytest.approx(share, abs=1e-10)
    assert reducer.kept_variance[0] == 1
    assert reducer.dims == (3, kept)
    assert torch.allclose(reducer.center[1], torch.from_numpy(given[:n_first].mean(0)), atol=1e-9)


def test_a_wide_state_that_never_moves_keeps_one_value() -> None:
    states = {"input": torch.randn(50, 3), "dead": torch.zeros(50, 30)}
    given = reduced(StateReducer(8), states, 10)
    assert given.states[1].shape == (50, 1)
    assert not given.states[1].any()


def test_rows_are_handed_on_in_full_blocks_and_never_hoarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_koopman.koopman.states._MOST_ROWS", 32)
    reducer = StateReducer(8)
    given = torch.randn(150, 3)
    sizes, seen = [], []
    for rows in given.split(5):
        for snapshots in reducer.push({"input": rows, "a": rows[:, :2]}):
            sizes.append(len(snapshots.keys))
            seen.append(snapshots.states[0].clone())
    # The basis takes 2 * max_dim rows; what follows is gathered into larger blocks.
    assert sizes == [16, 32, 32, 32, 32]
    for snapshots in reducer.flush():
        assert len(snapshots.keys) == 6
        seen.append(snapshots.states[0].clone())
    assert torch.equal(torch.cat(seen), given)
    assert list(reducer.flush()) == []


def test_blocks_of_wide_states_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_koopman.koopman.states._MOST_VALUES", 1000)
    reducer = StateReducer(8)
    states = {"input": torch.randn(40, 20), "a": torch.randn(40, 20)}
    sizes = [len(s.keys) for _ in range(3) for s in reducer.push(states)]
    # A row gathered is the input and two reduced states: 20 + 8 + 8 values.
    assert sizes == [16] + 3 * [1000 // 36]


@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (-float("inf"), "infinity")]
)
def test_values_that_are_not_finite_name_component_and_batch(value: float, kind: str) -> None:
    reducer = StateReducer(8)
    states = {"input": torch.randn(5, 3), "block.2": torch.randn(5, 2), "head": torch.randn(5, 2)}
    for _ in range(3):
        list(reducer.push(states))
    states["block.2"][4, 1] = value
    with pytest.raises(ValueError, match=f"component 'block.2' gave {kind} in batch 3. Find the sample"):
        list(reducer.push(states))


def test_states_that_change_their_shape_or_name_are_refused() -> None:
    reducer = StateReducer(8)
    list(reducer.push({"input": torch.randn(5, 3), "a": torch.randn(5, 2)}))
    with pytest.raises(ValueError, match=r"batch 1 ran the components .*difference: \['b'\]"):
        list(reducer.push({"input": torch.randn(5, 3), "a": torch.randn(5, 2), "b": torch.randn(5, 2)}))
    with pytest.raises(ValueError, match=r"batch 2 ran the components \('a', 'input'\)"):
        list(reducer.push({"a": torch.randn(5, 2), "input": torch.randn(5, 3)}))
    with pytest.raises(ValueError, match="component 'a' gave 4 rows in batch 3, but 'input' has 5"):
        list(reducer.push({"input": torch.randn(5, 3), "a": torch.randn(4, 2)}))
    with pytest.raises(
        ValueError, match="component 'a' gave 7 values a sample in batch 4, but 2 before"
    ):
        list(reducer.push({"input": torch.randn(5, 3), "a": torch.randn(5, 7)}))


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_dim is 0; a state vector needs at least one value"):
        StateReducer(0)


def test_of_the_principal_directions_those_are_kept_that_vary_beside_the_largest() -> None:
    noise = np.random.default_rng(0).standard_normal((40, 4))
    turned = np.linalg.qr(noise - noise.mean(0))[0]
    # Sums of squares 1e6, 1, 4e-6 and 2.5e-7, of which the last is below a 1e-12 of the first.
    rows = torch.from_numpy(np.hstack([turned * [1e3, 1.0, 2e-3, 5e-4], np.zeros((40, 1))]))
    basis, share = pod_basis(rows, 4)
    assert basis is not None
    assert torch.allclose(basis.abs(), torch.eye(5, 3, dtype=torch.float64), atol=1e-6)
    assert share == pytest.approx(1)
    assert pod_basis(rows, 5) == (None, 1.0)
    constant, share = pod_basis(torch.ones(10, 5), 3)
    assert constant is not None
    assert (constant.shape, share) == ((5, 1), 1.0)


@pytest.mark.parametrize("agreed", [True, False])
def test_rows_that_were_held_until_a_basis_was_agreed_on_come_out_the_same(agreed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    states = {
        name: torch.randn(50, width, generator=generator, dtype=torch.float64)
        for name, width in (("input", 12), ("a", 9))
    }
    reducer = StateReducer(4, hold=True)
    for first in range(0, 50, 7):
        assert not list(reducer.push({name: x[first : first + 7] for name, x in states.items()}))
    assert reducer.waits
    for count in (5, 7, 8, 21, 100):
        rows = reducer.first_rows(count)
        assert all(map(torch.equal, rows, [x[:count] for x in states.values()]))
    # The first 2 * max_dim rows fix the bases, here or elsewhere.
    if agreed:
        reducer.fix(reducer.fitted(reducer.first_rows(8)))
    # What was handed over is overwritten by what comes next.
    ready = [
        Snapshots([state.clone() for state in snapshots.states], snapshots.keys)
        for snapshots in reducer.flush()
    ]
    alone = reduced(StateReducer(4), states, 50)
    assert torch.equal(torch.cat([snapshots.keys for snapshots in ready]), alone.keys)
    assert torch.equal(alone.keys, sample_keys(states["input"]))
    for place, expected in enumerate(alone.states):
        found = torch.cat([snapshots.states[place] for snapshots in ready])
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert not list(reducer.flush())
    other = StateReducer(4, hold=True)
    other.expect(["input", "a"], [12, 3])
    assert (other.names, other.widths, other.waits) == (("input", "a"), (12, 3), True)


def test_a_reducer_takes_no_more_than_it_is_told_and_hashes_by_its_seed() -> None:
    x = torch.randn(9, 3, dtype=torch.float64)
    for most in (0, 1, 5):
        reducer = StateReducer(3, seed=7, hold=True)
        ready = list(reducer.push({"input": x, "a": 2 * x}, most))
        # No state is wider than max_dim, so there is nothing to wait for.
        assert not reducer.waits
        keys = [snapshots.keys for snapshots in (*ready, *reducer.flush())]
        assert torch.equal(torch.cat([torch.empty(0).long(), *keys]), sample_keys(x[:most], 7))
    assert StateReducer(1).max_dim == 1
