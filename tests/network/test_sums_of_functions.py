"""A sum of states is one state to a function that takes it, too, though no hook sees it there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from small import wired
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman import Options, credit_report, drift
from lightning_koopman.measurement.measurement import Measurement
from lightning_koopman.measurement.processes import agreed

LENGTH, WIDTH = 6, 8

Run = Callable[[Any, Tensor], Tensor]


class Whole(nn.Module):
    """Takes a sum as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return x


Join = Callable[[Any, Tensor, Tensor], Tensor]


def weighed(m: Any, x: Tensor, branch: Tensor) -> Tensor:
    return x + m.weight * branch


def network(
    run: Run,
    *,
    whole: bool = False,
    weight: float = 1.0,
    linear: bool = False,
    join: Join = weighed,
) -> Any:
    """Make a stream with three branches, of which a function goes on; behind a module, if ``whole``."""

    def stream(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for block in m.blocks:
            x = join(m, x, block(x))
        return run(m, m.whole(x) if whole else x)

    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Identity() if linear else nn.Tanh())

    torch.manual_seed(0)
    parts = {"stem": nn.Linear(WIDTH, WIDTH), "blocks": nn.ModuleList([block() for _ in range(3)])}
    heads = {"head": nn.Linear(WIDTH, 3), "conv": nn.Conv1d(WIDTH, 3, 2), "flat": nn.Linear(48, 3)}
    gate = {} if join is weighed else {"gate": nn.Linear(WIDTH, WIDTH)}
    net = wired(stream, **parts, **gate, whole=Whole(), **heads).double().eval()
    net.weight, net.places = weight, torch.linspace(0.3, 1.7, LENGTH, dtype=torch.float64)[:, None]
    return net


def samples(seed: int = 0, count: int = 600, size: int = 200) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, LENGTH, WIDTH, dtype=torch.float64, generator=draw).split(size))


def mean(m: Any, x: Tensor) -> Tensor:
    return m.head(x.mean(dim=1))


