"""Read .npz and .npy files without unpickling, and find which array has which role."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np

from ppl_vae.data import limits

SUFFIXES = (".npz", ".npy")
DELIMITERS = {".csv": ",", ".tsv": "\t", ".txt": " "}

# The names that a file may give the images and the labels of its splits, in any case: x_train, X_train, train_images.
_SPLITS = {"train": ("train",), "validation": ("valid", "validation", "val"), "test": ("test",)}
_IMAGES, _LABELS = ("{}", "x_{}", "{}_images", "{}_x"), ("{}_labels", "y_{}", "{}_y")
_LONE_LABELS = ("labels", "y")


def is_array_file(path: Path) -> bool:
    """Whether the name ends in .npz or .npy, in any case."""
    return path.suffix.lower() in SUFFIXES


def find_roles(names: list[str], lone_split: str, other_images: Collection[str] = ()) -> dict[str, str]:
    """Find the role of each array: {"train": name, "train labels": name, ...}; empty where the names do not say.

    Args:
        names: of all arrays.
        lone_split: what images are that do not carry the name of a split.
        other_images: names of images of ``lone_split``, beside those that carry its own name.
    """
    lower = {name.lower(): name for name in reversed(names)}  # the first of several spellings

    def find(words: Collection[str], forms: Collection[str]) -> str | None:
        return next((lower[name] for word in words for form in forms if (name := form.format(word)) in lower), None)

    roles = {split: name for split, words in _SPLITS.items() if (name := find(words, _IMAGES))}
    labels = {split: name for split, words in _SPLITS.items() if (name := find(words, _LABELS))}
    lone_labels = find(_LONE_LABELS, ("{}",))
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
    """Read the arrays that ``choose`` selects, without unpickling.

    Args:
        choose: takes the names of all arrays, and returns {role: name} of those to be read. A lone .npy array has the
            name "array". Arrays of objects are left out where their role ends in "labels".

    Returns:
        The arrays by their roles, and the names of those that were left out.

    Raises:
        ValueError: the file cannot be read, or is too large.
    """
    try:
        with path.open("rb") as file:
            is_array = file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
            if is_array:
                file.seek(0)
                limits.read_array_header(file, os.path.getsize(path))
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return dict.fromkeys(choose(["array"]), loaded), []
        with loaded:
            names = list(loaded.files)
            chosen = choose(names)
            objects = _check_members(path, chosen)
            arrays = {role: loaded[name] for role, name in chosen.items() if name not in objects}
    except MemoryError as error:
        advice = "" if path.suffix.lower() == ".npy" else f"; {limits.ADVICE}"
        raise ValueError(f"{path}: the memory ran out while it was read{advice}") from error
    except Exception as error:  # beside ValueError and OSError, a damaged zip raises zlib.error, struct.error and more
        raise ValueError(f"{path}: not a readable array file: {explain_unreadable(error)}") from None
    others = [name for name in names if name not in chosen.values()]
    return arrays, [*others, *(f"{name} (objects are not read)" for name in objects)]


def _check_members(path: Path, chosen: Mapping[str, str]) -> list[str]:
    """Check the headers of the chosen arrays, and return the names of labels that are Python objects.

    Raises:
        ValueError: an array is not of the size that the archive says, all are more than may be, or two have one name.
    """
    names, objects = set(chosen.values()), []
    labels = {name for role, name in chosen.items() if role.endswith("labels")}
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
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as file:
                try:
                    limits.read_array_header(file, member.file_size)
                except limits.ObjectArrayError:
                    if name not in labels:
                        raise
                    objects.append(name)
    return objects


def advise_array(path: Path, names: list[str]) -> str:
    """The line of NumPy that saves one of several arrays alone, or nothing where there are none."""
    line = f"numpy.save('images.npy', numpy.load({path.name!r})['NAME'])"
    return f"; to take one of them: {line}" if names else ""


def advise_conversion(path: Path) -> str:
    """How a file of another kind becomes an array file.

    >>> advise_conversion(Path("wine.csv"))
    "; numpy.save('wine.npy', numpy.loadtxt('wine.csv', delimiter=',', skiprows=1)) makes one of numbers below a header"
    """
    delimiter = DELIMITERS.get(path.suffix.lower())
    if delimiter is None:
        return "; numpy.save makes one of an array"
    line = f"numpy.save({path.stem + '.npy'!r}, numpy.loadtxt({path.name!r}, delimiter={delimiter!r}, skiprows=1))"
    return f"; {line} makes one of numbers below a header"


def explain_unreadable(error: Exception) -> object:
    """Explain why an array file could not be read, without numpy's advice to set allow_pickle."""
    if "Object arrays" in str(error):
        return "object arrays are not read"
    if "allow_pickle" in str(error):
        return "it is neither an .npy nor an .npz file"
    return error
