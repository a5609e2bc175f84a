"""What a network adds up is one state to what reads it; the sum has no row."""

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

from lightning_koopman import CreditReport, Options, credit_report, drift
from lightning_koopman.network.provenance import DataFlow

DEPTH, WIDTH = 4, 8


class Add(nn.Module):
    """A module that makes a sum, of which it may weigh what comes second."""

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + (b if self.weight is None else self.weight * b)


class Residual(nn.Module):
    """Adds each of its blocks to a stream by itself."""

    def __init__(self, block: Callable[[], nn.Module], weight: Tensor | None = None) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList([block() for _ in range(DEPTH)])
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + (block(x) if self.weight is None else self.weight * block(x))
        return self.head(x)


class Named(Residual):
    """The same, where a module makes each sum."""

    def __init__(self, net: Residual) -> None:
        super().__init__(nn.Identity)
        self.stem, self.head, self.blocks = net.stem, net.head, net.blocks
        self.adds = nn.ModuleList([Add(net.weight) for _ in net.blocks])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, add in zip(self.blocks, self.adds, strict=True):
            x = add(x, block(x))
        return self.head(x)


def bent() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def residual(block: Callable[[], nn.Module] = bent, weight: Tensor | None = None) -> Residual:
    torch.manual_seed(0)
    return Residual(block, weight).double().eval()


def samples(seed: int = 0, count: int = 1000) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, WIDTH, dtype=torch.float64, generator=draw).split(200))


def rows(report: CreditReport, names: tuple[str, ...], quantity: str) -> np.ndarray:
    places = [report.components.index(name) for name in names]
    return np.asarray(getattr(report, quantity)[places])


BLOCKS = ("stem", *(f"blocks.{i}.0" for i in range(DEPTH)), "head")
STREAM = [f"sum into {name}" for name in ("blocks.1", "blocks.2", "blocks.3", "head")]


def test_credits_beside_a_stream_are_those_of_the_weights():
    net = residual(lambda: nn.Linear(WIDTH, WIDTH))
    for block in net.blocks:
        nn.init.normal_(block.weight, std=0.3)
    report = credit_report(net, samples())
    names = ("stem", *(f"blocks.{i}" for i in range(DEPTH)), "head")
    assert report.components == names
    # A linear branch tells what the stream does: samples do not say which of them counts, the sum does.
    behind, expected = net.head.weight.detach().numpy().T, {"head": 0.0}
    for i in reversed(range(DEPTH)):
        expected[f"blocks.{i}"] = oracles.log_volume(behind) / 3
        behind = behind + net.blocks[i].weight.detach().numpy().T @ behind
    expected["stem"] = oracles.log_volume(behind) / 3
    assert report.credit == pytest.approx([expected[name] for name in names], abs=1e-9)
    assert report.gain.sum() == pytest.approx(report.total - report.credit[-1], abs=1e-12)
    assert report.stable.all()
    assert report.stderr["credit"].max() < 1e-9


def test_what_reads_a_sum_reads_it_alone_and_sums_have_no_row():
    net = residual()
    report = credit_report(net, samples())
    assert report.components == BLOCKS
    assert report.reads["blocks.2.0"] == ("sum into blocks.2",)
    assert report.reads["sum into blocks.2"] == ("blocks.1.0", "sum into blocks.1")
    assert [name for name in report.reads if name not in BLOCKS] == STREAM
    assert all(len(getattr(report, name)) == len(BLOCKS) for name in ("credit", "gain", "r2", "widths"))
    assert len(report.types) == len(report.parameters) == len(report.volumes) == len(BLOCKS)
    assert report.to_frame().component.tolist() == list(BLOCKS)
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("weight", [None, torch.linspace(0.2, 1.5, WIDTH, dtype=torch.float64)])
@pytest.mark.parametrize("options", [{}, {"normalize": "rms"}, {"delay": 2}, {"errors": False}])
def test_numbers_are_those_of_modules_that_make_the_sums(
    weight: Tensor | None, options: dict[str, Any]
) -> None:
    net = residual(weight=weight)
    named, own = Named(net), Options(**options)
    parts = [*BLOCKS[:1], *(f"adds.{i}" for i in range(DEPTH)), *(f"blocks.{i}" for i in range(DEPTH))]
    found = credit_report(net, samples(), options=own)
    known = credit_report(named, samples(), components=[*parts, "head"], options=own)
    pairs = (BLOCKS, tuple(name.removesuffix(".0") for name in BLOCKS))
    for quantity in ("credit", "r2", "chain_r2", "sensitivity", "rank"):
        near = pytest.approx(rows(known, pairs[1], quantity), abs=2e-6)
        assert rows(found, pairs[0], quantity) == near, quantity
    assert found.total == pytest.approx(known.total, abs=2e-6)


