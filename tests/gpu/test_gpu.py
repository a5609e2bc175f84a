"""On a GPU of NVIDIA's; ``pytest -m gpu`` runs them, and each skips where there is none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lit import LitNet, hooks_on, loaders, quiet_trainer
from torch import Tensor, nn

from lightning_koopman import CreditReport, KoopmanCredit, KoopmanCreditMonitor, Options, credit_report
from lightning_koopman.measurement.measurement import Measurement, merge_processes
from lightning_koopman.network.axes.padding import valid_positions
from lightning_koopman.network.runs.recording import Recording
from lightning_koopman.network.runs.steps import Part

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
FIXED = Options(tikhonov=1e-6)


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let float32 mean float32, and let Lightning be deterministic."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


def mlp(width: int = 300) -> nn.Module:
    parts = [nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, width), nn.ReLU(), nn.Linear(width, 5)]
    return nn.Sequential(*parts).eval()


def conv() -> nn.Module:
    parts = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2)]
    return nn.Sequential(*parts, nn.ReLU(), nn.Flatten(), nn.Linear(16 * 12 * 12, 4)).eval()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.first, self.second = (
            nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(32, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in (self.first, self.second):
            x = layer(x, src_key_padding_mask=attention_mask == 0)
        weights = attention_mask[:, :, None].to(x.dtype)
        return self.head((x * weights).sum(dim=1) / weights.sum(dim=1))


def batches_for(model: nn.Module, n_samples: int = 800, size: int = 50) -> list[Any]:
    if isinstance(model, Attention):
        lengths = torch.randint(1, 9, (n_samples, 1))
        masks = (torch.arange(8) < lengths).long().split(size)
        ids = torch.randint(0, 50, (n_samples, 8)).split(size)
        return [{"ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]
    shape = (12,) if isinstance(model[0], nn.Linear) else (3, 25, 25)
    return list(torch.randn(n_samples, *shape).split(size))


def on_gpu(batch: Any) -> Any:
    return {n: t.cuda() for n, t in batch.items()} if isinstance(batch, dict) else batch.cuda()


def cast(batch: Any, dtype: torch.dtype) -> Any:
    return batch if isinstance(batch, dict) else batch.to(dtype)


def run_on(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


def numbers(report: CreditReport) -> dict[str, Any]:
    names = ("credit", "gain", "nonlinearity", "sensitivity", "r2", "chain_r2", "rank")
    return {name: pytest.approx(getattr(report, name), rel=1e-6, abs=1e-6) for name in names}


@pytest.mark.parametrize("make", [mlp, conv, Attention])
def test_credits_on_the_gpu_are_those_on_the_cpu(make: Any) -> None:
    model = make().double().eval()
    batches = [cast(batch, torch.float64) for batch in batches_for(model)]
    # The ridge weight is given, for rounding in pooled pixels tells the folds, which choose it.
    expected = credit_report(copy.deepcopy(model), batches, options=FIXED)
    given = credit_report(model.cuda(), batches, options=FIXED)
    for name, value in numbers(expected).items():
        if name in ("r2", "chain_r2", "nonlinearity") and make is conv:
            continue  # held out by fold
        assert getattr(given, name) == value, name
    assert given.total == pytest.approx(expected.total, rel=1e-6, abs=1e-6)


def test_error_bars_on_the_gpu_are_those_on_the_cpu() -> None:
    model = mlp().double()
    batches = [batch.double() for batch in batches_for(model)]
    expected = credit_report(copy.deepcopy(model), batches)
    given = credit_report(model.cuda(), batches)
    for name, value in expected.stderr.items():
        assert given.stderr[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_the_model_and_all_random_states_are_left_as_found() -> None:
    model = conv().cuda().train()
    model[0].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    modes, batches = [module.training for module in model.modules()], batches_for(model)
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state()
    credit_report(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), cpu)
    assert torch.equal(torch.cuda.get_rng_state(), cuda)
    assert hooks_on(model) == 0


def trained(folder: Path, callbacks: list[Any], **options: Any) -> LitNet:
    L.seed_everything(0, verbose=False)
    model = LitNet()
    quiet_trainer(folder, callbacks, accelerator="gpu", devices=1, **options).fit(model, *loaders())
    return model


@pytest.mark.filterwarnings("ignore:the Trainer has no logger")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_bit_identical_with_the_monitor(tmp_path: Path, precision: Any) -> None:
    monitor = KoopmanCreditMonitor(on_error="raise")
    watched = trained(tmp_path, [monitor], precision=precision, deterministic=True)
    alone = trained(tmp_path, [], precision=precision, deterministic=True)
    for name, value in alone.state_dict().items():
        assert torch.equal(watched.state_dict()[name], value), name
    assert len(monitor.history) == 3
    assert (monitor.report.r2 <= 1).all()


def test_states_in_bfloat16_give_the_numbers_of_these_states() -> None:
    model = mlp(60).bfloat16().cuda()
    batches = [batch.bfloat16() for batch in batches_for(model)]
    report, metric = credit_report(model, batches, options=FIXED), KoopmanCredit(options=FIXED)
    with torch.no_grad():
        for batch in batches:
            x = batch.cuda()
            a = model[:2](x)
            b = model[2:4](a)
            metric.update([state.double().cpu() for state in (x, a, b, model[4](b))])
    found = metric.compute()
    for place, credit in enumerate(report.credit):
        assert float(found[f"credit/{place}"]) == pytest.approx(credit, rel=1e-6, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_gpu_between_two_blocks_of_rows() -> None:
    for make in (mlp, conv, Attention):
        model = make().cuda()
        batches = [on_gpu(batch) for batch in batches_for(model, 1000, 50)]
        measurement = Measurement(model, options=Options(max_dim=150))
        recording = Recording(model, dict(model.named_children()))
        with torch.no_grad():
            for number, batch in enumerate(batches):
                # The first six batches settle the chain and the bases. No block is full after that.
                torch.cuda.set_sync_debug_mode("error" if number > 7 else "default")
                try:
                    measurement.start_pass(batch)
                    with measurement.capture, recording:
                        recording.keep([Part({})], valid_positions(batch))
                        run_on(model, batch)
                        recording.end_step()
                    measurement.end_pass()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        assert measurement.n_samples == 1000
        assert len(recording.steps) == 20
        assert measurement.report().n_samples == 1000


def test_a_compiled_model_is_measured_as_the_eager_one() -> None:
    model = mlp().cuda()
    batches = batches_for(model)
    expected = credit_report(model, batches)
    given = credit_report(torch.compile(model), batches)
    assert given.credit == pytest.approx(expected.credit, rel=0, abs=1e-9)


@pytest.mark.parametrize(("width", "tolerance"), [(60, 1e-9), (300, 1e-3)])
def test_one_process_of_nccl_gives_the_report_of_no_process(
    tmp_path: Path, width: int, tolerance: float
) -> None:
    model = mlp(width).cuda()
    batches = [on_gpu(batch) for batch in batches_for(model)]
    # Processes fit bases to samples from everywhere, as one does that holds its rows.
    one = Measurement(model, hold=2**30)
    one.run(model, batches)
    alone = one.report()
    torch.cuda.set_device(0)
    address = f"file://{tmp_path / 'meeting'}"
    dist.init_process_group("nccl", init_method=address, rank=0, world_size=1)
    try:
        measurement = Measurement(model, shared=True)
        measurement.run(model, batches)
        merge_processes(measurement, torch.device("cuda", 0))
        report = measurement.report()
    finally:
        dist.destroy_process_group()
    # A wide state's basis is agreed on by a fit on the CPU, in single precision as on the GPU.
    assert report.credit == pytest.approx(alone.credit, rel=0, abs=tolerance)
