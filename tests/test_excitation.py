"""Operators under excitation, against closed forms, and what second calls leave alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from lit import LitNet, dataset, loaders, quiet_trainer
from scipy.stats import norm
from test_callback import assert_same as assert_same_training
from test_callback import fingerprint, fit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from lightning_koopman import (
    CreditReport,
    KoopmanCredit,
    KoopmanCreditMonitor,
    credit_report,
)
from lightning_koopman.cli import main
from lightning_koopman.credit import QUANTITIES
from lightning_koopman.excitation import Excitation
from lightning_koopman.keys import sample_keys
from lightning_koopman.layout import Layout
from lightning_koopman.report_files import read_reports


def samples(n: int = 400, width: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) @ mixing + 0.5


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, Tensor, Tensor]]]:
    """Everything that components were excited with, and their answers, a list a pass."""
    seen: list[list[tuple[int, Tensor, Tensor]]] = []
    original = Excitation.pairs

    def noted(self: Excitation, seed: int) -> list[tuple[int, Tensor, Tensor]]:
        seen.append(original(self, seed))
        return seen[-1]

    monkeypatch.setattr(Excitation, "pairs", noted)
    return seen


def note_of(report: CreditReport) -> str:
    return next((n for n in report.notes if n.startswith("fitted to the data alone")), "")


# Truths.


@pytest.mark.parametrize("normalize", ["none", "rms", "whiten"])
@pytest.mark.parametrize("widths", [(6, 6, 6), (6, 5, 4, 4)], ids=str)
def test_a_linear_network_is_the_same_under_excitation(
    linear_chain: Callable[..., nn.Sequential], widths: tuple[int, ...], normalize: Any
) -> None:
    net = linear_chain(*widths)
    # Whitening brings rounding up to where a ridge weight begins to be chosen.
    options = {"normalize": normalize, "tikhonov": 0.0 if normalize == "whiten" else None}
    plain, excited = (
        credit_report(net, samples().split(64), excitation=share, **options) for share in (0.0, 0.5)
    )
    for name in (*QUANTITIES, "tikhonov"):
        np.testing.assert_allclose(getattr(excited, name), getattr(plain, name), rtol=0, atol=1e-10)
    for name in QUANTITIES:
        np.testing.assert_allclose(excited.stderr[name], plain.stderr[name], rtol=0, atol=1e-10)
    assert (plain.excitation, excited.excitation) == (0.0, 0.5)


@pytest.mark.parametrize("share", [0.5, 3.0])
def test_of_gaussian_states_a_relu_layer_has_the_gain_of_price(share: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).double()
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([2.0, -2.0, 1.0, 0.0]))
    mixing = np.random.default_rng(0).standard_normal((3, 3))
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((200_000, 3)) @ mixing)
    report = credit_report(net, x.split(10_000), excitation=share, tikhonov=0.0)
    weight, bias = net[0].weight.detach().numpy().T, net[0].bias.detach().numpy()
    before = mixing.T @ mixing
    under = before + share**2 * np.diag(np.diag(before))

    def gain(cov: np.ndarray) -> np.ndarray:
        # Price's theorem: E[x relu(a)] = Cov(x, a) P(a > 0), for a = x w + b.
        spread = np.sqrt(np.einsum("ij,ik,kj->j", weight, cov, weight))
        return cov @ weight * norm.cdf(bias / spread)

    expected = np.linalg.solve(before + under, gain(before) + gain(under))
    found = report.operators["0"].matrix.numpy()
    assert np.abs(found - expected).max() < 0.01
    alone = np.linalg.solve(before, gain(before))
    plain = credit_report(net, x.split(10_000), tikhonov=0.0).operators["0"].matrix.numpy()
    assert np.abs(plain - alone).max() < 0.01
    if share > 1:
        assert np.abs(expected - alone).max() > 0.05
    # The affine part stays that of the data.
    assert np.allclose(report.operators["0"].y_mean, net(x).detach().mean(0), atol=1e-9)


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_off_the_subspace_of_the_data_a_linear_layer_is_known_only_if_excited(share: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)).double()
    x = samples(300, 3) @ torch.randn(3, 8, dtype=torch.float64)
    plain, excited = (
        credit_report(net, x.split(50), components=["0"], excitation=s, tikhonov=0.0)
        for s in (0.0, share)
    )
    weight = net[0].weight.detach().numpy().T
    assert np.abs(excited.operators["0"].matrix.numpy() - weight).max() < 1e-6
    assert np.abs(plain.operators["0"].matrix.numpy() - weight).max() > 0.1
    assert excited.operators["0"].rank == 8
    assert plain.operators["0"].rank == 3
    # The rank of the state stays that of the data.
    assert (excited.rank == plain.rank).all()


@pytest.mark.parametrize("normalize", ["none", "rms"])
@pytest.mark.parametrize("delay", [1, 2])
def test_every_number_is_that_of_an_explicit_fit_to_both_sets(delay: int, normalize: Any) -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape) for shape in ((4, 5), (5, 4), (4, 3))]
    x = rng.standard_normal((250, 4)) + 0.5
    states, given, answers = [x], [], []
    for weight in weights:
        noisy = states[-1] + 0.4 * states[-1].std(0) * rng.standard_normal(states[-1].shape)
        given.append(noisy)
        answers.append(np.maximum(noisy @ weight, 0))
        states.append(np.maximum(states[-1] @ weight, 0))
    # The second component is fitted to the data alone.
    metric = KoopmanCredit(excited=(1, 3), delay=delay, tikhonov=1e-3, normalize=normalize, center=None)
    rows = [*states, given[0], answers[0], given[2], answers[2]]
    folds = torch.arange(250)
    metric.update([torch.from_numpy(r) for r in rows], folds)
    report = metric.report()
    scales = [s.std(0) if normalize == "rms" else np.ones(s.shape[1]) for s in states]
    folds = folds.numpy() % 5

    def fitted(step: int, train: np.ndarray) -> np.ndarray:
        read = range(step - 1, max(0, step - delay) - 1, -1)
        spread = [s[train].std(0) if normalize == "rms" else np.ones(s.shape[1]) for s in states]
        sets = [([states[p] for p in read], states[step])]
        if step != 2:
            noisy = [given[p] if p == step - 1 else states[p] for p in read]
            sets.append((noisy, answers[step - 1]))
        inputs, outputs = [], []
        for parts, target in sets:
            block = np.hstack([p[train] / spread[i] for i, p in zip(read, parts, strict=True)])
            inputs.append(block - block.mean(0))
            outputs.append(target[train] / spread[step] - (target[train] / spread[step]).mean(0))
        return oracles.ridge(np.vstack(inputs), np.vstack(outputs), 1e-3)

    def squares(step: int, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        """Squared errors on some samples of the fit to others, and the squares they are of."""
        spread = [s[train].std(0) if normalize == "rms" else np.ones(s.shape[1]) for s in states]
        read = range(step - 1, max(0, step - delay) - 1, -1)
        block = np.hstack([(states[p] - states[p][train].mean(0)) / spread[p] for p in read])[test]
        target = ((states[step] - states[step][train].mean(0)) / spread[step])[test]
        return np.array([((target - block @ fitted(step, train)) ** 2).sum(), (target**2).sum()])

    everything = np.ones(250, dtype=bool)
    for step in (1, 2, 3):
        table = np.array([squares(step, folds != fold, folds == fold) for fold in range(5)])
        error, total = table.sum(0)
        assert report.r2[step - 1] == pytest.approx(1 - error / total, abs=1e-9)
        without = table.sum(0) - table
        error_bar = oracles.plain_jackknife(list(1 - without[:, 0] / without[:, 1]))
        own, of = squares(step, everything, everything)
        expected = np.hypot(error_bar, (error / total - own / of) / 4)
        assert report.stderr["r2"][step - 1] == pytest.approx(expected, abs=1e-9)
    if delay == 1:
        chain = [fitted(step, everything) for step in (1, 2, 3)]
        outputs = oracles.pod(states[-1] / scales[-1], 3)
        for i, name in enumerate(("0", "1", "2"), start=1):
            jacobian = oracles.dense_product([*chain[i:], outputs])
            place = report.components.index(name)
            assert report.credit[place] == pytest.approx(oracles.log_volume(jacobian) / 3, abs=1e-8)
            noise = (states[i] / scales[i]).std(0)[:, None] * jacobian
            expected = np.log(np.linalg.norm(noise))
            assert report.sensitivity[place] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("reduce", ["flatten", "mean"])
def test_noisy_pairs_go_through_the_reduction_of_their_states(reduce: Any, pairs: Any) -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(6, 4, 3), nn.ReLU())
    net = nn.Sequential(first, second, nn.Flatten(), nn.Linear(144, 3)).double()
    x = torch.randn(200, 1, 8, 8, dtype=torch.float64)
    report = credit_report(
        net,
        x.split(50),
        components=["0", "1", "3"],
        max_dim=10,
        reduce=reduce,
        excitation=0.5,
        tikhonov=0.0,
    )
    with torch.no_grad():
        states = [first(x), second(first(x))]

    def reduced(state: Tensor, given: Tensor) -> Tensor:
        if reduce == "mean":
            return given.mean(dim=(2, 3))
        head = state.flatten(1)[:20]
        return given.flatten(1) @ torch.linalg.svd(head - head.mean(0))[2][:10].T

    excited = [torch.cat([p[1][k] for p in pairs]) for k in (1, 2)]
    inputs, outputs = (
        torch.cat([rows - rows.mean(0) for rows in (reduced(state, state), reduced(state, noisy))])
        for state, noisy in zip(states, excited, strict=True)
    )
    expected = oracles.least_squares(inputs.numpy(), outputs.numpy())
    # Principal directions are known up to their sign.
    found = np.abs(report.operators["1"].matrix.numpy())
    assert np.allclose(found, np.abs(expected), rtol=0, atol=1e-8)
    assert found.shape == ((10, 10) if reduce == "flatten" else (6, 4))


@pytest.mark.parametrize("observables", ["polynomial", lambda rows: torch.cat([rows, rows**2], dim=1)])
def test_noisy_pairs_are_lifted_as_their_states_are(observables: Any, pairs: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    report = credit_report(
        net, samples(300, 3).split(100), observables=observables, excitation=0.5, tikhonov=0.0
    )

    def lifted(rows: Tensor) -> Tensor:
        if callable(observables):
            return observables(rows)
        products = [rows[:, i] * rows[:, j] for i in range(3) for j in range(i, 3)]
        return torch.cat([rows, torch.stack(products, dim=1)], dim=1)

    with torch.no_grad():
        states = [samples(300, 3), net[1](net[0](samples(300, 3)))]
    sets = [states, [torch.cat([p[0][1] for p in pairs]), torch.cat([p[0][2] for p in pairs])]]
    inputs, outputs = ([lifted(s[i]) - lifted(s[i]).mean(0) for s in sets] for i in (0, 1))
    expected = oracles.least_squares(torch.cat(inputs).numpy(), torch.cat(outputs).numpy())
    found = report.operators["0"].matrix.numpy()
    spread = np.linalg.svd(expected)[1]
    if callable(observables):
        assert np.allclose(found, expected, atol=1e-7)
    # Products are taken of centred and scaled states: the span is the same, the coordinates are not.
    assert found.shape == expected.shape
    assert len(spread) == len(np.linalg.svd(found)[1])


@pytest.mark.parametrize("axis", [0, 1])
def test_noise_has_the_share_of_each_units_own_spread(axis: int, pairs: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=axis == 0)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 2, 3, generator=generator) * torch.tensor([[1.0, 5.0, 0.0], [2.0, 0.1, 3.0]])
    batches = x.split(500) if axis == 0 else [b.transpose(0, 1) for b in x.split(500)]
    credit_report(Recurrent(), batches, excitation=0.2)
    noise = torch.cat([p[0][1] - b for p, b in zip(pairs, batches, strict=True)], dim=axis)
    found, spread = noise.std(dim=axis), x.std(dim=0)
    assert torch.allclose(found, 0.2 * spread, rtol=0.08)
    assert found[0, 2] == 0
    flat = noise.movedim(axis, 0).flatten(1)[:, [0, 1, 3, 4, 5]]
    off = torch.corrcoef(flat.T) - torch.eye(5)
    assert float(off.abs().max()) < 0.07


# What is left alone.


@pytest.mark.parametrize("everywhere", [False, True])
def test_no_hook_of_the_users_sees_a_second_call(everywhere: bool) -> None:
    counts: dict[float, list[str]] = {}
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    net = nn.Sequential(nn.Linear(6, 6), inner, nn.Linear(6, 2)).double()
    for share in (0.0, 0.3):
        seen: list[str] = []

        def look(module: nn.Module, *given: Any, seen: list[str] = seen) -> None:
            seen.append(type(module).__name__)

        if everywhere:
            handles = [register_module_forward_hook(look), register_module_forward_pre_hook(look)]
        else:
            handles = [m.register_forward_hook(look) for m in net.modules()]
            handles += [m.register_forward_pre_hook(look) for m in net.modules()]
        report = credit_report(net, samples(100).split(50), components=["0", "1", "2"], excitation=share)
        net(samples(4))
        for handle in handles:
            handle.remove()
        counts[share] = seen
    assert note_of(report) == ""
    assert counts[0.0] == counts[0.3] != []
    net(samples(4))
    assert counts[0.0] == counts[0.3]


def messy() -> nn.Module:
    """Batch normalisation, dropout and in-place activations, in mixed modes."""
    net = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 5),
        nn.ReLU(inplace=True), nn.Linear(5, 3),
    ).double()  # fmt: skip
    net[1].eval()
    return net


def test_weights_buffers_modes_and_random_states_stay() -> None:
    net = messy()
    before = copy.deepcopy(fingerprint(net))
    report = credit_report(net, samples().split(100), excitation=0.3)
    assert_same_training(fingerprint(net), before)
    assert note_of(report) == ""


class Brittle(nn.Module):
    """Breaks where its input leaves the data."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.answer, self.scale = answer, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x) * self.scale


