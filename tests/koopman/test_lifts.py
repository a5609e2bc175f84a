"""Lifted states against an explicit EDMD in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_koopman import Options, credit_report
from lightning_koopman.koopman.lifts import fit_lift

Array = NDArray[np.float64]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)
    ).double()


def states(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [x, net[:2](x), net[:4](x), net(x)]


def edmd(lifted: list[Array], ridge: float) -> list[float]:
    """Log-volumes a direction, from the last state back to the first."""
    centred = [state - state.mean(axis=0) for state in lifted]
    jacobian, volumes = np.eye(centred[-1].shape[1]), [0.0]
    for x, y in zip(centred[-2::-1], centred[:0:-1], strict=True):
        c_xx = x.T @ x / len(x)
        weight = ridge * np.trace(c_xx) / len(c_xx)
        operator = np.linalg.solve(c_xx + weight * np.eye(len(c_xx)), x.T @ y / len(x))
        jacobian = operator @ jacobian
        sign_and_log = np.linalg.slogdet(jacobian.T @ jacobian)
        volumes.append(float(sign_and_log[1]) / 2 / jacobian.shape[1])
    return volumes[::-1]


def squares(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows**2], dim=1)


def test_a_callable_lift_is_edmd() -> None:
    net, x = network(), torch.randn(500, 3, dtype=torch.float64)
    report = credit_report(net, x.split(100), options=Options(observables=squares, tikhonov=1e-6))
    *hidden, output = [state.numpy() for state in states(net, x)]
    expected = edmd([*(np.hstack([h, h**2]) for h in hidden), output], 1e-6)
    np.testing.assert_allclose([report.total, *report.credit], expected, atol=1e-8)
    assert any("was lifted by squares" in note for note in report.notes)


def polynomial(rows: Array, first: Array) -> Array:
    about = rows - first.mean(axis=0)
    scale = np.sqrt(np.mean((first - first.mean(axis=0)) ** 2))
    products = [
        about[:, i] * about[:, j] for i in range(about.shape[1]) for j in range(i, about.shape[1])
    ]
    return np.hstack([rows, np.stack(products, axis=1) / scale])


def kernel(rows: Array, first: Array, kind: str, size: int, seed: int) -> Array:
    mean = first.mean(axis=0)
    scale = np.sqrt(np.mean((first - mean) ** 2))
    distances = np.linalg.norm(first[:, None] - first[None], axis=2)[np.triu_indices(len(first), 1)]
    width = np.sort(distances)[(len(distances) - 1) // 2]  # torch's median: the lower of the middle two
    generator = torch.Generator().manual_seed(seed)
    if kind == "rff":
        w = torch.randn(rows.shape[1], size, generator=generator, dtype=torch.float64).numpy() / width
        b = 2 * np.pi * torch.rand(size, generator=generator, dtype=torch.float64).numpy()
        return np.hstack([rows, np.sqrt(2) * scale * np.cos((rows - mean) @ w + b)])
    centres = first[torch.randperm(len(first), generator=generator)[:size].numpy()]
    squared = ((rows[:, None] - centres[None]) ** 2).sum(axis=2)
    return np.hstack([rows, scale * np.exp(-squared / 2 / width**2)])


@pytest.mark.parametrize("kind", ["polynomial", "rff", "rbf"])
def test_each_lift_is_edmd_in_its_coordinates(kind: Any) -> None:
    net, x = network(), torch.randn(600, 3, dtype=torch.float64)
    report = credit_report(
        net, x.split(100), options=Options(observables=kind, tikhonov=1e-5, max_dim=20, seed=3)
    )
    lifted = []
    *hidden, output = [state.numpy() for state in states(net, x)]
    for state in hidden:
        # The first 2 * max_dim samples fix the lift.
        first = state[:40]
        lifted.append(
            polynomial(state, first) if kind == "polynomial" else kernel(state, first, kind, 20, 3)
        )
    np.testing.assert_allclose([report.total, *report.credit], edmd([*lifted, output], 1e-5), atol=1e-7)


def test_a_lift_follows_what_a_plain_operator_cannot() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) ** 2)

    net, batches = Square().double(), list(torch.randn(1000, 2, dtype=torch.float64).split(250))
    assert credit_report(net, batches).r2[-1] < 0.7
    assert (
        credit_report(net, batches, options=Options(observables="polynomial", tikhonov=0.0)).r2[-1]
        > 1 - 1e-9
    )


def test_lifts_do_not_depend_on_the_batches() -> None:
    net, x = network(), torch.randn(600, 3, dtype=torch.float64)
    given = [
        credit_report(
            net, x.split(n), max_samples=None, options=Options(observables="rff", max_dim=30)
        ).credit
        for n in (600, 7)
    ]
    np.testing.assert_allclose(given[0], given[1], atol=1e-9)


def test_a_constant_state_can_be_lifted() -> None:
    rows = torch.ones(10, 3, dtype=torch.float64)
    for kind in ("polynomial", "rff", "rbf"):
        for given in (rows, rows[:1]):
            assert bool(torch.isfinite(fit_lift(given, kind, 5)(rows)).all())


def test_a_polynomial_of_a_wide_state_is_refused() -> None:
    with pytest.raises(
        ValueError, match="'polynomial' makes 2079 values of 63; set max_dim to at most 62"
    ):
        fit_lift(torch.randn(10, 63), "polynomial", 0)


@pytest.mark.parametrize(
    ("observables", "message"),
    [
        ("spline", r"observables is 'spline'; choose one of \('polynomial', 'rff', 'rbf'\)"),
        (lambda rows: rows[:5], r"observables gave \(5, 3\) for rows of shape \(100, 3\)"),
        (lambda rows: rows.tolist(), "observables gave list for rows of shape"),
        (lambda rows: rows / 0, "observables gave NaN or infinity for rows of shape"),
    ],
)
def test_a_wrong_lift_is_explained(observables: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        credit_report(
            network(),
            [torch.randn(100, 3, dtype=torch.float64)],
            options=Options(observables=observables),
        )
