"""Lightning's strategies that spread weights over processes, on CPUs, and the plans that they follow."""

import importlib
from typing import Any

import torch
from torch import nn


def strategy(namespace: str, name: str) -> Any:
    """Make a strategy by name: ``fsdp…``, or ``DxT…``, D data-parallel times T tensor-parallel."""
    strategies = importlib.import_module(namespace + ".strategies")
    if not name.startswith("fsdp"):
        data, tensor = map(int, name.partition(" ")[0].split("x"))
        return strategies.ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor)

    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    class Double(importlib.import_module(namespace + ".plugins").FSDPPrecision):
        """As 32-true, in float64."""

        mixed_precision_config = MixedPrecision(*[torch.float64] * 3)

        def __init__(self) -> None:
            super().__init__("32-true")
            self._desired_input_dtype = torch.float64

        def convert_module(self, module: nn.Module) -> nn.Module:
            return module.double()

    class CPUFSDPStrategy(strategies.FSDPStrategy):
        """Lightning refuses its own class without a GPU, and torch a model without a device."""

        def _setup_model(self, model: nn.Module) -> nn.Module:
            return FullyShardedDataParallel(
                model,
                device_id=torch.device("cpu"),
                mixed_precision=self.mixed_precision_config,
                sharding_strategy=self.sharding_strategy,
                **self.kwargs,
            )

    wrapped = {"fsdp linear": {nn.Linear}, "fsdp block": {nn.Sequential, nn.Linear}}.get(name)
    return CPUFSDPStrategy(auto_wrap_policy=wrapped, precision_plugin=Double())


def parallelise(net: nn.Sequential, mesh: Any, name: str) -> None:
    """Spread a chain of linear layers (0, 2, 4, …), as a user does in ``configure_model``."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if mesh["tensor_parallel"].size() > 1:
        whole = {"output_layouts": Replicate()}
        kept = whole | {"use_local_output": False}
        plans = {
            # What lies between the two layers is in parts, as a DTensor or not, or whole.
            "dtensor": {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()},
            "parts": {"0": ColwiseParallel(), "2": RowwiseParallel()},
            "replicated": {"0": ColwiseParallel(**kept), "2": ColwiseParallel(**whole)},
            "whole": {"0": ColwiseParallel(**whole), "2": ColwiseParallel(**whole)},
        }
        parallelize_module(net, mesh["tensor_parallel"], plans[name.partition(" ")[2]])
    if mesh["data_parallel"].size() > 1:
        for part in (*net, net):
            if any(True for _ in part.parameters()):
                fully_shard(part, mesh=mesh["data_parallel"])
