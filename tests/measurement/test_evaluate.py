"""credit_report: from a model and batches to a report, leaving nothing behind."""

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import oracles
import pytest
import torch
from lit import hooks_on
from small import wired
from test_metric import assert_same_report
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_koopman import CreditReport, Options, credit_report
from lightning_koopman.demo import Digits
from lightning_koopman.koopman.credit import QUANTITIES


def samples(n: int = 300, width: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64)


def images(n: int = 120) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# The truth on linear networks.


@pytest.mark.parametrize("widths", [(5, 5, 5), (7, 4, 6, 5), (12, 10, 3, 10, 8)], ids=str)
def test_a_linear_network_is_read_off_exactly(linear_chain, widths):
    net = linear_chain(*widths)
    report = credit_report(net, samples(400, widths[0]).split(64), options=Options(tikhonov=0.0))
    weights = [layer.weight.detach().numpy().T for layer in net]
    states = [samples(400, widths[0]).numpy()]
    for layer in net:
        states.append(layer(torch.from_numpy(states[-1])).detach().numpy())
    rank = min(widths)
    product = oracles.dense_product([*weights, oracles.pod(states[-1], rank)])
    assert report.directions == rank
    assert report.total * rank == pytest.approx(oracles.log_volume(product), abs=1e-8)
    assert report.gain.sum() == pytest.approx(report.total, abs=1e-9)
    assert np.abs(report.nonlinearity).max() < 1e-9
    assert np.abs(1 - report.chain_r2).max() < 1e-9
    for i, name in enumerate(report.components):
        x, y = (torch.from_numpy(states[j]) for j in (i, i + 1))
        assert torch.allclose(report.operators[name].predict(x), y, rtol=0, atol=1e-8)
        if min(widths[: i + 1]) == widths[i]:
            assert np.allclose(report.operators[name].matrix.numpy(), weights[i], rtol=0, atol=1e-8)


def test_a_report_says_how_many_folds_its_errors_rest_on(mlp):
    report = credit_report(mlp, [samples()], options=Options(folds=3))
    assert report.folds == CreditReport.from_dict(report.to_dict()).folds == 3


def test_a_nonlinear_network_has_the_r2_of_an_explicit_fit(mlp):
    from lightning_koopman.koopman.states import sample_keys

    x = samples()
    report = credit_report(mlp, x.split(50), options=Options(tikhonov=0.0))
    with torch.no_grad():
        first = torch.relu(mlp.first(x))
        second = mlp.second(first)
        head = mlp.head(torch.relu(second))
    states = [state.numpy() for state in (x, first, second, head)]
    fold_of = (sample_keys(x) % 5).numpy()
    for i in range(3):
        expected = oracles.held_out_r2(states[i], states[i + 1], fold_of, oracles.least_squares)
        assert report.r2[i] == pytest.approx(expected, abs=1e-9)
    assert report.components == ("first", "second", "head")
    assert report.r2[1] == pytest.approx(1, abs=1e-9)  # a linear layer whose input is recorded
    assert report.r2[0] < 0.99


def test_states_that_vary_by_rounding_alone_are_told():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(400, 6)

    def told(scale: float, dtype: torch.dtype = torch.float32) -> bool:
        given = copy.deepcopy(net).to(dtype)
        with torch.no_grad():
            given[2].weight.mul_(scale)
            given[2].bias.fill_(1.0)
            outputs = given(x.to(dtype))
        notes = [note for note in credit_report(given, [x.to(dtype)]).notes if "rounded" in note]
        assert not notes or notes[0].startswith("2 vary between samples by hardly more than")
        # An independent truth: an output of 400 samples is one of a few numbers.
        assert bool(notes) == (len(outputs[:, 0].unique()) < 20)
        return bool(notes)

    assert told(3e-7)
    assert not told(1e-4)
    assert not told(3e-7, torch.float64)


def directions(rows: np.ndarray, count: int) -> np.ndarray:
    """The leading principal directions of some rows."""
    return np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:count].T


