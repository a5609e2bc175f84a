"""Measured effects: closed forms, alterations by hand, models left as found, every error."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from effect_nets import (
    Attending,
    Branches,
    Twice,
    assert_same,
    batched,
    data,
    fingerprint,
    left_out,
    linear_chain,
    mlp,
    normal,
    pooled,
    smooth,
)
from scipy.stats import sem
from small import wired
from torch import Tensor, nn

import lightning_koopman
from lightning_koopman import component_effects, credit_report, drop_order
from lightning_koopman.effects.alterations import Alterations
from lightning_koopman.effects.scoring import kl_divergence
from lightning_koopman.network.runs.samples import spread_over
from lightning_koopman.report.effects import KINDS


def relative(y: Tensor, altered: Tensor) -> float:
    return float((altered - y).square().sum() / (y - y.mean(0)).square().sum())


def right(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(1) == y).double().mean())


def test_without_a_report_the_components_are_those_that_one_would_name():
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y))
    alone = component_effects(net, batched(x, y))
    assert alone.components == report.components
    assert alone.how == {"skip": "measured"}
    beside = component_effects(net, batched(x, y), report)
    np.testing.assert_array_equal(alone.values["skip"], beside.values["skip"])
    few = component_effects(net, batched(x, y), report, components=["[25]"])
    assert few.components == ("2", "5")
    np.testing.assert_array_equal(few.values["skip"], alone.values["skip"][1:])
    assert component_effects(net, batched(x, y), components=["2"]).components == ("2",)


def test_each_component_takes_as_many_passes_as_there_are_draws():
    net, x = linear_chain(), normal(20, 6)
    report = credit_report(net, [normal(200, 6)])

    def passes(kind: str, **given) -> int:
        seen = []
        options = {"kinds": [kind], "how": "measured", "forward_fn": lambda m, b: seen.append(1) or m(b)}
        component_effects(net, [x], report, **options, **given)
        return len(seen)

    count, once = len(report.components), passes("output_noise")
    assert passes("output_noise", draws=4) - once == 3 * count
    assert passes("weight_noise", draws=4) - passes("weight_noise", draws=1) == 3 * count
    assert passes("weight_noise") - passes("weight_noise", draws=1) == 4 * count
    assert passes("skip", draws=4) == passes("skip")
    assert passes("output_noise", draws=1) == once
    first = dict(net.state_dict())
    assert passes("reinit") - passes("reinit", initial=first, draws=4) == 4 * count


def test_skip_passes_the_input_where_shapes_agree_and_the_mean_elsewhere():
    net, (x, y) = mlp(), data()
    found = component_effects(net, batched(x, y))
    with torch.no_grad():
        logits = net(x)
        skipped = net[5](net[:2](x))
        mean = logits.mean(0).expand_as(logits)
    assert found.scale == "kl"
    assert found.metric_before == pytest.approx(right(logits, y))
    for place, altered in ((1, skipped), (2, mean)):
        by_sample = kl_divergence(logits, altered).numpy()
        gained = (altered.argmax(1) == y).double() - (logits.argmax(1) == y).double()
        assert found.values["skip"][place] == pytest.approx(by_sample.mean(), rel=1e-5)
        if place == 1:
            assert found.stderr["skip"][place] == pytest.approx(sem(by_sample), rel=1e-5)
        assert found.metric["skip"][place] == pytest.approx(right(altered, y))
        assert found.metric_stderr["skip"][place] == pytest.approx(sem(gained.numpy()))


def test_pooling_behind_a_block_runs_on_what_the_block_takes_where_it_is_skipped():
    net, x = pooled(), normal(300, 40).reshape(300, 4, 10)
    with torch.no_grad():
        logits, skipped = net(x), net[3:](net[:2](x))
    batches, parts = [*zip(x.split(128), logits.argmax(1).split(128), strict=True)], ["1", "2", "5"]
    net_before = fingerprint(net)
    for report in (credit_report(net, batches), None):
        found = component_effects(net, batches, report, components=parts)
        by_sample = kl_divergence(logits, skipped).numpy()
        assert found.values["skip"][1] == pytest.approx(by_sample.mean(), rel=1e-5)
        assert found.stderr["skip"][1] == pytest.approx(sem(by_sample), rel=1e-5)
        assert found.metric["skip"][1] == right(skipped, logits.argmax(1))
    assert_same(fingerprint(net), net_before)
    # It is what drop_order removes, beside another component that is gone, too.
    order = drop_order(net, batches, components=["1", "2"], steps=2)
    pair = component_effects(net, batches, components=parts, sets=[("1", "2")]).values["skip"]
    assert sorted(order.remaining[0]) == pytest.approx(sorted(pair[:2]), rel=1e-5)
    assert order.effect[1] == pytest.approx(pair[3], rel=1e-5)


def test_pooling_stays_also_where_it_changes_the_shape_in_some_batches_alone():
    """A batch of sequences of two positions, which pooling to two leaves as they are."""
    net, long, short = pooled(), normal(200, 40).reshape(200, 4, 10), normal(100, 8).reshape(100, 4, 2)
    with torch.no_grad():
        batches, logits = [long, short], torch.cat([net(long), net(short)])
        skipped = torch.cat([net[3:](net[:2](x)) for x in (long, short)])
    report = credit_report(net, [long])
    assert report.parts["2"] == ("2", "3", "4")
    found = component_effects(net, batches, report, components=["1", "2"])
    assert found.values["skip"][1] == pytest.approx(relative(logits, skipped), rel=1e-5)


def test_the_error_of_skip_is_that_of_groups_with_means_of_their_own():
    """Moved by a fifth of the way, the outputs follow along a line."""
    net, (x, y) = mlp(), data(240)
    sizes, groups, parts = (160, 80), (20, 10), []
    found = component_effects(net, list(zip(x.split(160), y.split(160), strict=True)))
    with torch.no_grad():
        logits = net(x).double()
        mean = logits.mean(0)
        effect = kl_divergence(logits, mean.expand_as(logits)).mean()
        for rows, count in zip(logits.split(sizes), groups, strict=True):
            for own in (rows[i::count] for i in range(count)):
                moved = mean + 0.2 * (own.mean(0) - mean)
                here = kl_divergence(own, mean.expand_as(own))
                there = kl_divergence(own, moved.expand_as(own))
                parts.append(float((here + (there - here) / 0.2).mean()))
    assert found.values["skip"][2] == pytest.approx(float(effect), rel=1e-5)
    assert found.stderr["skip"][2] == pytest.approx(sem(parts), rel=1e-5)


def test_groups_of_sequences_of_several_lengths_have_a_mean_over_positions():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [normal(80 * n, 5, seed=n).view(80, n, 5).float() for n in (4, 6)]
    with torch.no_grad():
        own = [net(x).double() for x in batches]
        mean = torch.cat([y.flatten(0, 1) for y in own]).mean(0)
        labels = [y.argmax(2) for y in own]
        moved, whole = [], []
        for rows in (y[i::10] for y in own for i in range(10)):
            shifted = mean + 0.2 * (rows.mean((0, 1)) - mean)
            here, there = (kl_divergence(rows, m.expand_as(rows), 2).sum() for m in (mean, shifted))
            moved.append(float(here + (there - here) / 0.2))
            whole.append(rows[..., 0].numel())
    found = component_effects(net, list(zip(batches, labels, strict=True)))
    rest = np.array(moved) - sum(moved) / sum(whole) * np.array(whole)
    assert found.scale == "kl"
    assert found.stderr["skip"][1] == pytest.approx(
        math.sqrt((rest**2).sum() * 20 / 19) / sum(whole), rel=1e-4
    )


def test_the_error_of_skip_is_the_spread_over_fresh_samples():
    """Without the mean's own error it would be six tenths of that."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4)).double()
    net[0].weight.data *= 4
    net[0].bias.data *= 5

    def fresh(seed):
        x = normal(320, 3, seed=seed).exp()
        found = component_effects(net, x.split(160), components=["0"], scale="kl")
        return found.values["skip"][0], found.stderr["skip"][0]

    effects, errors = np.array([fresh(seed) for seed in range(100)]).T
    assert np.sqrt((errors**2).mean()) == pytest.approx(effects.std(ddof=1), rel=0.2)


