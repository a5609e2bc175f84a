"""Linear maps between whole tensors, fitted on data as it streams by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_koopman.koopman.operator import KoopmanOperator, fit_operator
from lightning_koopman.koopman.regression import spectrum
from lightning_koopman.koopman.states import pod_basis

SEEN_FIRST = 2
"""POD bases are fixed by the first ``SEEN_FIRST * max_dim`` samples."""


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
        r2: Held-out R²; over the leading POD directions where the output is wide.
        covariance: Covariance of the projected inputs, shape ``(Σk, Σk)``; ``None`` where unknown.
        tikhonov: Ridge weight, in units of the projected inputs' mean variance.
        n_samples: Samples that the map was fitted to; 0 where unknown.
    """

    bases: tuple[Tensor | None, ...]
    x_mean: Tensor
    matrix: Tensor
    y_mean: Tensor
    shape: tuple[int, ...]
    r2: float
    covariance: Tensor | None = None
    tikhonov: float = 0.0
    n_samples: int = 0

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Apply the map."""
        reduced = self._reduced(inputs)
        flat = reduced @ self.matrix.to(reduced) + self.y_mean.to(reduced)
        return flat.reshape(-1, *self.shape)

    def leverage(self, inputs: Sequence[Tensor]) -> Tensor:
        """Tell how much each sample that the map was fitted to decides its own prediction.

        A residual divided by one minus this is what the residual would be had the sample been left out
        of the fit: exact for ridge regression on fixed projections.
        """
        if self.covariance is None:
            raise ValueError("this map does not know how its inputs vary; fit it on data first")
        problem = spectrum(self.covariance, self.covariance)
        reduced = self._reduced(inputs)
        rotated = (reduced @ problem.vectors.to(reduced)).square()
        return (1 + rotated @ problem.filters(self.tikhonov).to(reduced)) / self.n_samples

    def _reduced(self, inputs: Sequence[Tensor]) -> Tensor:
        rows = [x.flatten(1).double() for x in inputs]
        centred = torch.cat(rows, dim=1) - self.x_mean.to(rows[0])
        parts = torch.split(centred, [row.shape[1] for row in rows], dim=1)
        return torch.cat(_project(parts, self.bases), dim=1)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Give the map of a single tensor as one matrix and an offset."""
        matrix = self._whole(self.matrix)
        return matrix, self.y_mean - self.x_mean @ matrix

    def factors(self, variance: float) -> tuple[Tensor, Tensor, Tensor]:
        """Give the map of a single tensor as the product of two thin matrices, and an offset."""
        if self.covariance is None:
            raise ValueError("this map does not know how its inputs vary; fit it on data first")
        values, vectors = torch.linalg.eigh(self.covariance)
        root = values.clamp_min(0).sqrt()[:, None] * vectors.T
        _, strength, directions = torch.linalg.svd(root @ self.matrix, full_matrices=False)
        share = strength.square().cumsum(0) / strength.square().sum().clamp_min(1e-300)
        rank = min(int((share < variance).sum()) + 1, len(share))
        left = self._whole(self.matrix @ directions[:rank].T)
        right = directions[:rank]
        return left, right, self.y_mean - (self.x_mean @ left) @ right

    def _whole(self, matrix: Tensor) -> Tensor:
        """Bring a matrix that acts on projected inputs to the inputs themselves."""
        (basis,) = self.bases
        return matrix if basis is None else basis @ matrix


def from_operator(operator: KoopmanOperator, shape: Sequence[int], n_inputs: int) -> LinearMap:
    """Take an operator between flattened tensors as a map between the tensors."""
    return LinearMap(
        bases=(None,) * n_inputs,
        x_mean=operator.x_mean,
        matrix=operator.matrix,
        y_mean=operator.y_mean,
        shape=tuple(shape),
        r2=operator.r2,
    )


