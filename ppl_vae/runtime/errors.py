"""The errors of this package, checks of arguments, and counts in words. It imports the standard library only."""

from __future__ import annotations

import operator
import signal
from collections.abc import Sequence

Widths = int | Sequence[int]

# What torch and its libraries say when memory runs out, on a CPU and on a GPU. Only some of these errors have a type
# of their own in torch.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "out of memory",
    "ALLOC_FAILED",
)


class NotFinite(ArithmeticError):
    """A number that should be finite is NaN or infinite."""


class CannotCapture(ValueError):
    """A function cannot be written as one graph, or the graph cannot be compiled; the message says why."""


class ShapeError(ValueError):
    """A part of a model returns another shape than the model needs.

    The message is one line: Pyro appends its table of shapes to the message of an error that passes through it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.partition("\n")[0])


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the work.

    Args:
        words: What has been kept, and how to continue.
        number: The signal's number. The exit code is 128 + number.
    """

    def __init__(self, words: str = "", *, number: int = signal.SIGINT) -> None:
        super().__init__(words)
        self.number = number


class EndedElsewhere(ConnectionError):
    """Another process of the same training or evaluation raised an error, which it reports itself."""


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. A process that the system kills for memory raises none."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def check_count(name: str, value: object, *, least: int = 1) -> int:
    """Return ``value`` as a Python int; NumPy's integers are accepted.

    Raises:
        ValueError: It is no whole number, or it is below ``least``.
    """
    try:
        count = operator.index(None if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name}: expected a whole number, got {value!r}") from None
    if count < least:
        raise ValueError(f"{name}: expected at least {least}, got {count}")
    return count


def check_widths(name: str, value: object) -> tuple[int, ...]:
    """Return the widths of layers, or the sizes of dimensions, as a tuple; one number becomes a tuple of one.

    Raises:
        ValueError: One of them is no whole number of at least 1.
    """
    if hasattr(value, "__index__") and not getattr(value, "shape", ()):  # arrays have the method too
        value = (value,)
    try:
        widths = tuple(value)  # type: ignore[arg-type, var-annotated]
    except TypeError:
        raise ValueError(f"{name}: expected a whole number or a sequence of them, got {value!r}") from None
    return tuple(check_count(name, width) for width in widths)


def pluralize(count: int, what: str) -> str:
    """Write a count with its noun: 1 file, 2 files."""
    return f"{count:,} {what}" + "s" * (count != 1)