FUNCTIONS: dict[str, Run] = {
    "mean": mean,
    "largest": lambda m, x: m.head(x.amax(dim=1)),
    "pooled": lambda m, x: m.head(F.adaptive_avg_pool1d(x.transpose(1, 2), 1).squeeze(2)),
    "flattened": lambda m, x: m.flat(x.flatten(1)),
    "turned": lambda m, x: m.conv(x.transpose(1, 2)),
    "turned by a function": lambda m, x: F.conv1d(x.transpose(1, 2), m.conv.weight).mean(2),
    "weights of its own": lambda m, x: x @ m.head.weight.T,
    "bent": lambda m, x: m.head(F.gelu(x)),
    "bent in place": lambda m, x: m.head(F.relu(x, inplace=True)),
    "beside what it holds": lambda m, x: m.head((x + m.stem.bias).mean(dim=1)),
    "a norm": lambda m, x: m.head(F.layer_norm(x, (WIDTH,))),
    "twice": lambda m, x: m.head(x.mean(dim=1)) + m.head(x.amax(dim=1)),
    "a gate": lambda m, x: m.head(x * torch.sigmoid(x.mean(dim=1, keepdim=True))),
    "weighed by a number": lambda m, x: m.head(x * torch.sigmoid(1.702 * x)),
    "of both signs": lambda m, x: m.head(F.relu(-x) + F.relu(x - 1) + F.relu(x + 1)),
    "attention": lambda m, x: m.head(F.scaled_dot_product_attention(x, x, x)),
    "returned": lambda m, x: x.mean(dim=1),
    "the first position": lambda m, x: m.head(torch.sigmoid(x[:, 0])),
    "the last position": lambda m, x: m.head(F.layer_norm(x[:, -1], (WIDTH,))),
    "other positions": lambda m, x: m.conv(torch.tanh(x[:, 1:]).transpose(1, 2)),
    "halves": lambda m, x: F.glu(x, dim=2) + torch.mul(*x.chunk(2, dim=2)),
    "copied as it is turned": lambda m, x: m.head(torch.tanh(x.transpose(1, 2).contiguous()[:, :, -1])),
    "joined to rows of its own": lambda m, x: (
        m.head(torch.tanh(x.permute(1, 0, 2).reshape(-1, WIDTH))).view(LENGTH, -1, 3).mean(0)
    ),
    "one after the other": lambda m, x: m.head(sum(torch.sigmoid(part) for part in x.unbind(1))),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_numbers_are_those_of_a_module_that_takes_the_sum(function: str) -> None:
    run = FUNCTIONS[function]
    found, known = (credit_report(network(run, whole=whole), samples()) for whole in (False, True))
    assert found.components == known.components
    assert ("blocks.2.0", "sum into blocks.2") in found.reads.values()
    for quantity in ("credit", "r2", "chain_r2", "sensitivity", "rank"):
        near = pytest.approx(getattr(known, quantity), abs=1e-6)
        assert getattr(found, quantity) == near, quantity
    assert found.total == pytest.approx(known.total, abs=1e-6)


JOINS: dict[str, Join] = {
    "gated": lambda m, x, branch: x + torch.sigmoid(m.gate(x)) * branch,
    "chosen by a gate": lambda m, x, branch: torch.lerp(x, branch, torch.sigmoid(m.gate(x))),
    "gated, then halved": lambda m, x, branch: (x + torch.sigmoid(m.gate(x)) * branch) / 2,
    "weighed by position": lambda m, x, branch: x + m.places * branch,
    "bent by a function": lambda m, x, branch: x + F.relu(branch),
    "bent by one behind it": lambda m, x, branch: F.relu(x + branch),
    "written to": lambda m, x, branch: (x + branch).mul_(2).add_(torch.sigmoid(m.gate(branch))),
}


# What functions make of a sum one after the other is one state, and a module between them makes it two.
TAKEN = [
    (function, join)
    for function in ("bent", "flattened", "the first position", "halves")
    for join in JOINS
    if (function, join) != ("bent", "bent by one behind it")
]


@pytest.mark.parametrize(("function", "join"), TAKEN)
@pytest.mark.parametrize("first", [1, 200])
def test_however_branches_are_added_numbers_are_those_of_a_module_that_takes_it(
    function: str, first: int, join: str
) -> None:
    batches = [samples(size=first)[0], *samples(seed=1, count=900)]
    run = FUNCTIONS[function]
    nets = (network(run, whole=whole, join=JOINS[join]) for whole in (False, True))
    found, known = (credit_report(net, batches) for net in nets)
    assert found.components == known.components
    assert found.credit == pytest.approx(known.credit, abs=1e-6)
    assert found.chain_r2 == pytest.approx(known.chain_r2, abs=1e-6)


def test_branches_in_half_precision_are_added_as_the_network_adds_them() -> None:
    halves = [batch.bfloat16() for batch in samples()]
    nets = (network(mean, whole=whole, weight=0.3).bfloat16() for whole in (False, True))
    found, known = (credit_report(net, halves) for net in nets)
    assert found.credit == pytest.approx(known.credit, abs=1e-6)


@pytest.mark.parametrize("behind", [F.relu, lambda x: F.gelu(F.layer_norm(x, (WIDTH,)))])
def test_a_function_goes_on_with_what_others_made_of_a_sum(behind: Callable[[Tensor], Tensor]) -> None:
    report = credit_report(network(lambda m, x: m.head(behind(x).mean(dim=1))), samples())
    assert report.reads["head"] == ("sum into mean()",)
    assert report["head"].r2 == pytest.approx(1, abs=1e-6)


def test_the_credit_of_a_last_branch_is_that_of_the_weights_behind_it():
    report = credit_report(network(mean, linear=True), samples(), options=Options(max_dim=48))
    behind = np.kron(network(mean).head.weight.detach().numpy().T, np.full((LENGTH, 1), 1 / LENGTH))
    assert report["blocks.2.0"].credit == pytest.approx(oracles.log_volume(behind) / 3, abs=1e-9)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.head(torch.eye(WIDTH).to(x)[(10 * x).long() % WIDTH][:, :, 0]),
        lambda m, x: m.head(torch.exp(1j * x).real),
    ],
    ids=["integers", "complex"],
)
def test_what_holds_no_real_numbers_is_no_sum(run: Run):
    report = credit_report(network(run), samples())
    assert set(report.reads["head"]) == {"blocks.2.0", "sum into blocks.2"}
    assert np.isfinite(report.credit).all()


