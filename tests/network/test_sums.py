"""What a network adds up is one state to what reads it; the sum has no row."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from scipy.stats import t as student
from small import wired
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman import CreditReport, Options, credit_report, drift
from lightning_koopman.network.flow.dataflow import DataFlow

DEPTH, WIDTH = 4, 8


Join = Callable[[Tensor, Tensor], Tensor]


def plain(a: Tensor, b: Tensor) -> Tensor:
    return a + b


def weighed(a: Tensor, b: Tensor) -> Tensor:
    return a - torch.linspace(0.2, 1.5, WIDTH, dtype=a.dtype) * b


def bent_before(a: Tensor, b: Tensor) -> Tensor:
    return a + torch.sigmoid(b)


def bend(x: Tensor) -> Tensor:
    return F.leaky_relu(F.layer_norm(x, x.shape[1:]))


def bent_after(a: Tensor, b: Tensor) -> Tensor:
    return bend(a + b)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


def mixed(a: Tensor, b: Tensor) -> Tensor:
    return torch.lerp(a, b, torch.linspace(0.2, 0.9, WIDTH, dtype=a.dtype))


def stacked(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b], dim=-1).mean(-1)


class Joins(nn.Module):
    """A module that makes a sum, or goes on with one."""

    def __init__(self, join: Callable[..., Tensor]) -> None:
        super().__init__()
        self.join = join

    def forward(self, *given: Tensor) -> Tensor:
        return self.join(*given)


class Residual(nn.Module):
    """Adds each of its blocks to a stream by itself."""

    def __init__(self, block: Callable[[], nn.Module], join: Join) -> None:
        super().__init__()
        self.stem, self.head, self.join = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), join
        self.blocks = nn.ModuleList([block() for _ in range(DEPTH)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.join(x, block(x))
        return self.head(x)


class Named(Residual):
    """The same, where a module makes each sum, and one what goes on with it."""

    def __init__(self, net: Residual) -> None:
        super().__init__(nn.Identity, net.join)
        self.stem, self.head, self.blocks = net.stem, net.head, net.blocks
        steps = [plain, bend] if net.join is bent_after else [net.join]
        self.joins = nn.ModuleList([nn.ModuleList(map(Joins, steps)) for _ in net.blocks])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, joins in zip(self.blocks, self.joins, strict=True):
            x = joins[0](x, block(x))
            for bent in joins[1:]:
                x = bent(x)
        return self.head(x)


def bent() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def residual(block: Callable[[], nn.Module] = bent, join: Join = plain) -> Residual:
    torch.manual_seed(0)
    return Residual(block, join).double().eval()


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


@pytest.mark.parametrize("max_dim", [128, 7])
def test_what_a_network_weighs_is_known_of_a_linear_branch_too(max_dim: int) -> None:
    weight = torch.linspace(0.3, -2, WIDTH, dtype=torch.float64)
    net = residual(lambda: nn.Linear(WIDTH, WIDTH), lambda a, b: a + weight * b)
    net.weight = weight
    report = credit_report(net, samples(), options=Options(max_dim=max_dim))
    behind, matrix = net.head.weight.detach().numpy().T, np.diag(weight.numpy())
    if max_dim > WIDTH:
        assert report["blocks.3"].credit == pytest.approx(
            oracles.log_volume(matrix @ behind) / 3, abs=1e-9
        )
        assert report.stable.all()
    assert report.reference is not None
    place = report.reference.states.index("sum into head")
    bases = report.reference.basis.vectors
    own, first, second = (
        torch.eye(WIDTH).double() if bases[p] is None else bases[p].double()  # type: ignore[union-attr]
        for p in (place, *report.reference.parents[place - 1])
    )
    expected = torch.cat([first.T @ torch.diag(weight) @ own, second.T @ own])
    assert torch.allclose(report.reference.operators[place - 1].double(), expected, atol=1e-6)


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


@pytest.mark.parametrize("join", [plain, weighed, bent_before, bent_after, mixed, stacked])
@pytest.mark.parametrize("options", [{}, {"normalize": "rms"}, {"delay": 2}, {"errors": False}])
def test_numbers_are_those_of_modules_that_make_the_sums(join: Join, options: dict[str, Any]) -> None:
    net = residual(join=join)
    named, own = Named(net), Options(**options)
    parts = [*BLOCKS[:1], "joins.*.*", *(f"blocks.{i}" for i in range(DEPTH))]
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


def test_the_error_of_what_is_added_up_tells_of_directions_never_seen():
    net = residual(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()))
    layer, head = net.blocks[-1][0], net.head.weight.detach().numpy().T
    with torch.no_grad():
        layer.weight[:2] *= 1e-3
        layer.bias[:2] = -1
    asleep, last = credit_report(net, samples()), f"blocks.{DEPTH - 1}.0"
    known = math.log(8 / 6) / 2 / student.ppf(0.975, 4)
    assert asleep[last].credit == pytest.approx(oracles.log_volume(head[2:]) / 3, abs=1e-9)
    assert asleep[last].credit_stderr == pytest.approx(known, abs=1e-9)
    assert asleep["head"].gain_stderr == pytest.approx(known, abs=1e-9)
    # What the branches before give varies in all directions, and so does the stream.
    assert asleep["stem"].credit_stderr < known / 2
    with torch.no_grad():
        layer.bias[:2] = 0
    awake = credit_report(net, samples())
    assert awake[last].credit == pytest.approx(oracles.log_volume(head) / 3, abs=1e-9)
    assert awake[last].credit_stderr < 1e-9


@pytest.mark.parametrize("inplace", [False, True])
def test_activations_of_sums_are_states_beside_the_sums(inplace: bool) -> None:
    class Acting(Named):
        """Joins what blocks give by modules or itself, and bends what comes out by modules."""

        by_modules = False

        def __init__(self) -> None:
            super().__init__(residual())
            self.acts = nn.ModuleList([nn.LeakyReLU(0.1, inplace) for _ in self.blocks])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block, (join,), act in zip(self.blocks, self.joins, self.acts, strict=True):
                x = act(join(x, block(x)) if self.by_modules else x + block(x))
            return self.head(x)

    net = Acting().double().eval()
    found = credit_report(net, samples())
    assert found.components == BLOCKS
    assert found.reads["head"] == ("sum into head",)
    assert found.reads["sum into head"] == ("sum into acts.3",)
    assert found.reads["sum into acts.3"] == ("blocks.3.0", "sum into blocks.3")
    net.by_modules = True
    every = [f"{part}.{i}" for part in ("blocks", "acts") for i in range(DEPTH)]
    known = credit_report(net, samples(), components=["stem", "joins.*.*", *every, "head"])
    names = ("stem", *(f"blocks.{i}" for i in range(DEPTH)), "head")
    for quantity in ("credit", "r2", "chain_r2"):
        near = pytest.approx(rows(known, names, quantity), abs=2e-6)
        assert rows(found, BLOCKS, quantity) == near, quantity


def test_a_stream_is_a_state_where_branches_bend_it_first():
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        for i in range(DEPTH):
            x = x + getattr(m, f"branch{i}")(m.act(x))
        return m.head(x)

    torch.manual_seed(0)
    branches = {f"branch{i}": nn.Linear(WIDTH, WIDTH) for i in range(DEPTH)}
    parts = {"stem": nn.Linear(WIDTH, WIDTH), **branches, "head": nn.Linear(WIDTH, 3)}
    report = credit_report(wired(run, act=nn.Softplus(), **parts).double().eval(), samples())
    assert report.reads["branch2"] == ("sum into branch2",)
    assert report.reads["sum into branch2"] == ("sum into act#2",)
    assert report.reads["sum into act#2"] == ("branch1", "sum into act#1")


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
    assert report.reads["sum into b1.attn"] == ("sum into b1",)
    assert report.reads["sum into b1.mlp"] == ("sum into b1.two",)
    assert report.reads["b1.mlp"] == ("sum into b1.mlp",)
    assert report.reads["head"] == ("sum into head",)
    # Of the sum, whatever else was named, what is behind answers as to the last part of it.
    behind = credit_report(net, samples(), components=["stem", "b0", "b1", "head"])
    assert report["b1.mlp"].credit == pytest.approx(behind["b1"].credit, abs=1e-6)


def set_to_zero(x: Tensor, mask: Tensor) -> Tensor:
    x[~mask.squeeze(-1)] = 0
    return x


@pytest.mark.parametrize(
    "shut",
    [
        lambda x, mask: x,
        lambda x, mask: x * mask,
        lambda x, mask: x.masked_fill(~mask, 0),
        lambda x, mask: torch.where(mask, x, 0),
        set_to_zero,
    ],
)
def test_sequences_are_added_up_where_a_mask_leaves_out_positions(shut: Join) -> None:
    def run(m: Any, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        x = m.emb(tokens)
        for block in m.blocks:
            x = shut(x + block(x), attention_mask[..., None].bool())
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


def test_a_branch_whose_weight_is_trained_is_weighed_anew_in_each_measurement():
    net = residual()
    first = credit_report(net, samples())
    net.join = lambda a, b: a + 0.5 * b
    second = credit_report(net, samples())
    assert second["blocks.3.0"].credit == pytest.approx(
        first["blocks.3.0"].credit + np.log(0.5), abs=1e-6
    )


def test_drift_names_the_sum_that_weighs_otherwise_and_no_sum_behind_another_change():
    net = residual(join=lambda a, b: a + 0.7 * b)
    report = credit_report(net, samples())
    same = drift(report, net, samples(seed=1))
    assert same.components == BLOCKS
    assert not same.changed.any()
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.blocks[1][0].weight.mul_(-1)
    found = drift(report, broken, samples(seed=1))
    assert (found.culprit, found.components) == ("blocks.1.0", BLOCKS)
    net.join = lambda a, b: a - 0.7 * b
    found = drift(report, net, samples(seed=1))
    assert [name for name in found.components if name not in BLOCKS] == ["sum into blocks.1"]
    assert found.culprit == "sum into blocks.1"


@pytest.mark.parametrize("sizes", [[1], [1, 99], [1, 1, 200], [200]])
def test_sums_are_known_whatever_the_size_of_batches(sizes: list[int]) -> None:
    net = residual(lambda: nn.Linear(WIDTH, WIDTH))
    whole = torch.cat(samples(count=300))
    batches = list(whole.split(sizes[0])) if len(sizes) == 1 else list(whole[: sum(sizes)].split(sizes))
    report = credit_report(net, batches)
    behind = net.head.weight.detach().numpy().T
    assert report["blocks.3"].credit == pytest.approx(oracles.log_volume(behind) / 3, abs=1e-9)


def switched(say: Callable[[int], Any], weight: Any = None) -> Any:
    """Make a network with one branch, and of what its pass does otherwise from batch to batch."""

    def run(m: Any, x: Tensor) -> Tensor:
        m.batch += 1
        return say(m.batch)(m, m.stem(x))

    torch.manual_seed(0)
    parts = {"stem": nn.Linear(WIDTH, WIDTH), "branch": bent(), "head": nn.Linear(WIDTH, 3)}
    net = wired(run, **parts, add=Joins(plain), seen=nn.Identity()).double().eval()
    net.batch, net.weight = -1, weight
    return net


@pytest.mark.parametrize("weight", [1.0, torch.linspace(-0.5, 2, WIDTH, dtype=torch.float64)])
@pytest.mark.parametrize("seen_in", [{0}, {0, 2, 3}, {0, 1, 2, 3, 4}])
def test_a_sum_is_filled_in_where_no_module_takes_it_on_the_way(seen_in: set[int], weight: Any) -> None:
    def say(batch: int) -> Any:
        def rest(m: Any, x: Tensor) -> Tensor:
            total = x + m.weight * m.branch(x)
            return m.head(m.seen(total) if batch in seen_in else total)

        return rest

    report = credit_report(switched(say, weight), samples())
    direct = switched(lambda _: lambda m, x: m.head(x + m.weight * m.branch(x)), weight)
    known = credit_report(direct, samples())
    assert report.reads["head"] == ("sum into seen",)
    for quantity in ("credit", "r2", "chain_r2"):
        assert getattr(report, quantity) == pytest.approx(getattr(known, quantity), abs=1e-9)


def test_a_sum_that_is_weighed_otherwise_in_later_batches_is_fitted_and_told():
    def weight(batch: int) -> float:
        return 1.0 if batch < 3 else 0.2

    net = switched(lambda batch: lambda m, x: m.head(x + weight(batch) * m.branch(x)))
    report = credit_report(net, samples())
    named = switched(lambda batch: lambda m, x: m.head(m.add(x, weight(batch) * m.branch(x))))
    known = credit_report(named, samples(), components=["stem", "branch", "add", "head"])
    assert report.credit == pytest.approx(known.credit[[0, 1, 3]], abs=1e-9)
    assert any("added up in sum into head does not explain all of it" in note for note in report.notes)
    assert known["add"].r2 < 0.99


def test_what_is_changed_before_a_sum_is_told():
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(5 * torch.relu(x) + m.first(x))

    torch.manual_seed(0)
    parts = {"first": nn.Linear(WIDTH, WIDTH), "head": nn.Linear(WIDTH, 3)}
    report = credit_report(wired(run, **parts).double().eval(), samples())
    assert any("sum into head does not explain all of it" in note for note in report.notes)
    assert report.chain_r2[0] < 0.9


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_half_precision_tells_weighed_branches_from_others(scale: float) -> None:
    net = residual(lambda: nn.Sequential(nn.LayerNorm(WIDTH), bent()), lambda a, b: a + scale * b)
    with torch.no_grad():
        # A unit far from 0, as of streams of language models, is rounded more coarsely than a branch is.
        net.stem.bias[0] = 20
        for block in net.blocks:
            block[1][0].weight.mul_(0.2)
    parts, half = ["stem", "blocks.*", "head"], copy.deepcopy(net).bfloat16()
    batches = [x.bfloat16() for x in samples()]
    found = credit_report(half, batches, components=parts)["blocks.3"].credit
    if scale == 1:
        behind = half.head.weight.detach().double().numpy().T
        assert found == pytest.approx(oracles.log_volume(behind) / 3, abs=0.2)
    else:
        known = credit_report(Named(half), batches, components=[*parts, "joins.*"])["blocks.3"].credit
        assert found == pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize("taker", [nn.LayerNorm(WIDTH), F.gelu])
def test_what_a_component_adds_up_within_is_no_state(taker: Callable[[Tensor], Tensor]) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.taker, self.lin = taker, nn.Linear(WIDTH, WIDTH)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.lin(self.taker(a + b))

    def run(m: Any, x: Tensor) -> Tensor:
        a = m.stem(x)
        return m.head(m.block(a, m.branch(a)))

    torch.manual_seed(0)
    parts = {"stem": nn.Linear(WIDTH, WIDTH), "branch": bent(), "block": Block()}
    net = wired(run, **parts, head=nn.Linear(WIDTH, 3)).double().eval()
    report = credit_report(net, samples(), components=["stem", "branch", "block", "head"])
    assert report.reads["block"] == ("branch", "stem")
    assert list(report.reads) == list(report.components)


class Two(nn.Module):
    """Takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.one(a) + self.other(b)