def test_after_an_error_in_a_second_call_hooks_and_modes_are_back() -> None:
    def refuse(x: Tensor) -> Tensor:
        if float(x.min()) < 0:
            raise ArithmeticError("negative")
        return x

    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), Brittle(refuse), nn.Linear(3, 2)).double()
    net[2].register_forward_hook(lambda *given: None)
    before = copy.deepcopy(fingerprint(net))
    hooks = net[2]._forward_hooks
    with pytest.raises(ArithmeticError, match="negative"):
        credit_report(net, samples(100, 3).split(50), excitation=0.3)
    assert_same_training(fingerprint(net), before)
    assert net[2]._forward_hooks is hooks


def test_answers_that_are_not_finite_are_refused_with_the_component() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), Brittle(torch.log), nn.Linear(3, 2)).double()
    with pytest.raises(
        ValueError, match=r"component '2' gave NaN or infinity on its input with noise of 2"
    ):
        credit_report(net, samples(100, 3).split(50), excitation=2.0)


def test_an_answer_without_a_tensor_is_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), Brittle(lambda x: x), nn.Linear(3, 2)).double()
    net[2].forward = lambda x: x if float(x.min()) >= 0 else None
    with pytest.raises(ValueError, match="gave NoneType without a tensor on a noisy input"):
        credit_report(net, samples(100, 3).split(50), excitation=0.3)


