"""What is written to a part of a memory is read from that part alone, as if it had been put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small import wired
from torch import Tensor, nn

from lightning_koopman import component_effects, credit_report
from lightning_koopman.network.flow import shared_memory
from lightning_koopman.network.flow.dataflow import DataFlow
from lightning_koopman.network.flow.shared_memory import LabelsByView
from lightning_koopman.report.report import CreditReport

Forward = Callable[[Any, Tensor], Tensor]


def series() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(600, 4, 8, generator=generator).split(100))


def few(samples: int) -> list[Tensor]:
    return list(torch.cat(series())[:200].split(samples))


def vectors() -> list[Tensor]:
    return [batch[:, 0].clone() for batch in series()]


def step(m: Any, x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(m.a(x) + m.b(h))


def part(h: Tensor) -> Tensor:
    """Return what nobody is told of that it is all of a sum, as of what is written to a part."""
    return torch.stack([h, h])[0]


def loop(m: Any, x: Tensor) -> Tensor:
    states = [torch.zeros(len(x), 8)]
    for t in range(x.shape[1]):
        states.append(part(step(m, x[:, t], states[-1])))
    return m.head(torch.stack(states[1:], dim=1).flatten(1))


def loop_batch_first(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), x.shape[1] + 1, 8)
    for t in range(x.shape[1]):
        out[:, t + 1] = step(m, x[:, t], out[:, t])
    return m.head(out[:, 1:].flatten(1))


def loop_time_first(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[1] + 1, len(x), 8)
    for t in range(x.shape[1]):
        out[t + 1] = step(m, x[:, t], out[t])
    return m.head(out[1:].transpose(0, 1).flatten(1))


def loop_time_last(m: Any, x: Tensor) -> Tensor:
    out = x.new_empty(len(x), 8, x.shape[1] + 1)
    out[..., 0] = 0
    for t in range(x.shape[1]):
        out[..., t + 1].copy_(step(m, x[:, t], out[..., t]))
    return m.head(out[..., 1:].transpose(1, 2).flatten(1))


def loop_narrow(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), x.shape[1] + 1, 8)
    for t in range(x.shape[1]):
        given = out.narrow(1, t, 1).squeeze(1)
        out.narrow(1, t + 1, 1).copy_(step(m, x[:, t], given).unsqueeze(1))
    return m.head(out.narrow(1, 1, x.shape[1]).flatten(1))


def loop_added_into(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), x.shape[1] + 1, 8)
    for t in range(x.shape[1]):
        torch.tanh(m.a(x[:, t]) + m.b(out[:, t]), out=out[:, t + 1])
    return m.head(out[:, 1:].flatten(1))


def decoder(m: Any, x: Tensor) -> Tensor:
    outputs, h = [m.encoder(x[:, 0])], m.encoder(x[:, 1])
    for _ in range(3):
        outputs.append(part(torch.tanh(m.a(outputs[-1]) + m.b(h))))
    return m.head(torch.stack(outputs).mean(dim=0))


def decoder_written(m: Any, x: Tensor) -> Tensor:
    outputs = torch.zeros(4, len(x), 8)
    outputs[0] = m.encoder(x[:, 0])
    h = m.encoder(x[:, 1])
    for t in range(1, 4):
        outputs[t] = torch.tanh(m.a(outputs[t - 1]) + m.b(h))
    return m.head(outputs.mean(dim=0))


def coupling(m: Any, x: Tensor) -> Tensor:
    a, b = m.stem(x).chunk(2, 1)
    a = part(a).add_(torch.tanh(m.one(b)))
    return m.head(torch.cat([a, part(b).add_(torch.tanh(m.two(b)))], dim=1))


def coupling_by_chunk(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    a, b = h.chunk(2, 1)
    a += torch.tanh(m.one(b))
    b += torch.tanh(m.two(b))
    return m.head(h)


def coupling_by_rows(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x).t().contiguous()
    a, b = h.split(4)
    a.add_(torch.tanh(m.one(b.t())).t())
    b.add_(torch.tanh(m.two(b.t())).t())
    return m.head(h.t())


def columns(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    first = m.one(h[:, :4])
    return m.head(torch.cat([first, part(m.two(torch.tanh(first))).add_(h[:, 4:])], dim=1))


def columns_written(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    h[:, :4] = m.one(h[:, :4])
    h[:, 4:] += m.two(torch.tanh(h[:, :4]))
    return m.head(h)


def interleaved(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    even, odd = m.one(h[:, ::2]), h[:, 1::2]
    return m.head(torch.stack([even, torch.tanh(m.two(odd))], dim=2).flatten(1))


def interleaved_written(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    h[:, ::2] = m.one(h[:, ::2])
    h[:, 1::2] = torch.tanh(m.two(h[:, 1::2]))
    return m.head(h)


def branches(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.stem(x))
    left, right = torch.tanh(m.one(h[:, :4])), m.two(h[:, 4:])
    # Of what is written to a part, nobody is told that it is a sum.
    return m.head(torch.cat([left, part(right).add_(m.three(left))], dim=1))


def branches_written(m: Any, x: Tensor) -> Tensor:
    h, buffer = torch.tanh(m.stem(x)), torch.zeros(len(x), 8)
    buffer[..., :4] = torch.tanh(m.one(h[:, :4]))
    buffer[..., 4:] = m.two(h[:, 4:])
    buffer[..., 4:] += m.three(buffer[..., :4])
    return m.head(buffer)


def masked(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    h = torch.where(h > 0, torch.tanh(m.mix(h)), h)
    return m.head(torch.cat([m.one(h[:, :4]), h[:, 4:]], dim=1))


def masked_written(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    mask = h > 0
    h[mask] = torch.tanh(m.mix(h))[mask]
    h[:, :4] = m.one(h[:, :4])
    return m.head(h)


def masked_part(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    first, last = h[:, :4], h[:, 4:]
    first = torch.where(first > 0, torch.tanh(m.one(last)), first)
    return m.head(torch.cat([first, torch.tanh(m.two(last))], dim=1))


def masked_part_written(m: Any, x: Tensor) -> Tensor:
    h = m.stem(x)
    first, last = h[:, :4], h[:, 4:]
    first.masked_scatter_(first > 0, torch.tanh(m.one(last))[first > 0])
    h[:, 4:] = torch.tanh(m.two(last))
    return m.head(h)


RECURRENT = {"a": (8, 8), "b": (8, 8), "head": (32, 3)}
SEQUENCE = {"encoder": (8, 8), "a": (8, 8), "b": (8, 8), "head": (8, 3)}
HALVES = {"stem": (8, 8), "one": (4, 4), "two": (4, 4), "head": (8, 3)}

WRITTEN: dict[str, tuple[Forward, Forward, dict[str, tuple[int, int]], Callable[[], list[Tensor]]]] = {
    "batch first": (loop_batch_first, loop, RECURRENT, series),
    "time first": (loop_time_first, loop, RECURRENT, series),
    "time last": (loop_time_last, loop, RECURRENT, series),
    "as many steps as samples": (loop_time_first, loop, RECURRENT, lambda: few(4)),
    "as many states as samples": (loop_time_first, loop, RECURRENT, lambda: few(5)),
    "narrow": (loop_narrow, loop, RECURRENT, series),
    "out": (loop_added_into, loop, RECURRENT, series),
    "decoder": (decoder_written, decoder, SEQUENCE, series),
    "chunk": (coupling_by_chunk, coupling, HALVES, vectors),
    "split rows": (coupling_by_rows, coupling, HALVES, vectors),
    "columns": (columns_written, columns, HALVES, vectors),
    "interleaved": (interleaved_written, interleaved, HALVES, vectors),
    "branches": (branches_written, branches, {**HALVES, "three": (4, 4)}, vectors),
    "mask": (masked_written, masked, {**HALVES, "mix": (8, 8)}, vectors),
    "mask of a part": (masked_part_written, masked_part, HALVES, vectors),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_written_parts_are_as_what_is_put_together(kind: str) -> None:
    def network(forward: Forward) -> Any:
        torch.manual_seed(1)
        parts = {name: nn.Linear(*sizes) for name, sizes in widths.items() if name != "two"}
        return wired(forward, **parts, two=nn.Linear(4, 4)).eval()

    written, made, widths, data = WRITTEN[kind]
    net, expected = network(written), network(made)
    with torch.no_grad():
        assert torch.allclose(net(data()[0]), expected(data()[0]), atol=1e-6)
        report, other = credit_report(net, data()), credit_report(expected, data())
    assert report.components == other.components
    assert (report.reads, report.parts) == (other.reads, other.parts)
    assert report.r2 == pytest.approx(other.r2, abs=1e-7)
    assert report.credit == pytest.approx(other.credit, abs=1e-6)
    found = component_effects(net, data(), report, ("skip",)).values["skip"]
    true = component_effects(expected, data(), other, ("skip",)).values["skip"]
    assert found == pytest.approx(true, rel=1e-4, abs=1e-9)


def test_an_activation_goes_with_its_component_where_another_part_was_written() -> None:
    class Into(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 4)

        def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
            return self.inner(x) if out is None else out.copy_(self.inner(x))

    def written(m: Any, x: Tensor) -> Tensor:
        buffer = torch.zeros(len(x), 8)
        first, second = m.one(x, buffer[:, :4]), m.two(x, buffer[:, 4:])
        return m.head(torch.cat([m.relu(first), m.other(second)], dim=1))

    def made(m: Any, x: Tensor) -> Tensor:
        first, second = m.one(x), m.two(x)
        return m.head(torch.cat([m.relu(first), m.other(second)], dim=1))

    def report(forward: Forward) -> CreditReport:
        torch.manual_seed(1)
        parts = {"one": Into(), "two": Into(), "relu": nn.ReLU(), "other": nn.ReLU()}
        return credit_report(wired(forward, **parts, head=nn.Linear(8, 3)).eval(), vectors())

    found, expected = report(written), report(made)
    assert found.parts["one"] == ("one", "relu")
    assert (found.components, found.parts, found.reads) == (
        expected.components,
        expected.parts,
        expected.reads,
    )
    assert found.credit == pytest.approx(expected.credit, abs=1e-6)


def followed(forward: Callable[[Tensor, Tensor], list[Tensor]]) -> list[set[str]]:
    """Return what of x and y is in the tensors that a function makes of them."""
    flow, x, y = DataFlow(), torch.ones(6, 4), torch.ones(6, 4)
    flow.label(x, "x")
    flow.label(y, "y")
    with flow:
        made = forward(x, y)
    assert flow.error is None
    return [{*flow.labels(tensor)} for tensor in made]


def test_views_are_told_apart_by_the_places_that_they_share() -> None:
    def forward(x: Tensor, y: Tensor) -> list[Tensor]:
        x[:, 1::2] = y[:, 1::2]
        pairs = x.view(6, 2, 2)
        halves = x.view(torch.int16)
        return [x, x[:, ::2], x[:, 1:3], x[2], x.t()[3], pairs[..., 0], halves[:, 2:4], halves[:, :2]]

    both = {"x", "y"}
    assert followed(forward) == [both, {"x"}, both, both, {"y"}, {"x"}, {"y"}, {"x"}]


def test_what_all_parts_of_a_memory_lost_is_not_in_it() -> None:
    def forward(x: Tensor, y: Tensor) -> list[Tensor]:
        for rows in x.split(2):
            rows.copy_(y[:2])
        y[:, 0] = 0
        whole = y.clone()
        y.zero_()
        return [x, whole, y, y[:, 1]]

    assert followed(forward) == [{"y"}, {"y"}, set(), set()]


def test_what_a_part_holds_is_read_where_it_is_not_written_over() -> None:
    def forward(x: Tensor, y: Tensor) -> list[Tensor]:
        x[:3].add_(y[:3])
        torch.add(y[3:], y[3:], out=x[3:])
        return [x[:3], x[3:], x.expand(2, 6, 4), x[:0]]

    assert followed(forward) == [{"x", "y"}, {"y"}, {"x", "y"}, set()]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_all_of_their_memory() -> None:
    def forward(x: Tensor, y: Tensor) -> list[Tensor]:
        nested = torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)])
        first, second = nested.unbind()
        first.copy_(x[:2])
        second.copy_(y[:3])
        return [nested, first, second, 2 * nested]

    both = {"x", "y"}
    assert followed(forward) == [both, {"x"}, {"y"}, both]


def test_beyond_what_can_be_told_apart_a_part_holds_what_the_memory_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_memory, "_MARK", np.uint8)
    x = torch.zeros(300, 2)
    labels = LabelsByView(frozenset({"x"}))
    for i, row in enumerate(x):
        labels.set(row, frozenset({str(i)}))
    assert labels.of(x[299]) == {"299"}
    assert labels.of(x[0]) >= {"0"}
    assert labels.of(x) == {"x", *map(str, range(300))}
    # Rows of two values take a mark each, columns one for each value.
    monkeypatch.setattr(shared_memory, "_MOST_MARKS", 300)
    labels = LabelsByView(frozenset({"x"}))
    labels.set(x[:8], frozenset({"8"}))
    labels.set(x[:0], frozenset())
    assert [labels.of(part) for part in (x[:2], x[8:], x[:, 0])] == [{"8"}, {"x"}, {"x", "8"}]
    labels.set(x[:, 0], frozenset({"0"}))
    assert labels.of(x[8:]) == {"x", "8", "0"}


def test_nothing_is_kept_of_memory_that_nobody_holds() -> None:
    def step(x: Tensor) -> None:
        buffer = torch.zeros(2, 4)
        buffer[0] = x[0]

    flow, x = DataFlow(), torch.ones(6, 4)
    flow.label(x, "x")
    with flow:
        for _ in range(20):
            step(x)
    assert len(flow._parts) == 1
    assert len(flow._written) == 1