def test_linear_is_the_residual_of_a_fit_without_the_sample():
    net, x = smooth(), normal(40, 5)
    found = component_effects(net, [x[:17], x[17:]], kinds=["linear"], components=["0", "1", "2"])
    with torch.no_grad():
        states = [x, net[0](x), net[:2](x), net(x)]
        for i in range(3):
            fit = Alterations(net, {"c": (f"{i}",)}, ["linear"])
            fit.update(
                [{fit.inputs["c"]: states[i], fit.outputs["c"]: states[i + 1]}], 40, lambda _: None
            )
            fit.solve()
            ridge = 40 * fit.maps["c"].tikhonov * float(states[i].var(0, correction=0).mean())
            altered = net[i + 1 :](states[i + 1] - left_out(states[i], states[i + 1], ridge))
            expected = relative(states[3], altered)
            assert found.values["linear"][i] == pytest.approx(expected, rel=1e-6, abs=1e-20)


def test_what_is_linear_loses_nothing_in_tensors_of_any_shape():
    torch.manual_seed(0)
    images = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 3)
    ).eval()
    for net, x in ((linear_chain(), normal(300, 6)), (images, torch.randn(512, 1, 8, 8))):
        found = component_effects(net, [x], kinds=["linear"])
        np.testing.assert_allclose(found.values["linear"], 0, atol=1e-6)


