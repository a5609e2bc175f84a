"""What the chain is made of: links, joins, the output of interest, reductions."""

import itertools
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import Options, credit_report
from lightning_koopman.network.flow.dataflow import DataFlow


class LinearResidual(nn.Module):
    """x + b(a(x)) three times at leaf granularity, all of it linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(6)).double()

    def forward(self, x: Tensor) -> Tensor:
        for a, b in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = x + b(a(x))
        return x


def residual() -> tuple[LinearResidual, list[Tensor]]:
    torch.manual_seed(0)
    return LinearResidual(), list(torch.randn(400, 5, dtype=torch.float64).split(100))


def test_a_linear_residual_chain_has_the_volume_of_its_dense_jacobian():
    net, batches = residual()
    report = credit_report(net, batches, options=Options(output=lambda given: given, tikhonov=0.0))
    assert report.components[-1] == "output"
    dense = torch.eye(5, dtype=torch.float64)
    for a, b in zip(net.layers[::2], net.layers[1::2], strict=True):
        dense = (torch.eye(5, dtype=torch.float64) + b.weight @ a.weight) @ dense
    expected = float(torch.linalg.slogdet(dense.detach())[1]) / 5
    assert report.total == pytest.approx(expected, abs=1e-8)
    assert float(report.r2.min()) > 1 - 1e-9


def test_the_output_of_interest_may_be_a_module():
    net, batches = residual()
    assert credit_report(net, batches, options=Options(output="layers.3")).components[-1] == "layers.3"
    with pytest.raises(ValueError, match="output is 'layer', which is no module of LinearResidual"):
        credit_report(net, batches, options=Options(output="layer"))


class Dense(nn.Module):
    """Every layer reads all states before it."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2 * (i + 1), 2) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for layer in self.layers:
            states.append(torch.tanh(layer(torch.cat(states, 1))))
        return states[-1]


def test_a_step_reads_six_states_of_full_width_and_says_what_it_left_out():
    report = credit_report(Dense(8), list(torch.randn(900, 2).split(300)), options=Options(max_dim=2))
    assert report.reads["layers.5"] == (*(f"layers.{i}" for i in range(4, -1, -1)), "input")
    assert report.reads["layers.7"] == tuple(f"layers.{i}" for i in range(6, 0, -1))
    told = [note for note in report.notes if "the nearest" in note]
    assert told == [
        "of many states, operators read the nearest, and what only the others bring counts as "
        "unexplained: layers.6 (6 of 7), layers.7 (6 of 8)"
    ]


class Put(nn.Module):
    """Puts two states side by side."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], dim=1)


def test_a_step_reads_all_narrow_states_that_its_layer_does():
    """Where each layer goes on with all before it: as if a module made each state that layers take."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for layer, put in zip(m.layers, m.puts, strict=True):
            x = put(x, layer(x)) if m.named else torch.cat([x, layer(x)], dim=1)
        return m.head(x)

    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Sequential(nn.Linear(12 + 4 * i, 4), nn.Tanh()) for i in range(10))
    puts, head = nn.ModuleList(Put() for _ in layers), nn.Linear(52, 3)
    net = wired(run, stem=nn.Linear(12, 12), layers=layers, puts=puts, head=head).double().eval()
    batches = list(torch.randn(2000, 12, dtype=torch.float64).split(500))
    net.named = False
    report = credit_report(net, batches)
    assert len(report.reads["head"]) == 11
    assert not any("the nearest" in note for note in report.notes)
    net.named = True
    known = credit_report(net, batches, components=["stem", "layers.*", "puts.*", "head"])
    named = [name.removesuffix(".0") for name in report.components]
    places = [known.components.index(name) for name in named]
    assert report.credit == pytest.approx(known.credit[places], abs=1e-6)
    assert report.chain_r2 == pytest.approx(known.chain_r2[places], abs=1e-6)
    # The head alone weighs what the last layer gives.
    last = head.weight.detach().numpy()[:, -4:].T
    assert report["layers.9.0"].credit == pytest.approx(oracles.log_volume(last) / 3, abs=1e-6)