def test_of_states_that_are_cut_the_operator_of_a_sum_leads_from_basis_to_basis():
    report = credit_report(residual(), samples(), options=Options(max_dim=6))
    assert report.reference is not None
    place = report.reference.states.index("sum into head")
    basis = report.reference.basis.vectors
    read = torch.cat([basis[p] for p in report.reference.parents[place - 1]], dim=1)  # type: ignore
    expected = read.double().T @ basis[place].double()  # type: ignore[union-attr]
    assert read.shape == (WIDTH, 12)
    found = report.reference.operators[place - 1]
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_gains_lead_over_sums_from_one_component_to_the_next():
    report = credit_report(residual(), samples())
    before = np.append(report.total, report.credit[:-1])
    assert report.gain == pytest.approx(before - report.credit, abs=1e-12)


def test_sums_are_known_of_fewer_samples_than_would_tell_them():
    net, few = residual(), samples(count=12)
    # 16 units are read by each sum, of which 11 samples about their mean say but little.
    flat = copy.deepcopy(net)
    for block in flat.blocks:
        block[1] = nn.Identity()
    with pytest.warns(UserWarning, match="are few for states this wide; take 20 or more"):
        report = credit_report(flat, few)
    matrix = flat.head.weight.detach().numpy().T
    for block in reversed(flat.blocks):
        last = oracles.log_volume(matrix) / 3
        matrix = matrix + block[0].weight.detach().numpy().T @ matrix
    place = report.components.index("blocks.0.0")
    assert report.credit[place] == pytest.approx(last, abs=1e-8)


def test_parts_that_are_bent_by_a_function_are_read_as_parts():
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x + torch.relu(m.branch(x)))

    torch.manual_seed(0)
    net = wired(run, stem=nn.Linear(WIDTH, 6), branch=nn.Linear(6, 6), head=nn.Linear(6, 3)).double()
    report = credit_report(net.eval(), samples())
    # Else no row would tell that there is an activation.
    assert report.reads["head"] == ("branch", "stem")
    assert report.nonlinearity[-1] > 0.005


@pytest.mark.parametrize("names", [["stem", "b*.attn", "b*.mlp", "head"], ["b*.attn", "b*.mlp", "head"]])
def test_named_parts_behind_norms_of_no_component_read_the_stream(names: list[str]) -> None:
    def block(m: Any, x: Tensor) -> Tensor:
        x = x + m.attn(m.one(x))
        return x + m.mlp(m.two(x))

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.b1(m.b0(m.stem(x))))

    torch.manual_seed(0)
    two = {
        f"b{i}": wired(block, one=nn.LayerNorm(WIDTH), two=nn.LayerNorm(WIDTH), attn=bent(), mlp=bent())
        for i in range(2)
    }
    net = wired(run, stem=nn.Linear(WIDTH, WIDTH), **two, head=nn.Linear(WIDTH, 3)).double().eval()
    report = credit_report(net, samples(), components=names)
    assert report.reads["b1.attn"] == ("sum into b1",)
    assert report.reads["b1.mlp"] == ("sum into b1.two",)
    assert report.reads["head"] == ("sum into head",)
    # Of the sum, whatever else was named, what is behind answers as to the last part of it.
    behind = credit_report(net, samples(), components=["stem", "b0", "b1", "head"])
    assert report["b1.mlp"].credit == pytest.approx(behind["b1"].credit, abs=1e-6)


