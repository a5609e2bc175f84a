"""Figures show the numbers of the report."""

import dataclasses
import io
import sys

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.colors import to_hex
from test_report import NAMES, make

from lightning_koopman import CreditReport
from lightning_koopman.report.drift import Drift
from lightning_koopman.report.effects import Effects
from lightning_koopman.report.plots import (
    plot_course,
    plot_directions,
    plot_evolution,
    plot_importance,
    plot_report,
)


def png(figure: matplotlib.figure.Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def with_effects(report: CreditReport, **values: list[float]) -> CreditReport:
    effects = Effects(
        report.components, {kind: np.array(found) for kind, found in values.items()},
        {kind: np.full(3, 0.001) for kind in values}, dict.fromkeys(values, "measured"), "kl", 50,
        doubts={kind: ((), ("unsteady",), ()) for kind in values},
    )  # fmt: skip
    return dataclasses.replace(report, effects=effects)


def colors(axis) -> list[str]:
    return [to_hex(bar.get_facecolor()) for bar in axis.patches]


def words(axis) -> list[str]:
    return [text.get_text().partition(":")[0] for text in axis.get_legend().get_texts()]


def test_importance_is_the_effect_of_skip_the_most_first_coloured_by_decision():
    report = with_effects(make(step=3), skip=[0.004, 0.2, 0.9], linear=[0.3, 0.001, 0.002])
    figure, axis = report.plot()
    assert [bar.get_width() for bar in axis.patches] == [0.9, 0.2, 0.004]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["head", "body.0", "stem"]
    assert words(axis) == ["can go", "can become linear", "doubted"]
    handles = dict(zip(words(axis), axis.get_legend().legend_handles, strict=True))
    expected = ["can become linear", "doubted", "can go"]
    assert colors(axis) == [to_hex(handles[word].get_facecolor()) for word in expected]
    (bars,) = (np.array(each.get_segments()) for each in axis.containers[0].lines[2])
    np.testing.assert_allclose(np.ptp(bars[:, :, 0], axis=1), 0.004)
    assert "KL in nats" in axis.get_xlabel()
    assert "at step 3, 50 samples" in axis.get_title()
    assert png(figure).startswith(b"\x89PNG")


def test_without_effects_importance_is_the_credit():
    report = dataclasses.replace(
        make(), stable=np.array([True, False, True]), r2=np.array([0.9, 0.9, 1.0]), chain_r2=np.ones(3)
    )
    _, axis = report.plot()
    order = np.argsort(-report.credit)
    assert [bar.get_width() for bar in axis.patches] == pytest.approx(report.credit[order].tolist())
    assert words(axis) == ["linear already", "undecided", "doubted"]
    decided = np.array(["undecided", "doubted", "linear already"])[order]
    handles = dict(zip(words(axis), axis.get_legend().legend_handles, strict=True))
    assert colors(axis) == [to_hex(handles[word].get_facecolor()) for word in decided]


def test_pictures_are_drawn_on_axes_that_are_given_or_shown_by_pyplot():
    plt = pytest.importorskip("matplotlib.pyplot")
    own = matplotlib.figure.Figure()
    axes = own.subplots(1, 4)
    assert make().plot(axes[0]) == (own, axes[0])
    assert make().plot(axes[1:], kind="credits")[0] is own
    assert plot_evolution([make()], ax=axes[0])[1] is axes[0]
    assert plt.get_fignums() == []
    figure, _ = make().plot()
    assert [plt.figure(number) for number in plt.get_fignums()] == [figure]
    with pytest.raises(ValueError, match="kind is 'pie'; choose one of"):
        make().plot(kind="pie")
    with pytest.raises(ValueError, match="ax holds 2 axes; this picture has 3 panels, one each"):
        make().plot(axes[:2], kind="credits")


def test_bars_have_the_length_of_credits_and_gains():
    report = make(step=3)
    figure, (credit, gain, fit) = report.plot(kind="credits")
    assert [bar.get_width() for bar in credit.patches] == pytest.approx(report.credit.tolist())
    assert [bar.get_width() for bar in gain.patches] == pytest.approx(report.gain.tolist())
    assert [label.get_text() for label in credit.get_yticklabels()] == list(NAMES)
    assert credit.get_xlabel() == "credit [nats per direction]"
    drawn = {line.get_label(): line.get_xdata() for line in fit.get_lines()}
    assert np.allclose(drawn["component"], report.r2)
    assert np.allclose(drawn["chain behind it"], report.chain_r2)
    title = credit.get_title(loc="left")
    assert "at step 3" in title
    assert "200 samples" in title
    assert png(figure).startswith(b"\x89PNG")


def test_a_doubt_greys_the_numbers_that_it_is_about():
    report = dataclasses.replace(
        make(), stable=np.ones(3, bool), r2=np.array([1, 0.2, 1]), chain_r2=np.array([1, 1, 0.3])
    )
    credit, gain, _ = plot_report(report)[1]
    assert colors(credit)[0] == colors(credit)[1] != colors(credit)[2]
    assert (
        colors(gain)[0] == colors(credit)[0] != colors(gain)[1] == colors(gain)[2] == colors(credit)[2]
    )


def test_a_report_without_numbers_can_be_drawn():
    report = make(dead=True)
    assert np.isnan(report.credit).all()
    for drawn in (plot_importance(report), plot_report(report), plot_evolution([report, report])):
        assert png(drawn[0]).startswith(b"\x89PNG")


def test_a_very_low_r2_stays_in_sight():
    report = dataclasses.replace(make(), r2=np.array([0.9, -7.0, np.nan]))
    assert plot_report(report)[1][2].get_xlim()[0] < -7


def test_no_window_manager_is_asked():
    import matplotlib.pyplot as plt

    plot_report(make())
    plot_importance(make())
    assert plt.get_fignums() == []
    assert "matplotlib.pyplot" in sys.modules


@pytest.mark.parametrize("quantity", ["credit", "nonlinearity", "rank"])
def test_evolution_is_a_map_of_components_over_steps(quantity):
    reports = [make(seed, step=10 * seed) for seed in range(4)]
    figure, axis = plot_evolution(reports, quantity)
    (image,) = axis.get_images()
    shown = image.get_array()
    low, high = image.get_clim()
    assert (low == -high) == (quantity == "credit")
    assert figure.axes[1].get_ylabel().startswith(f"{quantity} [")
    assert np.allclose(shown, np.stack([getattr(report, quantity) for report in reports], axis=1))
    assert [label.get_text() for label in axis.get_yticklabels()] == list(NAMES)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "10", "20", "30"]
    assert png(figure).startswith(b"\x89PNG")


