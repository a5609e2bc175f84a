"""The page on migration says what is so: its second column runs, its first does no longer."""

import re
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import pytest
from small import batches, network, save

import lightning_koopman
from lightning_koopman.cli.main import main

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))


def pairs(section: str) -> list[tuple[str, str]]:
    """Return what each row of a section's tables names first, before and now."""
    return re.findall(r"^\| `([^`]+)`[^|]* \| `([^`]+)`.*\|$", SECTIONS[section], flags=re.M)


@pytest.fixture
def names(tmp_path, monkeypatch, report):
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    save(tmp_path / "1.ckpt", 1)
    found = {name: getattr(lightning_koopman, name) for name in lightning_koopman.__all__}
    data = {"net": network(), "data": batches(), "report": report, "run": lambda model, batch: None}
    return found | data | {"replace": replace}


@pytest.mark.filterwarnings("ignore:.* is now component_effects:FutureWarning")
@pytest.mark.parametrize(("before", "now"), pairs("Python"))
def test_what_is_written_today_runs_and_what_was_written_then_does_not(before, now, names):
    # Names that are gone are asked for as a user would, by import.
    asked = [name for name in ("intervene", "predict_effects") if name in before]
    then = "".join(f"from lightning_koopman import {name}; " for name in asked) + before
    with pytest.raises((TypeError, ValueError, ImportError, AttributeError)):
        exec(then, names)
    exec(now, names)


@pytest.mark.parametrize(("before", "now"), pairs("Command line"))
def test_commands_of_today_are_known_and_those_of_then_are_not(before, now, capsys):
    for words, known in ((before.split(), False), (now.split(), True)):
        with pytest.raises(SystemExit):
            main([words[0], "--help"])
        told = capsys.readouterr()
        flag, value = words[1:]
        choices = f"{flag} {{auto,json,csv,html}}"
        found = flag in re.findall(r"--[\w.]+", told.out)
        assert (value in choices if choices in told.out else found) is known, words
