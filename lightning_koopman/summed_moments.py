"""A torchmetrics state: moments of a chain of states, which add up over batches and processes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_koopman.delay import MAX_DELAY, Delay
from lightning_koopman.keys import sample_keys
from lightning_koopman.layout import Layout
from lightning_koopman.moments import accumulate
from lightning_koopman.tensors import exact_device, exactly

_FORWARD_FLAGS = ("_to_sync", "_should_unsync", "compute_on_cpu", "_enable_grad", "_computed")


class SummedMoments(Metric):
    """The part of :class:`~lightning_koopman.KoopmanCredit` that takes batches.

    Args:
        components: As there, like all that follow.
        dims: Widths of the states.
        center: Offsets about which moments are summed.
        folds: Number of folds.
        delay: Step delay.
        links: Further states that steps read.
        seed: Chooses the folds.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

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
        delay: Delay,
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
        """Add one batch.

        Args:
            states: x_0 … x_L, each ``(n_samples, d_i)``, as a sequence or by name in order.
            keys: One integer a sample that decides its fold, shape ``(n_samples,)``; ``None`` hashes
                the rows of x_0, so that equal samples share a fold in any batch and process.

        Raises:
            ValueError: If names, widths or row counts do not fit, or a value is not finite.
        """
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
        """Add one batch and return the numbers of that batch alone.

        Args:
            args: Positional arguments of :meth:`update`.
            kwargs: Keyword arguments of :meth:`update`.

        Returns:
            As :meth:`compute`, over this batch.

        Raises:
            Exception: As :meth:`update` and :meth:`compute`; what was added before is then kept.
        """
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
        """Add what another metric has seen.

        Args:
            incoming_state: A metric of this class with the same options, or its state.

        Raises:
            ValueError: If the two did not see the same chain.
        """
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
        delay, reach = (1, min(MAX_DELAY, len(dims) - 1)) if self.delay == "auto" else (self.delay, 1)
        layout = Layout(dims, self.folds, delay, self.links, reach)
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
