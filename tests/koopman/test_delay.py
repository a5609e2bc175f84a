"""What each operator sees with a delay, and where a delay can be given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman import CreditReport, KoopmanCredit, Options, credit_report
from lightning_koopman.cli.main import main
from lightning_koopman.report.files import read_reports


class Residual(nn.Module):
    """A residual network whose skips span two leaves."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(12, 10), nn.Linear(10, 3)
        self.a = nn.ModuleList(nn.Linear(10, 10) for _ in range(blocks))
        self.b = nn.ModuleList(nn.Linear(10, 10) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for a, b in zip(self.a, self.b, strict=True):
            x = x + b(F.relu(a(x)))
        return self.head(x)

    def states(self, x: Tensor) -> list[Tensor]:
        """Every leaf's output, x first, as if nobody had followed the data."""
        seen = [x]
        leaves = [m for m in self.modules() if isinstance(m, nn.Linear)]
        handles = [m.register_forward_hook(lambda *given: seen.append(given[2])) for m in leaves]
        with torch.no_grad():
            self(x)
        for handle in handles:
            handle.remove()
        return seen


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_leaf_of_a_residual_network_fits_at_least_as_well_as_without_a_delay(seed: int) -> None:
    torch.manual_seed(seed)
    net = Residual().double()
    states = net.states(torch.randn(1500, 12, dtype=torch.float64))
    reports = {}
    for delay in (1, 3):
        metric = KoopmanCredit(options=Options(delay=delay))
        metric.update(states)
        reports[delay] = metric.report()
    # The first leaf of a block reads the block before it and, three states back, that one's input.
    assert (reports[3].r2 - reports[1].r2 > -1e-3).all()
    assert reports[3].r2.mean() > reports[1].r2.mean() + 0.01


def test_links_are_read_whatever_the_delay_and_leave_nothing_for_it_to_gain() -> None:
    torch.manual_seed(0)
    net = Residual().double()
    for module in (net.a, net.b):
        for layer in module:
            nn.init.normal_(layer.weight, std=0.3)
    # Linear blocks: with its links a step is exact, and a delay can add nothing.
    net.forward = lambda x: net.head(_linear_blocks(net, x))  # type: ignore[method-assign]
    report = credit_report(
        net, torch.randn(600, 12, dtype=torch.float64).split(100), options=Options(delay=2)
    )
    assert report.reads["a.1"] == ("sum into a.1", "b.0")
    assert np.abs(1 - report.r2).max() < 1e-9
    dense = np.eye(10)
    for a, b in zip(net.a, net.b, strict=True):
        dense = dense @ (np.eye(10) + a.weight.detach().numpy().T @ b.weight.detach().numpy().T)
    dense = net.stem.weight.detach().numpy().T @ dense @ net.head.weight.detach().numpy().T
    assert report.total * 3 == pytest.approx(oracles.log_volume(dense), abs=1e-8)


def _linear_blocks(net: Residual, x: Tensor) -> Tensor:
    x = net.stem(x)
    for a, b in zip(net.a, net.b, strict=True):
        x = x + b(a(x))
    return x


class Branch(nn.Module):
    """A branch beside a skip connection, then a head that reads both."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.branch = nn.Linear(6, 6) if inner is None else nn.Sequential(nn.Linear(6, 12), inner)
        self.head = nn.Linear(6 + (6 if inner is None else 12), 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        branch = self.branch(h)
        return self.head(torch.cat([h, branch], 1))


def _branch_report(net: nn.Module, n_samples: int = 2000) -> CreditReport:
    x = torch.randn(n_samples, 6, dtype=torch.float64)
    return credit_report(net.double(), x.split(500), components=["stem", "branch", "head"])


def _log_volume(operator: Tensor) -> float:
    return float(torch.linalg.svdvals(operator.detach()).log().mean())


def test_a_branch_that_the_states_beside_it_tell_has_a_doubt_and_a_note() -> None:
    torch.manual_seed(0)
    net = Branch()
    report = _branch_report(net)
    b, (skip, branch) = net.branch.weight.T, net.head.weight.T.split(6)
    # What the branch is made from has the right credit, however the two share what they tell.
    assert report["stem"]["credit"] == pytest.approx(_log_volume(skip + b @ branch), abs=1e-9)
    assert abs(report["branch"]["credit"] - _log_volume(branch)) > 0.5
    assert report.doubts == ((), ("ridge",), ())
    assert [n for n in report.notes if "tell the same" in n] == [
        "states that are read beside 'branch' tell the same, so that the ridge weight, not the data, "
        "says which of them counts: in doubt are its credit, its gain and that of what reads it"
    ]


def test_a_branch_that_adds_something_has_the_credit_of_its_weights_and_no_doubt() -> None:
    torch.manual_seed(0)
    net = Branch(nn.Tanh())
    report = _branch_report(net)
    assert report["branch"]["credit"] == pytest.approx(_log_volume(net.head.weight.T[6:]), abs=1e-9)
    assert report.doubts == ((), (), ())
    # With fewer samples than directions all states look like sums of others, which another note tells.
    with pytest.warns(UserWarning, match="samples are few"):
        few = _branch_report(net, 10)
    assert not any("tell the same" in note for note in few.notes)


@pytest.mark.parametrize("scale", [1e-8, 0.0])
def test_a_branch_that_is_small_or_dead_beside_others_is_not_said_to_be_told_by_them(
    scale: float,
) -> None:
    torch.manual_seed(0)
    net = Branch(nn.Sequential(nn.Tanh(), nn.Linear(12, 12))).double()
    for parameter in net.branch[1][1].parameters():
        parameter.data *= scale
    # The stem's last direction is a copy of its first, so that not all directions side by side vary.
    net.stem.weight.data[-1] = net.stem.weight.data[0]
    report = _branch_report(net)
    assert not any("tell the same" in note for note in report.notes)


class Partly(nn.Module):
    """Beside a state, some sums of what it holds and something that no sum tells, twice."""

    def __init__(self, width: int, told: int, untold: int) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.free, self.mix = nn.Sequential(nn.Linear(width, 5), nn.Tanh()), nn.Linear(width + 5, width)
        self.part, self.head = Part(width, told, untold), nn.Linear(width + told + untold, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = self.mix(torch.cat([h, self.free(h)], 1))
        return self.head(torch.cat([h, self.part(h)], 1))


class Part(nn.Module):
    def __init__(self, width: int, told: int, untold: int) -> None:
        super().__init__()
        self.told, self.untold = nn.Linear(width, told), nn.Linear(width, untold)

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([self.told(h), torch.tanh(2 * self.untold(h))], 1)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("width", "told", "untold"), [(6, 1, 3), (6, 2, 2), (6, 3, 4), (6, 1, 0), (6, 0, 4), (2, 1, 3)]
)
def test_a_state_of_which_half_is_told_is_in_doubt(width: int, told: int, untold: int) -> None:
    torch.manual_seed(0)
    net = Partly(width, told, untold).double()
    x = torch.randn(1000, 6, dtype=torch.float64)
    names = ["stem", "free", "mix", "part", "head"]
    report = credit_report(net, x.split(500), components=names)
    assert report.reads["head"] == ("part", "mix")
    is_told = 2 * told >= told + untold
    assert [names[i] for i, doubts in enumerate(report.doubts) if "ridge" in doubts] == (
        ["part"] if is_told else []
    )
    assert any("tell the same" in note for note in report.notes) == is_told


def test_the_delay_is_in_the_file_and_old_files_had_1(tmp_path: Path) -> None:
    metric = KoopmanCredit(options=Options(delay=2))
    metric.update(list(torch.randn(4, 100, 3, generator=torch.Generator().manual_seed(0))))
    report = metric.report()
    report.to_json(tmp_path / "r.json")
    assert CreditReport.from_json(tmp_path / "r.json").delay == report.delay == 2
    old = report.to_dict()
    del old["delay"]
    assert CreditReport.from_dict(old).delay == 1


USER_CODE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 2))

def data():
    return torch.randn(90, 4, generator=torch.Generator().manual_seed(0)).split(30)
"""


def test_the_command_line_takes_a_number(
    user_module: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    user_module("delay_code", USER_CODE)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 2))
    torch.save({"state_dict": net.state_dict(), "global_step": 1}, "1.ckpt")
    command = "evaluate --model delay_code:net --data delay_code:data --ckpt 1.ckpt --out r.json"
    command += " --options.delay"
    assert main([*command.split(), "2"]) == 0
    (report,) = read_reports("r.json")
    assert report.delay == report.source["options"]["delay"] == 2
    with pytest.raises(SystemExit):
        main([*command.split(), "auto"])
    assert "auto" in capsys.readouterr().err
