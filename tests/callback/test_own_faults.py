"""Whatever goes wrong in our own parts, training ends as it does without the monitor."""

import copy
import csv
import errno
import functools
import os
import pickle
import re
import signal
import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from test_faults import Fault, Samples, assert_alike, check_alike, fit, outcome
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle
from torch.utils.tensorboard import SummaryWriter

from lightning_koopman import CreditReport, KoopmanCreditMonitor
from lightning_koopman.callback import loggers as writers
from lightning_koopman.callback import monitor as monitors
from lightning_koopman.callback.loggers import CreditWriter
from lightning_koopman.measurement.accumulator import Accumulator
from lightning_koopman.measurement.measurement import Measurement
from lightning_koopman.network.access import hooks, watch
from lightning_koopman.network.access.hooks import _Around
from lightning_koopman.network.access.watch import Watcher, _WatchOfThread
from lightning_koopman.network.capture.capture import Capture
from lightning_koopman.network.flow.dataflow import DataFlow
from lightning_koopman.network.runs.steps import Step

# Where one measurement passes, from the first hook to the last number.
PLACES = [
    (KoopmanCreditMonitor, "_begin"),
    (Capture, "__enter__"),
    (Measurement, "_keep"),
    (Measurement, "end_pass"),
    (Accumulator, "_sum"),
    (Measurement, "report"),
    (CreditWriter, "draw"),
    (CreditWriter, "scalars"),
    (CreditWriter, "write"),
    (CreditReport, "to_scalars"),
    (CreditWriter, "finish"),
]
NAMES = [f"{owner.__name__}.{name}" for owner, name in PLACES]


# How states are recorded: along Lightning's own pass, in a pass of our own, or beside compiled code.
WAYS = {
    "along": {},
    "no validation": {"limit_val_batches": 0},
    "compiled": {"faults": {"compiled": True}},
}


SOME_SLOW = [way if way == "along" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]


class Armed(L.Callback):
    """Tells whether an epoch has been reached."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.now = epoch, False

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.now = trainer.current_epoch >= self.epoch


@contextmanager
def broken(
    place: tuple[Any, str],
    error: BaseException,
    raised: list[BaseException],
    when: Callable[[], bool] = lambda: True,
) -> Generator[None, None, None]:
    """Let one of our methods raise, and note what it raised."""
    kept = getattr(*place)

    @functools.wraps(kept)
    def breaks(*args: Any, **kwargs: Any) -> Any:
        if when():
            raised.append(error)
            raise error
        return kept(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*place, breaks)
        yield


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES, ids=NAMES)
def test_an_error_of_ours_ends_nothing(place, way, tmp_path):
    raised: list[BaseException] = []
    ours = functools.partial(broken, place, Fault("ours"), raised)
    check_alike(ours=ours, case_of=way, logger=lambda: CSVLogger(tmp_path), **WAYS[way])
    assert raised


@pytest.mark.parametrize("theirs", [{}, {"train": Fault("theirs")}], ids=["ends", "breaks"])
def test_an_error_of_ours_as_the_run_before_is_forgotten_takes_no_others_place(theirs):
    raised: list[BaseException] = []
    place = monitors, "WatchedState"
    check_alike(ours=functools.partial(broken, place, MemoryError("ours"), raised), faults=theirs)
    # In the beginning and at the end.
    assert len(raised) > 1


@pytest.mark.parametrize("way", WAYS)
def test_a_measurement_that_fails_once_is_tried_again(way):
    third = Armed(2)
    monitor = check_alike(
        ours=lambda: broken((Measurement, "report"), Fault("ours"), [], lambda: not third.now),
        others=lambda: [third],
        max_epochs=4,
        **WAYS[way],
    )
    assert [report.step for report in monitor.history] == [18, 24]


@pytest.mark.parametrize("way", SOME_SLOW)
@pytest.mark.parametrize("place", PLACES[1:-1], ids=NAMES[1:-1])
def test_ctrl_c_in_ours_stops_training_and_keeps_what_was_measured(place, way, tmp_path):
    second, monitor = Armed(1), KoopmanCreditMonitor()
    raised: list[BaseException] = []
    case = {"others": lambda: [second], "max_epochs": 3, "logger": lambda: CSVLogger(tmp_path)}
    with broken(place, KeyboardInterrupt(), raised, lambda: second.now):
        model, trainer, end = fit([monitor], **case, **WAYS[way])
    assert raised
    assert isinstance(end, SystemExit | KeyboardInterrupt)
    assert trainer.interrupted
    assert not any(outcome(model, trainer)["hooks"])
    assert [report.step for report in monitor.history][:1] == [6]
    assert trainer.current_epoch == 1


@contextmanager
def signalled(
    place: tuple[Any, str], handler: Callable[..., None], *, number: int = 1
) -> Generator[None, None, None]:
    """Let a signal come when one of our methods is called for so many times, and handle it."""
    kept, before, calls = getattr(*place), signal.signal(signal.SIGUSR1, handler), []

    @functools.wraps(kept)
    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGUSR1)
        return kept(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*place, called)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert len(calls) >= number


HOOKS_GO = [(RemovableHandle, "remove"), (_WatchOfThread, "remove"), (_Around, "leave")]
SIGNALLED = [*PLACES, (Step, "revive"), (DataFlow, "_known"), (Capture, "_record"), *HOOKS_GO]


@pytest.mark.parametrize("place", SIGNALLED, ids=lambda place: f"{place[0].__name__}.{place[1]}")
def test_what_a_signal_raises_ends_training_also_where_it_meets_ours(place, tmp_path):
    """A time limit that is an ordinary exception was taken for an error of ours, and went unheard."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError("time is up")

    with signalled(place, stop):
        model, trainer, end = fit([KoopmanCreditMonitor()], logger=lambda: CSVLogger(tmp_path))
    assert isinstance(end, TimeoutError)
    assert_nothing_stays(model, trainer)


