"""A torchmetrics shell: ``compute`` calls the core on moments that were summed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_koopman.assembly import build_report
from lightning_koopman.chain import Normalize
from lightning_koopman.credit import QUANTITIES, Credits, check_options, compute_credits, samples_needed
from lightning_koopman.delay import Delay, DelayChoice, choose_delay
from lightning_koopman.layout import Layout
from lightning_koopman.report import CreditReport, check_quantities
from lightning_koopman.summed_moments import SummedMoments


class KoopmanCredit(SummedMoments):
    r"""Koopman credit of every component, from one batch's states at a time.

    As input to ``forward`` and ``update`` the metric accepts

    - ``states`` (a sequence of :class:`~torch.Tensor`, or a mapping from names to tensors): the states
      x_0 … x_L of one batch, each of shape ``(n_samples, d_i)``, rows in the same order. Further axes
      are flattened.

    As output of ``forward`` and ``compute`` the metric returns

    - a flat dictionary of scalar tensors, ``credit/<component>`` and so on.

    The only state is a matrix of moments, ``(folds, size)`` in float64, that adds up over batches and
    processes, so memory does not grow with samples and one collective synchronises everything.

    Args:
        components: Names of the L components; ``None`` takes them from a mapping, or counts from ``0``.
        dims: Widths d_0 … d_L. Needed only where a process may see no batch at all; otherwise the first
            batch tells.
        center: Fixed offsets, one ``(d_i,)`` a state, equal in all processes, about which moments are
            summed. States whose mean is far larger than their spread need them.
        folds: Number of folds for held-out R² and error bars.
        delay: Step delay: how many earlier states each operator sees at least; ``"auto"`` takes the
            smallest, up to :data:`~lightning_koopman.delay.MAX_DELAY`, whose mean held-out R² no larger
            one improves on by more than its error.
        links: For each component, the indices of further states 0 … L - 1 that it reads, such as those
            that a skip connection brings; ``None`` means none.
        rank: Most output directions to align; ``None`` takes all that reach back to the input.
        tikhonov: Ridge weight in units of the regressors' mean variance; ``None`` picks, for
            every component, the largest up to 1e-2 that at most doubles its held-out error.
        normalize: Coordinates of every state: as they are (``"none"``), each unit over its standard
            deviation (``"rms"``) or whitened (``"whiten"``).
        targets: Output units of interest, not with ``"whiten"``; ``None`` takes the leading POD
            directions of the output.
        quantities: Which numbers ``compute`` returns; see :data:`lightning_koopman.QUANTITIES`.
        seed: Chooses the folds.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(100, 4, generator=generator, dtype=torch.float64)
        >>> metric = KoopmanCredit(["double", "halve"], quantities=["credit", "gain"])
        >>> metric.update([x, 2 * x, x])
        >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
        {'credit/double': -0.693, 'credit/halve': 0.0, 'gain/double': 0.693, 'gain/halve': -0.693}
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    plot_legend_name = "Component"

    def __init__(
        self,
        components: Sequence[str] | None = None,
        *,
        dims: Sequence[int] | None = None,
        center: Sequence[Tensor] | None = None,
        folds: int = 5,
        delay: Delay = 1,
        links: Sequence[Sequence[int]] | None = None,
        rank: int | None = None,
        tikhonov: float | None = None,
        normalize: Normalize = "none",
        targets: Sequence[int] | None = None,
        quantities: Sequence[str] = QUANTITIES,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_options(
            folds=folds, delay=delay, rank=rank, tikhonov=tikhonov, normalize=normalize, targets=targets
        )
        check_quantities(quantities)
        super().__init__(
            components,
            dims=dims,
            center=center,
            folds=folds,
            delay=delay,
            links=links,
            seed=seed,
            **kwargs,
        )
        self.rank, self.tikhonov, self.normalize, self.targets = rank, tikhonov, normalize, targets
        self.quantities = tuple(quantities)

    def compute(self) -> dict[str, Tensor]:
        """Compute the numbers of every component.

        Returns:
            ``{quantity}/{component}`` to a float64 scalar tensor.

        Raises:
            ValueError: If fewer than two samples were seen.
        """
        credits = self._credits(self._settled()[0])
        scalars = {}
        for name in self.quantities:
            base = name.removesuffix("_stderr")
            values = (credits.values if name == base else credits.stderr)[base]
            for component, value in zip(self._names(), values, strict=True):
                scalars[f"{name}/{component}"] = value
        return scalars

    def report(
        self,
        *,
        variance_kept: Sequence[float] | None = None,
        notes: Sequence[str] = (),
        step: int | None = None,
    ) -> CreditReport:
        """Give the full report; synchronises processes as ``compute`` does.

        Args:
            variance_kept: Share of variance that each component's state vector keeps, if it was reduced.
            notes: Sentences to carry along.
            step: Training step the weights belong to.

        Returns:
            The report.

        Raises:
            ValueError: If fewer than two samples were seen.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            layout, choice = self._settled()
            credits = self._credits(layout)
            n_samples = int(self.moments[:, 0].sum())
        notes = list(notes)
        if choice is not None and not choice.r2:
            notes.append("delay 1 was taken, for too few folds hold samples to choose one")
        elif choice is not None:
            tried = ", ".join(f"{r2:.4f} with {s}" for s, r2 in enumerate(choice.r2, start=1))
            notes.append(
                f"delay {choice.delay} was chosen: mean held-out R² is {tried}, and no larger delay "
                "improves on it by more than its error"
            )
        needed = samples_needed(layout)
        if n_samples < needed:
            note = f"{n_samples} samples are few for states this wide; take {needed} or more"
            warnings.warn(note, stacklevel=2)
            notes.append(note)
        return build_report(
            self._names(),
            credits,
            n_samples=n_samples,
            variance_kept=variance_kept,
            notes=notes,
            step=step,
            folds=self.folds,
            delay=layout.delay,
        )

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several results of ``compute``.

        Args:
            val: Result of ``compute`` or ``forward``, or a list of them; ``None`` computes.
            ax: Matplotlib axis to draw on.

        Returns:
            Figure and axis.
        """
        return self._plot(val, ax)

    def _settled(self) -> tuple[Layout, DelayChoice | None]:
        """Give the layout with the delay given or chosen, and the choice if there was one."""
        if self.layout is None:
            raise ValueError("no sample arrived; call update with the states of a batch first")
        if self.delay != "auto":
            return self.layout, None
        choice = choose_delay(
            self.layout, self.moments.double(), tikhonov=self.tikhonov, normalize=self.normalize
        )
        return replace(self.layout, delay=choice.delay), choice

    def _credits(self, layout: Layout) -> Credits:
        return compute_credits(
            layout,
            self.moments.double(),
            rank=self.rank,
            tikhonov=self.tikhonov,
            normalize=self.normalize,
            targets=self.targets,
            center=self.center,
        )
