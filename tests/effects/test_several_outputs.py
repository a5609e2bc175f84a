"""Effects of components that give several tensors."""

import numpy as np
import pytest
import torch
from small import Both, wired
from torch import Tensor, nn
from torch.distributions import Normal

from lightning_koopman import component_effects, credit_report, drop_order
from lightning_koopman.network.runs.hook_points import HookPoint, HookPoints, replace_tensor
from lightning_koopman.network.tensors import all_tensors


def built(forward) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    parts = {"both": Both(3, 6), "a": nn.Linear(3, 7), "b": nn.Linear(6, 7), "last": nn.Linear(7, 2)}
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    return wired(forward, **parts).eval(), list(x.split(100))


def second_alone(m, x):
    return m.last(torch.tanh(m.b(m.both(x)[1])))


def together(m, x):
    left, right = m.both(x)
    return m.last(torch.tanh(m.a(left) + m.b(right)))


@torch.no_grad()
def change(model: nn.Module, x: Tensor, replace) -> float:
    """Squared change of the outputs, over their variance, if both tensors are replaced."""
    before = model(x)
    hook = model.both.register_forward_hook(lambda _, args, out: replace(*out))
    after = model(x)
    hook.remove()
    return float((after - before).square().sum() / (before - before.mean(0)).square().sum())