def test_a_component_that_later_takes_something_else_is_refused() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Named(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x, object() if len(x) == 40 else None))

    class Named(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)

        def forward(self, x: Tensor, extra: Any) -> Tensor:
            return super().forward(x)

    net = Changing().double()
    with pytest.raises(ValueError, match="takes something else now"):
        credit_report(net, samples(90, 3).split([50, 40]), excitation=0.3)


# Which components can be excited.


class Wired(nn.Module):
    """Three layers, joined by a function."""

    def __init__(self, wire: Callable[..., Tensor], middle: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), middle or nn.Linear(6, 6), nn.Linear(6, 3)
        self.wire = wire

    def forward(self, x: Tensor) -> Tensor:
        return self.wire(self, x)


class Opaque:
    pass


class Two(nn.Linear):
    """Takes something beside the state."""

    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, x: Tensor, more: Any) -> Tensor:
        y = super().forward(x)
        return y + more if isinstance(more, Tensor) else y


class Random(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand(())


class Once(nn.Linear):
    """Refuses to be called twice on the same input."""

    seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.seen is not None and torch.equal(x, self.seen):
            raise RuntimeError("again")
        self.seen = x.clone()
        return super().forward(x)


UNFIT = {
    "functional": (
        Wired(lambda m, x: m.c(F.relu(m.b(m.a(x))))),
        r"c \(takes something computed from the state before it\)",
    ),
    "narrowed": (
        Wired(lambda m, x: m.c(torch.cat([m.b(m.a(x))[:, :3]] * 2, dim=1))),
        r"c \(takes something computed from the state before it\)",
    ),
    "skip": (
        Wired(lambda m, x: m.c(m.b(h := m.a(x)) + h)),
        r"c \(reads several states\)",
    ),
    "joined": (
        Wired(lambda m, x: m.c(m.a(x) + m.b(x))),
        r"a\+b, c \(its state, or the one before it, is joined from several\)",
    ),
    "two": (
        Wired(lambda m, x: m.c(m.b(h := m.a(x), 2 * h)), Two()),
        r"b \(takes several tensors that depend on the data\)",
    ),
    "object": (
        Wired(lambda m, x: m.c(m.b(m.a(x), Opaque())), Two()),
        r"b \(takes a Opaque, which a second call might alter\)",
    ),
    "random": (
        Wired(lambda m, x: m.c(m.b(m.a(x))), Random(6, 6)),
        r"b \(gives something else on the same input\)",
    ),
    "once": (
        Wired(lambda m, x: m.c(m.b(m.a(x))), Once(6, 6)),
        r"b \(could not be called a second time: RuntimeError: again\)",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_components_that_cannot_be_excited_are_named_and_the_others_are(case: str, pairs: Any) -> None:
    net, message = UNFIT[case]
    net = copy.deepcopy(net).double()
    batches = samples(600).split(200)
    if case == "joined":
        with pytest.raises(
            ValueError, match=rf"excitation is 0.3, but no component .*: {message}\. Leave"
        ):
            credit_report(net, batches, excitation=0.3)
        return
    torch.manual_seed(0)
    report = credit_report(net, batches, excitation=0.3)
    assert re.search(rf"without noise: {message}$", note_of(report)), report.notes
    excited = {report.components[i - 1] for i, *_ in pairs[0]}
    assert excited == set(report.components) - {message[0]}
    torch.manual_seed(0)
    plain = credit_report(net, batches)
    place = report.components.index(message[0])
    # The draws of a random component are not the same in the two measurements.
    if case != "random":
        assert report.r2[place] == pytest.approx(plain.r2[place], abs=1e-12)


FIT = {
    "constant": Wired(lambda m, x: m.c(m.b(m.a(x), torch.full((6,), 0.5).to(x))), Two()),
    "view": Wired(lambda m, x: m.c(m.b(m.a(x)).unflatten(1, (2, 3)).flatten(1))),
    "inplace": Wired(
        lambda m, x: m.c(m.b(m.a(x))), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6))
    ),
    "keyword": Wired(lambda m, x: m.c(m.b(more=None, x=m.a(x))), Two()),
}


@pytest.mark.parametrize("case", FIT)
def test_constants_views_keywords_and_changes_in_place_are_no_obstacle(case: str, pairs: Any) -> None:
    net = copy.deepcopy(FIT[case]).double()
    report = credit_report(net, samples(600).split(200), components=["a", "b", "c"], excitation=0.3)
    assert note_of(report) == ""
    for number, noisy, answer in pairs[0]:
        module = getattr(net, report.components[number - 1])
        more = {"constant": torch.full((6,), 0.5).double(), "keyword": None}.get(case, 0)
        with torch.no_grad():
            expected = module(noisy.clone(), more) if isinstance(module, Two) else module(noisy.clone())
        assert torch.equal(answer, expected)


def test_self_attention_takes_its_noisy_state_in_all_three_places(pairs: Any) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            return self.head(self.attend(h, h, h)[0])

    net = Attention()
    report = credit_report(net, torch.randn(120, 5, 4).split(40), excitation=0.5)
    assert note_of(report) == ""
    with torch.no_grad():
        for given in pairs:
            _, noisy, answer = given[1]
            assert torch.allclose(net.attend(noisy, noisy, noisy)[0], answer, atol=1e-6)


def test_tokens_and_packed_sequences_are_left_out_or_named() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.mix(self.embed(ids)))

    ids = torch.randint(9, (120, 5), generator=torch.Generator().manual_seed(0))
    report = credit_report(Tokens(), ids.split(40), excitation=0.3)
    assert report.components == ("mix", "head")
    assert note_of(report) == ""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.GRU(3, 4), nn.GRU(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Any) -> Tensor:
            return self.head(self.second(self.first(x)[0])[1][-1])

    batches = [pack_sequence([torch.randn(n, 3) for n in (4, 3, 3, 2)]) for _ in range(30)]
    with pytest.raises(ValueError, match=r"first, second, head \(takes or follows packed sequences\)"):
        credit_report(Packed(), batches, excitation=0.3)


