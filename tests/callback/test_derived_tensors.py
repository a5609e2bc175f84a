"""Data of classes that somebody derived from ``Tensor``, made and kept by methods of their own."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_koopman import KoopmanCreditMonitor, component_effects, credit_report
from lightning_koopman.network.access.subclasses import MadeUnwatched
from lightning_koopman.network.flow.dataflow import DataFlow


class Made(Tensor):
    """Made by ``Tensor.__new__``, which torch refuses under a dispatch mode."""

    @staticmethod
    def __new__(cls, x, *_):
        return super().__new__(cls, x)


class Bare(Tensor):
    """Has no maker of its own."""


class Named(Tensor):
    """Its methods need what only :meth:`of` gives it."""

    @classmethod
    def of(cls, x):
        made = x.as_subclass(cls)
        made.columns = ["a", "b"]
        return made

    def __getitem__(self, place):
        assert self.columns
        return super().__getitem__(place)

    def clone(self, *args, **kwargs):
        made = super().clone(*args, **kwargs)
        made.columns = self.columns
        return made


class Labelled(L.LightningModule):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x):
        # Made anew from a view, as columns picked by their names are.
        return self.net(self.kind(x[:, :6]))

    def training_step(self, batch, _):
        return nn.functional.mse_loss(self(batch[0]).as_subclass(Tensor), batch[1])

    def validation_step(self, batch, _):
        self.training_step(batch, _)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def trained(kind, callbacks):
    torch.manual_seed(0)
    module, x = Labelled(kind), torch.randn(256, 8)
    loader = DataLoader(TensorDataset(x, torch.tanh(x[:, :2])), 64)
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    L.Trainer(max_epochs=2, accelerator="cpu", callbacks=callbacks, **quiet).fit(module, loader, loader)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Made, Bare])
def test_training_goes_on_where_the_step_makes_tensors_of_a_derived_class(kind):
    makers = {each: vars(each).get("__new__") for each in (Made, Bare)}
    monitor = KoopmanCreditMonitor(figures=False, on_error="raise")
    plain, watched = trained(kind, []), trained(kind, [monitor])
    for old, new in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(old, new)
    expected = trained(lambda x: x, [twin := KoopmanCreditMonitor(figures=False, on_error="raise")])
    assert torch.equal(next(expected.parameters()), next(watched.parameters()))
    np.testing.assert_array_equal(monitor.report.credit, twin.report.credit)
    assert monitor.report.notes == twin.report.notes
    assert {each: vars(each).get("__new__") for each in (Made, Bare)} == makers
    assert type(Bare(torch.ones(2))) is Bare
    assert type(torch.Tensor([1.0])) is Tensor


def test_makers_are_patched_once_while_several_follow():
    own = vars(Made)["__new__"]
    with DataFlow():
        with DataFlow():
            assert type(Made(torch.ones(4)[:2])) is Made
        assert vars(Made)["__new__"] is not own
        assert type(Bare(torch.ones(4)[:2])) is Bare
    assert vars(Made)["__new__"] is own
    assert "__new__" not in vars(Bare)


def test_what_a_derived_class_needs_is_not_asked_of_copies():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)).eval()
    x = torch.randn(512, 6)
    reports = [
        credit_report(net, [make(part) for part in x.split(64)]) for make in (torch.clone, Named.of)
    ]
    np.testing.assert_array_equal(reports[1].credit, reports[0].credit)
    np.testing.assert_array_equal(reports[1].r2, reports[0].r2)


class Wrapped(nn.Module):
    """Gives a tensor of a derived class, which the next one asks for its columns."""

    def __init__(self, named):
        super().__init__()
        self.a, self.b, self.named = Give(named), nn.Linear(8, 2), named

    def forward(self, x):
        h = self.a(x)
        return self.b(h[:, :8].as_subclass(Tensor) if self.named else h)


class Give(nn.Module):
    def __init__(self, named):
        super().__init__()
        self.linear, self.named = nn.Linear(6, 8), named

    def forward(self, x):
        h = torch.tanh(self.linear(x))
        return Named.of(h) if self.named else h


def test_what_stands_in_for_a_derived_tensor_is_one_with_its_attributes():
    torch.manual_seed(0)
    plain, named = Wrapped(False).eval(), Wrapped(True).eval()
    named.load_state_dict(plain.state_dict())
    batches, kinds = list(torch.randn(256, 6).split(64)), ["skip", "linear", "output_noise"]
    report = credit_report(plain, batches, components=["a", "b"])
    expected, found = (component_effects(net, batches, report, kinds) for net in (plain, named))
    for kind in kinds:
        np.testing.assert_array_equal(found.values[kind], expected.values[kind])


def test_an_interrupt_leaves_no_maker_patched_for_good():
    own, made, watch = vars(Made)["__new__"], MadeUnwatched(), object()
    # The second time, the first had no end.
    made.begin(watch)
    made.begin(watch)
    assert vars(Made)["__new__"] is not own
    made.end(watch)
    made.end(watch)
    assert vars(Made)["__new__"] is own
    made.begin(watch)
    assert vars(Made)["__new__"] is not own
    made.end(watch)
    assert vars(Made)["__new__"] is own
