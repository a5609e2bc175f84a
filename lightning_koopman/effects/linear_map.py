"""A linear map between whole tensors, fitted on data as it streams by."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_koopman.effects.means import MeanAndSpread
from lightning_koopman.koopman.operator import fit_operator
from lightning_koopman.koopman.regression import spectrum
from lightning_koopman.koopman.states import pod_basis

SEEN_FIRST = 2
"""POD bases are fixed by the first ``SEEN_FIRST * max_dim`` samples."""

_DECIDED = 1e-6
"""A sample whose leverage is nearer to 1 decides its own prediction wholly."""


@dataclass(frozen=True)
class LinearMap:
    """An affine map from the entries of a tensor to those of another.

    Attributes:
        basis: Directions that what is taken in is projected on, ``(D, k)``; ``None`` keeps all of them.
        x_mean: Mean of what is taken in, before projection, shape ``(D,)``.
        matrix: Shape ``(k, D_out)``.
        y_mean: Mean of what is given out, shape ``(D_out,)``.
        shape: Shape of one sample of what is given out.
        covariance: Covariance of the projected inputs, shape ``(k, k)``.
        tikhonov: Ridge weight, in units of the projected inputs' mean variance.
        fitted_to: Projected inputs that the map was fitted to, about their mean, ``(n_samples, k)``.
    """

    basis: Tensor | None
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

    def projected(self, x: Tensor) -> Tensor:
        """Bring inputs to the directions that the map acts on, about their mean."""
        return _projected(x, self.x_mean, self.basis)

    def __call__(self, reduced: Tensor) -> Tensor:
        """Apply the map to projected inputs."""
        flat = reduced @ self.matrix.to(reduced) + self.y_mean.to(reduced)
        return flat.reshape(-1, *self.shape)

    def left_out(self, reduced: Tensor, residuals: Tensor) -> Tensor:
        """Return what the residuals of samples that a map was fitted to are once each is left out of it.

        That is the residual over one minus the leverage, the share of its own prediction that a sample
        decides: exact for ridge regression on fixed projections. Where samples are fewer than directions
        and no ridge keeps them apart, that is 0/0; both then come from this map, as multiples of the
        ridge weight that cancel, which is the limit for small ones.
        """
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
        """Return the map as one matrix and an offset."""
        matrix = self._unprojected(self.matrix)
        return matrix, self.y_mean - self.x_mean @ matrix

    def factors(self, variance: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the map as the product of two thin matrices, and an offset."""
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
        return matrix if self.basis is None else self.basis @ matrix


class LinearFit:
    """Fits a map from a tensor of any width to a whole tensor.

    An input wider than ``max_dim`` is projected on its leading POD directions, fixed by the first
    ``2 * max_dim`` samples. The map gives every entry of the output: it is the ridge regression of the
    whole output on the reduced input. Only its ridge weight is chosen on a reduced output.
    """

    def __init__(self, max_dim: int = 256) -> None:
        self._max_dim = max_dim
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._reduced: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._output = MeanAndSpread()
        self._shapes: list[tuple[int, ...]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the map, and of the sums that it is fitted from."""
        width, output = map(math.prod, self._shapes)
        return 2 * 8 * output * min(width, self._max_dim)

    def takes(self, x: Tensor, output: Tensor) -> bool:
        """Return whether tensors have the shapes of those before."""
        return self._shapes in ([], _shapes(x, output))

    def update(self, x: Tensor, output: Tensor) -> None:
        """Take one batch, in which no row may come here, as to an expert that is not chosen."""
        if not len(x):
            return
        self._shapes = _shapes(x, output)
        rows = output.reshape(len(output), -1)
        self._output.update(rows)
        self._waiting.append((x, rows))
        if self._reduced or self._output.count >= SEEN_FIRST * self._max_dim:
            self._drain()

    def solve(self, tikhonov: float | None = None) -> LinearMap:
        """Fit the map."""
        n = self._output.count
        if n < 2:
            raise ValueError(f"{n} of at least 2 samples arrived for a linear map; pass more")
        self._drain()
        x, y = torch.cat(self._reduced), torch.cat(self._targets)
        chosen = fit_operator(x, y, tikhonov=tikhonov, folds=None)
        x_mean, y_mean = x.mean(dim=0), self._output.mean
        c_xx = (x - x_mean).T @ (x - x_mean) / n
        c_xy = self._xy / n - torch.outer(x_mean, y_mean - self._output.offset)
        # The mean of what was projected away is carried by the offset alone.
        lifted = x_mean if self._basis is None else self._basis @ x_mean
        return LinearMap(
            basis=self._basis,
            x_mean=self._offset + lifted,
            matrix=spectrum(c_xx, c_xy).matrix(chosen.tikhonov),
            y_mean=y_mean,
            shape=self._shapes[-1],
            covariance=c_xx,
            tikhonov=chosen.tikhonov,
            fitted_to=x - x_mean,
        )

    def _drain(self) -> None:
        """Reduce the batches that wait, once there are enough of them to choose a basis by."""
        if not self._reduced:
            block = torch.cat([_flat(x) for x, _ in self._waiting])
            output = torch.cat([y for _, y in self._waiting]).double()
            self._basis = pod_basis(block, self._max_dim)[0]
            self._output_basis = pod_basis(output, self._max_dim)[0]
            self._offset = block.mean(dim=0)
            kept = (block if self._basis is None else self._basis).shape[1]
            self._xy = output.new_zeros(kept, output.shape[1])
        for x, output in self._waiting:
            reduced = _projected(x, self._offset, self._basis)
            rows = output.double() - self._output.offset
            self._reduced.append(reduced)
            self._targets.append(rows if self._output_basis is None else rows @ self._output_basis)
            self._xy += reduced.T @ rows
        self._waiting = []


def _shapes(x: Tensor, output: Tensor) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape[1:]) for tensor in (x, output)]


def _flat(x: Tensor) -> Tensor:
    """Return one row per sample."""
    return x.reshape(len(x), -1).double().contiguous()


def _projected(x: Tensor, mean: Tensor, basis: Tensor | None) -> Tensor:
    """Centre a tensor, and project it on a basis."""
    flat = _flat(x)
    centred = flat - mean.to(flat)
    return centred if basis is None else centred @ basis.to(flat)
