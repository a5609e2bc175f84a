"""Batches of which several tensors are views of one memory, as windows of a series are."""

from typing import Any

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import credit_report
from lightning_koopman.network.flow.dataflow import DataFlow
from lightning_koopman.network.flow.shared_memory import Coverage, LabelsByView

SERIES = torch.randn(600, 10, generator=torch.Generator().manual_seed(0)).cumsum(dim=1)


def forecast(m: Any, past: Tensor, future: Tensor | None = None) -> dict[str, Tensor]:
    """Windows are scaled by themselves, and what is made of them is scaled back."""
    level, spread = past.mean(dim=1, keepdim=True), past.std(dim=1, keepdim=True)
    given = m.head(torch.relu(m.body((past - level) / spread))) * spread + level
    loss = {} if future is None else {"loss": (given - future[:, -4:]).square().mean()}
    return {**loss, "given": given}


def report_of(batches: list[Any], forward: Any = forecast) -> Any:
    torch.manual_seed(0)
    model = wired(forward, body=nn.Linear(6, 8), head=nn.Linear(8, 4))
    return credit_report(model, batches, forward_fn=lambda m, batch: m(**batch))


def windows(series: Tensor, start: int = 6) -> list[dict[str, Tensor]]:
    return [{"past": rows[:, :6], "future": rows[:, start:]} for rows in series.split(100)]


WAYS = {
    "side by side": windows(SERIES),
    "overlapping": windows(SERIES, start=1),
    "positions first": windows(SERIES.T.contiguous().T),
    "targets first": [{name: b[name] for name in ("future", "past")} for b in windows(SERIES)],
    "the series too": [
        {**b, "future": s} for b, s in zip(windows(SERIES), SERIES.split(100), strict=True)
    ],
}


@pytest.mark.parametrize("way", WAYS)
def test_targets_that_share_memory_with_inputs_are_none(way):
    expected = report_of([{"past": batch["past"].clone()} for batch in WAYS[way]])
    report = report_of(WAYS[way])
    # The window as the body takes it, and as it is scaled back.
    assert report.reference.widths[0] == 12
    assert report.reference.states == expected.reference.states
    assert (report.reads, report.notes) == (expected.reads, expected.notes)
    np.testing.assert_allclose(report.r2, expected.r2, atol=1e-9)
    np.testing.assert_allclose(report.credit, expected.credit, atol=1e-9)


def test_data_that_are_taken_beside_inputs_are_inputs_whatever_memory_they_share():
    def run(m: Any, past: Tensor, future: Tensor) -> Tensor:
        return m.head(torch.cat([m.body(past), future], dim=1))

    torch.manual_seed(0)
    model = wired(run, body=nn.Linear(6, 8), head=nn.Linear(12, 4))
    before = SERIES.clone()
    report = credit_report(model, windows(SERIES), forward_fn=lambda m, batch: m(**batch))
    assert report.reference.widths[0] == 10
    assert report.r2[-1] > 1 - 1e-6
    assert torch.equal(SERIES, before)


def test_labels_of_a_view_are_those_of_its_own_values():
    """Against the labels of single values."""
    generator = torch.Generator().manual_seed(0)

    def view(x: Tensor) -> Tensor:
        for axis in range(x.ndim):
            begin, end, step = torch.randint(0, 5, (3,), generator=generator).tolist()
            x = x[(slice(None),) * axis + (slice(begin, begin + end, 1 + step % 2),)]
        return x.transpose(0, 1) if begin % 2 else x

    for _ in range(50):
        numbers = torch.arange(7 * 6 * 5).view(7, 6, 5)
        labels, single = LabelsByView(frozenset({"all"})), [{"all"}] * numbers.numel()
        for name in "abcd":
            part = view(numbers)
            labels.set(part, frozenset({name}))
            for number in part.flatten().tolist():
                single[number] = {name}
        for _ in range(5):
            part = view(numbers)
            assert labels.of(part) == set().union(*(single[n] for n in part.flatten().tolist()))
        assert labels.of(numbers.view(torch.int32)) == set().union(*single)


def test_a_flow_tells_parts_of_a_memory_apart():
    flow, x = DataFlow(), torch.zeros(4, 6)
    flow.label(x, "all")
    flow.label_part(x[:, :2], "left")
    with flow:
        left, right, both = x[:, :2] * 2, x[:, 2:] + 1, x[:, 1:4].relu()
        x[:, 5] = left[:, 0]
    assert (flow.labels(left), flow.labels(right)) == ({"left"}, {"all"})
    assert flow.labels(both) == {"left", "all"}
    assert flow.labels(x[:, 3:5]) == {"all"}
    assert flow.labels(x[:, 5]) >= {"left"}
    assert flow.labels(x[:, :2].view(torch.float16)) == {"left"}
    assert flow.error is None


def test_a_part_is_taken_where_its_own_values_are():
    x = torch.zeros(5, 8)
    coverage = Coverage()
    coverage.open(x[:, :4])
    coverage.add(x[:, :4])
    assert coverage.knows(x[:, 4:])
    assert not coverage.misses(x[:, 1:3])
    assert coverage.misses(x[:, 4:])
    assert coverage.misses(x)
    coverage.add(x[:, 4:])
    assert not coverage.misses(x)
    # Values that are read several times count once.
    assert not coverage.misses(x.unfold(1, 3, 1))
    assert not coverage.misses(x[:1].expand(9, 8))
    assert not coverage.misses(torch.zeros(5, 8))
    assert not coverage.knows(torch.zeros(3))
