"""Effects are on what the chain ends with, wherever the network or the step returns it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from lit import LitNet, dataset, quiet_trainer, small_module
from small import wired
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_koopman import (
    CreditReport,
    KoopmanCreditMonitor,
    Options,
    component_effects,
    credit_report,
    drop_order,
)
from lightning_koopman.effects.scoring import kl_divergence

pytestmark = pytest.mark.filterwarnings("ignore:the Trainer has no logger")


@pytest.fixture(autouse=True)
def plenty(monkeypatch):
    """Let effects be measured on all samples, also where the machine does other things beside."""
    monkeypatch.setattr("lightning_koopman.callback.budget.ALLOWANCE", 1000.0)


def heads(returns: Any) -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Any:
        h = m.body(x).tanh()
        return returns(m.policy(h), m.value(h))

    torch.manual_seed(0)
    parts = {"body": nn.Linear(8, 6), "policy": nn.Linear(6, 3), "value": nn.Linear(6, 1)}
    return wired(run, **parts).eval()


def skipped(model: nn.Module, x: Tensor, name: str) -> float:
    """Return what the mean in place of a linear layer's output does to both outputs, by hand."""

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            h = model.body(x).tanh()
            return model.policy(h).double(), model.value(h).double()

    before = run()
    layer = model.get_submodule(name)
    with torch.no_grad():
        given = x if name == "body" else model.body(x).tanh()
        mean = layer(given).mean(0)
    hook = layer.register_forward_hook(lambda *_: mean.expand(len(x), -1))
    after = run()
    hook.remove()
    moved = [
        (b - a).square().sum() / (a - a.mean(0)).square().sum()
        for a, b in zip(before, after, strict=True)
    ]
    return float(sum(moved)) / 2


@pytest.mark.parametrize(
    "returns",
    [
        lambda p, v: (p, v),
        lambda p, v: {"value": v, "policy": p},
        lambda p, v: (p, v.squeeze(1)),
        lambda p, v: {"loss": p.mean(), "value": v, "policy": p, "probabilities": p.softmax(1)},
        lambda p, v: (torch.distributions.Categorical(logits=p, validate_args=False), v),
    ],
    ids=["tuple", "dictionary", "one number a sample", "a loss before them", "an object"],
)
def test_all_heads_count(returns):
    model, x = heads(returns), dataset().tensors[0]
    effects = component_effects(model, [x], credit_report(model, [x]))
    assert effects.components == ("body", "policy", "value")
    if "Categorical" in str(returns(torch.zeros(1, 3), torch.zeros(1, 1))):
        # A distribution holds its logits normed, which moves otherwise.
        assert (effects.values["skip"] > 0.01).all()
        return
    expected = [skipped(model, x, name) for name in effects.components]
    assert effects.values["skip"] == pytest.approx(expected, rel=1e-4)


def test_a_head_whose_classes_are_known_stands_alone_and_is_named():
    model, (x, y) = heads(lambda p, v: (v, p)), dataset().tensors
    effects = component_effects(model, [(x, y)], credit_report(model, [(x, y)]), how="both", probes=3)
    assert effects.scale == "kl"
    assert effects.values["skip"][1] > 0.01
    measured = (effects.values, effects.stderr, effects.metric, effects.metric_stderr)
    for found in (*measured, effects.predicted, effects.predicted_stderr):
        assert np.isnan(found["skip"]).tolist() == [False, False, True]
    assert effects.doubts["skip"] == ((), (), ("elsewhere",))
    assert effects.notes[0].startswith("effects are about one of 2 outputs, that of policy; return")


def test_a_head_that_is_not_returned_is_named():
    model, x = heads(lambda p, v: {"loss": p.mean() + v.mean(), "policy": p}), dataset().tensors[0]
    effects = component_effects(model, [x], credit_report(model, [x]))
    assert effects.notes == (
        "the model does not return what 'value' gives, so effects on it are not seen",
    )
    # It leads to the loss: that nothing else moves does not mean that it may go.
    assert math.isnan(effects.values["skip"][2])
    assert "elsewhere (skip)" in str(effects)
    assert effects.metric == effects.metric_stderr == {}


def ensemble(classes: int = 3, members: int = 2) -> nn.Module:
    torch.manual_seed(0)
    parts = {f"m{k}": nn.Linear(8, classes) for k in range(members)}
    return wired(lambda m, x: tuple(getattr(m, name)(x) for name in parts), **parts).eval()


@pytest.mark.parametrize("members", [2, 3])
def test_over_outputs_with_the_same_classes_effects_are_averaged(members):
    """With three members and three classes, shapes do not tell which axis is which."""
    model, (x, y) = ensemble(members=members), dataset().tensors
    effects = component_effects(model, [(x, y)], credit_report(model, [(x, y)]))
    expected, right = [], []
    with torch.no_grad():
        outputs = [part(x) for part in model.children()]
        hits = [float((output.argmax(1) == y).double().mean()) for output in outputs]
        for k, output in enumerate(outputs):
            mean = output.mean(0).expand_as(output)
            p, q = output.double().log_softmax(1), mean.double().log_softmax(1)
            expected.append(float((p.exp() * (p - q)).sum(1).mean()) / members)
            after = float((mean.argmax(1) == y).double().mean())
            right.append((sum(hits) - hits[k] + after) / members)
    assert effects.scale == "kl"
    assert effects.values["skip"] == pytest.approx(expected, rel=1e-4)
    assert effects.metric_before == pytest.approx(sum(hits) / members)
    assert effects.metric["skip"] == pytest.approx(right)
    assert effects.notes[0].startswith(f"effects are averaged over {members} outputs, those of m0, m1")


