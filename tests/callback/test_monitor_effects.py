"""Effects that are measured on the calls that a training makes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.demos.transformer import LightningTransformer
from lit import LitNet, dataset, loaders, quiet_trainer
from scipy.stats import poisson
from small import wired
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_koopman import KoopmanCreditMonitor, component_effects
from lightning_koopman.callback.recorded_effects import labels_in, pooled
from lightning_koopman.effects.scoring import kl_divergence
from lightning_koopman.effects.targets import Fit, are_scores, may_be_scores

pytestmark = pytest.mark.filterwarnings("ignore:the Trainer has no logger")


def trained(folder: Any, model: LitNet, **given: Any) -> tuple[KoopmanCreditMonitor, Any]:
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False, **given)
    trainer = quiet_trainer(folder, [monitor], max_epochs=2)
    trainer.fit(model, *loaders())
    return monitor, trainer


def test_the_effects_of_the_last_report_are_those_of_the_trained_network(tmp_path: Any) -> None:
    monitor, trainer = trained(tmp_path, LitNet(), every_n_epochs=1)
    assert monitor.report is not None
    found = monitor.report.effects
    assert found is not None
    net = trainer.lightning_module.net
    expected = component_effects(net, loaders()[1])
    assert found.components == tuple(f"net.{name}" for name in expected.components)
    assert found.scale == expected.scale == "kl"
    assert found.values["skip"] == pytest.approx(expected.values["skip"], rel=1e-4)
    assert found.stderr["skip"] == pytest.approx(expected.stderr["skip"], rel=1e-3)
    assert found.metric_before == expected.metric_before
    assert found.metric["skip"] == pytest.approx(expected.metric["skip"])
    assert found.metric_stderr["skip"] == pytest.approx(expected.metric_stderr["skip"])
    assert found.n_samples == expected.n_samples == len(dataset(seed=1))
    assert "of accuracy" in str(monitor.report)
    for name, value in zip(found.components, found.values["skip"], strict=True):
        assert float(trainer.callback_metrics[f"koopman/skip/{name}"]) == pytest.approx(value)


class Pooling(LitNet):
    """Calls a block and the pooling behind it itself, each on its own."""

    def __init__(self) -> None:
        super().__init__()
        conv = (nn.Conv1d(4, 4, 3, padding=1) for _ in range(3))
        blocks = (around(layer) for layer in conv)
        self.net = nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.repeat(1, 4).view(-1, 4, 8)
        for part in self.net:
            x = part(x)
        return x


def around(layer: nn.Module) -> nn.Module:
    return wired(lambda self, x: torch.tanh(x + self.layer(x)), layer=layer)


def test_pooling_that_was_called_apart_runs_on_what_the_skipped_block_takes(tmp_path: Any) -> None:
    monitor, trainer = trained(tmp_path, Pooling())
    assert monitor.report is not None
    found, model = monitor.report.effects, trainer.lightning_module.eval()
    assert found is not None
    assert found.components == ("net.0", "net.1", "net.2", "net.5")
    x = dataset(seed=1).tensors[0]
    with torch.no_grad():
        logits, skipped = model(x), model.net[3:](model.net[:2](x.repeat(1, 4).view(-1, 4, 8)))
    expected = kl_divergence(logits, skipped).mean()
    assert found.scale == "kl"
    assert found.values["skip"][2] == pytest.approx(float(expected), rel=1e-4)


class Popping(LitNet):
    """Takes its targets out of the batch and changes them, as steps may."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step((batch["x"], batch["labels"]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        labels = batch.pop("labels")
        self.net(batch["x"])
        labels.fill_(0)


def named(samples: list[Any]) -> dict[str, torch.Tensor]:
    x, y = zip(*samples, strict=True)
    return {"x": torch.stack(x), "labels": torch.stack(y)}


def test_targets_are_those_that_the_step_was_given(tmp_path: Any) -> None:
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=2)
    batches = [DataLoader(dataset(seed=seed), batch_size=40, collate_fn=named) for seed in (0, 1)]
    trainer.fit(Popping(), *batches)
    assert monitor.report is not None
    assert monitor.report.effects is not None
    assert monitor.report.effects.scale == "kl"
    expected = component_effects(trainer.lightning_module.net, loaders()[1])
    assert monitor.report.effects.metric_before == pytest.approx(expected.metric_before)


class Paired(LitNet):
    """Takes two inputs of a batch, or the first alone, twice."""

    def __init__(self, *, both: bool) -> None:
        super().__init__()
        self.both = both

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.net(x + 0.5 * other)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self(batch[0], batch[1] if self.both else batch[0])
        return nn.functional.cross_entropy(logits, batch[2])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.training_step(batch, batch_idx)


