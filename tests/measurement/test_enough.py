"""A report looks at enough samples, not at all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from torch import Tensor, nn

from lightning_koopman import CreditReport, Options, credit_report
from lightning_koopman.measurement import accumulator, measurement

SAMPLES = torch.randn(6000, 8, generator=torch.Generator().manual_seed(3)).double()


@pytest.fixture
def checks_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "_CHECK_WORK", 0)


def scaled_rotations(*scales: float) -> nn.Sequential:
    layers = [nn.Linear(8, 8).double() for _ in scales]
    for layer, scale in zip(layers, scales, strict=True):
        layer.weight.data = scale * torch.linalg.qr(torch.randn(8, 8).double())[0]
    return nn.Sequential(*layers)


def curved() -> nn.Sequential:
    parts = [nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)]
    return nn.Sequential(*parts).double()


class Noisy(nn.Linear):
    """Doubles, and adds noise that no operator predicts."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 4.5 * torch.randn_like(x)


@pytest.mark.usefixtures("checks_are_cheap")
def test_a_linear_network_is_known_after_the_first_check() -> None:
    read = 0

    def batches() -> Iterator[Tensor]:
        nonlocal read
        for batch in SAMPLES.split(100):
            read += 1
            yield batch

    report = credit_report(scaled_rotations(3.0, 0.5, 2.0), batches(), options=Options(tikhonov=0.0))
    # Whole batches, up to the first that brings 512.
    assert report.n_samples == 600
    assert read == 6
    assert report.gain == pytest.approx(np.log([3.0, 0.5, 2.0]), abs=1e-9)
    assert report.credit == pytest.approx([0.0, math.log(2.0), 0.0], abs=1e-9)


@pytest.mark.usefixtures("checks_are_cheap")
def test_samples_are_doubled_until_every_error_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    model = curved()

    def measured(max_samples: Any = "enough") -> CreditReport:
        return credit_report(model, SAMPLES.split(64), max_samples=max_samples)

    fixed = {n: measured(n) for n in (512, 1024, 2048, 4096)}
    worst = {n: float(report.stderr["credit"].max()) for n, report in fixed.items()}
    low, middle, high = sorted(worst[n] for n in (512, 1024, 2048))
    for tolerance in (0.0, (low + middle) / 2, (middle + high) / 2, 1.01 * high):
        # Folds hang on the last bits of the samples, errors on the folds: no test may order them.
        n = next((n for n in (512, 1024, 2048) if worst[n] <= tolerance), 4096)
        monkeypatch.setattr(measurement, "TOLERANCE", tolerance)
        report = measured()
        assert report.n_samples == n
        assert report.credit == pytest.approx(fixed[n].credit, rel=0, abs=1e-9)
        assert report.stderr["credit"] == pytest.approx(fixed[n].stderr["credit"], rel=0, abs=1e-9)


@pytest.mark.slow
def test_error_bars_hold_the_truth_although_they_chose_when_to_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measurement, "_CHECK_WORK", 0)
    model = nn.Sequential(nn.Linear(8, 2), Noisy(2, 2)).double()
    nn.init.orthogonal_(model[0].weight)
    nn.init.zeros_(model[1].bias)
    model[1].weight.data = 2 * torch.eye(2).double()
    held, seen = 0, []
    for seed in range(100):
        torch.manual_seed(seed)
        x = torch.randn(6000, 8).double()
        report = credit_report(model, x.split(512), options=Options(tikhonov=0.0))
        # Behind the first layer, volumes double: its outputs vary alike in all directions.
        off = abs(report.credit[0] - math.log(2.0))
        held += off <= student.ppf(0.975, 4) * report.stderr["credit"][0]
        seen.append(report.n_samples)
    assert set(seen) <= {512, 1024, 2048, 4096}
    assert len(set(seen)) > 1
    # 94 at any fixed number; errors that came out small by chance stop early.
    assert held >= 85


def test_where_a_check_would_take_long_samples_are_taken_up_to_the_cap() -> None:
    model = scaled_rotations(3.0, 0.5)
    report, capped = (credit_report(model, [SAMPLES], max_samples=n) for n in ("enough", 4096))
    assert report.n_samples == capped.n_samples == accumulator.SAMPLES == 4096
    assert report.credit == pytest.approx(capped.credit, rel=0, abs=1e-12)
    assert credit_report(model, SAMPLES[:700].split(100)).n_samples == 700


@pytest.mark.usefixtures("checks_are_cheap")
def test_as_many_as_are_advised_are_taken_however_wide_the_states_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(accumulator, "SAMPLES", 40)
    # Twice 32 regressors in four folds of five.
    assert credit_report(curved(), SAMPLES.split(16)).n_samples == 80
    monkeypatch.setattr(accumulator, "SAMPLES", 4096)
    monkeypatch.setattr(measurement, "FIRST_CHECK", 8)
    monkeypatch.setattr(measurement, "TOLERANCE", 1e9)
    assert credit_report(curved(), SAMPLES.split(16)).n_samples == 80


@pytest.mark.usefixtures("checks_are_cheap")
def test_an_output_that_does_not_vary_yet_is_waited_for() -> None:
    model = nn.Sequential(*scaled_rotations(1.0, 1.0), nn.ReLU())
    model[1].bias.data.fill_(-20.0)
    late = SAMPLES.clone()
    late[2048:] *= 20
    # An iterator is taken as it comes.
    report, capped = (
        credit_report(model, iter(late.split(512)), max_samples=n) for n in ("enough", 4096)
    )
    assert report.n_samples == 4096
    assert report.credit == pytest.approx(capped.credit, rel=0, abs=1e-9)
    with pytest.raises(ValueError, match="constant over all 2048 samples"):
        credit_report(model, late[:2048].split(512))


def test_samples_are_numbered_by_the_user_or_all_taken() -> None:
    model = curved()
    assert credit_report(model, SAMPLES.split(500), max_samples=None).n_samples == 6000
    assert credit_report(model, SAMPLES.split(500), max_samples=1234).n_samples == 1234
    # Without error bars nobody can tell when to stop.
    options = Options(errors=False)
    assert credit_report(model, SAMPLES.split(500), options=options).n_samples == 4096


@pytest.mark.parametrize("given", [0, -1, 2.5, "all"])
def test_no_other_number_of_samples_is_taken(given: Any) -> None:
    with pytest.raises(ValueError, match=f"max_samples is {given!r}; give a number of 1 or above"):
        credit_report(curved(), SAMPLES.split(500), max_samples=given)
