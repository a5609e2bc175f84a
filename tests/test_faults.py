"""Whatever goes wrong, training ends exactly as it does without the monitor, and no hook stays."""

from __future__ import annotations

import errno
import os
import signal
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_koopman import KoopmanCreditMonitor
from lightning_koopman.measurement import Measurement
from lightning_koopman.metric import KoopmanCredit


class Fault(Exception):
    pass


class Samples(Dataset):
    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.rows = torch.randn(count, 6, generator=torch.Generator().manual_seed(5))
        self.fails_at = fails_at

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        if index == self.fails_at:
            raise Fault("the loader broke")
        return self.rows[index]


class Net(L.LightningModule):
    def __init__(self, **faults: Any) -> None:
        super().__init__()
        self.faults = faults
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 5), nn.Linear(5, 2)
        )
        if faults.get("compiled"):
            self.net = torch.compile(self.net, backend="eager")
        self.automatic_optimization = not faults.get("manual")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def _maybe_fail(self, phase: str, batch_idx: int) -> None:
        fault = self.faults.get(phase)
        if fault is not None and batch_idx == 1 and not self.trainer.sanity_checking:
            if isinstance(fault, signal.Signals):
                os.kill(os.getpid(), fault)
            else:
                raise fault

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor | None:
        self._maybe_fail("train", batch_idx)
        loss = self(batch).square().mean()
        if self.faults.get("nan_from") is not None and self.global_step >= self.faults["nan_from"]:
            loss = loss * torch.nan
        if not self.faults.get("manual"):
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._maybe_fail("validation", batch_idx)
        self(batch)

    def configure_optimizers(self) -> Any:
        if self.faults.get("manual"):
            halves = list(self.parameters())
            return [torch.optim.SGD(halves[:3], lr=0.1), torch.optim.Adam(halves[3:], lr=0.01)]
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(
    monitors: list[KoopmanCreditMonitor],
    *,
    faults: dict[str, Any] | None = None,
    validation: Any = None,
    training: Any = None,
    others: Callable[[], list[L.Callback]] = list,
    ours_first: bool = True,
    **flags: Any,
) -> tuple[Net, L.Trainer, BaseException | None]:
    """Train once; return the model, the Trainer, and how training ended."""
    torch.manual_seed(0)
    model = Net(**(faults or {}))
    extra = others()
    given = {"max_epochs": 2, "logger": False, "num_sanity_val_steps": 1} | flags
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[*monitors, *extra] if ours_first else [*extra, *monitors],
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"enable_checkpointing": False} | given),
    )
    training = DataLoader(Samples(24), batch_size=4, shuffle=True) if training is None else training
    validation = DataLoader(Samples(40), batch_size=8) if validation is None else validation
    ended: BaseException | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(model, training, validation)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            ended = error
    return model, trainer, ended


def check_alike(**case: Any) -> KoopmanCreditMonitor:
    """Train without and with the monitor, and compare how both ended."""
    monitor = KoopmanCreditMonitor()
    plain, plain_trainer, plain_end = fit([], **case)
    watched, trainer, end = fit([monitor], **case)
    assert type(end) is type(plain_end), (end, plain_end)
    assert str(end) == str(plain_end)
    assert trainer.global_step == plain_trainer.global_step
    assert trainer.state.status == plain_trainer.state.status
    assert_untouched(watched, plain)
    return monitor


def assert_untouched(watched: nn.Module, plain: nn.Module) -> None:
    for (name, left), right in zip(
        watched.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True, msg=name)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())


@pytest.mark.parametrize(
    "flags",
    [
        {"max_epochs": 0},
        {"fast_dev_run": True},
        {"overfit_batches": 2},
        {"limit_train_batches": 3},
        {"limit_val_batches": 1},
        {"limit_val_batches": 0},
        {"limit_val_batches": 0.5, "val_check_interval": 2},
        {"barebones": True, "num_sanity_val_steps": None, "logger": None, "enable_checkpointing": None},
        {"accumulate_grad_batches": 4},
        {"max_steps": 3},
        {"check_val_every_n_epoch": 2},
        {"detect_anomaly": True},
        {"precision": "bf16-true"},
    ],
    ids=str,
)
def test_trainer_flags(flags: dict[str, Any]) -> None:
    check_alike(**flags)


@pytest.mark.parametrize("phase", ["train", "validation"])
@pytest.mark.parametrize("fault", [Fault("forward broke"), KeyboardInterrupt(), signal.SIGINT], ids=repr)
def test_exceptions_and_interrupts(phase: str, fault: Any) -> None:
    check_alike(faults={phase: fault})


@pytest.mark.parametrize("phase", ["train", "validation"])
def test_termination(phase: str) -> None:
    check_alike(faults={phase: signal.SIGTERM})


@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_loader_that_fails(where: str) -> None:
    check_alike(**{where: DataLoader(Samples(24, fails_at=17), batch_size=4)})


@pytest.mark.parametrize("first", [0, 3])
def test_a_loss_that_is_not_a_number(first: int) -> None:
    monitor = check_alike(faults={"nan_from": first})
    assert len(monitor.history) == 0


def test_manual_optimisation_with_two_optimizers() -> None:
    assert len(check_alike(faults={"manual": True}).history) == 2


