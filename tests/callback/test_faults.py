"""Whatever goes wrong, training ends exactly as it does without the monitor, and no hook stays."""

import copy
import os
import random
import signal
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lit import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_koopman import KoopmanCreditMonitor, Options


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


class Trap(nn.Module):
    """Raises in the middle of a forward pass, once it is set."""

    error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return x


class Net(L.LightningModule):
    def __init__(self, **faults: Any) -> None:
        super().__init__()
        self.faults = faults
        inside = [Trap()] if "inside" in faults else []
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 5), *inside, nn.Linear(5, 2)
        )
        if faults.get("compiled"):
            self.net = torch.compile(self.net, backend="eager")
        self.automatic_optimization = not faults.get("manual")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def _maybe_fail(self, phase: str, batch_idx: int) -> None:
        phase = "sanity" if self.trainer.sanity_checking else phase
        fault = self.faults.get(phase)
        if fault is None or batch_idx != 1:
            return
        if "inside" in self.faults:
            self.net[4].error = fault
        elif isinstance(fault, signal.Signals):
            os.kill(os.getpid(), fault)
        else:
            raise fault

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor | None:
        self._maybe_fail("train", batch_idx)
        if "skips" in self.faults:
            return None
        parts = batch.values() if isinstance(batch, dict) else [batch]
        loss = torch.stack([self(part).square().mean() for part in parts]).sum()
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
    L.seed_everything(0, verbose=False)
    model = Net(**(faults or {}))
    extra = others()
    given = {"max_epochs": 2, "logger": False, "num_sanity_val_steps": 1} | flags
    given["logger"] = _made(given["logger"])
    callbacks = [*monitors, *extra] if ours_first else [*extra, *monitors]
    trainer = quiet_trainer(None, callbacks, log_every_n_steps=None, **given)
    training = DataLoader(Samples(24), batch_size=4, shuffle=True) if training is None else training
    validation = DataLoader(Samples(40), batch_size=8) if validation is None else _made(validation)
    ended: BaseException | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(model, training, validation)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            ended = error
    return model, trainer, ended


def _made(given: Any) -> Any:
    """Call what makes an object of its own for every training."""
    return given() if callable(given) else given


PLAIN: dict[str, Any] = {}


def check_alike(
    monitor: KoopmanCreditMonitor | None = None,
    *more: KoopmanCreditMonitor,
    ours: Callable[[], AbstractContextManager[Any]] = nullcontext,
    case_of: str = "",
    **case: Any,
) -> KoopmanCreditMonitor:
    """Train without and with the monitor, ``ours`` entered, and compare how both ended.

    Cases of the same name share the training without.
    """
    monitor = KoopmanCreditMonitor() if monitor is None else monitor
    if case_of not in PLAIN:
        plain, plain_trainer, plain_end = fit([], **case)
        kept = copy.deepcopy(outcome(plain, plain_trainer)), plain_end
        PLAIN.update({case_of: kept} if case_of else {})
    expected, plain_end = PLAIN[case_of] if case_of else kept
    with ours():
        watched, trainer, end = fit([monitor, *more], **case)
    assert type(end) is type(plain_end), (end, plain_end)
    assert str(end) == str(plain_end)
    assert_alike(outcome(watched, trainer), expected)
    return monitor


