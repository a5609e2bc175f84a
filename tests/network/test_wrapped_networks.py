"""What modules around a network do with what it gives is what counts, as if its parts were their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lit import quiet_trainer
from small import wired
from test_returned_parts import EXACT, batches, volume
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_koopman import (
    CreditReport,
    KoopmanCreditMonitor,
    component_effects,
    credit_report,
)


def flat(end: Callable[[Tensor, Any], Any]) -> Any:
    torch.manual_seed(0)
    parts = {"body": nn.Linear(6, 7), "head": nn.Linear(7, 4)}
    return wired(lambda m, x: end(x, m.head(m.body(x))), **parts).double().eval()


def around(net: nn.Module, end: Callable[[Tensor, Any], Any]) -> Any:
    return wired(lambda m, x: end(x, m.net(x)), net=net).eval()


def plain() -> Any:
    return flat(lambda x, y: y)


def in_cases(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x[:, :1] > 0, y, -y)


ENDS: dict[str, Callable[[Tensor, Any], Any]] = {
    "as it is": lambda x, y: y,
    "a slice": lambda x, y: y[:, :2],
    "a skip connection": lambda x, y: x[:, :4] + y,
    "one that counts more": lambda x, y: 10 * x[:, :4] + y,
    "one in place": lambda x, y: y.add_(x[:, :4]),
    "beside the data": lambda x, y: torch.cat([x, y], 1),
    "in cases": in_cases,
    "a mapping": lambda x, y: {"scores": y[:, :3]},
    "behind a loss": lambda x, y: (y.square().mean(), y[:, :2]),
    "a loss alone": lambda x, y: y.square().mean(),
    "classes": lambda x, y: y.argmax(1),
    "out of torch": lambda x, y: y.detach().numpy(),
    "nothing": lambda x, y: None,
    "the data alone": lambda x, y: x,
}


def assert_alike(wrapped: CreditReport, alone: CreditReport, prefix: str = "net.") -> None:
    own = tuple(n if n == "output" else prefix + n for n in alone.components)
    assert wrapped.components == own
    assert wrapped.total == pytest.approx(alone.total, abs=1e-9)
    assert wrapped.r2.tolist() == pytest.approx(alone.r2.tolist(), abs=1e-9)
    assert list(wrapped.reads.values()) == [
        tuple(n if n in ("input", "output") else prefix + n for n in read)
        for read in alone.reads.values()
    ]


@pytest.mark.parametrize("kind", ENDS)
def test_a_wrapper_gives_the_report_of_the_network_that_does_all_itself(kind: str) -> None:
    alone = credit_report(flat(ENDS[kind]), batches(), options=EXACT)
    assert_alike(credit_report(around(plain(), ENDS[kind]), batches(), options=EXACT), alone)


@pytest.mark.parametrize("kind", ENDS)
def test_a_wrapper_that_runs_the_parts_itself_gives_what_one_that_calls_the_network_does(
    kind: str,
) -> None:
    network = wired(lambda m, x: ENDS[kind](x, m.net.head(m.net.body(x))), net=plain()).eval()
    alone = credit_report(flat(ENDS[kind]), batches(), options=EXACT)
    assert_alike(credit_report(network, batches(), options=EXACT), alone)


def test_residual_blocks_in_a_sequential_that_is_not_called_end_with_their_sum() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        for block in m.blocks:
            x = x + block(x)
        return x

    torch.manual_seed(0)
    network = wired(run, blocks=nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))).double()
    report = credit_report(network, batches(), options=EXACT)
    assert report.components[-1] == "output"
    assert report.total == pytest.approx(volume(network), abs=1e-6)


def test_calls_of_a_wrapper_that_runs_the_parts_itself_are_those_of_the_network() -> None:
    def twice(model: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([model(x), model(x.flip(1))], 1)

    by_parts = wired(lambda m, x: x[:, :4] + m.net.head(m.net.body(x)), net=plain()).eval()
    called = around(plain(), ENDS["a skip connection"])
    one, other = (
        credit_report(net, batches(), options=EXACT, forward_fn=twice) for net in (by_parts, called)
    )
    assert one.components == other.components == ("net.body", "net.head", "output")
    assert one.n_samples == other.n_samples == 2 * sum(map(len, batches()))
    assert one.total == pytest.approx(other.total, abs=1e-9)
    with torch.no_grad():
        x = torch.cat(batches())
        before, both = twice(called, x), torch.cat([x, x.flip(1)])
        mean = called.net(both).mean(0)
        after = torch.cat([x[:, :4] + mean, x.flip(1)[:, :4] + mean], 1)
    expected = float((after - before).square().sum() / (before - before.mean(0)).square().sum())
    for report in (one, None):
        effects = component_effects(by_parts, batches(), report, forward_fn=twice)
        assert effects.values["skip"][1] == pytest.approx(expected, rel=1e-6)


def test_a_skip_connection_around_all_components_has_the_volume_of_the_whole_function() -> None:
    network = around(plain(), ENDS["a skip connection"])
    report = credit_report(network, batches(), options=EXACT)
    assert report.components[-1] == "output"
    assert report.total == pytest.approx(volume(network), abs=1e-6)


def test_the_outermost_of_several_wrappers_counts() -> None:
    inner = around(plain(), lambda x, y: y[:, :3])
    network = around(inner, lambda x, y: x[:, :3] - y)
    alone = credit_report(flat(lambda x, y: x[:, :3] - y[:, :3]), batches(), options=EXACT)
    assert_alike(credit_report(network, batches(), options=EXACT), alone, "net.net.")


@pytest.mark.filterwarnings("ignore:the Trainer has no logger")
def test_a_step_that_calls_a_wrapper_gets_what_the_wrapper_returns(tmp_path: Path) -> None:
    class Lit(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.wrapper = around(plain(), lambda x, y: y[:, :2])

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.wrapper(batch).square().mean()

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.wrapper(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    monitor = KoopmanCreditMonitor(options=EXACT)
    loader = DataLoader(torch.cat(batches()), batch_size=50)
    quiet_trainer(tmp_path, [monitor], max_epochs=1).fit(Lit().double().train(), loader, loader)
    assert monitor.report is not None
    alone = credit_report(flat(lambda x, y: y[:, :2]), batches(), options=EXACT)
    assert_alike(monitor.report, alone, "wrapper.net.")


def test_an_entry_that_is_not_returned_is_no_end() -> None:
    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        states = m.head(m.body(x))
        return states, torch.tanh(m.pooler(states))

    torch.manual_seed(0)
    parts = {"body": nn.Linear(6, 7), "head": nn.Linear(7, 4), "pooler": nn.Linear(4, 4)}
    network = around(wired(run, **parts).double(), lambda x, both: both[0])
    report = credit_report(network, batches(), options=EXACT)
    assert report.components == ("net.body", "net.head")
    assert any("left out" in note and "net.pooler" in note for note in report.notes)
    skipped = component_effects(network, batches(), report, ["skip"]).values["skip"]
    assert skipped.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


CALLED_AGAIN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "two views compared": lambda net, x: torch.cosine_similarity(net(x), net(-x)),
    "two views side by side": lambda net, x: torch.cat([net(x), net(-x)], 1),
    "the mean over views": lambda net, x: (net(x) + net(x.flip(1))) / 2,
}


@pytest.mark.parametrize("kind", CALLED_AGAIN)
def test_a_network_called_several_times_by_a_wrapper_is_reported_by_call(kind: str) -> None:
    network = wired(lambda m, x: CALLED_AGAIN[kind](m.net, x), net=plain()).eval()
    report = credit_report(network, batches(), options=EXACT)
    assert report.components == ("net.body", "net.head")
    assert report.total == pytest.approx(credit_report(plain(), batches(), options=EXACT).total)
    assert any("call the network several times" in note for note in report.notes)


def test_what_was_given_counts_where_a_wrapper_fails_behind_it() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        both: list[Tensor] = []
        with contextlib.suppress(ArithmeticError):
            m.around(x, both)
        return both[0].detach()

    def fail(m: Any, x: Tensor, both: list[Tensor]) -> None:
        both.append(m.net(x))
        raise ArithmeticError

    def give(m: Any, x: Tensor) -> Tensor:
        return m.head(m.body(x))[:, :2]

    torch.manual_seed(0)
    net = wired(give, body=nn.Linear(6, 7), head=nn.Linear(7, 4)).double()
    network = wired(run, around=wired(fail, net=net)).eval()
    report = credit_report(network, batches(), options=EXACT)
    assert report.components == ("around.net.body", "around.net.head", "output")


def test_a_wrapper_that_failed_and_was_called_again_is_read_as_one_that_did_not() -> None:
    alone = credit_report(flat(ENDS["a slice"]), batches(), options=EXACT)
    failing = wired(lambda m, x, fails: 1 / 0 if fails else m.net(x), net=plain())

    def forward(m: Any, x: Tensor) -> Tensor:
        with contextlib.suppress(ZeroDivisionError):
            m.net(x, True)
        found: Tensor = m.net(x, False)
        return found[:, :2]

    report = credit_report(wired(forward, net=failing).eval(), batches(), options=EXACT)
    assert_alike(report, alone, "net.net.")
