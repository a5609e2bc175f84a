"""Runs a model on batches as data loaders give them, while hook points are read or replaced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_koopman.network.hook_points import Alteration, Site, Sites
from lightning_koopman.network.isolation import random_states_kept
from lightning_koopman.network.tensors import exact_device, first_tensor

ForwardFn = Callable[[nn.Module, Any], Any]


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch as data loaders give it; what cannot be mapped is handed over whole."""
    if isinstance(batch, Mapping):
        return _call_by_name(model, batch)
    if isinstance(batch, tuple | list) and not isinstance(batch, PackedSequence) and batch:
        needed = _positional(model)
        if 1 < needed <= len(batch):
            return model(*batch[:needed])
        first = batch[0]
        # Inputs that come apart from their targets: ((a, b), y).
        if isinstance(first, tuple | list) and 1 < needed == len(first):
            return model(*first)
        alone = type(first) in (tuple, list) and len(first) == 1
        batch = first[0] if alone else first
        if isinstance(batch, Mapping):
            return _call_by_name(model, batch)
    if isinstance(batch, Tensor | PackedSequence):
        return model(batch)
    return _call_whole(model, batch, f"a batch of type {type(batch).__name__} arrived")


def _call_whole(model: nn.Module, batch: Any, arrived: str) -> Any:
    try:
        return model(batch)
    except Exception as error:
        raise ValueError(
            f"{arrived} and was handed over whole, but {type(model).__name__} raised "
            f"{type(error).__name__}: {error}; say how to run the model with "
            "forward_fn=lambda model, batch: ..."
        ) from error


def _positional(model: nn.Module) -> int:
    """How many arguments a model's ``forward`` cannot do without."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(p.kind in positional and p.default is p.empty for p in parameters)


def _call_by_name(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if takes_all and (_positional(model) != 1 or next(iter(parameters)) in batch):
        return model(**batch)
    given = {name: value for name, value in batch.items() if name in parameters}
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind is not inspect.Parameter.VAR_POSITIONAL and name not in given
    ]
    if (not given or takes_all) and _positional(model) == 1:
        return _call_whole(
            model, batch, f"a batch with the entries {list(batch)}, none of which forward takes, arrived"
        )
    if not given or missing:
        raise ValueError(
            f"the batch has the entries {list(batch)}, but {type(model).__name__}.forward takes "
            f"{list(parameters)}; say how to run the model with forward_fn=lambda model, batch: ..."
        )
    return model(**given)


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors of a nested batch."""
    if hasattr(value, "to") and callable(value.to):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: to_device(part, device) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(part, device) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(to_device(part, device) for part in value)
    return value


class Runner:
    """Runs a model over the same batches again and again."""

    def __init__(
        self, model: nn.Module, batches: Iterable[Any], forward_fn: ForwardFn | None = None
    ) -> None:
        with random_states_kept(batches):
            self.model, self.batches = model, list(batches)
        self.forward_fn = default_forward if forward_fn is None else forward_fn
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if exact_device(self._device) != self._device:
            raise ValueError(
                f"the model is on {self._device}, which has no float64; reports are made on the CPU "
                "then, but altering components needs the model there: call model.cpu() first"
            )

    def run(
        self,
        read: Iterable[Site] = (),
        alter: Mapping[str, Alteration] | None = None,
        update: Callable[[Mapping[Site, Tensor]], None] | None = None,
    ) -> list[Tensor]:
        """Run once over all batches."""
        read = list(read)
        outputs = []
        for batch in self.batches:
            output, values = self.run_batch(batch, read, alter)
            if update is not None:
                update(values)
            outputs.append(output.detach().cpu())
        return outputs

    def run_batch(
        self, batch: Any, read: Iterable[Site] = (), alter: Mapping[str, Alteration] | None = None
    ) -> tuple[Tensor, Mapping[Site, Tensor]]:
        """Run once over one batch."""
        read = list(read)
        with Sites(self.model, read, alter) as sites:
            sites.start_pass()
            given = self.forward_fn(self.model, to_device(batch, self._device))
        output = first_tensor(given)
        if output is None:
            raise ValueError(
                f"the model gave {type(given).__name__} with no floating-point tensor; return the "
                "outputs from forward_fn"
            )
        for site in read:
            if site not in sites.values:
                raise ValueError(
                    f"{site.call!r} did not run, though the report names it; pass the model and the "
                    "forward_fn that the report was measured with"
                )
        return output, sites.values


class UnitMoments:
    """Mean, standard deviation and shape of what sites give, as it streams by."""

    def __init__(self) -> None:
        self.shapes: dict[Site, tuple[int, ...]] = {}
        self._offset: dict[Site, Tensor] = {}
        self._sums: dict[Site, tuple[Tensor, Tensor]] = {}
        self._count: dict[Site, int] = {}

    def update(self, values: Mapping[Site, Tensor]) -> None:
        """Take what was read in one pass."""
        for site, value in values.items():
            rows = value.double()
            if site not in self._sums:
                self.shapes[site] = tuple(rows.shape[1:])
                self._offset[site] = rows.mean(dim=0)
                self._sums[site] = (torch.zeros_like(rows[0]), torch.zeros_like(rows[0]))
                self._count[site] = 0
            rows = rows - self._offset[site]
            self._sums[site][0].add_(rows.sum(dim=0))
            self._sums[site][1].add_(rows.square().sum(dim=0))
            self._count[site] += len(rows)

    def mean(self, site: Site) -> Tensor:
        """Give each unit's mean at a site."""
        return self._offset[site] + self._sums[site][0] / self._count[site]

    def std(self, site: Site) -> Tensor:
        """Give each unit's standard deviation at a site."""
        first, second = (total / self._count[site] for total in self._sums[site])
        return (second - first.square()).clamp_min(0).sqrt()


def rows_by_sample(tensor: Tensor, n_samples: int, name: str) -> Tensor:
    """Give each sample of a batch one row."""
    shape = tensor.shape
    second = len(shape) > 1 and shape[1] == n_samples != shape[0]
    if second or not shape or not n_samples or shape[0] % n_samples:
        raise ValueError(
            f"{name!r} gave a tensor of shape {tuple(shape)} for {n_samples} samples of the output, so "
            "effects cannot be told apart by sample; choose components with the samples along their "
            "first axis"
        )
    rows = tensor.reshape(n_samples, -1)
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
