"""Networks in the style of other people's code, which nothing here was tuned for."""

from typing import Any

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman import CreditReport, Options, credit_report


def detector() -> nn.Module:
    """Returns a dictionary with a loss of no dimension and counts in front of the heads."""

    def run(m: Any, images: Tensor) -> dict[str, Any]:
        features = m.neck(m.backbone(images)).mean((2, 3))
        out = {name: head(features) for name, head in m.heads.items()}
        return {"loss": out["boxes"].square().mean(), "n": len(images), "predictions": out}

    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.SiLU())
    heads = nn.ModuleDict({"boxes": nn.Linear(8, 4), "classes": nn.Linear(8, 5)})
    return wired(run, backbone=backbone, neck=nn.Conv2d(8, 8, 1), heads=heads)


def functional_skip() -> nn.Module:
    """Functional activations, pooling and concatenation between layers."""

    def run(m: Any, x: Tensor) -> Tensor:
        a = F.relu(m.conv1(x), inplace=True)
        both = F.max_pool2d(torch.cat([a, F.relu(m.conv2(a))], dim=1), 2)
        return F.log_softmax(m.fc2(F.dropout(F.relu(m.fc1(both.flatten(1))), 0.2, m.training)), 1)

    convs = {"conv1": nn.Conv2d(1, 6, 3, padding=1), "conv2": nn.Conv2d(6, 6, 3, padding=1)}
    return wired(run, **convs, fc1=nn.Linear(12 * 16, 20), fc2=nn.Linear(20, 4))


def cell_loop() -> nn.Module:
    """A loop over an LSTMCell, from a state of zeros."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 6)
        for t in range(x.shape[1]):
            h, c = m.cell(torch.tanh(m.embed(x[:, t])), (h, c))
        return m.readout(h)

    return wired(run, embed=nn.Linear(3, 5), cell=nn.LSTMCell(5, 6), readout=nn.Linear(6, 2))


def siamese(stacked: bool) -> nn.Module:
    """One encoder on two inputs, and a head on how far they are apart."""

    def run(m: Any, left: Tensor, right: Tensor) -> Tensor:
        a, b = m.encoder(left), m.encoder(right)
        return m.head(torch.cat([(a - b).abs(), a * b], dim=1))

    encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    forward = (lambda m, pair: run(m, *pair.unbind(1))) if stacked else run
    return wired(forward, encoder=encoder, head=nn.Linear(8, 3))


def auxiliary(when: str) -> nn.Module:
    """An auxiliary head in front of the main one, behind it, or last and in training only."""

    def run(m: Any, x: Tensor) -> Any:
        low = F.gelu(m.low(x))
        aux = m.aux(low) if when == "first" else None
        out = m.main(F.gelu(m.high(low)))
        if when == "in training":
            return (out, m.aux(low)) if m.training else out
        return out, m.aux(low) if aux is None else aux

    parts = {"low": nn.Linear(6, 8), "aux": nn.Linear(8, 3)}
    return wired(run, **parts, high=nn.Linear(8, 8), main=nn.Linear(8, 3))


def measured(model: nn.Module, batches: list[Any], **options: Any) -> CreditReport:
    report = credit_report(model, batches, options=Options(max_dim=64, **options))
    for quantity in ("credit", "gain", "r2", "chain_r2", "sensitivity"):
        assert np.isfinite(getattr(report, quantity)).all(), quantity
    assert report.gain.sum() == pytest.approx(report.total)
    return report


def test_a_model_that_returns_a_dictionary():
    report = measured(detector(), list(torch.randn(400, 3, 9, 9).split(100)))
    assert report.components == ("backbone.0", "neck", "heads.boxes+heads.classes")


def test_functional_activations_and_concatenation():
    report = measured(functional_skip(), list(torch.randn(400, 1, 8, 8).split(100)))
    assert report.components == ("conv1", "conv2", "fc1", "fc2")
    assert report.reads["fc1"] == ("conv2", "conv1")


def test_a_loop_over_a_recurrent_cell():
    report = measured(cell_loop(), list(torch.randn(600, 4, 3).split(100)))
    assert report.components[-1] == "readout"
    assert report.reads["readout"] == ("cell#3",)
    assert any("cell#2" in name for name in report.reads["cell#3"])
    # Each call takes a step of its own, and the input holds all of them.
    assert report.reads["embed#*"] == ("input",)
    assert report.r2[0] > 0.999


@pytest.mark.parametrize("stacked", [False, True])
def test_one_encoder_on_two_inputs(stacked):
    pairs = [(torch.randn(100, 6), torch.randn(100, 6)) for _ in range(6)]
    batches = [torch.stack(pair, 1) for pair in pairs] if stacked else pairs
    report = measured(siamese(stacked), batches)
    assert report.components == ("encoder.0+encoder.0#1", "encoder.2+encoder.2#1", "head")


def test_an_auxiliary_head_that_does_not_run_is_left_out_by_name():
    report = measured(auxiliary("in training"), list(torch.randn(600, 6).split(100)))
    assert report.components == ("low", "high", "main")
    assert any("aux" in note and "left out" in note for note in report.notes)


@pytest.mark.parametrize("when", ["first", "last"])
def test_an_auxiliary_head_counts_wherever_it_runs(when):
    report = measured(auxiliary(when), list(torch.randn(600, 6).split(100)))
    assert len(report.components) == 3
    assert set(report.components[-1].split("+")) == {"main", "aux"}


def test_an_auxiliary_head_that_runs_last_can_be_passed_over():
    report = measured(auxiliary("last"), list(torch.randn(600, 6).split(100)), output="main")
    assert report.components == ("low", "high", "main")
