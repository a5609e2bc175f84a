"""Samples are looked at from everywhere in the data, and loaders are left as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from lightning_koopman import component_effects, credit_report, drift, drop_order
from lightning_koopman.network.runs.samples import SpreadSampler, first_samples, spread, spread_over

NUMBERS = TensorDataset(torch.arange(50))


@given(st.integers(1, 3000), st.floats(0, 1))
def test_whatever_comes_first_is_spread_over_all(size: int, share: float) -> None:
    order = list(SpreadSampler(size))
    assert sorted(order) == list(range(size))
    assert len(SpreadSampler(size)) == size
    count = max(1, round(share * size))
    edges = [0, *sorted(order[:count]), size]
    widest = max(b - a for a, b in pairwise(edges))
    # Even distances would be size / count.
    assert widest <= 3 * size / count + 1


@given(st.integers(1, 300), st.integers(1, 300))
def test_so_many_at_even_distances(count: int, size: int) -> None:
    found = spread_over(count, size)
    assert found == sorted(set(found))
    assert len(found) == min(count, size)
    distances = {b - a for a, b in pairwise(found)}
    assert len(distances) < 3
    if count < size:
        assert max(found) < size - 1
        # As far from the beginning as from the end.
        assert abs(found[0] - (size - 1 - found[-1])) <= size / count


def given_by(loader: Any) -> list[list[int]]:
    return [batch[0].tolist() if batch[0].ndim else [int(batch[0])] for batch in loader]


def test_samples_of_a_loader_that_goes_through_its_data_in_order() -> None:
    loader = DataLoader(NUMBERS, 8, drop_last=True)
    before = dict(vars(loader))
    found = given_by(spread(loader, 20))
    assert [len(batch) for batch in found] == [8] * 6
    assert [*chain(*found)] == list(SpreadSampler(50))[:48]
    # Of every fifth of the data, a fifth of the first batch, or one beside it.
    assert all(1 <= sum(10 * k <= i < 10 * k + 10 for i in found[0]) <= 2 for k in range(5))
    assert vars(loader) == before
    assert given_by(loader) == [list(range(8 * k, 8 * k + 8)) for k in range(6)]
    assert spread(loader, 50) is loader
    assert given_by(spread(loader, None)) == found


def test_what_a_loader_collates_and_batches_stays() -> None:
    def summed(samples: list[tuple[Tensor]]) -> list[Tensor]:
        return [torch.stack([x for (x,) in samples]).sum()]

    order = list(SpreadSampler(50))
    by_hand = DataLoader(
        NUMBERS, batch_sampler=BatchSampler(SequentialSampler(NUMBERS), 20, False), collate_fn=summed
    )
    assert given_by(spread(by_hand, 20)) == [[sum(order[k : k + 20])] for k in (0, 20, 40)]
    assert given_by(spread(DataLoader(NUMBERS, batch_size=None), None)) == [[i] for i in order]


def test_a_persistent_iterator_of_the_users_is_left_alone() -> None:
    loader = DataLoader(NUMBERS, 10, num_workers=1, persistent_workers=True)
    own = iter(loader)
    first = next(own)[0].tolist()
    assert [*chain(*given_by(spread(loader, None)))] == list(SpreadSampler(50))
    assert loader._iterator is own
    assert [*first, *chain(*given_by(own))] == list(range(50))


class Stream(IterableDataset[tuple[Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor]]:
        return iter(NUMBERS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(NUMBERS, 8, shuffle=True),
        lambda: DataLoader(NUMBERS, batch_sampler=[[3, 1], [2, 0]]),
        lambda: DataLoader(NUMBERS, batch_sampler=BatchSampler(RandomSampler(NUMBERS), 8, False)),
        lambda: DataLoader(Stream(), 8),
        lambda: iter([torch.zeros(2)]),
        lambda: (torch.zeros(2) for _ in range(2)),
    ],
)
def test_what_gives_batches_in_an_order_of_its_own_is_taken_as_it_is(make: Callable[[], Any]) -> None:
    batches = make()
    assert spread(batches, 1) is batches


def test_batches_of_lists_and_tuples_that_hold_more_than_is_wanted() -> None:
    batches = [(torch.arange(4 * k, 4 * k + 4),) for k in range(5)]
    spread_out = [batches[i] for i in SpreadSampler(5)]
    assert spread(batches, 19) == spread_out
    assert spread(tuple(batches), 19) == spread_out
    assert spread(batches, 20) is batches
    assert spread(batches, None) is batches


def test_of_the_last_batch_rows_at_even_distances_are_taken() -> None:
    x = torch.arange(50)
    found = list(first_samples([{"x": x, "names": [*map(str, x.tolist())], "scale": torch.ones(())}], 8))
    assert found[0]["x"].tolist() == spread_over(8, 50)
    assert found[0]["names"] == [*map(str, spread_over(8, 50))]
    assert [len(b) for b in first_samples(x.split(20), 30)] == [20, 10]


def by_class() -> tuple[Any, Dataset[Any], Dataset[Any]]:
    """A trained network, and digits sorted by class and in random order."""
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16, dtype=torch.float32)
    fit = LogisticRegression(C=0.1, max_iter=200).fit(x[:600], y[:600])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Identity(), nn.Linear(64, 10))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(64) + 0.1 * torch.randn(64, 64))
        weight = torch.linalg.solve(
            net[0].weight, torch.tensor(fit.coef_, dtype=torch.float32), left=False
        )
        net[2].weight.copy_(weight)
        net[2].bias.copy_(torch.tensor(fit.intercept_) - weight @ net[0].bias)
    order = torch.tensor(y[600:]).argsort(stable=True) + 600
    shuffled = torch.randperm(len(order), generator=torch.Generator().manual_seed(1)) + 600
    y = torch.tensor(y)
    return net, TensorDataset(x[order], y[order]), TensorDataset(x[shuffled], y[shuffled])


def test_effects_on_some_samples_are_about_all_classes_of_sorted_data() -> None:
    net, ordered, shuffled = by_class()
    loader = DataLoader(ordered, 50)
    truth = component_effects(net, DataLoader(shuffled, 50), samples=5000)
    assert truth.n_samples == 1197
    found = component_effects(net, loader, samples=200)
    assert found.n_samples == 200
    error = (found.stderr["skip"] ** 2 + truth.stderr["skip"] ** 2) ** 0.5
    assert (abs(found.values["skip"] - truth.values["skip"]) < 3 * error).all()
    assert found.metric["skip"] == pytest.approx(truth.metric["skip"], abs=0.1)
    # The first 200 are of two classes, of which one is what is left where all outputs are means.
    x, y = ordered[:200]
    assert set(y.tolist()) == {0, 1}
    first = component_effects(net, [(x, y)])
    assert abs(first.metric["skip"] - truth.metric["skip"]).max() > 0.3
    assert (abs(first.values["skip"] - truth.values["skip"]) > 5 * error).any()


def test_reports_drift_and_decisions_look_at_all_classes_too() -> None:
    net, ordered, shuffled = by_class()
    seen: list[set[int]] = []

    def run(model: nn.Module, batch: Any) -> Tensor:
        seen.append(set(batch[1].tolist()))
        return model(batch[0])

    def classes() -> set[int]:
        found, seen[:] = set().union(*seen), []
        return found

    report = credit_report(net, DataLoader(ordered, 50), max_samples=200, forward_fn=run)
    assert classes() == set(range(10))
    other = credit_report(net, DataLoader(shuffled, 50), max_samples=200)
    error = (report.stderr["credit"] ** 2 + other.stderr["credit"] ** 2) ** 0.5
    assert (abs(report.credit - other.credit) <= 3 * error + 1e-9).all()
    found = drift(report, net, DataLoader(ordered, 50), max_samples=300, forward_fn=run)
    assert classes() == set(range(10))
    assert not found.changed.any()
    drop_order(net, DataLoader(ordered, 50), samples=200, forward_fn=run)
    assert classes() == set(range(10))
