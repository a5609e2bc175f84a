"""Components that take, or give, several tensors; data that come changed, in part, or on other ways."""

import numpy as np
import pytest
import torch
from small import Both, wired
from torch import Tensor, nn
from torch.distributions import Normal
from torch.utils.data import DataLoader, TensorDataset

from lightning_koopman import credit_report
from lightning_koopman.network.axes.input_data import holds_all_of
from lightning_koopman.network.capture.capture import Capture
from lightning_koopman.network.names import call_of, further_name


def r2_of(model: nn.Module, *data: Tensor, size: int = 100) -> dict[str, float]:
    """R² of every component, over batches of some tensors that the network is called with."""
    return by_name(report_of(model, *data, size=size))


def report_of(model: nn.Module, *data: Tensor, size: int = 100):
    batches = list(zip(*(tensor.split(size) for tensor in data), strict=True))
    return credit_report(model.eval(), batches, forward_fn=lambda m, batch: m(*batch))


def by_name(report) -> dict[str, float]:
    return dict(zip(report.components, report.r2.tolist(), strict=True))


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Merge(nn.Module):
    """Linear in all that it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(4, 8)

    def forward(self, x: Tensor, y: Tensor, state: Tensor | float = 0.0) -> Tensor:
        return self.a(x) + self.b(y) + state


HOW = {
    "two tensors": lambda m, x, y: m.merge(x, y),
    "parts of one": lambda m, x, y: m.merge(x[:, :3], x[:, 3:]),
    "copies of parts": lambda m, x, y: m.merge(x[:, :3].clone(), x[:, 3:].clone()),
    "beside a state": lambda m, x, y: m.merge(x, y, m.stem(y)),
    "by name": lambda m, x, y: m.merge(y=y, x=x),
}


@pytest.mark.parametrize("how", HOW)
def test_all_data_that_a_component_takes_are_inputs(how):
    model = wired(
        lambda m, x, y: m.last(torch.tanh(m.merge_of(x, y))),
        merge=Merge(), stem=nn.Linear(4, 8), last=nn.Linear(8, 3),
    )  # fmt: skip
    model.merge_of = lambda x, y: HOW[how](model, x, y)
    whole = "parts" in how
    x, y = drawn(600, 7 if whole else 3), drawn(600, 4, seed=2)
    report = report_of(model, x, y)
    assert by_name(report)["merge"] == pytest.approx(1, abs=1e-6)
    assert "input" in report.reads["merge"][-1]
    assert not any("beside" in note for note in report.notes if "tell the same" not in note)


def test_masks_that_are_given_beside_data_are_no_inputs():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.layer(x) * mask[..., None]

    model = wired(lambda m, x, mask: m.last(m.first(x, mask)), first=Masked(), last=nn.Linear(4, 2))
    for mask in (drawn(300, 5) > -1, torch.where(drawn(300, 5) > -1, 0.0, -1e9)):
        assert report_of(model, drawn(300, 5, 3), mask.float()).reference.states[0] == "input"


def test_integers_beside_numbers_are_told():
    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(5, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor, kind: Tensor) -> Tensor:
            return self.layer(x) + self.table(kind)

    model = wired(lambda m, x, k: m.last(m.embed(x, k)), embed=Embed(), last=nn.Linear(4, 2))
    x, kinds = drawn(400, 3), torch.randint(5, (400,))
    note = "integers of the batch that go into embed beside other numbers are not seen by operators"
    assert any(note in found for found in report_of(model, x, kinds).notes)
    # Taken by a module of its own, they are.
    apart = wired(
        lambda m, x, k: m.last(m.layer(x) + m.table(k)),
        table=model.embed.table, layer=model.embed.layer, last=model.last,
    )  # fmt: skip
    report = report_of(apart, x, kinds)
    assert not any("integers" in found for found in report.notes)
    assert by_name(report)["last"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("change", [lambda y: y, lambda y: 2 * y - 1, torch.Tensor.bool])
def test_zeros_and_ones_that_are_put_beside_a_state_are_data(change, columns: int):
    def run(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return m.last(torch.cat([m.first(x), change(y)], 1))

    model = wired(run, first=nn.Linear(3, 4), last=nn.Linear(4 + columns, 2))
    report = report_of(model, drawn(400, 3), (drawn(400, columns) > 0.3).float())
    # The layer is linear in what it takes.
    assert by_name(report)["last"] == pytest.approx(1, abs=1e-6)
    assert report.reads["last"] == ("first", "input+input#1")


@pytest.mark.parametrize("classes", [2, 4])
def test_classes_as_a_one_in_each_row_are_data_that_are_added_to_a_state(classes: int):
    model = wired(
        lambda m, x, y: m.last(m.first(x) + y), first=nn.Linear(3, classes), last=nn.Linear(classes, 2)
    )
    y = nn.functional.one_hot(drawn(400, classes).argmax(1), classes).float()
    report = report_of(model, drawn(400, 3), y)
    # The layer is linear in what it takes, whatever joins the two.
    assert by_name(report)["last"] == pytest.approx(1, abs=1e-6)
    assert "input+input#1" in {*report.reads["last"]}.union(
        *(report.reads.get(n, ()) for n in report.reads["last"])
    )


@pytest.mark.parametrize("columns", [1, 4])
def test_zeros_and_ones_that_are_added_to_a_state_are_data(columns: int):
    def run(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return m.last(m.first(x) + y)

    model = wired(run, first=nn.Linear(3, 4), last=nn.Linear(4, 2))
    report = report_of(model, drawn(400, 3), (drawn(400, columns) > 0.3).float())
    assert by_name(report)["last"] == pytest.approx(1, abs=1e-6)
    assert report.reads["last"] == ("first", "input+input#1")


GATES = {
    "mul": lambda h, y: h * y,
    "mul_by_bool": lambda h, y: h * (y > 0),
    "masked_fill": lambda h, y: h.masked_fill(y == 0, 0),
    "where": lambda h, y: torch.where(y > 0, h, -h),
    "affine": lambda h, y: h * (2 * y - 1),
    "in_place": lambda h, y: h.clone().mul_(y),
    "where_zero": lambda h, y: torch.where(y == 0, 0.0, h),
    "written": lambda h, y: h.clone().index_put_(((y == 0).expand_as(h),), torch.tensor(0.5)),
    "scattered": lambda h, y: h.masked_scatter(y == 0, torch.zeros_like(h)),
}


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("name", GATES)
def test_zeros_and_ones_that_gate_a_state_are_data(name: str, columns: int):
    model = wired(
        lambda m, x, y: m.last(GATES[name](m.first(x), y)), first=nn.Linear(3, 4), last=nn.Linear(4, 2)
    )
    x, y = drawn(4000, 3), (drawn(4000, columns, seed=5) > 0.3).float()
    report = report_of(model, x, y, size=500)
    assert report.reads["last"] == ("first", "input+input#1")
    given = torch.cat([model.first(x), x, y, torch.ones(4000, 1)], 1).detach().double()
    made = model(x, y).detach().double()
    rest = made - given @ torch.linalg.lstsq(given, made, driver="gelsd").solution
    best = 1 - float(rest.square().sum() / (made - made.mean(0)).square().sum())
    assert by_name(report)["last"] == pytest.approx(best, abs=0.01)


CHANNEL_GATES = {
    "mul": lambda h, y: h * y,
    "where": lambda h, y: torch.where(y > 0, h, 0.0),
    "masked_fill": lambda h, y: h.masked_fill(y == 0, 0.0),
}


@pytest.mark.parametrize("name", CHANNEL_GATES)
@pytest.mark.parametrize("kind", ["sequence", "image"])
def test_zeros_and_ones_that_gate_channels_are_data(name: str, kind: str):
    """All positions alike, so that a mean over these is gated, too."""
    is_image, gate = kind == "image", CHANNEL_GATES[name]

    def run(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = m.first(x)
        return m.last(gate(h, y[:, :, None, None] if is_image else y[:, None]).flatten(1))

    first = nn.Conv2d(3, 4, 3) if is_image else nn.Linear(3, 4)
    model = wired(run, first=first, last=nn.Linear(36 if is_image else 24, 2))
    x, y = drawn(4000, 3, 5, 5) if is_image else drawn(4000, 6, 3), (drawn(4000, 4, seed=5) > 0).float()
    report = report_of(model, x, y, size=500)
    assert report.reads["last"] == ("first", "input+input#1")
    given = torch.cat([model.first(x).flatten(1), x.flatten(1), y, torch.ones(4000, 1)], 1)
    given, made = given.detach().double(), model(x, y).detach().double()
    rest = made - given @ torch.linalg.lstsq(given, made, driver="gelsd").solution
    best = 1 - float(rest.square().sum() / (made - made.mean(0)).square().sum())
    assert by_name(report)["last"] == pytest.approx(best, abs=0.04)


@pytest.mark.parametrize(
    "how", ["scores", "scores_filled", "weights", "weights_bool", "channels_first", "tokens"]
)
def test_zeros_and_ones_that_shut_out_positions_are_a_mask(how: str):
    lengths = drawn(400, 1).abs().mul(3).long().clamp(1, 6)
    mask = (torch.arange(6) < lengths).float()

    def run(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if how == "channels_first":
            return m.last((m.first(x.mT).mT * y[:, None]).sum(2))
        if how == "tokens":
            return m.last(m.first(x).masked_fill(y[:, :, None] == 0, 0).sum(1))
        scores = m.first(x)[..., 0]
        if how == "scores":
            weights = scores.masked_fill(y == 0, -torch.inf).softmax(1)
        elif how == "scores_filled":
            weights = torch.where(y > 0, scores, -1e9).softmax(1)
        else:
            weights = scores.softmax(1).masked_fill(~y if how == "weights_bool" else y == 0, 0)
        return m.last((weights[:, None] @ x)[:, 0])

    first = {"channels_first": nn.Linear(3, 4), "tokens": nn.Embedding(9, 4)}.get(how, nn.Linear(3, 1))
    model = wired(run, first=first, last=nn.Linear(3 if first.weight.shape[0] == 1 else 4, 2))
    x = torch.randint(1, 9, (400, 6)) if how == "tokens" else drawn(400, 6, 3)
    x = x.mT if how == "channels_first" else x
    report = report_of(model, x, mask.bool() if how == "weights_bool" else mask)
    assert "input#1" not in "".join(report.reads["last"])
    assert not any("data of the batch" in note or "integers" in note for note in report.notes)


def test_zeros_and_ones_by_unit_that_are_true_or_false_are_told():
    model = wired(
        lambda m, x, y: m.last(m.first(x).masked_fill(~y, 0)),
        first=nn.Linear(3, 4),
        last=nn.Linear(4, 2),
    )
    notes = report_of(model, drawn(400, 3), drawn(400, 4, seed=5) > 0).notes
    told = "integers of the batch that go into last beside other numbers are not seen by operators"
    assert any(told in note for note in notes)


def test_a_single_number_of_the_batch_that_weighs_a_state_ends_nothing():
    model = wired(
        lambda m, x, y: m.last(m.first(x) * y.view(1)), first=nn.Linear(3, 4), last=nn.Linear(4, 2)
    )
    batches = [(x, torch.tensor(2.0)) for x in drawn(400, 3).split(100)]
    report = credit_report(model, batches, forward_fn=lambda m, batch: m(*batch))
    assert report.reads["last"][0] == "first"
    assert not any("could not be followed" in note for note in report.notes)


def test_gates_that_are_made_of_numbers_are_told():
    model = wired(
        lambda m, x, y: m.last(m.first(x) * (y > 0)), first=nn.Linear(3, 4), last=nn.Linear(4, 2)
    )
    report = report_of(model, drawn(400, 3), drawn(400, 1, seed=5))
    assert any("data of the batch go into last changed on the way" in note for note in report.notes)


@pytest.mark.parametrize("shape", [(-1, 6, 1), (-1, 1)])
def test_zeros_and_ones_that_leave_out_positions_are_a_mask(shape: tuple[int, ...]):
    def run(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = m.first(x.view(*shape[:-1], 3)) * y.view(shape)
        return m.last(h.view(-1, 6, 4))

    model = wired(run, first=nn.Linear(3, 4), last=nn.Linear(4, 2))
    lengths = drawn(400, 1).abs().mul(3).long().clamp(1, 6)
    mask = (torch.arange(6) < lengths).float()
    report = report_of(model, drawn(400, 6, 3), mask)
    assert report.reads["last"] == ("first",)
    assert not any("data of the batch" in note for note in report.notes)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
def test_integers_that_are_put_beside_a_state_are_told(kind: torch.dtype):
    def run(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return m.last(torch.cat([m.first(x), y.float()], 1))

    model = wired(run, first=nn.Linear(3, 4), last=nn.Linear(7, 2))
    notes = report_of(model, drawn(400, 3), (drawn(400, 3) > 0).to(kind)).notes
    told = "integers of the batch that go into last beside other numbers are not seen by operators"
    assert any(told in note for note in notes)


def test_random_numbers_that_go_into_a_component_are_told():
    model = wired(
        lambda m, x: m.last(m.mean(x) + torch.randn(len(x), 4)),
        mean=nn.Linear(3, 4), last=nn.Linear(4, 2),
    )  # fmt: skip
    notes = report_of(model, drawn(400, 3)).notes
    assert any("random numbers go into last that operators do not see" in note for note in notes)


def test_random_numbers_that_the_network_mixes_into_what_it_returns_are_told():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.base(x))
        noise = torch.randn(len(x), 2)
        mean = m.mean(torch.cat([h, noise], 1)) if m.before else m.mean(h)
        return mean + m.spread(h).exp() * (1 if m.before else noise)

    notes = {}
    for before in (False, True):
        model = wired(
            run, base=nn.Linear(3, 8), mean=nn.Linear(8 + 2 * before, 2), spread=nn.Linear(8, 2)
        )
        model.before = before
        notes[before] = [n for n in report_of(model, drawn(400, 3)).notes if "random numbers" in n]
    told = "random numbers go into {} that operators do not see"
    assert [len(found) for found in notes.values()] == [1, 1]
    assert told.format("output") in notes[False][0]
    assert told.format("mean") in notes[True][0]


def test_attention_without_dropout_draws_nothing():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = wired(lambda m, x: m.last(m.block(x)[:, 0]), block=block, last=nn.Linear(8, 2))
    assert not any("random" in note for note in report_of(model, drawn(300, 4, 8)).notes)


def test_what_is_left_of_data_is_not_all_of_them():
    # Each is linear in all of x.
    def less_last(m, x):
        return m.out(m.linear(x - x[:, -1:])) + x[:, -1:]

    def trend(m, x):
        mean = x.mean(1, keepdim=True).expand(-1, 12).contiguous()
        return m.linear(x - mean) + m.out(mean[:, :4])

    x = drawn(600, 12) + 3 * drawn(600, 1, seed=2)
    for forward in (less_last, trend):
        net = wired(forward, linear=nn.Linear(12, 4), out=nn.Linear(4, 4))
        report = report_of(net, x)
        np.testing.assert_allclose(report.r2, 1, atol=1e-6)
        np.testing.assert_allclose(report.chain_r2, 1, atol=1e-6)


def test_another_part_of_a_tensor_may_come_later():
    def forward(m, y, f):
        return m.head(m.dec(torch.cat([m.enc(torch.cat([y, f[:, :4]], 1)), f[:, 4:]], 1)))

    def in_place(m, y, f):
        return m.head(m.dec(torch.cat([m.enc(f[:, :4]), f[:, 4:]], 1)))

    for way, width in ((forward, 10), (in_place, 4)):
        net = wired(way, enc=nn.Linear(width, 16), dec=nn.Linear(20, 12), head=nn.Linear(12, 4))
        found = r2_of(net, drawn(600, 6), 3 * drawn(600, 8, seed=2))
        assert found == pytest.approx({"enc": 1, "dec": 1, "head": 1}, abs=1e-6)


@pytest.mark.parametrize(
    "changed",
    [
        lambda x: x + torch.arange(12.0).view(3, 4),
        lambda x: x * torch.arange(1, 13.0).view(3, 4),
        lambda x: x.transpose(1, 2).contiguous(),
        lambda x: torch.cat([x, x.new_ones(len(x), 3, 4)], 2)[..., :4].clone(),
    ],
    ids=["moved", "scaled", "turned", "cut out"],
)
def test_data_that_came_whole_are_known_from_then_on(changed):
    model = wired(
        lambda m, x: m.last(torch.cat([m.first(changed(x).flatten(1)), x.flatten(1)], 1)),
        first=nn.Linear(12, 4), last=nn.Linear(16, 2),
    )  # fmt: skip
    report = report_of(model, drawn(400, 3, 4))
    assert report.reference.states[0] == "input"
    assert report.reads["last"] == ("first", "input")
    assert by_name(report)["last"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("made", "whole"),
    [
        (lambda x: 2 * x + torch.arange(6.0), True),
        (lambda x: x.bfloat16(), True),
        (lambda x: x.flip(1), True),
        (lambda x: torch.cat([torch.ones(20, 2), x], 1), True),
        (lambda x: x - x[:, -1:], False),
        (lambda x: x / x.norm(dim=1, keepdim=True), False),
        (lambda x: x * torch.tensor([1, 1, 1, 0, 1, 1.0]), False),
        (lambda x: x[:, :5], False),
        (lambda x: x.relu(), False),
        (lambda x: x[:3] + 1, True),  # three samples tell nothing
    ],
)
def test_whether_a_tensor_holds_all_of_another_one_is_told_by_its_values(made, whole):
    x = drawn(20, 6)
    tensor = made(x)
    assert holds_all_of(tensor, x[: len(tensor)]) == whole


def test_a_state_that_a_module_keeps_for_itself_is_read_when_it_is_used():
    class Reversible(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor, back: bool) -> Tensor:
            if back:
                return x * self.weight + self.mean
            self.mean = x.mean(1, keepdim=True)
            return (x - self.mean) * self.weight

    model = wired(
        lambda m, x: m.rev(m.linear(m.rev(x, False)), True), rev=Reversible(), linear=nn.Linear(8, 4)
    )
    report = report_of(model, drawn(500, 8) + 2 * drawn(500, 1, seed=2))
    assert report.components == ("rev", "linear", "rev#1")
    assert report.reads["rev#1"] == ("linear", "input")
    assert by_name(report)["rev#1"] == pytest.approx(1, abs=1e-6)


def test_the_state_is_what_is_read_of_what_a_component_gives():
    x = drawn(500, 6)
    parts = {"both": Both(8, 5), "a": nn.Linear(8, 7), "b": nn.Linear(5, 7), "last": nn.Linear(7, 3)}
    first = wired(lambda m, x: m.last(m.a(m.both(x)[0])), **parts)
    second = wired(lambda m, x: m.last(m.b(m.both(x)[1])), **parts)

    def together(m, x):
        left, right = m.both(x)
        return m.last(m.a(left) + m.b(right))

    widths = {net: report_of(net, x).widths[0] for net in (first, second, wired(together, **parts))}
    assert list(widths.values()) == [8, 5, 13]
    for net in widths:
        report = report_of(net, x)
        assert report.components[0] == "both"
        assert report.parameters[0] == 91
        np.testing.assert_allclose(report.r2[1:], 1, atol=1e-6)


def test_a_network_that_ends_with_several_tensors_is_credited_for_all():
    model = wired(lambda m, x: m.last(torch.tanh(m.first(x))), first=nn.Linear(4, 6), last=Both(8, 5))
    report = report_of(model, drawn(400, 4))
    assert report.components == ("first", "last")
    assert report.widths == (6, 13)
    assert report.directions == 4  # as many as the network takes numbers


def test_what_is_passed_on_and_what_nobody_reads_is_no_state():
    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return torch.tanh(self.layer(x)), other, x.square()

    def forward(m, x, scale):
        x, scale, _ = m.a(x, scale)
        x, scale, _ = m.b(x, scale)
        return m.last(x)

    model = wired(forward, a=Passes(), b=Passes(), last=nn.Linear(4, 2))
    report = report_of(model, drawn(400, 4), drawn(400, 1, seed=2))
    assert report.widths == (4, 4, 2)


def test_scores_that_a_softmax_is_to_ignore_are_no_state():
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, before: Tensor | float) -> tuple[Tensor, Tensor]:
            scores = x @ x.mT + before
            scores = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), torch.finfo(x.dtype).min)
            return torch.tanh(self.layer(scores.softmax(2) @ x)), scores

    def forward(m, x):
        x, scores = m.a(x, 0.0)
        x, _ = m.b(x, scores)
        return m.last(x[:, 0])

    model = wired(forward, a=Scores(), b=Scores(), last=nn.Linear(4, 2))
    report = report_of(model, drawn(400, 3, 4))
    assert report.widths == (12, 4, 2)
    assert np.isfinite(report.credit).all()


def test_distributions_are_followed():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.scale = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Normal:
            return Normal(self.mean(x), self.scale(x).exp())

    def forward(m, x):
        return m.last(m.decoder(m.encoder(torch.tanh(m.first(x))).mean))

    parts = {"first": nn.Linear(3, 6), "encoder": Encoder(), "decoder": nn.Linear(4, 5)}
    report = report_of(wired(forward, **parts, last=nn.Linear(5, 2)), drawn(400, 3))
    assert report.components == ("first", "encoder", "decoder", "last")
    assert report.reads["decoder"] == ("encoder",)
    np.testing.assert_allclose(report.r2[2:], 1, atol=1e-6)


def test_the_chain_ends_with_what_is_returned():
    def forward(m, x):
        y = m.head(torch.tanh(m.body(x)))
        m.aside(y)
        return y

    model = wired(forward, body=nn.Linear(4, 6), head=nn.Linear(6, 3), aside=nn.Linear(3, 5))
    report = report_of(model, drawn(400, 4))
    assert report.components == ("body", "head")
    assert any("nothing leads from there to it: aside" in note for note in report.notes)


@pytest.mark.parametrize("name", ["input", "output"])
def test_components_may_be_called_as_the_ends_of_a_network_are(name):
    def forward(m, x):
        return m.last(torch.tanh(m.get_submodule(name)(x)))

    model = wired(forward, **{name: nn.Linear(4, 6)}, last=nn.Linear(6, 3))
    report = report_of(model, drawn(400, 4))
    assert report.components == (name, "last")
    assert report.reads[name] == ("data" if name == "input" else "input",)
    assert report.r2[0] == pytest.approx(1, abs=1e-6)


def test_repeating_a_learned_token_is_no_merge_of_samples():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(m, x):
        y = m.embed(x)
        token = m.tokens.token.repeat(len(x), 1, 1)
        return m.head(m.encoder(torch.cat([y, token], 1).reshape(len(x), -1)))

    parts = {"embed": nn.Linear(5, 8), "tokens": Tokens(), "encoder": nn.Linear(32, 6)}
    model = wired(forward, **parts, head=nn.Linear(6, 2))
    report = report_of(model, drawn(300, 3, 5))
    assert report.components == ("embed", "encoder", "head")


def test_names_of_further_tensors_tell_the_call():
    for call in ("net.0", "net.0#1", "a"):
        assert call_of(call) == call
        assert call_of(further_name(call, 2)) == call


def sorted_data() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network that reads categories, which come sorted: one alone in the first batches."""
    model = wired(
        lambda m, x, k: m.last(torch.cat([m.first(x), m.table(k)], 1)),
        first=nn.Linear(4, 4), table=nn.Embedding(5, 3), last=nn.Linear(7, 3),
    )  # fmt: skip
    x, kinds = drawn(600, 4), torch.arange(5).repeat_interleave(120)
    return model.eval(), list(zip(x.split(60), kinds.split(60), strict=True))


