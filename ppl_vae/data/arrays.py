"""Load a user's .npz or .npy file: the kind of its numbers, the meaning of its axes, and its splits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ppl_vae.data import storage
from ppl_vae.data.array_files import advise_array, find_roles, read_arrays, read_labels
from ppl_vae.data.splits import (
    BINARY,
    COUNTS,
    LEVELS,
    PROBABILITIES,
    REAL,
    SPLIT_ORDER,
    Splits,
    abbreviate,
    complete_splits,
)
from ppl_vae.runtime.errors import pluralize

LARGEST_COUNT = 2**24  # single precision holds every whole number up to this one
BLOCK = 2**23  # bytes that are read at once
_MOST_ROUNDING = 0.01  # of the spread of real values
_CONSTANT = 64 * np.finfo(np.float64).eps  # of the mean: what a constant that was computed may vary by
_LARGEST_FLOAT = np.finfo(np.float32).max


def load_arrays(path: Path, *, missing: str = "forbid") -> Splits:
    """Load the splits of an .npz or .npy file: (N, D), (N, H, W), (N, H, W, C) or (N, C, H, W), C = 1 or 3.

    The arrays are named train, valid, test (also x_train, train_images and the like), or there is one of any name.
    Labels are named train_labels, y_train and the like, or labels or y if there is one array of images. Zeros and ones
    are binary; uint8 is 8-bit levels; other whole numbers from 0 are counts, also as floats; other floats in [0, 1] are
    probabilities; and all other floats are real values. Other files raise ValueError, and so does a NaN, unless
    ``missing`` is "train": then it is a missing value of floats of any kind, and stays a NaN in float32.
    """
    try:
        status = os.stat(path)
        if path.suffix.lower() != ".npy" or status.st_size <= storage.LARGE:
            return _read(path, missing, None)
        options = {"array": "own"} | ({} if missing == "forbid" else {"missing": missing})
        state = [status.st_size, status.st_mtime_ns]
        return storage.load_cached(path, options, state, lambda to: _read(path, missing, to))
    except OSError as error:
        raise ValueError(f"dataset: {path} cannot be read: {error.strerror}") from None


def _read(path: Path, missing: str, to: Path | None) -> Splits:
    sha256 = storage.compute_sha256(path)
    arrays, ignored = read_arrays(path, _find_roles)
    if "train" not in arrays:
        got = f"{ignored or 'none'}{advise_array(path, ignored)}"
        raise ValueError(f"{path}: expected one array, or arrays named train, valid and test, got {got}")
    given = {split: arrays[split] for split in SPLIT_ORDER if split in arrays}
    if any(array.ndim > 0 and len(array) == 0 for array in given.values()):
        raise ValueError(f"{path}: expected at least one image in every split, got an empty array")
    floats = {split: array for split, array in given.items() if missing == "train" and array.dtype.kind == "f"}
    shares = {split: share for split, array in floats.items() if (share := float(np.isnan(array).mean()))}
    kind = find_kind(path, given | {split: _first_observed(given[split]) for split in shares})
    images = {split: move_channels_first(path, split, array) for split, array in given.items()}
    shapes = {array.shape[1:] for array in images.values()}
    if len(shapes) > 1:
        raise ValueError(f"{path}: expected images of one shape in all splits, got {sorted(shapes)}")
    label_arrays = {split: arrays[f"{split} labels"] for split in images if f"{split} labels" in arrays}
    labels = read_labels(str(path), label_arrays, {split: len(array) for split, array in images.items()})
    all_rows = {split: torch.arange(len(array)) for split, array in images.items()}
    rows, numbers, words = complete_splits(str(path), all_rows, labels.numbers)
    words = "as the file gives them" if words == "as given" else words
    if ignored:
        words += f"; other arrays ignored: {', '.join(ignored)}"
    dtype = torch.uint8 if kind in (BINARY, LEVELS) and not shares else torch.float32
    holes = ", ".join(f"{share:.1%} of {split}" for split, share in shares.items())
    note = (f"missing values (NaN), which leave the likelihood: {holes}",) if shares else ()

    def iterate_blocks() -> Iterator[np.ndarray]:
        for split in SPLIT_ORDER:
            source = images.get(split, images["train"])
            for part in rows[split].split(_count_rows(source)):
                yield np.ascontiguousarray(source[part.numpy()], dtype=str(dtype).removeprefix("torch."))

    sizes = [len(rows[split]) for split in SPLIT_ORDER]
    stored = storage.collect(iterate_blocks(), (sum(sizes), *shapes.pop()), dtype, to)
    train, validation, test = stored.split(sizes)
    return Splits(
        path.name,
        kind,
        train,
        validation,
        test,
        sha256=sha256,
        split=words,
        labels=numbers,
        class_names=labels.class_names,
        notes=(*_describe_shape(given["train"].shape), *labels.notes, *note),
    )


def _find_roles(names: list[str]) -> dict[str, str]:
    roles = find_roles(names, "train")
    return roles if "train" in roles else {}


def _count_rows(array: np.ndarray) -> int:
    """Count the rows of a block."""
    return max(1, BLOCK * len(array) // max(1, array.nbytes))


def _first_observed(array: np.ndarray) -> np.ndarray:
    """Replace each NaN of an array (N, *E) by the first observed value of the same pixel, or of any."""
    values = array.reshape(len(array), -1)
    missing = np.isnan(values)
    if not missing.any() or missing.all():
        return array
    first = np.take_along_axis(values, (~missing).argmax(0)[None], 0)
    first = np.where(np.isnan(first), values[~missing][0], first)
    return np.where(missing, first, values).reshape(array.shape)


# --- The meaning of axes ---

_CHANNELS = (1, 3)
_FEW_COLUMNS = 4  # a last axis that short is more likely the channels of one image


def move_channels_first(path: Path, split: str, array: np.ndarray) -> np.ndarray:
    """Transpose one split from (N, D), (N, H, W), (N, H, W, C) or (N, C, H, W) to (N, D) or (N, C, H, W).

    Raises ValueError for other shapes, C other than 1 or 3, and no pixels.
    """
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in _CHANNELS:
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim != 2 and not has_channels_first(array.shape):
        last = "; for images along the last axis, save np.moveaxis(array, -1, 0)"
        raise ValueError(
            f"{path}: expected (N, D), (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels, "
            f"got shape {array.shape} in {split}" + last * (array.ndim == 4 and array.shape[2] in _CHANNELS)
        )
    if 0 in array.shape:
        raise ValueError(f"{path}: expected at least one pixel, got shape {array.shape} in {split}")
    return array


def has_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether a shape (N, *E) is read as (N, C, H, W); where C may also stand last, it is taken to be last."""
    return len(shape) == 4 and shape[1] in _CHANNELS and shape[3] not in _CHANNELS


