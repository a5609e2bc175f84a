"""Effects of steps whose network takes integers of the batch: these are no classes, those behind are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lit import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_koopman import KoopmanCreditMonitor

pytestmark = pytest.mark.filterwarnings("ignore:the Trainer has no logger")


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(5, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)) * (1 + t[:, None]))


class Training(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Timed()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0], batch[1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0], batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("behind", ["labels", "numbers", "nothing"])
def test_the_target_is_behind_what_the_step_gives_to_the_network(tmp_path: Any, behind: str) -> None:
    x = torch.randn(96, 5, generator=torch.Generator().manual_seed(1))
    t = torch.randint(0, 4, (96,), generator=torch.Generator().manual_seed(2))
    right = Timed()(x, t).argmax(1)
    label = torch.where(torch.arange(96) % 4 < 3, right, (right + 1) % 4)
    more = {"labels": [label], "numbers": [torch.randn(96, 4)], "nothing": []}[behind]
    loader = DataLoader(TensorDataset(x, t, *more), 32)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
    quiet_trainer(tmp_path, [monitor], max_epochs=1).fit(Training(), loader, loader)
    assert monitor.report is not None
    found = monitor.report.effects
    assert found is not None
    assert found.notes == ()
    assert found.scale == ("kl" if behind == "labels" else "relative")
    assert found.metric_before == pytest.approx(0.75 if behind == "labels" else torch.nan, nan_ok=True)
