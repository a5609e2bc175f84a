"""Models whose weights are spread over processes, on two gloo processes."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import warm
from torch import Tensor, nn
from torch.multiprocessing import start_processes

from lightning_koopman import credit_report

pytestmark = pytest.mark.slow


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def batches() -> list[Tensor]:
    return list(torch.randn(200, 6, generator=torch.Generator().manual_seed(1)).split(50))


def fully_sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net, mesh = Net(), init_device_mesh("cpu", (2,))
    for part in (net.up, net.down, net.head, net):
        fully_shard(part, mesh=mesh)
    return net


def tensor_parallel(kind: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2,))
    whole = ColwiseParallel(output_layouts=Replicate())
    plans = {
        "replicated": {"up": whole, "down": whole},
        "replicated dtensor": {
            "up": ColwiseParallel(output_layouts=Replicate(), use_local_output=False),
            "down": whole,
        },
        "dtensor": {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()},
        "parts": {"up": ColwiseParallel(), "down": RowwiseParallel()},
    }
    return parallelize_module(Net(), mesh, plans[kind])


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


KINDS = ("fsdp", "replicated", "replicated dtensor", "dtensor", "parts")


def measured(kind: str) -> dict[str, Any] | str:
    model = fully_sharded() if kind == "fsdp" else tensor_parallel(kind)
    # What the strategy itself hooks in is there before as well.
    before, own_hooks = dict(model.named_parameters()), hooks(model)
    try:
        report = credit_report(model, batches())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    given = {"credit": report.credit, "r2": report.r2, "total": report.total}
    given |= {"widths": report.widths, "notes": report.notes, "hooks": hooks(model) - own_hooks}
    return given | {"kept": all(p is before[name] for name, p in model.named_parameters())}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    warnings.simplefilter("ignore")
    torch.save({kind: measured(kind) for kind in KINDS}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(once):
    folder = once(
        "ranks", lambda folder: start_processes(work, (str(folder),), 2, start_method=warm.METHOD)
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS[:3])
def test_sharded_weights_give_the_report_of_one_process(kind, ranks):
    expected = credit_report(Net(), batches())
    for given in (rank[kind] for rank in ranks):
        assert isinstance(given, dict), given
        assert given["widths"] == expected.widths
        np.testing.assert_allclose(given["credit"], expected.credit, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(given["r2"], expected.r2, rtol=1e-4, atol=1e-5)
        assert given["total"] == pytest.approx(expected.total, abs=1e-5)
        assert given["kept"]
        assert given["hooks"] == 0
        # The collective that gathers a replicated output is not followed, and the report says so.
        unfollowed = [note for note in given["notes"] if "could not be followed" in note]
        assert len(unfollowed) == len(given["notes"]) == (kind == "replicated")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dtensor", "the state of 'up' is a DTensor of which each process holds a part"),
        ("parts", "component 'up' gave 4 of its 8 units, and other processes the rest"),
    ],
)
def test_states_of_which_each_process_holds_a_part_are_refused(kind, message, ranks):
    for given in (rank[kind] for rank in ranks):
        assert given.startswith(f"ValueError: {message}. Under tensor parallelism")
        assert "output_layouts=Replicate()" in given
