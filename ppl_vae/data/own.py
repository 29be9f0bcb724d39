"""A user's data: arrays in an .npz or .npy file, with labels where there are any."""

from __future__ import annotations

import hashlib
import math
import os
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ppl_vae.data import cache, limits
from ppl_vae.data.array_files import advise_array, explain_unreadable, find_roles, read_arrays
from ppl_vae.data.labels import read_labels
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
    pluralize,
)

_MOST_ROUNDING = 0.01  # of the spread of real values
_CONSTANT = 64 * np.finfo(np.float64).eps  # of the mean: what a constant that was computed may vary by
LARGEST_COUNT = 2**24  # to here single precision holds every whole number


def load_arrays(path: Path) -> Splits:
    """Load the splits of an .npz or .npy file: (N, D), (N, H, W), (N, H, W, C) or (N, C, H, W), C = 1 or 3.

    The arrays are named train, valid, test (also x_train, train_images and the like), or there is one of any name;
    labels are train_labels or y_train and the like, or labels or y beside one array of images. Zeros and ones are
    binary, uint8 is 8-bit levels, other whole numbers from 0 are counts, also as floats, other floats in [0, 1] are
    probabilities, and all other floats are real values.

    Raises:
        ValueError: a file that cannot be read, or arrays that are no images.
    """
    if path.suffix.lower() == ".npy" and _size(path) > limits.LARGE:
        return _large_array(path)
    sha256 = _sha256(path)
    arrays, ignored = read_arrays(path, _find_roles)
    if "train" not in arrays:
        got = ignored or "none"
        raise ValueError(
            f"{path}: expected one array, or arrays named train, valid and test, got {got}{advise_array(path, ignored)}"
        )
    images = {split: arrays[split] for split in SPLIT_ORDER if split in arrays}
    if any(array.ndim > 0 and len(array) == 0 for array in images.values()):
        raise ValueError(f"{path}: expected at least one image in every split, got an empty array")
    kind = _kind_of_splits(path, {split: _look(array) for split, array in images.items()})
    tensors = {
        split: torch.from_numpy(np.ascontiguousarray(channels_first(path, split, array), dtype=_STORED[kind][0]))
        for split, array in images.items()
    }
    shapes = {tuple(x.shape[1:]) for x in tensors.values()}
    if len(shapes) > 1:
        raise ValueError(f"{path}: expected images of one shape in all splits, got {sorted(shapes)}")
    label_arrays = {split: arrays[f"{split} labels"] for split in tensors if f"{split} labels" in arrays}
    labels = read_labels(str(path), label_arrays, {split: len(x) for split, x in tensors.items()})
    given, numbers, words = complete_splits(str(path), tensors, labels.numbers)
    if words == "as given":
        words = "as the file gives them"
    if ignored:
        words += f"; other arrays ignored: {', '.join(ignored)}"
    return Splits(
        name=path.name,
        kind=kind,
        train=given["train"],
        validation=given["validation"],
        test=given["test"],
        sha256=sha256,
        split=words,
        labels=numbers,
        class_names=labels.class_names,
        notes=(*_shape_notes(images["train"].shape), *labels.notes),
    )


def _find_roles(names: list[str]) -> dict[str, str]:
    roles = find_roles(names, "train")
    return roles if "train" in roles else {}


def _size(path: Path) -> int:
    """Raises ValueError where there is no such file."""
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise ValueError(f"dataset: {path} cannot be read: {error.strerror}") from None


def _sha256(path: Path) -> str:
    """Raises ValueError where it cannot be read."""
    try:
        return cache.compute_sha256(path)
    except OSError as error:
        raise ValueError(f"dataset: {path} cannot be read: {error.strerror}") from None


# --- An array that is not read into memory ---


def _large_array(path: Path) -> Splits:
    """Load an .npy file through the cache: it is read once, in blocks, and then mapped."""
    status = os.stat(path)
    source = cache.source(path, {"array": "own"}, [status.st_size, status.st_mtime_ns])
    return cache.cached(source, path.name, partial(_draft, path))


