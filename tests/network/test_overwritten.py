"""What is written over a whole tensor is made of what is written, not of what was there before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import credit_report


def by_copy(a: Any, x: Tensor) -> Tensor:
    return x.clone().copy_(a(x))


def by_index(a: Any, x: Tensor) -> Tensor:
    made = x.clone()
    made[:] = a(x)
    return made


def by_out(a: Any, x: Tensor) -> Tensor:
    made, buffer = a(x), torch.relu(x)
    return torch.mul(made, 1.0, out=buffer)


def zeroed(a: Any, x: Tensor) -> Tensor:
    return x.clone().zero_().add_(a(x))


def batches() -> list[Tensor]:
    return list(torch.randn(600, 8, generator=torch.Generator().manual_seed(0)).split(100))


@pytest.mark.parametrize("write", [by_copy, by_index, by_out, zeroed])
def test_what_was_there_is_read_by_nobody(write: Callable[[Any, Tensor], Tensor]) -> None:
    def report(first: Callable[[Any, Tensor], Tensor]) -> Any:
        def run(m: Any, x: Tensor) -> Tensor:
            return m.head(torch.tanh(m.b(torch.tanh(first(m.a, x)))))

        torch.manual_seed(1)
        parts = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
        return credit_report(wired(run, **parts), batches())

    found, expected = report(write), report(lambda a, x: a(x))
    assert found.reads == expected.reads
    assert found.credit == pytest.approx(expected.credit, abs=1e-6)


def test_a_state_that_is_kept_in_one_place_is_read_by_the_next_step_alone() -> None:
    def run(m: Any, x: Tensor, *, in_place: bool) -> Tensor:
        h = torch.zeros(len(x), 6)
        for t in range(4):
            new = m.cell(x[:, t], h)
            h = h.copy_(new) if in_place else new
        return m.head(h)

    def report(in_place: bool) -> Any:
        torch.manual_seed(1)
        parts = {"cell": nn.RNNCell(8, 6), "head": nn.Linear(6, 3)}
        net = wired(lambda m, x: run(m, x, in_place=in_place), **parts)
        x = torch.randn(600, 4, 8, generator=torch.Generator().manual_seed(0))
        return credit_report(net, x.split(100))

    found, expected = report(True), report(False)
    assert found.reads == expected.reads
    assert found.reads["head"] == ("cell#3",)
    assert found.credit == pytest.approx(expected.credit, abs=1e-6)


def test_a_part_that_is_written_leaves_what_is_beside_it() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        made = m.a(x)
        made[:, :4] = m.b(x)[:, :4]
        return m.head(torch.tanh(made))

    torch.manual_seed(1)
    parts = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
    report = credit_report(wired(run, **parts), batches())
    assert report.components == ("a+b", "head")