def test_output_noise_on_a_linear_chain_has_its_closed_form():
    net, x = linear_chain(), normal(4000, 6)
    found = component_effects(net, x.split(1000), kinds=["output_noise"], samples=4000, draws=8)
    with torch.no_grad():
        states = [net[: i + 1](x) for i in range(3)]
    rest = [net[2].weight @ net[1].weight, net[2].weight, torch.eye(4, dtype=torch.float64)]
    total = states[-1].var(0, correction=0).sum()
    for i, (state, jacobian) in enumerate(zip(states, rest, strict=True)):
        moved = 0.09 * (jacobian.square() * state.var(0, correction=0)).sum() / total
        assert found.values["output_noise"][i] == pytest.approx(float(moved.detach()), rel=0.05)


def test_sets_are_altered_together():
    net, (x, y) = mlp(), data()
    kinds = ["skip", "reinit"]
    found = component_effects(
        net, batched(x, y), kinds=kinds, how="measured", initial=mlp(5).state_dict(), sets=[{"5", "2"}]
    )
    assert found.components == ("0", "2", "5", "2+5")
    fresh = copy.deepcopy(net)
    fresh.load_state_dict({k: v for k, v in mlp(5).state_dict().items() if k[0] in "235"}, strict=False)
    with torch.no_grad():
        logits = net(x)
        skipped = logits.mean(0).expand_as(logits)
        for kind, altered in (("skip", skipped), ("reinit", fresh(x))):
            expected = kl_divergence(logits, altered).mean().item()
            assert found.values[kind][3] == pytest.approx(expected, rel=1e-5)
            assert found.of({"2", "5"}, kind) == (found.values[kind][3], found.stderr[kind][3])


def test_noise_of_weights_is_seeded_and_grows_with_strength():
    net, (x, y) = mlp(), data()
    first, again, large = (
        component_effects(
            net, batched(x, y), kinds=["weight_noise"], how="measured", strength=strength, draws=2
        ).values["weight_noise"]
        for strength in (0.1, 0.1, 0.5)
    )
    np.testing.assert_array_equal(first, again)
    assert (large > first).all()


def test_the_error_covers_draws():
    net, (x, y) = mlp(), data()
    how = {"kinds": ["reinit"], "how": "measured", "components": ["2"]}
    how["report"] = credit_report(net, batched(x, y))
    drawn = [component_effects(net, batched(x, y), draws=1, seed=100 * s, **how) for s in range(40)]
    # Over the same samples, what differs from seed to seed is the draw alone.
    spread = np.std([one.values["reinit"][0] for one in drawn], ddof=1)
    assert np.mean([one.stderr["reinit"][0] for one in drawn]) < 0.5 * spread
    several = [component_effects(net, batched(x, y), draws=8, seed=100 * s, **how) for s in range(12)]
    squares = [one.stderr["reinit"][0] ** 2 for one in several]
    assert np.sqrt(np.mean(squares)) == pytest.approx(spread / np.sqrt(8), rel=0.25)