def test_what_bases_leave_out_is_told_and_is_what_a_linear_layer_cannot_explain():
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 3)).double()
    x = torch.randn(2000, 20, dtype=torch.float64)
    cut, whole = credit_report(net, [x], max_dim=16), credit_report(net, [x], max_dim=20)
    assert whole.notes == ()
    assert whole.nonlinearity == pytest.approx(0, abs=1e-9)
    (note,) = cut.notes
    assert note.startswith(
        "states keep less than 99% of their variance at max_dim=16: 1 of 3, 'input' the"
    )
    assert note.endswith("in the R² of what gives it; a larger max_dim keeps more")
    # White inputs: unexplained is what the layer makes of the directions that are left out.
    weight, first = net[0].weight.detach().numpy(), x[:32].numpy()
    read, given = (directions(rows, 16) for rows in (first, first @ weight.T))
    unseen = weight.T @ given - read @ read.T @ weight.T @ given
    share = (unseen**2).sum() / ((weight.T @ given) ** 2).sum()
    assert cut.nonlinearity[0] == pytest.approx(share, abs=0.02)
    assert cut.nonlinearity[1] > 0


# Streaming.


@pytest.mark.parametrize("batch", [1, 7, 64, 299])
def test_neither_batch_size_nor_order_changes_a_number(mlp, batch):
    given = credit_report(mlp, [samples()])
    assert_same_report(credit_report(mlp, samples().split(batch)), given)
    order = torch.randperm(300)
    assert_same_report(credit_report(mlp, samples()[order].split(batch)), given)


@pytest.mark.parametrize("batch", [1, 9, 50])
def test_batch_size_changes_no_number_of_reduced_states(conv_net, batch):
    options = Options(max_dim=12)
    given, other = (credit_report(conv_net, images().split(b), options=options) for b in (120, batch))
    assert_same_report(other, given, atol=1e-8)
    assert given.widths == (12, 6, 3)
    assert given.variance_kept[0] < 1


def test_error_bars_shrink_with_samples(mlp):
    options = Options(folds=10)
    few, many = (
        credit_report(mlp, samples(n).split(500), max_samples=None, options=options) for n in (500, 8000)
    )
    for name in ("credit", "r2"):
        ratio = np.linalg.norm(few.stderr[name]) / np.linalg.norm(many.stderr[name])
        assert 2 < ratio < 8, name  # 4 in theory


# What batches and models may be.


class Named(NamedTuple):
    x: Tensor
    label: str


def test_batches_may_be_tensors_tuples_mappings_or_a_loader(mlp):
    x, labels = samples(), torch.zeros(300).long()
    parts = x.split(50)
    expected = credit_report(mlp, parts)
    forms: dict[str, Any] = {
        "generator": (part for part in parts),
        "tuples": [(part, part.sum()) for part in parts],
        "named tuples": [Named(part, "of no interest") for part in parts],
        "nested lists": [[[part], None] for part in parts],
        "mappings": [{"x": part} for part in parts],
        "loader": DataLoader(TensorDataset(x, labels), batch_size=50, shuffle=True),
    }
    for batches in forms.values():
        assert_same_report(credit_report(mlp, batches), expected)


def test_forward_fn_says_how_to_run_the_model_and_all_its_calls_count(mlp):
    def views(model: nn.Module, batch: dict[str, Any]) -> None:
        model(batch["image"])
        model(2 * batch["image"])

    def again(model: nn.Module, batch: dict[str, Any]) -> None:
        model(batch["image"])
        model(batch["image"].clone())

    parts = samples().split(50)
    batches = [{"image": part, "label": None} for part in parts]
    once, both = parts, [view for part in parts for view in (part, 2 * part)]
    calls = ((lambda model, batch: model(batch["image"]), once), (views, both), (again, once))
    for forward_fn, seen in calls:
        given, expected = credit_report(mlp, batches, forward_fn=forward_fn), credit_report(mlp, seen)
        if seen is once:
            assert_same_report(given, expected)
            continue
        # As many samples, of which each is left out together with its other view.
        assert given.n_samples == expected.n_samples
        np.testing.assert_allclose(given.credit, expected.credit, atol=1e-9)
        assert "300 of 600 samples are later calls" in given.notes[0]


def test_calls_on_the_same_samples_make_no_smaller_errors(mlp):
    x, errors = samples(), []
    for n_calls in (1, 8):

        def step(model: nn.Module, batch: Tensor, n_calls: int = n_calls) -> None:
            for call in range(n_calls):
                model(batch * (1 + 0.01 * call))

        errors.append(credit_report(mlp, x.split(50), forward_fn=step).stderr)
    for name in ("credit", "r2"):
        # By as many samples as rows, they would be 2.8 times as small.
        np.testing.assert_allclose(errors[1][name], errors[0][name], rtol=0.3, atol=1e-12)


