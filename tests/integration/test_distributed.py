"""Reports of several processes equal the report of one."""

import json
import os
import re
import socket
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import warm
from distributed_fit import Monitor, run

from lightning_koopman import CreditReport

SCRIPT = Path(__file__).with_name("distributed_fit.py")
BASE = {"n_samples": 101, "batch_size": 7, "max_dim": 256, "shards": "sampler"}


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def fit(configs: list[dict[str, Any]], folder: Path, timeout: float = 240) -> list[Path]:
    done = warm.run([SCRIPT, json.dumps(configs), folder], env=environment(), timeout=timeout)
    # Lightning looks for a free port some time before it is used; another test may take it in between.
    if done.returncode and ("TCPStore::TCPStore(" in done.stderr or "EADDRINUSE" in done.stderr):
        done = warm.run([SCRIPT, json.dumps(configs), folder], env=environment(), timeout=timeout)
    assert done.returncode == 0, done.stderr[-20_000:]
    return places(configs, folder)


def places(configs: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Give the folder of each training."""
    return [folder / str(place) for place in range(len(configs))]


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def assert_same(given: dict[str, Any], expected: dict[str, Any]) -> None:
    left, right = CreditReport.from_dict(given), CreditReport.from_dict(expected)
    assert left.n_samples == right.n_samples
    assert left.components == right.components
    assert left.directions == right.directions
    assert left.delay == right.delay
    for name in ("credit", "gain", "nonlinearity", "sensitivity", "r2", "chain_r2", "rank"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(left.stderr[name], right.stderr[name], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(left.variance_kept, right.variance_kept, rtol=1e-9)


def ranks(count: int) -> list[dict[str, str]]:
    """Tell each process its rank, as torchrun or a cluster would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    return [place | {"LOCAL_RANK": str(rank)} for rank in range(count)]


def fit_side_by_side(configs: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Train as :func:`fit` does, where Lightning would start processes that import everything anew."""
    command = [SCRIPT, json.dumps(configs), folder]
    with ExitStack() as stack:
        environments = [environment() | rank for rank in ranks(configs[0]["devices"])]
        started = [stack.enter_context(warm.Program(command, env=each)) for each in environments]
        for program in started:
            done = program.wait(timeout=240)
            assert done.returncode == 0, done.stderr[-20_000:]
    return places(configs, folder)


@contextmanager
def second_process(configs: list[dict[str, Any]], folder: Path) -> Generator[None, None, None]:
    """Make this process the first of two."""
    here, there = ranks(2)
    with (
        pytest.MonkeyPatch.context() as patch,
        warm.Program([SCRIPT, json.dumps(configs), folder], env=environment() | there) as other,
    ):
        for name, value in here.items():
            patch.setenv(name, value)
        try:
            yield
            done = other.wait(timeout=60)
            assert done.returncode == 0, done.stderr[-3000:]
        except BaseException:
            print(other.printed("err")[-3000:])
            raise
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def fit_here(configs: list[dict[str, Any]], folder: Path) -> list[L.Trainer]:
    """Train in this process, and in a second one where the strategy asks for it."""
    folders = places(configs, folder)
    for path in folders:
        path.mkdir(parents=True)
    shared = configs[0]["devices"] > 1
    with second_process(configs, folder) if shared else nullcontext():
        trainers = [run(c, str(path)) for c, path in zip(configs, folders, strict=True)]
        for trainer, path in zip(trainers, folders, strict=True):
            parent = {name: float(value) for name, value in trainer.callback_metrics.items()}
            (path / "parent.json").write_text(json.dumps(parent))
    return trainers


def check_against_one_process(
    configs: list[dict[str, Any]], tmp_path: Path, fit: Callable[..., list[Path]] = fit
) -> None:
    single = alone(configs)
    distinct = [config for i, config in enumerate(single) if config not in single[:i]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_here(distinct, tmp_path / "one")
    folders = places(distinct, tmp_path / "one")
    ones = [folders[distinct.index(config)] for config in single]
    check_alike(configs, ones, fit(configs, tmp_path / "many"))


def alone(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for config in configs:
        # Processes of a tensor-parallel group run on the same samples.
        mesh = re.match(r"(\d)x\d ?", config["strategy"])
        parts = int(mesh[1]) if mesh else config["processes"]
        # Where processes may skip validation, training steps are measured.
        steps = {"limit_val_batches": 0} if config["shards"] == "skipping" else {}
        found.append(config | {"devices": 1, "strategy": "auto", "parts": parts} | steps)
    return found


def check_alike(configs: list[dict[str, Any]], ones: list[Path], manys: list[Path]) -> None:
    for config, one, many in zip(configs, ones, manys, strict=True):
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
        keys = {key for key in ranks[0]["metrics"] if not key.endswith("overhead")}
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
        # Training samples are shuffled over processes, so all 32 must count.
        many | {"shards": "skipping", "max_dim": 16},
        many | {"limit_val_batches": 0, "max_dim": 16},
        many | {"every_n_epochs": 2, "max_epochs": 3},
    ]


def good() -> list[dict[str, Any]]:
    chosen = [cases("ddp", 2)[i] for i in (3, 5, 8, 9)]
    # On a busy machine, effects rest on fewer samples where time is short.
    averaged = cases("ddp", 2)[6] | {"averages": True, "max_epochs": 2, "max_overhead": 1e6}
    added = cases("ddp", 2)[0] | {"residual": 1.0, "shards": "single"}
    # Three samples do not tell what branches are weighed with.
    weighed = added | {"residual": 0.5, "shards": "few"}
    return [added, weighed, *chosen, averaged, chosen[0] | {"halves": True}]


# Process, method that fails there, and what the other process is told of it.
FAULTS = [
    (0, "end_pass", "process 0: ArithmeticError"),
    (0, "share", "process 0: ArithmeticError"),
    (1, "push", "process 1: ArithmeticError"),
    (1, "flush", "1 of 2 processes could not add up their samples"),
    (0, "flush", "1 of 2 processes could not add up their samples"),
    (0, "held_rows", "process 0: ArithmeticError"),
    (0, "_fit_basis", "process 0: ArithmeticError"),
    (0, "replay", "process 0: ArithmeticError"),
    (1, "recentred", "1 of 2 processes could not add up their samples"),
    (1, "report", None),
]


@pytest.fixture(scope="module")
def two(once):
    """What was left by trainings in two processes, of which the first is one of pytest's."""
    many = BASE | {"strategy": "ddp", "devices": 2, "processes": 2}
    faults = [many | {"max_dim": 8, "break_numerics": fault[:2]} for fault in FAULTS]
    # Without a validation loop, the pass is ours.
    faults[7] |= {"limit_val_batches": 0}
    # Where no basis is needed, each process has a centre of its own.
    faults[8] |= {"max_dim": BASE["max_dim"]}
    alike = many | {"every_n_epochs": None, "max_epochs": 6, "slow": [1, 0.2]}
    empty = [alike, many | {"shards": "none"}, many | {"shards": "skipping", "validate": True}]
    configs = [*good(), *faults, *empty]

    def fill(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit_here(alone(good()), folder / "one")
            trainers = fit_here(configs, folder / "many")
        told = next(c for c in trainers[-1].callbacks if isinstance(c, Monitor)).told
        (folder / "told.json").write_text(json.dumps(told))

    folder = once("two", fill)
    return {
        "ones": places(good(), folder / "one"),
        "folders": places(configs, folder / "many"),
        "told": json.loads((folder / "told.json").read_text()),
    }


def test_two_processes_give_the_report_of_one(two):
    check_alike(good(), two["ones"], two["folders"][: len(good())])


def test_a_measurement_takes_one_exchange_and_one_sum_however_many_batches(two):
    for config, folder in zip(good(), two["folders"], strict=False):
        wide = ["all_gather_object", "broadcast_object_list"] if config["max_dim"] < 256 else []
        for rank in read(folder):
            once = ["all_gather_object", *wide, "all_reduce"]
            assert rank["history"]
            # Before the last report of a validation comes whether its weights are there yet, and with it
            # what targets each process has, and the effects it measured, or these when training ends,
            # where averaged weights are in place again; then whether weights were changed since, and
            # the same once more.
            told, effects = ["all_gather_object"], ["all_gather_object"] * 2
            validated = config["shards"] != "skipping" and config.get("limit_val_batches") != 0
            earlier = once * (len(rank["history"]) - 1)
            expected = [*earlier, *told * validated, *once, *effects, *told]
            if config.get("averages"):
                expected = [*earlier, *told, *once, *told, *effects]
            if config.get("halves"):
                expected = [*told, *once, *effects, *told, *once, *effects]
            assert rank["collectives"] == expected


def test_weights_that_were_changed_behind_the_last_validation_are_measured_in_all(two):
    for rank in read(two["folders"][len(good()) - 1]):
        validated, final = map(CreditReport.from_dict, rank["history"])
        assert validated.step == final.step
        assert abs(validated.credit - final.credit).max() > 1e-2
        assert any("were changed after the last measurement" in note for note in final.notes)


def test_averaged_weights_have_effects_in_all(two):
    for one, rank in zip(read(two["ones"][-2]) * 2, read(two["folders"][len(good()) - 2]), strict=True):
        alone, shared = (CreditReport.from_dict(each["history"][-1]) for each in (one, rank))
        assert shared.effects is not None, shared.notes
        assert shared.effects.values["skip"] == pytest.approx(alone.effects.values["skip"])


def test_processes_measure_effects_in_the_same_unit(two):
    for config, folder in zip(good(), two["folders"], strict=False):
        found = [rank["history"][-1]["effects"] for rank in read(folder)]
        labelled = config["shards"] == "sampler" and config.get("limit_val_batches") != 0
        assert {each["scale"] for each in found} == {"kl" if labelled else "relative"}
        assert found[0]["values"] == found[1]["values"]
        assert found[0]["metric_before"] == found[1]["metric_before"]


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[f"{r}-{place}" for r, place, _ in FAULTS])
def test_an_error_of_ours_in_one_process_ends_the_measurement_in_all(number, two):
    rank, _, words = FAULTS[number]
    ranks = read(two["folders"][len(good()) + number])
    assert len(ranks) == 2
    assert all(found["hooks"] == 0 for found in ranks)
    assert any("broken numerics" in warning for warning in ranks[rank]["warned"])
    if words is None:
        # The samples were added up before: the other has its report, and nobody measures alone.
        assert [len(found["history"]) for found in ranks] == [1, 0]
        return
    assert all(found["history"] == [] for found in ranks)
    told = [w for w in ranks[1 - rank]["warned"] if "Koopman credit skipped" in w]
    assert any(words in warning for warning in told), told


def test_no_batch_in_any_process_and_a_validation_that_one_of_them_skips(two):
    for rank in read(two["folders"][-2]):
        assert rank["history"] == []
        assert any("the batches were empty in every process" in told for told in rank["warned"])
    assert any("a process without a batch skips this validation" in told for told in two["told"])


def test_processes_of_which_one_is_slow_skip_the_same_epochs(two):
    first, second = read(two["folders"][-3])
    steps = [[report["step"] for report in rank["history"]] for rank in (first, second)]
    assert steps[0] == steps[1]
    assert 2 <= len(steps[0]) < 6
    assert steps[0][-1] == 6 * steps[0][0]
    # They agree at the end of each measurement, which is one exchange more.
    assert first["collectives"] == second["collectives"]
    assert first["collectives"].count("all_reduce") == 2 * len(steps[0])


@pytest.mark.slow
def test_forked_processes_give_the_report_of_one(tmp_path):
    # Three, whose parts differ in size and of which two may be left to go on.
    configs = [config for i, config in enumerate(cases("ddp_fork", 3)) if i in (1, 3, 4, 7, 8, 10)]
    check_against_one_process([*configs, configs[1] | {"delay": 2}], tmp_path)


@pytest.mark.slow
def test_spawned_processes_give_the_report_of_one(tmp_path):
    check_against_one_process([cases("ddp_spawn", 2)[3]], tmp_path)


@pytest.mark.slow
def test_no_process_waits_for_one_that_died(tmp_path):
    """The user's own error in one process ends the run as it does without the monitor."""
    config = BASE | {"strategy": "ddp_fork", "devices": 2, "processes": 2}
    with pytest.raises(AssertionError, match="broken forward"):
        fit([config | {"break_forward": 1}], tmp_path, timeout=120)


@pytest.mark.slow
def test_an_error_that_is_asked_for_is_raised_in_every_process(tmp_path):
    config = BASE | {"strategy": "ddp_fork", "devices": 2, "processes": 2, "on_error": "raise"}
    with pytest.raises(AssertionError, match="broken numerics"):
        fit([config | {"break_numerics": [1, "end_pass"]}], tmp_path, timeout=120)
