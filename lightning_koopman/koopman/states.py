"""Turns rows into state vectors: a frozen POD basis, lifts, a key per sample."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_koopman.koopman.lifts import Lift, Observables, fit_lift, lifted_by
from lightning_koopman.koopman.moments import add_square
from lightning_koopman.koopman.regression import product
from lightning_koopman.network.tensors import exact_device, varies


def sample_keys(rows: Tensor, seed: int = 0) -> Tensor:
    """Hash each row's bits, so that a sample's fold depends on nothing but its content.

    Batch size, order and process do not matter then, and a sample that appears twice (augmentation,
    padding of a distributed sampler) is never held out from its own copy.
    """
    odd = _odd_numbers(rows.shape[1], seed, rows.device)
    hashed = []
    # Few enough rows at once for the cache of a CPU; many more make a device busy.
    values = 2**16 if rows.device.type == "cpu" else 2**24
    for part in torch.split(rows, max(1, values // max(1, rows.shape[1]))):
        # Adding zero turns -0.0 into 0.0.
        bits = part.to(torch.float64, copy=True).add_(0.0).contiguous().view(torch.int64)
        # Round numbers differ in their leading bits only, which a product alone never carries downward.
        hashed.append(bits.bitwise_xor_(bits >> 32).mul_(odd).sum(dim=1))
    keys = torch.cat(hashed)
    for shift, factor in ((32, -7046029288634856825), (29, -4417276706812531889)):
        keys = (keys ^ (keys >> shift)) * factor
    return (keys >> 16) & (2**40 - 1)


@functools.lru_cache(maxsize=8)
def _odd_numbers(count: int, seed: int, device: torch.device) -> Tensor:
    """Draw what the bits of each column are multiplied by."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(-(2**62), 2**62, (count,), generator=generator, device="cpu")
        return (drawn * 2 + 1).to(device)


