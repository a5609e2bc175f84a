"""Steps that open ``torch.autocast`` themselves give what a Trainer's own precision gives."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from lit import LitNet, dataset, loaders, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_koopman import CreditReport, KoopmanCreditMonitor, credit_report

pytestmark = [
    pytest.mark.filterwarnings("ignore:the Trainer has no logger"),
    pytest.mark.filterwarnings("ignore:there is no validation loop"),
    pytest.mark.filterwarnings("ignore:Attribute .* removed from hparams"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


def halves() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


class Own(LitNet):
    """Casts products by itself, or leaves that to the Trainer."""

    def __init__(self, around: Any = halves) -> None:
        super().__init__()
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        with self.around():
            return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        with self.around():
            self.net(batch[0])


class Outside(Own):
    """Casts around the whole network, which is the outermost call then."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with self.around():
            given = self(batch[0])
        return nn.functional.cross_entropy(given.float(), batch[1])


WAYS: dict[str, dict[str, Any]] = {
    "validation": {},
    "no validation": {"limit_val_batches": 0},
    "stopped between validations": {"max_epochs": -1, "max_steps": 6},
}


def trained(folder: Any, model: LitNet, **options: Any) -> tuple[CreditReport, Any]:
    torch.manual_seed(0)
    model.load_state_dict(LitNet().state_dict())
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
    trainer = quiet_trainer(folder, [monitor], **({"max_epochs": 1} | options))
    trainer.fit(model, DataLoader(dataset(), 40), loaders()[1])
    assert monitor.report is not None
    return monitor.report, model.eval()


@pytest.mark.parametrize("way", WAYS)
def test_reports_and_effects_are_those_of_the_trainers_precision(tmp_path: Any, way: str) -> None:
    report, model = trained(tmp_path, Outside(), **WAYS[way])
    expected, twin = trained(tmp_path, Outside(nullcontext), precision="bf16-mixed", **WAYS[way])
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert report.notes == expected.notes
    np.testing.assert_array_equal(report.credit, expected.credit)
    assert report.effects is not None
    assert expected.effects is not None
    np.testing.assert_array_equal(report.effects.values["skip"], expected.effects.values["skip"])
    batches = dataset().tensors[0].split(40) if way == "no validation" else loaders()[1]
    with halves():
        direct = credit_report(model.net, batches)
    np.testing.assert_allclose(report.credit, direct.credit, atol=1e-6)
    full = credit_report(model.net, batches)
    assert abs(full.credit - direct.credit).max() > 1e-3


def test_a_step_that_leaves_the_trainers_precision_is_run_again_without_it(tmp_path: Any) -> None:
    def whole() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", enabled=False)

    options = WAYS["no validation"]
    report, model = trained(tmp_path, Outside(whole), precision="bf16-mixed", **options)
    expected, twin = trained(tmp_path, Outside(nullcontext), **options)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    np.testing.assert_array_equal(report.credit, expected.credit)


def test_compiled_parts_are_run_again_as_the_step_casts(tmp_path: Any) -> None:
    model = Outside()
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
    model.net = torch.compile(model.net, backend="eager")
    quiet_trainer(tmp_path, [monitor], max_epochs=1).fit(model, *loaders())
    assert monitor.report is not None
    assert monitor.report.effects is not None
    with halves():
        direct = credit_report(model.eval().net._orig_mod, loaders()[1])
    np.testing.assert_allclose(monitor.report.credit, direct.credit, atol=1e-6)
