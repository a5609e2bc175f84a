"""Encoder layers of torch compute in another way where hooks are seen on them: none may be."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import lightning as L
import pytest
import torch
from lit import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_koopman import KoopmanCreditMonitor, component_effects, credit_report


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(dim=1))


def computing(bfloat16: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext()


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("components", [None, ("encoder", "head"), ("encoder.layers.1", "head")])
@pytest.mark.filterwarnings("ignore:.*samples are few")
def test_outputs_are_the_same_bits_while_they_are_watched(bfloat16: bool, components: Any) -> None:
    torch.manual_seed(0)
    model, batches = Encoder().eval(), list(torch.randn(160, 5, 16).split(40))
    with torch.no_grad(), computing(bfloat16):
        expected = [model(batch) for batch in batches]
    given = []

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        with computing(bfloat16):
            given.append(model(batch))
        return given[-1]

    report = credit_report(model, batches, components=components, forward_fn=forward)
    assert all(map(torch.equal, given, expected))
    given.clear()
    component_effects(model, batches, report, ("linear",), forward_fn=forward)
    assert torch.equal(given[0], expected[0])


class LitEncoder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.losses = Encoder(), list[float]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(self.training_step(batch, batch_idx)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.mark.filterwarnings("ignore:the Trainer has no logger", "ignore:.*samples are few")
def test_validation_in_bfloat16_is_the_same_function(tmp_path: Any) -> None:
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        x = torch.randn(192, 5, 16)
        data = TensorDataset(x, x[:, 0, :3].argmax(dim=1))
        monitor = KoopmanCreditMonitor(on_error="raise", figures=False, every_n_epochs=1)
        trainer = quiet_trainer(
            tmp_path, [monitor] if watched else [], max_epochs=2, precision="bf16-mixed"
        )
        model = LitEncoder()
        trainer.fit(model, *(DataLoader(data, 48) for _ in range(2)))
        found.append(model.losses)
    assert found[0] == found[1]
    assert monitor.report is not None
    assert monitor.report.effects is not None
