"""Whatever runs a user's model over a user's loader leaves every random state as it was."""

from __future__ import annotations

import ctypes
import itertools
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_koopman import component_effects, credit_report, drop_order, linearize
from lightning_koopman.measurement.overview import describe_components
from lightning_koopman.network.access import isolation
from lightning_koopman.network.access.isolation import random_states_kept, undisturbed
from lightning_koopman.network.tensors import detached_copy
from lightning_koopman.report.effects import KINDS


def network() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / 3
    return net


class Noisy(TensorDataset):
    """Draws from every global generator for each sample, as augmentation does."""

    def __getitem__(self, index: int) -> Any:
        random.random(), np.random.rand(), torch.rand(1)
        return super().__getitem__(index)


def samples() -> Noisy:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    return Noisy(x, x[:, :3].argmax(1))


def of_its_own() -> tuple[DataLoader, torch.Generator]:
    generator = torch.Generator().manual_seed(2)
    return DataLoader(samples(), batch_size=20, shuffle=True, generator=generator), generator


def of_its_sampler() -> tuple[DataLoader, torch.Generator]:
    data, generator = samples(), torch.Generator().manual_seed(2)
    return DataLoader(data, batch_size=20, sampler=RandomSampler(data, generator=generator)), generator


def globally() -> tuple[DataLoader, torch.Generator]:
    return DataLoader(samples(), batch_size=20, shuffle=True), torch.Generator()


NET = network()
REPORT = credit_report(NET, [batch for batch, _ in DataLoader(samples(), batch_size=20)])
USES: dict[str, Callable[[DataLoader], Any]] = {
    "credit_report": lambda loader: credit_report(NET, loader),
    "component_effects": lambda loader: component_effects(NET, loader, None, KINDS, how="both", draws=1),
    "linearize": lambda loader: linearize(NET, loader, allow_larger=True),
    "linearize on other data": lambda loader: linearize(
        NET, loader, REPORT, fit_batches=loader, max_drop=0.5, allow_larger=True
    ),
    "drop_order": lambda loader: drop_order(NET, loader, steps=2),
    "components": lambda loader: describe_components(NET, loader),
}


def states(generator: torch.Generator) -> list[Any]:
    return [
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state(),
        generator.get_state(),
    ]


def same(left: list[Any], right: list[Any]) -> bool:
    return left[:2] == right[:2] and all(map(torch.equal, left[2:], right[2:]))


@pytest.mark.parametrize("make", [of_its_own, of_its_sampler, globally])
@pytest.mark.parametrize("use", USES)
def test_random_states_are_left_as_they_were(
    use: str, make: Callable[[], tuple[DataLoader, torch.Generator]]
) -> None:
    loader, generator = make()
    before = states(generator)
    USES[use](loader)
    assert same(states(generator), before)


def test_random_states_come_back_after_an_error() -> None:
    loader, generator = of_its_own()
    before = states(generator)

    def broken(model: nn.Module, batch: list[Tensor]) -> Tensor:
        raise ArithmeticError("in the pass")

    with pytest.raises(ArithmeticError, match="in the pass"):
        credit_report(NET, loader, forward_fn=broken)
    assert same(states(generator), before)


def test_the_comparison_of_states_sees_a_draw() -> None:
    loader, generator = of_its_own()
    before = states(generator)
    list(loader)
    after = states(generator)
    assert not torch.equal(after[3], before[3])
    assert not same(after, before)
    with random_states_kept(loader):
        list(loader)
    assert same(states(generator), after)


def test_a_sparse_tensor_is_copied_dense() -> None:
    sparse = torch.eye(3).to_sparse()
    copy = detached_copy(sparse)
    assert copy.layout is torch.strided
    assert torch.equal(copy, torch.eye(3))


class Grid(nn.Module):
    """Compares inputs with a grid, which `expand` may repeat for each."""

    def __init__(self, expands: bool) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        grid, width = torch.linspace(-1, 1, 6).expand(5, 6), torch.ones(1, 1).expand(5, 6)
        given = (grid, width) if expands else (grid.contiguous(), width.contiguous())
        self.grid = nn.Parameter(given[0], requires_grad=False)
        self.register_buffer("width", given[1])
        self.weight = nn.Parameter(torch.randn(5, 6, 4, generator=drawn) / 3)

    def forward(self, x: Tensor) -> Tensor:
        bumps = torch.exp(-(((x[:, :, None] - self.grid) / self.width) ** 2))
        return torch.einsum("nig,igo->no", bumps, self.weight)


