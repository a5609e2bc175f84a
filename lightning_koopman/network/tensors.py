"""Finds the tensors in what modules take and give."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributions import Distribution
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence


def by_name(value: Any) -> Mapping[Any, Any]:
    """Return what a mapping, a named tuple or a dataclass holds by name; of anything else, nothing."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}


def parts_of(value: Any) -> Iterator[Any]:
    """Return what a container holds, one level down."""
    if isinstance(value, PackedSequence):
        yield value.data
    elif isinstance(value, tuple | list):
        yield from value
    elif isinstance(value, Distribution):
        yield from vars(value).values()
    else:
        yield from by_name(value).values()


def all_tensors(value: Any) -> list[Tensor]:
    """Find every tensor in a nested value."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    """Add every tensor in a nested value, in order."""
    if isinstance(value, Tensor):
        found.append(value)
    elif type(value) in (tuple, list, dict):
        # Hooks look at every call: what most calls take and give is told without asking what it is not.
        for part in value.values() if type(value) is dict else value:
            _collect(part, found)
    elif not isinstance(value, _HOLD_NONE):
        for part in parts_of(value):
            _collect(part, found)
        if is_wrapper(value):
            found += (part for part in vars(value).values() if isinstance(part, Tensor))


_HOLD_NONE = (type(None), str, int, float, nn.Module)


def is_wrapper(value: Any) -> bool:
    """Check whether a value is an object of a class of somebody's own that may hold tensors."""
    known = (*_HOLD_NONE, Tensor, Mapping, tuple, list, type, FunctionType, Distribution)
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, known)
        and not dataclasses.is_dataclass(value)
    )


