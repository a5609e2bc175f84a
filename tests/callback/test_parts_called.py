"""Blocks whose parts a step calls past their own forward, as actor.dist(x) of reinforcement learning."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lit import dataset, newest, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_koopman import KoopmanCreditMonitor, credit_report
from lightning_koopman.network.runs.recording import Recording

pytestmark = [
    pytest.mark.filterwarnings("ignore:the Trainer has no logger"),
    pytest.mark.filterwarnings("ignore:there is no validation loop"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


class Actor(nn.Module):
    """Does the same by ``forward`` and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.pi = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU())
        self.mu = nn.Linear(10, 3)

    def dist(self, x: torch.Tensor) -> torch.Tensor:
        return self.mu(self.pi(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dist(x)


class Agent(L.LightningModule):
    """Runs the actor in one of several ways, and never the critic."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.actor, self.critic, self.way = Actor(), nn.Linear(8, 1), way

    def act(self, x: torch.Tensor) -> torch.Tensor:
        return self.actor(x) if self.way == "whole" else getattr(self.actor, self.way)(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.act(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-2)


def states() -> torch.Tensor:
    return dataset().tensors[0]


def trained(folder: Any, agent: Any, *, validates: bool = True) -> tuple[Any, Any]:
    torch.manual_seed(0)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
    trainer = quiet_trainer(folder, [monitor], max_epochs=1)
    loader = DataLoader(TensorDataset(states(), states()[:, :3].tanh()), 40)
    trainer.fit(agent, loader, loader if validates else None)
    return monitor.report, trainer.lightning_module.eval()


@pytest.mark.parametrize("validates", [True, False])
def test_parts_called_past_a_block_are_run_again(tmp_path: Any, validates: bool) -> None:
    report, agent = trained(tmp_path, Agent("dist"), validates=validates)
    assert report.components == ("actor.pi.0", "actor.pi.2", "actor.mu")
    assert report.notes[-1] == "never ran, so left out: 'critic'"
    with torch.no_grad():
        pi, mu = agent.actor.pi, agent.actor.mu
        before, first = agent.act(states()), pi[:2](states())
        after = [
            mu(pi[2:](first.mean(dim=0, keepdim=True))),
            mu(first),
            before.mean(dim=0, keepdim=True),
        ]
        spread = before.var(dim=0, correction=0).sum()
        by_hand = [float((each - before).square().mean(dim=0).sum() / spread) for each in after]
    assert report.effects.components == report.components
    assert report.effects.values["skip"] == pytest.approx(by_hand, rel=1e-4)


def test_a_block_called_as_a_whole_stays_one(tmp_path: Any) -> None:
    report, _ = trained(tmp_path, Agent("whole"), validates=False)
    assert report.components == ("actor",)
    assert report.effects.values["skip"] == pytest.approx([1.0])


class Positive(nn.Module):
    """A class without weights that is none of torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.softplus(x)


class WithHead(Agent):
    """Calls its own ``forward``, where what holds no weights stands behind all that does."""

    def __init__(self) -> None:
        super().__init__("forward")
        self.actor = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))  # type: ignore[assignment]
        self.positive = Positive()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.positive(self.actor(x))

    def act(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x)


def test_effects_are_measured_where_a_step_calls_the_modules_own_forward(tmp_path: Any) -> None:
    report, agent = trained(tmp_path, WithHead())
    assert report.components == ("actor.0", "actor.2")
    with torch.no_grad():
        hidden, before = agent.actor[:2](states()), agent(states())
        after = agent.positive(agent.actor[2](hidden.mean(dim=0)))
        spread = before.var(dim=0, correction=0).sum()
        by_hand = float((after - before).square().mean(dim=0).sum() / spread)
    assert report.effects.values["skip"] == pytest.approx([by_hand, 1.0], rel=1e-4)


def test_what_no_recorded_call_runs_is_named_with_what_to_do(tmp_path: Any) -> None:
    report, _ = trained(tmp_path, Agent("forward"))
    assert report.components == ("actor",)
    assert report.effects is None
    (note,) = (note for note in report.notes if "effects" in note)
    assert note.startswith("effects were not measured: no recorded call runs 'actor', which the report")
    assert note.endswith("or of compiled code; call the module, or what holds it")


def test_steps_that_call_no_module_are_told_apart_from_steps_that_never_came(tmp_path: Any) -> None:
    class OneLayer(Agent):
        def __init__(self) -> None:
            super().__init__("forward")
            self.actor = nn.Linear(8, 3)

    why = "no step called a component as a module, nor what holds it or a part of it"
    report, _ = trained(tmp_path, OneLayer())
    assert any(note.startswith(f"effects were not measured: {why}") for note in report.notes)
    with pytest.raises(RuntimeError, match=f"the recorded calls cannot be run again: {why}"):
        trained(tmp_path, OneLayer(), validates=False)
    assert Recording(OneLayer(), {"actor": nn.Linear(8, 3)}).reason is None


