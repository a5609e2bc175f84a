"""The command that holds a checkpoint against a reference, and those that lead to it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_koopman.cli.main import main
from lightning_koopman.report.reference_file import read_reference

CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

def data():
    return torch.randn(400, 4, generator=torch.Generator().manual_seed(0)).split(100)

def others():
    return torch.randn(400, 4, generator=torch.Generator().manual_seed(1)).split(100)
"""


@pytest.fixture
def project(user_module: Callable[..., Path]) -> Path:
    """A module, and checkpoints before and after one part was turned round."""
    folder = user_module("drift_code", CODE)
    import drift_code  # type: ignore[import-not-found]

    network = drift_code.net()
    torch.save({"state_dict": network.state_dict(), "global_step": 10}, "before.ckpt")
    with torch.no_grad():
        network[2].weight *= -1
    torch.save({"state_dict": network.state_dict(), "global_step": 20}, "after.ckpt")
    return folder


def evaluate(*more: str) -> int:
    return main(["evaluate", "--model=drift_code:net", "--data=drift_code:data", *more])


def drift(*more: str) -> int:
    return main(["drift", *more, "--model=drift_code:net", "--data=drift_code:others"])


def test_from_a_reference_to_the_part_that_broke(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--ckpt=before.ckpt", "--reference=r.safetensors") == 0
    assert "Written to r.safetensors" in capsys.readouterr().out
    made = ["--figure=d.png", "--out=d.csv", "--max-samples=300"]
    assert drift("r.safetensors", "--ckpt=after.ckpt", *made) == 0
    printed = capsys.readouterr().out
    assert "Written to d.png" in printed
    assert "Drift at step 20 since step 10, 300 samples" in printed
    assert " ".join(printed.split()).endswith("or put them back and measure again.")
    assert (project / "d.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((project / "d.csv").read_text().splitlines()))
    assert [row["component"] for row in rows] == ["0", "2", "4"]
    assert max(rows, key=lambda row: float(row["drift"]))["component"] == "2"


def test_the_reference_is_that_of_the_last_checkpoint(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--ckpt=*.ckpt", "--reference=r.safetensors", "--out=r.json") == 0
    assert read_reference("r.safetensors").step == 20
    assert evaluate("--ckpt=*.ckpt", "--reference=r.safetensors", "--out=r.json") == 1
    assert "taken over from r.json, which holds no reference; add --fresh" in capsys.readouterr().err
    assert evaluate("--ckpt=*.ckpt", "--reference=r.safetensors", "--out=r.json", "--fresh") == 0


def test_a_reference_without_errors_is_refused_before_anything_is_measured(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--ckpt=none.ckpt", "--reference=r.safetensors", "--options.errors=false") == 1
    assert "r.safetensors is made of what errors are" in capsys.readouterr().err


def test_a_file_that_holds_no_step_says_none(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("before", "after"):
        torch.save(torch.load(f"{name}.ckpt")["state_dict"], f"{name}.pt")
    assert evaluate("--ckpt=before.pt", "--reference=r.safetensors") == 0
    assert read_reference("r.safetensors").step is None
    capsys.readouterr()
    assert drift("r.safetensors", "--ckpt=after.pt") == 0
    assert capsys.readouterr().out.strip().startswith("Drift, 400 samples")


def test_where_the_last_checkpoint_fails_its_failure_is_told_and_no_reference_written(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = torch.load("after.ckpt", weights_only=True)
    del last["state_dict"]["2.bias"]
    torch.save({**last, "global_step": 30}, "later.ckpt")
    assert evaluate("--ckpt=*.ckpt", "--reference=r.safetensors") == 1
    told = capsys.readouterr().err
    assert "later.ckpt does not fit Sequential: it lacks '2.bias'" in told
    assert "taken over" not in told
    assert not (project / "r.safetensors").exists()


def test_what_is_no_reference_is_refused_before_a_model_is_built(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drift("before.ckpt", "--ckpt=missing.ckpt") == 1
    assert "error: before.ckpt holds no reference" in capsys.readouterr().err


def test_compare_shows_the_drift_of_checkpoints_and_says_how_for_reports(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["--model=drift_code:net", "--data=drift_code:data"]
    assert main(["compare", "before.ckpt", "after.ckpt", *named]) == 0
    printed = capsys.readouterr().out
    assert printed.index("Change of credit") < printed.index("Drift at step 20 since step 10")
    assert "Look at 2 (modules 3) first" in " ".join(printed.split())
    assert evaluate("--ckpt=*.ckpt", "--out=r.JSON") == 0
    assert main(["compare", "r.JSON", "r.JSON"]) == 0
    assert "evaluate --reference FILE" in capsys.readouterr().out
