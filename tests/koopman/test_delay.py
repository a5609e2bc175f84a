"""The delay that is chosen, against explicit fits fold by fold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from test_credit import assert_same, residual_states, run
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman import CreditReport, KoopmanCredit, KoopmanCreditMonitor, credit_report
from lightning_koopman.cli.main import main
from lightning_koopman.koopman.credit import compute_credits
from lightning_koopman.koopman.delay import MAX_DELAY, DelayChoice, choose_delay
from lightning_koopman.koopman.moments import Layout, accumulate
from lightning_koopman.report.files import read_reports


def moments_of(states: Sequence[np.ndarray], reach: int, links: Any = (), folds: int = 5) -> Any:
    layout = Layout(tuple(x.shape[1] for x in states), folds, 1, links, reach)
    moments = layout.zeros()
    rows = [torch.from_numpy(x) for x in states]
    accumulate(layout, moments, rows, torch.arange(len(rows[0])) % folds)
    return layout, moments


def noisy_states(seed: int, lags: Sequence[int], n: int = 300) -> list[np.ndarray]:
    """A chain that reads the states at some lags, with noise of its own in every state."""
    rng = np.random.default_rng(seed)
    states = [rng.standard_normal((n, 4))]
    for i in range(1, 7):
        read = [lag for lag in lags if lag <= i]
        state = sum(states[i - lag] @ rng.standard_normal((4, 4)) / 2 for lag in read)
        states.append(state + 0.5 * rng.standard_normal((n, 4)))
    return states


def mean_r2(states: Sequence[np.ndarray], delay: int, left_out: int | None = None) -> float:
    """Mean over the steps of the held-out R², over all folds or all but one."""
    folds = np.arange(len(states[0])) % 5
    found = []
    for i in range(1, len(states)):
        x = np.hstack([states[p] for p in range(i - 1, max(0, i - delay) - 1, -1)])
        errors, totals = oracles.fold_errors(x, states[i], folds, partial(oracles.ridge, tikhonov=1e-3))
        kept = [fold for fold in range(5) if fold != left_out]
        found.append(1 - errors[kept].sum() / totals[kept].sum())
    return float(np.mean(found))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("lags", [(1,), (1, 2), (1, 3), (1, 4)])
def test_the_choice_is_that_of_explicit_fits(lags: tuple[int, ...], seed: int) -> None:
    states = noisy_states(seed, lags)
    found = choose_delay(*moments_of(states, 4), tikhonov=1e-3)
    r2 = [mean_r2(states, delay) for delay in range(1, 5)]
    assert found.r2 == pytest.approx(r2, abs=1e-9)
    without = np.array([[mean_r2(states, s, fold) for s in range(1, 5)] for fold in range(5)])

    def improved(s: int, t: int) -> bool:
        error = oracles.plain_jackknife(without[:, t] - without[:, s])
        return bool(r2[t] - r2[s] > error)

    expected = next(s for s in range(4) if not any(improved(s, t) for t in range(s + 1, 4)))
    assert found.delay == expected + 1


@pytest.mark.parametrize(("n", "folds"), [(300, 2), (3, 3)])
def test_two_folds_that_leave_two_samples_suffice_and_one_does_not(n: int, folds: int) -> None:
    layout, moments = moments_of(noisy_states(0, (1, 2), n), 3, folds=folds)
    assert len(choose_delay(layout, moments, tikhonov=1e-3).r2) == 3
    moments[1:] = 0
    assert choose_delay(layout, moments) == DelayChoice(1, ())


@pytest.mark.parametrize("span", [1, 2, 3, 4])
def test_the_span_of_a_skip_is_found_though_shorter_delays_do_not_help(span: int) -> None:
    # Lags of 1 and of the span only: between them nothing is gained on the way.
    lags = (1, span) if span > 1 else (1,)
    states = [noisy_states(seed, lags, n=1000) for seed in range(5)]
    found = [choose_delay(*moments_of(given, 4)).delay for given in states]
    assert min(found) == span
    # One standard error is exceeded by chance now and then.
    assert sum(delay == span for delay in found) >= 4


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("span", [2, 3])
def test_a_linear_residual_chain_gets_its_span_and_the_dense_jacobians(span: int, seed: int) -> None:
    blocks, states = residual_states(300, seed, span)
    metric = KoopmanCredit(delay="auto", tikhonov=0.0)
    metric.update([torch.from_numpy(x) for x in states])
    report = metric.report()
    assert report.delay == span
    assert f"delay {span} was chosen: mean held-out R² is" in report.notes[-1]
    for step, operator in zip(blocks, report.operators.values(), strict=True):
        assert np.allclose(operator.matrix.numpy(), np.vstack(step), rtol=0, atol=1e-8)
    outputs = oracles.pod(states[-1], 3)
    for start in range(1, len(states)):
        width = states[start].shape[1]
        unit = [np.zeros((width, x.shape[1])) for x in states[:start]] + [np.eye(width)]
        for i in range(start, len(blocks)):
            unit.append(sum(unit[i - lag] @ block for lag, block in enumerate(blocks[i])))
        volume = oracles.log_volume(unit[-1] @ outputs) / 3
        assert report.credit[start - 1] == pytest.approx(volume, abs=1e-8)


class Residual(nn.Module):
    """A residual network whose skips span two leaves."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(12, 10), nn.Linear(10, 3)
        self.a = nn.ModuleList(nn.Linear(10, 10) for _ in range(blocks))
        self.b = nn.ModuleList(nn.Linear(10, 10) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for a, b in zip(self.a, self.b, strict=True):
            x = x + b(F.relu(a(x)))
        return self.head(x)

    def states(self, x: Tensor) -> list[Tensor]:
        """Every leaf's output, x first, as if nobody had followed the data."""
        seen = [x]
        leaves = [m for m in self.modules() if isinstance(m, nn.Linear)]
        handles = [m.register_forward_hook(lambda *given: seen.append(given[2])) for m in leaves]
        with torch.no_grad():
            self(x)
        for handle in handles:
            handle.remove()
        return seen


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_leaf_of_a_residual_network_fits_at_least_as_well_as_without_a_delay(seed: int) -> None:
    torch.manual_seed(seed)
    net = Residual().double()
    states = net.states(torch.randn(1500, 12, dtype=torch.float64))
    reports = {}
    for delay in (1, 3, "auto"):
        metric = KoopmanCredit(delay=delay)
        metric.update(states)
        reports[delay] = metric.report()
    # The first leaf of a block reads the block before it and, three states back, that one's input.
    assert reports["auto"].delay >= 3
    for delay in (3, "auto"):
        assert (reports[delay].r2 - reports[1].r2 > -1e-3).all()
        assert reports[delay].r2.mean() > reports[1].r2.mean() + 0.01


def test_links_are_read_whatever_the_delay_and_leave_nothing_for_it_to_gain() -> None:
    torch.manual_seed(0)
    net = Residual().double()
    for module in (net.a, net.b):
        for layer in module:
            nn.init.normal_(layer.weight, std=0.3)
    # Linear blocks: with its links a step is exact, and a delay can add nothing.
    net.forward = lambda x: net.head(_linear_blocks(net, x))  # type: ignore[method-assign]
    report = credit_report(net, torch.randn(600, 12, dtype=torch.float64).split(100), delay="auto")
    assert report.delay == 1
    assert report.reads["a.1"] == ("b.0", "stem")
    assert np.abs(1 - report.r2).max() < 1e-9
    dense = np.eye(10)
    for a, b in zip(net.a, net.b, strict=True):
        dense = dense @ (np.eye(10) + a.weight.detach().numpy().T @ b.weight.detach().numpy().T)
    dense = net.stem.weight.detach().numpy().T @ dense @ net.head.weight.detach().numpy().T
    assert report.total * 3 == pytest.approx(oracles.log_volume(dense), abs=1e-8)


def _linear_blocks(net: Residual, x: Tensor) -> Tensor:
    x = net.stem(x)
    for a, b in zip(net.a, net.b, strict=True):
        x = x + b(a(x))
    return x


@pytest.mark.parametrize("normalize", ["none", "rms", "whiten"])
@pytest.mark.parametrize("links", [(), ((), (), (0,), (), (1,), ())])
def test_moments_kept_for_a_larger_delay_hold_those_of_a_smaller_one(links: Any, normalize: Any) -> None:
    states = noisy_states(0, (1, 2))
    layout, moments = moments_of(states, 4, links)
    for delay in (1, 2, 3, 4):
        given = compute_credits(replace(layout, delay=delay), moments, normalize=normalize)
        assert_same(given, run(states, delay=delay, links=links, normalize=normalize))


def test_memory_grows_with_the_largest_delay_and_not_with_the_samples() -> None:
    metric = KoopmanCredit(delay="auto", dims=[4] * 9)
    assert metric.layout is not None
    size = metric.layout.size
    reach = {j - i for i, j in metric.layout.pairs if j < 8}
    assert reach == set(range(MAX_DELAY + 1))
    metric.update([torch.randn(500, 4, generator=torch.Generator().manual_seed(i)) for i in range(9)])
    assert metric.moments.shape == (5, size)


def test_added_up_over_processes_the_choice_is_that_of_all_samples() -> None:
    states = [torch.from_numpy(x) for x in noisy_states(0, (1, 3), n=400)]
    whole = KoopmanCredit(delay="auto")
    whole.update(states)
    parts = [KoopmanCredit(delay="auto"), KoopmanCredit(delay="auto")]
    for part, rows in zip(parts, (slice(0, 60), slice(60, 400)), strict=True):
        part.update([x[rows] for x in states])
    parts[0].merge_state(parts[1])
    given, expected = parts[0].report(), whole.report()
    assert given.delay == expected.delay == 3
    np.testing.assert_allclose(given.credit, expected.credit, atol=1e-9)
    scalars = whole.compute()
    assert float(scalars["credit/0"]) == pytest.approx(expected.credit[0], abs=1e-12)


def test_a_chain_of_one_component_and_a_handful_of_samples_have_delay_1() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    assert credit_report(net, [torch.randn(50, 4)], delay="auto", components=["0"]).delay == 1
    deep = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))).double()
    with pytest.warns(UserWarning, match="2 samples are few"):
        report = credit_report(deep, [torch.randn(2, 2, dtype=torch.float64)], delay="auto")
    assert report.delay == 1
    note = "delay 1 was taken, for too few folds hold samples to choose one"
    assert note in report.notes


