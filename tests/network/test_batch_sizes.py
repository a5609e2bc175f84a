"""Numbers are of the samples, however many come at once: as many as steps, views or channels, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman import CreditReport, Options, credit_report

SAMPLES, STEPS, WIDTH = 120, 6, 8

Network = tuple[nn.Module, Tensor]
NETWORKS: dict[str, Callable[[], Network]] = {}


def network(make: Callable[[], Network]) -> Callable[[], Network]:
    NETWORKS[make.__name__] = make
    return make


def sequences() -> Tensor:
    return torch.randn(SAMPLES, STEPS, WIDTH)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, 6))


@network
def loop_over_steps() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], 12)
        for step in x:
            h = m.cell(step, h)
        return m.head(h)

    return wired(forward, cell=nn.GRUCell(WIDTH, 12), head=nn.Linear(12, 3)), sequences()


@network
def loop_that_gives_each_step() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        h, given = x.new_zeros(x.shape[1], 12), []
        for step in x:
            h = m.cell(step, h)
            given.append(m.head(h))
        return torch.stack(given)

    return wired(forward, cell=nn.GRUCell(WIDTH, 12), head=nn.Linear(12, 3)), sequences()


@network
def mean_over_steps() -> Network:
    parts = {"layer": nn.Linear(WIDTH, 12), "head": nn.Linear(12, 3)}
    return wired(lambda m, x: m.head(m.layer(x).relu().mean(0)), **parts), sequences()


@network
def last_step() -> Network:
    parts = {"layer": nn.Linear(WIDTH, 12), "head": nn.Linear(12, 3)}
    return wired(lambda m, x: m.head(m.layer(x).relu()[-1]), **parts), sequences()


STEPS_FIRST = {*NETWORKS}


@network
def first_position_of_turned_states() -> Network:
    block = nn.TransformerEncoderLayer(12, 2, 24, 0.0)
    parts = {"layer": nn.Linear(WIDTH, 12), "block": block, "head": nn.Linear(12, 3)}

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.block(m.layer(x).permute(1, 0, 2)).permute(1, 0, 2)[:, 0])

    return wired(forward, **parts), sequences()


@network
def first_position_of_channels() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.last(m.first(x.transpose(1, 2)).relu()).transpose(1, 2)[:, 0])

    parts = {"first": nn.Conv1d(WIDTH, 12, 3, padding=1), "last": nn.Conv1d(12, 30, 3, padding=1)}
    return wired(forward, **parts, head=nn.Linear(30, 3)), sequences()


@network
def views() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(m.layers(x.flatten(0, 1)).view(len(x), STEPS, -1).mean(1))

    return wired(forward, layers=layers(), head=nn.Linear(6, 3)), sequences()


@network
def frames() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        steps = m.layers(x.flatten(0, 1)).view(len(x), STEPS, -1)
        return m.head(m.cell(steps)[0][:, -1])

    parts = {"layers": layers(), "cell": nn.GRU(6, 8, batch_first=True), "head": nn.Linear(8, 3)}
    return wired(forward, **parts), sequences()


@network
def pairs_within() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = x[:, :, None].expand(-1, -1, 4, -1), x[:, None].expand(-1, 4, -1, -1)
        pairs = torch.cat([first, second], dim=-1).view(-1, 2 * WIDTH)
        return m.head(m.layer(pairs).relu().view(len(x), 16, -1).sum(1))

    return wired(forward, layer=nn.Linear(2 * WIDTH, 12), head=nn.Linear(12, 3)), sequences()[:, :4]


@network
def windows() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        z = m.layer(x).view(-1, 2, 4, 2, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 8)
        z = m.last(z + m.attention(z, z, z)[0])
        z = z.view(-1, 2, 2, 4, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 8)
        return m.head(z.mean((1, 2)))

    parts = {"layer": nn.Linear(4, 8), "attention": nn.MultiheadAttention(8, 2, batch_first=True)}
    parts |= {"last": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
    return wired(forward, **parts), torch.randn(SAMPLES, 8, 8, 4)


@network
def trend_and_rest() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        trend = F.avg_pool1d(F.pad(x, (1, 1), mode="replicate"), 3, 1)
        return (m.trend(trend) + m.rest(x - trend)).transpose(1, 2)

    return wired(forward, trend=nn.Linear(12, 5), rest=nn.Linear(12, 5)), torch.randn(SAMPLES, 12, STEPS)


@network
def distances_to_points() -> Network:
    parts = {"layers": layers(), "points": nn.Embedding(5, 6)}
    return wired(lambda m, x: -torch.cdist(m.layers(x), m.points.weight), **parts), sequences()[:, 0]


@network
def functions_on_a_grid() -> Network:
    """As a DeepONet on points of its own, of which a batch may have as many samples."""
    parts = {"branch": layers(), "trunk": nn.Sequential(nn.Linear(2, 6), nn.Tanh())}
    net = wired(lambda m, x: m.branch(x) @ m.trunk(m.points).t(), **parts)
    net.register_buffer("points", torch.rand(5, 2))
    return net, sequences()[:, 0]


@network
def tokens_and_places() -> Network:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.tokens(x) + m.places(torch.arange(STEPS)[None])
        return m.head(m.layer(h).tanh().mean(1))

    parts = {"tokens": nn.Embedding(9, WIDTH), "places": nn.Embedding(STEPS, WIDTH)}
    parts |= {"layer": nn.Linear(WIDTH, 12), "head": nn.Linear(12, 3)}
    return wired(forward, **parts), torch.randint(0, 9, (SAMPLES, STEPS))


@pytest.mark.filterwarnings("ignore:120 samples are few")
@pytest.mark.parametrize("name", NETWORKS)
def test_numbers_do_not_depend_on_how_many_samples_come_at_once(name: str) -> None:
    def report(size: int) -> CreditReport:
        torch.manual_seed(0)
        net, data = NETWORKS[name]()
        batches = list(data.split(size))
        if name in STEPS_FIRST:
            batches = [batch.transpose(0, 1).contiguous() for batch in batches]
        return credit_report(net.eval(), batches, options=Options(errors=False), max_samples=None)

    expected = report(25)
    assert expected.n_samples == SAMPLES
    for size in (STEPS, WIDTH, 2 * STEPS, 5, 3, 2, 1):
        found = report(size)
        assert (found.components, found.n_samples, found.reads) == (
            expected.components,
            SAMPLES,
            expected.reads,
        )
        np.testing.assert_allclose(found.credit, expected.credit, atol=2e-3, err_msg=str(size))
        np.testing.assert_allclose(found.r2, expected.r2, atol=2e-3, err_msg=str(size))
