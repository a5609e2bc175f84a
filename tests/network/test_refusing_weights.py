"""Weights of a class that refuses torch functions are put back, and so is the rest where one fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_koopman.network.access.isolation import undisturbed


class Refusing(nn.Parameter):
    """Answers what modules ask of their parameters, and no other torch function."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if type(func).__name__ != "method-wrapper":
            raise TypeError(f"{func} is refused")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*(getattr(a, "tensor", a) for a in args), **(kwargs or {}))


class Hollow(Refusing):
    """Keeps its numbers in an attribute, as hyperbolic libraries do."""

    def __new__(cls, data: Tensor) -> Hollow:
        return super().__new__(cls)

    def __init__(self, data: Tensor) -> None:
        self.tensor = nn.Parameter(data)


class Layer(nn.Module):
    """Has weights of one class, and a buffer behind them."""

    def __init__(self, kind: type[nn.Parameter]) -> None:
        super().__init__()
        self.weight = kind(torch.tensor([1.0, 2.0]))
        self.register_buffer("seen", torch.zeros(2))

    def numbers(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return getattr(self.weight, "tensor", self.weight).data


@pytest.mark.parametrize("kind", [nn.Parameter, Refusing, Hollow])
@pytest.mark.parametrize("error", [None, ArithmeticError("in the pass")])
def test_weights_that_refuse_torch_functions_are_put_back(
    kind: type[nn.Parameter], error: Exception | None
) -> None:
    layer = Layer(kind)

    def run() -> None:
        with undisturbed(layer):
            layer.numbers().mul_(3), layer.seen.add_(1)
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(ArithmeticError, match="in the pass"):
            run()
    assert layer.numbers().tolist() == [1, 2]
    assert layer.seen.tolist() == [0, 0]


def test_memory_that_a_refusing_weight_was_given_in_the_pass_goes() -> None:
    layer = Layer(Refusing)
    memory = layer.numbers().data_ptr()
    with undisturbed(layer), torch._C.DisableTorchFunctionSubclass():
        layer.weight.data = torch.tensor([5.0, 6.0])
    assert layer.numbers().data_ptr() == memory
    assert layer.numbers().tolist() == [1, 2]


class Stuck(nn.Module):
    """Cannot go back to training mode."""

    def train(self, mode: bool = True) -> Stuck:
        if mode:
            raise RuntimeError("no way back")
        return super().train(mode)


@pytest.mark.parametrize("raised", [False, True])
def test_what_can_be_put_back_is_put_back_though_a_part_fails(raised: bool) -> None:
    net = nn.Sequential(Stuck(), nn.Dropout(), nn.BatchNorm1d(2))

    def run() -> None:
        with undisturbed(net):
            net[2].running_mean.add_(1)
            if raised:
                raise ArithmeticError("in the pass")

    # What the body raised is what the user must read.
    kind, words = (ArithmeticError, "in the pass") if raised else (RuntimeError, "no way back")
    with pytest.raises(kind, match=words):
        run()
    assert net[1].training
    assert net[2].running_mean.tolist() == [0, 0]
