"""Load a user's .npz or .npy file: the kind of its numbers, the meaning of its axes, and its splits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ppl_vae.data import cache, machine
from ppl_vae.data.array_files import advise_array, find_roles, read_arrays, read_labels
from ppl_vae.data.array_kinds import count_rows, find_kind
from ppl_vae.data.splits import BINARY, LEVELS, SPLIT_ORDER, Splits, complete_splits, pluralize


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
        status = os.stat(path)
        if path.suffix.lower() != ".npy" or status.st_size <= machine.LARGE:
            return cache.read_into_memory(_draft(path))
        key = cache.make_key(path, {"array": "own"}, [status.st_size, status.st_mtime_ns])
        return cache.load_cached(key, path.name, lambda _: _draft(path))
    except OSError as error:
        raise ValueError(f"dataset: {path} cannot be read: {error.strerror}") from None


def _draft(path: Path) -> cache.Draft:
    sha256 = cache.compute_sha256(path)
    arrays, ignored = read_arrays(path, _find_roles)
    if "train" not in arrays:
        got = ignored or "none"
        raise ValueError(
            f"{path}: expected one array, or arrays named train, valid and test, got {got}{advise_array(path, ignored)}"
        )
    given = {split: arrays[split] for split in SPLIT_ORDER if split in arrays}
    if any(array.ndim > 0 and len(array) == 0 for array in given.values()):
        raise ValueError(f"{path}: expected at least one image in every split, got an empty array")
    kind = find_kind(path, given)
    images = {split: move_channels_first(path, split, array) for split, array in given.items()}
    shapes = {array.shape[1:] for array in images.values()}
    if len(shapes) > 1:
        raise ValueError(f"{path}: expected images of one shape in all splits, got {sorted(shapes)}")
    label_arrays = {split: arrays[f"{split} labels"] for split in images if f"{split} labels" in arrays}
    labels = read_labels(str(path), label_arrays, {split: len(array) for split, array in images.items()})
    rows, numbers, words = complete_splits(
        str(path), {split: torch.arange(len(array)) for split, array in images.items()}, labels.numbers
    )
    if words == "as given":
        words = "as the file gives them"
    if ignored:
        words += f"; other arrays ignored: {', '.join(ignored)}"
    dtype = torch.uint8 if kind in (BINARY, LEVELS) else torch.float32
    stored = str(dtype).removeprefix("torch.")

    def iterate_blocks() -> Iterator[np.ndarray]:
        for split in SPLIT_ORDER:
            source = images.get(split, images["train"])
            for part in rows[split].split(count_rows(source)):
                yield np.ascontiguousarray(source[part.numpy()], dtype=stored)

    splits = Splits(
        path.name,
        kind,
        *cache.outline(rows, shapes.pop(), dtype),
        sha256=sha256,
        split=words,
        labels=numbers,
        class_names=labels.class_names,
        notes=(*_describe_shape(given["train"].shape), *labels.notes),
    )
    return cache.Draft(splits, iterate_blocks())


def _find_roles(names: list[str]) -> dict[str, str]:
    roles = find_roles(names, "train")
    return roles if "train" in roles else {}


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
