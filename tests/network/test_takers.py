"""What functions take is found again in later passes, and nothing else is taken for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_koopman.network.access.watch import Watcher
from lightning_koopman.network.capture.sums import Takers
from lightning_koopman.network.operators import Operator

X = torch.arange(6.0).view(2, 3)


class _Notes(Watcher):
    """Notes what one operator takes, as the first pass shows it."""

    def __init__(self, calls: Takers, value: Tensor) -> None:
        super().__init__()
        self.calls, self.value = calls, value

    def precede(self, op: Operator, args: tuple[Any, ...], kwargs: Any) -> None:
        if op.full_name == "mean" and torch.equal(args[0], self.value):
            self.calls.note("taken")


def found(first: Callable[[Takers], object], later: Callable[[Takers], object]) -> Any:
    """Note what takes the mean of 3 X in a pass, and return what is found in another one."""
    seen: list[Tensor] = []
    calls = Takers(lambda what, tensors: seen.extend(tensors))
    with calls, _Notes(calls, 3 * X):
        first(calls)
    assert calls.watches
    assert not seen
    calls.begin(None)
    with calls:
        later(calls)
    assert calls.error is None
    return seen


def run(calls: Takers, scale: float = 1.0) -> None:
    calls.begin("stem")
    x = scale * X
    (2 * x).mean(), (3 * x).mean(dim=0)
    calls.begin("head")
    (5 * x).mean()


def test_what_an_operator_takes_is_found_in_a_later_pass() -> None:
    assert [x.tolist() for x in found(run, lambda calls: run(calls, 2.0))] == [(6 * X).tolist()]


def test_behind_another_component_it_is_the_one_that_comes_as_late() -> None:
    def other(calls: Takers) -> None:
        calls.begin("another")
        x = torch.exp(X)
        (2 * x).mean(), (3 * x).mean(dim=0)
        calls.begin("head")
        (5 * x).mean()

    assert [x.tolist() for x in found(run, other)] == [(3 * torch.exp(X)).tolist()]


def test_where_it_comes_as_noted_is_found_last() -> None:
    def other(calls: Takers) -> None:
        calls.begin("another")
        X.mean(), X.mean()
        run(calls)

    assert [x.tolist() for x in found(run, other)] == [X.tolist(), (3 * X).tolist()]


def with_copies(calls: Takers) -> None:
    calls.begin("stem")
    x = 1.0 * X.clone().t().contiguous().t()
    (2 * x.view(2, 3)).mean(), (3 * x.detach().clone()).clone().mean(dim=0)


def test_copies_and_views_change_nothing() -> None:
    assert [x.tolist() for x in found(run, with_copies)] == [(3 * X).tolist()]


@pytest.mark.parametrize("before", [torch.exp, torch.cos, lambda x: (3 * x).mean()])
def test_nothing_is_found_where_something_else_was_computed_before(before: Any) -> None:
    def other(calls: Takers) -> None:
        calls.begin("stem")
        x = before(X) * X
        (2 * x).mean(), (3 * x).mean(dim=0)

    assert not found(run, other)


def test_what_is_ours_counts_for_nothing() -> None:
    def beside(calls: Takers) -> None:
        calls.begin("stem")
        calls.is_ours = True
        torch.exp(X), (3 * X).mean()
        calls.is_ours = False
        x = 1.0 * X
        (2 * x).mean(), (3 * x).mean(dim=0)

    assert len(found(run, beside)) == 1


def test_which_of_several_that_view_the_same_is_told_by_their_order() -> None:
    seen: list[list[float]] = []
    calls = Takers(lambda what, tensors: seen.append(tensors[0].tolist()))

    class Second(Watcher):
        def precede(self, op: Operator, args: tuple[Any, ...], kwargs: Any) -> None:
            if op.full_name == "select" and args[2] == 1:
                calls.note("second")

    with calls, Second():
        X.select(0, 0), X.select(0, 1)
    calls.begin(None)
    with calls:
        X.select(0, 0), (X.clone()).select(0, 1)
    assert seen == [X.tolist()]


def test_an_error_is_kept_out_of_the_pass() -> None:
    def broken(what: Any, tensors: list[Tensor]) -> None:
        raise RuntimeError("of ours")

    calls = Takers(broken)
    with calls, _Notes(calls, 3 * X):
        run(calls)
    calls.begin(None)
    with calls:
        run(calls)
    assert str(calls.error) == "of ours"


def test_what_is_forgotten_is_found_no_more() -> None:
    def forgetful(calls: Takers) -> None:
        calls.forget(lambda what: what == "taken")
        assert not calls.watches
        run(calls)

    assert not found(run, forgetful)