@pytest.mark.parametrize("kind", ["reinit", "weight_noise", "same"])
def test_weights_as_they_are_change_nothing(kind):
    net, (x, y) = mlp(), data()
    found = component_effects(
        net, batched(x, y), kinds=[kind] if kind in KINDS else [], how="measured", strength=0.0,
        initial=net.state_dict() if kind == "reinit" else None,
        replacements={} if kind in KINDS else {"same": net.state_dict()},
    )  # fmt: skip
    np.testing.assert_array_equal(found.values[kind], 0)
    assert (found.metric[kind] == found.metric_before).all()


def test_buffers_of_a_component_go_along():
    net, (x, y) = mlp(), data()
    with torch.no_grad():
        net[3].running_mean.fill_(0.2)
    initial = copy.deepcopy(net.state_dict())
    initial["3.running_mean"].zero_()
    found = component_effects(net, batched(x, y), kinds=["reinit"], how="measured", initial=initial)
    assert found.values["reinit"][1] > 0
    assert found.values["reinit"][[0, 2]].tolist() == [0, 0]


def test_calls_of_a_shared_module_are_altered_one_by_one():
    torch.manual_seed(0)
    net, x = Twice(), torch.randn(200, 4)
    found = component_effects(net, [x])
    assert found.components == ("inner", "inner#1", "head")
    with torch.no_grad():
        y = net(x)
        once = net.head(net.act(net.inner(x)))
        for i, altered in enumerate((once, once, y.mean(0).expand_as(y))):
            assert found.values["skip"][i] == pytest.approx(relative(y, altered), rel=1e-4)


def test_states_that_are_joined_or_summed_are_altered_part_by_part():
    torch.manual_seed(0)
    net, x = Branches(), torch.randn(200, 3)
    report = credit_report(net, [x])
    assert report.components == ("left+right", "head", "output")
    found = component_effects(net, [x], report, kinds=["skip", "linear"])
    assert found.components == ("left", "right", "head")
    with torch.no_grad():
        a, b = net.left(x), torch.tanh(net.right(x))
        both = a.mean(0) + b
        assert found.values["skip"][0] == pytest.approx(
            relative(net(x), both + net.head(both)), rel=1e-4
        )
        assert found.values["skip"][2] == pytest.approx(relative(net(x), 2 * (a + b)), rel=1e-4)
    # The tangent is nobody's own, and all else is linear.
    np.testing.assert_allclose(found.values["linear"], 0, atol=1e-9)
    # What is not a row of the report's own stands in the table of effects.
    text = str(dataclasses.replace(report, effects=found))
    assert "left " in text


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.LSTM(4, 6), nn.LSTM(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)[0])[0][-1])


def test_samples_may_be_along_the_second_axis():
    torch.manual_seed(0)
    net, x = SequenceFirst(), torch.randn(5, 100, 4)
    batches, initial = [x[:, :60], x[:, 60:]], SequenceFirst().state_dict()
    how = {"how": "both", "initial": initial, "probes": 3}
    found = component_effects(net, batches, credit_report(net, [x]), KINDS, **how)
    with torch.no_grad():
        y = net(x)
        mean = net.first(x)[0].mean(1, keepdim=True).expand(-1, 100, -1)
        altered = [net.head(net.second(mean)[0][-1]), net.head(net.first(x)[0][-1])]
        for i in range(2):
            assert found.values["skip"][i] == pytest.approx(relative(y, altered[i]), rel=1e-4)
    ratio = found.predicted["output_noise"] / found.values["output_noise"]
    np.testing.assert_allclose(ratio, 1, atol=0.5)
    # What follows the second layer is linear.
    for kind in ("skip", "reinit"):
        assert found.predicted[kind][1] == pytest.approx(found.values[kind][1], rel=1e-4)


