"""Refuses arguments of another type than the one that is meant."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType
from typing import Any

from torch import Tensor

INTEGER = (Integral, "an integer")
NUMBER = (Real, "a number")
FUNCTION = (Callable, "a function")
TENSOR = (Tensor, "a torch.Tensor")
STATE_DICT = (Mapping, "a state_dict")


def check_type(expected: tuple[Any, str], **given: object) -> None:
    """Refuse arguments that are not of a type, which comes with what it is in words.

    Example:
        >>> check_type(INTEGER, samples=512, draws=5)
    """
    for name, value in given.items():
        # Python takes bool for an integer, and text for a list.
        other = isinstance(value, bool) or (expected[0] is Sequence and isinstance(value, str))
        if other or not isinstance(value, expected[0]):
            plain = isinstance(value, str | Real | NoneType)
            shown = reprlib.repr(value) if plain else f"of type {type(value).__name__}"
            raise ValueError(f"{name} is {shown}; it must be {expected[1]}")


def check_given(expected: tuple[Any, str], **given: object) -> None:
    """Refuse the same of arguments that may be left out."""
    check_type(expected, **{name: value for name, value in given.items() if value is not None})


def check_each(expected: tuple[Any, str], **given: Any) -> None:
    """Refuse what is no list, and lists of which an entry is not of a type.

    Example:
        >>> check_each(INTEGER, bits=(8, 4))
    """
    for name, values in given.items():
        check_type((Sequence, f"a list, of which each entry is {expected[1]}"), **{name: values})
        check_type(expected, **{f"{name}[{place}]": each for place, each in enumerate(values)})