def outcome(model: Net, trainer: L.Trainer) -> dict[str, Any]:
    """Everything that a training leaves behind, but what the monitor itself reports."""
    metrics = trainer.callback_metrics
    return {
        "weights": model.state_dict(),
        "gradients": [p.grad for p in model.parameters()],
        "needs": [p.requires_grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "progress": trainer.fit_loop.state_dict(),
        "state": (trainer.state.status, trainer.interrupted, trainer.should_stop),
        "metrics": {k: v for k, v in metrics.items() if not k.startswith("koopman/")},
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
    }


def assert_alike(left: Any, right: Any, where: str = "") -> None:
    """Compare to the last bit."""
    assert type(left) is type(right), where
    if isinstance(left, Tensor):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True, msg=where)
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_alike(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for place, pair in enumerate(zip(left, right, strict=True)):
            assert_alike(*pair, f"{where}/{place}")
    else:
        assert left == right, where


@pytest.mark.parametrize(
    "flags",
    [
        {"max_epochs": 0},
        {"num_sanity_val_steps": 0},
        {"num_sanity_val_steps": -1},
        {"fast_dev_run": True},
        {"overfit_batches": 2},
        {"limit_train_batches": 3},
        {"limit_train_batches": 0},
        {"limit_val_batches": 1},
        {"limit_val_batches": 0},
        {"limit_val_batches": 0.5, "val_check_interval": 2},
        {"barebones": True, "num_sanity_val_steps": None, "logger": None, "enable_checkpointing": None},
        {"accumulate_grad_batches": 4},
        {"max_steps": 3},
        {"check_val_every_n_epoch": 2},
        {"detect_anomaly": True},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"gradient_clip_val": 0.1},
        {"reload_dataloaders_every_n_epochs": 1},
        {"inference_mode": False},
    ],
    ids=str,
)
def test_trainer_flags(flags):
    monitor = check_alike(KoopmanCreditMonitor(on_error="raise"), **flags)
    assert bool(monitor.history) == (
        0 not in (flags.get("max_epochs"), flags.get("limit_train_batches"))
    )


RUNS = pytest.mark.parametrize("phase", ["sanity", "train", "validation"])


@RUNS
@pytest.mark.parametrize("fault", [Fault("step broke"), KeyboardInterrupt(), signal.SIGINT], ids=repr)
def test_exceptions_and_interrupts(phase, fault):
    check_alike(faults={phase: fault}, num_sanity_val_steps=2)


@RUNS
@pytest.mark.parametrize("fault", [Fault("layer broke"), KeyboardInterrupt()], ids=repr)
def test_a_forward_pass_that_breaks_between_two_components(phase, fault):
    check_alike(faults={phase: fault, "inside": True}, num_sanity_val_steps=2)


@RUNS
def test_termination(phase):
    check_alike(faults={phase: signal.SIGTERM}, num_sanity_val_steps=2)


@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_loader_that_fails(where):
    check_alike(**{where: DataLoader(Samples(24, fails_at=17), batch_size=4)})


class FailsLater(Samples):
    """Gives every sample a number of times, and fails then."""

    def __init__(self, count: int, times: int) -> None:
        super().__init__(count)
        self.left = count * times

    def __getitem__(self, index: int) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise Fault("asked once too often")
        return self.rows[index]


def test_a_loader_that_fails_when_asked_once_more_is_not_asked():
    monitor = check_alike(
        KoopmanCreditMonitor(every_n_epochs=2),
        validation=lambda: DataLoader(FailsLater(40, times=3), batch_size=8),
        max_epochs=3,
        num_sanity_val_steps=0,
    )
    assert [report.step for report in monitor.history] == [6, 12, 18]


@pytest.mark.parametrize("first", [0, 3])
def test_a_loss_that_is_not_a_number(first):
    monitor = check_alike(faults={"nan_from": first})
    assert len(monitor.history) == 0


def test_a_training_that_takes_no_step_measures_what_validation_shows():
    monitor = check_alike(faults={"manual": True, "skips": True})
    assert [report.step for report in monitor.history] == [0, 0]


def test_manual_optimisation_with_two_optimizers():
    assert len(check_alike(faults={"manual": True}).history) == 2


def test_a_compiled_model():
    monitor = check_alike(faults={"compiled": True})
    assert [report.components for report in monitor.history] == [("net.0", "net.3", "net.4")] * 2


def test_one_validation_sample():
    assert check_alike(validation=DataLoader(Samples(1))).report is None


def test_several_training_loaders_without_validation():
    loaders = {
        "a": DataLoader(Samples(24), batch_size=4, shuffle=True),
        "b": DataLoader(Samples(12), batch_size=4, shuffle=True),
    }
    monitor = check_alike(training=loaders, limit_val_batches=0)
    # A step calls the network on the batch of each loader, of which the shorter one begins anew.
    assert [report.n_samples for report in monitor.history] == [48, 48]


