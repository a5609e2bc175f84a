"""Reports and checkpoints by others: nothing they hold is run, opened or shown as markup."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NET_AND_DATA
from torch import nn

from lightning_koopman import CreditReport, component_effects, credit_report
from lightning_koopman.cli.main import main
from lightning_koopman.report.files import read_reports, write_reports
from lightning_koopman.report.pages import to_html

# Tells every file that is opened for writing, made, moved or deleted, and every module imported late.
AUDIT = """
import os, sys, tempfile
touched, watching = [], False
def hook(event, args):
    if not watching:
        return
    if event == "open" and isinstance(args[0], str):
        writes = (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if writes or "secret" in args[0]:
            touched.append(args[0])
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink"):
        touched.extend(a for a in args if isinstance(a, str))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
        touched.append(event)
sys.addaudithook(hook)
from lightning_koopman.cli.main import main
import matplotlib.pyplot, tensorboard.summary, torch.utils.tensorboard
tempfile.gettempdir()  # the standard library tries by a file of its own where temporary files may go
watching = True
commands = " ".join(sys.argv[1:]).split(" THEN ")
code = max(main(command.split()) for command in commands)
watching = False
touched += ["import " + name for name in ("evil", "bystander") if name in sys.modules]
inside = os.path.realpath("out") + os.sep
outside = [t for t in touched if not os.path.realpath(t).startswith(inside) and t != os.devnull
           and not t.endswith((".pyc", "fontlist")) and "__pycache__" not in t
           and "torchinductor_" not in t]
print("CODE", code, "OUTSIDE", sorted(set(outside)))
"""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def batches() -> list[torch.Tensor]:
    return list(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).split(20))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "hostile_user.py").write_text(NET_AND_DATA)
    for name in ("evil", "bystander"):
        (tmp_path / f"{name}.py").write_text("net = None")
    (tmp_path / "audited.py").write_text(AUDIT)
    (tmp_path / "out").mkdir()
    (tmp_path / "secret.txt").write_text("not to be read")
    for step in (1, 2):
        # A checkpoint may name any path or class; only tensors and the step are of use here.
        content = {
            "state_dict": network().state_dict(),
            "global_step": step,
            "hyper_parameters": {"_class_path": "evil.Model", "data_dir": "../secret.txt"},
            "datamodule_hyper_parameters": {"root": "secret.txt", "_instantiator": "evil"},
            "callbacks": {
                "ModelCheckpoint": {"dirpath": "../elsewhere", "best_model_path": "secret.txt"}
            },
        }
        torch.save(content, tmp_path / f"{step}.ckpt")
    return tmp_path


def run(project: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "audited.py", *arguments],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CODE" in done.stdout, done.stderr[-2000:]
    return done.stdout[done.stdout.index("CODE") :].strip()


def hostile(report: CreditReport, **more: Any) -> dict[str, Any]:
    source = {
        "path": "../secret.txt",
        "size": 3,
        "modified_ns": 0,
        "step": 1,
        "options": {"model": "evil:Model", "data": "evil:data"},
    }
    return report.to_dict() | {"run": "../../elsewhere", "source": source} | more


@pytest.mark.slow
def test_no_path_in_a_report_is_followed_outside_the_output_folder(project: Path) -> None:
    report = credit_report(network(), batches(), step=1)
    names = {"components": ["../../a", "/etc/passwd"], "parts": {"../../a": ["/b"]}, "notes": ["../c"]}
    first = hostile(report, **names)
    # The second claims to be a checkpoint that is really there, measured alike, in a run of its own.
    (project / "out" / "r.json").write_text(json.dumps([first, hostile(report, step=2)]))
    given = ["--model=hostile_user:net", "--data=hostile_user:data", "--ckpt=*.ckpt"]
    assert run(project, "evaluate", *given, "--out=out/r.json", "--logdir=out/tb") == "CODE 0 OUTSIDE []"
    known = json.loads((project / "out" / "r.json").read_text())
    assert [entry["run"] for entry in known] == ["", ""]
    # Known reports now, with the run of each altered: it is the files' own that counts.
    altered = [entry | {"run": "../../elsewhere"} for entry in known]
    (project / "out" / "r.json").write_text(json.dumps(altered))
    assert run(project, "evaluate", *given, "--out=out/r.json", "--logdir=out/tc") == "CODE 0 OUTSIDE []"
    assert len(list((project / "out" / "tc").glob("events*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["html", "csv"])
def test_showing_reports_writes_the_file_named_and_nothing_else(project: Path, kind: str) -> None:
    report = credit_report(network(), batches(), step=1)
    (project / "out" / "r.json").write_text(json.dumps([hostile(report), hostile(report, step=2)]))
    given = ["out/r.json", f"--out=out/page.{kind}", f"--format={kind}"]
    assert run(project, "report", *given) == "CODE 0 OUTSIDE []"
    assert sorted(p.name for p in (project / "out").iterdir()) == [f"page.{kind}", "r.json"]
    merged = ["--reports+=out/r.json", "--out=out/all.json"]
    assert run(project, "merge", *merged) == "CODE 0 OUTSIDE []"


@pytest.mark.slow
def test_the_audit_sees_what_it_must(project: Path) -> None:
    report = credit_report(network(), batches(), step=1)
    write_reports([report], project / "out" / "r.json")
    found = run(project, "report", "out/r.json", "--out=page.html")
    assert "'page.html'" in found
    found = run(project, "components", "--model=bystander:net")
    assert "import bystander" in found


@pytest.mark.slow
def test_only_what_the_user_named_is_imported(project: Path) -> None:
    assert run(project, "components", "--model=hostile_user:net") == "CODE 0 OUTSIDE []"
    given = ["--model=hostile_user:net", "--data=hostile_user:data", "--ckpt=1.ckpt"]
    assert run(project, "evaluate", *given) == "CODE 0 OUTSIDE []"


class Tags(HTMLParser):
    """Every tag, attribute and script of a page, without its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        plain = [(k, v) for k, v in attrs if k not in ("src", "data-value", "alt")]
        self.tags.append((tag, plain, sorted(k for k, _ in attrs)))
        self._in_script = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")
        self._in_script = False

    def handle_data(self, data: str) -> None:
        (self.scripts if self._in_script else self.text).append(data)


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    return tags


EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</td></tr></table><iframe src=//x>",
    "&lt;b&gt; &amp;lt;",
    "</script><script>alert(1)//",
    "</title><svg/onload=alert(1)>",
    "<!--",
    "{{7*7}}${7*7}",
]


