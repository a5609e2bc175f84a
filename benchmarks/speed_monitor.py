"""Measures what watching a training costs: epochs, the demo, and trainings of three minutes.

Run ``python benchmarks/speed_monitor.py epochs demo minutes`` with ``OMP_NUM_THREADS=1``; the parts take
seven, two and thirty minutes; ``minutes=60`` trains for one. Seconds are the processor's, of this
process; both sides of a ratio are measured in one run, and of long trainings they take turns by epoch: a
neighbour on the same core makes one and the same epoch take half as long again.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lightning_koopman import KoopmanCreditMonitor
from lightning_koopman.demo import DigitClassifier, Digits
from lightning_koopman.koopman.moments import Layout


class Transformer(nn.Module):
    """An encoder that reads an image as one token per row of ``pixels``."""

    def __init__(self, pixels: int, width: int, depth: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Linear(pixels, width)
        self.position = nn.Parameter(0.1 * torch.randn(pixels, width))
        block = nn.TransformerEncoderLayer(width, 4, hidden, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(images.squeeze(1)) + self.position).mean(dim=1))


def training(kind: str) -> tuple[L.LightningModule, L.LightningDataModule]:
    """A module and its data: the demo's, or a transformer on the same digits.

    The MLP and the small transformer (4 blocks of width 64) train on 898 digits of 8×8 and validate on
    539, the CNN and the transformer (4 blocks of width 128) on 2,500 of 28×28 and on 1,500.
    """
    torch.manual_seed(0)
    arch = "mlp" if kind in ("MLP", "small transformer") else "cnn"
    model = DigitClassifier(arch)
    if kind == "transformer":
        model.net = Transformer(28, 128, 4, 256)
    if kind == "small transformer":
        model.net = Transformer(8, 64, 4, 128)
    return model, Digits(arch)


class Epochs(L.Callback):
    """Processor seconds of every epoch, validation and all callbacks included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_epoch_start(self, *_: object) -> None:
        self.ends.append(time.process_time())

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]


def fit(kind: str, epochs: int, callbacks: Sequence[L.Callback]) -> float:
    """Train, with TensorBoard, and return the processor seconds of it."""
    model, data = training(kind)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), log_every_n_steps=5,
            logger=TensorBoardLogger(folder), enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        start = time.process_time()
        trainer.fit(model, data)
        return time.process_time() - start


