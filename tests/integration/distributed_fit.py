"""Trains under a strategy with the monitor on; every process leaves its reports in a folder."""

import hashlib
import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_koopman import KoopmanCreditMonitor, Options
from lightning_koopman.callback import budget
from lightning_koopman.measurement import accumulator, processes
from lightning_koopman.measurement.accumulator import Accumulator
from lightning_koopman.measurement.measurement import Measurement
from lightning_koopman.network.capture.capture import Capture

NAMESPACE = os.environ.get("LIGHTNING_NAMESPACE", "lightning.pytorch")
L = importlib.import_module(NAMESPACE)


def shard_sizes(shards: str, n_processes: int, n_samples: int) -> list[int]:
    """Number of samples of each process, dealt out in turn as long as its part lasts."""
    even = [n_samples // n_processes + (r < n_samples % n_processes) for r in range(n_processes)]
    if shards == "unequal":
        return [max(1, size // (r + 1)) for r, size in enumerate(even)]
    if shards == "single":
        return [1, n_samples - 1][:n_processes]
    if shards == "few":
        return [3, n_samples - 3][:n_processes]
    if shards == "none":
        return [0] * n_processes
    if shards in ("empty", "skipping"):
        return [0 if r == n_processes - 1 else size for r, size in enumerate(even)]
    return even


def turns(sizes: list[int]) -> list[tuple[int, int]]:
    """(rank, place within the rank) in the order in which samples are dealt out."""
    return [(r, i) for i, r in sorted((i, r) for r, size in enumerate(sizes) for i in range(size))]


class Rows(IterableDataset):
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.rows)


class Data(L.LightningDataModule):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.allow_zero_length_dataloader_with_multiple_devices = config["shards"] == "skipping"
        generator = torch.Generator().manual_seed(7)
        self.rows = torch.randn(config["n_samples"], 6, dtype=torch.float64, generator=generator)
        self.rows[:, 0] += torch.arange(config["n_samples"]) / 50

    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.rows[:32]), batch_size=4)

    def val_dataloader(self) -> DataLoader:
        size, shards = self.config["batch_size"], self.config["shards"]
        if "max_samples" in self.config:
            # Which batches are watched where not all are: as large as those of all processes together.
            size *= self.config.get("parts", 1)
        if shards == "sampler":
            labels = self.rows.argmax(dim=1) // 2
            return DataLoader(TensorDataset(self.rows, labels), batch_size=size)
        sizes = shard_sizes(shards, self.config["processes"], self.config["n_samples"])
        order = turns(sizes)
        world, rank = self.trainer.world_size, self.trainer.global_rank
        mine = self.rows[[k for k, (r, _) in enumerate(order) if world == 1 or r == rank]]
        if shards == "skipping":
            return DataLoader(TensorDataset(mine), batch_size=size)
        return DataLoader(Rows(mine), batch_size=size)


class Residual(nn.Module):
    """Adds branches to what they take, of which samples do not tell the one from the other."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.branches, self.head = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), nn.Linear(6, 3)
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            x = x + self.weight * branch(x)
        return self.head(x)


class Net(L.LightningModule):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 9), nn.ReLU(), nn.Linear(9, 5), nn.Linear(5, 3)
        )
        if config.get("residual"):
            self.net = Residual(config["residual"])
        self.double()

    def configure_model(self) -> None:
        if self.config.get("strategy", "auto")[0].isdigit():
            from sharding import parallelise

            parallelise(self.net, self.device_mesh, self.config["strategy"])

    def forward(self, x: Tensor) -> Tensor:
        if self.config.get("break_forward") == self.trainer.global_rank and not self.training:
            raise ArithmeticError("broken forward")
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0] if isinstance(batch, list) else batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0 if self.config.get("frozen", True) else 0.1)


class Monitor(KoopmanCreditMonitor):
    """Remembers its warnings in every process, not in process 0 only."""

    def _warn_once(self, message: str, *args: Any, **kwargs: Any) -> None:
        self.told = [*getattr(self, "told", []), message]


class Scribe(L.Callback):
    """Writes down what each process ends up with."""

    def __init__(self, folder: str, monitor: Monitor) -> None:
        self.folder, self.monitor = folder, monitor

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        every = [h for m in pl_module.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
        # Strategies that spread weights leave hooks of their own.
        hooks = sum(is_ours(hook) for hooks in every for hook in hooks.values())
        content = {
            "history": [report.to_dict() for report in self.monitor.history],
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
            "warned": getattr(self.monitor, "told", []),
            "hooks": hooks,
            "weights": digest(pl_module),
            "collectives": COLLECTIVES,
        }
        Path(self.folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(content))


class Halves(L.Callback):
    """Changes weights behind the last validation."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with torch.no_grad():
            pl_module.net[2].weight[:4].mul_(0.5)