@pytest.mark.parametrize("where", ["_known", "_set", "_get"])
def test_an_error_of_the_tracer_leaves_a_plain_chain_and_a_note(monkeypatch, where):
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    batches = list(torch.randn(400, 5, dtype=torch.float64).split(100))
    expected = credit_report(net, batches)

    def fail(*_: object) -> None:
        raise NotImplementedError("no storage here")

    monkeypatch.setattr(DataFlow, where, fail)
    given = credit_report(net, batches)
    assert given.components == expected.components
    assert given.credit == pytest.approx(expected.credit)
    (note,) = [note for note in given.notes if "could not be followed" in note]
    assert "NotImplementedError: no storage here" in note
    skipping, _ = residual()
    assert credit_report(skipping, batches).reads["layers.3"] == ("layers.2",)


def test_an_error_of_the_model_under_the_tracer_stays_the_models():
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        credit_report(net, [torch.randn(10, 5)])


def through_numpy(m: Any, x: Tensor) -> Tensor:
    """Leave torch between two layers, so that no data can be followed."""
    return m.second(torch.from_numpy(np.tanh(m.first(x).detach().numpy()).copy()))


def test_where_the_data_leave_torch_the_layer_before_is_taken_and_a_note_says_so():
    net = wired(through_numpy, first=nn.Linear(4, 5), second=nn.Linear(5, 3))
    report = credit_report(net, list(torch.randn(300, 4).split(100)))
    assert report.reads["second"] == ("first",)
    assert [note for note in report.notes if note.startswith("where the input of second comes from")]


def branches() -> nn.Module:
    """Two layers side by side, of which the second is given fewer rows in a later batch."""
    calls = itertools.count()

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.a(x) + (m.b(x[:-1]).sum() if next(calls) else m.b(x)))

    return wired(run, a=nn.Linear(4, 3), b=nn.Linear(4, 3), head=nn.Linear(3, 2))


def test_parallel_components_need_a_row_from_each_sample():
    with pytest.raises(ValueError, match=r"differing numbers of rows: \{.*'b': 49.*\}. Rows are"):
        credit_report(branches(), list(torch.randn(100, 4).split(50)))


def test_an_output_of_interest_that_does_not_run_is_named():
    net, batches = residual()
    net.idle = nn.Linear(5, 5).double()
    with pytest.raises(ValueError, match="the output of interest 'idle' did not run in the forward"):
        credit_report(net, batches, options=Options(output="idle"))


def windows() -> Any:
    """Folds the windows of an image into the batch axis, as shifted-window transformers do."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.inside(m.first(x).reshape(-1, 4)).reshape(-1, 8))

    return wired(run, first=nn.Linear(8, 8), inside=nn.Linear(4, 4), head=nn.Linear(8, 3))


def test_rows_of_several_windows_belong_to_one_sample():
    x = torch.randn(200, 8)
    net = windows()
    report = credit_report(net, list(x.split(50)), components=["first", "inside", "head"])
    assert report.widths == (8, 8, 3)
    # Nothing but a change of shape sets it apart from a plain chain.
    inside = nn.Linear(8, 8)
    with torch.no_grad():
        inside.weight.copy_(torch.block_diag(net.inside.weight, net.inside.weight))
        inside.bias.copy_(net.inside.bias.repeat(2))
    plain = credit_report(nn.Sequential(net.first, inside, net.head), list(x.split(50)))
    np.testing.assert_allclose(report.credit, plain.credit, atol=1e-5)


def two_towers() -> nn.Module:
    """Two towers of unequal depth, side branches into one layer, and a head behind both."""

    def layers(count: int, width: int = 4) -> nn.Module:
        return nn.ModuleList(nn.Linear(4, width) for _ in range(count))

    def run(m: Any, x: Tensor) -> Tensor:
        states = [a := m.left[0](x)]
        for layer in m.left[1:]:
            states.append(a := layer(a))
        b = m.right[1](m.right[0](x))
        sides = [side(s) for side, s in zip(m.sides, [*states, b], strict=True)]
        return m.head(torch.cat([m.fuse(torch.cat(sides, 1)), b], 1))

    right = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 4)])
    parts = {"left": layers(3), "right": right, "sides": layers(4, 3)}
    return wired(run, **parts, fuse=nn.Linear(12, 4), head=nn.Linear(8, 3)).double()


def test_towers_run_one_after_the_other_and_only_what_is_read_together_is_joined():
    torch.manual_seed(0)
    net = two_towers()
    batches = list(torch.randn(400, 4, dtype=torch.float64).split(100))
    report = credit_report(net, batches, options=Options(tikhonov=0.0))
    towers = ("left.0", "left.1", "left.2", "right.0", "right.1")
    assert report.components == (*towers, "sides.*", "fuse", "head")
    assert report.reads["right.0"] == ("input",)
    assert report.reads["left.1"] == ("left.0",)
    assert report.reads["sides.*"] == ("right.1", "left.2", "left.1", "left.0")
    dense = torch.autograd.functional.jacobian(net, batches[0][:1])[0, :, 0]
    assert report.total == pytest.approx(float(torch.linalg.svdvals(dense).log().mean()), abs=1e-9)


def positions(by_token: bool) -> nn.Module:
    """Adds positions, looked up from the shape of the embedded tokens, and as wide as the batch."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.tokens(x)
        return m.head(torch.tanh(m.mix(h + m.places(x if by_token else h))))

    parts = {"tokens": nn.Embedding(20, 8), "places": Places()}
    return wired(run, **parts, mix=nn.Linear(8, 8), head=nn.Linear(8, 3))