def test_predictions_are_averaged_over_outputs_too():
    model, (x, y) = ensemble(), dataset().tensors
    report = credit_report(model, [(x, y)])
    kinds = ["output_noise"]
    both = component_effects(model, [(x, y)], report, kinds, how="both", strength=0.05, probes=6)
    assert both.predicted["output_noise"] == pytest.approx(both.values["output_noise"], rel=0.3)


def test_of_outputs_of_several_sizes_that_which_has_the_classes_counts():
    model = ensemble()
    model.m1 = nn.Linear(8, 12)
    x, y = dataset().tensors
    effects = component_effects(model, [(x, y)], credit_report(model, [(x, y)]))
    assert effects.notes == (
        "effects are about one of 2 outputs, that of m0; return another from forward_fn to see those "
        "on it",
    )
    assert effects.doubts["skip"] == ((), ("elsewhere",))


def test_a_metric_is_about_one_output():
    model, (x, y) = ensemble(), dataset().tensors
    report, metric = credit_report(model, [(x, y)]), lambda o, t: float(o.shape == (len(t), 3))
    effects = component_effects(model, [(x, y)], report, metric=metric)
    assert effects.metric_before == pytest.approx(1.0)
    assert effects.doubts["skip"] == ((), ("elsewhere",))


class Towers(small_module()):
    """Two encoders that are called one after the other, as in contrastive learning, beside labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 6)
        self.other = nn.Linear(8, 6)

    def step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(batch[0]) @ self.other(batch[0]).T).square().mean()

    training_step = validation_step = step


def test_both_towers_of_a_step_have_effects(tmp_path):
    monitor = KoopmanCreditMonitor(every_n_epochs=1)
    trainer = quiet_trainer(tmp_path, monitor, max_epochs=1)
    trainer.fit(Towers(), *[DataLoader(dataset(), 40)] * 2)
    effects = monitor.report.effects
    assert effects.components == ("net", "other")
    assert effects.scale == "relative"
    assert (effects.values["skip"] > 0.1).all()


def test_a_loss_beside_the_logits_changes_nothing():
    """As models of transformers return both where a batch has labels."""

    def run(m: nn.Module, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = m.b(m.a(x).relu())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return logits if labels is None else {"loss": loss, "logits": logits}

    model = wired(run, a=nn.Linear(8, 8), b=nn.Linear(8, 3))
    x, y = dataset().tensors
    effects = component_effects(
        model, [{"x": x[i : i + 40], "labels": y[i : i + 40]} for i in range(0, 160, 40)]
    )
    plain = component_effects(model, [(x, y)])
    assert (effects.scale, effects.n_samples) == ("kl", 160)
    assert effects.values["skip"] == pytest.approx(plain.values["skip"], rel=1e-4)
    assert effects.metric_before == plain.metric_before


def language_model() -> nn.Module:
    torch.manual_seed(0)

    def run(m: nn.Module, input_ids: Tensor, labels: Tensor) -> Any:
        return {"logits": m.head(m.body(m.tokens(input_ids)).tanh())}

    parts = {"tokens": nn.Embedding(20, 12), "body": nn.Linear(12, 12), "head": nn.Linear(12, 20)}
    return wired(run, **parts).eval()


@pytest.mark.parametrize("kind", ["causal", "masked", "classes of tokens"])
@pytest.mark.parametrize("padded", [False, True])
def test_of_tokens_those_count_that_are_targets_where_they_are_predicted(kind, padded):
    """The accuracy, by hand; a causal model's labels are its input, which it predicts one before."""
    model, ids = language_model(), torch.randint(20, (60, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        best = model(ids, ids)["logits"].argmax(-1)
    if kind == "causal":
        # A text that the model continues well now and then.
        ids[:, 1:] = torch.where(torch.arange(6) % 2 == 0, best[:, :-1], ids[:, 1:])
        with torch.no_grad():
            best = model(ids, ids)["logits"].argmax(-1)
    labels = ids.clone() if kind != "classes of tokens" else (best + (ids > 9)) % 20
    if kind == "masked":
        labels[ids > 5] = -100
        ids = torch.where(labels == -100, ids, 0)
        with torch.no_grad():
            best = model(ids, ids)["logits"].argmax(-1)
    if padded:
        labels[:, 5:] = -100
    given, wanted = (best[:, :-1], labels[:, 1:]) if kind == "causal" else (best, labels)
    counts = wanted != -100
    expected = float((given == wanted)[counts].double().mean())
    batches = [{"input_ids": ids[i : i + 20], "labels": labels[i : i + 20]} for i in (0, 20, 40)]
    effects = component_effects(model, batches)
    assert effects.scale == "kl"
    assert effects.metric_before == pytest.approx(expected)
    with torch.no_grad():
        p = model(ids, ids)["logits"].double().log_softmax(-1)
        q = model.head(model.tokens(ids).tanh()).double().log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    # Positions of the outputs, not of the targets, which a causal model's are one behind.
    divergence = divergence[:, :-1] if kind == "causal" else divergence
    place = effects.components.index("body")
    assert effects.values["skip"][place] == pytest.approx(float(divergence[counts].mean()), rel=1e-4)
    seen: list[Tensor] = []

    def metric(outputs: Tensor, targets: Tensor) -> float:
        seen.append(targets)
        return 0.5

    component_effects(model, batches, metric=metric)
    # A metric of the user's moves the targets itself, as the loss does.
    assert torch.equal(seen[0], labels)


def test_positions_without_a_target_do_not_count_to_predictions():
    """They are as if they had been cut off: this network has no eyes for others."""
    model, ids = language_model(), torch.randint(20, (60, 7), generator=torch.Generator().manual_seed(0))
    labels = (ids + 1) % 20
    labels[:, 5:] = -100
    kinds = {"kinds": ["skip", "linear"], "how": "both", "probes": 140}
    padded = component_effects(model, [{"input_ids": ids, "labels": labels}], **kinds)
    short = {"input_ids": ids[:, :5], "labels": labels[:, :5]}
    cut = component_effects(model, [short], **kinds)
    assert padded.predicted["skip"] == pytest.approx(cut.predicted["skip"], rel=1e-4)
    assert padded.values["skip"] == pytest.approx(cut.values["skip"], rel=1e-4)


@pytest.mark.parametrize("decide", [False, True])
def test_labels_beside_a_reconstruction_are_no_classes_of_it(decide):
    """There is room for all of them, but no output that tells them."""
    torch.manual_seed(0)
    x, y = torch.randn(400, 64), torch.arange(400) % 10
    net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 64))
    found = drop_order(net, [(x, y)], steps=1) if decide else component_effects(net, [(x, y)])
    assert found.scale == "relative"
    assert math.isnan(found.metric_before)
    assert found.notes == (
        "the integer targets of the batches are no classes of the outputs, so changes are relative",
    )
    # Whoever says what they are is believed.
    options = {"scale": "kl"}
    told = (
        drop_order(net, [(x, y)], **options) if decide else component_effects(net, [(x, y)], **options)
    )
    right = float((net(x).argmax(1) == y).double().mean())
    assert (told.scale, told.metric_before) == ("kl", pytest.approx(right))


