"""Integers that the network is called with (lengths, times, ids) are no targets; others are."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import wired
from torch import Tensor, nn

from lightning_koopman import component_effects, drop_order
from lightning_koopman.callback.recorded_effects import labels_in
from lightning_koopman.effects.targets import TargetSearch, are_classes, find_target


class Timed(nn.Module):
    """Takes an integer beside its input, as many values of it as it has outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(x)) * (1 + t[:, None])))


X = torch.randn(120, 5, generator=torch.Generator().manual_seed(0))
T = torch.randint(0, 4, (120,), generator=torch.Generator().manual_seed(1))


def split(*parts: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(part.split(40) for part in parts), strict=True))


def test_the_label_behind_a_length_is_the_target():
    net = Timed()
    right = net(X, T).argmax(1)
    label = torch.where(torch.arange(120) < 90, right, (right + 1) % 4)
    found = component_effects(net, split(X, T, label))
    assert (found.scale, found.metric_before, found.notes) == ("kl", 0.75, ())
    order = drop_order(net, split(X, T, label), max_drop=1.0)
    assert (order.scale, order.metric_before, order.notes) == ("kl", 0.75, ())


@pytest.mark.parametrize("more", [(), (torch.randn(120, 4),)], ids=["nothing", "numbers"])
def test_without_labels_there_is_no_accuracy_and_no_word_of_classes(more):
    found = component_effects(Timed(), split(X, T, *more))
    assert (found.scale, found.metric, found.notes) == ("relative", {}, ())


class Losing(Timed):
    def forward(self, x: Tensor, t: Tensor) -> Any:
        logits = super().forward(x, torch.zeros_like(t))
        return logits, nn.functional.cross_entropy(logits, t)


def test_labels_that_a_network_takes_for_its_loss_stay_labels():
    net = Losing()
    label = net(X, T)[0].argmax(1)
    found = component_effects(net, split(X, label), forward_fn=lambda m, b: m(*b)[0])
    assert (found.scale, found.metric_before) == ("kl", 1.0)


def test_what_was_not_taken_stays_where_it_was():
    x, y, extra = X[:40], T[:40], torch.arange(40)
    search = TargetSearch((x, y, extra))
    search.see_taken((x, {"beside": extra}))
    assert search.target_of((x, y, extra)) is y
    search.see_taken([y.double()])
    assert search.target_of((x, y, extra)) is None
    tokens = torch.arange(12).view(3, 4)
    search = TargetSearch([x, tokens])
    search.see_taken(tokens.clone())
    assert search.target_of([x, tokens]) is tokens
    # What is taken may be targets: numbers that are no integers, or anything where a loss came back.
    search = TargetSearch([x, y / 3])
    search.see_taken(y / 3)
    assert search.target_of([x, y / 3]).tolist() == (y / 3).tolist()
    search = TargetSearch([x, y])
    search.see_taken(y.clone())
    assert search.target_of([x, y]) is None
    for given in (x, torch.tensor(0.5), x):
        search.see_given(given)
    assert search.target_of([x, y]) is y
    assert TargetSearch({"x": x, "labels": y}).target_of({"x": x, "labels": y}) is y
    assert find_target({"x": x, "labels": y.tolist()}) is None
    assert TargetSearch(x).target_of(x) is None


def test_what_is_kept_of_a_batch_that_may_hold_labels_stops_at_what_is_no_tensor():
    x, y = X[:40], T[:40]
    assert {name: t.tolist() for name, t in labels_in((x, y)).items()} == {"1": y.tolist()}
    told = labels_in((x, y, x, y, "name", y))
    assert list(told) == ["1", "2", "3", "4"]
    assert told["2"] is x
    assert told["4"].numel() == 0
    assert labels_in((x, x, "name", y)) == {}


Labelled = namedtuple("Labelled", "x weight label")
Played = namedtuple("Played", "state action reward")


@dataclass
class Sample:
    x: Tensor
    y: Tensor