def test_branches_that_a_number_weighs_are_weighed_by_it():
    run = FUNCTIONS["bent"]
    found, known = (credit_report(network(run, weight=0.3, whole=w), samples()) for w in (False, True))
    assert found.reads["sum into gelu()"] == ("blocks.2.0", "sum into blocks.2")
    assert found.credit == pytest.approx(known.credit, abs=1e-6)
    assert found.chain_r2 == pytest.approx(known.chain_r2, abs=1e-6)


@pytest.mark.parametrize("run", [mean, lambda m, x: m.head(torch.sigmoid(x[:, 0]))])
def test_branches_that_trained_weights_multiply_by_unit_are_weighed_by_them(run: Run) -> None:
    reports = []
    for whole in (False, True):
        trained = network(run, whole=whole)
        trained.weight = nn.Parameter(torch.linspace(0.2, 1.5, WIDTH, dtype=torch.float64))
        reports.append(credit_report(trained, samples()))
    found, known = reports
    assert found.components == known.components
    assert found.reads["head"] != ("blocks.2.0", "sum into blocks.2")
    assert found.credit == pytest.approx(known.credit, abs=1e-6)
    assert found.chain_r2 == pytest.approx(known.chain_r2, abs=1e-6)


def test_a_sum_that_numbers_weigh_is_no_further_state():
    def run(m: Any, x: Tensor) -> Tensor:
        twice = 2 * x
        bent = torch.tanh(m.blocks[0](twice)) + torch.sigmoid(x / 2) + twice
        return m.head(bent.amax(dim=1))

    reads = credit_report(network(run), samples()).reads
    assert reads["head"] == ("sum into amax()",)
    assert reads["sum into amax()"] == ("blocks.0.0#1", "sum into blocks.0#1")


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("first", [1, 4])
def test_a_first_batch_of_few_samples_tells_it_as_well(first: int, weight: float):
    batches = [*samples(count=first, size=first), *samples(seed=1)]
    found, known = (credit_report(network(mean, weight=weight, whole=w), batches) for w in (False, True))
    assert found.reads["head"] == ("sum into mean()",)
    assert found.credit == pytest.approx(known.credit, abs=1e-6)


def test_batches_of_one_sample_tell_it():
    singles = samples(count=260, size=1)
    found, known = (credit_report(network(mean, whole=whole), singles) for whole in (False, True))
    assert found.reads["head"] == ("sum into mean()",)
    assert found.credit == pytest.approx(known.credit, abs=1e-6)


def test_processes_agree_whatever_their_first_batches_hold():
    shares = []
    for size in (200, 1, 4):
        net = network(mean, weight=0.3)
        measurement = Measurement(net)
        measurement.run(net, samples(count=260, size=size))
        shares.append(measurement.share())
    assert "sum into mean()" in agreed(shares).chain.names


def test_each_measurement_of_a_training_adds_up_anew():
    net = network(mean)
    first = Measurement(net)
    first.run(net, samples())
    with torch.no_grad():
        net.blocks[2][0].weight.mul_(2)
    again = Measurement(net, like=first)
    again.run(net, samples())
    fresh = credit_report(net, samples())
    credits = again.credits()
    names = [again.chain.names[i] for i in again.moments()[0].components]
    assert tuple(names) == fresh.components
    assert credits.values["credit"].numpy() == pytest.approx(fresh.credit, abs=1e-9)
    assert first.credits().values["credit"].numpy() != pytest.approx(fresh.credit, abs=1e-2)


def test_drift_knows_the_sum_again_and_tells_a_change_before_it():
    net = network(mean)
    report = credit_report(net, samples())
    same = drift(report, net, samples(seed=1))
    assert same.components == report.components
    assert not same.changed.any()
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.blocks[1][0].weight.mul_(-1)
    assert drift(report, broken, samples(seed=1)).culprit == "blocks.1.0"