def means(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return left.mean(0).expand_as(left), right.mean(0).expand_as(right)


@pytest.mark.parametrize("with_report", [True, False])
@pytest.mark.parametrize("forward", [second_alone, together])
def test_all_that_a_skipped_component_gives_is_at_its_mean(forward, with_report):
    model, batches = built(forward)
    report = credit_report(model, batches) if with_report else None
    effects = component_effects(model, batches, report, ["skip"])
    truth = change(model, torch.cat(batches), means)
    assert truth > 0.1
    assert effects.components[0] == "both"
    assert effects.values["skip"][0] == pytest.approx(truth, rel=1e-4)
    assert effects.doubts["skip"][0] == ()


def streams(given) -> nn.Module:
    """A network of two streams that a block takes and gives, as ``given`` makes them of one tensor."""
    torch.manual_seed(0)
    block = wired(
        lambda m, a, b: given(torch.relu(m.inner(torch.cat([a, b], 1)))), inner=nn.Linear(8, 8)
    )
    first = wired(lambda m, x: given(torch.tanh(m.inner(x))), inner=nn.Linear(6, 8))

    def forward(m, x):
        left, right = m.both(*m.first(x))
        return m.last(torch.tanh(m.mix(left + 2 * right.exp())))

    return wired(forward, first=first, both=block, mix=nn.Linear(4, 7), last=nn.Linear(7, 2)).eval()


def halves(y: Tensor) -> tuple[Tensor, ...]:
    return y.chunk(2, dim=1)


def copies(y: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.clone() for part in halves(y))


def test_parts_of_one_tensor_are_each_a_tensor_of_its_own():
    batches = built(together)[1]
    reports, effects = [], []
    for parts in (halves, copies):
        model = streams(parts)
        reports.append(credit_report(model, batches))
        effects.append(component_effects(model, batches, reports[-1], ["skip", "output_noise"]).values)
    assert reports[0].components == ("first", "both", "mix", "last")
    assert reports[0].r2 == pytest.approx(reports[1].r2)
    assert reports[0].credit == pytest.approx(reports[1].credit)
    for kind in ("skip", "output_noise"):
        assert effects[0][kind] == pytest.approx(effects[1][kind])


@pytest.mark.parametrize("parts", [halves, copies])
def test_a_skipped_block_of_two_streams_passes_both(parts):
    model, batches = streams(parts), built(together)[1]
    effects = component_effects(model, batches, credit_report(model, batches), ["skip"])
    x, given = torch.cat(batches), []
    hook = model.both.register_forward_pre_hook(lambda _, args: given.append(args))
    truth = change(model, x, lambda *_: given[-1])
    hook.remove()
    assert effects.values["skip"][1] == pytest.approx(truth, rel=1e-4)


def test_a_second_tensor_that_nobody_reads_changes_nothing():
    model, batches = built(lambda m, x: m.last(torch.tanh(m.a(m.both(x)[0]))))
    effects = component_effects(model, batches, None, ["skip", "linear"])
    assert effects.doubts["linear"][0] == ()
    truth = change(model, torch.cat(batches), lambda left, right: (means(left, right)[0], right))
    assert effects.values["skip"][0] == pytest.approx(truth, rel=1e-4)


def test_of_a_skipped_cell_states_are_at_their_means() -> None:
    """It takes three tensors and gives two: places say nothing of what is passed on."""
    torch.manual_seed(0)
    parts = {"both": nn.LSTMCell(5, 5), "first": nn.Linear(6, 5), "last": nn.Linear(5, 2)}

    def forward(m, x):
        y = m.first(x)
        h, c = m.both(y, (y.tanh(), y.sigmoid()))
        return m.last(h + c)

    model, batches, given = wired(forward, **parts).eval(), built(together)[1], []
    effects = component_effects(model, batches, credit_report(model, batches), ["skip"])
    hook = model.both.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    truth = change(model, torch.cat(batches), lambda h, c: (given[-1], c.mean(0).expand_as(c)))
    hook.remove()
    found = dict(zip(effects.components, effects.values["skip"], strict=True))
    assert found["both"] == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("parts", [halves, copies])
def test_a_part_that_nobody_reads_is_no_doubt(parts):
    torch.manual_seed(0)
    first = wired(lambda m, x: parts(torch.tanh(m.inner(x))), inner=nn.Linear(6, 8))
    model = wired(lambda m, x: m.last(m.first(x)[0]), first=first, last=nn.Linear(4, 2)).eval()
    effects = component_effects(model, built(together)[1], None, ["linear"])
    assert effects.doubts["linear"][0] == ()


def test_where_the_first_alone_is_altered_a_doubt_says_so():
    model, batches = built(together)
    effects = component_effects(model, batches, None, ["linear", "weight_noise"], how="auto")
    assert effects.doubts["linear"][0] == ("outputs",)
    assert "outputs" not in effects.doubts["linear"][1]
    assert effects.doubts["weight_noise"] == ((),) * len(effects.components)


@pytest.mark.parametrize("forward", [second_alone, together])
def test_predictions_are_of_all_that_a_component_gives(forward):
    model, batches = built(forward)
    model = model.double()
    batches = [x.double() for x in batches]
    near = {k: v + 1e-5 * torch.randn_like(v) for k, v in model.state_dict().items()}
    effects = component_effects(
        model, batches, credit_report(model, batches), ["output_noise"],
        replacements={"near": near}, how="both", strength=1e-3, draws=60, probes=2, scale="relative",
    )  # fmt: skip
    assert effects.components[0] == "both"
    np.testing.assert_allclose(effects.predicted["near"], effects.values["near"], rtol=1e-3)
    noisy = effects.predicted["output_noise"]
    np.testing.assert_allclose(noisy, effects.values["output_noise"], rtol=0.1)
    # All that follows the streams' last block is linear, so the second order is the effect.
    last = wired(lambda m, x: m.last(torch.cat(m.both(x), 1)), both=model.both, last=nn.Linear(9, 2))
    skipped = component_effects(last.double(), batches, None, ["skip"], how="both", probes=2)
    assert skipped.components[0] == "both"
    assert skipped.predicted["skip"][0] == pytest.approx(skipped.values["skip"][0], rel=1e-6)


def test_noise_goes_on_all_of_them():
    model, batches = built(second_alone)
    effects = component_effects(model, batches, None, ["output_noise"], how="measured", strength=0.3)
    torch.manual_seed(3)
    x, runs = torch.cat(batches), []
    for _ in range(20):
        runs.append(change(model, x, lambda left, right: (left, right + 0.3 * noise_like(right))))
    assert effects.values["output_noise"][0] == pytest.approx(np.mean(runs), rel=0.2)


def noise_like(tensor: Tensor) -> Tensor:
    return tensor.std(0) * torch.randn(tensor.shape)


def test_states_of_an_encoder_that_alone_go_on_are_skipped():
    class Translate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.LSTM(3, 8, batch_first=True)
            self.decoder, self.head = nn.LSTM(2, 8, batch_first=True), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            _, state = self.encoder(x)
            return self.head(self.decoder(torch.ones(len(x), 4, 2), state)[0])

    torch.manual_seed(0)
    model, batches = Translate().eval(), list(torch.randn(200, 5, 3).split(50))
    effects = component_effects(model, batches, None, ["skip"])
    # Nothing else of the data goes on: what is left has no variance over samples.
    assert effects.values["skip"][0] == pytest.approx(1, abs=0.05)


def test_parameters_of_a_distribution_are_replaced():
    given = Normal(torch.zeros(3), torch.ones(3))
    replaced = replace_tensor((given, 1), given.loc, torch.full((3,), 2.0))
    assert replaced[0].mean.tolist() == [2, 2, 2]
    assert replaced[0].stddev.tolist() == [1, 1, 1]
    assert given.mean.tolist() == [0, 0, 0]


def test_each_tensor_of_a_call_is_altered_by_its_place():
    model, (x, *_) = built(together)
    points = {HookPoint("out", "both", 1): lambda tensor, _: torch.zeros_like(tensor)}
    with torch.no_grad(), HookPoints(model, [HookPoint("out", "both", 1)], points) as hooks:
        altered = model(x)
    with torch.no_grad():
        expected = model.last(torch.tanh(model.a(model.both(x)[0]) + model.b.bias))
    torch.testing.assert_close(altered, expected)
    assert hooks.values[HookPoint("out", "both", 1)].abs().sum() == 0
    hooks = HookPoints(model, [], {HookPoint("out", "last", 1): points.popitem()[1]})
    with hooks, pytest.raises(ValueError, match="'last' gave Tensor with no tensor to replace"):
        model(x)


def test_all_that_a_network_ends_with_counts():
    torch.manual_seed(0)
    parts = {"first": nn.Linear(4, 6), "last": Both(3, 6)}
    model = wired(lambda m, x: m.last(torch.tanh(m.first(x))), **parts).eval()
    batches = list(torch.randn(400, 4).split(100))
    effects = component_effects(model, batches, None, ["skip"])
    assert any("averaged over 2 outputs, those of last" in note for note in effects.notes)
    # What does not depend on the input any more misses all of the variance, of either.
    assert effects.values["skip"].tolist() == pytest.approx([1, 1], rel=0.05)


def test_a_flow_is_seen_by_what_each_of_its_layers_adds_beside_the_sample():
    """The last layer leads to the log-determinant by the second tensor that it gives alone."""
    torch.manual_seed(0)

    def coupling(m, x):
        left, right = x.chunk(2, 1)
        scale, shift = torch.tanh(m.inner(left)).chunk(2, 1)
        return torch.cat([right * scale.exp() + shift, left], 1), scale.sum(1, keepdim=True)

    def flow(m, x):
        x, first = m.one(x)
        x, second = m.both(x)
        return x, first + second

    parts = {name: wired(coupling, inner=nn.Linear(2, 4)) for name in ("one", "both")}
    model, x = wired(flow, **parts).eval(), torch.randn(300, 4)

    class Volume(nn.Module):
        both = model.both

        def forward(self, x: Tensor) -> Tensor:
            return model(x)[1]

    effects = component_effects(model, list(x.split(100)), credit_report(model, list(x.split(100))))
    truth = change(Volume(), x, lambda y, volume: (y, volume.mean(0).expand_as(volume)))
    assert truth > 0.1
    assert effects.components == ("one", "both")
    assert effects.values["skip"][1] == pytest.approx(truth, rel=1e-4)
    assert effects.doubts["skip"] == ((), ())


@pytest.mark.parametrize(
    "given",
    [
        lambda h: (h, h),
        lambda h: (h, (h[:, 1:5], {"again": h})),
        lambda h: (h.t().contiguous().t(),) * 2,
        lambda h: (torch.cat([h, h], 1)[:, :6], h)[:1] * 2,
        lambda h: {"all": h, "mean": h.view(-1, 2, 3)[:, :, 2]},
    ],
)
def test_what_a_component_gives_twice_or_in_part_again_is_altered_everywhere(given):
    torch.manual_seed(0)
    twice = wired(lambda m, x: given(torch.tanh(m.inner(x))), inner=nn.Linear(6, 6))
    values = all_tensors(given(torch.zeros(2, 6)))
    heads = {f"head{i}": nn.Linear(part.shape[1], 7) for i, part in enumerate(values)}

    def forward(m, x):
        parts = enumerate(all_tensors(m.twice(m.first(x))))
        return m.last(sum(torch.tanh(getattr(m, f"head{i}")(part)) for i, part in parts))

    parts = {"first": nn.Linear(6, 6), "twice": twice, **heads, "last": nn.Linear(7, 2)}
    model, batches = wired(forward, **parts).eval(), built(together)[1]
    effects = component_effects(model, batches, None, ["skip"], how="both", probes=2)
    x = torch.cat(batches)
    with torch.no_grad():
        before = model(x)
        taken = model.first(x)
        hook = model.twice.register_forward_hook(lambda *_: given(taken))
        after = model(x)
        hook.remove()
    truth = float((after - before).square().sum() / (before - before.mean(0)).square().sum())
    where = effects.components.index("twice")
    assert effects.values["skip"][where] == pytest.approx(truth, rel=1e-4)
    # Predicted, a small change of it moves all of it as well.
    near = component_effects(
        model.double(), [b.double() for b in batches], None, ["output_noise"],
        how="both", probes=2, strength=1e-3, draws=60, components=["twice", "last"],
    )  # fmt: skip
    assert near.predicted["output_noise"][0] == pytest.approx(near.values["output_noise"][0], rel=0.15)


class Encoder(nn.Module):
    """A recurrent layer with dropout behind it, of which the cell goes on past the dropout."""

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        self.first, self.rnn = nn.Linear(3, 6), nn.LSTM(6, 6, batch_first=batch_first)
        self.drop, self.b, self.c = nn.Dropout(0.1), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        turn = (lambda t: t) if self.rnn.batch_first else (lambda t: t.transpose(0, 1))
        hidden, (_, cell) = self.rnn(turn(self.first(x)))
        return self.read(turn(self.drop(hidden)), cell)

    def read(self, hidden: Tensor, cell: Tensor) -> Tensor:
        return self.b(hidden.mean(1)) + 3 * self.c(cell[-1])


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
def test_what_goes_on_past_a_module_that_continues_a_component_is_altered_too(batch_first):
    torch.manual_seed(0)
    model, x = Encoder(batch_first=batch_first).eval(), torch.randn(400, 5, 3)
    report = credit_report(model, list(x.split(100)))
    assert report.parts["rnn"] == ("rnn", "drop")
    kinds = ["skip", "output_noise", "weight_noise"]
    effects = component_effects(model, list(x.split(100)), report, kinds, how="both", draws=20)
    where = effects.components.index("rnn")
    model.rnn.batch_first = True
    taken = model.first(x)
    hidden, (_, cell) = model.rnn(taken)
    before = model.read(hidden, cell)

    def moved(hidden: Tensor, cell: Tensor) -> float:
        squares = (model.read(hidden, cell) - before).square().sum()
        return float(squares / (before - before.mean(0)).square().sum())

    truth = moved(taken, cell.mean(1, keepdim=True).expand_as(cell))
    assert truth > 1.5 * moved(taken, cell)
    assert effects.values["skip"][where] == pytest.approx(truth, rel=1e-4)
    drawn = [
        moved(
            hidden + 0.3 * hidden.std(0) * torch.randn_like(hidden),
            cell + 0.3 * cell.std(1, keepdim=True) * torch.randn_like(cell),
        )
        for _ in range(20)
    ]
    assert effects.values["output_noise"][where] == pytest.approx(np.mean(drawn), rel=0.1)
    for kind in ("output_noise", "weight_noise"):
        measured = effects.values[kind][where]
        assert effects.predicted[kind][where] == pytest.approx(measured, rel=0.6)


@torch.no_grad()
def test_what_goes_on_past_a_pooling_is_altered_where_the_block_is_skipped_before_it():
    torch.manual_seed(0)
    block = wired(
        lambda m, x: (x + 0.3 * torch.tanh(m.inner(x)), m.beside(x)),
        inner=nn.Linear(6, 6),
        beside=nn.Linear(6, 2),
    )

    def forward(m, x):
        hidden, beside = m.block(m.first(x))
        return m.last(m.pool(hidden)) + beside

    parts = {"first": nn.Linear(6, 6), "block": block, "pool": nn.AvgPool1d(2), "last": nn.Linear(3, 2)}
    model, x = wired(forward, **parts).eval(), torch.randn(400, 6)
    effects = component_effects(model, list(x.split(100)), None, ["skip"])
    taken = model.first(x)
    before, beside = model(x), block.beside(taken)
    moved = model.last(model.pool(taken)) + beside.mean(0) - before
    truth = float(moved.square().sum() / (before - before.mean(0)).square().sum())
    where = effects.components.index("block")
    assert effects.values["skip"][where] == pytest.approx(truth, rel=1e-4)


class Branches(nn.Module):
    """Two heads on blocks of their own; the second goes through an array, so that nothing follows it."""

    def __init__(self, arrays: bool = False) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Linear(6, 6) for _ in range(3))
        self.first, self.second, self.arrays = nn.Linear(6, 3), nn.Linear(6, 2), arrays

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.stem(x))
        a, b = torch.tanh(self.a(h)), torch.tanh(self.b(h))
        a = torch.from_numpy(a.detach().numpy().copy()) if self.arrays else a
        return self.first(a), self.second(b)


