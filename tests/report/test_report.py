"""The frozen result: files, scalars and the table."""

import copy
import dataclasses
import functools
import io
import json
from html import unescape

import numpy as np
import pytest
import torch
from rich.console import Console

from lightning_koopman import CreditReport, KoopmanCredit
from lightning_koopman.koopman.credit import QUANTITIES, compute_credits
from lightning_koopman.koopman.moments import Layout, accumulate
from lightning_koopman.report.effects import Effects
from lightning_koopman.report.fields import MIN_R2
from lightning_koopman.report.pages import to_html, to_markdown
from lightning_koopman.report.report import build_report, check_quantities
from lightning_koopman.report.saved import ReportFormatError
from lightning_koopman.report.tables import columns, credit_table
from lightning_koopman.report.text import with_error

NAMES = ("stem", "body.0", "head")


@functools.cache
def make(seed: int = 0, *, dead: bool = False, step: int | None = 12) -> CreditReport:
    metric = KoopmanCredit(NAMES)
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(200, 5, generator=generator, dtype=torch.float64)]
    for _ in NAMES:
        weight = torch.randn(5, 5, generator=generator, dtype=torch.float64)
        states.append(torch.tanh(states[-1] @ weight))
    if dead:
        states[1] = torch.zeros_like(states[1])
    metric.update(states)
    report = metric.report(step=step)
    return dataclasses.replace(
        report, variance_kept=np.array([0.9, 1.0, 1.0]), notes=("a note", *report.notes)
    )


def assert_equal(given: CreditReport, other: CreditReport) -> None:
    for field in dataclasses.fields(CreditReport):
        if field.name == "operators":
            continue
        a, b = getattr(given, field.name), getattr(other, field.name)
        if field.name == "stderr":
            assert set(a) == set(b)
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])
        else:
            np.testing.assert_array_equal(a, b, err_msg=field.name)
            assert type(a) is type(b), field.name


@pytest.mark.parametrize("dead", [False, True])
def test_a_report_comes_back_from_json_as_it_was(tmp_path, dead):
    report = make(dead=dead)
    path = tmp_path / "report.json"
    text = report.to_json(path)
    assert path.read_text(encoding="utf-8") == text == report.to_json()
    assert list(tmp_path.iterdir()) == [path]
    back = CreditReport.from_json(path)
    assert_equal(back, report)
    assert back.operators == {}
    assert back.r2.dtype == np.float64
    assert back.stable.dtype == np.bool_
    assert str(back) == str(report)
    assert back.doubts == report.doubts
    assert dead == np.isnan(report.total)


def test_numbers_that_are_not_finite_become_null():
    text = make(dead=True).to_json()
    assert "NaN" not in text
    given = json.loads(text)
    assert given["total"] is None
    assert given["credit"] == [None] * 3
    assert given["r2"][0] is None
    infinite = dataclasses.replace(make(), total=float("inf")).to_json()
    assert json.loads(infinite)["total"] is None


