"""The four guarantees of minimal linear dimension alignment, against dense products."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from oracles import dense_product, log_gram_volume, log_volume
from torch import Tensor

from lightning_koopman.koopman.alignment import Alignment, align

WIDTHS = [(5, 5, 5), (7, 4, 6, 5), (3, 9, 12, 8), (12, 10, 3, 10, 8), (6, 1, 4), (40, 25, 30, 20, 10)]
SEEDS = [0, 1, 2]


def random_weights(widths: tuple[int, ...], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in itertools.pairwise(widths)]


def orthonormal(width: int, rank: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((width, rank)))[0]


def as_operators(weights: list[np.ndarray]) -> list[list[Tensor]]:
    return [[torch.from_numpy(weight)] for weight in weights]


def aligned(widths: tuple[int, ...], seed: int) -> tuple[list[np.ndarray], np.ndarray, Alignment]:
    """Weights, output directions that reach the input, and their alignment."""
    weights = random_weights(widths, seed)
    outputs = orthonormal(widths[-1], min(widths), seed + 100)
    return weights, outputs, align(as_operators(weights), torch.from_numpy(outputs))


def dense_jacobian(weights: list[np.ndarray], outputs: np.ndarray, state: int) -> np.ndarray:
    return dense_product([*weights[state:], outputs])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_auxiliary_layers_are_lossless(widths: tuple[int, ...], seed: int) -> None:
    weights, outputs, chain = aligned(widths, seed)
    assert chain.rank == min(widths)
    for state, basis in enumerate(chain.bases):
        q, jacobian = basis.numpy(), dense_jacobian(weights, outputs, state)
        scale = np.linalg.norm(jacobian)
        assert np.linalg.norm(q @ q.T @ jacobian - jacobian) <= 1e-10 * scale
        assert np.allclose(q.T @ q, np.eye(chain.rank), rtol=0, atol=1e-12)
        assert np.linalg.norm(chain.jacobian(state).numpy() - jacobian) <= 1e-10 * scale


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_composing_the_auxiliary_layers_leaves_the_outputs_as_they_are(
    widths: tuple[int, ...], seed: int
) -> None:
    weights, outputs, chain = aligned(widths, seed)
    x = np.random.default_rng(seed).standard_normal((20, widths[0]))
    expected = dense_product([x, *weights, outputs])
    for weight, basis in zip(weights, chain.bases[1:], strict=True):
        x = x @ weight @ basis.numpy() @ basis.numpy().T
    assert np.linalg.norm(x @ outputs - expected) <= 1e-10 * np.linalg.norm(expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("widths", [w for w in WIDTHS if min(w) > 1], ids=str)
def test_every_narrower_auxiliary_layer_loses(widths: tuple[int, ...], seed: int) -> None:
    weights, outputs, chain = aligned(widths, seed)
    for state in range(len(widths)):
        jacobian = dense_jacobian(weights, outputs, state)
        u, values, _ = np.linalg.svd(jacobian, full_matrices=False)
        narrower = chain.rank - 1
        best = u[:, :narrower] @ u[:, :narrower].T
        # Eckart and Young: nothing of this rank comes closer, and even this one misses σ_r.
        assert np.linalg.norm(best @ jacobian - jacobian) == pytest.approx(values[-1], rel=1e-6)
        assert values[-1] > 1e-8 * values[0]
        for trial in range(5):
            other = orthonormal(widths[state], narrower, 1000 * seed + trial)
            lost = np.linalg.norm(other @ other.T @ jacobian - jacobian)
            assert lost >= values[-1] * (1 - 1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_aligned_operators_intertwine_with_the_bases(widths: tuple[int, ...], seed: int) -> None:
    weights, _, chain = aligned(widths, seed)
    for i, weight in enumerate(weights):
        left = weight @ chain.bases[i + 1].numpy()
        right = chain.bases[i].numpy() @ chain.operators[i].numpy()
        assert np.linalg.norm(left - right) <= 1e-10 * np.linalg.norm(left)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_volumes_are_those_of_the_dense_jacobian(widths: tuple[int, ...], seed: int) -> None:
    weights, outputs, chain = aligned(widths, seed)
    for state in range(len(widths)):
        jacobian = dense_jacobian(weights, outputs, state)
        volume = float(chain.log_volumes[state].sum())
        assert volume == pytest.approx(log_volume(jacobian), abs=1e-8)
        assert volume == pytest.approx(log_gram_volume(jacobian), abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [1, 2, 8, 30])
def test_a_square_chain_has_the_determinant_of_its_product(size: int, seed: int) -> None:
    weights, _, chain = aligned((size,) * 5, seed)
    expected = np.linalg.slogdet(dense_product(weights))[1]
    assert float(chain.log_volumes[0].sum()) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_determinants_multiply_along_the_chain(widths: tuple[int, ...], seed: int) -> None:
    _, _, chain = aligned(widths, seed)
    gains = [np.linalg.slogdet(operator.numpy())[1] for operator in chain.operators]
    volumes = chain.log_volumes.sum(dim=1).numpy()
    assert np.allclose(volumes[:-1] - volumes[1:], gains, rtol=0, atol=1e-9)
    assert sum(gains) == pytest.approx(volumes[0], abs=1e-9)


@pytest.mark.parametrize("kind", ["rotation", "permutation"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_volumes_ignore_an_orthogonal_change_of_hidden_coordinates(
    widths: tuple[int, ...], seed: int, kind: str
) -> None:
    weights, outputs, chain = aligned(widths, seed)
    rng = np.random.default_rng(seed)
    changes = []
    for i, width in enumerate(widths):
        turn = (
            np.eye(width)[rng.permutation(width)]
            if kind == "permutation"
            else orthonormal(width, width, i)
        )
        changes.append(turn if i < len(widths) - 1 else np.eye(width))
    turned = [changes[i].T @ weight @ changes[i + 1] for i, weight in enumerate(weights)]
    other = align(as_operators(turned), torch.from_numpy(outputs))
    assert torch.allclose(other.log_volumes.sum(1), chain.log_volumes.sum(1), rtol=0, atol=1e-9)
    # The directions' own shares stay too: the outputs of interest were not touched.
    assert torch.allclose(other.log_volumes, chain.log_volumes, rtol=0, atol=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_volumes_ignore_the_basis_chosen_for_the_outputs(seed: int) -> None:
    weights, outputs, chain = aligned((7, 4, 6, 5), seed)
    turned = outputs @ orthonormal(chain.rank, chain.rank, seed)
    other = align(as_operators(weights), torch.from_numpy(turned))
    assert torch.allclose(other.log_volumes.sum(1), chain.log_volumes.sum(1), rtol=0, atol=1e-9)
    gains = [torch.linalg.slogdet(a.operators[1]).logabsdet for a in (chain, other)]
    assert torch.allclose(*gains, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_narrow_middle_drops_directions_and_says_where(seed: int) -> None:
    weights = random_weights((8, 7, 3, 7, 6), seed)
    chain = align(as_operators(weights), torch.from_numpy(orthonormal(6, 6, seed)))
    assert chain.rank == 3
    assert chain.lost == (2,)
    assert chain.kept == (0, 1, 2)
    for state in range(5):
        jacobian = dense_jacobian(weights, orthonormal(6, 6, seed)[:, :3], state)
        assert float(chain.log_volumes[state].sum()) == pytest.approx(log_volume(jacobian), abs=1e-8)


def test_two_bottlenecks_are_both_reported() -> None:
    weights = random_weights((8, 2, 7, 4, 6), 0)
    chain = align(as_operators(weights), torch.eye(6, dtype=torch.float64))
    assert chain.rank == 2
    assert chain.lost == (1, 3)


def test_a_dead_state_leaves_no_direction() -> None:
    weights = random_weights((4, 5, 3), 0)
    weights[1] = np.zeros((5, 3))
    chain = align(as_operators(weights), torch.eye(3, dtype=torch.float64))
    assert chain.rank == 0
    assert chain.log_volumes.shape == (3, 0)


def leading_independent(matrix: np.ndarray) -> tuple[int, ...]:
    """Columns that each raise the rank of those before them."""
    cut = 1e-8 * np.linalg.norm(matrix, 2)
    ranks = [np.linalg.matrix_rank(matrix[:, : j + 1], tol=cut) for j in range(matrix.shape[1])]
    return tuple(j for j, rank in enumerate(ranks) if rank > (ranks[j - 1] if j else 0))


@pytest.mark.parametrize("seed", range(8))
def test_only_directions_that_add_nothing_are_dropped_wherever_they_stand(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = random_weights((9, 7, int(rng.integers(3, 8)), 8, 7), seed)
    dead, source, copy = rng.permutation(7)[:3]
    weights[-1][:, dead] = 0
    weights[-1][:, copy] = 3 * weights[-1][:, source]
    outputs = np.eye(7)
    chain = align(as_operators(weights), torch.from_numpy(outputs))
    kept = leading_independent(dense_product(weights))
    assert chain.kept == kept
    assert dead not in kept
    assert max(source, copy) not in kept
    assert chain.lost[-1] == 3
    for state in range(5):
        jacobian = dense_jacobian(weights, outputs[:, kept], state)
        scale = np.linalg.norm(jacobian)
        assert np.linalg.norm(chain.jacobian(state).numpy() - jacobian) <= 1e-10 * scale
        assert float(chain.log_volumes[state].sum()) == pytest.approx(log_volume(jacobian), abs=1e-8)
    gains = sum(np.linalg.slogdet(operator.numpy())[1] for operator in chain.operators)
    assert gains == pytest.approx(float(chain.log_volumes[0].sum()), abs=1e-9)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_rank_is_judged_against_the_largest_direction_at_any_scale(scale: float) -> None:
    weights = random_weights((6, 5, 3), 0)
    weights[-1] *= scale * np.array([1e-4, 1.0, 1e-12])
    chain = align(as_operators(weights), torch.eye(3, dtype=torch.float64))
    assert chain.kept == (0, 1)
    weights[-1][:, 2] *= 1e6
    assert align(as_operators(weights), torch.eye(3, dtype=torch.float64)).kept == (0, 1, 2)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_direction_far_below_the_others_is_the_one_that_is_dropped(place: int) -> None:
    weights = random_weights((6, 5, 3), 0)
    weights[-1][:, place] *= 1e-11
    chain = align(as_operators(weights), torch.eye(3, dtype=torch.float64))
    assert chain.kept == tuple(j for j in range(3) if j != place)
    assert chain.lost == (1,)


@pytest.mark.parametrize(
    ("values", "kept"),
    [((1.0, 1.5e-8), 2), ((1.0, 0.7e-8), 1), ((1.0, 1e-4, 1e-10), 2), ((0.0,), 0)],
    ids=str,
)
def test_a_direction_is_lost_below_a_share_of_the_largest(values: tuple[float, ...], kept: int) -> None:
    diagonal = torch.tensor(values, dtype=torch.float64)
    chain = align([[torch.diag(diagonal)]], torch.eye(len(values), dtype=torch.float64))
    assert chain.rank == kept
    assert chain.kept == tuple(range(kept))
    assert chain.log_volumes[0].tolist() == pytest.approx(np.log(values[:kept]).tolist(), abs=1e-12)


def test_all_directions_are_kept_where_none_is_lost() -> None:
    _, _, chain = aligned((7, 4, 6, 5), 0)
    assert chain.kept == (0, 1, 2, 3)
    assert chain.lost == ()


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_scale_moves_volumes_as_the_formula_says(scale: float) -> None:
    weights, outputs, chain = aligned((7, 4, 6, 5), 0)
    other = align(as_operators([scale * weights[0], *weights[1:]]), torch.from_numpy(outputs))
    shift = other.log_volumes - chain.log_volumes
    assert torch.allclose(shift[0], torch.tensor(np.log(scale)), rtol=0, atol=1e-9)
    assert torch.allclose(shift[1:], torch.zeros(3, 4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_long_chain_neither_overflows_nor_underflows() -> None:
    weights = [1e-20 * weight for weight in random_weights((4,) * 101, 0)]
    chain = align(as_operators(weights), torch.eye(4, dtype=torch.float64))
    expected = sum(np.linalg.slogdet(weight)[1] for weight in weights)
    assert float(chain.log_volumes[0].sum()) == pytest.approx(expected, rel=1e-12)


def delayed_jacobians(blocks: list[list[np.ndarray]], outputs: np.ndarray) -> list[np.ndarray]:
    """Total derivatives by running the delayed linear recursion on unit vectors."""
    widths = [blocks[0][0].shape[0], *(step[0].shape[1] for step in blocks)]
    jacobians = []
    for start, width in enumerate(widths):
        # The state at ``start`` moves, those before it stay.
        states = [np.zeros((width, w)) for w in widths[:start]] + [np.eye(width)]
        for i in range(start, len(blocks)):
            states.append(sum(states[i - lag] @ block for lag, block in enumerate(blocks[i])))
        jacobians.append(states[-1] @ outputs)
    return jacobians


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("widths", "delay"), [((5, 5, 5, 5), 2), ((6, 5, 7, 4, 5), 3), ((8, 6, 5, 6, 7, 4), 5)], ids=str
)
def test_delayed_chains_have_the_dense_total_derivative(
    widths: tuple[int, ...], delay: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    blocks = [
        [rng.standard_normal((widths[i - lag], widths[i])) for lag in range(1, min(delay, i) + 1)]
        for i in range(1, len(widths))
    ]
    outputs = orthonormal(widths[-1], 3, seed)
    chain = align([[torch.from_numpy(b) for b in step] for step in blocks], torch.from_numpy(outputs))
    for state, jacobian in enumerate(delayed_jacobians(blocks, outputs)):
        assert np.allclose(
            chain.jacobian(state).numpy(), jacobian, rtol=0, atol=1e-8 * abs(jacobian).max()
        )
        assert float(chain.log_volumes[state].sum()) == pytest.approx(log_volume(jacobian), abs=1e-8)
    gains = sum(np.linalg.slogdet(operator.numpy())[1] for operator in chain.operators)
    assert gains == pytest.approx(float(chain.log_volumes[0].sum()), abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_chain_whose_steps_read_states_far_back_has_the_dense_total_derivative(seed: int) -> None:
    widths, parents = (4, 5, 6, 4, 5, 3), [(0,), (1,), (2, 0), (3,), (4, 1)]
    rng = np.random.default_rng(seed)
    blocks = [
        [rng.standard_normal((widths[p], widths[i])) for p in read]
        for i, read in enumerate(parents, start=1)
    ]
    outputs = orthonormal(3, 3, seed)
    chain = align(
        [[torch.from_numpy(b) for b in step] for step in blocks], torch.from_numpy(outputs), parents
    )
    answers = {5: outputs}
    for state in range(4, -1, -1):
        answers[state] = sum(
            block @ answers[i]
            for i, (read, step) in enumerate(zip(parents, blocks, strict=True), start=1)
            for p, block in zip(read, step, strict=True)
            if p == state
        )
        assert np.allclose(chain.jacobian(state).numpy(), answers[state], rtol=1e-9, atol=1e-9)


def test_operators_that_do_not_fit_together_are_refused() -> None:
    weights = [torch.ones(4, 3), torch.ones(2, 5)]
    with pytest.raises(ValueError, match=r"operator 1 gives 3 values, but 2 were expected behind it"):
        align([[w] for w in weights], torch.eye(5))
    with pytest.raises(ValueError, match=r"operator 2 gives 5 values, but 6 were expected"):
        align([[w] for w in weights], torch.eye(6))


def test_directions_that_nearly_coincide_but_are_told_apart_are_all_kept() -> None:
    """A spread that norms leave open, and that singular values show to lie within the cut-off."""
    smallest = 2e-8
    weight = np.diag([1.0, 1.0, smallest])
    chain = align(as_operators([weight]), torch.eye(3, dtype=torch.float64))
    assert chain.rank == 3
    assert float(chain.log_volumes[0].sum()) == pytest.approx(np.log(smallest), rel=1e-9)
