"""What is run on a GPU still runs: the benchmark, on small networks and the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_benchmark_writes_its_page(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    command = [sys.executable, str(PROGRAM), "--tiny", str(page)]
    subprocess.run(command, check=True, timeout=500, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    known = {row[0]: row[-1] for row in rows}
    kinds = {f"{name}{half}" for name in ("ResNet-50", "ViT-B/16") for half in ("", ", bf16")}
    assert kinds <= set(known)
    assert float(known["gloo against none: largest difference of a credit"]) < 1e-9
    assert rows[-1][0] == "drift"
