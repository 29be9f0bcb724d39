"""Read a folder of images: find its files, read from its subfolders which splits and classes they name, and split it.

Two layouts are understood, each also below one or more outer folders that hold everything:

    train/cat/1.png     the split first, then the class
    cat/1.png           classes without splits
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from posixpath import commonpath

import torch
from torch import Tensor

from ppl_vae.data import storage
from ppl_vae.data.image_files import EXTENSIONS, ImageOptions, check_image_size, read_image_files
from ppl_vae.data.splits import LEVELS, SPLIT_ORDER, Splits, abbreviate, complete_splits
from ppl_vae.runtime.errors import pluralize

_BLOCK = 2**23  # bytes of a block of images


def load_image_folder(path: Path, *, image_size: Sequence[int] | None, fit: str, color: str | None) -> Splits:
    """Load the images below a folder as 8-bit levels: (N, 1, H, W) gray or (N, 3, H, W) red, green, blue.

    The formats of ``image_files.FORMATS`` are read. Hidden files, and files with the extension of none of these, are
    skipped. Links to folders are followed, except those that lead back to a folder that contains them. Images outside
    the folders of splits train where there is no folder train; missing splits are a tenth each, by a fixed permutation
    of the sorted names. Two or more classes label the images if every image lies in one; labels count the sorted names
    of them all. Images are turned as their EXIF orientation says; transparent ones are laid over white; of several
    pages or frames the first is taken. The notes of the splits count these files.

    The images are kept in the cache folder, and read again when the name, the size or a time of change of any file is
    another.

    ``image_size`` is (H, W), or one number for both; ``fit`` and ``color`` are as in ``ImageOptions``. Raises
    ValueError for a folder or file that cannot be opened, a folder that is named like a split without being one, no
    images that can be read, several sizes, or images that are blank once transparent pixels lie over white.
    """
    names, others = find_images(path)
    if not names:
        raise ValueError(f"{path}: expected images (such as PNG), got {describe_others(others)}; convert others to PNG")
    check_layout(path, names, count_outer_folders(names))
    options = ImageOptions(check_image_size(image_size), fit, color)
    status = [os.stat(path / name) for name in names]
    state = [(name, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for name, each in zip(names, status, strict=True)]
    splits = storage.load_cached(path, options._asdict(), state, partial(_read_folder, path, names, options))
    return replace(splits, split=f"{splits.split}; {describe_others(others)} ignored") if others else splits


def _read_folder(path: Path, names: Sequence[str], options: ImageOptions, to: Path | None) -> Splits:
    """Read and split images, and collect them in the file ``to``."""
    files = read_image_files(path, names, options, to.parent if to else None)
    num_outer = count_outer_folders(names)
    index = index_splits(path, names, files.names, num_outer)
    numbers, class_names = label_by_folder(files.names, num_outer)
    labels = {split: numbers[rows] for split, rows in index.items()} if class_names else {}
    rows, labels, words = complete_splits(str(path), index, labels)
    order = torch.cat([rows[split] for split in SPLIT_ORDER])
    blocks = (files.images[part.numpy()] for part in order.split(max(1, _BLOCK // files.images[0].nbytes)))
    images = storage.collect(blocks, files.images.shape, torch.uint8, to)
    train, validation, test = images.split([len(rows[split]) for split in SPLIT_ORDER])
    return Splits(
        path.resolve().name,
        LEVELS,
        train,
        validation,
        test,
        sha256=files.sha256,
        split="by their folders" if words == "as given" else words,
        labels=labels,
        names={split: tuple(files.names[row] for row in rows[split].tolist()) for split in SPLIT_ORDER},
        class_names=class_names,
        unreadable=tuple(files.unreadable),
        notes=files.notes,
    )


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


def count_outer_folders(names: Iterable[str]) -> int:
    """Count the outer folders that hold all images, above those of splits; 0 where no folder is a split."""
    all_folders = {_folders(name) for name in names}
    outer = [folder for folder in commonpath(["/".join(folders) for folders in all_folders]).split("/") if folder]
    depth = next((i for i, folder in enumerate(outer) if _exact_split(folder)), len(outer))
    has_splits = any(len(folders) > depth and _exact_split(folders[depth]) for folders in all_folders)
    return depth if has_splits else 0


def find_place(name: str, num_outer: int) -> tuple[str | None, str | None]:
    """Find the split and the class of an image, each may be None, from its path below the data set's folder."""
    folders = _folders(name)[num_outer:]
    split = _exact_split(folders[0]) if folders else None
    below = folders[split is not None :]
    return split, below[0] if below else None


def check_layout(root: Path, names: Iterable[str], num_outer: int) -> None:
    """Raise ValueError for a folder that is named like a split but not read as one: its images would train unnoticed.

    Two such folders are harmless: one within a folder of the same split, as archives unpack ("test/test"), and a class
    "train" beside other classes.
    """
    places = {_folders(name): find_place(name, num_outer) for name in names}
    num_classes = len({class_name for split, class_name in places.values() if split == "train"})
    refused = set()
    for folders, (split, _) in places.items():
        for depth, folder in enumerate(folders):
            is_split = split is not None and split == _exact_split(folder)
            is_class = split is not None and depth == num_outer + 1 and folder.lower() == "train" and num_classes > 1
            if _is_named_like_split(folder) and not is_split and not is_class:
                refused.add("/".join(folders[: depth + 1]))
    if refused:
        raise ValueError(
            f"{root}: expected every split to be a folder of the data set, named train; valid, validation or val; "
            f"test, got {abbreviate(sorted(refused))}; rename them, or give the path of one of them alone"
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


def index_splits(root: Path, names: Sequence[str], read: Sequence[str], num_outer: int) -> dict[str, Tensor]:
    """Find {split: rows} of the images in ``read``, those among all ``names`` that could be read.

    Images outside the folders of splits belong to train. Images outside where there is a folder train, and a split
    without an image that can be read, raise ValueError.
    """
    splits = [find_place(name, num_outer)[0] for name in names]
    named = {split for split in splits if split}
    outside = [name for name, split in zip(names, splits, strict=True) if split is None]
    if outside and "train" in named:
        raise ValueError(
            f"{root}: expected every image in train, valid or test, got {len(outside):,} outside: {abbreviate(outside)}"
        )
    of_image = [find_place(name, num_outer)[0] or "train" for name in read]
    index = {split: [i for i, own in enumerate(of_image) if own == split] for split in sorted({"train"} | named)}
    for split, rows in index.items():
        if not rows:
            raise ValueError(f"{root}: expected at least one image that can be read in {split}, got none")
    return {split: torch.tensor(rows) for split, rows in index.items()}


def label_by_folder(names: Sequence[str], num_outer: int) -> tuple[Tensor, tuple[str, ...]]:
    """Label images by folder: (N,) int64 and class names; no names unless all images lie in two or more classes."""
    of_image = [find_place(name, num_outer)[1] for name in names]
    classes = sorted({name for name in of_image if name is not None})
    if None in of_image or len(classes) < 2:
        return torch.zeros(len(names), dtype=torch.int64), ()
    numbers = {name: number for number, name in enumerate(classes)}
    return torch.tensor([numbers[name] for name in of_image if name is not None]), tuple(classes)
