"""Effects of a step that calls its network several times: every call is altered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lit import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_koopman import KoopmanCreditMonitor

pytestmark = pytest.mark.filterwarnings("ignore:the Trainer has no logger")


class Refining(LightningModule):
    """Its step runs the network on what the network gave before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 5))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(self.net(self.net(batch))).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(self.net(self.net(batch)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_recorded_step_of_three_calls_is_altered_in_all_of_them(tmp_path: Any) -> None:
    x = torch.randn(96, 5, generator=torch.Generator().manual_seed(1))
    model, monitor = Refining(), KoopmanCreditMonitor(on_error="raise", figures=False)
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=1)
    trainer.fit(model, DataLoader(x, 32), DataLoader(x, 32))
    assert monitor.report is not None
    found = monitor.report.effects
    assert found is not None
    assert found.components == ("net.0", "net.2")
    net, own = model.net, x
    given = []
    with torch.no_grad():
        for _ in range(3):
            given.append(net[:2](own))
            own = net(own)
        mean = torch.cat(given).mean(0).expand(96, 9)
        altered = net[2](mean)
    expected = (altered - own).square().sum() / (own - own.mean(0)).square().sum()
    assert found.values["skip"][0] == pytest.approx(float(expected), rel=1e-4)
    with torch.no_grad():
        mean = torch.cat([net[2](each) for each in given]).mean(0)
    expected = (mean - own).square().sum() / (own - own.mean(0)).square().sum()
    assert found.values["skip"][1] == pytest.approx(float(expected), rel=1e-4)
