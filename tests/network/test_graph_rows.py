"""Networks on graphs in plain torch: edges beside nodes, and pooling behind the last layer."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import credit_report
from lightning_koopman.measurement.overview import describe_components
from lightning_koopman.network.runs.samples import samples_in


def pooled(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Average rows by their index."""
    sums = values.new_zeros(count, values.shape[1]).index_add_(0, index, values)
    return sums / torch.bincount(index, minlength=count).clamp_min(1)[:, None]


class Convolution(nn.Module):
    """Linear in nodes and in the mean of edges that arrive at each."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.nodes, self.edges = nn.Linear(width, 8), nn.Linear(4, 8)

    def forward(self, x: Tensor, ends: Tensor, edges: Tensor) -> Tensor:
        return self.nodes(x) + 3 * self.edges(pooled(edges, ends[1], len(x)))


class Network(nn.Module):
    def __init__(self, *, head_first: bool = False, embeds: bool = False, pools: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4) if embeds else None
        self.conv, self.head = Convolution(), nn.Linear(8, 2)
        self.head_first, self.pools = head_first, pools

    def forward(self, x: Tensor, ends: Tensor, edges: Tensor, index: Tensor) -> Tensor:
        x = self.conv(x if self.table is None else self.table(x), ends, edges)
        if not self.pools:
            return self.head(x.relu())
        count = int(index[-1]) + 1
        if self.head_first:
            return pooled(self.head(x), index, count)
        return self.head(pooled(x, index, count))


def graphs(*, integers: bool = False, n_batches: int = 6) -> list[dict[str, Tensor]]:
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(n_batches):
        sizes = torch.randint(5, 15, (64,), generator=generator)
        index = torch.arange(64).repeat_interleave(sizes)
        first = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])[index]
        # Two edges arrive at every node, each from within the graph.
        starts = torch.rand(2, len(index), generator=generator) * sizes[index] + first
        ends = torch.stack([starts.long().flatten(), torch.arange(len(index)).repeat(2)])
        own = torch.randn(64, 4, generator=generator)[index[ends[0]]]
        x = torch.randint(20, (len(index),), generator=generator)
        batches.append({
            "x": x if integers else torch.randn(len(index), 4, generator=generator),
            "ends": ends,
            "edges": own + torch.randn(ends.shape[1], 4, generator=generator),
            "index": index,
        })  # fmt: skip
    return batches


@pytest.mark.parametrize("head_first", [False, True])
def test_edges_are_inputs_and_graphs_are_samples(head_first):
    torch.manual_seed(0)
    report = credit_report(Network(head_first=head_first), graphs(), components=["conv", "head"])
    assert report.n_samples == 6 * 64
    # All of it is linear in what nodes and edges are on average, up to how often edges start where.
    assert report.r2 == pytest.approx([1, 1], abs=0.02)
    assert report.reads["conv"] == ("input+input#1",)
    assert any("samples are graphs" in note for note in report.notes)


@pytest.mark.parametrize("named", [False, True])
def test_edges_beside_nodes_that_are_samples_are_left_out_with_a_note(named):
    torch.manual_seed(0)
    model = Network(embeds=True, pools=False)
    components = ["table", "conv", "head"] if named else None
    report = credit_report(model, graphs(integers=True), components=components)
    assert report.reads["conv"] == ("table",)
    n_nodes = sum(len(batch["x"]) for batch in graphs(integers=True))
    assert report.n_samples == n_nodes
    assert any("so left out: input (" in note for note in report.notes)
    assert any("'table' takes no floating-point input" in note for note in report.notes)


def test_edges_that_are_told_later_are_not_said_to_be_changed():
    class Two(Network):
        def __init__(self) -> None:
            super().__init__()
            self.second = Convolution(8)

        def forward(self, x: Tensor, ends: Tensor, edges: Tensor, index: Tensor) -> Tensor:
            x = self.second(self.conv(x, ends, edges).relu(), ends, edges)
            return self.head(pooled(x, index, int(index[-1]) + 1))

    torch.manual_seed(0)
    report = credit_report(Two(), graphs(), components=["conv", "second", "head"])
    assert report.reads["second"] == ("conv", "input+input#1")
    assert not any("changed on the way" in note for note in report.notes)


class Potential(nn.Module):
    """Hands one dictionary from module to module, targets and all, as force fields do."""

    def __init__(self, *, averages: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.score = Score(averages=averages)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = dict(batch)
        for layer in self.layers:
            # Messages are added up in place, in what was zeros.
            sums = torch.zeros(batch["x"].shape).index_add_(0, batch["ends"], batch["x"])
            batch["x"] = layer(sums)
        return {"energy": self.score(batch)["energy"]}


class Score(nn.Module):
    def __init__(self, *, averages: bool) -> None:
        super().__init__()
        self.net, self.averages = nn.Linear(4, 1), averages

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        y = self.net(batch["x"])
        energy = torch.zeros(int(batch["index"][-1]) + 1, 1).index_add(0, batch["index"], y).squeeze(-1)
        batch["energy"] = energy / batch["sizes"] if self.averages else energy
        return batch


@pytest.mark.parametrize("averages", [False, True])
def test_a_head_that_is_given_targets_and_sums_nodes_without_reading_them_is_no_loss(averages):
    torch.manual_seed(0)
    model, batches = Potential(averages=averages), []
    for _ in range(6):
        sizes = torch.randint(3, 8, (64,)) if averages else torch.full((64,), 5)
        index = torch.arange(64).repeat_interleave(sizes)
        x = torch.randn(len(index), 4)
        # Neighbours in a ring of all nodes of a graph, each of which gets one message.
        first = (index.diff(prepend=index[:1] - 1) > 0).nonzero().flatten()
        ends = torch.arange(len(index)) + 1
        ends[first.roll(-1) - 1] = first
        batches.append({"x": x, "ends": ends, "index": index, "sizes": sizes, "energy": torch.randn(64)})
    report = credit_report(model, batches, forward_fn=lambda m, batch: m(batch))
    assert report.components == ("layers.0", "layers.1", "score")
    # A ring hands on all that it is given, so all of it is linear in what nodes are on average.
    slope = (model.score.net.weight @ model.layers[1].weight @ model.layers[0].weight).detach()
    expected = float((slope * (1 if averages else 5)).norm().log())
    assert report.total == pytest.approx(expected, abs=1e-3)
    assert not any("targets" in note or "integers" in note for note in report.notes)


class Molecules(nn.Module):
    """Adds up what heads behind each layer give for a graph, and returns the layers' nodes, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.scores = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

    def forward(self, batch: SimpleNamespace) -> dict[str, Tensor]:
        x, nodes, own = batch.x, [], torch.zeros(len(batch.x), 1)
        for layer, score in zip(self.layers, self.scores, strict=True):
            x = layer(pooled(x[batch.ends[0]], batch.ends[1], len(x)))
            nodes, own = [*nodes, x], own + score(x)
        energy = pooled(own, batch.index, int(batch.index[-1]) + 1)
        return {"energy": energy, "own": own, "target": batch.target, "nodes": torch.cat(nodes, 1)}


