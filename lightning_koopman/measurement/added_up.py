"""Whether a state is what others give, added up: told by the rows of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_koopman.network.tensors import exactly

EXACT = 1e-5
"""Rounding, as a share, up to which rows tell what each unit of a part of a sum is multiplied by."""

_ALIKE = 1e-4
# Of such units, cosines that are nearer to 1 leave that open.

_WEIGHED = 0.25
# Parts of a sum whose weights differ from 1 by more are weighed, however coarsely the sum is rounded.

_MISSED = 0.1
# Rows that vary by less than ten times what their parts miss of that do not tell a sum: their values may
# be so large that rounding allows for any other ones.

_FIRST_COMPARED, _COMPARED = 64, 8
_MOST_COMPARED = 2**20
# Rows by which sums are compared with their parts: of the first batches, within so many values, and of
# each one behind them.


class AddedUp:
    """Compares rows of a sum with those of its parts, added up: the first ones, then some of each batch.

    Args:
        rounding: How far values may be off, as a share of the largest ones that were added.
    """

    def __init__(self, rounding: float) -> None:
        self._rounding, self._fits, self._needed = rounding, True, 2
        self._first: list[tuple[Tensor, Tensor]] = []
        # None until the first rows are compared.
        self._shift: Tensor | None = None
        self._excess: Tensor = torch.zeros((), device="cpu")

    def see(self, own: Tensor, parts: Sequence[Tensor]) -> None:
        """Add rows of the sum and of its parts, of which each may be several side by side."""
        self._fits = self._fits and all(part.shape[1] % own.shape[1] == 0 for part in parts)
        if not self._fits:
            return
        if self._shift is not None:
            added = self._weighed([part[:_COMPARED] for part in parts])
            off = own[:_COMPARED] - added - self._shift
            allowed = torch.maximum(self._sizes, own[:_COMPARED].abs()).mul_(self._rounding)
            self._excess = torch.maximum(self._excess, off.abs_().sub_(allowed).amax())
            return
        most = max(2, min(_FIRST_COMPARED, _MOST_COMPARED // own.shape[1]))
        self._first.append((own[:most], _blocks([part[:most] for part in parts], own.shape[1])))
        if sum(len(rows) for rows, _ in self._first) >= max(most, self._needed):
            self._compare()

    def _compare(self) -> None:
        """Compare the first rows, if they are enough: two, or more where parts may be weighed."""
        owns, blocks = zip(*self._first, strict=True)
        added = torch.cat(blocks, dim=1)
        own = torch.cat(owns).to(added)
        self._sizes = added.abs().sum(dim=0).amax(dim=0)
        allowed = self._rounding * self._sizes
        varied, moved = added - added[:, :1], own - own[:1]
        off = moved - varied.sum(dim=0)
        # Where a part is hardly larger than the sum is rounded, rows together tell that it is weighed.
        spread = varied.square().sum(dim=1)
        told = spread > (self._rounding / 2) ** 2 * added.sum(dim=0).square().sum(dim=0)
        weighed = torch.where(told, (varied * off).sum(dim=1).square() / spread, 0).sum(dim=1)
        fits = _adds_up(off, moved, allowed)
        fits = fits & (weighed <= _WEIGHED**2 * torch.where(told, spread, 0).sum(dim=1)).all()
        self._factors = torch.ones_like(added[:, 0])
        if not fits and self._rounding <= EXACT:
            self._needed = 2 * len(added) + 1
            if len(own) < self._needed:
                return
            # One unit first: where it is no sum, all of them would take long for nothing.
            for units in (slice(1), slice(None)):
                part, whole = varied[..., units], moved[:, units]
                found = _weights(exactly(part).double(), exactly(whole).double())
                factors = self._factors[:, units] if found is None else found.to(added)
                off = whole - (factors[:, None] * part).sum(dim=0)
                fits = _adds_up(off, whole, allowed[units])
                if not fits:
                    break
            else:
                self._factors = factors
        self._shift = own[0] - (self._factors * added[:, 0]).sum(dim=0)
        self._excess, self._first = torch.where(fits, -torch.inf, torch.inf), []

    @property
    def tells(self) -> bool:
        """Whether rows were compared."""
        if self._shift is None and sum(len(rows) for rows, _ in self._first) > 1:
            self._compare()
        return self._shift is not None or not self._fits

    @property
    def weights(self) -> Tensor | None:
        """What parts are weighed with by unit, if the sum is that of its parts but for a shift."""
        holds = self.tells and self._fits and bool(self._excess <= 0)
        return self._factors.double().cpu() if holds else None

    def filled_in(self, parts: Sequence[Tensor]) -> Tensor | None:
        """Return rows of the sum that were not recorded, if those before tell them."""
        if self.weights is None:
            return None
        assert self._shift is not None
        return self._weighed(parts) + self._shift

    def _weighed(self, parts: Sequence[Tensor]) -> Tensor:
        return (self._factors[:, None] * _blocks(parts, self._factors.shape[1])).sum(dim=0)


def _adds_up(off: Tensor, moved: Tensor, allowed: Tensor) -> Tensor:
    """Check whether what parts miss of how a sum varies is rounding, and little beside it."""
    little = off.square().sum() <= _MISSED**2 * moved.square().sum()
    return (off.abs() <= allowed).all() & little


def _weights(parts: Tensor, own: Tensor) -> Tensor | None:
    """Fit the weights, by unit, that make a sum of its parts, if rows tell all of them."""
    gram = torch.einsum("knw,lnw->wkl", parts, parts)
    size = gram.diagonal(dim1=1, dim2=2).sqrt()
    # What does not vary has no weight.
    scale = torch.where(size > 0, size, torch.inf).reciprocal()
    gram = scale[:, :, None] * gram * scale[:, None] + torch.diag_embed((size == 0).to(gram))
    given = scale * torch.einsum("knw,nw->wk", parts, own)
    least = _ALIKE * torch.eye(len(parts), device="cpu").to(gram)
    if bool(torch.linalg.cholesky_ex(gram - least).info.any()):
        return None
    factor = torch.linalg.cholesky(gram)
    return (scale * torch.cholesky_solve(given[..., None], factor)[..., 0]).T


def _blocks(parts: Iterable[Tensor], width: int) -> Tensor:
    """Put the rows of what is added up behind each other, ``(parts, samples, width)``."""
    blocks = [block for part in parts for block in part.view(len(part), -1, width).unbind(1)]
    # Sums of half precision would be rounded themselves.
    return torch.stack(blocks).to(torch.promote_types(blocks[0].dtype, torch.float32))
