"""A person's own data: arrays in an .npz or .npy file, with labels where there are any."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_vae.data import cache, limits
from ppl_vae.data.splits import BINARY, COUNTS, LEVELS, PROBABILITIES, REAL, Splits, complete, several

# What a user's file may call its splits, and the labels of each.
_WORDS = {"train": ("train",), "validation": ("valid", "validation", "val"), "test": ("test",)}
_IMAGES, _LABELS = ("{}", "x_{}", "{}_images"), ("{}_labels", "y_{}")
LABELS_ALONE = ("labels", "y")


_MOST_ROUNDING = 0.01  # of the spread of real values
LARGEST_COUNT = 2**24  # to here single precision holds every whole number


def own_arrays(path: Path) -> Splits:
    """The splits of an .npz or .npy file: (N, D), (N, H, W) or (N, H, W, C), C = 1 or 3.

    The arrays are named train, valid, test (also x_train, train_images and the like), or there is one of any name;
    labels are train_labels or y_train and the like, or labels or y beside one array of images. Zeros and ones are
    binary, uint8 is 8-bit levels, other integers from 0 are counts, floats in [0, 1] are probabilities, and other
    floats are real values.

    Raises:
        ValueError: a file that cannot be read, or arrays that are no images.
    """
    if path.suffix == ".npy" and _size(path) > limits.LARGE:
        return _large_array(path)
    sha256 = _sha256(path)
    arrays, ignored = read_arrays(path, _roles)
    if "train" not in arrays:
        got = ignored or "none"
        raise ValueError(f"{path}: expected one array, or arrays named train, valid and test, got {got}")
    images = {split: arrays[split] for split in _WORDS if split in arrays}
    if any(array.ndim > 0 and len(array) == 0 for array in images.values()):
        raise ValueError(f"{path}: expected at least one image in every split, got an empty array")
    seen = {split: _look(array) for split, array in images.items()}
    kind = _kind(path, seen["train"])
    for split, of_split in seen.items():
        _check_kind(path, split, of_split, kind)
    tensors = {
        split: torch.from_numpy(np.ascontiguousarray(channels_first(path, split, array), dtype=_STORED[kind][0]))
        for split, array in images.items()
    }
    shapes = {tuple(x.shape[1:]) for x in tensors.values()}
    if len(shapes) > 1:
        raise ValueError(f"{path}: expected images of one shape in all splits, got {sorted(shapes)}")
    labels = {
        split: as_labels(f"{path}: {split}", arrays[f"{split} labels"], len(x))
        for split, x in tensors.items()
        if f"{split} labels" in arrays
    }
    given, labels, words = complete(str(path), tensors, labels)
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
        labels=labels,
    )


def _size(path: Path) -> int:
    """Raises ValueError where there is no such file."""
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise ValueError(f"dataset: {path} cannot be read: {error.strerror}") from None


def _sha256(path: Path) -> str:
    """Raises ValueError where it cannot be read."""
    try:
        return cache.sha256_of(path)
    except OSError as error:
        raise ValueError(f"dataset: {path} cannot be read: {error.strerror}") from None


# --- An array that is not read into memory ---


def _large_array(path: Path) -> Splits:
    """An .npy file through the cache: it is read once, in blocks, and then mapped as it is stored."""
    status = os.stat(path)
    source = cache.source(path, {"array": "own"}, [status.st_size, status.st_mtime_ns])
    return cache.cached(source, path.name, partial(_draft, path), lambda: cache.in_room(_draft(path), path.name))


def _draft(path: Path) -> cache.Draft:
    """Read twice: once for what it holds and for its checksum, and once in the order of the splits."""
    try:
        with path.open("rb") as file:
            header = limits.array_header(file, os.path.getsize(path))
            file.seek(0)
            digest = hashlib.sha256(file.read(header.offset))
        order: Literal["C", "F"] = "F" if header.is_fortran else "C"
        array = np.asarray(np.memmap(path, header.dtype, "r", header.offset, header.shape, order))
    except OSError as error:
        raise ValueError(f"dataset: {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged header is parsed as Python, and raises nearly every type
        raise ValueError(f"{path}: not a readable array file: {_why(error)}") from None
    if array.ndim > 0 and len(array) == 0:
        raise ValueError(f"{path}: expected at least one image in every split, got an empty array")
    seen = _look(array.T if header.is_fortran else array, digest)
    kind = _kind(path, seen)
    _check_kind(path, "train", seen, kind)
    images = channels_first(path, "train", array)
    rows, labels, words = complete(str(path), {"train": torch.arange(len(images))}, {})
    stored, dtype = _STORED[kind]
    places = torch.cat([rows[split] for split in _WORDS]).split(_rows_at_once(images))
    return cache.Draft(
        kind=kind,
        dtype=dtype,
        event_shape=tuple(images.shape[1:]),
        sizes={split: len(index) for split, index in rows.items()},
        blocks=(np.ascontiguousarray(images[index.numpy()], dtype=stored) for index in places),
        sha256=digest.hexdigest(),
        split="as the file gives them" if words == "as given" else words,
        labels=labels,
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


# --- Files of arrays ---


def read_arrays(
    path: Path, choose: Callable[[list[str]], Mapping[str, str]]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays that ``choose`` takes, {role: name}, from all names, and the names of the others; never unpickles.

    A lone .npy array has the name "array".

    Raises:
        ValueError: it cannot be read, or is too large.
    """
    try:
        with path.open("rb") as file:
            is_array = file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
            if is_array:
                file.seek(0)
                limits.array_header(file, os.path.getsize(path))
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return dict.fromkeys(choose(["array"]), loaded), []
        with loaded:
            names = list(loaded.files)
            chosen = choose(names)
            _check_members(path, set(chosen.values()))
            arrays = {role: loaded[name] for role, name in chosen.items()}
    except MemoryError as error:
        advice = "" if path.suffix == ".npy" else f"; {limits.ADVICE}"
        raise ValueError(f"{path}: the memory ran out while it was read{advice}") from error
    except Exception as error:  # beside ValueError and OSError, a damaged zip raises zlib.error, struct.error and more
        raise ValueError(f"{path}: not a readable array file: {_why(error)}") from None
    return arrays, [name for name in names if name not in chosen.values()]


