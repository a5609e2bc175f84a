"""Networks that one pass calls several times: what a row stands for is altered in every call of them."""

from collections.abc import Callable

import pytest
import torch
from effect_nets import normal
from torch import Tensor, nn

from lightning_koopman import component_effects, credit_report
from lightning_koopman.network.runs.hook_points import HookPoint, HookPoints


def inner() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 6)
    ).double()


class Towers(nn.Module):
    """One network on the two halves of what arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.net = inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, :6]) - 2 * self.net(x[:, 6:]).sin()


class Refined(nn.Module):
    """One network that improves on what it gave before."""

    def __init__(self) -> None:
        super().__init__()
        self.net = inner()

    def forward(self, x: Tensor) -> Tensor:
        u = x[:, :6]
        for _ in range(4):
            u = u + self.net(u) / 2
        return u


class Direct(Refined):
    """The same, by the network's ``forward``, which fires no hook."""

    def forward(self, x: Tensor) -> Tensor:
        u = x[:, :6]
        for _ in range(4):
            u = u + self.net.forward(u) / 2
        return u


BATCHES = list(normal(120, 12).split(50))
ROWS = {"net.0": ("0", "1"), "net.2": ("2", "3"), "net.4": ("4", "4")}


def outputs(model: nn.Module, hook: Callable[..., Tensor] | None = None, last: str = "") -> Tensor:
    handle = model.net[int(last)].register_forward_hook(hook) if hook else None
    with torch.no_grad():
        found = torch.cat([model(x) for x in BATCHES])
    if handle:
        handle.remove()
    return found


def states(model: nn.Module, first: str, last: str) -> tuple[Tensor, Tensor]:
    """What a component takes and gives in all calls, one below the other."""
    taken, given = [], []
    hooks = [
        model.net[int(first)].register_forward_pre_hook(lambda m, args: taken.append(args[0])),
        model.net[int(last)].register_forward_hook(lambda m, args, out: given.append(out)),
    ]
    outputs(model)
    for hook in hooks:
        hook.remove()
    return torch.cat(taken), torch.cat(given)


def change(own: Tensor, altered: Tensor) -> float:
    return float((altered - own).square().sum() / (own - own.mean(0)).square().sum())


@pytest.mark.parametrize("kind", [Towers, Refined, Direct])
@pytest.mark.parametrize("named", [False, True])
def test_skipping_a_component_skips_it_in_every_call(kind, named):
    model = kind()
    own = outputs(model)
    report = credit_report(model, BATCHES) if named else None
    found = component_effects(model, BATCHES, report)
    assert found.components == tuple(ROWS)
    assert not found.notes
    for i, (first, last) in enumerate(ROWS.values()):
        taken, given = states(model, first, last)
        # The last one gives what it takes in shape; the others become their mean over all calls.
        mean = given.mean(0)
        altered = outputs(model, lambda m, args, out, mean=mean: mean.expand_as(out), last)
        if taken.shape == given.shape:
            altered = outputs(model, lambda m, args, out: args[0], last)
        assert found.values["skip"][i] == pytest.approx(change(own, altered), rel=1e-9)


@pytest.mark.parametrize("kind", [Towers, Refined])
def test_noise_of_the_same_size_goes_into_every_call(kind):
    model = kind()
    own = outputs(model)
    how = {"kinds": ["output_noise"], "strength": 1e-3, "draws": 40}
    found = component_effects(model, BATCHES, how="both", **how)
    for i, (first, last) in enumerate(ROWS.values()):
        spread = 1e-3 * states(model, first, last)[1].std(0, correction=0)

        def noisy(module, args, output, spread=spread):
            return output + spread * torch.randn_like(output)

        drawn = [change(own, outputs(model, noisy, last)) for _ in range(40)]
        expected = pytest.approx(sum(drawn) / 40, rel=0.15)
        assert found.values["output_noise"][i] == expected
        assert found.predicted["output_noise"][i] == expected


def test_one_linear_map_is_fitted_to_all_calls_and_put_in_each():
    model = Towers()
    own = outputs(model)
    found = component_effects(model, BATCHES, kinds=["linear"])
    taken, given = states(model, "0", "1")
    design = torch.cat([taken, torch.ones(len(taken), 1)], dim=1)
    solved = torch.linalg.lstsq(design, given).solution
    fitted = iter((design @ solved).split([50, 50, 50, 50, 20, 20]))
    altered = outputs(model, lambda m, args, out: next(fitted), "1")
    # Each row is predicted as if left out of the fit: by more than the fit itself misses, but not much.
    assert 1.0 < found.values["linear"][0] / change(own, altered) < 1.3
    assert found.values["linear"][2] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("kind", [Towers, Refined])
def test_small_changes_of_weights_are_predicted_over_all_calls(kind):
    model = kind()
    weights = model.state_dict().items()
    other = {k: v + 1e-4 * normal(v.numel(), 1, seed=5).view(v.shape) for k, v in weights}
    found = component_effects(
        model, BATCHES, kinds=[], how="both", probes=6, replacements={"near": other}
    )
    assert found.predicted["near"] == pytest.approx(found.values["near"], rel=2e-3)


