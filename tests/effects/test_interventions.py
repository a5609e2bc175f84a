"""Interventions: closed forms on linear chains, models left as found, every error by its message."""

import copy
import dataclasses
import io

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import sem
from torch import Tensor, nn

from lightning_koopman import CreditReport, Options, credit_report, intervene, linearize, predict_effects
from lightning_koopman.effects.alterations import Alterations
from lightning_koopman.effects.scoring import accuracy, kl_divergence
from lightning_koopman.report.effects import KINDS


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)
    ).eval()


def linear_chain() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)).double()


def data(n: int = 400, d: int = 5, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    return x, (x[:, 0] > 0).long()


def batched(x: torch.Tensor, y: torch.Tensor, size: int = 100) -> list[list[torch.Tensor]]:
    return [[a, b] for a, b in zip(x.split(size), y.split(size), strict=True)]


def fingerprint(model: nn.Module) -> list:
    return [
        [(id(p), p.clone()) for p in (*model.parameters(), *model.buffers())],
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state(),
    ]


def assert_same(before: list, after: list) -> None:
    assert all(i == j and torch.equal(a, b) for (i, a), (j, b) in zip(before[0], after[0], strict=True))
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])


def test_a_linear_component_loses_nothing_to_its_operator():
    x = torch.randn(300, 6, dtype=torch.float64)
    net = linear_chain()
    report = credit_report(net, [x])
    result = intervene(net, [torch.randn(100, 6, dtype=torch.float64)], report, ["linear"])
    assert result.scale == "relative"
    assert np.isnan(result.metric).all()
    np.testing.assert_allclose(result.effect, 0, atol=1e-12)


def test_output_noise_on_a_linear_chain_has_its_closed_form():
    x = torch.randn(4000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = linear_chain()
    report = credit_report(net, [x])
    result = intervene(net, x.split(1000), report, ["output_noise"], strength=0.3, draws=8)
    with torch.no_grad():
        states = [net[: i + 1](x) for i in range(3)]
    rest = [net[2].weight @ net[1].weight, net[2].weight, torch.eye(4, dtype=torch.float64)]
    total = states[-1].var(0, correction=0).sum()
    for i, (state, jacobian) in enumerate(zip(states, rest, strict=True)):
        moved = 0.09 * (jacobian.square() * state.var(0, correction=0)).sum() / total
        assert result.effect[i, 0] == pytest.approx(float(moved.detach()), rel=0.05)


def test_weight_noise_draws_are_seeded_and_grow_with_strength():
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y))
    first = intervene(net, batched(x, y), report, ["weight_noise"], strength=0.1, draws=2)
    again = intervene(net, batched(x, y), report, ["weight_noise"], strength=0.1, draws=2)
    large = intervene(net, batched(x, y), report, ["weight_noise"], strength=0.5, draws=2)
    np.testing.assert_array_equal(first.effect, again.effect)
    assert (large.effect > first.effect).all()
    assert first.scale == "kl"


@pytest.mark.parametrize("kind", ["reinit", "weight_noise"])
def test_weights_as_they_are_change_nothing(kind):
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y))
    result = intervene(net, batched(x, y), report, [kind], initial=net.state_dict(), strength=0.0)
    np.testing.assert_array_equal(result.effect, 0)
    assert (result.metric == result.metric_before).all()


def test_reinit_takes_batch_norm_of_the_component_along():
    net, (x, y) = mlp(), data()
    with torch.no_grad():
        net[3].running_mean.fill_(0.2)
    report = credit_report(net, batched(x, y))
    assert report.parts["2"] == ("2", "3", "4")
    initial = copy.deepcopy(net.state_dict())
    initial["3.running_mean"].zero_()
    result = intervene(net, batched(x, y), report, ["reinit"], initial=initial)
    assert result.effect[1, 0] > 0
    assert result.effect[[0, 2], 0].tolist() == [0, 0]


def test_skip_passes_the_input_where_shapes_agree_and_the_mean_elsewhere():
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y))
    result = intervene(net, batched(x, y), report, ["skip"], components=["2", "5"])
    with torch.no_grad():
        logits = net(x)
        skipped = net[5](net[:2](x))
        mean = logits.mean(0).expand_as(logits)
    assert result.components == ("2", "5")
    for row, altered in enumerate((skipped, mean)):
        expected = float(kl_divergence(logits, altered).mean())
        assert result.effect[row, 0] == pytest.approx(expected, rel=1e-5)
        assert result.metric[row, 0] == pytest.approx(accuracy(altered, y))


