"""Tells where the values of one pass come from: states, the batch, the network itself, or chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.network.axes.input_data import (
    are_zeros_and_ones,
    gates,
    holds_all_of,
    is_mask,
    shuts_out,
)
from lightning_koopman.network.flow.dataflow import BATCH, CHANCE, ORIGINS, OWN, UNKNOWN, DataFlow
from lightning_koopman.network.flow.labelled_sums import OnSum
from lightning_koopman.network.tensors import (
    address_of,
    all_tensors,
    compares_samples,
    is_underived,
    plain,
    tensors_inside,
    varies,
)

_STAGE = "stage:"
"""Label of a state before a further module continued it, beside that of the state."""

_NOTHING: frozenset[str] = frozenset()


class Provenance:
    """Where the values of one pass come from, as long as the data is followed.

    Attributes:
        follows: Whether the data is followed now.
        flow: The labels, which tell nothing where it is not.
        idle: States and inputs that were made of what the network holds: positions, learned queries.
        changed: Labels of data of the batch that were put to states otherwise than they came.
        beside: Labels of those that were put beside states, added to them, or gate them: no masks.
        lost_order: What kept the order of rows from being followed in a later pass, if anything did.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None
        self.follows, self.flow = False, _no_flow()
        # Of later passes, only the order of rows is asked.
        self._order: DataFlow | None = None
        self.lost_order: Exception | None = None
        self.start_pass(None)

    def start_pass(self, batch: Any) -> None:
        """Forget the pass before."""
        self._batch = batch
        self._claimed: dict[str, str] = {}
        # By sum that is a state, the states that it was made of; and which of the flow's sums these are.
        self._sums: dict[str, frozenset[str]] = {}
        self._marked: set[int | None] = set()
        self._taken: set[str] = set()
        self._inputs: set[str] = set()
        self.idle: set[str] = set()
        self.changed: set[str] = set()
        self.beside: set[str] = set()
        self._label_batch()

    def follow(self, model: nn.Module, on_sum: OnSum | None = None) -> None:
        """Begin to follow the data, and what the network holds itself; see :class:`DataFlow`."""
        flow = DataFlow(origins=True, on_mix=self._note_change, on_sum=on_sum)
        self.follows, self.flow = True, flow
        self.own(_held_by(model))
        self._label_batch()
        self.flow.__enter__()

    def follow_rows(self, model: nn.Module) -> None:
        """Begin to follow in what order rows are, and nothing else."""
        self._order = DataFlow(origins=True)
        self._order.label(list(_held_by(model)), OWN)
        self._order.label(list(self.data), BATCH)
        self._order.begin_axes(self.data)
        self._order.__enter__()

    def rows(self, tensor: Tensor, given: Tensor) -> dict[str, Any]:
        """Find how a state's rows and positions came about, as fields of what is recorded of it.

        It was ``given`` as another tensor where it was packed, say.
        """
        if (flow := self.flow if self.follows else self._order) is None:
            return {}
        found: dict[str, Any] = {"places": flow.places(tensor)}
        found |= {"orders": flow.orders(tensor), "second_orders": flow.orders(tensor, 1)}
        if self.follows:
            found |= {"positions": flow.positions(tensor), "picks": flow.picks(tensor)}
            found["merged"] = flow.merged(given)
        return found

    def _note_change(
        self, reads: Sequence[Tensor], known: Sequence[frozenset[str]], operator: str, out: Any
    ) -> set[int]:
        """Note which data of the batch an operator puts to states otherwise than they came.

        Masks say which positions count, and are nothing that a state is made of: they are returned. What
        is put beside a state is none, and neither are zeros and ones that are added to it or gate it.
        """
        known = [labels - ORIGINS - self.idle for labels in known]
        new = [{name for name in labels if self._is_new(name)} for labels in known]
        # What comes alone with data is no state.
        alone = [all(n.startswith(BATCH) or n in self._inputs for n in labels) for labels in known]
        masks = set[int]()
        if all(alone) or not any(new):
            return masks
        states = [t for t, is_data in zip(reads, alone, strict=True) if not is_data]
        for place, (tensor, names, is_data) in enumerate(zip(reads, new, alone, strict=True)):
            if not names or not is_data:
                continue
            data = self.data_of(frozenset(names))
            if (
                operator in ("cat", "stack")
                or (operator == "add" and are_zeros_and_ones(tensor))
                or gates(operator, tensor, states, data, self.data, out)
            ):
                self.beside |= names
            elif tensor.dtype == torch.bool or (tensor.is_floating_point() and is_mask(tensor)):
                masks.add(place)
                continue
            numbers = tensor.float() if tensor.dtype == torch.bool else tensor
            if any(address_of(t) != address_of(tensor) and not holds_all_of(numbers, t) for t in data):
                self.changed |= names
        return masks

    def _is_new(self, label: str) -> bool:
        """Check whether a label is of data of the batch that are no input yet."""
        return label.startswith(BATCH) and label not in self._claimed

    def leave(self) -> None:
        """Stop following the data; safe to call twice."""
        # Let go of behind its end, which Ctrl-C may keep it from.
        if self.follows:
            self.flow.__exit__()
            self._error, self.follows, self.flow = self.flow.error, False, _no_flow()
        if self._order is not None:
            self._order.__exit__()
            self.lost_order, self._order = self._order.error, None

    @property
    def error(self) -> Exception | None:
        """What kept the data from being followed, if anything did."""
        return self.flow.error if self.follows else self._error

    def _label_batch(self) -> None:
        if self.follows:
            self.flow.idle = self.idle
            data = list(enumerate(self.data))
            shared = Counter(address_of(tensor) for _, tensor in data)
            # Past and future of a window are views of one series. Where these overlap, what is of both
            # belongs to the smaller one, or the first, for inputs come before targets.
            for i, tensor in sorted(data[::-1], key=lambda each: -each[1].numel()):
                label = self.flow.label_part if shared[address_of(tensor)] > 1 else self.flow.label
                label(tensor, f"{BATCH}{i}")
            self.flow.begin_axes(self.data)
            self.flow.begin_positions(list(self.data))

    def of(self, value: Any) -> frozenset[str] | None:
        """Find which states a value was computed from, with sums of states where these are read."""
        if not self.follows:
            return None
        known = {self._claimed.get(label, label) for label in self._labels(value)}
        return frozenset(name for name in known if not name.startswith(BATCH))

    def parts_of(self, value: Any) -> frozenset[str] | None:
        """Find which states a value was computed from, sums taken apart."""
        found = self.of(value)
        return None if found is None else self._taken_apart(found)

    def _taken_apart(self, names: frozenset[str]) -> frozenset[str]:
        return _NOTHING.union(*(self._sums.get(name, {name}) for name in names))

    def is_sum(self, tensor: Tensor) -> bool:
        """Check whether a tensor is a sum, see :meth:`DataFlow.sum_in`, that is no state yet."""
        found = self.flow.sum_in(tensor)
        return found is not None and found not in self._marked

    def mark_sum(self, tensor: Tensor, name: str, made_of: frozenset[str]) -> None:
        """Let a sum of states count as a state itself."""
        self._sums[name] = self._taken_apart(made_of)
        self._marked.add(self.flow.sum_in(tensor))
        self.flow.label_sum(tensor, name)

    def exactly(self, value: Any) -> frozenset[str] | None:
        """Find which states a value was computed from, ``None`` where some of it is not known."""
        lost = UNKNOWN in self.flow.labels(value) or self.error is not None
        return None if lost else self.of(value)

    def may_reach(self, tensor: Tensor, value: Any) -> bool:
        """Check whether a value may have been computed from what a tensor was."""
        return bool(self._labels(tensor) & self._labels(value))

    def _labels(self, value: Any) -> frozenset[str]:
        """Read which data and states a value was computed from, by their labels."""
        labels = self.flow.labels(value) - ORIGINS
        return frozenset(name for name in labels if not name.startswith(_STAGE))

    def is_fresh(self, tensor: Tensor, inputs: Collection[str] = ()) -> bool | None:
        """Check whether a tensor is noise, or made of data of the batch that is not in ``inputs`` alone.

        ``None`` where nothing is known of what else than positions and the like it is made of.
        """
        labels = self.flow.labels(tensor)
        data = labels - ORIGINS - self.idle
        if data:
            alone = all(name in inputs or name.startswith(BATCH) for name in data)
            return alone and any(map(self._is_new, data))
        if CHANCE in labels and UNKNOWN not in labels:
            return True
        return None if UNKNOWN in labels or not labels - {OWN} else False

    def has_read(self, module: nn.Module) -> bool:
        """Check whether an operator read any of the tensors that a module holds."""
        return not self.flow.read.isdisjoint(map(address_of, _held_by(module)))

    def is_untouched(self, tensor: Tensor) -> bool:
        """Check whether no data of the batch is known to have reached a tensor."""
        return not self._labels(tensor) and self.flow.error is None

    def is_idle(self, value: Any) -> bool:
        """Check whether all tensors of a value are known to be made of what the network holds itself."""
        known = [self.flow.labels(tensor) for tensor in all_tensors(value)]
        return bool(known) and all(labels and labels <= self.idle | {OWN} for labels in known)

    def masks(self, value: Any) -> list[Tensor]:
        """Find the tensors that hold nothing but masks and what the network holds itself."""
        real = filter(torch.is_floating_point, all_tensors(value))
        return [tensor for tensor in real if self.is_idle(tensor) or self._is_mask(tensor)]

    def _is_mask(self, tensor: Tensor) -> bool:
        names = self._labels(tensor) - self.idle
        if not self.follows or not all(n.startswith(BATCH) or n in self._inputs for n in names):
            return False
        # Zeros and ones may be data that something was made of.
        return shuts_out(tensor) or not (names or varies(tensor))

    def own(self, tensors: Iterable[Tensor]) -> None:
        """Let tensors count as what the network holds itself."""
        self.flow.label(list(tensors), OWN)

    def own_weights(self, model: nn.Module) -> None:
        """Let weights that a functional call put in count as what the network holds itself."""
        if self.follows:
            self.own([t for t in (*model.parameters(), *model.buffers()) if not self.flow.labels(t)])

    def holds_own(self, value: Any) -> bool:
        """Check whether what the network holds itself is in a value, beside what states are made of."""
        return OWN in self.flow.labels(value)

    def draws(self, value: Any) -> bool:
        """Check whether there are random numbers in a value that are no input."""
        return CHANCE in self.flow.labels(value)

    def claim(self, tensor: Tensor, name: str, *, whole: bool) -> None:
        """Let a tensor count as an input, and if it is the ``whole`` of what it is made of, that too."""
        self._inputs.add(name)
        self.flow.begin(tensor)
        labels = self._labels(tensor) - self.idle
        if labels and not whole:
            self.flow.label_part(tensor, name)
            return
        if not labels:
            if self.is_idle(tensor):
                self.idle.add(name)
            self.flow.label(tensor, name)
        data = {label for label in labels if label.startswith(BATCH)}
        # A mask that cut it to size is no part of it.
        masks = {n for n in data if all(t.dtype == torch.bool for t in self.data_of(frozenset({n})))}
        self._claimed |= dict.fromkeys(data - masks or data, name)

    def unclaimed(
        self, value: Any, partly: Callable[[Tensor], bool] = lambda _: False
    ) -> frozenset[str]:
        """Return the labels of the data of the batch in a value that are no input yet, or in part."""
        data = (name for name in self._labels(value) if name.startswith(BATCH))
        return frozenset(
            name
            for name in data
            if name not in self._claimed or any(map(partly, self.data_of(frozenset({name}))))
        )

    def taken(self, labels: frozenset[str]) -> frozenset[str]:
        """Return those labels of the batch that are of data which a component has taken."""
        return labels & (self._taken | self._claimed.keys())

    def made_of(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of the batch that a tensor was made of."""
        return self.data_of(self._labels(tensor))

    def data_of(self, labels: frozenset[str]) -> list[Tensor]:
        """Return the tensors of the batch that have some labels."""
        return [tensor for i, tensor in enumerate(self.data) if f"{BATCH}{i}" in labels]

    @property
    def data(self) -> Iterator[Tensor]:
        """The tensors of the batch."""
        return tensors_inside(self._batch)

    def others(self, value: Any) -> list[Tensor]:
        """Find the tensors made of data of the batch that no component has taken, such as targets."""
        return [
            tensor
            for tensor in all_tensors(value)
            # What is true or false is a mask, not a target.
            if tensor.dtype != torch.bool
            and any(self._is_new(n) and n not in self._taken for n in self.flow.labels(tensor))
        ]

    def take(self, value: Any) -> None:
        """Remember which data of the batch a component has taken, in whatever place."""
        self._taken |= {name for name in self.flow.labels(value) if name.startswith(BATCH)}

    def mark(self, value: Any, name: str, *, idle: bool, is_part: bool = False) -> None:
        """Let a value count as a state, and remember it where the network holds all it is made of.

        What shares memory with a value that ``is_part`` of it stays what it was.
        """
        if idle:
            self.idle.add(name)
        (self.flow.label_part if is_part else self.flow.label)(value, name)

    def compares_samples(self, tensor: Tensor, given: Iterable[Tensor], module: nn.Module) -> bool:
        """Check whether a tensor that a module made has a value for each pair of samples."""
        may = compares_samples(tensor, given, module)
        return may and (self.flow.error is not None or self.flow.pairs(tensor))

    def mark_stage(self, tensor: Tensor, name: str, stage: int) -> None:
        """Let what is computed from a state show which of its stages it was."""
        if name not in self.idle:
            self.flow.label(tensor, f"{_STAGE}{stage}:{name}", beside=True)

    def mark_returned(self, tensor: Tensor, name: str) -> None:
        """Let what is computed from a tensor that the network returns show as a stage that it was."""
        self.flow.label_part(tensor, f"{_STAGE}0:{name}", beside=True)

    def stages(self, value: Any) -> set[tuple[str, int]]:
        """Find which stages of which states a value was computed from."""
        stages = (label for label in self.flow.labels(value) if label.startswith(_STAGE))
        marks = (label.split(":", 2)[1:] for label in stages)
        return {(name, int(stage)) for stage, name in marks}

    def may_hold(self, tensor: Tensor, name: str) -> bool:
        """Check whether a tensor may have been computed from a state."""
        return self.flow.error is not None or name in self.flow.labels(tensor)


def _no_flow() -> DataFlow:
    """Return labels that nothing gets: these are as they are where it failed to follow them."""
    flow = DataFlow()
    flow.error = Exception()
    return flow


def _held_by(model: nn.Module) -> Iterator[Tensor]:
    """Find the tensors that a network holds: parameters, buffers, and plain attributes."""
    for module in model.modules():
        for held in (module._parameters, module._buffers, vars(module)):
            # Of other classes, as those whose values are elsewhere, there may be no memory to know.
            tensors = (t for t in held.values() if isinstance(t, Tensor))
            yield from filter(is_underived, (t if is_underived(t) else plain(t) for t in tensors))