def in_order(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a call as ``forward`` has its parameters, not as the caller has.

    Example:
        >>> list(in_order(nn.Bilinear(1, 1, 1), {"input2": 0, "input1": 0}))
        ['input1', 'input2']
    """
    if len(kwargs) < 2:
        return kwargs
    names = _parameters(type(module))  # type: ignore[arg-type]
    return {name: kwargs[name] for name in (*names, *kwargs) if name in kwargs}


@functools.lru_cache(maxsize=64)
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of what the ``forward`` of a class takes, none where it does not tell."""
    try:
        # Not that of an instance, to which somebody may listen.
        return tuple(inspect.signature(kind.forward).parameters)
    except Exception:  # as of scripted modules; a hook may not end the user's pass
        return ()


_PLAIN = frozenset((type(None), bool, int, float, str))

_DEEPEST = 4
"""How deep in objects of any class tensors are looked for, as in batches of graph libraries."""


def tensors_inside(value: Any) -> Iterator[Tensor]:
    """Find every tensor in a nested value, also in the attributes of objects of any class."""
    found: list[Tensor] = []
    _collect_inside(value, found, 0)
    return iter(found)


def _collect_inside(value: Any, found: list[Tensor], depth: int) -> None:
    """Add every tensor in a nested value, in order, to so deep in objects of any class."""
    if isinstance(value, Tensor):
        found.append(value)
        return
    parts: Any = value if type(value) in (tuple, list) else tuple(parts_of(value))
    known = parts or isinstance(value, Mapping | tuple | list | nn.Module | type)
    if not known and depth < _DEEPEST:
        parts = tuple(getattr(value, "__dict__", {}).values())
    for part in parts:
        # Batches of graph libraries hold thousands of plain numbers.
        if type(part) not in _PLAIN:
            _collect_inside(part, found, depth + (not known))


def first_tensor(value: Any) -> Tensor | None:
    """Find the first floating-point tensor in a module's input or output.

    A single number, as a loss that comes with a state, is none where there are others.

    Example:
        >>> first_tensor((torch.tensor([1, 2]), {"out": torch.ones(2, 3)})).shape
        torch.Size([2, 3])
    """
    first = value
    while type(first) is tuple and first:
        first = first[0]
    # Most calls take and give a tensor first of all.
    if type(first) is Tensor and first.ndim and is_real(first):
        return first
    number = None
    for tensor in all_tensors(value):
        _refuse_complex(tensor)
        if is_real(tensor):
            if tensor.ndim:
                return tensor
            number = tensor if number is None else number
    return number


def compares_samples(tensor: Tensor, given: Iterable[Tensor], module: nn.Module) -> bool:
    """Check whether a tensor that a module made may have a value for each pair of samples, by shape."""
    if tensor.is_nested or tensor.ndim != 2 or len(tensor) < 2 or len(tensor) != tensor.shape[1]:
        return False
    before = [t for t in given if not t.is_nested]
    widths = {size for t in before for size in t.shape[1:]}
    # As many units as there are samples may be what the module is made for.
    widths |= {size for weight in module.parameters() for size in weight.shape}
    return len(tensor) not in widths and all(t.numel() != tensor.numel() for t in before)


def address_of(tensor: Tensor) -> int:
    """Identify a tensor's memory; 0 where it has none of its own, as sparse tensors."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    if tensor.layout is not torch.strided or wrapped:
        return 0
    return int(tensor.untyped_storage()._cdata)


def first_real(value: Any) -> Tensor | None:
    """Find the first tensor as :func:`first_tensor` does, and none where that is complex."""
    try:
        return first_tensor(value)
    except ValueError:
        return None


def varies(tensor: Tensor) -> bool:
    """Check whether a tensor differs between samples, which are along its first axis."""
    if tensor.is_nested:
        return True
    if tensor.ndim == 0 or tensor.shape[0] < 2:
        return False
    # The first two samples tell nearly always, and are far fewer than all.
    return bool((tensor[1] != tensor[0]).any()) or bool((tensor != tensor[:1]).any())


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def is_real(tensor: Tensor) -> bool:
    """Check whether a tensor stands for real numbers; quantised ones do."""
    return tensor.is_floating_point() or tensor.is_quantized


def are_data(*values: Any) -> bool:
    """Check whether a call is a pass of the network on data, not one under a transform or a tracer.

    Under ``torch.func`` transforms, tracing and export, and with fake or meta tensors, there is nothing
    to record.
    """
    # First of all, for the compiler cannot look into what follows.
    if torch.compiler.is_compiling():
        return False
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    # While make_fx writes down what runs, nothing may be asked of a value.
    proxies = torch._C._TorchDispatchModeKey.PROXY
    transformed = transformed or torch._C._get_dispatch_mode(proxies) is not None
    if transformed or torch._C._get_tracing_state() is not None:
        return False
    return not any(map(_is_pretended, all_tensors(values)))


def _is_pretended(tensor: Tensor) -> bool:
    """Check whether a tensor holds no values that can be recorded."""
    return (
        isinstance(tensor, FakeTensor)
        or tensor.is_meta
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def first_packed(value: Any) -> PackedSequence | None:
    """Find a packed sequence in front of any other floating-point tensor."""
    if isinstance(value, PackedSequence):
        return value
    if isinstance(value, Tensor):
        return None
    first = next(iter(parts_of(value)), None)
    return None if first is None else first_packed(first)


def unpacked(value: PackedSequence) -> tuple[Tensor, Tensor]:
    """Undo the packing of sequences of several lengths.

    Example:
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> padded, lengths = unpacked(pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]))
        >>> padded.shape, lengths.tolist()
        (torch.Size([2, 3, 2]), [3, 1])
    """
    padded, lengths = pad_packed_sequence(value, batch_first=True)
    return padded, lengths


def samples_of_packed(value: PackedSequence) -> Tensor:
    """Return the sample of each row of the data of a packed sequence.

    Example:
        >>> from torch.nn.utils.rnn import pack_sequence
        >>> packed = pack_sequence([torch.ones(1), torch.ones(3)], enforce_sorted=False)
        >>> samples_of_packed(packed).tolist()
        [1, 0, 1, 1]
    """
    sizes: list[int] = value.batch_sizes.tolist()
    order = value.sorted_indices
    order = torch.arange(sizes[0], device="cpu") if order is None else order.cpu()
    return torch.cat([order[:size] for size in sizes])


def refuse_without_shape(batch: Any) -> None:
    """Refuse nested tensors of a layout whose shape torch does not tell."""
    if any(tensor.is_nested and tensor.layout is torch.strided for tensor in all_tensors(batch)):
        raise ValueError(
            "a batch holds a nested tensor of strided layout, whose shape torch does not tell; make it "
            "with torch.nested.nested_tensor(samples, layout=torch.jagged)"
        )


def padded(nested: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Pad a nested tensor of sequences; tell their lengths."""
    parts = nested.unbind()
    tails = {part.shape[1:] for part in parts}
    if not parts or parts[0].ndim < 1 or len(tails) > 1:
        shapes = sorted({tuple(part.shape) for part in parts})
        raise ValueError(
            f"the state of {name!r} is a nested tensor whose samples have the shapes {shapes[:4]}; only "
            "their first axis, the positions, may differ. Leave it out with components=[...]."
        )
    lengths = torch.tensor([part.shape[0] for part in parts], device="cpu")
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True), lengths