def test_linear_swap_equals_the_operator_applied_by_hand():
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y))
    result = intervene(net, batched(*data(seed=9)), report, ["linear"])
    with torch.no_grad():
        z, _ = data(seed=9)
        before = net[:2](z)
        swapped = net[5](report.operators["2"].predict(before).float())
        expected = float(kl_divergence(net(z), swapped).mean())
    assert result.effect[1, 0] == pytest.approx(expected, rel=1e-5)


def test_linear_swap_with_a_delay_sees_the_earlier_states():
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y), options=Options(delay=2))
    result = intervene(net, batched(x, y), report, ["linear"])
    with torch.no_grad():
        first = net[:2](x)
        both = torch.cat([first, x], dim=1)
        swapped = net[5](report.operators["2"].predict(both).float())
        expected = float(kl_divergence(net(x), swapped).mean())
    assert result.effect[1, 0] == pytest.approx(expected, rel=1e-5)


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 3)
    ).eval()


def test_reduced_states_need_data_to_fit_and_then_give_whole_tensors():
    net = cnn()
    x = torch.randn(900, 1, 8, 8)
    report = credit_report(net, [x], options=Options(max_dim=64))
    with pytest.raises(ValueError, match=r"act on reduced states .* pass fit_batches"):
        intervene(net, [x[:100]], report, ["linear"])
    result = intervene(net, [x[:100]], report, ["linear"], fit_batches=[x[100:400], x[400:]])
    # A convolution of 64 pixels is linear: what the POD of 256 directions keeps is everything.
    np.testing.assert_allclose(result.effect, 0, atol=1e-6)


def test_a_report_from_json_has_no_operators_but_its_parts(tmp_path):
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y), options=Options(tikhonov=0.0))
    report.to_json(tmp_path / "r.json")
    back = CreditReport.from_json(tmp_path / "r.json")
    assert dict(back.parts) == dict(report.parts)
    with pytest.raises(ValueError, match="pass fit_batches"):
        intervene(net, batched(x, y), back, ["linear"])
    refitted = intervene(net, batched(x, y), back, ["linear"], fit_batches=batched(x, y))
    direct = intervene(net, batched(x, y), report, ["linear"])
    np.testing.assert_allclose(refitted.effect, direct.effect, rtol=0.05, atol=1e-9)


def test_the_model_is_left_exactly_as_found():
    net, (x, y) = mlp(), data()
    net.train()
    net[3].eval()
    report = credit_report(net, batched(x, y))
    before = fingerprint(net)
    intervene(net, batched(x, y), report, draws=2)
    assert_same(before, fingerprint(net))


@pytest.mark.parametrize("kind", ["linear", "reinit", "weight_noise", "output_noise", "skip"])
def test_the_model_is_left_exactly_as_found_when_a_metric_raises(kind):
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y))
    before = fingerprint(net)
    calls = []

    def failing(outputs, targets):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no metric")
        return 1.0

    with pytest.raises(RuntimeError, match="no metric"):
        intervene(net, batched(x, y), report, [kind], metric=failing)
    assert_same(before, fingerprint(net))


def test_the_model_is_left_exactly_as_found_when_the_forward_pass_raises():
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y))
    before = fingerprint(net)
    calls = []

    def forward(model, batch):
        calls.append(1)
        if len(calls) > 6:
            raise RuntimeError("no pass")
        return model(batch[0])

    with pytest.raises(RuntimeError, match="no pass"):
        intervene(net, batched(x, y), report, ["weight_noise"], forward_fn=forward)
    assert_same(before, fingerprint(net))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.act = nn.Tanh()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.act(self.inner(self.act(self.inner(x)))))


def test_calls_of_a_shared_module_are_altered_one_by_one():
    torch.manual_seed(0)
    net, x = Twice(), torch.randn(200, 4)
    report = credit_report(net, [x])
    assert report.parts["inner#1"] == ("inner#1", "act#1")
    result = intervene(net, [x], report, ["skip"], scale="relative")
    with torch.no_grad():
        y = net(x)
        skipped = [net.head(net.act(net.inner(x))), net.head(net.act(net.inner(x)))]
        mean = y.mean(0).expand_as(y)
    total = (y - y.mean(0)).square().sum()
    for i, altered in enumerate([*skipped, mean]):
        assert result.effect[i, 0] == pytest.approx(
            float((altered - y).square().sum() / total), rel=1e-4
        )


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.attention(x, x, x)[0].mean(1))


