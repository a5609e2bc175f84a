"""What may be dropped: against closed forms, plain loops and exhaustive search."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from lightning_koopman import credit_report, drop_order, linearize
from lightning_koopman.decisions.swaps import Skipped, load_shrunk, save_shrunk, swaps_in

STRENGTHS = (0.5, -0.2, 1.5, 0.05, -1.0, 0.3)


class Scale(nn.Module):
    """Adds a multiple of one coordinate to it; what follows knows nothing of it otherwise."""

    def __init__(self, place: int, strength: float, width: int = 6) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(width))
        self.factors.data[place] += strength

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


def scales() -> nn.Sequential:
    return nn.Sequential(*(Scale(i, c) for i, c in enumerate(STRENGTHS)))


class Residual(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.inner.weight.data *= size

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


def residual_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Residual(s) for s in (0.7, 0.2, 1.0, 0.4, 0.1, 0.6)), nn.Linear(5, 3)).eval()


def inputs(n: int = 300, width: int = 5) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(3))


def labelled(net: nn.Module, n: int = 300, width: int = 5) -> list[tuple[Tensor, Tensor]]:
    x = inputs(n, width)
    with torch.no_grad():
        y = net(x).argmax(1)
    return list(zip(x.split(100), y.split(100), strict=True))


def test_effects_of_coordinates_apart_are_those_of_the_closed_form():
    x = inputs(width=6)
    order = drop_order(scales(), x.split(100), steps=6)
    variance = x.double().numpy().var(axis=0)
    parts = np.array(STRENGTHS) ** 2 * variance + (np.array(STRENGTHS) * x.double().numpy().mean(0)) ** 2
    whole = ((1 + np.array(STRENGTHS)) ** 2 * variance).sum()
    ascending = np.argsort(parts)
    assert order.components == tuple(str(i) for i in ascending)
    np.testing.assert_allclose(order.effect, parts[ascending].cumsum() / whole, rtol=1e-5)
    np.testing.assert_allclose(order.remaining[0], parts / whole, rtol=1e-5)
    assert order.scale == "relative"
    assert np.isnan(order.metric_before)


def test_additive_effects_make_the_greedy_order_the_best_of_all_subsets():
    net, x = scales().eval(), inputs(width=6)
    order = drop_order(net, [x], steps=6)
    with torch.no_grad():
        for k in range(1, 6):
            loss = {
                kept: (nn.Sequential(*(net[i] for i in kept))(x) - net(x)).square().sum()
                for kept in itertools.combinations(range(6), 6 - k)
            }
            best = min(loss, key=loss.__getitem__)
            assert {str(i) for i in range(6)} - set(order.components[:k]) == {str(i) for i in best}


def test_every_step_measures_all_that_are_left_on_what_is_left():
    net = residual_net()
    batches = labelled(net)
    order = drop_order(net, batches, steps=6)
    x, y = torch.cat([a for a, _ in batches]), torch.cat([b for _, b in batches])
    left = list(range(6))
    with torch.no_grad():
        p = net(x).double().log_softmax(1)
        for step in range(6):
            kl, hits = {}, {}
            for i in left:
                q = nn.Sequential(*(net[j] for j in left if j != i), net[6])(x).double().log_softmax(1)
                kl[str(i)] = float((p.exp() * (p - q)).sum(1).mean())
                hits[str(i)] = float((q.argmax(1) == y).double().mean())
            name = min(kl, key=kl.__getitem__)
            assert order.components[step] == name
            tried = dict(zip(order.candidates, order.remaining[step], strict=True))
            assert {n for n, value in tried.items() if not np.isnan(value)} == set(kl)
            assert all(tried[n] == pytest.approx(kl[n], rel=1e-6) for n in kl)
            assert order.effect[step] == pytest.approx(kl[name], rel=1e-6)
            assert order.metric[step] == pytest.approx(hits[name])
            left.remove(int(name))
    assert order.metric_before == pytest.approx(1.0)
    assert order.n_samples == 300


class Clip(nn.Module):
    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = nn.Parameter(torch.tensor(bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(x, self.bound)


def test_of_two_blocks_that_do_the_same_one_goes_and_the_other_stays():
    net = nn.Sequential(Clip(0.0), Clip(0.0), Scale(0, 0.1, width=5)).eval()
    order = drop_order(net, [inputs()], steps=2)
    assert order.components[0] in {"0", "1"}
    assert order.components[1] == "2"  # ranked by effects on the whole network, the second Clip would go
    assert order.effect[0] == pytest.approx(0.0, abs=1e-12)
    assert np.nanmax(order.remaining[0]) == order.remaining[0][2]


def test_the_order_ends_where_the_loss_is_exceeded():
    net, x = scales(), inputs(width=6)
    order = drop_order(net, [x], max_drop=0.02)
    assert len(order.components) == len(order.dropped) + 1
    assert order.effect[len(order.dropped) - 1] <= 0.02 < order.effect[-1]
    assert order.dropped == ("3", "1", "5")  # 0.05² + 0.2² + 0.3² of 11.9, the next adds 0.5²
    everything = drop_order(net, [x], max_drop=10.0)
    assert len(everything.dropped) == 6
    nothing = drop_order(net, [x], max_drop=0.0)
    assert nothing.dropped == ()
    assert "Nothing can go within 0 share of the outputs' variance" in nothing.verdict
    assert len(list(swaps_in(nothing.apply(net)))) == 0


def test_the_shrunk_network_is_what_was_measured_and_goes_round_by_a_file(tmp_path):
    net = residual_net()
    batches = labelled(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    parts = [id(module) for module in net.modules()]
    state = torch.get_rng_state()
    order = drop_order(net.train(), batches, credit_report(net, batches), steps=3)
    assert torch.equal(state, torch.get_rng_state())
    assert parts == [id(module) for module in net.modules()]
    assert net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    small = order.apply(net.eval(), steps=3)
    x, y = torch.cat([a for a, _ in batches]), torch.cat([b for _, b in batches])
    assert float((small(x).argmax(1) == y).double().mean()) == pytest.approx(order.metric[2])
    assert sum(p.numel() for p in small.parameters()) == order.costs[2].parameters
    save_shrunk(small, tmp_path / "small.ckpt", more={"global_step": 7})
    loaded = load_shrunk(residual_net(), tmp_path / "small.ckpt")
    torch.testing.assert_close(loaded(x), small(x), rtol=0, atol=0)
    assert "replaces=" in repr(loaded)
    with pytest.raises(ValueError, match="steps is 4; the order has 3"):
        order.apply(net, steps=4)


def test_the_users_own_metric_counts():
    net, x = scales(), inputs(width=6)
    batches = [(x, net(x).detach())]

    def metric(outputs: Tensor, targets: Tensor) -> float:
        return -float((outputs - targets).abs().mean())

    order = drop_order(net, batches, metric=metric, max_drop=0.1)
    assert order.metric_before == pytest.approx(0.0, abs=1e-12)
    assert (np.diff(order.metric) < 0).all()
    assert order.loss[-1] > 0.1 >= order.loss[-2]
    assert np.isnan(order.metric_stderr).all()


class Odd(nn.Module):
    """One block per way in which it can, or cannot, be skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5)
        self.tuple_of_one, self.pair, self.twice = (Tuples(1), Tuples(2), nn.Linear(5, 5))
        self.head = nn.Linear(5, 2)

    def forward(self, ids: Tensor) -> Tensor:
        (x,) = self.tuple_of_one(self.embed(ids))
        x, _ = self.pair(x)
        return self.head(self.twice(self.twice(x)))