def test_tokens_beside_features_are_no_classes_of_them():
    """As many as there are positions; but what is returned is what another part makes classes of."""
    model, ids = language_model(), torch.randint(20, (60, 7), generator=torch.Generator().manual_seed(0))
    wide = wired(lambda m, x: m.body(m.tokens(x)), tokens=nn.Embedding(20, 90), body=nn.Linear(90, 90))
    features = component_effects(wide, [(ids, ids)], components=["body"])
    assert features.scale == "relative"
    assert features.notes[-1].startswith("the integer targets of the batches are no classes")
    # Where some are marked as no classes, the others are some; and few tokens tell nothing.
    marked = torch.where(ids > 15, -100, ids)
    assert component_effects(wide, [(ids, marked)], components=["body"]).scale == "kl"
    assert component_effects(wide, [(ids[:5], ids[:5])], components=["body"]).scale == "kl"
    assert component_effects(model, [{"input_ids": ids, "labels": ids}]).scale == "kl"


@pytest.mark.parametrize("present", [1, 2, 12])
def test_classes_of_which_few_are_in_the_data_are_classes(present):
    x, y = torch.randn(400, 12), torch.arange(400) % present
    x[torch.arange(400), y] += 10
    net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    for layer in net:
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    effects = component_effects(net, [(x, y)])
    assert effects.scale == "kl"
    assert effects.metric_before > 0.95


def test_outputs_whose_largest_is_always_the_same_one_are_no_class_scores_of_that_label():
    # Values on a grid, beside labels of which the first is as frequent as the others.
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 20))
    with torch.no_grad():
        net[2].bias[0] += 100
    x, y = torch.randn(400, 6), torch.arange(400) % 3
    effects = component_effects(net, [(x, y)])
    assert effects.scale == "relative"
    assert effects.notes[0].startswith(
        "the integer targets of the batches are no classes of the outputs"
    )