def test_each_sum_that_a_call_takes_is_a_state():
    def run(m: Any, x: Tensor) -> Tensor:
        a = m.stem(x)
        return m.head(a + m.branch(x), a - 2 * m.third(a))

    torch.manual_seed(0)
    layers = {name: nn.Linear(2 * WIDTH, WIDTH) for name in ("stem", "branch")}
    net = wired(run, **layers, third=nn.Linear(WIDTH, WIDTH), head=Two()).double().eval()
    batches = [torch.cat([x, x.flip(0)], dim=1) for x in samples()]
    report = credit_report(net, batches, components=["stem", "branch", "third", "head"])
    assert set(report.reads["head"]) == {"sum into head", "sum into head[1]"}
    assert report.reads["sum into head[1]"] == ("third", "stem")
    one = net.head.one.weight.detach().numpy().T
    assert report.credit[1] == pytest.approx(oracles.log_volume(one) / 3, abs=1e-9)


def test_where_sums_tell_each_other_what_they_have_apart_is_in_doubt():
    def run(m: Any, x: Tensor) -> Tensor:
        a = m.stem(x)
        return m.head(a + m.branch(a), a + m.third(a))

    torch.manual_seed(0)
    layers = {name: nn.Linear(WIDTH, WIDTH) for name in ("stem", "branch", "third")}
    net = wired(run, **layers, head=Two()).double().eval()
    report = credit_report(net, samples(), components=["stem", "branch", "third", "head"])
    one, other, *linear = (
        m.weight.detach().numpy().T
        for m in (net.head.one, net.head.other, net.stem, net.branch, net.third)
    )
    behind_stem = one + other + linear[1] @ one + linear[2] @ other
    expected = [oracles.log_volume(matrix) / 3 for matrix in (behind_stem, one, other)]
    right = np.abs(report.credit[:3] - expected) < 1e-9
    assert right.tolist() == report.stable[:3].tolist() == [True, False, False]
    assert any("beside 'branch', 'third' tell the same" in note for note in report.notes)