def assert_nothing_stays(model: L.LightningModule, trainer: L.Trainer) -> None:
    """Look for hooks, for what takes the place of a module's forward, and for what follows data."""
    assert not any(outcome(model, trainer)["hooks"])
    assert not any("forward" in vars(module) for module in model.modules())
    assert _get_current_dispatch_mode_stack() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("ours")], ids=repr)
def test_data_are_followed_no_longer_where_it_fails_to_end(error, monkeypatch):
    failed: list[Watcher] = []

    class Fails(_WatchOfThread):
        def remove(self, watcher: Watcher) -> None:
            if watcher not in failed:
                failed.append(watcher)
                raise error
            super().remove(watcher)

    monkeypatch.setattr(watch, "_WATCH", Fails())
    model, trainer, _ = fit([KoopmanCreditMonitor()])
    assert failed
    assert_nothing_stays(model, trainer)


def test_no_hook_stays_where_memory_lacks_as_it_is_put_on():
    with broken((hooks, "_keep_place"), MemoryError("ours"), []):
        assert_nothing_stays(*fit([KoopmanCreditMonitor()])[:2])


@pytest.mark.parametrize("kind", ["weight_noise", "reinit"])
def test_what_a_signal_saves_are_the_weights_of_the_training(kind):
    """As Lightning saves where SLURM takes a machine back, at any moment."""
    saved: list[dict[str, Tensor]] = []
    expected: list[dict[str, Tensor]] = []

    class Weights(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.model = pl_module

        def copied(self) -> dict[str, Tensor]:
            return {name: value.clone() for name, value in self.model.state_dict().items()}

        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            expected.append(self.copied())

    weights = Weights()
    # Five passes for each component; the fourth of the training is the second of the first one.
    for number in range(4, 24, 4):
        with signalled((Step, "revive"), lambda *_: saved.append(weights.copied()), number=number):
            fit([KoopmanCreditMonitor(effects=[kind])], others=lambda: [weights])
        assert_alike(saved[-1], expected[-1])
    assert len(saved) == 5


@pytest.mark.parametrize("place", [(CreditWriter, "finish"), (monitors, "may_change_weights")])
def test_files_of_components_are_closed_where_the_end_fails(place, tmp_path):
    with broken(place, Fault("ours"), []):
        _, trainer, _ = fit([KoopmanCreditMonitor()], logger=lambda: TensorBoardLogger(tmp_path))
    assert trainer.loggers[0] not in writers._runs


def test_files_of_components_are_closed_behind_a_validation(tmp_path):
    model, trainer, _ = fit([KoopmanCreditMonitor()], logger=lambda: TensorBoardLogger(tmp_path))
    before = set(threading.enumerate())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.validate(model, DataLoader(Samples(40), batch_size=8), verbose=False)
    assert [*tmp_path.rglob("koopman/*/events*")]
    assert trainer.loggers[0] not in writers._runs
    assert set(threading.enumerate()) <= before


def test_a_run_that_cannot_be_closed_leaves_no_other_open(tmp_path):
    logger, closed = TensorBoardLogger(tmp_path), []

    class Run:
        def close(self) -> None:
            closed.append(self)
            raise DISK[0]

    writers._runs[logger] = {"a": Run(), "b": Run()}
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.ENOSPC))):
        CreditWriter.close([logger])
    assert len(closed) == 2