def detached_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor, for a later in-place module may overwrite it."""
    return plain(dense(tensor)).detach().clone()


def dense(tensor: Tensor) -> Tensor:
    """Write out a sparse tensor, of which operators see all values."""
    return tensor if tensor.layout is torch.strided or tensor.is_nested else tensor.to_dense()


def plain(tensor: Tensor) -> Tensor:
    """View a tensor of a class derived by somebody, whose methods may need what a copy has not."""
    kind: Any = type(tensor)
    if kind is Tensor or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.as_subclass(tensor, Tensor)


def is_underived(value: Any) -> TypeGuard[Tensor]:
    """Check whether a value is a tensor, and of no class that somebody derived."""
    return type(value) in (Tensor, nn.Parameter)


def derived(tensor: Tensor, kind: type[Tensor], attributes: Mapping[str, Any]) -> Tensor:
    """Make a plain tensor one of a class derived by somebody, with its attributes."""
    made = tensor.as_subclass(kind)
    vars(made).update(attributes)
    return made


@functools.cache
def exact_device(device: torch.device) -> torch.device:
    """Return where the statistics of states on a device are made."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device).add(1.0)
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return device


_ORDERED = {"cuda"}


def need_not_wait(device: torch.device) -> bool:
    """Check whether copies to and from a device are in order with what runs there.

    Then nobody need wait for them, as long as what arrives on the CPU is used on the device alone.
    """
    return device.type in _ORDERED


def _refuse_complex(tensor: Tensor) -> None:
    if tensor.is_complex():
        raise ValueError(
            f"a state of dtype {tensor.dtype} arrived; complex states are not supported. "
            "Choose components whose outputs are real, or view them with torch.view_as_real."
        )


def exactly(tensor: Tensor) -> Tensor:
    """Move a tensor to where its statistics can be made, in a type that can be summed."""
    _refuse_complex(tensor)
    moved = tensor.to(exact_device(tensor.device))
    return moved.float() if moved.is_floating_point() and moved.element_size() == 1 else moved


def memory_layout(tensor: Tensor) -> tuple[int, list[tuple[int, int]], int]:
    """Return in bytes where a view begins, its axes, and what of it lies together along these."""
    width, axes = tensor.element_size(), list[tuple[int, int]]()
    run = width
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if step * width == run and not axes:
            run *= size
        elif step and size > 1:
            axes.append((size, step * width))
    return int(tensor.storage_offset()) * width, axes, run


def view_of_memory(tensor: Tensor) -> tuple[Any, ...]:
    """Tell views of one memory apart."""
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def order_of_axes(view: tuple[Any, ...], other: tuple[Any, ...]) -> list[int] | None:
    """Find the order in which the axes of a view are those of another of one memory, if there is one.

    Axes of one entry that the other has not are left out.
    """
    (place, *own), (other_place, *wanted) = view, other
    own, wanted = (list(zip(*axes, strict=True)) for axes in (own, wanted))
    kept = [axis for axis, (size, _) in enumerate(own) if size > 1 or len(own) == len(wanted)]
    if place != other_place or sorted(own[axis] for axis in kept) != sorted(wanted):
        return None
    places = sorted(range(len(wanted)), key=wanted.__getitem__)
    pairs = zip(places, sorted(kept, key=own.__getitem__), strict=True)
    return [axis for _, axis in sorted(pairs)]


def with_axes(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Put axes into an order, without those that it leaves out, of one entry each."""
    left = [axis for axis in range(tensor.ndim) if axis not in order]
    tensor = tensor.permute(*order, *left)
    for _ in left:
        tensor = tensor.select(-1, 0)
    return tensor


def has_places(tensor: Tensor) -> bool:
    """Check whether each value of a tensor has a place of its own in memory."""
    return tensor.layout is torch.strided and not tensor.is_nested


def is_all_of_memory(tensor: Tensor) -> bool:
    """Check whether no place of a tensor's memory is left out of it."""
    if not has_places(tensor):
        return True
    begin, _, run = memory_layout(tensor)
    return begin == 0 and run >= tensor.untyped_storage().nbytes()