@pytest.mark.parametrize("more", [torch.rand_like, lambda x: x])
def test_with_data_or_random_numbers_beside_them_states_are_no_sum(more: Any) -> None:
    def run(m: Any, x: Tensor, beside: Tensor) -> Tensor:
        a = m.stem(x)
        return m.head(a + m.branch(a) + more(beside))

    torch.manual_seed(0)
    layers = {name: nn.Linear(WIDTH, WIDTH) for name in ("stem", "branch", "head")}
    net, pairs = wired(run, **layers).double().eval(), zip(samples(), samples(1), strict=True)
    report = credit_report(net, list(pairs), forward_fn=lambda m, batch: m(*batch))
    assert "sum into head" not in report.reads


def test_a_sum_that_is_returned_ends_the_chain():
    def run(m: Any, x: Tensor) -> Tensor:
        return m.drop(m.a(x) + m.b(x))

    net = wired(run, a=nn.Linear(WIDTH, 4), b=nn.Linear(WIDTH, 4), drop=nn.Dropout()).double()
    report = credit_report(net.eval(), samples())
    assert report.components == ("a+b", "output")
    # Each output is the sum of two units.
    assert report.credit == pytest.approx([math.log(2) / 2, 0], abs=1e-9)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_operator_of_a_sum_that_is_returned_is_known_too(weight: float) -> None:
    torch.manual_seed(0)
    layers = {name: nn.Linear(WIDTH, WIDTH) for name in ("stem", "branch")}
    net = wired(lambda m, x: (a := m.stem(x)) + weight * m.branch(a), **layers).double().eval()
    report = credit_report(net, samples())
    slope = np.eye(WIDTH) + weight * net.branch.weight.detach().numpy().T
    expected = [oracles.log_volume(slope) / WIDTH, math.log(weight), 0]
    assert report.components == ("stem", "branch", "output")
    assert report.credit == pytest.approx(expected, abs=1e-9)
    assert report.stable.all()
    assert not drift(report, net, samples(seed=1)).changed.any()