def test_several_loaders():
    loaders = [DataLoader(Samples(40), batch_size=8), DataLoader(Samples(16), batch_size=8)]
    monitor = check_alike(validation=loaders)
    assert monitor.report is not None
    assert monitor.report.n_samples == 40


@pytest.mark.parametrize("ours_first", [True, False])
def test_averaged_weights(ours_first):
    averaging = pytest.importorskip(
        "lightning.pytorch.callbacks.weight_averaging", reason="this Lightning has no WeightAveraging"
    )
    monitor = check_alike(
        others=lambda: [averaging.EMAWeightAveraging(decay=0.9)], ours_first=ours_first
    )
    assert [report.step for report in monitor.history] == [6, 12]


@pytest.mark.parametrize("ours_first", [True, False])
def test_weights_averaged_over_the_last_epochs(ours_first):
    monitor = check_alike(
        others=lambda: [StochasticWeightAveraging(0.01, swa_epoch_start=1)],
        ours_first=ours_first,
        max_epochs=3,
    )
    assert monitor.report is not None


def test_two_monitors():
    wide = KoopmanCreditMonitor(prefix="koopman/wide", options=Options(rank=1))
    monitors = [KoopmanCreditMonitor(), wide]
    check_alike(*monitors)
    assert [len(monitor.history) for monitor in monitors] == [2, 2]


def resume(path: Path, monitors: list[KoopmanCreditMonitor]) -> tuple[dict[str, Any], Any]:
    """Train a fresh model from a checkpoint on."""
    L.seed_everything(0, verbose=False)
    model = Net()
    trainer = quiet_trainer(path.parent, list(monitors))
    loaders = [DataLoader(Samples(count), batch_size=size) for count, size in ((24, 4), (40, 8))]
    ended = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(model, *loaders, ckpt_path=path)
        except Exception as error:
            ended = error
    return outcome(model, trainer), ended


def broken_off(folder: Path, monitors: list[KoopmanCreditMonitor]) -> Path:
    """Train until the third batch of the second epoch; give the checkpoint written there."""
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    stops = Stops("on_train_batch_start", Fault("power cut"), after=9)
    fit(monitors, others=lambda: [saving, stops], enable_checkpointing=None)
    return folder / "step=9.ckpt"


def test_resume_in_mid_epoch(tmp_path):
    first, second = KoopmanCreditMonitor(), KoopmanCreditMonitor()
    watched = resume(broken_off(tmp_path / "watched", [first]), [second])
    plain = resume(broken_off(tmp_path / "plain", []), [])
    assert_alike(watched, plain)
    assert watched[0]["progress"]["epoch_progress"]["current"]["completed"] == 3
    assert [report.step for report in first.history] == [6]
    # Of a training that broke off, nothing but numbers stays.
    assert first._recorded.calls is None
    assert first._watched is None
    assert [report.step for report in second.history] == [6, 12, 18]
    assert second.history[0].to_dict() == first.history[0].to_dict()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_resume_from_a_checkpoint_cut_short(share, tmp_path):
    path = broken_off(tmp_path, [KoopmanCreditMonitor()])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    monitor = KoopmanCreditMonitor()
    watched, plain = resume(path, [monitor]), resume(path, [])
    assert type(watched[1]) is type(plain[1])
    assert watched[1] is not None
    assert str(watched[1]) == str(plain[1])
    assert_alike(watched[0], plain[0])
    assert monitor.history == []


class Stops(L.Callback):
    """Presses Ctrl-C, or breaks, in one hook; ``after`` hooks of that name were called."""

    def __init__(self, hook: str, error: BaseException, after: int = 0) -> None:
        self.left = after

        def stop(*_: Any, **__: Any) -> None:
            self.left -= 1
            if self.left < 0:
                raise error

        setattr(self, hook, stop)


PHASES = [
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "teardown",
]


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("hook", PHASES)
def test_ctrl_c_in_every_phase(hook, ours_first):
    check_alike(case_of=hook, others=lambda: [Stops(hook, KeyboardInterrupt())], ours_first=ours_first)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Fault("late")], ids=repr)
def test_what_was_measured_before_the_end_is_kept(error, tmp_path):
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
