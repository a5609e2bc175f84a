r"""Minimal linear dimension alignment: backward thin QR, aligned operators, log-volumes.

Let J_L = Q_L hold the output directions of interest and J_{i-1} = K_i J_i. With the thin QR
J_i = Q_i R_i, inserting the auxiliary layer Q_i Q_iᵀ behind component i

* is lossless: Q_i Q_iᵀ J_i = J_i;
* is minimal: a layer of rank below rank(J_i) cannot reproduce J_i;
* gives square operators K̃_i with K_i Q_i = Q_{i-1} K̃_i, whose |det| and the volumes
  sqrt det(J_iᵀ J_i) = |det R_i| do not depend on the bases chosen;
* is multiplicative: log|det R_{i-1}| = log|det K̃_i| + log|det R_i|.

Source: Liang et al. (2022), arXiv 2212.00998, names this stage; the construction is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_koopman.koopman.regression import product

RANK_RTOL = 1e-8
"""Singular values of a backward step below this share of its largest count as lost directions."""

_CLEARLY = 0.5
"""Bounds on singular values decide about a rank only this far from :data:`RANK_RTOL`."""

Operators = Sequence[Sequence[Tensor]]
"""For step i = 1 … L, one block of shape ``(d_p, d_i)`` a state p that it reads, the nearest first."""


class OneByOneError(Exception):
    """Of several chains at once, one may have lost a direction, so each must be aligned by itself."""


@dataclass(frozen=True)
class Alignment:
    """Aligned operators and volumes of a chain, or of several, which tensors then have an axis for.

    Attributes:
        bases: Q_0 … Q_L, each ``(d_i, r)``, with orthonormal columns where a state carries all
            directions.
        operators: K̃_1 … K̃_L, each ``(r, r)``, upper triangular; from the nearest state behind that
            carries all directions, and NaN where the state itself does not.
        factors: R_0 … R_L, each ``(r, r)``, with J_i = Q_i R_i.
        log_volumes: log|R_i[j, j]| by state and output direction, shape ``(L + 1, r)``, in nats; NaN
            where a state beside others does not carry the direction.
        lost: Indices of the states behind which an output direction stops to matter; empty where
            all directions asked for are kept.
        kept: Which columns of the outputs asked for are aligned, ascending, r of them.
    """

    bases: tuple[Tensor, ...]
    operators: tuple[Tensor, ...]
    factors: tuple[Tensor, ...]
    log_volumes: Tensor
    lost: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Number r of aligned directions."""
        return self.bases[0].shape[-1]

    def jacobian(self, state: int) -> Tensor:
        """Return J_i, how the chosen outputs answer to a state."""
        return product(self.bases[state], self.factors[state])


def align(
    operators: Operators, outputs: Tensor, parents: Sequence[Sequence[int]] | None = None
) -> Alignment:
    """Align a chain of operators of differing widths, backward from the outputs of interest.

    Where J_i has not full column rank, each column of ``outputs`` is dropped that adds nothing to those
    kept before it, unless other states lead around state i: then it is not followed through this one.
    Several chains at once, along an axis in front of all tensors, must keep all columns.

    Raises:
        OneByOneError: If one of several chains may have lost a direction.
    """
    if parents is None:
        parents = [range(i, i - len(blocks), -1) for i, blocks in enumerate(operators)]
    if unread := {*range(len(operators))}.difference(*parents):
        raise ValueError(f"no step reads state {min(unread)}; leave out what nothing goes on from")
    widths = {len(operators): outputs.shape[-2]}
    for step in range(len(operators), 0, -1):
        width = widths[step]
        if operators[step - 1][0].shape[-1] != width:
            raise ValueError(
                f"operator {step} gives {operators[step - 1][0].shape[-1]} values, but {width} were "
                "expected behind it"
            )
        for block, state in zip(operators[step - 1], parents[step - 1], strict=True):
            widths.setdefault(state, block.shape[-2])
    lost: list[int] = []
    kept = list(range(outputs.shape[-1]))
    while True:
        attempt, independent, state = _align(operators, outputs[..., kept], parents)
        if len(independent) == len(kept):
            return Alignment(*attempt, lost=tuple(lost), kept=tuple(kept))
        lost.insert(0, state)
        kept = [kept[column] for column in independent]


def _align(
    operators: Operators, outputs: Tensor, parents: Sequence[Sequence[int]]
) -> tuple[
    tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], Tensor], Sequence[int], int
]:
    """Go backward once; stop, and tell the independent columns, where a Jacobian has lost rank."""
    several, rank, last = outputs.shape[:-2], outputs.shape[-1], len(operators)
    identity = torch.eye(rank, dtype=outputs.dtype, device=outputs.device)
    # J_i = bases[i] R_i, where R_i is that of the nearest child where the state does not carry all.
    bases, factors = {last: outputs}, {last: identity}
    aligned: list[Tensor] = []
    logs = {last: outputs.new_zeros(*several, rank)}
    volumes = [logs[last]]
    readers: dict[int, dict[int, Tensor]] = {state: {} for state in range(last)}
    for child, (blocks, read) in enumerate(zip(operators, parents, strict=True), start=1):
        for block, state in zip(blocks, read, strict=True):
            readers[state][child] = block
    units, live, nearest = _Units(identity), [last], last
    for state in range(last - 1, -1, -1):
        steps = {child: product(block, bases[child]) for child, block in readers[state].items()}
        unit, jacobian, solved = _in_best_units(steps, units)
        needed = [c for c in live if min(parents[c - 1]) < state]
        if solved is None and not needed:
            return ((), (), (), torch.empty(0, device="cpu")), _independent(jacobian), state
        basis, triangle, inverse = solved or (jacobian, identity, identity)
        bases[state], factors[state] = basis, product(triangle, factors[unit])
        logs[state] = logs[unit] + triangle.diagonal(dim1=-2, dim2=-1).abs().log()
        units.add(state, unit, triangle, inverse)
        if solved is None:
            aligned.append(torch.full_like(identity, torch.nan))
            volumes.append(logs[unit] + _volumes(jacobian))
        else:
            aligned.append(units.told_in(nearest, [state])[state])
            volumes.append(logs[state])
            nearest = state
        live = [state, *needed]
        if live == [nearest]:
            units = _Units(identity)
    back = range(last + 1)
    parts = tuple(bases[i] for i in back), tuple(aligned[::-1]), tuple(factors[i] for i in back)
    return (*parts, torch.stack(volumes[::-1], dim=-2)), range(rank), 0


