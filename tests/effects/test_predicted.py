"""Predicted effects: closed forms, dense Jacobians, small alterations, sets, passes counted."""

import copy
import itertools
import signal
from typing import Any

import numpy as np
import pytest
import torch
from effect_nets import (
    Attending,
    Branches,
    Twice,
    batched,
    data,
    left_out,
    linear_chain,
    mlp,
    normal,
    pooled,
    smooth,
)
from torch import Tensor, nn

from lightning_koopman import component_effects, credit_report
from lightning_koopman.report.effects import Effects

PARTS = ["0", "1", "2"]


def predicted(net: nn.Module, batches: list, kinds: list[str], **more) -> Effects:
    return component_effects(net, batches, None, kinds, **{"how": "predicted", "probes": 9} | more)


def fisher(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def tail_jacobians(tail: nn.Module, states: Tensor) -> Tensor:
    """∂ outputs / ∂ state at every sample, shape (n, C, d), by torch.func."""
    with torch.no_grad():
        return torch.func.vmap(torch.func.jacrev(lambda s: tail(s[None])[0]))(states)


def dense(net: nn.Module, x: Tensor, given: list[Tensor]) -> Tensor:
    """z_i = J_i δ_i at every sample, shape (L, n, C), where each state becomes what is given."""
    with torch.no_grad():
        states = [net[: i + 1](x) for i in range(3)]
    jacobians = [tail_jacobians(net[i + 1 :], states[i]) for i in range(3)]
    moved = [new - state for new, state in zip(given, states, strict=True)]
    return torch.stack([torch.einsum("ncd,nd->nc", j, d) for j, d in zip(jacobians, moved, strict=True)])


def skipped(net: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        first, second, last = (net[: i + 1](x) for i in range(3))
    return (
        [first.mean(0).expand_as(first), first.clone(), last.mean(0).expand_as(last)]
        if len(second)
        else []
    )


def test_a_linear_network_has_its_effects_in_closed_form():
    net, x = linear_chain(), normal(400, 6)
    initial = {k: v + 0.1 * torch.ones_like(v) for k, v in net.state_dict().items()}
    kinds = ["output_noise", "skip", "reinit", "linear"]
    found = predicted(net, x.split(100), kinds, initial=initial)
    assert found.scale == "relative"
    assert set(found.how.values()) == {"predicted"}
    assert found.predicted == found.predicted_stderr == {}  # nothing was measured to set beside these
    with torch.no_grad():
        w = [layer.weight.T for layer in net]
        states = [x, net[0](x), net[:2](x), net(x)]
        total = (states[-1] - states[-1].mean(0)).square().sum()
        after = [w[1] @ w[2], w[2], torch.eye(4, dtype=torch.float64)]
        for i, j in enumerate(after):
            var = states[i + 1].var(0, correction=0)
            noise = 0.09 * 400 * (var[:, None] * j.square()).sum() / total
            assert found.values["output_noise"][i] == pytest.approx(float(noise), rel=1e-9)
            given = states[i] if i < 2 else states[i + 1].mean(0)
            skip = ((given - states[i + 1]) @ j).square().sum() / total
            assert found.values["skip"][i] == pytest.approx(float(skip), rel=1e-9)
            fresh = (0.1 * states[i].sum(1, keepdim=True) + 0.1).expand_as(states[i + 1])
            reinit = (fresh @ j).square().sum() / total
            assert found.values["reinit"][i] == pytest.approx(float(reinit), rel=1e-9)
    np.testing.assert_allclose(found.values["linear"], 0, atol=1e-20)


def test_the_second_order_of_kl_and_of_sets_equals_dense_jacobians_and_fisher_information():
    net, x = smooth(), normal(60, 5)
    y = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(1))
    found = predicted(net, batched(x, y, 20), ["output_noise", "skip"], components=PARTS)
    assert found.scale == "kl"
    with torch.no_grad():
        states = [net[: i + 1](x) for i in range(3)]
    f = fisher(states[-1])
    root = torch.linalg.cholesky(f + 1e-14 * torch.eye(4, dtype=torch.float64))
    for i, state in enumerate(states):
        j = root.mT @ tail_jacobians(net[i + 1 :], state)
        noise = 0.5 * (j.square() * 0.09 * state.var(0, correction=0)).sum() / 60
        assert found.values["output_noise"][i] == pytest.approx(float(noise), rel=1e-6)
    z = dense(net, x, skipped(net, x))
    h = 0.5 * torch.einsum("ina,nab,jnb->ij", z, f, z) / 60
    np.testing.assert_allclose(found.values["skip"], h.diagonal(), rtol=1e-9)
    np.testing.assert_allclose(found.pairs["skip"].sum(axis=0), h, rtol=1e-8, atol=1e-12)
    for places in itertools.chain(itertools.combinations(range(3), 2), [(0, 1, 2)]):
        value, stderr = found.of({PARTS[i] for i in places}, "skip")
        assert value == pytest.approx(float(h[places, :][:, places].sum()), rel=1e-8)
        alone = 0.5 * torch.einsum("na,nab,nb->n", z[[*places]].sum(0), f, z[[*places]].sum(0))
        # Folds deal the samples of each batch out in turn.
        fold = np.arange(60) % 20 % 5
        rest = np.array([alone[fold != k].mean() for k in range(5)])
        assert stderr == pytest.approx(np.sqrt(4 / 5 * ((rest - rest.mean()) ** 2).sum()), rel=1e-6)
    # Noise on one output is independent of noise on another.
    both = found.of({"0", "1"}, "output_noise")[0]
    assert both == pytest.approx(found.values["output_noise"][:2].sum())
    assert found.of("1", "skip") == (found.values["skip"][1], found.stderr["skip"][1])


def test_where_all_that_follows_is_linear_skipping_a_block_before_pooling_is_predicted_exactly():
    net, x = pooled(), normal(120, 40).reshape(120, 4, 10)
    report = credit_report(net, [*x.split(40)])
    assert report.parts["2"] == ("2", "3", "4")
    found = component_effects(net, [*x.split(40)], report, components=["1", "2"], how="both", probes=3)
    assert found.predicted["skip"][1] == pytest.approx(found.values["skip"][1], rel=1e-9)
    assert found.values["skip"][1] > 0.01


def test_linear_takes_the_residual_of_a_fit_without_the_sample():
    net, x = smooth(), normal(40, 5)
    found = predicted(net, [x], ["linear"], components=PARTS, how="both", scale="kl")
    with torch.no_grad():
        states = [x, *(net[: i + 1](x) for i in range(3))]
    # The same maps swap in when it is measured; a small effect is the same either way.
    ratio = found.predicted["linear"][:2] / found.values["linear"][:2]
    np.testing.assert_allclose(ratio, 1, atol=0.3)
    few = normal(12, 30)
    wide = nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        hidden, y = wide[:2](few), wide(few)
    # Fewer samples than directions, and still no zero: the limit for a small ridge.
    found = predicted(wide, [few], ["linear"], components=["0", "2"])
    exact = left_out(hidden, y, 0.0).square().sum() / (y - y.mean(0)).square().sum()
    assert found.values["linear"][1] == pytest.approx(float(exact), rel=0.3, abs=1e-9)
    assert found.values["linear"][0] > 1e-3
    assert "samples" in found.doubts["linear"][0]
    assert len(states) == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weight_noise", "output_noise"])
def test_measured_over_predicted_is_one_for_small_noise(kind):
    net, x = smooth(), normal(300, 5)
    y = net(x).argmax(1)
    how = {"strength": 1e-3, "components": PARTS}
    found = predicted(net, batched(x, y, 50), [kind], draws=300, **how)
    measured = predicted(net, [(x, y)], [kind], draws=400, **how | {"how": "measured"})
    np.testing.assert_allclose(measured.values[kind] / found.values[kind], 1, atol=0.12)


def test_a_small_change_of_weights_is_predicted_sample_by_sample():
    net, x = smooth(), normal(200, 5)
    near = {k: v + 1e-4 * torch.cos(v * 100) for k, v in net.state_dict().items()}
    found = predicted(
        net, batched(x, net(x).argmax(1)), [], components=PARTS, how="both", replacements={"near": near},
        sets=[{"0", "2"}, {"0", "1", "2"}],
    )  # fmt: skip
    assert found.components[3:] == ("0+2", "0+1+2")
    np.testing.assert_allclose(found.predicted["near"] / found.values["near"], 1, rtol=2e-3)
    np.testing.assert_allclose(found.predicted_stderr["near"] / found.stderr["near"], 1, rtol=0.7)


def test_the_order_of_hidden_units_and_the_size_of_batches_do_not_matter():
    net, x = smooth(), normal(100, 5)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    turned = copy.deepcopy(net)
    with torch.no_grad():
        turned[0][0].weight.copy_(net[0][0].weight[order])
        turned[0][0].bias.copy_(net[0][0].bias[order])
        turned[1][0].weight.copy_(net[1][0].weight[:, order])
    kinds = ["linear", "output_noise", "skip", "reinit"]
    first, second = (predicted(n, [x], kinds[:2], components=PARTS, scale="kl") for n in (net, turned))
    # The folds that a ridge weight is chosen on follow a state's own numbers, in their order.
    for kind, places in (("linear", [0]), ("output_noise", [0, 1, 2])):
        np.testing.assert_allclose(first.values[kind][places], second.values[kind][places], rtol=1e-6)
    how = {"components": PARTS, "initial": smooth(5).state_dict(), "scale": "kl"}
    whole, parts = (predicted(net, batches, kinds, **how) for batches in ([x], x.split(17)))
    for kind in kinds:
        np.testing.assert_allclose(whole.values[kind], parts.values[kind], rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("scale", ["kl", "relative"])
def test_two_probes_have_the_mean_of_all(scale):
    net, x = smooth(), normal(3000, 5)
    how = {"components": PARTS, "scale": scale, "samples": 3000}
    exact = predicted(net, [x], ["output_noise", "skip"], **how)
    drawn = predicted(net, [x], ["output_noise", "skip"], **how | {"probes": 2})
    assert drawn.notes == ("predicted from 2 random combinations of the 4 outputs per sample",)
    assert not exact.notes
    for kind in ("output_noise", "skip"):
        np.testing.assert_allclose(drawn.values[kind], exact.values[kind], rtol=0.1)
        # Of noise on the outputs themselves, any combination is as large.
        errors = (drawn.values[kind] - exact.values[kind])[:2] / drawn.stderr[kind][:2]
        assert np.abs(errors).max() < 4


def test_all_kinds_but_reinit_take_four_passes_and_two_backward():
    net, (x, y) = mlp(), data(512)
    calls, backward = [], []

    def forward(model, batch):
        calls.append(len(batch[0]))
        output = model(batch[0])
        if output.requires_grad:
            output.register_hook(lambda _: backward.append(len(batch[0])))
        return output

    component_effects(
        net, batched(x, y, 64), None, ["linear", "skip", "output_noise", "weight_noise"],
        how="predicted", forward_fn=forward,
    )  # fmt: skip
    # The components are found on the first batch, which is also asked twice, and shows whether weights
    # are used past their components and whether gradients are what they claim.
    assert sum(calls) <= 3 * 512 + 4 * 64
    assert sum(backward) == 2 * 512


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))


