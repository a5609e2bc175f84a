"""What the chain ends with: heads, sums of branches, frozen networks, losses; and dead branches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import CreditReport, Options, credit_report


def samples(width: int = 8, count: int = 480) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.randn(count, width, dtype=torch.float64).split(40))


def volume(jacobian: Tensor) -> float:
    """Log-volume per output direction of ``x @ jacobian``."""
    return float(torch.linalg.slogdet(jacobian.T @ jacobian)[1]) / 2 / jacobian.shape[1]


class Linears(nn.Module):
    """Named linear layers and a forward that says how they hang together."""

    def __init__(self, run: Callable[..., Any], **widths: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        for name, (a, b) in widths.items():
            self.add_module(name, nn.Linear(a, b).double())

    def forward(self, *given: Tensor) -> Any:
        return self.run(self, *given)

    def w(self, *names: str) -> Tensor:
        """Matrix of layers one after the other."""
        product = torch.eye(8, dtype=torch.float64)
        for name in names:
            product = product @ getattr(self, name).weight.detach().T
        return product


@dataclass
class Answer:
    logits: Tensor
    aux: Tensor


ENDS: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, tuple[int, int]], Any]] = {
    "a tuple": (
        lambda m, x: (m.p(h := m.body(x)), m.v(h)),
        {"body": (8, 8), "p": (8, 4), "v": (8, 1)},
        lambda m: torch.cat([m.w("body", "p"), m.w("body", "v")], 1),
    ),
    "a nested mapping": (
        lambda m, x: {"out": OrderedDict(p=m.p(h := m.body(x))), "n": 3, "v": [m.v(h)]},
        {"body": (8, 8), "p": (8, 4), "v": (8, 1)},
        lambda m: torch.cat([m.w("body", "p"), m.w("body", "v")], 1),
    ),
    "a dataclass, auxiliary head last": (
        lambda m, x: Answer(m.head(m.b(h := m.a(x))), m.aux(h)),
        {"a": (8, 8), "b": (8, 8), "head": (8, 3), "aux": (8, 2)},
        lambda m: torch.cat([m.w("a", "b", "head"), m.w("a", "aux")], 1),
    ),
    "a sum of branches": (
        lambda m, x: m.wide(x) + m.down(m.up(x)),
        {"wide": (8, 3), "up": (8, 9), "down": (9, 3)},
        lambda m: m.w("up", "down") + m.w("wide"),
    ),
    "a skip around the last layer": (
        lambda m, x: (h := m.a(x)) + m.c(m.b(h)),
        {"a": (8, 4), "b": (4, 5), "c": (5, 4)},
        lambda m: m.w("a") + m.w("a", "b", "c"),
    ),
    "a sum of branches and one of them": (
        lambda m, x: (m.a(x) + (b := m.b(x)), b),
        {"a": (8, 3), "b": (8, 3)},
        lambda m: torch.cat([m.w("a") + m.w("b"), m.w("b")], 1),
    ),
    "a sum with what it was corrected by": (
        lambda m, x: ((h := m.a(x)) + (c := m.c(m.b(h))), c),
        {"a": (8, 4), "b": (4, 5), "c": (5, 4)},
        lambda m: m.w("a") + m.w("a", "b", "c"),
    ),
    "a head with one value per sample": (
        lambda m, x: (m.p(h := m.body(x)), m.v(h).squeeze(1)),
        {"body": (8, 8), "p": (8, 4), "v": (8, 1)},
        lambda m: torch.cat([m.w("body", "p"), m.w("body", "v")], 1),
    ),
    "hidden states and caches beside the output": (
        lambda m, x: {"out": m.head(g := m.b(h := m.a(x))), "hidden": [h, g], "cache": (2 * h,)},
        {"a": (8, 8), "b": (8, 8), "head": (8, 3)},
        lambda m: m.w("a", "b", "head"),
    ),
    "a loss beside the output": (
        lambda m, x: {"loss": (y := m.head(m.a(x))).square().mean(), "logits": y},
        {"a": (8, 8), "head": (8, 3)},
        lambda m: m.w("a", "head"),
    ),
}


@pytest.mark.parametrize("kind", ENDS)
def test_the_chain_ends_at_all_that_the_network_returns(kind: str) -> None:
    run, widths, jacobian = ENDS[kind]
    net = Linears(run, **widths)
    report = credit_report(net, samples(), options=Options(tikhonov=0.0))
    named = {part for name in report.components for part in name.split("+")}
    assert set(widths) <= named
    assert report.total == pytest.approx(volume(jacobian(net)), abs=1e-7)
    assert not any("left out" in note for note in report.notes)


def test_a_head_that_is_not_returned_is_left_out_and_the_report_says_what_it_is_about() -> None:
    def run(m: Linears, x: Tensor) -> Tensor:
        out = m.head(h := m.a(x))
        m.probe(h)
        return out

    net = Linears(run, a=(8, 8), head=(8, 3), probe=(8, 2))
    report = credit_report(net, samples(), options=Options(tikhonov=0.0))
    assert report.total == pytest.approx(volume(net.w("a", "head")), abs=1e-7)
    assert (
        "this report is about head; left out, for nothing leads from there to it: probe; choose another "
        "output with output=" in report.notes
    )


def test_where_no_single_call_returns_all_that_is_not_read_counts() -> None:
    net = Linears(lambda m, x: None, a=(8, 8), p=(8, 3), v=(8, 2))

    def step(m: Any, x: Tensor) -> None:
        h = m.a(x)
        m.p(h), m.v(h)

    report = credit_report(net, samples(), forward_fn=step, options=Options(tikhonov=0.0))
    expected = torch.cat([net.w("a", "p"), net.w("a", "v")], 1)
    assert report.total == pytest.approx(volume(expected), abs=1e-7)


def frozen(net: Linears, *names: str) -> Linears:
    for name in names:
        getattr(net, name).requires_grad_(False)
    return net


@pytest.mark.parametrize("returned", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_frozen_teacher_does_not_count(first: bool, returned: bool) -> None:
    def run(m: Linears, x: Tensor) -> Any:
        outputs = [m.t(m.tt(x)), m.s(m.ss(x))] if first else [m.s(m.ss(x)), m.t(m.tt(x))]
        return outputs if returned else None

    net = frozen(Linears(run, tt=(8, 8), t=(8, 3), ss=(8, 8), s=(8, 3)), "t", "tt")
    report = credit_report(net, samples(), options=Options(tikhonov=0.0))
    assert report.components == ("ss", "s")
    assert report.total == pytest.approx(volume(net.w("ss", "s")), abs=1e-7)
    assert any(note.startswith("this report is about s; left out") for note in report.notes)


def test_a_frozen_network_behind_the_trained_one_counts_only_if_it_is_what_is_returned() -> None:
    widths = {"a": (8, 8), "b": (8, 4), "f": (4, 4)}

    def step(m: Any, batch: tuple[Tensor, Tensor]) -> Any:
        return (m.f(m.b(m.a(batch[0]))) - m.f(batch[1])).square().mean()

    net = frozen(Linears(lambda m, x: m.f(m.b(m.a(x))), **widths), "f")
    pairs = [(x, torch.randn(40, 4, dtype=torch.float64)) for x in samples()]
    perceptual = credit_report(net, pairs, forward_fn=step, options=Options(tikhonov=0.0))
    assert perceptual.components == ("a", "b")
    assert perceptual.total == pytest.approx(volume(net.w("a", "b")), abs=1e-7)
    head = credit_report(net, samples(), options=Options(tikhonov=0.0))
    assert head.components == ("a", "b", "f")
    assert head.total == pytest.approx(volume(net.w("a", "b", "f")), abs=1e-7)
    everything = frozen(Linears(lambda m, x: m.f(m.b(m.a(x))), **widths), *widths)
    assert credit_report(everything, samples()).components == ("a", "b", "f")


class Weighted(nn.Module):
    """A loss with weights of its own, one value per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        return ((y - target).square() * self.weight).sum(1)


