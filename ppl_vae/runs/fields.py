"""Options as dataclass fields: each declares its default, help, check and group once.

The command line, ``--config FILE.toml``, the checks of Python callers and ``config.json`` all read these fields.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Self, TypeVar

T = TypeVar("T")
REQUIRED: Any = MISSING  # the default of an option that must be given
KINDS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


@dataclass(frozen=True)
class Check:
    """A condition on a value, in words and as a predicate."""

    words: str
    holds: Callable[[Any], bool]


POSITIVE_INTEGER = Check("a whole number, at least 1", lambda v: 1 <= v <= 2**31)
WIDTH = Check("a whole number, 1 to 65,536", lambda v: 1 <= v <= 2**16)
NON_NEGATIVE_INTEGER = Check("a whole number, 0 to 2^31 - 1", lambda v: 0 <= v < 2**31)
POSITIVE = Check("a finite number above 0", lambda v: 0 < v < math.inf)
NON_NEGATIVE = Check("a finite number, at least 0", lambda v: 0 <= v < math.inf)
BELOW_ONE = Check("a number, 0 or more and below 1", lambda v: 0 <= v < 1)
NOT_EMPTY = Check("a word", lambda v: bool(v))
BOOLEAN = Check("true or false", lambda v: v in (True, False))


def option(
    default: T,
    help: str,
    check: Check | Iterable[str] = NOT_EMPTY,
    *,
    group: str = "",
    rare: bool = False,
    positional: bool = False,
) -> T:
    """A dataclass field that is an option.

    Args:
        default: Its value where nothing is given; ``REQUIRED`` for an argument that must be given.
        help: One line for ``--help``; the default is added to it.
        check: What each value must satisfy, or the words to choose from.
        group: The heading that it stands under in ``--help``.
        rare: Whether only ``--help-all`` shows it.
        positional: Whether it is an argument without a flag.
    """
    choices = None if isinstance(check, Check) else tuple(check)
    if choices is not None:
        check = Check(f"one of {', '.join(choices)}", lambda v, words=choices: v in words)  # type: ignore[misc]
    shown = {"help": help, "group": group, "rare": rare, "positional": positional}
    return field(default=default, metadata=shown | {"check": check, "choices": choices})


def format_flag(name: str) -> str:
    """A field's name as it is typed.

    >>> format_flag("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def get_kind(spec: Field[object]) -> type:
    """The type of one value: int, float, str or bool, as the annotation says."""
    found = re.search("|".join(KINDS), str(spec.type))
    assert found is not None
    return KINDS[found.group()]


def is_list(spec: Field[object]) -> bool:
    """Whether the option takes several values."""
    return "tuple[" in str(spec.type)


class CheckedOptions:
    """Base of options whose values are checked when they are made."""

    @classmethod
    def make(cls, values: Mapping[str, object]) -> Self:
        """The options with these values, by name."""
        return cls(**values)

    def __post_init__(self) -> None:
        for spec in fields(self):  # type: ignore[arg-type]
            if "check" in spec.metadata:
                value = convert_value(spec, getattr(self, spec.name))
                check_value(spec, value)
                object.__setattr__(self, spec.name, value)


def convert_value(spec: Field[object], value: object) -> object:
    """Converts NumPy's numbers and arrays to Python's, and lists and single values to tuples where a list is meant."""
    value = _to_python_number(value)  # an array becomes a list
    if not is_list(spec):
        return value
    if isinstance(value, int | str) and not isinstance(value, bool):
        value = (value,)
    return tuple(map(_to_python_number, value)) if isinstance(value, list | tuple) else value


def _to_python_number(value: object) -> object:
    return value.tolist() if hasattr(value, "tolist") else value


def check_value(spec: Field[object], value: object) -> None:
    """Checks the value of one option. Raises ValueError, which names the option, what was expected and what came."""
    if value is None and "None" in str(spec.type):
        return
    kind, check = get_kind(spec), spec.metadata["check"]
    name = spec.name.upper() if spec.metadata["positional"] else format_flag(spec.name)
    if is_list(spec) and (not isinstance(value, tuple) or not value):
        raise ValueError(f"{name}: expected a list, each {check.words}, got {value!r}")
    for one in value if is_list(spec) and isinstance(value, tuple) else (value,):
        has_type = isinstance(one, (int, float) if kind is float else kind)
        if not has_type or (isinstance(one, bool) and kind is not bool) or not check.holds(one):
            raise ValueError(f"{name}: expected {check.words}, got {one!r}")


def expand_home(value: object) -> object:
    """The value with the home folder in place of a leading ~, which a shell leaves alone in --name=~/photos."""
    if isinstance(value, list | tuple):
        return tuple(map(expand_home, value))
    return os.path.expanduser(value) if isinstance(value, str) else value