@pytest.mark.parametrize("behind", [lambda x: x.log_softmax(-1), lambda x: F.relu(x).mean(1)])
def test_a_function_around_what_holds_all_components_takes_a_sum_as_one_inside_does(behind: Any) -> None:
    def whole(m: Any, x: Tensor) -> Tensor:
        return (h := m.stem(x)) + m.branch(h)

    torch.manual_seed(0)
    parts = {"stem": nn.Linear(WIDTH, WIDTH), "branch": nn.Linear(WIDTH, WIDTH)}
    around = wired(lambda m, x: behind(m.net(x)), net=wired(whole, **parts)).double().eval()
    inside = wired(lambda m, x: behind(whole(m, x)), **parts).double().eval()
    found, known = (credit_report(net, samples()) for net in (around, inside))
    assert found.components == ("net.stem", "net.branch", "output")
    assert found.credit == pytest.approx(known.credit, abs=1e-9)
    assert [n for n in found.reads if "()" in n] == [n for n in known.reads if "()" in n] != []


def test_a_network_that_runs_the_layers_of_a_stack_itself_has_sums_of_functions_too():
    def run(m: Any, x: Tensor) -> Tensor:
        for i, layer in enumerate(m.stack):
            x = F.relu(m.whole(x + layer(x)) if m.named else x + layer(x)) if i else layer(x)
        return x

    torch.manual_seed(0)
    stack = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    net = wired(run, stack=stack, whole=Whole()).double().eval()
    net.named = False
    found = credit_report(net, samples())
    assert [name for name in found.reads if "()" in name] == ["sum into relu()", "sum into relu()#1"]
    net.named = True
    known = credit_report(net, samples())
    assert found.credit == pytest.approx(known.credit, abs=1e-9)


@pytest.mark.parametrize("behind", [lambda x: x, lambda x: F.cross_entropy(x, x.detach().argmax(1))])
def test_a_step_that_calls_the_parts_itself_has_sums_of_functions_too(behind: Any) -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for block in m.blocks:
            x = x + block(x)
        return behind(m.head((m.whole(x) if m.named else x).amax(dim=1)))

    net = network(mean)
    net.named = False
    found = credit_report(net, samples(), forward_fn=step)
    net.named = True
    known = credit_report(net, samples(), forward_fn=step)
    assert found.reads["head"] == ("sum into amax()",)
    assert found.credit == pytest.approx(known.credit, abs=1e-9)


@pytest.mark.parametrize(("function", "taker"), [("turned", "conv"), ("flattened", "flat")])
def test_a_sum_has_the_name_of_what_takes_it_not_of_a_view(function: str, taker: str) -> None:
    report = credit_report(network(FUNCTIONS[function]), samples())
    assert report.reads[taker] == (f"sum into {taker}",)
    assert not any("()" in name for name in report.reads)


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_a_position_is_picked_of_a_sum_of_sums_that_functions_take(weight: float, place: int) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        for i in (0, 1):
            x = x + weight * m.blocks[i](torch.sigmoid(x))
            x = m.whole(x) if m.named and i else x
        return m.head(torch.sigmoid(x[:, place]))

    net = network(run)
    net.named = False
    found = credit_report(net, samples())
    net.named = True
    known = credit_report(net, samples())
    assert found.reads["head"] == ("sum into select()",)
    assert found.reads["sum into select()"] == ("blocks.1.0#1", "sum into sigmoid()#1")
    assert found.credit == pytest.approx(known.credit, abs=1e-6)
    assert found.chain_r2 == pytest.approx(known.chain_r2, abs=1e-6)


