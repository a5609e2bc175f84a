"""Lets the processes of one training agree on names, bases and moments, and on what went wrong.

Every process takes the same collectives in the same order, whatever happened to it: one small exchange
of names, counts and errors, one of the rows that fix the POD bases (only where a state is wider than
``max_dim``), and one sum of all moments. An error of one process travels in the next exchange, so that
all of them give up together and none waits for another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_koopman.koopman.states import Basis
from lightning_koopman.network.runs.samples import spread_over


class ProcessError(RuntimeError):
    """A measurement over several processes failed in another of them."""


@dataclass(frozen=True)
class Chain:
    """The states that batches are measured in, which must be the same in all batches and processes.

    Attributes:
        names: Names of the states; empty where no batch arrived.
        widths: Their widths before reduction.
        links: For each step, the states it reads; empty where each reads the one before it.
    """

    names: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    links: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Share:
    """What one process tells the others about its part of the samples.

    Attributes:
        chain: The states.
        count: Number of samples.
        center: Offsets that its moments are summed about; empty while rows wait for a basis.
        weights: Of the parts of sums, by unit, as far as rows tell; None where they are not weighed so.
        error: What went wrong, if anything did.
    """

    chain: Chain = Chain()
    count: int = 0
    center: tuple[Tensor, ...] = ()
    weights: Mapping[int, Tensor | None] = field(default_factory=dict)
    error: str | None = None


def exchange(share: Share) -> list[Share]:
    """Exchange the shares of all processes; a collective."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "several processes take part, but torch.distributed was not started, so their samples "
            "cannot be added up. Use a strategy that starts it (ddp), or measure in one process."
        )
    return gather(share)


def agreed(shares: Sequence[Share]) -> Share:
    """Find what all processes have in common."""
    _raise_for([share.error for share in shares])
    seen = {rank: share for rank, share in enumerate(shares) if share.count}
    if not seen:
        return Share()
    first_rank, first = next(iter(seen.items()))
    for rank, share in seen.items():
        chain, expected = share.chain, first.chain
        if chain != expected:
            raise ProcessError(
                f"process {rank} ran the components {chain.names} of widths {chain.widths}, process "
                f"{first_rank} {expected.names} of {expected.widths}. Choose components that run alike "
                "everywhere with components=[...]."
            )
    return first


def agree_on_basis(
    held_rows: Callable[[Sequence[int]], list[Tensor]],
    shares: Sequence[Share],
    max_dim: int,
    fit: Callable[[list[Tensor]], Basis],
) -> Basis:
    """Fit one basis to ``2 * max_dim`` samples from everywhere in all processes; a collective.

    A ``DistributedSampler`` deals samples out in turn, so these are the samples that a single process
    would take.
    """
    turns = sorted((i, rank) for rank, share in enumerate(shares) for i in range(share.count))
    turns = [turns[k] for k in spread_over(2 * max_dim, len(turns))]
    mine = [i for i, rank in turns if rank == dist.get_rank()]
    given: Any
    try:
        given = [rows.cpu() for rows in held_rows(mine)] if mine else []
    except Exception as error:
        given = f"{type(error).__name__}: {error}"
    gathered = gather(given)
    _raise_for([rows if isinstance(rows, str) else None for rows in gathered])
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            by_state = []
            for state in range(len(agreed(shares).chain.names)):
                rows = [iter(blocks[state] if blocks else ()) for blocks in gathered]
                by_state.append(torch.stack([next(rows[rank]) for _, rank in turns]))
            answer = [fit(by_state)]
        except Exception as error:
            answer = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(answer, src=0)
    if not isinstance(answer[0], Basis):
        _raise_for([answer[0]])
    basis: Basis = answer[0]
    return basis


def sum_moments(moments: Tensor, error: BaseException | None) -> Tensor:
    """Add up the numbers of all processes, in one row; one collective, which carries errors too."""
    failed = torch.full((1,), float(error is not None), dtype=moments.dtype, device=moments.device)
    packed = torch.cat([moments if error is None else torch.zeros_like(moments), failed])
    dist.all_reduce(packed)
    if error is not None:
        raise error
    if float(packed[-1]) > 0:
        raise ProcessError(
            f"{int(packed[-1])} of {dist.get_world_size()} processes could not add up their samples; "
            "their own messages say why"
        )
    return packed[:-1]


def gather(value: Any) -> list[Any]:
    """Collect what each process has; a collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree_on_latest(step: int, device: torch.device) -> int:
    """Find the largest number that a process gives; a collective."""
    latest = torch.tensor(step, device=device)
    dist.all_reduce(latest, dist.ReduceOp.MAX)
    return int(latest)


def _raise_for(errors: Sequence[str | None]) -> None:
    failed = {rank: error for rank, error in enumerate(errors) if error is not None}
    if failed:
        told = "; ".join(f"process {rank}: {error}" for rank, error in failed.items())
        raise ProcessError(f"the measurement was aborted, because it failed in {told}")