class Rowwise(nn.Module):
    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        return (y - target).abs()


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "mean squares": lambda: nn.MSELoss(reduction="none"),
    "smooth": lambda: nn.SmoothL1Loss(reduction="none"),
    "own": Rowwise,
    "with weights": Weighted,
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("inside", [True, False])
def test_a_module_that_also_reads_targets_is_a_loss(kind: str, inside: bool) -> None:
    def run(m: Any, x: Tensor, target: Tensor) -> Tensor:
        return m.criterion(m.head(m.a(x)), target)

    net = Linears(run, a=(8, 8), head=(8, 3))
    net.criterion = LOSSES[kind]()
    pairs = [(x, torch.randn(40, 3, dtype=torch.float64)) for x in samples()]
    report = credit_report(
        net,
        pairs,
        forward_fn=lambda m, batch: m(*batch) if inside else run(m, *batch),
        options=Options(tikhonov=0.0),
    )
    assert report.components == ("a", "head")
    assert report.total == pytest.approx(volume(net.w("a", "head")), abs=1e-7)


class Pooling(nn.Module):
    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def test_a_module_that_pools_with_a_mask_is_no_loss() -> None:
    net = Linears(lambda m, x, mask: m.b(m.pool(m.a(x), mask)), a=(8, 8), b=(8, 3))
    net.pool = Pooling()
    mask = (torch.arange(5) < torch.randint(1, 6, (40, 1))).long()
    batches = [(torch.randn(40, 5, 8, dtype=torch.float64), mask) for _ in range(6)]
    report = credit_report(net, batches, forward_fn=lambda m, batch: m(*batch))
    assert report.components == ("a", "b")
    assert report.widths == (8, 3)


