"""The last report is about the weights that a training ends with, or says that it is not."""

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lit import Stops, quiet_trainer
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, TensorDataset

from lightning_koopman import CreditReport, KoopmanCreditMonitor, credit_report
from lightning_koopman.callback.watched_state import have_changed, weight_sums

ROWS = torch.randn(320, 6, generator=torch.Generator().manual_seed(5))


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Halves(L.Callback):
    """Changes a layer when training ends."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with torch.no_grad():
            pl_module.net[2].weight[:, :4].mul_(0.5)


def trained(folder, *callbacks: L.Callback, net: type[Net] = Net, epochs: int = 2) -> Net:
    torch.manual_seed(0)
    model = net()
    loader = DataLoader(TensorDataset(ROWS), 40)
    logger = CSVLogger(folder)
    trainer = quiet_trainer(folder, list(callbacks), max_epochs=epochs, logger=logger)
    trainer.fit(model, loader, loader)
    return model


def of_final_weights(model: Net) -> CreditReport:
    return credit_report(model, ROWS.split(40))


def pruning() -> L.Callback:
    return ModelPruning("l1_unstructured", amount=0.3)


def averaging() -> L.Callback:
    found = pytest.importorskip(
        "lightning.pytorch.callbacks.weight_averaging", reason="this Lightning has no WeightAveraging"
    )
    return found.EMAWeightAveraging(decay=0.9)


@pytest.mark.parametrize("ours_first", [True, False])
def test_weights_that_were_pruned_after_the_last_validation_are_measured(ours_first, tmp_path):
    monitor = KoopmanCreditMonitor(on_error="raise")
    model = trained(tmp_path, *[monitor, pruning()][:: 1 if ours_first else -1])
    expected = of_final_weights(model)
    validated, final = monitor.history[-2:]
    assert [validated.step, final.step] == [16, 16]
    assert final.credit == pytest.approx(expected.credit, abs=1e-6)
    assert abs(validated.credit - expected.credit).max() > 1e-2
    assert final.effects is not None
    assert any("were changed after the last measurement" in note for note in final.notes)


@pytest.mark.parametrize("ours_first", [True, False])
def test_averaged_weights_are_measured_once_and_have_effects(ours_first, tmp_path):
    monitor = KoopmanCreditMonitor(on_error="raise")
    model = trained(tmp_path, *[monitor, averaging()][:: 1 if ours_first else -1])
    assert [report.step for report in monitor.history] == [8, 16]
    assert monitor.report.credit == pytest.approx(of_final_weights(model).credit, abs=1e-6)
    assert monitor.report.effects is not None
    assert not any("weights" in note for note in monitor.report.notes)


class Scaled(Net):
    """Adds a branch that trained weights multiply by unit, and goes on with a function of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.2, 1, 5))
        self.branch = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.net[2](self.net[1](self.net[0](x)))
        return self.net[4](torch.tanh(x + self.scale * self.branch(x)))


def test_what_branches_are_weighed_with_is_told_anew_where_it_was_changed(tmp_path):
    def end(trainer: L.Trainer, pl_module: Any) -> None:
        with torch.no_grad():
            pl_module.scale.mul_(-2)

    monitor = KoopmanCreditMonitor(on_error="raise")
    model = trained(tmp_path, LambdaCallback(on_train_end=end), monitor, net=Scaled)
    expected = of_final_weights(model)
    assert expected.reads["sum into net.4"] == ("sum into tanh()",)
    assert monitor.report.reads == expected.reads
    assert monitor.report.credit == pytest.approx(expected.credit, abs=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        Halves,
        lambda: LambdaCallback(on_train_end=Halves().on_train_end),
        lambda: StochasticWeightAveraging(0.1, swa_epoch_start=1),
    ],
)
def test_what_another_callback_makes_of_the_weights_in_the_end(other, tmp_path):
    monitor = KoopmanCreditMonitor(on_error="raise")
    model = trained(tmp_path, other(), monitor)
    assert monitor.report.credit == pytest.approx(of_final_weights(model).credit, abs=1e-6)
    assert monitor.report.effects is not None
    # Behind the monitor, it is too late.
    monitor = KoopmanCreditMonitor(on_error="raise")
    with pytest.warns(UserWarning, match="list the monitor behind what changes them"):
        model = trained(tmp_path, monitor, other())
    assert abs(monitor.report.credit - of_final_weights(model).credit).max() > 1e-3
    assert "which is not about the final ones" in monitor.report.notes[-1]


def test_a_module_that_changes_its_weights_when_training_ends(tmp_path):
    class Shrinks(Net):
        def on_train_end(self) -> None:
            Halves().on_train_end(self.trainer, self)

    monitor = KoopmanCreditMonitor(on_error="raise")
    with pytest.warns(UserWarning, match=r"behind what changes them \(Shrinks\)"):
        trained(tmp_path, monitor, net=Shrinks)


