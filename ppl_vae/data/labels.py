"""Labels: whole numbers, words or one-hot rows become class numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_vae.data.splits import pluralize


class Labels(NamedTuple):
    """Class numbers (N,) int64 of each split, class names, and a note on labels that were left out."""

    numbers: dict[str, Tensor]
    class_names: tuple[str, ...]
    notes: tuple[str, ...]


def read_labels(
    where: str, arrays: Mapping[str, np.ndarray], sizes: Mapping[str, int], class_names: tuple[str, ...] = ()
) -> Labels:
    """Convert label arrays to class numbers; labels that are no classes are left out, with a note.

    Whole numbers (N,) or (N, 1), also as floats or truth values, are class numbers. One-hot rows (N, K) become the
    position of the 1. Words become their position in the sorted list of all words.

    Args:
        where: the file, for errors.
        arrays: the labels of each split that has any.
        sizes: the number of images of each split.
        class_names: what words are looked up in, where the classes are known already.

    Raises:
        ValueError: not one label for each image.
    """
    flat = {}
    for split, array in arrays.items():
        if array.ndim == 0 or len(array) != sizes[split]:
            expected = pluralize(sizes[split], "label")
            raise ValueError(f"{where}: {split} labels: expected {expected}, one an image, got shape {array.shape}")
        flat[split] = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if flat and all(array.ndim == 1 and array.dtype.kind in "US" for array in flat.values()):
        return _from_words(flat, class_names)
    numbers = {split: _class_numbers(array) for split, array in flat.items()}
    found = {split: torch.from_numpy(own) for split, own in numbers.items() if own is not None}
    if len(found) < len(flat):
        split = next(split for split in flat if split not in found)
        got = f"{arrays[split].dtype} of shape {arrays[split].shape} in {split}"
        note = f"labels left out: expected whole numbers, words or one-hot rows, one an image, got {got}"
        return Labels({}, (), (note,))
    return Labels(found, (), ())


def _from_words(words: Mapping[str, np.ndarray], class_names: tuple[str, ...]) -> Labels:
    as_text = {
        split: np.char.decode(array, "utf-8", "replace") if array.dtype.kind == "S" else array
        for split, array in words.items()
    }
    known = np.unique(np.concatenate([*as_text.values()]))
    names = class_names or tuple(known.tolist())
    index = {name: i for i, name in enumerate(names)}
    if unknown := [word for word in known.tolist() if word not in index]:
        note = f"labels left out: expected the classes of the training data, got {unknown[0]!r}"
        return Labels({}, (), (note,))
    positions = np.array([index[word] for word in known.tolist()], np.int64)
    numbers = {split: positions[np.searchsorted(known, array)] for split, array in as_text.items()}
    return Labels({split: torch.from_numpy(own) for split, own in numbers.items()}, names, ())


def _class_numbers(array: np.ndarray) -> np.ndarray | None:
    """Convert whole numbers (N,) or one-hot rows (N, K) to (N,) int64; None for anything else."""
    if array.dtype.kind not in "buif":
        return None
    if array.ndim == 1:
        is_whole = array.dtype.kind != "f" or bool(((np.abs(array) < 2**53) & (array == np.round(array))).all())
        return array.astype(np.int64) if is_whole else None
    is_one_hot = array.ndim == 2 and bool((((array == 0) | (array == 1)).all(1) & (array.sum(1) == 1)).all())
    return array.argmax(1).astype(np.int64) if is_one_hot else None
