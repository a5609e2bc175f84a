"""Finds the modules that linear layers can take the place of, and which of them become one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from lightning_koopman.hooks import attach
from lightning_koopman.report import CreditReport
from lightning_koopman.runs import Runner
from lightning_koopman.sites import find_module


def groups_to_replace(
    model: nn.Module, report: CreditReport, components: Sequence[str], merge: bool
) -> list[list[str]]:
    """Find the modules that become one map each.

    Args:
        model: The network that the report was measured on.
        report: Says what the components are made of.
        components: Which components.
        merge: Whether neighbours become one map.

    Returns:
        Names of modules that follow each other, a list a map, in order of execution. What is linear
        already is left out.
    """
    groups: list[list[str]] = []
    for name in report.components:
        calls = list(report.parts[name])
        if name not in components:
            continue
        if merge and groups and _follows(model, groups[-1][-1], calls[0]):
            groups[-1] += calls
        else:
            groups.append(calls)
    bare = [len(g) == 1 and type(find_module(model, g[0])[0]) is nn.Linear for g in groups]
    return [group for group, already in zip(groups, bare, strict=True) if not already]


def _follows(model: nn.Module, call: str, following: str) -> bool:
    """Whether two modules are neighbours in one Sequential, so that nothing else sees between them."""
    parent = call.rpartition(".")[0]
    if parent != following.rpartition(".")[0] or not isinstance(
        find_module(model, parent)[0], nn.Sequential
    ):
        return False
    order = [child for child, _ in find_module(model, parent)[0].named_children()]
    places = [order.index(name.rpartition(".")[2]) for name in (call, following) if "#" not in name]
    return len(places) == 2 and places[1] - places[0] == 1


def check_replaceable(calls: Sequence[str], runner: Runner) -> None:
    """Run one batch to see that each module runs once, takes one tensor and gives one.

    Args:
        calls: Names of the modules.
        runner: Runs the network.

    Raises:
        ValueError: If one does not.
    """
    model = runner.model
    seen: dict[str, int] = dict.fromkeys(calls, 0)

    def look(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen[name] += 1
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(tensors) != 1 or not args or tensors[0] is not args[0] or not isinstance(output, Tensor):
            raise ValueError(
                f"{name!r} takes {len(tensors)} tensors and gives {type(output).__name__}; only a "
                "module that takes one tensor first and gives one can become linear"
            )

    with ExitStack() as hooks:
        for call in calls:
            module, number = find_module(model, call)
            if number:
                raise ValueError(
                    f"{call!r} is a module's second call; only modules that run once can go"
                )
            hooks.enter_context(attach(module, after=functools.partial(look, call)))
        Runner(model, runner.batches[:1], runner.forward_fn).run()
    repeated = [name for name, count in seen.items() if count != 1]
    if repeated:
        raise ValueError(
            f"{repeated} run {[seen[name] for name in repeated]} times in one pass; only modules that "
            "run once can become linear. Give each place a module of its own."
        )