def test_tuple_outputs_and_integer_inputs():
    torch.manual_seed(0)
    net = Attending()
    tokens, labels = torch.randint(0, 7, (300, 5)), torch.randint(0, 3, (300,))
    batches = [{"tokens": tokens, "labels": labels}]

    def forward(model, batch):
        return model(batch["tokens"])

    report = credit_report(net, batches, forward_fn=forward, components=["embed", "attention", "head"])
    result = intervene(net, batches, report, forward_fn=forward, draws=1, fit_batches=batches)
    assert result.components == ("attention", "head")
    assert np.isfinite(result.effect).all()
    assert result.scale == "kl"


def test_table_figure_and_rank_correlation():
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y))
    result = intervene(net, batched(x, y), report, draws=1)
    ordered = dataclasses.replace(
        result, kinds=("skip",), effect=np.array([[1.0], [2.0], [3.0]]), metric=np.ones((3, 1)),
        predicted={"skip": np.array([-1.0, 0.0, 5.0])},
    )  # fmt: skip
    assert ordered.spearman("skip") == pytest.approx(1.0)
    with pytest.raises(ValueError, match="'linear' was not measured"):
        ordered.spearman("linear")
    text = str(result)
    assert all(component in text for component in result.components)
    assert "weight_noise" in text
    assert "Spearman" in text
    assert len(result.plot().axes) == 5


def test_measured_effects_carry_the_error_of_their_mean_over_samples():
    net, (x, y) = mlp(), data()
    result = intervene(net, batched(x, y), credit_report(net, batched(x, y)), ["skip"])
    with torch.no_grad():
        logits = net(x)
        altered = net[5](net[:2](x))
    by_sample = kl_divergence(logits, altered).numpy()
    gained = (altered.argmax(1) == y).double() - (logits.argmax(1) == y).double()
    assert result.effect_stderr[1, 0] == pytest.approx(sem(by_sample), rel=1e-5)
    assert result.metric_stderr[1, 0] == pytest.approx(sem(gained.numpy()))
    assert "± of change" in str(result)
    assert f"{result.effect[1, 0]:.2g}±" in str(result)


def test_measured_effects_of_kinds_that_draw_carry_the_error_of_their_draws_too():
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y))
    drawn = [
        intervene(net, batched(x, y), report, ["reinit"], components=["2"], draws=1, seed=seed)
        for seed in range(60)
    ]
    # Over the same samples, what differs from seed to seed is the draw alone.
    spread = np.std([one.effect[0, 0] for one in drawn], ddof=1)
    alone = np.mean([one.effect_stderr[0, 0] for one in drawn])
    assert alone < 0.5 * spread
    several = [
        intervene(net, batched(x, y), report, ["reinit"], components=["2"], draws=8, seed=seed)
        for seed in range(12)
    ]
    squares = [one.effect_stderr[0, 0] ** 2 for one in several]
    assert np.sqrt(np.mean(squares)) == pytest.approx(spread / np.sqrt(8), rel=0.25)


def test_the_frame_holds_what_was_measured():
    net, (x, y) = mlp(), data()
    report = predict_effects(net, batched(x, y), credit_report(net, batched(x, y)))
    result = intervene(net, batched(x, y), report, draws=2)
    result = dataclasses.replace(result, components=("0", 'a, "b"', "5"))
    found = result.to_frame()
    assert found["component"].tolist() == list(result.components)
    for column, kind in enumerate(KINDS):
        for name, values in (
            (f"measured_{kind}", result.effect[:, column]),
            (f"measured_{kind}_stderr", result.effect_stderr[:, column]),
            (f"predicted_{kind}", report.effects.values[kind]),
            (f"predicted_{kind}_stderr", report.effects.stderr[kind]),
            (f"metric_change_{kind}", result.metric[:, column] - result.metric_before),
            (f"metric_change_{kind}_stderr", result.metric_stderr[:, column]),
        ):
            np.testing.assert_allclose(found[name], values, rtol=1e-12, atol=0, err_msg=name)
    assert set(found["n_samples"]) == {len(x)}
    assert set(found["scale"]) == {"kl"}
    assert found["metric_before"].tolist() == pytest.approx([accuracy(net(x), y)] * 3)