@pytest.mark.parametrize("both", [True, False])
def test_labels_behind_other_numbers_are_targets_where_the_network_takes_those(
    both: bool, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    x, y = dataset().tensors
    loader = DataLoader(TensorDataset(x, torch.randn(len(x), 8), y), batch_size=40)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=2)
    trainer.fit(model := Paired(both=both), loader, loader)
    assert monitor.report is not None
    found = monitor.report.effects
    assert found is not None
    if not both:
        assert (found.scale, found.metric) == ("relative", {})
        return
    with torch.no_grad():
        right = torch.cat([model.eval()(*batch[:2]).argmax(1) == batch[2] for batch in loader])
    expected = component_effects(model, loader)
    assert found.scale == expected.scale == "kl"
    assert found.metric_before == expected.metric_before == pytest.approx(float(right.double().mean()))
    assert found.values["skip"] == pytest.approx(expected.values["skip"], rel=1e-4)


class Autoencoder(LitNet):
    """Has class indices beside its inputs, and no class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.net[6] = nn.Linear(12, 8)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.net(batch[0]) - batch[0]).square().mean()

    validation_step = training_step  # type: ignore[assignment]


def test_an_autoencoder_on_labelled_data_has_relative_effects_and_says_why(tmp_path: Any) -> None:
    monitor, trainer = trained(tmp_path, Autoencoder())
    assert monitor.report is not None
    found = monitor.report.effects
    assert found is not None
    inputs = [x for x, _ in loaders()[1]]
    expected = component_effects(trainer.lightning_module.net, inputs)
    assert found.scale == expected.scale == "relative"
    assert found.values["skip"] == pytest.approx(expected.values["skip"], rel=1e-4)
    assert found.notes == (
        "the integer targets of the batches are no classes of the outputs, so changes are relative",
    )


def test_outputs_are_class_scores_only_where_all_recorded_calls_say_so() -> None:
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    scores = nn.functional.one_hot(y, 3).float()
    assert are_scores([Fit.of([scores, scores], [y, y])])
    # Whatever does not fit in one call, or in one process, decides for all.
    for outputs, targets in (
        ([scores, scores], [y, y + 1]),
        ([scores, scores], [y, y - 1]),
        ([scores, scores], [y, None]),
        ([scores, scores], [y, y[:3]]),
        ([scores, scores[:, :2]], [y, y]),
        ([scores[:, :1]], [torch.zeros(6, dtype=torch.long)]),
        ([scores[..., None]], [y]),
        ([scores[0]], [y[:3]]),
    ):
        assert not are_scores([Fit.of(outputs, targets)])
        assert not are_scores([Fit.of([scores], [y]), Fit.of(outputs, targets)])
    assert not are_scores([])
    # What is marked as having no target tells nothing, and keeps the others from nothing.
    partly = torch.tensor([0, -100, 2, -100, 1, -100])
    assert are_scores([Fit.of([scores], [partly])])
    assert (Fit.of([scores], [partly]).right, Fit.of([scores], [partly]).n_targets) == (3, 3)
    assert not are_scores([Fit.of([scores], [torch.full((6,), -100)])])


def test_wide_outputs_are_class_scores_where_they_name_the_targets() -> None:
    """A validation set that lacks most classes, as 512 images of a thousand do."""
    y = torch.arange(50) % 5
    wide = nn.functional.one_hot(y, 1000).float()
    assert are_scores([Fit.of([wide], [y])])
    # No better than to name the most frequent target always.
    assert not are_scores([Fit.of([wide[:1].expand(50, -1)], [y])])
    assert not are_scores([Fit.of([wide.roll(100, 1)], [y])])
    # Two processes with half of the samples each know as much as one.
    halves = [Fit.of([wide[i::2]], [y[i::2]]) for i in (0, 1)]
    assert are_scores(halves)
    # The last class may be in another process.
    assert are_scores([Fit(3, 1, 5, 0), Fit(3, 2, 5, 0)])
    assert not are_scores([Fit(4, 1, 5, 0), Fit(4, 2, 5, 0)])


@pytest.mark.parametrize("usual", [1, 5, 50, 500])
def test_scores_name_more_targets_than_chance_gives_once_in_a_million(usual: int) -> None:
    """By the exact chance where so many are expected, which is bounded from above."""
    fits = (Fit(2000, 5, usual, right, 1000) for right in range(1000))
    least = next(fit.right for fit in fits if are_scores([fit]))
    assert 1e-8 < poisson.sf(least - 1, usual) < 1e-6


@pytest.mark.parametrize(
    ("fit", "may"),
    [
        # Up to four outputs per class.
        (Fit(8, 1, 5, 0, 9), True),
        (Fit(9, 1, 5, 0, 9), False),
        # More outputs than there are targets to tell more classes.
        (Fit(9, 1, 5, 0, 8), True),
        # Named more than twice as often as by chance, and more often than the most frequent.
        (Fit(9, 1, 1, 2, 9), False),
        (Fit(9, 1, 1, 3, 9), True),
        (Fit(9, 1, 3, 3, 9), False),
        (Fit(9, 0, 9, 3, 9), True),
        (Fit(marked=True), True),
        (Fit(), False),
    ],
)
def test_outputs_may_be_scores_of_classes_that_are_few_beside_them(fit: Fit, may: bool) -> None:
    assert may_be_scores([fit]) is may


@pytest.mark.parametrize(
    "target", [torch.zeros(4), torch.tensor(1), torch.zeros(4, dtype=torch.bool), "words"]
)
def test_what_is_no_class_is_not_kept(target: Any) -> None:
    assert labels_in((torch.zeros(4, 8), target)) == {}
    assert labels_in([torch.zeros(4, 8)]) == {}


class Tagger(LitNet):
    """Names a class for each position of a sequence: of its own token, or the next token."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.net = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 9))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits, labels = self.net(batch["input_ids"]), batch["labels"].flatten(1)
        if self.kind == "causal":
            logits, labels = logits[:, :-1], labels[:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def sentences(kind: str, seed: int, columns: int = 0) -> DataLoader:
    """Sequences of six tokens, each one more than that before it, of which some end in padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.randint(9, (320, 1), generator=generator) + torch.arange(6)) % 9
    labels = ids.clone() if kind == "causal" else (2 * ids) % 9
    labels[torch.randint(2, (320,), generator=generator) == 1, 4:] = -100
    labels = labels.reshape(*labels.shape, *[1] * columns)
    pairs = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    return DataLoader(pairs, batch_size=40)  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [0, 1])
@pytest.mark.parametrize("kind", ["causal", "tags"])
def test_of_sequences_the_positions_that_are_targets_count(
    kind: str, columns: int, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=2)
    trainer.fit(Tagger(kind), *(sentences(kind, seed, columns) for seed in (0, 1)))
    assert monitor.report is not None
    found = monitor.report.effects
    assert found is not None
    expected = component_effects(trainer.lightning_module.net, sentences(kind, 1), forward_fn=on_ids)
    assert found.scale == expected.scale == "kl"
    assert found.values["skip"] == pytest.approx(expected.values["skip"], rel=1e-4)
    assert found.stderr["skip"] == pytest.approx(expected.stderr["skip"], rel=1e-3)
    assert found.metric_before == pytest.approx(expected.metric_before)
    assert not found.notes


class Tabular(LitNet):
    """Takes labels as a column, as loaders of tables give them."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step((batch[0], batch[1].flatten()), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step((batch[0], batch[1].flatten()), batch_idx)


def test_labels_as_a_column_are_labels(tmp_path: Any) -> None:
    found = []
    for columns in (0, 1):
        torch.manual_seed(0)
        monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
        trainer = quiet_trainer(tmp_path, [monitor], max_epochs=2)
        sets = [dataset(seed=seed).tensors for seed in (0, 1)]
        loaders = [DataLoader(TensorDataset(x, y.reshape(-1, *[1] * columns)), 40) for x, y in sets]
        trainer.fit(Tabular(), *loaders)
        assert monitor.report is not None
        assert monitor.report.effects is not None
        found.append(monitor.report.effects)
        net, (x, y) = trainer.lightning_module.net.eval(), sets[1]
        with torch.no_grad():
            right = float((net(x).argmax(1) == y).double().mean())
        assert found[-1].metric_before == pytest.approx(right)
    flat, column = found
    assert flat.scale == column.scale == "kl"
    for name in ("values", "stderr", "metric", "metric_stderr"):
        assert np.array_equal(getattr(flat, name)["skip"], getattr(column, name)["skip"])
    assert flat.notes == column.notes == ()


class Counting(LitNet):
    """Predicts whole numbers by a single output."""

    def __init__(self) -> None:
        super().__init__()
        self.net[6] = nn.Linear(12, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    validation_step = training_step  # type: ignore[assignment]


def test_a_column_of_counts_beside_a_single_output_is_no_column_of_labels(tmp_path: Any) -> None:
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=2)
    sets = [dataset(seed=seed).tensors for seed in (0, 1)]
    trainer.fit(Counting(), *(DataLoader(TensorDataset(x, y[:, None]), 40) for x, y in sets))
    assert monitor.report is not None
    found = monitor.report.effects
    assert found is not None
    expected = component_effects(trainer.lightning_module.net, sets[1][0].split(40))
    assert (found.scale, found.notes) == ("relative", ())
    assert found.values["skip"] == pytest.approx(expected.values["skip"], rel=1e-4)


class Codes(nn.Module):
    """Returns a latent, what is decoded of it, and a mixture of it with what another head gives."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec, self.cls = nn.Linear(8, 5), nn.Linear(5, 8), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> Any:
        z = self.enc(x).tanh()
        return z, self.dec(z), z[:, :2] * self.cls(z)


class Coding(LitNet):
    def __init__(self) -> None:
        super().__init__()
        self.net = Codes()  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        _, decoded, mixed = self.net(batch[0])
        return (decoded - batch[0]).square().mean() + mixed.square().mean()

    validation_step = training_step  # type: ignore[assignment]


def test_a_mixture_that_the_network_returns_counts_beside_the_head_at_the_end(tmp_path: Any) -> None:
    """The mean in place of a head moves the one output wholly, and the other not at all."""
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=2)
    x, other = (dataset(seed=seed).tensors[0] for seed in (1, 0))
    trainer.fit(Coding(), *(DataLoader(TensorDataset(part), 160) for part in (other, x)))
    assert monitor.report is not None
    assert monitor.report.components[-1] == "net.dec+output#2"
    found, net = monitor.report.effects, trainer.lightning_module.net.eval()
    assert found is not None
    with torch.no_grad():
        z = net.enc(x).tanh()
        own = z[:, :2] * net.cls(z)
        moved = z[:, :2] * net.cls(z).mean(0) - own
    share = float(moved.square().sum() / (own - own.mean(0)).square().sum())
    skipped = dict(zip(found.components, found.values["skip"], strict=True))
    assert skipped["net.dec"] == pytest.approx(0.5, rel=1e-4)
    assert skipped["net.cls"] == pytest.approx(share / 2, rel=1e-4)
    assert found.notes[0].startswith("effects are averaged over 2 outputs, those of net.dec, output#2")


class Adversaries(LitNet):
    """As Lightning's own template has it: ``forward`` is the generator's, the step judges both."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({
            "make": nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)),
            "judge": nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)),
        })

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net["make"](x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        made, real = self.net["judge"](self(batch[0])), self.net["judge"](batch[1])
        return nn.functional.softplus(-made).mean() + nn.functional.softplus(real).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


def test_calls_beside_a_forward_that_runs_one_part_alone_are_run_again(tmp_path: Any) -> None:
    """The mean in place of a score takes what this score varies by of what both do."""
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=2)
    x = dataset(seed=1).tensors[0]
    real = torch.randn(len(x), 8)
    trainer.fit(Adversaries(), *(DataLoader(TensorDataset(x, real), 80) for _ in range(2)))
    assert monitor.report is not None
    found = monitor.report.effects
    assert found is not None
    # Each in units of its own deviation.
    skipped = dict(zip(found.components, found.values["skip"], strict=True))
    for name in ("net.judge.2", "net.judge.2#1"):
        assert skipped[name] == pytest.approx(0.5, rel=1e-4)
    assert skipped["net.make.0"] > 0