def test_sequences_may_differ_in_length_from_batch_to_batch():
    torch.manual_seed(0)
    net = Attending()
    batches = [
        {"tokens": torch.randint(0, 7, (50, n)), "labels": torch.zeros(50).long()} for n in (3, 6)
    ]
    how = {
        "forward_fn": lambda model, batch: model(batch["tokens"]),
        "components": ["attention", "head"],
    }
    found = component_effects(net, batches, kinds=["skip", "output_noise"], how="both", **how)
    assert found.scale == "kl"
    assert all((found.values[kind] > 0).all() for kind in found.kinds)
    found = component_effects(net, batches, kinds=["linear"], **how)
    assert np.isnan(found.values["linear"]).tolist() == [True, False]
    assert any("'attention' takes (50, 6, 8) and gives (50, 6, 8), other" in n for n in found.notes)
    how["components"] = ["embed", "head"]
    found = component_effects(net, batches[:1], kinds=["linear"], **how)
    assert np.isnan(found.values["linear"]).tolist() == [True, False]
    assert any("'embed' takes no floating-point tensor, or one of" in note for note in found.notes)


def test_at_most_l_plus_3_passes_over_at_most_512_samples():
    """And one more for each component in whose place a mean is put."""
    net, (x, y) = mlp(), data(2000)
    rows: list[int] = []

    def forward(model, batch):
        rows.append(len(batch[0]))
        return model(batch[0])

    for batches in (batched(x, y), batched(x, y, 2000), iter(batched(x, y))):
        rows.clear()
        found = component_effects(net, batches, forward_fn=forward)
        assert found.n_samples == 512
        assert sum(rows) <= (len(found.components) + 2 + 3) * 512


def test_only_what_is_plain_enough_is_cut():
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    x, y = data(100)
    given = {"x": x, "weight": torch.ones(7), "labels": y}
    whole = component_effects(net, [given], samples=30, forward_fn=lambda m, b: m(b["x"]))
    assert whole.n_samples == 100
    named = {"x": x, "names": [str(i) for i in range(100)], "labels": y}
    seen = []

    def forward(model, batch):
        seen.append(batch["names"])
        return model(batch["x"])

    assert component_effects(net, [named], samples=30, forward_fn=forward).n_samples == 30
    assert seen[-1] == [str(i) for i in spread_over(30, 100)]


@pytest.mark.parametrize("how", ["measured", "predicted"])
@pytest.mark.parametrize("fails", [None, "metric", "pass"])
def test_the_model_is_left_exactly_as_found(how, fails):
    net, (x, y) = mlp(), data()
    net.train()
    net[3].eval()
    net[0].weight.requires_grad_(False)
    net[2].weight.grad = torch.ones_like(net[2].weight)
    report = credit_report(net, batched(x, y))
    before, calls = fingerprint(net), itertools.count()

    def forward(model, batch):
        if fails == "pass" and next(calls) > 6:
            raise RuntimeError("no more")
        return model(batch[0])

    def metric(outputs, targets):
        if fails == "metric" and next(calls) > (how == "measured"):
            raise RuntimeError("no more")
        return 1.0

    for kind in KINDS:
        calls = itertools.count()
        given = {"how": how, "draws": 2, "forward_fn": forward, "metric": metric}
        if fails == "metric" and how == "predicted":
            given["metric"] = lambda outputs, targets: [][0]
        if fails:
            with pytest.raises((RuntimeError, IndexError)):
                component_effects(net, batched(x, y), report, [kind], **given)
        else:
            component_effects(net, batched(x, y), report, [kind], **given)
        assert_same(before, fingerprint(net))


def test_a_metric_of_the_users_own():
    net, (x, y) = mlp(), data()
    found = component_effects(
        net, batched(x, y), metric=lambda outputs, targets: float((outputs[:, 0] - targets).abs().mean())
    )
    with torch.no_grad():
        assert found.metric_before == pytest.approx(float((net(x)[:, 0] - y).abs().mean()))
    assert np.isnan(found.metric_stderr["skip"]).all()