def test_outputs_with_positions_average_over_them():
    torch.manual_seed(0)
    net, x = Positions().double(), torch.randn(80, 2, 4, dtype=torch.float64)
    found = predicted(net, [(x, net(x).argmax(1))], ["output_noise"], probes=12, draws=300, how="both")
    assert found.scale == "kl"
    np.testing.assert_allclose(found.values["output_noise"], found.predicted["output_noise"], rtol=0.15)


def test_shared_weights_count_in_every_call_and_have_no_sum():
    torch.manual_seed(0)
    net, x = Twice().double(), normal(200, 4)
    near = {k: v + (1e-5 if "inner" in k else 0) for k, v in net.state_dict().items()}
    found = predicted(net, [x], ["skip"], replacements={"near": near}, how="both", scale="relative")
    assert found.components[:2] == ("inner", "inner#1")
    effect = found.predicted["near"]
    assert effect[0] == effect[1] > 0
    np.testing.assert_allclose(effect[:2], found.values["near"][:2], rtol=1e-3)
    assert effect[2] == 0
    assert np.isnan(found.of({"inner", "inner#1"}, "near")[0])
    assert found.of({"inner", "inner#1"}, "skip")[0] > 0


def test_tuples_integers_and_mappings_go_in():
    torch.manual_seed(0)
    net = Attending()
    tokens, labels = torch.randint(0, 7, (300, 5)), torch.randint(0, 3, (300,))
    batches = [{"tokens": tokens[i], "labels": labels[i]} for i in torch.arange(300).split(100)]
    kinds = ["output_noise", "weight_noise", "reinit", "skip", "linear"]
    found = predicted(net, batches, kinds, strength=1e-2, draws=50, how="both")
    assert found.components == ("attention", "head")
    assert all(np.isfinite(v).all() and (v >= 0).all() for v in found.predicted.values())
    np.testing.assert_allclose(found.values["output_noise"], found.predicted["output_noise"], rtol=0.15)


