"""Labels travel with the data, for several followers at once, and training never notices."""

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import wired
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from lightning_koopman import credit_report
from lightning_koopman.measurement.measurement import Measurement
from lightning_koopman.network.access import watch as watches
from lightning_koopman.network.flow.dataflow import DataFlow
from lightning_koopman.network.flow.provenance import Provenance
from lightning_koopman.network.runs.recording import Recording


class Counting(TorchDispatchMode):
    """What a user may have entered around everything."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("last_first", [True, False])
def test_two_flows_may_be_left_in_any_order(last_first):
    flows = [DataFlow(), DataFlow()]
    x, y = torch.ones(3), torch.ones(3)
    flows[0].label(x, "x")
    flows[1].label(y, "y")
    with Counting() as outer:
        for flow in flows:
            flow.__enter__()
        both = x + y
        gone, left = flows[::-1] if last_first else flows
        gone.__exit__()
        later = x * y
        left.__exit__()
        before = outer.calls
        x - y
        assert outer.calls == before + 1
    assert flows[0].labels(both) == {"x"}
    assert flows[1].labels(both) == {"y"}
    assert left.labels(later) != frozenset()
    assert gone.labels(later) == frozenset()
    assert left.labels(x - y) == frozenset()


def test_of_a_pass_nothing_is_followed_but_what_the_network_runs(monkeypatch):
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), torch.randn(8, 3)
    measurement, follow, followed = Measurement(net), DataFlow.follow, []

    def noted(self: DataFlow, func: Any, *given: Any) -> None:
        followed.append(func)
        follow(self, func, *given)

    monkeypatch.setattr(DataFlow, "follow", noted)
    with torch.no_grad(), Counting() as plain:
        net(x)
    with torch.no_grad(), measurement.capture:
        measurement.start_pass(x)
        with Recording(net, measurement.capture.components):
            net(x)
        measurement.end_pass()
    # Once by what measures, and once by what keeps calls to be run again.
    assert len(followed) == 2 * plain.calls


def test_a_flow_sees_its_own_thread_only():
    flow, x, found = DataFlow(), torch.ones(3), []
    flow.label(x, "x")

    def elsewhere() -> None:
        found.append(x + 1)

    with flow:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        here = x + 1
    assert flow.labels(here) == {"x"}
    assert flow.labels(found[0]) == frozenset()


def test_an_error_in_the_pass_is_the_passes_own_and_ends_the_watch():
    flow = DataFlow()
    with pytest.raises(RuntimeError, match="size of tensor"), flow:
        torch.ones(3) + torch.ones(4)
    assert flow.error is None
    with Counting() as counting:
        torch.ones(3) + 1
    assert counting.calls == 2


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(144, 24),
        nn.GELU(),
        nn.Linear(24, 3),
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.attend = nn.MultiheadAttention(6, 2, dropout=0.2, batch_first=True)
        self.recur = nn.GRU(6, 5, batch_first=True, num_layers=2, dropout=0.3)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0] + self.attend(x[:, 0], x[:, 0], x[:, 0], need_weights=False)[0]
        return self.head(self.recur(x)[0][:, -1])


def trained(make: Callable[[], nn.Module], followed: bool) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Train with dropout; follow every second step, backward pass and optimiser included."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(4)
    losses = []
    for step in range(6):
        x, y = torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8,))
        flow = DataFlow()
        if followed and step % 2 == 0:
            flow.label(x, "x")
            flow.__enter__()
        output = model(x)
        loss = nn.functional.cross_entropy(output, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if followed and step % 2 == 0:
            flow.__exit__()
            assert flow.error is None
            assert flow.labels(output) == {"x"}
        losses.append(loss.detach())
    return model.state_dict(), [*losses, torch.get_rng_state()]


@pytest.mark.parametrize("make", [network, Attention])
def test_training_under_the_tracer_is_bit_identical(make):
    plain_weights, plain = trained(make, followed=False)
    weights, losses = trained(make, followed=True)
    for name, value in plain_weights.items():
        assert torch.equal(weights[name], value), name
    assert all(torch.equal(a, b) for a, b in zip(losses, plain, strict=True))


def chosen(m: nn.Module, h: Tensor) -> Tensor:
    either = (lambda h: h.sin() * m.b(h).cos()), (lambda h: h - m.b(h))
    return torch.cond(torch.tensor(len(h) > 1), *either, (h,))


def repeated(m: nn.Module, h: Tensor) -> Tensor:
    gate = m.b(h)
    step = (lambda i, _: i < 1), (lambda i, h: (i + 1, h.sin() * gate.cos()))
    return while_loop(*step, (torch.tensor(0), h.clone()))[1]


def scored(m: nn.Module, h: Tensor) -> Tensor:
    # Of a single key, attention gives its value, whatever the score.
    gate = m.b(h)
    query, key, value = (part[:, None, None] for part in (h, gate, h.sin() * gate.cos()))
    return flex_attention(query, key, value, score_mod=lambda score, *_: score + 1)[:, 0, 0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("by_functions", [chosen, repeated, scored])
def test_data_are_followed_through_operators_that_take_functions(by_functions):
    batches = torch.randn(300, 4, generator=torch.Generator().manual_seed(1)).split(50)
    reports = []
    for run in (lambda m, h: h.sin() * m.b(h).cos(), by_functions):
        torch.manual_seed(0)
        model = wired(
            lambda m, x, run=run: m.o((h := m.a(x)) + run(m, h)),
            a=nn.Linear(4, 16), b=nn.Linear(16, 16), o=nn.Linear(16, 3),
        )  # fmt: skip
        reports.append(credit_report(model, batches))
    plain, found = reports
    assert found.components == plain.components == ("a", "b", "o")
    assert found.notes == plain.notes
    assert found.credit == pytest.approx(plain.credit, abs=1e-5)
    assert found.r2 == pytest.approx(plain.r2, abs=1e-5)


FIRST_COMPILED = """
import sys, torch
from torch import nn
from lightning_koopman import component_effects, credit_report

