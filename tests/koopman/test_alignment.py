"""The four guarantees of minimal linear dimension alignment, against dense products."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from oracles import dense_product, log_gram_volume, log_volume
from torch import Tensor

from lightning_koopman.koopman import alignment
from lightning_koopman.koopman.alignment import Alignment, OneByOneError, align

WIDTHS = [
    (5, 5, 5),
    (1,) * 5,
    (8,) * 5,
    (7, 4, 6, 5),
    (3, 9, 12, 8),
    (12, 10, 3, 10, 8),
    (6, 1, 4),
    (40, 25, 30, 20, 10),
]
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
def test_auxiliary_layers_are_lossless_minimal_and_multiplicative(
    widths: tuple[int, ...], seed: int
) -> None:
    weights, outputs, chain = aligned(widths, seed)
    assert (chain.rank, chain.lost, chain.kept) == (min(widths), (), tuple(range(min(widths))))
    moved = np.random.default_rng(seed).standard_normal((20, widths[0]))
    expected = dense_product([moved, *weights, outputs])
    for state, basis in enumerate(chain.bases):
        q, jacobian = basis.numpy(), dense_jacobian(weights, outputs, state)
        scale = np.linalg.norm(jacobian)
        assert np.linalg.norm(q @ q.T @ jacobian - jacobian) <= 1e-10 * scale
        assert np.allclose(q.T @ q, np.eye(chain.rank), rtol=0, atol=1e-12)
        assert np.linalg.norm(chain.jacobian(state).numpy() - jacobian) <= 1e-10 * scale
        volume = float(chain.log_volumes[state].sum())
        assert volume == pytest.approx(log_volume(jacobian), abs=1e-8)
        # The Gram matrix has the squared condition, and its determinant an error in proportion to it.
        condition = np.linalg.cond(jacobian)
        gram_error = 10 * np.finfo(float).eps * condition**2
        assert volume == pytest.approx(log_gram_volume(jacobian), abs=1e-9 + gram_error)
        if state:
            weight, operator = weights[state - 1], chain.operators[state - 1].numpy()
            left = weight @ q
            assert np.linalg.norm(left - chain.bases[state - 1].numpy() @ operator) <= 1e-10 * (
                np.linalg.norm(left)
            )
            moved = moved @ weight @ q @ q.T
        # Eckart and Young: nothing narrower comes closer than this, and even this misses σ_r.
        values = np.linalg.svd(jacobian, compute_uv=False)
        assert values[-1] > 1e-8 * values[0]
        for trial in range(3 if chain.rank > 1 else 0):
            other = orthonormal(widths[state], chain.rank - 1, 1000 * seed + trial)
            assert np.linalg.norm(other @ other.T @ jacobian - jacobian) >= values[-1] * (1 - 1e-9)
    assert np.linalg.norm(moved @ outputs - expected) <= 1e-10 * np.linalg.norm(expected)
    gains = [np.linalg.slogdet(operator.numpy())[1] for operator in chain.operators]
    volumes = chain.log_volumes.sum(dim=1).numpy()
    assert np.allclose(volumes[:-1] - volumes[1:], gains, rtol=0, atol=1e-9)
    if len(set(widths)) == 1:
        assert volumes[0] == pytest.approx(np.linalg.slogdet(dense_product(weights))[1], abs=1e-8)
    # The basis chosen for the outputs does not matter.
    turned = torch.from_numpy(outputs @ orthonormal(chain.rank, chain.rank, seed))
    other = align(as_operators(weights), turned).log_volumes.sum(1)
    assert torch.allclose(other, chain.log_volumes.sum(1), rtol=0, atol=1e-9)


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
@pytest.mark.parametrize(
    ("widths", "dead", "lost"),
    [((8, 7, 3, 7, 6), None, (2,)), ((8, 2, 7, 4, 6), None, (1, 3)), ((4, 5, 3), 1, (1,))],
    ids=str,
)
def test_a_narrow_middle_drops_directions_and_says_where(
    widths: tuple[int, ...], dead: int | None, lost: tuple[int, ...], seed: int
) -> None:
    weights, outputs = random_weights(widths, seed), orthonormal(widths[-1], widths[-1], seed)
    if dead is not None:
        weights[dead] *= 0
    chain = align(as_operators(weights), torch.from_numpy(outputs))
    assert chain.rank == (min(widths) if dead is None else 0)
    assert chain.lost == lost
    assert chain.kept == tuple(range(chain.rank))
    assert chain.log_volumes.shape == (len(widths), chain.rank)
    for state in range(len(widths) if chain.rank else 0):
        jacobian = dense_jacobian(weights, outputs[:, : chain.rank], state)
        assert float(chain.log_volumes[state].sum()) == pytest.approx(log_volume(jacobian), abs=1e-8)


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


@pytest.mark.parametrize(
    ("values", "kept"),
    # Of the last but one, norms leave the spread open, and singular values tell.
    [((1, 1.5e-8), 2), ((1, 0.7e-8), 1), ((1, 1e-4, 1e-10), 2), ((1, 1, 2e-8), 3), ((0,), 0)],
    ids=str,
)
def test_a_direction_is_lost_below_a_share_of_the_largest(values: tuple[float, ...], kept: int) -> None:
    diagonal = torch.tensor(values, dtype=torch.float64)
    chain = align([[torch.diag(diagonal)]], torch.eye(len(values), dtype=torch.float64))
    assert chain.rank == kept
    assert chain.kept == tuple(range(kept))
    assert chain.log_volumes[0].tolist() == pytest.approx(np.log(values[:kept]).tolist(), abs=1e-12)


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


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("widths", "parents"),
    [
        ((5, 5, 5, 5), [(0,), (1, 0), (2, 1)]),
        ((8, 6, 5, 6, 7, 4), [tuple(range(i, -1, -1)) for i in range(5)]),
        ((4, 5, 6, 4, 5, 3), [(0,), (1,), (2, 0), (3,), (4, 1)]),
    ],
    ids=str,
)
def test_steps_that_read_several_states_have_the_dense_total_derivative(
    widths: tuple[int, ...], parents: list[tuple[int, ...]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    blocks = [
        [rng.standard_normal((widths[p], widths[i])) for p in read]
        for i, read in enumerate(parents, start=1)
    ]
    outputs = orthonormal(widths[-1], 3, seed)
    operators = [[torch.from_numpy(b) for b in step] for step in blocks]
    chain = align(operators, torch.from_numpy(outputs), parents)
    answers = {len(parents): outputs}
    for state in range(len(parents) - 1, -1, -1):
        answers[state] = sum(
            block @ answers[i]
            for i, (read, step) in enumerate(zip(parents, blocks, strict=True), start=1)
            for p, block in zip(read, step, strict=True)
            if p == state
        )
        scale = abs(answers[state]).max()
        assert np.allclose(chain.jacobian(state).numpy(), answers[state], rtol=0, atol=1e-8 * scale)
        volume = log_volume(answers[state])
        assert float(chain.log_volumes[state].sum()) == pytest.approx(volume, abs=1e-8)
    gains = sum(np.linalg.slogdet(operator.numpy())[1] for operator in chain.operators)
    assert gains == pytest.approx(float(chain.log_volumes[0].sum()), abs=1e-9)
    if all(read == tuple(range(i, i - len(read), -1)) for i, read in enumerate(parents)):
        # Without parents, each step reads as many states before it as it has blocks.
        assert torch.equal(align(operators, torch.from_numpy(outputs)).log_volumes, chain.log_volumes)


@pytest.mark.parametrize("weak", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_what_leads_past_a_weak_branch_is_not_lost_beside_it(weak: int, seed: int) -> None:
    """Steps whose spread is far from the cut-off each, and all together far below it, beside a skip."""
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(weak):
        left, right = (np.linalg.qr(rng.standard_normal((8, 8)))[0] for _ in range(2))
        steps.append(left @ np.diag(np.logspace(0, -3.5, 8)) @ right)
    first, last, past = (rng.standard_normal((8, 8)) for _ in range(3))
    operators = [[torch.from_numpy(m)] for m in (first, *steps)]
    operators.append([torch.from_numpy(last), torch.from_numpy(past)])
    parents = [*((i,) for i in range(weak + 1)), (weak + 1, 1)]
    chain = align(operators, torch.eye(8, dtype=torch.float64), parents)
    assert chain.kept == tuple(range(8))
    jacobian = first @ (dense_product([*steps, last]) + past)
    assert np.allclose(chain.jacobian(0).numpy(), jacobian, rtol=0, atol=1e-10 * abs(jacobian).max())
    assert float(chain.log_volumes[0].sum()) == pytest.approx(log_volume(jacobian), abs=1e-9)
    gains = sum(np.linalg.slogdet(operator.numpy())[1] for operator in chain.operators)
    assert gains == pytest.approx(float(chain.log_volumes[0].sum()), abs=1e-9)


def test_operators_that_do_not_fit_together_are_refused() -> None:
    weights = [torch.ones(4, 3), torch.ones(2, 5)]
    with pytest.raises(ValueError, match=r"operator 1 gives 3 values, but 2 were expected behind it"):
        align([[w] for w in weights], torch.eye(5))
    with pytest.raises(ValueError, match=r"operator 2 gives 5 values, but 6 were expected"):
        align([[w] for w in weights], torch.eye(6))


def test_a_state_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no step reads state 1; leave out what nothing goes on from"):
        align([[torch.ones(4, 3)], [torch.ones(4, 3)]], torch.eye(3), [(0,), (0,)])


@pytest.mark.parametrize("width", [2, 6])
@pytest.mark.parametrize("steps", [3, 20, 40])
def test_where_all_steps_read_one_state_products_are_no_more_than_pairs_of_these(
    steps: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a loop over time do, all of which read the input."""
    taken: list[None] = []

    def counted(left: Tensor, right: Tensor) -> Tensor:
        taken.append(None)
        return left @ right

    monkeypatch.setattr(alignment, "product", counted)
    rng = np.random.default_rng(steps)
    inputs = rng.standard_normal((steps, width, 4))
    weights = 0.5 * rng.standard_normal((steps, 4, 4))
    operators = [
        [torch.from_numpy(block) for block in ((w, x) if step else (x,))]
        for step, (w, x) in enumerate(zip(weights, inputs, strict=True))
    ]
    parents = [(step, 0) if step else (0,) for step in range(steps)]
    chain = align(operators, torch.eye(4, dtype=torch.float64), parents)
    assert len(taken) <= 2 * steps**2 + 8
    answer, jacobian = np.eye(4), np.zeros((width, 4))
    for w, x in zip(weights[::-1], inputs[::-1], strict=True):
        answer, jacobian = w @ answer, jacobian + x @ answer
    assert len(chain.kept) == min(width, 4)
    assert np.allclose(chain.jacobian(0).numpy(), jacobian[:, chain.kept], rtol=0, atol=1e-9)


@pytest.mark.parametrize("skips", [False, True])
def test_several_chains_at_once_are_each_alone_unless_one_loses_a_direction(skips: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    parents = [(0,), (1, 0) if skips else (1,), (2,)]
    widths = {0: 9, 1: 12, 2: 8, 3: 6}

    def drawn(*shape: int) -> Tensor:
        return torch.randn(3, *shape, generator=generator, dtype=torch.float64)

    operators = [[drawn(widths[p], widths[i]) for p in read] for i, read in enumerate(parents, start=1)]
    outputs = drawn(6, 4)
    together = align(operators, outputs, parents)
    assert together.rank == 4
    for fold in range(3):
        alone = align(
            [[block[fold] for block in blocks] for blocks in operators], outputs[fold], parents
        )
        assert torch.allclose(together.log_volumes[fold], alone.log_volumes, rtol=1e-12, atol=1e-12)
        for state in range(4):
            jacobian = together.jacobian(state).expand(3, -1, -1)[fold]
            assert torch.allclose(jacobian, alone.jacobian(state), rtol=1e-10, atol=1e-10)
    operators[2][0][1] = 0
    with pytest.raises(OneByOneError):
        align(operators, outputs, parents)
