"""Validation data that come sorted, as images in a folder per class, are looked at from everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from lit import LitNet, dataset, quiet_trainer
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_koopman import KoopmanCreditMonitor, component_effects, credit_report
from lightning_koopman.network.runs.samples import spread_over

pytestmark = pytest.mark.filterwarnings("ignore:the Trainer has no logger")


class Counting(LitNet):
    """Remembers the rows of every batch that is validated."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[torch.Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.rows.append(batch[0])
        super().validation_step(batch, batch_idx)


def by_class(n_samples: int) -> TensorDataset:
    x, y = dataset(n_samples, seed=1).tensors
    order = y.argsort(stable=True)
    return TensorDataset(x[order], y[order])


def fitted(folder: Any, loader: Any, **options: Any) -> tuple[Any, Counting]:
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False, **options)
    trainer = quiet_trainer(folder, [monitor], max_epochs=3)
    model = Counting()
    trainer.fit(model, DataLoader(dataset(), 40), loader)
    return monitor, model


def test_effects_are_about_all_classes(tmp_path: Any) -> None:
    validation = by_class(3000)
    monitor, model = fitted(tmp_path, DataLoader(validation, 50))
    found = monitor.report.effects
    assert found.n_samples == 500
    truth = component_effects(model.net.eval(), DataLoader(validation, 50), samples=3000)
    assert truth.n_samples == 3000
    assert found.scale == truth.scale == "kl"
    assert found.metric_before == pytest.approx(truth.metric_before, abs=0.05)
    assert found.values["skip"] == pytest.approx(truth.values["skip"], rel=0.1)
    assert found.metric["skip"] == pytest.approx(truth.metric["skip"], abs=0.05)
    # Of the first batches all are of one class, which the skipped head gives or does not.
    first = component_effects(model.net, [validation[:500]])
    assert abs(first.metric["skip"] - truth.metric["skip"]).max() > 0.3


def test_so_many_batches_at_even_distances_are_watched(tmp_path: Any) -> None:
    watched: list[torch.Tensor] = []

    class Watching(KoopmanCreditMonitor):
        def on_validation_batch_end(self, *given: Any, **more: Any) -> None:
            if self._in_batch:
                watched.append(given[3][0])
            super().on_validation_batch_end(*given, **more)

    torch.manual_seed(0)
    monitor = Watching(on_error="raise", figures=False, max_samples=200)
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=1, num_sanity_val_steps=0)
    model = Counting()
    trainer.fit(model, DataLoader(dataset(), 40), DataLoader(by_class(1000), 25))
    assert monitor.report.n_samples == 200
    # Eight of forty, none of them the last, which may repeat what other processes have.
    assert len(model.rows) == 40
    numbers = [next(i for i, rows in enumerate(model.rows) if rows is seen) for seen in watched]
    assert numbers == [2, 7, 12, 17, 22, 27, 32, 37]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(by_class(1000))  # type: ignore[arg-type]


def test_where_nobody_knows_how_many_there_are_the_first_are_watched(tmp_path: Any) -> None:
    monitor, _ = fitted(tmp_path, DataLoader(Stream(), 25), max_samples=200)
    assert monitor.report.n_samples == 200


class Pairs(LitNet):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch[0] if isinstance(batch[0], list) else batch, batch_idx)


@pytest.mark.parametrize("mode", ["sequential", "min_size", "max_size_cycle"])
def test_of_several_loaders_as_many_samples_are_watched(mode: Any, tmp_path: Any) -> None:
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False, max_samples=200)
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=1)
    given = [DataLoader(by_class(n), 25) for n in (1000, 250)]
    trainer.fit(Pairs(), DataLoader(dataset(), 40), CombinedLoader(given, mode))
    assert monitor.report.n_samples == 200


def test_bases_are_fitted_to_samples_from_everywhere(tmp_path: Any) -> None:
    validation, size = by_class(400), 2 * 8
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False, max_dim=8)
    torch.manual_seed(0)
    quiet_trainer(tmp_path, [monitor]).validate(
        model := LitNet(width=40), DataLoader(validation, 25), verbose=False
    )
    found, first = monitor.report, spread_over(size, 400)
    others = [i for i in range(400) if i not in first]
    expected = credit_report(model.net, [validation[first + others]], max_dim=8)
    assert found.variance_kept == pytest.approx(expected.variance_kept, abs=1e-6)
    assert found.credit == pytest.approx(expected.credit, abs=1e-5)
    # The first ones are of one class.
    apart = credit_report(model.net, [validation[:]], max_dim=8)
    assert abs(apart.credit - expected.credit).max() > 0.01


def test_a_validation_by_itself_is_watched_at_even_distances(tmp_path: Any) -> None:
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False, max_samples=200)
    trainer = quiet_trainer(tmp_path, [monitor])
    torch.manual_seed(0)
    trainer.validate(model := LitNet(), DataLoader(by_class(1000), 25), verbose=False)
    rows = torch.arange(1000).split(25)
    taken = torch.cat([rows[i] for i in spread_over(8, 40)])
    expected = credit_report(model.net, [by_class(1000)[taken]])
    assert monitor.report.credit == pytest.approx(expected.credit, abs=1e-6)
