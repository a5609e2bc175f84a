"""Quantisers, whose trained weights are buffers, beside other modules that hold tables."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import wired
from torch import Tensor, nn

from lightning_koopman import credit_report
from lightning_koopman.measurement.overview import describe_components
from lightning_koopman.network.access.isolation import undisturbed
from lightning_koopman.network.capture.capture import Capture


class Table(nn.Module):
    """Holds a table of twelve rows, and does something with it and what it takes."""

    def __init__(self, use: Any, width: int = 4) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(12, width, generator=torch.Generator().manual_seed(1)))
        self.use = use

    def forward(self, z: Tensor) -> Any:
        return self.use(self.table, z)


def nearest(table: Tensor, z: Tensor) -> Tensor:
    return torch.cdist(z, table).argmin(-1)


def by_index(table: Tensor, z: Tensor) -> Tensor:
    return table[nearest(table, z)]


def by_embedding(table: Tensor, z: Tensor) -> Tensor:
    return F.embedding(nearest(table, z), table)


def by_row(table: Tensor, z: Tensor) -> Tensor:
    return table.index_select(0, nearest(table, z).flatten()).view_as(z)


def gathered(table: Tensor, z: Tensor) -> Tensor:
    places = nearest(table, z)[..., None].expand_as(z)
    return table.expand(len(z), -1, -1).gather(1, places)


def straight_through(table: Tensor, z: Tensor) -> Tensor:
    return z + (by_index(table, z) - z).detach()


def with_loss(table: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, places = by_index(table, z), nearest(table, z)
    return (q - z).square().mean(), q, places


class Outer(nn.Module):
    """Wraps what quantises, as in packages of quantisers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner = nn.Identity(), inner

    def forward(self, z: Tensor) -> Tensor:
        return z + (self.inner(self.before(z)) - z).detach()


def autoencoder(q: nn.Module) -> Any:
    """Make an encoder to four vectors of each sample, which are quantised, and a decoder."""

    def forward(m: Any, x: Tensor) -> Tensor:
        given = m.q(m.enc(x).view(-1, 4, 4))
        q = next(g for g in given if g.ndim) if isinstance(given, tuple) else given
        return m.dec(q.flatten(1))

    torch.manual_seed(0)
    return wired(forward, enc=nn.Linear(8, 16), q=q, dec=nn.Linear(16, 8)).eval()


BATCHES = list(torch.randn(240, 8, generator=torch.Generator().manual_seed(0)).split(60))
USES = [by_index, by_embedding, by_row, gathered, straight_through]


@pytest.mark.parametrize("wrap", [lambda q: q, Outer, lambda q: Outer(Outer(q))])
@pytest.mark.parametrize("use", USES)
def test_a_quantiser_is_a_component_as_if_it_were_named(use, wrap):
    net = autoencoder(wrap(Table(use)))
    report, named = (credit_report(net, BATCHES, components=c) for c in (None, ["enc", "q", "dec"]))
    assert report.components == ("enc", "q", "dec")
    assert report.parts == named.parts
    assert report.r2.tolist() == named.r2.tolist()
    assert report.credit.tolist() == named.credit.tolist()
    # The decoder is linear, and the quantiser is not.
    assert report.r2[2] > 0.999 > 0.9 > report.r2[1]
    assert report.parameters[1] == 0


def test_one_that_gives_its_loss_first_is_one_too():
    assert credit_report(autoencoder(Table(with_loss)), BATCHES).components == ("enc", "q", "dec")


def test_its_state_is_the_nearest_entries_in_the_first_batch_and_in_later_ones():
    net = autoencoder(Outer(Table(straight_through)))
    table = net.q.inner.table
    capture = Capture(net)
    for x in BATCHES[:2]:
        with undisturbed(net), capture:
            net(x)
            states = capture.end_pass()
        z = net.enc(x).view(-1, 4, 4).detach()
        distances = (z[:, :, None] - table).square().sum(-1)
        torch.testing.assert_close(states["q"], table[distances.argmin(-1)])
        torch.testing.assert_close(states["enc"], z.flatten(1))


