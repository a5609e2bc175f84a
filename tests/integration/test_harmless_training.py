"""Trainings that do odd things to their own modules end as they would without the callback."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping
from lit import dataset, hooks_on, quiet_trainer, small_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_koopman import KoopmanCreditMonitor, credit_report
from lightning_koopman.network.access.isolation import undisturbed
from lightning_koopman.network.capture.capture import Capture

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Trainer has no logger",
    "ignore:.*no validation loop",
    "ignore:.*samples are few",
    "ignore:Total length of",
    "ignore:You defined a .validation_step",
    "ignore:.*there is no validation loop",
)


class Odd(small_module()):
    """Two layers, and whatever a step does to them behind the pass."""

    def __init__(self, net: nn.Module, behind: Callable[[nn.Module], Any] = lambda _: None) -> None:
        super().__init__()
        self.net, self.behind = net, behind

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        self.behind(self.net)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


class Masked(nn.Linear):
    """Writes its own weights in every pass, as masked convolutions do."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= torch.tril(torch.ones_like(self.weight))
        return super().forward(x)


class Adapter(nn.Linear):
    """Merges a low-rank part into its weights in eval mode and takes it out again."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.low = nn.Parameter(torch.randn(d_out, d_in) * 0.1)
        self.merged = False

    def train(self, mode: bool = True) -> Adapter:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += self.low.data * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0 if self.merged else x @ self.low.T)


def trained(
    net: Callable[[], nn.Module], folder: Path, callbacks: list[Any], validate: bool, **odd: Any
) -> Odd:
    torch.manual_seed(0)
    model = Odd(net(), **odd)
    loaders = [DataLoader(dataset(), 40), DataLoader(dataset(seed=1), 40)]
    quiet_trainer(folder, callbacks, max_epochs=2).fit(model, *(loaders if validate else loaders[:1]))
    return model


@pytest.mark.parametrize(
    ("net", "validate"),
    [
        (lambda: nn.Sequential(Masked(8, 6), nn.Tanh(), nn.Linear(6, 3)), False),
        (lambda: nn.Sequential(Masked(8, 6), nn.Tanh(), nn.Linear(6, 3)), True),
        (lambda: nn.Sequential(Adapter(8, 6), nn.Tanh(), Adapter(6, 3)), False),
    ],
    ids=["forward writes weights", "the same while validating", "a change of mode writes weights"],
)
def test_weights_written_in_passes_end_the_same(net, validate, tmp_path):
    monitor = KoopmanCreditMonitor(every_n_epochs=2, on_error="raise")
    without = trained(net, tmp_path, [], validate)
    watched = trained(net, tmp_path, [monitor], validate)
    for ours, theirs in zip(watched.state_dict().values(), without.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    states = [[getattr(m, "merged", None) for m in model.net.modules()] for model in (watched, without)]
    assert states[0] == states[1]


def copied(net: nn.Module) -> None:
    # Another call of the network itself would count, as all calls of a step do; those of copies do not.
    twins, x = [copy.deepcopy(net), copy.deepcopy(net)], torch.ones(2, 8)
    assert torch.equal(twins[0](x), twins[1](x))


def saved(net: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    torch.load(file, weights_only=False)(torch.ones(2, 8))


@pytest.mark.parametrize("behind", [copied, saved])
def test_a_model_is_copied_and_saved_while_hooks_are_on(behind, tmp_path):
    monitor = KoopmanCreditMonitor(on_error="raise")
    without = trained(plain, tmp_path, [], True, behind=behind)
    watched = trained(plain, tmp_path, [monitor], True, behind=behind)
    for ours, theirs in zip(watched.state_dict().values(), without.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    report = credit_report(watched.net, [b[0] for b in DataLoader(dataset(seed=1), 40)])
    assert monitor.report.credit == pytest.approx(report.credit, abs=1e-9)


def test_a_copy_keeps_nothing_of_the_capture():
    net = plain()
    with Capture(net) as capture:
        net(torch.ones(4, 8))
        copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    states = capture.end_pass()
    for twin in copies:
        held = [hook for m in twin.modules() for hook in m._forward_hooks.values()]
        assert held
        assert all(type(hook.__self__).__module__ == "contextlib" for hook in held)
        twin(torch.ones(2, 8))
    assert len(states) == 3
    assert hooks_on(net) == 0


@pytest.mark.parametrize("empty", [[], {}, [[]], ()])
def test_a_validation_without_batches_does_not_hang(empty, tmp_path):
    model = Odd(plain())
    model.val_dataloader = lambda: empty
    monitor = KoopmanCreditMonitor(on_error="raise")
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=1)
    with pytest.warns(UserWarning, match="no validation was watched, so Koopman credit"):
        trainer.fit(model, DataLoader(dataset(), 40))
    assert trainer.global_step == 4
    direct = credit_report(model.net, [dataset().tensors[0]])
    assert monitor.report.credit == pytest.approx(direct.credit, abs=1e-6)


def test_what_a_pass_sets_on_a_module_is_put_back():
    class Sets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("seen", torch.zeros(1))
            self.last = "before"

        def forward(self, x: Tensor) -> Tensor:
            self.last, self.cache = "after", x
            self.seen = self.seen + 1
            self.layer.weight.data = torch.ones(2, 2)
            return self.layer(x)

    net = Sets()
    weight, seen = net.layer.weight.detach().clone(), net.seen
    with suppress(RuntimeError), undisturbed(net):
        net(torch.ones(1, 2))
        raise RuntimeError
    assert net.last == "before"
    assert not hasattr(net, "cache")
    assert net.training
    assert net.seen is seen
    assert torch.equal(net.layer.weight, weight)


class Counting(small_module()):
    """Logs, counts and collects in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.queue = torchmetrics.MeanMetric(), deque(maxlen=5)
        self.seen, self.by_step, self.sum = [], {}, torch.zeros(3)
        self.calls, self.by_mode = Counter(), defaultdict(list)
        self.nested = {"rows": [[]], "sums": (torch.zeros(3), {}, np.zeros(1))}

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.log("mean", y.mean(), on_step=False, on_epoch=True)
        self.log_dict({"norm": y.norm()})
        self.mean.update(y.detach())
        self.sum += y.detach().sum(0)
        self.queue.append(float(y.detach().mean()))
        self.seen.append(len(x))
        self.by_step[len(self.by_step)] = 1
        self.calls["forward"] += 1
        self.by_mode[self.training].append(len(x))
        self.nested["rows"][0].append(len(x))
        self.nested["sums"][0].add_(y.detach().sum(0))
        self.nested["sums"][1][len(self.seen)] = 1
        self.nested["sums"][2][:] += 1
        return y

    def on_train_end(self) -> None:
        self.kept = [self.mean.compute(), self.sum, [*self.queue], self.seen, self.by_step]
        self.kept += [self.calls, self.by_mode, self.nested]


