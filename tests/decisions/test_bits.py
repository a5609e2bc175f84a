"""Bits per component: against brute force, against rounding by hand, and against closed forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import sem
from torch import Tensor, nn

from lightning_koopman import bit_widths, credit_report
from lightning_koopman.decisions import bits
from lightning_koopman.decisions.bits import _pairs, exchange, improve, solve_exactly
from lightning_koopman.effects.scoring import Measured

pytest.importorskip("torchao", reason="torchao is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # torchao warns of kernels for other machines

OPTIONS = (8, 4, 3, 2)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 3)).eval()


def inputs(n: int = 300) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(3))


def labelled(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        return [(part, net(part).argmax(1)) for part in inputs().split(100)]


def rounded_by_hand(weight: Tensor, bits: int) -> Tensor:
    """Round to nearest with one scale per row, the largest weight at the end of the integers."""
    scale = weight.abs().amax(dim=1, keepdim=True) / ((2**bits - 1) / 2)
    return (weight * (1 / scale)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def problems() -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Draw effects and costs of six components, and what is allowed."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(20):
        effects = np.sort(10.0 ** rng.uniform(-6, 0, (6, 4)), axis=1)
        counts = rng.integers(1, 100, 6)
        found.append((effects, np.outer(counts, OPTIONS), rng.uniform(2.1, 5) * counts.sum()))
    return found


def allowed_choices(costs: np.ndarray, allowed: float) -> list[tuple[int, ...]]:
    every = np.array(list(itertools.product(range(4), repeat=6)))
    return [tuple(c) for c in every[costs[range(6), every].sum(axis=1) <= allowed].tolist()]


@pytest.mark.parametrize("unit", [1e-9, 1.0])
@pytest.mark.parametrize("is_any_infinite", [False, True])
def test_the_integer_programme_is_as_good_as_all_choices(unit: float, is_any_infinite: bool) -> None:
    rng = np.random.default_rng(4)
    for effects, costs, allowed in problems():
        if is_any_infinite:
            # The least bits remain, so that some choice is allowed.
            effects[:, :3][rng.random((6, 3)) < 0.3] = np.inf
        choices = allowed_choices(costs, allowed)
        best = min(float(effects[range(6), c].sum()) for c in choices)
        found = solve_exactly(unit * effects, costs, allowed)
        assert found in choices
        assert effects[range(6), found].sum() == pytest.approx(best, rel=1e-5)


def test_the_integer_programme_is_exact_beside_effects_of_other_orders_of_magnitude() -> None:
    rng = np.random.default_rng(5)
    for effects, costs, _ in problems():
        effects[:] = np.sort(10.0 ** rng.uniform(-14, -3, (6, 4)), axis=1)
        effects[:, 3] = 10.0 ** rng.uniform(-1, 1, 6)
        allowed = rng.uniform(3.1, 6) * costs[:, 3].sum() / 2
        best = min(float(effects[range(6), c].sum()) for c in allowed_choices(costs, allowed))
        found = solve_exactly(effects, costs, allowed)
        assert effects[range(6), found].sum() == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("size", [1e-6, 1e3])
def test_pairs_are_what_two_moves_have_in_common_and_hold_nothing_of_what_must_not_be(
    size: float,
) -> None:
    """Where an effect is the square of a move, that of several is the square of their sum."""
    moved = size * torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved[3] = 0.0
    effects = moved.square().sum(dim=1).numpy().reshape(3, 2)
    pairs = _pairs(effects, moved)
    np.testing.assert_allclose(pairs.reshape(6, 6), (moved @ moved.T).numpy(), rtol=1e-9, atol=0)
    effects[1, 0], moved[2] = np.inf, torch.nan
    odd = _pairs(effects, moved)
    assert odd[1, 0, 1, 0] == np.inf
    pairs[1, 0], pairs[:, :, 1, 0] = 0.0, 0.0
    odd[1, 0, 1, 0] = 0.0
    np.testing.assert_allclose(odd, pairs, rtol=1e-9, atol=0)


def test_exchanges_keep_the_budget_and_come_near_the_best_choice_for_all_pairs() -> None:
    rng = np.random.default_rng(1)
    ratios = []
    for effects, costs, allowed in problems():
        moved = rng.standard_normal((24, 10)) + 0.5
        moved *= (np.sqrt(effects.reshape(-1)) / np.linalg.norm(moved, axis=1))[:, None]
        pairs = (moved @ moved.T).reshape(6, 4, 6, 4)

        def total(c: tuple[int, ...], pairs: np.ndarray = pairs) -> float:
            return float(pairs[range(6), c][:, range(6), c].sum())

        start = solve_exactly(effects, costs, allowed)
        found = exchange(pairs, costs, allowed, start)
        assert costs[range(6), found].sum() <= allowed
        assert total(found) <= total(start) * (1 + 1e-9)
        ratios.append(total(found) / min(map(total, allowed_choices(costs, allowed))))
    assert min(ratios) > 1 - 1e-9
    assert np.median(ratios) == pytest.approx(1.0)
    assert max(ratios) < 2


def test_what_is_measured_improves_a_choice_within_the_budget() -> None:
    """What is measured is the sum over pairs times a factor that nothing tells of."""
    rng = np.random.default_rng(2)
    better = 0
    for effects, costs, allowed in problems()[:8]:
        factors = dict(
            zip(itertools.product(range(4), repeat=6), rng.uniform(0.5, 2, 4**6), strict=True)
        )
        pairs = np.zeros((6, 4, 6, 4))
        for row, option in itertools.product(range(6), range(4)):
            pairs[row, option, row, option] = effects[row, option]
        seen: list[tuple[int, ...]] = []

        def real(c: tuple[int, ...], e: np.ndarray = effects, f: np.ndarray = factors) -> float:
            return float(e[range(6), c].sum()) * f[c]

        def measure(c: tuple[int, ...], real=real, seen: list = seen) -> Measured:
            seen.append(c)
            return Measured(real(c), 0.0, math.nan, math.nan)

        choices = allowed_choices(costs, allowed)
        start = solve_exactly(effects, costs, allowed)
        found, measured = improve(pairs, costs, allowed, (start, measure(start)), measure)
        assert set(seen) <= set(choices)
        assert measured.effect == real(found) == min(map(real, seen))
        near = [c for c in choices if 1 <= sum(a != b for a, b in zip(c, found, strict=True)) <= 2]
        promising = sorted(near, key=lambda c, e=effects: e[range(6), c].sum())[:6]
        assert all(real(found) <= real(c) for c in promising)
        better += real(found) < real(start)
    assert better > 4


def test_a_choice_whose_outputs_are_not_finite_is_left_for_one_whose_are() -> None:
    effects, costs, allowed = problems()[0]
    pairs = np.zeros((6, 4, 6, 4))
    start = solve_exactly(effects, costs, allowed)
    for odd in (math.nan, math.inf):
        # Only what gives the first row fewer bits is finite.
        def measure(c: tuple[int, ...], odd: float = odd) -> Measured:
            return Measured(1.0 + sum(c) if c[0] == 3 else odd, 0.0, math.nan, math.nan)

        begin = (0, *start[1:])
        found, measured = improve(pairs, costs, math.inf, (begin, measure(begin)), measure)
        assert found[0] == 3
        assert measured.effect == pytest.approx(1.0 + sum(found))


def test_both_choices_are_improved_and_the_better_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[Measured] = []

    def watched(*args: Any) -> tuple[tuple[int, ...], Measured]:
        found = improve(*args)
        ends.append(found[1])
        return found

    monkeypatch.setattr(bits, "improve", watched)
    net = mlp()
    found = bit_widths(net, labelled(net))
    assert len(ends) == 2
    assert found.effect == min(end.effect for end in ends)


@pytest.mark.parametrize(
    ("effects", "moves", "solver"),
    [
        ((0.1, 0.2), False, "milp"),
        ((0.1, 0.1), False, "milp"),
        ((0.2, 0.1), False, "exchange"),
        ((0.2, 0.1), True, "measured"),
        ((math.nan, 0.1), False, "exchange"),
    ],
)
def test_what_found_the_bits_is_named(
    effects: tuple[float, float], moves: bool, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter(effects)

    def improved(*args: Any) -> tuple[tuple[int, ...], Measured]:
        return (3, 3, 3, 3) if moves else args[3][0], Measured(next(given), 0.0, math.nan, math.nan)

    monkeypatch.setattr(bits, "improve", improved)
    net = mlp()
    found = bit_widths(net, labelled(net))
    assert (found.solver, found.effect) == (solver, 0.1)
    assert (found.bits == (2, 2, 2, 2)) is moves


def test_of_all_choices_for_a_small_network_none_is_better() -> None:
    net = mlp()
    batches = labelled(net)
    x = torch.cat([x for x, _ in batches])
    found = {average: bit_widths(net, batches, average=average) for average in (2.5, 3.0, 3.5)}
    names, weights = found[3.0].components, found[3.0].weights
    least = dict.fromkeys(found, math.inf)
    with torch.no_grad():
        p = net(x).double().log_softmax(1)
        for bits in itertools.product(OPTIONS, repeat=4):
            other = mlp()
            for name, b in zip(names, bits, strict=True):
                weight = other.get_submodule(name).weight
                weight.copy_(rounded_by_hand(weight, b))
            effect = float((p.exp() * (p - other(x).double().log_softmax(1))).sum(1).mean())
            for average in found:
                if np.dot(bits, weights) <= average * sum(weights):
                    least[average] = min(least[average], effect)
    assert {k: own.effect for k, own in found.items()} == pytest.approx(least, rel=1e-3)


def test_effects_are_those_of_weights_rounded_by_hand() -> None:
    net = mlp()
    batches = labelled(net)
    found = bit_widths(net, batches, average=4.0)
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    assert (found.scale, found.n_samples) == ("kl", len(x))
    assert found.components == ("0", "2", "4", "6")
    assert found.weights == (144, 576, 192, 24)
    with torch.no_grad():
        p = net(x).double().log_softmax(1)

        def rounded(bits: dict[str, int]) -> Tensor:
            other = mlp()
            for name, b in bits.items():
                weight = other.get_submodule(name).weight
                weight.copy_(rounded_by_hand(weight, b))
            return other(x).double().log_softmax(1)

        def by_sample(bits: dict[str, int]) -> Tensor:
            return (p.exp() * (p - rounded(bits))).sum(1)

        def effect(bits: dict[str, int]) -> float:
            return float(by_sample(bits).mean())

        for i, name in enumerate(found.components):
            for k, b in enumerate(found.options):
                assert found.effects[i, k] == pytest.approx(effect({name: b}), rel=1e-3, abs=1e-8)
                error = sem(by_sample({name: b}))
                assert found.effects_stderr[i, k] == pytest.approx(error, rel=1e-3, abs=1e-8)
        chosen = dict(zip(found.components, found.bits, strict=True))
        assert found.effect == pytest.approx(effect(chosen), rel=1e-3)
        assert found.effect_stderr == pytest.approx(sem(by_sample(chosen)), rel=1e-3)
        gained = (rounded(chosen).argmax(1) == y).double() - (p.argmax(1) == y).double()
        assert found.metric - found.metric_before == pytest.approx(float(gained.mean()))
        assert found.metric_stderr == pytest.approx(sem(gained), rel=1e-6)
        assert found.alike == {4: pytest.approx(effect(dict.fromkeys(chosen, 4)), rel=1e-3)}
    assert found.average == pytest.approx(np.dot(found.bits, found.weights) / sum(found.weights))
    assert found.average <= found.budget == pytest.approx(4.0)
    assert found.effect <= found.alike[4]


class Branches(nn.Module):
    """A sum: what rounding does to one branch adds to what it does to the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = (nn.Linear(6, 4, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + 0.1 * self.c(x)


def test_of_branches_that_add_up_no_choice_is_better() -> None:
    net, x = Branches(), inputs()
    found = bit_widths(net, [x], average=3.0, bits=(4, 3, 2))
    assert found.scale == "relative"
    with torch.no_grad():
        whole = net(x)
        spread = (whole - whole.mean(0)).square().sum()
        loss = {}
        for bits in itertools.product((4, 3, 2), repeat=3):
            if sum(bits) <= 9:
                other = Branches()
                for name, b in zip("abc", bits, strict=True):
                    weight = other.get_submodule(name).weight
                    weight.copy_(rounded_by_hand(weight, b))
                loss[bits] = float((other(x) - whole).square().sum() / spread)
    assert found.effect == pytest.approx(min(loss.values()), rel=1e-3)
    assert found.bits == min(loss, key=loss.__getitem__)


def test_the_network_that_is_given_is_the_one_that_was_measured() -> None:
    net = mlp()
    batches = labelled(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    found = bit_widths(net.train(), batches, credit_report(net, batches), average=2.5)
    assert torch.equal(state, torch.get_rng_state())
    assert net.training
    new = found.apply(net.eval())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    assert float((new(x).argmax(1) == y).double().mean()) == pytest.approx(found.metric)
    for name, b in zip(found.components, found.bits, strict=True):
        rows = new.get_submodule(name).weight
        assert max(len(row.unique()) for row in rows) <= 2**b


def test_named_components_groups_and_modules_that_run_twice() -> None:
    net = mlp()
    # The first layer, which stays, has 6 inputs.
    found = bit_widths(net, [inputs()], components=["[24]"], group_size=8, bits=[3, 4], average=4)
    assert found.components == ("2", "4")
    assert (found.bits, found.group_size) == ((4, 4), 8)
    least = bit_widths(net, [inputs()], components=["[24]"], bits=[3, 4], average=3)
    assert least.bits == (3, 3)
    assert found.alike[4] == pytest.approx(found.effect)
    assert torch.equal(found.apply(net)[0].weight, net[0].weight)
    layer = nn.Linear(6, 6)
    between, last = nn.Linear(6, 6), nn.Linear(6, 2)
    twice = nn.Sequential(layer, nn.Tanh(), between, nn.Tanh(), layer, nn.Tanh(), last)
    once = bit_widths(twice, [inputs()])
    assert once.components == ("0", "2", "6")
    assert once.weights == (36, 36, 12)


def test_a_loop_that_begins_with_zeros_has_its_block_rounded() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.cell, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            u = self.into(x)
            z = torch.zeros_like(u)
            for _ in range(3):
                z = torch.tanh(self.cell(z) + u)
            return self.out(z)

    torch.manual_seed(0)
    net = Loop()
    batches = labelled(net)
    found = bit_widths(net, batches, credit_report(net, batches), average=4)
    # The cell's first call gives the same for every sample, and so is no state.
    assert found.components == ("into", "cell#1", "out")
    assert found.weights == (48, 64, 24)
    spent = np.dot(found.bits, found.weights)
    assert found.average == pytest.approx(spent / 136)
    by_hand = Loop()
    by_hand.load_state_dict(net.state_dict())
    with torch.no_grad():
        for layer, b in zip((by_hand.into, by_hand.cell, by_hand.out), found.bits, strict=True):
            layer.weight.copy_(rounded_by_hand(layer.weight, b))
        x = torch.cat([x for x, _ in batches])
        p, q = net(x).double().log_softmax(1), by_hand(x).double().log_softmax(1)
        assert found.effect == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
        assert torch.equal(found.apply(net).cell.weight.unique(), by_hand.cell.weight.unique())


def test_results_can_be_read() -> None:
    net = mlp()
    found = bit_widths(net, labelled(net))
    assert repr(found).startswith(f"BitWidths({found.average:.2f} bits per weight, effect ")
    frame = found.to_frame()
    assert list(frame.bits) == list(found.bits)
    assert list(frame.effect_3) == list(found.effects[:, 2])
    assert str(found).endswith("your quantiser.")
    assert "3 bits everywhere" in found.verdict
    _, axis = found.plot()
    assert [tick.get_text() for tick in axis.get_yticklabels()] == list(found.components)


def test_errors_say_what_arrived_and_what_to_do() -> None:
    net = mlp()
    with pytest.raises(
        ValueError, match=r"average is 1.5, below all numbers .* \(8, 4, 3, 2\); raise it"
    ):
        bit_widths(net, [inputs()], average=1.5)
    with pytest.raises(ValueError, match="9 bits are asked for; weights are rounded to 2 to 8 bits"):
        bit_widths(net, [inputs()], bits=[9, 2])
    norms = nn.Sequential(nn.LayerNorm(6), nn.LayerNorm(6))
    report = credit_report(norms, [inputs()], components=["0", "1"])
    with pytest.raises(
        ValueError, match=r"none of \('0', '1'\) holds a linear, convolutional, attention"
    ):
        bit_widths(norms, [inputs()], report)