class Words(LightningTransformer):
    """Lightning's own language model, whose pass gives a row per word, on sentences that count."""

    def prepare_data(self) -> None:
        """Download nothing."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.mark.filterwarnings("ignore:.*samples are few")
def test_the_language_model_of_lightnings_demo_has_effects(tmp_path: Any) -> None:
    def sentences(seed: int) -> DataLoader:
        first = torch.randint(60, (80, 1), generator=torch.Generator().manual_seed(seed))
        words = (first + torch.arange(9)) % 60
        return DataLoader(list(zip(words[:, :-1], words[:, 1:], strict=True)), 20)  # type: ignore[arg-type]

    torch.manual_seed(0)
    # All the time that it wants, or a busy machine would leave effects fewer samples.
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False, max_overhead=1e6)
    model = Words(vocab_size=60)
    quiet_trainer(tmp_path, [monitor], max_epochs=1).fit(model, sentences(0), sentences(1))
    assert monitor.report is not None
    found = monitor.report.effects
    assert found is not None
    assert (found.scale, found.n_samples) == ("kl", 80)
    right = []
    with torch.no_grad():
        for words, following in sentences(1):
            best = model.model.eval()(words, following).argmax(-1)
            right.append(best == following.flatten())
    assert found.metric_before == pytest.approx(float(torch.cat(right).double().mean()))
    expected = component_effects(model.model, sentences(1))
    assert found.values["skip"] == pytest.approx(expected.values["skip"], rel=1e-4)


def on_ids(net: nn.Module, batch: Any) -> torch.Tensor:
    return net(batch["input_ids"])


def test_a_map_of_classes_tells_that_outputs_are_scores() -> None:
    """Where two numbers or more are too large for classes, or no shape fits, it tells nothing."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(8, 3, 5, 6, generator=generator)
    classes = scores.argmax(1)
    fit = Fit.of([scores], [classes], by_position=True)
    assert (fit.width, fit.largest, fit.right, fit.n_targets) == (3, 2, 240, 240)
    assert may_be_scores([fit])
    marked = torch.where(classes == 1, 255, classes)
    assert Fit.of([scores], [marked], by_position=True).marked
    assert may_be_scores([Fit.of([scores], [marked], by_position=True)])
    # Foreground and background are two classes, whatever numbers they have.
    for large in (3, 255):
        masks = torch.where(classes == 1, large, 0)
        assert not may_be_scores([Fit.of([scores], [masks], by_position=True)])
    for count in (5, 7):
        others = torch.arange(240).view(8, 5, 6) % count
        assert not may_be_scores([Fit.of([scores], [others], by_position=True)])
    # Other calls have room for other classes.
    fewer = Fit.of([scores, scores[:, :2]], [classes, classes.clamp(max=1)], by_position=True)
    assert not may_be_scores([fewer])
    assert Fit.of([scores], [classes[:, :4]], by_position=True) == Fit(found=False)
    assert not may_be_scores([fit, Fit(found=False)])
    nothing = Fit.of([scores], [torch.full_like(classes, -100)], by_position=True)
    assert (nothing.n_targets, may_be_scores([nothing])) == (0, True)