def test_sequences_are_added_up_where_a_mask_leaves_out_positions():
    def run(m: Any, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        x = m.emb(tokens)
        for block in m.blocks:
            x = x + block(x)
        mask = attention_mask[..., None].to(x)
        return m.head((m.norm(x) * mask).sum(1) / mask.sum(1))

    draw = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        mask = torch.arange(7)[None] < torch.randint(3, 8, (100, 1), generator=draw)
        tokens = torch.randint(1, 30, (100, 7), generator=draw) * mask
        batches.append({"tokens": tokens, "attention_mask": mask.long()})
    torch.manual_seed(0)
    blocks = nn.ModuleList([bent() for _ in range(2)])
    parts = {"emb": nn.Embedding(30, WIDTH), "norm": nn.LayerNorm(WIDTH), "head": nn.Linear(WIDTH, 3)}
    report = credit_report(wired(run, blocks=blocks, **parts).eval(), batches)
    assert report.reads["norm"] == ("sum into norm",)
    assert report.reads["blocks.1.0"] == ("sum into blocks.1",)
    assert report.reference is not None
    # Given, not fitted: the same without each fold.
    operators = report.reference.operators[report.reference.states.index("sum into norm") - 1]
    assert torch.equal(operators, operators[:1].expand_as(operators))
    assert torch.equal(operators[0], torch.cat([torch.eye(WIDTH * 7)] * 2).float())


def test_a_branch_whose_weight_a_training_moves_is_weighed_anew_in_each_measurement():
    net = residual(weight=torch.ones(WIDTH, dtype=torch.float64))
    first = credit_report(net, samples())
    # A weight of one leaves the sum as it is, until it is trained.
    net.weight = torch.full((WIDTH,), 0.5, dtype=torch.float64)
    second = credit_report(net, samples())
    found = drift(first, net, samples())
    assert found.changed.any()
    assert second["blocks.3.0"].credit == pytest.approx(
        first["blocks.3.0"].credit + np.log(0.5), abs=1e-6
    )


def test_drift_names_the_sum_that_weighs_otherwise_and_no_sum_behind_another_change():
    net = residual(weight=torch.full((WIDTH,), 0.7, dtype=torch.float64))
    report = credit_report(net, samples())
    same = drift(report, net, samples(seed=1))
    assert same.components == BLOCKS
    assert not same.changed.any()
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.blocks[1][0].weight.mul_(-1)
    found = drift(report, broken, samples(seed=1))
    assert (found.culprit, found.components) == ("blocks.1.0", BLOCKS)
    net.weight = net.weight * -1
    found = drift(report, net, samples(seed=1))
    assert found.culprit == found.components[2] == "sum into blocks.1"


def test_a_reference_says_what_counts_as_a_sum(tmp_path: Any) -> None:
    def bend(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for block in m.blocks:
            x = x + torch.tanh(block(x))
        return m.head(x)

    net = residual(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    bending = copy.deepcopy(net)
    bending.forward = bend.__get__(bending)  # type: ignore[method-assign]
    report, bent_report = credit_report(net, samples()), credit_report(bending, samples())
    assert "sum into head" in report.reads
    assert "sum into head" not in bent_report.reads
    report.save_reference(tmp_path / "net.safetensors")
    found = drift(tmp_path / "net.safetensors", bending, samples(seed=1))
    assert found.culprit == "sum into blocks.1"
    assert drift(bent_report, net, samples(seed=1)).changed.any()


def test_only_what_adds_leaves_a_sum():
    flow = DataFlow(origins=True)
    a, b, weight = torch.randn(4, 3), torch.randn(4, 3), torch.randn(3)
    for tensor, name in ((a, "a"), (b, "b"), (weight, "own")):
        flow.label(tensor, name)
    with flow:
        added, taken = a + b, a - 2 * b
        weighed, cast = weight * a + b, (a + b).double()
        bent, mixed, product = a + F.relu(b), a + b @ torch.eye(3), a * b
        bent_later, part = (a + b).relu_(), (a + b)[:2]
        in_place = a.clone()
        in_place += b
    assert all(map(flow.is_sum, (added, taken, cast, in_place)))
    assert flow.is_sum(weighed)
    assert not any(map(flow.is_sum, (bent, mixed, product, bent_later, part)))
