"""Reports as tables and pages: CSV, a data frame, HTML, Markdown."""

import csv
import dataclasses
import html
import json
import re

import numpy as np
import pandas
import pytest
from small import batches, network

from lightning_koopman import component_effects
from lightning_koopman.cli.main import main
from lightning_koopman.koopman.credit import QUANTITIES
from lightning_koopman.report.effects import Effects
from lightning_koopman.report.files import write_reports, write_table, write_with_known
from lightning_koopman.report.pages import to_html, to_markdown
from lightning_koopman.report.tables import verdict


def test_frame_and_csv_hold_a_row_per_component(report, tmp_path):
    write_reports([report, report], tmp_path / "r.csv", "csv")
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert [row["component"] for row in rows] == ["0", "2", "0", "2"]
    assert float(rows[0]["credit"]) == pytest.approx(report.credit[0])
    frame = report.to_frame()
    assert list(frame) == list(rows[0])
    assert list(frame["component"]) == ["0", "2"]
    assert list(frame["step"]) == [7, 7]
    for name in QUANTITIES:
        np.testing.assert_array_equal(frame[name], getattr(report, name))
        np.testing.assert_array_equal(frame[f"{name}_stderr"], report.stderr[name])
    assert list(frame["width"]) == list(report.widths)
    assert list(frame["doubt"]) == [", ".join(words) for words in report.doubts]


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_tables_hold_numbers_in_full(kind, tmp_path):
    table = pandas.DataFrame({
        "component": ["a", "b", 'c"é'],
        "drift": [1 / 3 * 1e-12, 1e12 / 3, np.nan],
        "changed": [True, False, True],
        "parameters": [1, 2**40, 0],
    })
    write_table(table, tmp_path / f"t.{kind}")
    if kind == "csv":
        read = pandas.read_csv(tmp_path / "t.csv", float_precision="round_trip")
    else:
        read = pandas.DataFrame(json.loads((tmp_path / "t.json").read_text(encoding="utf-8")))
    pandas.testing.assert_frame_equal(read, table, check_exact=True)


def test_html_is_self_contained_and_escaped(report):
    named = dataclasses.replace(report, components=("<script>alert(1)</script>", "2"))
    page = to_html([named, named])
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r"https?://", page)


def test_a_page_names_run_and_step_and_says_what_its_columns_mean(report):
    found = component_effects(network(), batches(), report, ["skip", "linear"])
    report = dataclasses.replace(report, run="a<b", effects=found)
    page = to_html([report])
    assert "<title>Koopman credit of run a&lt;b at step 7</title>" in page
    for line in verdict(report):
        assert f"<b>{html.escape(line)}</b>" in page
    tables = [re.findall(r"<th>(.*?)</th>", head) for head in re.findall(r"<thead>.*?</thead>", page)]
    assert [head[1] for head in tables] == ["skip", "holds"]
    meant = re.findall(r"<dt>(.*?)</dt><dd>.+?</dd>", page)
    assert set(meant) == {name for head in tables for name in head} - {"component"}
    titles = re.findall(r'<img alt="(.*?)"', page)
    assert titles == ["What each component is worth", "Effects", "Credit by output direction"]
    assert "Credit over training" in to_html([report, report])


def test_report_and_compare_take_bare_file_names(report, tmp_path, capsys):
    report.to_json(tmp_path / "r.json")
    name = str(tmp_path / "r.json")
    assert main(["report", name]) == 0
    assert "Koopman credit at step 7" in capsys.readouterr().out
    assert main(["report", name, "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert main(["compare", name, name, "--quantity", "gain"]) == 0
    assert "Change of gain" in capsys.readouterr().out


def test_effects_are_in_every_kind_of_file(report, tmp_path):
    bare = report
    found = component_effects(network(), batches(), bare, ["skip", "output_noise"], scale="kl")
    report = dataclasses.replace(bare, effects=found)
    write_reports([report, bare], tmp_path / "r.csv", "csv")
    frame = pandas.read_csv(tmp_path / "r.csv")
    np.testing.assert_allclose(frame["effect_skip"][:2], report.effects.values["skip"])
    np.testing.assert_allclose(frame["effect_skip_stderr"][:2], found.stderr["skip"])
    assert frame["effect_skip"][2:].isna().all()
    page, text = to_html([report, bare]), to_markdown(report)
    assert found.cell("skip", 0) in text
    assert f'data-value="{report.effects.values["output_noise"][0]}"' in to_html([report])
    assert "KL in nats" in to_html([report])
    assert "Effects of altering" not in page  # of one run, the newest report is shown, which has none


def test_the_page_shows_the_metric_that_its_verdict_is_about(report):
    values = {"skip": np.array([0.5, 0.7])}
    metric = {"skip": np.array([0.81, 0.62])}
    errors = {"skip": np.array([0.02, 0.03])}
    known = {"metric_before": 0.9, "metric": metric, "metric_stderr": errors}
    effects = Effects(report.components, values, errors, {"skip": "measured"}, "kl", 64, **known)
    page = to_html([dataclasses.replace(report, effects=effects)])
    assert page.count("metric then") == 2, "a column and its line in the glossary"
    assert "0.810±0.020" in page
    assert "metric 0.9000 as it was" in page


def test_a_report_without_directions_is_shown_without_their_figure(report):
    nothing = {name: np.full(2, np.nan) for name in ("credit", "gain", "sensitivity")}
    lost = dataclasses.replace(report, directions=0, volumes=np.zeros((2, 0)), **nothing)
    page = to_html([lost])
    assert "Credit by output direction" not in page
    assert "Credit by output direction" in to_html([report])
    assert page.count('class="doubt"') == 6, "credit, gain and sensitivity of two rows"


def test_without_any_report_only_json_is_written(tmp_path):
    write_with_known([], str(tmp_path / "r.html"))
    assert [path.name for path in tmp_path.iterdir()] == ["r.html.json"]
    with pytest.raises(ValueError, match="no report to show"):
        write_reports([], tmp_path / "r.html", "html")