@pytest.mark.parametrize("function", ["the last position", "bent", "halves"])
def test_a_sum_has_its_own_step_as_a_part_not_those_that_are_joined_with_it(function: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        added = [x + m.blocks[0](scale * x) for scale in (1, 2, 3)]
        return sum(FUNCTIONS[function](m, m.whole(part) if m.named else part) for part in added)

    net = network(run)
    net.named = False
    found = credit_report(net, samples())
    net.named = True
    known = credit_report(net, samples())
    assert len([name for name in found.reads if "()" in name]) == 3
    assert found.credit == pytest.approx(known.credit, abs=1e-6)
    assert found.chain_r2 == pytest.approx(known.chain_r2, abs=1e-6)


class Gated(nn.Module):
    """Lets a gate choose between a stream and a branch, and returns both at once."""

    def __init__(self, *, turned: bool = False) -> None:
        super().__init__()
        self.branch, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.turned = turned

    def forward(self, x: Tensor) -> tuple[int, Tensor]:
        share = torch.sigmoid(self.gate(x))
        mixed = share * torch.tanh(self.branch(x)) + (1 - share) * x
        return 0, mixed.transpose(1, 2) if self.turned else mixed


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("function", ["mean", "bent in place", "turned by a function", "halves"])
def test_what_a_module_gives_is_seen_there_where_a_function_takes_it(
    function: str, turned: bool
) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        for block in m.gated:
            _, x = block(x)
            x = x.transpose(1, 2) if turned else x
        return FUNCTIONS[function](m, m.whole(x) if m.named else x)

    net = network(run)
    net.gated = nn.ModuleList([Gated(turned=turned).double(), Gated(turned=turned).double()])
    net.named = False
    found = credit_report(net, samples(), components=["stem", "gated.*.*", "head"])
    net.named = True
    known = credit_report(net, samples(), components=["stem", "gated.*.*", "head"])
    assert any("()" in name for name in found.reads)
    assert found.credit == pytest.approx(known.credit, abs=1e-6)
    assert found.chain_r2 == pytest.approx(known.chain_r2, abs=1e-6)


@pytest.mark.parametrize("first", [1, 200])
@pytest.mark.parametrize("length", [LENGTH, WIDTH])
def test_a_module_is_seen_to_take_what_gates_weigh_whatever_the_order_of_its_axes(
    length: int, first: int
) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        share = torch.sigmoid(m.stem(x))
        x = share * m.blocks[0](x) + (1 - share) * x
        return m.conv((m.whole(x) if m.named else x).transpose(1, 2))

    net, draw = network(run), torch.Generator().manual_seed(0)
    batches = torch.randn(600, length, WIDTH, dtype=torch.float64, generator=draw).split([
        first,
        600 - first,
    ])
    net.named = False
    found = credit_report(net, batches)
    net.named = True
    known = credit_report(net, batches)
    assert found.reads["conv"] == ("sum into conv",)
    assert found.credit == pytest.approx(known.credit, abs=1e-6)
    assert found.r2 == pytest.approx(known.r2, abs=1e-6)


def test_images_whose_channels_come_last_in_memory_are_the_same_sums() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + 0.3 * m.branch(x)
        x = m.whole(x) if m.named else x
        return m.head(torch.tanh(x.flatten(2).transpose(1, 2)[:, 0]))

    torch.manual_seed(0)
    convs = {"stem": nn.Conv2d(3, 4, 1), "branch": nn.Conv2d(4, 4, 3, padding=1)}
    net = wired(run, **convs, whole=Whole(), head=nn.Linear(4, 2)).double().eval()
    images = torch.randn(400, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batches = images.to(memory_format=torch.channels_last).split(100)
    net.to(memory_format=torch.channels_last).named = False
    found = credit_report(net, batches)
    net.named = True
    known = credit_report(net, batches)
    assert found.reads["head"] == ("sum into select()",)
    assert found.credit == pytest.approx(known.credit, abs=1e-6)


@pytest.mark.parametrize("by_sample", [True, False])
def test_a_sum_of_what_experts_gave_is_found_whichever_of_them_ran_last(by_sample: bool) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        chosen = (x[:, 0] > 0) if by_sample else torch.full((len(x),), bool(x.sum() > 0))
        given = torch.zeros_like(x)
        for i, expert in enumerate(m.experts):
            if len(rows := (chosen == i).nonzero()[:, 0]):
                given = given.index_put((rows,), expert(x[rows]))
        x = x + torch.sigmoid(m.gate(x)) * given
        return m.head(F.gelu(m.whole(x) if m.named else x))

    torch.manual_seed(0)
    layers = {name: nn.Linear(WIDTH, WIDTH) for name in ("stem", "gate")}
    experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
    net = wired(run, **layers, experts=experts, whole=Whole(), head=nn.Linear(WIDTH, 3)).double().eval()
    batches = [batch[:, 0] for batch in samples(count=1000, size=100)]
    net.named = False
    found = credit_report(net, batches)
    net.named = True
    known = credit_report(net, batches)
    assert found.reads["sum into gelu()"] == known.reads["sum into whole"]
    assert found.credit == pytest.approx(known.credit, abs=1e-6)
