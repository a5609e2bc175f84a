"""The Trainer's strategies that spread weights over processes give the report of one process."""

from typing import Any

import pytest
from test_distributed import BASE, check_against_one_process, fit_side_by_side, read

pytestmark = pytest.mark.slow

SHARDING = BASE | {"shards": "sampler", "devices": 2, "processes": 2, "frozen": True}


def cases(*strategies: str, **options: Any) -> list[dict[str, Any]]:
    return [SHARDING | {"strategy": strategy} | options for strategy in strategies]


def test_spread_weights_give_the_report_of_one_process(tmp_path):
    # Tensor-parallel processes run on the same samples, which count once.
    configs = cases("fsdp", "fsdp linear", "1x2 replicated")
    configs += cases("2x1", "fsdp block", "1x2 whole", max_dim=8, max_samples=51)
    check_against_one_process(configs, tmp_path)


def test_both_kinds_at_once_give_the_report_of_one_process(tmp_path):
    four = {"devices": 4, "processes": 4}
    configs = cases("2x2 whole", max_dim=8, max_samples=51, **four)
    check_against_one_process(configs, tmp_path, fit_side_by_side)


FAULTS = [(1, "__init__"), (0, "start_pass"), (1, "_record"), (0, "_rows"), (1, "push")]


@pytest.fixture(scope="module")
def runs(once):
    """Five runs, the same without the monitor, one that never validates, one for each fault."""
    configs = cases(
        "fsdp linear", "2x1", "1x2 whole", "1x2 parts", "1x2 dtensor", frozen=False, max_epochs=2
    )
    configs += [config | {"unwatched": True} for config in configs]
    configs += cases("2x1", limit_val_batches=0, max_epochs=2)
    configs += [c for f in FAULTS for c in cases("1x2 whole", break_numerics=f, max_dim=8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_NAMESPACE", "pytorch_lightning")
        folder = once("strategies", lambda folder: fit_side_by_side(configs, folder))
    return [read(folder / str(place)) for place in range(len(configs))]


def test_training_is_bit_identical_with_the_monitor_on(runs):
    for watched, unwatched in zip(runs[:5], runs[5:10], strict=True):
        assert [r["weights"] for r in watched] == [r["weights"] for r in unwatched]
        assert all(r["history"] == [] for r in unwatched)
    assert [len(ranks[0]["history"]) for ranks in runs[:5]] == [2, 2, 2, 0, 0]
    refused = {
        3: "component 'net.0' gave 12 of its 24 units",
        4: "the state of 'net.0' is a DTensor of which each",
    }
    for number, words in refused.items():
        for rank in runs[number]:
            assert rank["hooks"] == 0
            assert any(words in w and "output_layouts=Replicate()" in w for w in rank["warned"])


def test_weights_stay_unmeasured_where_that_takes_an_extra_pass(runs):
    for rank in runs[10]:
        assert rank["history"] == []
        assert any("ModelParallelStrategy shards the weights" in w for w in rank["warned"])


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_an_error_of_ours_in_one_process_keeps_no_other_waiting(number, runs):
    ranks, broken = runs[11 + number], FAULTS[number][0]
    assert [(rank["history"], rank["hooks"]) for rank in ranks] == [([], 0)] * 2
    assert any("broken numerics" in warning for warning in ranks[broken]["warned"])
    assert any("Koopman credit skipped" in w for w in ranks[1 - broken]["warned"])