@pytest.mark.parametrize("limit", [1.0, 0])
def test_what_a_forward_pass_logs_and_collects_is_what_the_user_ran(limit, tmp_path):
    found = []
    for callbacks in ([], [KoopmanCreditMonitor(on_error="raise")]):
        torch.manual_seed(0)
        model = Counting()
        trainer = quiet_trainer(tmp_path, callbacks, max_epochs=3, limit_val_batches=limit)
        trainer.fit(model, DataLoader(dataset(), 40), DataLoader(dataset(seed=1), 40))
        logged = {k: v for k, v in trainer.callback_metrics.items() if "koopman" not in k}
        found.append(str([model.kept, sorted(logged.items()), sorted(vars(model))]))
    assert found[0] == found[1]


class Offloads(small_module()):
    """Packs what is saved for backward passes, in validation too."""

    def __init__(self) -> None:
        super().__init__()
        self.n_packed = 0

    def pack(self, saved: Tensor) -> Tensor:
        self.n_packed += 1
        return saved

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x):
            self(batch[0])


def test_nothing_of_ours_is_saved_for_a_backward_pass(tmp_path):
    found = []
    for callbacks in ([], [KoopmanCreditMonitor(on_error="raise")]):
        torch.manual_seed(0)
        model = Offloads()
        quiet_trainer(tmp_path, callbacks, max_epochs=2).fit(model)
        found.append(model.n_packed)
    assert found[0] == found[1] > 0