def test_what_forward_fn_leaves_out_has_no_effect_and_is_left_alone_by_decisions():
    torch.manual_seed(0)
    net, x = Branches().eval(), torch.randn(200, 6)
    batches = x.split(50)

    def first(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)[0]

    found = component_effects(
        net, batches, kinds=["skip", "weight_noise"], how="both", forward_fn=first,
        sets=[{"a", "b"}, {"b", "second"}],
    )  # fmt: skip
    places = {name: found.components.index(name) for name in found.components}
    for kind in found.kinds:
        gone = {n for n, i in places.items() if np.isnan(found.values[kind][i])}
        assert gone == {"b", "second", "b+second"}
        assert {n for n, i in places.items() if found.doubts[kind][i] == ("elsewhere",)} == gone
        assert {n for n, i in places.items() if np.isnan(found.predicted[kind][i])} == gone
        # Beside it, what leads nowhere adds nothing.
        assert found.predicted[kind][places["a+b"]] == found.predicted[kind][places["a"]]
    with torch.no_grad():
        own = net(x)[0].double()
        skipped = net.first(torch.tanh(torch.tanh(net.stem(x)))).double()
    expected = (skipped - own).square().sum() / (own - own.mean(0)).square().sum()
    for name in ("a", "a+b"):
        assert found.values["skip"][places[name]] == pytest.approx(float(expected), rel=1e-4)
    order = drop_order(net, batches, forward_fn=first, steps=3)
    assert "b" in order.refused
    assert "b" not in order.candidates
    assert "a" in order.candidates


