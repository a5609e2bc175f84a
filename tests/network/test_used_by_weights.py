"""Modules that take part in a pass without a call that could be recorded."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import wired
from torch import Tensor, nn

from lightning_koopman import credit_report
from lightning_koopman.measurement.overview import describe_components
from lightning_koopman.network.access.isolation import undisturbed
from lightning_koopman.network.capture.capture import Capture

USED = "used by their weights alone, or where no call can be recorded, so left out: "


def vmapped(m: Any, h: Tensor) -> Tensor:
    return torch.func.vmap(m.body)(h)


def functional(m: Any, h: Tensor) -> Tensor:
    weights = dict(m.body.named_parameters())
    return torch.func.vmap(lambda row: torch.func.functional_call(m.body, weights, (row,)))(h)


def by_its_weight(m: Any, h: Tensor) -> Tensor:
    return F.linear(h, m.body.weight)


def turned(m: Any, h: Tensor) -> Tensor:
    return h @ m.body.weight.T


def by_its_bias(m: Any, h: Tensor) -> Tensor:
    return h + m.body.bias


def seen(use: Any, **parts: nn.Module) -> Any:
    """Make a network with a part that is used somehow, and one that is not."""
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {"first": nn.Linear(6, 6), "body": nn.Linear(6, 6), **parts}
    net = wired(lambda m, x: m.head(use(m, m.first(x).tanh())), **made, head=nn.Linear(6, 3))
    net.idle = nn.Linear(3, 3)
    return net


BATCHES = list(torch.randn(120, 6, generator=torch.Generator().manual_seed(0)).split(40))


def notes_of(net: nn.Module, **options: Any) -> list[str]:
    notes, again = (
        [note for note in measure(net, BATCHES, **options).notes if "left out" in note]
        for measure in (credit_report, describe_components)
    )
    assert notes == again
    return notes


@pytest.mark.parametrize("use", [vmapped, functional, by_its_weight, turned, by_its_bias])
def test_what_is_used_by_its_weights_is_not_said_to_have_never_run(use):
    assert notes_of(seen(use)) == ["never ran, so left out: 'idle'", f"{USED}'body'"]


def test_a_part_that_attention_uses_by_its_weights_is_told():
    net = seen(
        lambda m, h: m.body(*[h[:, None]] * 3)[0][:, 0],
        body=nn.MultiheadAttention(6, 2, batch_first=True),
    )
    assert notes_of(net, components=["first", "body.out_proj", "head"]) == [f"{USED}'body.out_proj'"]


def test_buffers_that_are_read_count_as_weights():
    norm = nn.BatchNorm1d(6, affine=False)
    net = seen(lambda m, h: F.batch_norm(h, m.body.running_mean, m.body.running_var), body=norm)
    assert notes_of(net, components=["first", "body", "head"]) == [f"{USED}'body'"]


class Marked(Tensor):
    """A class of the user's own, as of hypervectors."""


def test_weights_of_a_class_derived_from_tensor_are_used_like_others():
    net = seen(by_its_weight)
    net.body.weight = nn.Parameter(net.body.weight.detach().as_subclass(Marked))
    assert type(net.body.weight) is Marked
    assert notes_of(net) == ["never ran, so left out: 'idle'", f"{USED}'body'"]


@pytest.mark.parametrize(
    "use",
    [
        lambda m, h: h,
        lambda m, h: h + torch.zeros_like(m.body.weight)[:1] + len(m.body.bias),
        lambda m, h: h.to(m.body.weight.device, m.body.weight.dtype),
    ],
)
def test_what_is_asked_for_its_shape_alone_never_ran(use):
    assert notes_of(seen(use)) == ["never ran, so left out: 'body', 'idle'"]


def test_weights_of_a_component_that_ran_need_no_note():
    net = seen(lambda m, h: h @ m.first.weight.T)
    net.body = net.first
    net.other, net.other.weight = nn.Linear(6, 6, bias=False), net.first.weight
    assert notes_of(net) == ["never ran, so left out: 'idle'"]


def test_lazy_modules_that_never_ran_have_no_weights_yet():
    net = seen(lambda m, h: h, body=nn.LazyLinear(4))
    assert "never ran, so left out: 'body', 'idle'" in credit_report(net, BATCHES).notes


def test_it_is_known_when_hooks_are_taken_off_before_the_pass_ends():
    net = seen(by_its_weight)
    capture = Capture(net)
    with undisturbed(net), capture:
        net(BATCHES[0])
    silent = capture.silent
    capture.end_pass()
    assert capture.told(silent) == ["never ran, so left out: 'idle'", f"{USED}'body'"]
