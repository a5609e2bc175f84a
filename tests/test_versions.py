"""The version is said once, and what pyproject.toml claims to run with is what CI runs with."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_oldest_versions_claimed_are_the_ones_that_ci_runs():
    tomllib = pytest.importorskip("tomllib", reason="Python below 3.11 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    claimed = {
        re.match(r"[\w-]+", entry)[0]: entry.partition(">=")[2] for entry in project["dependencies"]
    }
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    run = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert run.pop("pytorch-lightning") == run["lightning"]
    assert claimed.keys() == run.keys()
    for name, version in claimed.items():
        # 2.5 in the one file may be 2.5.0 in the other.
        assert (run[name] + ".0.0").startswith(version + "."), name
    assert project["requires-python"] == ">=3.10"


def test_the_version_is_the_same_wherever_it_is_said():
    said = {
        "pyproject.toml": r'^version = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
        "CHANGELOG.md": r"^## \[(\d.*)\] - \d{4}-\d\d-\d\d$",
    }
    found = {
        file: re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), flags=re.M)[1]
        for file, pattern in said.items()
    }
    assert len(set(found.values())) == 1, found
