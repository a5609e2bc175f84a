"""Devices that are not here, pretended; see ``pretended_device.py`` for what that one refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

SCRIPT = Path(__file__).with_name("pretended_device.py")


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch lets nobody pretend a device",
)
def test_on_a_device_without_float64_everything_is_as_on_the_cpu_or_refused() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    given = json.loads(done.stdout.splitlines()[-1])
    assert "has no float64" in given["effects"]
    assert given.pop("effects").endswith("call model.cpu() first")
    assert len(given) == 7
    # One thread, and the same operations on the same numbers in both places.
    assert given == dict.fromkeys(given, pytest.approx(0.0, abs=1e-9))
