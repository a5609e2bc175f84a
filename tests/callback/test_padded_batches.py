"""Effects that a monitor measures on recorded steps, of which some positions hold no data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lit import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_koopman import KoopmanCreditMonitor, component_effects, credit_report

pytestmark = pytest.mark.filterwarnings(
    "ignore:the Trainer has no logger",
    "ignore:.*there is no validation loop",
    "ignore:You defined a .validation_step",
)


class Tagging(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch["x"]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch["x"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("validates", [True, False], ids=["validation", "training steps"])
@pytest.mark.parametrize("targets", ["none", "labels"])
def test_a_monitor_leaves_out_what_functions_do(tmp_path: Any, targets: str, validates: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, net = torch.randn(128, 7, 3, generator=generator), Tagging()
    valid = torch.arange(7) < torch.randint(1, 8, (128, 1), generator=generator)
    x = torch.where(valid[..., None], x, 3.0)
    samples: list[dict[str, Tensor]] = [{"x": a, "mask": b} for a, b in zip(x, valid, strict=True)]
    if targets == "labels":
        with torch.no_grad():
            labels = torch.where(valid, net.net(x).argmax(-1), 0)
        samples = [{**sample, "labels": own} for sample, own in zip(samples, labels, strict=True)]
    loader: Any = DataLoader(samples, 32)  # type: ignore[arg-type]
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
    quiet_trainer(tmp_path, [monitor], max_epochs=1).fit(net, loader, loader if validates else None)
    assert monitor.report is not None
    found = monitor.report.effects
    assert found is not None

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"])

    expected = component_effects(net.net, loader, forward_fn=forward)
    np.testing.assert_allclose(found.values["skip"], expected.values["skip"], rtol=1e-5)
    plain = [{"x": batch["x"]} for batch in loader]
    whole = component_effects(net.net, plain, forward_fn=forward)
    assert expected.values["skip"][1] != pytest.approx(whole.values["skip"][1], rel=0.05)
    assert found.metric_before == pytest.approx(expected.metric_before, nan_ok=True)
    report = credit_report(net.net, loader, forward_fn=forward)
    np.testing.assert_allclose(monitor.report.credit, report.credit, atol=1e-5)
