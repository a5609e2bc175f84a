"""What has no finite effect is never chosen, and is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import around
from torch import Tensor, nn

from lightning_koopman import bit_widths, drop_order, linearize


def network() -> nn.Sequential:
    torch.manual_seed(0)
    positive = around(8, lambda m, x: nn.functional.softplus(m.inner(x)) + 0.1)
    # Gives NaN for what the component before it takes, and for what a linear map makes of it.
    logarithm = around(8, lambda m, x: m.inner(x.log()))
    residual = (around(8, lambda m, x: x + 1e-3 * m.inner(x)) for _ in range(2))
    return nn.Sequential(positive, logarithm, *residual, nn.Linear(8, 3)).eval()


def labelled(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    x = 3 * torch.randn(300, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        y = net(x).argmax(1)
    return list(zip(x.split(50), y.split(50), strict=True))


def test_a_component_without_which_nothing_is_finite_is_never_dropped():
    net = network()
    found = drop_order(net, labelled(net))
    alone = drop_order(net, labelled(net), components=["1", "2", "3", "4"])
    assert found.dropped == alone.dropped
    assert {*found.dropped} == {"2", "3"}
    assert "0" not in found.components
    assert np.isnan(found.remaining[:, found.candidates.index("0")]).all()
    assert any("with '0' dropped" in note for note in found.notes)
    assert "with '0' dropped" in str(found)
    assert alone.notes == ()


def test_nothing_goes_where_nothing_is_finite():
    net = network()
    found = drop_order(net, labelled(net), components=["0"])
    assert (found.components, found.dropped, found.within) == ((), (), 0)
    assert "Nothing can go" in str(found)
    assert "larger" not in found.next_step
    assert torch.equal(found.apply(net)(torch.ones(2, 8)), net(torch.ones(2, 8)))


def test_a_metric_that_is_not_finite_is_no_reason_to_drop():
    net = network()
    data = labelled(net)
    with torch.no_grad():
        own, without = (torch.cat([part(x) for x, _ in data]) for part in (net, without_third(net)))

    def metric(outputs: Tensor, targets: Tensor) -> float:
        if torch.allclose(outputs, without):
            return float("inf")
        return 1.0 - float((outputs - own).abs().mean())

    found = drop_order(net, data, metric=metric, max_drop=10.0, steps=1)
    assert found.components == ("3",)
    assert found.notes == tuple(n for n in found.notes if "with '0'" in n or "with '2'" in n)
    assert len(found.notes) == 2


def without_third(net: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(part for name, part in net.named_children() if name != "2"))


def test_a_component_that_no_linear_map_can_stand_for_stays_as_it_is():
    net = network()
    how = {"max_drop": 1.0, "allow_larger": True}
    found = linearize(net, labelled(net), components=["0", "2", "3"], **how)
    assert {*found.components} == {"2", "3"}
    # What breaks for a component that became linear, too, is none.
    assert {"0", "1"} <= {*linearize(net, labelled(net), **how).components}
    assert any("with '0' linear" in note for note in found.notes)
    assert all(np.isfinite(found.effect))


class Brittle(nn.Module):
    """Breaks where its weight holds fewer values than so many."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.inner, self.values = nn.Linear(8, 8), values

    def forward(self, x: Tensor) -> Tensor:
        few = len(self.inner.weight.unique()) < self.values
        return self.inner(x) * (torch.nan if few else 1.0)


@pytest.mark.filterwarnings("ignore")
def test_bits_with_which_nothing_is_finite_are_not_chosen():
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Brittle(40), nn.Linear(8, 3)).eval()
    found = bit_widths(net, labelled(net), bits=(8, 4, 2), average=5.0)
    known = np.isfinite(found.effects)
    assert not known.all()
    assert all(known[i, found.options.index(b)] for i, b in enumerate(found.bits))
    assert found.average <= 5.0
    assert np.isfinite(found.effect)
    assert any("with '2' rounded to 2 bits" in note for note in found.notes)
    with pytest.raises(ValueError, match="with so few bits"):
        bit_widths(net, labelled(net), bits=(8, 2), average=2.5)
    with pytest.raises(ValueError, match="nothing can be chosen"):
        bit_widths(net, labelled(net), bits=(2,), components=["2"])
