"""Whichever line of ours fails while the user's forward runs, the training goes on as without us."""

import inspect
import itertools
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import lightning as L
import pytest
import torch
from lit import quiet_trainer
from test_faults import assert_alike, outcome
from test_own_faults import assert_nothing_stays
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_koopman
from lightning_koopman import KoopmanCreditMonitor, Options
from lightning_koopman.network.access import bystander, hooks, watch

OURS = str(Path(lightning_koopman.__file__).parent)

Site = tuple[CodeType, int]

# Behind these all else is guarded, so nothing is called in them that can fail.
DOORS = {
    door.__code__
    for door in (
        *(hooks._Hook.__call__, hooks._Around.__call__),
        *(bystander.stand_by, bystander.Call.__init__, bystander.Call.__call__),
        *(hooks._is_elsewhere, hooks._is_computed_again),
        # Within what keeps the compiler out, where something was compiled before.
        inspect.unwrap(watch._Watch.__torch_dispatch__),
    )
}

ERRORS = (RuntimeError, MemoryError, torch.OutOfMemoryError)


class Net(L.LightningModule):
    """Calls modules in all ways: as modules, by keywords, by ``forward``, and in one fused operation."""

    def __init__(self, *, parts: bool) -> None:
        super().__init__()
        self.parts = parts
        self.net = nn.ModuleDict({
            "embed": nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True)),
            "encode": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            "both": nn.Bilinear(8, 8, 6),
            "head": nn.Linear(6, 3),
        })
        self.trace: Callable[..., Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.net["embed"](x)
        rows = torch.stack([h, 2 * h, h.flip(0).flip(0)], 1)
        rows = self.net["encode"](rows)
        y = self.net["both"](input2=rows.mean(1), input1=rows[:, -1])
        return self.net["head"].forward(y.tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        # Coverage traces, too.
        before = sys.gettrace()
        sys.settrace(self.trace or before)
        try:
            x = self.net["embed"](batch[0]) if self.parts else self(batch[0])
        finally:
            sys.settrace(before)
        self.log("mean", x.mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(monitors: list[L.Callback], *, epochs: int, parts: bool, trace: Any = None) -> tuple[Any, ...]:
    """Train once; return the model, the Trainer, and what was warned of."""
    L.seed_everything(0, verbose=False)
    model, rows = Net(parts=parts), torch.randn(40, 6)
    model.trace = trace
    trainer = quiet_trainer(None, monitors, log_every_n_steps=None, max_epochs=epochs, logger=False)
    training, validation = (
        DataLoader(TensorDataset(part), 20, shuffle=shuffle)
        for part, shuffle in ((rows[:20], True), (rows, False))
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, training, validation)
    return model, trainer, [str(warning.message) for warning in caught]


def monitor() -> KoopmanCreditMonitor:
    return KoopmanCreditMonitor(every_n_epochs=1, effects=(), options=Options(max_dim=4))


class Lines:
    """Counts how often each line of ours runs."""

    def __init__(self) -> None:
        self.counts: dict[Site, int] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code.co_filename.startswith(OURS) and code not in DOORS:
            return self._line
        return None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            site = frame.f_code, frame.f_lineno
            self.counts[site] = self.counts.get(site, 0) + 1
        return self._line


class Fails(L.Callback):
    """Lets one line fail in each epoch, once, at a call of it that is drawn."""

    def __init__(self, sites: list[tuple[Site, int]]) -> None:
        self.sites, self.errors = iter(sites), itertools.cycle(ERRORS)
        self.raised: list[Site] = []
        self._site: Site | None = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._site, self._left = next(self.sites, (None, 0))

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if self._site is not None and frame.f_code is self._site[0] else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and (frame.f_code, frame.f_lineno) == self._site:
            self._left -= 1
            if self._left < 0:
                self.raised.append(self._site)
                self._site = None
                raise next(self.errors)("a fault of ours")
        return self._line


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
def test_no_line_of_ours_that_fails_in_the_users_forward_is_seen_there(parts):
    lines, draw = Lines(), random.Random(0)
    fit([monitor()], epochs=1, parts=parts, trace=lines)
    # Each function, at one of its lines, and further ones.
    order = draw.sample(list(lines.counts), len(lines.counts))
    first = {code: (code, line) for code, line in order}.values()
    chosen = [*first, *(site for site in order if site not in {*first})][:80]
    fails = Fails([(site, draw.randrange(lines.counts[site])) for site in chosen])
    # In the last epoch nothing fails.
    epochs, watched = len(chosen) + 1, monitor()
    model, trainer, warned = fit([fails, watched], epochs=epochs, parts=parts, trace=fails)
    told = [message for message in warned if "a fault of ours" in message]
    assert len(fails.raised) > len(chosen) * 0.9
    assert len(told) == 1
    assert 0 < len(watched.history) < len(chosen)
    assert watched.report.step == epochs
    assert not any("a fault of ours" in note for note in watched.report.notes)
    assert_nothing_stays(model, trainer)
    plain = fit([], epochs=epochs, parts=parts)
    assert_alike(outcome(model, trainer), outcome(*plain[:2]))