def test_effects_are_not_measured_on_weights_that_are_not_final_and_were_not_measured(tmp_path):
    class Swaps(L.Callback):
        """Halves a layer behind the last validation, and doubles it when all is over."""

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                Halves().on_train_end(trainer, pl_module)

        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            with torch.no_grad():
                pl_module.net[2].weight[:, :4].mul_(2)

    monitor = KoopmanCreditMonitor(every_n_epochs=2, on_error="raise")
    model = trained(tmp_path, monitor, Swaps(), Stops(), epochs=9)
    assert [report.step for report in monitor.history] == [8, 16]
    assert monitor.report.credit == pytest.approx(of_final_weights(model).credit, abs=1e-6)
    assert monitor.report.effects is None
    assert "effects were not measured: the weights are others" in monitor.report.notes[-1]


def test_caches_and_counters_are_no_weights(tmp_path):
    class Counts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("passes", torch.zeros((), dtype=torch.long))
            self.register_buffer("cache", torch.zeros(40, 6), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            self.cache = x.clone()
            return super().forward(x)

        def on_train_epoch_end(self) -> None:
            self.passes += 1
            self.cache = torch.ones(40, 6)

    monitor = KoopmanCreditMonitor(on_error="raise")
    trained(tmp_path, monitor, net=Counts)
    assert [report.step for report in monitor.history] == [8, 16]


def told(*tensors: Tensor, strategy: str = "DDPStrategy") -> list[Tensor]:
    module = nn.Module()
    for i, tensor in enumerate(tensors):
        module.register_buffer(f"x{i}", tensor)
    return weight_sums(SimpleNamespace(strategy=type(strategy, (), {})()), module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_sums_tell_a_change(dtype):
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    zero, negative = x.clone(), -x
    zero[3, 4] = 0
    assert not have_changed(told(x), told(x.clone()))
    assert have_changed(told(x), told(zero))
    assert have_changed(told(x), told(negative))
    assert have_changed(told(x), told(x, x))


def test_sums_of_what_is_not_a_number_or_marks():
    odd = torch.tensor([1.0, torch.nan, torch.inf])
    assert not have_changed(told(odd), told(odd))
    marks = torch.tensor([True, False, True])
    assert have_changed(told(marks), told(~marks))
    assert told(torch.arange(3)) == []


def test_a_mask_made_permanent_changes_nothing_and_another_one_does():
    layer = nn.Linear(6, 4)
    trainer = SimpleNamespace(strategy=type("DDPStrategy", (), {})())
    masked = weight_sums(trainer, prune.l1_unstructured(layer, "weight", amount=0.3))
    prune.l1_unstructured(layer, "weight", amount=0.3)
    more = weight_sums(trainer, layer)
    assert have_changed(masked, more)
    assert not have_changed(more, weight_sums(trainer, prune.remove(layer, "weight")))


def test_sharded_weights_are_not_told():
    assert told(torch.ones(3), strategy="FSDPStrategy") == []


class OnRows(L.LightningModule):
    """Says of each batch which rows are one sample's, or which positions hold data."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(3, 6), nn.Linear(6, 2), kind
        self.inner = nn.GRU(6, 6, batch_first=True) if kind == "packed" else nn.Linear(6, 6)
        self.prompt = nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.first(x)
        if self.kind == "prompts":
            return self.last(self.inner(torch.cat([self.prompt.expand(len(x), -1, -1), h], 1)).tanh())
        if self.kind == "graphs":
            nodes, count = self.inner(h).tanh(), int(attention_mask[-1]) + 1
            return self.last(nodes.new_zeros(count, 6).index_add(0, attention_mask, nodes))
        lengths = x.any(dim=2).sum(1)
        packed = pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
        return self.last(pad_packed_sequence(self.inner(packed)[0], True, total_length=7)[0].mean(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(**batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(**batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize("kind", ["graphs", "packed", "prompts"])
def test_what_the_first_pass_told_of_rows_holds_for_the_final_weights(tmp_path, kind):
    torch.manual_seed(0)
    batches = []
    for _ in range(6):
        sizes = torch.randint(2, 7, (60,))
        x, mask = torch.randn(60, 7, 3), torch.arange(7) < sizes[:, None]
        given = {"x": x * mask[..., None], "attention_mask": mask.long() if kind == "prompts" else x}
        if kind == "graphs":
            given = {"x": x[mask], "attention_mask": torch.arange(60).repeat_interleave(sizes)}
        batches.append(given)
    model, monitor = OnRows(kind), KoopmanCreditMonitor(max_overhead=1e6)
    of_run: Any = {"max_epochs": 3, "check_val_every_n_epoch": 2, "logger": CSVLogger(tmp_path)}
    trainer = quiet_trainer(tmp_path, [monitor], **of_run)
    trainer.fit(model, *[DataLoader(batches, batch_size=None)] * 2)
    expected = credit_report(model, batches, max_samples=None)
    assert [report.step for report in monitor.history] == [12, 18]
    assert monitor.report.credit == pytest.approx(expected.credit, abs=1e-6)
    told = [[n for n in r.notes if "averaged" in n] for r in (monitor.report, expected)]
    assert told[0] == told[1]
    assert bool(told[0]) == (kind != "packed")