@pytest.mark.parametrize("kinds", [12, 120])
def test_data_of_few_kinds_are_told(kinds):
    class Ring(nn.Linear):
        """Reads what stands before each sample too, as atoms read their neighbours."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.3 * x.roll(1, 0))

    torch.manual_seed(0)
    model = nn.Sequential(Ring(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    table = samples(kinds)
    batches = [table[torch.randint(kinds, (100,))] for _ in range(4)]
    notes = credit_report(model, batches).notes
    told = "the first 256 samples have 12 different inputs, and folds leave out all samples of an input"
    assert any(told in note for note in notes) == (kinds == 12)


def test_a_further_call_that_skips_components_does_not_count(mlp):
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp

        def forward(self, x: Tensor, deep: bool = True) -> Tensor:
            return self.net(x) if deep else self.net.first(x)

    def step(model: nn.Module, x: Tensor) -> None:
        model(x)
        model(2 * x, deep=False)
        model(3 * x)
        model(4 * x, deep=False)

    given = credit_report(Features(), samples().split(50), forward_fn=step)
    assert given.n_samples == 2 * len(samples())


def test_calls_of_a_shared_module_are_told_apart_and_silent_ones_noted(shared_net):
    report = credit_report(shared_net, samples(200, 5).split(50))
    assert report.components == ("shared", "shared#1", "head")
    assert report.notes == ("never ran, so left out: 'unused'",)


def test_a_first_component_of_tokens_has_no_credit_of_its_own():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 3)).double()
    tokens = torch.randint(0, 9, (300, 3), generator=torch.Generator().manual_seed(0))
    report = credit_report(net, tokens.split(50))
    assert report.components == ("2", "3")
    assert report.notes[0].startswith("'0' takes no floating-point input that could be followed")


def test_single_precision_models_are_computed_in_double(mlp):
    double = credit_report(mlp, samples().split(50), options=Options(tikhonov=0.0))
    single = credit_report(mlp.float(), samples().float().split(50), options=Options(tikhonov=0.0))
    assert single.credit.dtype == np.float64
    assert np.allclose(single.credit, double.credit, rtol=0, atol=1e-3)
    assert np.abs(single.gain.sum() - single.total) < 1e-9


def test_options_reach_the_computation(mlp):
    batches = samples().split(50)

    def measured(**options: Any) -> CreditReport:
        return credit_report(mlp, batches, options=Options(**options))

    assert measured(rank=2).directions == 2
    assert measured(targets=[1, 3, 0]).directions == 3
    assert measured(tikhonov=0.25).tikhonov.tolist() == [0.25] * 3
    assert measured(max_dim=3).widths == (3, 3, 3)
    assert credit_report(mlp, batches, step=7).step == 7
    assert credit_report(mlp, batches, components=["second", "head"]).components == ("second", "head")
    plain = credit_report(mlp, batches)
    for changed in ({"folds": 10}, {"seed": 1}):
        other = measured(**changed, tikhonov=float(plain.tikhonov[0]))
        assert other.r2[0] != pytest.approx(plain.r2[0], abs=1e-9)
    for changed in ({"normalize": "rms"}, {"normalize": "whiten"}, {"delay": 2}):
        other = measured(**changed)
        assert other.credit[0] != pytest.approx(plain.credit[0], abs=1e-6)


def test_targets_are_units_of_the_output_or_refused(linear_chain):
    net, batches = linear_chain(6, 8, 12), samples(400).split(100)
    with pytest.raises(ValueError, match=r"targets is \[5\], but the output is wider than max_dim=10"):
        credit_report(net, batches, targets=[5], max_dim=10)
    named = credit_report(net, batches, targets=[5], max_dim=12)
    picked = credit_report(net, batches, output=lambda returned: returned[:, [5]], max_dim=10)
    assert named.credit[0] == pytest.approx(picked.credit[0], abs=1e-9)


def test_targets_are_no_cells_that_an_output_is_pooled_to():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1))
    with pytest.raises(ValueError, match=r"targets is \[0\], but the output is wider than max_dim=128"):
        credit_report(net, [torch.randn(60, 1, 2, 100)], targets=[0])
    assert credit_report(net, [torch.randn(300, 1, 2, 5)], targets=[0]).directions == 1


def test_targets_of_a_sequence_go_channel_by_channel(linear_chain):
    net, batches = linear_chain(4, 4, 3), torch.randn(400, 2, 4).double().split(100)
    named = credit_report(net, batches, targets=[3])
    picked = credit_report(net, batches, output=lambda returned: returned[:, 1, 1:2])
    assert named.credit[0] == pytest.approx(picked.credit[0], abs=1e-9)


def test_targets_of_the_position_that_is_returned_are_its_units(linear_chain):
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear_chain(4, 4, 3)

        def forward(self, x):
            return self.net(x)[:, 0]

    batches = torch.randn(400, 50, 4).double().split(100)
    named = credit_report(First(), batches, targets=[1])
    assert (named.directions, named.widths[-1]) == (1, 3)


# Nothing is left behind.


class Snapshot:
    """All that a measurement may not change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = copy.deepcopy(model.state_dict())
        self.modes = [module.training for module in model.modules()]
        self.gradients = [
            (p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()
        ]
        self.random = torch.get_rng_state(), random.getstate(), np.random.get_state()
        self.hooks = hooks_on(model)

    def assert_unchanged(self) -> None:
        assert hooks_on(self.model) == self.hooks
        assert [module.training for module in self.model.modules()] == self.modes
        for name, value in self.model.state_dict().items():
            assert torch.equal(value, self.state[name]), name
        for parameter, (wanted, gradient) in zip(self.model.parameters(), self.gradients, strict=True):
            assert parameter.requires_grad is wanted
            assert (parameter.grad is None) is (gradient is None)
            assert gradient is None or torch.equal(parameter.grad, gradient)
        assert torch.equal(torch.get_rng_state(), self.random[0])
        assert random.getstate() == self.random[1]
        for a, b in zip(np.random.get_state(), self.random[2], strict=True):
            assert np.array_equal(a, b)
        assert torch.is_grad_enabled()


def disturbing(batches: Any) -> Iterator[Any]:
    """Draw random numbers while iterating, as a shuffling loader does."""
    for batch in batches:
        random.random(), np.random.rand(), torch.rand(2)
        yield batch


def test_modes_buffers_gradients_and_random_states_are_as_before(conv_net):
    conv_net.bn1.eval()  # frozen
    conv_net.conv1.weight.requires_grad_(False)
    conv_net(images()[:8]).sum().backward()
    conv_net.fc.register_forward_hook(lambda *_: None)
    before = Snapshot(conv_net)
    credit_report(conv_net, disturbing(images().split(30)), options=Options(max_dim=12))
    before.assert_unchanged()
    assert [m.training for m in (conv_net, conv_net.bn1, conv_net.bn2)] == [True, False, True]


def test_all_is_as_before_when_the_model_raises(raising_net):
    raising_net.drop.eval()
    before = Snapshot(raising_net)
    with pytest.raises(RuntimeError, match="the model itself failed"):
        credit_report(raising_net, disturbing([samples(20, 4)]))
    before.assert_unchanged()


def test_all_is_as_before_when_the_data_raise(mlp):
    def failing() -> Iterator[Tensor]:
        yield from samples().split(50)[:2]
        raise OSError("disk gone")

    before = Snapshot(mlp)
    with pytest.raises(OSError, match="disk gone"):
        credit_report(mlp, disturbing(failing()))
    before.assert_unchanged()


def test_training_goes_on_bit_for_bit_as_without_a_report(conv_net):
    other = copy.deepcopy(conv_net)
    weights = []
    for net, measured in ((conv_net, False), (other, True)):
        torch.manual_seed(3)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        loader = DataLoader(TensorDataset(images()), batch_size=30, shuffle=True)
        for (batch,) in itertools.chain(loader, loader):
            if measured:
                credit_report(net, disturbing(images()[:60].split(30)), options=Options(max_dim=6))
            optimiser.zero_grad()
            net(batch).square().mean().backward()
            optimiser.step()
        weights.append(net.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# Degenerate networks, each with a stated answer.


def test_dead_and_duplicate_units_lower_the_rank_only(mlp):
    with torch.no_grad():
        mlp.first.weight[0] = 0
        mlp.first.bias[0] = -1  # dead
        mlp.first.weight[1] = 0
        mlp.first.bias[1] = 1 / 3  # constant
        mlp.first.weight[2] = mlp.first.weight[3]
        mlp.first.bias[2] = mlp.first.bias[3]  # duplicate
    report = credit_report(mlp, samples().split(50))
    np.testing.assert_allclose(report.rank, [6, 6, 4], atol=0.01)
    assert report.widths == (9, 7, 4)
    assert report.directions == 4
    assert all(np.isfinite([getattr(report, name), report.stderr[name]]).all() for name in QUANTITIES)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3])
