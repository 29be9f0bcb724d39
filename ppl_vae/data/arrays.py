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
from ppl_vae.data.array_files import find_roles, read_arrays, read_labels
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

LARGEST_COUNT = 2**24  # single precision holds every whole number up to this one
BLOCK = 2**23  # bytes that are read at once
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
        options, state = {"array": "own", "missing": missing}, [status.st_size, status.st_mtime_ns]
        return storage.load_cached(path, options, state, lambda to: _read(path, missing, to))
    except OSError as error:
        raise ValueError(f"dataset: {path} cannot be read: {error.strerror}") from None


def _read(path: Path, missing: str, to: Path | None) -> Splits:
    """Read and split arrays, and collect them in the file ``to``."""
    arrays, ignored = read_arrays(path, _find_roles)
    given = {split: arrays[split] for split in SPLIT_ORDER if split in arrays}
    if "train" not in given:
        raise ValueError(f"{path}: expected one array, or arrays named train, valid and test, got {ignored or 'none'}")
    if any(array.ndim > 0 and len(array) == 0 for array in given.values()):
        raise ValueError(f"{path}: expected at least one image in every split, got an empty array")
    kind = find_kind(path, given, skip_missing=missing == "train")
    images = {split: move_channels_first(path, split, array) for split, array in given.items()}
    shapes = {array.shape[1:] for array in images.values()}
    if len(shapes) > 1:
        raise ValueError(f"{path}: expected images of one shape in all splits, got {sorted(shapes)}")
    label_arrays = {split: arrays[f"{split} labels"] for split in images if f"{split} labels" in arrays}
    labels = read_labels(str(path), label_arrays, {split: len(array) for split, array in images.items()})
    all_rows = {split: torch.arange(len(array)) for split, array in images.items()}
    rows, numbers, words = complete_splits(str(path), all_rows, labels.numbers)
    words = "as the file gives them" if words == "as given" else words
    floats = {split: array for split, array in given.items() if missing == "train" and array.dtype.kind == "f"}
    shares = {split: share for split, array in floats.items() if (share := float(np.isnan(array).mean()))}
    holes = ", ".join(f"{share:.1%} of {split}" for split, share in shares.items())
    note = (f"missing values (NaN), which leave the likelihood: {holes}",) if shares else ()
    dtype = torch.uint8 if kind in (BINARY, LEVELS) and not shares else torch.float32

    def iterate_splits() -> Iterator[np.ndarray]:
        for split in SPLIT_ORDER:
            source = images.get(split, images["train"])
            for part in rows[split].split(_count_rows(source)):
                yield np.ascontiguousarray(source[part.numpy()], dtype=str(dtype).removeprefix("torch."))

    sizes = [len(rows[split]) for split in SPLIT_ORDER]
    train, validation, test = storage.collect(iterate_splits(), (sum(sizes), *shapes.pop()), dtype, to).split(sizes)
    return Splits(
        path.name,
        kind,
        train,
        validation,
        test,
        sha256=storage.compute_sha256(path),
        split=f"{words}; other arrays ignored: {', '.join(ignored)}" if ignored else words,
        labels=numbers,
        class_names=labels.class_names,
        notes=(*labels.notes, *note),
    )


def _find_roles(names: list[str]) -> dict[str, str]:
    roles = find_roles(names, "train")
    return roles if "train" in roles else {}


def _count_rows(array: np.ndarray) -> int:
    """Count the rows of a block."""
    return max(1, BLOCK * len(array) // max(1, array.nbytes))


def _iterate_blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    rows = np.atleast_1d(array)
    size = _count_rows(rows)
    return (rows[start : start + size] for start in range(0, len(rows) if rows.size else 0, size))


# --- The meaning of axes ---

_CHANNELS = (1, 3)


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


# --- The kind of the numbers ---


class ArraySummary(NamedTuple):
    """Summary of an array's numbers; ``low`` and ``high`` are NaN where one of them is, or where there are none."""

    dtype: np.dtype
    is_binary: bool = False
    is_whole: bool = False
    low: float = math.nan
    high: float = math.nan

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


def summarize(array: np.ndarray, *, skip_missing: bool = False) -> ArraySummary:
    """Summarize an array in one pass over blocks of rows; ``skip_missing`` leaves NaN out."""
    if array.dtype.kind not in "buif":
        return ArraySummary(array.dtype)
    is_binary, is_whole, lows, highs = True, True, [], []
    for rows in _iterate_blocks(array):
        block = rows[~np.isnan(rows)] if skip_missing else rows
        if block.size:
            is_binary = is_binary and bool(((block == 0) | (block == 1)).all())
            is_whole = is_whole and bool((block == np.round(block)).all())
            lows.append(block.min())
            highs.append(block.max())
    if not lows:
        return ArraySummary(array.dtype)
    return ArraySummary(array.dtype, is_binary, is_whole, np.min(lows), np.max(highs))


def find_kind(path: Path, splits: Mapping[str, np.ndarray], *, skip_missing: bool = False) -> str:
    """Find the kind of the numbers of the first split, a word of ``data.splits``, and refuse others of another kind.

    Floats are counts only where they are whole numbers in every split. Numbers of no kind raise ValueError.

    Args:
        path: what errors call the file.
        splits: (N, *E) each, one row or more.
        skip_missing: whether a NaN is a missing value, and no error.
    """
    summaries = {split: summarize(array, skip_missing=skip_missing) for split, array in splits.items()}
    for split, summary in summaries.items():
        if summary.dtype.kind == "f" and not summary.is_finite():
            _refuse_not_finite(path, split, splits[split])
    train, *others = summaries.values()
    if train.dtype.kind not in "buif":
        raise ValueError(f"{path}: expected numbers, got dtype {train.dtype}")
    kind = next((kind for kind in (BINARY, LEVELS, PROBABILITIES, COUNTS, REAL) if train.has_kind(kind)), None)
    if kind is None:
        raise ValueError(
            f"{path}: expected zeros and ones, uint8 levels, counts from 0 to {LARGEST_COUNT:,}, or floats, "
            f"got {train.dtype} from {train.low} to {train.high} in train; save real values as floats, x - x.mean(0)"
        )
    if kind == COUNTS and train.dtype.kind == "f" and not all(other.has_kind(COUNTS) for other in others):
        kind = REAL
    for split, summary in summaries.items():
        if not summary.has_kind(kind):
            got = f"other values (dtype {summary.dtype})"
            raise ValueError(f"{path}: expected {kind} in {split} as in train, got {got}")
    return kind


def _refuse_not_finite(path: Path, split: str, array: np.ndarray) -> None:
    """Raise ValueError for NaN, infinity and what float32 cannot hold; it names the columns of a table."""
    counts = np.sum([(~(np.abs(block) <= _LARGEST_FLOAT)).sum(0) for block in _iterate_blocks(array)], 0)
    columns = np.flatnonzero(counts).tolist() if array.ndim == 2 else []
    where = f", in {'column' if len(columns) == 1 else 'columns'} {abbreviate(map(str, columns))}, counted from 0"
    raise ValueError(
        f"{path}: expected finite values, got NaN or infinity in {split}: {int(counts.sum()):,} of the values"
        + where * bool(columns)
        + "; --missing train takes NaN as missing values"
    )
