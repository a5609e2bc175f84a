"""Refuses arguments of another type than the one that is meant."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from numbers import Integral, Real
from types import NoneType
from typing import Any

from torch import nn

INTEGER = (Integral, "an integer")
NUMBER = (Real, "a number")
MODULE = (nn.Module, "a torch.nn.Module")
STATE_DICT = (Mapping, "a state_dict")


def check_type(expected: tuple[Any, str], **given: object) -> None:
    """Refuse arguments that are not of a type, which comes with what it is in words.

    Example:
        >>> check_type(INTEGER, samples=512, draws=5)
    """
    for name, value in given.items():
        # Python takes bool for an integer.
        if isinstance(value, bool) or not isinstance(value, expected[0]):
            plain = isinstance(value, str | Real | NoneType)
            shown = reprlib.repr(value) if plain else f"of type {type(value).__name__}"
            raise ValueError(f"{name} is {shown}; it must be {expected[1]}")


def check_given(expected: tuple[Any, str], **given: object) -> None:
    """Refuse the same of arguments that may be left out."""
    check_type(expected, **{name: value for name, value in given.items() if value is not None})