def test_the_delay_is_in_the_file_and_old_files_had_1(tmp_path: Path) -> None:
    metric = KoopmanCredit(delay=2)
    metric.update([torch.from_numpy(x) for x in noisy_states(0, (1, 2))])
    report = metric.report()
    report.to_json(tmp_path / "r.json")
    assert CreditReport.from_json(tmp_path / "r.json").delay == report.delay == 2
    old = report.to_dict()
    del old["delay"]
    assert CreditReport.from_dict(old).delay == 1


@pytest.mark.parametrize("delay", [0, "automatic"])
@pytest.mark.parametrize("kind", [KoopmanCredit, KoopmanCreditMonitor])
def test_other_delays_are_refused(kind: Any, delay: Any) -> None:
    with pytest.raises(ValueError, match="give 1 or more, or 'auto'"):
        kind(delay=delay)


USER_CODE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 2))

def data():
    return torch.randn(90, 4, generator=torch.Generator().manual_seed(0)).split(30)
"""


def test_the_command_line_takes_a_number_or_auto(
    user_module: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    user_module("delay_code", USER_CODE)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 2))
    torch.save({"state_dict": net.state_dict(), "global_step": 1}, "1.ckpt")
    command = "evaluate --model delay_code:net --data delay_code:data --ckpt 1.ckpt --out r.json --delay"
    for given, expected in (("2", {2}), ("auto", {1, 2, 3})):
        assert main([*command.split(), given]) == 0
        (report,) = read_reports("r.json")
        assert report.delay in expected
        assert str(report.source["options"]["delay"]) == given
    assert "was chosen" in "".join(capsys.readouterr().out.split("\n"))
    with pytest.raises(SystemExit):
        main([*command.split(), "some"])
    assert "some" in capsys.readouterr().err