def branch(zero: bool, width: int = 8) -> Linears:
    def run(m: Linears, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.head(m.b(h + m.z(m.q(h))))

    net = Linears(run, a=(8, 8), q=(8, width), z=(width, 8), b=(8, 8), head=(8, 6))
    if zero:
        nn.init.zeros_(net.z.weight)
        nn.init.constant_(net.z.bias, 0.3)
    return net


def by_name(report: CreditReport, quantity: str) -> dict[str, float]:
    return dict(zip(report.components, getattr(report, quantity).tolist(), strict=True))


def test_a_branch_that_is_still_zero_is_nan_by_itself() -> None:
    net = branch(zero=True)
    report = credit_report(net, samples(), options=Options(tikhonov=0.0))
    assert report.components == ("a", "q", "z", "b", "head")
    credit, gain = by_name(report, "credit"), by_name(report, "gain")
    whole, behind_a = volume(net.w("a", "b", "head")), volume(net.w("b", "head"))
    assert report.total == pytest.approx(whole, abs=1e-7)
    assert credit["a"] == pytest.approx(behind_a, abs=1e-7)
    assert credit["b"] == pytest.approx(volume(net.w("head")), abs=1e-7)
    assert gain["b"] == pytest.approx(behind_a - volume(net.w("head")), abs=1e-7)
    for numbers in (credit, gain, by_name(report, "sensitivity")):
        assert np.isnan([numbers["q"], numbers["z"]]).all()
        assert np.isfinite([numbers["a"], numbers["b"], numbers["head"]]).all()
    assert np.nansum(report.gain) == pytest.approx(report.total)
    assert np.isfinite(report.stderr["credit"][[0, 3, 4]]).all()
    doubts = dict(zip(report.components, report.doubts, strict=True))
    assert [name for name, words in doubts.items() if "lost" in words] == ["q", "z"]
    assert any("no output direction can be followed back to q, z" in note for note in report.notes)


def test_a_narrow_branch_takes_no_direction_from_the_others() -> None:
    net = branch(zero=False, width=2)
    report = credit_report(net, samples(), options=Options(tikhonov=0.0))
    jacobian = net.w("a") @ (torch.eye(8) + net.w("q", "z")) @ net.w("b", "head")
    assert report.directions == 6
    assert report.total == pytest.approx(volume(jacobian), abs=1e-7)
    assert np.isfinite(report.credit).all()
    assert report.gain.sum() == pytest.approx(report.total)


def test_a_head_that_only_the_loss_sees_counts() -> None:
    def run(m: Linears, x: Tensor) -> dict[str, Tensor]:
        logits, aux = m.head(m.b(h := m.a(x))), m.aux(h)
        return {"loss": logits.square().mean() + aux.square().mean(), "logits": logits}

    net = Linears(run, a=(8, 8), b=(8, 8), head=(8, 3), aux=(8, 2))
    report = credit_report(net, samples(), options=Options(tikhonov=0.0))
    expected = torch.cat([net.w("a", "b", "head"), net.w("a", "aux")], 1)
    assert report.components == ("a", "b", "head+aux")
    assert report.total == pytest.approx(volume(expected), abs=1e-7)


@pytest.mark.parametrize("twice", [False, True])
def test_a_frozen_part_behind_a_trained_one_counts_where_the_step_calls_both(twice: bool) -> None:
    def step(m: Any, batch: tuple[Tensor, Tensor]) -> None:
        m.f(m.b(m.a(batch[0])))
        if twice:
            # Features of targets: what compares them with others is a loss.
            m.f(batch[1])

    net = frozen(Linears(lambda m, x: None, a=(8, 8), b=(8, 4), f=(4, 4)), "f")
    pairs = [(x, torch.randn(40, 4, dtype=torch.float64)) for x in samples()]
    report = credit_report(net, pairs, forward_fn=step, options=Options(tikhonov=0.0))
    expected = ["a", "b"] if twice else ["a", "b", "f"]
    assert report.components == tuple(expected)
    assert report.total == pytest.approx(volume(net.w(*expected)), abs=1e-7)


def similarities(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


def contrastive(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.cross_entropy(a @ b.T, torch.arange(len(a)))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(a, b)


def side_by_side(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b], dim=1)


@pytest.mark.parametrize(
    ("made", "in_forward", "is_told"),
    [
        (similarities, True, True),
        (similarities, False, True),
        (contrastive, True, True),
        (contrastive, False, True),
        (cosine, False, True),
        (cosine, True, False),
        (side_by_side, False, False),
        (lambda a, b: (a, 2 * b), False, False),
    ],
)
def test_what_is_made_of_two_towers_past_the_chain_is_told(
    made: Callable[..., Any], in_forward: bool, is_told: bool
) -> None:
    def towers(m: Any, x: Tensor) -> Any:
        pair = m.a(x[:, :4]), m.b(x[:, 4:])
        return made(*pair) if in_forward else pair

    net = Linears(towers, a=(4, 3), b=(4, 3))
    report = credit_report(net, samples(), forward_fn=None if in_forward else lambda m, x: made(*m(x)))
    plain = credit_report(
        Linears(lambda m, x: (m.a(x[:, :4]), m.b(x[:, 4:])), a=(4, 3), b=(4, 3)), samples()
    )
    told = [note for note in report.notes if note.startswith("credits end with what 'a+b' gives, not")]
    assert len(told) == is_told
    if in_forward and made is cosine:
        assert report.components == ("a+b", "output")
    else:
        assert report.components == plain.components == ("a+b",)
        assert set(report.notes) - set(told) == set(plain.notes)


@pytest.mark.parametrize(
    ("made", "is_told"),
    [
        (lambda z, log: log - z.square().sum(1) / 2, True),
        (lambda z, log: torch.cat([z, log[:, None]], dim=1), False),
        (lambda z, log: (z, log), False),
        (lambda z, log: z, False),
        (lambda z, log: log.exp(), False),
    ],
    ids=["log-probability", "side by side", "both", "the first", "of the second"],
)
@pytest.mark.parametrize("sums", [False, True], ids=["made of one component", "a sum"])
def test_what_forward_fn_makes_of_several_tensors_that_a_flow_returns_is_told(
    sums: bool, made: Callable[[Tensor, Tensor], Any], is_told: bool
) -> None:
    def flow(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.a(x)
        z = m.b(y)
        return z + y if sums else z, y[:, 0] + z[:, 0]

    net = Linears(flow, a=(8, 8), b=(8, 8))
    report = credit_report(net, samples(), forward_fn=lambda m, x: made(*m(x)))
    plain = credit_report(net, samples())
    told = [note for note in report.notes if note.startswith("credits end with what")]
    assert len(told) == is_told
    assert set(report.notes) - set(told) == set(plain.notes)
    assert report.credit.tolist() == plain.credit.tolist()


def test_a_tensor_that_is_returned_under_two_names_is_not_mixed_with_itself() -> None:
    def heads(m: Any, x: Tensor) -> dict[str, Tensor]:
        y = m.a(x) + m.b(x)
        return {"logits": y, "again": y, "detached": y.detach()}

    net = Linears(heads, a=(8, 4), b=(8, 4))
    for name in ("logits", "again", "detached"):
        report = credit_report(net, samples(), forward_fn=lambda m, x, name=name: m(x)[name].exp())
        assert not [note for note in report.notes if note.startswith("credits end with")]


def end_notes(end: Callable[[Tensor], Any], **given: Any) -> list[str]:
    net = Linears(lambda m, x: end(m.b(m.a(x))), a=(8, 8), b=(8, 4))
    if isinstance(end, nn.Module):
        net.add_module("end", end)
    report = credit_report(net, samples(), **given)
    assert report.components[:2] == ("a", "b")
    return [note for note in report.notes if note.startswith("credits end with")]


@pytest.mark.parametrize(
    "end",
    [torch.tanh, torch.relu, lambda y: torch.log_softmax(y, 1), lambda y: 2 * y, lambda y: (y**2, y**3)],
    ids=["tanh", "relu", "log_softmax", "a scale", "two of it"],
)
def test_what_the_network_makes_of_its_last_component_by_itself_is_told(
    end: Callable[[Tensor], Any],
) -> None:
    (note,) = end_notes(end)
    assert note == (
        "credits end with what 'b' gives, not with what the network makes of it by itself, as by "
        "torch.tanh; let a module do that, as nn.Tanh()"
    )
    assert not end_notes(end, output=lambda y: y if isinstance(y, Tensor) else y[0])


@pytest.mark.parametrize(
    "end",
    [
        nn.Tanh(),
        lambda y: y + 1,
        lambda y: y.view(-1, 2, 2),
        lambda y: y.flip(1),
        lambda y: (y, y.softmax(1)),
        lambda y: y[:, :2],
        lambda y: y.bfloat16(),
    ],
    ids=["a module", "a shift", "a view", "an order", "it as well", "a part", "a narrower type"],
)
def test_ends_that_are_the_last_component_or_a_state_of_their_own_need_no_word(
    end: Callable[[Tensor], Any],
) -> None:
    assert not end_notes(end)


class Tied(nn.Module):
    """Ends with a weight of its own, as language models do that share their embedding's."""

    def __init__(self, gives: str, units: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 8), nn.Linear(8, 6)
        self.weight, self.gives = nn.Parameter(torch.randn(6, units)), gives

    def forward(self, x: Tensor) -> Any:
        h = self.last(torch.tanh(self.first(x)))
        out = h @ self.weight
        return {"alone": out, "first": (out, h), "list": {"hidden": [h], "logits": out}}[self.gives]


@pytest.mark.parametrize("units", [4, 6, 9])
@pytest.mark.parametrize("gives", ["first", "list"])
def test_a_state_that_a_weight_of_the_network_goes_on_with_is_no_end(gives: str, units: int) -> None:
    found = {}
    for kind in ("alone", gives):
        torch.manual_seed(0)
        net = Tied(kind, units).double()
        x = torch.randn(400, 7, dtype=torch.float64)
        found[kind] = credit_report(net, x.split(100), options=Options(tikhonov=0))
    np.testing.assert_allclose(found[gives].credit, found["alone"].credit, atol=1e-12)
    # What the last layer gives reaches the output through the weight alone.
    logs = torch.linalg.svdvals(net.weight.detach()).log()
    np.testing.assert_allclose(found[gives].credit[1], logs.mean(), atol=1e-3)