@pytest.fixture(scope="module")
def benign() -> tuple[CreditReport, CreditReport, Tags]:
    """A report, another of the same numbers, and their page."""
    report = replace(
        credit_report(network(), batches()), effects=component_effects(network(), batches())
    )
    calls = {"plain": report.parts["0"], "2": report.parts["2"]}
    report = replace(report, components=("plain", "2"), notes=("plain",), run="plain", parts=calls)
    other = replace(report, run="other")
    return report, other, parsed(to_html([report, report, other]))


@pytest.mark.slow
@pytest.mark.parametrize("evil", EVIL)
def test_no_name_or_note_becomes_markup(
    evil: str, benign: tuple[CreditReport, CreditReport, Tags]
) -> None:
    report, other, expected = benign
    calls = {evil: report.parts["plain"], "2": report.parts["2"]}
    altered = replace(report, components=(evil, "2"), notes=(evil,), run=evil, parts=calls)
    found = parsed(to_html([altered, altered, other]))
    assert found.tags == expected.tags
    assert found.scripts == expected.scripts
    assert evil in "".join(found.text)


def test_a_report_with_evil_names_comes_back_as_it_was(tmp_path: Path) -> None:
    report = credit_report(network(), batches())
    report = replace(report, components=(EVIL[0], EVIL[1]), notes=tuple(EVIL), parts={}, operators={})
    write_reports([report], tmp_path / "r.json")
    found = read_reports(tmp_path / "r.json")[0]
    assert found.components == (EVIL[0], EVIL[1])
    assert found.notes == tuple(EVIL)


UNSHOWABLE = [
    "\x1b[31mred",
    "\x9b31m",
    "ring\x07",
    "back\x08",
    "over\rwritten",
    "\u202ereversed",
    "\ud800",
]


@pytest.mark.parametrize("evil", UNSHOWABLE, ids=ascii)
def test_what_a_file_says_does_nothing_to_a_terminal(
    evil: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = credit_report(network(), batches())
    names = {"components": [evil, "2"], "notes": [evil], "run": evil, "parts": {evil: [evil]}}
    (tmp_path / "r.json").write_text(json.dumps([report.to_dict() | names, report.to_dict()]))
    (read, _) = read_reports(tmp_path / "r.json")
    expected = "".join(c if c.isprintable() else "\ufffd" for c in evil)
    assert read.components[0] == read.notes[0] == read.run == next(iter(read.parts)) == expected
    file = str(tmp_path / "r.json")
    # Figures cannot hold every letter either; drawing them for one case takes seconds enough.
    page = [["report", file, f"--out={file}.html"]] if evil == UNSHOWABLE[-1] else []
    for command in (["report", file], ["compare", file, file], *page):
        assert main(command) == 0
        told = "".join(capsys.readouterr())
        assert all(c.isprintable() or c == "\n" for c in told)


@pytest.mark.parametrize("markup", ["[/bold]", "[red]x", "[link=http://x]y[/link]", "\\[x]"])
def test_no_name_or_note_becomes_a_style(markup: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = replace(
        credit_report(network(), batches()), effects=component_effects(network(), batches())
    )
    named = {"components": (markup, "2"), "notes": (markup,)}
    report = replace(report, **named, parts={}, operators={}, effects=replace(report.effects, **named))
    assert str(report).count(markup) >= 2, "a row and the note"
    effects = replace(report.effects, values={markup: np.ones(2)}, stderr={markup: np.ones(2)})
    assert str(replace(effects, how={markup: "measured"}, metric={}, doubts={})).count(markup) == 3


@pytest.mark.slow
def test_other_commands_follow_no_path_either(project: Path) -> None:
    report = credit_report(network(), batches(), step=1)
    (project / "out" / "r.json").write_text(json.dumps([hostile(report), hostile(report, step=2)]))
    given = ["--model=hostile_user:net", "--data=hostile_user:data"]
    commands = (
        ["compare", "out/r.json", "out/r.json"],
        ["compare", "1.ckpt", "2.ckpt", *given],
        ["linearize", *given, "--ckpt=1.ckpt", "--out=out/linear.ckpt"],
        ["effects", *given, "--ckpt=1.ckpt", "--out=out/i.json", "--figure=out/i.png"],
    )
    words = [word for command in commands for word in ("THEN", *command)]
    assert run(project, *words[1:]) == "CODE 0 OUTSIDE []"
