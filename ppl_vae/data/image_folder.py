"""Folders of image files: read, brought to one size and color, split, and labeled by their subfolders."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ppl_vae.data.splits import LEVELS, Splits, complete, first_few, several

_SPLIT_FOLDERS = {
    "train": "train",
    "valid": "validation",
    "validation": "validation",
    "val": "validation",
    "test": "test",
}
_NEARLY_A_SPLIT = re.compile(
    r"(train|training|test|testing|tests|val|valid|validate|validation|eval|evaluation|dev|devel|development)"
    r"[ _-]?(set|images|data)?"
)
_GRAY_MODES = ("1", "L", "LA", "La")
_NOT_PIXELS = ("EPS", "WMF", "PDF", "MPEG", "HDF5", "GRIB", "BUFR")  # no images, or read by starting another program


class Found(NamedTuple):
    """The image files below a folder, by their names from there on, sorted; how many other files."""

    images: tuple[str, ...]
    num_others: int


class Pictures(NamedTuple):
    """Images that could be read: (N, C, H, W) uint8, their names, the other names, SHA-256 of names and bytes."""

    pixels: Tensor
    names: tuple[str, ...]
    unreadable: tuple[str, ...]
    sha256: str


def image_folder(path: Path, *, image_size: Sequence[int] | None, fit: str, color: str | None) -> Splits:
    """The images below a folder, as 8-bit levels: (N, 1, H, W) gray or (N, 3, H, W) red, green, blue.

    Every format that Pillow decodes; hidden files are skipped, and so are those whose extension is no image's; links
    to folders are followed, but for those that lead back to a folder that they lie in. Folders
    named train, valid (or validation, val) and test are splits, and images beside these train where there is no folder
    train; what is lacking is a tenth each, by a fixed permutation of the sorted names. Two or more subfolders (of the
    splits, where there are splits) are classes if every image lies in one; labels count the sorted names of them all.
    Images are turned as their EXIF orientation says; transparent ones are laid over white; 16-bit gray becomes
    round(level / 257); of an animation the first frame is taken.

    Args:
        image_size: (H, W), or one number for both; None: all images have one size already.
        fit: "crop" resizes to cover H x W and cuts the middle; "stretch" ignores the aspect ratio.
        color: "gray", "rgb", or None: gray where every image is.

    Raises:
        ValueError: no folder, one that cannot be opened or whose name is nearly a split's, no images, none that can be
            read, or images of several sizes.
    """
    found = find_images(path)
    if not found.images:
        others = several(found.num_others, "other file") if found.num_others else "an empty folder"
        raise ValueError(f"{path}: expected images, got {others}")
    _check_names_of_splits(path, found.images)
    pictures = read_images(path, found.images, size=checked_size(image_size), fit=fit, color=color)
    index = _index_of_splits(path, found.images, pictures.names)
    given = {split: pictures.pixels[rows] for split, rows in index.items()}
    numbers, class_names = label_by_folder(pictures.names)
    labels = {split: numbers[rows] for split, rows in index.items()} if class_names else {}
    given, labels, words = complete(str(path), given, labels)
    words = "by their folders" if words == "as given" else words
    if found.num_others:
        are_no_images = "that is no image" if found.num_others == 1 else "that are no images"
        words += f"; {several(found.num_others, 'file')} {are_no_images} ignored"
    return Splits(
        name=path.resolve().name,
        kind=LEVELS,
        sha256=pictures.sha256,
        split=words,
        labels=labels,
        class_names=class_names,
        unreadable=pictures.unreadable,
        train=given["train"],
        validation=given["validation"],
        test=given["test"],
    )


def checked_size(image_size: Sequence[int] | None) -> tuple[int, int] | None:
    """(H, W) of one number or two.

    Raises:
        ValueError: anything else.
    """
    if image_size is None:
        return None
    if len(image_size) not in (1, 2) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in image_size):
        raise ValueError(f"image_size: expected height and width, or one number for both, got {list(image_size)}")
    return image_size[0], image_size[-1]


def find_images(root: Path) -> Found:
    """Image files by their extension, recursively, sorted by name; links to folders are followed, never in circles.

    Raises:
        ValueError: a folder that cannot be opened: a whole split or class could be missing.
    """
    extensions = {end for end, name in Image.registered_extensions().items() if name in _formats()}
    images, others = [], 0

    def refuse(error: OSError) -> None:
        name = Path(error.filename).relative_to(root).as_posix()
        which = "the folder" if name == "." else name
        raise ValueError(f"{root}: {which} cannot be opened: {error.strerror}") from None

    for folder, below, names in os.walk(root, onerror=refuse, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".") and not _leads_back(Path(folder, name))]
        for name in names:
            if Path(name).suffix.lower() in extensions and not name.startswith("."):
                images.append((Path(folder) / name).relative_to(root).as_posix())
            else:
                others += not name.startswith(".")
    return Found(tuple(sorted(images)), others)


def _leads_back(folder: Path) -> bool:
    """It is one of the folders that it lies in, by way of a link: to follow it would never end."""
    return os.path.realpath(folder) in map(os.path.realpath, Path(os.path.abspath(folder)).parents)


def read_images(
    root: Path, names: Sequence[str], *, size: tuple[int, int] | None, fit: str, color: str | None
) -> Pictures:
    """These files below a folder, each brought to (H, W) and all to one color; those that fail are named.

    Raises:
        ValueError: none can be read, or ``size`` is None and they have several sizes.
    """
    checksum, arrays, read, unreadable, sizes = hashlib.sha256(), [], [], [], set()
    for name in names:
        try:
            if not (root / name).is_file():  # a pipe would wait for ever
                raise OSError("not a file")
            raw = (root / name).read_bytes()
            image = _decode(raw)
            image = image if size is None else _resized(image, size, fit)
        except Exception:  # a broken file makes Pillow raise nearly every type
            unreadable.append(name)
            continue
        sizes.add((image.height, image.width))
        if len(sizes) == 1:  # later ones of another size are only counted
            arrays.append(np.asarray(image if color is None else image.convert({"gray": "L", "rgb": "RGB"}[color])))
        read.append(name)
        checksum.update(f"{name}\0{len(raw)}\0".encode("utf-8", "surrogateescape") + raw)
    if not read:
        raise ValueError(f"{root}: expected images, got {len(names):,} that cannot be read: {first_few(unreadable)}")
    if len(sizes) > 1:
        some = first_few(f"{height}x{width}" for height, width in sorted(sizes))
        raise ValueError(
            f"{root}: expected images of one size, got {len(sizes):,} sizes ({some}); "
            "--image-size H W brings them to one"
        )
    return Pictures(_stacked(arrays), tuple(read), tuple(unreadable), checksum.hexdigest())


def _stacked(arrays: list[np.ndarray]) -> Tensor:
    """(N, C, H, W) of (H, W) and (H, W, 3); C = 1 if all are (H, W). Empties the list, so as not to hold them twice."""
    height, width = arrays[0].shape[:2]
    channels = 3 if any(array.ndim == 3 for array in arrays) else 1
    stacked = np.empty((len(arrays), channels, height, width), np.uint8)
    for i in reversed(range(len(arrays))):
        array = arrays.pop()
        stacked[i] = array if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(stacked)


def _formats() -> list[str]:
    Image.init()  # once; without it Pillow knows only the most common formats
    return [name for name in Image.OPEN if name not in _NOT_PIXELS]


def _decode(raw: bytes) -> Image.Image:
    """The first frame, upright, opaque, 8 bits a channel, in mode L or RGB."""
    with Image.open(BytesIO(raw), formats=_formats()) as opened:
        opened.load()
        image: Image.Image = ImageOps.exif_transpose(opened)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known scale")
    if image.mode.startswith("I"):
        return _from_16_bits(np.asarray(image))
    gray = image.mode in _GRAY_MODES
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if gray else "RGB")


def _from_16_bits(levels: np.ndarray[Any, Any]) -> Image.Image:
    """round(level / 257), so that 65,535 is white."""
    if levels.min() < 0 or levels.max() > 65_535:
        raise ValueError("more than 16 bits have no known scale")
    return Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _resized(image: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    height, width = size
    if fit == "stretch":
        return image.resize((width, height), Image.Resampling.BILINEAR)
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


# --- What the folders mean ---


def _split_of(name: str) -> str | None:
    """The split that an image's first folder names."""
    folders = PurePosixPath(name).parts[:-1]
    return _SPLIT_FOLDERS.get(folders[0].lower()) if folders else None