def rings(*, target_of_graphs: bool) -> list[SimpleNamespace]:
    """Draw rings in batches that begin with the edges, of which there are as many as nodes."""
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(6):
        sizes = torch.randint(2, 5, (32,), generator=generator) * 2
        index = torch.arange(32).repeat_interleave(sizes)
        first = (index.diff(prepend=index[:1] - 1) > 0).nonzero().flatten()
        follow = torch.arange(len(index)) + 1
        follow[first.roll(-1) - 1] = first
        x = torch.randn(len(index), 4, generator=generator)
        ends = torch.stack([torch.arange(len(index)), follow])
        target = torch.randn(32 if target_of_graphs else len(index), generator=generator)
        batches.append(SimpleNamespace(ends=ends, x=x, index=index, target=target))
    return batches


def test_graphs_are_samples_where_a_network_returns_nodes_beside_what_it_pools() -> None:
    torch.manual_seed(0)
    model = Molecules()
    report = credit_report(model, rings(target_of_graphs=False), forward_fn=lambda m, batch: m(batch))
    assert report.n_samples == 6 * 32
    overview = describe_components(model, rings(target_of_graphs=False))
    assert overview.notes == report.notes[:2]
    assert {row.state for row in overview.rows} == {*report.components} - {"output+output#1"}
    assert overview.rows[0].shape_out == (194, 4)
    # A ring hands on all that it is given, so all of it is linear in what nodes are on average.
    first, second = (layer.weight.detach().double() for layer in model.layers)
    one, two = (score.weight.detach().double() for score in model.scores)
    energy = one @ first + two @ second @ first
    assert report.r2 == pytest.approx([1] * len(report.components), abs=1e-4)
    assert report.components[-1] == "output+output#1"
    # Energies and what nodes give to them on average are the same.
    assert report.total == pytest.approx(float((2**0.5 * energy).norm().log()), abs=1e-3)


class Nodes(Molecules):
    def forward(self, batch: SimpleNamespace) -> dict[str, Tensor]:
        return {"own": super().forward(batch)["own"], "target": batch.target}


def test_targets_of_whole_graphs_that_are_handed_on_do_not_make_graphs_samples() -> None:
    torch.manual_seed(0)
    batches = rings(target_of_graphs=True)
    report = credit_report(Nodes(), batches, forward_fn=lambda m, batch: m(batch))
    assert report.n_samples == sum(len(batch.x) for batch in batches)
    assert not any("samples are graphs" in note for note in report.notes)


def test_a_batch_that_begins_with_something_else_than_samples_is_refused_with_what_ran() -> None:
    def forward(model: nn.Module, batch: SimpleNamespace) -> tuple[Tensor, Tensor]:
        index = torch.tensor([i for i, size in enumerate(batch.sizes) for _ in range(size)])
        whole = SimpleNamespace(x=batch.x, ends=batch.ends, index=index, target=None)
        given = model(whole)
        return given["energy"], given["own"]

    torch.manual_seed(0)
    batches = []
    for ring in rings(target_of_graphs=True):
        # Nothing says in a tensor what graph a node belongs to.
        sizes = ring.index.bincount().tolist()
        batches.append(SimpleNamespace(units=torch.ones(2), x=ring.x, ends=ring.ends, sizes=sizes))
    with pytest.raises(
        ValueError, match=r"no state has one row for each sample.* of 2 samples, so left"
    ):
        credit_report(Molecules(), batches, forward_fn=forward)


def test_samples_of_a_batch_are_graphs_where_it_holds_edges_and_the_graph_of_each_node():
    batch = graphs(n_batches=1)[0]
    assert samples_in(batch) == 64
    assert samples_in(tuple(batch.values())) == 64
    n_nodes = len(batch["x"])
    # Labels in order are no graphs where nothing joins rows, and neither is what is in no order.
    assert samples_in((batch["x"], batch["index"])) == n_nodes
    assert samples_in({**batch, "index": batch["index"].flip(0)}) == n_nodes
    assert samples_in({**batch, "index": torch.arange(n_nodes)}) == n_nodes
    # Two samples of a text beside numbers look like the ends of edges.
    text = torch.zeros(2, 7, dtype=torch.int64)
    assert samples_in((torch.zeros(2, 3), text, torch.zeros(2, dtype=torch.int64))) == 2
    assert samples_in(SimpleNamespace(x=torch.zeros(9, 2), num_graphs=3)) == 3
