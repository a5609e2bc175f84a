"""Worker processes: equal results in equal order; what fails, dies or is interrupted."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NET_AND_DATA
from torch import nn

from lightning_koopman import EvaluationError, evaluate_checkpoints
from lightning_koopman import workers as module
from lightning_koopman.report_files import read_reports
from lightning_koopman.workers import WorkerError, run_in_processes

SLOW_DATA = """
import time

class Slow:
    def __iter__(self):
        for batch in data():
            time.sleep(0.3)
            yield batch

def slow_data():
    return Slow()
"""


def nothing() -> None:
    return None


def square(context: None, item: int) -> int:
    if item < 0:
        raise ValueError(f"item is {item}")
    if item == 13:
        os._exit(1)
    if item == 99:
        raise Untransportable(1, 2)
    time.sleep(0.2 if item == 1 else 0)
    return item * item


class Untransportable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("cannot travel")


def checkpoints(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for step in range(count):
        torch.manual_seed(step)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        paths.append(folder / f"{step}.ckpt")
        torch.save({"state_dict": model.state_dict(), "global_step": step}, paths[-1])
    return paths


def test_results_come_in_order_and_failures_as_they_are() -> None:
    done: list[Any] = []
    with pytest.raises(ValueError, match="item is -1"):
        done.extend(run_in_processes(nothing, square, [1, 2, 3, -1, 4], 2))
    assert done == [(1, 1), (2, 4), (3, 9)]
    with pytest.raises(RuntimeError, match="Untransportable: cannot travel"):
        list(run_in_processes(nothing, square, [99], 1))


def test_a_worker_that_dies_is_named_and_the_rest_kept() -> None:
    done: list[Any] = []
    with pytest.raises(WorkerError, match=r"before 2 of 3 were done .*less than workers=1"):
        done.extend(run_in_processes(nothing, square, [2, 13, 3], 1))
    assert done == [(2, 4)]


def test_ctrl_c_ends_the_workers() -> None:
    results: list[Any] = []
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        results.extend(run_in_processes(nothing, time_out, [600, 600, 600], 2))
    assert time.monotonic() - start < 60


def time_out(context: None, item: int) -> None:
    time.sleep(item)


def test_workers_measure_what_one_process_does(tmp_path: Path) -> None:
    paths = checkpoints(tmp_path, 4)
    (tmp_path / "bad.ckpt").write_bytes(b"junk")
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    torch.save({"state_dict": nn.Linear(1, 1).state_dict(), "global_step": 2}, tmp_path / "odd.ckpt")
    batches = list(torch.randn(60, 4).split(20))
    found = []
    for workers in (1, 2):
        with pytest.raises(EvaluationError, match=r"(?s)bad\.ckpt.*odd\.ckpt does not fit") as caught:
            evaluate_checkpoints(
                model, [*paths, tmp_path], batches, workers=workers, logdir=tmp_path / f"tb{workers}"
            )
        found.append(caught.value.reports)
    assert [report.step for report in found[1]] == [0, 1, 2, 3]
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one.credit, two.credit, rtol=1e-9, atol=1e-12)
        assert one.source == two.source
        assert one.operators.keys() == two.operators.keys()


def test_too_few_workers_and_what_cannot_be_sent(tmp_path: Path) -> None:
    paths = checkpoints(tmp_path, 2)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    batches = list(torch.randn(60, 4).split(20))
    with pytest.raises(ValueError, match="workers is 0; at least one process"):
        evaluate_checkpoints(model, paths, batches, workers=0)
    model.note = lambda: None
    with pytest.raises(ValueError, match=r"cannot be sent to other processes .*build function"):
        evaluate_checkpoints(model, paths, batches, workers=2)


@pytest.mark.skipif(os.name != "posix", reason="signals to a process group are of POSIX")
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_at_the_command_keeps_what_was_measured(tmp_path: Path, workers: int) -> None:
    (tmp_path / "slow_code.py").write_text(NET_AND_DATA + SLOW_DATA)
    checkpoints(tmp_path / "ckpt", 40)
    command = [sys.executable, "-m", "lightning_koopman.cli", "evaluate", "--model=slow_code:net"]
    command += ["--data=slow_code:slow_data", "--ckpt=ckpt", "--out=r.json", f"--workers={workers}"]
    out = tmp_path / "r.json"
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as run:
        until = time.monotonic() + 200
        while not out.exists() and run.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        # As a terminal does it: to the command and its workers alike.
        os.killpg(run.pid, signal.SIGINT)
        printed, told = (text.decode() for text in run.communicate(timeout=100))
    assert run.returncode == 130, told
    kept = read_reports(out)
    assert 1 <= len(kept) < 40
    assert f"at step {len(kept) - 1}" in printed
    assert f"interrupted after {len(kept)} of 40 checkpoints" in " ".join(told.split())
    assert "Traceback" not in told


def test_a_worker_keeps_its_context_and_gives_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker process does, in this one."""
    threads, made = torch.get_num_threads(), []

    def setup() -> str:
        made.append(1)
        return "context"

    monkeypatch.setattr(module, "_held", {})
    monkeypatch.setattr(module.pickle, "loads", lambda given: (setup, lambda c, i: f"{c} {i}"))
    module._start(b"job", 1)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    found = [module._run(item) for item in (1, 2)]
    monkeypatch.undo()
    torch.set_num_threads(threads)
    assert [pickle.loads(part) for part in found] == ["context 1", "context 2"]
    assert made == [1]


@pytest.mark.parametrize(("item", "kind"), [(-1, ValueError), (99, RuntimeError)])
def test_errors_of_a_worker_travel_or_are_told_in_words(
    item: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_held", {"context": None, "function": square})
    with pytest.raises(kind, match=r"item is -1|Untransportable: cannot travel"):
        module._run(item)
