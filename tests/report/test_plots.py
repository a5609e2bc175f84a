"""Figures show the numbers of the report."""

import dataclasses
import io
import sys

import matplotlib.figure
import numpy as np
import pytest
from test_report import NAMES, make

from lightning_koopman import CreditReport
from lightning_koopman.report.plots import (
    plot_directions,
    plot_evolution,
    plot_report,
    plot_spectra,
)


def png(figure: matplotlib.figure.Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def test_bars_have_the_length_of_credits_and_gains():
    report = make(step=3)
    figure = report.plot()
    credit, gain, fit = figure.axes
    assert [bar.get_width() for bar in credit.patches] == pytest.approx(report.credit.tolist())
    assert [bar.get_width() for bar in gain.patches] == pytest.approx(report.gain.tolist())
    assert [label.get_text() for label in credit.get_yticklabels()] == list(NAMES)
    assert credit.get_xlabel() == "credit [nats per direction]"
    drawn = {line.get_label(): line.get_xdata() for line in fit.get_lines()}
    assert np.allclose(drawn["component"], report.r2)
    assert np.allclose(drawn["chain behind it"], report.chain_r2)
    title = figure.get_suptitle()
    assert "at step 3" in title
    assert "200 samples" in title
    assert png(figure).startswith(b"\x89PNG")


def test_bars_with_a_doubt_are_grey():
    stable, ones = np.array([True, False, True]), np.ones(3)
    report = dataclasses.replace(make(), stable=stable, r2=ones, chain_r2=ones)
    credit, gain = (
        [bar.get_facecolor() for bar in axis.patches] for axis in plot_report(report).axes[:2]
    )
    assert credit[0] == credit[2] != credit[1]
    # What moves the credit says nothing of the gain.
    assert gain == [credit[0]] * 3


def test_a_report_without_numbers_can_be_drawn():
    report = make(dead=True)
    assert np.isnan(report.credit).all()
    assert png(plot_report(report)).startswith(b"\x89PNG")
    assert png(plot_evolution([report, report])).startswith(b"\x89PNG")


def test_a_very_low_r2_stays_in_sight():
    report = dataclasses.replace(make(), r2=np.array([0.9, -7.0, np.nan]))
    assert plot_report(report).axes[2].get_xlim()[0] < -7


def test_no_window_manager_is_asked():
    import matplotlib.pyplot as plt

    plot_report(make())
    assert plt.get_fignums() == []
    assert "matplotlib.pyplot" in sys.modules


@pytest.mark.parametrize("quantity", ["credit", "nonlinearity", "rank"])
def test_evolution_is_a_map_of_components_over_steps(quantity):
    reports = [make(seed, step=10 * seed) for seed in range(4)]
    figure = plot_evolution(reports, quantity)
    axis = figure.axes[0]
    shown = axis.get_images()[0].get_array()
    assert np.allclose(shown, np.stack([getattr(report, quantity) for report in reports], axis=1))
    assert [label.get_text() for label in axis.get_yticklabels()] == list(NAMES)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "10", "20", "30"]
    assert png(figure).startswith(b"\x89PNG")


def test_reports_without_a_step_are_counted():
    axis = plot_evolution([make(seed, step=None) for seed in range(12)]).axes[0]
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
    with pytest.raises(ValueError, match="holds no operators; a report read from JSON has none"):
        plot_spectra(CreditReport.from_dict(make().to_dict()))


def test_spectra_of_many_components_have_no_legend():
    report = make()
    assert plot_spectra(report).axes[0].get_legend() is not None
    operator = report.operators["stem"]
    many = dataclasses.replace(report, operators={f"block.{i}": operator for i in range(60)})
    (axis,) = plot_spectra(many).axes
    assert axis.get_legend() is None
    assert len(axis.lines) == 60
