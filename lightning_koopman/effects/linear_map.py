"""Linear maps between whole tensors, fitted on data as it streams by."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_koopman.koopman.operator import fit_operator
from lightning_koopman.koopman.regression import spectrum
from lightning_koopman.koopman.states import pod_basis
from lightning_koopman.network.forward_runner import MeanAndSpread

SEEN_FIRST = 2
"""POD bases are fixed by the first ``SEEN_FIRST * max_dim`` samples."""

_DECIDED = 1e-6
"""A sample whose leverage is nearer to 1 decides its own prediction wholly."""


@dataclass(frozen=True)
class LinearMap:
    """An affine map from the entries of one or more tensors to those of another.

    Attributes:
        bases: For each tensor taken in, the directions it is projected on, ``(D, k)``; ``None`` keeps
            all of them.
        x_mean: Mean of what is taken in, before projection, shape ``(ΣD,)``.
        matrix: Shape ``(Σk, D_out)``.
        y_mean: Mean of what is given out, shape ``(D_out,)``.
        shape: Shape of one sample of what is given out.
        covariance: Covariance of the projected inputs, shape ``(Σk, Σk)``.
        tikhonov: Ridge weight, in units of the projected inputs' mean variance.
        fitted_to: Projected inputs that the map was fitted to, about their mean, ``(n_samples, Σk)``.
    """

    bases: tuple[Tensor | None, ...]
    x_mean: Tensor
    matrix: Tensor
    y_mean: Tensor
    shape: tuple[int, ...]
    covariance: Tensor
    tikhonov: float
    fitted_to: Tensor

    @property
    def n_samples(self) -> int:
        """Samples that the map was fitted to."""
        return len(self.fitted_to)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Apply the map."""
        reduced = _projected(inputs, self.x_mean, self.bases)
        flat = reduced @ self.matrix.to(reduced) + self.y_mean.to(reduced)
        return flat.reshape(-1, *self.shape)

    def left_out(self, inputs: Sequence[Tensor], residuals: Tensor) -> Tensor:
        """Return what the residuals of samples that a map was fitted to are once each is left out of it.

        That is the residual over one minus the leverage, the share of its own prediction that a sample
        decides: exact for ridge regression on fixed projections. Where samples are fewer than directions
        and no ridge keeps them apart, that is 0/0; both then come from this map, as multiples of the
        ridge weight that cancel, which is the limit for small ones.
        """
        reduced = _projected(inputs, self.x_mean, self.bases)
        filters, values, vectors = (part.to(reduced) for part in self._spectrum)
        rotated = reduced @ vectors
        own = 1 - (1 + rotated.square() @ filters) / self.n_samples
        flat = residuals.reshape(len(own), -1) / own[:, None].to(residuals.device)
        decided = own < _DECIDED
        if decided.any():
            rotated = rotated[decided] / values
            weights = (rotated.square() * values) @ filters / self.n_samples
            exact = rotated @ (vectors.T @ self.matrix.to(reduced)) / weights[:, None]
            flat[decided] = exact.to(flat)
        return flat.reshape(residuals.shape)

    @functools.cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inverse eigenvalues under the ridge, eigenvalues and eigenvectors of the inputs."""
        problem = spectrum(self.covariance, self.covariance)
        return problem.filters(self.tikhonov), problem.values, problem.vectors

    @property
    def leverage(self) -> Tensor:
        """Share of its own prediction that each sample of the fit decides."""
        filters, _, vectors = self._spectrum
        return (1 + (self.fitted_to @ vectors).square() @ filters) / self.n_samples

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return the map of a single tensor as one matrix and an offset."""
        matrix = self._unprojected(self.matrix)
        return matrix, self.y_mean - self.x_mean @ matrix

    def factors(self, variance: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the map of a single tensor as the product of two thin matrices, and an offset."""
        values, vectors = torch.linalg.eigh(self.covariance)
        root = values.clamp_min(0).sqrt()[:, None] * vectors.T
        _, strength, directions = torch.linalg.svd(root @ self.matrix, full_matrices=False)
        share = strength.square().cumsum(0) / strength.square().sum().clamp_min(1e-300)
        rank = min(int((share < variance).sum()) + 1, len(share))
        left = self._unprojected(self.matrix @ directions[:rank].T)
        right = directions[:rank]
        return left, right, self.y_mean - (self.x_mean @ left) @ right

    def _unprojected(self, matrix: Tensor) -> Tensor:
        """Bring a matrix that acts on projected inputs to the inputs themselves."""
        (basis,) = self.bases
        return matrix if basis is None else basis @ matrix


class LinearFit:
    """Fits a map from tensors of any width to a whole tensor.

    Inputs wider than ``max_dim`` are projected on their leading POD directions, fixed by the first
    ``2 * max_dim`` samples. The map gives every entry of the output: it is the ridge regression of the
    whole output on the reduced input. Only its ridge weight is chosen on a reduced output.
    """

    def __init__(self, max_dim: int = 256, *, seed: int = 0) -> None:
        self._max_dim, self._seed = max_dim, seed
        self._waiting: list[tuple[Sequence[Tensor], Tensor]] = []
        self._reduced: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._output = MeanAndSpread()
        self._shapes: list[tuple[int, ...]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the map, and of the sums that it is fitted from."""
        *inputs, output = map(math.prod, self._shapes)
        return 2 * 8 * output * sum(min(width, self._max_dim) for width in inputs)

    def takes(self, inputs: Sequence[Tensor], output: Tensor) -> bool:
        """Return whether tensors have the shapes of those before."""
        return self._shapes in ([], _shapes(inputs, output))

    def update(self, inputs: Sequence[Tensor], output: Tensor) -> None:
        """Take one batch."""
        self._shapes = _shapes(inputs, output)
        rows = output.reshape(len(output), -1)
        self._output.update(rows)
        self._waiting.append((inputs, rows))
        if self._reduced or self._output.count >= SEEN_FIRST * self._max_dim:
            self._drain()

    def solve(self, tikhonov: float | None = None) -> LinearMap:
        """Fit the map."""
        n = self._output.count
        if n < 2:
            raise ValueError(f"{n} of at least 2 samples arrived for a linear map; pass more")
        self._drain()
        x, y = torch.cat(self._reduced), torch.cat(self._targets)
        chosen = fit_operator(x, y, tikhonov=tikhonov, seed=self._seed)
        x_mean, y_mean = x.mean(dim=0), self._output.mean
        c_xx = (x - x_mean).T @ (x - x_mean) / n
        c_xy = self._xy / n - torch.outer(x_mean, y_mean - self._output.offset)
        # The means of what was projected away are carried by the offset alone.
        lifted = torch.cat([
            mean if basis is None else basis @ mean
            for mean, basis in zip(torch.split(x_mean, self._kept), self._bases, strict=True)
        ])
        return LinearMap(
            bases=self._bases,
            x_mean=self._offset + lifted,
            matrix=spectrum(c_xx, c_xy).matrix(chosen.tikhonov),
            y_mean=y_mean,
            shape=self._shapes[-1],
            covariance=c_xx,
            tikhonov=chosen.tikhonov,
            fitted_to=x - x_mean,
        )

    def _drain(self) -> None:
        """Reduce the batches that wait, once there are enough of them to choose the bases by."""
        if not self._reduced:
            blocks = [_flat(block) for block in zip(*(x for x, _ in self._waiting), strict=True)]
            output = torch.cat([y for _, y in self._waiting]).double()
            self._bases = tuple(pod_basis(block, self._max_dim)[0] for block in blocks)
            self._output_basis = pod_basis(output, self._max_dim)[0]
            self._offset = torch.cat([block.mean(dim=0) for block in blocks])
            pairs = zip(blocks, self._bases, strict=True)
            self._kept = [(block if basis is None else basis).shape[1] for block, basis in pairs]
            self._xy = output.new_zeros(sum(self._kept), output.shape[1])
        for inputs, output in self._waiting:
            reduced = _projected(inputs, self._offset, self._bases)
            rows = output.double() - self._output.offset
            self._reduced.append(reduced)
            self._targets.append(rows if self._output_basis is None else rows @ self._output_basis)
            self._xy += reduced.T @ rows
        self._waiting = []


def _shapes(inputs: Sequence[Tensor], output: Tensor) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape[1:]) for tensor in (*inputs, output)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors with one row per sample."""
    return torch.cat([tensor.reshape(len(tensor), -1).double() for tensor in tensors])


def _projected(inputs: Sequence[Tensor], mean: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """Centre some tensors side by side, and project each on its basis."""
    flat = [_flat([x]) for x in inputs]
    centred = [
        x - m.to(x) for x, m in zip(flat, torch.split(mean, [x.shape[1] for x in flat]), strict=True)
    ]
    return torch.cat(
        [x if b is None else x @ b.to(x) for x, b in zip(centred, bases, strict=True)], dim=1
    )
