"""What processes agree on, without starting any."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_koopman.callback.trainer_facts import (
    data_part,
    refuse_sharded_weights,
    samples_for_rank,
    unrepeated_samples,
)
from lightning_koopman.koopman.moments import Layout, accumulate, recentred
from lightning_koopman.measurement.processes import Chain, ProcessError, Share, agreed, exchange


def test_recentred_moments_are_those_about_the_new_offset():
    layout = Layout((3, 4, 2), 3)
    states = [torch.randn(30, d, dtype=torch.float64) for d in layout.dims]
    shifts = [torch.randn(d, dtype=torch.float64) for d in layout.dims]
    folds = torch.arange(30) % 3
    given, expected = layout.zeros(), layout.zeros()
    accumulate(layout, given, states, folds)
    accumulate(layout, expected, [s + a for s, a in zip(states, shifts, strict=True)], folds)
    torch.testing.assert_close(recentred(layout, given, shifts), expected, rtol=1e-12, atol=1e-12)


def test_processes_that_ran_other_components_are_told_apart():
    chains = [Chain(("input", name), (2, 3)) for name in "ab"]
    shares = [Share(), *(Share(chain, 4) for chain in chains)]
    with pytest.raises(ProcessError, match=r"process 2 ran .*'b'.* process 1 .*'a'"):
        agreed(shares)
    assert agreed(shares[:2]) is shares[1]
    assert agreed([Share()]).count == 0


def test_the_error_of_one_process_is_told_in_all():
    with pytest.raises(ProcessError, match="process 1: ValueError: too wide"):
        agreed([Share(), Share(error="ValueError: too wide")])


@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (4, 1), (1, 4), (2, 2)])
def test_tensor_parallel_processes_share_a_part_of_the_data(data, tensor):
    def axis(size: int, rank: int) -> SimpleNamespace:
        return SimpleNamespace(size=lambda: size, get_local_rank=lambda: rank)

    parts = []
    for rank in range(data * tensor):
        mesh = {
            "data_parallel": axis(data, rank // tensor),
            "tensor_parallel": axis(tensor, rank % tensor),
        }
        mesh = type("Mesh", (dict,), {"mesh_dim_names": tuple(mesh)})(mesh)
        strategy = SimpleNamespace(device_mesh=mesh)
        trainer = SimpleNamespace(strategy=strategy, global_rank=rank, world_size=data * tensor)
        parts.append(data_part(trainer))
    assert [p.index for p in parts if p.counts] == list(range(data))
    assert [p.index for p in parts] == [rank // tensor for rank in range(data * tensor)]
    assert {p.count for p in parts} == {data}


def test_several_processes_without_torch_distributed_are_refused():
    with pytest.raises(RuntimeError, match=r"torch.distributed was not started.*ddp"):
        exchange(Share())


@pytest.mark.parametrize("n_processes", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_shares_add_up(n_processes, count):
    assert sum(samples_for_rank(count, n_processes, rank) for rank in range(n_processes)) == count


def test_repeated_samples_of_a_distributed_sampler_do_not_count():
    data = TensorDataset(torch.arange(11))
    seen: list[int] = []
    for rank in range(4):
        sampler = DistributedSampler(data, num_replicas=4, rank=rank, shuffle=True)
        loader = DataLoader(data, sampler=sampler)
        seen += list(sampler)[: unrepeated_samples(loader)]
    assert sorted(seen) == list(range(11))
    assert unrepeated_samples(DataLoader(data)) > 1e9


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_an_extra_pass_over_sharded_weights_is_refused(name):
    strategy = type("Mine", (type(name, (), {}),), {})()
    with pytest.raises(RuntimeError, match=r"Mine shards the weights.*validation loop"):
        refuse_sharded_weights(SimpleNamespace(strategy=strategy))
    refuse_sharded_weights(SimpleNamespace(strategy=object()))
