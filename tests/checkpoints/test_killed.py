"""A process that is ended from outside leaves whole files, and the next one goes on from there."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import small
import warm

from lightning_koopman.report.files import read_reports

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are of POSIX")
SLOW_DATA = """
import time

class Slow:
    def __iter__(self):
        for batch in batches():
            time.sleep(0.3)
            yield batch

def slow_data():
    return Slow()
"""
WRITER = """
import torch
from torch import nn
from lightning_koopman import credit_report
from lightning_koopman.report.files import write_reports

report = credit_report(nn.Linear(3, 2), [torch.randn(60, 3)])
while True:
    write_reports([report], "r.json")
    write_reports([report] * 300, "r.json")
"""


COMMAND = [sys.executable, "-m", "lightning_koopman.cli.main", "evaluate", "--model=slow_code:network"]
COMMAND += ["--data=slow_code:slow_data", "--ckpt=ckpt", "--out=r.json"]


def checkpoints(folder: Path, count: int) -> None:
    (folder / "slow_code.py").write_text(Path(small.__file__).read_text() + SLOW_DATA)
    for step in range(count):
        small.save(folder / "ckpt" / f"{step}.ckpt", step, 1 + step)


def appears(path: Path, ended: Callable[[], int | None]) -> None:
    until = time.monotonic() + 200
    while not path.exists() and ended() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert path.exists()


@pytest.mark.slow
def test_ctrl_c_at_the_command_keeps_what_was_measured(tmp_path):
    checkpoints(tmp_path, 40)
    with subprocess.Popen(
        COMMAND, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as run:
        appears(tmp_path / "r.json", run.poll)
        # As a terminal does it: to the whole group.
        os.killpg(run.pid, signal.SIGINT)
        printed, told = (text.decode() for text in run.communicate(timeout=100))
    assert run.returncode == 130, told
    kept = read_reports(tmp_path / "r.json")
    assert 1 <= len(kept) < 40
    assert f"at step {len(kept) - 1}" in printed
    assert f"interrupted after {len(kept)} of 40 checkpoints" in " ".join(told.split())
    assert "Traceback" not in told


@pytest.mark.slow
def test_an_evaluation_that_is_terminated_goes_on_where_it_was(tmp_path):
    checkpoints(tmp_path, 4)
    command = ["lightning-koopman", *COMMAND[3:]]
    with warm.Program(command, tmp_path) as run:
        appears(tmp_path / "r.json", lambda: run.process.exitcode)
        run.process.terminate()
        assert run.wait().returncode == -signal.SIGTERM
    kept = [report.to_dict() for report in read_reports(tmp_path / "r.json")]
    assert 1 <= len(kept) < 4
    done = warm.run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{len(kept)} of 4 reports taken over from r.json" in done.stderr
    found = [report.to_dict() for report in read_reports(tmp_path / "r.json")]
    assert len(found) == 4
    assert found[: len(kept)] == kept


@pytest.mark.slow
def test_a_file_is_whole_at_every_moment_until_its_writer_is_killed(tmp_path):
    path = tmp_path / "r.json"
    with subprocess.Popen([sys.executable, "-c", WRITER], cwd=tmp_path) as run:
        appears(path, run.poll)
        until, seen = time.monotonic() + 2, set()
        while time.monotonic() < until:
            seen.add(len(read_reports(path)))
        run.kill()
    assert seen == {1, 300}
    assert len(read_reports(path)) in seen