class Places(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.arange(x.shape[1]))


@pytest.mark.parametrize("by_token", [False, True])
def test_positions_that_no_data_reach_are_left_out_whatever_their_shape(by_token):
    # Eight samples a batch: positions of shape (6, 8) could be taken for eight samples along axis 1.
    report = credit_report(positions(by_token), list(torch.randint(0, 20, (240, 6)).split(8)))
    assert report.components == ("mix", "head")
    assert "the same for every sample, so left out: places" in report.notes


def test_states_that_first_vary_with_the_third_sample_are_kept():
    tokens = torch.randint(0, 20, (240, 6))
    tokens[1] = tokens[0]
    report = credit_report(positions(by_token=True), list(tokens.split(8)))
    assert report.components == ("mix", "head")
    assert [note for note in report.notes if "left out" in note] == [
        "the same for every sample, so left out: places"
    ]


def raw_positions(kind: str) -> nn.Module:
    """Adds to raw features, before any layer took them, positions that are looked up or computed."""

    def run(m: Any, x: Tensor) -> Tensor:
        places = {
            "looked up": lambda: m.table(torch.arange(6)),
            "of a buffer": lambda: m.places(m.grid),
            "of coordinates": lambda: m.places(torch.linspace(0, 1, 6)[:, None]),
        }
        return m.head(torch.tanh(m.mix(x + places[kind]())).mean(dim=1))

    places = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 8))
    table = nn.Embedding(6, 8)
    model = wired(run, table=table, places=places, mix=nn.Linear(8, 8), head=nn.Linear(8, 3))
    model.register_buffer("grid", torch.linspace(0, 1, 6)[:, None])
    return model


@pytest.mark.parametrize("kind", ["looked up", "of a buffer", "of coordinates"])
@pytest.mark.parametrize("size", [6, 50])
def test_data_that_positions_were_added_to_before_the_first_layer_is_its_input(kind, size):
    # Of as many positions as samples, rows could be taken for samples.
    found = credit_report(raw_positions(kind), list(torch.randn(300, 6, 8).split(size)))
    assert found.components == ("mix", "head")
    assert found.reference.widths == (48, 48, 3)
    assert not any("takes no floating-point" in n or "be followed" in n for n in found.notes)


def test_data_that_went_through_numpy_are_the_input_behind_positions_too():
    def run(m: Any, x: Tensor) -> Tensor:
        seen = torch.from_numpy(np.tanh(x.numpy()))
        return m.head(torch.tanh(m.mix(seen + m.table(torch.arange(6)))).mean(dim=1))

    model = wired(run, table=nn.Embedding(6, 8), mix=nn.Linear(8, 8), head=nn.Linear(8, 3))
    report = credit_report(model, list(torch.randn(300, 6, 8).split(50)))
    assert report.components == ("mix", "head")
    assert report.reference.states[0] == "input"


def test_data_lost_on_the_way_are_not_taken_for_what_the_network_holds():
    def run(m: Any, x: Tensor) -> Tensor:
        lost = torch.from_numpy(torch.tanh(m.encode(x)).numpy())
        return m.head(torch.tanh(m.mix(lost @ m.weights)))

    model = wired(run, encode=nn.Linear(8, 6), mix=nn.Linear(6, 6), head=nn.Linear(6, 3))
    model.weights = nn.Parameter(torch.randn(6, 6))
    report = credit_report(model, list(torch.randn(300, 8).split(50)))
    assert report.components == ("encode", "mix", "head")
    assert "where the input of mix comes from could not be followed" in report.notes[0]


