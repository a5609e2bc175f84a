"""The torchmetrics metric: moments of a chain that add up, and the numbers made of them."""

# Annotations are not deferred here, because torch.jit.script reads those of a metric's class.

import functools
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_koopman.koopman.credit import QUANTITIES, Credits, compute_credits
from lightning_koopman.koopman.moments import Layout, accumulate
from lightning_koopman.koopman.options import DEFAULTS, Options, takes_options
from lightning_koopman.koopman.states import sample_keys
from lightning_koopman.measurement.accumulator import all_finite
from lightning_koopman.network.arguments import INTEGER, TENSOR, check_each, check_given, check_type
from lightning_koopman.network.tensors import exact_device, exactly
from lightning_koopman.report.report import CreditReport, build_report, check_quantities

_RESTORED = (
    *("header", "moments", "_update_count"),
    *("_to_sync", "_should_unsync", "compute_on_cpu", "_enable_grad", "_computed"),
)
"""What torchmetrics changes on the way of ``forward``, and an error would leave changed."""


def _first(headers: Tensor) -> Tensor:
    return headers[0]


def _agree(facts: dict[str, Any], header: Tensor) -> dict[str, Any]:
    """Return facts with what a header adds to them, or refuse moments that do not add up."""
    found = json.loads(bytes(header.to(torch.uint8).tolist()) or b"{}")
    for name, value in found.items():
        if value != facts[name] and None not in (value, facts[name]):
            raise ValueError(
                f"moments with {name} {value} cannot be added to moments with {name} {facts[name]}; "
                "give both metrics the same"
            )
    return {name: found.get(name) if own is None else own for name, own in facts.items()}


def _check_states(rows: Sequence[Tensor], names: Sequence[str], layout: Layout) -> None:
    """Refuse states that do not fit each other or the layout, or are not finite."""
    if len(rows) != len(names):
        raise ValueError(f"{len(rows)} states arrived; expected {len(names)}: {tuple(names)}")
    for name, row, width in zip(names, rows, layout.dims, strict=True):
        if row.shape != (rows[0].shape[0], width):
            raise ValueError(
                f"state {name!r} has shape {tuple(row.shape)}; expected ({rows[0].shape[0]}, {width})"
            )
    if not all_finite(rows):
        for name, row in zip(names, rows, strict=True):
            if not bool(torch.isfinite(row).all()):
                raise ValueError(f"state {name!r} holds NaN or infinity; leave that batch out")