def features_beside_scores() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that gives features before its scores, samples, and the classes that it tells them."""
    torch.manual_seed(0)
    parts = {"features": nn.Linear(8, 20), "scores": nn.Linear(8, 12)}
    model = wired(lambda m, x: (m.features(x), m.scores(x)), **parts)
    x = torch.randn(400, 8)
    with torch.no_grad():
        y = model.scores(x).argmax(1)
    return model, x, y


def test_where_features_stand_beside_scores_these_count():
    model, x, y = features_beside_scores()
    effects = component_effects(model, [(x, y)], credit_report(model, [x]))
    assert effects.scale == "kl"
    assert effects.notes[0].startswith("effects are about one of 2 outputs, that of scores")


@pytest.mark.parametrize(("width", "classes"), [(1, 2), (3, 4)])
def test_integers_that_cannot_be_classes_of_the_outputs_are_none(width, classes):
    """One logit for two classes, and a reconstruction beside labels."""
    x = dataset().tensors[0]
    y = torch.arange(len(x)) % classes
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, width))
    effects = component_effects(net, [(x, y)])
    assert effects.scale == "relative"
    assert (effects.values["skip"] > 0.1).all()
    if width == 1:
        with pytest.raises(
            ValueError, match=r"outputs of shape \(160, 1\) arrived, whose classes are one"
        ):
            component_effects(net, [(x, y)], scale="kl")


def test_what_takes_the_place_of_an_output_can_be_viewed_and_written_to():
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        y.mul_(2)
        return m.b(y.view(-1, 3).relu()).view(len(x), -1)

    torch.manual_seed(0)
    model, x = wired(run, a=nn.Linear(8, 6), b=nn.Linear(3, 2)), dataset().tensors[0]
    with torch.no_grad():
        before, mean = model(x), model.a(x).mean(0)
        after = model.b((2 * mean).view(-1, 3).relu()).view(1, -1)
    effects = component_effects(model, [x], credit_report(model, [x]))
    expected = (after - before).square().sum() / (before - before.mean(0)).square().sum()
    assert effects.values["skip"][0] == pytest.approx(float(expected), rel=1e-4)


def test_several_tensors_of_which_none_is_known_to_be_the_end_are_told():
    model, x = heads(lambda p, v: (v, p)), dataset().tensors[0]
    effects = component_effects(model, [x], components=["body"])
    assert effects.notes[0].startswith(
        "effects are about the first of 2 tensors that the model returns, of"
    )


@pytest.mark.parametrize("channels_first", [False, True])
def test_outputs_may_vary_in_length(channels_first):
    """The mean in place of an output, and that of the outputs, is one of channels then."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = m.b(m.a(x).relu())
        return y.transpose(1, 2) if channels_first else y

    torch.manual_seed(0)
    model = wired(run, a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    batches = [torch.randn(20, length, 4) for length in (5, 7, 6)]
    effects = component_effects(model, batches, credit_report(model, batches, reduce="mean"))
    rows = torch.cat([x.flatten(0, 1) for x in batches])
    with torch.no_grad():
        before = model.b(model.a(rows).relu())
        after = model.b(model.a(rows).mean(0).relu())
    whole = (before - before.mean(0)).square().sum()
    expected = [float((after - before).square().sum() / whole), 1.0]
    assert effects.values["skip"] == pytest.approx(expected, rel=1e-4)


def test_pictures_may_vary_in_size():
    """The mean in place of a feature map is one of channels."""
    torch.manual_seed(0)
    parts = {
        "a": nn.Conv2d(1, 6, 3, padding=1),
        "b": nn.Conv2d(6, 4, 3, padding=1),
        "c": nn.Linear(4, 3),
    }
    model = wired(lambda m, x: m.c(m.b(m.a(x).relu()).relu().mean((2, 3))), **parts)
    batches = [(torch.randn(20, 1, h, w), torch.arange(20) % 3) for h, w in ((8, 8), (9, 8), (8, 6))]
    effects = component_effects(model, batches)
    with torch.no_grad():
        maps = [model.b(model.a(x).relu()) for x, _ in batches]
        mean = torch.cat([part.movedim(1, -1).flatten(0, 2) for part in maps]).mean(0)
        before = torch.cat([model(x) for x, _ in batches])
        after = model.c(mean.relu())
    moved = kl_divergence(before, after.expand(60, -1))
    place = effects.components.index("b")
    assert effects.values["skip"][place] == pytest.approx(float(moved.mean()), rel=1e-4)
    assert effects.stderr["skip"][place] > 0
    noise = component_effects(model, batches, kinds=["output_noise"], how="both")
    assert (noise.values["output_noise"] > 0).all()


@pytest.mark.parametrize("decide", [False, True])
def test_of_outputs_that_fill_the_memory_the_first_are_looked_at(decide, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = dataset().tensors[0].split(40)
    monkeypatch.setattr("lightning_koopman.network.runs.forward_runner.OUTPUT_BYTES", 50 * 3 * 4)
    found = drop_order(model, batches, steps=1) if decide else component_effects(model, batches)
    expected = component_effects(model, batches[:2])
    assert found.n_samples == 80
    assert found.notes == ("the outputs of 80 samples take 0 GiB and more, so only these are looked at",)
    effect = found.effect[0] if decide else found.values["skip"][0]
    place = expected.components.index(found.components[0])
    assert effect == pytest.approx(expected.values["skip"][place], rel=1e-4)


def test_linear_maps_that_would_fill_the_memory_are_refused(monkeypatch):
    model, x = heads(lambda p, v: p), dataset().tensors[0]
    # Each map takes its sums and itself, in double precision.
    monkeypatch.setattr("lightning_koopman.effects.alterations.MAP_BYTES", 16 * (8 * 6 + 6 * 3))
    component_effects(model, [x], kinds=["linear"])
    monkeypatch.setattr("lightning_koopman.effects.alterations.MAP_BYTES", 16 * (8 * 6 + 6 * 3) - 1)
    found = component_effects(model, [x], kinds=["linear"])
    assert found.components == ("body", "policy")
    assert np.isnan(found.values["linear"]).tolist() == [False, True]
    assert "'policy', which gives 3 values per sample, linear maps would" in found.notes[-1]


def flattened(model: nn.Module, flat: bool, classes: int) -> nn.Module:
    """The same network, which gives a row per position, as is common for the sake of the loss."""
    return wired(lambda m, x: m.net(x).reshape(-1, classes) if flat else m.net(x), net=model)


@pytest.mark.parametrize("targets", ["of samples", "of rows", "none"])
@pytest.mark.parametrize("decide", [False, True])
def test_outputs_may_hold_a_row_per_position(targets, decide):
    torch.manual_seed(0)
    parts = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)]
    model, found = nn.Sequential(*parts), []
    x = torch.randn(90, 5, 6)
    y = model(x).argmax(-1)
    for flat in (True, False):
        split = y.flatten().split(200) if flat and targets == "of rows" else y.split(40)
        batches = list(zip(x.split(40), split, strict=True)) if targets != "none" else x.split(40)
        net = flattened(model, flat, 4)
        found.append((drop_order if decide else component_effects)(net, batches))
    for name in ("effect", "effect_stderr") if decide else ("values", "stderr"):
        rows, samples = (getattr(each, name) for each in found)
        rows, samples = (rows, samples) if decide else (rows["skip"], samples["skip"])
        assert rows == pytest.approx(samples, rel=1e-5)
    assert found[0].n_samples == found[1].n_samples == 90
    assert found[0].scale == found[1].scale == ("relative" if targets == "none" else "kl")
    assert found[0].metric_before == pytest.approx(found[1].metric_before, nan_ok=True)


