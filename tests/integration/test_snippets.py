"""Tutorial and README run as they stand and print what they say; the recipes' snippets run.

With ``KEEP_SCREENSHOTS=docs/images`` in the environment the README's picture is drawn anew.
"""

import os
import re
import shlex
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import pytest
import torch
import warm

from lightning_koopman.cli.main import main

ROOT = Path(__file__).parents[2]
NUMBER = r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?"
# Told by the clock, or by the machine.
UNSTEADY = ("ms a batch",)
# Of two parts alike in worth, the machine's last bits decide which one a sentence is about.
PART = r"\b(?:body|net|head)(?:\.\d+)?(?=\W|$)"


class Snippet(NamedTuple):
    """One fenced block of a page."""

    language: str
    title: str | None
    text: str


def snippets(page: str) -> list[Snippet]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+)(?: title=\"(.+?)\")?\n(.*?)^```$", text, flags=re.M | re.S)
    return [Snippet(language, title or None, body) for language, title, body in found]


class Number(NamedTuple):
    """A printed number and how far that of another processor's training may be from it."""

    value: float
    tolerance: float


def numbers(printed: str) -> Generator[Number, None, None]:
    """Read all numbers of a line; an error is a number too, and widens what its value may be."""
    for text, error, percent in re.findall(rf"({NUMBER})(?:±({NUMBER})(%?))?", printed):
        value, spread = float(text.replace(",", "")), float(error or 0)
        share = abs(value) / 100 if percent else 1
        yield Number(value, max(0.02, 0.02 * abs(value), 3 * spread * share))
        if error:
            last_digit = 10.0 ** -len(error.partition(".")[2])
            # A measurement's own error is known to a factor of two.
            yield Number(spread, spread + 1.01 * last_digit)


def rows(printed: str) -> dict[str, list[Number]]:
    """Read the numbers of each line that begins with words, by these words."""
    found = {}
    for line in printed.splitlines():
        parts = re.match(rf"\s*({PART}|[A-Za-z]\w*(?: [a-z]\w*)*)\s+(.*?{NUMBER}.*)$", line)
        if parts is not None and not parts[1].startswith(UNSTEADY):
            found[parts[1]] = list(numbers(re.sub(PART, "", parts[2])))
    return found


def run(command: str, folder: Path) -> str:
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    printed = ""
    for line in command.replace("\\\n", " ").splitlines():
        # A line may change nothing but which program runs on which words.
        assert not re.search(r"[|&;<>$`(){}]", line), line
        words = shlex.split(line)
        done = warm.run(words[words[0] == "python" :], folder, env)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
        printed += done.stdout + done.stderr
    return printed


def lines(printed: str) -> set[str]:
    """Return the lines of what was printed, without their numbers and however wide they are."""
    bare = re.sub(NUMBER, "#", re.sub(PART, "part", re.sub(r"─+", "─", printed)))
    bare = re.sub(r"^(\s*part .*?)(yes|first)?\s*$", r"\1", bare, flags=re.M)
    # The clock decides, in so small a network.
    bare = bare.replace("LARGER (time): ", "")
    return {" ".join(line.split()) for line in bare.splitlines()} - {""}


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize(("page", "least"), [("docs/tutorial.md", 80), ("README.md", 40)])
def test_a_page_runs_as_it_stands_and_prints_what_it_says(page, least, tmp_path):
    printed, compared, file, tried = "", 0, None, False
    for snippet in snippets(page):
        if page == "README.md" and snippet.language == "python":
            continue  # runs below
        if snippet.language == "python":
            # A block without a title is appended to the file before it.
            file = tmp_path / (snippet.title or (file.name if file else ""))
            previous = file.read_text() if snippet.title is None else ""
            file.write_text(previous + snippet.text)
            if file.name != "train.py":
                printed = run(f"python {file.name}", tmp_path)
                tried = True
        elif snippet.language == "bash":
            # What installs the package and tests it, CI runs.
            command = re.sub(r"^pip install .*? \. && ", "", snippet.text.replace("&& pytest", ""))
            command = re.sub(r"^(pip|tensorboard) .*\n", "", command, flags=re.M)
            printed, tried = (run(command, tmp_path), True) if command else (printed, tried)
        elif snippet.language == "text":
            assert tried
            expected, given = rows(snippet.text), rows(printed)
            for name, those in expected.items():
                assert len(given.get(name, ())) == len(those), name
                for number, (value, tolerance) in zip(given[name], those, strict=True):
                    assert number.value == pytest.approx(value, abs=tolerance), name
                compared += len(those)
            assert lines(snippet.text) - lines(printed) == set(), "words that are printed no longer"
    assert compared > least
    if page == "README.md" and (folder := os.environ.get("KEEP_SCREENSHOTS")):
        (Path(folder) / "credits.png").write_bytes((tmp_path / "koopman_demo/credits.png").read_bytes())


def test_every_flag_of_every_command_in_the_documentation_exists(capsys):
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    asked: dict[str, set[str]] = {}
    for page in pages:
        text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
        for command, rest in re.findall(r"lightning-koopman ([a-z]+)\b([^`\n|]*)", text):
            asked.setdefault(command, set()).update(re.findall(r"--[a-z_.-]+", rest))
    assert len(asked) > 5
    for command, flags in asked.items():
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        known = set(re.findall(r"--[\w.]+", capsys.readouterr().out))
        assert {"--" + flag[2:].replace("-", "_") for flag in flags} <= known, command


def test_the_reader_of_printed_rows_tells_numbers_apart():
    table = " body.0   0.791±0.010  60/64\n head     1.0 → 2,762  2.6±2%\n ms a batch  3\n\n"
    read = rows(table + "the cheapest, body.0, costs 0.8±0.1\n 4 of 4 reports")
    assert {name: [number.value for number in those] for name, those in read.items()} == {
        "body.0": [0.791, 0.01, 60, 64],
        "head": [1.0, 2762, 2.6, 2],
        "the": [0.8, 0.1],
    }
    assert [number.tolerance for number in read["head"]] == pytest.approx([0.02, 55.24, 0.156, 3.01])


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """What the recipes take for granted: the tutorial's classes, a network and its data."""
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    names: dict[str, Any] = {"__name__": "snippets"}
    exec(next(s.text for s in snippets("docs/tutorial.md") if s.title == "train.py"), names)
    exec("from lightning_koopman import *\nfrom lightning_koopman import credit_report", names)
    torch.manual_seed(0)
    names["model"] = names["Net"]().eval()
    data = names["datamodule"] = names["Data"]()
    data.setup("fit")
    names["loader"], names["batches"] = data.val_dataloader(), data.train_dataloader()
    names["other_loader"] = names["loader"]
    names["held_out"] = names["loader"]
    return names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("page", "least"), [("docs/how-to.md", 3), ("README.md", 1)])
def test_every_python_snippet_runs(page, least, prepared):
    found = [s.text for s in snippets(page) if s.language == "python"]
    assert len(found) >= least
    if any("EMAWeightAveraging" in text for text in found):
        pytest.importorskip(
            "lightning.pytorch.callbacks.weight_averaging",
            reason="this Lightning has no WeightAveraging",
        )
    for text in found:
        # Two processes would each run this test; test_distributed.py has its own.
        if "devices=2" in text:
            continue
        text = text.replace("max_epochs=50", "max_epochs=2, accelerator='cpu'")
        exec(compile(text, page, "exec"), prepared)
