"""What a drift shows: a table with a last line, one line, a figure, a data frame."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from lightning_koopman.report.drift import Drift


def made(*changed: bool) -> Drift:
    values = np.array([0.25, 0.5, 0.01])
    return Drift(
        components=("stem", "a[0]", "head"),
        drift=values,
        stderr=np.array([0.01, 0.02, 0.04]),
        changed=np.array(changed),
        old=values + 0.1,
        new=np.full(3, 0.1),
        n_samples=640,
        step=20,
        since=10,
        parts={"stem": ("stem", "relu"), "a[0]": ("a[0]",)},
    )


def test_the_table_marks_what_changed_and_ends_with_what_to_do_next() -> None:
    lines = str(made(True, True, False)).splitlines()
    assert "Drift at step 20 since step 10, 640 samples" in lines[0]
    assert lines[4].split() == ["stem", "0.2500±0.0100", "0.3500", "0.1000", "1.786", "yes"]
    assert lines[5].split() == ["a[0]", "0.5000±0.0200", "0.6000", "0.1000", "3.333", "first"]
    assert lines[6].split() == ["head", "0.0100±0.0400", "0.1100", "0.1000", "0.059"]
    assert " ".join(lines[-2:]).startswith("Look at a[0] first, 1 more changed too. Compare its weights")


def test_what_rounds_to_zero_has_no_sign() -> None:
    drift = dataclasses.replace(made(False, False, False), drift=np.array([-4e-16, -0.0, -6e-5]))
    rows = [line.split()[1:] for line in str(drift).splitlines()[4:7]]
    assert [row[0] for row in rows] == ["0.0000±0.0100", "0.0000±0.0200", "-0.0001±0.0400"]
    assert [row[3] for row in rows] == ["0.000", "0.000", "0.000"]


@pytest.mark.parametrize("width", [40, 60, 76])
def test_a_narrow_screen_cuts_no_heading(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(made(True, True, False))
    lines = console.file.getvalue().splitlines()
    shown = " ".join(lines).split()
    assert {"0.5000±0.0200", "changed", "first"} <= {*shown}
    assert max(map(len, lines)) <= width


def test_modules_of_the_component_are_named() -> None:
    assert made(True, False, False).verdict.startswith("Look at stem (modules relu) first. Compare")


def test_where_nothing_changed_it_says_so() -> None:
    found = made(False, False, False)
    assert found.culprit is None
    assert str(found).endswith("measure on more samples.")
    assert repr(found) == "Drift(3 components, 0 changed)"


def test_it_is_one_line_in_a_shell() -> None:
    assert repr(made(True, True, False)) == "Drift(3 components, 2 changed, first 'a[0]')"


def test_the_frame_holds_one_row_per_component() -> None:
    frame = made(True, True, False).to_frame()
    assert list(frame.columns) == ["component", "drift", "stderr", "changed", "old", "new", "suspicion"]
    assert frame["drift"].tolist() == [0.25, 0.5, 0.01]
    assert frame["changed"].tolist() == [True, True, False]


def test_the_figure_draws_every_component_with_its_error() -> None:
    figure, axis = made(True, True, False).plot()
    assert figure.axes == [axis]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([0.25, 0.5, 0.01])
    assert len({bar.get_facecolor() for bar in axis.patches}) == 2
    assert [label.get_text() for label in axis.get_yticklabels()] == ["stem", "a[0]", "head"]


def test_a_block_that_adds_little_is_not_hidden_by_one_that_no_operator_explains() -> None:
    found = made(True, True, True)
    given = dataclasses.replace(
        found, drift=np.array([0.02, 0.03, 0.01]), new=np.array([0.01, 0.5, -0.01])
    )
    assert given.suspicion == pytest.approx([0.02 / 0.05, 0.03 / 0.55, 0.01 / 0.07])
    assert given.culprit == "stem"
