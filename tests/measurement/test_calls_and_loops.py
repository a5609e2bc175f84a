"""Networks called several times on one input, loops with an output per step, parts run elsewhere."""

import lightning as L
import numpy as np
import pytest
import torch
from lit import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_koopman import KoopmanCreditMonitor, Options, credit_report


class Neuron(nn.Module):
    """Keeps what came before, as spiking neurons do."""

    def forward(self, x: Tensor) -> Tensor:
        self.held = self.held * 0.8 + x
        return torch.sigmoid(8 * (self.held - 1))


class Spiking(nn.Module):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.net = nn.Sequential(nn.Linear(8, 16), Neuron(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.net[1].held = 0.0
        return sum(self.net(x) for _ in range(self.steps)) / self.steps


def fit(x: Tensor, y: Tensor) -> float:
    """Share of the variance that ordinary least squares explain."""
    design = np.c_[x.double().numpy(), np.ones(len(x))]
    target = y.detach().double().numpy()
    left = target - design @ np.linalg.lstsq(design, target, rcond=None)[0]
    return 1 - (left**2).sum() / ((target - target.mean(axis=0)) ** 2).sum()


def test_calls_on_the_same_input_count_where_states_differ():
    torch.manual_seed(0)
    net, x = Spiking(4).eval(), torch.randn(800, 8)
    report = credit_report(net, x.split(100), max_samples=None)
    assert report.n_samples == 4 * 800
    assert "2400 of 3200 samples are later calls" in " ".join(report.notes)
    net.net[1].held, states = 0.0, []
    states = [net.net[1](net.net[0](x)) for _ in range(4)]
    expected = fit(x.repeat(4, 1), torch.cat(states))
    assert report.r2[0] == pytest.approx(expected, abs=0.02)
    # Calls that give the same again, as for a loss and a metric, count once.
    plain = Spiking(4).eval()
    plain.net[1] = nn.Tanh()
    plain.net[1].held = None
    assert credit_report(plain, x.split(100), max_samples=None).n_samples == 800


class InParts(nn.Module):
    """Runs its network on a part of the batch after the other, as memory asks for."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net, self.size = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.net(part) for part in x.split(self.size)])


@pytest.mark.parametrize("size", [1, 40, 64])
def test_parts_of_a_batch_are_samples_of_their_own(size: int) -> None:
    torch.manual_seed(0)
    net, x = InParts(size).double(), torch.randn(600, 8, dtype=torch.float64)
    whole, parts = (credit_report(m, x.split(100), max_samples=None) for m in (net.net, net))
    np.testing.assert_allclose(parts.credit, whole.credit, atol=1e-9)
    np.testing.assert_allclose(parts.r2, whole.r2, atol=1e-9)
    np.testing.assert_allclose(parts.stderr["credit"], whole.stderr["credit"], atol=1e-9)
    assert not any("several times" in note for note in parts.notes)


class Loop(nn.Module):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.cell, self.out, self.steps = nn.GRUCell(3, 8), nn.Linear(8, 2), steps

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = x.new_zeros(len(x), 8), []
        for t in range(self.steps):
            h = self.cell(x[:, t], h)
            outputs.append(self.out(h))
        return torch.stack(outputs, 1)


@pytest.mark.parametrize("steps", [6, 7, 12])
def test_a_loop_with_an_output_of_each_step_has_a_report(steps: int):
    torch.manual_seed(0)
    report = credit_report(Loop(steps).eval(), torch.randn(600, steps, 3).split(200))
    cells = ["cell", *(f"cell#{t}" for t in range(1, steps))]
    assert set(cells) < set(report.components)
    assert ("out#*" in report.components) == (steps > 6)
    assert np.isfinite(report.credit).all()
    assert min(report.r2[report.components.index(cell)] for cell in cells) > 0.8
    if steps > 6:
        # It reads all steps, for these are narrow, and is linear.
        assert report["out#*"].r2 > 0.999


class ReadTwice(nn.Module):
    """Two layers read what a loop gave in ten steps, both of them all."""

    def __init__(self) -> None:
        super().__init__()
        self.loop, self.a, self.b = Loop(10), nn.Linear(20, 6), nn.Linear(26, 3)

    def forward(self, x: Tensor) -> Tensor:
        o = self.loop(x).flatten(1)
        return self.b(torch.cat([torch.tanh(self.a(o)), o], 1))


def test_no_state_is_left_that_nothing_reads():
    torch.manual_seed(0)
    net, names = ReadTwice().eval(), ["loop.cell", "loop.out", "a", "b"]
    report = credit_report(net, torch.randn(600, 10, 3).split(200), components=names)
    parents = report.reference.parents
    assert {p for read in parents for p in read} == set(range(len(parents)))
    assert np.isfinite(report.r2).all()


class Lifted(nn.Module):
    """Has no parameters, and another number of axes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2)


class Block(nn.Module):
    """Gives a function of its own beside its output, as hyper-connections do."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.linear = Lifted(), nn.Linear(8, 8)

    def forward(self, x: Tensor):
        return torch.tanh(self.linear(self.lift(x).squeeze(-2))), lambda out: self.lift(out)


class Connected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(8, 8), Block()
        self.branch, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, add = self.block(self.first(x))
        return self.out(add(self.branch(h)).squeeze(-2).mean(1))


def test_a_part_that_runs_inside_and_outside_its_component_is_told_alike_in_all_batches():
    torch.manual_seed(0)
    net, x = Connected().eval(), torch.randn(600, 5, 8)
    whole, parts = (credit_report(net, x.split(size), max_samples=None) for size in (600, 100))
    assert parts.components == whole.components
    assert "branch" in parts.components
    np.testing.assert_allclose(parts.r2, whole.r2, atol=1e-6)


class TimeFirst(nn.Module):
    """Shows one image in each step of time, which is the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.RNN(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.unsqueeze(0).repeat(4, 1, 1)))
        return self.c(self.b(h)[0]).mean(0)


