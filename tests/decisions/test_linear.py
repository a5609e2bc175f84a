"""Linear components: exact on linear networks, saved and loaded as usual, refused where impossible."""

import functools
import io
import itertools
import math

import numpy as np
import pytest
import torch
from small import wired
from torch import nn

from lightning_koopman import CheckpointError, credit_report, linearize
from lightning_koopman.decisions import linear, linear_search, timing
from lightning_koopman.decisions.steps import Cost, Step, is_within
from lightning_koopman.decisions.swaps import LinearComponent, load_shrunk, save_shrunk, swaps_in
from lightning_koopman.effects.linear_map import LinearFit
from lightning_koopman.effects.scoring import Measured

ANY = {"max_drop": math.inf, "allow_larger": True}


def mlp(act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, 16), act(), nn.Linear(16, 3)
    ).eval()


def inputs(n: int = 500, seed: int = 5) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def labelled(net: nn.Module) -> list[list[torch.Tensor]]:
    x = inputs(800)
    return [[part, net(part).argmax(1)] for part in x.split(100)]


def test_identity_activations_make_linearising_exact_and_merged():
    net, x = mlp(nn.Identity), inputs()
    new = linearize(
        net, [x], fit_batches=[x], report=credit_report(net, [x]), components=["2", "4"], **ANY
    )
    assert [type(child).__name__ for child in new.model] == [
        "Linear", "Identity", "LinearComponent", "Identity", "Identity", "Identity", "Linear",
    ]  # fmt: skip
    torch.testing.assert_close(new.model(inputs(seed=8)), net(inputs(seed=8)), rtol=1e-4, atol=1e-5)
    assert new.model[2].rank is not None  # 16 -> 16 through the 6 directions that the input fills
    assert sum(p.numel() for p in new.model.parameters()) == new.costs[-1].parameters
    assert (
        new.costs[-1].parameters < new.cost_before.parameters == sum(p.numel() for p in net.parameters())
    )


class Queried(nn.Module):
    """Gives learned queries to a module, as weights that ask for gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, 6))
        self.look, self.mix, self.head = nn.Bilinear(6, 6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.look(self.queries[:1].expand(len(x), -1), x)
        return self.head(self.mix(seen))


def test_networks_that_give_learned_queries_to_a_module_are_counted():
    net = Queried()
    new = linearize(net, labelled(nn.Sequential(net)), components=["mix"], **ANY)
    assert new.cost_before.flops > 0
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_original_is_left_alone_and_what_are_no_neighbours_stay_apart():
    net, x = mlp().train(), inputs()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    parts, state = list(map(id, net.modules())), torch.get_rng_state()
    new = linearize(net, x.split(250), components=["0", "4"], **ANY)
    assert len(swaps_in(new.model)) == 2
    assert new.model.training
    assert net.training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert parts == list(map(id, net.modules()))
    assert torch.equal(state, torch.get_rng_state())


def test_a_bare_linear_layer_stays_unless_a_neighbour_goes_with_it():
    net, x = mlp(nn.Identity), inputs()
    alone = linearize(net, x.split(250), components=["6"], **ANY)
    assert alone.components == ()
    assert not swaps_in(alone.model)
    torch.testing.assert_close(alone.model(x), net(x))
    both = linearize(net, x.split(250), components=["4", "6"], max_drop=1e-6, allow_larger=True)
    assert set(both.components) == {"4", "6"}
    (swap,) = swaps_in(both.model)
    assert swap.replaces == ("4", "5", "6")


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(4, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class Tokens(nn.Module):
    """A linear map of the channels at every position, dressed up as something else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x))