def table(heads: str, rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    columns = heads.split(" | ")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def epochs() -> str:
    """Every second epoch measured: what a measured one takes over its neighbours."""
    rows = []
    counts = {"MLP": 42, "CNN": 14, "transformer": 25, "small transformer": 18}
    targets = {"MLP": 1.5, "CNN": 1.25, "transformer": 1.06}
    for kind, count in counts.items():
        target = targets.get(kind)
        watch = Epochs()
        # Effects are measured where the budget has room, so that epochs would differ.
        monitor = KoopmanCreditMonitor(every_n_epochs=2, figures=False, effects=(), on_error="raise")
        fit(kind, count, [watch, monitor])
        # The first epochs warm up, and the last has errors and effects. Epochs 2, 4, … are measured.
        taken = watch.seconds[3:-1]
        measured, others = taken[0::2], taken[1::2]
        pairs = list(zip(measured, others, strict=False))
        ratio = statistics.median(a / b for a, b in pairs)
        spread = f"{min(a / b for a, b in pairs):.2f} … {max(a / b for a, b in pairs):.2f}"
        base = statistics.median(others)
        rows.append([
            kind, f"{base:.3f}", f"{statistics.median(measured):.3f}", f"{ratio:.2f} ({spread})",
            f"≤ {target}" if target else "", f"{1 + least(monitor) / base:.2f}",
            verdict(ratio <= target) if target else "",
        ])  # fmt: skip
    heads = "epoch of | not measured, s | measured, s | ratio (range) | target | floor | "
    return table(heads, rows)


def least(monitor: KoopmanCreditMonitor) -> float:
    """Seconds of the library calls that a measurement like a monitor's last cannot do without."""
    from speed_networks import credit_calls, drift_calls, fastest, products_of

    assert monitor.report is not None
    reference = monitor.report.reference
    assert reference is not None
    dims = tuple(mean.shape[1] for mean in reference.means)
    layout = Layout(dims, monitor.options.folds, 0, reference.parents)
    fits = fastest(credit_calls, layout, errors=False) + fastest(drift_calls, layout)
    return products_of(layout, monitor.report.n_samples) + fits


def demo() -> str:
    """The demo's training as a whole, each epoch measured, and by default."""
    rows = []
    for name, given in (("every epoch measured", {"every_n_epochs": 1}), ("default", {})):
        ratios, base, other, drawn = [], [], [], []
        for _ in range(4):
            monitor = KoopmanCreditMonitor(on_error="raise", **given)
            base.append(fit("MLP", 30, []))
            other.append(fit("MLP", 30, [monitor]))
            ratios.append(other[-1] / base[-1])
            drawn.append(monitor.budget._took["draw"])
        ratio, first = statistics.median(ratios[1:]), ratios[0]
        plain, measured = statistics.median(base[1:]), len(monitor.history)
        rows.append([
            f"demo, {name}", measured, f"{plain:.2f}", f"{statistics.median(other[1:]):.2f}",
            f"{ratio:.2f} (first of the process: {first:.2f})", "≤ 2",
            f"{1 + (measured * least(monitor) + min(drawn)) / plain:.2f}", verdict(ratio <= 2),
        ])  # fmt: skip
    return table("training | measured | none, s | monitor, s | ratio | target | floor | ", rows)


class Turn(L.Callback):
    """Lets one of two trainings run at a time, an epoch each, and counts the seconds of its own.

    ``plain`` are those at the end of each epoch, without what a monitor counts as its own.
    """

    def __init__(self, other: Turn | None = None) -> None:
        self.free, self.seconds, self.began = threading.Semaphore(0 if other else 1), 0.0, 0.0
        self.other, self.monitor, self.plain = other, None, list[float]()
        if other is not None:
            other.other = self

    def clock(self) -> float:
        """Processor seconds of this training so far."""
        return self.seconds + time.process_time() - self.began

    def take(self) -> None:
        self.free.acquire()
        self.began = time.process_time()

    def give(self) -> None:
        self.seconds = self.clock()
        self.other.free.release()

    def on_train_epoch_start(self, *_: object) -> None:
        self.note()
        self.give()
        self.take()

    def note(self, *_: object) -> None:
        self.plain.append(self.clock() - (self.monitor.budget.spent if self.monitor else 0.0))

    on_train_end = note

    def run(self, *given: object) -> None:
        self.take()
        try:
            fit(*given)
        finally:
            self.give()
            # If this one failed, the other must not wait.
            self.other.free.release(1000)


def minutes(seconds: float = 180) -> str:
    """Trainings of three minutes with the monitor as it is by default, figures included."""
    rows = []
    for kind in ("CNN", "transformer"):
        watch = Epochs()
        fit(kind, 4, [watch])
        count = max(4, round(seconds / statistics.median(watch.seconds)))
        sides, told, measured, apart = [0.0, 0.0], [], [], list[float]()
        # In both orders: without a monitor too, the second of two trainings takes some percent more.
        for first in (0, 1):
            turns = [Turn()]
            turns.append(Turn(turns[0]))
            monitor = KoopmanCreditMonitor(on_error="raise")
            # By processor seconds too, for on the clock on the wall it would count the other's turns.
            monitor.budget.clock = turns[1 - first].clock
            base, other = turns[first], turns[1 - first]
            other.monitor = monitor
            threads = [
                threading.Thread(target=turn.run, args=(kind, count, [turn, *more]))
                for turn, more in ((base, []), (other, [monitor]))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            sides = [sides[0] + base.seconds, sides[1] + other.seconds]
            told.append(f"{monitor.budget.overhead:.3f}")
            measured.append(str(len(monitor.history)))
            pairs = zip(pairwise(base.plain), pairwise(other.plain), strict=True)
            apart += [(d - c) - (b - a) for (a, b), (c, d) in pairs]
        ratio, error = sides[1] / sides[0], statistics.stdev(apart) * len(apart) ** 0.5 / sides[0]
        rows.append([
            kind, count, ", ".join(measured), f"{sides[0] / 2:.0f}", f"{sides[1] / 2:.0f}",
            f"{ratio:.3f} ± {error:.3f}", ", ".join(told), f"{sum(apart) / sides[0]:.3f} ± {error:.3f}",
            "≤ 1.05", verdict(ratio <= 1.05),
        ])  # fmt: skip
    heads = (
        "training of | epochs | measured | none, s | monitor, s | ratio | koopman/overhead | "
        "not counted | target | "
    )
    return table(heads, rows)


PARTS: dict[str, Callable[..., str]] = {"epochs": epochs, "demo": demo, "minutes": minutes}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    # What watching takes while the user's code runs is counted by it.
    time.perf_counter = time.process_time
    for part in sys.argv[1:] or PARTS:
        name, _, seconds = part.partition("=")
        print(PARTS[name](*map(float, filter(None, [seconds]))), end="\n\n", flush=True)