def test_states_that_repeat_over_time_vary_over_samples():
    torch.manual_seed(0)
    report = credit_report(TimeFirst().eval(), torch.randn(400, 8).split(50))
    assert report.components[0].startswith("a")
    assert not any("same for every sample" in note for note in report.notes)


class Traced(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.part = torch.jit.trace(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), torch.randn(4, 8))
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.part(x))

    def training_step(self, batch, _):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.training_step(batch, _)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 1e-2)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_part_keeps_no_callback_from_its_report():
    torch.manual_seed(0)
    x = torch.randn(200, 8)
    loader = DataLoader(TensorDataset(x, x[:, :2]), 50)
    monitor = KoopmanCreditMonitor(figures=False, effects=(), on_error="raise")
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[monitor], **quiet)
    trainer.fit(Traced(), loader, loader)
    assert {"net.0", "net.2"} <= set(monitor.report.components)


class Experts(nn.Module):
    """Sends each sample to one of three layers; those of the last are rare."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(4, 8), nn.Linear(8, 2)
        self.experts, self.spare = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.inp(x))
        kind, given = (x[:, 0] > 0).long() + (x[:, 0] > 1).long(), torch.zeros_like(h)
        for k, expert in enumerate(self.experts):
            places = (kind == k).nonzero()[:, 0]
            if len(places):
                given = given.index_add(0, places, expert(h[places]))
        return self.out(h + given)


def test_what_ran_in_one_batch_is_not_told_as_never_run():
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    batches = x[x[:, 0].argsort(descending=True)].split(128)
    assert not (batches[1][:, 0] > 1).any()
    notes = credit_report(Experts().eval(), batches).notes
    assert [note for note in notes if "never ran" in note] == ["never ran, so left out: 'spare'"]


def test_calls_of_unlike_length_are_later_calls_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    for sizes in ((32, 24), (24, 32)):
        batches = [tuple(torch.randn(size, 8) for size in sizes) for _ in range(8)]
        report = credit_report(
            net, batches, forward_fn=lambda m, batch: [m(part) for part in batch], max_samples=None
        )
        assert report.n_samples == 8 * sum(sizes)
        assert f"{8 * sizes[1]} of {8 * sum(sizes)} samples are later calls" in " ".join(report.notes)


class Pairs(L.LightningModule):
    """Runs its network on both halves of a batch, by themselves or one behind the other."""

    def __init__(self, *, at_once: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
        self.at_once = at_once

    def validation_step(self, batch, _):
        for part in [torch.cat(batch)] if self.at_once else batch:
            self.net(part)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_several_calls_of_a_step_are_added_up_as_one_is(tmp_path, precision):
    """In inference mode and under autocast, which the step runs in, they were none or in bfloat16."""
    loader = DataLoader(TensorDataset(*torch.randn(2, 600, 8)), 100)
    reports = []
    for at_once in (False, True):
        options = Options(max_dim=6)  # rows are brought into a basis, by products
        monitor = KoopmanCreditMonitor(effects=(), on_error="raise", figures=False, options=options)
        trainer = quiet_trainer(tmp_path, [monitor], precision=precision)
        trainer.validate(Pairs(at_once=at_once), loader, verbose=False)
        assert monitor.report is not None
        reports.append(monitor.report)
    calls, whole = reports
    assert calls.n_samples == whole.n_samples == 1200
    np.testing.assert_allclose(calls.credit, whole.credit, atol=1e-6)
