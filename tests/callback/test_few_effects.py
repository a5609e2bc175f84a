"""Effects rest on enough samples, or say on how few, whatever the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lit import dataset, quiet_trainer, small_module
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_koopman import KoopmanCreditMonitor, component_effects
from lightning_koopman.callback import effects_in_time
from lightning_koopman.callback.budget import Budget
from lightning_koopman.callback.effects_in_time import EffectsInTime
from lightning_koopman.network.runs.samples import spread_over

pytestmark = pytest.mark.filterwarnings("ignore:the Trainer has no logger")

FEW = "effects rest on {} samples alone; component_effects measures them on more"


def trained(folder: Any, size: int, n_samples: int = 160, epochs: int = 1) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
    model = small_module()()
    training, validation = DataLoader(dataset(), 40), DataLoader(dataset(n_samples, seed=1), size)
    quiet_trainer(folder, [monitor], max_epochs=epochs).fit(model, training, validation)
    return monitor, model


@pytest.mark.parametrize("size", [8, 48, 100])
def test_the_last_report_has_effects_on_512_samples_from_everywhere_where_a_second_does(
    size: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "left", lambda self, kind: -1.0)
    monkeypatch.setattr(effects_in_time, "_FEW", 1e3)  # seconds, for cores may be busy
    monitor, model = trained(tmp_path, size, n_samples=800)
    found = monitor.report.effects
    count = 512 // size
    assert found.n_samples == size * count
    rows = torch.arange(800).split(size)
    taken = torch.cat([rows[i] for i in spread_over(count, len(rows))])
    assert found.n_samples == len(taken)
    expected = component_effects(
        model.net, DataLoader(Subset(dataset(800, seed=1), taken.tolist()), len(taken))
    )
    assert found.values["skip"] == pytest.approx(expected.values["skip"], rel=1e-4)
    assert found.notes == ()


def test_effects_on_few_samples_say_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor, _ = trained(tmp_path, 8, n_samples=40)
    assert monitor.report.effects.n_samples == 40
    assert monitor.report.effects.notes == (FEW.format(40),)
    # As many as may be, where a second does not hold more.
    monkeypatch.setattr(Budget, "left", lambda self, kind: -1.0)
    monkeypatch.setattr(effects_in_time, "_FEW", 0.0)
    monitor, _ = trained(tmp_path, 8)
    assert monitor.report.effects.n_samples == 8
    assert monitor.report.effects.notes == (FEW.format(8),)


def test_nothing_is_skipped_by_the_mean_of_one_sample(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "left", lambda self, kind: -1.0)
    monkeypatch.setattr(effects_in_time, "_FEW", 0.0)
    monitor, _ = trained(tmp_path, 1)
    assert monitor.report.effects is None
    assert (
        "effects were not measured: the calls that were run again hold one sample"
        in (monitor.report.notes[-1])
    )


@pytest.mark.parametrize("rows", [8, 64])
def test_reports_before_the_last_have_effects_where_enough_samples_are_paid_for(
    rows: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[Any] = []
    own = EffectsInTime._own

    def remember(self: Any, *given: Any, **more: Any) -> Any:
        watched.append(self)
        return own(self, *given, **more)

    def room(self: Budget, kind: str) -> float:
        # Two components, of which each runs twice, and two passes more.
        return (rows + 0.5) * 6 * watched[-1].seconds_a_sample

    monkeypatch.setattr(EffectsInTime, "_own", remember)
    monkeypatch.setattr(Budget, "room", room)
    monitor, _ = trained(tmp_path, 8, epochs=2)
    first = monitor.history[0].effects
    assert first is None if rows == 8 else first.n_samples == 64
