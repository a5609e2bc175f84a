"""What changed between two checkpoints, beyond error."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import t as student
from small import network, save

from lightning_koopman.cli.main import main
from lightning_koopman.report.comparison import changes

OPTIONS = ["--model", "compared:network", "--data", "compared:batches", "--quantity", "gain"]


def with_errors(report, error, **more):
    errors = report.stderr | {"credit": np.full(len(report.components), error)}
    return dataclasses.replace(report, stderr=errors, **more)


@pytest.mark.parametrize("folds", [(5, 5), (5, 20), (2, 2)])
@pytest.mark.parametrize("errors", [(0.1, 0.1), (0.1, 0.02), (1e-90, 2e-90)])
def test_the_quantile_is_that_of_welchs_test(report, errors, folds):
    before, after = (with_errors(report, e, folds=f) for e, f in zip(errors, folds, strict=True))
    shares = [(e / max(errors)) ** 2 for e in errors]
    freedom = sum(shares) ** 2 / sum(s**2 / (f - 1) for s, f in zip(shares, folds, strict=True))
    for row in changes(before, after):
        assert row["quantile"] == pytest.approx(student.ppf(0.975, freedom), rel=1e-9)
        assert row["stderr"] == pytest.approx(math.hypot(*errors))


def test_the_share_of_false_alarms_is_five_percent(report):
    """Estimates and their errors drawn as a jackknife of five folds would give them."""
    generator = np.random.default_rng(0)
    trials, alarms = 4000, 0
    for _ in range(trials):
        drawn = []
        for folds in generator.normal(size=(2, 5)):
            credit = np.full(len(report.components), folds.mean())
            drawn.append(with_errors(report, folds.std(ddof=1) / math.sqrt(5), credit=credit))
        alarms += changes(*drawn)[0]["changed"]
    assert alarms / trials == pytest.approx(0.05, abs=0.011)  # three standard errors


def test_changes_beyond_error_are_told(report):
    error = report.stderr["credit"]
    moved = dataclasses.replace(report, credit=report.credit + np.array([1.0 + 9 * error[0], 0.0]))
    assert [row["changed"] for row in changes(report, moved)] == [True, False]
    with pytest.raises(ValueError, match="only equal components"):
        changes(report, dataclasses.replace(report, components=("a", "b")))


def test_what_is_not_finite_did_not_change(report):
    lost = dataclasses.replace(report, credit=np.full(len(report.components), np.nan))
    for row in changes(report, lost):
        assert not row["changed"]
        assert "lost" in row["doubt"]


def scaled(factor):
    weights = network().state_dict()
    return weights | {"2.weight": factor * weights["2.weight"]}


def test_compare_measures_checkpoints(user_module, capsys):
    folder = user_module("compared")
    save(folder / "a.ckpt", 1)
    save(folder / "b.ckpt", 2, state_dict=scaled(3.0))
    assert main(["compare", "a.ckpt", "b.ckpt", *OPTIONS]) == 0
    # The table of the drift follows.
    credits = capsys.readouterr().out.partition("rift")[0]
    rows = [line.split() for line in credits.splitlines()]
    told = {row[0]: row[4:5] for row in rows if row and row[0] in {"0", "2"}}
    assert told == {"0": [], "2": ["yes"]}
    difference = next(row for row in rows if row and row[0] == "2")[3]
    assert float(difference.split("±")[0]) == pytest.approx(math.log(3), abs=2e-3)


def test_compare_takes_the_weights_that_are_asked_for(user_module, capsys):
    folder = user_module("compared")
    # As Lightning's WeightAveraging saves them: the average as state_dict, current weights beside it.
    averaging = {"averaging_state": {}, "callbacks": {"EMAWeightAveraging": {"latest_update_step": 3}}}
    save(folder / "a.ckpt", 1, current_model_state=scaled(3.0), **averaging)
    save(folder / "b.ckpt", 2)
    changed = {}
    for weights in ("saved", "averaged", "current"):
        assert main(["compare", "a.ckpt", "a.ckpt", *OPTIONS, "--weights", weights]) == 0
        capsys.readouterr()
        code = main(["compare", "a.ckpt", "b.ckpt", *OPTIONS, "--weights", weights])
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        changed[weights] = (code, [row[0] for row in rows if row[4:5] == ["yes"]])
    # The second file holds no average: asking for it by name is an error, and its own are the current.
    assert changed == {"saved": (0, []), "averaged": (1, []), "current": (0, ["2"])}


def test_compare_of_files_that_are_none(user_module, capsys):
    user_module("compared")
    assert main(["compare", "gone.ckpt", "b.ckpt", *OPTIONS]) == 1
    assert "gone.ckpt does not exist" in capsys.readouterr().err
    assert main(["compare", "a.ckpt", "b.ckpt"]) == 1
    assert "needs --model and --data" in capsys.readouterr().err