def test_positions_share_one_map_of_their_channels():
    torch.manual_seed(0)
    net = nn.Sequential(Tokens(5), nn.Flatten(), nn.Linear(35, 3)).eval()
    x = torch.randn(600, 7, 5)
    found = linearize(net, x.split(150), components=["0"], max_drop=1e-6, allow_larger=True)
    assert type(found.model[1]) is nn.Flatten  # it belongs to the component, but changes the positions
    swap = found.model[0]
    assert (swap.axis, swap.in_features, swap.shape, swap.rank) == (-1, 5, (5,), None)
    torch.testing.assert_close(found.model(x), net(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        matrix = torch.eye(5) + net[0].down.weight @ net[0].up.weight
    torch.testing.assert_close(swap.layers.weight, matrix, rtol=1e-3, atol=1e-4)
    assert found.cost_before.flops == 2 * 150 * (7 * 2 * 5 * 20 + 35 * 3)
    assert found.costs[-1].flops == 2 * 150 * (7 * 5 * 5 + 35 * 3)


def test_neighbours_whose_positions_share_a_map_become_one_such_map():
    torch.manual_seed(0)
    net = nn.Sequential(Tokens(5), Tokens(5), nn.Flatten(), nn.Linear(35, 3)).eval()
    x = torch.randn(600, 7, 5)
    found = linearize(net, x.split(150), components=["0", "1"], max_drop=1e-6, allow_larger=True)
    (swap,) = swaps_in(found.model)
    assert (swap.replaces, swap.axis, swap.shape) == (("0", "1"), -1, (5,))
    torch.testing.assert_close(found.model(x), net(x), rtol=1e-4, atol=1e-4)


def test_pixels_share_one_map_of_their_channels():
    torch.manual_seed(0)
    convolution = Pixels()
    net = nn.Sequential(nn.Conv2d(1, 4, 3), convolution, nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.randn(300, 1, 8, 8)
    found = linearize(net, x.split(100), components=["1"], max_drop=1e-6, allow_larger=True)
    assert found.model[1].axis == 1
    torch.testing.assert_close(found.model(x), net(x), rtol=1e-4, atol=1e-4)


def test_wide_images_become_thin_layers_that_give_whole_images():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)).eval()
    x = torch.randn(900, 1, 8, 8)
    found = linearize(
        net,
        [x[:100]],
        fit_batches=x.split(300),
        components=["1"],
        variance=1.0,
        max_drop=1e-6,
        allow_larger=True,
    )
    assert found.model[1].shape == (4, 8, 8)
    assert found.model[1].rank == 64  # the 512 values in between depend on 64 pixels
    torch.testing.assert_close(found.model(x), net(x), rtol=1e-3, atol=1e-4)
    assert found.larger[:2] == ("parameters", "FLOPs")
    assert repr(found).startswith("Linearized(LARGER (parameters, FLOPs")
    assert str(found).lstrip().startswith("LARGER (parameters, FLOPs")


def test_nothing_gets_larger_unless_asked():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)).eval()
    found = linearize(net, torch.randn(600, 1, 8, 8).split(300), max_drop=0.01)
    assert found.components == ()
    assert found.verdict.startswith("Nothing became linear within 0.01 share of the outputs' variance")
    assert not swaps_in(found.model)


def test_what_saves_nothing_stays_though_it_was_taken_on_the_way():
    torch.manual_seed(0)
    merged = [nn.Linear(6, 256), nn.Identity(), nn.Linear(256, 256), nn.Identity()]
    net = nn.Sequential(*merged, nn.Linear(256, 8), nn.Tanh(), nn.Linear(8, 8), nn.Identity()).eval()
    found = linearize(net, inputs(2000).split(500), max_drop=1e-4)
    assert found.candidates == ("0", "2", "4", "6")
    assert sorted(found.components) == ["0", "2"]


def test_what_saves_nothing_stays():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    found = linearize(net, inputs().split(250), components=["0"], max_drop=math.inf)
    assert found.components == ()
    assert found.headline.startswith("100% of the parameters, 100% of the FLOPs")