def test_outputs_may_hold_a_row_per_pixel():
    torch.manual_seed(0)
    maps = nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 3, 3, padding=1))
    x = torch.randn(60, 1, 7, 6)
    batches = list(zip(x.split(25), maps(x).argmax(1).split(25), strict=True))
    pixels = wired(lambda m, x: m.maps(x).permute(0, 2, 3, 1).reshape(-1, 3), maps=maps)
    rows, samples = component_effects(pixels, batches), component_effects(maps, batches)
    assert (rows.scale, rows.n_samples, rows.metric_before) == ("kl", 60, 1.0)
    assert rows.values["skip"] == pytest.approx(samples.values["skip"], rel=1e-5)
    assert rows.metric["skip"] == pytest.approx(samples.metric["skip"])


def test_a_metric_is_given_what_the_model_returned():
    """Frames that the network takes one by one: rows are samples then, as they are of a metric."""
    torch.manual_seed(0)
    frames = wired(lambda m, x: m.b(m.a(x.flatten(0, 1)).relu()), a=nn.Linear(6, 8), b=nn.Linear(8, 3))
    x, shapes = torch.randn(30, 4, 6), []

    def metric(outputs: Tensor, targets: Tensor) -> float:
        shapes.append(outputs.shape)
        return 0.5

    effects = component_effects(frames, [(x, torch.zeros(30, 4).long())], metric=metric)
    assert set(shapes) == {(120, 3)}
    assert effects.n_samples == 120
    rows = component_effects(frames, [x])
    turned = wired(lambda m, x: m.net(x).unflatten(0, (-1, 4)), net=frames)
    samples = component_effects(turned, [x])
    assert rows.n_samples == samples.n_samples == 30
    assert rows.values["skip"] == pytest.approx(samples.values["skip"], rel=1e-5)
    assert rows.stderr["skip"] == pytest.approx(samples.stderr["skip"], rel=1e-4)


def test_outputs_of_which_no_axis_is_fixed_are_refused():
    model = wired(lambda m, x: m.a(x) @ m.a(x).transpose(1, 2), a=nn.Linear(4, 6))
    batches = [torch.randn(20, length, 4) for length in (5, 7)]
    with pytest.raises(
        ValueError, match=r"outputs of the shapes \(5, 5\) and \(7, 7\) per sample arrived"
    ):
        component_effects(model, batches, components=["a"])


def test_a_network_that_gives_its_loss_alone_is_refused():
    model = wired(lambda m, x: m.a(x).square().mean(), a=nn.Linear(8, 3))
    with pytest.raises(ValueError, match="gave Tensor with single numbers alone, as losses are; return"):
        component_effects(model, [torch.randn(20, 8)], components=["a"])


class Targeted(small_module()):
    """Learns to predict a copy of itself that nothing trains, though its weights could be."""

    def __init__(self, calls: str, frozen: bool) -> None:
        super().__init__()
        self.target, self.calls = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), calls
        self.target.requires_grad_(not frozen)

    def step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        with torch.no_grad():
            wanted = self.target(x + 0.1)
        given = self.net(x) if self.calls == "one" else self.net[2](self.net[1](self.net[0](x)))
        if self.calls == "last":
            with torch.no_grad():
                wanted = self.target(x)
        return (given - wanted).square().mean()

    training_step = validation_step = step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), lr=1e-2)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("calls", ["one", "several", "last"])
def test_a_target_network_counts_nowhere(calls, frozen, tmp_path):
    torch.manual_seed(0)
    model, monitor = Targeted(calls, frozen), KoopmanCreditMonitor(on_error="raise", figures=False)
    train, x = (TensorDataset(dataset(seed=seed).tensors[0]) for seed in (0, 1))
    quiet_trainer(tmp_path, [monitor], max_epochs=2).fit(model, DataLoader(train, 40), DataLoader(x, 40))
    assert monitor.report.components == ("net.0", "net.2")
    plain = credit_report(model.net, x.tensors[0].split(40))
    assert monitor.report.credit == pytest.approx(plain.credit, abs=1e-5)
    expected = component_effects(model.net, x.tensors[0].split(40), plain, scale="relative")
    found = monitor.report.effects
    assert found.scale == "relative"
    assert found.values["skip"] == pytest.approx(expected.values["skip"], rel=1e-4)
    assert np.all(found.values["skip"] > 0.01)


