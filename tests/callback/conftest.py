"""Time enough to measure, for cores may be busy."""

import pytest

from lightning_koopman.callback import budget


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "ALLOWANCE", 1000.0)
