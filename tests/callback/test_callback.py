import copy
import gc
import importlib.util
import json
import os
import random
import runpy
import subprocess
import sys
import time
import warnings
import weakref
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
import warm
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lit import LitNet, dataset, hooks_on, loaders, quiet_trainer, small_module
from torch import nn

from lightning_koopman import KoopmanCreditMonitor, Options, credit_report

COMPONENTS = ("net.0", "net.4", "net.6")
NO_LOGGER = "ignore:the Trainer has no logger"
pytestmark = pytest.mark.filterwarnings(NO_LOGGER, "ignore:.*GPU available.*")


class Recorder(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


def fit(
    tmp_path: Any, callbacks: list[Any], *, freeze_norm: bool = False, val: bool = True, **options: Any
) -> tuple[LitNet, L.Trainer]:
    L.seed_everything(7, verbose=False)
    model = LitNet(freeze_norm=freeze_norm)
    train, validation = loaders()
    if not val:
        options["limit_val_batches"] = 0
    trainer = quiet_trainer(tmp_path, callbacks, **options)
    trainer.fit(model, train, validation)
    return model, trainer


def fingerprint(model: nn.Module) -> dict[str, Any]:
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "needs": [p.requires_grad for p in model.parameters()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "hooks": hooks_on(model),
    }


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["weights"].keys() == b["weights"].keys()
    for name, value in a["weights"].items():
        assert torch.equal(value, b["weights"][name]), name
    for g, h in zip(a["grad"], b["grad"], strict=True):
        assert (g is None) == (h is None)
        assert g is None or torch.equal(g, h)
    assert torch.equal(a["torch"], b["torch"])
    for name in ("modes", "needs", "numpy", "python", "hooks"):
        assert a[name] == b[name], name


@pytest.mark.filterwarnings("ignore:there is no validation loop")
@pytest.mark.parametrize(
    "options",
    [{}, {"freeze_norm": True}, {"val": False}, {"every": 2}],
    ids=str,
)
def test_training_is_bit_identical_with_the_callback_on(tmp_path, options):
    options = dict(options)
    every = options.pop("every", 1)
    without, _ = fit(tmp_path, [], **options)
    expected = fingerprint(without)
    monitor = KoopmanCreditMonitor(on_error="raise", every_n_epochs=every)
    model, _ = fit(tmp_path, [monitor], **options)
    assert_same(fingerprint(model), expected)
    assert monitor.report.components == COMPONENTS


class Listed:
    """Batches from a list, for a DataLoader takes no default device without numbers."""

    def __init__(self, batches):
        self.batches = list(batches)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def fit_small(folder, callbacks, default_device):
    class Plain(small_module()):
        def configure_optimizers(self):
            # Adam of torch 2.6 counts its steps on the default device.
            return torch.optim.SGD(self.parameters(), lr=1e-1)

    torch.manual_seed(0)
    model, data = Plain(), [Listed(loader) for loader in loaders()]
    trainer = quiet_trainer(folder, callbacks)
    with torch.device(default_device):
        trainer.fit(model, *data)
    return model


def test_a_default_device_where_nothing_is_changes_neither_numbers_nor_the_training(tmp_path):
    kinds = ["skip", "linear", "weight_noise"]
    usual, elsewhere = (KoopmanCreditMonitor(effects=kinds, on_error="raise") for _ in range(2))
    fit_small(tmp_path, [usual], "cpu")
    model, alone = fit_small(tmp_path, [elsewhere], "meta"), fit_small(tmp_path, [], "meta")
    for mine, own in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, own)
    assert len(elsewhere.history) == len(usual.history) > 1
    assert np.array_equal(elsewhere.report.credit, usual.report.credit)
    for kind in kinds:
        assert np.array_equal(elsewhere.report.effects.values[kind], usual.report.effects.values[kind])