def test_effects_of_a_training_that_ends_early_are_about_its_last_weights(tmp_path: Any) -> None:
    class Stopping(LitNet):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop = self.current_epoch == 1

    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False, max_overhead=0.0)
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=50)
    trainer.fit(Stopping(), *loaders())
    assert monitor.report is not None
    assert monitor.report.step == trainer.global_step == 8
    assert np.isfinite(monitor.report.stderr["credit"]).all()
    assert monitor.report.effects is not None
    expected = component_effects(trainer.lightning_module.net, loaders()[1])
    assert monitor.report.effects.values["skip"] == pytest.approx(expected.values["skip"], rel=1e-4)


def test_a_network_that_samples_has_no_effects_and_a_note_says_why(tmp_path: Any) -> None:
    class Sampling(LitNet):
        def __init__(self) -> None:
            super().__init__()
            self.net[3] = Noise()

    monitor, _ = trained(tmp_path, Sampling(), every_n_epochs=1)
    assert monitor.report is not None
    assert monitor.report.effects is None
    (note,) = [note for note in monitor.report.notes if "effects" in note]
    assert note.startswith("effects were not measured: ")
    assert "does not give again what it gave" in note


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


def test_none_are_measured_where_none_are_wanted(tmp_path: Any) -> None:
    monitor, trainer = trained(tmp_path, LitNet(), effects=())
    assert monitor.report is not None
    assert monitor.report.effects is None
    assert not [key for key in trainer.callback_metrics if "/skip/" in key]
    assert not [note for note in monitor.report.notes if "effects" in note]