class Drawing(small_module()):
    """An autoencoder whose validation also decodes noise, as for a picture."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.net = None
        self.encoder, self.decoder, self.when = nn.Linear(8, 4), nn.Linear(4, 8), when

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.when == "first" or (self.when == "once" and not batch_idx):
            self.decoder(torch.randn(6, 4))
        self(batch[0])
        if self.when == "last":
            self.decoder(torch.randn(6, 4))


@pytest.mark.parametrize("when", ["first", "last", "once"])
def test_noise_that_is_decoded_for_a_picture_counts_nowhere(when, tmp_path):
    torch.manual_seed(0)
    model, monitor = Drawing(when), KoopmanCreditMonitor(on_error="raise", figures=False)
    train, x = (TensorDataset(dataset(seed=seed).tensors[0]) for seed in (0, 1))
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=2)
    trainer.fit(model, DataLoader(train, 40), DataLoader(x, 40))
    batches = x.tensors[0].split(40)
    plain = credit_report(model, batches)
    assert monitor.report.components == ("encoder", "decoder")
    assert monitor.report.n_samples == 160
    assert monitor.report.credit == pytest.approx(plain.credit, abs=1e-5)
    found = monitor.report.effects
    expected = component_effects(model, batches, plain)
    assert found.n_samples == expected.n_samples
    assert found.values["skip"] == pytest.approx(expected.values["skip"], rel=1e-4)


def inner_first(decoder: str = "dec") -> nn.Module:
    """Returns a latent, what is decoded of it, and a mixture of it with what another head gives."""

    def run(m: nn.Module, x: Tensor) -> Any:
        z = m.enc(x).tanh()
        return z, getattr(m, decoder)(z), z[:, :2] * m.cls(z)

    torch.manual_seed(0)
    return wired(
        run, **{"enc": nn.Linear(8, 5), decoder: nn.Linear(5, 8), "cls": nn.Linear(5, 2)}
    ).eval()


def shares(own: tuple[Tensor, ...], altered: tuple[Tensor, ...]) -> float:
    """Return by how much of their variance outputs move, averaged over them."""
    moved = [
        (b.double() - a.double()).square().sum() / (a.double() - a.double().mean(0)).square().sum()
        for a, b in zip(own, altered, strict=True)
    ]
    return float(sum(moved)) / len(moved)


def with_means(model: nn.Module, x: Tensor, decoder: str = "dec") -> dict[str, float]:
    """Return what the mean in place of each layer does to the last two tensors, by hand."""
    dec = getattr(model, decoder)
    with torch.no_grad():
        a = model.enc(x)
        z, of_mean = a.tanh(), a.mean(0).tanh()
        y, p = dec(z), model.cls(z)
        altered = {
            "enc": (dec(of_mean), of_mean[:2] * model.cls(of_mean)),
            decoder: (y.mean(0), z[:, :2] * p),
            "cls": (y, z[:, :2] * p.mean(0)),
        }
        return {name: shares((y, z[:, :2] * p), pair) for name, pair in altered.items()}


def by_name(effects: Any) -> dict[str, float]:
    return dict(zip(effects.components, effects.values["skip"], strict=True))


@pytest.mark.parametrize("kind", ["a report", "one from JSON", "no report", "named components"])
@pytest.mark.parametrize("decoder", ["dec", "output"])
def test_a_mixture_counts_beside_the_head_that_the_chain_ends_with(kind, decoder):
    """Where a component is called output, mixtures are called returned."""
    model, x = inner_first(decoder), dataset().tensors[0]
    named = ["cls", "enc", decoder] if kind == "named components" else None
    report = None if kind == "no report" else credit_report(model, [x], components=named)
    mixed = "returned#2" if decoder == "output" else "output#2"
    if report is not None:
        assert report.components[-1] == f"{decoder}+{mixed}"
    if kind == "one from JSON":
        report = CreditReport.from_dict(report.to_dict())
    effects = component_effects(model, [x], report)
    assert by_name(effects) == pytest.approx(with_means(model, x, decoder), rel=1e-4)
    assert effects.notes == (
        f"effects are averaged over 2 outputs, those of {decoder}, {mixed}, each in units of its own "
        "standard deviation",
    )
    assert effects.doubts["skip"] == ((), (), ())


def test_a_mixture_is_found_in_what_a_function_makes_of_the_outputs():
    model, x = inner_first(), dataset().tensors[0]

    def turned(m: nn.Module, batch: Tensor) -> Any:
        latent, decoded, mixed = m(batch)
        return [latent, mixed.mul(3).unsqueeze(2), {"decoded": -decoded}]

    effects = component_effects(
        model, [x], credit_report(model, [x], forward_fn=turned), forward_fn=turned
    )
    assert by_name(effects) == pytest.approx(with_means(model, x), rel=1e-4)

    def without(m: nn.Module, batch: Tensor) -> Any:
        return m(batch)[:2]

    effects = component_effects(model, [x], credit_report(model, [x]), forward_fn=without)
    assert effects.notes[0] == (
        "the model does not return what 'output#2' gives, so effects on it are not seen"
    )
    with torch.no_grad():
        z = model.enc(x).tanh()
        expected = shares((model.dec(z),), (model.dec(model.enc(x).mean(0).tanh()),))
    assert effects.values["skip"][0] == pytest.approx(expected, rel=1e-4)


def test_the_chain_may_end_with_mixtures_alone_and_each_counts():
    """The parts of a sum, and what they leave of the input, behind a latent."""

    def run(m: nn.Module, x: Tensor) -> Any:
        h = m.a(x)
        both = m.b(h.relu()) + m.c(x)
        return h, both, x - 2 * both

    torch.manual_seed(0)
    model = wired(run, a=nn.Linear(8, 6), b=nn.Linear(6, 8), c=nn.Linear(8, 8)).eval()
    x = dataset().tensors[0]
    report = credit_report(model, [x])
    assert report.components[-1] == "output#1+output#2"
    with torch.no_grad():
        h, c = model.a(x), model.c(x)
        b = model.b(h.relu())
        sums = {"a": model.b(h.mean(0).relu()) + c, "b": b.mean(0) + c, "c": b + x}
        expected = {
            name: shares((b + c, x - 2 * (b + c)), (both, x - 2 * both)) for name, both in sums.items()
        }
    effects = component_effects(model, [x], report)
    assert by_name(effects) == pytest.approx(expected, rel=1e-4)


def test_what_a_function_of_the_report_takes_is_not_taken_for_a_mixture():
    """It has the name that the first tensor returned has, if that is a mixture."""

    def run(m: nn.Module, x: Tensor) -> Any:
        return m.a(x) + m.b(x), m.c(m.a(x).relu())

    torch.manual_seed(0)
    model = wired(run, a=nn.Linear(8, 6), b=nn.Linear(8, 6), c=nn.Linear(6, 3)).eval()
    x = dataset().tensors[0]
    report = credit_report(model, [x], options=Options(output=lambda returned: returned[1]))
    assert report.components[-1] == "output"
    effects = component_effects(model, [x], CreditReport.from_dict(report.to_dict()))
    assert effects.notes[0].startswith("effects are about the first of 2 tensors that the model")
    effects = component_effects(model, [x], report)
    alone = component_effects(model, [x], report, forward_fn=lambda m, batch: m(batch)[1])
    assert (by_name(effects), effects.notes) == (pytest.approx(by_name(alone)), ())


@pytest.mark.parametrize(
    ("output", "heads"),
    [
        (lambda returned: returned["b"], "b"),
        (lambda returned: returned["b"][:, :1], "b"),
        (lambda returned: torch.cat([returned["a"], returned["b"]], 1), "ab"),
        (lambda returned: returned, "a"),
    ],
)
@pytest.mark.parametrize("ask", [component_effects, drop_order])
def test_effects_are_about_the_heads_that_a_function_of_the_report_takes(output, heads, ask):
    def run(m: nn.Module, x: Tensor) -> Any:
        h = m.stem(x).tanh()
        return {"a": m.a(h), "b": m.b(h).tanh()}

    torch.manual_seed(0)
    model = wired(run, stem=nn.Linear(8, 8), a=nn.Linear(8, 3), b=nn.Linear(8, 3)).eval()
    x = dataset().tensors[0]
    report = credit_report(model, [x], output=output)

    def of(**more: Any) -> float:
        found = ask(model, [x], report, components=["stem"], **more)
        return float((found.values["skip"] if ask is component_effects else found.effect)[0])

    with torch.no_grad():
        whole = model(x)
        altered = {"a": model.a(x.tanh()), "b": model.b(x.tanh()).tanh()}
    moved = [
        float((altered[k] - whole[k]).square().sum() / whole[k].var(dim=0, correction=0).sum() / len(x))
        for k in heads
    ]
    given: dict[str, Any] = {"steps": 1} if ask is drop_order else {}
    assert of(**given) == pytest.approx(sum(moved) / len(moved), rel=1e-4)
    if heads == "b":
        # The function is none of what this gives, a tensor.
        given["forward_fn"] = lambda m, batch: m(batch)["b"]
        assert of(**given) == pytest.approx(moved[0], rel=1e-4)


def labelled_as(columns: int, x: Tensor, y: Tensor) -> list[Any]:
    """Give labels with as many axes of size 1 behind their own."""
    y = y.reshape(*y.shape, *[1] * columns)
    return [{"x": a, "target": b} for a, b in zip(x.split(40), y.split(40), strict=True)]


def on_x(model: nn.Module, batch: Any) -> Any:
    return model(batch["x"])


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("decide", [False, True])
def test_labels_as_a_column_are_labels(columns, decide):
    """The accuracy and the divergence, by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = dataset().tensors
    batches = labelled_as(columns, x, y)
    with torch.no_grad():
        before = model(x)
        h = model[:2](x)
        after = model[4](h)
    right = float((before.argmax(1) == y).double().mean())
    if decide:
        order = drop_order(model, batches, forward_fn=on_x, max_drop=1.0)
        assert (order.scale, order.metric_before) == ("kl", pytest.approx(right))
        return
    effects = component_effects(model, batches, forward_fn=on_x, how="both", probes=3)
    flat = component_effects(model, labelled_as(0, x, y), forward_fn=on_x, how="both", probes=3)
    assert effects.scale == "kl"
    assert effects.metric_before == pytest.approx(right)
    moved = kl_divergence(before, after)
    assert effects.values["skip"][1] == pytest.approx(float(moved.mean()), rel=1e-4)
    assert effects.metric["skip"][1] == pytest.approx(float((after.argmax(1) == y).double().mean()))
    for name in ("values", "stderr", "metric", "metric_stderr", "predicted"):
        assert np.array_equal(getattr(effects, name)["skip"], getattr(flat, name)["skip"])
    assert effects.notes == flat.notes == ()