class Frame:
    """A batch as libraries for graphs and tables make it: an object of their own."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)


def test_labels_in_an_object_give_effects_in_nats_and_the_accuracy():
    torch.manual_seed(0)
    parts = {"body": nn.Linear(5, 8), "head": nn.Linear(8, 4)}
    network = wired(lambda m, batch: m.head(torch.tanh(m.body(batch.x))), **parts)
    batches = [Frame(*both) for both in split(X, T)]
    found = component_effects(network, batches)
    with torch.no_grad():
        h = torch.tanh(network.body(X))
        before, after = network.head(h), network.head(h).mean(0).expand(len(X), 4)
    expected = F.kl_div(after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="sum")
    assert found.scale == "kl"
    assert found.values["skip"][1] == pytest.approx(float(expected) / len(X), rel=1e-4)
    assert found.metric_before == pytest.approx(float((before.argmax(1) == T).float().mean()))


def test_names_tell_targets_wherever_parts_have_them():
    x, y = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    for batch in ({"x": x, "label": y}, Labelled(x, torch.ones(3), y), Sample(x, y), Frame(x, y)):
        assert find_target(batch) is y
        assert TargetSearch(batch).target_of(batch) is y
        assert [t.tolist() for t in labels_in(batch).values()] == [y.tolist()]
    # Where no name does, their order tells.
    assert find_target(Played(x, y, torch.ones(3))) is y


@pytest.mark.parametrize(
    ("output", "target", "are"),
    [
        ((8, 3), torch.arange(8) % 3, True),
        ((8, 3), torch.arange(8) % 4, False),
        ((8, 3), torch.arange(8) / 3, False),
        ((8, 2), torch.arange(8)[:, None] % 2, True),
        ((8, 1), torch.zeros(8, dtype=torch.long), False),
        ((8,), torch.zeros(8, dtype=torch.long), False),
        ((0, 3), torch.zeros(0, dtype=torch.long), True),
        # Of positions, some may be marked as none of the classes.
        ((2, 3, 4), torch.arange(8).view(2, 4), True),
        ((2, 4, 3), torch.arange(8).view(2, 4), True),
        ((2, 1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long), False),
        ((4, 1, 3), torch.arange(4).view(4, 1, 1) % 3, True),
    ],
)
def test_shapes_and_sizes_tell_classes(output: tuple[int, ...], target: Tensor, are: bool) -> None:
    assert are_classes(torch.zeros(output), target) is are


def test_only_labels_that_are_the_tokens_wherever_they_count_are_predicted_one_before():
    tokens = torch.tensor([[3, 1, 4, 2], [2, 5, 1, 6]])
    search = TargetSearch()
    some = torch.where(tokens > 2, tokens, -100)
    moved = torch.cat([some[:, 1:], torch.full((2, 1), -100)], dim=1)
    assert torch.equal(search.where_predicted({"input_ids": tokens}, some), moved)
    # Zero is a class of its own.
    other = torch.where(tokens > 2, tokens, 0)
    assert search.where_predicted({"input_ids": tokens}, other) is other
    nothing = torch.full_like(tokens, -100)
    assert search.where_predicted({"input_ids": tokens}, nothing) is nothing
    # Classes of samples, which are those of tokens by chance.
    one_each = torch.arange(4)
    assert search.where_predicted({"input_ids": one_each.expand(4, 4)}, one_each) is one_each


@pytest.mark.parametrize("gives_back", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_the_loss_tells_whether_tokens_are_given_back_or_predicted_one_before(gives_back, padded):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, (4, 6), generator=generator)
    logits, narrow = (torch.randn(4, 6, size, generator=generator) for size in (10, 3))
    labels = torch.where(torch.arange(6) < 4, ids, -100) if padded else ids
    pairs = (logits, labels), (logits[:, :-1], labels[:, 1:])
    back, behind = (F.cross_entropy(given.flatten(0, 1), each.flatten()) for given, each in pairs)
    batch = {"input_ids": ids, "labels": labels[..., None]}
    search = TargetSearch(batch)
    # Without a loss, with another one, and without as many scores as there are tokens.
    search.see_given([narrow, logits])
    search.see_given({"loss": back + behind, "narrow": narrow, "logits": logits})
    search.see_given({"loss": back if gives_back else behind, "narrow": narrow})
    assert search.guesses
    search.see_given({"loss": back if gives_back else behind, "narrow": narrow, "logits": logits})
    assert not search.guesses
    moved = torch.cat([labels[:, 1:], torch.full((4, 1), -100)], dim=1)
    found = search.where_predicted(batch, labels)
    assert torch.equal(found, labels if gives_back else moved)