def test_sums_and_what_one_of_them_became_are_told_from_what_mixes():
    flow = DataFlow(origins=True)
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    flow.label(a, "a")
    flow.label(b, "b")
    own = torch.full((3,), 0.5)
    with flow:
        stack, buffer = torch.stack([a, b]), torch.zeros(4, 2, 3)
        buffer[:, 0], buffer[:, 1] = a, b
        sums = [a + b, a - 2 * b, (a + b).double(), a + F.relu(b), F.gelu(a + b), 2 * (a + b)]
        sums += [F.layer_norm(a + b, (3,)), (a + b).relu_(), a.clone().add_(b)]
        sums += [rms(a + b), (a + b) * torch.sigmoid(a + b), torch.lerp(a, b, 0.3), torch.rsub(a, b)]
        sums += [torch.addcmul(a, b, own), stack.sum(0), (own * stack).mean(0), buffer.mean(dim=-2)]
        others = [F.relu(a), a * b, (a + b) * b, (a + b) @ torch.eye(3), (a + b)[:2], (a + b).softmax(1)]
        others += [torch.cat([a + b, b]), (a + b).copy_(a), torch.addcmul(own, a, b), rms(a), stack]
        others += [stack[0], stack.sum(), stack.sum(0, keepdim=True), torch.stack([a, rms(a)]).sum(0)]
    assert None not in map(flow.sum_in, sums)
    assert {None} == set(map(flow.sum_in, others))


def test_a_shared_activation_may_run_more_often_in_some_batches() -> None:
    def report(more: int) -> CreditReport:
        def run(m: Any, x: Tensor) -> Tensor:
            x = m.stem(x)
            for _ in range(more * (len(x) % 2)):
                m.act(x + x.mean())
            for block in m.blocks:
                x = m.act(x + block(x))
            return m.head(x)

        torch.manual_seed(0)
        parts = {"stem": nn.Linear(WIDTH, WIDTH), "head": nn.Linear(WIDTH, 3), "act": nn.SiLU()}
        net = wired(run, **parts, blocks=nn.ModuleList([bent() for _ in range(3)])).double().eval()
        return credit_report(net, torch.cat(samples()).split([200, 201, 199, 200, 200]))

    assert report(more=2).credit == pytest.approx(report(more=0).credit, abs=1e-9)
