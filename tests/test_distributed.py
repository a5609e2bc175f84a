"""Reports of several processes equal the report of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_koopman import CreditReport

SCRIPT = Path(__file__).with_name("distributed_fit.py")
BASE = {"n_samples": 101, "batch_size": 7, "max_dim": 256, "shards": "sampler"}


def fit(configs: list[dict[str, Any]], folder: Path, timeout: float = 240) -> list[Path]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(configs), str(folder)],
        env=environment,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [folder / str(place) for place in range(len(configs))]


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def assert_same(given: dict[str, Any], expected: dict[str, Any]) -> None:
    left, right = CreditReport.from_dict(given), CreditReport.from_dict(expected)
    assert left.n_samples == right.n_samples
    assert left.components == right.components
    assert left.directions == right.directions
    assert (left.delay, left.excitation) == (right.delay, right.excitation)
    for name in ("credit", "gain", "nonlinearity", "sensitivity", "r2", "chain_r2", "rank"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(left.stderr[name], right.stderr[name], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(left.variance_kept, right.variance_kept, rtol=1e-9)


def check_against_one_process(configs: list[dict[str, Any]], tmp_path: Path) -> None:
    singles = [c | {"devices": 1, "strategy": "auto"} for c in configs]
    alone = fit(singles, tmp_path / "one")
    together = fit(configs, tmp_path / "many")
    for config, one, many in zip(configs, alone, together, strict=True):
        ranks = read(many)
        expected = read(one)[0]["history"]
        assert len(ranks) == config["devices"]
        for rank in ranks:
            assert rank["hooks"] == 0
            assert len(rank["history"]) == len(expected), rank["warned"]
            for left, right in zip(rank["history"], expected, strict=True):
                assert_same(left, right)
        for rank in ranks[1:]:
            # LAPACK rounds by where memory lies, so processes may differ in the last bit.
            for left, right in zip(rank["history"], ranks[0]["history"], strict=True):
                assert_same(left, right)
        parent = json.loads((many / "parent.json").read_text())
        keys = {key for key in ranks[0]["metrics"] if not key.endswith("overhead_s")}
        assert keys
        assert {key: parent[key] for key in keys} == {key: ranks[0]["metrics"][key] for key in keys}


def cases(strategy: str, processes: int) -> list[dict[str, Any]]:
    many = BASE | {"strategy": strategy, "devices": processes, "processes": processes}
    return [
        many,
        many | {"n_samples": 100},
        many | {"max_dim": 8},
        many | {"max_dim": 8, "max_samples": 50},
        many | {"shards": "unequal"},
        many | {"shards": "unequal", "max_dim": 8},
        many | {"shards": "empty"},
        many | {"shards": "empty", "max_dim": 8},
        many | {"shards": "skipping", "max_dim": 8},
        # Lightning shuffles training samples over processes, so all 32 must count.
        many | {"limit_val_batches": 0, "max_dim": 16},
        many | {"every_n_epochs": 2, "max_epochs": 3},
    ]


def test_two_forked_processes_give_the_report_of_one(tmp_path: Path) -> None:
    configs = cases("ddp_fork", 2)
    auto = configs[4] | {"delay": "auto"}
    # The noise of a batch depends on its samples, and here one process has the same batches as two.
    excited = configs[7] | {"excitation": 0.3}
    check_against_one_process([configs[0], configs[5], configs[7], auto, excited], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_forked_processes_give_the_report_of_one(processes: int, tmp_path: Path) -> None:
    check_against_one_process(cases("ddp_fork", processes), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_launched_processes_give_the_report_of_one(processes: int, tmp_path: Path) -> None:
    check_against_one_process([cases("ddp", processes)[3]], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_spawned_processes_give_the_report_of_one(processes: int, tmp_path: Path) -> None:
    check_against_one_process([cases("ddp_spawn", processes)[3]], tmp_path)


def test_an_error_of_ours_in_one_process_ends_the_measurement_in_all(tmp_path: Path) -> None:
    many = BASE | {"strategy": "ddp_fork", "devices": 2, "processes": 2}
    faults: list[tuple[int, str]] = [(1, "end_pass"), (0, "share"), (1, "take"), (1, "report")]
    configs = [many | {"break_numerics": fault, "max_dim": 8} for fault in faults]
    for (broken, place), folder in zip(faults, fit(configs, tmp_path), strict=True):
        ranks = read(folder)
        assert len(ranks) == 2
        assert all(rank["hooks"] == 0 for rank in ranks)
        assert any("broken numerics" in warning for warning in ranks[broken]["warned"])
        if place != "report":
            assert all(rank["history"] == [] for rank in ranks)
            assert any("no Koopman credit this time" in w for w in ranks[1 - broken]["warned"])


@pytest.mark.slow
@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_no_process_waits_for_one_that_died(on_error: str, tmp_path: Path) -> None:
    """The user's own error in one process ends the run as it does without the monitor."""
    config = BASE | {"strategy": "ddp_fork", "devices": 2, "processes": 2, "on_error": on_error}
    with pytest.raises(AssertionError, match="broken forward"):
        fit([config | {"break_forward": 1}], tmp_path, timeout=120)


@pytest.mark.slow
def test_an_error_that_is_asked_for_is_raised_in_every_process(tmp_path: Path) -> None:
    config = BASE | {"strategy": "ddp_fork", "devices": 2, "processes": 2, "on_error": "raise"}
    with pytest.raises(AssertionError, match="broken numerics"):
        fit([config | {"break_numerics": [1, "end_pass"]}], tmp_path, timeout=120)