def test_a_slower_network_is_refused_unless_asked(monkeypatch):
    net, x = mlp(), inputs()
    monkeypatch.setattr(timing, "_seconds", lambda runner: 1.0 + len(swaps_in(runner.model)))
    with pytest.raises(ValueError, match=r"with 4, 2 linear the network is slower: LARGER \(time\): "):
        linearize(net, x.split(250), components=["2", "4"], max_drop=math.inf)
    found = linearize(net, x.split(250), components=["2", "4"], max_drop=math.inf, allow_larger=True)
    assert (found.seconds, found.slower, found.larger) == ((1.0, 2.0), True, ("time",))
    assert found.headline.startswith("LARGER (time): ")
    saved = linearize(net, x.split(250), components=["2", "4"], max_drop=math.inf, cost="seconds")
    assert saved.components == ()  # both take longer


def test_the_choice_keeps_the_drop_and_ends_at_the_budget():
    net = mlp()
    batches = labelled(net)
    found = linearize(net, batches, max_drop=0.1, allow_larger=True)
    assert found.metric_before == pytest.approx(1.0)
    assert found.components
    x, y = torch.cat([x for x, _ in batches[1::2]]), torch.cat([y for _, y in batches[1::2]])
    kept = float((found.model(x).argmax(1) == y).double().mean())
    assert kept == pytest.approx(found.metric[-1])
    assert kept >= 0.9
    assert found.within == len(found.components)
    assert found.cost_before.flops == 2 * 100 * (6 * 16 + 16 * 16 * 2 + 16 * 3)
    last, before_last = found.costs[-1].flops, [found.cost_before, *found.costs][-2].flops
    share = (last + 1) / found.cost_before.flops
    enough = linearize(net, batches, max_drop=0.1, budget=share, allow_larger=True)
    assert enough.costs[-1].flops <= share * found.cost_before.flops < before_last
    exact = linearize(net, batches, max_drop=0.0, cost="parameters", allow_larger=True)
    assert all(loss <= 0 for loss in exact.loss)


def test_where_one_is_enough_it_is_the_one_that_moves_the_outputs_least():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 6)) for _ in range(3)]
    for block, size in zip(blocks, (1.5, 0.1, 6.0), strict=True):
        block[0].weight.data.mul_(size)  # the larger, the more bent
    net, (fit_on, x) = nn.Sequential(*blocks, nn.Linear(6, 3)).eval(), inputs(400).split(200)
    batches, y, effects = [fit_on, x], net(x).detach(), {}
    report = credit_report(net, batches, components=list("0123"))
    for name in "012":
        alone = linearize(net, batches, report, components=[name], **ANY)
        moved = (alone.model(x) - y).detach()
        effects[name] = float(moved.square().sum() / (y - y.mean(0)).square().sum())
        budget = (alone.costs[0].flops + 1) / alone.cost_before.flops  # alike for all three
    found = linearize(net, batches, report, budget=budget, max_drop=math.inf)
    assert found.components == (min(effects, key=effects.get),) == ("1",)
    assert found.effect.tolist() == pytest.approx([effects["1"]], rel=1e-4)