def _check_names_of_splits(root: Path, names: Sequence[str]) -> None:
    """Refuses folders such as "testing" beside others: taken as a class, its images would train.

    Raises:
        ValueError: there is one.
    """
    folders = {PurePosixPath(name).parts[0] if "/" in name else "" for name in names}
    nearly = [
        name
        for name in sorted(folders)
        if name.lower() not in _SPLIT_FOLDERS and _NEARLY_A_SPLIT.fullmatch(name.lower())
    ]
    if nearly and len(folders) > 1:
        raise ValueError(
            f"{root}: expected folders of splits to be named train; valid, validation or val; test, "
            f"got {first_few(nearly)}"
        )


def _index_of_splits(root: Path, names: Sequence[str], read: Sequence[str]) -> dict[str, Tensor]:
    """{split: rows}; images outside the folders of splits train.

    Raises:
        ValueError: images outside where there is a folder train, or a split without an image that can be read.
    """
    named = {split for name in names if (split := _split_of(name))}
    outside = [name for name in names if _split_of(name) is None]
    if outside and "train" in named:
        raise ValueError(
            f"{root}: expected every image in train, valid or test, got {len(outside):,} outside: {first_few(outside)}"
        )
    of_images = [_split_of(name) or "train" for name in read]
    index = {split: [i for i, own in enumerate(of_images) if own == split] for split in sorted({"train"} | named)}
    for split, rows in index.items():
        if not rows:
            raise ValueError(f"{root}: expected at least one image that can be read in {split}, got none")
    return {split: torch.tensor(rows) for split, rows in index.items()}


def label_by_folder(names: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """(N,) int64 labels and the names of the classes; no names unless all images lie in two subfolders or more."""
    folders = [PurePosixPath(name).parts[_split_of(name) is not None : -1] for name in names]
    classes = sorted({below[0] for below in folders if below})
    if not all(folders) or len(classes) < 2:
        return torch.zeros(len(names), dtype=torch.int64), ()
    return torch.tensor([classes.index(below[0]) for below in folders]), tuple(classes)
