"""The budget on a clock that the tests set."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lit import LitNet, dataset, loaders, newest, quiet_trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_koopman import KoopmanCreditMonitor, credit_report
from lightning_koopman.callback.budget import ALLOWANCE, NEVER, Budget
from lightning_koopman.measurement.measurement import Measurement

pytestmark = pytest.mark.filterwarnings("ignore:the Trainer has no logger")


@pytest.fixture(autouse=True)
def unhurried() -> None:
    """How much time there is, is what is tested here."""


class Clock:
    """Time that passes where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def measured_steps(
    share: float,
    *,
    n_epochs: int,
    epoch_s: float,
    cost_s: float,
    first_s: float | None = None,
    end_s: float = 0.0,
    known: bool = True,
    steps: int = 10,
    pause: tuple[int, float] = (0, 0.0),
) -> tuple[list[int], Budget]:
    """Play a training whose epochs, measurements and figures take given times, the last one longer."""
    clock = Clock()
    budget = Budget(share, clock)
    budget.start(0)
    budget.expect("draw", end_s)
    taken: list[int] = []
    drawn: list[int] = []
    for epoch in range(1, n_epochs + 1):
        clock.now += epoch_s
        step = epoch * steps
        if step >= budget.due or epoch in (1, n_epochs):
            with budget.watching():
                clock.now += cost_s if taken or first_s is None else first_s
                clock.now += pause[1] if len(taken) + 1 == pause[0] else 0.0
                if epoch == n_epochs:
                    clock.now += 0.25 * cost_s
                elif end_s and budget.has_room("draw"):
                    drawn.append(epoch)
                    with budget.apart("draw"):
                        clock.now += end_s
                budget.plan(step, n_epochs * steps if known else None)
            taken.append(epoch)
    with budget.watching(), budget.apart("draw"):
        clock.now += end_s
    assert end_s * len(drawn) <= 0.05 * share * budget.trained
    return taken, budget


def test_measurements_come_in_even_distances_and_use_the_budget() -> None:
    # Six tenths of 5 % of 1,000 seconds pay for 15 measurements of 2 seconds.
    taken, budget = measured_steps(0.05, n_epochs=100, epoch_s=10, cost_s=2)
    assert (taken[0], taken[1], taken[-1]) == (1, 2, 100)
    gaps = np.diff(taken[1:-1])
    assert gaps.max() - gaps.min() <= 2
    assert 0.5 * 0.05 <= budget.overhead <= 0.6 * 0.05
    assert budget.trained == pytest.approx(1000)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("cost_s", [0.05, 1.0, 4.0])
def test_the_share_holds_whatever_a_measurement_takes(share: float, cost_s: float, known: bool) -> None:
    taken, budget = measured_steps(share, n_epochs=200, epoch_s=5, cost_s=cost_s, end_s=1, known=known)
    assert budget.spent <= max(ALLOWANCE, share * budget.trained, 2.25 * cost_s + 1) + 1e-6
    assert taken[0] == 1
    assert taken[-1] == 200
    # The first may pay for imports, so the second shows what one takes; from then on it is even.
    gaps = np.diff(taken[2:-1])
    assert len(gaps) == 0 or gaps.max() <= 1 + 1.3 * gaps.mean()


def test_measurements_that_come_late_do_not_make_the_next_ones_late_as_well() -> None:
    # 30 seconds pay for one in 2.1 epochs, and an epoch is measured as a whole.
    gaps = np.diff(measured_steps(0.05, n_epochs=200, epoch_s=5, cost_s=0.3)[0][2:-1])
    assert np.abs(np.cumsum(gaps) - gaps.mean() * np.arange(1, len(gaps) + 1)).max() <= 6


def test_everything_is_measured_where_that_fits_into_the_allowance() -> None:
    taken, _ = measured_steps(0.0, n_epochs=20, epoch_s=0.1, cost_s=ALLOWANCE / 21)
    assert taken == list(range(1, 21))


def test_a_first_measurement_that_pays_for_imports_does_not_thin_out_the_others() -> None:
    taken, budget = measured_steps(0.05, n_epochs=60, epoch_s=3, cost_s=0.1, first_s=2.0, end_s=1.5)
    # Of 5.4 seconds, imports take 2 and the figures of the end 1.5; a tenth each pays for 19 in all.
    assert len(taken) > 17
    assert budget.spent <= 0.05 * budget.trained + 1e-6