class Forces(small_module()):
    """Differentiates what it validates; activations are kept, or made again in the backward pass."""

    def __init__(self, checkpoints: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = (nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.net = nn.Sequential(nn.Linear(8, 8), *blocks, nn.Linear(8, 3))
        self.checkpoints = checkpoints

    def forward(self, x: Tensor) -> Tensor:
        for part in self.net:
            if self.checkpoints and isinstance(part, nn.Sequential):
                x = checkpoint(part, x, use_reentrant=self.checkpoints == "reentrant")
            else:
                x = part(x)
        return x

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0].clone().requires_grad_()
        gradients: dict[str, Tensor] = {}
        with torch.enable_grad():
            x.register_hook(lambda gradient: gradients.update(x=gradient))
            self(x).logsumexp(1).sum().backward()
        self.zero_grad()
        self.log("force", gradients["x"].norm())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("checkpoints", ["reentrant", "not reentrant"])
def test_what_a_backward_pass_runs_again_is_no_further_call(checkpoints, tmp_path):
    reports, forces = [], []
    for kind in ("", checkpoints):
        monitor = KoopmanCreditMonitor(on_error="raise")
        trainer = quiet_trainer(tmp_path, [monitor], max_epochs=2, inference_mode=False)
        trainer.fit(Forces(kind))
        reports.append(monitor.report)
        forces.append(trainer.callback_metrics["force"])
    assert forces[0] == forces[1] > 0
    plain_report, report = reports
    assert report.components == plain_report.components
    assert report.notes == plain_report.notes
    assert report.credit == pytest.approx(plain_report.credit, abs=1e-9)
    assert report.effects.values["skip"] == pytest.approx(plain_report.effects.values["skip"], rel=1e-6)


class Ways(small_module()):
    """One function of the batch, run in the ways that people write their steps."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.net = way, plain()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.net(x * scale)

    def run(self, batch: Any) -> Tensor:
        x = batch[0]
        if self.way == "no forward":
            return self.net(x * 0.1)
        if self.way == "forward itself":
            return self.forward(x, scale=0.1)
        if self.way == "two calls":
            return self.net[2](self.net[1](self.net[0](x * 0.1)))
        if self.way == "code between":
            return self.net[2](torch.tanh(self.net[0](x * 0.1)))
        return self(x=x, scale=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.run(batch), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.run(batch), batch[1]))


class Scaled(nn.Module):
    """That function, as a module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * 0.1)