@pytest.mark.parametrize("effects", ["skip", ["skip", "swap"], [None]])
def test_unknown_effects_are_refused(effects: Any) -> None:
    with pytest.raises(ValueError, match=r"effects is .*; give a list of some of"):
        KoopmanCreditMonitor(effects=effects)


def test_processes_average_by_their_samples(tmp_path: Any) -> None:
    monitor, _ = trained(tmp_path, LitNet())
    assert monitor.report is not None
    first = monitor.report.effects
    assert first is not None
    n = first.n_samples
    other = dataclasses.replace(
        first,
        values={"skip": first.values["skip"] + 4},
        stderr={"skip": np.zeros(3)},
        metric={"skip": first.metric["skip"] - 0.4},
        n_samples=3 * n,
    )
    found = pooled([dataclasses.replace(first, stderr={"skip": np.full(3, 0.8)}), other])
    assert found.n_samples == 4 * n
    assert found.metric["skip"] == pytest.approx(first.metric["skip"] - 0.3)
    assert found.metric_before == pytest.approx(first.metric_before)
    assert found.values["skip"] == pytest.approx(first.values["skip"] + 3)
    assert found.stderr["skip"] == pytest.approx(np.full(3, 0.2))
    assert pooled([first]).values["skip"] == pytest.approx(first.values["skip"])