class LinearFit:
    """Fits a map from tensors of any width to a whole tensor.

    Inputs wider than ``max_dim`` are projected on their leading POD directions, fixed by the first
    ``2 * max_dim`` samples. The map gives every entry of the output: it is the ridge regression of the
    whole output on the reduced input. Only its ridge weight is chosen on a reduced output.

    Attributes:
        n_samples: Samples taken so far.
    """

    def __init__(self, max_dim: int = 256, *, seed: int = 0) -> None:
        self.n_samples = 0
        self._max_dim, self._seed = max_dim, seed
        self._waiting: list[tuple[list[Tensor], Tensor]] = []
        self._bases: tuple[Tensor | None, ...] | None = None

    def update(self, inputs: Sequence[Tensor], output: Tensor) -> None:
        """Take one batch."""
        self._shape = tuple(output.shape[1:])
        rows = output.flatten(1) if output.ndim > 1 else output[:, None]
        self._waiting.append(([x.flatten(1).double() for x in inputs], rows.double()))
        self.n_samples += len(output)
        if self._bases is not None or self.n_samples >= SEEN_FIRST * self._max_dim:
            self._drain()

    def solve(self, tikhonov: float | None = None) -> LinearMap:
        """Fit the map."""
        if self.n_samples < 2:
            raise ValueError(f"{self.n_samples} sample arrived; a linear map needs at least 2")
        self._drain()
        assert self._bases is not None
        x, y = torch.cat(self._reduced), torch.cat(self._targets)
        chosen = fit_operator(x, y, tikhonov=tikhonov, seed=self._seed)
        n = self.n_samples
        x_mean, y_mean = x.mean(dim=0), self._y_sum / n
        c_xx = (x - x_mean).T @ (x - x_mean) / n
        c_xy = self._xy / n - torch.outer(x_mean, y_mean)
        matrix = spectrum(c_xx, c_xy).matrix(chosen.tikhonov)
        # The means of what was projected away are carried by the offset alone.
        lifted = torch.cat([
            mean if basis is None else basis @ mean
            for mean, basis in zip(torch.split(x_mean, self._kept), self._bases, strict=True)
        ])
        return LinearMap(
            bases=self._bases,
            x_mean=self._offset_x + lifted,
            matrix=matrix,
            y_mean=self._offset_y + y_mean,
            shape=self._shape,
            r2=chosen.r2,
            covariance=c_xx,
            tikhonov=chosen.tikhonov,
            n_samples=n,
        )

    def _drain(self) -> None:
        for inputs, output in self._waiting if self._bases is not None else self._start():
            centred = torch.cat(inputs, dim=1) - self._offset_x
            parts = torch.split(centred, [x.shape[1] for x in inputs], dim=1)
            assert self._bases is not None
            reduced = torch.cat(_project(parts, self._bases), dim=1)
            rows = output - self._offset_y
            self._reduced.append(reduced)
            self._targets.append(rows if self._output_basis is None else rows @ self._output_basis)
            self._xy += reduced.T @ rows
            self._y_sum += rows.sum(dim=0)
        self._waiting = []

    def _start(self) -> list[tuple[list[Tensor], Tensor]]:
        blocks = [torch.cat(block) for block in zip(*(x for x, _ in self._waiting), strict=True)]
        output = torch.cat([y for _, y in self._waiting])
        self._bases = tuple(pod_basis(block, self._max_dim)[0] for block in blocks)
        self._output_basis = pod_basis(output, self._max_dim)[0]
        self._offset_x = torch.cat([block.mean(dim=0) for block in blocks])
        self._offset_y = output.mean(dim=0)
        self._kept = [
            block.shape[1] if basis is None else basis.shape[1]
            for block, basis in zip(blocks, self._bases, strict=True)
        ]
        self._reduced: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._xy = output.new_zeros(sum(self._kept), output.shape[1])
        self._y_sum = output.new_zeros(output.shape[1])
        return self._waiting


def _project(rows: Sequence[Tensor], bases: Sequence[Tensor | None]) -> list[Tensor]:
    return [x if b is None else x @ b.to(x) for x, b in zip(rows, bases, strict=True)]