class Chosen(nn.Module):
    def __init__(self, by_cond):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.o = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.by_cond = by_cond

    def forward(self, x):
        h = self.a(x)
        run, other = (lambda h: h.sin() * self.b(h).cos()), (lambda h: h - self.b(h))
        return self.o(h + (torch.cond(x.sum() < 1e9, run, other, (h,)) if self.by_cond else run(h)))

batches = torch.randn(300, 4, generator=torch.Generator().manual_seed(1)).split(50)
measure, before = globals()[sys.argv[1]], torch.compile
assert "torch._dynamo" not in sys.modules
found = measure(Chosen(True), batches)
assert "torch._dynamo" in sys.modules and torch.compile is before
assert torch._dynamo.eval_frame._stance.stance == "default"
plain = measure(Chosen(False), batches)
first, second = (getattr(each, "credit", None) for each in (found, plain))
if first is None:
    first, second = found.values["skip"], plain.values["skip"]
print(*found.components, abs(first - second).max())
"""


@pytest.mark.parametrize("measure", ["credit_report", "component_effects"])
def test_what_is_first_compiled_inside_a_measurement_runs_without_compiler(measure):
    """``torch.cond`` compiles what it is given, and no hook of a part fires in compiled code."""
    command = [sys.executable, "-c", FIRST_COMPILED, measure]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *components, difference = done.stdout.split()
    assert components == ["a", "b", "o"]
    assert float(difference) < 1e-5


def test_data_are_followed_through_a_sparse_product():
    """A graph layer: a sparse adjacency has no memory of its own kind to be followed by."""
    flow, x = DataFlow(), torch.randn(3, 2)
    edges = torch.eye(3).to_sparse()
    flow.label(x, "x")
    with flow:
        scaled = edges * 2.0
        given = torch.sparse.mm(scaled, x)
    assert flow.labels(given) == {"x"}
    assert flow.labels(scaled) == frozenset()


@pytest.mark.parametrize("when", ["before", "while", "after"])
@pytest.mark.parametrize("by_leave", [False, True])
def test_an_interrupt_at_any_place_leaves_nothing_entered(
    when: str, by_leave: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C as a flow begins: what cleans up behind it must neither fail nor leave torch watched."""
    watch = watches._WATCH.watch
    entered = type(watch).__enter__

    def interrupted(given: object) -> object:
        if when == "while":
            entered(watch)
        raise KeyboardInterrupt

    class Full(list):  # type: ignore[type-arg]
        def append(self, flow: object) -> None:
            super().append(flow)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "after":
            patch.setattr(watch, "watchers", Full())
        else:
            patch.setattr(type(watch), "__enter__", interrupted)
        source = Provenance()
        with pytest.raises(KeyboardInterrupt):
            source.follow(nn.Module()) if by_leave else DataFlow().__enter__()
        source.leave()
        source.leave()
    assert _get_current_dispatch_mode_stack() == []  # type: ignore[no-untyped-call]
    assert not watch.watchers
    # What comes next follows as if nothing had happened.
    flow, x = DataFlow(), torch.ones(3)
    flow.label([x], "input")
    with flow:
        y = 2 * x
    assert flow.labels(y) == {"input"}
    assert _get_current_dispatch_mode_stack() == []  # type: ignore[no-untyped-call]