def test_the_frame_has_no_columns_of_what_was_not_measured():
    net, (x, _) = mlp(), data()
    result = intervene(net, [x], credit_report(net, [x]), ["skip"], scale="relative")
    assert list(result.to_frame()) == [
        "component", "measured_skip", "measured_skip_stderr", "scale", "n_samples",
    ]  # fmt: skip


def test_bars_of_the_figure_reach_one_standard_error():
    net, (x, y) = mlp(), data()
    report = predict_effects(net, batched(x, y), credit_report(net, batched(x, y)), ["weight_noise"])
    result = intervene(net, batched(x, y), report, ["weight_noise"])
    (container,) = result.plot().axes[0].containers
    across, upright = (np.array(bars.get_segments()) for bars in container.lines[2])
    value, error = result.predicted["weight_noise"], result.predicted_stderr["weight_noise"]
    np.testing.assert_allclose(across[:, :, 0].T, [value - error, value + error])
    value, error = result.effect[:, 0], result.effect_stderr[:, 0]
    np.testing.assert_allclose(upright[:, :, 1].T, [value - error, value + error])


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x):
        return x @ self.weight


def test_errors_say_what_arrived_and_what_to_do():
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y))
    with pytest.raises(ValueError, match=r"unknown kinds \['linaer'\]; choose from"):
        intervene(net, batched(x, y), report, ["linaer"])
    with pytest.raises(ValueError, match="no components"):
        intervene(net, batched(x, y), report, components=["9"])
    with pytest.raises(ValueError, match="strength is -1"):
        intervene(net, batched(x, y), report, strength=-1)
    with pytest.raises(ValueError, match="draws is 0"):
        intervene(net, batched(x, y), report, draws=0)
    with pytest.raises(ValueError, match="scale is 'mse'"):
        intervene(net, batched(x, y), report, scale="mse")
    with pytest.raises(ValueError, match="the batches were empty"):
        intervene(net, [], report)
    with pytest.raises(ValueError, match="a metric needs targets"):
        intervene(net, [x], report, metric=accuracy)
    with pytest.raises(ValueError, match=r"has no module '5'"):
        intervene(net[:5], batched(x, y), report)
    with pytest.raises(ValueError, match="does not say which modules"):
        intervene(net, batched(x, y), dataclasses.replace(report, parts={}))
    with pytest.raises(ValueError, match=r"initial has nothing for '0.weight'"):
        intervene(net, batched(x, y), report, ["reinit"], initial={"a": torch.ones(1)})
    with pytest.raises(ValueError, match="'5' did not run"):
        intervene(net, batched(x, y), report, ["skip"], forward_fn=lambda m, b: m[:5](b[0]))
    with pytest.raises(ValueError, match="no floating-point tensor; return the outputs"):
        intervene(net, batched(x, y), report, ["skip"], forward_fn=lambda m, b: 1)
    bare = nn.Sequential(Bare(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"'0' \(Bare\) has parameters but no reset_parameters"):
        intervene(bare, [x], credit_report(bare, [x]), ["reinit"])
    flat = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
    good = credit_report(flat, [x])
    nn.init.zeros_(flat[1].weight)
    with pytest.raises(ValueError, match="the outputs are constant"):
        intervene(flat, [x], good, ["skip"])
    image = credit_report(cnn(), [torch.randn(80, 1, 8, 8)], options=Options(max_dim=8))
    with pytest.raises(ValueError, match="no class indices to tell their class axis"):
        intervene(
            cnn(), [torch.randn(8, 1, 8, 8)], image, scale="kl", forward_fn=lambda m, b: m(b)[:, :, None]
        )


def test_kl_of_impossible_classes_is_finite():
    impossible = torch.tensor([[0.0, float("-inf")]])
    assert not kl_divergence(impossible, impossible).any()


def test_the_table_keeps_its_component_column_on_a_narrow_terminal():
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y))
    result = dataclasses.replace(
        intervene(net, batched(x, y), report, draws=1),
        components=("encoder.layers.0", "encoder.layers.1", "head"),
    )
    file = io.StringIO()
    Console(file=file, width=80, color_system=None).print(result)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(line.startswith(f" {name} ") for line in lines) for name in result.components)
    assert all(kind in file.getvalue() for kind in KINDS)


