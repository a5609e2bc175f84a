"""Options that no measurement can be made with are refused before any work is done."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch import nn

from lightning_koopman import KoopmanCredit, KoopmanCreditMonitor, Options, credit_report


def test_what_is_left_out_is_the_documented_default_and_stays() -> None:
    options = Options()
    assert (options.folds, options.delay, options.max_dim, options.normalize) == (5, 1, 128, "none")
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.folds = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("folds", 1, "folds is 1; held-out R² needs at least 2"),
        ("delay", 0, "delay is 0; it must be an integer of 1 or above"),
        ("delay", 1.0, "delay is 1.0; it must be an integer of 1 or above"),
        ("delay", True, "delay is True; it must be an integer of 1 or above"),
        ("delay", None, "delay is None; it must be an integer of 1 or above"),
        ("rank", 0, "rank is 0; at least one output direction must be aligned"),
        ("max_dim", "64", "max_dim is '64'; it must be an integer"),
        ("max_dim", 0, "max_dim is 0; a state vector needs at least one value"),
        ("tikhonov", -0.1, r"tikhonov is -0\.1; it must be a finite number"),
        ("normalize", "max", r"normalize is 'max'; choose one of \('none', 'rms', 'whiten'\)"),
        ("reduce", "max", "reduce holds 'max'; choose one of"),
        ("observables", "cubic", "observables is 'cubic'; choose one of"),
    ],
)
def test_an_option_out_of_range_is_refused(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**{option: value})


def test_what_is_no_options_object_is_refused() -> None:
    with pytest.raises(TypeError, match=r"options is of type dict; write Options\(max_dim=64\)"):
        credit_report(nn.Linear(2, 2), [], options={"max_dim": 64})  # type: ignore[arg-type]


def test_targets_and_whitening_exclude_each_other() -> None:
    with pytest.raises(
        ValueError, match=r"targets is \[1\], but normalize='whiten' mixes the output's units"
    ):
        Options(targets=[1], normalize="whiten")


def test_options_are_taken_by_their_own_names_too() -> None:
    monitor = KoopmanCreditMonitor(max_dim=8, options=Options(seed=3))  # type: ignore[call-arg]
    assert monitor.options == Options(max_dim=8, seed=3)
    metric = KoopmanCredit(["a", "b"], rank=2)  # type: ignore[call-arg]
    assert metric.options.rank == 2
    with pytest.raises(ValueError, match="folds is 1"):
        KoopmanCreditMonitor(folds=1)  # type: ignore[call-arg]
