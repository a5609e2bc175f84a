"""Networks in the style of other people's code, which nothing here was tuned for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman import CreditReport, Options, credit_report


class Detector(nn.Module):
    """Returns a dictionary with a loss of no dimension and counts in front of the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.SiLU())
        self.neck = nn.Conv2d(8, 8, 1)
        self.heads = nn.ModuleDict({"boxes": nn.Linear(8, 4), "classes": nn.Linear(8, 5)})

    def forward(self, images: Tensor) -> dict[str, Any]:
        features = self.neck(self.backbone(images)).mean((2, 3))
        out = {name: head(features) for name, head in self.heads.items()}
        return {"loss": out["boxes"].square().mean(), "n": len(images), "predictions": out}


class FunctionalSkip(nn.Module):
    """Functional activations, pooling and concatenation between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(12 * 16, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.conv1(x), inplace=True)
        b = F.relu(self.conv2(a))
        both = F.max_pool2d(torch.cat([a, b], dim=1), 2)
        return F.log_softmax(
            self.fc2(F.dropout(F.relu(self.fc1(both.flatten(1))), 0.2, self.training)), 1
        )


class CellLoop(nn.Module):
    """A loop over an LSTMCell, from a state of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.readout = nn.Linear(3, 5), nn.LSTMCell(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 6)
        for t in range(x.shape[1]):
            h, c = self.cell(torch.tanh(self.embed(x[:, t])), (h, c))
        return self.readout(h)


class Siamese(nn.Module):
    """One encoder on two inputs, and a head on how far they are apart."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        self.head = nn.Linear(8, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.encoder(left), self.encoder(right)
        return self.head(torch.cat([(a - b).abs(), a * b], dim=1))


class Auxiliary(nn.Module):
    """An auxiliary head that always runs, in front of the main one."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.aux = nn.Linear(6, 8), nn.Linear(8, 3)
        self.high, self.main = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = F.gelu(self.low(x))
        aux = self.aux(low)
        return self.main(F.gelu(self.high(low))), aux


class QuietAuxiliary(Auxiliary):
    """An auxiliary head that runs in training only, last."""

    def forward(self, x: Tensor) -> Any:
        low = F.gelu(self.low(x))
        out = self.main(F.gelu(self.high(low)))
        return (out, self.aux(low)) if self.training else out


class AuxiliaryLast(Auxiliary):
    """An auxiliary head that runs behind the main one."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = F.gelu(self.low(x))
        return self.main(F.gelu(self.high(low))), self.aux(low)


def measured(model: nn.Module, batches: list[Any], **options: Any) -> CreditReport:
    report = credit_report(model, batches, options=Options(max_dim=64, **options))
    for quantity in ("credit", "gain", "r2", "chain_r2", "sensitivity"):
        assert np.isfinite(getattr(report, quantity)).all(), quantity
    assert report.gain.sum() == pytest.approx(report.total)
    return report


def test_a_model_that_returns_a_dictionary() -> None:
    report = measured(Detector(), list(torch.randn(400, 3, 9, 9).split(100)))
    assert report.components == ("backbone.0", "neck", "heads.boxes+heads.classes")


def test_functional_activations_and_concatenation() -> None:
    report = measured(FunctionalSkip(), list(torch.randn(400, 1, 8, 8).split(100)))
    assert report.components == ("conv1", "conv2", "fc1", "fc2")
    assert report.reads["fc1"] == ("conv2", "conv1")


def test_a_loop_over_a_recurrent_cell() -> None:
    report = measured(CellLoop(), list(torch.randn(600, 4, 3).split(100)))
    assert report.components[-1] == "readout"
    assert report.reads["readout"] == ("cell#3",)
    assert any("cell#2" in name for name in report.reads["cell#3"])


def test_one_encoder_on_two_inputs() -> None:
    pairs = [(torch.randn(100, 6), torch.randn(100, 6)) for _ in range(6)]
    report = measured(Siamese(), pairs)
    assert report.components == ("encoder.0+encoder.0#1", "encoder.2+encoder.2#1", "head")


def test_one_encoder_on_two_tensors_in_one() -> None:
    class Stacked(Siamese):
        def forward(self, pair: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(pair[:, 0], pair[:, 1])

    report = measured(Stacked(), list(torch.randn(600, 2, 6).split(100)))
    assert report.components == ("encoder.0+encoder.0#1", "encoder.2+encoder.2#1", "head")


def test_an_auxiliary_head_that_does_not_run_is_left_out_by_name() -> None:
    report = measured(QuietAuxiliary(), list(torch.randn(600, 6).split(100)))
    assert report.components == ("low", "high", "main")
    assert any("aux" in note and "left out" in note for note in report.notes)


@pytest.mark.parametrize("kind", [Auxiliary, AuxiliaryLast])
def test_an_auxiliary_head_counts_wherever_it_runs(kind: type[Auxiliary]) -> None:
    report = measured(kind(), list(torch.randn(600, 6).split(100)))
    assert len(report.components) == 3
    assert set(report.components[-1].split("+")) == {"main", "aux"}


def test_an_auxiliary_head_that_runs_last_can_be_passed_over() -> None:
    report = measured(AuxiliaryLast(), list(torch.randn(600, 6).split(100)), output="main")
    assert report.components == ("low", "high", "main")