def _check_members(path: Path, names: set[str]) -> None:
    """Raises ValueError where an array is not of the size that the archive says, all are more than may be, or two have
    one name.
    """
    with zipfile.ZipFile(path) as archive:
        present: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in present:  # numpy may load the one of which the other was checked
                raise ValueError(f"expected one array of each name, got two named {name!r}")
            present[name] = member
        members = [present[name] for name in names if name in present]
        limits.check_expansion(path, sum(member.file_size for member in members))
        for member in members:
            with archive.open(member) as file:
                limits.array_header(file, member.file_size)


def _why(error: Exception) -> object:
    """numpy's own words for whatever is no array speak of allow_pickle, which nobody should be told to switch on."""
    if "Object arrays" in str(error):
        return "object arrays are not read"
    if "allow_pickle" in str(error):
        return "it is neither an .npy nor an .npz file"
    return error


def _roles(names: list[str]) -> dict[str, str]:
    """{"train": ..., "train labels": ...}: which array is what; nothing where no array is the training images."""

    def named(words: tuple[str, ...], forms: tuple[str, ...]) -> list[str]:
        return [name for word in words for form in forms if (name := form.format(word)) in names]

    images = {split: found[0] for split, words in _WORDS.items() if (found := named(words, _IMAGES))}
    of_labels = {split: found[0] for split, words in _WORDS.items() if (found := named(words, _LABELS))}
    if not images:
        alone = [name for name in names if name not in (*LABELS_ALONE, *of_labels.values())]
        if len(alone or names) != 1:
            return {}
        images = {"train": (alone or names)[0]}
    if "train" not in images:
        return {}
    alone = [name for name in LABELS_ALONE if name in names and name != images["train"]]
    if [*images] == ["train"] and alone:
        of_labels.setdefault("train", alone[0])
    return images | {f"{split} labels": name for split, name in of_labels.items() if split in images}


def as_labels(where: str, array: np.ndarray, num_images: int) -> Tensor:
    """(N,) int64 of an integer array (N,) or (N, 1).

    Raises:
        ValueError: other numbers, or another length than that of the images.
    """
    if array.dtype.kind not in "iu" or array.shape not in ((num_images,), (num_images, 1)):
        got = f"shape {array.shape} and dtype {array.dtype}"
        raise ValueError(f"{where} labels: expected {several(num_images, 'whole number')}, one an image, got {got}")
    return torch.from_numpy(array.reshape(-1).astype(np.int64))


# --- What kind of numbers they are ---


class _Seen(NamedTuple):
    """What was seen of an array's numbers; the last three where its floats are longer than single precision."""

    dtype: np.dtype
    is_binary: bool
    low: Any
    high: Any
    rounding: float
    mean: float
    spread: float