def test_samples_decoded_of_noise_that_the_network_holds_are_not_what_the_report_is_about():
    def run(m: Any, x: Tensor) -> Tensor:
        decoded = m.decode(torch.relu(m.encode(x)))
        m.shown = m.decode(m.noise)
        return decoded

    for count in (16, 50):
        model = wired(run, encode=nn.Linear(8, 4), decode=nn.Linear(4, 8))
        model.register_buffer("noise", torch.randn(count, 4))
        report = credit_report(model, list(torch.randn(300, 8).split(50)))
        assert report.components == ("encode", "decode")
        assert not any("be followed" in note for note in report.notes)


@pytest.mark.parametrize("how", ["added", "beside", "of its own argument"])
def test_data_that_a_layer_takes_mixed_into_states_are_an_input(how):
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        label = m.label(y)
        if how == "of its own argument":
            return m.head(torch.tanh(m.gate(label, x)))
        return m.head(torch.tanh(m.mix(x + label if how == "added" else torch.cat([x, label], dim=1))))

    wide = 16 if how == "beside" else 8
    mix = {"gate": nn.Bilinear(8, 8, 6)} if how == "of its own argument" else {"mix": nn.Linear(wide, 6)}
    model = wired(run, label=nn.Embedding(3, 8), **mix, head=nn.Linear(6, 3))
    x, y = torch.randn(300, 8), torch.randint(0, 3, (300,))
    batches = list(zip(x.split(50), y.split(50), strict=True))
    report = credit_report(model, batches, forward_fn=lambda m, batch: m(*batch))
    assert report.components == (next(iter(mix)), "head")
    assert report.reference.states[0] == "label+input"
    assert report.reference.widths == (16, 6, 3)
    if how != "of its own argument":
        assert report.r2[0] > 0.999999


@pytest.mark.parametrize("cut", [
    lambda x: (x[:, :3], x[:, 3:]),
    lambda x: (x[:, :3].clone(), x[:, 3:].clone()),
    lambda x: (x[:, :3], x[:, 3:].clone()),
    lambda x: (x[:, :3], x),
])  # fmt: skip
def test_parts_of_one_tensor_that_several_layers_take_are_inputs_each(cut):
    wide = cut(torch.zeros(1, 8))[1].shape[1]

    def run(m: Any, x: Tensor) -> Tensor:
        first, second = cut(x)
        return m.head(torch.tanh(torch.cat([m.a(first), m.b(second)], dim=1)))

    model = wired(run, a=nn.Linear(3, 5), b=nn.Linear(wide, 4), head=nn.Linear(9, 3))
    report = credit_report(model, list(torch.randn(300, 8).split(50)))
    assert report.components == ("a+b", "head")
    assert report.r2[0] > 0.999999


def test_windows_that_overlap_are_steps_of_one_input():
    def run(m: Any, x: Tensor) -> Tensor:
        windows = x.unfold(1, 3, 1)
        return m.head(torch.tanh(m.a(windows[:, 0]) + m.a(windows[:, 4])))

    model = wired(run, a=nn.Linear(3, 5), head=nn.Linear(5, 3))
    report = credit_report(model, list(torch.randn(300, 8).split(50)))
    assert report.components == ("a+a#1", "head")
    assert report.r2[0] > 0.999999


@pytest.mark.parametrize("deep", [False, True])
def test_data_that_only_a_step_mixes_into_states(deep):
    model = nn.ModuleDict({
        "label": nn.Embedding(3, 8),
        "mix": nn.Linear(16, 6),
        "head": nn.Linear(6, 3),
    })
    if deep:
        model["deeper"] = nn.Linear(8, 8)

    def step(m: Any, batch: Any) -> Tensor:
        x, y = batch
        known = torch.tanh(m["deeper"](m["label"](y))) if deep else m["label"](y)
        return m["head"](torch.tanh(m["mix"](torch.cat([x, known], dim=1))))

    x, y = torch.randn(300, 8), torch.randint(0, 3, (300,))
    batches = list(zip(x.split(50), y.split(50), strict=True))
    report = credit_report(model, batches, forward_fn=step)
    if deep:
        assert report.reads["mix"] == ("deeper", "label+input")
    else:
        # Behind an embedding, what the layer takes is an input as it is.
        assert report.reference.states == ("input", "mix", "head")
        assert report.r2[0] == pytest.approx(1, abs=1e-6)
    assert not any(note.startswith("data of the batch") for note in report.notes)