def test_a_hook_that_changes_an_output_keeps_its_component_out() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)).double()
    net[1].register_forward_hook(lambda module, args, output: 2 * output)
    report = credit_report(net, samples().split(100), excitation=0.3)
    assert "without noise: 1 (gives something else on the same input)" in note_of(report)


def test_an_output_that_no_module_gives_is_left_out() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)).double()
    report = credit_report(net, samples().split(100), excitation=0.3, output=lambda given: given[:, :2])
    assert "without noise: output (is no module's output)" in note_of(report)


def test_where_the_data_is_not_followed_single_inputs_are_still_excited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: Any, *given: Any) -> None:
        raise RuntimeError("no tracing")

    monkeypatch.setattr("lightning_koopman.dataflow.DataFlow._follow", broken)
    net = Wired(lambda m, x: m.c(m.b(m.a(x), torch.ones(6).to(x))), Two()).double()
    report = credit_report(net, samples().split(100), excitation=0.3)
    assert any(note.startswith("the data could not be followed") for note in report.notes)
    assert "b (takes several tensors that depend on the data)" in note_of(report)


# Numerics, batches, seeds.


def test_second_calls_run_under_the_autocast_of_the_first(pairs: Any) -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch)

    report = credit_report(net, samples().float().split(100), excitation=0.3, forward_fn=forward)
    assert note_of(report) == ""
    assert pairs[0][0][2].dtype == pairs[0][1][1].dtype == torch.bfloat16
    half = copy.deepcopy(net).bfloat16()
    credit_report(half, samples().bfloat16().split(100), excitation=0.3)
    assert pairs[-1][0][1].dtype == torch.bfloat16


