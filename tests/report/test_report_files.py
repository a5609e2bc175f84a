"""Files of reports: complete or untouched, and never believed unread."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import batches, network, save

from lightning_koopman import CreditReport, component_effects, credit_report, evaluate_checkpoints
from lightning_koopman.cli.main import main
from lightning_koopman.report.comparison import changes_table
from lightning_koopman.report.files import merge_reports, read_reports, write_reports
from lightning_koopman.report.pages import to_html, to_markdown
from lightning_koopman.report.saved import ReportFormatError
from lightning_koopman.report.text import as_text

QUIET = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def checkpoints(folder: Path, count: int) -> list[Path]:
    return [save(folder / f"{step}.ckpt", step, 1 + step / 10) for step in range(count)]


def test_shards_merge_to_the_whole(tmp_path):
    # Of two runs, one with a checkpoint more.
    paths = [*checkpoints(tmp_path / "a", 2), *checkpoints(tmp_path / "b", 3)]
    whole = evaluate_checkpoints(network(), paths, batches())
    files = []
    for number in (1, 2, 3):
        part = evaluate_checkpoints(network(), paths, batches(), shard=(number, 3))
        files.append(tmp_path / f"{number}.json")
        write_reports(part, files[-1])
    write_reports(whole, tmp_path / "whole.json")
    arguments = [f"--reports+={path}" for path in files]
    assert main(["merge", *arguments, "--out", str(tmp_path / "all.json")]) == 0
    assert (tmp_path / "all.json").read_text() == (tmp_path / "whole.json").read_text()
    assert not list(tmp_path.glob("*.tmp"))
    assert evaluate_checkpoints(network(), paths[:1], batches(), shard=(2, 2), logdir=tmp_path) == []


@pytest.mark.parametrize("shard", [(0, 2), (3, 2), (1, 0)])
def test_a_shard_out_of_range_is_refused(shard, tmp_path):
    with pytest.raises(ValueError, match="write i/n with i from 1 to n"):
        evaluate_checkpoints(network(), checkpoints(tmp_path, 1), batches(), shard=shard)


@pytest.mark.parametrize("shard", ["2", "a/b", "1/2/3", "-1/2", "3/2"])
def test_a_shard_that_is_none_is_refused_by_the_command(shard, user_module, capsys):
    checkpoints(user_module("shards"), 1)
    given = ["--model=shards:network", "--data=shards:batches", "--ckpt=0.ckpt", f"--shard={shard}"]
    assert main(["evaluate", *given]) == 1
    assert "write i/n" in capsys.readouterr().err


def test_reports_so_far_are_saved_after_every_checkpoint(tmp_path):
    out, counts = tmp_path / "out.json", []

    def save(reports: list[CreditReport]) -> None:
        write_reports(reports, out)
        counts.append(len(read_reports(out)))

    evaluate_checkpoints(network(), checkpoints(tmp_path, 3), batches(), on_report=save)
    assert counts == [1, 2, 3]


@pytest.mark.parametrize("kind", ["one", "json", "html", "csv"])
def test_a_disk_that_is_full_leaves_the_old_file(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_koopman.report.files.to_html", str)  # drawing takes time
    out = tmp_path / "out"

    def write(reports: list[CreditReport]) -> None:
        if kind == "one":
            reports[-1].to_json(out)
        else:
            write_reports(reports, out, kind)

    write([REPORT])
    before = out.read_text()

    def full(self: Path, target: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write([REPORT, dataclasses.replace(REPORT, n_samples=7)])
    assert out.read_text() == before
    assert list(tmp_path.iterdir()) == [out]


def test_files_that_contradict_each_other_are_refused(tmp_path):
    write_reports([dataclasses.replace(REPORT, step=3)], tmp_path / "a.json")
    write_reports([dataclasses.replace(REPORT, step=3, n_samples=40)], tmp_path / "b.json")
    assert len(merge_reports([tmp_path / "a.json", tmp_path / "a.json"])) == 1
    with pytest.raises(ReportFormatError, match=r"different reports at step 3; merge shards"):
        merge_reports([tmp_path / "a.json", tmp_path / "b.json"])


NONE = {
    "": "is not JSON",
    "{": "is not JSON",
    "[" * 100_000: "is not JSON",
    "\ud800": "is no text file",
    "{}": "holds no report",
    "[1]": "holds no report",
    '[{"format": 1}]': "holds no report",
    "[]": "empty list",
}


@pytest.mark.parametrize("text", NONE, ids=range(len(NONE)))
def test_a_file_that_holds_no_reports_is_refused(text, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ReportFormatError, match=rf"bad\.json.*{NONE[text]}"):
        read_reports(path, may_be_empty=False)
    with pytest.raises(ReportFormatError, match=r"gone\.json cannot be read"):
        read_reports(tmp_path / "gone.json")


REPORT = credit_report(network(), batches())
VALID = REPORT.to_dict()
WITH_EFFECTS = dataclasses.replace(
    REPORT, effects=component_effects(network(), batches(), REPORT, how="both", sets=[{"0", "2"}])
).to_dict()


@QUIET
@given(field=st.sampled_from(sorted(VALID)), value=JSON)
def test_any_field_may_hold_anything(field, value):
    altered = json.loads(json.dumps(VALID)) | {field: value}
    try:
        report = CreditReport.from_dict(altered)
    except ReportFormatError:
        return
    str(report)
    report.to_scalars()


@QUIET
@given(value=JSON)
def test_anything_may_stand_for_a_report(value):
    try:
        CreditReport.from_dict(value)
    except ReportFormatError:
        return
    pytest.fail("a report was made of nothing")


@QUIET
@given(name=st.sampled_from(sorted(VALID["stderr"])), value=JSON, drop=st.booleans())
def test_any_error_bar_may_hold_anything(name, value, drop):
    altered = json.loads(json.dumps(VALID))
    if drop:
        del altered["stderr"][name]
    else:
        altered["stderr"][name] = value
    try:
        CreditReport.from_dict(altered)
    except ReportFormatError:
        return


@QUIET
@given(content=st.binary(max_size=60))
def test_any_bytes_may_stand_in_the_file(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "file.json"
    path.write_bytes(content)
    for read in (read_reports, CreditReport.from_json):
        try:
            read(path)
        except ReportFormatError:
            continue


NUMBER = st.floats() | st.sampled_from([1e308, -1e300, 5e-324, 10**300, None, -1])


@pytest.mark.slow
@settings(QUIET, max_examples=25)
@given(data=st.data())
def test_what_passes_for_a_report_can_be_shown_in_every_form(data):
    def drawn(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: drawn(part) for name, part in value.items()}
        if isinstance(value, list):
            return [drawn(part) for part in value]
        kept = isinstance(value, bool | str) or value is None
        return value if kept or data.draw(st.booleans()) else data.draw(NUMBER)

    shown = ("credit", "gain", "nonlinearity", "r2", "rank", "stderr", "total", "volumes", "effects")
    altered = json.loads(json.dumps(WITH_EFFECTS))
    altered |= {name: drawn(altered[name]) for name in data.draw(st.sets(st.sampled_from(shown)))}
    altered |= {"notes": [data.draw(st.text())], "run": data.draw(st.text())}
    try:
        report = CreditReport.from_dict(altered)
    except ReportFormatError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # figures warn of overflow and of letters they lack
        for form in (str, CreditReport.to_frame, to_markdown, lambda one: to_html([one, one])):
            form(report)
        str(as_text(changes_table(report, report, "credit")))
    assert json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("field", ["credit", "volumes", "parts", "folds", "run", "effects"])
def test_lists_within_lists_without_end_are_refused(field):
    deep: Any = []
    for _ in range(20_000):
        deep = [deep]
    with pytest.raises(ReportFormatError):
        CreditReport.from_dict({**VALID, field: deep})
    while deep:  # or taking it apart would be a recursion of its own
        deep = deep[0]


def test_ctrl_c_while_a_file_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    write_reports([REPORT], out)
    before = out.read_bytes()

    def interrupted(self: Path, text: str, **more: Any) -> None:
        self.write_bytes(text[:100].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_koopman.report.files.to_html", str)
    monkeypatch.setattr(Path, "write_text", interrupted)
    for write in (write_reports, lambda reports, path: reports[0].to_json(path)):
        with pytest.raises(KeyboardInterrupt):
            write([REPORT, REPORT], out)
    with pytest.raises(KeyboardInterrupt):
        write_reports([REPORT], out, "html")
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_report_stored_by_0_1_is_read():
    columns = ("credit", "gain", "nonlinearity", "sensitivity", "r2", "chain_r2", "rank")
    stored = {
        "format": 1,
        "components": ["stem", "head"],
        "widths": [3, 2],
        **{name: [0.5, None] for name in (*columns, "variance_kept", "tikhonov", "condition")},
        "stable": [True, False],
        "stderr": {name: [0.25, None] for name in columns},
        "volumes": [[0.5], [None]],
        "directions": 1,
        "n_samples": 100,
        "total": -0.5,
        "total_stderr": None,
        "notes": ["a note"],
        "step": 3,
        "excitation": 0.0,
        "a key of another version": [],
    }
    report = CreditReport.from_dict(json.loads(json.dumps(stored)))
    assert (report.label, report.widths, report.total) == (" at step 3", (3, 2), -0.5)
    assert (report.folds, report.delay, report.run, report.effects) == (5, 1, "", None)
    assert report.doubts == ((), ("r2", "chain_r2", "lost"))
    assert report.stderr["gain"].tolist()[:1] == [0.25]
    # Before there was `stable`, nothing said whether a credit may be believed.
    del stored["stable"]
    with pytest.raises(ReportFormatError, match="field stable: Field required"):
        CreditReport.from_dict(stored)
