"""Of several validation loaders one is measured, and a note says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from lit import LitNet, dataset, loaders, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_koopman import KoopmanCreditMonitor, component_effects, credit_report
from lightning_koopman.callback.recorded_effects import parts_in

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


def report_of(folder: Any, model: LitNet, validated: Any, effects: Any = (), **options: Any) -> Any:
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False, effects=effects)
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


class Parts(LitNet):
    """Validates on parts of what several loaders give at once, as they come, as views or joined."""

    def __init__(self, *keys: Any, how: str = "") -> None:
        super().__init__()
        self.keys, self.how = keys, how

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        for key in self.keys:
            x, _ = batch[key]
            self(x.view(-1, 2, 4).flatten(1) if self.how == "viewed" else x)
        if self.how == "joined":
            self(torch.cat([x for x, _ in batch.values()]))


def effects_of_parts(folder: Any, model: Parts, *, in_order: bool = False) -> Any:
    both = [loaders()[1], DataLoader(dataset(96, seed=2), 24)]
    given = CombinedLoader(both if in_order else dict(zip("ab", both, strict=True)), "max_size_cycle")
    return report_of(folder, model, given, max_epochs=4, effects=("skip",)).effects, both


@pytest.mark.parametrize("how", ["", "viewed"])
@pytest.mark.parametrize(("keys", "counts"), [("a", 0), ("b", 1), ("ab", 0), ("ba", 1), ((1,), 1)])
def test_labels_are_those_of_the_part_that_the_outputs_are_of(
    tmp_path: Any, keys: Any, counts: int, how: str
) -> None:
    model = Parts(*keys, how=how)
    found, both = effects_of_parts(tmp_path, model, in_order=keys == (1,))
    with torch.no_grad():
        right = torch.cat([model.net.eval()(x).argmax(1) == y for x, y in both[counts]])
    assert (found.scale, found.n_samples) == ("kl", len(right))
    assert found.metric_before == pytest.approx(float(right.double().mean()))
    if len(keys) == 1:
        expected = component_effects(
            model.net, both[counts], credit_report(model.net, both[counts]), kinds=["skip"]
        )
        np.testing.assert_allclose(found.values["skip"], expected.values["skip"], rtol=1e-4)
        assert found.notes == ()


def test_a_note_says_where_no_part_of_a_batch_tells_the_labels(tmp_path: Any) -> None:
    found, _ = effects_of_parts(tmp_path, Parts(how="joined"))
    assert found.scale == "relative"
    assert found.notes[-1].startswith("the batches have parts with labels of their own, and no call")


def test_inputs_and_targets_side_by_side_are_no_parts() -> None:
    x, y = torch.randn(4, 8), torch.arange(4)
    assert [part.told for part in parts_in([[x, y], [y, y]])] == [{}]
    assert [{*part.told} for part in parts_in([[x, y], None])] == [{"1"}, set()]
    assert [{*part.told} for part in parts_in({"a": x, "b": {"x": x, "labels": y}})] == [
        set(),
        {"labels"},
    ]