def test_residual_quantisers_are_one_component_where_a_module_calls_them():
    first, second = Table(by_index), Table(by_index)

    def forward(m: Any, z: Tensor) -> Tensor:
        q = m.first(z)
        return q + m.second(z - q)

    net = autoencoder(wired(forward, first=first, second=second))
    assert credit_report(net, BATCHES).components == ("enc", "q", "dec")


def test_a_table_of_normalised_entries_is_one_too():
    net = autoencoder(Table(lambda table, z: by_index(F.normalize(table, dim=-1), z)))
    assert credit_report(net, BATCHES).components == ("enc", "q", "dec")


def test_the_overview_lists_it():
    net = autoencoder(Outer(Table(by_index)))
    rows = {row.name: row for row in describe_components(net, BATCHES).rows}
    assert list(rows) == ["enc", "q", "dec"]
    assert (rows["q"].shape_in, rows["q"].shape_out) == ((60, 4, 4), (60, 4, 4))


def test_quantisers_inside_of_a_component_are_a_part_of_it():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.q = nn.Linear(8, 8), Table(by_index, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(self.lin(x)[:, None])[:, 0]

    net = nn.Sequential(Block(), Block(), nn.Linear(8, 3)).eval()
    assert credit_report(net, BATCHES).components == ("0", "1", "2")


def fixed_projection(table: Tensor, z: Tensor) -> Tensor:
    return (z @ table.T).cos() @ table


def positions(table: Tensor, z: Tensor) -> Tensor:
    return z + table[torch.arange(z.shape[1])]


def rotary(table: Tensor, z: Tensor) -> Tensor:
    angles = F.embedding(torch.arange(z.shape[1]), table)
    return z * angles.cos() + z.roll(1, -1) * angles.sin()


def masked(table: Tensor, z: Tensor) -> Tensor:
    return z.masked_fill(table[:4] > 1, 0)


def pooled_and_blurred(table: Tensor, z: Tensor) -> Tensor:
    largest = F.max_pool1d(F.pad(z, (1, 1)), 3, 1)
    return largest @ table[:4]


def windowed(table: Tensor, z: Tensor) -> Tensor:
    return z * table[0]


def sorted_by_itself(table: Tensor, z: Tensor) -> Tensor:
    return z.gather(1, z.argsort(1)) * table[:4]


@pytest.mark.parametrize(
    "use",
    [fixed_projection, positions, rotary, masked, pooled_and_blurred, windowed, sorted_by_itself],
)
def test_tables_of_which_no_state_chooses_entries_are_no_components(use):
    report = credit_report(autoencoder(Table(use)), BATCHES)
    assert report.components == ("enc", "dec")


@pytest.mark.parametrize("at", ["positions", "data"])
def test_entries_that_the_batch_chooses_are_no_state_of_their_own(at):
    def forward(m: Any, x: Tensor, at: Tensor) -> Tensor:
        return m.head(torch.relu(m.body(x)) + m.place(at))

    parts = {
        "body": nn.Linear(8, 4),
        "place": Table(lambda table, at: table[at]),
        "head": nn.Linear(4, 3),
    }
    net = wired(forward, **parts)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m(x, torch.arange(len(x)) % 12 if at == "positions" else (x[:, 0] > 0).long())

    assert credit_report(net, BATCHES, forward_fn=run).components == ("body", "head")


def test_what_gives_places_alone_is_no_component():
    parts = {"enc": nn.Linear(8, 4), "q": Table(nearest), "dec": nn.Linear(4, 3)}

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        z = m.enc(x)
        return m.dec(z), m.q(z)

    assert credit_report(wired(forward, **parts), BATCHES).components == ("enc", "dec")