def test_weights_that_repeat_others_in_memory_are_like_those_that_do_not() -> None:
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    batches = list(zip(x.split(50), x[:, :3].argmax(1).split(50), strict=True))
    kinds, found = ["skip", "linear", "weight_noise", "other"], {}
    for expands in (False, True):
        torch.manual_seed(2)
        net = nn.Sequential(Grid(expands), nn.Linear(4, 3))
        before = net[0].grid.data_ptr(), net[0].grid.stride(), net[0].grid.clone()
        report = credit_report(net, batches)
        other = {"other": {"0.grid": before[2] + torch.rand(5, 6)}}
        effects = component_effects(net, batches, report, kinds[:-1], replacements=other, how="both")
        found[expands] = [report.total, *(effects.values[k] for k in kinds), *effects.predicted.values()]
        assert (net[0].grid.data_ptr(), net[0].grid.stride()) == before[:2]
        assert torch.equal(net[0].grid, before[2])
    assert found[True][4][0] > 0
    for one, other in zip(found[True], found[False], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-12)


class Installing(nn.Module):
    """Hangs hooks on its parts in its first pass, and remembers that it did, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.seen = nn.Linear(4, 4), nn.Linear(4, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "installed"):
            self.installed = True
            self.a.register_forward_hook(self.count)
        return self.b(self.a(x).tanh())

    def count(self, *_: object) -> None:
        self.seen += 1


def test_hooks_that_a_network_hangs_on_itself_are_hung_on_once() -> None:
    net = Installing()
    credit_report(net, list(torch.randn(100, 4).split(50)))
    assert not net.a._forward_hooks
    net(torch.randn(3, 4))
    assert net.seen == 1
    credit_report(net, list(torch.randn(100, 4).split(50)))
    net(torch.randn(3, 4))
    assert net.seen == 2


@pytest.mark.parametrize("place", [(torch, "set_rng_state"), (torch.no_grad, "__exit__")])
def test_ctrl_c_as_it_ends_leaves_nothing(place, monkeypatch):
    kept, model = getattr(*place), network()
    due: list[None] = []

    def interrupted(*args: Any) -> Any:
        if due:
            due.pop()
            signal.raise_signal(signal.SIGINT)
        return kept(*args)

    def body() -> None:
        with undisturbed(model):
            due.append(None)
            torch.rand(1), random.random()
            model[0].weight.zero_()

    monkeypatch.setattr(*place, interrupted)
    before = torch.get_rng_state(), random.getstate(), model[0].weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        body()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert torch.equal(model[0].weight, before[2])
    assert torch.is_grad_enabled()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_was_compiled_runs_so_behind_a_lack_of_memory_for_copies(monkeypatch):
    compiled: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory for a copy")

    twice, net = torch.compile(lambda x: 2 * x, backend=backend), network()
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "clone", refuse)
        with pytest.raises(MemoryError), undisturbed(net):
            pass
    twice(torch.ones(2))
    assert len(compiled) == 1


@pytest.mark.parametrize("lacks_at", [0, 3, 12, 13])
def test_what_is_emptied_as_memory_lacks_is_filled_again(lacks_at, monkeypatch):
    kept, calls = isolation._refill, itertools.count()

    def lacks(container: Any, before: Any) -> None:
        if next(calls) == lacks_at:
            container.clear()
            raise MemoryError("no memory to fill it")
        kept(container, before)

    monkeypatch.setattr(isolation, "_refill", lacks)
    net = network()
    held = [(vars(m), dict(vars(m)), dict(m._parameters), dict(m._modules)) for m in net.modules()]
    with pytest.raises(MemoryError, match="to fill it"), undisturbed(net):
        net[0].added = 1
    assert next(calls) > 40
    for values, before, parameters, modules in held:
        assert list(values.items()) == list(before.items())
        assert values["_parameters"].keys() == parameters.keys()
        assert values["_modules"].keys() == modules.keys()
    assert net.training


_MAPPED = """
import ctypes, torch
from lightning_koopman.network.access.isolation import undisturbed

class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (*"abc", "mapped", *"defghi")]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Counts
states = []  # kept, for what is freed changes what is mapped next

def mapped():
    before = library.mallinfo2().mapped
    states.append(torch.empty(6 * 2**20))
    return library.mallinfo2().mapped - before

early = mapped()
with undisturbed(torch.nn.Linear(1, 1)):
    pass
print(early, mapped())
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="needs glibc 2.33",
)
def test_large_states_come_from_memory_that_stays() -> None:
    # What is mapped for itself goes back to the system with each layer, and costs a fault per page anew.
    done = subprocess.run([sys.executable, "-c", _MAPPED], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["1", "0"]