class Watched(NamedTuple):
    """A training of three epochs, and what stood beside it."""

    model: LitNet
    trainer: L.Trainer
    monitor: KoopmanCreditMonitor
    recorder: Recorder


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    recorder, monitor = Recorder(), KoopmanCreditMonitor(on_error="raise")
    return Watched(*fit(tmp_path_factory.mktemp("run"), [monitor], logger=recorder), monitor, recorder)


def test_report_equals_a_direct_report_on_the_final_weights(watched):
    model, trainer, monitor, _ = watched
    direct = credit_report(model, loaders()[1])
    assert monitor.report.step == trainer.global_step
    for name in ("credit", "gain", "r2", "chain_r2", "sensitivity"):
        np.testing.assert_allclose(getattr(monitor.report, name), getattr(direct, name), rtol=1e-6)


def test_rides_along_without_a_forward_pass_of_its_own(tmp_path, watched):
    without, _ = fit(tmp_path, [])
    assert watched.model.forward_calls == without.forward_calls


def test_logs_every_component_at_lightnings_own_step(watched):
    _, trainer, monitor, recorder = watched
    ours = [(step, row) for step, row in recorder.rows if any(k.startswith("koopman/") for k in row)]
    lightnings = [step for step, row in recorder.rows if "val_loss" in row]
    assert [step for step, _ in ours] == lightnings == [3, 7, 11]
    expected = {f"koopman/{q}/{c}" for q in ("credit",) for c in COMPONENTS}
    for (_, row), report in zip(ours, monitor.history, strict=True):
        assert {k for k in row if k.startswith("koopman/")} >= expected | {"koopman/total"}
        assert all(type(value) is float for value in row.values())
        assert row["koopman/credit/net.0"] == report.credit[0]
    assert float(trainer.callback_metrics["koopman/total"]) == pytest.approx(monitor.history[-1].total)


def test_step_is_aligned_without_a_validation_loop_too(tmp_path):
    recorder = Recorder()
    monitor = KoopmanCreditMonitor(on_error="raise")
    with pytest.warns(UserWarning, match="no validation loop, so Koopman credit is about training step"):
        model, _ = fit(tmp_path, [monitor], val=False, logger=recorder)
    assert [step for step, row in recorder.rows if "koopman/total" in row] == [3, 7, 11]
    assert monitor.report.n_samples == 160
    direct = credit_report(model, [dataset().tensors[0]])
    np.testing.assert_allclose(monitor.report.credit, direct.credit, rtol=1e-5)


def test_every_n_epochs_still_ends_on_the_final_weights(tmp_path):
    monitor = KoopmanCreditMonitor(every_n_epochs=2, on_error="raise")
    model, _ = fit(tmp_path, [monitor])
    # Every second epoch, and always the first and the last validation.
    assert [report.step for report in monitor.history] == [4, 8, 12]
    expected = credit_report(model, loaders()[1]).credit
    np.testing.assert_allclose(monitor.history[-1].credit, expected, rtol=1e-6)


def test_early_stopping_and_checkpoints_can_monitor_a_credit(tmp_path):
    stop = EarlyStopping("koopman/total", patience=0, mode="max", min_delta=1e9)
    keep = ModelCheckpoint(tmp_path, monitor="koopman/credit/net.0", filename="best")
    monitor = KoopmanCreditMonitor(on_error="raise")
    _, trainer = fit(tmp_path, [monitor, stop, keep], enable_checkpointing=True, max_epochs=9)
    assert trainer.current_epoch == 2
    assert keep.best_model_score is not None
    assert float(keep.best_model_score) == pytest.approx(min(r.credit[0] for r in monitor.history))


def test_only_the_newest_report_keeps_its_operators(watched):
    # There are three: the sanity check before training leaves no trace.
    assert [len(report.operators) for report in watched.monitor.history] == [0, 0, 3]


UNREADABLE = [{"history": given} for given in (["{}"], ["{"], [3], ["[" * 100_000], 3)]
UNREADABLE += [{"history": [], "shown": 3}, {}, [], None]


