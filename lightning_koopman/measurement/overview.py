"""Lists what would be reported as components, with shapes and state widths where data is at hand."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from lightning_koopman.koopman.options import DEFAULTS, Options
from lightning_koopman.network.access.hooks import attach
from lightning_koopman.network.access.isolation import random_states_kept, undisturbed
from lightning_koopman.network.axes.padding import valid_positions
from lightning_koopman.network.axes.rows import Recorded, pooled_by, pooling_index
from lightning_koopman.network.capture.capture import Capture
from lightning_koopman.network.capture.plan import in_a_row, make_plan
from lightning_koopman.network.components import Components, n_weights, named_components
from lightning_koopman.network.names import module_of, numbered
from lightning_koopman.network.runs.forward_runner import default_forward, device_of, to_device
from lightning_koopman.network.runs.hook_points import find_module
from lightning_koopman.network.tensors import all_tensors, detached_copy, first_tensor
from lightning_koopman.report.text import counted


@dataclass(frozen=True)
class ComponentRow:
    """One component as it would be reported.

    Attributes:
        name: Dotted name; the second call in a pass reads ``name#1``.
        kind: Class of the module.
        parameters: How many it has.
        shape_in: Shape of the first tensor that it takes, with the batch axis; ``None`` without data.
        shape_out: Shape of its state, with the batch axis.
        width: Values in one row of its state before POD.
        state: The state it belongs to: its own name, ``a+b`` where it is joined with others, or ``None``
            where it is left out.
    """

    name: str
    kind: str
    parameters: int
    shape_in: tuple[int, ...] | None = None
    shape_out: tuple[int, ...] | None = None
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

    def __rich__(self) -> Table:
        inside = sum({module_of(row.name): row.parameters for row in self.rows}.values())
        table = Table(
            title=f"{counted(len(self.rows), 'component')} with {inside:,} of {self.total:,} parameters",
            caption="\n".join(map(escape, self.notes)) or None,
            caption_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        heads = ["component", "type", "parameters"]
        for head in heads + (["input", "output", "state width"] if self.run else []):
            left = head in ("component", "type")
            table.add_column(head, justify="left" if left else "right", overflow="fold")
        for row in self.rows:
            cells = [escape(row.name), row.kind, f"{row.parameters:,}"]
            if self.run:
                cells += [_shape(row.shape_in), _shape(row.shape_out), self._width(row)]
            table.add_row(*cells)
        return table

    def _width(self, row: ComponentRow) -> str:
        if row.state is None or row.width is None:
            return "left out"
        width = f"{row.width}"
        if row.state != row.name:
            return escape(f"{width} in {row.state}")
        return f"{width} → {self.max_dim}" if row.width > self.max_dim else width


def describe_components(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    components: Components | Sequence[Components] | None = None,
    max_dim: int = DEFAULTS.max_dim,
) -> Overview:
    """List the components that a report would have.

    Args:
        model: Any module; it is left exactly as it was found.
        batches: Data, of which the first batch is run; ``None`` runs nothing.
        components: As in :func:`lightning_koopman.credit_report`.
        max_dim: Widest state vector.

    Returns:
        The overview.

    Raises:
        ValueError: If the components cannot be chosen, there is no batch, or no component runs.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [(row.name, row.parameters) for row in describe_components(net).rows]
        [('0', 15), ('2', 8)]
        >>> describe_components(net, [torch.ones(5, 4)]).rows[0].shape_out
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
    taken: dict[str, tuple[int, ...]] = {}
    with undisturbed(model), capture, _noting_inputs(capture.candidates, taken):
        capture.start_pass(batch)
        default_forward(model, batch)
        silent = capture.silent
        records: list[Recorded] = list(capture.end_pass().values())
    if len(records) < 2:
        raise ValueError(
            f"no component ran in the forward pass; chosen were {list(capture.components)}. "
            "Name modules that the pass calls with components=[...]."
        )
    named = components is not None
    returned, in_losses = capture.returned.made_of, capture.returned.in_losses
    if capture.untraced is not None:
        records, returned = in_a_row(records, returned), {}
        in_losses = frozenset()
    shapes = {record.name: tuple(record.tensor.shape) for record in records}
    pooled = pooling_index(records, capture.returned.rows, batch)
    records = [replace(r, tensor=pooled_by(pooled, r.tensor, batch)) for r in records]
    plan = make_plan(
        records,
        batch=batch,
        named=named,
        max_dim=max_dim,
        returned=returned,
        in_losses=in_losses,
        in_turns=frozenset() if named else capture.in_turns(records),
        valid=valid_positions(batch),
    )
    notes = plan.told() + capture.told(silent)
    shown = [record for record in records if record.name in capture.parts]

    def row(record: Recorded, size: int) -> ComponentRow:
        name, chain = record.name, zip(plan.names, plan.states, strict=True)
        state = next((known for known, group in chain if name in group), None)
        width = None if state is None else plan.forms[name].width(record.tensor)
        kind = type(find_module(model, name)[0]).__name__
        return ComponentRow(name, kind, size, taken.get(name), shapes[name], width, state)

    rows = tuple(map(row, shown, capture.n_weights([record.name] for record in shown)))
    return Overview(rows, tuple(notes), total, max_dim, run=True)


@contextmanager
def _noting_inputs(
    modules: dict[str, nn.Module], taken: dict[str, tuple[int, ...]]
) -> Generator[None, None, None]:
    """Note the shape of the first tensor of every call, by state name."""

    def note(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        given = (args, kwargs)
        tensor = first_tensor(given)
        tensor = next(iter(all_tensors(given)), None) if tensor is None else tensor
        count = sum(module_of(key) == name for key in taken)
        taken[numbered(name, count)] = () if tensor is None else tuple(tensor.shape)

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(attach(module, before=partial(note, name)))
        yield


def _kept(tensor: Tensor, recorded: Recorded) -> Recorded:
    return replace(recorded, tensor=detached_copy(tensor))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape))
