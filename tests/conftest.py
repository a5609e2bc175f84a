"""A fixed seed for every test, and the tiny models that the tests share."""

import itertools
import random
import signal
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import small
import torch
from torch import Tensor, nn

from lightning_koopman import credit_report

mpl.use("Agg")


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield 0
    if "matplotlib.pyplot" in sys.modules:
        import matplotlib.pyplot as plt

        plt.close("all")


@pytest.fixture(autouse=True)
def interruptible():
    """Take Ctrl-C: Lightning ignores it for good once a Trainer met it, and so do background shells."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


class InPlaceMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(9, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.nn.functional.relu(self.second(self.act(self.first(x)))))


@pytest.fixture
def mlp():
    return InPlaceMLP().double()


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


class SharedNet(nn.Module):
    """One layer that runs twice in a pass, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(5, 5)
        self.unused = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


@pytest.fixture
def shared_net():
    return SharedNet().double()


class TupleNet(nn.Module):
    """A recurrent part that returns a tuple, and an output in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.gru = nn.GRU(4, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> dict[str, object]:
        sequence, _ = self.gru(self.embed(x))
        return {"length": x.shape[1], "logits": self.head(sequence[:, -1])}


@pytest.fixture
def tuple_net():
    return TupleNet().double()


class RaisingNet(nn.Module):
    """Raises in its second layer once it is armed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(4, 4)
        self.armed = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.first(x))
        if self.armed:
            random.random(), np.random.rand(), torch.rand(1)
            raise RuntimeError("the model itself failed")
        return self.second(x)


@pytest.fixture
def raising_net():
    return RaisingNet().double()