@pytest.mark.parametrize("interrupted", [1, 2, 5])
def test_a_measurement_that_is_interrupted_does_not_end_the_others(interrupted: int) -> None:
    pause = (interrupted, ALLOWANCE / 4)
    taken, budget = measured_steps(0.05, n_epochs=30, epoch_s=0.05, cost_s=0.05, end_s=0.3, pause=pause)
    assert len(taken) >= 8
    assert budget.spent <= ALLOWANCE


def test_without_anything_to_spend_the_first_and_the_last_are_left() -> None:
    taken, budget = measured_steps(0.0, n_epochs=50, epoch_s=1, cost_s=ALLOWANCE)
    assert taken == [1, 50]
    assert budget.due >= NEVER
    assert measured_steps(0.0, n_epochs=50, epoch_s=1, cost_s=ALLOWANCE, known=False)[0] == [1, 50]


def test_a_single_epoch_is_measured_once() -> None:
    assert measured_steps(0.05, n_epochs=1, epoch_s=0.0, cost_s=0.0)[0] == [1]


def test_time_inside_is_counted_once_and_also_when_it_ends_in_an_error() -> None:
    clock = Clock()
    budget = Budget(0.05, clock)

    def fails() -> None:
        with budget.watching():
            clock.now += 1
            with budget.watching():
                clock.now += 2
            assert budget.spent == pytest.approx(3)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fails()
    clock.now += 10
    budget.add(0.5)
    assert budget.spent == pytest.approx(3.5)
    assert budget.trained == pytest.approx(9.5)
    assert budget.overhead == pytest.approx(3.5 / 9.5)


def test_figures_need_room_beside_those_of_the_end() -> None:
    clock = Clock()
    budget = Budget(0.1, clock)
    budget.expect("draw", 2.0)
    clock.now += 660
    assert not budget.has_room("draw"), "they take more than a twentieth of six tenths of the 66 s"
    clock.now += 20
    assert budget.has_room("draw")
    with budget.watching(), budget.apart("draw"):
        clock.now += 3
    assert not budget.has_room("draw")


@pytest.mark.parametrize("share", [-0.1, math.inf, math.nan])
def test_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"max_overhead is .*; give a share of the training's time"):
        KoopmanCreditMonitor(max_overhead=share)


class Slow(LitNet):
    """Takes a known time per training step, whatever the machine."""

    def __init__(self, seconds: float = 0.02) -> None:
        super().__init__()
        self.seconds = seconds

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().training_step(batch, batch_idx)


def fit(folder: Any, monitor: KoopmanCreditMonitor, *callbacks: Any, **options: Any) -> L.Trainer:
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, [monitor, *callbacks], **options)
    trainer.fit(Slow(), *loaders())
    return trainer


def slowed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[float]:
    """Let each report take longer; return the list of the times that they took."""
    took: list[float] = []
    kept = Measurement.report

    def report(self: Any, **given: Any) -> Any:
        start = time.perf_counter()
        time.sleep(seconds)
        try:
            return kept(self, **given)
        finally:
            took.append(time.perf_counter() - start)

    monkeypatch.setattr(Measurement, "report", report)
    return took


class Keys(L.Callback):
    """Keeps what callbacks find after each validation."""

    def __init__(self) -> None:
        self.totals: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.totals.append(float(trainer.callback_metrics["koopman/total"]))


