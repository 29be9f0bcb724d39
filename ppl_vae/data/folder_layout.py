"""How the folders of a data set name its splits and its classes.

Three layouts are understood, each also below one or more outer folders that hold everything:

    train/cat/1.png     the split first, then the class
    cat/train/1.png     the class first, then the split
    cat/1.png           classes without splits
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from posixpath import commonpath
from typing import NamedTuple

from ppl_vae.data.splits import abbreviate

_SPLIT_FOLDERS = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "test": "test",
}

# A word of a folder's name that speaks of a split ("train", "testset", "trainval"), and the split that it speaks of.
_SPLIT_WORD = re.compile(
    r"(?:(train|training)|(tests?|testing)|(val|valid|validate|validation|eval|evaluation|dev|devel|development|holdout))+"
    r"(?:sets?|data|images)?"
)
# Words that may stand beside it without making another name of it: "test_images", "train_64x64", "trainA", "valid_HR".
_QUALIFIER = re.compile(
    r"\d+|[^\W\d_]|sets?|data|datasets?|images?|imgs?|pics?|pictures?|photos?|split|full|small|all|final|new|old|raw|hr|lr"
)


class Place(NamedTuple):
    """Split and class of an image according to its folders, or None."""

    split: str | None
    class_name: str | None


class Layout(NamedTuple):
    """Meaning of the folders in a path.

    Args:
        num_outer: outer folders that hold everything.
        is_class_first: whether the class is named before the split.
    """

    num_outer: int
    is_class_first: bool

    @property
    def words(self) -> str:
        """Description of how the images were split."""
        return "by the folders in each class" if self.is_class_first else "by their folders"

    def place(self, name: str) -> Place:
        """Find the split and the class of an image from its path below the data set's folder."""
        return self.place_folders(_folders(name))

    def place_folders(self, folders: tuple[str, ...]) -> Place:
        """Find the split and the class of images from the names of the folders that they lie in."""
        folders = folders[self.num_outer :]
        if self.is_class_first:
            return Place(_exact_split(folders[1]), folders[0])
        split = _exact_split(folders[0]) if folders else None
        below = folders[split is not None :]
        return Place(split, below[0] if below else None)


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
    """Refuse a folder that is named like a split but not read as one: its images would train unnoticed.

    Two such folders are harmless: one within a folder of the same split, as archives unpack ("test/test"), and a class
    "train" beside other classes.

    Raises:
        ValueError: there is such a folder, at any depth.
    """
    places = {folders: layout.place_folders(folders) for folders in map(_folders, names)}
    suspects = _find_split_names({folder for folders in places for folder in folders})
    train_classes = {place.class_name for place in places.values() if place.split == "train"}
    class_names = {name for name in train_classes if name and name.lower() == "train"} if len(train_classes) > 1 else ()
    refused = set()
    for folders, (split, class_name) in places.items():
        split_depth = layout.num_outer + layout.is_class_first if split else None
        for depth, folder in enumerate(folders):
            is_understood = depth == split_depth or (split is not None and split == _exact_split(folder))
            is_class = depth - 1 == split_depth and class_name in class_names
            if folder in suspects and not is_understood and not is_class:
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


def _find_split_names(folders: Iterable[str]) -> set[str]:
    """Find the folders that are named like a split.

    "train2017" is, whatever is beside it. "seg_train" is one if there is a "seg_test" or the like; a class such as
    "bullet_train" or "test_tube" is none.
    """
    found: set[str] = set()
    partners: dict[tuple[str, ...], dict[str, list[int | None]]] = {}
    for folder in folders:
        words = re.findall(r"\d+|[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder).lower())
        matches = [_SPLIT_WORD.fullmatch(word) for word in words]
        if not any(matches):
            continue
        if all(match or _QUALIFIER.fullmatch(word) for word, match in zip(words, matches, strict=True)):
            found.add(folder)
        key = tuple("*" if match else word for word, match in zip(words, matches, strict=True))
        partners.setdefault(key, {})[folder] = [match.lastindex for match in matches if match]
    for splits in partners.values():
        if any(of_folder != next(iter(splits.values())) for of_folder in splits.values()):
            found |= splits.keys()
    return found