MALFORMED = {
    "empty": b"",
    "half": b'{"format": 1, "components": ["a"',
    "text": b"hello",
    "not utf-8": b"\xff\xfe{}",
    "deeply nested": b"[" * 200_000,
    "a huge number": b'{"format": ' + b"1" * 5000 + b"}",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "another format": b'{"format": 2}',
    "no format": b"{}",
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_files_that_hold_no_report_are_refused_by_name(tmp_path, kind):
    path = tmp_path / "bad.json"
    path.write_bytes(MALFORMED[kind])
    with pytest.raises(ReportFormatError, match=r"bad\.json (is no|holds no report)"):
        CreditReport.from_json(path)
    with pytest.raises(FileNotFoundError):
        CreditReport.from_json(tmp_path / "none.json")


NUMBER, WHOLE = "Input should be a valid number, not", "Input should be a valid integer, not"
FIELDS = {
    "components": [
        ("x", "field components: Input should be a valid list, not 'x'"),
        ([], "has 3 entries for 0 components"),
        (["a", "a", "b"], "components must be distinct names"),
        ([1, 2, 3], r"field components\.0: Input should be a valid string, not 1"),
    ],
    "widths": [
        ([5, 5], "field widths: has 2 entries for 3 components"),
        ([5.0, 5.0, 5.0], rf"field widths\.0: {WHOLE} 5\.0"),
        ([1, True, 1], rf"field widths\.1: {WHOLE} True"),
    ],
    "stderr": [
        ({}, "stderr must hold credit, gain"),
        ([], r"field stderr: Input should be a valid dictionary, not \[\]"),
        ({key: [1.0] for key in QUANTITIES}, r"stderr\.credit: has 1 entries for 3 components"),
        ({key: [0.0, -1.0, 0.0] for key in QUANTITIES}, "credit: holds a standard error below 0"),
    ],
    "volumes": [
        ([[1.0]] * 3, r"volumes has rows of \{1\} numbers; expected 5"),
        ([[1.0], [1.0, 2.0], []], "volumes has rows of"),
        ([], "field volumes: has 0 entries for 3 components"),
        (None, "field volumes: Input should be a valid list, not None"),
    ],
    "directions": [
        (-1, "field directions: Input should be greater than or equal to 0, not -1"),
        (True, f"field directions: {WHOLE} True"),
    ],
    "n_samples": [(1.5, rf"n_samples: {WHOLE} 1\.5"), ("7", f"n_samples: {WHOLE} '7'")],
    "step": [(-3, "step: Input should be greater than or equal to 0"), ("3", f"step: {WHOLE} '3'")],
    "total": [
        ("abc", f"field total: {NUMBER} 'abc'"),
        ([1.0], rf"field total: {NUMBER} \[1\.0\]"),
        (-1.1e300, "total: is beyond 1e300"),  # no figure can hold it
    ],
    "total_stderr": [
        ({}, f"field total_stderr: {NUMBER} "),
        (-1.0, "total_stderr: holds a standard error below 0"),
    ],
    "parts": [
        ([], "field parts: Input should be a valid dictionary"),
        ({"a\r": "b"}, "field parts.a\ufffd: Input should be a valid list, not 'b'"),
    ],
    "notes": [
        ("note", "field notes: Input should be a valid list, not 'note'"),
        ([1], r"field notes\.0: Input should be a valid string, not 1"),
    ],
    "run": [(7, "field run: Input should be a valid string, not 7")],
    "folds": [(1, "field folds: Input should be greater than or equal to 2, not 1")],
    "delay": [(0, "delay: .* equal to 1, not 0"), (10**9, "delay: Input should be less than")],
    "source": [
        ([], "field source: Input should be a valid dictionary"),
        ({"a": float("nan")}, "field source: cannot be written again: Out of range"),
    ],
    **{
        name: [
            ([1.0, 2.0], f"field {name}: has 2 entries for 3 components"),
            (["1.0", "2.0", "3.0"], rf"field {name}\.0: {NUMBER} '1\.0'"),
            ([1, {}, 2], rf"field {name}\.1: {NUMBER} "),
            ([10**400, 1, 2], rf"field {name}\.0: {NUMBER} 1000"),
        ]
        for name in (*QUANTITIES, "variance_kept", "tikhonov", "condition")
    },
    "stable": [
        ([True, False], "field stable: has 2 entries for 3 components"),
        ([1, 0, 1], r"field stable\.0: Input should be a valid boolean, not 1"),
        ([None, True, True], r"field stable\.0: Input should be a valid boolean, not None"),
    ],
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [(name, value, message) for name, cases in FIELDS.items() for value, message in cases],
)
def test_every_field_is_checked(name, value, message):
    given = make().to_dict()
    given[name] = value
    with pytest.raises(ReportFormatError, match=message):
        CreditReport.from_dict(given)


OPTIONAL = {"step", "parts", "folds", "delay", "run", "source"}
OPTIONAL |= {"effects", "types", "parameters", "drift"}


@pytest.mark.parametrize("name", sorted(set(make().to_dict()) - OPTIONAL))
def test_every_field_is_needed(name):
    given = make().to_dict()
    del given[name]
    with pytest.raises(ReportFormatError, match=name):
        CreditReport.from_dict(given)


def test_excitation_of_an_old_file_must_be_off():
    given = make().to_dict()
    CreditReport.from_dict(given | {"excitation": 0.0})
    with pytest.raises(ReportFormatError, match=r"excitation=0.3, which was removed in 0.2; measure it"):
        CreditReport.from_dict(given | {"excitation": 0.3})


def test_reading_leaves_the_dictionary_alone():
    given = make().to_dict()
    before = copy.deepcopy(given)
    assert_equal(CreditReport.from_dict(given), make())
    assert given == before


def test_scalars_have_flat_keys_and_plain_values():
    report = make()
    scalars = report.to_scalars()
    assert list(scalars) == [f"koopman/{q}/{c}" for q in QUANTITIES for c in NAMES]
    assert all(type(value) is float for value in scalars.values())
    assert [scalars[f"koopman/gain/{c}"] for c in NAMES] == report.gain.tolist()
    chosen = report.to_scalars("k", ["credit", "credit_stderr"])
    assert list(chosen) == [f"k/{q}/{c}" for q in ("credit", "credit_stderr") for c in NAMES]
    assert [chosen[f"k/credit_stderr/{c}"] for c in NAMES] == report.stderr["credit"].tolist()


def test_unknown_quantities_are_refused():
    with pytest.raises(
        ValueError, match=r"unknown quantities \['blame'\]; choose from \['credit', 'gai"
    ):
        make().to_scalars(quantities=["credit", "blame"])
    with pytest.raises(ValueError, match="quantities is 'credit'; give a list"):
        check_quantities("credit")
    check_quantities([*QUANTITIES, "r2_stderr"])


def test_a_row_carries_its_doubts():
    report = dataclasses.replace(
        make(),
        r2=np.array([0.9, MIN_R2 - 0.01, np.nan]),
        chain_r2=np.array([0.9, 0.9, -3.0]),
        credit=np.array([1.0, np.nan, 0.0]),
        stable=np.array([True, False, False]),
    )
    assert report.doubts == ((), ("r2", "lost"), ("r2", "chain_r2", "ridge"))
    assert report.trusted.tolist() == [True, False, False]
    text = str(report)
    assert "2 of 3 rows carry a doubt" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["body.0"][-2:] == ["r2,", "lost"]
    assert rows["stem"][-1] == f"{report.r2[0]:.3f}"
    ones = {name: np.ones(3) for name in ("r2", "chain_r2", "credit")}
    sound = dataclasses.replace(report, stable=np.ones(3, bool), **ones)
    assert "carry a doubt" not in str(sound)


def test_the_table_shows_numbers_with_errors_and_notes():
    report = make()
    text = str(report)
    assert "at step 12, 200 samples" in text
    assert f"total {with_error(report.total, report.total_stderr, ' ± ')} nats per direction" in text
    assert with_error(report.credit[0], report.stderr["credit"][0]) in text
    assert "Note: a note" in text
    for name in NAMES:
        assert name in text
    assert "at step" not in str(dataclasses.replace(report, step=None))


def test_empty_cells_are_explained_in_every_form():
    numbers, why = {"skip": np.array([np.nan, 0.5, 0.7])}, "no effect skip of 'stem': it gave no rows"
    effects = Effects(NAMES, numbers, numbers, {"skip": "measured"}, "kl", 200, notes=(why,))
    report = dataclasses.replace(make(), effects=effects, drift=np.array([np.nan, 0.5, 0.7]))
    shown = columns(report)
    assert (shown["skip"][0], shown["drift"][0]) == ("", "")
    text = " ".join(str(report).split())
    assert text.count(f"Note: {why}") == 1
    assert "drift: empty where a state was brought to other directions" in text
    for form in (to_html([report]), to_markdown(report)):
        assert unescape(form).count(why) == 1
    # Where effects have a table of their own, it is explained there.
    both = dataclasses.replace(effects, predicted=numbers, predicted_stderr=numbers)
    text = " ".join(str(dataclasses.replace(report, effects=both)).split())
    assert text.count(f"Note: {why}") == 1


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.34123, 0.02449, "1.341±0.024"),
        (1.34123, 0.0996, "1.34±0.10"),
        (1234.5, 56.7, "1234±57"),
        (1234.5, 567.8, "1230±570"),
        (-0.00001, 0.2, "0.00±0.20"),
        (0.98412, 0.00003, "0.98412±3e-05"),
        (2.2e-15, 5e-16, "2.2e-15±5e-16"),
        (0.0, 0.0, "0±0"),
        (0.123, np.nan, "0.12"),
        (np.nan, 0.1, ""),
    ],
)
def test_no_digits_beyond_the_error(value, error, text):
    assert with_error(value, error) == text