class KoopmanCredit(Metric):
    r"""Koopman credit of every component, from one batch's states at a time.

    As input to ``forward`` and ``update`` the metric accepts

    - ``states`` (a sequence of :class:`~torch.Tensor`, or a mapping from names to tensors): the states
      x_0 … x_L of one batch, each of shape ``(n_samples, d_i)``, rows in the same order. Further axes
      are flattened.

    As output of ``forward`` and ``compute`` the metric returns

    - a flat dictionary of scalar tensors, ``credit/<component>`` and so on.

    The state is a matrix of moments, ``(folds, size)`` in float64, that adds up over batches and
    processes, so memory does not grow with samples, and a line of text that says what it holds, so that
    a saved or shared state needs nothing else to go on.

    Args:
        components: Names of the L components; ``None`` takes them from a mapping, or counts from ``0``.
        dims: Widths d_0 … d_L; ``None`` takes those of the first batch.
        center: Fixed offsets, one ``(d_i,)`` per state, equal in all processes, about which moments are
            summed. States whose mean is far larger than their spread need them.
        links: For each component, the indices of further states 0 … L - 1 that it reads, such as those
            that a skip connection brings; ``None`` means none.
        quantities: Which numbers ``compute`` returns, out of ``credit``, ``gain``, ``nonlinearity``,
            ``sensitivity``, ``r2``, ``chain_r2`` and ``rank``; ``<name>_stderr`` are standard errors.
        options: How credits are computed; ``max_dim``, ``reduce``, ``output`` and ``observables`` are
            of no consequence, for states are taken as they are given.
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
    __jit_unused_properties__: ClassVar = [*Metric.__jit_unused_properties__, "components", "layout"]

    header: Tensor
    moments: Tensor

    @takes_options()
    def __init__(
        self,
        components: Sequence[str] | None = None,
        *,
        dims: Sequence[int] | None = None,
        center: Sequence[Tensor] | None = None,
        links: Sequence[Sequence[int]] | None = None,
        quantities: Sequence[str] = QUANTITIES,
        options: Options = DEFAULTS,
        **kwargs: Any,
    ) -> None:
        check_quantities(quantities)
        check_each((str, "a name"), components=() if components is None else components)
        check_each(INTEGER, dims=() if dims is None else dims)
        check_each(TENSOR, center=() if center is None else center)
        check_each((Sequence, "a list of integers"), links=() if links is None else links)
        check_each(INTEGER, **{f"links[{step}]": read for step, read in enumerate(links or ())})
        super().__init__(**kwargs)
        self.center = None if center is None else [offset.detach().double() for offset in center]
        self.links = () if links is None else tuple(tuple(map(int, read)) for read in links)
        self.options = options
        self.quantities = tuple(quantities)
        place = exact_device(self.device)
        header = torch.zeros(0, dtype=torch.uint8, device=place)
        self.add_state("header", header, dist_reduce_fx=_first)
        moments = torch.zeros(options.folds, 0, dtype=torch.float64, device=place)
        self.add_state("moments", moments, dist_reduce_fx="sum")
        offsets = [offset.cpu().numpy().tobytes() for offset in self.center or ()]
        self._own = dict[str, Any](
            components=None if components is None else list(components),
            dims=None,
            folds=options.folds,
            seed=options.seed,
            delay=options.delay,
            links=list(map(list, self.links)),
            center=zlib.crc32(b"".join(offsets)),
        )
        # The header read last, and what it says.
        self._read: tuple[Tensor | None, tuple[str, ...] | None, Layout | None] = (None, None, None)
        if dims is not None:
            self._lay_out(self.components, self._layout_of(dims, self.components))

    @property
    def components(self) -> tuple[str, ...] | None:
        """Names of the components, as far as they are known."""
        return self._known()[0]

    @property
    def layout(self) -> Layout | None:
        """What the moments hold; ``None`` before the first batch, unless ``dims`` are given."""
        return self._known()[1]

    def update(
        self, states: Sequence[Tensor] | Mapping[str, Tensor], keys: Tensor | None = None
    ) -> None:
        """Add one batch.

        Args:
            states: States x_0 … x_L of the batch, or a mapping from names to them.
            keys: A number per sample that chooses its fold; ``None`` hashes the rows of x_0.

        Raises:
            ValueError: If the states do not fit each other or earlier ones, or are not finite.
        """
        components = self.components
        check_type((Iterable, "a list of tensors, or a mapping to them"), states=states)
        check_given(TENSOR, keys=keys)
        if isinstance(states, Mapping):
            names = tuple(states)[1:]
            if components not in (None, names):
                raise ValueError(f"states are named {names}; expected x_0 and then {components}")
            components, states = names, list(states.values())
        states = list(states)
        check_each(TENSOR, states=states)
        rows = [exactly(state.detach()) for state in states]
        rows = [row.flatten(1) if row.ndim > 1 else row.reshape(-1, 1) for row in rows]
        if not rows or rows[0].shape[0] == 0:
            raise ValueError("no sample arrived; states must hold at least one row")
        layout = self.layout or self._layout_of([row.shape[1] for row in rows], components)
        _check_states(rows, ("x_0", *(components or map(str, range(len(layout.dims) - 1)))), layout)
        if keys is not None and (keys.shape != rows[0].shape[:1] or keys.is_floating_point()):
            raise ValueError(
                f"keys has shape {tuple(keys.shape)} of {keys.dtype}; expected one integer per sample, "
                f"({len(rows[0])},)"
            )
        # A state that was made in inference mode could not be added to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if self.layout is None or components != self.components:
                self._lay_out(components, layout)
            if self.moments.is_inference():
                self.moments = self.moments.clone()
            keys = sample_keys(rows[0], self.options.seed) if keys is None else keys
            folds = keys.to(self.moments.device) % layout.folds
            accumulate(layout, self.moments, rows, folds, self.center)

    @torch.jit.unused
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Add one batch and return the numbers of that batch alone.

        Args:
            args: As of :meth:`update`.
            kwargs: As of :meth:`update`.

        Returns:
            What :meth:`compute` returns of the batch.
        """
        # torchmetrics empties the metric first, and an error would leave it empty.
        before = {name: self.__dict__[name] for name in _RESTORED}
        try:
            batch_value: dict[str, Tensor] = super().forward(*args, **kwargs)
        except Exception:
            self.__dict__.update(before)
            raise
        return batch_value

    def reset(self) -> None:
        """Forget the samples, but not the names and widths of the states."""
        components, layout = self._known()
        super().reset()
        if layout is not None:
            self._lay_out(components, layout)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add what another metric has seen.

        Args:
            incoming_state: The other metric, or its ``metric_state``.

        Raises:
            ValueError: If it is about other components, or was made with another ``folds``, ``seed``,
                ``delay``, ``links`` or ``center``.
        """
        super().merge_state(incoming_state)
        # torchmetrics would go on giving a result computed before, or warn that there was no update.
        self._computed = None
        self._update_count += incoming_state._update_count if isinstance(incoming_state, Metric) else 1

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

    def report(self, *, step: int | None = None) -> CreditReport:
        """Compute the full report; synchronises processes as ``compute`` does.

        Args:
            step: Training step the weights belong to.

        Returns:
            The report.

        Raises:
            ValueError: If fewer than two samples were seen.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            return build_report(
                self._names(),
                self._credits(),
                self._laid_out(),
                n_samples=int(self.moments[:, 0].sum()),
                delay=self.options.delay,
                step=step,
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

    def _laid_out(self) -> Layout:
        if self.layout is None:
            raise ValueError("no sample arrived; call update with the states of a batch first")
        return self.layout

    def _credits(self) -> Credits:
        layout = self._laid_out()
        return compute_credits(layout, self.moments.double(), self.options, center=self.center)

    def _names(self) -> tuple[str, ...]:
        width = 0 if self.layout is None else len(self.layout.dims) - 1
        return tuple(map(str, range(width))) if self.components is None else self.components

    def _known(self) -> tuple[tuple[str, ...] | None, Layout | None]:
        """Return what the header says: names of the components, and the layout."""
        if self._read[0] is not self.header:
            facts = _agree(self._own, self.header)
            names = None if facts["components"] is None else tuple(facts["components"])
            layout = None if facts["dims"] is None else self._layout_of(facts["dims"], names)
            self._read = (self.header, names, layout)
        return self._read[1:]

    def _layout_of(self, dims: Sequence[int], components: tuple[str, ...] | None) -> Layout:
        folds, delay = self.options.folds, self.options.delay
        layout = Layout(tuple(map(int, dims)), folds, delay, self.links)
        if components is not None and len(components) != len(dims) - 1:
            raise ValueError(f"{len(dims)} states need {len(dims) - 1} components, not {components}")
        if self.center is not None and tuple(map(len, self.center)) != layout.dims:
            raise ValueError(f"center must hold one offset per state, of widths {layout.dims}")
        return layout

    def _lay_out(self, components: Sequence[str] | None, layout: Layout) -> None:
        """Write what the moments hold, and make empty ones where none are."""
        text = json.dumps({**self._own, "components": components, "dims": layout.dims}).encode()
        self.header = torch.tensor(list(text), dtype=torch.uint8, device=self.moments.device)
        if self.moments.shape[1] == 0:
            self.moments = layout.zeros().to(self.moments.device)

    def _take(self, *headers: Tensor) -> None:
        """Lay out as other metrics are, before their moments are added."""
        facts = functools.reduce(_agree, (self.header, *headers), self._own)
        if facts["dims"] is not None:
            self._lay_out(facts["components"], self._layout_of(facts["dims"], facts["components"]))

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        # Before its first batch a metric has empty moments: they add nothing.
        if incoming_state["header"].numel():
            self._take(incoming_state["header"])
            super()._reduce_states({**incoming_state, "header": self.header})

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None
    ) -> None:
        # A process without a batch learns from the others how wide its moments are.
        self._take(*dist_sync_fn(self.header, group=process_group or self.process_group))
        super()._sync_dist(dist_sync_fn, process_group)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        @functools.wraps(fn)
        def moved(tensor: Tensor) -> Tensor:
            place = fn(torch.zeros(1, device=tensor.device)).device
            return fn(tensor) if exact_device(place) == place else tensor.to(exact_device(place))

        return super()._apply(moved, exclude_state)
