"""Find the kind of an array's numbers: binary, 8-bit levels, counts, probabilities or real values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ppl_vae.data.splits import BINARY, COUNTS, LEVELS, PROBABILITIES, REAL, abbreviate, pluralize

LARGEST_COUNT = 2**24  # single precision holds every whole number up to this one
BLOCK = 2**23  # bytes that are read at once
_MOST_ROUNDING = 0.01  # of the spread of real values
_CONSTANT = 64 * np.finfo(np.float64).eps  # of the mean: what a constant that was computed may vary by


def count_rows(array: np.ndarray) -> int:
    """Count the rows of a block."""
    return max(1, BLOCK * len(array) // max(1, array.nbytes))


_NONE = np.zeros(1)


class ArraySummary(NamedTuple):
    """Summary of an array's numbers.

    The last four are of floats, for each column of a table (N, D) or for all pixels of images together:
    ``num_not_finite`` counts NaN and values that single precision cannot hold; for floats longer than single precision
    there are the largest error of rounding to it, the mean and the standard deviation.
    """

    dtype: np.dtype
    is_binary: bool = False
    is_whole: bool = False
    low: float = math.nan
    high: float = math.nan
    num_not_finite: np.ndarray = _NONE
    rounding: np.ndarray = _NONE
    mean: np.ndarray = _NONE
    spread: np.ndarray = _NONE

    def has_kind(self, kind: str) -> bool:
        """Whether the numbers are of a kind, a word of ``data.splits``."""
        is_float = self.dtype.kind == "f"
        if kind == BINARY:
            return self.is_binary
        if kind == LEVELS:
            return self.dtype == np.uint8
        if kind == PROBABILITIES:
            return is_float and bool(self.low >= 0 and self.high <= 1)
        if kind == REAL:
            return is_float and self.is_finite()
        return self.dtype.kind in "buif" and self.is_whole and 0 <= float(self.low) <= float(self.high) <= LARGEST_COUNT

    def is_finite(self) -> bool:
        """Whether both ends are finite, also as float32; False where one is NaN."""
        most = np.finfo(np.float32).max
        return bool(-most <= self.low and self.high <= most)


def summarize(array: np.ndarray) -> ArraySummary:
    """Summarize an array in one pass over blocks of rows.

    The mean and the variance of blocks are combined as of Chan, Golub and LeVeque (1983).
    """
    if array.dtype.kind not in "buif":
        return ArraySummary(array.dtype)
    is_binary, is_whole, lows, highs, rounding = True, True, [], [], _NONE
    num_not_finite, count, mean, squares = _NONE, 0, _NONE, _NONE
    axis = 0 if array.ndim == 2 else None
    is_long = array.dtype.kind == "f" and array.dtype.itemsize > 4
    for block in _iterate_blocks(array):
        is_binary = is_binary and bool(((block == 0) | (block == 1)).all())
        is_whole = is_whole and (array.dtype.kind != "f" or bool((block == np.round(block)).all()))
        low, high = block.min(), block.max()
        lows.append(low)
        highs.append(high)
        is_finite = ArraySummary(array.dtype, low=low, high=high).is_finite()
        if array.dtype.kind == "f" and not is_finite:
            num_not_finite = num_not_finite + (~(np.abs(block) <= np.finfo(np.float32).max)).sum(axis=axis)
        if is_long and is_finite:
            error = np.abs(block.astype(np.float32).astype(np.float64) - block)
            rounding = np.maximum(rounding, error.max(axis=axis))
            size = len(block) if axis == 0 else block.size
            step, total = block.mean(axis=axis, dtype=np.float64) - mean, count + size
            mean = mean + step * size / total
            squares = squares + size * block.var(axis=axis, dtype=np.float64) + step * step * count * size / total
            count = total
    low, high = (np.min(lows), np.max(highs)) if lows else (math.nan, math.nan)  # either is NaN where a block's is
    return ArraySummary(
        array.dtype, is_binary, is_whole, low, high, num_not_finite, rounding, mean, np.sqrt(squares / max(1, count))
    )


def _iterate_blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    if array.ndim == 0:
        yield array
    elif array.size:
        num_rows = count_rows(array)
        yield from (array[i : i + num_rows] for i in range(0, len(array), num_rows))


def find_kind(path: Path, splits: Mapping[str, np.ndarray], *, check_resolution: bool = True) -> str:
    """Find the kind of the numbers of the first split, a word of ``data.splits``, and refuse others of another kind.

    Floats are counts only where they are whole numbers in every split.

    Args:
        path: what errors call the file.
        splits: (N, *E) each, one row or more.
        check_resolution: whether real values that single precision cannot tell apart are refused.

    Raises:
        ValueError: numbers of no kind, or that single precision cannot tell apart.
    """
    summaries = {split: summarize(array) for split, array in splits.items()}
    for split, summary in summaries.items():
        _check_finite(path, split, summary)
    train, *others = summaries.values()
    if train.dtype.kind not in "buif":
        raise ValueError(f"{path}: expected numbers, got dtype {train.dtype}")
    kind = next((kind for kind in (BINARY, LEVELS, PROBABILITIES, COUNTS, REAL) if train.has_kind(kind)), None)
    if kind is None:
        raise ValueError(
            f"{path}: expected zeros and ones, uint8 levels, counts from 0 to {LARGEST_COUNT:,}, or floats, "
            f"got {train.dtype} from {train.low} to {train.high} in train; real values are saved as floats, centered "
            f"in float64: {_advise_centering(path)}"
        )
    if kind == COUNTS and train.dtype.kind == "f" and not all(other.has_kind(COUNTS) for other in others):
        kind = REAL
    for split, summary in summaries.items():
        if not summary.has_kind(kind):
            got = f"other values (dtype {summary.dtype})"
            raise ValueError(f"{path}: expected {kind} in {split} as in train, got {got}")
        if kind == REAL and check_resolution:
            _check_resolution(path, split, summary)
    return kind


def _check_finite(path: Path, split: str, summary: ArraySummary) -> None:
    """Refuse NaN, infinity and what float32 cannot hold, and name the columns of a table that have them."""
    if summary.dtype.kind != "f" or summary.is_binary or summary.is_finite():
        return
    counts = summary.num_not_finite
    columns = np.flatnonzero(counts).tolist() if counts.size > 1 else []
    where = f", in {'column' if len(columns) == 1 else 'columns'} {abbreviate(map(str, columns))}, counted from 0"
    raise ValueError(
        f"{path}: expected finite values, got NaN or infinity in {split}: {int(counts.sum()):,} of the values"
        + where * bool(columns)
    )


def _check_resolution(path: Path, split: str, summary: ArraySummary) -> None:
    """Refuse values that float32 rounds to a coarse grid, such as timestamps: a density would fit the grid.

    A column whose spread is the rounding of float64 itself is a constant, and passes.
    """
    is_constant = summary.spread <= _CONSTANT * np.abs(summary.mean)
    columns = np.flatnonzero((summary.rounding > _MOST_ROUNDING * summary.spread) & ~is_constant).tolist()
    if not columns:
        return
    mean, spread = float(summary.mean.flat[columns[0]]), float(summary.spread.flat[columns[0]])
    where = f"in {split}" if summary.spread.size == 1 else f"in column {columns[0]} of {split}"
    more = f", and likewise in {pluralize(len(columns) - 1, 'more column')}" * (len(columns) > 1)
    raise ValueError(
        f"{path}: expected values that single precision can tell apart, got {summary.dtype} around {mean:.7g} with a "
        f"spread of {spread:.2g} {where}{more}; center them first, in float64: {_advise_centering(path)}"
    )


def _advise_centering(path: Path) -> str:
    """Write the line of NumPy that centers the columns of a file; VAEDensity centers its tables itself."""
    if path.suffix.lower() == ".npy":
        name = repr(path.name)
        return f"x = numpy.load({name}); numpy.save('centered.npy', x - x.mean(0))"
    return "x - train.mean(0), with the training means for every split"
