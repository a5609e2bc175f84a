"""Options from a file, and shell completion."""

import importlib.util
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from small import save

from lightning_koopman.cli.main import main
from lightning_koopman.report.files import read_reports

OPTIONS = {"model": "mine:network", "data": "mine:batches", "ckpt": ["1.ckpt"]}


@pytest.fixture
def project(user_module):
    return save(user_module("mine") / "1.ckpt").parent


def test_options_come_from_a_file_and_the_command_line_wins(project):
    (project / "o.yaml").write_text(
        yaml.safe_dump(OPTIONS | {"out": "r.json", "options": {"seed": 3, "max_dim": 64}})
    )
    assert main(["evaluate", "--config", "o.yaml", "--options.max-dim", "32"]) == 0
    (report,) = read_reports("r.json")
    options = report.source["options"]
    assert (options["seed"], options["max_dim"]) == (3, 32)


def test_the_printed_config_can_be_used(project, capsys):
    given = ["--model=mine:network", "--data=mine:batches", "--ckpt=1.ckpt", "--out=r.json"]
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *given, "--print_config"])
    assert caught.value.code == 0
    (project / "o.yaml").write_text(capsys.readouterr().out)
    assert main(["evaluate", "--config", "o.yaml"]) == 0
    assert len(read_reports("r.json")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (yaml.safe_dump(OPTIONS | {"sed": 3}), "'sed'"),
        (yaml.safe_dump(OPTIONS | {"folds": "many"}), "folds"),
        (None, "does not exist"),
    ],
)
def test_a_bad_config_exits_with_2_and_says_why(project, capsys, text, message):
    if text is not None:
        (project / "o.yaml").write_text(text)
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--config", "o.yaml"])
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_bash_completes_commands_and_options(tmp_path, capsys):
    pytest.importorskip("shtab", reason="shtab is not installed")
    if tuple(map(int, version("jsonargparse").split(".")[:2])) < (4, 53):
        pytest.skip("the extra `completion` asks for jsonargparse 4.53")
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion=shtab-bash"])
    assert caught.value.code == 0
    (tmp_path / "completion.bash").write_text(capsys.readouterr().out)
    for words, expected in (
        (["eval"], "evaluate"),
        (["evaluate", "--options.max"], "--options.max_dim"),
        (["evaluate", "--weights", "av"], "averaged"),
    ):
        assert expected in completed(tmp_path / "completion.bash", words)


def completed(script: Path, words: list[str]) -> list[str]:
    """Ask bash, as it asks when the tab key is pressed."""
    line = ["lightning-koopman", *words]
    code = f"""
source "$1"
COMP_WORDS=({" ".join(line)}); COMP_CWORD={len(words)}; COMP_LINE="{" ".join(line)}"
COMP_POINT=${{#COMP_LINE}}
function=$(complete -p lightning-koopman | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
$function lightning-koopman {words[-1]} x
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    run = subprocess.run(
        ["bash", "-c", code, "bash", str(script)], capture_output=True, text=True, check=False
    )
    return [reply.strip() for reply in run.stdout.split("\n")]


def test_missing_shtab_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--print-completion=shtab-bash"]) == 1
    assert "needs shtab and a newer jsonargparse: pip install -U" in capsys.readouterr().err
