"""The result of altering components: sets, ranks, frames, tables, figures, files, and recorded calls."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from effect_nets import batched, data, mlp, smooth
from rich.console import Console
from torch import nn

from lightning_koopman import CreditReport, component_effects, credit_report
from lightning_koopman.effects.component_effects import effects_on
from lightning_koopman.effects.returned import Ends
from lightning_koopman.network.runs.forward_runner import ForwardRunner
from lightning_koopman.network.runs.recording import Recording
from lightning_koopman.report.effects import KINDS, Effects
from lightning_koopman.report.saved import ReportFormatError
from lightning_koopman.report.tables import next_step, verdict


@pytest.fixture(scope="module")
def report() -> CreditReport:
    x, y = data()
    return credit_report(mlp(), batched(x, y))


@pytest.fixture(scope="module")
def both(report: CreditReport) -> Effects:
    x, y = data()
    return component_effects(mlp(), batched(x, y), report, KINDS, how="both", draws=2, sets=[{"0", "5"}])


def made(**more: object) -> Effects:
    fields = {"values": [1.0, 2.0, 3.0], "stderr": [0.1, 0.2, 0.3]}
    fields |= {"predicted": [-1.0, 0.0, 5.0], "predicted_stderr": [0.1] * 3}
    found = {name: {"skip": np.array(values)} for name, values in fields.items()}
    kept = {"components": ("a", "b", "c"), "how": {"skip": "measured"}, "scale": "kl", "n_samples": 50}
    return Effects(**kept | found | more)


def narrow(shown: object, width: int = 80) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(shown)
    return file.getvalue().splitlines()


def test_ranks_are_those_of_components_with_both_numbers(both):
    assert made().spearman("skip") == pytest.approx(1.0)
    two = made(predicted={"skip": np.array([1.0, np.nan, 2.0])})
    assert np.isnan(two.spearman("skip"))
    assert np.isnan(made(predicted={}).spearman("skip"))
    assert both.components[-1] == "0+5"
    assert abs(both.spearman("skip")) <= 1
    with pytest.raises(ValueError, match="there are no effects of 'linear'; there are of"):
        made().spearman("linear")


def test_what_was_neither_measured_nor_predicted_is_refused():
    effects = made(predicted={}, predicted_stderr={})
    assert effects.of("b", "skip") == (2.0, 0.2)
    with pytest.raises(ValueError, match=r"'skip' of \['a', 'b'\] together was neither measured nor"):
        effects.of({"a", "b"}, "skip")
    with pytest.raises(ValueError, match=r"no effects of \['z'\]; there are of \('a', 'b', 'c'\)"):
        effects.of({"a", "z"}, "skip")
    with pytest.raises(ValueError, match="no effects of no component"):
        effects.of((), "skip")


def test_the_frame_holds_what_was_asked_for(both):
    found = both.to_frame()
    assert found["component"].tolist() == list(both.components)
    for kind in KINDS:
        for name, values in (
            (f"measured_{kind}", both.values[kind]),
            (f"measured_{kind}_stderr", both.stderr[kind]),
            (f"predicted_{kind}", both.predicted[kind]),
            (f"predicted_{kind}_stderr", both.predicted_stderr[kind]),
            (f"metric_change_{kind}", both.metric[kind] - both.metric_before),
            (f"metric_change_{kind}_stderr", both.metric_stderr[kind]),
        ):
            np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert set(found["scale"]) == {"kl"}
    assert list(made(predicted={}).to_frame()) == [
        "component", "measured_skip", "measured_skip_stderr", "doubt_skip", "scale", "n_samples",
    ]  # fmt: skip


def test_the_table_cuts_nothing_on_a_narrow_screen(both, report):
    long = tuple(f"encoder.layers.{i}.attention" for i in range(3))
    effects = dataclasses.replace(both, components=(*long, "0+5"), sets={"0+5": long[:2]})
    lines = narrow(effects)
    assert max(map(len, lines)) <= 80
    words = " ".join(" ".join(lines).split())
    for kind in KINDS:
        assert kind in words
        for i in range(4):
            assert effects.cell(kind, i) in words
    assert all(name in words for name in effects.components)
    named = {"components": long, "parts": {}, "operators": {}}
    with_effects = dataclasses.replace(report, **named, effects=effects)
    for width in (60, 80, 120):
        lines = narrow(with_effects, width)
        assert max(map(len, lines)) <= width
        assert effects.cell("skip", 0) in " ".join(lines)
        assert "…" not in " ".join(lines)


def test_a_table_says_on_how_many_samples_effects_rest_where_these_are_fewer(report):
    x, y = data()
    for rows, told in ((400, "what it is worth (KL in nats)."), (100, "(KL in nats, on 100 samples).")):
        effects = component_effects(mlp(), batched(x[:rows], y[:rows]), report)
        lines = narrow(dataclasses.replace(report, effects=effects), 130)
        assert told in " ".join(" ".join(lines).split())


def test_the_report_leads_with_the_decision(report, both):
    x, y = data()
    effects = component_effects(mlp(), batched(x, y), report, ["skip", "linear"])
    lines = narrow(dataclasses.replace(report, effects=effects), 130)
    heading = next(line for line in lines if "credit" in line and "gain" in line).split()
    expected = ["component", "holds", "parameters", "skip", "linear", "credit", "gain", "R²"]
    assert heading == expected
    row = next(line for line in lines if line.startswith(" 2 ")).split()
    skip, linear = (effects.cell(kind, 1) for kind in ("skip", "linear"))
    assert row[1:9] == ["Linear", "→", "3", "→", "4", "180", skip, linear]
    assert lines[-1] == "Next: lightning-koopman drop, or drop_order: how many may go together"
    assert (
        narrow(report, 130)[-1] == "Next: lightning-koopman effects, or component_effects: what may go"
    )
    drifted = dataclasses.replace(report, effects=effects, drift=np.array([0.25, 0.0, 0.01]))
    row = next(line for line in narrow(drifted, 130) if line.startswith(" 0 ")).split()
    assert "0.2500" in row
    np.testing.assert_array_equal(CreditReport.from_dict(drifted.to_dict()).drift, drifted.drift)
    more = narrow(dataclasses.replace(report, effects=both), 130)
    assert sum("skip" in line for line in more) >= 2, "the effects have a table of their own"


def verdicts(report: CreditReport, loss: list[float], error: float, **more: object) -> str:
    effects = Effects(
        components=report.components, values={"skip": np.array(loss)}, how={"skip": "measured"},
        stderr={"skip": np.full(3, error)}, scale="relative", n_samples=99, **more,
    )  # fmt: skip
    return " ".join(str(dataclasses.replace(report, effects=effects)).split())


def test_the_verdict_is_true_by_its_numbers(report):
    said = verdicts(report, [0.5, 0.009, 0.001], 0.001)
    assert "5 can go alone within 1% of the outputs' variance" in said
    assert "2, 5 can go one at a time within 1% of" in verdicts(report, [0.5, 0.009, 0.001], 0.0001)
    said = verdicts(report, [0.5, 0.3, 0.009], 0.001)
    assert "nothing can go within 1% of the outputs' variance for sure: the cheapest, 5, costs" in said
    metric = {"skip": np.array([0.9, 0.899, 0.5])}, {"skip": np.full(3, 0.001)}
    said = verdicts(
        report, [0.5, 0.5, 0.5], 0.1, metric_before=0.9, metric=metric[0], metric_stderr=metric[1]
    )
    assert "0, 2 can go one at a time within 0.01 of accuracy" in said
    kl = made(components=report.components, values={"skip": np.array([0.5, 0.001, 0.5])})
    said = "nothing can go within 0.01 nats of KL for sure: the cheapest, 2, costs 0.00±0.20"
    assert verdict(dataclasses.replace(report, effects=kl))[0] == said
    assert "no effect of skip is known" in verdicts(report, [np.nan] * 3, np.nan)
    # The activation has nothing to cut off; the layer behind it is linear by its kind.
    linear = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    nn.init.constant_(linear[0].bias, 50.0)
    exact = credit_report(linear, [torch.randn(300, 5, dtype=torch.float64)])
    assert verdict(exact) == ["0 is linear already (R² 0.999 or more)"]
    # Of a state of which much is left out, the rest may be less linear.
    assert verdict(dataclasses.replace(exact, variance_kept=np.array([0.9, 1.0]))) == []
    # A layer with weight norm is linear by its kind, too.
    normed = nn.Sequential(linear[0], linear[1], nn.utils.parametrizations.weight_norm(linear[2]))
    exact = credit_report(normed, [torch.randn(300, 5, dtype=torch.float64)])
    assert verdict(exact) == ["0 is linear already (R² 0.999 or more)"]


def test_the_next_step_follows_from_the_verdict(report):
    def after(skip: float, linear: float | None = None) -> str:
        values = {"skip": np.full(3, skip)} | ({} if linear is None else {"linear": np.full(3, linear)})
        given = {"values": values, "stderr": {kind: np.zeros(3) for kind in values}}
        effects = made(components=report.components, how=dict.fromkeys(values, "measured"), **given)
        return next_step(dataclasses.replace(report, effects=effects))

    assert after(0.001, 0.001).startswith("Next: lightning-koopman drop, or drop_order")
    assert after(0.5).startswith("Next: lightning-koopman linearize, or linearize()")
    assert after(0.5, 0.001).startswith("Next: lightning-koopman linearize")
    assert after(0.5, 0.5).startswith("Next: lightning-koopman bits, or bit_widths")


def test_the_figure_shows_both_with_their_errors(both):
    figure, axes = both.plot()
    assert len(figure.axes) == 5
    for axis, kind in zip(axes, KINDS, strict=True):
        assert kind in axis.get_title()
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        (container,) = axis.containers
        across, upright = (np.array(bars.get_segments()) for bars in container.lines[2])
        shown = (both.predicted[kind] > 0) & (both.values[kind] > 0)
        for found, value, error in (
            (across[:, :, 0], both.predicted[kind], both.predicted_stderr[kind]),
            (upright[:, :, 1], both.values[kind], both.stderr[kind]),
        ):
            np.testing.assert_allclose(found.T, [(value - error)[shown], (value + error)[shown]])
    alone = dataclasses.replace(both, predicted={}, predicted_stderr={})
    _, axis = alone.plot(kind=KINDS[4])
    widths = [bar.get_width() for bar in axis.patches]
    np.testing.assert_allclose(widths, both.values[KINDS[4]])
    with pytest.raises(ValueError, match="ax holds 2 axes; this picture has 5 panels, one each"):
        both.plot(axes[:2])
    with pytest.raises(ValueError, match="there are no effects of 'shake'"):
        both.plot(kind="shake")


def test_an_effect_is_one_line_in_a_shell_and_a_table_in_a_notebook():
    assert repr(made()) == "Effects(3 components; measured skip; KL in nats, 50 samples)"
    assert "Measured effects of altering" in made()._repr_mimebundle_((), ())["text/html"]


def test_doubts_name_kinds_as_they_are_written():
    values = {"skip": np.array([1.0, 2.0]), "my[bold]": np.array([1.0, 2.0])}
    doubts = {"skip": (("samples",), ()), "my[bold]": (("saturated", "samples"), ("saturated",))}
    how = dict.fromkeys(values, "predicted")
    found = Effects(("a", "b"), values, values, how, "kl", 10, doubts=doubts)
    assert str(found).endswith("?: samples (skip, my[bold]), saturated (my[bold])")


def test_effects_are_written_and_read_back(both, report, tmp_path):
    again = Effects.from_dict(json.loads(json.dumps(both.to_dict(), allow_nan=False)))
    for field in dataclasses.fields(Effects):
        old, new = getattr(both, field.name), getattr(again, field.name)
        if isinstance(old, dict) and any(isinstance(v, np.ndarray) for v in old.values()):
            assert list(old) == list(new)
            for kind, values in old.items():
                np.testing.assert_array_equal(new[kind], values)
        else:
            assert old == new, field.name
    assert again.of({"0", "2"}, "skip") == pytest.approx(both.of({"0", "2"}, "skip"))
    dataclasses.replace(report, effects=both).to_json(tmp_path / "r.json")
    back = CreditReport.from_json(tmp_path / "r.json")
    assert str(back.effects) == str(both)
    assert (back.types, back.parameters) == (report.types, report.parameters)


def test_effects_of_a_report_of_01_are_read(report):
    given = report.to_dict()
    given["effects"] = {
        "values": {"skip": [1.0, 2.0, None]}, "stderr": {"skip": [0.1, 0.2, 0.3]}, "scale": "kl",
        "influence_stderr": [0.1, 0.1, 0.1], "strength": 0.3, "n_samples": 40,
    }  # fmt: skip
    effects = CreditReport.from_dict(given).effects
    assert effects is not None
    assert (effects.components, effects.how) == (report.components, {"skip": "predicted"})
    np.testing.assert_array_equal(effects.values["skip"], [1, 2, np.nan])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"values": {}}, "effects.stderr must be of the kinds that effects.values has"),
        ({"stderr": {}}, "effects.stderr must be of the kinds that effects.values has"),
        ({"how": {"skip": "guessed"}}, "field effects.how.skip: Input should be 'measured' or"),
        ({"scale": "mse"}, "field effects.scale: Input should be 'kl' or 'relative', not 'mse'"),
        ({"strength": -1.0}, "effects.strength: Input should be greater than or equal to 0, not -1.0"),
        ({"values": {"skip": [1.0]}}, "effects.values.skip: has 1 entries for 4"),
        ({"components": ["0"] * 4}, "components must be distinct names"),
        ({"metric": {"skip": [1.0] * 4}, "metric_stderr": {}}, "metric_stderr must be of the kinds"),
        ({"doubts": {"other": [[]] * 4}}, "doubts must be of the kinds that effects.values has"),
        ({"sets": {"0": ["2", "5"]}}, "effects.sets must name the last components"),
        ({"sets": {"0+5": ["7"]}}, "effects.sets must name the last components"),
        ({"pairs": {"skip": [[[1.0]]]}}, "effects.pairs must hold 3 times 3 numbers per fold"),
        (3, "not 3"),
    ],
)
def test_spoiled_effects_are_refused(spoil, message, report, both):
    kept = {"skip"}
    given = both.to_dict()
    for name, value in given.items():
        if isinstance(value, dict) and name != "sets":
            given[name] = {kind: part for kind, part in value.items() if kind in kept}
    given = given | spoil if isinstance(spoil, dict) else spoil
    with pytest.raises(ReportFormatError, match=message):
        CreditReport.from_dict(report.to_dict() | {"effects": given})
    with pytest.raises(ReportFormatError):
        Effects.from_dict(given)


def test_recorded_calls_have_the_effects_of_the_data(report):
    net, (x, y) = mlp(), data()
    recording = Recording(net, {name: net.get_submodule(name) for name in report.components})
    with torch.inference_mode():
        for part in x.split(100):
            with recording:
                net(part)
            recording.end_step()
    runner = ForwardRunner(net, recording.steps, lambda _, step: step.run()[-1])
    kinds = ["skip", "linear", "output_noise", "weight_noise"]
    found = effects_on(runner, report.parts, kinds, ends=Ends(), targets=lambda *_: list(y.split(100)))
    expected = component_effects(net, batched(x, y), report, kinds)
    assert found.scale == "kl"
    for kind in kinds:
        np.testing.assert_allclose(found.values[kind], expected.values[kind], rtol=1e-6)
        np.testing.assert_allclose(found.stderr[kind], expected.stderr[kind], rtol=1e-6)


def test_a_smooth_network_has_no_doubts(report):
    x = data()[0].double()
    effects = component_effects(smooth(), [x], kinds=KINDS, how="both", draws=1)
    assert not any(word for rows in effects.doubts.values() for row in rows for word in row)
