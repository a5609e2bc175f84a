"""Files that could not be written are refused before anything else is looked at."""

import contextlib
import csv
import json
import os
import time
from pathlib import Path

import pytest
import small
from small import save

from lightning_koopman.cli.commands import check_writable
from lightning_koopman.cli.main import main
from lightning_koopman.report import files

NAMED = ["--model=nowhere:Net", "--data=nowhere:batches"]
TRAINED = [*NAMED, "--ckpt=missing.ckpt"]
COMMANDS = {
    "report": (["missing.json"], ["out"]),
    "merge": (["--reports+=missing.json"], ["out"]),
    "evaluate": (TRAINED, ["out", "reference"]),
    "effects": (TRAINED, ["out", "figure"]),
    "drop": (TRAINED, ["out", "figure"]),
    "linearize": (TRAINED, ["out", "figure"]),
    "bits": (TRAINED, ["out", "figure"]),
    "drift": (["missing.safetensors", *TRAINED], ["out", "figure"]),
}
OPTIONS = [(command, option) for command, (_, options) in COMMANDS.items() for option in options]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_a_folder_that_does_not_exist_is_named_first(command, option, capsys):
    given, _ = COMMANDS[command]
    assert main([command, *given, f"--{option}=no/such/file.png"]) == 1
    assert capsys.readouterr().err == (
        "error: no/such/file.png cannot be written, for there is no folder no/such; make it first\n"
    )
    # With one that can be written, something else is missing.
    more = [f"--{option}=file.png"]
    assert main([command, *given, *more]) == 1
    assert "file.png cannot" not in capsys.readouterr().err


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"cannot be written, for it is a folder; name a file"):
        check_writable("r.json", str(tmp_path))


def test_a_folder_of_somebody_else_is_refused(monkeypatch):
    # Whoever runs the tests may be allowed to write anywhere.
    monkeypatch.setattr(os, "access", lambda folder, how: how != os.W_OK | os.X_OK)
    told = r"r.json cannot be written, for no file can be made in \.; name another folder"
    with pytest.raises(PermissionError, match=told):
        check_writable(None, "r.json")


def test_figures_have_a_name_that_matplotlib_draws(tmp_path):
    with pytest.raises(ValueError, match=r"f\.json is no figure that can be drawn; .*, \.png, "):
        check_writable("r.xyz", figure="f.json")
    check_writable("r.xyz", figure="f.PNG")
    check_writable(str(tmp_path / "f"), figure="f")


@pytest.fixture
def reports(user_module):
    user_module("kinds_code", "")
    save(Path("a.ckpt"), 7)
    named = ["--model=kinds_code:network", "--data=kinds_code:batches", "--ckpt=a.ckpt"]
    assert main(["evaluate", *named, "--out=r.json", "--reference=r.safetensors"]) == 0
    return named


def kind(path: str) -> str:
    """What a file holds, by standard readers."""
    text = Path(path).read_text()
    if text.startswith("<!doctype html>"):
        return "html"
    with contextlib.suppress(ValueError):
        return type(json.loads(text)).__name__
    rows = list(csv.DictReader(text.splitlines()))
    return "csv" if [row["component"] for row in rows] == ["0", "2"] else "?"


def test_files_are_of_the_kind_that_their_names_end_in(reports):
    commands = {
        "evaluate": reports,
        "report": ["r.json"],
        "merge": ["--reports+=r.json"],
        "effects": reports,
        "drift": ["r.safetensors", *reports],
    }
    found = {}
    for command, given in commands.items():
        for ending in ("json", "csv", "html", "txt"):
            if (command, ending) == ("drift", "html"):
                continue
            path = f"{command}.{ending}"
            assert main([command, *given, f"--out={path}"]) == 0
            found[command, ending] = kind(path)
    evaluated = {"json": "list", "csv": "csv", "html": "html", "txt": "list"}
    expected = {
        "evaluate": evaluated,
        "report": {**evaluated, "txt": "html"},
        "merge": evaluated,
        "effects": {**evaluated, "json": "dict", "txt": "dict"},
        "drift": {"json": "list", "csv": "csv", "txt": "csv"},
    }
    assert found == {(c, ending): kind for c, row in expected.items() for ending, kind in row.items()}


@pytest.mark.parametrize(("seconds", "most"), [(0.0, 9), (0.4, 4)])
def test_files_that_take_long_are_not_written_behind_each_checkpoint(
    user_module, monkeypatch, seconds, most
):
    user_module("often_code", Path(small.__file__).read_text())
    for step in range(8):
        save(Path(f"ckpt/{step}.ckpt"), step, 1 + step)
    written = []

    def slowly(reports, path):
        written.append(len(reports))
        time.sleep(seconds)
        files.write_reports(reports, path)

    monkeypatch.setattr(files, "write_with_known", slowly)
    options = ["--model=often_code:network", "--data=often_code:batches", "--ckpt=ckpt"]
    assert main(["evaluate", *options, "--out=r.json"]) == 0
    assert written[0] == 1
    assert len(written) <= most
    assert len(written) > 4 or seconds
    assert [report.step for report in files.read_reports("r.json")] == [*range(8)]


@pytest.mark.parametrize("command", ["drift", "drop", "linearize", "bits"])
def test_no_page_is_made_of_numbers(reports, capsys, command):
    reference = ["--reference=r.safetensors"] if command == "drift" else []
    assert main([command, *reference, *reports, "--out=x.html"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "x.html would be a page, and pages are made of reports alone; end its name in .json" in told
    assert not Path("x.html").exists()


def test_names_in_brackets_are_printed_as_they_are(reports, capsys):
    for _ in range(2):
        assert main(["evaluate", *reports, "--out=r[bold].json"]) == 0
    told = capsys.readouterr()
    assert "Written to r[bold].json" in told.out
    assert "1 of 1 report taken over from r[bold].json" in told.err
    assert main(["merge", "r[bold].json", "--out=m[i].json"]) == 0
    assert "1 report in m[i].json" in capsys.readouterr().out


def test_reports_are_not_read_from_pages(reports, capsys):
    told = "error: x.html is not JSON: give the .json file that evaluate or to_json wrote{}, not a page"
    Path("x.html").touch()
    assert main(["report", "x.html"]) == 1
    assert told.format("") in capsys.readouterr().err
    assert main(["evaluate", *reports, "--out=x.html"]) == 0
    assert main(["report", "x.html"]) == 1
    assert told.format(", as x.html.json") in capsys.readouterr().err
    assert main(["report", "x.html.json"]) == 0


def test_decisions_write_tables_as_their_names_end(reports):
    for ending in ("json", "CSV"):
        assert main(["linearize", *reports, "--max-drop=9", "--allow-larger", f"--out=d.{ending}"]) == 0
    assert kind("d.json") == "list"
    assert Path("d.CSV").read_text().startswith(",".join(json.loads(Path("d.json").read_text())[0]))