def test_a_dead_branch_is_nan_by_itself_and_the_report_says_so(linear_chain, value):
    net = linear_chain(6, 5, 4, 3)
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.fill_(value)
        net[2].weight.normal_()
    with pytest.raises(ValueError, match="last component is constant over all 300 samples"):
        credit_report(net, samples().split(50))

    # The dead state is followed by one that moves again.
    late = wired(lambda m, x: m.c(m.b(m.a(x)) + x[:, :4]), a=net[0], b=net[1], c=net[2])
    report = credit_report(late, samples().split(50))
    np.testing.assert_allclose(report.rank, [5, 0, 3], atol=0.01)
    np.testing.assert_array_equal(np.isnan(report.credit), [True, True, False])
    jacobian = net[2].weight.detach()  # of the first four inputs, which go around the dead branch
    volume = float(torch.linalg.slogdet(jacobian @ jacobian.T)[1]) / 2 / 3
    assert report.total == pytest.approx(volume, abs=1e-9)
    assert report.gain[2] == pytest.approx(volume, abs=1e-9)
    assert np.isnan(report.r2[1])
    assert report.r2[2] > 1 - 1e-9  # its operator sees the input that reaches it around the dead state
    assert report.directions == 3
    assert ["lost" in reasons for reasons in report.doubts] == [True, True, False]
    assert "no output direction can be followed back to a, b" in report.notes[-1]