def test_reports_without_a_step_are_counted():
    _, axis = plot_evolution([make(seed, step=None) for seed in range(12)])
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert (labels[0], labels[-1], len(labels)) == ("0", "11", 8)


def test_reports_that_make_no_series_are_refused():
    with pytest.raises(ValueError, match="no report to draw"):
        plot_evolution([])
    other = dataclasses.replace(make(), components=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"components differ between reports: \('a', 'b', 'c'\) and"):
        plot_evolution([other, make()])
    with pytest.raises(ValueError, match="quantity is 'blame'; choose one of"):
        plot_evolution([make()], "blame")


def test_what_a_report_lacks_cannot_be_drawn():
    with pytest.raises(ValueError, match="no output direction reaches back to the input, so there is"):
        plot_directions(make(dead=True))


def bands(axes) -> dict[str, np.ndarray]:
    """Return what is drawn by component: steps, and the lower and the upper end of the band there."""
    found = {}
    for axis in axes:
        *drawn, marks = axis.collections
        assert np.array_equal(marks.get_colors()[:, :3], [b.get_facecolor()[0, :3] for b in drawn])
        for name, band in zip([text.get_text() for text in axis.texts], drawn, strict=True):
            corners = np.concatenate([path.vertices for path in band.get_paths()])
            steps = np.unique(corners[:, 0])
            ends = [corners[corners[:, 0] == step, 1] for step in steps]
            found[name] = np.array([steps, [e.min() for e in ends], [e.max() for e in ends]])
    return found