def test_a_compiled_model() -> None:
    assert len(check_alike(faults={"compiled": True}).history) == 2


def test_one_validation_sample() -> None:
    assert check_alike(validation=DataLoader(Samples(1))).report is None


def test_several_loaders() -> None:
    loaders = [DataLoader(Samples(40), batch_size=8), DataLoader(Samples(16), batch_size=8)]
    monitor = check_alike(validation=loaders)
    assert monitor.report is not None
    assert monitor.report.n_samples == 40


@pytest.mark.parametrize("ours_first", [True, False])
def test_averaged_weights(ours_first: bool) -> None:
    averaging = pytest.importorskip(
        "lightning.pytorch.callbacks.weight_averaging", reason="this Lightning has no WeightAveraging"
    )
    check_alike(others=lambda: [averaging.EMAWeightAveraging(decay=0.9)], ours_first=ours_first)


def test_two_monitors() -> None:
    plain, _, _ = fit([])
    monitors = [KoopmanCreditMonitor(), KoopmanCreditMonitor(prefix="wide", rank=1)]
    watched, _, end = fit(monitors)
    assert end is None
    assert [len(monitor.history) for monitor in monitors] == [2, 2]
    assert_untouched(watched, plain)


@pytest.mark.parametrize(
    "place", [(Measurement, "end_pass"), (Measurement, "report"), (KoopmanCredit, "update")]
)
@pytest.mark.parametrize("error", [Fault("ours"), torch.linalg.LinAlgError("ours"), MemoryError("ours")])
def test_our_own_numerics_fail(
    place: tuple[Any, str], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise error

    plain, _, _ = fit([])
    monkeypatch.setattr(*place, broken)
    watched, _, end = fit([KoopmanCreditMonitor()])
    assert end is None
    assert_untouched(watched, plain)


def test_ctrl_c_in_our_numerics_stops_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Measurement, "report", interrupted)
    watched, trainer, end = fit([KoopmanCreditMonitor()])
    assert isinstance(end, SystemExit | KeyboardInterrupt)
    assert trainer.interrupted
    assert not any(m._forward_hooks for m in watched.modules())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_logger_that_cannot_write(code: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: CSVLogger, metrics: dict[str, float], step: int | None = None) -> None:
        if any(key.startswith("koopman/") for key in metrics):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(CSVLogger, "log_metrics", full)
    plain, _, _ = fit([], logger=CSVLogger(tmp_path / "plain"))
    monitor = KoopmanCreditMonitor()
    watched, _, end = fit([monitor], logger=CSVLogger(tmp_path / "watched"))
    assert end is None
    assert len(monitor.history) == 2
    assert_untouched(watched, plain)


def test_resume_in_mid_epoch(tmp_path: Any) -> None:
    def resumed(monitor: list[KoopmanCreditMonitor], folder: str) -> Net:
        path = tmp_path / f"{folder}.ckpt"
        first = [] if not monitor else [KoopmanCreditMonitor()]
        _, trainer, _ = fit(first, max_steps=9)
        trainer.save_checkpoint(path)
        torch.manual_seed(0)
        model = Net()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            again = L.Trainer(
                accelerator="cpu",
                max_epochs=3,
                logger=False,
                callbacks=list(monitor),
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
            )
            loader = DataLoader(TensorDataset(Samples(24).rows), batch_size=4, collate_fn=_rows)
            again.fit(model, loader, DataLoader(Samples(40), batch_size=8), ckpt_path=path)
        return model

    monitor = KoopmanCreditMonitor()
    assert_untouched(resumed([monitor], "watched"), resumed([], "plain"))
    assert monitor.history


def _rows(parts: list[tuple[Tensor]]) -> Tensor:
    return torch.stack([part[0] for part in parts])


class Stops(L.Callback):
    """Presses Ctrl-C, or breaks, in one hook; ``after`` hooks of that name were called."""

    def __init__(self, hook: str, error: BaseException, after: int = 0) -> None:
        self.left = after

        def stop(*_: Any, **__: Any) -> None:
            self.left -= 1
            if self.left < 0:
                raise error

        setattr(self, hook, stop)


PHASES = (
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_train_epoch_end",
    "on_train_end",
    "teardown",
)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("hook", PHASES)
def test_ctrl_c_in_every_phase(hook: str, ours_first: bool) -> None:
    check_alike(others=lambda: [Stops(hook, KeyboardInterrupt())], ours_first=ours_first)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Fault("late")], ids=repr)
def test_what_was_measured_before_the_end_is_kept(error: BaseException, tmp_path: Any) -> None:
    monitor, logger = KoopmanCreditMonitor(), CSVLogger(tmp_path)
    _, trainer, end = fit(
        [monitor],
        logger=logger,
        max_epochs=4,
        others=lambda: [Stops("on_train_epoch_start", error, after=2)],
    )
    assert end is not None
    assert [report.step for report in monitor.history] == [6, 12]
    assert "koopman/total" in trainer.callback_metrics
    assert len(monitor.state_dict()["history"]) == 2
    logger.save()
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    place = rows[0].split(",").index("koopman/total")
    assert sum(bool(row.split(",")[place]) for row in rows[1:]) == 2
