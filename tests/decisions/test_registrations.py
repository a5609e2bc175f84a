"""Modules that are registered in several places, or called from elsewhere than where they are."""

import pytest
import torch
from torch import Tensor, nn

from lightning_koopman import bit_widths, drop_order, linearize
from lightning_koopman.decisions.swaps import Skipped, load_shrunk, save_shrunk, swapped


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    wide = [part for _ in range(2) for part in (nn.Linear(12, 12), nn.ReLU())]
    return [nn.Linear(6, 12), nn.ReLU(), *wide, nn.Linear(12, 3)]


class Twice(nn.Module):
    """Registers some of its layers under second names, before or behind the sequence that runs them."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        net = nn.Sequential(*layers())
        if first:
            self.a, self.b = net[2], net[4]
        self.net = net
        if not first:
            self.a, self.b = net[2], net[4]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Listed(nn.Module):
    """Runs its layers from a list, beside which they are registered."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers()
        for i, layer in enumerate(self.layers):
            self.add_module(f"l{i}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def batches() -> list[tuple[Tensor, Tensor]]:
    rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    return [(part, part.argmax(1) % 3) for part in rows.split(100)]


def gives(model: nn.Module) -> Tensor:
    return model(batches()[0][0])


@pytest.mark.parametrize("first", [True, False])
def test_second_names_change_no_decision(first, tmp_path):
    model, plain = Twice(first).eval(), nn.Sequential(*layers()).eval()
    order, expected = (drop_order(m, batches(), steps=2) for m in (model, plain))
    assert order.effect.tolist() == expected.effect.tolist()
    assert order.effect[0] > 0
    for steps in (1, 2):
        new = order.apply(model, steps=steps)
        torch.testing.assert_close(gives(new), gives(expected.apply(plain, steps=steps)), rtol=0, atol=0)
        save_shrunk(new, tmp_path / "new.ckpt")
        torch.testing.assert_close(gives(load_shrunk(model, tmp_path / "new.ckpt")), gives(new))
    linear, expected = (linearize(m, batches(), max_drop=1.0, allow_larger=True) for m in (model, plain))
    assert len(linear.components) == len(expected.components) == 4
    assert not torch.equal(gives(linear.model), gives(model))
    if not first:
        # Otherwise names do not tell that two layers are neighbours, which could be one map.
        torch.testing.assert_close(gives(linear.model), gives(expected.model))
    bits, expected = (bit_widths(m, batches(), average=3.0) for m in (model, plain))
    torch.testing.assert_close(gives(bits.apply(model)), gives(expected.apply(plain)), rtol=0, atol=0)


def test_what_is_swapped_is_put_back_everywhere():
    model = Twice(first=True)
    layer = model.net[2]
    with swapped(model, [Skipped(["a", "net.3"])]):
        assert model.a is model.net[2]
        assert isinstance(model.a, Skipped)
    assert model.a is model.net[2] is layer
    assert isinstance(model.net[3], nn.ReLU)


def test_what_is_called_from_elsewhere_cannot_be_replaced():
    model = Listed().eval()
    before = list(model.named_modules())
    order, linear = (
        drop_order(model, batches(), steps=2),
        linearize(model, batches(), max_drop=1.0, allow_larger=True),
    )
    for found in (order, linear):
        assert found.components == ()
        assert "the network does not call" in found.refused["l2"]
        assert "where it is registered, so nothing can take its place" in found.refused["l2"]
    assert list(model.named_modules()) == before


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kind, self.layer = "full", nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


class Asks(nn.Module):
    """Asks its blocks for an attribute, their type and where their weights are before it runs them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(next(self.parameters()).device)
        for block in self.blocks:
            x = block(x) if block.kind == "full" else 2 * x
        return self.head(x)


def plainly_without(model: nn.Module, block: int) -> Tensor:
    class Nothing(nn.Module):
        kind = "full"

        def forward(self, x: Tensor) -> Tensor:
            return x

    model.blocks[block], kept = Nothing(), model.blocks[block]
    try:
        return gives(model)
    finally:
        model.blocks[block] = kept


def test_what_takes_a_module_s_place_has_its_attributes(tmp_path):
    model = Asks().eval()
    order = drop_order(model, batches(), steps=1)
    new = order.apply(model, steps=1)
    dropped = int(order.components[0].rpartition(".")[2])
    torch.testing.assert_close(gives(new), plainly_without(model, dropped), rtol=0, atol=0)
    assert sum(p.numel() for p in new.parameters()) == order.costs[0].parameters
    save_shrunk(new, tmp_path / "new.ckpt")
    torch.testing.assert_close(
        gives(load_shrunk(model, tmp_path / "new.ckpt")), gives(new), rtol=0, atol=0
    )
    linear = linearize(model, batches(), max_drop=1.0, allow_larger=True)
    assert {"blocks.0", "blocks.1", "blocks.2"} <= {*linear.components}
    assert gives(linear.model).shape == (100, 3)


def test_an_encoder_of_torch_can_go_without_any_of_its_layers():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 3), nn.Flatten(), nn.Linear(24, 3)).eval()
    rows = torch.randn(200, 4, 6).split(50)
    order = drop_order(model, rows, scale="relative", steps=3)
    assert {*order.components} == {f"0.layers.{i}" for i in range(3)}
    assert (order.effect > 0).all()


def test_a_block_whose_weights_are_read_cannot_go():
    class Reads(Asks):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x) * block.layer.weight.norm()
            return self.head(x)

    model = Reads().eval()
    order = drop_order(model, batches(), steps=1)
    assert order.components == ()
    assert "without which the network fails" in order.refused["blocks.0"]
    linear = linearize(model, batches(), max_drop=1.0, allow_larger=True)
    assert "the network fails without it" in linear.refused["blocks.2"]


class Functions(Asks):
    """Keeps functions that run its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [lambda x, i=i: self.blocks[i](x) for i in range(3)]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return self.head(x)


def test_a_network_whose_copy_would_run_its_own_modules_is_not_copied():
    model = Functions().eval()
    order = drop_order(model, batches(), steps=1)
    torch.testing.assert_close(order.effect[0], order.remaining[0].min())
    for call in (lambda: order.apply(model, steps=1), lambda: linearize(model, batches())):
        with pytest.raises(ValueError, match="'steps' of 'Functions' holds a function that refers to a"):
            call()
    steps = [lambda x, block=block: block(x) for block in model.blocks]
    for model.steps in (steps, dict(enumerate(steps)), steps[0]):
        with pytest.raises(ValueError, match="'steps' of 'Functions' holds a function"):
            order.apply(model, steps=1)
    model.steps = [block.forward for block in model.blocks]
    # Of what is no part of the network.
    loss = nn.MSELoss()
    model.loss = lambda x, loss=loss: loss(x, x)
    assert not torch.equal(gives(order.apply(model, steps=0)), torch.zeros(100, 3))
