"""A component that cannot be altered in one way has no number there, with the reason; the others do."""

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import component_effects, credit_report
from lightning_koopman.effects.alterations import altered_parts

NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Bare(nn.Module):
    """Has weights and no way to draw them anew."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def with_bare() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), Bare(), nn.Linear(8, 2))


@pytest.mark.parametrize("how", ["measured", "predicted", "both"])
def test_what_cannot_be_drawn_anew_takes_no_number_from_the_others(how):
    net, batches = with_bare(), list(normal(120, 4).split(40))
    kinds = ["reinit", "skip", "weight_noise"]
    found = component_effects(
        net, batches, kinds=kinds, how=how, sets=[{"0", "1"}] if how != "predicted" else []
    )
    rows = [False, True, False, *([True] if how != "predicted" else [])]
    assert np.isnan(found.values["reinit"]).tolist() == rows
    assert np.isnan(found.stderr["reinit"]).tolist() == rows
    assert found.doubts["reinit"][1] == ("refused",)
    assert np.isfinite(found.values["skip"]).all()
    assert np.isfinite(found.values["weight_noise"]).all()
    assert [n for n in found.notes if "no effect" in n] == [
        "no effect reinit of '1': '1' (Bare) has parameters but no reset_parameters; pass the weights "
        "it started from with initial=state_dict"
    ]
    assert "refused (reinit)" in str(found)
    # Draws of weights that are predicted follow one another.
    without = component_effects(net, batches, kinds=kinds[1:], how=how)
    for kind in kinds[1 : 2 if how == "predicted" else 3]:
        assert found.values[kind][:3] == pytest.approx(without.values[kind])


def test_it_is_an_error_where_nothing_at_all_can_be_altered():
    net = with_bare()
    with pytest.raises(ValueError, match=r"'1' \(Bare\) has parameters but no reset_parameters"):
        component_effects(net, [normal(40, 4)], kinds=["reinit"], components=["1"])
    # What the user gives for it is looked at as before.
    with pytest.raises(ValueError, match="initial has nothing for"):
        component_effects(net, [normal(40, 4)], kinds=["reinit"], initial={"0.weight": net[0].weight})


class Masked(nn.Module):
    """Computes on nested tensors in eval mode, as encoders of torch do with a mask."""

    def __init__(self, pools_all: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
        self.embed, self.encoder = nn.Linear(6, 16), nn.TransformerEncoder(layer, 2)
        self.out, self.pools_all = nn.Linear(16, 2), pools_all

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1]) >= lengths[:, None]
        h = self.encoder(self.embed(x), src_key_padding_mask=padding)
        if self.pools_all:
            return self.out(h.mean(1))
        return self.out(h.masked_fill(padding[..., None], 0).sum(1) / lengths[:, None])


@NESTED
def test_layers_on_nested_tensors_are_altered_as_on_padded_ones():
    net = Masked().eval()
    x, lengths = normal(96, 5, 6), torch.arange(96) % 4 + 2
    batches = list(zip(x.split(32), lengths.split(32), strict=True))
    found = component_effects(net, batches)
    assert found.components == ("embed", "encoder.layers.0", "encoder.layers.1", "out")
    assert found.notes == ()
    with torch.no_grad():
        # Without one layer, by an encoder that has the other alone.
        own = net(x, lengths)
        for i in range(2):
            other = Masked().eval()
            other.encoder.layers = nn.ModuleList([net.encoder.layers[1 - i]])
            altered = other(x, lengths)
            expected = (altered - own).square().sum() / (own - own.mean(0)).square().sum()
            assert found.values["skip"][1 + i] == pytest.approx(float(expected), rel=1e-4)
    assert torch.backends.mha.get_fastpath_enabled()


@NESTED
def test_where_padding_counts_in_the_outputs_it_is_said():
    x, lengths = normal(64, 5, 6), torch.arange(64) % 4 + 2
    found = component_effects(Masked(pools_all=True).eval(), [(x, lengths)])
    assert "mask positions where they are pooled" in found.notes[-1]


def test_without_padding_rounding_of_the_fast_path_is_no_padding():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = (
        nn
        .Sequential(nn.Linear(6, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 4))
        .bfloat16()
        .eval()
    )
    found = component_effects(net, [normal(64, 5, 6).bfloat16()], kinds=["skip"])
    assert not any("padding" in note for note in found.notes)


class Jagged(nn.Module):
    """Makes a nested tensor itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        rows = enumerate(self.embed(x).unbind())
        nested = torch.nested.as_nested_tensor([row[: 1 + i % 3] for i, row in rows])
        return self.out(torch.nested.to_padded_tensor(self.inner(nested), 0.0, (len(x), 3, 4)).sum(1))