@pytest.mark.parametrize("batches", [[], iter(()), DataLoader(TensorDataset(torch.zeros(0, 6)))])
def test_an_empty_loader_is_refused(mlp, batches):
    with pytest.raises(ValueError, match="no sample arrived: the batches were empty"):
        credit_report(mlp, batches)


def test_a_batch_without_rows_is_refused(mlp):
    with pytest.raises(ValueError, match=r"a state of shape \(0, 6\) is no row of values"):
        credit_report(mlp, [samples(10), samples(0)])


@pytest.mark.parametrize(("value", "kind"), [("nan", "NaN"), ("inf", "infinity"), ("-inf", "infinity")])
def test_values_that_are_not_finite_name_component_and_batch(mlp, value, kind):
    batches = list(samples().split(50))
    batches[3] = batches[3].clone()
    batches[3][7, 2] = value = float(value)
    before = Snapshot(mlp)
    with pytest.raises(
        ValueError, match=f"the network's input holds {kind} in batch 3. Find the sample, or"
    ):
        credit_report(mlp, batches)
    before.assert_unchanged()
    with torch.no_grad():
        mlp.second.bias[1] = value
    with pytest.raises(ValueError, match=f"component 'second' holds {kind} in batch 0"):
        credit_report(mlp, samples().split(50))