def test_noise_depends_on_seed_and_samples_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batches = samples().split(100)
    first = credit_report(net, batches, excitation=0.5)
    torch.manual_seed(5)
    assert (credit_report(net, batches, excitation=0.5).credit == first.credit).all()
    other = credit_report(net, batches, excitation=0.5, seed=1)
    assert other.total != pytest.approx(first.total, abs=1e-9)
    assert other.total == pytest.approx(first.total, abs=0.1)
    assert sample_keys(batches[0], 0).sum() != sample_keys(batches[1], 0).sum()


@pytest.mark.parametrize("size", [1, 7, 400])
def test_batches_of_any_size_are_excited_alike(size: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    whole = credit_report(net, samples(1500).split(500), excitation=3.0)
    plain = credit_report(net, samples(1500).split(500))
    given = credit_report(net, samples(1500).split(size), excitation=3.0)
    assert np.abs(given.total - whole.total) < 0.1 * np.abs(plain.total - whole.total)


def test_sequences_of_changing_length_and_padding_are_excited() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batches = [
        {"input": torch.randn(30, n, 4, dtype=torch.float64), "lengths": torch.randint(1, n + 1, (30,))}
        for n in (5, 3, 5, 6, 3)
    ]
    report = credit_report(net, batches, excitation=0.3, reduce="mean")
    assert note_of(report) == ""
    assert report.n_samples == 150


def test_a_compiled_model_is_excited() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    expected = credit_report(net, samples().split(100), excitation=0.5)
    compiled = torch.compile(net, backend="eager")
    report = credit_report(compiled, samples().split(100), excitation=0.5)
    np.testing.assert_allclose(report.credit, expected.credit, atol=1e-12)


@pytest.mark.parametrize("delay", [2, "auto"])
def test_with_a_delay_the_nearest_state_alone_is_noisy(delay: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4))).double()
    report = credit_report(net, samples(400, 5).split(100), delay=delay, excitation=0.5, tikhonov=0.0)
    assert report.delay == (2 if delay == 2 else 1)
    assert note_of(report) == ""
    # Without noise the earlier state tells all that the nearest does; with it they can be told apart.
    for i, name in enumerate(report.components):
        matrix = report.operators[name].matrix.numpy()
        assert np.allclose(matrix[:5], net[i].weight.detach().numpy().T, atol=1e-8)
        assert np.allclose(matrix[5:], 0, atol=1e-8)


