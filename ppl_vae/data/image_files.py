"""Read image files: decode them to 8-bit levels, and bring them to one size and color."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ppl_vae.data.splits import abbreviate
from ppl_vae.runtime.errors import Widths, check_widths, pluralize
from ppl_vae.runtime.process import progress_bar

# --- One file ---

# The formats that are read, by Pillow's names, and the ends of their files' names.
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
EXTENSIONS = frozenset(end for ends in FORMATS.values() for end in ends)
MOST_PIXELS = 89_478_485  # Pillow's own limit, 256 MiB of red, green and blue; beyond it Pillow only warns

# What an image does not show of its file: sentences for the user, with a place for the number of images.
PAGES = "several pages or frames in {}: only the first is kept"
TRANSPARENT = "transparency in {}: it is laid over white"
DEEP = "gray levels of 16 bits in {}: they are divided by 257 and rounded, so that 65,535 is white"

_GRAY_MODES = ("1", "L", "LA", "La")


class UnreadableImageError(ValueError):
    """An image is left out, and the message gives the user the reason, without the name of the file."""


def decode(raw: bytes) -> tuple[Image.Image, list[str]]:
    """Decode the first page of an image file, turned as its EXIF orientation says, and laid over white.

    The header is checked before memory is allocated for the pixels.

    Returns:
        The image, opaque and in mode L or RGB; and what it does not show of its file, of the sentences above.

    Raises:
        UnreadableImageError: the image is too large, or its levels have no known scale.
        Exception: of nearly every type, where the file is damaged.
    """
    too_large = f"an image may have at most {MOST_PIXELS:,} pixels; scale it down"
    try:
        opened = Image.open(BytesIO(raw), formats=[*FORMATS])
    except Image.DecompressionBombError:
        raise UnreadableImageError(too_large) from None
    with opened:
        if opened.width * opened.height > MOST_PIXELS:
            raise UnreadableImageError(too_large)
        is_deep = opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in ("PNG", "PPM"))
        if opened.mode.startswith(("I", "F")) and not is_deep:
            raise UnreadableImageError("gray levels of 32 bits have no known scale; save 8 or 16 bits")
        image: Image.Image = ImageOps.exif_transpose(opened)
        notes = [PAGES] if getattr(opened, "n_frames", 1) > 1 else []
        if is_deep:
            image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
            notes.append(DEEP)
        is_gray = image.mode in _GRAY_MODES
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if np.asarray(image.getchannel("A")).min() < 255:
                notes.append(TRANSPARENT)
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if is_gray else "RGB"), notes


# --- Many files ---

_GRAY_DIFFERENCE = 2  # levels between the channels of a gray image that a lossy WebP file stores in color
_MOST_THREADS, _ITEMS_PER_THREAD = 16, 8

# What is true of an image: sentences for the user, as above.
_IN_COLOR = "{} are in color"  # not said
_GRAY = "only gray pixels in {}, which are read as red, green and blue: --color gray reads one channel"
_GRAYED = "{} are stored in color, and were made gray"


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


def check_image_size(image_size: Widths | None) -> tuple[int, int] | None:
    """Convert one number or two to (H, W); anything else raises ValueError."""
    if image_size is None:
        return None
    size = check_widths("image_size", image_size)
    if len(size) not in (1, 2):
        raise ValueError(f"image_size: expected height and width, or one number for both, got {image_size!r}")
    return size[0], size[-1]


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

    Raises ValueError where a file cannot be opened, none is an image, they have several sizes, or they show nothing
    once transparent pixels lie over white.
    """
    read: list[str] = []
    unreadable: dict[str, str] = {}
    counts: Counter[str] = Counter()
    sizes: set[tuple[int, int]] = set()
    levels: set[int] = set()  # the smallest and the largest of each image
    checksum = hashlib.sha256()
    bar = progress_bar(iterable=names, unit="image", desc=f"reading {root.name}", delay=1, leave=False)
    with tempfile.TemporaryFile(dir=folder) if folder else BytesIO() as file, warnings.catch_warnings(), bar:
        warnings.filterwarnings("ignore", module="PIL")  # of files that it repairs; sizes are checked here
        for name, found in zip(bar, _map_in_threads(partial(_read_image, root, options), names), strict=True):
            if isinstance(found, str):
                unreadable[name] = found
                continue
            raw, pixels, notes = found
            read.append(name)
            counts.update(notes)
            sizes.add((pixels.shape[0], pixels.shape[1]))
            levels |= {int(pixels.min()), int(pixels.max())}
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


Found = tuple[bytes, np.ndarray, list[str]] | str


def _map_in_threads(function: Callable[[str], Found], names: Sequence[str]) -> Iterator[Found]:
    """Yield function(name) of each name, in order; few results wait for their turn."""
    Image.init()  # once, before several threads do
    num_threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    size = _ITEMS_PER_THREAD * num_threads
    with ThreadPoolExecutor(num_threads, "ppl_vae-data") as pool:
        for start in range(0, len(names), size):
            yield from pool.map(function, names[start : start + size])


def _read_image(root: Path, options: ImageOptions, name: str) -> Found:
    """Read a file to its bytes, pixels and notes, or to the reason why it is no image ("": damage).

    Pixels are (H, W) for the color "gray", else (H, W, 3). Raises ValueError where the file cannot be opened, and where
    the memory ran out: the file is not the cause, since its size was checked.
    """
    try:
        raw = (root / name).read_bytes()
    except OSError as error:
        raise ValueError(f"{root / name} cannot be read: {error.strerror}") from None
    try:
        image, notes = decode(raw)
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
    return raw, pixels, notes


def _is_gray(pixels: np.ndarray) -> bool:
    """Whether the channels of (H, W, 3) levels agree."""
    red, green, blue = np.moveaxis(pixels, 2, 0)
    most, least = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    return bool((most - least).max() <= _GRAY_DIFFERENCE)