class Tuples(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.inner, self.count = nn.Linear(5, 5), count

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.inner(x),) * self.count


def test_what_cannot_be_skipped_is_named_with_the_reason():
    torch.manual_seed(0)
    net, ids = Odd().eval(), torch.arange(9)
    order = drop_order(net, [ids], steps=5)
    assert order.components == ("tuple_of_one",)
    assert order.refused == {
        "embed": "which takes no floating-point tensor",
        "pair": "which gives tuple and not one tensor",
        "twice": "which runs 2 times in one pass",
        "twice#1": "which runs 2 times in one pass",
        "head": "which turns (5,) into (2,)",
    }
    small = order.apply(net, steps=1)
    x, _ = net.pair(net.embed(ids))
    torch.testing.assert_close(small(ids), net.head(net.twice(net.twice(x))))
    assert Skipped(["a"])(1, [torch.full((1,), 3.0)]).tolist() == [3.0]


class Tagger(nn.Module):
    """Takes a recurrent layer's first tensor, without a name for the others, to a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rnn = nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.rnn(self.stem(x))[0]))


@pytest.mark.parametrize("decide", [drop_order, linearize])
def test_what_gives_a_tuple_in_front_of_its_norm_stays_and_the_rest_is_decided(decide):
    torch.manual_seed(0)
    found = decide(Tagger().eval(), torch.randn(200, 5, 4).split(100), max_drop=1e9)
    assert "gives tuple" in found.refused["rnn"]
    assert found.candidates[0] == "stem"


@pytest.mark.parametrize("behind", [[nn.AdaptiveAvgPool2d(1), nn.Flatten()], [nn.Flatten()]])
def test_what_changes_the_shape_behind_a_block_stays(behind):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())
    width = 3 if len(behind) == 2 else 108
    net = nn.Sequential(nn.Conv2d(1, 3, 1), block, *behind, nn.Linear(width, 2))
    x = torch.randn(300, 1, 6, 6)
    report = credit_report(net, [x], components=["0", "1", f"{len(net) - 1}"])
    assert drop_order(net, [x], report).candidates == ("1",)
    order = drop_order(net, [x], steps=1)
    (swap,) = swaps_in(order.apply(net, steps=1))
    assert swap.replaces == ("1.0", "1.1")
    torch.testing.assert_close(order.apply(net, steps=1)(x), net[2:](net[0](x)))


def test_a_network_of_which_nothing_can_go():
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    order = drop_order(net, [inputs()])
    assert order.components == order.dropped == ()
    assert order.verdict.startswith("No component can be dropped")
    assert len(order.to_frame()) == 0
    assert "(5,) into (4,)" in str(order)


def test_an_order_of_nothing_still_says_what_its_metric_is():
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [[inputs(), net(inputs()).argmax(1)]]
    assert "accuracy 1.0000 as it was" in str(drop_order(net, batches))
    assert "metric 0.0000 as it was" in str(
        drop_order(net, batches, metric=lambda outputs, targets: 0.0)
    )


def test_results_can_be_read():
    net = residual_net()
    order = drop_order(net, labelled(net), max_drop=0.05)
    assert repr(order) == f"DropOrder({len(order.dropped)} of 6 within 0.05: {', '.join(order.dropped)})"
    printed = str(order)
    for text in (
        "300 samples, accuracy 1.0000",
        "Stays: 6, which turns (5,) into (3,)",
        ".apply(model)",
    ):
        assert text in printed
    frame = order.to_frame()
    assert list(frame.component) == list(order.components)
    assert list(frame.step) == list(range(1, len(order.components) + 1))
    assert frame.within.sum() == len(order.dropped)
    for name in ("effect", "effect_stderr", "metric", "metric_stderr"):
        assert np.array_equal(frame[name], getattr(order, name))
    blocks = [p.numel() for p in net[1].parameters()]
    for i, name in enumerate(order.components):
        row = next(line.split() for line in printed.splitlines() if line.split()[:1] == [name])
        left = 1 - (i + 1) * sum(blocks) / sum(p.numel() for p in net.parameters())
        products = 1 - (i + 1) * max(blocks) / sum(p.numel() for p in net.parameters() if p.ndim > 1)
        metric = f"{order.metric[i]:.4f}±{order.metric_stderr[i]:.4f}"
        assert row[-3:] == [metric, f"{left:.0%}", f"{products:.0%}"]
        assert frame.parameters[i] == order.costs[i].parameters
        assert frame.flops[i] == order.costs[i].flops
    _, axis = order.plot()
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["none", *order.components]
    line, low, high, _ = (line.get_ydata() for line in axis.lines)
    assert line == pytest.approx([0, *(order.metric_before - order.metric)], abs=1e-12)
    assert (high - low) / 2 == pytest.approx([0, *order.metric_stderr], abs=1e-12)


def test_an_order_without_a_metric_is_one_table_on_80_columns():
    console = Console(file=io.StringIO(), width=80)
    console.print(drop_order(residual_net(), [inputs()], max_drop=0.05))
    heading = next(line for line in console.file.getvalue().splitlines() if "component" in line)
    assert heading.rstrip().endswith("FLOPs left")


def test_errors_say_what_arrived_and_what_to_do():
    net, x = residual_net(), inputs()
    with pytest.raises(ValueError, match="max_drop is -1; it must be 0 or above"):
        drop_order(net, [x], max_drop=-1)
    with pytest.raises(ValueError, match="steps is 0; it must be 1 or above"):
        drop_order(net, [x], steps=0)
    with pytest.raises(ValueError, match="samples is 0; at least one is needed"):
        drop_order(net, [x], samples=0)
    with pytest.raises(ValueError, match="no sample arrived"):
        drop_order(net, [])
    with pytest.raises(ValueError, match=r"no component is called \['9'\]; there are \('0', '1'"):
        drop_order(net, [x], credit_report(net, [x]), components=["9"])
    with pytest.raises(ValueError, match=r"components\[1\] is of type type; it must be a name or glob"):
        drop_order(net, [x], components=["1", nn.Linear])
    with pytest.raises(ValueError, match="components names nothing; leave it out"):
        drop_order(net, [x], components=[])


@pytest.mark.parametrize("decide", [drop_order, linearize])
def test_a_name_alone_is_a_list_of_one(decide):
    net, x = residual_net(), inputs().split(50)
    assert decide(net, x, components="1").candidates == ("1",)


def test_only_so_many_samples_are_run_and_named_components_tried():
    net = residual_net()
    seen = []
    order = drop_order(
        net,
        inputs().split(50),
        credit_report(net, [inputs()]),
        components=["1", "4"],
        samples=120,
        steps=9,
        forward_fn=lambda model, batch: seen.append(len(batch)) or model(batch),
    )
    assert order.n_samples == 120
    assert set(seen) == {50, 20}
    assert sorted(order.components) == ["1", "4"]
    assert drop_order(net, [inputs()], components=["[14]"], steps=1).candidates == ("1", "4")