@pytest.mark.parametrize("layout", ["positions", "maps", "rows"])
def test_targets_of_positions_may_have_an_axis_more(layout):
    torch.manual_seed(0)
    x = torch.randn(120, 5, 6)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    with torch.no_grad():
        y = model(x).argmax(-1)
    y[::3] = -100
    net = wired(
        {
            "positions": lambda m, x: m.net(x),
            "maps": lambda m, x: m.net(x).transpose(1, 2),
            "rows": lambda m, x: m.net(x).reshape(-1, 4),
        }[layout],
        net=model,
    )
    found = [component_effects(net, labelled_as(k, x, y), forward_fn=on_x) for k in (0, 1)]
    for effects in found:
        assert (effects.scale, effects.metric_before, effects.n_samples) == ("kl", 1.0, 120)
    assert np.array_equal(found[0].values["skip"], found[1].values["skip"])


def test_labels_of_a_causal_model_may_be_a_column():
    model, ids = language_model(), torch.randint(20, (60, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = float((model(ids, ids)["logits"].argmax(-1)[:, :-1] == ids[:, 1:]).double().mean())
    effects = component_effects(model, [{"input_ids": ids, "labels": ids[..., None]}])
    assert effects.metric_before == pytest.approx(right)


@pytest.mark.parametrize("gives_back", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_of_labels_that_are_the_tokens_the_loss_tells_where_they_stand(gives_back, padded, tmp_path):
    """A network that gives its tokens back, and one that predicts the next, by its own accuracy."""

    def run(m: nn.Module, input_ids: Tensor, labels: Tensor) -> Any:
        hidden = m.tokens(input_ids)
        logits = m.head(m.body(hidden).tanh())
        given, wanted = (logits, labels) if gives_back else (logits[:, :-1], labels[:, 1:])
        loss = nn.functional.cross_entropy(given.flatten(0, 1), wanted.flatten())
        # With what is as long as the logits, and narrower than there are tokens.
        return {"loss": loss, "hidden": hidden, "logits": logits}

    torch.manual_seed(0)
    model = LitNet()
    model.net = wired(run, tokens=nn.Embedding(20, 12), body=nn.Linear(12, 12), head=nn.Linear(12, 20))
    model.training_step = lambda batch, batch_idx: model.net(**batch)["loss"]
    model.validation_step = lambda batch, batch_idx: model.net(**batch)["loss"]
    ids = (torch.randint(20, (240, 1)) + torch.arange(7)) % 20
    labels = ids.clone()
    if padded:
        labels[::2, 4:] = -100
    pairs = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]
    loader = DataLoader(pairs, batch_size=30)  # type: ignore[arg-type]
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
    quiet_trainer(tmp_path, [monitor], max_epochs=3).fit(model, loader, loader)
    with torch.no_grad():
        best = model.net(ids, labels)["logits"].argmax(-1)
    given, wanted = (best, labels) if gives_back else (best[:, :-1], labels[:, 1:])
    right = float((given == wanted)[wanted != -100].double().mean())
    order = drop_order(model.net, loader)
    assert order.metric_before == pytest.approx(right)
    for effects in (component_effects(model.net, loader), monitor.report.effects):
        assert effects.metric_before == pytest.approx(right)
        assert not effects.notes


@pytest.mark.parametrize("members", [2, 3])
def test_labels_as_a_column_are_those_of_each_output_with_these_classes(members):
    model, (x, y) = ensemble(members=members), dataset().tensors
    with torch.no_grad():
        hits = [float((part(x).argmax(1) == y).double().mean()) for part in model.children()]
    found = [component_effects(model, labelled_as(k, x, y), forward_fn=on_x) for k in (0, 1)]
    assert [each.scale for each in found] == ["kl", "kl"]
    assert found[1].metric_before == pytest.approx(sum(hits) / members)
    assert np.array_equal(found[0].values["skip"], found[1].values["skip"])


def test_scores_beside_features_are_told_by_a_column_too():
    model, x, y = features_beside_scores()
    effects = component_effects(model, [(x, y[:, None])], credit_report(model, [x]))
    assert (effects.scale, effects.metric_before) == ("kl", 1.0)
    assert effects.notes[0].startswith("effects are about one of 2 outputs, that of scores")


@pytest.mark.parametrize("targets", ["numbers", "counts"])
def test_columns_of_a_regression_are_no_classes(targets):
    """Numbers beside a single output, or beside several; and whole ones beside a single output."""
    x = dataset().tensors[0]
    for width in (1,) if targets == "counts" else (1, 3):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, width))
        y = x[:, :1].exp() if targets == "numbers" else x[:, :1].exp().long()
        seen: list[Any] = []

        def metric(outputs: Tensor, given: Tensor, seen: list[Any] = seen) -> float:
            seen.append((outputs.shape, given))
            return 0.0

        effects = component_effects(net, [(x, y)])
        assert effects.scale == "relative"
        assert math.isnan(effects.metric_before)
        assert effects.notes == ()
        with torch.no_grad():
            expected = shares((net(x),), (net[2](net[:2](x).mean(0)),))
        assert effects.values["skip"][0] == pytest.approx(expected, rel=1e-4)
        component_effects(net, [(x, y)], metric=metric)
        assert seen[0][0] == (160, width)
        assert torch.equal(seen[0][1], y)