def test_joined_and_summed_states_are_predicted_part_by_part():
    torch.manual_seed(0)
    net, x = Branches().double(), normal(300, 3)
    found = predicted(net, [x], ["output_noise"], strength=1e-3, how="both", draws=40)
    assert found.components == ("left", "right", "head")
    np.testing.assert_allclose(found.values["output_noise"], found.predicted["output_noise"], rtol=0.1)


def test_in_place_layers_and_frozen_weights_are_no_obstacle():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    changing = copy.deepcopy(plain).requires_grad_(False)
    changing[1], changing[3] = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
    x, y = data()
    kinds = ["linear", "output_noise", "skip", "weight_noise"]
    first, second = (
        predicted(net, batched(x, y), kinds, components=["0", "2", "4"]) for net in (plain, changing)
    )
    for kind in kinds:
        np.testing.assert_allclose(first.values[kind], second.values[kind], rtol=1e-5)


def test_outputs_of_one_value_and_tensors_of_inference_mode():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    with torch.inference_mode():
        x = torch.randn(100, 5)
    how = {"strength": 1e-2, "components": ["0", "2"]}
    found = predicted(net, [x], ["output_noise"], how="both", draws=200, **how)
    np.testing.assert_allclose(found.values["output_noise"], found.predicted["output_noise"], rtol=0.1)
    mapping = predicted(net, [{"input": x}], ["output_noise"], **how)
    np.testing.assert_array_equal(mapping.values["output_noise"], found.predicted["output_noise"])


