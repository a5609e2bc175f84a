"""Networks of ``torch_geometric``, on object batches as its loader gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Nodes(nn.Module):
    """Layers of a graph network and a head, for each node."""

    def __init__(self, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.convs, self.head = nn.ModuleList([layer(6, 16), layer(16, 16)]), nn.Linear(16, 3)

    def nodes(self, data: Any) -> Tensor:
        x = data.x
        for conv in self.convs:
            x = conv(x, data.edge_index).relu()
        return x

    def forward(self, data: Any) -> Tensor:
        return self.head(self.nodes(data))


class Graphs(Nodes):
    """The same with nodes pooled to graphs before the heads, of which one is auxiliary."""

    def __init__(self, layer: Callable[[int, int], nn.Module], pool: Callable[..., Tensor]) -> None:
        super().__init__(layer)
        self.pool, self.last, self.auxiliary = pool, nn.Linear(3, 2), nn.Linear(16, 1)

    def forward(self, data: Any) -> dict[str, Tensor]:
        x = self.pool(self.nodes(data), data.batch)
        return {"logits": self.last(self.head(x).relu()), "auxiliary": self.auxiliary(x)}


class Edges(nn.Module):
    """Features of edges go through a layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric import nn as layers

        self.edges, self.inp = nn.Linear(4, 16), nn.Linear(6, 16)
        steps = (nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(2))
        self.convs = nn.ModuleList(layers.GINEConv(step) for step in steps)
        self.norms = nn.ModuleList(layers.BatchNorm(16) for _ in range(2))
        self.head, self.pool = nn.Linear(16, 2), layers.global_add_pool

    def forward(self, data: Any) -> Tensor:
        x, e = self.inp(data.x), self.edges(data.edge_attr)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x, data.edge_index, e)).relu()
        return self.head(self.pool(x, data.batch))


def networks() -> dict[str, Callable[[], nn.Module]]:
    """Return what builds each network."""
    from torch_geometric import nn as layers

    return {
        "GCN, nodes": lambda: Nodes(layers.GCNConv),
        "GraphSAGE, nodes": lambda: Nodes(layers.SAGEConv),
        "GAT, nodes": lambda: Nodes(layers.GATConv),
        "GCN, mean over graphs": lambda: Graphs(layers.GCNConv, layers.global_mean_pool),
        "GraphConv, maximum over graphs": lambda: Graphs(layers.GraphConv, layers.global_max_pool),
        "TAG, aggregation module": lambda: Graphs(layers.TAGConv, layers.MeanAggregation()),
        "GINE with edges, sum over graphs": Edges,
    }


NAMES = (
    "GCN, nodes",
    "GraphSAGE, nodes",
    "GAT, nodes",
    "GCN, mean over graphs",
    "GraphConv, maximum over graphs",
    "TAG, aggregation module",
    "GINE with edges, sum over graphs",
)


def graphs(count: int = 240) -> Any:
    """Draw graphs of several sizes, in batches."""
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader

    torch.manual_seed(1)
    drawn = []
    for _ in range(count):
        n = int(torch.randint(4, 9, (1,)))
        edges, features = torch.randint(0, n, (2, 3 * n)), torch.randn(3 * n, 4)
        drawn.append(Data(x=torch.randn(n, 6), edge_index=edges, edge_attr=features))
    return DataLoader(drawn, batch_size=40)