def _look(array: np.ndarray, digest: Any = None) -> _Seen:
    """Goes through the array once, in blocks, and gives ``digest`` their bytes on the way."""
    if array.dtype.kind not in "buif":
        return _Seen(array.dtype, False, math.nan, math.nan, 0.0, math.nan, math.nan)
    is_binary, low, high, rounding = True, None, None, 0.0
    count, mean, squares = 0, 0.0, 0.0
    num_rows = _rows_at_once(array) if array.ndim else 0
    blocks = (array[i : i + num_rows] for i in range(0, len(array), num_rows)) if array.ndim else iter([array])
    is_long = array.dtype.kind == "f" and array.dtype.itemsize > 4
    for block in blocks if array.size else ():
        if digest is not None:
            digest.update(block.data.cast("B"))
        is_binary = is_binary and bool(((block == 0) | (block == 1)).all())
        low = block.min() if low is None else np.minimum(low, block.min())
        high = block.max() if high is None else np.maximum(high, block.max())
        if is_long and _is_finite(low, high):
            rounding = max(rounding, float(np.abs(block.astype(np.float32).astype(np.float64) - block).max()))
            own_mean, own_squares = float(block.mean(dtype=np.float64)), block.size * float(block.var(dtype=np.float64))
            step, total = own_mean - mean, count + block.size  # of two parts, as of Chan, Golub and LeVeque (1983)
            mean += step * block.size / total
            squares += own_squares + step * step * count * block.size / total
            count = total
    return _Seen(array.dtype, is_binary, low, high, rounding, mean, math.sqrt(squares / max(1, count)))


def kind_of(path: Path, name: str, array: np.ndarray) -> str:
    """The kind of an array's numbers, a word of ``data.splits``.

    Args:
        path, name: what errors call the file and the array.
        array: (N, *E), one row or more.

    Raises:
        ValueError: numbers of no kind, or that single precision cannot tell apart.
    """
    seen = _look(array)
    kind = _kind(path, seen)
    _check_kind(path, name, seen, kind)
    return kind


def _is_finite(low: Any, high: Any) -> bool:
    """Also as float32, in which it is stored; False where one is NaN."""
    most = np.finfo(np.float32).max
    return bool(-most <= low and high <= most)


def _kind(path: Path, train: _Seen) -> str:
    if train.dtype.kind not in "buif":
        raise ValueError(f"{path}: expected numbers, got dtype {train.dtype}")
    if train.dtype.kind == "f" and not (train.is_binary or _is_finite(train.low, train.high)):
        raise ValueError(f"{path}: expected finite values, got NaN or infinity in train")
    for kind in (BINARY, LEVELS, PROBABILITIES, REAL, COUNTS):
        if _is_of(kind, train):
            return kind
    raise ValueError(
        f"{path}: expected zeros and ones, uint8 levels, counts from 0 to {LARGEST_COUNT:,}, or floats, "
        f"got {train.dtype} from {train.low} to {train.high} in train (save as float32 for real values)"
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
    return seen.dtype.kind in "bui" and bool(seen.low >= 0 and seen.high <= LARGEST_COUNT)


def _check_kind(path: Path, split: str, seen: _Seen, kind: str) -> None:
    """Refuses another kind than that of train, and values that float32, in which they are stored, cannot tell apart."""
    if not _is_of(kind, seen):
        raise ValueError(f"{path}: expected {kind} in {split} as in train, got other values (dtype {seen.dtype})")
    if kind == REAL and seen.rounding > _MOST_ROUNDING * seen.spread > 0:  # a density would be of a grid
        raise ValueError(
            f"{path}: expected values that single precision can tell apart, got {seen.dtype} around "
            f"{seen.mean:.7g} with a spread of {seen.spread:.2g} in {split}; subtract the mean first"
        )


def channels_first(path: Path, split: str, array: np.ndarray) -> np.ndarray:
    """One split as (N, D) or (N, C, H, W).

    Raises:
        ValueError: neither that, nor (N, H, W), nor (N, H, W, C), C = 1 or 3; or no pixels.
    """
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim != 2:
        raise ValueError(
            f"{path}: expected (N, D), (N, H, W) or (N, H, W, C) with 1 or 3 channels (last), "
            f"got shape {array.shape} in {split}"
        )
    if 0 in array.shape:
        raise ValueError(f"{path}: expected at least one pixel, got shape {array.shape} in {split}")
    return array