def test_draws_are_seeded_and_a_single_batch_has_two():
    net, (x, y) = mlp(), data()
    first, again, other = (
        predicted(net, batched(x, y), ["weight_noise"], seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.values["weight_noise"], again.values["weight_noise"])
    assert (first.values["weight_noise"] != other.values["weight_noise"]).all()
    alone = predicted(net, [(x, y)], ["weight_noise"])
    assert np.isfinite(alone.stderr["weight_noise"]).all()
    single = predicted(net, [(x[:1], y[:1])], ["skip"])
    assert np.isnan(single.stderr["skip"]).all()


def test_the_error_of_weight_noise_covers_its_draws_which_differ_by_component():
    net, x, passes = linear_chain(), normal(500, 6), []
    with torch.no_grad():
        w = [layer.weight.T for layer in net]
        states = [x, net[0](x), net[:2](x), net(x)]
        total = (states[-1] - states[-1].mean(0)).square().sum()
        after = [w[1] @ w[2], w[2], torch.eye(4, dtype=torch.float64)]
        parts = zip(net, states, after, strict=False)
        expected = np.array([
            float((a.weight.var() * s.square().sum() + 500 * a.bias.var()) * j.square().sum() / total)
            for a, s, j in parts
        ])

    def run(draws: int, seed: int = 0) -> Effects:
        passes.append(0)

        def forward(model: nn.Module, batch: Tensor) -> Tensor:
            passes[-1] += 1
            return model(batch)

        how = {"draws": draws, "seed": seed, "strength": 0.01, "forward_fn": forward}
        return predicted(net, x.split(250), ["weight_noise"], **how)

    runs = [run(14, seed) for seed in range(8)]
    values, stderr = np.array([
        [f.values["weight_noise"], f.stderr["weight_noise"]] for f in runs
    ]).swapaxes(0, 1)
    np.testing.assert_allclose(values.mean(axis=0), 1e-4 * expected, rtol=0.15)
    # So far is Student's t of five folds from 0; with errors that cover samples alone, it would be 32.
    assert (((values - 1e-4 * expected) / stderr) ** 2).mean() == pytest.approx(2, rel=0.5)
    both = runs[0].of({"0", "2"}, "weight_noise")[0]
    assert both == pytest.approx(values[0, 0] + values[0, 2], rel=1e-9)
    run(4)
    assert passes[0] - passes[-1] == 10


class Routed(nn.Module):
    """A layer that runs on every batch, and is passed by in some."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        held = self.stem(x)
        made = self.inner(held)
        return self.head(made if x[0, 0] > 0 else held)


def test_what_the_last_batch_passes_by_has_the_effect_that_it_has_in_the_others():
    torch.manual_seed(0)
    net, x = Routed().double(), normal(200, 4)
    x = x[x[:, 0].argsort(descending=True)]
    found = predicted(net, x.split(100), ["skip"], how="both", components=["inner"])
    assert found.values["skip"][0] > 0.01
    assert found.predicted["skip"][0] == pytest.approx(found.values["skip"][0], rel=1e-9)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(x)


def test_where_no_gradient_leads_nothing_is_predicted():
    torch.manual_seed(0)
    found = predicted(Broken(), [torch.randn(100, 4)], ["output_noise"])
    assert np.isnan(found.values["output_noise"]).tolist() == [True, True, False]
    assert found.doubts["output_noise"] == (("gradient",), ("gradient",), ())
    net, (x, y) = mlp(), data()
    with pytest.raises(ValueError, match=r"the outputs carry no gradient.*measure with how='measured'"):
        predicted(net, batched(x, y), ["skip"], forward_fn=lambda m, b: m(b[0]).detach())


def test_large_predictions_are_doubted():
    net, (x, y) = mlp(), data()
    with torch.no_grad():
        net[5].weight.mul_(20)
    found = predicted(net, batched(x, y), ["skip"], how="both")
    assert (found.predicted["skip"] > 0.5).any()
    assert not any(found.doubts["skip"]), "what was measured is no prediction"
    alone = predicted(net, batched(x, y), ["skip"])
    expected = [("saturated",) if value > 0.5 else () for value in alone.values["skip"]]
    assert list(alone.doubts["skip"]) == expected
    assert "?: saturated (skip)" in str(alone)


class TiedEmbedding(nn.Module):
    """Scores tokens by the table that it embeds them by, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = (
            nn.Embedding(9, 5),
            nn.Linear(5, 5),
            nn.Linear(5, 9, bias=False),
        )
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.table(tokens))))