def _describe_shape(shape: tuple[int, ...]) -> tuple[str, ...]:
    """Explain how an ambiguous shape was read, and how to have it read otherwise; empty where it is clear."""
    if len(shape) == 2 and shape[1] >= shape[0]:
        read = f"(N, D), a table of {shape[0]:,} rows and {shape[1]:,} columns"
        otherwise = "if each column is one example, save array.T; images are (N, H, W)"
    elif len(shape) == 3 and shape[2] <= _FEW_COLUMNS:
        read = f"(N, H, W), {shape[0]:,} gray images of {shape[1]} x {shape[2]}"
        otherwise = "if it is one image (H, W, C), save several of them as (N, H, W, C)"
    elif len(shape) == 3 and (shape[1] == shape[0] or shape[0] < shape[2] != shape[1]):
        read = f"(N, H, W), {shape[0]:,} gray images of {shape[1]} x {shape[2]}"
        otherwise = "if the images lie along the last axis, save np.moveaxis(array, -1, 0)"
    elif len(shape) == 4 and shape[1] in _CHANNELS and shape[3] in _CHANNELS:
        read = f"(N, H, W, C), images of {shape[1]} x {shape[2]} with {pluralize(shape[3], 'channel')}"
        otherwise = "if the channels come first, save array.transpose(0, 2, 3, 1)"
    else:
        return ()
    return (f"shape {shape} was read as {read}; {otherwise}",)


# --- The kind of the numbers ---

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
        return bool(self.low >= -_LARGEST_FLOAT and self.high <= _LARGEST_FLOAT)


def summarize(array: np.ndarray) -> ArraySummary:
    """Summarize an array in one pass over blocks of rows.

    The mean and the variance of blocks are combined as of Chan, Golub and LeVeque (1983).
    """
    if array.dtype.kind not in "buif":
        return ArraySummary(array.dtype)
    is_float = array.dtype.kind == "f"
    is_binary, is_whole, lows, highs = True, True, [], []
    num_not_finite, rounding, count, mean, squares = _NONE, _NONE, 0, _NONE, _NONE
    axis = 0 if array.ndim == 2 else None
    rows = array.reshape(1) if array.ndim == 0 else array
    num_rows = _count_rows(rows)
    for block in (rows[start : start + num_rows] for start in range(0, len(rows) if rows.size else 0, num_rows)):
        is_binary = is_binary and bool(((block == 0) | (block == 1)).all())
        is_whole = is_whole and (not is_float or bool((block == np.round(block)).all()))
        lows.append(block.min())
        highs.append(block.max())
        if not is_float:
            continue
        if not (lows[-1] >= -_LARGEST_FLOAT and highs[-1] <= _LARGEST_FLOAT):
            num_not_finite = num_not_finite + (~(np.abs(block) <= _LARGEST_FLOAT)).sum(axis=axis)
        elif array.dtype.itemsize > 4:
            error = np.abs(block.astype(np.float32).astype(np.float64) - block)
            rounding = np.maximum(rounding, error.max(axis=axis))
            size = len(block) if axis == 0 else block.size
            step, total = block.mean(axis=axis, dtype=np.float64) - mean, count + size
            mean = mean + step * size / total
            squares = squares + size * block.var(axis=axis, dtype=np.float64) + step * step * count * size / total
            count = total
    low, high = (np.min(lows), np.max(highs)) if lows else (math.nan, math.nan)  # either is NaN where a block's is
    spread = np.sqrt(squares / max(1, count))
    return ArraySummary(array.dtype, is_binary, is_whole, low, high, num_not_finite, rounding, mean, spread)


def find_kind(path: Path, splits: Mapping[str, np.ndarray], *, check_resolution: bool = True) -> str:
    """Find the kind of the numbers of the first split, a word of ``data.splits``, and refuse others of another kind.

    Floats are counts only where they are whole numbers in every split. Numbers of no kind raise ValueError.

    Args:
        path: what errors call the file.
        splits: (N, *E) each, one row or more.
        check_resolution: whether real values that single precision cannot tell apart are refused.
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
        + "; --missing train takes NaN as missing values"
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
