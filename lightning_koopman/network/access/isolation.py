"""Runs a user's model and loaders and leaves no trace of it: modes, gradients, random states."""

from __future__ import annotations

import functools
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_koopman.network.access.signals import signals_wait
from lightning_koopman.network.tensors import is_wrapper

_INSIDE = (
    *("_parameters", "_buffers", "_modules", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)

_CONTAINERS = frozenset({list, dict, OrderedDict, defaultdict, Counter, set, deque})

_PLAIN = frozenset({bool, int, float, str, type(None), tuple}) | _CONTAINERS
"""What most attributes of modules are, and no objects of somebody's own."""


@contextmanager
def undisturbed(model: nn.Module, batches: Any = ()) -> Generator[None, None, None]:
    """Put a model in eval mode without gradients and leave no trace of it.

    Each module's own mode, its weights, buffers and attributes and all random states are restored, also
    when the body raises: a forward pass may write weights, and so may a change of mode (adapters that
    merge). So is what tensors, arrays, lists, dictionaries and sets hold that are attributes, or in one
    of these, as metrics keep their sums, and which tensors other objects hold that are; and what a
    LightningModule logs is not logged. Hooks on backward passes rest, for passes of ours are not the
    user's. Compiled modules run eagerly inside, because hooks that are added after compilation never
    fire otherwise.
    """
    _let_freed_memory_stay()
    compiled = is_compiled(model) or may_compile()
    # It holds from when it is made, so nothing that may fail comes between.
    eager = _never_compiled if compiled else _not_compiled_inside
    waiting, randomness = signals_wait(now=False), random_states_kept(batches)
    with waiting as signals, randomness, _contents_kept(model, signals):
        model.eval()
        for module in model.modules():
            module._backward_hooks.clear()
            module._backward_pre_hooks.clear()
            if callable(getattr(type(module), "log_dict", None)):
                vars(module).update(log=_log_nothing, log_dict=_log_nothing)
        with torch.inference_mode(False), torch.no_grad(), eager():
            try:
                yield
            finally:
                # What ends here does so whole: Ctrl-C would leave the rest as it is.
                signals.now = True


_never_compiled = functools.partial(torch.compiler.set_stance, "force_eager")


@contextmanager
def _not_compiled_inside() -> Generator[None, None, None]:
    """Run eagerly what is compiled inside for the first time in this process, as by ``torch.cond``.

    The first use of a stance imports the whole compiler, which takes longer than many a report.
    """
    compile_, stances = torch.compile, ExitStack()

    @functools.wraps(compile_)
    def compile_eagerly(*args: Any, **kwargs: Any) -> Any:
        torch.compile = compile_
        made = compile_(*args, **kwargs)
        stances.enter_context(_never_compiled())
        return made

    torch.compile = compile_eagerly
    try:
        yield
    finally:
        torch.compile = compile_
        stances.close()


@contextmanager
def plain_numerics(holder: Any) -> Generator[None, None, None]:
    """Leave inference mode, gradients and autocast of the device that a tensor or a module is on.

    They make statistics inexact or impossible.
    """
    autocast = torch.autocast(holder.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast:
        yield


@contextmanager
def fast_path(enabled: bool) -> Generator[None, None, None]:
    """Let torch's encoder layers run as one fused operation each, or keep them from it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _let_freed_memory_stay() -> None:
    """Let the C library keep what one layer frees, for the next one to take."""
    # By itself, glibc hands back what lies free beyond twice the largest block that was freed so far.
    # With large states it does so in each layer, which costs as much as a convolution. It learns from
    # blocks up to 32 MiB, and of one that nobody writes to no page is made.
    torch.UntypedStorage(2**25 - 2**16, device="cpu")  # type: ignore[no-untyped-call]


def _log_nothing(*_: Any, **__: Any) -> None:
    """Stand in for a LightningModule's ``log``: these passes are not the user's."""


@contextmanager
def _contents_kept(model: nn.Module, signals: SimpleNamespace) -> Generator[None, None, None]:
    """Restore every module's mode, attributes, hooks, weights and buffers, to the last bit."""
    modes = [(module, module.training) for module in model.modules()]
    kept: list[tuple[Any, ...]] = [
        (_refill, values, dict(values))
        for module in model.modules()
        for values in (vars(module), *(vars(module).get(name) for name in _INSIDE))
        if isinstance(values, dict)
    ]
    named = (item for module in model.modules() for item in vars(module).items())
    attributes = [value for name, value in named if name not in _INSIDE]
    own = _with_contents(attributes)
    kept += [(_refill, value, value.copy()) for value in own if type(value) in _CONTAINERS]
    arrays = (value for value in own if type(value) is np.ndarray and value.flags.writeable)
    kept += [(np.copyto, array, array.copy()) for array in arrays]
    rest = (value for value in attributes if type(value) not in _PLAIN)
    kept += [(_put_tensors_back, vars(v), dict(vars(v))) for v in rest if is_wrapper(v)]
    # Those made in inference mode cannot be written outside of it.
    others = [value for value in own if type(value) is Tensor and not value.is_inference()]
    weights = (*model.parameters(), *model.buffers(), *others)
    inside = [value for tensor in weights for value in _own_numbers(tensor)]
    with torch._C.DisableTorchFunctionSubclass():  # somebody's own class may refuse to be read
        kept += [
            (_rewrite, tensor, data, _once(data).clone())
            for tensor in (*weights, *inside)
            for data in (tensor.data,)
            if type(data) is Tensor and data.layout is torch.strided and not is_lazy(tensor)
        ]
    failure: Exception | None = None

    def attempt(put_back: Callable[..., Any], *given: Any) -> None:
        nonlocal failure
        try:
            put_back(*given)
        except Exception as error:
            failure = failure or error

    def put_modes_back() -> None:
        for module, mode in modes:
            if module.training != mode:
                # The module's own method, which may do more than set a flag.
                attempt(module.train, mode)

    def put_rest_back() -> None:
        for put_back, *given in kept:
            attempt(put_back, *given)

    try:
        yield
    finally:
        signals.now = True
        attempt(put_modes_back)
        attempt(put_rest_back)
        if failure is not None:
            # Memory may have lacked for a moment, and what was emptied must not stay so.
            attempt(put_rest_back)
    # Not within `finally`, where it would hide what the body raised.
    if failure is not None:
        raise failure


def _with_contents(values: list[Any]) -> list[Any]:
    """Return values and all that containers among them hold, which are opened once."""
    found, opened = list(values), set[int]()
    inside = values
    while inside:
        closed = {id(v): v for v in inside if type(v) in _CONTAINERS or type(v) is tuple}
        new = [v for key, v in closed.items() if key not in opened]
        opened |= closed.keys()
        inside = [part for v in new for part in (v.values() if isinstance(v, dict) else v)]
        found += inside
    return found


def _own_numbers(tensor: Tensor) -> list[Tensor]:
    """Return the attributes where a tensor that answers every call itself may keep its numbers."""
    kind: Any = type(tensor)
    answers = getattr(kind.__torch_function__, "__func__", None)
    if (
        answers in (None, Tensor.__torch_function__.__func__)  # type: ignore[attr-defined]
        or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    ):
        return []
    return [value for value in vars(tensor).values() if isinstance(value, Tensor)]


def is_expanded(tensor: Tensor) -> bool:
    """Check whether `expand` made a tensor, so that torch does not write into it."""
    return tensor.layout is torch.strided and 0 in tensor.stride()


def _once(data: Tensor) -> Tensor:
    """Return numbers without those that `expand` repeats."""
    for axis, stride in enumerate(data.stride()):
        data = data if stride else data.narrow(axis, 0, min(data.shape[axis], 1))
    return data


def _rewrite(tensor: Tensor, data: Tensor, copy: Tensor) -> None:
    """Give a tensor its memory and its numbers back."""
    with torch._C.DisableTorchFunctionSubclass():
        if tensor.data_ptr() != data.data_ptr():
            tensor.data = data
        _once(data).copy_(copy)


def _refill(container: Any, before: Any) -> None:
    """Put back what a container held, if it holds anything else; most do not."""
    now, then = (
        [*values.keys(), *values.values()] if isinstance(values, dict) else [*values]
        for values in (container, before)
    )
    if len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True)):
        return
    container.clear()
    if isinstance(container, dict | set):
        container.update(before)
    else:
        container.extend(before)


