"""A person's own data: arrays in an .npz or .npy file, with labels where there are any."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"dataset: {path} cannot be read: {error.strerror}") from None
    arrays, ignored = read_arrays(path, _roles)
    if "train" not in arrays:
        got = ignored or "none"
        raise ValueError(f"{path}: expected one array, or arrays named train, valid and test, got {got}")
    images = {split: arrays[split] for split in _WORDS if split in arrays}
    if any(array.ndim > 0 and len(array) == 0 for array in images.values()):
        raise ValueError(f"{path}: expected at least one image in every split, got an empty array")
    kind = _kind(path, images["train"])
    tensors = {split: _images(path, split, array, kind) for split, array in images.items()}
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
        sha256=hashlib.sha256(raw).hexdigest(),
        split=words,
        labels=labels,
    )


def read_arrays(
    path: Path, choose: Callable[[list[str]], Mapping[str, str]]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays that ``choose`` takes, {role: name}, from all names, and the names of the others; never unpickles.

    A lone .npy array has the name "array".
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return dict.fromkeys(choose(["array"]), loaded), []
        with loaded:
            names = list(loaded.files)
            chosen = choose(names)
            arrays = {role: loaded[name] for role, name in chosen.items()}
    except Exception as error:  # beside ValueError and OSError, a damaged zip raises zlib.error, struct.error and more
        # numpy's own words for whatever is no array speak of allow_pickle, which nobody should be told to switch on.
        why: object = error
        if "Object arrays" in str(error):
            why = "object arrays are not read"
        elif "allow_pickle" in str(error):
            why = "it is neither an .npy nor an .npz file"
        raise ValueError(f"{path}: not a readable array file: {why}") from None
    return arrays, [name for name in names if name not in chosen.values()]


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


def _kind(path: Path, train: np.ndarray) -> str:
    if train.dtype.kind not in "buif":
        raise ValueError(f"{path}: expected numbers, got dtype {train.dtype}")
    if train.dtype.kind == "f" and not _finite(train):
        raise ValueError(f"{path}: expected finite values, got NaN or infinity in train")
    if ((train == 0) | (train == 1)).all():
        return BINARY
    if train.dtype == np.uint8:
        return LEVELS
    if train.dtype.kind == "f":
        return PROBABILITIES if train.min() >= 0 and train.max() <= 1 else REAL
    if _counts(train):
        return COUNTS
    raise ValueError(
        f"{path}: expected zeros and ones, uint8 levels, counts from 0 to {LARGEST_COUNT:,}, or floats, "
        f"got {train.dtype} from {train.min()} to {train.max()} in train (save as float32 for real values)"
    )


def _counts(array: np.ndarray) -> bool:
    return array.dtype.kind in "bui" and bool((array >= 0).all() and (array <= LARGEST_COUNT).all())


def _finite(array: np.ndarray) -> bool:
    """Also as float32, in which it is stored."""
    return bool((np.abs(array) <= np.finfo(np.float32).max).all())


def _check_precision(path: Path, split: str, array: np.ndarray) -> None:
    """Refuses values that float32, in which they are stored, cannot tell apart: a density would be of a grid."""
    rounding = float(np.abs(array.astype(np.float32).astype(np.float64) - array).max())
    spread = float(array.std(dtype=np.float64))
    if rounding > _MOST_ROUNDING * spread > 0:
        raise ValueError(
            f"{path}: expected values that single precision can tell apart, got {array.dtype} around "
            f"{float(array.mean(dtype=np.float64)):.7g} with a spread of {spread:.2g} in {split}; "
            "subtract the mean first"
        )


def _images(path: Path, split: str, array: np.ndarray, kind: str) -> Tensor:
    """One split as (N, D) or (N, C, H, W), its values checked against the kind of the training split."""
    on_kind = {
        BINARY: lambda: array.dtype.kind in "buif" and bool(((array == 0) | (array == 1)).all()),
        LEVELS: lambda: array.dtype == np.uint8,
        PROBABILITIES: lambda: array.dtype.kind == "f" and bool(((array >= 0) & (array <= 1)).all()),
        REAL: lambda: array.dtype.kind == "f" and _finite(array),
        COUNTS: lambda: _counts(array),
    }
    if not on_kind[kind]():
        raise ValueError(f"{path}: expected {kind} in {split} as in train, got other values (dtype {array.dtype})")
    if kind == REAL:
        _check_precision(path, split, array)
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
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.uint8 if kind in (BINARY, LEVELS) else np.float32))