A, B = torch.randn(2, 40, 40, generator=torch.Generator().manual_seed(0))
GRU, ATTENTION = nn.GRU(40, 4, batch_first=True), nn.MultiheadAttention(40, 2, batch_first=True)
OPERATORS = {
    "einsum": lambda: torch.einsum("ij,kj->ik", A, B),
    "matmul": lambda: A @ B.T,
    "linear": lambda: nn.functional.linear(A, B),
    "bilinear": lambda: nn.functional.bilinear(A, B, torch.ones(2, 40, 40)),
    "cdist": lambda: torch.cdist(A, B),
    "cosine": lambda: nn.functional.cosine_similarity(A[:, None], B[None], dim=-1),
    "attention": lambda: nn.functional.scaled_dot_product_attention(A[None], B[None], B[None]),
    "heads": lambda: ATTENTION(A[None], B[None], B[None])[0],
    "gru": lambda: GRU(A[None])[0],
    "several": lambda: torch.linalg.multi_dot([A, B.T, A]),
}


@pytest.mark.parametrize("casts", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_followed_gives_what_it_gives_where_nobody_watches(name, mode, casts):
    with mode(), torch.autocast("cpu", torch.bfloat16, enabled=casts):
        expected = OPERATORS[name]()
        flow = DataFlow()
        with flow:
            flow.label(A, "a")
            found = OPERATORS[name]()
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert flow.labels(found) == {"a"}


PAIRS = {
    "product": lambda a, b: a @ b.T,
    "einsum": lambda a, b: torch.einsum("ij,kj->ik", a, b),
    "in place": lambda a, b: torch.zeros(len(a), len(b)).addmm_(a, b.T),
}


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS.keys())
def test_comparisons_of_samples_are_told_in_inference_mode_too(pairs):
    with torch.inference_mode():
        a, b = torch.randn(2, 12, 4).unbind()
        flow = DataFlow(origins=True)
        with flow:
            flow.label((a, b), "data")
            given = pairs(a.relu(), b.relu())
    assert flow.pairs(given)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("past_torch", [True, False])
def test_zeros_that_states_are_added_to_are_nothing_but_what_is_written_past_torch_is(
    past_torch: bool, in_place: bool
) -> None:
    flow, x, index = DataFlow(origins=True), torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    flow.label([x, index], "x")
    with flow:
        sums = torch.zeros(2, 2)
        if past_torch:
            sums.numpy()[:] = [[1, 2], [3, 4]]
        sums = sums.index_add_(0, index, x) if in_place else sums.index_add(0, index, x)
    # Whatever has no label is not known.
    assert flow.labels(sums) == ({"x", "unknown"} if past_torch else {"x"})
