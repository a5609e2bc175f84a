"""A pretended device without float64, and how far results on it are from those on the CPU.

A tensor there holds one on the CPU. As on a GPU, an operation on tensors of two devices is an error; as
on MPS, float64 is. Run as a script, for the device stays registered for the rest of the process.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import lightning_koopman as lk

NAME = "pretended"
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class Pretended(Tensor):
    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        if held.dtype == torch.float64:
            raise TypeError(f"the {NAME} device has no float64")
        shown = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=torch.device(NAME, 0)
        )
        shown.held = held
        return shown

    def tolist(self) -> Any:  # torch refuses subclasses
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [isinstance(tensor, Pretended) for tensor in tensors]
    mixed = any(there) and any(not t and x.ndim for t, x in zip(there, tensors, strict=True))
    if mixed and func not in MOVES and func is not torch.ops.aten.index.Tensor:
        raise RuntimeError(f"{func} got tensors on {NAME} and on the CPU")
    device = kwargs.get("device")
    stays = any(there) if device is None else torch.device(device).type == NAME
    stays = there[0] if func is torch.ops.aten.copy_.default else stays
    if device is not None and stays:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, Pretended) else x, (args, kwargs))
    given = func(*args, **kwargs)
    known = {id(x.held): x for x in tensors if isinstance(x, Pretended)}

    def shown(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Pretended(value)

    return tree_map(shown, given) if stays else given


class Device(TorchDispatchMode):
    """Makes tensors on the pretended device, also by functions that take none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        there = device is not None and torch.device(device).type == NAME
        if there or any(isinstance(leaf, Pretended) for leaf in tree_leaves((args, kwargs))):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


Numbers = Callable[[nn.Module, list[Tensor]], list[Any]]


def report(**options: Any) -> Numbers:
    def measured(model: nn.Module, batches: list[Tensor]) -> list[Any]:
        given = lk.credit_report(model, batches, **options)
        return [*(getattr(given, n) for n in ("credit", "gain", "r2", "rank")), given.stderr["credit"]]

    return measured


def metric(model: nn.Module, batches: list[Tensor]) -> list[Any]:
    summed = lk.KoopmanCredit().to(batches[0].device)
    for batch in batches:
        summed.update([batch, model[0](batch), model(batch)])
    return [value.cpu() for value in summed.compute().values()]


def operator(model: nn.Module, batches: list[Tensor]) -> list[Any]:
    fitted = lk.fit_operator(batches[0], model(batches[0]).detach())
    return [fitted.matrix.cpu(), fitted.predict(batches[1]).cpu()]


def effects(model: nn.Module, batches: list[Tensor]) -> list[Any]:
    return [lk.component_effects(model, batches).values["skip"]]


TRIALS: dict[str, Numbers] = {
    "report": report(),
    "POD": report(max_dim=5),
    "lift": report(observables="rff"),
    "delay": report(delay=2),
    "metric": metric,
    "operator": operator,
    "bfloat16": report(),
    "effects": effects,
}


def deviations() -> Iterator[tuple[str, float | str]]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 9), nn.ReLU(), nn.Linear(9, 5), nn.Linear(5, 3)
    )
    samples = torch.randn(200, 6)
    for name, numbers in TRIALS.items():
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        model, batches = copy.deepcopy(net).to(dtype), list(samples.to(dtype).split(50))
        expected = numbers(copy.deepcopy(model), batches)
        try:
            with Device():
                given = numbers(model.to(NAME), [batch.to(NAME) for batch in batches])
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}"
        else:
            pairs = zip(given, expected, strict=True)
            yield name, max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    print(json.dumps(dict(deviations())))
