"""Validation batches in which no component runs are left out, and the rest is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lit import LitNet, dataset, hooks_on, loaders, newest, quiet_trainer
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from lightning_koopman import CreditReport, KoopmanCreditMonitor, credit_report
from lightning_koopman.callback import monitor as callback
from lightning_koopman.callback.trainer_facts import DataPart, is_dealt_out
from lightning_koopman.measurement.measurement import NoSamplesError

pytestmark = [
    pytest.mark.filterwarnings("ignore:the Trainer has no logger"),
    pytest.mark.filterwarnings("ignore:Attribute .* removed from hparams"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


class Skips(LitNet):
    """Runs nothing in some of its validation batches."""

    def __init__(self, skips: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.skips = skips

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not self.skips(self.current_epoch, batch_idx):
            self(batch[0])


def monitor_of(**given: Any) -> KoopmanCreditMonitor:
    return KoopmanCreditMonitor(on_error="raise", figures=False, every_n_epochs=1, **given)


def without(*left_out: int) -> list[Tensor]:
    return [batch[0] for i, batch in enumerate(loaders()[1]) if i not in left_out]


def check(report: CreditReport, model: Any, batches: list[Tensor]) -> None:
    expected = credit_report(model.net, batches)
    assert report.n_samples == expected.n_samples
    np.testing.assert_allclose(report.credit, expected.credit, atol=1e-6)
    np.testing.assert_allclose(report.r2, expected.r2, atol=1e-6)


def trained(folder: Any, model: LitNet, monitor: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, [monitor], **options)
    trainer.fit(model, *loaders())
    assert hooks_on(model) == 0
    return trainer


# The last of the four batches is a smaller one.
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_batch_without_a_pass_is_left_out(tmp_path: Any, place: int) -> None:
    monitor, model = monitor_of(), Skips(lambda epoch, i: epoch > 0 and i == place)
    trained(tmp_path, model, monitor)
    rest = without(place)
    assert [report.n_samples for report in monitor.history] == [160, *[sum(map(len, rest))] * 2]
    assert [report.notes for report in monitor.history] == [()] * 3
    check(newest(monitor), model, rest)
    assert newest(monitor).effects is not None


def test_a_batch_without_a_pass_is_left_out_of_a_compiled_network_too(tmp_path: Any) -> None:
    monitor, model = monitor_of(), Skips(lambda _, i: i == 0)
    model.net = torch.compile(model.net, backend="eager")
    trained(tmp_path, model, monitor, max_epochs=1)
    model.net = model.net._orig_mod
    check(newest(monitor), model, without(0))


def test_validation_alone_leaves_such_a_batch_out(tmp_path: Any) -> None:
    monitor, model = monitor_of(), Skips(lambda _, i: i == 0)
    quiet_trainer(tmp_path, [monitor]).validate(model, loaders()[1], verbose=False)
    check(newest(monitor), model, without(0))


def test_validation_alone_that_runs_nothing_has_no_report(tmp_path: Any) -> None:
    monitor = monitor_of()
    with pytest.raises(ValueError, match="no component ran in the forward pass"):
        quiet_trainer(tmp_path, [monitor]).validate(Skips(lambda *_: True), loaders()[1], verbose=False)


def test_samples_that_a_sampler_repeats_stay_uncounted(tmp_path: Any) -> None:
    monitor, model = monitor_of(), Skips(lambda _, i: i == 0)
    # Of the 53 samples of each process the last one of this is the first again.
    data = dataset(105, seed=1)
    sampler = DistributedSampler(data, num_replicas=2, rank=1, shuffle=False)
    loader = DataLoader(data, 10, sampler=sampler)
    quiet_trainer(tmp_path, [monitor]).validate(model, loader, verbose=False)
    check(newest(monitor), model, list(data.tensors[0][1::2][10:].split(10)))


def test_an_error_of_a_hook_is_no_batch_without_a_pass(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> None:
        raise ArithmeticError("ours")

    monkeypatch.setattr(callback.Measurement, "_keep", breaks)
    with pytest.raises(ArithmeticError, match="ours"):
        quiet_trainer(tmp_path, [monitor_of()]).validate(LitNet(), loaders()[1], verbose=False)


def test_one_validation_that_runs_nothing_is_no_reason_for_other_samples(tmp_path: Any) -> None:
    monitor, model = monitor_of(), Skips(lambda epoch, _: epoch > 0)
    with pytest.warns(UserWarning, match="validation ran no component in one epoch, which has no"):
        trained(tmp_path, model, monitor)
    # What was validated at step 4 is run again with the final weights.
    assert [report.step for report in monitor.history] == [4, 12]
    assert not any("training steps" in note for note in newest(monitor).notes)
    check(newest(monitor), model, without())


ABOUT_TRAINING = (
    "so this is about samples of training steps, whose calls were run once more in eval mode"
)


def test_a_report_on_training_steps_says_so(tmp_path: Any) -> None:
    for why, options in (
        ("validation runs no component", {}),
        ("there is no validation loop", {"limit_val_batches": 0}),
    ):
        monitor, model = monitor_of(), Skips(lambda *_: True)
        with pytest.warns(UserWarning, match=f"{why}, so Koopman credit is about training steps"):
            trained(tmp_path, model, monitor, max_epochs=2, **options)
        assert [report.notes for report in monitor.history] == [(f"{why}, {ABOUT_TRAINING}",)] * 2
        check(newest(monitor), model, list(dataset().tensors[0].split(40)))


class Counted(KoopmanCreditMonitor):
    """Takes the place of one of two processes, of which the other runs nothing either."""

    def _begin(self, *given: Any, **more: Any) -> None:
        super()._begin(*given, **more)
        self.sync_pending = not self._why_training


def test_processes_find_alike_that_validation_runs_nothing(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(*_: Any) -> None:
        raise NoSamplesError("no sample arrived: the batches were empty in every process")

    asked: list[bool] = []

    def gather(value: bool) -> list[bool]:
        asked.append(value)
        return [value, True]

    monkeypatch.setattr(callback, "merge_processes", nobody)
    monkeypatch.setattr(callback, "gather", gather)
    monitor = Counted(on_error="raise", figures=False)
    with pytest.warns(UserWarning, match="validation runs no component, so Koopman credit"):
        trained(tmp_path, Skips(lambda *_: True), monitor, max_epochs=1)
    assert asked == [True]
    assert newest(monitor).n_samples == 160


def test_what_deals_samples_out_to_processes_is_told_by_the_loader() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(torch.zeros(3, 8))

    data = dataset()
    sampler = DistributedSampler(data, num_replicas=2, rank=0)
    batches = BatchSampler(sampler, 10, drop_last=False)
    assert is_dealt_out(DataLoader(data, 10, sampler=sampler))
    assert is_dealt_out(DataLoader(data, batch_sampler=batches))
    assert not any(map(is_dealt_out, (DataLoader(data, 10), DataLoader(Stream()), [torch.zeros(3, 8)])))


@pytest.mark.parametrize("count", [1, 2])
def test_a_note_says_where_samples_may_count_several_times(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(callback, "data_part", lambda _: DataPart(0, count))
    monitor = monitor_of()
    quiet_trainer(tmp_path, [monitor]).validate(LitNet(), loaders()[1], verbose=False)
    told = [note for note in newest(monitor).notes if note.startswith("no DistributedSampler deals")]
    assert len(told) == count - 1