@pytest.mark.parametrize(
    ("alone", "n", "doubts"), [(20, 300, ("leverage",)), (10, 300, ()), (0, 40, ("samples",))]
)
def test_linear_maps_that_few_samples_decide_are_doubted(alone, n, doubts):
    """Samples that have an axis of their own; or hardly more samples than there are axes."""
    torch.manual_seed(0)
    x = normal(n, 25)
    if alone:
        x[:, 5:] = 0.0
        x[:alone, 5 : 5 + alone] = 10 * torch.eye(alone)
    rows = np.column_stack([np.ones(n), x.numpy()])
    leverage = np.einsum("ij,ji->i", rows, np.linalg.pinv(rows))
    decided = (leverage > 0.95).mean()
    assert (decided > 0.05, leverage.mean() > 0.5) == ("leverage" in doubts, "samples" in doubts)
    net = nn.Sequential(nn.Linear(25, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    net[0].weight.data *= 0.1
    assert component_effects(net, [x], kinds=["linear"]).doubts["linear"] == (doubts, ())


class Unsteady(nn.Module):
    """Answers by a count of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(5, 4), nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.b(torch.tanh(self.a(x))) + 0.3 * (self.calls % 2)


def test_a_network_that_answers_differently_when_asked_twice_is_doubted():
    x, _ = data(200)
    net = Unsteady()
    found = component_effects(net, [x], kinds=["output_noise"], strength=1e-3)
    assert found.doubts["output_noise"] == (("unsteady",), ("unsteady",))
    steady = component_effects(mlp(), [x])
    assert not any(steady.doubts["skip"])
    assert "?: unsteady (output_noise)" in str(found)


class Gate(nn.Module):
    """Scales what comes first by what comes second."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 5)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.mix(x) * scale


def test_linear_maps_of_components_that_take_further_tensors_which_vary_are_doubted():
    x, _ = data(400)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        alone = m.same(x, torch.ones(len(x), 1))
        return m.head(m.gate(alone, x.square()))

    net = wired(run, same=Gate(), gate=Gate(), head=nn.Linear(5, 3))
    found = component_effects(net, [x], kinds=["linear", "skip"], sets=[["same", "gate"]])
    assert found.components == ("same", "gate", "head", "same+gate")
    assert found.doubts["linear"] == ((), ("inputs",), (), ("inputs",))
    assert not any(found.doubts["skip"])
    assert "?: inputs (linear)" in str(found)


def test_linear_maps_of_too_few_samples_are_doubted():
    net = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))
    few = component_effects(net, [torch.randn(30, 40)], kinds=["linear"])
    assert "samples" in few.doubts["linear"][0]
    many = component_effects(net, [torch.randn(500, 40)], kinds=["linear"])
    assert not any(many.doubts["linear"])


