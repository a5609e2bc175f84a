"""Networks and data that the tests of effects share."""

import torch
from small import wired
from torch import Tensor, nn


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)
    ).eval()


def data(n: int = 400, d: int = 5, seed: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long()


def batched(x: Tensor, y: Tensor, size: int = 100) -> list[list[Tensor]]:
    return [[a, b] for a, b in zip(x.split(size), y.split(size), strict=True)]


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear_chain() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)).double()


def smooth(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
        nn.Linear(8, 4),
    ).double()


class Twice(nn.Module):
    """One layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.inner(self.act(self.inner(x)))))


class Attending(nn.Module):
    """Tokens in, a part that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.attention(x, x, x)[0].mean(1))


class Branches(nn.Module):
    """Two linear layers side by side, whose sum a third reads; then a sum is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        both = self.left(x) + torch.tanh(self.right(x))
        return both + self.head(both)


def left_out(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Residual of every sample from the ridge regression of the others; of least norm at 0."""
    found = torch.empty_like(y)
    for i in range(len(x)):
        rest = torch.arange(len(x)) != i
        x_mean, y_mean = x[rest].mean(dim=0), y[rest].mean(dim=0)
        u, s, v = torch.linalg.svd(x[rest] - x_mean, full_matrices=False)
        alive = s > 1e-10 * s[0]  # centred, so that one may be 0
        u, s, v = u[:, alive], s[alive], v[alive]
        matrix = v.T @ ((s / (s.square() + ridge))[:, None] * (u.T @ (y[rest] - y_mean)))
        found[i] = y[i] - y_mean - (x[i] - x_mean) @ matrix
    return found


def pooled() -> nn.Sequential:
    """Residual blocks of one shape, of which the last is followed by pooling, and classes."""
    torch.manual_seed(0)
    stem, *blocks = (
        wired(lambda self, x: torch.tanh(x + self.norm(self.conv(x))), conv=conv, norm=nn.BatchNorm1d(4))
        for conv in (nn.Conv1d(4, 4, 3, padding=1) for _ in range(3))
    )
    net = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(8, 3))
    return net.double().eval()


def fingerprint(model: nn.Module) -> list:
    """Everything that must be left as it was, gradients included."""
    return [
        [(id(p), p.clone()) for p in (*model.parameters(), *model.buffers())],
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        torch.get_rng_state(),
    ]


def assert_same(before: list, after: list) -> None:
    assert all(i == j and torch.equal(a, b) for (i, a), (j, b) in zip(before[0], after[0], strict=True))
    assert before[1:4] == after[1:4]
    assert torch.equal(before[4], after[4])
