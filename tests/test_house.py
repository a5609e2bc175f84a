"""What is written down twice says the same."""

import json
import re
import runpy
from pathlib import Path

import pytest

import lightning_koopman

ROOT = Path(__file__).parents[1]


def test_make_check_pre_commit_and_ci_run_the_same_checks():
    checks = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    hooks = re.findall(r"entry: ([^,]+),", (ROOT / ".pre-commit-config.yaml").read_text())
    assert checks is not None
    assert [line.strip() for line in checks[1].splitlines()] == hooks
    assert re.search(r"^ *make check$", (ROOT / ".ci" / "run").read_text(), re.M)


def test_the_api_page_lists_the_public_names():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: lightning_koopman\.(\w+)$", page, re.M)) == lightning_koopman.__all__


def test_the_figure_of_the_architecture_shows_what_the_source_holds():
    found = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))["read_architecture"]()
    drawn = json.loads((ROOT / "docs" / "images" / "architecture.json").read_text(encoding="utf-8"))
    stale = "docs/images/architecture.png is stale; run `make figures`"
    assert set(found["lines"]) == set(drawn["lines"]), stale
    assert found["lines"] == pytest.approx(drawn["lines"], rel=0.5), stale
    assert set(found["imports"]) == set(drawn["imports"]), stale
    assert (found["folders"], found["way"]) == (drawn["folders"], drawn["way"]), stale