def hung(recording: Recording, model: nn.Module, step: Any) -> int:
    """Return how many modules have hooks while a step is recorded."""
    with torch.no_grad(), recording:
        count = sum(bool(module._forward_hooks) for module in model.modules())
        step(states())
    recording.end_step()
    return count


def test_nothing_is_hung_inside_of_a_block_once_a_step_called_it_as_a_whole() -> None:
    """The model, its actor, and in this pi, two layers with an activation each, and mu."""
    whole, dist = Agent("whole").eval(), Agent("dist").eval()
    for agent, then in ((whole, 2), (dist, 8)):
        recording = Recording(agent, {"actor": agent.actor})
        assert [hung(recording, agent, agent.act) for _ in range(3)] == [8, then, then]
        assert not any(module._forward_hooks for module in agent.modules())
    recording = Recording(whole, {"actor": whole.actor})
    # A step may do both.
    for _ in range(2):
        assert hung(recording, whole, lambda x: (whole.actor(x), whole.actor.dist(x))) == 8
    kinds = [[type(call.module).__name__ for call in step.calls] for step in recording.steps]
    assert kinds == [["Actor", "Sequential", "Linear"]] * 2


def test_a_look_at_derived_weights_is_no_call() -> None:
    agent = Agent("whole").eval()
    nn.utils.parametrizations.weight_norm(agent.actor.mu)
    recording = Recording(agent, {"actor": agent.actor})
    hung(recording, agent, lambda x: agent.act(x).mean() + agent.actor.mu.weight.norm())
    assert [call.module for call in recording.steps[0].calls] == [agent.actor]


def test_an_error_that_a_block_catches_inside_of_it_hides_no_call() -> None:
    class Careful(Actor):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.mu(x)
            except RuntimeError:
                return super().forward(x)

    agent = Agent("whole").eval()
    agent.actor = Careful().eval()
    recording = Recording(agent, {"actor": agent.actor})
    hung(recording, agent, lambda x: (agent.act(x), agent.act(x)))
    assert [call.module for call in recording.steps[0].calls] == [agent.actor] * 2
    with torch.no_grad():
        for found in recording.steps[0].run():
            assert torch.equal(found, agent.actor.dist(states()))


class Plays(L.LightningModule):
    """Acts in an environment in some steps before it learns, as examples of deep Q-learning do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))
        self.target = nn.Linear(8, 3).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx % 2 == self.current_epoch % 2:
            self.net(torch.randn(1, 8)).argmax()
        return (self.net(batch[0]) - self.target(batch[0])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), 1e-2)


@pytest.mark.parametrize("n_epochs", [1, 2])
def test_reports_are_about_what_is_learnt_from_not_about_actions(n_epochs: int, tmp_path: Any) -> None:
    loader, model = DataLoader(dataset(), 40), Plays()
    monitor = KoopmanCreditMonitor(every_n_epochs=1, on_error="raise", figures=False)
    quiet_trainer(tmp_path, [monitor], max_epochs=n_epochs).fit(model, loader)
    assert [report.n_samples for report in monitor.history] == n_epochs * [160]
    assert monitor.report is not None
    expected = credit_report(model.net.eval(), loader)
    np.testing.assert_allclose(monitor.report.credit, expected.credit, atol=1e-6)
    assert monitor.report.effects is not None
    assert monitor.report.effects.n_samples == 160
    assert any(note.startswith("calls of training steps on one") for note in monitor.report.notes)


class Adversaries(L.LightningModule):
    """Judges data, and then what it makes of noise, in one step; no validation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.maker = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
        self.judge = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return self.maker(noise)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        data, noise = batch
        loss = self.judge(data).mean() - self.judge(self(noise).detach()).mean()
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.judge.parameters(), lr=0.01)


def test_effects_are_about_the_call_that_the_report_is_about(tmp_path: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(160, 6, generator=generator)
    noise = torch.randn(160, 4, generator=generator)
    monitor = KoopmanCreditMonitor(on_error="raise", figures=False)
    net = Adversaries()
    loader: Any = DataLoader(TensorDataset(data, noise), 40)
    quiet_trainer(tmp_path, [monitor], max_epochs=2).fit(net, loader)
    report = newest(monitor)
    assert report.components == ("maker.0", "maker.2", "judge.0", "judge.2")
    with torch.no_grad():
        made = net(noise)
        before, after = net.judge(made), net.judge[2](made)
        fixed = net.judge(made.mean(dim=0)).expand_as(before)
    changes = [float((other - before).square().mean() / before.var()) for other in (fixed, after)]
    assert report.effects.values["skip"][1:3] == pytest.approx(changes, rel=0.02)
