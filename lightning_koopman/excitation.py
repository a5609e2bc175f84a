"""Finds the components that can be excited, and their answers to noise on their own inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_koopman.isolation import undisturbed
from lightning_koopman.module_tree import clean_modules
from lightning_koopman.plan import Plan
from lightning_koopman.recorded import Recorded
from lightning_koopman.replay import Call, answer, copied_call
from lightning_koopman.tensors import exactly

_REPEATS = 1e-3
"""Largest distance of a component's second answer from its first, relative to that."""

_SEVERAL = "takes several tensors that depend on the data"

Sources = Callable[[Any], frozenset[str]]


@dataclass(frozen=True)
class _Step:
    """A component that is excited.

    ``shape`` is that of one sample of the state before it where the component takes another view of it.
    """

    number: int
    head: tuple[int, int]
    modules: tuple[nn.Module, ...]
    shape: tuple[int, ...] | None
    batch_axis: int


class Excitation:
    """Second calls of the components that take one state, with noise on it.

    They happen in eval mode, without gradients, under the autocast of the first call, and no hook sees
    them. The noise is normal and independent, with a given share of each unit's own standard deviation
    over the samples seen so far; its generator is seeded by the samples, and the model's random state is
    left as found.

    Args:
        model: The network.
        share: Standard deviation of the noise, as a share of each unit's own.

    Attributes:
        steps: Numbers i = 1 … L of the components that are excited, known after the first pass.
        unfit: Why each of the others is not.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.share = share
        self.steps: tuple[int, ...] = ()
        self.unfit: dict[str, str] = {}
        self._model = model
        self._chosen: list[_Step] | None = None
        self._heads: set[tuple[int, int]] = set()
        self._calls: dict[tuple[int, int], Call] = {}
        self._mixed: set[tuple[int, int]] = set()
        self._spreads: dict[int, _Spread] = {}

    def start_pass(self) -> None:
        """Forget what the components took in the pass before."""
        self._calls = {}

    def see(
        self, module: nn.Module, call: int, args: Any, kwargs: Mapping[str, Any], sources: Sources | None
    ) -> None:
        """Remember what a component is called with; for a hook.

        Args:
            module: The component.
            call: How often it ran before in this pass.
            args: Its arguments.
            kwargs: Its keyword arguments.
            sources: Tells the states that a value was computed from; ``None`` where nobody followed.
        """
        key = (id(module), call)
        if self._chosen is not None and key not in self._heads:
            return
        given = copied_call(args, kwargs)
        if given is None:
            return
        self._calls[key] = given
        if self._chosen is None and given.others and (sources is None or sources(given.others)):
            self._mixed.add(key)

    def settle(
        self,
        plan: Plan,
        records: Mapping[str, Recorded],
        parts: Mapping[str, Sequence[str]],
        *,
        followed: bool = True,
    ) -> None:
        """Find, after the first pass, which components can be excited.

        Args:
            plan: The chain.
            records: What was recorded in the pass, by name.
            parts: By recorded name, the module calls that its component is made of.
            followed: Whether the data could be followed through the pass.

        Raises:
            ValueError: If none can.
        """
        if not followed:
            self._mixed |= {key for key, call in self._calls.items() if call.others}
        modules = dict(clean_modules(self._model))
        self._chosen = []
        with undisturbed(self._model):
            for number, name in enumerate(plan.names[1:], start=1):
                step = self._step(number, plan, records, parts, modules)
                if isinstance(step, str):
                    self.unfit[name] = step
                else:
                    self._chosen.append(step)
        if not self._chosen:
            raise ValueError(
                f"excitation is {self.share}, but no component can be called on a noisy input: "
                f"{self.reasons}. Leave it out, or choose other components with components=[...]."
            )
        self._heads = {step.head for step in self._chosen}
        self.steps = tuple(step.number for step in self._chosen)

    @property
    def reasons(self) -> str:
        """Components that are not excited, and why, in words."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.unfit.items():
            by_reason.setdefault(reason, []).append(name)
        return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())

    def pairs(self, seed: int) -> list[tuple[int, Tensor, Tensor]]:
        """Call every component that can be on its own input of this pass, with noise on top.

        Args:
            seed: Seeds the noise.

        Returns:
            For each step: its number, the state before it with noise, and the answer to it.

        Raises:
            ValueError: If a component was not called in this pass as in the first, or gave no tensor.
        """
        generator = torch.Generator().manual_seed(seed)
        pairs = []
        with undisturbed(self._model):
            for step in self._chosen or ():
                call = self._calls.get(step.head)
                if call is None or call.foreign is not None:
                    raise ValueError(
                        "a component that took one tensor in the first batch takes something else now; "
                        "leave excitation out, or choose components that take the same in every pass"
                    )
                noisy = self._noisy(step, call.state, generator)
                given = answer(step.modules, call, noisy)
                if step.shape is not None:
                    noisy = noisy.reshape(noisy.shape[0], *step.shape)
                pairs.append((step.number, noisy, given))
        return pairs

    def _step(
        self,
        number: int,
        plan: Plan,
        records: Mapping[str, Recorded],
        parts: Mapping[str, Sequence[str]],
        modules: Mapping[str, nn.Module],
    ) -> _Step | str:
        """Give the step, or why its component cannot be excited."""
        if len(plan.states[number]) > 1 or len(plan.states[number - 1]) > 1:
            return "its state, or the one before it, is joined from several"
        if plan.links[number - 1] != (number - 1,):
            return "reads several states"
        name, before = plan.names[number], plan.names[number - 1]
        if name not in parts:
            return "is no module's output"
        called = [part.partition("#") for part in parts[name]]
        chain = tuple(modules[module] for module, _, _ in called)
        head = id(chain[0]), int(called[0][2] or 0)
        call = self._calls.get(head)
        if call is None:
            return "takes no floating-point tensor"
        if call.foreign is not None:
            return f"takes a {call.foreign}, which a second call might alter"
        if head in self._mixed:
            return _SEVERAL
        if records[before].lengths is not None or records[name].lengths is not None:
            return "takes or follows packed sequences"
        state = records[before].tensor
        alike = call.state.numel() == state.numel() and call.state.shape[:1] == state.shape[:1]
        if not alike or not torch.equal(call.state.reshape(state.shape), state):
            return "takes something computed from the state before it"
        try:
            again = answer(chain, call, call.state)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return f"could not be called a second time: {reason}"
        if not _alike(again, records[name].tensor):
            return "gives something else on the same input"
        if call.state.shape == state.shape:
            return _Step(number, head, chain, None, plan.forms[before].batch_axis)
        return _Step(number, head, chain, tuple(state.shape[1:]), 0)

    def _noisy(self, step: _Step, state: Tensor, generator: torch.Generator) -> Tensor:
        wide = state.to(torch.promote_types(state.dtype, torch.float32))
        samples = wide.movedim(step.batch_axis, 0) if wide.ndim > 1 else wide
        spread = self._spreads.get(step.number)
        if spread is None or spread.mean.shape != samples.shape[1:]:
            # Sequences of another length: their positions are other units.
            spread = self._spreads[step.number] = _Spread(torch.zeros_like(exactly(samples[0])).double())
        spread.add(exactly(samples).double())
        noise = torch.randn(samples.shape, generator=generator, dtype=wide.dtype).to(wide.device)
        noise *= self.share * spread.std.to(wide.dtype).to(wide.device)
        if wide.ndim > 1:
            noise = noise.movedim(0, step.batch_axis)
        return (wide + noise).to(state.dtype)


class _Spread:
    """Running standard deviation of every unit."""

    def __init__(self, zeros: Tensor) -> None:
        self.count, self.mean, self._squares = 0, zeros, zeros.clone()

    def add(self, samples: Tensor) -> None:
        count, mean = samples.shape[0], samples.mean(dim=0)
        apart, total = mean - self.mean, self.count + count
        self._squares += (samples - mean).square().sum(dim=0)
        self._squares += apart.square() * self.count * count / total
        self.mean = self.mean + apart * count / total
        self.count = total

    @property
    def std(self) -> Tensor:
        return (self._squares / self.count).sqrt()


def _alike(given: Tensor, expected: Tensor) -> bool:
    if given.shape != expected.shape:
        return False
    given, expected = exactly(given).double(), exactly(expected).double()
    return bool((given - expected).norm() <= _REPEATS * expected.norm())


def check_excitation(share: float) -> None:
    """Refuse a share of noise that is no non-negative number.

    Args:
        share: The share.

    Raises:
        ValueError: If it is negative or not finite.
    """
    if not 0 <= share < float("inf"):
        raise ValueError(f"excitation is {share}; give a share of each unit's spread, 0 or above")