def test_weights_that_an_embedding_shares_move_the_components_behind_it_for_their_own_component_alone():
    torch.manual_seed(0)
    net = TiedEmbedding().double()
    near = {k: v + 1e-5 * torch.randn_like(v) for k, v in net.state_dict().items()}
    batches = torch.randint(9, (200,), generator=torch.Generator().manual_seed(1)).split(50)
    found = predicted(
        net, batches, [], replacements={"near": near}, how="both", scale="relative", probes=9
    )
    assert found.components == ("body", "head")
    np.testing.assert_allclose(found.predicted["near"], found.values["near"], rtol=1e-3)


class UsedPast(nn.Module):
    """Uses the weights of one layer by a function again, and another in a call without samples."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.cell, self.norm = nn.Linear(4, 6), nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.code(x))
        z = torch.zeros_like(code)
        for _ in range(3):
            z = torch.tanh(self.norm(self.cell(z) + code))
        return nn.functional.linear(z, self.code.weight.t())


def test_weights_that_are_used_past_their_components_move_the_outputs_there_too():
    torch.manual_seed(0)
    net, x = UsedPast().double(), normal(200, 4)
    near = {k: v + 1e-5 * torch.randn_like(v) for k, v in net.state_dict().items()}
    report = credit_report(net, x.split(50))
    found = component_effects(
        net, x.split(50), report, [], replacements={"near": near}, how="both", scale="relative", probes=4
    )
    # The first call of the cell is the same for all samples, and so is no state.
    assert [name for name in found.components if "cell" in name] == ["cell#1", "cell#2"]
    np.testing.assert_allclose(found.predicted["near"], found.values["near"], rtol=1e-3)


def test_the_users_hooks_on_backward_passes_neither_see_those_of_predictions_nor_change_them():
    net, x = smooth(), normal(400, 5)
    kinds = ["skip", "weight_noise"]
    without = predicted(net, list(x.split(100)), kinds)
    seen: list[str] = []

    def scale(module: nn.Module, given: tuple, _: tuple) -> tuple:
        seen.append("scaled")
        return tuple(grad * 0.1 for grad in given)

    net[1].register_full_backward_hook(scale)
    net[2].register_full_backward_pre_hook(lambda *_: seen.append("before"))
    found = predicted(net, list(x.split(100)), kinds)
    assert not seen
    for kind in kinds:
        np.testing.assert_array_equal(found.values[kind], without.values[kind])
    # They are the user's again from then on.
    net(x[:3].requires_grad_()).sum().backward()
    assert seen == ["before", "scaled"]


def test_a_network_that_overwrites_what_its_gradients_need_is_to_be_measured():
    class Overwrites(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            grown = self[0](x).exp()
            read = self[1](grown)
            grown.mul_(0)
            return read

    torch.manual_seed(0)
    net, batches = Overwrites(nn.Linear(5, 4), nn.Linear(4, 2)), list(torch.randn(200, 5).split(50))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        net(batches[0]).sum().backward()
    with pytest.raises(ValueError, match=r"overwrites what its own gradients need.*how='measured'"):
        component_effects(net, batches, None, ["weight_noise"])
    measured = component_effects(net, batches, None, ["weight_noise"], how="measured")
    assert np.isfinite(measured.values["weight_noise"]).all()


class _Once(torch.autograd.Function):
    """Doubles, and keeps nothing for a second backward pass, as reversible blocks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.factor = 2.0
        return x * 2.0

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        factor = ctx.factor
        del ctx.factor
        return grads[0] * factor