def test_a_report_feels_at_home_in_a_shell_and_a_notebook():
    report = dataclasses.replace(make(), run="a")
    total = with_error(report.total, report.total_stderr, " ± ")
    assert repr(report) == f"CreditReport(3 components, run a, step 12, 200 samples, total {total})"
    assert "total unknown" in repr(make(dead=True))
    assert list(report) == list(NAMES)
    assert len(report) == 3
    assert "body.0" in report
    row = report["body.0"]
    assert (row["component"], row["credit"], row["step"]) == ("body.0", report.credit[1], 12)
    with pytest.raises(KeyError, match=r"no component is called 'body.1'; did you mean 'body.0'\?"):
        report["body.1"]
    with pytest.raises(KeyError, match=r"called 'xyz'; there are \('stem', 'body.0', 'head'\)"):
        report["xyz"]
    page = report._repr_mimebundle_((), ())["text/html"]
    assert "Koopman credit of run a at step 12" in page
    assert with_error(report.credit[0], report.stderr["credit"][0]) in page


def test_rows_say_what_they_hold():
    deep = tuple(f"head.{i}" for i in range(7))
    report = dataclasses.replace(
        make(),
        types=("Conv2d", "Linear", "Head"),
        parameters=(10, 20, 0),
        parts={
            "stem": ("a.bn1", "a.relu", "stem"),
            "body.0": ("body.0", "body.1"),
            "head": (*deep, "head"),
        },
    )
    shown = columns(report)
    assert shown["holds"] == ["bn1 → relu → Conv2d", "Linear → body.1", "Head and 7 more"]
    assert shown["parameters"] == ["10", "20", ""]


