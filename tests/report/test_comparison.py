"""What changed between two checkpoints, beyond error."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from torch import nn

from lightning_koopman import CreditReport, credit_report
from lightning_koopman.cli.main import main
from lightning_koopman.report.comparison import changes

USER_CODE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

def data():
    return torch.randn(600, 4, generator=torch.Generator().manual_seed(0)).split(100)
"""


@pytest.fixture(scope="module")
def report() -> CreditReport:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return credit_report(net, torch.randn(300, 4).split(100), step=7)


@pytest.mark.parametrize("folds", [(5, 5), (5, 20), (2, 2)])
@pytest.mark.parametrize("errors", [(0.1, 0.1), (0.1, 0.02), (1e-90, 2e-90)])
def test_the_quantile_is_that_of_welchs_test(
    report: CreditReport, errors: tuple[float, float], folds: tuple[int, int]
) -> None:
    before, after = (
        dataclasses.replace(
            report, folds=f, stderr={**report.stderr, "credit": np.full(len(report.components), e)}
        )
        for e, f in zip(errors, folds, strict=True)
    )
    shares = [(e / max(errors)) ** 2 for e in errors]
    freedom = sum(shares) ** 2 / sum(s**2 / (f - 1) for s, f in zip(shares, folds, strict=True))
    for row in changes(before, after):
        assert row["quantile"] == pytest.approx(student.ppf(0.975, freedom), rel=1e-9)
        assert row["stderr"] == pytest.approx(math.hypot(*errors))


def test_the_share_of_false_alarms_is_five_percent(report: CreditReport) -> None:
    """Estimates and their errors drawn as a jackknife of five folds would give them."""
    generator = np.random.default_rng(0)
    trials, alarms = 4000, 0
    for _ in range(trials):
        drawn = []
        for _ in range(2):
            folds = generator.normal(size=5)
            error = np.full(len(report.components), folds.std(ddof=1) / math.sqrt(5))
            drawn.append(
                dataclasses.replace(
                    report,
                    credit=np.full(len(report.components), folds.mean()),
                    stderr={**report.stderr, "credit": error},
                )
            )
        alarms += changes(*drawn)[0]["changed"]
    assert alarms / trials == pytest.approx(0.05, abs=0.011)  # three standard errors


def test_what_is_not_finite_did_not_change(report: CreditReport) -> None:
    lost = dataclasses.replace(report, credit=np.full(len(report.components), np.nan))
    for row in changes(report, lost):
        assert not row["changed"]
        assert "lost" in row["doubt"]


def test_compare_measures_checkpoints(
    user_module: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    user_module("compared", USER_CODE)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    torch.save({"state_dict": net.state_dict(), "global_step": 1}, "a.ckpt")
    with torch.no_grad():
        net[4].weight.mul_(3.0)
    torch.save({"state_dict": net.state_dict(), "global_step": 2}, "b.ckpt")
    options = ["--model", "compared:net", "--data", "compared:data", "--quantity", "gain"]
    assert main(["compare", "a.ckpt", "b.ckpt", *options]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    told = {row[0]: row[4:5] for row in rows if row and row[0] in {"0", "2", "4"}}
    assert told == {"0": [], "2": [], "4": ["yes"]}
    difference = next(row for row in rows if row and row[0] == "4")[3]
    assert float(difference.split("±")[0]) == pytest.approx(math.log(3), abs=2e-3)


def test_compare_takes_the_weights_that_are_asked_for(
    user_module: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    user_module("compared", USER_CODE)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    averaged = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        net[4].weight.mul_(3.0)
    # As Lightning's WeightAveraging saves them: the average as state_dict, current weights beside it.
    content = {
        "state_dict": averaged,
        "current_model_state": net.state_dict(),
        "averaging_state": {},
        "callbacks": {"EMAWeightAveraging": {"latest_update_step": 3}},
    }
    torch.save({**content, "global_step": 1}, "a.ckpt")
    torch.save({"state_dict": averaged, "global_step": 2}, "b.ckpt")
    options = [
        "--model",
        "compared:net",
        "--data",
        "compared:data",
        "--quantity",
        "gain",
    ]
    changed = {}
    for weights in ("saved", "averaged", "current"):
        assert main(["compare", "a.ckpt", "a.ckpt", *options, "--weights", weights]) == 0
        capsys.readouterr()
        code = main(["compare", "a.ckpt", "b.ckpt", *options, "--weights", weights])
        told = capsys.readouterr()
        rows = [line.split() for line in told.out.splitlines()]
        changed[weights] = (code, [row[0] for row in rows if row[4:5] == ["yes"]])
    # The second file holds no average: asking for it by name is an error, and its own are the current.
    assert changed == {"saved": (0, []), "averaged": (1, []), "current": (0, ["4"])}


def test_compare_of_a_file_that_is_none(
    user_module: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    user_module("compared", USER_CODE)
    options = ["--model", "compared:net", "--data", "compared:data"]
    assert main(["compare", "gone.ckpt", "b.ckpt", *options]) == 1
    assert "gone.ckpt does not exist" in capsys.readouterr().err