class Averages(L.Callback):
    """Puts other weights in place while validation runs, and for good when training ends."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.kept = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        pl_module.load_state_dict({name: tensor / 2 for name, tensor in self.kept.items()})

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.load_state_dict(self.kept)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.load_state_dict({name: tensor / 2 for name, tensor in self.kept.items()})


COLLECTIVES: list[str] = []
"""What this process exchanged with the others for the monitor in the training under way."""


class CountedCollectives:
    """Stands for ``torch.distributed`` and counts what is called."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch.distributed, name)
        if name.startswith(("all_", "broadcast", "gather", "reduce", "scatter", "barrier")):
            COLLECTIVES.append(name)
        return found


def is_ours(hook: Any) -> bool:
    return getattr(hook, "func", hook).__module__.startswith("lightning_koopman")


def digest(model: nn.Module) -> str:
    """Tell the weights that this process holds by their bits."""
    summed = hashlib.sha256()
    for parameter in model.parameters():
        held = parameter.detach()
        held = held.to_local() if hasattr(held, "to_local") else held
        summed.update(held.contiguous().numpy().tobytes())
    return summed.hexdigest()


def spreads_weights(config: dict[str, Any]) -> bool:
    name = config.get("strategy", "auto")
    return name[0].isdigit() or name.startswith("fsdp")


def strategy_of(config: dict[str, Any]) -> Any:
    name = config.get("strategy", "auto")
    if spreads_weights(config):
        from sharding import strategy

        return strategy(NAMESPACE, name)
    if name == "ddp":
        return DDPStrategy(timeout=timedelta(seconds=60), process_group_backend="gloo")
    return name


@contextmanager
def broken_numerics(rank: int, place: str) -> Generator[None, None, None]:
    """Make our own numerics fail in one process only."""
    kinds: tuple[Any, ...] = (Measurement, Accumulator, Capture, accumulator)
    owner = next(kind for kind in kinds if hasattr(kind, place))
    kept = getattr(owner, place)

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.distributed.get_rank() == rank:
            raise ArithmeticError("broken numerics")
        return kept(self, *args, **kwargs)

    setattr(owner, place, broken)
    try:
        yield
    finally:
        setattr(owner, place, kept)


@contextmanager
def slowed(rank: int, seconds: float) -> Generator[None, None, None]:
    """Let reports take longer in one process only, and leave little to spend."""
    report, allowance = Measurement.report, budget.ALLOWANCE

    def slow(self: Any, **given: Any) -> Any:
        if torch.distributed.get_rank() == rank:
            time.sleep(seconds)
        return report(self, **given)

    Measurement.report, budget.ALLOWANCE = slow, 2.5 * seconds
    try:
        yield
    finally:
        Measurement.report, budget.ALLOWANCE = report, allowance


def run(config: dict[str, Any], folder: str) -> L.Trainer:
    monitor = Monitor(
        options=Options(max_dim=config["max_dim"], delay=config.get("delay", 1)),
        max_samples=config.get("max_samples", 4096),
        every_n_epochs=config.get("every_n_epochs", 1),
        max_overhead=config.get("max_overhead", 0.05),
        on_error=config.get("on_error", "warn"),
    )
    strategy = strategy_of(config)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=strategy,
        devices=config["devices"],
        max_epochs=config.get("max_epochs", 1),
        # Some strategies take no precision but their own; the network is in float64 anyway.
        precision=None if spreads_weights(config) else "64-true",
        logger=False,
        callbacks=[
            *[Halves()][: config.get("halves", False)],
            *[Averages()][: config.get("averages", False)],
            *[monitor][config.get("unwatched", False) :],
            Scribe(folder, monitor),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=config.get("limit_val_batches"),
        use_distributed_sampler=config["shards"] == "sampler",
    )
    COLLECTIVES.clear()
    processes.dist = CountedCollectives()
    fault, slow = config.get("break_numerics"), config.get("slow")
    with broken_numerics(*fault) if fault else slowed(*slow) if slow else nullcontext():
        trainer.fit(Net(config), Data(config))
    if config.get("validate"):
        trainer.validate(Net(config), Data(config), verbose=False)
    return trainer


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    configs = json.loads(sys.argv[1])
    for place, config in enumerate(configs):
        target = os.path.join(sys.argv[2], str(place))
        os.makedirs(target, exist_ok=True)
        finished = run(config, target)
        if finished.is_global_zero:
            parent = {k: float(v) for k, v in finished.callback_metrics.items()}
            Path(target, "parent.json").write_text(json.dumps(parent))