# The callback, files, the command line.


@pytest.mark.filterwarnings("ignore:the Trainer has no logger", "ignore:.*GPU available.*")
def test_training_is_bit_identical_with_an_excited_monitor(tmp_path: Path) -> None:
    plain, _ = fit(tmp_path, [])
    before = fingerprint(plain)
    monitor = KoopmanCreditMonitor(excitation=0.3, on_error="raise")
    watched, _ = fit(tmp_path, [monitor])
    assert_same_training(fingerprint(watched), before)
    assert watched.forward_calls == plain.forward_calls
    assert len(monitor.history) == 3
    report = monitor.report
    assert report is not None
    assert report.excitation == pytest.approx(0.3)
    assert note_of(report) == ""
    _, validation = loaders()
    expected = credit_report(watched, validation, excitation=0.3)
    np.testing.assert_allclose(report.credit, expected.credit, rtol=0, atol=1e-6)
    assert report.total != pytest.approx(credit_report(watched, validation).total, abs=1e-6)


@pytest.mark.filterwarnings(
    "ignore:the Trainer has no logger", "ignore:.*GPU available.*", "ignore:there is no"
)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("val", [True, False])
def test_the_monitor_excites_under_other_precisions_and_without_validation(
    tmp_path: Path, precision: str, val: bool
) -> None:
    monitor = KoopmanCreditMonitor(excitation=0.3, on_error="raise")
    fit(tmp_path, [monitor], precision=precision, val=val, max_epochs=1)
    assert monitor.report is not None
    assert note_of(monitor.report) == ""


