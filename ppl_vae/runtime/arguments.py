"""Checks of what Python callers give: counts and widths, NumPy's numbers included. Standard library only."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

Widths = int | Sequence[int]


class ShapeError(ValueError):
    """A part of a model gives another shape than the model needs.

    The message stays one line: Pyro appends its table of shapes to the message of an error that passes through it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.partition("\n")[0])


def check_count(name: str, value: Any, *, least: int = 1) -> int:
    """The whole number ``value`` as a Python int.

    Raises:
        ValueError: it is no whole number, or below ``least``.
    """
    number: Any = None if isinstance(value, bool) else value
    try:
        count = operator.index(number)
    except TypeError:
        raise ValueError(f"{name}: expected a whole number, got {value!r}") from None
    if count < least:
        raise ValueError(f"{name}: expected at least {least}, got {count}")
    return count


def check_widths(name: str, value: Any) -> tuple[int, ...]:
    """The widths of layers, or the sizes of dimensions, as a tuple; one number stands for a tuple of one.

    Raises:
        ValueError: one of them is no whole number of at least 1.
    """
    if hasattr(value, "__index__") and not getattr(value, "shape", ()):  # arrays have the method too
        value = (value,)
    try:
        widths = tuple(value)
    except TypeError:
        raise ValueError(f"{name}: expected a whole number or a sequence of them, got {value!r}") from None
    return tuple(check_count(name, width) for width in widths)