def test_a_network_whose_own_backward_fails_is_to_be_measured():
    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return self[1](_Once.apply(self[0](x)))

    torch.manual_seed(0)
    net, batches = Doubled(nn.Linear(5, 4), nn.Linear(4, 2)), list(torch.randn(200, 5).split(50))
    with pytest.raises(ValueError, match=r"AttributeError: .*'factor'.*; measure with how='measured'"):
        component_effects(net, batches, None, ["weight_noise"])
    measured = component_effects(net, batches, None, ["weight_noise"], how="measured")
    assert np.isfinite(measured.values["weight_noise"]).all()
    single = component_effects(net, batches, None, ["weight_noise"], probes=1)
    assert np.isfinite(single.values["weight_noise"]).all()


def test_a_time_limit_within_a_backward_pass_is_none_of_its_errors():
    def limit(*_: Any) -> None:
        raise TimeoutError("time is up")

    class Late(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            h = self[0](x)
            if h.requires_grad:
                h.register_hook(lambda _: signal.raise_signal(signal.SIGALRM))
            return self[1](h)

    before = signal.signal(signal.SIGALRM, limit)
    try:
        with pytest.raises(TimeoutError, match="time is up"):
            component_effects(
                Late(nn.Linear(5, 4), nn.Linear(4, 2)), [torch.randn(50, 5)], None, ["weight_noise"]
            )
    finally:
        signal.signal(signal.SIGALRM, before)


class Rounded(nn.Module):
    """A hidden state rounded to steps, with gradients as if it were not."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.first, self.last, self.step = nn.Linear(5, 6), nn.Linear(6, 2), step

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x)) / self.step
        return self.last((z + (z.round() - z).detach()) * self.step)


def test_a_note_tells_by_how_much_stand_ins_for_gradients_are_off():
    torch.manual_seed(0)
    net, batches = Rounded(0.5).double(), list(normal(1200, 5).split(400))
    near = {k: v + 5e-3 * torch.randn_like(v) for k, v in net.state_dict().items()}
    others = {"same": net.state_dict(), "near": near}
    found = component_effects(net, batches, None, [], replacements=others)
    # By hand: the gradient skips the rounding, what altered weights give does not.
    altered = copy.deepcopy(net)
    altered.first.load_state_dict({k.removeprefix("first."): v for k, v in near.items() if "first" in k})
    with torch.no_grad():
        h = torch.tanh(net.first(batches[0]))
        moved = (altered.first(batches[0]) - net.first(batches[0])) * (1 - h**2) @ net.last.weight.T
        told = moved.square().sum() / (altered(batches[0]) - net(batches[0])).square().sum()
    assert told < 1 / 30
    (note,) = (note for note in found.notes if "when altered alone" in note)
    # Of the displaced component, where the prediction takes the difference of tanh itself.
    assert "near of 'first' is predicted to have" in note
    assert float(note.split("to have ")[1].split()[0]) == pytest.approx(float(told), rel=0.05)
    effect = component_effects(net, batches, None, [], replacements={"near": near}, how="measured")
    assert found.values["near"][0] < effect.values["near"][0] / 30


class OneRounds(nn.Module):
    """Two branches, of which the second rounds what it makes of its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 6), nn.Linear(5, 6)
        self.after, self.last = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.right(x))
        return self.last(torch.tanh(self.left(x)) + self.after(z + (z.round() - z).detach()))