@NESTED
def test_nested_tensors_of_somebodys_own_have_no_number_and_a_note():
    batches = list(normal(60, 3, 4).split(20))
    found = component_effects(Jagged(), batches, kinds=["skip", "output_noise"])
    assert np.isnan(found.values["skip"]).tolist() == [False, True, False]
    assert "'inner' gave a nested tensor" in found.notes[-1]
    # Its weights can be altered all the same, of which nothing is predicted.
    both = component_effects(Jagged(), batches, kinds=["weight_noise"], how="both")
    assert np.isnan(both.values["weight_noise"]).tolist() == [False] * 3
    assert np.isnan(both.predicted["weight_noise"]).tolist() == [False, True, False]


def lengths_apart(width: int, seed: int) -> Tensor:
    rows = [normal(2 + i % 3, width, seed=seed + i) for i in range(30)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("how", ["measured", "predicted"])
def test_outputs_of_lengths_of_their_own_are_refused_in_words(how):
    net, batches = with_bare(), [lengths_apart(4, seed) for seed in (0, 100)]
    with pytest.raises(ValueError, match="the network returns a nested tensor"):
        component_effects(net, batches, kinds=["weight_noise"], how=how)


def test_what_stands_beside_padded_targets_counts_alone():
    net, batches = with_bare(), [lengths_apart(4, seed) for seed in (0, 100)]
    labels = [(b.to_padded_tensor(0.0).abs().sum(-1) > 2).long() for b in batches]
    kept = [(b.to_padded_tensor(0.0) != 0).any(-1) for b in batches]
    given = [(b, torch.where(k, y, -100)) for b, y, k in zip(batches, labels, kept, strict=True)]
    with pytest.raises(
        ValueError, match=r"'0' gave a nested tensor.* weights alone, with how='measured'"
    ):
        component_effects(
            net,
            given,
            kinds=["weight_noise"],
            how="predicted",
            forward_fn=lambda model, batch: model(batch[0]).to_padded_tensor(0.0),
        )
    found = component_effects(
        net,
        given,
        kinds=["weight_noise"],
        how="measured",
        forward_fn=lambda model, batch: model(batch[0]).to_padded_tensor(0.0),
    )
    scores = torch.cat([net(row).detach() for b in batches for row in b.unbind()])
    right = scores.argmax(1) == torch.cat([y[k] for y, k in zip(labels, kept, strict=True)])
    assert found.metric_before == pytest.approx(float(right.double().mean()))


class Factors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(9, 4), nn.Embedding(7, 4)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.user(user) * self.item(item)).sum(1, keepdim=True)


def test_embeddings_alone_are_altered_by_name():
    batches = [(torch.arange(63) % 9, torch.arange(63) % 7)]
    for parts in (
        lambda: component_effects(Factors(), batches),
        lambda: altered_parts(credit_report(Factors(), batches)),
    ):
        with pytest.raises(ValueError, match="no component reads another one, so the chain has none"):
            parts()
    found = component_effects(Factors(), batches, components=["user", "item"])
    assert (found.values["skip"] > 0).all()


class Unrolled(nn.Module):
    """Gives one output per step of time, along the first axis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.last(torch.tanh(self.first(x) * (t + 1) / 3)) for t in range(6)])


class Loop(nn.Module):
    """Takes steps of time along the first axis, and gives as many."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.last = nn.GRUCell(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        state, given = x.new_zeros(x.shape[1], 16), []
        for step in x:
            state = self.cell(step, state)
            given.append(self.last(state))
        return torch.stack(given)


@pytest.mark.parametrize("size", [25, 60])
def test_loops_over_time_in_front_are_named_as_what_is_turned(size):
    batches = [rows.transpose(0, 1) for rows in normal(120, 6, 8).split(size)]
    with pytest.raises(ValueError, match=rf"\(6, {size}, 4\), and components give {size} samples"):
        component_effects(Loop(), batches)
    turned = component_effects(Loop(), batches, forward_fn=lambda m, b: m(b).transpose(0, 1))
    assert np.isfinite(turned.values["skip"]).all()


