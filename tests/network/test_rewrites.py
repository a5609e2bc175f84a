"""Numbers are of the function that a network is, in whatever words its passes are written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_koopman import CreditReport, Options, credit_report

SAMPLES, STEPS, WIDTH = 400, 6, 8

Word = Callable[..., Any]


def sequences(steps: int = STEPS) -> Tensor:
    return torch.randn(SAMPLES, steps, WIDTH)


def block(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, width))


def measured(network: nn.Module, batches: Any, **given: Any) -> CreditReport:
    options = Options(errors=False)
    return credit_report(network.eval(), batches, options=options, max_samples=None, **given)


def assert_alike(report: CreditReport, other: CreditReport) -> None:
    assert report.components == other.components
    assert report.n_samples == other.n_samples
    for name in ("credit", "r2", "chain_r2", "sensitivity"):
        np.testing.assert_allclose(getattr(report, name), getattr(other, name), atol=1e-4, err_msg=name)


def residual(word: Word) -> tuple[nn.Module, Tensor]:
    """Adds up a branch and what it goes past."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = word(m.first(x), m.block(m.first(x)))
        return m.head(word(x, m.other(x)))

    blocks = {"block": block(12), "other": block(12)}
    return wired(forward, first=nn.Linear(WIDTH, 12), **blocks, head=nn.Linear(12, 3)), sequences()[:, 0]


def picking(word: Word) -> tuple[nn.Module, Tensor]:
    """Goes on with the first position of a state too wide to be kept whole."""
    attention = nn.MultiheadAttention(32, 2, batch_first=True)
    parts = {"first": nn.Linear(WIDTH, 32), "attention": attention, "head": nn.Linear(32, 3)}

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.head(word(x + m.attention(x, x, x)[0]))

    return wired(forward, **parts), sequences(9)


def picking_last(word: Word) -> tuple[nn.Module, Tensor]:
    """Goes on with the last step of states too wide to be kept whole."""
    parts = {"first": nn.Linear(WIDTH, 24), "cell": nn.GRU(24, 24, batch_first=True)}
    network = wired(lambda m, x: m.head(word(m.cell(m.first(x))[0])), **parts, head=nn.Linear(24, 3))
    return network, sequences(9)


def steps_first(word: Word) -> tuple[nn.Module, Tensor]:
    """Adds up states that lie in memory in another order than their axes, and turns the sum."""
    parts = {"first": nn.Linear(WIDTH, 12), "attention": nn.MultiheadAttention(12, 2)}

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x).transpose(0, 1)
        x = x + m.attention(x, x, x)[0]
        return m.head(word(x, m.block(x))[:, 0])

    return wired(forward, **parts, block=block(12), head=nn.Linear(12, 3)), sequences()


def pooling(word: Word) -> tuple[nn.Module, Tensor]:
    """Takes means of what a norm makes of a sum."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return m.head(word(F.layer_norm(x + m.block(x), (12,))))

    parts = {"first": nn.Linear(WIDTH, 12), "block": block(12), "head": nn.Linear(12, 3)}
    return wired(forward, **parts), sequences()


def norms(word: Word) -> tuple[nn.Module, Tensor]:
    """Divides sums by what a function makes of them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        x = word(x + m.block(x))
        return m.head(word(x + m.other(x)))

    blocks = {"block": block(12), "other": block(12)}
    return wired(forward, first=nn.Linear(WIDTH, 12), **blocks, head=nn.Linear(12, 3)), sequences()[:, 0]


def attending(word: Word) -> tuple[nn.Module, Tensor]:
    """Weighs earlier positions, which it tells by a mask of its own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        x = x + word(x @ x.mT).softmax(-1) @ x
        return m.head((x + m.block(x))[:, -1])

    parts = {"first": nn.Linear(WIDTH, 8), "block": block(8), "head": nn.Linear(8, 3)}
    return wired(forward, **parts), sequences()


def placing(word: Word) -> tuple[nn.Module, Tensor]:
    """Adds positions of its own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = word(m.first(x), m.places.weight)
        x = x + m.block(x)
        return m.head((x + m.other(x)).mean(1))

    parts = {"first": nn.Linear(WIDTH, 12), "places": nn.Embedding(STEPS, 12)}
    blocks = {"block": block(12), "other": block(12)}
    return wired(forward, **parts, **blocks, head=nn.Linear(12, 3)), sequences()