@pytest.mark.parametrize("in_one", [False, True])
def test_data_that_reach_a_call_past_its_arguments(in_one):
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.mix(torch.cat([m.encode(x), m.beside], dim=1))))

    def step(m: Any, batch: Any) -> Tensor:
        x, m.beside = batch.split([8, 4], dim=1) if in_one else batch
        return m(x)

    model = wired(run, encode=nn.Linear(8, 6), mix=nn.Linear(10, 6), head=nn.Linear(6, 3))
    x = list(torch.randn(300, 12).split(50))
    batches = x if in_one else [(rows[:, :8].clone(), rows[:, 8:].clone()) for rows in x]
    report = credit_report(model, batches, forward_fn=step)
    note = "data of the batch that go into mix beside states are given to no call of the whole network"
    assert any(found.startswith(note) for found in report.notes)


def test_masks_of_positions_that_states_are_multiplied_by_are_no_inputs():
    def run(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.head(torch.tanh(m.mix(m.encode(x) * mask)))

    model = wired(run, encode=nn.Linear(8, 6), mix=nn.Linear(6, 6), head=nn.Linear(6, 3))
    x, mask = torch.randn(300, 5, 8), (torch.rand(300, 5, 1) > 0.1).float()
    batches = list(zip(x.split(50), mask.split(50), strict=True))
    report = credit_report(model, batches, forward_fn=lambda m, batch: m(*batch))
    assert report.reference.states == ("input", "encode", "mix", "head")
    assert report.reference.parents == ((0,), (1,), (2,))


def test_noise_that_a_part_takes_is_an_input_wherever_it_comes():
    def run(m: Any, x: Tensor) -> Tensor:
        hidden = torch.relu(m.encode(x))
        return m.head(hidden + torch.tanh(m.stir(m.scale * torch.randn(len(x), 4))))

    parts = {"encode": nn.Linear(8, 6), "stir": nn.Linear(4, 6), "head": nn.Linear(6, 3)}
    model = wired(run, **parts)
    model.scale = nn.Parameter(torch.ones(4))
    report = credit_report(model, list(torch.randn(300, 8).split(50)))
    assert report.components == ("encode+stir", "head")
    assert report.reference.widths == (12, 12, 6, 3)
    assert not any("be followed" in note for note in report.notes)


class Attend(nn.Module):
    """Looks at data with learned queries, which come first."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        return torch.softmax(queries @ self.mix(keys).mT, dim=-1) @ keys


def test_data_behind_learned_queries_is_the_input_of_what_looks_at_it():
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.attend(m.queries.expand(len(x), -1, -1), x)).mean(dim=1))

    model = wired(run, attend=Attend(), head=nn.Linear(8, 3))
    model.queries = nn.Parameter(torch.randn(2, 8))
    report = credit_report(model, list(torch.randn(300, 5, 8).split(50)), components=["attend", "head"])
    assert report.components == ("attend", "head")
    assert report.reference.widths == (40, 16, 3)


def test_what_a_hypernetwork_made_weights_for_is_the_input_of_what_reads_it():
    def run(m: Any, x: Tensor) -> Tensor:
        weights = m.weights(m.code).view(6, 8)
        return m.head(torch.relu(m.mix(torch.relu(nn.functional.linear(x, weights)))))

    model = wired(run, weights=nn.Linear(4, 48), mix=nn.Linear(6, 6), head=nn.Linear(6, 3))
    model.code = nn.Parameter(torch.randn(4))
    report = credit_report(model, list(torch.randn(300, 8).split(50)))
    assert report.components == ("mix", "head")
    assert report.reference.widths == (6, 6, 3)
    # The code, which comes first, is no input of the network.
    assert "the same for every sample, so left out: weights" in report.notes


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(20, 8)
        self.encoder = nn.ModuleDict({"embed": nn.Embedding(20, 8), "mix": nn.Linear(8, 8)})
        self.encoder["embed"].weight = self.shared.weight
        self.head, self.idle = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder["mix"](self.encoder["embed"](x)).tanh())


def test_a_module_whose_weights_ran_elsewhere_is_not_said_to_be_silent():
    report = credit_report(Tied(), list(torch.randint(0, 20, (200, 4)).split(50)))
    assert "never ran, so left out: 'idle'" in report.notes
