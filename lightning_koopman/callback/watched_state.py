"""What a validation ran with: the sums of its weights, and the modes and buffers of its first step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod

from lightning_koopman.callback.trainer_facts import refuse_sharded_weights
from lightning_koopman.measurement.processes import gather
from lightning_koopman.network.access.isolation import plain_numerics
from lightning_koopman.network.tensors import exact_device


class WatchedState:
    """Tells whether weights were changed since they were measured, and runs calls as validation did."""

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        # Of the first watched step, which may have written them.
        self._buffers: list[tuple[dict[str, Tensor | None], dict[str, Tensor]]] = []

    @property
    def is_known(self) -> bool:
        """Whether weights were looked at since the measurement began."""
        return bool(self._weights)

    def forget_weights(self) -> None:
        """Begin a measurement."""
        self._weights = []

    def copy_buffers(self, pl_module: Any) -> None:
        """Copy the buffers of modules, which a step may write."""
        # Those of compiled scripts are in no dictionary that could be put back.
        held = [m._buffers for m in pl_module.modules() if m._buffers and isinstance(m._buffers, dict)]
        plain = [{name: t for name, t in each.items() if type(t) is Tensor} for each in held]
        with plain_numerics(pl_module):
            copies = [{name: tensor.clone() for name, tensor in each.items()} for each in plain]
        self._buffers = list(zip(held, copies, strict=True))

    def put_back_buffers(self) -> None:
        """Let modules have the buffers that were copied, and let go of these."""
        for held, before in self._buffers:
            held.update(before)
        self._buffers = []

    def note_modes(self, pl_module: Any) -> None:
        """Remember which modules are in train mode."""
        self._modes = [(module, module.training) for module in pl_module.modules()]

    def note_weights(self, trainer: Any, pl_module: Any) -> None:
        """Remember what tells the weights of now."""
        self._weights = weight_sums(trainer, pl_module)

    def differs_here(self, trainer: Any, pl_module: Any) -> bool:
        """Check whether the weights are others than those that were measured."""
        return self.is_known and have_changed(self._weights, weight_sums(trainer, pl_module))

    def differs(self, trainer: Any, pl_module: Any) -> bool:
        """Check whether the weights are others in any process; each of them must call this."""
        changed = False
        try:
            changed = self.differs_here(trainer, pl_module)
        finally:
            if trainer.world_size > 1:
                changed = any(gather(changed))
        return changed

    def around(self, trainer: Any, *, modes: bool) -> Callable[[], AbstractContextManager[None]]:
        """Return what stands around recorded calls of a model that is put back behind them."""
        kept = self._modes if modes else []

        @contextmanager
        def around() -> Generator[None, None, None]:
            for module, mode in kept:
                if module.training != mode:
                    module.train(mode)
            with trainer.precision_plugin.forward_context():
                yield

        return around


def weight_sums(trainer: Any, pl_module: Any) -> list[Tensor]:
    """Sum up each parameter and saved buffer, and take its norm, which tells whether any was changed.

    Nothing waits for a device. Where each process holds a part of the weights, nothing is told.
    """
    try:
        refuse_sharded_weights(trainer)
    except RuntimeError:
        return []
    held: list[Tensor | None] = []
    for module in pl_module.modules():
        # Others are caches, and integers count: any pass may change them.
        saved = {*module._buffers.keys()} - {*module._non_persistent_buffers_set}
        own = dict(module._parameters.items()) | {name: module._buffers[name] for name in saved}
        for hook in module._forward_pre_hooks.values():
            # What a mask leaves of a weight is the weight, also once the mask is made permanent.
            if isinstance(hook, BasePruningMethod):
                name = hook._tensor_name
                weight, mask = own.pop(f"{name}_orig"), own.pop(f"{name}_mask")
                own[name] = weight.detach() * mask
        held += [own[name] for name in sorted(own)]
    return [_sums(tensor) for tensor in held if tensor is not None and _is_told(tensor)]


def _is_told(tensor: Tensor) -> bool:
    """Check whether a tensor holds real or complex numbers, or marks, all of them here."""
    if is_lazy(tensor) or tensor.is_meta:
        return False
    numbers = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
    return numbers and type(tensor.data) is Tensor and tensor.layout is torch.strided


def _sums(tensor: Tensor) -> Tensor:
    values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    dtype = torch.float64 if exact_device(tensor.device) == tensor.device else torch.float32
    values = values.float() if values.dtype == torch.bool else values
    return torch.stack([values.sum(dtype=dtype), torch.linalg.vector_norm(values, dtype=dtype)])


_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Share of a tensor's norm by which its sum, of this type, differs between devices at most."""


def have_changed(before: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    """Compare the sums of weights at two times."""
    if len(before) != len(now):
        return True
    for pair in zip(before, now, strict=True):
        old, new = (sums.cpu().double().nan_to_num() for sums in pair)
        if bool(((old - new).abs() > max(_ROUNDING[sums.dtype] for sums in pair) * old[1]).any()):
            return True
    return False
