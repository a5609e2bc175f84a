"""A fixed seed for every test, and the tiny models that the tests share."""

import itertools
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before NumPy: threads that wait for one another take longer than one, where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib as mpl
import numpy as np
import pytest
import small
import torch
from filelock import FileLock
from torch import Tensor, nn

from lightning_koopman import credit_report
from lightning_koopman.network.access.isolation import following_stops_compiler, seed_all

mpl.use("Agg")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use some processors for all tests; a file or a test by name starts sooner in this process."""
    return 0 if config.args_source is config.ArgsSource.ARGS else min(os.cpu_count() or 1, 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests: with one of them as the last, all processes but one would idle."""
    items.sort(key=lambda item: "longest" not in item.keywords)


@pytest.fixture(autouse=True)
def seed():
    seed_all(0)
    torch.set_num_threads(1)
    yield 0
    if "matplotlib.pyplot" in sys.modules:
        import matplotlib.pyplot as plt

        plt.close("all")
    if following_stops_compiler():
        # What one test compiled, no other has to do with.
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def unhurried(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give what is measured inside of a training time enough, and networks one speed, on busy cores."""
    if request.path.parent.name == "callback":
        monkeypatch.setattr("lightning_koopman.callback.budget.ALLOWANCE", 1000.0)
    monkeypatch.setattr("lightning_koopman.decisions.timing._seconds", lambda runner: 1.0)


@pytest.fixture(autouse=True)
def interruptible():
    """Take Ctrl-C: Lightning ignores it for good once a Trainer met it, and so do background shells."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """What fills a folder once for all processes of pytest-xdist; each reads the same."""

    def filled(name: str, fill: Callable[[Path], Any]) -> Path:
        own = tmp_path_factory.getbasetemp()
        folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
        with FileLock(f"{folder}.lock"):
            if not (folder / "filled").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                (folder / "filled").touch()
        return folder

    return filled


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """What writes a module that a user might name on the command line, and goes to its folder."""

    def write(name: str, more: str = "") -> Path:
        code = Path(small.__file__).read_text()
        (tmp_path / f"{name}.py").write_text(code + more)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return tmp_path

    return write


@pytest.fixture
def no_pixels(monkeypatch):
    """Figures for TensorBoard are made and not rendered, which takes most of the time."""
    blank = np.zeros((2, 2, 4), np.uint8)
    monkeypatch.setattr("lightning_koopman.callback.loggers._pixels", lambda figure: blank)


@pytest.fixture(scope="session")
def report():
    return credit_report(small.network(), small.batches(), step=7)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def linear_chain():
    """Make a chain of linear layers of the given widths."""

    def make(*widths: int, bias: bool = True) -> nn.Sequential:
        layers = [nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(widths)]
        return nn.Sequential(*layers).double()

    return make


@pytest.fixture
def mlp():
    """Has one activation that works in place, and one that no hook sees."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.relu(m.second(m.act(m.first(x)))))

    parts = {"first": nn.Linear(6, 9), "act": nn.ReLU(inplace=True), "second": nn.Linear(9, 7)}
    return small.wired(run, **parts, head=nn.Linear(7, 4)).double()


class ConvNet(nn.Module):
    """Convolutions with batch normalisation and dropout, and a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.relu2 = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.fc(self.pool(self.drop(x)).flatten(1))


@pytest.fixture
def conv_net():
    return ConvNet().double()


@pytest.fixture
def shared_net():
    """One layer runs twice in a pass, and one never runs."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.shared(torch.tanh(m.shared(x)))))

    layers = {"shared": nn.Linear(5, 5), "unused": nn.Linear(5, 5), "head": nn.Linear(5, 3)}
    return small.wired(run, **layers).double()


@pytest.fixture
def tuple_net():
    """A recurrent part that returns a tuple, and an output in a dictionary."""

    def run(m: Any, x: Tensor) -> dict[str, object]:
        sequence, _ = m.gru(m.embed(x))
        return {"length": x.shape[1], "logits": m.head(sequence[:, -1])}

    parts = {"embed": nn.Linear(3, 4), "gru": nn.GRU(4, 5, batch_first=True)}
    return small.wired(run, **parts, head=nn.Linear(5, 2)).double()


@pytest.fixture
def raising_net():
    """Raises in front of its second layer as long as it is armed."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.drop(m.first(x))
        if m.armed:
            random.random(), np.random.rand(), torch.rand(1)
            raise RuntimeError("the model itself failed")
        return m.second(x)

    layers = {"first": nn.Linear(4, 4), "drop": nn.Dropout(0.5), "second": nn.Linear(4, 4)}
    net = small.wired(run, **layers).double()
    net.armed = True
    return net
