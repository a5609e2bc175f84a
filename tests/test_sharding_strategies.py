"""The Trainer's strategies that spread weights over processes give the report of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_distributed import BASE, check_against_one_process, fit, read

pytestmark = pytest.mark.slow

SHARDING = BASE | {"shards": "sampler", "devices": 2, "processes": 2, "frozen": True}


def cases(*strategies: str, **options: Any) -> list[dict[str, Any]]:
    return [SHARDING | {"strategy": strategy} | options for strategy in strategies]


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_fully_sharded_weights_give_the_report_of_one_process(
    namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_NAMESPACE", namespace)
    configs = cases("fsdp", "fsdp linear", "fsdp block", "2x1")
    configs += cases("2x1", "fsdp block", max_dim=8, max_samples=50)
    check_against_one_process(configs, tmp_path)


def test_tensor_parallel_weights_give_the_report_of_one_process(tmp_path: Path) -> None:
    # Both processes run on the same samples, which count once.
    configs = cases("1x2 whole", "1x2 dtensor")
    configs += cases("1x2 dtensor", max_dim=8, max_samples=51)
    check_against_one_process(configs, tmp_path)


def test_both_kinds_at_once_give_the_report_of_one_process(tmp_path: Path) -> None:
    four = {"devices": 4, "processes": 4}
    check_against_one_process(cases("2x2 dtensor", max_dim=8, max_samples=51, **four), tmp_path)


def test_training_is_bit_identical_with_the_monitor_on(tmp_path: Path) -> None:
    configs = cases("fsdp linear", "2x1", "1x2 dtensor", "1x2 parts", frozen=False, max_epochs=2)
    configs += [config | {"unwatched": True} for config in configs]
    ranks = [read(folder) for folder in fit(configs, tmp_path)]
    for watched, unwatched in zip(ranks[:4], ranks[4:], strict=True):
        assert [r["weights"] for r in watched] == [r["weights"] for r in unwatched]
        assert all(r["history"] == [] for r in unwatched)
    for told in (rank["warned"] for rank in ranks[3]):
        assert any("gave 12 of its 24 units" in w and "use_local_output=False" in w for w in told)
    assert [len(folder[0]["history"]) for folder in ranks[:4]] == [2, 2, 2, 0]


def test_the_newest_weights_stay_unmeasured_where_that_takes_an_extra_pass(tmp_path: Path) -> None:
    [folder] = fit(cases("2x1", every_n_epochs=2, max_epochs=3), tmp_path)
    for rank in read(folder):
        assert len(rank["history"]) == 1
        assert any("ModelParallelStrategy shards the weights" in w for w in rank["warned"])


def test_an_error_of_ours_in_one_process_keeps_no_other_waiting(tmp_path: Path) -> None:
    faults = [(1, "__init__"), (0, "start_pass"), (1, "_count"), (0, "_rows"), (1, "take")]
    configs = [config for f in faults for config in cases("1x2 dtensor", break_numerics=f, max_dim=8)]
    for (broken, place), folder in zip(faults, fit(configs, tmp_path), strict=True):
        ranks = read(folder)
        assert [(rank["history"], rank["hooks"]) for rank in ranks] == [([], 0)] * 2, place
        assert any("broken numerics" in warning for warning in ranks[broken]["warned"])
        assert any("no Koopman credit this time" in w for w in ranks[1 - broken]["warned"])