def test_an_autocast_around_the_report_casts_the_network_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))
    batches, options = samples(400).float().split(50), Options(max_dim=16)

    def casts(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    within = credit_report(net, batches, options=options, forward_fn=casts)
    with torch.autocast("cpu", torch.bfloat16):
        around = credit_report(net, batches, options=options)
    assert around.credit == pytest.approx(within.credit, abs=1e-12)
    assert around.r2 == pytest.approx(within.r2, abs=1e-12)
    exact = credit_report(net, batches, options=options)
    assert around.credit != pytest.approx(exact.credit, abs=1e-6)  # the network is cast


@pytest.mark.parametrize("exponent", [-30, 30])
def test_the_scale_of_the_inputs_changes_no_invariant_number(linear_chain, exponent):
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    scale = 2.0 ** round(exponent * np.log2(10))  # a power of two, so that the network sees the same
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight /= scale
    given = credit_report(net, samples(2000).split(100), options=Options(folds=2))
    moved = credit_report(other, (samples(2000) * scale).split(100), options=Options(folds=2))
    # Folds follow the bits of x_0, so held-out numbers may differ within their errors.
    assert np.allclose(moved.credit, given.credit, rtol=0, atol=1e-9)
    assert np.allclose(moved.sensitivity, given.sensitivity, rtol=0, atol=1e-9)
    assert np.allclose(moved.r2, given.r2, rtol=0, atol=0.02)
    assert moved.rank.tolist() == given.rank.tolist()
    assert moved.total + np.log(scale) == pytest.approx(given.total, abs=1e-9)


# Bad input.


def test_components_that_never_run_are_refused(shared_net):
    with pytest.raises(
        ValueError, match=r"no component ran in the forward pass; chosen were \['unused'"
    ):
        credit_report(shared_net, [samples(20, 5)], components=["unused"])


def test_embeddings_that_nothing_reads_are_named():
    class Scores(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.users, self.items = nn.Embedding(10, 4), nn.Embedding(10, 4) if n == 2 else None

        def rate(self, x):
            u = self.users(x[:, 0])
            return u if self.items is None else (u * self.items(x[:, 1])).sum(1)

    pairs = list(torch.randint(10, (200, 2)).split(50))
    for n, name in [(1, "users"), (2, r"users\+items")]:
        with pytest.raises(
            ValueError, match=f"'{name}' is all that the chain holds, and reads no floating"
        ):
            credit_report(Scores(n), pairs, forward_fn=lambda m, x: m.rate(x))


@pytest.mark.parametrize("batch", [3, "text", None, ()], ids=repr)
def test_batches_that_the_model_cannot_take_name_forward_fn(mlp, batch):
    kind = f"a batch of type {type(batch).__name__} arrived and was handed over whole"
    with pytest.raises(ValueError, match=f"{kind}, .* forward_fn=lambda"):
        credit_report(mlp, [batch])


class Given:
    """A batch of a class of its own, as graph libraries make them."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.parts = x, {"y": -x}


class TakesWhole(nn.Module):
    """Takes apart by itself what it is given."""

    def __init__(self, take: Callable[[Any], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.take, self.a, self.b = take, nn.Linear(6, 5).double(), nn.Linear(5, 3).double()

    def forward(self, batch: Any) -> Tensor:
        return self.b(self.a(self.take(batch)))


WHOLE: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "a tuple and targets": (lambda x: ((x, 2 * x, 3 * x), x[:, 0]), lambda xs: sum(xs) / 6),
    "a list and targets": (lambda x: ([x, 3 * x], None), lambda xs: sum(xs) / 4),
    "an object": (Given, lambda given: given.x),
    "an object and targets": (lambda x: (Given(x), x[:, 0]), lambda given: -given.parts["y"]),
    "a mapping of other names": (lambda x: {"image": x}, lambda batch: batch["image"]),
}


class AnyKeywords(TakesWhole):
    def forward(self, **given: Tensor) -> Tensor:
        return self.b(self.a(given["x"]))


@pytest.mark.parametrize("kind", WHOLE)
def test_what_cannot_be_mapped_is_handed_over_whole(kind):
    make, take = WHOLE[kind]
    x = samples().split(50)
    expected = credit_report(TakesWhole(lambda x: x), x)
    given = credit_report(TakesWhole(take), [make(part) for part in x])
    assert given.components == expected.components == ("a", "b")
    np.testing.assert_allclose(given.credit, expected.credit, atol=1e-9)
    named = credit_report(AnyKeywords(take), [{"x": part, "more": part} for part in x])
    np.testing.assert_allclose(named.credit, expected.credit, atol=1e-9)


def test_a_mapping_that_fails_whole_names_forward_fn():
    model = TakesWhole(lambda batch: batch["x"])
    with pytest.raises(
        ValueError, match=r"the entries \['y'\], none of which forward takes, .* forward_fn="
    ):
        credit_report(model, [{"y": samples()}])


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nn.Linear, [samples()], r"model is the class Linear; pass an instance, Linear\(\.\.\.\)"),
        (
            torch.relu,
            [samples()],
            "model has type builtin_function_or_method; it must be a torch.nn.Module",
        ),
        (None, samples(), r"batches is one tensor of shape \(300, 6\).*x\.split\(256\) or \[x\]"),
        (None, TensorDataset(samples()), r"batches is a dataset \(TensorDataset\).*DataLoader\(dataset"),
        (None, Digits(), r"batches is a DataModule \(Digits\).*then pass val_dataloader\(\)"),
        (None, samples().numpy(), r"one table of numbers \(ndarray\).*torch\.as_tensor\(x, dtype"),
        (None, {"x": samples()}, r"batches is a mapping \(dict\), whose keys .*pass \[batch\] for a"),
        (None, 3, "batches has type int; it must be an iterable of batches"),
        (None, iter([]), r"no sample arrived: .*a generator gives its batches only once"),
    ],
)
def test_what_is_no_model_and_what_gives_no_batches_is_refused(mlp, model, batches, message):
    with pytest.raises(ValueError, match=message):
        credit_report(mlp if model is None else model, batches)


def test_a_network_of_one_component_is_told_that_its_credit_says_nothing(mlp):
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double()
    (note,) = [n for n in credit_report(net, [samples()]).notes if "one component" in n]
    assert note == (
        "the network has one component, '1', whose credit is 0 by definition, as of every last one"
    )
    whole = credit_report(nn.Sequential(mlp), [samples()], components=["0"])
    (note,) = [n for n in whole.notes if "one component" in n]
    assert note.endswith("as of every last one; name its parts, as with components='0.*'")
    assert len(credit_report(nn.Sequential(mlp), [samples()], components="0.*").components) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": 4}, "delay is 4; with 3 components it must lie between 1 and 3"),
        ({"targets": [9]}, r"targets is \[9\]; name each output at most once, from 0 to 3"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_the_network_are_refused(mlp, options, message):
    with pytest.raises(ValueError, match=message):
        credit_report(mlp, [samples()], options=Options(**options))


class Picking(nn.Linear):
    """Has parameters, and gives indices."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


def test_a_component_of_whole_numbers_is_left_out_with_a_note():
    parts = {"scores": nn.Linear(4, 3), "body": nn.Linear(4, 3), "head": nn.Linear(3, 2)}
    net = wired(lambda m, x: (m.pick(x), m.head(m.body(x)))[1], **parts, pick=Picking())
    report = credit_report(net, list(torch.randn(90, 4).split(30)))
    assert report.components == ("body", "head")
    assert "gave no floating-point tensor, so left out: pick" in report.notes
    assert "never ran, so left out: 'scores'" in report.notes


@pytest.mark.parametrize("scale", [1e-30, 1e37])
def test_sums_that_overflow_are_no_infinite_values(scale):
    """Single precision holds every value, and not the sum of a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    x = torch.randn(400, 4) + 3
    expected = credit_report(model, [x])
    found = credit_report(model, [x * scale])
    np.testing.assert_allclose(found.credit, expected.credit, atol=1e-4)


# Networks that do not take the same path for every batch.


def stepwise(extra: str) -> nn.Module:
    """Return a network that runs more for batches of sequences of more than two steps."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        h, longer = m.start(x[:, 0]), x.shape[1] > 2
        if longer and extra == "a call":
            h = m.cell(h).tanh()
        elif longer and extra == "a module":
            h = m.block(h).tanh()
        elif longer and extra == "a call on some rows":
            m.cell(h[: len(h) // 2])
        y = m.end(m.other(h).tanh())
        if longer and extra == "a call behind the chain":
            m.cell(torch.zeros(len(x), 4, dtype=x.dtype))
        return y

    torch.manual_seed(0)
    parts = {name: nn.Linear(4, 4) for name in ("cell", "block", "other")}
    return wired(run, start=nn.Linear(3, 4), **parts, end=nn.Linear(4, 2)).double()


def sequences(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(60, size, 3, dtype=torch.float64, generator=generator) for size in lengths]


@pytest.mark.parametrize(
    ("extra", "lengths", "message"),
    [
        ("a call", (2, 3), "batch 1 also ran cell, which the first one did not, before 'end'"),
        ("a call", (3, 2), r"batch 1 ran the components .* \(difference: cell\)"),
        ("a module", (2, 3), "batch 1 also ran block, which the first one did not, before 'end'"),
    ],
)
def test_a_batch_that_takes_another_path_is_refused(extra, lengths, message):
    with pytest.raises(ValueError, match=message):
        credit_report(stepwise(extra), sequences(*lengths))


@pytest.mark.parametrize("extra", ["a call on some rows", "a call behind the chain"])
def test_what_does_not_belong_to_the_chain_may_run_now_and_then(extra):
    report = credit_report(stepwise(extra), sequences(2, 3))
    assert report.components == ("start", "other", "end")
    np.testing.assert_array_equal(report.credit, credit_report(stepwise(""), sequences(2, 3)).credit)


@pytest.mark.parametrize("max_samples", ["enough", None])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_whose_shape_is_not_told_are_refused(max_samples):
    batches = [torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(2, 6)] * 20) for _ in range(3)]
    with pytest.raises(ValueError, match=r"strided layout, whose shape .* layout=torch\.jagged"):
        credit_report(nn.Linear(6, 2), batches, max_samples=max_samples)
