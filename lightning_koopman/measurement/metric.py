"""The torchmetrics metric: moments of a chain that add up, and the numbers made of them."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_koopman.koopman.credit import (
    QUANTITIES,
    Credits,
    compute_credits,
    samples_needed,
)
from lightning_koopman.koopman.moments import Layout, accumulate
from lightning_koopman.koopman.options import Normalize, Options
from lightning_koopman.koopman.states import sample_keys
from lightning_koopman.network.tensors import exact_device, exactly
from lightning_koopman.report.report import CreditReport, build_report, check_quantities

_FORWARD_FLAGS = ("_to_sync", "_should_unsync", "compute_on_cpu", "_enable_grad", "_computed")


class SummedMoments(Metric):
    """The part of :class:`~lightning_koopman.KoopmanCredit` that takes batches.

    Attributes:
        layout: What the moments hold; ``None`` before the first batch, unless ``dims`` are given.
    """

    moments: Tensor

    def __init__(
        self,
        components: Sequence[str] | None,
        *,
        dims: Sequence[int] | None,
        center: Sequence[Tensor] | None,
        folds: int,
        delay: int,
        links: Sequence[Sequence[int]] | None,
        seed: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.components = None if components is None else tuple(components)
        self.center = None if center is None else [offset.detach().double() for offset in center]
        self.folds, self.delay, self.seed = folds, delay, seed
        self.links = () if links is None else tuple(tuple(read) for read in links)
        self.layout: Layout | None = None
        self.add_state("moments", torch.zeros(folds, 0, dtype=torch.float64), dist_reduce_fx="sum")
        if dims is not None:
            self._lay_out(tuple(dims))

    def update(
        self, states: Sequence[Tensor] | Mapping[str, Tensor], keys: Tensor | None = None
    ) -> None:
        """Add one batch."""
        if isinstance(states, Mapping):
            names = tuple(states)[1:]
            if self.components is None:
                self.components = names
            elif names != self.components:
                raise ValueError(f"states are named {names}; expected x_0 and then {self.components}")
            states = list(states.values())
        rows = self._checked([exactly(state.detach()) for state in states])
        if keys is None:
            keys = sample_keys(rows[0], self.seed)
        assert self.layout is not None
        folds = keys.to(self.moments.device) % self.folds
        accumulate(self.layout, self.moments, rows, folds, self.center)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Add one batch and return the numbers of that batch alone."""
        # torchmetrics empties the metric first, and an error would leave it empty.
        before = {name: self.__dict__[name] for name in ("_update_count", *_FORWARD_FLAGS)}
        moments = self.moments
        try:
            batch_value: dict[str, Tensor] = super().forward(*args, **kwargs)
        except Exception:
            self.__dict__.update(before)
            if self.layout is not None and moments.numel() == 0:
                moments = self.layout.zeros().to(moments.device)
            self.moments = moments
            raise
        return batch_value

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric has seen."""
        if isinstance(incoming_state, SummedMoments):
            if self.layout is None and incoming_state.layout is not None:
                self.components = self.components or incoming_state.components
                self._lay_out(incoming_state.layout.dims)
            if incoming_state.layout not in (None, self.layout) or self.components != (
                incoming_state.components or self.components
            ):
                raise ValueError(
                    f"cannot merge a metric over {incoming_state.components} with widths and folds "
                    f"{incoming_state.layout} into one over {self.components} with {self.layout}"
                )
        super().merge_state(incoming_state)
        # torchmetrics would go on giving a result computed before, or warn that there was no update.
        self._computed = None
        self._update_count += incoming_state._update_count if isinstance(incoming_state, Metric) else 1

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        # Before its first batch a metric knows no widths, so its moments are empty: they add nothing.
        if incoming_state["moments"].shape[1] == 0:
            incoming_state = {"moments": torch.zeros_like(self.moments)}
        super()._reduce_states(incoming_state)

    def _names(self) -> tuple[str, ...]:
        if self.components is not None:
            return self.components
        return () if self.layout is None else tuple(str(i) for i in range(len(self.layout.dims) - 1))

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        @functools.wraps(fn)
        def moved(tensor: Tensor) -> Tensor:
            place = fn(torch.zeros(1, device=tensor.device)).device
            return fn(tensor) if exact_device(place) == place else tensor.to(exact_device(place))

        return super()._apply(moved, exclude_state)

    def _lay_out(self, dims: tuple[int, ...]) -> None:
        layout = Layout(dims, self.folds, self.delay, self.links)
        if self.components is not None and len(self.components) != len(dims) - 1:
            raise ValueError(
                f"{len(dims)} states need {len(dims) - 1} components, not {self.components}"
            )
        if self.center is not None and tuple(len(offset) for offset in self.center) != dims:
            raise ValueError(f"center must hold one offset a state, of widths {dims}")
        self.layout = layout
        self.moments = layout.zeros().to(self.device)
        # What reset() copies takes no memory of its own.
        self._defaults["moments"] = self.moments.new_zeros(1, 1).expand_as(self.moments)

    def _checked(self, states: Sequence[Tensor]) -> list[Tensor]:
        rows = [state.flatten(1) if state.ndim > 1 else state[:, None] for state in states]
        if not rows or rows[0].shape[0] == 0:
            raise ValueError("no sample arrived; states must hold at least one row")
        if self.layout is None:
            self._lay_out(tuple(row.shape[1] for row in rows))
        assert self.layout is not None
        names = ("x_0", *self._names())
        if len(rows) != len(names):
            raise ValueError(f"{len(rows)} states arrived; expected {len(names)}: {names}")
        for name, row, width in zip(names, rows, self.layout.dims, strict=True):
            if row.shape != (rows[0].shape[0], width):
                raise ValueError(
                    f"state {name!r} has shape {tuple(row.shape)}; "
                    f"expected ({rows[0].shape[0]}, {width})"
                )
        # A finite sum has finite terms, and is found faster.
        if not all(map(math.isfinite, torch.stack([row.sum().to(rows[0]) for row in rows]).tolist())):
            for name, row in zip(names, rows, strict=True):
                if not bool(torch.isfinite(row).all()):
                    raise ValueError(f"state {name!r} holds NaN or infinity; leave that batch out")
        return rows


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
        delay: Step delay: how many earlier states each operator sees at least.
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
        delay: int = 1,
        links: Sequence[Sequence[int]] | None = None,
        rank: int | None = None,
        tikhonov: float | None = None,
        normalize: Normalize = "none",
        targets: Sequence[int] | None = None,
        quantities: Sequence[str] = QUANTITIES,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        options = Options(
            rank=rank,
            tikhonov=tikhonov,
            normalize=normalize,
            targets=targets,
            delay=delay,
            folds=folds,
            seed=seed,
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
        self.options = options
        self.quantities = tuple(quantities)

    def compute(self) -> dict[str, Tensor]:
        """Compute the numbers of every component.

        Returns:
            ``{quantity}/{component}`` to a float64 scalar tensor.

        Raises:
            ValueError: If fewer than two samples were seen.
        """
        credits = self._credits()
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
            credits = self._credits()
            n_samples = int(self.moments[:, 0].sum())
        notes = list(notes)
        assert self.layout is not None
        needed = samples_needed(self.layout)
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
            delay=self.delay,
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

    def _credits(self) -> Credits:
        if self.layout is None:
            raise ValueError("no sample arrived; call update with the states of a batch first")
        return compute_credits(self.layout, self.moments.double(), self.options, center=self.center)
