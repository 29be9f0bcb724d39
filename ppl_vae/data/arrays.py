"""Load a user's .npz or .npy file: the kind of its numbers, the meaning of its axes, and its splits."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ppl_vae.data import cache, machine
from ppl_vae.data.array_files import (
    advise_array,
    explain_unreadable,
    find_roles,
    read_array_header,
    read_arrays,
    read_labels,
)
from ppl_vae.data.array_kinds import BLOCK, count_rows, find_kind_of_splits, summarize
from ppl_vae.data.splits import (
    BINARY,
    COUNTS,
    LEVELS,
    PROBABILITIES,
    REAL,
    SPLIT_ORDER,
    Splits,
    complete_splits,
    pluralize,
)

_STORED: dict[str, tuple[type[np.generic], torch.dtype]] = {
    BINARY: (np.uint8, torch.uint8),
    LEVELS: (np.uint8, torch.uint8),
    PROBABILITIES: (np.float32, torch.float32),
    REAL: (np.float32, torch.float32),
    COUNTS: (np.float32, torch.float32),
}


def load_arrays(path: Path) -> Splits:
    """Load the splits of an .npz or .npy file: (N, D), (N, H, W), (N, H, W, C) or (N, C, H, W), C = 1 or 3.

    The arrays are named train, valid, test (also x_train, train_images and the like), or there is one of any name.
    Labels are named train_labels, y_train and the like, or labels or y if there is one array of images. Zeros and ones
    are binary; uint8 is 8-bit levels; other whole numbers from 0 are counts, also as floats; other floats in [0, 1] are
    probabilities; and all other floats are real values.

    Raises:
        ValueError: a file that cannot be read, or arrays that are no images.
    """
    try:
        if path.suffix.lower() == ".npy" and os.path.getsize(path) > machine.LARGE:
            return _load_large_array(path)
        sha256 = cache.compute_sha256(path)
    except OSError as error:
        raise ValueError(f"dataset: {path} cannot be read: {error.strerror}") from None
    arrays, ignored = read_arrays(path, _find_roles)
    if "train" not in arrays:
        got = ignored or "none"
        raise ValueError(
            f"{path}: expected one array, or arrays named train, valid and test, got {got}{advise_array(path, ignored)}"
        )
    images = {split: arrays[split] for split in SPLIT_ORDER if split in arrays}
    for array in images.values():
        _check_not_empty(path, array)
    kind = find_kind_of_splits(path, {split: summarize(array) for split, array in images.items()})
    tensors = {
        split: torch.from_numpy(np.ascontiguousarray(move_channels_first(path, split, array), dtype=_STORED[kind][0]))
        for split, array in images.items()
    }
    shapes = {tuple(x.shape[1:]) for x in tensors.values()}
    if len(shapes) > 1:
        raise ValueError(f"{path}: expected images of one shape in all splits, got {sorted(shapes)}")
    label_arrays = {split: arrays[f"{split} labels"] for split in tensors if f"{split} labels" in arrays}
    labels = read_labels(str(path), label_arrays, {split: len(x) for split, x in tensors.items()})
    completed, numbers, words = complete_splits(str(path), tensors, labels.numbers)
    if words == "as given":
        words = "as the file gives them"
    if ignored:
        words += f"; other arrays ignored: {', '.join(ignored)}"
    return Splits(
        name=path.name,
        kind=kind,
        train=completed["train"],
        validation=completed["validation"],
        test=completed["test"],
        sha256=sha256,
        split=words,
        labels=numbers,
        class_names=labels.class_names,
        notes=(*_describe_shape(images["train"].shape), *labels.notes),
    )


def _find_roles(names: list[str]) -> dict[str, str]:
    roles = find_roles(names, "train")
    return roles if "train" in roles else {}


def _check_not_empty(path: Path, array: np.ndarray) -> None:
    if array.ndim > 0 and len(array) == 0:
        raise ValueError(f"{path}: expected at least one image in every split, got an empty array")


# --- An array that is not read into memory ---


def _load_large_array(path: Path) -> Splits:
    """Load an .npy file through the cache: it is read once, in blocks, and then mapped."""
    status = os.stat(path)
    key = cache.make_key(path, {"array": "own"}, [status.st_size, status.st_mtime_ns])
    return cache.load_cached(key, path.name, partial(_draft, path))


def _draft(path: Path) -> cache.Draft:
    """Read a file twice: for its kind and its checksum, and then in the order of the splits."""
    try:
        with path.open("rb") as file:
            header = read_array_header(file, os.path.getsize(path))
            file.seek(0)
            digest = hashlib.sha256(file.read(header.offset))
            if header.is_fortran:  # the blocks that are summarized are not in the order of the bytes
                while block := file.read(BLOCK):
                    digest.update(block)
        mapped = np.memmap(
            path, header.dtype, "r", header.offset, header.shape, order="F" if header.is_fortran else "C"
        )
    except OSError as error:
        raise ValueError(f"dataset: {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged header is parsed as Python, and raises nearly every type
        raise ValueError(f"{path}: not a readable array file: {explain_unreadable(error)}") from None
    array = np.asarray(mapped)
    _check_not_empty(path, array)
    kind = find_kind_of_splits(path, {"train": summarize(array, None if header.is_fortran else digest.update)})
    images = move_channels_first(path, "train", array)
    rows, labels, words = complete_splits(str(path), {"train": torch.arange(len(images))}, {})
    stored, dtype = _STORED[kind]
    places = torch.cat([rows[split] for split in SPLIT_ORDER]).split(count_rows(images))
    return cache.Draft(
        kind=kind,
        dtype=dtype,
        event_shape=tuple(images.shape[1:]),
        sizes={split: len(index) for split, index in rows.items()},
        blocks=(np.ascontiguousarray(images[index.numpy()], dtype=stored) for index in places),
        sha256=digest.hexdigest(),
        split="as the file gives them" if words == "as given" else words,
        labels=labels,
        notes=_describe_shape(array.shape),
    )


# --- The meaning of axes ---

_CHANNELS = (1, 3)
_FEW_COLUMNS = 4  # a last axis that short is more likely the channels of one image


def move_channels_first(path: Path, split: str, array: np.ndarray) -> np.ndarray:
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