def test_without_predicted_effects_only_sound_quantities_are_set_against_the_measured():
    net, (x, y) = mlp(), data()
    report = credit_report(net, batched(x, y))
    result = intervene(net, batched(x, y), report, draws=1)
    assert result.predictor == {"linear": "nonlinearity", "output_noise": "sensitivity"}
    np.testing.assert_array_equal(result.predicted["linear"], report.nonlinearity)
    assert np.isnan(result.spearman("skip"))
    titles = [axis.get_title() for axis in result.plot().axes]
    assert titles[4] == "skip"
    assert "nothing" in str(result)


class Branches(nn.Module):
    """Two linear layers side by side, on one input or on two."""

    def __init__(self, inputs: int = 1) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        self.inputs = inputs

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        return self.head(self.left(x[0]) + self.right(x[-1]))


@pytest.mark.parametrize("inputs", [1, 2])
def test_states_joined_from_several_components_are_named(inputs: int) -> None:
    torch.manual_seed(0)
    net = Branches(inputs)
    batches = [tuple(torch.randn(50, 3) for _ in range(inputs)) for _ in range(2)]
    report = credit_report(net, batches, forward_fn=lambda model, batch: model(*batch))
    named = r"'left\+right'" if inputs == 1 else r"'input\+input#1', 'left\+right'"
    for alter in (
        lambda: intervene(net, batches, report, forward_fn=lambda model, batch: model(*batch)),
        lambda: linearize(net, batches, report, components=["head"]),
    ):
        with pytest.raises(ValueError, match=rf"the states \[{named}\] were joined from what runs side"):
            alter()


class Sequences(nn.Module):
    """Linear layers over the last axis: the report's rows have that axis first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.b(self.a(x)).mean(1))


def test_tensors_of_several_axes_are_not_read_in_the_order_of_the_reports_rows():
    torch.manual_seed(0)
    net, x = Sequences(), torch.randn(400, 5, 4)
    report = credit_report(net, [x])
    assert report.widths[:2] == (40, 30)
    with pytest.raises(ValueError, match=r"operators of \['a', 'b', 'head'\] act on .* several axes"):
        intervene(net, [x], report, ["linear"])
    result = intervene(net, [x], report, ["linear"], fit_batches=[x])
    np.testing.assert_allclose(result.effect, 0, atol=1e-9)
    predicted = predict_effects(net, [x], report, ["linear"], scale="relative")
    np.testing.assert_allclose(predicted.effects.values["linear"], 0, atol=1e-9)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.LSTM(4, 6), nn.LSTM(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)[0])[0][-1])


def test_outputs_are_not_altered_where_the_samples_are_along_another_axis() -> None:
    torch.manual_seed(0)
    net = SequenceFirst()
    batches = [torch.randn(5, 20, 4) for _ in range(5)]
    report = credit_report(net, batches)
    message = r"'first' gave a tensor of shape \(5, 20, 6\) for 20 samples of the output"
    with pytest.raises(ValueError, match=message):
        intervene(net, batches, report, ["output_noise"])
    assert (intervene(net, batches, report, ["weight_noise"]).effect > 0).all()


def test_noise_leaves_single_and_whole_numbers_alone():
    model = nn.Sequential(nn.PReLU(), nn.Linear(3, 3))
    model[0].register_parameter("count", nn.Parameter(torch.arange(4), requires_grad=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(50, 3)
    report = credit_report(model, [x], components=["0", "1"])
    noise = Alterations(model, [x], report, ["weight_noise"], strength=0.5)
    with noise.weights("weight_noise", ["0", "1"]):
        inside = {name: value.clone() for name, value in model.state_dict().items()}
    assert {name for name in before if not torch.equal(before[name], inside[name])} == {
        "1.weight",
        "1.bias",
    }
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_ranks_of_fewer_than_three_effects_are_not_told():
    x, y = data()
    report = credit_report(mlp(), [x], components=["0", "2"])
    report = predict_effects(mlp(), [x], report, ["output_noise"])
    result = intervene(mlp(), batched(x, y), report, ["output_noise"], draws=1)
    assert np.isnan(result.spearman("output_noise"))


def test_a_report_that_ends_in_a_sum_of_branches_names_output() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return h + self.b(h)

    torch.manual_seed(0)
    net, batches = Skips(), [torch.randn(60, 4)]
    report = credit_report(net, batches)
    assert report.components[-1] == "output"
    with pytest.raises(ValueError, match=r"ends with what the network returns.*by output="):
        intervene(net, batches, report)
    assert intervene(
        net, batches, credit_report(net, batches, options=Options(output="b")), kinds=["skip"]
    ).effect.shape == (2, 1)