class Unrolled(nn.Module):
    """A block that one call of the network runs twice, in a network that a pass calls twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Module()
        self.net.block, self.net.head = nn.Linear(6, 6).double(), nn.Linear(6, 3).double()
        self.net.forward = lambda x: self.net.head(self.net.block(self.net.block(x).tanh()).tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, :6]) - 2 * self.net(x[:, 6:])


def test_a_block_that_runs_twice_in_each_call_keeps_its_numbers():
    model = Unrolled()
    found = component_effects(model, BATCHES)
    assert found.components == ("net.block", "net.block#1", "net.head")
    own = torch.cat([model(x).detach() for x in BATCHES])
    for which, value in enumerate(found.values["skip"][:2]):
        count = iter(range(4 * len(BATCHES)))
        hook = model.net.block.register_forward_hook(
            lambda m, args, out, n=count, which=which: args[0] if next(n) % 2 == which else out
        )
        altered = torch.cat([model(x).detach() for x in BATCHES])
        hook.remove()
        assert value == pytest.approx(change(own, altered), rel=1e-9)


class Shorter(Towers):
    """The second call is about half as many rows."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:, :6]) + self.net(x[: len(x) // 2, 6:]).mean(0)


def test_a_call_on_other_shapes_is_left_and_told():
    model = Shorter()
    found = component_effects(model, BATCHES)
    own, first = outputs(model), iter([True, False] * len(BATCHES))
    altered = outputs(model, lambda m, args, out: args[0] if next(first) else out, "4")
    assert found.values["skip"][2] == pytest.approx(change(own, altered), rel=1e-9)
    (note,) = found.notes
    assert note.startswith("9 calls of components gave tensors of another shape")


def test_calls_are_counted_anew_where_the_ancestor_is_called_again_but_not_within_it():
    model = Towers()
    read = HookPoint("out", "net.0")
    halves = BATCHES[0].split(6, dim=1)
    with HookPoints(model, [read], counted_in=model.net) as points, torch.no_grad():
        model(BATCHES[0])
        for values, half in zip(points.rounds, halves, strict=True):
            assert torch.equal(values[read], model.net[0](half))


def test_the_error_of_a_mean_comes_from_groups_that_are_moved_in_every_call():
    model, own = Towers(), outputs(Towers())
    found = component_effects(model, BATCHES)
    _, given = states(model, "2", "3")
    mean, counts, first = given.mean(0), [6, 6, 2], [0, 6, 12]
    groups = [torch.arange(len(x)) % n for x, n in zip(BATCHES, counts, strict=True)]
    # Each batch is seen by both towers in turn.
    turns = iter([each for each in groups for _ in range(2)])

    def moved_to_groups(module, args, output):
        own = next(turns)
        means = torch.stack([output[own == g].mean(0) for g in range(int(own.max()) + 1)])
        return mean + 0.2 * (means[own] - mean)

    altered = outputs(model, lambda m, args, out: mean.expand_as(out), "3")
    shifted = outputs(model, moved_to_groups, "3")
    before, behind = ((own - each).square().sum(1) for each in (altered, shifted))
    place = torch.cat([each + start for each, start in zip(groups, first, strict=True)])
    sums = torch.zeros(14, dtype=torch.float64)
    moved = sums.index_add(0, place, before + (behind - before) / 0.2)
    whole = sums.index_add(0, place, (own - own.mean(0)).square().sum(1))
    rest = moved - moved.sum() / whole.sum() * whole
    expected = (rest.square().sum() * 14 / 13).sqrt() / whole.sum()
    assert found.stderr["skip"][1] == pytest.approx(float(expected), rel=1e-6)


def test_all_calls_that_end_the_chain_count_with_a_report_too():
    """As the views of a contrastive step, which a report joins under one name."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = inner()[2:], nn.Linear(2, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.net(own) for own in (x, x.sin(), 2 * x))

    model, x = Beside(), normal(200, 9)
    report = credit_report(model, x.split(50))
    assert report.components[-1] == "net.4#*"
    effects = [component_effects(model, x.split(50), given) for given in (report, None)]
    views = (x, x.sin(), 2 * x)
    with torch.no_grad():
        own = model(x)
        mean = [model.net[0](view).tanh().mean(0) for view in views]
        moved = [(model.net[2](m) - y).square().sum() for m, y in zip(mean, own, strict=True)]
        spread = [(y - y.mean(0)).square().sum() for y in own]
    for found in effects:
        assert found.components[::2] == ("net.2", "net.2#1", "net.2#2")
        assert found.notes == effects[0].notes
        assert "averaged over 3 outputs" in found.notes[0]
        expected = [float(m / s) / 3 for m, s in zip(moved, spread, strict=True)]
        assert found.values["skip"][::2] == pytest.approx(expected, rel=1e-3)