def test_a_stand_in_in_another_branch_than_the_first_is_told_as_well():
    torch.manual_seed(0)
    net, batches, calls = OneRounds().double(), list(normal(600, 5).split(200)), []
    near = {k: v + 5e-3 * torch.randn_like(v) for k, v in net.state_dict().items()}

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(len(x))
        return model(x)

    found = component_effects(net, batches, None, [], replacements={"near": near}, forward_fn=forward)
    n_passes = len(calls)
    altered = copy.deepcopy(net)
    altered.right.load_state_dict({k[6:]: v for k, v in near.items() if k.startswith("right.")})
    with torch.no_grad():
        # By hand: the gradient skips the rounding, what altered weights give does not.
        h = torch.tanh(net.right(batches[0]))
        through = (altered.right(batches[0]) - net.right(batches[0])) * (1 - h**2)
        moved = through @ (net.last.weight @ net.after.weight).T
        told = moved.square().sum() / (altered(batches[0]) - net(batches[0])).square().sum()
    (note,) = (note for note in found.notes if "when altered alone" in note)
    assert "near of 'right' is predicted to have" in note
    assert float(note.split("to have ")[1].split()[0]) == pytest.approx(float(told), rel=0.05)
    # All components take one pass of the first batch together, those that are off one each.
    calls.clear()
    smooth_net = Rounded(1e-6).double()
    fine = {k: v + 5e-3 * torch.randn_like(v) for k, v in smooth_net.state_dict().items()}
    component_effects(smooth_net, batches, None, [], replacements={"near": fine}, forward_fn=forward)
    assert n_passes <= len(calls) + 3