def _put_tensors_back(attributes: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Put back which tensors are an object's attributes, and leave all others alone."""
    for name in attributes.keys() | before.keys():
        now, then = attributes.get(name), before.get(name)
        if now is not then and (isinstance(now, Tensor) or isinstance(then, Tensor)):
            if name in before:
                attributes[name] = then
            else:
                del attributes[name]


@contextmanager
def random_states_kept(batches: Any = ()) -> Generator[None, None, None]:
    """Restore the states of all random generators, also when the body raises."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    owners = (batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None))
    own = [g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)]
    own_states = [generator.get_state() for generator in own]
    try:
        yield
    finally:
        torch.set_rng_state(cpu_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        for generator, state in zip(own, own_states, strict=True):
            generator.set_state(state)


def seed_all(seed: int) -> None:
    """Seed all random generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed stores a stack trace for each device that was not used yet.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def is_compiled(model: nn.Module) -> bool:
    """Check whether a module or any part of it went through ``torch.compile``."""
    return any(map(is_compiled_itself, model.modules()))


def is_compiled_itself(module: nn.Module) -> bool:
    """Check whether calls of a module run compiled code, whatever its parts do."""
    own = getattr(module, "forward", None)
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None or _is_made(own)


def may_compile() -> bool:
    """Check whether anything may have gone through ``torch.compile``."""
    return "torch._dynamo" in sys.modules


def following_stops_compiler() -> bool:
    """Check whether what went through ``torch.compile`` would run without it while data is followed.

    That is so of torch up to 2.8, which then compiles our own code besides.
    """
    if not may_compile() or hasattr(TorchDispatchMode, "ignore_compile_internals"):
        return False
    from torch._dynamo.eval_frame import cached_backends

    return any(backend is not None for backend in cached_backends.values())


def has_compiled_functions(model: nn.Module) -> bool:
    """Check whether functions went through ``torch.compile`` that modules, or their files, hold."""
    if not may_compile():
        return False
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    files = (sys.modules.get(name) for name in {kind.__module__ for kind in kinds})
    holders = (*model.modules(), *kinds, *(file for file in files if isinstance(file, ModuleType)))
    # The compiler leaves functions of its own in files, under names such as __compiled_fn_1.
    held = (value for each in holders for name, value in [*vars(each).items()] if name[:2] != "__")
    return any(map(_is_made, held))


def _is_made(value: Any) -> bool:
    """Check whether a function is what ``torch.compile`` made of another one."""
    # Nothing is asked of other objects, which may answer by doing something.
    function = value.__func__ if type(value) is MethodType else value
    return type(function) is FunctionType and hasattr(function, "_torchdynamo_orig_callable")