def test_epochs_are_skipped_and_the_keys_hold_what_was_measured_last(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(monkeypatch, ALLOWANCE / 4)
    monitor, keys = KoopmanCreditMonitor(on_error="raise", figures=False), Keys()
    fit(tmp_path, monitor, keys, max_epochs=8)
    steps = [report.step for report in monitor.history]
    assert len(steps) < 8
    assert (steps[0], steps[-1]) == (4, 32)
    measured = dict(zip(steps, (report.total for report in monitor.history), strict=True))
    expected, newest = [], math.nan
    for step in range(4, 33, 4):
        newest = measured.get(step, newest)
        expected.append(newest)
    assert keys.totals == pytest.approx(expected)


class Stream(IterableDataset):
    """The samples of the small data set, whose number nobody knows."""

    def __iter__(self) -> Any:
        return iter(dataset())


@pytest.fixture
def costly(monkeypatch: pytest.MonkeyPatch) -> KoopmanCreditMonitor:
    """Return a monitor that can pay for one report."""
    clock = Clock()
    monkeypatch.setattr(time, "sleep", clock.sleep)
    monkeypatch.setattr(time, "perf_counter", clock)
    slowed(monkeypatch, ALLOWANCE)
    monitor = KoopmanCreditMonitor(max_overhead=0.0, on_error="raise", figures=False)
    monitor.budget.clock = clock
    return monitor


@pytest.mark.parametrize("stream", [False, True])
def test_in_the_last_epoch_too_validations_but_the_last_are_paid_for(
    stream: bool, costly: KoopmanCreditMonitor, tmp_path: Any
) -> None:
    training, validation = loaders()
    training = DataLoader(Stream(), batch_size=40) if stream else training
    trainer = quiet_trainer(tmp_path, [costly], max_epochs=1, val_check_interval=1)
    trainer.fit(Slow(), training, validation)
    assert [report.step for report in costly.history] == [1, 4]
    assert newest(costly).effects is not None


def test_a_training_that_may_not_stop_yet_is_not_at_its_last_validation(
    costly: KoopmanCreditMonitor, tmp_path: Any
) -> None:
    def ask(trainer: L.Trainer, _: L.LightningModule) -> None:
        trainer.should_stop = True

    fit(tmp_path, costly, LambdaCallback(on_train_epoch_end=ask), min_epochs=4, max_epochs=9)
    assert [report.step for report in costly.history] == [4, 16]


def test_every_n_epochs_wins(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(monkeypatch, 0.1)
    monitor = KoopmanCreditMonitor(every_n_epochs=1, max_overhead=0.0, on_error="raise", figures=False)
    fit(tmp_path, monitor, max_epochs=4)
    assert [report.step for report in monitor.history] == [4, 8, 12, 16]


def test_the_share_that_is_logged_is_what_the_training_takes_longer(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Time passes in sleeps alone, so that no machine is too slow, nor a tracer's work counted.
    clock = Clock()
    monkeypatch.setattr(time, "sleep", clock.sleep)
    monkeypatch.setattr(time, "perf_counter", clock)
    slowed(monkeypatch, 0.2)
    kept = Measurement._keep

    def keep(self: Any, *given: Any) -> Any:
        time.sleep(0.005)
        return kept(self, *given)

    # In hooks, while the user's own validation runs.
    monkeypatch.setattr(Measurement, "_keep", keep)

    class Times(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            self.start = clock()

        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if not trainer.sanity_checking:
                self.took = clock() - self.start
                self.logged = trainer.callback_metrics.get("koopman/overhead")

    def timed(*callbacks: Any) -> Times:
        torch.manual_seed(0)
        times = Times()
        trainer = quiet_trainer(tmp_path, [*callbacks, times], max_epochs=2)
        trainer.fit(Slow(0.06), *loaders())
        return times

    monitor = KoopmanCreditMonitor(every_n_epochs=1, on_error="raise", figures=False)
    monitor.budget.clock = clock
    without, watched = timed(), timed(monitor)
    assert without.took == pytest.approx(8 * 0.06)
    longer = watched.took - without.took
    assert longer > 0.4 + 10 * 0.005
    assert float(watched.logged) == pytest.approx(longer / without.took, rel=1e-4)


def test_a_validation_where_nothing_is_due_costs_next_to_nothing(tmp_path: Any) -> None:
    monitor = KoopmanCreditMonitor(every_n_epochs=100, on_error="raise", figures=False)
    # Time of this process alone: what else the machine does is not ours.
    monitor.budget.clock = time.process_time
    spent: list[float] = []

    class Spent(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            spent.append(monitor.budget.spent)

    fit(tmp_path, monitor, Spent(), max_epochs=6)
    # Of the first measurement, and of five validations where nothing is due.
    assert len(monitor.history) == 2
    assert np.median(np.diff(spent[2:-1])) < 0.005


def test_reports_under_way_have_no_errors_and_the_last_one_has(tmp_path: Any) -> None:
    monitor = KoopmanCreditMonitor(every_n_epochs=1, on_error="raise", figures=False)
    trainer = fit(tmp_path, monitor, max_epochs=3)
    has = [np.isfinite(report.stderr["credit"]).all() for report in monitor.history]
    assert has == [False, False, True]
    assert [report.step for report in monitor.history] == [4, 8, 12]
    net = trainer.lightning_module.net
    assert monitor.report is not None
    data = DataLoader(dataset(seed=1), batch_size=50)
    again = credit_report(net, [batch[0] for batch in data])
    assert monitor.report.credit == pytest.approx(again.credit, abs=1e-9)
    assert monitor.report.stderr["credit"] == pytest.approx(again.stderr["credit"], abs=1e-9)
