"""Rows of every state in, moments kept, a report out; over the samples of one process or of all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lightning_koopman.koopman.credit import Credits, StateError, compute_credits, samples_needed
from lightning_koopman.koopman.moments import Layout, accumulate, covariances, recentred
from lightning_koopman.koopman.options import Options
from lightning_koopman.koopman.reference import FoldFits, Reference
from lightning_koopman.koopman.states import Basis, fit_basis, sample_keys, widest
from lightning_koopman.measurement.processes import Chain, Share, agree_on_basis, agreed, sum_moments
from lightning_koopman.network.access.isolation import plain_numerics
from lightning_koopman.network.names import INPUT, is_sum, listed
from lightning_koopman.network.runs.forward_runner import NO_SAMPLES
from lightning_koopman.network.runs.samples import spread_over
from lightning_koopman.network.tensors import exact_device, exactly
from lightning_koopman.report.report import CreditReport, build_report

SAMPLES = 4096
"""Most samples that are looked at where nobody says how many, unless wide states need more."""

MaxSamples = int | Literal["enough"] | None
"""Most samples to take: a number, as many as are enough, or all."""

_KEPT = 0.99
# Of a state's variance: less may move R² and nonlinearity by what is shown of them.

_ROUNDED = 2
# Spacings of numbers as large as a state that samples must differ by: less is rounding, to 2 % or more.

_FEW_KINDS = 4
# So many samples of each input, at least, make folds of few inputs.

_MOST_ROWS = 4096
_MOST_VALUES = 2**22
# Rows are gathered until a fold's share of them makes products fast, within this many values in all.


def _called(name: str) -> str:
    """Say what a state is of."""
    return "the network's input" if name == INPUT else f"component {name!r}"


def all_finite(blocks: Sequence[Tensor]) -> bool:
    """Check whether all values are finite; a finite sum has finite terms, and is found faster."""
    sums = torch.stack([block.sum().to(blocks[0]) for block in blocks])
    return all(map(math.isfinite, sums.tolist()))


class Accumulator:
    """Rows of every state in, moments kept, a report out.

    The first ``2 * max_dim`` samples fix, for every wider state, an orthonormal POD basis that stays
    frozen; all later samples are projected on it. Rows are gathered until the products over them are
    large enough to be fast, so memory is bounded by a fixed number of samples. Samples that may come
    sorted are held, as many as ``hold`` bytes allow, and so many from everywhere in them fix the bases.
    Where processes share the samples and must agree on one basis first, all are held until
    :meth:`merge`.

    Attributes:
        chain: The states and what each step reads, known from the first batch on.
        basis: The frozen coordinates of the state vectors.
        earlier: Coordinates of a measurement before, to be kept for every state that they still fit.
        apart: By state, how many of its last columns have directions of their own in the basis.
        joined: By state that several were joined into, how many columns each of these has.
        n_seen: Samples that arrived so far.
        n_samples: Samples taken so far.
        max_samples: Most that are taken; where that is ``"enough"``, known from the first batch on.
    """

    def __init__(
        self,
        options: Options,
        *,
        max_samples: MaxSamples = None,
        shared: bool = False,
        hold: int = 0,
    ) -> None:
        self.options = options
        self.chain = Chain()
        self.basis: Basis | None = None
        self.earlier: Basis | None = None
        self.apart: dict[str, int] = {}
        self.joined: dict[str, tuple[int, ...]] = {}
        # The weights of sums that all processes found.
        self._common: dict[int, Tensor] | None = None
        self._fitted: FoldFits | None = None
        self.n_seen = self.n_samples = 0
        self.max_samples = None if max_samples == "enough" else max_samples
        self._may_stop, self._shared, self._hold = max_samples == "enough", shared, hold
        self._layout: Layout | None = None
        self._credits: Credits | None = None
        self._moments: Tensor | None = None
        # What tells how much bases keep: of all samples, and of those of a block, on their device.
        self._spreads: Tensor | None = None
        self._fresh: Tensor | None = None
        # How many inputs differ among the first samples, and how many these are.
        self._kinds = 0, 0
        # Spacing of the numbers of each state, relative to their size; none where no sample was seen.
        self._spacings: tuple[float, ...] = ()
        # Smallest and largest value of each state, by batch, which only the device knows yet.
        self._extremes: list[tuple[int, Tensor]] = []
        self._held: list[list[Tensor]] = []
        self._block: list[Tensor] = []
        self._filled = self._batches = 0

    @property
    def waits(self) -> bool:
        """Whether rows are held until there is a basis."""
        max_dim, lift = self.options.max_dim, self.options.observables
        fitted = isinstance(lift, str) or any(width > max_dim for width in self.chain.widths)
        return (self._shared or self._hold > 0) and self.basis is None and fitted

    def push(
        self,
        rows: Mapping[str, Tensor],
        links: tuple[tuple[int, ...], ...] = (),
        told_by: Tensor | None = None,
    ) -> None:
        """Add one batch of rows by state, each ``(n_samples, D_i)``, in the order of the chain.

        The first batch says what each step reads. The folds are told by the rows of the first state, or
        by others as many, where samples come again otherwise. Values that are not finite are found at
        once on the CPU, and once a block is full on a device, which would otherwise be waited for in
        every batch.
        """
        batch, self._batches = self._batches, self._batches + 1
        self._check(rows, batch, links)
        if self._may_stop and self.max_samples is None:
            self.max_samples = max(SAMPLES, self.advised)
        arrived = next(iter(rows.values())).shape[0]
        room = arrived if self.max_samples is None else self.max_samples - self.n_samples
        taken = min(arrived, max(0, room))
        if taken:
            blocks = list(rows.values())
            # In front, what tells the folds.
            blocks.insert(0, blocks[0] if told_by is None else told_by)
            self._gather(blocks if taken == arrived else [block[:taken] for block in blocks])
        self.n_seen += arrived
        self.n_samples += taken

    def flush(self) -> None:
        """Add up what is still gathered."""
        self._let_go()
        if self._filled and self.basis is None:
            self._begin([block[: self._filled] for block in self._block])
        if self._filled:
            self._add([block[: self._filled] for block in self._block])
        self._block, self._filled = [], 0

    def _laid_out(self) -> Layout:
        """Return what the moments hold; there must be a basis."""
        if self._layout is None:
            assert self.basis is not None
            self._layout = self._layout_of(tuple(len(offset) for offset in self.basis.center))
        return self._layout

    def _layout_of(self, dims: tuple[int, ...]) -> Layout:
        links, delay = self.chain.links, self.options.delay
        # Links name all that a step reads: branches side by side do not read one another.
        sums = tuple(i for i, name in enumerate(self.chain.names) if is_sum(name))
        return Layout(dims, self.options.folds, 0 if links and delay == 1 else delay, links, sums=sums)

    def _gather(self, rows: list[Tensor]) -> None:
        """Add rows to those that wait for company."""
        if self.waits:
            self._held.append(rows)
            # All that came before is held, too.
            count = self.n_samples + len(rows[0])
            size = count * sum(part.nbytes for part in rows) // len(rows[0])
            if count >= 2 * self.options.max_dim and size > self._hold and not self._shared:
                self._let_go()
            return
        start = 0
        while start < len(rows[0]):
            size = len(self._block[0]) if self._block else self._block_size
            count = min(size - self._filled, len(rows[0]) - start)
            taken, start = [part[start : start + count] for part in rows], start + count
            if self.basis is not None:
                if not self._block:
                    self.basis = self.basis.like(taken[1:])
                # Wide rows do not wait: what is gathered are states, and the input that tells the folds.
                taken = [taken[0], *self._project(taken[1:])]
            if not self._block:
                self._block = [part.new_empty(size, part.shape[1]) for part in taken]
            for block, part in zip(self._block, taken, strict=True):
                block[self._filled : self._filled + count] = part
            self._filled += count
            if self._filled == size:
                if self.basis is None:
                    self._begin(self._block)
                else:
                    self._filled = 0
                    self._add(self._block)

    @property
    def _block_size(self) -> int:
        """Number of rows gathered before products over them are taken."""
        first = 2 * self.options.max_dim
        if self.basis is None:
            return first
        values = self.chain.widths[0] + sum(len(offset) for offset in self.basis.center)
        return max(first, min(_MOST_ROWS, _MOST_VALUES // values))

    def _fit_basis(self, rows: list[Tensor]) -> Basis:
        own, apart = self.options, [self.apart.get(name, 0) for name in self.chain.names]
        joined = [self.joined.get(name, ()) for name in self.chain.names]
        with plain_numerics(rows[0]):
            return fit_basis(rows, own.max_dim, own.observables, own.seed, self.earlier, apart, joined)

    def _freeze_basis(self, rows: Sequence[Tensor]) -> None:
        self._refuse_odd()
        self.basis = self._fit_basis([exactly(block) for block in rows])

    def _begin(self, rows: list[Tensor]) -> None:
        """Freeze the basis by the first rows, which then wait for company in it."""
        self._block, self._filled = [], 0
        self._freeze_basis(rows[1:])
        self._gather(rows)

    def _let_go(self) -> None:
        """Gather the rows that are held, by some of which the basis is frozen if there is none yet."""
        if self._held and self.basis is None:
            count = sum(len(rows[0]) for rows in self._held)
            self._freeze_basis(self.held_rows(spread_over(2 * self.options.max_dim, count)))
        # The last comes first off, and each is let go of when it is added up.
        held, self._held = self._held[::-1], []
        while held:
            self._gather(held.pop())

    def _add(self, rows: list[Tensor]) -> None:
        """Add up rows, which are in the basis already."""
        assert self.basis is not None
        self._refuse_odd()
        rows = [exactly(block) for block in rows]
        fresh, self._fresh = self._fresh, None
        if fresh is not None:
            fresh = exactly(fresh).double()
            self._spreads = fresh if self._spreads is None else self._spreads + fresh
        keys = sample_keys(rows[0], self.options.seed)
        if self._moments is None:
            first = keys[: 2 * self.options.max_dim]
            self._kinds = int((first.sort().values.diff() != 0).sum()) + 1, len(first)
        self._sum(self.basis.lift(rows[1:], self.options.observables), keys)

    def _project(self, rows: list[Tensor]) -> list[Tensor]:
        """Bring rows into the basis, and add up what tells how much of their variance it keeps."""
        assert self.basis is not None
        with plain_numerics(rows[0]):
            projected = self.basis.project(rows)
            spreads = self.basis.spreads(rows, projected)
            self._fresh = spreads if self._fresh is None else self._fresh.add_(spreads)
        return projected

    def _sum(self, states: list[Tensor], keys: Tensor) -> None:
        """Add state vectors to the moments, each sample to those of its fold."""
        assert self.basis is not None
        known, self._credits, self._fitted, layout = self._fitted, None, None, self._laid_out()
        with plain_numerics(keys):
            if self._moments is None:
                self._moments = layout.zeros().to(keys.device)
            elif known is not None:
                # A report that was given out may still be fitted to them.
                self._moments = self._moments.clone()
            accumulate(layout, self._moments, states, keys % layout.folds, self.basis.center)

    def _check(self, rows: Mapping[str, Tensor], batch: int, links: tuple[tuple[int, ...], ...]) -> None:
        if not self.chain.names:
            widths = tuple(block.shape[1] for block in rows.values())
            self.chain = Chain(tuple(rows), widths, links)
            self._spacings = tuple(torch.finfo(block.dtype).eps for block in rows.values())
        first = self.chain.names[0]
        n_samples = rows[first].shape[0]
        for (name, block), width in zip(rows.items(), self.chain.widths, strict=True):
            if block.shape[0] != n_samples:
                raise ValueError(
                    f"{_called(name)} has {block.shape[0]} rows in batch {batch}, but {first!r} "
                    f"has {n_samples}. Rows are samples: axis 0 must be the batch axis. Where rows are "
                    "pooled, as nodes are to graphs, let the batch hold the graph of each node, in "
                    "order, or name the components behind the pooling with components=[...]."
                )
            if block.shape[1] != width:
                raise ValueError(
                    f"{_called(name)} has {block.shape[1]} values per sample in batch {batch}, but "
                    f"{width} before. Bring the samples to one size, or take a reduction whose width "
                    "does not depend on it, such as reduce='mean'."
                )
        blocks = list(rows.values())
        at_once = all(block.device.type == "cpu" for block in blocks)
        if n_samples == 0 or (at_once and all_finite(blocks)):
            return
        dtype = torch.float32 if blocks[0].device != exact_device(blocks[0].device) else torch.float64
        extremes = [end.to(blocks[0].device, dtype) for block in blocks for end in block.aminmax()]
        self._extremes.append((batch, torch.stack(extremes)))
        if at_once:
            self._refuse_odd()

    def _refuse_odd(self) -> None:
        """Refuse values that are not finite, if any arrived since this was asked last."""
        seen, self._extremes = self._extremes, []
        if not seen:
            return
        table = torch.stack([extremes for _, extremes in seen]).cpu()
        if bool(torch.isfinite(table).all()):
            return
        for (batch, _), row in zip(seen, table.view(len(seen), -1, 2), strict=True):
            for name, ends in zip(self.chain.names, row, strict=True):
                if not bool(torch.isfinite(ends).all()):
                    kind = "NaN" if bool(torch.isnan(ends).any()) else "infinity"
                    if not all(bool(weight.float().isfinite().all()) for weight in self._weights(name)):
                        raise StateError(
                            f"{_called(name)} holds {kind} in batch {batch}, and its weights are not "
                            "finite either. Train with a lower learning rate, or in a wider type: in "
                            "half precision, the usual eps of Adam, 1e-8, is 0."
                        )
                    found = "" if name == INPUT else " or the layer (torch.autograd.set_detect_anomaly)"
                    raise (ValueError if name == INPUT else StateError)(
                        f"{_called(name)} holds {kind} in batch {batch}. Find the sample{found}, or "
                        "leave the batch out."
                    )

    def _weights(self, name: str) -> list[Tensor]:
        """Return what the weights of a component hold, as far as they are known here."""
        return []

    def _weights_of_sums(self) -> dict[int, Tensor | None]:
        """Find what sums weigh their parts with, ``(parts, width)``, as far as rows tell.

        ``None`` says that they are no sums of these, weighed by unit.
        """
        return {}

    def share(self) -> Share:
        """Return what the other processes must know of this one's samples."""
        self._refuse_odd()
        if not self.waits:
            self.flush()
        center = () if self.basis is None else self.basis.center
        offsets = tuple(offset.cpu() for offset in center)
        return Share(self.chain, self.n_samples, offsets, self._weights_of_sums())

    def held_rows(self, places: Sequence[int]) -> list[Tensor]:
        """Copy some of the rows that are held, one block per state."""
        each = [(batch, row) for batch in self._held for row in range(len(batch[0]))]
        chosen = [each[place] for place in places]
        return [
            torch.stack([batch[state][row] for batch, row in chosen])
            for state in range(1, len(self._held[0]))
        ]

    def merge(self, shares: Sequence[Share], device: torch.device) -> None:
        """Add up the samples of all processes; collectives that each of them must join."""
        common, error = agreed(shares), None
        own = None if self.basis is None else [offset.cpu() for offset in self.basis.center]
        self.chain = common.chain
        told = [pair for share in shares for pair in share.weights.items()]
        self._common = {i: weights for i, weights in told if weights is not None}
        for i, weights in told:
            known = self._common.get(i)
            if known is not None and (weights is None or not torch.allclose(weights, known, 1e-3)):
                del self._common[i]
        center = common.center
        if not center:
            max_dim = self.options.max_dim
            self.basis = agree_on_basis(self.held_rows, shares, max_dim, self._fit_basis)
            center = self.basis.center
            try:
                self.flush()
            except Exception as failure:
                error = failure
        if self.basis is None:
            self.basis = Basis((None,) * len(center), (1.0,) * len(center), center)
        layout = self._laid_out()
        moments = nothing = layout.zeros().to(device)
        try:
            if self._moments is not None:
                moments = self._moments.to(device)
                if own is not None:
                    shifts = [(a - b).to(moments) for a, b in zip(own, center, strict=True)]
                    moments = recentred(layout, moments, shifts)
                    self.basis = replace(self.basis, center=center)
        except Exception as failure:
            # The others wait in the sum, and hear of it there.
            moments, error = nothing, error or failure
        self._credits, self._fitted = None, None
        spreads = moments.new_zeros(self.basis.n_spreads) if self._spreads is None else self._spreads
        added = sum_moments(torch.cat([moments.flatten(), spreads.to(moments)]), error)
        self._moments = added[: moments.numel()].view_as(moments)
        self._spreads = added[moments.numel() :]

    @property
    def lasting_basis(self) -> Basis | None:
        """The basis for later measurements, and what share of all samples' variance it keeps.

        Of the rows that directions were fitted to they keep nearly all, and of others never as much.
        """
        if self.basis is None or self._spreads is None or self._moments is None:
            return self.basis
        found = self.basis.kept(self._spreads, int(self._moments[:, 0].sum()))
        before = () if self.earlier is None else self.earlier.kept_variance
        known = before if len(before) == len(found) else (None,) * len(found)
        shares = (
            own if own == old else min(own, share)
            for own, old, share in zip(self.basis.kept_variance, known, found, strict=True)
        )
        return replace(self.basis, kept_variance=tuple(shares))

    def moments(self) -> tuple[Layout, Tensor, tuple[Tensor, ...]]:
        """Return all that was added up, what it holds and the offsets that it is about."""
        self.flush()
        if self._moments is None or self.basis is None:
            raise ValueError(NO_SAMPLES)
        # On the CPU: see compute_credits.
        return self._laid_out(), self._moments.cpu(), self.basis.cpu().center

    def credits(self) -> Credits:
        """Compute all numbers of the samples so far."""
        layout, moments, center = self.moments()
        if self._credits is None:
            sums = self._operators_of_sums()
            self._credits = compute_credits(layout, moments, self.options, center=center, given=sums)
        return self._credits

    def _operators_of_sums(self) -> dict[int, Tensor]:
        """Return the operators of sums whose rows are those of what they read, weighed and added up."""
        assert self.basis is not None
        known = self._weights_of_sums() if self._common is None else self._common
        found: dict[int, Tensor] = {}
        # Of lifted states, a sum is none of the others.
        for i, weights in known.items() if self.options.observables is None else ():
            if weights is None:
                continue
            blocks, at = list[Tensor](), 0
            for p in self._laid_out().parents[i]:
                width = weights.shape[1]
                block = torch.zeros(self.chain.widths[p], width, dtype=torch.float64, device="cpu")
                if p in self.chain.links[i - 1]:
                    # Of a state that several were joined into, each is added.
                    count = self.chain.widths[p] // width
                    block = torch.cat([torch.diag(own) for own in weights[at : at + count]])
                    at += count
                for vectors, axis in ((self.basis.vectors[p], 0), (self.basis.vectors[i], 1)):
                    if vectors is not None:
                        vectors = vectors.double().cpu()
                        block = block @ vectors if axis else vectors.T @ block
                blocks.append(block)
            found[i] = torch.cat(blocks)
        return found

    @property
    def advised(self) -> int:
        """How many samples states of these widths need."""
        options, widths = self.options, self.chain.widths
        # Few samples make narrow states: as many as those need would be few again.
        seen = (1,) * len(widths) if self.basis is None else self._laid_out().dims
        dims = widest(widths, seen, options.max_dim, options.observables)
        return samples_needed(self._layout_of(dims))

    def credit_report(self, notes: Sequence[str], *, step: int | None = None) -> CreditReport:
        """Return the report, with the states that each component reads."""
        layout, moments, _ = self.moments()
        assert self.basis is not None
        assert self._spreads is not None
        options, names, n_samples = self.options, self.chain.names, int(moments[:, 0].sum())
        kept = self.basis.kept(self._spreads, n_samples)
        notes = list(notes)
        self._note_left_out(kept, notes)
        self._note_bent(layout, kept, notes)
        self._note_kinds(notes)
        self._note_rounded(layout, moments, notes)
        report = build_report(
            [names[i] for i in layout.components],
            self.credits(),
            layout,
            n_samples=n_samples,
            delay=options.delay,
            variance_kept=[kept[i] for i in layout.components],
            notes=notes,
            step=step,
            enough=self.advised,
        )
        reads = {name: tuple(names[p] for p in layout.parents[i]) for i, name in enumerate(names) if i}
        if options.errors is False:
            # Drift needs operators without each fold, as error bars do.
            return replace(report, reads=reads)
        return replace(report, reads=reads, reference=self.reference(step))

    def _note_kinds(self, notes: list[str]) -> None:
        """Tell where folds leave out all samples of some inputs, as of data of few kinds."""
        kinds, count = self._kinds
        if 0 < _FEW_KINDS * kinds <= count:
            notes.append(
                f"the first {count} samples have {kinds} different inputs, and folds leave out all "
                "samples of an input together: R² and errors are about inputs that were not seen before"
            )

    def _note_left_out(self, kept: Sequence[float], notes: list[str]) -> None:
        """Tell what the bases leave out, where that is enough to be read in the numbers."""
        cut = {n: share for n, share in zip(self.chain.names, kept, strict=True) if share < _KEPT}
        if cut:
            least = min(cut, key=lambda name: cut[name])
            notes.append(
                f"states keep less than {_KEPT:.0%} of their variance at "
                f"max_dim={self.options.max_dim}: {len(cut)} of {len(kept)}, {least!r} the least "
                f"({cut[least]:.1%}). What is left out counts as unexplained in what reads it, and not "
                "at all in the R² of what gives it; a larger max_dim keeps more"
            )

    def _note_bent(self, layout: Layout, kept: Sequence[float], notes: list[str]) -> None:
        """Tell of which sums more is unexplained than bases leave out."""
        found = {
            self.chain.names[i]: r2
            for i, r2 in self.credits().sums_r2.items()
            if r2 < min(kept[p] for p in (i, *layout.parents[i])) - (1 - _KEPT)
        }
        if found:
            least = min(found, key=lambda name: found[name])
            notes.append(
                f"what is added up in {listed(list(found))} does not explain all of it (of {least!r} "
                f"{found[least]:.1%}), as where functions or activations come between or weights differ "
                "from batch to batch; the rest is in no component's R² but in that of the chain"
            )

    def _note_rounded(self, layout: Layout, moments: Tensor, notes: list[str]) -> None:
        """Tell which states vary by hardly more than their numbers are rounded."""
        assert self.basis is not None
        found, (*_, last) = covariances(layout, moments.sum(dim=0)), self.chain.names
        each = zip(self.chain.names, found.means, self.basis.cpu().center, found.variances, strict=True)
        rounded = []
        for (name, mean, center, variances), spacing in zip(each, self._spacings, strict=False):
            # Lifted coordinates are rounded otherwise; the last state is never lifted.
            if self.options.observables is None or name == last:
                least = _ROUNDED * spacing * torch.linalg.vector_norm(mean + center)
                rounded += [name] if 0 < variances.sum() <= least.square() else []
        if rounded:
            notes.append(
                f"{listed(rounded)} vary between samples by hardly more than numbers of their size are "
                "rounded, so what is said of them, and of all that leads there, is about rounding"
            )

    def reference(self, step: int | None = None) -> Reference:
        """Return what drift is measured against, fitted once for all that was added up."""
        layout, moments, center = self.moments()
        assert self.basis is not None
        self._fitted = self._fitted or FoldFits(layout, moments, center, self._operators_of_sums())
        return Reference(
            self.chain.names,
            self.chain.widths,
            layout.parents[1:],
            self.basis.cpu(),
            self._fitted,
            n_samples=int(moments[:, 0].sum()),
            options=self.options,
            step=step,
        )