def test_a_metric_is_given_labels_as_they_are_in_the_batches():
    model, (x, y) = nn.Linear(8, 3), dataset().tensors
    seen: list[Tensor] = []

    def metric(outputs: Tensor, targets: Tensor) -> float:
        seen.append(targets)
        return 0.0

    effects = component_effects(model, [(x, y[:, None])], metric=metric)
    assert effects.scale == "kl"
    assert torch.equal(seen[0], y[:, None])


def test_where_targets_are_taken_one_later_a_note_says_so():
    model = language_model()
    ids = torch.randint(20, (60, 7), generator=torch.Generator().manual_seed(0))
    own = component_effects(model, [{"input_ids": ids, "labels": ids}])
    assert own.notes[-1].startswith("labels are the input_ids, so each position's target is the next")
    # As the note has it: of a network that gives the tokens themselves.
    copied = component_effects(
        model, [{"tokens": ids, "labels": ids}], forward_fn=lambda m, b: m(b["tokens"], b["labels"])
    )
    assert copied.notes == ()
    with torch.no_grad():
        best = model(ids, ids)["logits"].argmax(-1)
    assert copied.metric_before == pytest.approx(float((best == ids).double().mean()))
    assert own.metric_before == pytest.approx(float((best[:, :-1] == ids[:, 1:]).double().mean()))
