"""In figures of effects each name leads to its own point, and no text stands over another."""

import dataclasses
import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from test_report import make

from lightning_koopman.report.effects import Effects


def effects(values: dict[str, np.ndarray], predicted: dict[str, np.ndarray] | None = None) -> Effects:
    size = len(next(iter(values.values())))
    names = tuple(f"body.layers.{i}" for i in range(size))
    errors, beside = ({k: v / 20 for k, v in found.items()} for found in (values, predicted or {}))
    return Effects(
        names, values, errors, dict.fromkeys(values, "measured"), "kl", 512,
        predicted=predicted or {}, predicted_stderr=beside,
    )  # fmt: skip


def drawn(figure):
    FigureCanvasAgg(figure).draw()
    return figure


def line_of(text) -> np.ndarray:
    """Return where the line of a name begins and ends, in pixels."""
    patch = text.arrow_patch
    return patch.get_transform().transform_path(patch.get_path()).vertices[[0, -1]]


def scattered(size: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(size)
    measured = np.exp(generator.normal(size=size))
    return measured * np.exp(generator.normal(-0.5, 0.3, size)), measured


POINTS = {
    # The tutorial's network, two of whose points lie 8 pixels apart.
    "near": (np.array([0.337, 0.335, 0.52]), np.array([2.6, 2.3, 3.05])),
    **{str(size): scattered(size) for size in (8, 25)},
}


@pytest.mark.parametrize(
    ("points", "kinds"), [("near", ["skip", "linear"]), ("8", ["skip"]), ("25", ["skip"])]
)
def test_each_name_leads_to_its_own_point(points: str, kinds: list[str]) -> None:
    predicted, measured = POINTS[points]
    both = effects(dict.fromkeys(kinds, measured), dict.fromkeys(kinds, predicted))
    figure = drawn(both.plot()[0])
    for axis in figure.axes:
        names = [text.get_text() for text in axis.texts]
        assert names == [both.components[i] for i in np.argsort(measured)]
        own = axis.transData.transform(np.stack([predicted, measured], axis=1))[np.argsort(measured)]
        boxes = [Text.get_window_extent(text) for text in axis.texts]
        for text, point, box in zip(axis.texts, own, boxes, strict=True):
            begin, end = line_of(text)
            np.testing.assert_allclose(end, point, atol=0.1)
            assert box.x0 - 8 < begin[0] <= box.x0
            assert box.y0 < begin[1] < box.y1
            # Names stand beside the axes, where there are no points.
            assert axis.bbox.x1 < box.x0 < box.x1 < figure.bbox.x1
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))


def test_the_names_of_many_points_are_as_many_as_can_be_read() -> None:
    predicted, measured = scattered(130)
    figure, _ = effects({"skip": measured}, {"skip": predicted}).plot()
    assert len(figure.axes[0].texts) == 44  # every third


@pytest.mark.parametrize("largest", [3.0, 9.7, 13.7])
@pytest.mark.parametrize("unit", [1e-7, 1e-3, 1e4])
def test_ticks_of_neighbouring_panels_stand_apart(unit: float, largest: float) -> None:
    found = {kind: unit * largest * np.array([1.0, 0.6, 0.2]) for kind in ("skip", "int4", "int3")}
    figure = drawn(effects(found).plot()[0])
    boxes = [
        label.get_window_extent()
        for axis in figure.axes
        for label, at in zip(axis.get_xticklabels(), axis.get_xticks(), strict=True)
        if axis.get_xlim()[0] <= at <= axis.get_xlim()[1]
    ]
    assert len(boxes) >= 3 * 3
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_a_report_shows_effects_of_other_weights_above_its_own_table() -> None:
    values = {"half": np.array([0.125, 0.25, 0.5])}
    report = make()
    half = dataclasses.replace(effects(values), components=report.components)
    shown = str(dataclasses.replace(report, effects=half))
    above, below = shown.split("Koopman credit")
    assert [line.split() for line in above.splitlines() if "±5%" in line] == [
        [name, f"{value:.2g}±5%"] for name, value in zip(report.components, values["half"], strict=True)
    ]
    assert "half" not in below
