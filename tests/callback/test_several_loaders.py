"""Of several validation loaders one is measured, and a note says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lit import LitNet, dataset, loaders, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_koopman import KoopmanCreditMonitor, credit_report

pytestmark = pytest.mark.filterwarnings("ignore:the Trainer has no logger")

ALONE = "measured on validation loader 1 of 2 alone; what runs on others only counts as never run"


class TwoHeads(LitNet):
    """Validates its second head on the second loader."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]) + self.aux(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        (self.aux if dataloader_idx else self.net)(batch[0])


def other() -> DataLoader:
    return DataLoader(dataset(90, seed=2), 30)


def report_of(folder: Any, model: LitNet, validated: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False, effects=())
    quiet_trainer(folder, [monitor], **({"max_epochs": 1} | options)).fit(model, loaders()[0], validated)
    return monitor.report


# Stopped between validations, the recorded calls are run again.
@pytest.mark.parametrize("stop", [{}, {"max_epochs": -1, "max_steps": 6}])
def test_the_first_loader_is_measured_and_a_note_says_so(tmp_path: Any, stop: dict[str, int]) -> None:
    model = LitNet()
    report = report_of(tmp_path, model, [loaders()[1], other()], **stop)
    assert report.notes == (ALONE,)
    expected = credit_report(model.net, loaders()[1])
    assert report.n_samples == expected.n_samples
    np.testing.assert_allclose(report.credit, expected.credit, atol=1e-6)


def test_a_head_of_the_second_loader_is_explained(tmp_path: Any) -> None:
    report = report_of(tmp_path, TwoHeads(), [loaders()[1], other()])
    assert report.notes == (ALONE, "never ran, so left out: 'aux'")


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_an_empty_loader_is_passed_over(tmp_path: Any) -> None:
    model = LitNet()
    report = report_of(tmp_path, model, [[], loaders()[1]])
    assert report.notes == ()
    expected = credit_report(model.net, loaders()[1])
    np.testing.assert_allclose(report.credit, expected.credit, atol=1e-6)
