"""Names of states: of modules, their calls, what a call gives beside its state, sums, and the ends."""

from __future__ import annotations

from collections.abc import Sequence

INPUT = "input"
"""Name of the state before the first component."""

OUTPUT = "output"
"""Name of the last state where it is no component's."""

_SUM = "sum into "


def sum_name(call: str) -> str:
    """Name a sum of states by the module call that takes it first."""
    return f"{_SUM}{call}"


def is_sum(name: str) -> bool:
    """Check whether a state is a sum of others, which no component gave and which has no numbers."""
    return name.startswith(_SUM)


def numbered(name: str, place: int) -> str:
    """Tell what comes after the first of several, as later calls of a module, by its number."""
    return f"{name}#{place}" if place else name


def module_of(name: str) -> str:
    """Return the module of a call, or of what a call gave."""
    return name.partition("#")[0]


def further_name(call: str, place: int) -> str:
    """Name a tensor that a module call gives beside the one that has the call's name."""
    return f"{call}:{place}" if "#" in call else f"{call}#0:{place}"


def call_of(name: str) -> str:
    """Return the module call that gave a tensor of this name.

    Example:
        >>> call_of("net.0"), call_of(further_name("net.0", 2)), call_of(further_name("net.0#1", 2))
        ('net.0', 'net.0', 'net.0#1')
    """
    module, _, number = name.rpartition("#")
    if ":" not in number or not module:
        return name
    return f"{module}#{number.partition(':')[0]}".removesuffix("#0")


def listed(items: Sequence[str], separator: str = ", ") -> str:
    """Name the first few of many things."""
    shown = separator.join(items[:6])
    return shown if len(items) <= 6 else f"{shown}{separator}and {len(items) - 6} more"