class Saves(L.Callback):
    """Saves a checkpoint in each epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def test_a_history_that_cannot_be_saved_ends_nothing(tmp_path):
    path, raised = tmp_path / "last.ckpt", []
    check_alike(
        ours=functools.partial(broken, (CreditReport, "to_dict"), MemoryError("ours"), raised),
        others=lambda: [Saves(path)],
    )
    assert raised
    assert not any("Koopman" in key for key in torch.load(path, weights_only=True)["callbacks"])


class Lost(CSVLogger):
    """A server that cannot be reached from when training begins on, which logging puts up with."""

    lost = False

    @property
    def experiment(self) -> Any:
        if self.lost:
            raise ConnectionError("no server")

    def save(self) -> None:
        self.lost = True

    def log_metrics(self, *_: Any, **__: Any) -> None:
        pass

    log_hyperparams = finalize = log_metrics


def test_a_logger_that_is_lost_ends_nothing(tmp_path):
    assert len(check_alike(logger=lambda: Lost(tmp_path)).history) == 2


class Copies(L.Callback):
    """Copies a monitor in the midst of a batch, and behind it."""

    def __init__(self, monitor: KoopmanCreditMonitor) -> None:
        self.monitor, self.copies = monitor, list[KoopmanCreditMonitor]()

    def _copy(self, *_: Any, **__: Any) -> None:
        self.copies += [copy.deepcopy(self.monitor), pickle.loads(pickle.dumps(self.monitor))]

    on_validation_batch_start = on_validation_batch_end = on_train_batch_start = on_fit_end = _copy


@pytest.mark.parametrize("way", ["along", "no validation"])
def test_a_monitor_can_be_copied_at_any_time(way):
    monitor = KoopmanCreditMonitor(["net.0", "net.3"])
    copies = Copies(monitor)
    check_alike(monitor, others=lambda: [copies], **WAYS[way])
    assert [report.step for report in copies.copies[-1].history] == [6, 12]
    # A copy holds none of the network, and watches a training of its own.
    assert all(copied._recorded.calls is copied._measurement is None for copied in copies.copies)
    for copied in (copies.copies[0], copies.copies[-1]):
        check_alike(copied, **WAYS[way])
        assert copied.report is not None
        assert copied.report.to_dict() == monitor.report.to_dict()


def test_keys_that_cannot_be_kept_end_nothing():
    raised: list[BaseException] = []
    check_alike(
        ours=functools.partial(broken, (monitors, "monitored_keys"), Fault("ours"), raised),
        case_of="along without a logger",
    )
    assert raised


class Refusing(CSVLogger):
    """Takes everything but what is of one kind."""

    def __init__(self, folder: Path, error: Exception, refused: str) -> None:
        super().__init__(folder)
        self.error, self.refused = error, refused

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.refused == "metrics" and any(key.startswith("koopman/") for key in metrics):
            raise self.error
        super().log_metrics(metrics, step)


def totals(folder: Path) -> int:
    """Count the measurements that a CSVLogger wrote."""
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return sum(bool(row["koopman/total"]) for row in csv.DictReader(file))


DISK = [OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EROFS)]


@pytest.mark.parametrize("error", [*DISK, Fault("logger")], ids=repr)
@pytest.mark.parametrize("first", [True, False])
def test_a_logger_that_cannot_write_keeps_no_other_from_it(error, first, tmp_path):
    def loggers() -> list[CSVLogger]:
        both = [Refusing(tmp_path / "broken", error, "metrics"), CSVLogger(tmp_path / "whole")]
        return both if first else both[::-1]

    monitor = check_alike(logger=loggers, case_of="two loggers")
    assert len(monitor.history) == 2
    assert totals(tmp_path / "whole") == 2
    stop = EarlyStopping("koopman/total", patience=9)
    _, trainer, end = fit([KoopmanCreditMonitor()], logger=loggers, others=lambda: [stop])
    assert end is None
    assert trainer.current_epoch == 2


EXPERIMENT = ["add_image", "add_text", "add_scalar"]


@pytest.mark.usefixtures("no_pixels")
@pytest.mark.parametrize("method", EXPERIMENT)
def test_tensorboard_may_fail_in_any_part(method, tmp_path):
    raised: list[BaseException] = []
    ours = functools.partial(broken, (SummaryWriter, method), DISK[0], raised)

    def loggers() -> list[Any]:
        return [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")]

    monitor = check_alike(ours=ours, case_of="two loggers", logger=loggers)
    assert raised
    assert len(monitor.history) == 2
    assert totals(tmp_path / "csv") == 2
