"""Devices that are not here, pretended; see ``pretended_device.py`` for what that one refuses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import warm
from torch.utils import backend_registration

SCRIPT = Path(__file__).with_name("pretended_device.py")


pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch lets nobody pretend a device",
)


def run(*arguments: str) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = warm.run([SCRIPT, *arguments], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_on_a_device_without_float64_everything_is_as_on_the_cpu_or_refused() -> None:
    given = run()
    assert "has no float64" in given["effects"]
    assert given.pop("effects").endswith("call model.cpu() first")
    assert len(given) == 7
    # One thread, and the same operations on the same numbers in both places.
    assert given == dict.fromkeys(given, pytest.approx(0.0, abs=1e-9))


@pytest.mark.slow
@pytest.mark.parametrize("float64", [True, False], ids=["float64", "no float64"])
def test_no_batch_waits_for_a_device(float64: bool) -> None:
    given = run("--waits", *(["--float64"] if float64 else []))
    assert set(given) >= {"wide", "pooled", "masked", "lengths"}
    for name, counts in given.items():
        if name.endswith("recorded"):
            assert not any(counts), name
            continue
        # By then the chain and the bases are fixed. Blocks are one question after odd values and one
        # after the sizes of folds; without float64 each state moves, and what tells how much bases keep,
        # but nothing is asked any more.
        later = counts[4:]
        assert {waits for waits, blocks in later if not blocks} == {0}, name
        assert {blocks for _, blocks in later} == {0, 1}, name
        most = 2 if float64 else 1 + 6 + 1
        assert all(0 < waits <= most for waits, blocks in later if blocks), name
