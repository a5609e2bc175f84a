"""Effects in networks that draw in eval mode, derive their weights or run under checkpoints."""

import functools
import random

import numpy as np
import pytest
import torch
from effect_nets import left_out
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from lightning_koopman import component_effects, credit_report, linearize
from lightning_koopman.effects.derived_weights import reset
from lightning_koopman.effects.linear_map import LinearFit
from lightning_koopman.network.runs.forward_runner import ForwardRunner
from lightning_koopman.report.effects import KINDS


class Sampling(nn.Module):
    """Draws from every global generator, also behind its last component but one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.tanh(self.a(x)) + torch.randn(len(x), 8)
        x = torch.tanh(self.b(x)) + torch.from_numpy(np.random.randn(len(x), 8)).float()
        return self.c(x) * (1 + torch.rand(len(x), 4)) + random.random()


@pytest.fixture
def sampling():
    torch.manual_seed(0)
    batches = torch.randn(400, 6).split(100)
    model = Sampling().eval()
    return model, batches


def test_weak_noise_changes_nothing_in_a_network_that_draws(sampling):
    model, batches = sampling
    kinds = ["output_noise", "weight_noise"]
    found = component_effects(model, batches, None, kinds, how="both", strength=1e-6, draws=2)
    for kind in kinds:
        assert 0 < found.values[kind].min() <= found.values[kind].max() < 1e-10
        assert not any(found.doubts[kind])
        # Of the same size: what the network draws is the same in both.
        np.testing.assert_allclose(found.predicted[kind], found.values[kind], rtol=2)


def test_a_batch_has_its_own_random_numbers_in_every_run_and_the_users_go_on(sampling):
    model, batches = sampling
    runner = ForwardRunner(model, [batches[0], batches[0]])
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    with torch.no_grad():
        first, second = runner.run(), runner.run()
    assert torch.equal(torch.rand(5), expected)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.allclose(first[0], first[1])


def old_weight_norm(layer, name="weight"):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer, name)


@pytest.mark.parametrize("wrap", [old_weight_norm, parametrizations.weight_norm])
def test_reinit_of_normed_weights_is_that_of_plain_ones(wrap):
    def layers(wrapped):
        torch.manual_seed(0)
        made = [nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)]
        a, b, c = [wrap(layer) for layer in made] if wrapped else made
        return nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), c)

    batches = torch.randn(300, 6, generator=torch.Generator().manual_seed(1)).split(100)
    effects, copies = [], []
    for wrapped in (True, False):
        net = layers(wrapped)
        net(batches[0])  # leaves a weight with a graph on the modules of the old kind
        state = {key: value.clone() for key, value in net.state_dict().items()}
        report = credit_report(net, batches)
        found = component_effects(net, batches, report, ["reinit"], how="both", draws=2)
        effects.append((found.values["reinit"], found.predicted["reinit"]))
        copies.append(
            linearize(net, batches, report, components=["2"], max_drop=1.0, allow_larger=True).model
        )
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    np.testing.assert_allclose(effects[0], effects[1], rtol=1e-4)
    torch.testing.assert_close(copies[0](batches[0]), copies[1](batches[0]), rtol=0, atol=1e-4)


def drawn(make, wrap, seed=7):
    """Reset a wrapped module, and return it with a plain one that is drawn with the same seed."""
    torch.manual_seed(0)
    module = wrap(make()).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        assert reset(module, "m")
    torch.manual_seed(seed)
    plain = make()
    return module, plain


@pytest.mark.parametrize(
    "wrap", [nn.utils.spectral_norm, parametrizations.spectral_norm], ids=["old", "parametrized"]
)
def test_a_spectral_norm_follows_the_weight_drawn_anew(wrap):
    module, plain = drawn(lambda: nn.Linear(8, 8), lambda layer: wrap(layer, n_power_iterations=20))
    x = torch.randn(50, 8)
    weight = plain.weight / torch.linalg.matrix_norm(plain.weight, 2)
    torch.testing.assert_close(module(x), x @ weight.T + plain.bias, rtol=0, atol=1e-3)
    assert not any(part.training for part in module.modules())


def test_pruned_entries_stay_zero_and_others_are_drawn_anew():
    module, plain = drawn(lambda: nn.Conv1d(3, 4, 2), lambda m: prune.l1_unstructured(m, "weight", 5))
    x = torch.randn(5, 3, 6)
    expected = nn.functional.conv1d(x, plain.weight * module.weight_mask, plain.bias)
    torch.testing.assert_close(module(x), expected)


def test_one_of_several_weights_may_be_derived():
    module, _ = drawn(lambda: nn.LSTM(3, 4), lambda m: old_weight_norm(m, "weight_hh_l0"))
    fresh = dict(module.named_parameters())
    torch.manual_seed(0)
    before = dict(nn.LSTM(3, 4).named_parameters())
    assert not any(torch.equal(fresh[key], before[key]) for key in fresh.keys() & before.keys())
    norms = fresh["weight_hh_l0_v"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(fresh["weight_hh_l0_g"], norms)
    assert not torch.allclose(fresh["weight_hh_l0_v"], before["weight_hh_l0"])


def test_a_parametrization_without_a_way_back_is_named():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    parametrize.register_parametrization(net[0], "weight", Doubled())
    batches = torch.randn(100, 4).split(50)
    words = "'0.weight' is derived by Doubled, which cannot be set to another weight"
    found = component_effects(net, batches, kinds=["reinit"])
    assert found.doubts["reinit"] == (("refused",), ())
    assert words in found.notes[-1]
    with pytest.raises(ValueError, match=words):
        component_effects(net, batches, kinds=["reinit"], components=["0"])
    found = component_effects(net, batches, kinds=["reinit"], initial=net.state_dict())
    assert found.values["reinit"].max() == 0


@pytest.mark.parametrize("tikhonov", [0.0, 1e-12, 1e-3])
def test_samples_left_out_of_a_fit_are_those_of_fits_without_them(tikhonov):
    torch.manual_seed(0)
    x = torch.randn(12, 30, dtype=torch.float64)
    y = (x @ torch.randn(30, 3, dtype=torch.float64)).tanh()
    fit = LinearFit(64)
    fit.update(x, y)
    found = fit.solve(tikhonov)
    given = found.projected(x)
    # The ridge weight is in units of the mean variance of all samples.
    ridge = 12 * tikhonov * float(x.var(dim=0, correction=0).mean())
    torch.testing.assert_close(
        found.left_out(given, y - found(given)), left_out(x, y, ridge), rtol=1e-6, atol=1e-8
    )


def test_a_map_of_wide_inputs_is_ridge_regression_on_the_leading_directions_of_the_first_samples():
    torch.manual_seed(0)
    x = torch.randn(120, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) / 10 + 5
    y = (2.5 * x[:, :6] - 11).tanh().reshape(120, 2, 3)
    fit, sizes = LinearFit(4), [5, 5, 50, 60]
    for some, given in zip(x.split(sizes), y.split(sizes), strict=True):
        fit.update(some, given)
    found = fit.solve(0.01)
    assert fit.nbytes == 2 * 8 * 4 * 6  # the map and its sums, in double precision
    # Eight samples settle four directions; the second batch reaches them.
    directions = torch.linalg.svd(x[:10] - x[:10].mean(0))[2][:4].T
    t, rows, mean = (x - x.mean(0)) @ directions, y.flatten(1), y.flatten(1).mean(0)
    inverse = torch.linalg.inv(t.T @ t + 120 * 0.01 * t.square().mean() * torch.eye(4))
    mapped = t @ inverse @ t.T @ (rows - mean)
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)
    close(found(found.projected(x)), (mapped + mean).view_as(y))
    matrix, offset = found.dense()
    close(x @ matrix + offset, mapped + mean)
    close(found.leverage, (t @ inverse @ t.T).diagonal() + 1 / 120)
    u, s, vh = torch.linalg.svd(mapped, full_matrices=False)
    for rank, kept in enumerate(s[:4].square().cumsum(0) / s.square().sum(), 1):
        left, right, offset = found.factors(float(kept) - 1e-6)
        assert left.shape == (12, rank)
        close(x @ left @ right + offset, (u[:, :rank] * s[:rank]) @ vh[:rank] + mean)


def test_linear_effects_are_not_zero_with_fewer_samples_than_directions():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Linear(40, 40), nn.Tanh()), nn.Sequential(nn.Linear(40, 40), nn.Tanh()),
        nn.Linear(40, 4),
    ).double()  # fmt: skip
    few, many = torch.randn(30, 40).double(), torch.randn(400, 40).double()
    how = {"kinds": ["linear"], "components": ["0", "1", "2"], "how": "both"}
    found, better = component_effects(net, [few], **how), component_effects(net, [many], **how)
    assert (found.values["linear"] > 0.01).all()
    assert (found.predicted["linear"] > 0.01).all()
    assert all("samples" in words for words in found.doubts["linear"])
    # With enough samples the last one, which is linear, costs nothing.
    assert better.values["linear"][2] < 1e-3 * found.values["linear"][2]


class OwnCheckpoint(torch.autograd.Function):
    """As libraries write it."""

    @staticmethod
    def forward(ctx, function, x):
        return function(x)

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("Checkpointing is not compatible with .grad()")


class Checkpointed(nn.Module):
    def __init__(self, how, frozen=False):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.head, self.tail = nn.Linear(6, 8), nn.Linear(8, 3)
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks).requires_grad_(not frozen)
        self.head.requires_grad_(not frozen)

    def forward(self, x):
        x = self.head(x)
        for block in self.blocks:
            if self.how == "own":
                x = x + OwnCheckpoint.apply(block, x)
            else:
                given = block(x) if self.how is None else checkpoint(block, x, use_reentrant=self.how)
                x = x + given
        return self.tail(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("components", [None, ["head", "blocks.*.0", "blocks.*.2", "tail"]])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", [True, False])
def test_effects_under_checkpoints_are_those_without(how, frozen, components):
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    found = []
    for checkpoints in (None, how):
        net = Checkpointed(checkpoints, frozen).eval()
        report = credit_report(net, [x], components=components)
        found.append(component_effects(net, [x], report, KINDS, how="predicted").values)
    for kind, values in found[0].items():
        np.testing.assert_allclose(found[1][kind], values, rtol=1e-5, atol=1e-12, err_msg=kind)
    assert "apply" not in vars(CheckpointFunction)


def test_what_somebody_else_put_in_place_of_a_checkpoint_is_put_back(monkeypatch):
    theirs = staticmethod(CheckpointFunction.apply)
    monkeypatch.setattr(CheckpointFunction, "apply", theirs)
    component_effects(Checkpointed(None).eval(), [torch.randn(50, 6)], how="predicted")
    assert vars(CheckpointFunction)["apply"] is theirs


def test_checkpoints_of_other_libraries_are_named():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    net = Checkpointed("own").eval()
    with pytest.raises(ValueError, match="activation checkpoints that let no gradients of states"):
        component_effects(net, [x], how="predicted")
    assert component_effects(net, [x]).how == {"skip": "measured"}
