"""A disk that is really full, or really read-only, ends nothing that it does not end without us."""

import functools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lit import events
from small import save
from test_faults import assert_alike, fit, outcome

from lightning_koopman import KoopmanCreditMonitor
from lightning_koopman.callback import loggers as writers
from lightning_koopman.cli.main import main
from lightning_koopman.report.files import read_reports, write_reports

KILOBYTES = 48


@pytest.fixture
def tiny_disks(tmp_path):
    """Two file systems that hold no more than 48 KiB each."""
    folders = [tmp_path / "disk", tmp_path / "other"]
    size = f"size={KILOBYTES}k"
    mounted = []
    try:
        for folder in folders:
            folder.mkdir()
            made = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True
            )
            if made.returncode:
                pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
            mounted.append(folder)
        yield folders
    finally:
        for folder in mounted:
            subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def tiny_disk(tiny_disks):
    return tiny_disks[0]


def fill(disk: Path) -> None:
    descriptor = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
    while os.statvfs(disk).f_bavail:
        os.write(descriptor, bytes(4096))
    with pytest.raises(OSError, match="No space left"):
        os.write(descriptor, bytes(4096))
    os.close(descriptor)


def read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OSError, match="Read-only"):
        (disk / "file").write_text("x")


class Own(L.Callback):
    """What any training logs of itself; spoils the disk when an epoch starts."""

    def __init__(self, spoil: Callable[[], None], epoch: int) -> None:
        self.spoil, self.epoch = spoil, epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.spoil()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({"own": 1.0}, step=trainer.global_step)
            logger.save()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("spoil", [fill, read_only])
def test_a_log_folder_that_fails(kind, spoil, epoch, tiny_disks):
    """Training ends as it does without us, and what was measured until then is kept."""
    ends, outcomes, monitors = [], [], [[], [KoopmanCreditMonitor()]]
    for disk, given in zip(tiny_disks, monitors, strict=True):
        spoiler = Own(functools.partial(spoil, disk), epoch)
        model, trainer, end = fit(given, logger=kind(disk), others=lambda own=spoiler: [own])
        ends.append(end)
        outcomes.append(outcome(model, trainer))
    assert type(ends[1]) is type(ends[0]), ends
    assert getattr(ends[1], "errno", None) == getattr(ends[0], "errno", None)
    assert_alike(outcomes[1], outcomes[0])
    assert len(monitors[1][0].history) >= epoch
    if kind is CSVLogger and epoch == 1:
        rows = next(tiny_disks[1].rglob("metrics.csv")).read_text()
        assert "koopman/total" in rows, "the first measurement is on the disk"


@pytest.fixture
def project(user_module):
    return save(user_module("disk_user") / "1.ckpt").parent


COMMAND = ["evaluate", "--model=disk_user:network", "--data=disk_user:batches", "--ckpt=1.ckpt"]


@pytest.mark.parametrize(
    ("spoil", "words"), [(fill, "No space left"), (read_only, "no file can be made in")]
)
def test_reports_that_cannot_be_written_leave_the_old_file_and_an_exit_code(
    spoil, words, project, tiny_disk, report, capsys
):
    out = tiny_disk / "r.json"
    write_reports([report], out)
    before = out.read_bytes()
    spoil(tiny_disk)
    assert main([*COMMAND, f"--out={out}", "--fresh=true"]) == 1
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert out.read_bytes() == before
    assert not list(tiny_disk.glob("*.tmp"))


@pytest.mark.slow
def test_a_file_that_may_grow_no_further(project):
    """EFBIG needs no right to mount: the operating system cuts the write short."""
    before = json.dumps([])
    (project / "r.json").write_text(before)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    done = subprocess.run(
        [sys.executable, "-B", "-m", "lightning_koopman.cli.main", *COMMAND, "--out=r.json"],
        cwd=project,
        preexec_fn=limited,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "MPLCONFIGDIR": str(project)},
    )
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert (project / "r.json").read_text() == before
    assert read_reports("r.json") == []
    assert not list(project.glob("*.tmp"))


def test_figures_are_left_out_where_they_could_fill_the_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    said: list[str] = []
    monkeypatch.setattr(writers, "rank_zero_warn", lambda message, **_: said.append(message))
    fit([KoopmanCreditMonitor()], logger=TensorBoardLogger(tmp_path))
    assert [m for m in said if "less than 64 MiB are free where a logger writes" in m] == said[:1]
    fit([KoopmanCreditMonitor(figures=False)], logger=TensorBoardLogger(tmp_path / "unasked"))
    assert [m for m in said if "less than" in m] == said[:1], "who asks for no figures needs no room"
    tags = events(next((tmp_path / "lightning_logs").rglob("events.*")).parent).Tags()
    assert tags["images"] == []
    assert "koopman/total" in tags["scalars"]