class _Units:
    """The triangles R_i of states, each told in units of that of another state behind it.

    Only ratios of two are formed. So every factor stays well scaled, and products of steps lose nothing
    where one branch is far weaker than another.
    """

    def __init__(self, identity: Tensor) -> None:
        self._identity = identity
        self._steps: dict[int, tuple[int, Tensor, Tensor]] = {}

    def add(self, state: int, unit: int, triangle: Tensor, inverse: Tensor) -> None:
        """Let R_state be a triangle times R_unit."""
        self._steps[state] = unit, triangle, inverse

    def told_in(self, unit: int, states: Iterable[int]) -> dict[int, Tensor]:
        """Return R_i R_unit^{-1} of some states, and of those on the way to them."""
        known, behind = {unit: self._identity}, unit
        for state in states:
            way = []
            while state not in known:
                if state < behind:
                    way.append(state)
                    state = self._steps[state][0]
                else:
                    further, _, inverse = self._steps[behind]
                    known[further] = self._times(inverse, known[behind])
                    behind = further
            for step in reversed(way):
                further, triangle, _ = self._steps[step]
                known[step] = self._times(triangle, known[further])
        return known

    def _times(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply, but for the identity, which is all there is in chains without skips."""
        if right is self._identity:
            return left
        return right if left is self._identity else product(left, right)


def _in_best_units(
    steps: dict[int, Tensor], units: _Units
) -> tuple[int, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """Return the child in whose units a Jacobian shows most directions, the Jacobian, and its factors.

    In units of a weak branch, what leads past it is so large that the branch itself is lost beside it; a
    direction is lost only if it is in the units of every child. ``steps`` holds K_c Q_c by child.
    """
    best, most = None, -1
    for unit in steps:
        ratios = units.told_in(unit, steps)
        paths = [s if c == unit else product(s, ratios[c]) for c, s in steps.items()]
        jacobian = sum(paths[1:], start=paths[0])
        if (solved := _triangular(jacobian)) is not None:
            return unit, jacobian, solved
        if (count := len(_independent(jacobian))) > most:
            best, most = (unit, jacobian, None), count
        if most == min(jacobian.shape):
            break
    assert best is not None
    return best


def _triangular(jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Thin QR and the inverse of its triangle; ``None`` where the columns are not independent."""
    rank = jacobian.shape[-1]
    if jacobian.shape[-2] < rank:
        return None
    basis, triangle = torch.linalg.qr(jacobian)
    identity = torch.eye(rank, dtype=jacobian.dtype, device=jacobian.device)
    inverse = torch.linalg.solve_triangular(triangle, identity, upper=True)
    # Singular values are computed only where norms leave it open whether any is below the cut-off.
    spread = float((torch.linalg.matrix_norm(triangle) * torch.linalg.matrix_norm(inverse)).max())
    if not spread * RANK_RTOL < _CLEARLY and len(_independent(jacobian)) < rank:
        return None
    return basis, triangle, inverse


def _volumes(jacobian: Tensor) -> Tensor:
    """What each column adds to those before it, in nats; NaN where it adds nothing."""
    volumes = jacobian.new_full((jacobian.shape[1],), torch.nan)
    if columns := list(_independent(jacobian)):
        triangle = torch.linalg.qr(jacobian[:, columns], mode="r").R
        volumes[columns] = triangle.diagonal().abs().log()
    return volumes


def _independent(jacobian: Tensor) -> Sequence[int]:
    """Columns that each add to those before them, all of them where the rank is full."""
    if jacobian.ndim > 2:
        raise OneByOneError
    if jacobian.numel() == 0:
        return ()
    values = torch.linalg.svdvals(jacobian)
    cutoff = float(RANK_RTOL * values[0])
    rank = int((values > cutoff).sum())
    if rank == jacobian.shape[1] or _clears(jacobian[:, :rank], cutoff):
        return range(rank)
    triangle = torch.linalg.qr(jacobian, mode="r").R
    columns: list[int] = []
    for column in range(jacobian.shape[1]):
        if len(columns) < rank and _clears(triangle[:, [*columns, column]], cutoff):
            columns.append(column)
    return columns


def _clears(columns: Tensor, cutoff: float) -> bool:
    return columns.shape[1] == 0 or float(torch.linalg.svdvals(columns)[-1]) > cutoff