@pytest.mark.parametrize("size", [50, 60])
def test_outputs_with_time_in_front_are_named_as_what_is_turned(size):
    batches = list(normal(120, 8).split(size))
    with pytest.raises(ValueError, match=rf"\(6, {size}, 4\), and components give {size} samples"):
        component_effects(Unrolled(), batches)
    turned = component_effects(Unrolled(), batches, forward_fn=lambda m, b: m(b).transpose(0, 1))
    assert np.isfinite(turned.values["skip"]).all()


class Rigid(Tensor):
    """Weights of somebody's own class, as quantised ones are: torch's operations are not theirs."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("std", "kaiming_uniform_"):
            raise NotImplementedError(f"Rigid has no {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs or {})


def with_rigid() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    net[2].weight = nn.Parameter(net[2].weight.detach().as_subclass(Rigid))
    return net


@pytest.mark.parametrize("how", ["measured", "predicted", "both"])
@pytest.mark.parametrize("kind", ["weight_noise", "reinit"])
def test_weights_of_a_class_that_refuses_it_take_no_number_from_the_others(kind, how):
    net, batches = with_rigid(), list(normal(120, 4).split(40))
    before = [weight.detach().clone() for weight in net.parameters()]
    found = component_effects(net, batches, kinds=[kind, "skip"], how=how)
    assert np.isnan(found.values[kind]).tolist() == [False, True]
    assert found.doubts[kind][1] == ("refused",)
    assert np.isfinite(found.values["skip"]).all()
    assert (
        f"no effect {kind} of '2': '2' holds weights of the class Rigid, which cannot be altered so "
        "(NotImplementedError); ask for it before weights are made such, as by quantising, or leave the "
        "kind out"
    ) in found.notes
    assert all(map(torch.equal, net.parameters(), before))


def test_a_state_of_other_numbers_of_axes_has_no_mean_to_be_skipped_by():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        # An axis more in the last batch.
        return m.inner(x) if len(x) == 40 else m.inner(x)[:, None]

    torch.manual_seed(0)
    odd = wired(forward, inner=nn.Linear(6, 4))
    net = wired(lambda m, x: m.head(m.odd(x).flatten(1)), odd=odd, head=nn.Linear(4, 3)).eval()
    found = component_effects(net, normal(110, 6).split(40), components=["odd", "head"])
    assert found.doubts["skip"] == (("refused",), ())
    assert np.isnan(found.values["skip"]).tolist() == [True, False]
    why = "no effect skip of 'odd': states of shape (1, 4) and of shape (4,) per sample arrived"
    assert any(note.startswith(why) for note in found.notes)


class LastState(nn.Module):
    """Uses the last state of a recurrent layer, and not what it gives first."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.rnn(x)
        return self.head(h[-1])


@pytest.mark.parametrize("how", ["measured", "predicted"])
def test_what_the_network_does_not_use_of_a_component_is_not_made_linear(how):
    torch.manual_seed(0)
    net, x = LastState().eval(), normal(120, 5, 4)
    found = component_effects(net, x.split(40), kinds=["skip", "linear"], how=how)
    assert np.isnan(found.values["linear"]).tolist() == [True, False]
    assert found.doubts["linear"][0] == ("refused",)
    assert [note for note in found.notes if "no effect" in note] == [
        "no effect linear of 'rnn': the first tensor that 'rnn' gives leads to none of the outputs, and "
        "what is made linear is the first; leave it out with components=[...], or leave out the kind "
        "'linear'"
    ]
    if how == "measured":
        with torch.no_grad():
            own, h = net(x).double(), net.rnn(x)[1][0][-1]
            mean = net.head(h.mean(0, keepdim=True)).double()
        expected = (mean - own).square().sum() / (own - own.mean(0)).square().sum()
        assert found.values["skip"][0] == pytest.approx(float(expected), rel=1e-4)


def test_a_single_sample_has_no_mean_and_no_spread():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)).eval()
    found = component_effects(net, [normal(1, 4)], kinds=["skip", "output_noise"], scale="kl")
    assert np.isnan(found.values["skip"]).tolist() == [True, False, True]
    assert np.isnan(found.values["output_noise"]).all()
    why = "one row of '0' arrived, whose mean is itself; pass more samples"
    assert f"no effect skip, output_noise of '0': {why}" in found.notes or (
        f"no effect output_noise, skip of '0': {why}" in found.notes
    )
