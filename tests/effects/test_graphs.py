"""Effects of networks that pool the nodes of graphs, whose components have a row per node or edge."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lit import LitNet, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_koopman import KoopmanCreditMonitor, component_effects, drop_order
from lightning_koopman.callback import effects_in_time
from lightning_koopman.report.effects import Effects

OUTPUTS, GRAPHS = 2, 20


def averaged(values: Tensor, index: Tensor, count: int) -> Tensor:
    sums = values.new_zeros(count, values.shape[1]).index_add_(0, index, values)
    return sums / torch.bincount(index, minlength=count).clamp_min(1)[:, None]


class Layer(nn.Module):
    """Reads a node, and what its neighbours and its edges are on average."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own, self.others = nn.Linear(width, 6), nn.Linear(width + 6, 6)

    def forward(self, x: Tensor, ends: Tensor, edges: Tensor) -> Tensor:
        around = averaged(torch.cat([x[ends[0]], edges], dim=1), ends[1], len(x))
        return torch.tanh(self.own(x) + self.others(around))


class Graphs(nn.Module):
    """Layers of nodes with edges beside them, pooled in front of a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.edges, self.first, self.second = nn.Linear(3, 6), Layer(4), Layer(6)
        self.head = nn.Linear(6, OUTPUTS)
        for p in self.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=generator)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        edges = self.edges(batch["features"])
        x = self.first(batch["x"], batch["ends"], edges)
        x = self.second(x, batch["ends"], edges)
        return self.head(averaged(x, batch["index"], int(batch["index"][-1]) + 1))


def batches() -> list[dict[str, Tensor]]:
    """Of the first batch, there are as many nodes as would be ten for each graph, which they are not."""
    generator, found = torch.Generator().manual_seed(1), []
    for number in range(4):
        sizes = torch.randint(5, 15, (GRAPHS,), generator=generator)
        sizes[-1] += 10 * GRAPHS - sizes.sum() if not number else 0
        assert int(sizes.min()) > 0
        index = torch.arange(GRAPHS).repeat_interleave(sizes)
        # Two edges arrive at each node from within the graph, in no order.
        to = torch.arange(len(index)).repeat(2)[torch.randperm(2 * len(index), generator=generator)]
        start = (sizes.cumsum(0) - sizes)[index[to]]
        away = (torch.rand(len(to), generator=generator) * sizes[index[to]]).long()
        own = torch.randn(GRAPHS, 4, generator=generator)[index]
        found.append({
            "x": own + torch.randn(len(index), 4, generator=generator),
            "ends": torch.stack([start + away, to]),
            "features": torch.randn(len(to), 3, generator=generator),
            "index": index,
        })  # fmt: skip
    return found


def as_it_is(model: nn.Module, batch: Any) -> Tensor:
    return model(batch)


def effects_of(net: nn.Module, given: Any, *kinds: Any, **options: Any) -> Effects:
    return component_effects(net, given, kinds=kinds, forward_fn=as_it_is, **options)


def by_hand(net: nn.Module, name: str, put: Callable[[Any, Tensor], Tensor]) -> float:
    """Return the effect of what a plain hook puts in the place of what a module gives."""
    with torch.no_grad():
        before = torch.cat([net(batch) for batch in batches()])
        with net.get_submodule(name).register_forward_hook(lambda _, args, output: put(args, output)):
            after = torch.cat([net(batch) for batch in batches()])
    moved = (after - before).square().mean(dim=0).sum()
    return float(moved / before.var(dim=0, correction=0).sum())


def test_skipping_is_what_plain_hooks_say_node_by_node_or_by_the_mean_of_all_nodes():
    net = Graphs()
    effects = effects_of(net, batches(), "skip")
    assert effects.n_samples == 4 * GRAPHS
    for name in ("edges", "first"):
        seen: list[Tensor] = []
        with (
            torch.no_grad(),
            net.get_submodule(name).register_forward_hook(
                lambda *given, seen=seen: seen.append(given[-1])
            ),
        ):
            for batch in batches():
                net(batch)
        mean = torch.cat(seen).mean(dim=0)
        expected = by_hand(net, name, lambda _, output, mean=mean: mean.expand_as(output))
        assert effects.values["skip"][effects.components.index(name)] == pytest.approx(expected, 1e-4)
    expected = by_hand(net, "second", lambda args, _: args[0])
    assert effects.values["skip"][effects.components.index("second")] == pytest.approx(expected, 1e-4)


def test_an_error_by_groups_covers_the_mean_of_nodes():
    # The mean of few graphs is not that of many: over parts of the data, effects scatter as they say.
    net, found = Graphs(), []
    for batch in batches():
        found.append(effects_of(net, [batch], "skip"))
    first = found[0].components.index("first")
    values = torch.tensor([float(each.values["skip"][first]) for each in found])
    errors = torch.tensor([float(each.stderr["skip"][first]) for each in found])
    assert 0.3 < float(values.std() / errors.mean()) < 3


@pytest.mark.parametrize("name", ["edges", "first", "second"])
def test_predicted_noise_is_that_of_jacobians_of_each_graph(name):
    net, batch, strength = Graphs(), batches()[0], 0.1
    effects = effects_of(net, [batch], "output_noise", how="predicted", strength=strength)
    given: list[Tensor] = []
    with net.get_submodule(name).register_forward_hook(lambda *seen: given.append(seen[-1].detach())):
        before = net(batch).detach()

    def outputs(state: Tensor) -> Tensor:
        with net.get_submodule(name).register_forward_hook(lambda *_: state):
            return net(batch)

    jacobian = torch.autograd.functional.jacobian(outputs, given[0])
    spread = strength * given[0].double().std(dim=0, correction=0)
    moved = (jacobian.double() * spread).square().sum(dim=(2, 3)).mean(dim=0).sum()
    expected = float(moved / before.double().var(dim=0, correction=0).sum())
    value = effects.values["output_noise"][effects.components.index(name)]
    assert value == pytest.approx(expected, rel=1e-4)


def test_predicted_changes_of_weights_are_the_measured_ones_where_they_are_small():
    net = Graphs()
    moved = {
        f"{name}.moved": {
            key: value * 1.01
            for key, value in net.state_dict().items()
            if key.startswith(f"{name}.") and key.endswith("weight")
        }
        for name in ("edges", "first", "second")
    }
    effects = effects_of(net, batches(), replacements=moved, how="both")
    for kind in moved:
        i = effects.components.index(kind.removesuffix(".moved"))
        assert effects.predicted[kind][i] == pytest.approx(effects.values[kind][i], rel=0.05)
    assert not any("predicted to have" in note for note in effects.notes)


def test_linear_maps_are_of_each_node():
    net = Graphs()
    effects = effects_of(net, batches(), "linear")
    values = dict(zip(effects.components, effects.values["linear"], strict=True))
    assert values["edges"] < 1e-6
    assert values["head"] < 1e-6
    # What they take of their neighbours is in no map of a node alone.
    assert values["first"] > 1e-3
    assert effects.doubts["linear"] == ((), ("inputs",), ("inputs",), ())


def test_what_a_drop_order_drops_first_has_the_effect_of_skipping_it():
    net = Graphs()
    order = drop_order(net, batches(), forward_fn=as_it_is)
    effects = effects_of(net, batches(), "skip")
    (name,) = order.components[:1]
    skip = effects.values["skip"][effects.components.index(name)]
    assert float(order.effect[0]) == pytest.approx(skip, rel=1e-3)


def test_components_of_nodes_are_left_alone_where_one_batch_does_not_tell_the_graph_of_each():
    # As many nodes as would be ten for each graph, which they are not.
    other, *given = batches()
    other["sizes"] = other.pop("index").bincount()

    def forward(model: Graphs, batch: Any) -> Tensor:
        index = torch.arange(GRAPHS).repeat_interleave(batch["sizes"]) if "sizes" in batch else None
        return model(batch if index is None else {**batch, "index": index})

    found = component_effects(Graphs(), [*given, other], forward_fn=forward)
    assert np.isnan(found.values["skip"]).tolist() == [True, True, True, False]
    assert sum("effects cannot be told apart by sample" in note for note in found.notes) == 3


def test_effects_on_some_samples_are_on_batches_that_hold_as_many_graphs():
    assert effects_of(Graphs(), batches(), "skip", samples=2 * GRAPHS).n_samples == 2 * GRAPHS


class Batch(SimpleNamespace):
    """A batch of graphs as an object."""

    num_graphs = GRAPHS


class OfObjects(Graphs):
    def forward(self, batch: Any) -> Tensor:
        return super().forward(vars(batch))


class LitGraphs(LitNet):
    """Trains a network that takes such objects."""

    def __init__(self) -> None:
        super().__init__()
        self.net = OfObjects()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch)


def test_a_training_on_objects_has_effects_of_as_many_graphs_as_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(effects_in_time, "_FEW", 1e3)  # seconds, for cores may be busy
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
    given, model = DataLoader([Batch(**batch) for batch in batches()], batch_size=None), LitGraphs()
    quiet_trainer(tmp_path, [monitor], max_epochs=1, logger=CSVLogger(tmp_path)).fit(model, given, given)
    effects = monitor.report.effects
    assert effects.n_samples == 4 * GRAPHS
    expected = component_effects(model.net.eval(), given)
    assert effects.values["skip"] == pytest.approx(expected.values["skip"], rel=1e-4)