@pytest.mark.filterwarnings("ignore:the Trainer has no logger", "ignore:.*GPU available.*")
@pytest.mark.parametrize("compiled", [True, False])
def test_sharded_weights_are_not_called_a_second_time(tmp_path: Path, compiled: bool) -> None:
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class FSDPStrategy(SingleDeviceStrategy):
        pass

    monitor = KoopmanCreditMonitor(excitation=0.0 if compiled else 0.3, on_error="raise")
    trainer = quiet_trainer(
        tmp_path, [monitor], strategy=FSDPStrategy(torch.device("cpu")), accelerator="auto"
    )
    model = LitNet()
    if compiled:
        model.net = torch.compile(model.net, backend="eager")
    with pytest.raises(RuntimeError, match="compile nothing and leave excitation out"):
        trainer.fit(model, DataLoader(dataset(), 40), DataLoader(dataset(), 50))


@pytest.mark.parametrize("share", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("how", ["report", "monitor"])
def test_shares_out_of_range_are_refused(share: float, how: str) -> None:
    message = r"excitation is .*; give a share of each unit's spread, 0 or above"
    if how == "monitor":
        with pytest.raises(ValueError, match=message):
            KoopmanCreditMonitor(excitation=share)
    else:
        with pytest.raises(ValueError, match=message):
            credit_report(messy(), samples().split(100), excitation=share)


@pytest.mark.parametrize("steps", [(0,), (3,), (2, 1), (1, 1)])
def test_steps_that_do_not_exist_are_refused(steps: Sequence[int]) -> None:
    with pytest.raises(ValueError, match="name steps from 1 to 2, in ascending order"):
        Layout((3, 3, 3), 5, excited=tuple(steps))


def test_the_metric_checks_noisy_states_as_the_others() -> None:
    x = torch.randn(40, 3, dtype=torch.float64)
    metric = KoopmanCredit(["a"], excited=[1])
    with pytest.raises(
        ValueError, match=r"state 'a under noise' has shape \(40, 2\); expected \(40, 3\)"
    ):
        metric.update([x, x, x, x[:, :2]])
    with pytest.raises(ValueError, match="3 states arrived; expected 4"):
        KoopmanCredit(["a"], dims=[3, 3], excited=[1]).update([x, x, x])


def test_the_share_is_in_the_file_and_old_files_had_none(tmp_path: Path) -> None:
    report = credit_report(messy(), samples().split(100), excitation=0.25)
    report.to_json(tmp_path / "r.json")
    assert CreditReport.from_json(tmp_path / "r.json").excitation == pytest.approx(0.25)
    old = report.to_dict()
    del old["excitation"]
    assert not CreditReport.from_dict(old).excitation


def test_the_command_line_takes_a_share(user_module: Callable[..., Path]) -> None:
    user_module("excited_code")
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    torch.save({"state_dict": net.state_dict(), "global_step": 1}, "1.ckpt")
    command = "evaluate --model excited_code:net --data excited_code:data --ckpt 1.ckpt --out r.json"
    assert main([*command.split(), "--excitation", "0.1"]) == 0
    assert read_reports("r.json")[0].excitation == pytest.approx(0.1)
    assert main([*command.split(), "--excitation", "-1"]) == 1