class Looked(nn.Module):
    """Scales by the first row of a large table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.table[0]


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten())


@pytest.mark.parametrize(
    ("block", "sizes", "cost", "other"),
    [(Looked, (6,), "parameters", "FLOPs"), (convolutions, (1, 8, 8), "flops", "parameters")],
)
def test_what_saves_one_cost_and_needs_more_of_the_other_stays_unless_asked(block, sizes, cost, other):
    torch.manual_seed(0)
    net = nn.Sequential(block(), nn.Linear(6 if sizes == (6,) else 32, 3)).eval()
    x = torch.randn(400, *sizes).split(200)
    report = credit_report(net, x, components=["0", "1"])
    options = {"components": ["0"], "max_drop": 0.01, "cost": cost, "variance": 1.0}
    assert linearize(net, x, report, **options).components == ()
    found = linearize(net, x, report, allow_larger=True, **options)
    assert (found.components, found.larger[0]) == (("0",), other)
    before, after = (getattr(costs, cost) for costs in (found.cost_before, found.costs[-1]))
    assert after < before


def test_no_choice_of_components_is_cheaper():
    """All subsets, each made linear as a whole and scored by hand."""
    net = mlp()
    batches = labelled(net)
    x, y = torch.cat([x for x, _ in batches[1::2]]), torch.cat([y for _, y in batches[1::2]])
    flops = []
    for count in (1, 2, 3, 4):
        for names in itertools.combinations(["0", "2", "4", "6"], count):
            own = linearize(net, batches, components=names, variance=0.9, **ANY)
            lost = 1 - float((own.model(x).argmax(1) == y).double().mean())
            flops += [(lost, cost.flops) for cost in own.costs[-1:]]
    for max_drop, count in ((0.0025, 0), (0.05, 2), (0.08, 3), (0.15, 3)):
        found = linearize(net, batches, variance=0.9, max_drop=max_drop)
        least = min((cost for lost, cost in flops if lost <= max_drop + 1e-9), default=131200)
        assert (found.costs or [found.cost_before])[-1].flops == least
        assert len(found.components) == count


def looked_up(monkeypatch, numbers, count):
    """Decide on so many blocks, with an effect and a cost for every subset that are given."""

    def tried(search, chosen):
        effect, cost = numbers[frozenset(option.name for option in chosen)]
        return Step(chosen[-1].name, Measured(effect, 0.0, math.nan, math.nan), Cost(cost, cost)), cost

    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)) for _ in range(count)]
    net = nn.Sequential(*blocks, nn.Linear(6, 3)).eval()
    for module in (linear, linear_search):
        monkeypatch.setattr(module, "cost_of", lambda runner: Cost(1000, 1000))
    monkeypatch.setattr(linear_search.Search, "_try", tried)
    report = credit_report(net, [inputs()], components=[str(i) for i in range(count)])
    return linearize(net, inputs().split(100), report, max_drop=1.0, scale="kl")


@pytest.mark.parametrize("seed", range(8))
def test_no_order_and_no_exchange_gives_a_cheaper_network(monkeypatch, seed):
    """Costs and effects drawn for every subset of five blocks, so that all of them can be looked up."""
    rng = np.random.default_rng(seed)
    every = [frozenset(c) for n in range(6) for c in itertools.combinations("01234", n)]
    savings = {chosen: int(rng.integers(80, 120)) * len(chosen) for chosen in every}
    numbers = {c: (rng.gamma(1.0) * len(c) / 3, 1000 - saved) for c, saved in savings.items()}
    found = looked_up(monkeypatch, numbers, 5)
    own = frozenset(found.components)
    assert len(own) == len(found.components) == found.within
    assert [step.flops for step in found.costs] == [
        numbers[frozenset(found.components[: i + 1])][1] for i in range(len(own))
    ]
    by_depth: list[list[str]] = []
    for order in ("01234", "43210"):
        taken: list[str] = []
        for name in order:
            effect, cost = numbers[frozenset([*taken, name])]
            if effect <= 1 and cost < numbers[frozenset(taken)][1]:
                taken.append(name)
        by_depth.append(taken)
    # One more or two that are neighbours, or in place of one.
    added = [{a} for a in "01234"] + [{a, b} for a, b in itertools.pairwise("01234")]
    near = [c for c in every if len(own - c) <= 1 and (not c - own or c - own in added)]
    near = [c for c in near if numbers[c][0] <= 1]
    assert not own or numbers[own][0] <= 1
    assert numbers[own][1] <= min(numbers[frozenset(c)][1] for c in by_depth)
    assert numbers[own][1] == min(numbers[c][1] for c in (near if own else [own]))
    if own:
        assert numbers[own][0] == min(numbers[c][0] for c in near if numbers[c][1] == numbers[own][1])


@pytest.mark.parametrize("apart", [False, True])
def test_two_that_lose_too_much_alone_become_linear_together_where_they_are_neighbours(
    monkeypatch, apart
):
    every = [frozenset(c) for n in range(4) for c in itertools.combinations("012", n)]
    both = frozenset("02" if apart else "12")
    numbers = {c: (0.5 if c in (both, frozenset()) else 2.0, 1000 - 100 * len(c)) for c in every}
    assert frozenset(looked_up(monkeypatch, numbers, 3).components) == (frozenset() if apart else both)


@pytest.mark.parametrize("order", ["0123", "3210"])
def test_from_either_end_more_becomes_linear_than_by_the_effect_of_each(monkeypatch, order):
    """What moves the outputs least leads no further, and the way to more begins at the other end."""
    every = (c for n in range(5) for c in itertools.combinations(order, n))
    numbers = {frozenset(c): (2.0, 1000) for c in every}
    least, *rest = order
    costs = {least: 900, rest[2]: 950, "".join(rest[1:]): 920, "".join(rest): 600}
    numbers |= {frozenset(c): (0.1 if c == least else 0.5, cost) for c, cost in costs.items()}
    assert frozenset(looked_up(monkeypatch, numbers, 4).components) == frozenset(rest)


def test_by_the_effect_per_cost_saved_more_becomes_linear_than_from_either_end(monkeypatch):
    every = (c for n in range(5) for c in itertools.combinations("0123", n))
    numbers = {frozenset(c): (2.0, 1000) for c in every}
    alone = {"1": (0.9, 900), "2": (0.01, 960), "3": (0.005, 990)}
    numbers |= {frozenset(c): both for c, both in (alone | {"02": (0.5, 700)}).items()}
    assert frozenset(looked_up(monkeypatch, numbers, 4).components) == frozenset("02")


def test_what_saves_nothing_stays_only_where_the_others_alone_are_admitted(monkeypatch):
    none, first, second, both = map(frozenset, ("", "0", "1", "01"))
    numbers = {none: (0.0, 1000), first: (2.0, 800), second: (0.5, 900), both: (0.5, 800)}
    assert frozenset(looked_up(monkeypatch, numbers, 2).components) == both
    numbers |= {first: (0.9, 800), second: (0.4, 900)}
    assert frozenset(looked_up(monkeypatch, numbers, 2).components) == first


def test_the_last_sample_that_may_be_lost_counts_as_within():
    lost = 0.93 - 0.92
    assert lost > 0.01
    assert is_within(lost, 0.01)
    assert not is_within(0.93 - 0.9199, 0.01)
    assert not is_within(1e-9, 0.0)


def test_results_can_be_read():
    net = mlp()
    found = linearize(net, labelled(net), max_drop=0.3, allow_larger=True)
    frame = found.to_frame()
    assert list(frame.component) == list(found.components)
    assert list(frame.flops) == [cost.flops for cost in found.costs]
    assert frame.within.all()
    assert f"linear: {', '.join(found.components)}" in repr(found)
    assert "Next: measure .model on data that nothing was chosen on" in found.next_step
    assert found.plot()[0].axes


def test_state_dicts_go_round(tmp_path):
    net, x = mlp(), inputs()
    new = linearize(net, x.split(250), components=["2", "4"], **ANY).model
    torch.save(new.state_dict(), tmp_path / "weights.pt")
    other = linearize(net, (x + 0.1).split(250), components=["2", "4"], **ANY).model
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    torch.testing.assert_close(other(x), new(x), rtol=0, atol=0)
    save_shrunk(new, tmp_path / "new.ckpt", more={"global_step": 7})
    loaded = load_shrunk(net, tmp_path / "new.ckpt")
    torch.testing.assert_close(loaded(x), new(x), rtol=0, atol=0)
    whole = io.BytesIO()
    torch.save(new, whole)
    whole.seek(0)
    torch.testing.assert_close(torch.load(whole, weights_only=False)(x), new(x), rtol=0, atol=0)
    # In the precision that the file has.
    save_shrunk(new.double(), tmp_path / "new.ckpt")
    exact = load_shrunk(net.double(), tmp_path / "new.ckpt")(x.double())
    torch.testing.assert_close(exact, new(x.double()), rtol=0, atol=0)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    net, x = mlp(), inputs()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="holds no dropped or linear components; load it as usual"):
        load_shrunk(net, tmp_path / "plain.ckpt")
    save_shrunk(linearize(net, x.split(250), components=["4"], **ANY).model, tmp_path / "new.ckpt")
    with pytest.raises(CheckpointError, match=r"does not fit Sequential: .* has no module '4'"):
        load_shrunk(net[:2], tmp_path / "new.ckpt")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x, other):
        return torch.relu(self.inner(x) + other)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.last = Pair(), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.pair(x, x))


def test_errors_say_what_arrived_and_what_to_do():
    net, x = mlp(), inputs()
    batches = x.split(250)
    with pytest.raises(ValueError, match=r"no component is called \['x'\]"):
        linearize(net, batches, credit_report(net, [x]), components=["x"])
    with pytest.raises(ValueError, match="variance is 0"):
        linearize(net, batches, variance=0)
    with pytest.raises(ValueError, match="max_drop is -1"):
        linearize(net, batches, max_drop=-1)
    with pytest.raises(ValueError, match="budget is 1; it is a share of the original flops"):
        linearize(net, batches, budget=1)
    with pytest.raises(ValueError, match="cost is 'time'; choose 'flops', 'parameters' or 'seconds'"):
        linearize(net, batches, cost="time")
    with pytest.raises(ValueError, match="no sample arrived"):
        linearize(net, [])
    with pytest.raises(ValueError, match="one batch arrived, but maps are fitted on one"):
        linearize(net, [x])
    with pytest.raises(ValueError, match=r"went through torch.compile"):
        linearize(torch.compile(net, backend="eager"), batches)
    pairs = Pairs().eval()
    report = credit_report(pairs, [x], components=["pair", "last"])
    with pytest.raises(ValueError, match="'pair' cannot become linear: it takes more than one tensor"):
        linearize(pairs, batches, report, components=["pair"])
    recurrent = wired(lambda m, x: m.head(m.gru(x)[0]), gru=nn.GRU(6, 6), head=nn.Linear(6, 2)).eval()
    refused = linearize(recurrent, batches, forward_fn=lambda model, x: model(x[:, None])[:, 0]).refused
    assert refused == {"gru": "it gives tuple, not one tensor of rows"}
    with pytest.raises(ValueError, match="0 of at least 2 samples arrived for a linear map"):
        LinearFit().solve()
    assert "shape=(2,)" in repr(LinearComponent(3, (2,), replaces=["a"]))


class AsFunctions(nn.Module):
    """Layers with activations that are functions, or one module for all."""

    def __init__(self, act) -> None:
        super().__init__()
        self.a, self.b, self.c, self.act = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2), act

    def forward(self, x):
        return self.c(self.act(self.b(self.act(self.a(x)))))


def test_activations_that_are_functions_or_shared_are_explained():
    data = inputs().split(250)
    for net in (AsFunctions(torch.relu), AsFunctions(nn.ReLU())):
        found = linearize(net.eval(), data)
        assert found.candidates == ("a", "b", "c")
        assert found.notes[-1].startswith("a, b, c: no activation of its own belongs to any of these")
    images = AsFunctions(torch.relu).eval()
    images.a, images.b, images.c = (nn.Conv2d(i, 4, 2) for i in (1, 4, 4))
    convolved = linearize(images, torch.randn(400, 1, 5, 5).split(100), max_drop=1e-9)
    assert convolved.notes[-1].startswith("a, b, c: no activation of its own")
    assert not linearize(mlp(), data, max_drop=1e-9).notes
    twice = Repeated().eval()
    nothing = linearize(twice, data, credit_report(twice, data, components=["inner"]))
    assert nothing.verdict == "Nothing can become linear: all components stay, for the reasons above."
    assert nothing.next_step == "Next: drop_order, which drops blocks whole."


def test_layers_around_an_activation_become_one_map_though_others_share_the_dropout_behind():
    torch.manual_seed(0)
    drop = nn.Dropout(0.1)
    blocks = [nn.Sequential(nn.Linear(6, 64), nn.Identity(), nn.Linear(64, 6), drop) for _ in range(2)]
    net = nn.Sequential(*blocks).eval()
    found = linearize(net, inputs().split(250), max_drop=1e-3, allow_larger=True)
    replaced = [new.replaces for new in swaps_in(found.model)]
    assert replaced == [(f"{i}.0", f"{i}.1", f"{i}.2") for i in range(2)]
    torch.testing.assert_close(found.model(inputs()), net(inputs()), rtol=1e-3, atol=1e-4)


class SharedPool(nn.Module):
    """Activations of their own, and one pooling and one dropout for all."""

    def __init__(self, in_a_sequence: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        pool, drop = nn.MaxPool2d(2), nn.Dropout(0.1)
        first = [nn.Conv2d(1, 8, 3, padding=1), nn.Identity(), pool]
        second = [nn.Conv2d(8, 8, 3, padding=1), nn.Identity(), pool]
        last = [nn.Conv2d(8, 8, 3, padding=1), nn.Identity(), nn.Flatten()]
        last += [nn.Linear(32, 16), nn.Identity(), drop, nn.Linear(16, 3), drop]
        self.parts = nn.Sequential(*first, *second, *last)
        self.apart = None if in_a_sequence else nn.Sequential(*first, *second)

    def forward(self, x):
        return self.parts(x) if self.apart is None else self.parts[6:](self.apart(x))


@pytest.mark.parametrize("in_a_sequence", [True, False])
def test_what_several_share_stays_and_their_own_becomes_linear(in_a_sequence):
    net, x = SharedPool(in_a_sequence).eval(), torch.randn(400, 1, 8, 8)
    found = linearize(net, x.split(100), max_drop=1e-6, allow_larger=True)
    replaced = [call.rpartition(".")[2] for new in swaps_in(found.model) for call in new.replaces]
    # Not one map, for the pooling runs in between.
    assert replaced == ["0", "1", "3", "4", "6", "7", "8", "9", "10"]
    torch.testing.assert_close(found.model(x), net(x), rtol=1e-4, atol=1e-5)


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.inner(self.inner(x)))


class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(self.a(x))


def test_a_second_call_cannot_become_linear_and_places_apart_are_no_neighbours():
    net, x = Repeated().eval(), inputs()
    report = credit_report(net, [x], components=["inner", "last"])
    with pytest.raises(ValueError, match="'inner' cannot become linear: it runs 2 times"):
        linearize(net, x.split(250), report, components=["inner", "last"])
    new = linearize(Apart().eval(), x.split(250), **ANY)
    assert [component.replaces for component in swaps_in(new.model)] == [("a.0", "a.1")]


def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "new.ckpt"
    path.write_bytes(b"of another day")

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_shrunk(mlp(), path)
    assert path.read_bytes() == b"of another day"
    assert list(tmp_path.iterdir()) == [path]


class Mixed(nn.Module):
    """Lets positions depend on others."""

    def __init__(self, inner, mix):
        super().__init__()
        self.inner, self.mix = inner, mix

    def forward(self, x):
        return self.mix(torch.tanh(self.inner(x)))


@pytest.mark.parametrize(
    ("inner", "mix", "axes"),
    [
        (functools.partial(nn.Linear, 4, 4), lambda y: y.cumsum(1), []),
        (functools.partial(nn.Linear, 4, 4), lambda y: y + y.sum(1, keepdim=True), [None]),
        (functools.partial(nn.Linear, 4, 4), lambda y: y.roll(-1, 1), [None]),
        (functools.partial(nn.Conv1d, 3, 3, 3, padding=2), lambda y: y[..., :-2], []),
        (functools.partial(nn.Conv1d, 3, 3, 3, padding=1), lambda y: y + 0, [None]),
    ],
)
def test_what_does_not_see_the_future_is_no_map_of_whole_sequences(inner, mix, axes):
    torch.manual_seed(0)
    net, x = nn.Sequential(Mixed(inner(), mix), nn.Linear(4, 2)).eval(), torch.randn(400, 3, 4)
    net[0].inner.weight.data.mul_(0.1)  # so small that whole sequences are mapped nearly exactly
    found = linearize(net, x.split(100), components=["0"], max_drop=0.01, allow_larger=True)
    assert [swap.axis for swap in swaps_in(found.model)] == axes


def test_maps_are_fitted_on_batches_at_even_places_and_chosen_on_the_others():
    net, (a, b, c, d), x = mlp(), inputs(400).split(100), inputs(seed=8)
    found, apart = (
        linearize(net, choose_on, components=["2"], fit_batches=fit_on, **ANY)
        for choose_on, fit_on in (([a, b, c, d], None), ([b, d], [a, c]))
    )
    torch.testing.assert_close(found.model(x), apart.model(x), rtol=0, atol=0)
    assert found.effect == apart.effect


def test_images_of_several_sizes_leave_no_map_of_whole_tensors():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 6, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*body, nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    x = [torch.randn(100, 3, size, size) for size in (6, 9, 8, 7)]
    found = linearize(net, x, **ANY)
    # Of these, images of one size at most would do, and behind the pooling there is but one.
    assert found.refused == {"0": "what it takes or gives has not one shape in all batches"}
    axes = {swap.replaces: swap.axis for swap in swaps_in(found.model)}
    assert axes == {("1",): 1, ("4", "5", "6"): None}
    with pytest.raises(ValueError, match="'0' cannot become linear: what it takes or gives has not one"):
        linearize(net, x, components=["0"], **ANY)


class Routed(nn.Module):
    """Sends each sample to the expert that its first number says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        which, h = x[:, 0].long(), torch.relu(self.stem(x))
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            out[which == number] = expert(h[which == number])
        return self.head(h + out)