@dataclass(frozen=True)
class Basis:
    """What freezes the coordinates of a chain's state vectors.

    Attributes:
        vectors: POD basis of each state, ``(D_i, d_i)``; ``None`` where the state is kept whole.
        kept_variance: Share of each state's variance that its basis keeps of the rows it was fitted to.
        center: Mean of each state in the new coordinates, ``(d_i,)``.
        lifts: What each state is lifted by; empty where none is, or the user's function does it.
    """

    vectors: tuple[Tensor | None, ...]
    kept_variance: tuple[float, ...]
    center: tuple[Tensor, ...]
    lifts: tuple[Lift | None, ...] = ()

    def like(self, rows: Sequence[Tensor]) -> Basis:
        """Convert the vectors once and for all to the types and places of the rows to come."""
        pairs = zip(self.vectors, rows, strict=True)
        return replace(self, vectors=tuple(v if v is None else v.to(block) for v, block in pairs))

    def cpu(self) -> Basis:
        """Return the basis on the CPU, to be kept beside a report."""
        vectors = tuple(None if v is None else v.cpu() for v in self.vectors)
        return replace(self, vectors=vectors, center=tuple(offset.cpu() for offset in self.center))

    def project(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Return rows in the coordinates of the basis, themselves where a state is kept whole."""
        return [
            block if vectors is None else block @ vectors.to(block)
            for block, vectors in zip(rows, self.vectors, strict=True)
        ]

    def spreads(self, rows: Sequence[Tensor], projected: Sequence[Tensor]) -> Tensor:
        """Return the sums that tell how much of the variance of some rows is kept, end to end.

        Of each state that is not kept whole they are the squares and the values, of the rows and of the
        projected ones. They stay on the device, in single precision where it has no other.
        """
        device, sums = rows[0].device, [rows[0].new_zeros(0)]
        exact = torch.float64 if exact_device(device) == device else torch.float32
        for vectors, *blocks in zip(self.vectors, rows, projected, strict=True):
            if vectors is None:
                continue
            for block in blocks:
                # Either sum would convert them by itself, and the two then take half as long again.
                values = block.to(exact)
                sums += [torch.dot(values.flatten(), values.flatten())[None], values.sum(dim=0)]
        return torch.cat([part.to(device, exact) for part in sums])

    @property
    def n_spreads(self) -> int:
        """How many sums :meth:`spreads` returns."""
        return sum(2 + sum(vectors.shape) for vectors in self.vectors if vectors is not None)

    def kept(self, spreads: Tensor, count: int) -> tuple[float, ...]:
        """Return the share of each state's variance that is kept of ``count`` rows, by their spreads."""
        shares, start = [], 0
        values = spreads.cpu()
        for vectors in self.vectors:
            if vectors is None:
                shares.append(1.0)
                continue
            variances = []
            for width in vectors.shape:
                square, total = values[start], values[start + 1 : start + 1 + width]
                variances.append(float(square - total.square().sum() / count))
                start += 1 + width
            whole, kept = variances
            shares.append(min(1.0, max(0.0, kept / whole)) if whole > 0 else 1.0)
        return tuple(shares)

    def lift(self, states: list[Tensor], observables: Observables) -> list[Tensor]:
        """Return state vectors in the lifted coordinates; the last one is never lifted."""
        if observables is None:
            return states
        lifted = [state.double() for state in states]
        if callable(observables):
            return [*(lifted_by(observables, state) for state in lifted[:-1]), lifted[-1]]
        return [
            state if lift is None else lift(state)
            for state, lift in zip(lifted, self.lifts, strict=True)
        ]


def fit_basis(
    rows: Sequence[Tensor],
    max_dim: int,
    observables: Observables = None,
    seed: int = 0,
    earlier: Basis | None = None,
    apart: Sequence[int] = (),
    joined: Sequence[Sequence[int]] = (),
) -> Basis:
    """Fit the coordinates of every state, and the centres and lifts in them, to some of its rows.

    Of a state that is too wide, the last ``apart`` columns have directions of their own, half of all at
    most: they count, however little they vary beside the others. So do those of the states ``joined``
    into it, of so many columns each, that are no wider than an equal share: they are kept whole. POD
    bases of an earlier measurement are kept where they fit: that spares the costliest part, and numbers
    of one epoch and the next are then about the same coordinates.
    """
    before: Sequence[tuple[Tensor | None, float]] = [(None, 0.0)] * len(rows)
    if earlier is not None and len(earlier.vectors) == len(rows):
        before = list(zip(earlier.vectors, earlier.kept_variance, strict=True))
    apart, joined = apart or [0] * len(rows), joined or [()] * len(rows)
    fitted = [
        (vectors, share)
        if _still_fits(block, max_dim, vectors, share)
        else (_basis_of_joined(block, max_dim, of) if of else _basis_in_parts(block, max_dim, columns))
        for block, columns, of, (vectors, share) in zip(rows, apart, joined, before, strict=True)
    ]
    vectors = tuple(basis for basis, _ in fitted)
    center = tuple(
        block.mean(dim=0, dtype=torch.float64)
        if v is None
        # Sums are taken about it, so any value near the mean will do.
        else (block.mean(dim=0) @ v.to(block)).double()
        for block, v in zip(rows, vectors, strict=True)
    )
    basis = Basis(vectors, tuple(share for _, share in fitted), center)
    if observables is None:
        return basis
    states = [state.double() for state in basis.project(rows)]
    if isinstance(observables, str):
        lifts = [fit_lift(state, observables, max_dim, seed=seed) for state in states[:-1]]
        basis = replace(basis, lifts=(*lifts, None))
    lifted = basis.lift(states, observables)
    return replace(basis, center=tuple(state.mean(dim=0) for state in lifted))


_LOST = 0.01
"""Share of the variance that a basis may lose of other rows on top of what it lost of its own."""


def _still_fits(rows: Tensor, max_dim: int, vectors: Tensor | None, share: float) -> bool:
    """Check whether an earlier basis keeps about as much variance as it kept when it was fitted."""
    if vectors is None or len(vectors) != rows.shape[1] or max_dim >= len(vectors):
        return False
    centred = rows - rows.mean(dim=0)
    kept, whole = (torch.linalg.vector_norm(part) for part in (centred @ vectors.to(rows), centred))
    return bool((kept >= math.sqrt(max(0.0, share - _LOST)) * whole) & whole.isfinite())


def pod_basis(rows: Tensor, max_dim: int) -> tuple[Tensor | None, float]:
    """Find the leading principal directions and the share of variance they keep.

    Rows in single precision are factored in it where all directions kept stand clear of its rounding:
    the space that they span then moves by less than states in single precision tell.
    """
    width = rows.shape[1]
    if width <= max_dim:
        return None, 1.0
    found = None if rows.dtype == torch.float64 else _principal(rows, max_dim, _CLEAR_OF_ROUNDING)
    found = found or _principal(rows.double(), max_dim, 1e-12)
    if found is None:
        return torch.eye(width, 1, dtype=torch.float64, device=rows.device), 1.0
    return found


def _basis_in_parts(rows: Tensor, max_dim: int, apart: int) -> tuple[Tensor | None, float]:
    """Find principal directions, those of the last columns ``apart`` from those of the others."""
    others, last = rows[:, : rows.shape[1] - apart], rows[:, rows.shape[1] - apart :]
    if rows.shape[1] <= max_dim or not varies(last) or not varies(others):
        return pod_basis(rows, max_dim)
    own = _directions(last, max_dim // 2)
    kept_others = _directions(others, max_dim - own.shape[1])
    vectors = torch.block_diag(kept_others, own)  # type: ignore[no-untyped-call]
    return vectors, _kept_of(rows, vectors)


def _basis_of_joined(rows: Tensor, max_dim: int, widths: Sequence[int]) -> tuple[Tensor | None, float]:
    """Find principal directions of the wide ones of several states, and keep the narrow ones whole."""
    narrow = [[width * len(widths) <= max_dim] * width for width in widths]
    whole = torch.tensor([*itertools.chain.from_iterable(narrow)], device=rows.device)
    others, n_whole = rows[:, ~whole], int(whole.sum())
    if rows.shape[1] <= max_dim or n_whole == 0 or not varies(others):
        return pod_basis(rows, max_dim)
    kept_others = _directions(others, max_dim - n_whole)
    vectors = rows.new_zeros(rows.shape[1], kept_others.shape[1] + n_whole)
    vectors[~whole, : kept_others.shape[1]] = kept_others
    vectors[whole, kept_others.shape[1] :] = torch.eye(n_whole, dtype=rows.dtype, device=rows.device)
    return vectors, _kept_of(rows, vectors)


def _kept_of(rows: Tensor, vectors: Tensor) -> float:
    """Return the share of the variance of rows that orthonormal directions keep."""
    centred = rows - rows.mean(dim=0)
    kept = torch.linalg.vector_norm(centred @ vectors) / torch.linalg.vector_norm(centred)
    return float(kept.square())


def _directions(rows: Tensor, count: int) -> Tensor:
    """Find at most ``count`` principal directions, all of them where there are no more."""
    vectors, _ = pod_basis(rows, count)
    if vectors is None:
        return torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return vectors.to(rows)


_CLEAR_OF_ROUNDING = 1e-5
"""Share of the largest variance above which single precision tells a direction from rounding."""


def _principal(rows: Tensor, max_dim: int, least: float) -> tuple[Tensor, float] | None:
    """Factor the covariance of rows in their own precision; ``None`` if nothing stands out.

    Kept are directions with more than the share ``least`` of the largest variance. Single precision
    gives up where there are fewer than asked for, for the rest may vary too.
    """
    centred = rows - rows.mean(dim=0)
    # The smaller of the two Gram matrices has the same non-zero spectrum.
    tall = rows.shape[0] >= rows.shape[1]
    gram = _upper_square(centred if tall else centred.T)
    try:
        values, vectors = torch.linalg.eigh(gram, UPLO="U")
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # In single precision LAPACK fails on many equal or vanishing directions, as one-hot data have.
        if rows.dtype == torch.float64:
            raise
        return None
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    kept = min(max_dim, int((values > least * values[0]).sum()))
    # Squares that underflow or overflow say nothing, either.
    tiny = len(rows) * torch.finfo(rows.dtype).tiny
    sound = rows.dtype == torch.float64 or (kept == max_dim and tiny < values.sum() < math.inf)
    if kept == 0 or not sound:
        return None
    if tall:
        basis = vectors[:, :kept]
    else:
        basis = product(centred.T, vectors[:, :kept] / values[:kept].sqrt()).contiguous()
        if rows.dtype != torch.float64:
            # Small directions, divided by their size, are orthogonal but roughly; so close to that, a
            # QR by Cholesky is stable, and many times faster than one by reflections.
            factor = torch.linalg.cholesky(_upper_square(basis), upper=True)
            identity = torch.eye(kept, dtype=basis.dtype, device=basis.device)
            basis = basis @ torch.linalg.solve_triangular(factor, identity, upper=True)
    return basis, float(values[:kept].sum() / values.sum())


def _upper_square(part: Tensor) -> Tensor:
    """Return ``part.T @ part``, of which what is below the diagonal must not be read."""
    square = part.new_zeros(part.shape[1], part.shape[1])
    add_square(square, part.T, upper=True)
    return square


def widest(
    widths: Sequence[int], seen: Sequence[int], max_dim: int, observables: Observables
) -> tuple[int, ...]:
    """Return how wide state vectors may get with more samples, of those that are so wide with some."""

    def lifted(width: int, now: int) -> int:
        kept = min(width, max_dim)
        if observables == "polynomial":
            return kept * (kept + 3) // 2
        if callable(observables) and kept == width:
            return now
        # Nobody knows what a function makes of more coordinates; most add as many.
        return kept + max_dim

    most = [min(width, max_dim) for width in widths]
    if observables is not None:
        most[:-1] = map(lifted, widths[:-1], seen[:-1])
    return tuple(map(max, most, seen))
