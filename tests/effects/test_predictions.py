"""Predicted effects: closed forms, dense Jacobians, small alterations, models left as found."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from test_interventions import (
    Attending,
    Twice,
    assert_same,
    batched,
    cnn,
    data,
    fingerprint,
    linear_chain,
    mlp,
)
from torch import nn

from lightning_koopman import CreditReport, Options, credit_report, intervene, predict_effects
from lightning_koopman.report.effects import KINDS
from lightning_koopman.report.saved import ReportFormatError


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64, generator=generator)


def fisher(logits: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def tail_jacobians(tail: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """∂ outputs / ∂ state at every sample, shape (n, C, d), by torch.func."""
    with torch.no_grad():
        return torch.func.vmap(torch.func.jacrev(lambda s: tail(s[None])[0]))(states)


def smooth(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
        nn.Linear(8, 4),
    ).double()


def smooth_report(net: nn.Sequential, x: torch.Tensor) -> CreditReport:
    return credit_report(net, [x], components=["0", "1", "2"])


def test_a_linear_network_has_its_effects_in_closed_form():
    net, x = linear_chain(), normal(400, 6)
    initial = {k: v + 0.1 * torch.ones_like(v) for k, v in net.state_dict().items()}
    report = predict_effects(net, x.split(100), credit_report(net, [x]), initial=initial)
    assert report.effects.scale == "relative"
    with torch.no_grad():
        w = [layer.weight.T for layer in net]
        states = [x, net[0](x), net[:2](x), net(x)]
        total = (states[-1] - states[-1].mean(0)).square().sum()
        after = [w[1] @ w[2], w[2], torch.eye(4, dtype=torch.float64)]
        for i, j in enumerate(after):
            var = states[i + 1].var(0, correction=0)
            noise = 0.09 * 400 * (var[:, None] * j.square()).sum() / total
            assert report.effects.values["output_noise"][i] == pytest.approx(float(noise), rel=1e-9)
            skipped = states[i] if i < 2 else states[i + 1].mean(0)
            skip = ((skipped - states[i + 1]) @ j).square().sum() / total
            assert report.effects.values["skip"][i] == pytest.approx(float(skip), rel=1e-9)
            fresh = (0.1 * states[i].sum(1, keepdim=True) + 0.1).expand_as(states[i + 1])
            reinit = (fresh @ j).square().sum() / total
            assert report.effects.values["reinit"][i] == pytest.approx(float(reinit), rel=1e-9)
    np.testing.assert_allclose(report.effects.values["linear"], 0, atol=1e-20)


def test_the_second_order_of_kl_equals_dense_jacobians_and_fisher_information():
    net, x = smooth(), normal(60, 5)
    y = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(1))
    report = predict_effects(net, batched(x, y, 20), smooth_report(net, x), ["output_noise", "skip"])
    assert report.effects.scale == "kl"
    with torch.no_grad():
        states = [x, net[0](x), net[:2](x), net(x)]
    for i in range(3):
        j = tail_jacobians(net[i + 1 :], states[i + 1])
        f = fisher(states[-1])
        root = torch.linalg.cholesky(f + 1e-14 * torch.eye(4, dtype=torch.float64))
        sigma = torch.diag(0.09 * states[i + 1].var(0, correction=0))
        noise = 0.5 * torch.einsum("nab,nac,cd,nde,neb->", root, j, sigma, j.mT, root) / 60
        assert report.effects.values["output_noise"][i] == pytest.approx(float(noise), rel=1e-6)
        given = states[i] if i == 1 else states[i + 1].mean(0)
        z = torch.einsum("ncd,nd->nc", j, given - states[i + 1])
        skip = 0.5 * torch.einsum("na,nab,nb->", z, f, z) / 60
        assert report.effects.values["skip"][i] == pytest.approx(float(skip), rel=1e-9)


def test_linear_takes_the_residual_of_a_fit_without_the_sample():
    net, x = smooth(), normal(40, 5)
    report = smooth_report(net, x)
    predicted = predict_effects(net, [x], report, ["linear"], scale="kl").effects.values["linear"]
    with torch.no_grad():
        states = [x, net[0](x), net[:2](x), net(x)]
    f = fisher(states[-1])
    for i in range(3):
        a, b = states[i].numpy(), states[i + 1].numpy()
        ridge = report.tikhonov[i] * np.var(a, axis=0).mean() * 40
        z = np.empty((40, 4))
        j = tail_jacobians(net[i + 1 :], states[i + 1]).numpy()
        for n in range(40):
            rest = np.arange(40) != n
            # The mean is fitted without a penalty: a column of ones.
            ones = np.c_[a - a.mean(0), np.ones(40)]
            penalty = ridge * np.diag([1.0] * a.shape[1] + [0.0])
            k = np.linalg.solve(ones[rest].T @ ones[rest] + penalty, ones[rest].T @ b[rest])
            z[n] = j[n] @ (ones[n] @ k - b[n])
        expected = 0.5 * np.einsum("na,nab,nb->", z, f.numpy(), z) / 40
        assert predicted[i] == pytest.approx(expected, rel=1e-6, abs=1e-20)


def test_errors_are_those_of_a_jackknife_over_samples_dealt_out_in_turn():
    net, x = smooth(), normal(61, 5)
    report = predict_effects(net, [x[:41], x[41:]], smooth_report(net, x), ["skip"], scale="kl")
    with torch.no_grad():
        states = [x, net[0](x), net[:2](x), net(x)]
    # Two batches of 10 draws each, and samples that share a draw share a fold.
    fold = np.concatenate([np.arange(n) % 10 % 5 for n in (41, 20)])
    each = []
    for i in range(3):
        j = tail_jacobians(net[i + 1 :], states[i + 1])
        given = states[i] if i == 1 else states[i + 1].mean(0)
        z = torch.einsum("ncd,nd->nc", j, given - states[i + 1])
        each.append((0.5 * torch.einsum("na,nab,nb->n", z, fisher(states[-1]), z)).numpy())
    share = np.sqrt(np.mean(each, axis=1)) / np.sqrt(np.mean(each, axis=1)).sum()
    for errors, whole, of in (
        (report.effects.stderr["skip"], np.mean(each, axis=1), lambda rest: rest.mean(axis=1)),
        (
            report.effects.influence_stderr,
            share,
            lambda rest: np.sqrt(rest.mean(axis=1)) / np.sqrt(rest.mean(axis=1)).sum(),
        ),
    ):
        h = np.array([61 / (fold == f).sum() for f in range(5)])[:, None]
        left = np.stack([of(np.array(each)[:, fold != f]) for f in range(5)])
        centre = 5 * whole - ((1 - 1 / h) * left).sum(0)
        pseudo = h * whole - (h - 1) * left
        expected = np.sqrt(((pseudo - centre) ** 2 / (h - 1)).mean(0))
        np.testing.assert_allclose(errors, expected, rtol=1e-6)
    np.testing.assert_allclose(report.influence, share, rtol=1e-9)


def test_one_sample_gives_no_error_and_the_table_says_none():
    net, x = smooth(), normal(40, 5)
    report = predict_effects(net, [x[:1]], smooth_report(net, x), ["skip"], scale="kl")
    assert np.isnan(report.effects.stderr["skip"]).all()
    assert report.effects.cells(0)[0] == f"{report.effects.values['skip'][0]:.2g}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weight_noise", "output_noise"])
def test_measured_over_predicted_is_one_for_small_noise(kind):
    net, x = smooth(), normal(300, 5)
    y = net(x).argmax(1)
    report = smooth_report(net, x)
    predicted = predict_effects(net, batched(x, y, 50), report, [kind], strength=1e-3, draws=300)
    measured = intervene(net, [(x, y)], predicted, [kind], strength=1e-3, draws=400)
    np.testing.assert_allclose(measured.effect[:, 0] / predicted.effects.values[kind], 1, atol=0.12)


def test_a_small_known_change_of_weights_is_predicted_sample_by_sample():
    net, x = smooth(), normal(200, 5)
    y = net(x).argmax(1)
    initial = {k: v + 1e-4 * torch.cos(v * 100) for k, v in net.state_dict().items()}
    report = predict_effects(net, batched(x, y), smooth_report(net, x), ["reinit"], initial=initial)
    measured = intervene(net, batched(x, y), report, ["reinit"], initial=initial)
    np.testing.assert_allclose(measured.effect[:, 0] / report.effects.values["reinit"], 1, rtol=2e-3)
    assert measured.predictor == {"reinit": "effect"}


def test_the_order_of_hidden_units_does_not_matter():
    net, x = smooth(), normal(100, 5)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    turned = copy.deepcopy(net)
    with torch.no_grad():
        turned[0][0].weight.copy_(net[0][0].weight[order])
        turned[0][0].bias.copy_(net[0][0].bias[order])
        turned[1][0].weight.copy_(net[1][0].weight[:, order])
    kinds = ["linear", "output_noise"]
    first = predict_effects(net, [x], smooth_report(net, x), kinds, scale="kl").effects
    second = predict_effects(turned, [x], smooth_report(turned, x), kinds, scale="kl").effects
    for kind in kinds:
        np.testing.assert_allclose(first.values[kind], second.values[kind], rtol=1e-6, atol=1e-18)


def test_batch_size_changes_no_prediction_that_draws_nothing():
    net, x = smooth(), normal(100, 5)
    kinds = ["linear", "output_noise", "skip"]
    initial = smooth(5).state_dict()
    whole, parts = (
        predict_effects(
            net, b, smooth_report(net, x), [*kinds, "reinit"], initial=initial, scale="kl"
        ).effects
        for b in ([x], x.split(17))
    )
    for kind in (*kinds, "reinit"):
        np.testing.assert_allclose(whole.values[kind], parts.values[kind], rtol=1e-9, atol=1e-18)


def test_many_outputs_are_taken_in_random_combinations_with_the_same_mean():
    net, x = smooth(), normal(3000, 5)
    report = smooth_report(net, x)
    exact = predict_effects(net, [x], report, ["output_noise", "skip"], scale="kl")
    drawn = predict_effects(net, [x], report, ["output_noise", "skip"], scale="kl", probes=3)
    assert "effects are predicted from 3 random combinations of the 4 outputs a sample" in drawn.notes
    assert not exact.notes or "random" not in exact.notes[-1]
    for kind in ("output_noise", "skip"):
        np.testing.assert_allclose(drawn.effects.values[kind], exact.effects.values[kind], rtol=0.1)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 3, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))


def test_outputs_with_positions_average_over_them():
    torch.manual_seed(0)
    net = Positions().double()
    x = torch.randn(80, 2, 4, dtype=torch.float64)
    y = net(x).argmax(1)
    report = credit_report(net, [x], components=["first", "head"])
    here = predict_effects(net, [(x, y)], report, ["output_noise"])
    measured = intervene(net, [(x, y)], here, ["output_noise"], draws=300)
    assert here.effects.scale == "kl"
    np.testing.assert_allclose(measured.effect[:, 0], here.effects.values["output_noise"], rtol=0.15)


def test_shared_weights_count_in_every_call():
    torch.manual_seed(0)
    net, x = Twice().double(), normal(200, 4)
    report = credit_report(net, [x])
    initial = {k: v + (1e-5 if "inner" in k else 0) for k, v in net.state_dict().items()}
    predicted = predict_effects(net, [x], report, ["reinit"], initial=initial, scale="relative")
    measured = intervene(net, [x], predicted, ["reinit"], initial=initial)
    assert report.components[:2] == ("inner", "inner#1")
    effect = predicted.effects.values["reinit"]
    assert effect[0] == effect[1] > 0
    np.testing.assert_allclose(effect[:2], measured.effect[:2, 0], rtol=1e-3)
    assert effect[2] == 0


@pytest.mark.slow
def test_convolutions_are_reduced_but_their_effects_are_whole():
    net, x = cnn(), torch.randn(600, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = net(x).argmax(1)
    report = credit_report(net, [x], options=Options(max_dim=32))
    kinds = ["linear", "output_noise"]
    predicted = predict_effects(net, batched(x, y), report, kinds)
    measured = intervene(net, batched(x, y), predicted, kinds, fit_batches=[x], draws=20)
    # These convolutions are linear, and what the leading 256 directions of 64 pixels keep is everything.
    np.testing.assert_allclose(predicted.effects.values["linear"], 0, atol=1e-6)
    np.testing.assert_allclose(measured.effect[:, 1], predicted.effects.values["output_noise"], rtol=0.2)


def test_tuple_outputs_integer_inputs_and_batches_as_mappings():
    torch.manual_seed(0)
    net = Attending()
    tokens, labels = torch.randint(0, 7, (300, 5)), torch.randint(0, 3, (300,))
    batches = [{"tokens": tokens[i], "labels": labels[i]} for i in torch.arange(300).split(100)]

    def forward(model, batch):
        return model(batch["tokens"])

    report = credit_report(net, batches, forward_fn=forward, components=["embed", "attention", "head"])
    predicted = predict_effects(net, batches, report, forward_fn=forward)
    assert predicted.components == ("attention", "head")
    assert all(np.isfinite(v).all() and (v >= 0).all() for v in predicted.effects.values.values())
    noisy = predict_effects(net, batches, report, ["output_noise"], strength=1e-2, forward_fn=forward)
    measured = intervene(
        net, batches, noisy, ["output_noise"], strength=1e-2, draws=50, forward_fn=forward
    )
    np.testing.assert_allclose(measured.effect[:, 0], noisy.effects.values["output_noise"], rtol=0.15)


def test_in_place_layers_and_frozen_weights_are_no_obstacle():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    changing = copy.deepcopy(plain)
    changing[1], changing[3] = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
    for parameter in changing.parameters():
        parameter.requires_grad_(False)
    x, y = data()
    names = ["0", "2", "4"]
    kinds = ["linear", "output_noise", "skip"]
    first, second = (
        predict_effects(
            net, batched(x, y), credit_report(net, batched(x, y), components=names), kinds
        ).effects
        for net in (plain, changing)
    )
    for kind in kinds:
        np.testing.assert_allclose(first.values[kind], second.values[kind], rtol=1e-5)


def gradients(model: nn.Module) -> list:
    return [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_exactly_as_found(fails):
    net, (x, y) = mlp(), data()
    net.train()
    net[3].eval()
    net[0].weight.requires_grad_(False)
    net[2].weight.grad = torch.ones_like(net[2].weight)
    report = credit_report(net, batched(x, y))
    before, grads = fingerprint(net), gradients(net)
    calls = []

    def forward(model, batch):
        calls.append(1)
        if fails and len(calls) > 9:
            raise RuntimeError("no pass")
        return model(batch[0])

    if fails:
        with pytest.raises(RuntimeError, match="no pass"):
            predict_effects(net, batched(x, y), report, forward_fn=forward)
    else:
        predict_effects(net, batched(x, y), report, forward_fn=forward)
    assert_same(before, fingerprint(net))
    for (needed, old), (still, new) in zip(grads, gradients(net), strict=True):
        assert needed == still
        assert (old is None and new is None) or torch.equal(old, new)


def test_linear_predicts_the_reports_own_operator():
    net, x = smooth(), normal(300, 5)
    y = net(x).argmax(1)
    report = credit_report(net, [x], components=["0", "1", "2"], options=Options(tikhonov=0.3))
    predicted = predict_effects(net, batched(x, y), report, ["linear"])
    measured = intervene(net, batched(*(t for t in (normal(300, 5, seed=9), y))), report, ["linear"])
    plain = predict_effects(net, batched(x, y), smooth_report(net, x), ["linear"])
    ours, theirs, other = (
        values[:2]
        for values in (
            predicted.effects.values["linear"],
            measured.effect[:, 0],
            plain.effects.values["linear"],
        )
    )
    np.testing.assert_allclose(ours, theirs, rtol=0.25)
    assert (np.abs(ours - other) > 1e-4 * other).all()


def test_a_delay_gives_the_operator_its_earlier_states():
    net, x = smooth(), normal(200, 5)
    report = credit_report(net, [x], components=["0", "1", "2"], options=Options(delay=2))
    predicted = predict_effects(net, [x], report, ["linear"], scale="kl").effects.values["linear"]
    with torch.no_grad():
        states = [x, net[0](x), net[:2](x), net(x)]
        sources = torch.cat([states[1], states[0]], dim=1)
        residual = report.operators["1"].predict(sources) - states[2]
        centred = sources - sources.mean(0)
        c = centred.T @ centred / 200
        ridge = report.tikhonov[1] * c.diagonal().mean() * torch.eye(len(c))
        leverage = (1 + (centred @ torch.linalg.inv(c + ridge) * centred).sum(1)) / 200
        z = torch.einsum(
            "ncd,nd->nc", tail_jacobians(net[2:], states[2]), residual / (1 - leverage)[:, None]
        )
    expected = 0.5 * torch.einsum("na,nab,nb->", z, fisher(states[3]), z) / 200
    assert predicted[1] == pytest.approx(float(expected), rel=1e-6)


def test_outputs_of_one_value_and_tensors_of_inference_mode():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    with torch.inference_mode():
        x = torch.randn(100, 5)
    report = credit_report(net, [x], components=["0", "2"])
    predicted = predict_effects(net, [x], report, ["output_noise"], strength=1e-2)
    measured = intervene(net, [x], predicted, ["output_noise"], strength=1e-2, draws=200)
    np.testing.assert_allclose(measured.effect[:, 0], predicted.effects.values["output_noise"], rtol=0.1)
    mapping = predict_effects(
        net, [{"input": x}], report, ["output_noise"], strength=1e-2, scale="relative"
    )
    np.testing.assert_array_equal(
        mapping.effects.values["output_noise"], predicted.effects.values["output_noise"]
    )


def test_draws_are_seeded():
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y))
    first, again, other = (
        predict_effects(net, batched(x, y), report, ["weight_noise"], seed=seed).effects.values
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first["weight_noise"], again["weight_noise"])
    assert (first["weight_noise"] != other["weight_noise"]).all()


def test_influence_is_the_mean_share_of_the_amplitude_and_sums_to_one():
    net, (x, y) = mlp(), data()
    report = predict_effects(net, batched(x, y), credit_report(net, batched(x, y)))
    moved = np.sqrt(np.stack([report.effects.values[kind] for kind in KINDS]))
    expected = (moved / moved.sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(report.influence, expected, rtol=1e-12)
    assert report.influence.sum() == pytest.approx(1)
    bare = credit_report(net, batched(x, y))
    assert np.isnan(bare.influence).all()
    nothing = dataclasses.replace(report.effects, values={"skip": np.zeros(3)})
    assert np.isnan(nothing.influence).all()


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        with torch.no_grad():
            x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(x)


def test_where_no_gradient_leads_nothing_is_predicted():
    torch.manual_seed(0)
    net, x = Broken(), torch.randn(100, 4)
    report = credit_report(net, [x])
    assert report.components == ("first", "second", "head")
    predicted = predict_effects(net, [x], report, ["output_noise"], scale="relative")
    assert np.isnan(predicted.effects.values["output_noise"]).tolist() == [True, True, False]
    assert (
        "no gradient leads from the outputs to 'first', 'second', so no effect is predicted there"
        in predicted.notes
    )
    assert predicted.influence[2] == 1


def test_reports_with_effects_are_written_and_read_back(tmp_path):
    net, (x, y) = mlp(), data()
    report = predict_effects(net, batched(x, y), credit_report(net, batched(x, y)))
    report.to_json(tmp_path / "r.json")
    back = CreditReport.from_json(tmp_path / "r.json")
    assert back.effects.scale == "kl"
    assert (back.effects.strength, back.effects.n_samples) == (0.3, 400)
    for kind in KINDS:
        np.testing.assert_array_equal(back.effects.values[kind], report.effects.values[kind])
    assert str(back) == str(report)
    assert "influence" in str(report)
    older = json.loads((tmp_path / "r.json").read_text())
    del older["effects"]
    assert CreditReport.from_dict(older).effects is None
    for spoil, message in (
        ({"values": {}}, "effects must hold values and stderr of equal kinds"),
        ({"values": {"swap": [1.0]}}, "field effects.values.swap.*: Input should be 'linear', "),
        ({"scale": "mse"}, "field effects.scale: Input should be 'kl' or 'relative', not 'mse'"),
        ({"strength": -1.0}, "effects.strength: Input should be greater than or equal to 0, not -1.0"),
        ({"values": {"skip": [1.0]}, "stderr": {"skip": [1.0]}}, "skip: has 1 entries for"),
        ({"stderr": {}}, "effects must hold values and stderr of equal kinds"),
    ):
        given = json.loads((tmp_path / "r.json").read_text())
        given["effects"] |= spoil
        with pytest.raises(ReportFormatError, match=message):
            CreditReport.from_dict(given)


def test_measured_effects_stand_beside_predicted_ones():
    net, (x, y) = mlp(), data()
    report = predict_effects(net, batched(x, y), credit_report(net, batched(x, y)))
    result = intervene(net, batched(x, y), report, draws=2)
    assert set(result.predictor.values()) == {"effect"}
    text = str(result)
    assert text.count("predicted") == 3
    assert text.count("metric") >= 3
    figure = result.plot()
    assert len(figure.axes) == 5
    for axis in figure.axes:
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        line = axis.get_lines()[-1]
        np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    with pytest.raises(ValueError, match=r"predicts effects of noise of strength 0.3, but strength is"):
        intervene(net, batched(x, y), report, strength=0.1)
    with pytest.raises(ValueError, match="predicts effects on the scale 'kl', but scale is 'relative'"):
        intervene(net, batched(x, y), report, scale="relative")


def test_errors_say_what_arrived_and_what_to_do():
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y))
    with pytest.raises(ValueError, match="probes is 0"):
        predict_effects(net, batched(x, y), report, probes=0)
    with pytest.raises(ValueError, match="the outputs carry no gradient"):
        predict_effects(net, batched(x, y), report, forward_fn=lambda m, b: m(b[0]).detach())
    with pytest.raises(ValueError, match=r"gave a tensor of shape \(100, 12\) for 30 samples of"):
        predict_effects(net, batched(x, y), report, forward_fn=lambda m, b: m(b[0])[:30], scale="kl")


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = smooth()

    def forward(self, x):
        return self.net(x)


def test_batches_made_under_inference_mode_are_of_any_kind():
    x = normal(60, 5)
    report = credit_report(ByName(), [x], components=["net.0", "net.1", "net.2"])
    expected = predict_effects(ByName(), [x], report, ["output_noise"]).effects
    with torch.inference_mode():
        given = [{"x": x.clone(), "unused": "text"}]
    found = predict_effects(ByName(), given, report, ["output_noise"]).effects
    np.testing.assert_allclose(found.values["output_noise"], expected.values["output_noise"])