def test_what_varies_in_later_batches_alone_counts():
    model, batches = sorted_data()

    def forward(m, batch):
        return m(*batch)

    report = credit_report(model, batches, forward_fn=forward)
    assert by_name(report)["last"] == pytest.approx(1, abs=1e-6)
    assert "table" in report.reference.states[0]
    # A generator cannot be gone through again.
    told = credit_report(model, iter(batches), forward_fn=forward)
    note = "the same for every sample of the first batch, so left out, though not in later ones: table"
    assert any(found.startswith(note) for found in told.notes)
    assert not any(found.startswith("the same for every sample, ") for found in told.notes)
    # Where it never varies, nothing is said of later batches.
    same = credit_report(model, batches[:2], forward_fn=forward)
    assert "the same for every sample, so left out: table" in same.notes


class Stepwise(nn.Module):
    """Takes a window at once, and then goes on by single steps, on what it gave itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = wired(
            lambda m, x: m.head(torch.tanh(m.embed(x))), embed=nn.Linear(2, 8), head=nn.Linear(8, 2)
        )

    def run(self, x: Tensor, steps: int) -> Tensor:
        outputs = [self.net(x)[:, -1:]]
        for _ in range(steps):
            outputs.append(self.net(outputs[-1]))
        return torch.cat(outputs, 1)


def test_calls_on_data_of_other_shapes_do_not_count():
    model, x = Stepwise().eval(), drawn(400, 6, 2)
    found = [
        credit_report(model, x.split(100), forward_fn=lambda m, batch, k=k: m.run(batch, k))
        for k in (0, 3)
    ]
    assert [report.n_samples for report in found] == [400, 400]
    np.testing.assert_allclose(found[1].credit, found[0].credit, atol=1e-12)
    assert any(
        note.startswith("12 calls of the network on data of other shapes") for note in found[1].notes
    )
    assert not any("calls of the network" in note for note in found[0].notes)
    # Those of the same shape do: two views of each sample.
    views = credit_report(model, x.split(100), forward_fn=lambda m, b: (m.net(b), m.net(-b)))
    assert views.n_samples == 800


@pytest.mark.parametrize("adds", [False, True])
def test_a_part_that_runs_on_samples_of_its_own_costs_the_batches_alone_that_it_differs_in(adds):
    def run(m, x, labelled):
        z = m.enc(x)
        # A function takes the sum, which no later pass shows.
        return m.dec((m.mid(z) + z).pow(2) if adds else z), m.cls(m.enc(labelled))

    model = wired(
        run, enc=nn.Linear(8, 16), mid=nn.Linear(16, 16), dec=nn.Linear(16, 8), cls=nn.Linear(16, 3)
    ).eval()
    batches = [(drawn(64, 8, seed=n), drawn(size, 8, seed=9)) for n, size in enumerate([64, 64, 25, 64])]

    def forward(m, batch):
        return m(*batch)

    report = credit_report(model, batches, forward_fn=forward)
    assert report.n_samples == 192
    assert any(
        note.startswith("1 batches were left out, for parts side by side") for note in report.notes
    )
    with pytest.raises(ValueError, match="parallel components gave differing numbers of rows"):
        credit_report(model, batches, components=["enc", "dec", "cls"], forward_fn=forward)


def test_views_of_one_copy_are_parts_of_it():
    class Select(nn.Module):
        """Takes a state and several variables by name, as variable selection does."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"b": nn.Linear(2, 6), "c": nn.Linear(3, 6)})

        def forward(self, variables: dict[str, Tensor], context: Tensor) -> Tensor:
            return context + sum(self.layers[name](x) for name, x in variables.items())

    def forward(m, x, y):
        both = torch.cat([x, y], 1)
        context = m.first(both[:, :2])
        return m.last(torch.tanh(m.select({"b": both[:, 2:4], "c": both[:, 4:]}, context)))

    model = wired(forward, first=nn.Linear(2, 6), select=Select(), last=nn.Linear(6, 2))
    assert r2_of(model, drawn(500, 3), drawn(500, 4, seed=2))["select"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scaled", [True, False])
def test_data_that_are_scaled_by_sample_beside_a_state_are_told(scaled):
    def forward(m, t, x):
        size = x.abs().mean(1, keepdim=True) if scaled else 2.0
        return m.last(m.mix(torch.cat([m.first(t), x / size], 1)))

    model = wired(forward, first=nn.Linear(3, 4), mix=nn.Linear(12, 6), last=nn.Linear(6, 2))
    report = report_of(model, drawn(500, 3), drawn(500, 8, seed=2) * drawn(500, 1, seed=3).exp())
    told = [note for note in report.notes if note.startswith("data of the batch go into mix changed")]
    assert bool(told) == scaled
    assert (by_name(report)["mix"] > 0.999) != scaled


def test_data_scaled_beside_an_embedding_are_an_input_as_they_are_taken():
    def forward(m, x, kind):
        scaled = x / x.abs().mean(1, keepdim=True)
        return m.last(m.mix(torch.cat([m.table(kind), scaled], 1)))

    model = wired(forward, table=nn.Embedding(4, 3), mix=nn.Linear(11, 6), last=nn.Linear(6, 2))
    report = report_of(model, drawn(500, 8) * drawn(500, 1, seed=3).exp(), torch.randint(4, (500,)))
    assert report.reference.states == ("input", "mix", "last")
    assert by_name(report)["mix"] == pytest.approx(1, abs=1e-6)
    assert not any("changed" in note or "left out" in note for note in report.notes)
    assert sum(note.startswith("what table gave is part of the input x_0") for note in report.notes) == 1


def test_what_a_module_with_a_table_makes_of_data_is_a_component():
    class Front(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 3)

        def forward(self, x: Tensor, kind: Tensor) -> Tensor:
            return torch.cat([self.table(kind), x / x.abs().mean(1, keepdim=True)], 1)

    parts = {"front": Front(), "mix": nn.Linear(11, 6), "last": nn.Linear(6, 2)}
    model = wired(lambda m, x, kind: m.last(m.mix(m.front(x, kind))), **parts)
    report = report_of(model, drawn(500, 8), torch.randint(4, (500,)))
    assert report.components == ("front", "mix", "last")
    assert not any("x_0" in note for note in report.notes)


def test_masks_made_of_data_are_nothing_that_a_state_is_made_of():
    def forward(m, x):
        h = m.first(x - x.mean(1, keepdim=True))
        return m.last(h + torch.zeros_like(h).masked_fill(x > 9, -1e9))

    model = wired(forward, first=nn.Linear(6, 6), last=nn.Linear(6, 2))
    report = report_of(model, drawn(400, 6))
    assert report.reads["last"] == ("first",)
    assert report.notes == ()


def test_what_is_known_of_a_component_holds_for_all_tensors_that_it_gives():
    model = wired(lambda m, x: m.last(m.both(x)[1]), both=Both(8, 5), last=nn.Linear(5, 2))
    model.both.requires_grad_(requires_grad=False)
    with torch.no_grad(), Capture(model, keep=lambda _, recorded: recorded) as capture:
        capture.start_pass(x := drawn(20, 6))
        model(x)
        states = capture.end_pass()
    assert [states[name].is_frozen for name in ("both", "both#0:1", "last")] == [True, True, False]
    assert states["both#0:1"].from_data


def test_constants_are_told_beside_what_varies_in_later_batches():
    model, batches = sorted_data()
    model.places = nn.Embedding(4, 4)

    def forward(m, batch):
        x, kinds = batch
        places = m.places(torch.arange(4))[:, 0]
        return m.last(torch.cat([m.first(x + places), m.table(kinds)], 1))

    notes = credit_report(model, iter(batches), forward_fn=forward).notes
    assert "the same for every sample, so left out: places" in notes
    assert any(note.startswith("the same for every sample of the first batch") for note in notes)


def test_a_second_look_leaves_random_states_alone():
    model, batches = sorted_data()
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    before = torch.get_rng_state()
    report = credit_report(model, DataLoader(data, 60), forward_fn=lambda m, batch: m(*batch))
    assert "table" in report.reference.states[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_data_of_one_axis_that_come_changed_are_followed():
    model = wired(
        lambda m, x, w: m.last((m.first(x).squeeze(1) * (w - 1) / 2)[:, None]),
        first=nn.Linear(3, 1), last=nn.Linear(1, 2),
    )  # fmt: skip
    report = report_of(model, drawn(300, 3), drawn(300, seed=2))
    assert not any("could not be followed" in note for note in report.notes)
    assert report.reads["last"] == ("first", "input+input#1")


def test_where_data_are_lost_later_batches_run_what_the_first_one_did(monkeypatch):
    def fails(*_: object) -> None:
        raise IndexError("of this project's own")

    monkeypatch.setattr("lightning_koopman.network.flow.provenance.holds_all_of", fails)
    model = wired(
        lambda m, x, y, w: m.last(m.merge(x, y, torch.tanh(m.stem(y))) * (w - 1)),
        merge=Merge(), stem=nn.Linear(4, 8), last=nn.Linear(8, 3),
    )  # fmt: skip
    report = report_of(model, drawn(300, 3), drawn(300, 4, seed=2), drawn(300, 8, seed=3))
    assert any("the data could not be followed (IndexError" in note for note in report.notes)
    assert report.components == ("stem", "merge", "last")
