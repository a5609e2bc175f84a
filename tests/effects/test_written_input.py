"""Networks that write into their input, over which effects and decisions run many times."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import bit_widths, component_effects, drop_order


class Shifting(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(0.5) if self.in_place else x - 0.5
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("how", ["measured", "predicted"])
def test_effects_are_those_of_the_same_network_out_of_place(how: str):
    torch.manual_seed(0)
    plain, writing = Shifting(False).eval(), Shifting(True).eval()
    writing.load_state_dict(plain.state_dict())
    x = torch.rand(300, 8)
    y, found = plain(x).argmax(1), []
    for net in (plain, writing):
        data = [(part.clone(), labels) for part, labels in zip(x.split(50), y.split(50), strict=True)]
        found.append(component_effects(net, data, kinds=["skip", "linear", "weight_noise"], how=how))
        assert all(torch.equal(part, old) for (part, _), old in zip(data, x.split(50), strict=True))
    assert found[1].metric_before == found[0].metric_before
    for kind in found[0].kinds:
        np.testing.assert_allclose(found[1].values[kind], found[0].values[kind], rtol=1e-9)


def test_decisions_are_those_of_the_same_network_out_of_place():
    torch.manual_seed(0)
    plain, writing = Shifting(False).eval(), Shifting(True).eval()
    writing.load_state_dict(plain.state_dict())
    x = torch.rand(300, 8)
    y, orders, widths = plain(x).argmax(1), [], []
    for net in (plain, writing):
        data = [(part.clone(), labels) for part, labels in zip(x.split(50), y.split(50), strict=True)]
        orders.append(drop_order(net, data))
        widths.append(bit_widths(net, data, average=4.0))
    assert orders[1].dropped == orders[0].dropped
    assert widths[0].metric_before == pytest.approx(1)
    assert widths[1].metric_before == widths[0].metric_before
    assert widths[1].bits == widths[0].bits
