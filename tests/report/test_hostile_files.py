"""Reports and checkpoints by others: nothing they hold is run, opened or shown as markup."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import warm
from small import batches, network, save

from lightning_koopman import component_effects
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


@pytest.fixture
def project(tmp_path):
    (tmp_path / "hostile_user.py").write_text(Path(small.__file__).read_text())
    for name in ("evil", "bystander"):
        (tmp_path / f"{name}.py").write_text("network = None")
    (tmp_path / "audited.py").write_text(AUDIT)
    (tmp_path / "out").mkdir()
    (tmp_path / "secret.txt").write_text("not to be read")
    # A checkpoint may name any path or class; only tensors and the step are of use here.
    named = {
        "hyper_parameters": {"_class_path": "evil.Model", "data_dir": "../secret.txt"},
        "datamodule_hyper_parameters": {"root": "secret.txt", "_instantiator": "evil"},
        "callbacks": {"ModelCheckpoint": {"dirpath": "../elsewhere", "best_model_path": "secret.txt"}},
    }
    for step in (1, 2):
        save(tmp_path / f"{step}.ckpt", step, **named)
    return tmp_path


GIVEN = ["--model=hostile_user:network", "--data=hostile_user:batches"]
NOTHING = "CODE 0 OUTSIDE []"


def run(project: Path, *arguments: str) -> str:
    done = warm.run([project / "audited.py", *arguments], project, timeout=120)
    assert "CODE" in done.stdout, done.stderr[-2000:]
    return done.stdout[done.stdout.index("CODE") :].strip()


@pytest.fixture
def hostile(report):
    """A report that names paths and classes wherever it can."""
    options = {"model": "evil:Model", "data": "evil:data"}
    source = {"path": "../secret.txt", "size": 3, "modified_ns": 0, "step": 1, "options": options}
    return report.to_dict() | {"run": "../../elsewhere", "source": source, "step": 1}


@pytest.mark.slow
def test_no_path_in_a_report_is_followed_outside_the_output_folder(project, hostile):
    names = {"components": ["../../a", "/etc/passwd"], "parts": {"../../a": ["/b"]}, "notes": ["../c"]}
    # The second claims to be a checkpoint that is really there, measured alike, in a run of its own.
    (project / "out" / "r.json").write_text(json.dumps([hostile | names, hostile | {"step": 2}]))
    given = [*GIVEN, "--ckpt=*.ckpt"]
    assert run(project, "evaluate", *given, "--out=out/r.json", "--logdir=out/tb") == NOTHING
    known = json.loads((project / "out" / "r.json").read_text())
    assert [entry["run"] for entry in known] == ["", ""]
    # Known reports now, with the run of each altered: it is the files' own that counts.
    altered = [entry | {"run": "../../elsewhere"} for entry in known]
    (project / "out" / "r.json").write_text(json.dumps(altered))
    assert run(project, "evaluate", *given, "--out=out/r.json", "--logdir=out/tc") == NOTHING
    assert len(list((project / "out" / "tc").glob("events*"))) == 1


@pytest.mark.slow
def test_commands_write_the_file_named_and_nothing_else(project, hostile):
    (project / "out" / "r.json").write_text(json.dumps([hostile, hostile | {"step": 2}]))
    linear = ["--max-drop=9", "--allow-larger", "--out=out/linear.ckpt"]
    commands = (
        ["report", "out/r.json", "--out=out/page.html"],
        ["report", "out/r.json", "--out=out/page.csv"],
        ["merge", "--reports+=out/r.json", "--out=out/all.json"],
        ["compare", "out/r.json", "out/r.json"],
        ["compare", "1.ckpt", "2.ckpt", *GIVEN],
        ["components", GIVEN[0]],
        ["evaluate", *GIVEN, "--ckpt=1.ckpt"],
        ["linearize", *GIVEN, "--ckpt=1.ckpt", *linear],
        ["effects", *GIVEN, "--ckpt=1.ckpt", "--out=out/i.json", "--figure=out/i.png"],
    )
    words = [word for command in commands for word in ("THEN", *command)]
    assert run(project, *words[1:]) == NOTHING
    written = {path.name for path in (project / "out").iterdir()} - {"r.json"}
    assert written == {"page.html", "page.csv", "all.json", "linear.ckpt", "i.json", "i.png"}


@pytest.mark.slow
def test_the_audit_sees_what_it_must(project, report):
    write_reports([report], project / "out" / "r.json")
    commands = [
        "report",
        "out/r.json",
        "--out=page.html",
        "THEN",
        "components",
        "--model=bystander:network",
    ]
    found = run(project, *commands)
    assert "'page.html'" in found
    assert "import bystander" in found


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
def predicted(report):
    return replace(report, effects=component_effects(network(), batches(), report))


@pytest.fixture(scope="module")
def benign(predicted):
    """A report, another of the same numbers, and their page."""
    report = predicted
    calls = {"plain": report.parts["0"], "2": report.parts["2"]}
    report = replace(report, components=("plain", "2"), notes=("plain",), run="plain", parts=calls)
    other = replace(report, run="other")
    return report, other, parsed(to_html([report, report, other]))


@pytest.mark.slow
@pytest.mark.parametrize("evil", EVIL)
def test_no_name_or_note_becomes_markup(evil, benign):
    report, other, expected = benign
    calls = {evil: report.parts["plain"], "2": report.parts["2"]}
    altered = replace(report, components=(evil, "2"), notes=(evil,), run=evil, parts=calls)
    found = parsed(to_html([altered, altered, other]))
    assert found.tags == expected.tags
    assert found.scripts == expected.scripts
    assert evil in "".join(found.text)


def test_a_report_with_evil_names_comes_back_as_it_was(tmp_path, report):
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
def test_what_a_file_says_does_nothing_to_a_terminal(evil, report, tmp_path, capsys):
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
def test_no_name_or_note_becomes_a_style(markup, predicted):
    named = {"components": (markup, "2"), "notes": (markup,)}
    effects = replace(predicted.effects, **named)
    report = replace(predicted, **named, parts={}, operators={}, effects=effects)
    assert str(report).count(markup) >= 2, "a row and the note"
    kinds = {name: {markup: np.ones(2)} for name in ("values", "stderr")}
    effects = replace(effects, how={markup: "measured"}, metric={}, doubts={}, **kinds)
    assert str(effects).count(markup) == 3
