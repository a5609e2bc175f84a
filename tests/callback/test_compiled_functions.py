"""Functions of the user's that went through the compiler run as they would without the callback."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from lit import dataset, loaders, quiet_trainer, small_module
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_koopman import KoopmanCreditMonitor, credit_report

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Trainer has no logger",
    "ignore:Total length of",
    "ignore:.*is deprecated",
    "ignore:The .grad attribute",
    "ignore:.*validation runs no component",
)


class Compiles(small_module()):
    """Runs a part of its step through a compiler that counts what it is given."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.n_graphs, self.losses = way, 0, []
        if way == "loss":
            self.fast = torch.compile(self.entropy, backend=self.count)
        elif way == "graph break":
            self.fast = torch.compile(self.breaks, backend=self.count)
        elif way == "forward":
            self.forward = torch.compile(self.forward, backend=self.count)
        elif way == "step":
            self.fast = torch.compile(self.step, backend=self.count)
        elif way == "called by forward":
            self.fast = torch.compile(self.run, backend=self.count)

    def count(self, graph: Any, _: Any) -> Any:
        self.n_graphs += 1
        return graph.forward

    def run(self, x: Tensor) -> Tensor:
        return self.net(x)

    def forward(self, x: Tensor) -> Tensor:
        return (self.fast if self.way == "called by forward" else self.net)(x)

    def entropy(self, y: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(y * 1.1, target)

    def breaks(self, y: Tensor, target: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.entropy(y, target) + 0 * y[y > 0].sum()

    def step(self, x: Tensor, target: Tensor) -> Tensor:
        return self.entropy(self.net(x), target)

    def loss(self, batch: Any) -> Tensor:
        x, target = batch
        if self.way == "step":
            return self.fast(x, target)
        return (self.entropy if "forward" in self.way else self.fast)(self(x), target)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(self.loss(batch)))


def trained(way: str, folder: Any, callbacks: list[Any]) -> Compiles:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Compiles(way)
    quiet_trainer(folder, callbacks, max_epochs=4).fit(model, *loaders())
    return model


@pytest.mark.parametrize("way", ["loss", "graph break", "forward", "step", "called by forward"])
def test_compiled_functions_are_compiled_as_without_the_callback(way: str, tmp_path: Any) -> None:
    without = trained(way, tmp_path, [])
    monitor = KoopmanCreditMonitor(every_n_epochs=1)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        watched = trained(way, tmp_path, [monitor])
    # What is first compiled while hooks are on a module is compiled once more when they are off.
    again = 2 if way in ("step", "called by forward") else 0
    assert without.n_graphs <= watched.n_graphs <= without.n_graphs + again
    assert watched.losses == without.losses
    for ours, theirs in zip(watched.parameters(), without.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not [each for each in raised if "ynamo" in str(each.message)]
    skipped = [each for each in raised if "Koopman credit skipped" in str(each.message)]
    if way == "step":
        # What calls no module cannot be run again.
        assert "compiled code" in str(skipped[0].message)
        assert not monitor.history
        return
    assert not skipped
    assert [report.step for report in monitor.history] == [4, 8, 12, 16]
    direct = credit_report(watched.net, dataset(seed=1).tensors[0].split(50))
    assert monitor.report is not None
    assert monitor.report.credit == pytest.approx(direct.credit, abs=1e-6)


KNOWS_ENCODERS = hasattr(TorchDispatchMode, "ignore_compile_internals")
refused = pytest.mark.skipif(not KNOWS_ENCODERS, reason="this torch compiles no encoder in eval mode")


@pytest.mark.parametrize("encoder", [False, pytest.param(True, marks=refused)])
def test_the_compiler_does_not_give_up(encoder: bool, tmp_path: Any) -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    if encoder:
        # Nothing that these can see is hung on their parts.
        net[1] = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)

    def run(network: nn.Module, x: Tensor) -> Tensor:
        return network(x[:, None])[:, 0]

    # Found by nobody who looks at the modules, and an error where it had to be compiled too often.
    made: list[Any] = []

    class Outside(small_module()):
        def forward(self, x: Tensor) -> Tensor:
            return made[-1](self.net, x)

    found = []
    for callbacks in ([], [KoopmanCreditMonitor(every_n_epochs=1, on_error="raise")]):
        torch._dynamo.reset()
        made.append(torch.compile(run, backend="eager", fullgraph=True))
        torch.manual_seed(0)
        model = Outside()
        model.net = copy.deepcopy(net)
        trainer = quiet_trainer(tmp_path, callbacks, max_epochs=12)
        trainer.fit(model, *loaders())
        assert trainer.current_epoch == 12
        found.append(list(model.parameters()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_a_network_that_calls_compiled_functions_is_measured(tmp_path: Any) -> None:
    model = trained("called by forward", tmp_path, [])
    batches = dataset(seed=1).tensors[0].split(50)
    whole, net = credit_report(model, batches), credit_report(model.net, batches)
    assert whole.credit == pytest.approx(net.credit, abs=1e-9)


@pytest.mark.parametrize("own_code", [False, True])
def test_where_nobody_may_follow_calls_are_run_again(
    own_code: bool, tmp_path: Any, monkeypatch: Any
) -> None:
    """As with torch up to 2.8, once anything in the process went through the compiler."""
    monkeypatch.setattr("lightning_koopman.callback.monitor.following_stops_compiler", lambda: True)

    class Step(small_module()):
        def forward(self, x: Tensor) -> Tensor:
            return self.net[2](2 * self.net[1](self.net[0](x))) if own_code else self.net(x)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(Step.forward(self, batch[0]), batch[1]))

    torch.manual_seed(0)
    model, monitor = Step(), KoopmanCreditMonitor(every_n_epochs=1)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        quiet_trainer(tmp_path, [monitor], max_epochs=2).fit(model, *loaders())
    said = [str(each.message) for each in raised if "Koopman credit skipped" in str(each.message)]
    if own_code:
        assert "torch up to 2.8 does not run what it compiled" in said[0]
        assert not monitor.history
        return
    assert not said
    direct = credit_report(model.net, dataset(seed=1).tensors[0].split(50))
    assert monitor.report is not None
    assert monitor.report.credit == pytest.approx(direct.credit, abs=1e-6)


def test_a_training_with_operators_that_take_functions_goes_on_as_without_the_callback(
    tmp_path: Any,
) -> None:
    class Step(small_module()):
        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return torch.cond(torch.tensor(len(x) > 1), lambda y: y.sin() + y, lambda y: y - 1, (y,))

    monitor, found = KoopmanCreditMonitor(every_n_epochs=1), []
    for callbacks in ([], [monitor]):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Step()
        quiet_trainer(tmp_path, callbacks, max_epochs=2).fit(model, *loaders())
        found.append(list(model.parameters()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert len(monitor.history) == 2
