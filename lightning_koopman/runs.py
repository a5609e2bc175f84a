"""Runs a model over batches while chosen sites are read or replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.forward import ForwardFn, default_forward, to_device
from lightning_koopman.isolation import random_states_kept
from lightning_koopman.sites import Alteration, Site, Sites
from lightning_koopman.tensors import exact_device, first_tensor


class Runner:
    """Runs a model over the same batches again and again.

    Args:
        model: The model.
        batches: What ``forward_fn`` takes.
        forward_fn: Called as ``forward_fn(model, batch)``; ``None`` calls the model on the input.

    Raises:
        ValueError: If the model's device has no float64.
    """

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
        """Run once over all batches.

        Args:
            read: Sites to read.
            alter: What to put in place of what calls give out.
            update: Called with what was read in each pass.

        Returns:
            The model's outputs, one tensor a batch, on the CPU.

        Raises:
            ValueError: If the model gives no tensor, or a site to read did not run.
        """
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
        """Run once over one batch.

        Args:
            batch: One of ``batches``.
            read: Sites to read.
            alter: What to put in place of what calls give out.

        Returns:
            The model's output, as it comes, and what was read.

        Raises:
            ValueError: If the model gives no tensor, or a site to read did not run.
        """
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
        """Take what was read in one pass.

        Args:
            values: Tensors by site, each ``(n_samples, ...)``.
        """
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
    """Give each sample of a batch one row.

    Args:
        tensor: A state, or something of its shape.
        n_samples: Samples of the batch, by the network's output.
        name: The component, for errors.

    Returns:
        Shape ``(n_samples, D)``, at least float32.

    Raises:
        ValueError: If the tensor does not hold an equal number of entries for each sample.
    """
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
