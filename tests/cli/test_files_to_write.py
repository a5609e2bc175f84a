"""Files that could not be written are refused before anything else is looked at."""

import os

import pytest

from lightning_koopman.cli.commands import check_writable
from lightning_koopman.cli.main import main

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