@pytest.mark.parametrize(
    ("at", "why"),
    [
        ((), "no row of the first batch comes to it"),
        ((130,), "no row of the first batch comes to it"),
        ((7,), "it takes 1 row of the data to fit maps on, of at least 2"),
    ],
)
def test_experts_that_get_no_samples_stay(at, why):
    torch.manual_seed(0)
    net, x = Routed().eval(), inputs(400)
    x[:, 0] = torch.arange(400) % 2
    x[list(at), 0] = 2.0
    batches = x.split(100)
    found = linearize(net, batches, **ANY)
    assert found.refused == {"experts.2.0": why}
    assert {"experts.0.0", "experts.1.0"} <= {*found.components}
    with torch.no_grad():
        own, new = (torch.cat([model(b) for b in batches[1::2]]) for model in (net, found.model))
    effect = (new - own).square().sum() / (own - own.mean(0)).square().sum()
    assert found.effect[-1] == pytest.approx(float(effect), rel=1e-4)


def test_experts_may_get_samples_of_some_batches_alone():
    torch.manual_seed(0)
    net, x = Routed().eval(), inputs(800)
    x[:, 0] = torch.arange(800) % 2
    x[:100:3, 0] = x[400:500:2, 0] = 2.0  # of those to fit on the first and third, to choose on none
    found = linearize(net, x.split(100), components=["experts.2.*"], variance=1.0, **ANY)
    assert found.components == ("experts.2.0",)
    with torch.no_grad():
        rows = torch.relu(net.stem(torch.cat([x[:100], x[400:500]])))
        rows = rows[torch.cat([x[:100, 0], x[400:500, 0]]) == 2]
        given, mapped = net.experts[2](rows), found.model.experts[2](rows)
    ones = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    fitted = ones @ torch.linalg.lstsq(ones, given, driver="gelsd").solution
    least, left = ((each - given).square().sum() for each in (fitted, mapped))
    assert least <= left <= 2.5 * least  # a ridge may double the error
    assert left < 0.01 * (given - given.mean(0)).square().sum()
