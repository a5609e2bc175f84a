"""A pretended device: how far results on it are from those on the CPU, and how often it is waited for.

A tensor there holds one on the CPU. As on a GPU, an operation on tensors of two devices is an error; as
on MPS, float64 is, unless ``--float64`` lets the device be like a GPU of NVIDIA's. Run as a script, for
the device stays registered for the rest of the process.
"""

from __future__ import annotations

import copy
import json
import sys
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
from lightning_koopman.koopman.options import Options
from lightning_koopman.measurement import accumulator
from lightning_koopman.measurement.measurement import Measurement
from lightning_koopman.network import tensors as network_tensors
from lightning_koopman.network.axes.padding import valid_positions
from lightning_koopman.network.runs.recording import Recording
from lightning_koopman.network.runs.steps import Part

NAME = "pretended"
FLOAT64 = "--float64" in sys.argv
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
# What asks a device for a number, or for the size of what it makes.
ASKING = {
    *(aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default),
    *(aten.masked_select.default, aten.bincount.default, aten.repeat_interleave.Tensor),
    *(aten._unique2.default, aten.unique_consecutive.default, aten.unique_dim.default),
    *(aten._linalg_eigh.default, aten.linalg_cholesky_ex.default, aten._linalg_svd.default),
}
waits: list[str] = []


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class Pretended(Tensor):
    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        if held.dtype == torch.float64 and not FLOAT64:
            raise TypeError(f"the {NAME} device has no float64")
        shown = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=torch.device(NAME, 0)
        )
        shown.held = held
        return shown

    def tolist(self) -> Any:  # torch refuses subclasses
        waits.append("tolist")
        return self.held.tolist()

    def __matmul__(self, other: Tensor) -> Tensor:  # torch squeezes in place, which shows nobody
        return torch.mm(self[None], other)[0] if self.ndim == 1 else super().__matmul__(other)

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
    if is_waited_for(func, args, kwargs, any(there), stays):
        waits.append(str(func))
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


def is_waited_for(func: Any, args: Any, kwargs: dict[str, Any], was: bool, stays: bool) -> bool:
    """Tell whether the device is waited for, as a GPU would be."""
    if func in MOVES:
        later = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        both = func is aten.copy_.default and not all_there(args)
        return (was != stays or both) and not later
    masks = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor) and x.dtype == torch.bool]
    chosen = func in (aten.index.Tensor, aten.index_put_.default) and bool(masks)
    return was and (chosen or func in ASKING)


def all_there(args: Any) -> bool:
    return all(isinstance(leaf, Pretended) for leaf in tree_leaves(args) if isinstance(leaf, Tensor))


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
        given = lk.credit_report(model, batches, options=lk.Options(**options))
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


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 24)
        self.first, self.second = (
            nn.TransformerEncoderLayer(24, 2, 32, 0.0, batch_first=True) for _ in "ab"
        )
        self.head = nn.Linear(24, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor, lengths: Tensor) -> Tensor:
        x = self.second(self.first(self.embed(ids)))
        return self.head(x.mean(dim=1))


def networks() -> Iterator[tuple[str, nn.Module, list[Any], dict[str, Any]]]:
    """Networks and batches of 16 samples: wide states, pooled ones, sequences with marked padding."""
    torch.manual_seed(0)
    rows = [torch.randn(16, 20) for _ in range(12)]
    yield "wide", nn.Sequential(nn.Linear(20, 90), nn.Tanh(), nn.Linear(90, 5)), rows, {}
    images = [torch.randn(16, 3, 9, 9) for _ in range(12)]
    conv = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(150, 4)
    )
    yield "pooled", conv, images, {}
    lengths = [torch.randint(1, 7, (16,)).index_fill_(0, torch.tensor([3]), 6) for _ in range(12)]
    marks = [{"attention_mask": (torch.arange(6) < n[:, None]).long(), "lengths": n} for n in lengths]
    texts = [{"ids": torch.randint(0, 30, (16, 6)), **mark} for mark in marks]
    yield "masked", Attention().eval(), texts, {}
    lengths_first = [
        {"ids": t["ids"], "lengths": t["lengths"], "attention_mask": t["attention_mask"]} for t in texts
    ]
    yield "lengths", Attention().eval(), lengths_first, {"reduce": "last"}


def moved(batch: Any) -> Any:
    return (
        {name: part.to(NAME) for name, part in batch.items()}
        if isinstance(batch, dict)
        else batch.to(NAME)
    )


def run_on(model: nn.Module, batch: Any) -> None:
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)


def waits_of_measuring(model: nn.Module, batches: list[Any], options: dict[str, Any]) -> list[list[int]]:
    """Count for each batch how often the device was waited for, and the blocks of rows added up."""
    measurement, counts = Counting(model, options=Options(max_dim=16, **options)), []
    for batch in batches:
        waits.clear()
        before = measurement.added
        measurement.start_pass(batch)
        with measurement.capture:
            run_on(model, batch)
        measurement.end_pass()
        counts.append([len(waits), measurement.added - before])
    return counts


def waits_of_recording(model: nn.Module, batches: list[Any]) -> list[int]:
    """Count how often the device is waited for while the calls of steps are recorded."""
    recording, counts = Recording(model, dict(model.named_children())), []
    for batch in batches:
        waits.clear()
        with recording:
            recording.keep([Part({})], valid_positions(batch))
            run_on(model, batch)
            recording.end_step()
        counts.append(len(waits))
    return counts


class Counting(Measurement):
    """Counts the blocks of rows that were added up."""

    added = 0

    def _sum(self, states: list[Tensor], keys: Tensor) -> None:
        self.added += 1
        super()._sum(states, keys)


def waited_for() -> Iterator[tuple[str, Any]]:
    network_tensors._ORDERED.add(NAME)
    accumulator._MOST_ROWS = 32
    with Device():
        x = torch.ones(3).to(NAME)
        probes = (x.sum().item, lambda: bool(x.any()), x.tolist, x.cpu, lambda: x[x > 0], x.nonzero)
        for probe in probes:
            waits.clear()
            probe()
            assert waits, probe
        for name, model, batches, options in networks():
            model, batches = model.to(NAME), [moved(batch) for batch in batches]
            yield name, waits_of_measuring(model, batches, options)
            yield f"{name}, recorded", waits_of_recording(model, batches)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    print(json.dumps(dict(waited_for() if "--waits" in sys.argv else deviations())))