def splitting(word: Word) -> tuple[nn.Module, Tensor]:
    """Gives parts of a state to branches."""

    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = word(m.first(x))
        return m.head(torch.cat([m.block(a), m.other(b)], -1))

    blocks = {"block": block(6), "other": block(6)}
    return wired(forward, first=nn.Linear(WIDTH, 12), **blocks, head=nn.Linear(12, 3)), sequences()[:, 0]


def before(size: int) -> Tensor:
    places = torch.arange(size)
    return places[None] > places[:, None]


def written_mask(scores: Tensor) -> Tensor:
    mask = torch.zeros(scores.shape[-2:])
    for row in range(len(mask)):
        mask[row, row + 1 :] = float("-inf")
    return scores + mask


def added_in_place(x: Tensor, branch: Tensor) -> Tensor:
    x += branch
    return x


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def centred(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def inf_above(size: int) -> Tensor:
    return torch.full((size, size), float("-inf")).triu(1)


# A network, and words of one meaning, of which the first is what others are set against.
WORDS: dict[Callable[[Word], tuple[nn.Module, Tensor]], dict[str, Word]] = {
    residual: {
        "plus": lambda x, y: x + y,
        "in place": added_in_place,
        "stack": lambda x, y: torch.stack([x, y]).sum(0),
        "lerp": lambda x, y: torch.lerp(2 * x, 2 * y, 0.5),
        "turned": lambda x, y: (x.t() + y.t()).t(),
    },
    picking: {
        "index": lambda x: x[:, 0],
        "unbind": lambda x: x.unbind(1)[0],
        "split": lambda x: x.split(1, 1)[0].squeeze(1),
        "sizes": lambda x: x.split([1, x.shape[1] - 1], 1)[0].flatten(1),
        "chunk": lambda x: next(iter(x.chunk(x.shape[1], 1)))[:, 0],
        "iter": lambda x: next(iter(x.transpose(0, 1))),
        "narrow": lambda x: x.narrow(1, 0, 1).squeeze(1),
        "index_select": lambda x: x.index_select(1, torch.tensor([0])).squeeze(1),
    },
    picking_last: {
        "index": lambda x: x[:, -1],
        "loop": lambda x: [step for step in x.transpose(0, 1)][-1],
        "split": lambda x: x.split(1, 1)[-1].squeeze(1),
    },
    steps_first: {
        "plus": lambda x, y: (x + y).transpose(0, 1),
        "clone": lambda x, y: (x + y).transpose(0, 1).clone(),
        "turned": lambda x, y: (x.transpose(0, -1) + y.transpose(0, -1)).permute(1, 2, 0),
        "other": lambda x, y: x.transpose(0, 1) + y.transpose(0, 1),
    },
    pooling: {
        "mean": lambda x: x.mean(1),
        "adaptive": lambda x: F.adaptive_avg_pool1d(x.mT, 1).squeeze(-1),
        "pool": lambda x: F.avg_pool1d(x.mT, x.shape[1])[..., 0],
    },
    norms: {
        "by hand": rms,
        "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6),
        "normalize": lambda x: F.normalize(x, dim=-1) * x.shape[-1] ** 0.5,
        "square": lambda x: x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt(),
    },
    attending: {
        "compared": lambda s: s.masked_fill(before(s.shape[-1]), float("-inf")),
        "tril": lambda s: s.masked_fill(torch.ones(s.shape[-2:]).tril() == 0, float("-inf")),
        "triu": lambda s: s + inf_above(s.shape[-1]),
        "written": written_mask,
        "of torch": lambda s: s + nn.Transformer.generate_square_subsequent_mask(s.shape[-1]),
    },
    placing: {
        "plus": lambda x, places: x + places,
        "count": lambda x, places: x + places[torch.ones(x.shape[:2]).cumsum(1).long() - 1],
        "embedding": lambda x, places: x + F.embedding(torch.arange(len(places)), places),
    },
    splitting: {
        "chunk": lambda x: x.chunk(2, -1),
        "unflatten": lambda x: x.unflatten(-1, (2, -1)).unbind(-2),
        "tensor_split": lambda x: x.tensor_split(2, -1),
    },
}


@pytest.mark.parametrize("network", WORDS)
def test_words_of_one_meaning_give_the_same_numbers(network: Any) -> None:
    words, found, given = WORDS[network], dict[str, CreditReport](), dict[str, Tensor]()
    for name, word in words.items():
        torch.manual_seed(0)
        model, data = network(word)
        with torch.no_grad():
            given[name] = model.eval()(data.clone())
        # The last batch is smaller.
        found[name] = measured(model, list(data.split(130)))
    first, *others = words
    for name in others:
        torch.testing.assert_close(given[name], given[first], atol=1e-5, rtol=1e-4)
        assert_alike(found[name], found[first])


def test_a_norm_of_layers_by_hand_is_read_as_that_of_torch() -> None:
    torch.manual_seed(0)
    network, data = norms(lambda x: F.layer_norm(x, x.shape[-1:]))
    torch.manual_seed(0)
    by_hand, _ = norms(centred)
    report = measured(by_hand, list(data.split(100)))
    assert_alike(report, measured(network, list(data.split(100))))
    # What the last layer takes is a state, of which it is linear.
    assert report.r2[-1] > 0.9999


@pytest.mark.parametrize("grads", [True, False])
def test_windows_are_no_shape_for_what_was_put_together_again(grads: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        z = m.layer(x).view(-1, 2, 4, 2, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 8)
        with torch.set_grad_enabled(grads):
            z = z + m.attention(z, z, z)[0]
        z = z.view(-1, 2, 2, 4, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 64, 8)
        return m.head(m.last(z).mean(1))

    torch.manual_seed(0)
    parts = {"layer": nn.Linear(4, 8), "attention": nn.MultiheadAttention(8, 2, batch_first=True)}
    network = wired(forward, **parts, last=nn.Linear(8, 8), head=nn.Linear(8, 3))
    report = measured(network, list(torch.randn(SAMPLES, 8, 8, 4).split(100)))
    # Means over other positions than those of the layer that is linear of each tell nothing of it: -0.2.
    assert report.r2[report.components.index("last")] > 0.7


def test_weights_that_a_functional_call_puts_in_are_the_networks_own() -> None:
    torch.manual_seed(0)
    network, data = placing(lambda x, places: x + places)
    batches = list(data.split(100))
    weights = {name: weight.clone() for name, weight in network.state_dict().items()}

    def call(model: nn.Module, batch: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, weights, (batch,))
        return found

    assert_alike(measured(network, batches, forward_fn=call), measured(network, batches))


def test_units_of_hidden_layers_have_no_order() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
    batches = list(torch.randn(SAMPLES, 8).split(100))
    other = copy.deepcopy(network)
    for place in (0, 2):
        order = torch.randperm(len(network[place].bias))
        for tensor in other[place].parameters():
            tensor.data = tensor.data[order]
        other[place + 2].weight.data = other[place + 2].weight.data[:, order]
    assert_alike(measured(other, batches), measured(network, batches))


@pytest.mark.parametrize("kind", ["order", "keywords", "strided", "more"])
def test_batches_of_the_same_samples_give_the_same_numbers(kind: str) -> None:
    class Named(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, flag: Tensor | None = None, text: str = "", n: int = 0) -> Any:
            return self.inner(x)

    torch.manual_seed(0)
    network = Named(steps_first(lambda x, y: (x + y).transpose(0, 1))[0])
    batches = list(sequences().split(100))
    others: dict[str, Callable[[Tensor], Any]] = {
        "order": lambda x: x[torch.randperm(len(x))],
        "keywords": lambda x: {"x": x},
        "strided": lambda x: x.mT.contiguous().mT,
        "more": lambda x: {"x": x, "flag": torch.ones(len(x)), "text": "told", "n": 3},
    }
    assert_alike(measured(network, [*map(others[kind], batches)]), measured(network, batches))
