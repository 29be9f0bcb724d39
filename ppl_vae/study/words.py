"""Numbers as words: a mean with its error, a share, a list. The study's text takes every number through these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Value = Mapping[str, float]

_MOST_DECIMALS = 6  # of an error; a finer one is given with a power of ten
_MOST_ZEROS = 4  # after the point, of a number without an error
_LEAST_PERCENT = 1e-4
_TWO_DIGITS = 3.55  # an error that begins so, or lower, is given to two digits. Source: the Particle Data Group's rule
_NAMES = {
    "mnist": "MNIST",
    "static-mnist": "static MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "kmnist": "KMNIST",
    "caltech-silhouettes": "Caltech silhouettes",
    "cifar10": "CIFAR-10",
    "svhn": "SVHN",
}


def plus_minus(value: Value) -> str:
    """mean ± stderr, with one digit of the error, or two up to 35; the mean alone where there is no error."""
    mean, stderr = value["mean"], value.get("stderr")
    if not stderr or not math.isfinite(stderr):
        return number(mean)
    decimals = _decimals(stderr)
    if decimals > _MOST_DECIMALS:
        return f"{number(mean)} ± {stderr:.1g}"
    return f"{_no_minus_zero(mean, decimals)} ± {stderr:,.{decimals}f}"


def signed(value: Value) -> str:
    """As ``plus_minus``, with the sign of a difference."""
    return ("+" if value["mean"] > 0 else "") + plus_minus(value)


def size_of(value: Value) -> str:
    """As ``plus_minus``, of the difference's size: what "better by" is followed by."""
    return plus_minus({**value, "mean": abs(value["mean"])})


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, without an exponent where a reader can do without."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    if decimals > _MOST_ZEROS + digits:
        return f"{value:.{digits}g}"
    text = f"{round(value, decimals):,.{max(0, decimals)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float) -> str:
    """A share as percent: whole ones, finer below ten."""
    hundredth = 100 * share
    return f"{hundredth:.0f}%" if abs(hundredth) >= 10 or hundredth == 0 else f"{hundredth:.2g}%"


def percent_plus_minus(share: Value) -> str:
    """A share with its error, as percent."""
    stderr = share.get("stderr")
    if 0 < 100 * (abs(share["mean"]) + 2 * (stderr or 0.0)) < _LEAST_PERCENT:
        return f"less than {_LEAST_PERCENT:.4f}%"
    hundredth = {"mean": 100 * share["mean"], "stderr": None if stderr is None else 100 * stderr}
    return plus_minus(hundredth) + "%"  # type: ignore[arg-type]


def count(value: int) -> str:
    """With a comma for thousands."""
    return f"{value:,}"


def several(value: int, what: str) -> str:
    """A count and its noun."""
    return f"{value:,} {what}" + "s" * (value != 1)


def listed(items: Sequence[Any]) -> str:
    """a, b and c."""
    words = [item if isinstance(item, str) else f"{item:g}" for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def beta(value: float) -> str:
    """beta = 0.1."""
    return f"beta = {value:g}"


def data_name(dataset: str) -> str:
    """As its authors write it; a person's own images by their file's name, and called so."""
    own = dataset.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    return _NAMES.get(dataset, f"your data ({own})")


def differs(value: Value, from_what: float, stderrs: float = 2.0) -> int:
    """1 above, -1 below, 0 within so many standard errors, which proves no equality."""
    away = stderrs * (value.get("stderr") or 0.0)
    return int(value["mean"] > from_what + away) - int(value["mean"] < from_what - away)


def _decimals(stderr: float) -> int:
    power = math.floor(math.log10(stderr))
    digits = 2 if stderr / 10**power < _TWO_DIGITS else 1
    return max(0, digits - 1 - power)


def _no_minus_zero(mean: float, decimals: int) -> str:
    return f"{round(mean, decimals) + 0.0:,.{decimals}f}"