def test_a_course_is_shaded_two_standard_errors_up_and_down():
    effects = [[0.1, 0.2, 0.3], [0.4, 0.2, 0.9], [0.5, 0.1, 1.4]]
    reports = [with_effects(make(step=10 * i), skip=found) for i, found in enumerate(effects)]
    bare = dataclasses.replace(reports[1], effects=None)
    figure, axes = plot_course("skip", [reports[0], bare, *reports[1:]])
    assert list(bands(axes)) == list(NAMES)
    for i, (steps, low, high) in enumerate(bands(axes).values()):
        assert steps.tolist() == [0, 10, 20]
        assert low == pytest.approx([found[i] - 0.002 for found in effects])
        assert high == pytest.approx([found[i] + 0.002 for found in effects])
    lines = [line.get_ydata().tolist() for line in axes[0].get_lines()]
    assert lines == np.transpose(effects).tolist()
    assert axes[0].get_ylabel() == "skip [KL in nats]"
    assert axes[0].get_title(loc="left") == "± 2 standard errors, 50 samples"
    assert png(figure).startswith(b"\x89PNG")


def test_a_credit_without_error_and_one_that_is_always_0_have_no_band():
    reports = [make(seed, step=seed) for seed in range(4)]
    for report in reports:
        report.credit[-1] = report.stderr["credit"][-1] = 0.0
    reports[1].stderr["credit"][:] = np.nan
    drawn = bands(plot_course("credit", reports)[1])
    assert list(drawn) == list(NAMES[:2])
    assert drawn["stem"][0].tolist() == [0, 2, 3]
    middle = drawn["stem"][1:].mean(axis=0)
    assert middle == pytest.approx([reports[i].credit[0] for i in (0, 2, 3)])
    for known in (reports[:2], reports[:1], []):
        assert plot_course("credit", known) is None
    assert plot_course("skip", reports) is None
    assert plot_course("drift", reports) is None


def test_effects_of_another_unit_share_no_course():
    reports = [with_effects(make(step=step), skip=[0.1, 0.2, 0.3]) for step in range(3)]
    other = dataclasses.replace(reports[0].effects, scale="relative")
    reports[0] = dataclasses.replace(reports[0], effects=other)
    assert bands(plot_course("skip", reports)[1])["stem"][0].tolist() == [1, 2]


@pytest.mark.parametrize(("last", "bottom"), [(0.02, 0.018), (0.0, 0.0)])
def test_drift_is_drawn_by_decades_down_to_0_where_something_stays(last, bottom):
    plain = np.full(3, 0.5)
    drifts = [
        Drift(NAMES, np.array(found), np.full(3, 0.001), plain > 0, plain, plain, 80, step, step - 1)
        for step, found in ((1, [2.0, 1.0, 0.4]), (2, [0.2, 0.1, last]))
    ]
    figure, axes = plot_course("drift", [make()], drifts)
    assert bands(axes)["head"][2].tolist() == pytest.approx([0.402, last + 0.002])
    assert axes[0].get_yscale() == "symlog"
    assert axes[0].get_ylim()[0] == pytest.approx(bottom)
    assert png(figure).startswith(b"\x89PNG")


def test_many_components_are_spread_over_panels_and_the_largest_shown():
    names = tuple(f"block.{i}" for i in range(40))
    values = np.random.default_rng(0).permutation(40) + 1.0
    reports = []
    for step in range(2):
        effects = Effects(
            names, {"skip": values}, {"skip": np.ones(40)}, {"skip": "measured"}, "relative", 9
        )
        reports.append(dataclasses.replace(make(step=step), components=names, effects=effects))
    _, axes = plot_course("skip", reports)
    assert list(bands(axes)) == [names[i] for i in range(40) if values[i] > 12]
    for axis in axes:
        lines = [line.get_color() for line in axis.get_lines()]
        assert len(set(lines)) == len(lines) == 7
    assert axes[0].get_title(loc="left").endswith("9 samples, 28 largest of 40")