class StopsAt(L.Callback):
    """Ends the training in an epoch that nobody expected to be the last."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch >= 2


@pytest.mark.parametrize("loop", ["validation", "stopped early", "training alone"])
@pytest.mark.parametrize("way", ["a call", "no forward", "forward itself", "two calls"])
def test_the_report_is_about_the_function_that_was_run(way, loop, tmp_path):
    torch.manual_seed(0)
    model, monitor = Ways(way), KoopmanCreditMonitor(every_n_epochs=5, on_error="raise")
    callbacks = [monitor, StopsAt()] if loop == "stopped early" else [monitor]
    train, validation = DataLoader(dataset(), 40), DataLoader(dataset(seed=1), 40)
    how: dict[str, Any] = {"limit_val_batches": 0} if loop == "training alone" else {}
    quiet_trainer(tmp_path, callbacks, max_epochs=4, **how).fit(model, train, validation)
    data = dataset(seed=0 if loop == "training alone" else 1).tensors[0]
    assert monitor.report.step == (12 if loop == "stopped early" else 16)
    assert monitor.report.n_samples == 160
    direct = credit_report(Scaled(model.net), data.split(40))
    assert monitor.report.credit == pytest.approx(direct.credit, abs=1e-5)
    assert monitor.report.total == pytest.approx(direct.total, abs=1e-5)
    assert hooks_on(model) == 0


def test_all_views_of_a_sample_count(tmp_path):
    class Views(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(torch.cat([x, x + 0.1]))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).pow(2).mean()

    torch.manual_seed(0)
    model, monitor = Views(plain()), KoopmanCreditMonitor(on_error="raise")
    loader = DataLoader(dataset(), 40)
    quiet_trainer(tmp_path, [monitor], max_epochs=1).fit(model, loader, loader)
    assert monitor.report.n_samples == 320
    x = dataset().tensors[0].split(40)
    direct = credit_report(model.net, [torch.cat([part, part + 0.1]) for part in x])
    assert monitor.report.credit == pytest.approx(direct.credit, abs=1e-6)


def test_training_steps_are_measured_where_validation_runs_no_component(tmp_path):
    class Idle(Odd):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.behind(self.net)

    torch.manual_seed(0)
    model, monitor = Idle(plain()), KoopmanCreditMonitor(every_n_epochs=1, on_error="raise")
    trainer = quiet_trainer(tmp_path, [monitor], max_epochs=3)
    with pytest.warns(UserWarning, match="validation runs no component, so Koopman credit is about"):
        trainer.fit(model, DataLoader(dataset(), 40), DataLoader(dataset(seed=1), 40))
    assert [report.step for report in monitor.history] == [4, 8, 12]
    direct = credit_report(model.net, dataset().tensors[0].split(40))
    assert monitor.report.credit == pytest.approx(direct.credit, abs=1e-6)


def test_what_cannot_be_run_again_keeps_its_watched_report_and_says_so(tmp_path):
    torch.manual_seed(0)
    model, monitor = Ways("code between"), KoopmanCreditMonitor(every_n_epochs=5, on_error="raise")
    trainer = quiet_trainer(tmp_path, [monitor, StopsAt()], max_epochs=4)
    with pytest.warns(UserWarning, match="the weights that were validated at step 4, not the final"):
        trainer.fit(model, DataLoader(dataset(), 40), DataLoader(dataset(seed=1), 40))
    assert [report.step for report in monitor.history] == [4]
    assert "runs code of its own before 'net.2'" in monitor.history[0].notes[-1]


def test_one_monitor_in_two_trainings_keeps_their_reports_apart(tmp_path):
    monitor = KoopmanCreditMonitor(on_error="raise")
    for _ in range(2):
        trained(plain, tmp_path, [monitor], True)
        assert [report.step for report in monitor.history] == [4, 8]


@pytest.mark.parametrize("fails", [False, True])
def test_a_monitored_key_is_there_from_the_first_validation_on(fails, tmp_path):
    monitor = KoopmanCreditMonitor(every_n_epochs=3)
    seen: list[float] = []

    class Sees(L.Callback):
        monitor = "koopman/total"

        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if not trainer.sanity_checking:
                seen.append(float(trainer.callback_metrics["koopman/total"]))

    stopping = EarlyStopping("koopman/total", patience=9)
    model = Odd(plain())
    data = dataset(seed=1)
    if fails:
        data.tensors[0][0, 0] = float("inf")
    trainer = quiet_trainer(tmp_path, [monitor, stopping, Sees()], max_epochs=4)
    context = pytest.warns(UserWarning, match="Koopman credit skipped") if fails else nullcontext()
    with context:
        trainer.fit(model, DataLoader(dataset(), 40), DataLoader(data, 40))
    assert trainer.current_epoch == 4
    assert seen[:2] == pytest.approx([0.0 if fails else monitor.history[0].total] * 2)


def test_a_monitored_key_is_there_without_a_validation_too(tmp_path):
    monitor, stopping = KoopmanCreditMonitor(), EarlyStopping("koopman/total", patience=9)
    data = dataset()
    data.tensors[0][0, 0] = float("inf")
    trainer = quiet_trainer(tmp_path, [monitor, stopping], limit_val_batches=0)
    with pytest.warns(UserWarning, match="Koopman credit skipped"):
        trainer.fit(Odd(plain()), DataLoader(data, 40))
    assert trainer.current_epoch == 3
    assert trainer.callback_metrics["koopman/total"] == 0