def test_what_goes_on_as_an_array_has_its_effect():
    torch.manual_seed(0)
    net, x = Branches(arrays=True).eval(), torch.randn(200, 6)
    found = component_effects(
        net, x.split(50), components=["stem", "a", "first"], forward_fn=lambda m, b: m(b)[0]
    )
    with torch.no_grad():
        own = net(x)[0].double()
        skipped = net.first(torch.tanh(torch.tanh(net.stem(x)))).double()
    expected = (skipped - own).square().sum() / (own - own.mean(0)).square().sum()
    assert found.values["skip"][1] == pytest.approx(float(expected), rel=1e-4)


def test_weights_that_count_elsewhere_have_their_effect_there():
    torch.manual_seed(0)
    net, x = Branches().eval(), torch.randn(200, 6)
    net.b.weight = net.a.weight
    found = component_effects(
        net, x.split(50), kinds=["weight_noise"], how="measured", forward_fn=lambda m, b: m(b)[0]
    )
    assert found.values["weight_noise"][found.components.index("b")] > 0


def test_an_output_that_is_still_the_same_for_all_samples_counts_for_nothing():
    def effects(gives_both):
        def run(m, x):
            h = torch.tanh(m.a(x))
            h = h + m.b(h)
            return (m.c(h), m.zero(h)) if gives_both else m.c(h)

        torch.manual_seed(0)
        model = wired(run, a=nn.Linear(4, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3), zero=nn.Linear(6, 2))
        nn.init.zeros_(model.zero.weight)
        x = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
        return component_effects(model, x.split(50), kinds=["skip"], components=["b"], how="measured")

    assert effects(True).values["skip"] == pytest.approx(effects(False).values["skip"], rel=1e-4)
