"""Find the image files of a folder, and how its subfolders name splits and classes.

Three layouts are understood, each also below one or more outer folders that hold everything:

    train/cat/1.png     the split first, then the class
    cat/train/1.png     the class first, then the split
    cat/1.png           classes without splits
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from posixpath import commonpath
from typing import NamedTuple

import torch
from torch import Tensor

from ppl_vae.data.image_file import EXTENSIONS
from ppl_vae.data.splits import abbreviate
from ppl_vae.runtime.errors import pluralize

# --- Files ---


def find_images(root: Path) -> tuple[tuple[str, ...], Counter[str]]:
    """Find image files by extension, recursively; links are followed, but not in circles.

    Returns:
        Their sorted names, and the number of other files by the ends of their names, which ``describe_others`` takes.

    Raises:
        ValueError: A folder cannot be opened; a whole split or class could be missing.
    """
    images: list[str] = []
    others: Counter[str] = Counter()

    def refuse(error: OSError) -> None:
        name = Path(error.filename).relative_to(root).as_posix()
        which = "the folder" if name == "." else name
        raise ValueError(f"{root}: {which} cannot be opened: {error.strerror}") from None

    for folder, below, names in os.walk(root, onerror=refuse, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".") and not _leads_back(Path(folder, name))]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            kind = path.suffix.lower()
            if kind in EXTENSIONS and path.is_file():  # a link to nothing is none
                images.append(path.relative_to(root).as_posix())
            else:
                others[kind] += 1
    return tuple(sorted(images)), others


def describe_others(others: Counter[str]) -> str:
    """Count the files that are no images, in all and of each kind: "3 other files (2 .csv, 1 without an extension)"."""
    if not others:
        return "an empty folder"
    kinds = [f"{count:,} {kind or 'without an extension'}" for kind, count in others.most_common()]
    return f"{pluralize(others.total(), 'other file')} ({abbreviate(kinds)})"


def _leads_back(folder: Path) -> bool:
    """Whether a link leads back to a folder that contains it, so that following it would never end."""
    return os.path.realpath(folder) in map(os.path.realpath, Path(os.path.abspath(folder)).parents)


# --- Layout ---

_SPLIT_FOLDERS = {"train": "train", "test": "test"} | dict.fromkeys(("valid", "validation", "val"), "validation")

# A word that names a split: "train", "testset", "trainval", "dev".
_SPLIT_WORD = re.compile(
    r"x?(train|training|tests?|testing|val|valid|validate|validation|eval|evaluation|dev|development|holdout)+"
    r"(sets?|data|images)?"
)


class Layout(NamedTuple):
    """Meaning of the folders in a path: how many outer ones hold everything, and whether the class is named first."""

    num_outer: int
    is_class_first: bool

    @property
    def words(self) -> str:
        """Description of how the images were split."""
        return "by the folders in each class" if self.is_class_first else "by their folders"

    def place(self, name: str) -> tuple[str | None, str | None]:
        """Find the split and the class of an image, each may be None, from its path below the data set's folder."""
        folders = _folders(name)[self.num_outer :]
        if self.is_class_first:
            return _exact_split(folders[1]), folders[0]
        split = _exact_split(folders[0]) if folders else None
        below = folders[split is not None :]
        return split, below[0] if below else None


def find_layout(names: Iterable[str]) -> Layout:
    """Find the layout of images from their paths: the first of the three that fits."""
    all_folders = {_folders(name) for name in names}
    outer = [folder for folder in commonpath(["/".join(folders) for folders in all_folders]).split("/") if folder]
    depth = next((i for i, folder in enumerate(outer) if _exact_split(folder)), len(outer))
    if any(len(folders) > depth and _exact_split(folders[depth]) for folders in all_folders):
        return Layout(depth, is_class_first=False)
    if all(len(folders) > depth + 1 and _exact_split(folders[depth + 1]) for folders in all_folders):
        return Layout(depth, is_class_first=True)
    return Layout(0, is_class_first=False)


def check_layout(root: Path, names: Iterable[str], layout: Layout) -> None:
    """Raise ValueError for a folder that is named like a split but not read as one: its images would train unnoticed.

    Two such folders are harmless: one within a folder of the same split, as archives unpack ("test/test"), and a class
    "train" beside other classes.
    """
    places = {_folders(name): layout.place(name) for name in names}
    num_classes = len({class_name for split, class_name in places.values() if split == "train"})
    refused = set()
    for folders, (split, _) in places.items():
        # The layout has read one level as the split, and the level below it as the class.
        split_depth = layout.num_outer + layout.is_class_first if split else None
        for depth, folder in enumerate(folders):
            is_understood = depth == split_depth or (split is not None and split == _exact_split(folder))
            is_class = depth - 1 == split_depth and folder.lower() == "train" and num_classes > 1
            if _is_named_like_split(folder) and not is_understood and not is_class:
                refused.add("/".join(folders[: depth + 1]))
    if refused:
        raise ValueError(
            f"{root}: expected every split to be a folder of the data set or of each class, "
            f"named train; valid, validation or val; test, got {abbreviate(sorted(refused))}; "
            "rename them, or give the path of one of them alone"
        )


def _folders(name: str) -> tuple[str, ...]:
    return tuple(name.split("/")[:-1])


def _exact_split(folder: str) -> str | None:
    return _SPLIT_FOLDERS.get(folder.lower())


def _is_named_like_split(folder: str) -> bool:
    """Whether one word of a folder's name names a split: "train2017", "testA", "seg_test", "held-out"."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder).lower()
    words = re.findall(r"[^\W\d_]+", re.sub(r"held\W?out", "holdout", spaced))
    return any(_SPLIT_WORD.fullmatch(word) for word in words)


# --- Splits and classes ---


def index_splits(root: Path, names: Sequence[str], read: Sequence[str], layout: Layout) -> dict[str, Tensor]:
    """Find {split: rows} of the images in ``read``, those among all ``names`` that could be read.

    Images outside the folders of splits belong to train. Images outside where there is a folder train, and a split
    without an image that can be read, raise ValueError.
    """
    splits = [layout.place(name)[0] for name in names]
    named = {split for split in splits if split}
    outside = [name for name, split in zip(names, splits, strict=True) if split is None]
    if outside and "train" in named:
        raise ValueError(
            f"{root}: expected every image in train, valid or test, got {len(outside):,} outside: {abbreviate(outside)}"
        )
    of_image = [layout.place(name)[0] or "train" for name in read]
    index = {split: [i for i, own in enumerate(of_image) if own == split] for split in sorted({"train"} | named)}
    for split, rows in index.items():
        if not rows:
            raise ValueError(f"{root}: expected at least one image that can be read in {split}, got none")
    return {split: torch.tensor(rows) for split, rows in index.items()}


def label_by_folder(names: Sequence[str], layout: Layout) -> tuple[Tensor, tuple[str, ...]]:
    """Label images by folder: (N,) int64 and class names; no names unless all images lie in two or more classes."""
    of_image = [layout.place(name)[1] for name in names]
    classes = sorted({name for name in of_image if name is not None})
    if None in of_image or len(classes) < 2:
        return torch.zeros(len(names), dtype=torch.int64), ()
    numbers = {name: number for number, name in enumerate(classes)}
    return torch.tensor([numbers[name] for name in of_image if name is not None]), tuple(classes)
