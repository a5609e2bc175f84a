"""Whatever goes wrong in our own parts, training ends as it does without the monitor."""

import csv
import errno
import functools
import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from test_faults import Fault, assert_alike, check_alike, fit, outcome
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_koopman import CreditReport, KoopmanCreditMonitor
from lightning_koopman.callback import loggers as writers
from lightning_koopman.callback import monitor as monitors
from lightning_koopman.callback.loggers import CreditWriter
from lightning_koopman.measurement.accumulator import Accumulator
from lightning_koopman.measurement.measurement import Measurement
from lightning_koopman.network.capture import Capture
from lightning_koopman.network.provenance import DataFlow
from lightning_koopman.network.replay import Step

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


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError("ours"), MemoryError("ours")])
@pytest.mark.parametrize("place", PLACES[3:6], ids=NAMES[3:6])
def test_numerics_of_ours_that_fail_end_nothing(place, error):
    ours = functools.partial(broken, place, error, [])
    assert check_alike(ours=ours, case_of="along without a logger").history == []


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


SIGNALLED = [*PLACES, (Step, "revive"), (DataFlow, "_known"), (Capture, "_record")]


@pytest.mark.parametrize("place", SIGNALLED, ids=lambda place: f"{place[0].__name__}.{place[1]}")
def test_what_a_signal_raises_ends_training_also_where_it_meets_ours(place, tmp_path):
    """A time limit that is an ordinary exception was taken for an error of ours, and went unheard."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError("time is up")

    with signalled(place, stop):
        model, trainer, end = fit([KoopmanCreditMonitor()], logger=lambda: CSVLogger(tmp_path))
    assert isinstance(end, TimeoutError)
    assert not any(outcome(model, trainer)["hooks"])


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


def test_files_of_components_are_closed_where_the_last_figures_fail(tmp_path):
    with broken((CreditWriter, "finish"), Fault("ours"), []):
        _, trainer, _ = fit([KoopmanCreditMonitor()], logger=lambda: TensorBoardLogger(tmp_path))
    assert trainer.loggers[0] not in writers._runs


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