@pytest.mark.parametrize("saved", UNREADABLE, ids=lambda saved: str(saved)[:30])
def test_a_history_that_cannot_be_read_does_not_stop_a_resume(saved):
    monitor = KoopmanCreditMonitor()
    monitor.setup(None, None, "fit")
    with pytest.warns(UserWarning, match="credit skipped: the checkpoint holds no history of credits"):
        monitor.load_state_dict(saved)
    assert monitor.history == []


def test_evaluation_leaves_the_history_alone(watched):
    monitor = copy.copy(watched.monitor)
    monitor.setup(None, None, "validate")
    monitor.load_state_dict({"history": []})
    assert monitor.history == watched.monitor.history != []


def test_misspelt_component_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"no module is called 'net.9'.*'net.6'"):
        fit(tmp_path, [KoopmanCreditMonitor(["net.9"])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs is 0"),
        ({"max_samples": 0}, "max_samples is 0"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        KoopmanCreditMonitor(**options)


@pytest.mark.parametrize(
    ("argument", "where"),
    [
        ("quantities", "trainer.callback_metrics and monitor.history hold every quantity"),
        ("top_k", "top_k is no argument any more: name the components"),
        ("layout", "figures=False leaves out all but plain scalars"),
        ("hyperparameters", "logger.log_hyperparams"),
        ("nonsense", "unexpected keyword argument 'nonsense'"),
    ],
)
def test_earlier_arguments_say_where_they_went(argument, where):
    with pytest.raises(TypeError, match=where):
        KoopmanCreditMonitor(**{argument: 8})


class Diverging(LitNet):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.current_epoch == 1 and batch_idx == 3:
            with torch.no_grad():
                self.net[4].weight.fill_(float("nan"))


def test_nan_states_warn_once_and_training_goes_on(tmp_path):
    monitor, model = KoopmanCreditMonitor(), Diverging()
    trainer = quiet_trainer(tmp_path, [monitor], logger=Recorder())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, *loaders())
    said = [str(w.message) for w in caught if "Koopman credit skipped" in str(w.message)]
    assert len(said) == 1  # in epoch 2 every component gives NaN
    assert "'net.4' holds NaN in batch 0" in said[0]
    assert trainer.current_epoch == 3
    assert len(monitor.history) == 1
    assert hooks_on(model) == 0


class Halved(small_module()):
    def __init__(self, eps: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.eps = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), eps

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2, eps=self.eps)


def test_half_precision_is_measured_as_by_a_direct_report(tmp_path):
    monitor, model = KoopmanCreditMonitor(on_error="raise"), Halved(1e-4)
    quiet_trainer(tmp_path, [monitor], precision="16-true").fit(model)
    batches = [x.half() for x, _ in loaders()[1]]
    direct = credit_report(model, batches)
    assert [report.step for report in monitor.history] == [4, 8, 12]
    assert monitor.report.credit == pytest.approx(direct.credit, abs=1e-9)


def test_weights_that_diverged_are_named_as_the_reason(tmp_path):
    monitor, model = KoopmanCreditMonitor(), Halved(1e-8)
    said = "'net.0' holds NaN in batch 0, and its weights are not finite either"
    with pytest.warns(UserWarning, match=said):
        quiet_trainer(tmp_path, [monitor], precision="16-true").fit(model)
    # That is not the callback's doing.
    twin = Halved(1e-8)
    quiet_trainer(tmp_path, [], precision="16-true").fit(twin)
    assert twin.net[0].weight.isnan().any()
    assert monitor.report is None


@pytest.mark.parametrize(
    ("reduce", "told"),
    [
        ({"head": "mean"}, "reduce holds 'head', which matches no"),
        (lambda t: t[:5], "reduce gave 5 rows of 'input', of shape"),
    ],
)
def test_a_reduction_that_cannot_be_done_warns_once(tmp_path, reduce, told):
    monitor = KoopmanCreditMonitor(reduce=reduce)
    trainer = quiet_trainer(tmp_path, [monitor], logger=Recorder())
    with pytest.warns(UserWarning, match=f"skipped: {told}") as caught:
        trainer.fit(LitNet(), *loaders())
    assert sum("Koopman credit skipped" in str(w.message) for w in caught) == 1
    assert (trainer.current_epoch, monitor.history) == (3, [])


def test_on_error_raise_raises(tmp_path):
    trainer = quiet_trainer(tmp_path, [KoopmanCreditMonitor(on_error="raise")], logger=Recorder())
    with pytest.raises(ValueError, match=r"'net.4' holds NaN"):
        trainer.fit(Diverging(), *loaders())


def test_validating_checkpoints_logs_at_their_own_steps(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, [keep], enable_checkpointing=True)
    recorder = Recorder()
    monitor = KoopmanCreditMonitor(on_error="raise")
    trainer = quiet_trainer(tmp_path, [monitor], logger=recorder)
    for path in sorted(tmp_path.glob("epoch=*.ckpt")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning misses the ModelCheckpoint of the training
            trainer.validate(LitNet(), loaders()[1], ckpt_path=str(path), verbose=False)
    assert [step for step, row in recorder.rows if "koopman/total" in row] == [4, 8, 12]
    assert [report.step for report in monitor.history] == [4, 8, 12]


def test_two_monitors_side_by_side(tmp_path):
    monitors = [
        KoopmanCreditMonitor(prefix="all", on_error="raise"),
        KoopmanCreditMonitor("net.[06]", prefix="ends", on_error="raise"),
    ]
    _, trainer = fit(tmp_path, monitors)
    assert "all/credit/net.4" in trainer.callback_metrics
    assert "ends/credit/net.6" in trainer.callback_metrics
    assert "ends/credit/net.4" not in trainer.callback_metrics


@pytest.mark.parametrize("validates", ["fast", "forward", "net"])
def test_a_part_that_is_kept_beside_its_compiled_form_is_left_alone(tmp_path, validates):
    class Both(LitNet):
        def __init__(self) -> None:
            super().__init__()
            self.fast = torch.compile(self.net, backend="eager")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.fast(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            run = self if validates == "forward" else getattr(self, validates)
            self.log("val_loss", nn.functional.cross_entropy(run(batch[0]), batch[1]))

    def fit_both(callbacks: list[Any]) -> LitNet:
        torch._dynamo.reset()
        L.seed_everything(7, verbose=False)
        model = Both()
        quiet_trainer(tmp_path, callbacks, max_epochs=2).fit(model, *loaders())
        return model

    monitor = KoopmanCreditMonitor()
    expected = fingerprint(fit_both([]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fingerprint(fit_both([monitor]))
    assert_same(found, expected)
    ours = [str(w.message) for w in caught if "Koopman credit skipped" in str(w.message)]
    if validates == "net":
        (why,) = ours
        assert "weights alone, compiled code and what it was made from cannot be recorded" in why
    else:
        assert monitor.report.components == COMPONENTS
        assert not ours


def test_compiled_parts_of_sharded_weights_are_not_called_a_second_time(tmp_path):
    class FSDPStrategy(SingleDeviceStrategy):
        pass

    model, monitor = LitNet(), KoopmanCreditMonitor(on_error="raise")
    model.net = torch.compile(model.net, backend="eager")
    strategy = FSDPStrategy(torch.device("cpu"))
    trainer = quiet_trainer(tmp_path, [monitor], strategy=strategy, accelerator="auto")
    with pytest.raises(RuntimeError, match=r"FSDPStrategy shards the weights.*compile nothing"):
        trainer.fit(model, *loaders())


def test_works_in_the_other_namespace(tmp_path):
    pl = pytest.importorskip("pytorch_lightning")

    monitor = KoopmanCreditMonitor(on_error="raise")
    assert isinstance(monitor, pl.Callback)
    assert isinstance(monitor, L.Callback)
    quiet_trainer(tmp_path, [monitor], kind=pl.Trainer, max_epochs=1).fit(
        small_module("pytorch_lightning")()
    )
    assert monitor.report.components == ("net.0", "net.2")


def test_reductions_and_the_output_are_passed_on(tmp_path):
    monitor = KoopmanCreditMonitor(on_error="raise", options=Options(reduce="flatten", output="net.4"))
    fit(tmp_path, [monitor])
    assert monitor.report.components == ("net.0", "net.4")
    with pytest.raises(ValueError, match="reduce holds 'sum'; choose one of"):
        KoopmanCreditMonitor(options=Options(reduce="sum"))
    with pytest.raises(
        ValueError, match=r"output is .*; a callback does not see what the model returns"
    ):
        KoopmanCreditMonitor(options=Options(output=lambda out: out))


def run_again(name: str, missing: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a module's own lines anew, where some packages cannot be imported."""
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    found = importlib.util.find_spec(name)
    assert found is not None
    return runpy.run_path(str(found.origin))


@pytest.mark.parametrize("missing", ["lightning.pytorch", "pytorch_lightning"])
def test_one_of_lightnings_namespaces_is_enough(missing, monkeypatch):
    other = {"lightning.pytorch": "pytorch_lightning", "pytorch_lightning": "lightning.pytorch"}[missing]
    base = pytest.importorskip(other).Callback
    found = run_again("lightning_koopman.callback.harmless", [missing], monkeypatch)
    found["join_namespaces"](required=True)
    assert found["Callback"].__bases__ == (base,)


def test_without_lightning_the_callback_says_what_to_install(monkeypatch):
    missing = ["lightning.pytorch", "pytorch_lightning"]
    found = run_again("lightning_koopman.callback.harmless", missing, monkeypatch)
    with pytest.raises(ModuleNotFoundError, match="the callback needs Lightning: pip install lightning"):
        found["HarmlessCallback"]("warn", None)


RUNS = """
import importlib, logging, pickle, sys, warnings
warnings.simplefilter("ignore")
{before}
from lightning_koopman import KoopmanCreditMonitor
assert {{"lightning", "pytorch_lightning"}} & set(sys.modules) == set({names})
early = {early}
{after}
import torch
from torch import nn
monitor = early or KoopmanCreditMonitor(on_error="raise")
assert {{"lightning.pytorch", "pytorch_lightning"}} & set(sys.modules) == {expected}
monitor = pickle.loads(pickle.dumps(monitor))
for name in {expected}:
    pl = importlib.import_module(name)

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def validation_step(self, batch, batch_idx):
            self.net(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar"], False)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[monitor], enable_model_summary=False, **quiet
    )
    loader = torch.utils.data.DataLoader(torch.randn(90, 8), batch_size=30)
    trainer.fit(Net(), loader, loader)
    assert monitor.report.n_samples == 90
    assert isinstance(KoopmanCreditMonitor(), pl.Callback)
    assert isinstance(monitor, KoopmanCreditMonitor)
"""


FORKS = """
import json, os, sys
import torch._dynamo, torch.utils.tensorboard, torchmetrics  # what takes both namespaces seconds
assert not {"lightning", "pytorch_lightning"} & set(sys.modules)
for code in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        exec(code)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, code
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_no_namespace_is_imported_but_the_users_and_each_of_them_runs_the_callback(tmp_path):
    pytest.importorskip("lightning")
    pytest.importorskip("pytorch_lightning")
    cases = [
        ([], False, ["pytorch_lightning"]),
        (["lightning"], True, ["pytorch_lightning"]),
        (["pytorch_lightning", "lightning"], False, []),
    ]
    codes = [
        RUNS.format(
            before="\n".join(f"import {name}" for name in before),
            names=before,
            early='KoopmanCreditMonitor(on_error="raise")' if early else "None",
            after="\n".join(f"import {name}" for name in after),
            expected={"lightning.pytorch" if "lightning" in n[:9] else n for n in (*before, *after)},
        )
        for before, early, after in cases
    ]
    subprocess.run([sys.executable, "-c", FORKS, json.dumps(codes)], check=True, cwd=tmp_path)


@pytest.mark.slow
def test_a_validation_in_which_nothing_is_due_costs_next_to_nothing(tmp_path):
    def milliseconds(callbacks: list[Any]) -> list[float]:
        trainer, taken = quiet_trainer(tmp_path, callbacks, num_sanity_val_steps=0, max_epochs=5), []
        loop = trainer.fit_loop.epoch_loop.val_loop
        run = loop.run

        def timed() -> Any:
            start = time.process_time()
            result = run()
            taken.append(1e3 * (time.process_time() - start))
            return result

        loop.run = timed
        trainer.fit(LitNet(), *loaders())
        return taken[1:-1]  # the first and the last are always measured

    due = [KoopmanCreditMonitor(every_n_epochs=1000)]
    runs = [(milliseconds([]), milliseconds(due)) for _ in range(10)]
    without, with_monitor = (np.median(taken) for taken in zip(*runs, strict=True))
    assert with_monitor - without < 5


GROWS = """
import torch
from torch import nn
import lightning as L
from lightning_koopman import KoopmanCreditMonitor

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        convs = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*convs, nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10))
        self.sizes = []
    def training_step(self, batch, i):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def validation_step(self, batch, i):
        self.net(batch[0])
    def on_train_epoch_end(self):
        with open("/proc/self/statm") as file:
            self.sizes.append(int(file.read().split()[1]) * 4096 / 2**20)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

torch.manual_seed(0)
data = torch.utils.data.TensorDataset(torch.randn(600, 1, 8, 8), torch.randint(10, (600,)))
loader, model = torch.utils.data.DataLoader(data, 64), Net()
quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar"], False)
monitor = KoopmanCreditMonitor(every_n_epochs=1, on_error="raise")
trainer = L.Trainer(max_epochs=41, callbacks=[monitor], accelerator="cpu", **quiet)
trainer.fit(model, loader, loader)
assert len(monitor.history) == 41
# Memory is handed back after the 8th, 16th and 32nd measurement, and the last one computes more.
print(min(model.sizes[24:40]) - min(model.sizes[4:20]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_the_process_does_not_grow_with_each_measurement(tmp_path):
    (tmp_path / "grows.py").write_text(GROWS)
    done = warm.run([tmp_path / "grows.py"])
    assert done.returncode == 0, done.stderr
    # It was 5 to 12 MiB per measurement.
    assert float(done.stdout.split()[-1]) < 10


def test_a_measurement_is_freed_as_soon_as_the_next_is_done(tmp_path):
    alive: list[Any] = []

    class Watches(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            alive.append(weakref.ref(monitor._watched))

    monitor = KoopmanCreditMonitor(every_n_epochs=1, on_error="raise")
    gc.collect()
    gc.disable()
    try:
        trainer = quiet_trainer(tmp_path, [monitor, Watches()], max_epochs=3)
        trainer.fit(LitNet(), *loaders())
        # The last one is made anew for the final report, and let go of at the end.
        assert [measurement() is None for measurement in alive[:2]] == [True, True]
    finally:
        gc.enable()


def test_a_step_that_gives_all_samples_by_many_calls_leaves_no_hook_behind(tmp_path):
    class Solver(LitNet):
        """Calls its network again and again, as solvers of differential equations do."""

        def validation_step(self, batch: Any, _: int) -> None:
            for call in range(6):
                self(batch[0] * (1 + 0.1 * call))
            seen.append(hooks_on(self))

    class Behind(L.Callback):
        def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            left.append((hooks_on(module), torch._C._len_torch_dispatch_stack()))

    seen: list[int] = []
    left: list[tuple[int, int]] = []
    monitor = KoopmanCreditMonitor(every_n_epochs=1, figures=False, max_samples=100)
    quiet_trainer(tmp_path, [monitor, Behind()], max_epochs=2).fit(Solver(), *loaders())
    assert monitor.report.n_samples == 100
    assert any(seen)
    assert set(left) == {(0, 0)}
    torch.empty(2)