def _draft(path: Path) -> cache.Draft:
    """Read a file twice: for its kind and its checksum, and then in the order of the splits."""
    try:
        with path.open("rb") as file:
            header = limits.read_array_header(file, os.path.getsize(path))
            file.seek(0)
            digest = hashlib.sha256(file.read(header.offset))
            if header.is_fortran:  # the numbers lie in another order than that in which they are looked at
                while block := file.read(_AT_ONCE):
                    digest.update(block)
        order: Literal["C", "F"] = "F" if header.is_fortran else "C"
        array = np.asarray(np.memmap(path, header.dtype, "r", header.offset, header.shape, order))
    except OSError as error:
        raise ValueError(f"dataset: {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged header is parsed as Python, and raises nearly every type
        raise ValueError(f"{path}: not a readable array file: {explain_unreadable(error)}") from None
    if array.ndim > 0 and len(array) == 0:
        raise ValueError(f"{path}: expected at least one image in every split, got an empty array")
    kind = _kind_of_splits(path, {"train": _look(array, None if header.is_fortran else digest)})
    images = channels_first(path, "train", array)
    rows, labels, words = complete_splits(str(path), {"train": torch.arange(len(images))}, {})
    stored, dtype = _STORED[kind]
    places = torch.cat([rows[split] for split in SPLIT_ORDER]).split(_rows_at_once(images))
    return cache.Draft(
        kind=kind,
        dtype=dtype,
        event_shape=tuple(images.shape[1:]),
        sizes={split: len(index) for split, index in rows.items()},
        blocks=(np.ascontiguousarray(images[index.numpy()], dtype=stored) for index in places),
        sha256=digest.hexdigest(),
        split="as the file gives them" if words == "as given" else words,
        labels=labels,
        notes=_shape_notes(array.shape),
    )


_STORED: dict[str, tuple[type[np.generic], torch.dtype]] = {
    BINARY: (np.uint8, torch.uint8),
    LEVELS: (np.uint8, torch.uint8),
    PROBABILITIES: (np.float32, torch.float32),
    REAL: (np.float32, torch.float32),
    COUNTS: (np.float32, torch.float32),
}
_AT_ONCE = 2**23  # bytes


def _rows_at_once(array: np.ndarray) -> int:
    return max(1, _AT_ONCE * len(array) // max(1, array.nbytes))


# --- What kind of numbers they are ---


class _Seen(NamedTuple):
    """Summary of an array's numbers.

    Rounding, mean and spread are of floats longer than single precision: the largest error of rounding to it, and both
    moments, of each column of a table (N, D) or of all pixels of images together. ``not_finite`` counts NaN and what
    single precision cannot hold, likewise.
    """

    dtype: np.dtype
    is_binary: bool
    is_whole: bool
    low: Any
    high: Any
    rounding: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    not_finite: np.ndarray


_NONE = np.zeros(1)


def _look(array: np.ndarray, digest: Any = None) -> _Seen:
    """Summarize an array in one pass over blocks of rows, and pass their bytes to ``digest``."""
    if array.dtype.kind not in "buif":
        return _Seen(array.dtype, False, False, math.nan, math.nan, _NONE, _NONE, _NONE, _NONE)
    is_binary, is_whole, low, high, rounding = True, True, None, None, _NONE
    count, mean, squares, not_finite = 0, _NONE, _NONE, _NONE
    axis = 0 if array.ndim == 2 else None
    num_rows = _rows_at_once(array) if array.ndim else 0
    blocks = (array[i : i + num_rows] for i in range(0, len(array), num_rows)) if array.ndim else iter([array])
    is_long = array.dtype.kind == "f" and array.dtype.itemsize > 4
    for block in blocks if array.size else ():
        if digest is not None:
            digest.update(block.data.cast("B"))
        is_binary = is_binary and bool(((block == 0) | (block == 1)).all())
        is_whole = is_whole and (array.dtype.kind != "f" or bool((block == np.round(block)).all()))
        low = block.min() if low is None else np.minimum(low, block.min())
        high = block.max() if high is None else np.maximum(high, block.max())
        if array.dtype.kind == "f" and not _is_finite(low, high):
            not_finite = not_finite + (~(np.abs(block) <= np.finfo(np.float32).max)).sum(axis=axis)
        if is_long and _is_finite(low, high):
            error = np.abs(block.astype(np.float32).astype(np.float64) - block)
            rounding = np.maximum(rounding, error.max(axis=axis))
            size = len(block) if axis == 0 else block.size
            own_mean = block.mean(axis=axis, dtype=np.float64)
            own_squares = size * block.var(axis=axis, dtype=np.float64)
            step, total = own_mean - mean, count + size  # of two parts, as of Chan, Golub and LeVeque (1983)
            mean = mean + step * size / total
            squares = squares + own_squares + step * step * count * size / total
            count = total
    return _Seen(
        array.dtype, is_binary, is_whole, low, high, rounding, mean, np.sqrt(squares / max(1, count)), not_finite
    )


def find_kind(path: Path, name: str, array: np.ndarray, *, check_resolution: bool = True) -> str:
    """Find the kind of an array's numbers, a word of ``data.splits``.

    Args:
        path, name: what errors call the file and the array.
        array: (N, *E), one row or more.
        check_resolution: whether real values that single precision cannot tell apart are refused.

    Raises:
        ValueError: numbers of no kind, or that single precision cannot tell apart.
    """
    seen = _look(array)
    if check_resolution:
        return _kind_of_splits(path, {name: seen})
    _check_finite(path, name, seen)
    return _kind(path, seen)


def _is_finite(low: Any, high: Any) -> bool:
    """Whether both ends are finite, also as float32; False where one is NaN."""
    most = np.finfo(np.float32).max
    return bool(-most <= low and high <= most)


def _kind_of_splits(path: Path, seen: dict[str, _Seen]) -> str:
    """Find the kind of the first split, and refuse others of another kind or beyond the precision of float32.

    Floats are counts only where they are whole numbers in every split.
    """
    for split, of_split in seen.items():
        _check_finite(path, split, of_split)
    train, *others = seen.values()
    kind = _kind(path, train)
    if kind == COUNTS and train.dtype.kind == "f" and not all(_is_of(COUNTS, other) for other in others):
        kind = REAL
    for split, of_split in seen.items():
        if not _is_of(kind, of_split):
            got = f"other values (dtype {of_split.dtype})"
            raise ValueError(f"{path}: expected {kind} in {split} as in train, got {got}")
        if kind == REAL:
            _check_resolution(path, split, of_split)
    return kind


def _kind(path: Path, train: _Seen) -> str:
    if train.dtype.kind not in "buif":
        raise ValueError(f"{path}: expected numbers, got dtype {train.dtype}")
    for kind in (BINARY, LEVELS, PROBABILITIES, COUNTS, REAL):
        if _is_of(kind, train):
            return kind
    raise ValueError(
        f"{path}: expected zeros and ones, uint8 levels, counts from 0 to {LARGEST_COUNT:,}, or floats, "
        f"got {train.dtype} from {train.low} to {train.high} in train (save as float32 for real values)"
    )


def _check_finite(path: Path, split: str, seen: _Seen) -> None:
    """Refuse NaN, infinity and what float32 cannot hold, and name the columns of a table that have them."""
    if seen.dtype.kind != "f" or seen.is_binary or _is_finite(seen.low, seen.high):
        return
    columns = np.flatnonzero(seen.not_finite).tolist() if seen.not_finite.size > 1 else []
    where = f", in {'column' if len(columns) == 1 else 'columns'} {abbreviate(map(str, columns))}, counted from 0"
    raise ValueError(
        f"{path}: expected finite values, got NaN or infinity in {split}: {int(seen.not_finite.sum()):,} of the values"
        + where * bool(columns)
    )


def _is_of(kind: str, seen: _Seen) -> bool:
    if kind == BINARY:
        return seen.is_binary
    if kind == LEVELS:
        return seen.dtype == np.uint8
    if kind == PROBABILITIES:
        return seen.dtype.kind == "f" and bool(seen.low >= 0 and seen.high <= 1)
    if kind == REAL:
        return seen.dtype.kind == "f" and _is_finite(seen.low, seen.high)
    return seen.dtype.kind in "buif" and seen.is_whole and 0 <= float(seen.low) <= float(seen.high) <= LARGEST_COUNT


def _check_resolution(path: Path, split: str, seen: _Seen) -> None:
    """Refuse values that float32 rounds to a coarse grid, such as timestamps: a density would fit the grid.

    A column whose spread is the rounding of float64 itself is a constant, and passes.
    """
    is_constant = seen.spread <= _CONSTANT * np.abs(seen.mean)
    columns = np.flatnonzero((seen.rounding > _MOST_ROUNDING * seen.spread) & ~is_constant).tolist()
    if not columns:
        return
    mean, spread = float(seen.mean.flat[columns[0]]), float(seen.spread.flat[columns[0]])
    where = f"in {split}" if seen.spread.ndim == 0 or seen.spread.size == 1 else f"in column {columns[0]} of {split}"
    more = f", and likewise in {pluralize(len(columns) - 1, 'more column')}" * (len(columns) > 1)
    raise ValueError(
        f"{path}: expected values that single precision can tell apart, got {seen.dtype} around {mean:.7g} with a "
        f"spread of {spread:.2g} {where}{more}; center them first, in float64: {_centering(path)}"
    )


def _centering(path: Path) -> str:
    """The line of NumPy that centers the columns of a file. VAEDensity centers the columns of its tables itself."""
    if path.suffix.lower() == ".npy":
        name = repr(path.name)
        return f"x = numpy.load({name}); numpy.save('centered.npy', x - x.mean(0))"
    return "x - train.mean(0), with the training means for every split"


# --- What the axes are ---

_CHANNELS = (1, 3)
_FEW_COLUMNS = 4  # an image that narrow is more likely the channels of a single one


def channels_first(path: Path, split: str, array: np.ndarray) -> np.ndarray:
    """Transpose one split to (N, D) or (N, C, H, W).

    Raises:
        ValueError: the array is neither that, nor (N, H, W), nor (N, H, W, C), with C = 1 or 3; or it has no pixels.
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


def _shape_notes(shape: tuple[int, ...]) -> tuple[str, ...]:
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
