"""Read .npz and .npy files without unpickling: the roles of their arrays, and labels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_vae.data import storage
from ppl_vae.runtime.errors import pluralize


def is_array_file(path: Path) -> bool:
    """Whether the name ends in .npz or .npy, in any case."""
    return path.suffix.lower() in (".npz", ".npy")


# --- Arrays ---

# The names that a file may give the images and the labels of its splits, in any case: x_train, X_train, train_images.
_SPLIT_WORDS = {"train": ("train",), "validation": ("valid", "validation", "val"), "test": ("test",)}
_IMAGE_NAMES, _LABEL_NAMES = ("{}", "x_{}", "{}_images", "{}_x"), ("{}_labels", "y_{}", "{}_y")
_LONE_LABEL_NAMES = ("labels", "y")


def find_roles(names: list[str], lone_split: str, other_images: Collection[str] = ()) -> dict[str, str]:
    """Find the role of each array: {"train": name, "train labels": name, ...}; empty where the names do not say.

    Images whose name says no split belong to ``lone_split``, whose images may also have the names ``other_images``.
    """
    lower = {name.lower(): name for name in reversed(names)}  # the first of several spellings

    def find(words: Collection[str], forms: Collection[str]) -> str | None:
        return next((lower[name] for word in words for form in forms if (name := form.format(word)) in lower), None)

    roles = {split: name for split, words in _SPLIT_WORDS.items() if (name := find(words, _IMAGE_NAMES))}
    labels = {split: name for split, words in _SPLIT_WORDS.items() if (name := find(words, _LABEL_NAMES))}
    lone_labels = find(_LONE_LABEL_NAMES, ("{}",))
    if lone_split not in roles and (name := find(other_images, ("{}",))):
        roles = {lone_split: name}
    elif not roles:
        candidates = [name for name in names if name not in (lone_labels, *labels.values())] or names
        if len(candidates) != 1:
            return {}
        roles = {lone_split: candidates[0]}
    if [*roles] == [lone_split] and lone_labels not in (None, roles[lone_split]):
        labels.setdefault(lone_split, lone_labels)
    return roles | {f"{split} labels": name for split, name in labels.items() if split in roles}


def read_arrays(
    path: Path, choose: Callable[[list[str]], Mapping[str, str]]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read arrays without unpickling: the arrays by their roles, and the names of those that were left out.

    Args:
        choose: takes the names of all arrays, and returns {role: name} of those to be read. A lone .npy array, which is
            mapped, has the name "array". Arrays of objects are left out where their role ends in "labels".

    Raises ValueError where the file cannot be read, or does not fit into memory.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with np.errstate(over="ignore"):  # of a size that no memory has
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return dict.fromkeys(choose(["array"]), loaded), []
        with loaded:
            chosen = choose(loaded.files)
            others = [name for name in loaded.files if name not in chosen.values()]
            sizes = {file.filename.removesuffix(".npy"): file.file_size for file in loaded.zip.infolist()}
            num_bytes, available = sum(sizes.get(name, 0) for name in chosen.values()), storage.get_available_memory()
            if available is not None and num_bytes > available:
                raise ValueError(
                    f"its arrays take {num_bytes:,} bytes, and {available:,} are available; save it as .npy, which is "
                    "not read into memory"
                )
            for role, name in chosen.items():
                try:
                    arrays[role] = loaded[name]
                except ValueError as error:
                    if not role.endswith("labels") or "allow_pickle" not in str(error):
                        raise
                    others.append(f"{name} (objects are not read)")
    except Exception as error:  # a damaged header is parsed as Python, and raises nearly every type
        reason = " ".join(str(error).split())
        if "Python objects" in reason or "Object arrays" in reason:
            reason = "object arrays are not read"
        elif "pickle" in reason:
            reason = "it is neither an .npy nor an .npz file"
        raise ValueError(f"{path}: not a readable array file: {reason}") from None
    return arrays, others


# --- Labels ---


class Labels(NamedTuple):
    """Class numbers (N,) int64 of each split, class names, and a note on labels that were left out."""

    numbers: dict[str, Tensor]
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_labels(
    where: str, arrays: Mapping[str, np.ndarray], sizes: Mapping[str, int], class_names: tuple[str, ...] = ()
) -> Labels:
    """Convert label arrays to class numbers; labels that are no classes are left out, with a note.

    Whole numbers (N,) or (N, 1), also as floats or truth values, are class numbers. One-hot rows (N, K) become the
    position of the 1. Words become their position in the sorted list of all words.

    Args:
        where: the file, for errors.
        arrays, sizes: the labels of each split that has any, and the number of images of each.
        class_names: the known classes, among which words are looked up; empty: the words define the classes.

    Raises ValueError where there is not one label for each image.
    """
    flat = {}
    for split, array in arrays.items():
        if array.ndim == 0 or len(array) != sizes[split]:
            expected = pluralize(sizes[split], "label")
            raise ValueError(f"{where}: {split} labels: expected {expected}, one per image, got shape {array.shape}")
        flat[split] = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if flat and all(array.ndim == 1 and array.dtype.kind in "US" for array in flat.values()):
        words = {
            split: np.char.decode(x, "utf-8", "replace") if x.dtype.kind == "S" else x for split, x in flat.items()
        }
        found = np.unique(np.concatenate([*words.values()])).tolist()
        names = class_names or tuple(found)
        if unknown := [word for word in found if word not in names]:
            note = f"labels left out: expected the classes of the training data, got {unknown[0]!r}"
            return Labels({}, notes=(note,))
        index = {name: number for number, name in enumerate(names)}
        numbers = {split: torch.tensor([index[word] for word in x.tolist()]) for split, x in words.items()}
        return Labels(numbers, names)
    numbers = {}
    for split, array in flat.items():
        if (own := _find_class_numbers(array)) is None:
            got = f"{arrays[split].dtype} of shape {arrays[split].shape} in {split}"
            note = f"labels left out: expected whole numbers, words or one-hot rows, one per image, got {got}"
            return Labels({}, notes=(note,))
        numbers[split] = torch.from_numpy(own.astype(np.int64))
    return Labels(numbers)


def _find_class_numbers(array: np.ndarray) -> np.ndarray | None:
    """Convert whole numbers (N,) or one-hot rows (N, K) to whole numbers (N,); None for anything else."""
    if array.dtype.kind not in "buif":
        return None
    if array.ndim == 1:
        return array if ((np.abs(array) < 2**53) & (array == np.round(array))).all() else None
    is_one_hot = array.ndim == 2 and bool((((array == 0) | (array == 1)).all(1) & (array.sum(1) == 1)).all())
    return array.argmax(1) if is_one_hot else None