def test_noise_leaves_single_and_whole_numbers_alone():
    model = nn.Sequential(nn.PReLU(), nn.Linear(3, 3))
    model[0].register_parameter("count", nn.Parameter(torch.arange(4), requires_grad=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    noise = Alterations(model, {"0": ("0",), "1": ("1",)}, ["weight_noise"], strength=0.5)
    with noise.weights.altered("weight_noise", ["0", "1"]):
        inside = {name: value.clone() for name, value in model.state_dict().items()}
    assert {name for name in before if not torch.equal(before[name], inside[name])} == {
        "1.weight",
        "1.bias",
    }
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x):
        return x @ self.weight


def test_errors_say_what_arrived_and_what_to_do():
    net, (x, y) = mlp(), data()
    batches = batched(x, y)
    report = credit_report(net, batches)

    def refused(message, given=batches, of=net, about=report, kinds=("skip",), **more):
        with pytest.raises(ValueError, match=message):
            component_effects(of, given, about, kinds, **more)

    refused(r"unknown kinds \['linaer'\]; give a list of some of", kinds=["linaer"])
    refused(r"unknown kinds 'skip'; give a list of some of \('linear'", kinds="skip")
    refused(r"kinds names nothing; choose some of \('linear'", kinds=[])
    refused("kinds is None; it must be a list of kinds", kinds=None)
    refused("sets is 3; it must be a list of sets", sets=3)
    refused(r"sets holds 3; each must hold two or more of \('0', '2', '5'\)", sets=[3])
    refused(r"replacements are named \['skip'\], which are kinds", replacements={"skip": {}})
    refused("has no components '9'", components=["9"])
    refused("components is of type type; it must be names or glob patterns", components=nn.Linear)
    refused("components names nothing", components=[])
    refused("strength is -1", strength=-1)
    refused("initial weights are given, but the effect", initial=net.state_dict())
    refused("draws is 0", draws=0)
    refused("probes is 0", probes=0)
    refused("samples is 0", samples=0)
    refused("how is 'guessed'; choose one of", how="guessed")
    refused("scale is 'mse'", scale="mse")
    refused("the batches were empty", given=[])
    refused("a metric needs targets", given=[x], metric=right)
    refused(r"has no module '5'", of=net[:5])
    refused("does not say which modules", about=dataclasses.replace(report, parts={}))
    refused(r"sets holds \{'0'\}; each must hold two or more of", sets=[{"0"}])
    refused(r"initial has nothing for '0.weight'", kinds=["reinit"], initial={"a": torch.ones(1)})
    refused("'5' did not run", forward_fn=lambda m, b: m[:5](b[0]))
    refused("no floating-point tensor; return the outputs", forward_fn=lambda m, b: 1)
    refused(
        r"gave a tensor of shape \(100, 12\) for 30 samples of", forward_fn=lambda m, b: m(b[0])[:30]
    )
    bare = nn.Sequential(Bare(), nn.Linear(5, 3))
    how = {"how": "measured", "components": ["0"]}
    refused(r"'0' \(Bare\) has parameters but no reset", [x], bare, None, ["reinit"], **how)
    flat = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
    nn.init.zeros_(flat[1].weight)
    refused("the outputs are constant", [x], flat, None)
    refused(
        "no class indices to tell their class axis", [x], about=None, scale="kl",
        forward_fn=lambda m, b: m(b)[:, :, None],
    )  # fmt: skip


@pytest.mark.parametrize(("name", "how"), [("intervene", "measured"), ("predict_effects", "predicted")])
def test_what_went_says_so_when_imported_and_when_called(name, how):
    message = rf"{name} is now component_effects.*how='{how}'"
    with pytest.warns(FutureWarning, match=message):
        gone = getattr(lightning_koopman, name)
    with pytest.raises(TypeError, match=message):
        gone(None, [], kinds=["skip"])


def test_attention_is_drawn_anew_as_it_is_built():
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(5.0)
    anew = Alterations(net, {"0": ("0",)}, ["reinit"])
    with anew.weights.altered("reinit", ["0"]):
        # The layer that it holds draws a bias, which attention then sets to zero.
        assert not net[0].self_attn.out_proj.bias.any()
        assert not net[0].self_attn.in_proj_bias.any()
        bounds = [math.sqrt(6 / (8 + 24)), 1 / math.sqrt(8)]
        drawn = [net[0].self_attn.in_proj_weight, net[0].self_attn.out_proj.weight]
        for weight, bound in zip(drawn, bounds, strict=True):
            assert 0.9 * bound < float(weight.detach().abs().max()) <= bound
    assert (net[0].self_attn.out_proj.bias == 5).all()


class Routed(nn.Module):
    """Sends each sample to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h, first = torch.relu(self.stem(x)), x[:, 0] > 0
        out = torch.zeros_like(h)
        out[first], out[~first] = self.experts[0](h[first]), self.experts[1](h[~first])
        return self.head(h + out)


def test_components_that_a_report_leaves_out_are_named():
    torch.manual_seed(0)
    net, x = Routed().eval(), torch.randn(200, 6)
    effects = component_effects(net, x.split(50))
    left_out = {"experts.0.0", "experts.1.0"}
    assert {*effects.components} == {"stem", "head"}
    assert [note for note in effects.notes if note.startswith("no effects of")] == [
        "no effects of experts.0.0, experts.1.0: credit_report leaves them out, and says why"
    ]
    told = " ".join(credit_report(net, x.split(50)).notes)
    assert all(name in told for name in left_out)
    # Who names components, or gives a report, knows.
    report = credit_report(net, x.split(50))
    assert component_effects(net, x.split(50), report).notes == ()
    assert component_effects(net, x.split(50), components=["stem", "head"]).notes == ()