def test_a_component_that_gives_sequences_with_positions_first_is_displaced_by_sample():
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.read = nn.Linear(5, 6), nn.GRU(6, 7)
            self.last = nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.tanh(self.read(self.first(x.transpose(0, 1)))[0])
            return self.last((z + ((4 * z).round() / 4 - z).detach())[-1])

    torch.manual_seed(0)
    net, batches = Steps().double(), list(torch.randn(900, 4, 5, dtype=torch.float64).split(300))
    near = {k: v + 5e-3 * torch.randn_like(v) for k, v in net.state_dict().items()}
    found = component_effects(net, batches, None, [], replacements={"near": near}, how="both")
    (note,) = (note for note in found.notes if "when altered alone" in note)
    name, ratio = note.split("near of '")[1].split("'")[0], float(note.split("to have ")[1].split()[0])
    i = found.components.index(name)
    # Of one batch of three, and to second order on one side only.
    assert ratio == pytest.approx(found.predicted["near"][i] / found.values["near"][i], rel=0.5)
    assert ratio < 1 / 4


@pytest.mark.parametrize("net", [Rounded(1e-6).double(), smooth(), mlp()], ids=["fine", "smooth", "mlp"])
def test_gradients_that_are_right_get_no_note(net):
    x = normal(300, 5).to(next(net.parameters()).dtype)
    near = {k: v + 1e-3 * v for k, v in net.state_dict().items()}
    found = component_effects(net, x.split(100), None, ["weight_noise"], replacements={"near": near})
    assert not [note for note in found.notes if "altered alone" in note]
    # What is lost in rounding tells nothing.
    same = {k: v * (1 + torch.finfo(x.dtype).eps) for k, v in net.state_dict().items()}
    found = component_effects(net, x.split(100), None, [], replacements={"same": same})
    assert not [note for note in found.notes if "altered alone" in note]


def test_a_prediction_is_held_against_the_change_by_the_same_draw(monkeypatch):
    for name in ("_SUSPECT", "_FAR"):
        monkeypatch.setattr(f"lightning_koopman.effects.second_order.{name}", 1 + 1e-6)
    found = predicted(linear_chain(), [normal(200, 6)], ["weight_noise"], draws=3)
    assert found.notes == ()


def test_changes_of_probabilities_past_components_are_those_of_their_logits():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            # The weights of the first layer count a second time, where no component stands.
            return (self.last(torch.tanh(self.first(x))) + x @ self.first.weight.T).softmax(1)

    torch.manual_seed(0)
    net, x, y = Tied().double(), normal(200, 5), torch.arange(200) % 4
    other = {k: v + 0.3 * torch.randn_like(v) for k, v in net.state_dict().items() if "first" in k}
    batches = [(x, y)]
    found = predicted(net, batches, [], replacements={"other": net.state_dict() | other})
    with torch.no_grad():
        p, moved = net(x), nn.functional.linear(x, other["first.weight"] - net.first.weight)
        own = moved + other["first.bias"] - net.first.bias
        z = moved + own * (1 - torch.tanh(net.first(x)) ** 2) @ net.last.weight.T
    truth = (torch.einsum("nc,ncd,nd->n", z, fisher(p.log()), z) / 2).mean()
    assert found.components[0] == "first"
    np.testing.assert_allclose(found.values["other"][0], truth, rtol=1e-9)
