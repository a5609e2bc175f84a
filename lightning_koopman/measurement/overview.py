"""Lists what would be reported as components, with shapes and state widths where data is at hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.markup import escape
from torch import Tensor, nn

from lightning_koopman.koopman.options import DEFAULTS, Options
from lightning_koopman.measurement.measurement import plan_of
from lightning_koopman.network.access.isolation import random_states_kept, undisturbed
from lightning_koopman.network.axes.padding import valid_positions
from lightning_koopman.network.axes.recorded import Recorded
from lightning_koopman.network.capture.capture import Capture
from lightning_koopman.network.components import Components, n_weights, named_components
from lightning_koopman.network.names import module_of
from lightning_koopman.network.runs.forward import default_forward, device_of, to_device
from lightning_koopman.network.runs.hook_points import find_module
from lightning_koopman.network.tensors import detached_copy
from lightning_koopman.report.text import Fitted, counted


@dataclass(frozen=True)
class ComponentRow:
    """One component as it would be reported.

    Attributes:
        name: Dotted name; the second call in a pass reads ``name#1``.
        kind: Class of the module.
        parameters: How many it has.
        shape: Shape of its state, with the batch axis; ``None`` without data.
        width: Values in one row of its state before POD.
        state: The state it belongs to: its own name, ``a+b`` where it is joined with others, or ``None``
            where it is left out.
    """

    name: str
    kind: str
    parameters: int
    shape: tuple[int, ...] | None = None
    width: int | None = None
    state: str | None = None


@dataclass(frozen=True)
class Overview:
    """What would be measured, without measuring it.

    Attributes:
        rows: The components, in order of execution where data was given, else of registration.
        notes: What the report's notes would say of the chain.
        total: Number of parameters of the whole model.
        max_dim: Widest state vector.
        run: Whether a batch was run.
    """

    rows: tuple[ComponentRow, ...]
    notes: tuple[str, ...]
    total: int
    max_dim: int
    run: bool

    def __rich__(self) -> Fitted:
        inside = sum({module_of(row.name): row.parameters for row in self.rows}.values())
        columns = {
            "component": [row.name for row in self.rows],
            "type": [row.kind for row in self.rows],
            "parameters": [f"{row.parameters:,}" for row in self.rows],
        }
        if self.run:
            columns["output"] = ["x".join(map(str, row.shape or ())) for row in self.rows]
            columns["state width"] = [self._width(row) for row in self.rows]
        return Fitted(
            f"{counted(len(self.rows), 'component')} with {inside:,} of {self.total:,} parameters",
            columns,
            lines=[f"Note: {escape(note)}" for note in self.notes],
        )

    def _width(self, row: ComponentRow) -> str:
        if row.state is None or row.width is None:
            return "left out"
        width = f"{row.width}"
        if row.state != row.name:
            return f"{width} in {row.state}"
        return f"{width} → {self.max_dim}" if row.width > self.max_dim else width


def describe_components(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    components: Components | Sequence[Components] | None = None,
    max_dim: int = DEFAULTS.max_dim,
) -> Overview:
    """List the components that a report would have; of data, the first batch is run.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [(row.name, row.parameters) for row in describe_components(net).rows]
        [('0', 15), ('2', 8)]
        >>> describe_components(net, [torch.ones(5, 4)]).rows[0].shape
        (5, 3)
    """
    max_dim = Options(max_dim=max_dim).max_dim  # refused there if it is none
    total = sum(p.numel() for p in model.parameters())
    if batches is None:
        chosen = named_components(model, components)
        rows = tuple(ComponentRow(n, type(m).__name__, n_weights(m)) for n, m in chosen.items())
        return Overview(rows, (), total, max_dim, run=False)
    with random_states_kept(batches):
        batch = next(iter(batches), None)
    if batch is None:
        raise ValueError("batches is empty; the shapes need one batch")
    batch = to_device(batch, device_of(model))
    capture = Capture(model, components, keep=_kept)
    with undisturbed(model), capture:
        capture.start_pass(batch)
        default_forward(model, batch)
        silent = capture.silent
        records: list[Recorded] = list(capture.end_pass().values())
    if len(records) < 2:
        raise ValueError(
            f"no component ran in the forward pass; chosen were {list(capture.components)}. "
            "Name modules that the pass calls with components=[...]."
        )
    shapes = {record.name: tuple(record.tensor.shape) for record in records}
    named, valid = components is not None, valid_positions(batch)
    plan, records, _ = plan_of(capture, records, batch, named=named, max_dim=max_dim, valid=valid)
    notes = plan.told() + capture.told(silent)
    shown = [record for record in records if record.name in capture.parts]

    def row(record: Recorded, size: int) -> ComponentRow:
        name, chain = record.name, zip(plan.names, plan.states, strict=True)
        state = next((known for known, group in chain if name in group), None)
        width = None if state is None else plan.forms[name].width(record.tensor)
        kind = type(find_module(model, name)[0]).__name__
        return ComponentRow(name, kind, size, shapes[name], width, state)

    rows = tuple(map(row, shown, capture.n_weights([record.name] for record in shown)))
    return Overview(rows, tuple(notes), total, max_dim, run=True)


def _kept(tensor: Tensor, recorded: Recorded) -> Recorded:
    return replace(recorded, tensor=detached_copy(tensor))
