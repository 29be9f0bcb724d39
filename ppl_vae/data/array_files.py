"""Read .npz and .npy files without unpickling: their headers, the roles of their arrays, and labels.

An array's header must announce exactly the bytes that are there, which is checked before memory is allocated. The
arrays that are read from an .npz file may together take ``FREE_EXPANSION`` bytes, or ``MOST_EXPANSION`` times the bytes
of the file: binary images shrink to a twentieth of their size, and a file that was made to fill memory shrinks to a
thousandth.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_vae.data import storage
from ppl_vae.runtime.errors import pluralize

FREE_EXPANSION, MOST_EXPANSION = 2**26, 200
_ADVICE = "save it as .npy, which is not read into memory"
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": " "}


def is_array_file(path: Path) -> bool:
    """Whether the name ends in .npz or .npy, in any case."""
    return path.suffix.lower() in (".npz", ".npy")


def is_text_table(path: Path) -> bool:
    """Whether a file has the name of a table of text, such as .csv."""
    return path.suffix.lower() in _DELIMITERS and path.is_file()


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
        choose: takes the names of all arrays, and returns {role: name} of those to be read. A lone .npy array has the
            name "array". Arrays of objects are left out where their role ends in "labels".

    Raises ValueError where the file cannot be read, or is too large.
    """
    try:
        with path.open("rb") as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                _check_version(file)
        with np.errstate(over="ignore"):  # of a size that no address has, which is refused
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.memmap):
            if loaded.offset + loaded.nbytes != os.path.getsize(path):
                raise ValueError(f"its header announces {loaded.nbytes:,} bytes of {loaded.dtype} {loaded.shape}")
            return dict.fromkeys(choose(["array"]), loaded), []
        with loaded:
            names = list(loaded.files)
            chosen = choose(names)
            objects = _check_members(path, chosen)
            arrays = {role: loaded[name] for role, name in chosen.items() if name not in objects}
    except MemoryError as error:
        raise ValueError(f"{path}: the memory ran out while it was read; {_ADVICE}") from error
    except Exception as error:  # a damaged header is parsed as Python, and raises nearly every type
        reason = "object arrays are not read" if "Python objects" in str(error) else str(error)
        if "allow_pickle" in reason:
            reason = "it is neither an .npy nor an .npz file"
        raise ValueError(f"{path}: not a readable array file: {reason}") from None
    others = [name for name in names if name not in chosen.values()]
    return arrays, [*others, *(f"{name} (objects are not read)" for name in objects)]


def _check_members(path: Path, chosen: Mapping[str, str]) -> list[str]:
    """Check the sizes that the headers of chosen arrays announce; return the names of labels that are objects."""
    labels, objects = {name for role, name in chosen.items() if role.endswith("labels")}, []
    with zipfile.ZipFile(path) as archive:
        found = [(member.filename.removesuffix(".npy"), member) for member in archive.infolist()]
        members = [(name, member) for name, member in found if name in chosen.values()]
        num_bytes = sum(member.file_size for _, member in members)
        most = max(FREE_EXPANSION, MOST_EXPANSION * os.path.getsize(path))
        if num_bytes > most:
            raise ValueError(
                f"its arrays take {num_bytes:,} bytes, more than {MOST_EXPANSION} times the file ({most:,}); {_ADVICE}"
            )
        available = storage.get_available_memory()
        if available is not None and num_bytes > available:
            raise ValueError(f"its arrays take {num_bytes:,} bytes, and {available:,} are available; {_ADVICE}")
        for name, member in members:
            with archive.open(member) as file:
                file.read(6)
                _check_version(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                announced = math.prod(shape) * dtype.itemsize
                if dtype.hasobject and name in labels:
                    objects.append(name)
                elif dtype.hasobject:
                    raise ValueError("Python objects are not read")
                elif min(shape, default=0) < 0 or announced != member.file_size - file.tell():
                    raise ValueError(f"its header announces {announced:,} bytes of {dtype} {shape}")
    return objects


def _check_version(file: IO[bytes]) -> None:
    """Refuse a header of another version, which may announce 4 GiB of itself."""
    if (version := file.read(2)) != b"\1\0":
        raise ValueError(f"expected a header of version 1.0, got {'.'.join(map(str, version))}")


def advise_array(path: Path, names: list[str]) -> str:
    """Write the line of NumPy that saves one of several arrays alone; nothing where there are none."""
    line = f"numpy.save('images.npy', numpy.load({path.name!r})['NAME'])"
    return f"; to take one of them: {line}" if names else ""


def advise_conversion(path: Path) -> str:
    """Write how a file of another kind becomes an array file.

    >>> advise_conversion(Path("wine.csv"))
    "; numpy.save('wine.npy', numpy.loadtxt('wine.csv', delimiter=',', skiprows=1)) makes one of numbers below a header"
    """
    delimiter = _DELIMITERS.get(path.suffix.lower())
    if delimiter is None:
        return "; numpy.save makes one of an array"
    line = f"numpy.save({path.stem + '.npy'!r}, numpy.loadtxt({path.name!r}, delimiter={delimiter!r}, skiprows=1))"
    return f"; {line} makes one of numbers below a header"


# --- Labels ---


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
        return _number_words(flat, class_names)
    numbers = {}
    for split, array in flat.items():
        found = _find_class_numbers(array)
        if found is None:
            got = f"{arrays[split].dtype} of shape {arrays[split].shape} in {split}"
            note = f"labels left out: expected whole numbers, words or one-hot rows, one per image, got {got}"
            return Labels({}, (), (note,))
        numbers[split] = torch.from_numpy(found)
    return Labels(numbers, (), ())


def _number_words(words: Mapping[str, np.ndarray], class_names: tuple[str, ...]) -> Labels:
    def read(array: np.ndarray) -> np.ndarray:
        return np.char.decode(array, "utf-8", "replace") if array.dtype.kind == "S" else array

    as_text = {split: read(array) for split, array in words.items()}
    known = np.unique(np.concatenate([*as_text.values()]))
    names = class_names or tuple(known.tolist())
    index = {name: i for i, name in enumerate(names)}
    if unknown := [word for word in known.tolist() if word not in index]:
        note = f"labels left out: expected the classes of the training data, got {unknown[0]!r}"
        return Labels({}, (), (note,))
    positions = np.array([index[word] for word in known.tolist()], np.int64)
    numbers = {split: torch.from_numpy(positions[np.searchsorted(known, array)]) for split, array in as_text.items()}
    return Labels(numbers, names, ())


def _find_class_numbers(array: np.ndarray) -> np.ndarray | None:
    """Convert whole numbers (N,) or one-hot rows (N, K) to (N,) int64; None for anything else."""
    if array.dtype.kind not in "buif":
        return None
    if array.ndim == 1:
        is_whole = array.dtype.kind != "f" or bool(((np.abs(array) < 2**53) & (array == np.round(array))).all())
        return array.astype(np.int64) if is_whole else None
    is_one_hot = array.ndim == 2 and bool((((array == 0) | (array == 1)).all(1) & (array.sum(1) == 1)).all())
    return array.argmax(1).astype(np.int64) if is_one_hot else None
