"""Read folders of image files: bring them to one size and color, split them, and label them by subfolder."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from ppl_vae.data import storage
from ppl_vae.data.folder_layout import (
    check_layout,
    describe_others,
    find_images,
    find_layout,
    index_splits,
    label_by_folder,
)
from ppl_vae.data.image_file import TRANSPARENT, UnreadableImageError, decode
from ppl_vae.data.splits import LEVELS, SPLIT_ORDER, Splits, abbreviate, complete_splits
from ppl_vae.runtime.errors import Widths, check_widths, pluralize
from ppl_vae.runtime.process import progress_bar

_BLOCK = 2**23  # bytes of a block of images


class ImageOptions(NamedTuple):
    """How image files are brought to one size and color.

    Args:
        size: (H, W); None: all images have one size already.
        fit: "crop" resizes to cover H x W and cuts the middle; "stretch" ignores the aspect ratio.
        color: "gray", "rgb", or None: gray where every image is.
    """

    size: tuple[int, int] | None = None
    fit: str = "crop"
    color: str | None = None


def load_image_folder(path: Path, *, image_size: Sequence[int] | None, fit: str, color: str | None) -> Splits:
    """Load the images below a folder as 8-bit levels: (N, 1, H, W) gray or (N, 3, H, W) red, green, blue.

    The formats of ``image_file.FORMATS`` are read. Hidden files, and files with the extension of none of these, are
    skipped. Links to folders are followed, except those that lead back to a folder that contains them.
    ``folder_layout`` says how folders name splits and classes. Images outside the folders of splits train where there
    is no folder train; missing splits are a tenth each, by a fixed permutation of the sorted names. Two or more classes
    label the images if every image lies in one; labels count the sorted names of them all.
    Images are turned as their EXIF orientation says; transparent ones are laid over white; 16-bit gray becomes
    round(level / 257); of several pages or frames the first is taken. The notes of the splits count these files.

    The images are kept in the cache folder, and read again when the name, the size or a time of change of any file is
    another.

    ``image_size`` is (H, W), or one number for both; ``fit`` and ``color`` are as in ``ImageOptions``. Raises
    ValueError for a folder or file that cannot be opened, a folder that is named like a split without being one, no
    images that can be read, several sizes, levels without a known scale, or images that are blank once transparent
    pixels lie over white.
    """
    names, others = find_images(path)
    if not names:
        raise ValueError(f"{path}: expected images (such as PNG), got {describe_others(others)}; convert others to PNG")
    check_layout(path, names, find_layout(names))
    options = ImageOptions(check_image_size(image_size), fit, color)
    status = [os.stat(path / name) for name in names]
    state = [(name, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for name, each in zip(names, status, strict=True)]
    splits = storage.load_cached(path, options._asdict(), state, partial(_read_folder, path, names, options))
    return replace(splits, split=f"{splits.split}; {describe_others(others)} ignored") if others else splits


def _read_folder(path: Path, names: Sequence[str], options: ImageOptions, to: Path | None) -> Splits:
    """Read and split images, and collect them in the file ``to``."""
    files = read_image_files(path, names, options, to.parent if to else None)
    layout = find_layout(names)
    index = index_splits(path, names, files.names, layout)
    numbers, class_names = label_by_folder(files.names, layout)
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
        split=layout.words if words == "as given" else words,
        labels=labels,
        names={split: tuple(files.names[row] for row in rows[split].tolist()) for split in SPLIT_ORDER},
        class_names=class_names,
        unreadable=tuple(files.unreadable),
        notes=files.notes,
    )


def check_image_size(image_size: Widths | None) -> tuple[int, int] | None:
    """Convert one number or two to (H, W); anything else raises ValueError."""
    if image_size is None:
        return None
    size = check_widths("image_size", image_size)
    if len(size) not in (1, 2):
        raise ValueError(f"image_size: expected height and width, or one number for both, got {image_size!r}")
    return size[0], size[-1]


# --- Reading files ---

_GRAY_DIFFERENCE = 2  # levels between the channels of a gray image that a lossy WebP file stores in color
_LEAST_HIGHEST = 2**14  # if all 16-bit levels are below it, they have 14 bits or fewer
_MOST_THREADS, _ITEMS_PER_THREAD = 16, 8

# What is true of an image: sentences for the user, as in ``image_file``.
_IN_COLOR = "{} are in color"  # not said
_GRAY = "only gray pixels in {}, which are read as red, green and blue: --color gray reads one channel"
_GRAYED = "{} are stored in color, and were made gray"


class ImageFiles(NamedTuple):
    """Image files that were read.

    Args:
        names: of the files that were read, in their order.
        unreadable: names of the other files, with the reason where the user should know it, else "".
        images: (N, C, H, W) uint8, C = 1 where all are gray.
        sha256: of the names and bytes of the files that were read.
        notes: sentences for the user: why files were left out, what the images do not show, and how they were changed.
    """

    names: tuple[str, ...]
    unreadable: dict[str, str]
    images: np.ndarray
    sha256: str
    notes: tuple[str, ...]


def read_image_files(root: Path, names: Sequence[str], options: ImageOptions, folder: Path | None = None) -> ImageFiles:
    """Read image files in threads, and keep their pixels in a nameless file of a folder (None: in memory).

    Raises ValueError where a file cannot be opened, none is an image, they have several sizes, their levels have no
    known scale, or they show nothing once transparent pixels lie over white.
    """
    read: list[str] = []
    unreadable: dict[str, str] = {}
    counts: Counter[str] = Counter()
    sizes: set[tuple[int, int]] = set()
    levels: set[int] = set()  # the smallest and the largest of each image
    highest, checksum = 0, hashlib.sha256()
    bar = progress_bar(iterable=names, unit="image", desc=f"reading {root.name}", delay=1, leave=False)
    with tempfile.TemporaryFile(dir=folder) if folder else BytesIO() as file, warnings.catch_warnings(), bar:
        warnings.filterwarnings("ignore", module="PIL")  # of files that it repairs; sizes are checked here
        for name, found in zip(bar, _map_in_threads(partial(_read_image, root, options), names), strict=True):
            if isinstance(found, str):
                unreadable[name] = found
                continue
            raw, pixels, notes, own_highest = found
            read.append(name)
            counts.update(notes)
            sizes.add((pixels.shape[0], pixels.shape[1]))
            levels |= {int(pixels.min()), int(pixels.max())}
            highest = max(highest, own_highest)
            checksum.update(f"{name}\0{len(raw)}\0".encode("utf-8", "surrogateescape"))
            checksum.update(raw)
            file.write(pixels.data)
        if not read:
            unread = f"{len(names):,} that cannot be read: {abbreviate(unreadable)}"
            raise ValueError("; ".join([f"{root}: expected images, got {unread}", *list_reasons(unreadable)]))
        file.flush()
        stored = np.frombuffer(file.getvalue() if isinstance(file, BytesIO) else np.memmap(file, mode="r"), np.uint8)
    if len(sizes) > 1:
        some = abbreviate(f"{height}x{width}" for height, width in sorted(sizes))
        raise ValueError(
            f"{root}: expected images of one size, got {len(sizes):,} sizes ({some}); "
            "--image-size H W brings them to one"
        )
    if 0 < highest < _LEAST_HIGHEST:
        raise ValueError(
            f"{root}: expected 16-bit levels where white is 65,535, got no level above {highest:,}; multiply them so "
            "that it is, or save the images with 8 bits"
        )
    if counts[TRANSPARENT] and len(levels) == 1:
        raise ValueError(
            f"{root}: expected images that show something, got only level {levels.pop()}, since the transparent pixels "
            "are laid over white; save the images over another color"
        )
    images = stored.reshape(len(read), *sizes.pop(), -1).transpose(0, 3, 1, 2)
    is_in_color = counts.pop(_IN_COLOR, 0) > 0
    if options.color is None and not is_in_color:
        images = images[:, :1]
    if not is_in_color or 2 * counts[_GRAY] < len(read):
        counts.pop(_GRAY, None)
    of_all = f" of {pluralize(len(read), 'image')}"
    sentences = [words.replace("{}", f"{count:,}{of_all}", 1) for words, count in counts.items() if count]
    return ImageFiles(tuple(read), unreadable, images, checksum.hexdigest(), (*list_reasons(unreadable), *sentences))


def list_reasons(unreadable: Mapping[str, str]) -> list[str]:
    """List why files were left out, one sentence for each reason."""
    reasons = dict.fromkeys(reason for reason in unreadable.values() if reason)
    names = {reason: [name for name, own in unreadable.items() if own == reason] for reason in reasons}
    return [f"{abbreviate(names[reason])} not read: {reason}" for reason in reasons]


Found = tuple[bytes, np.ndarray, list[str], int] | str


def _map_in_threads(function: Callable[[str], Found], names: Sequence[str]) -> Iterator[Found]:
    """Yield function(name) of each name, in order; few results wait for their turn."""
    Image.init()  # once, before several threads do
    num_threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    size = _ITEMS_PER_THREAD * num_threads
    with ThreadPoolExecutor(num_threads, "ppl_vae-data") as pool:
        for start in range(0, len(names), size):
            yield from pool.map(function, names[start : start + size])


def _read_image(root: Path, options: ImageOptions, name: str) -> Found:
    """Read a file to its bytes, pixels, notes and highest level, or to the reason why it is no image ("": damage).

    Pixels are (H, W) for the color "gray", else (H, W, 3). Raises ValueError where the file cannot be opened, and where
    the memory ran out: the file is not the cause, since its size was checked.
    """
    try:
        raw = (root / name).read_bytes()
    except OSError as error:
        raise ValueError(f"{root / name} cannot be read: {error.strerror}") from None
    try:
        image, notes, highest = decode(raw)
        size, is_in_color = (image.height, image.width), image.mode == "RGB"
        if options.size is not None and size != options.size:
            height, width = options.size
            fit = Image.Image.resize if options.fit == "stretch" else ImageOps.fit
            image = fit(image, (width, height), Image.Resampling.BILINEAR)
            how = {"crop": "scaled to cover it and cut to the middle", "stretch": "stretched to it"}[options.fit]
            notes.append(f"{{}} have a height or width other than {height}x{width}, and were {how}")
        pixels = np.ascontiguousarray(image.convert("L" if options.color == "gray" else "RGB"))
    except MemoryError as error:
        raise ValueError(f"{root / name}: the memory ran out while it was decoded") from error
    except UnreadableImageError as error:
        return str(error)
    except Exception:  # a broken file makes Pillow raise nearly every type
        return ""
    if options.color == "gray" and is_in_color:
        notes.append(_GRAYED)
    if options.color is None:
        notes += [_IN_COLOR] * is_in_color + [_GRAY] * _is_gray(pixels)
    return raw, pixels, notes, highest


def _is_gray(pixels: np.ndarray) -> bool:
    """Whether the channels of (H, W, 3) levels agree."""
    red, green, blue = np.moveaxis(pixels, 2, 0)
    most, least = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    return bool((most - least).max() <= _GRAY_DIFFERENCE)
