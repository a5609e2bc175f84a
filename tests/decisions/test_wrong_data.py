"""Data in another form than batches: told where it is certain, and left alone where it is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_koopman import bit_widths, component_effects, drop_order, linearize
from lightning_koopman.decisions.steps import SINGLE_SAMPLES
from lightning_koopman.effects.targets import NO_CLASSES

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao warns of kernels for other machines

Decide = Callable[[nn.Module, Any], Any]


def bits(net: nn.Module, data: Any) -> Any:
    pytest.importorskip("torchao", reason="torchao is not installed")
    return bit_widths(net, data, average=4.0)


DECISIONS: dict[str, Decide] = {
    "drop": lambda net, data: drop_order(net, data, max_drop=10),
    "linearize": lambda net, data: linearize(net, data, max_drop=10, allow_larger=True),
    "bits": bits,
}
every = pytest.mark.parametrize("decide", DECISIONS.values(), ids=DECISIONS.keys())


def rows_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def images_net() -> nn.Sequential:
    torch.manual_seed(0)
    parts = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    return nn.Sequential(*parts).eval()


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


SAMPLES: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "rows": (rows_net, list(drawn(40, 4))),
    "rows and targets": (rows_net, [(x, torch.tensor(k % 3)) for k, x in enumerate(drawn(40, 4))]),
    "rows and numbers": (rows_net, [(x, k % 3) for k, x in enumerate(drawn(40, 4))]),
    "named": (rows_net, [{"input": x, "labels": torch.tensor(1)} for x in drawn(40, 4)]),
    "images": (images_net, list(drawn(40, 1, 8, 8))),
    "images and targets": (images_net, [(x, torch.tensor(1)) for x in drawn(40, 1, 8, 8)]),
    "images and numbers": (images_net, [(x, 1) for x in drawn(40, 1, 8, 8)]),
}


@every
@pytest.mark.parametrize("kind", SAMPLES)
def test_single_samples_are_told_from_batches_and_a_loader_takes_them(decide: Decide, kind: str) -> None:
    make, samples = SAMPLES[kind]
    with pytest.raises(ValueError, match=f"^{re.escape(SINGLE_SAMPLES)}$"):
        decide(make(), samples)
    # As it advises.
    assert decide(make(), DataLoader(samples, batch_size=10)).n_samples in (20, 40)


@pytest.mark.parametrize("kind", SAMPLES)
def test_single_samples_to_fit_on_are_told_too(kind: str) -> None:
    make, samples = SAMPLES[kind]
    batches = DataLoader(samples, batch_size=10)
    with pytest.raises(ValueError, match=f"^{re.escape(SINGLE_SAMPLES)}$"):
        linearize(make(), batches, fit_batches=samples, max_drop=10)
    found = linearize(make(), batches, fit_batches=batches, max_drop=10, allow_larger=True)
    assert found.n_samples == 40


@every
@pytest.mark.parametrize("kind", [list, tuple])
def test_an_input_and_its_target_are_told_where_the_network_fails(
    decide: Decide, kind: Callable[[Any], Any]
) -> None:
    told = (
        r"runs on a tensor of shape \(40, 4\), but on one of shape \(40, 1\) raised RuntimeError: .*; "
        r"if they are an input and its target, pass \[\(x, y\)\], for each would be taken for a batch"
    )
    with pytest.raises(ValueError, match=told):
        decide(rows_net(), kind([drawn(40, 4), drawn(40, 1)]))
    assert decide(rows_net(), kind([drawn(40, 4), drawn(30, 4)])).n_samples in (30, 70)


class Failing(nn.Module):
    """Fails whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = rows_net()

    def forward(self, x: Tensor) -> Tensor:
        self.net(x)
        raise RuntimeError("of its own")


@every
@pytest.mark.parametrize("shape", [(20, 4), (4,)])
def test_another_error_of_the_network_is_left_as_it_is(decide: Decide, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"^of its own$"):
        decide(Failing(), [drawn(*shape)] * 2)
    with pytest.raises(ValueError, match="scale is 'no'"):
        drop_order(rows_net(), drawn(40, 4).split(20), scale="no")  # type: ignore[arg-type]


class Numbers(nn.Module):
    """Takes one number per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = rows_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.stack([x**k for k in range(4)], dim=-1))


@every
def test_samples_of_one_number_each_are_batches(decide: Decide) -> None:
    assert decide(Numbers(), drawn(40).split(20)).n_samples in (20, 40)


def test_a_map_of_no_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="max_dim is 0; a linear map needs at least one direction"):
        linearize(rows_net(), drawn(40, 4).split(20), max_dim=0)


@pytest.mark.parametrize("count", [10, 50])
@pytest.mark.parametrize(
    "ask", [*DECISIONS.values(), component_effects], ids=[*DECISIONS, "component_effects"]
)
def test_a_note_tells_that_there_are_fewer_or_more_labels_than_samples(ask: Decide, count: int) -> None:
    given = [(drawn(40, 4), torch.arange(40) % 3), (drawn(40, 4), torch.arange(count) % 3)]
    found = ask(rows_net(), given * 2)
    assert found.scale == "relative"
    assert NO_CLASSES in found.notes


def test_no_note_tells_of_labels_that_are_not_needed() -> None:
    short, net = [(drawn(40, 4), torch.arange(10) % 3)] * 2, rows_net()
    assert not drop_order(net, short, scale="relative").notes
    # Values beside an input may be anything.
    assert not drop_order(net, [(x, y.float()) for x, y in short]).notes
    # A label per position, one behind the other, as the loss of a language model takes it.
    flat = (drawn(40, 7, 4), torch.arange(280) % 3)
    assert not component_effects(net, [flat]).notes