def test_a_doubt_is_about_some_numbers_only():
    report = dataclasses.replace(
        make(), r2=np.array([0.1, 1, 1]), chain_r2=np.array([1, 0.1, 1]), stable=np.ones(3, bool)
    )
    assert report.doubts_about("gain") == (("r2",), ("chain_r2",), ())
    assert report.doubts_about("credit") == report.doubts_about("sensitivity") == ((), ("chain_r2",), ())
    assert report.doubts_about("r2") == report.doubts_about("nonlinearity") == (("r2",), (), ())
    assert report.doubts_about("rank") == ((), (), ())
    assert credit_table(report).grey == {
        "credit": [False, True, False],
        "gain": [True, True, False],
        "R²": [True, False, False],
    }
    ridge = dataclasses.replace(report, stable=np.zeros(3, bool), chain_r2=np.ones(3))
    assert ridge.doubts_about("gain") == (("r2",), (), ())
    assert ridge.doubts_about("credit") == (("ridge",),) * 3


def test_numbers_are_double_precision_and_add_up():
    report = make()
    for name in QUANTITIES:
        assert getattr(report, name).dtype == np.float64
        assert getattr(report, name).shape == report.stderr[name].shape == (3,)
    assert report.gain.sum() == pytest.approx(report.total, abs=1e-9)
    assert report.volumes.shape == (3, report.directions)
    assert np.allclose(report.volumes.mean(1), report.credit, rtol=0, atol=1e-12)
    assert list(report.operators) == list(NAMES)
    assert report.widths == (5, 5, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.total = 0.0  # type: ignore[misc]


def of_states(states: list[torch.Tensor]) -> CreditReport:
    layout = Layout((5, 4, 2, 6), 5)
    moments = layout.zeros()
    accumulate(layout, moments, states, torch.arange(100) % 5)
    return build_report(NAMES, compute_credits(layout, moments), layout, n_samples=100)


def test_lost_directions_are_named_in_a_note():
    states = [torch.randn(100, 5, dtype=torch.float64)]
    for shape in ((5, 4), (4, 2), (2, 6)):
        states.append(states[-1] @ torch.randn(shape, dtype=torch.float64))
    states[-1] = states[-1] + 0.1 * torch.randn(100, 6, dtype=torch.float64)
    lost = "others (2 to 5) are lost at 'body.0' and were dropped"
    assert of_states(states).notes == (f"2 output directions reach back to the input; {lost}",)
    states[0] = torch.zeros_like(states[0])
    report = of_states(states)
    assert report.notes[0].startswith("0 output directions reach back to the input; others (0 to 5)")
    assert "lost" in report.doubts[0]


@pytest.mark.parametrize("sure", [True, False])
def test_no_number_and_no_heading_is_cut_at_any_width(sure, report):
    report = dataclasses.replace(report, stable=np.full(len(report), sure), r2=np.ones(len(report)))
    shown = columns(report)
    always = {"component"} if sure else {"component", "doubt"}
    for width in range(60, 131):
        file = io.StringIO()
        Console(file=file, width=width, color_system=None).print(report)
        text = file.getvalue()
        headings = next(line for line in text.splitlines() if "component" in line).split()
        assert always <= set(headings) <= set(shown) - ({"doubt"} if sure else set()), width
        for heading in set(headings) - {"doubt", "holds"}:
            assert all(cell in text for cell in shown[heading]), (width, heading)


@pytest.mark.parametrize("width", [60, 80, 130])
def test_notes_are_whole_where_the_table_is_wider_than_the_screen(width):
    words = [f"word{i}" for i in range(60)]
    wide = {"credit": np.full(3, -10.123), "gain": np.full(3, -20.123), "rank": np.full(3, 128.0)}
    notes = (" ".join(words), "with [brackets]")
    report = dataclasses.replace(make(), widths=(128,) * 3, notes=notes, **wide)
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(report)
    shown = file.getvalue().split()
    assert [word for word in shown if word.startswith("word")] == words
    assert "[brackets]" in shown
