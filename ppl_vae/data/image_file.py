"""Decode image files to 8-bit levels, and count for the user what the levels leave out.

An image is not read if its file is larger than ``MOST_BYTES``, or if it has more than ``MOST_PIXELS``, or more than
``FREE_PIXELS`` and also more than ``MOST_EXPANSION`` for every byte of its file. The header is checked before memory is
allocated for the pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ppl_vae.data.splits import abbreviate
from ppl_vae.runtime.errors import pluralize

MOST_PIXELS = 89_478_485  # Pillow's own limit, 256 MiB of red, green and blue; beyond it Pillow only warns
MOST_BYTES = 2**30
FREE_PIXELS = 2**23  # 32 MiB of red, green, blue and opacity
MOST_EXPANSION = 200

_GRAY_MODES = ("1", "L", "LA", "La")
_NOT_PIXELS = (
    *("EPS", "WMF", "PDF", "MPEG", "HDF5", "GRIB", "BUFR"),  # no images, or read by starting another program
    *("IPTC", "ICO", "ICNS", "BLP"),  # contain another image, which is read whatever its format or its size
)
_FORMATS_WITH_16_BITS = ("PNG", "TIFF", "PPM", "JPEG2000", "IM")  # their gray levels run from 0 to a known white
# The place of the number of bits after a marker. JPEG 2000 stores the number less one, and a highest bit for "signed".
_BITS_AFTER_MARKER = {"JPEG2000": (b"\xff\x4f\xff\x51", 42), "AVIF": (b"pixi", 9)}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_CHANNELS = 258, 262, 277  # tags of TIFF 6.0


class UnreadableImageError(ValueError):
    """An image is left out, and the message gives the user the reason."""


class ImageFacts(NamedTuple):
    """What else an image file contains, which is counted.

    Args:
        kinds: what holds of it, in words of ``ImageNotes``.
        bits: per channel of the file.
        highest: the largest stored level of any channel where there are more than 8 bits, on a scale up to 65,535.
        num_pages: pages or frames of the file; the image is the first.
        size: (H, W) before the image was resized.
    """

    kinds: tuple[str, ...]
    bits: int
    highest: int
    num_pages: int
    size: tuple[int, int]


def list_formats() -> list[str]:
    """List the formats that are read, by Pillow's names."""
    Image.init()  # once; without it Pillow knows only the most common formats
    return [name for name in Image.OPEN if name not in _NOT_PIXELS]


def decode(raw: bytes) -> tuple[Image.Image, ImageFacts]:
    """Decode the first page of an image file: upright, opaque, in mode L or RGB, and laid over white.

    Messages name a limit and not the numbers of the image, so that files that exceed it can be listed together.

    Raises:
        UnreadableImageError: the image is too large, or its levels have no known scale.
        Exception: of nearly every type, where the file is damaged.
    """
    too_many = f"an image may have at most {MOST_PIXELS:,} pixels; scale it down"
    try:
        opened = Image.open(BytesIO(raw), formats=list_formats())
    except Image.DecompressionBombError:
        raise UnreadableImageError(too_many) from None
    with opened:
        num_pixels = opened.width * opened.height
        if num_pixels > MOST_PIXELS:
            raise UnreadableImageError(too_many)
        if num_pixels > max(FREE_PIXELS, MOST_EXPANSION * len(raw)):
            raise UnreadableImageError(
                f"an image of more than {FREE_PIXELS:,} pixels may have at most {MOST_EXPANSION} per byte of its file; "
                "scale it down, or save it without compression"
            )
        bits = _read_bits_per_channel(opened, raw)
        opened.load()
        image: Image.Image = ImageOps.exif_transpose(opened)
        num_pages = _count_pages(opened)
        num_channels = opened.tag_v2.get(_TIFF_CHANNELS, 1) if isinstance(opened, TiffImageFile) else 0
        has_further_channels = num_channels > len(opened.getbands())
        if image.mode.startswith(("I", "F")):
            image, highest, is_transparent = _reduce_long_levels(image, opened, bits)
        else:
            gray, is_transparent = image.mode in _GRAY_MODES, False
            if image.has_transparency_data:
                image = image.convert("RGBA")
                is_transparent = bool(np.asarray(image.getchannel("A")).min() < 255)
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if gray else "RGB")
            highest = 257 * int(np.asarray(image).max()) if bits > 8 else 0
    found = {
        "image": True,
        "page": num_pages > 1,
        "deep": bits > 8,
        "transparent": is_transparent,
        "channels": has_further_channels,
    }
    kinds = tuple(kind for kind, holds in found.items() if holds)
    return image, ImageFacts(kinds, bits, highest, num_pages, (image.height, image.width))


def _reduce_long_levels(image: Image.Image, opened: ImageFile, bits: int) -> tuple[Image.Image, int, bool]:
    """Convert long gray levels to round(255 level / white); a level that the file calls transparent becomes white.

    Returns the image, its largest stored level, and whether it is partly transparent.
    """
    scaled_by_pillow = opened.format in ("PNG", "PPM")  # older versions of Pillow read 16 bits of a PNG in mode I
    if image.mode == "F":
        raise UnreadableImageError("floating-point levels have no known scale; save them with 8 or 16 bits")
    if opened.format not in _FORMATS_WITH_16_BITS or not (image.mode.startswith("I;16") or scaled_by_pillow):
        raise UnreadableImageError("signed and 32-bit levels have no known scale; save them with 8 or 16 bits")
    white = 2**bits - 1 if opened.format == "TIFF" else 65_535  # Pillow brings the other formats to 16 bits
    levels = np.asarray(image)
    table = ((np.arange(white + 1) * 510 + white) // (2 * white)).astype(np.uint8)
    # Where white is zero, Pillow inverts 8 bits alone.
    if isinstance(opened, TiffImageFile) and opened.tag_v2.get(_TIFF_PHOTOMETRIC) == 0:
        table = table[::-1]
    pixels = table[levels]
    transparent = levels == image.info.get("transparency")
    pixels[transparent] = 255
    return Image.fromarray(pixels), int(levels.max()) * 65_535 // white, bool(transparent.any())


def _read_bits_per_channel(opened: ImageFile, raw: bytes) -> int:
    """Read the bits per channel from the file's header; Pillow reports them for some formats only."""
    if opened.format == "PNG":
        return raw[24]  # the depth in IHDR
    if isinstance(opened, TiffImageFile):
        return int(max(opened.tag_v2.get(_TIFF_BITS, (1,))))
    if opened.format == "PPM":
        arguments = opened.tile[0].args
        return 16 if arguments == "I;16B" else arguments[-1].bit_length() if isinstance(arguments, tuple) else 8
    if opened.format == "SGI":
        return 8 * raw[3]
    if opened.format == "IM":
        return 16 if opened.mode.startswith("I") else 8
    marker, offset = _BITS_AFTER_MARKER.get(opened.format or "", (b"", 0))
    place = raw.find(marker)
    return (raw[place + offset] & 0x7F) + (opened.format == "JPEG2000") if marker and place >= 0 else 8


def _count_pages(opened: ImageFile) -> int:
    """Count pages or frames; a Photoshop file's are layers, which are all in the image."""
    try:
        return 1 if opened.format == "PSD" else int(getattr(opened, "n_frames", 1))
    except MemoryError:
        raise
    except Exception:  # a page beyond the first is damaged
        return 1


# --- Notes for the user ---

_GRAY_DIFFERENCE = 2  # levels between the channels of a gray image that a lossy WebP file stores in color
_MOST_PIXELS_AT_ONCE = 2**16  # most images in color are known by their first rows
_LEAST_HIGHEST = 2**14  # if all 16-bit levels are below it, they have 14 bits or fewer


def add_facts(facts: ImageFacts, image: Image.Image, pixels: np.ndarray) -> ImageFacts:
    """Add what holds of the ``pixels`` (H, W) or (H, W, 3) of an image that are kept."""
    is_color = pixels.ndim == 3
    found = {
        "size": facts.size != pixels.shape[:2],
        "blank": "transparent" in facts.kinds and bool(pixels.min() == pixels.max()),
        "color": is_color,
        "gray": not is_color or _is_gray(pixels),
        "grayed": not is_color and image.mode == "RGB" and not _is_gray(np.asarray(image)),
    }
    return facts._replace(kinds=(*facts.kinds, *(kind for kind, holds in found.items() if holds)))


def _is_gray(pixels: np.ndarray) -> bool:
    """Whether the channels of (H, W, 3) levels agree."""
    num_rows = max(1, _MOST_PIXELS_AT_ONCE // pixels.shape[1])
    for start in range(0, len(pixels), num_rows):
        red, green, blue = np.moveaxis(pixels[start : start + num_rows], 2, 0)
        most, least = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
        if (most - least).max() > _GRAY_DIFFERENCE:
            return False
    return True


class ImageNotes:
    """Counts of what the files of a folder contain beyond the pixels that are kept."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # the first file of a kind, and what it has
        self._transparent: set[int] = set()  # places of images, in the order in which they were added
        self._num_pages = self._bits = self._highest = 0  # the highest level is that of files with 16 bits
        self._refused: dict[str, list[str]] = {}  # files that are left out, by the reason

    def add(self, name: str, facts: ImageFacts) -> None:
        """Count an image."""
        if "transparent" in facts.kinds:
            self._transparent.add(self._counts["image"])
        if "page" in facts.kinds:
            self._first.setdefault("page", f"{name} has {facts.num_pages:,}")
            self._num_pages += facts.num_pages
        if "size" in facts.kinds:
            self._first.setdefault("size", f"{name} has {facts.size[0]}x{facts.size[1]}")
        if facts.bits == 16:
            self._highest = max(self._highest, facts.highest)
        self._bits = max(self._bits, facts.bits)
        self._counts.update(facts.kinds)

    def add_refused(self, name: str, reason: str) -> None:
        """Count a file that is left out for a reason that the user should know."""
        self._refused.setdefault(reason, []).append(name)

    def check_scale(self, root: Path) -> None:
        """Raises ValueError where the levels of all 16-bit files have no known scale."""
        if 0 < self._highest < _LEAST_HIGHEST:
            raise ValueError(
                f"{root}: expected 16-bit levels on a scale where white is 65,535, got no level above "
                f"{self._highest:,}, as of {self._highest.bit_length()} bits; multiply the levels so that white is "
                "65,535, or save the images with 8 bits"
            )

    def check_not_blank(self, root: Path, split: str, rows: Sequence[int], images: Iterable[np.ndarray]) -> None:
        """Raises ValueError where images of a split, some partly transparent, have one level: they show nothing.

        ``rows`` are places of the images in the order in which they were added, and ``images`` their pixels.
        """
        count, level = len(self._transparent.intersection(rows)), None
        if not count:
            return
        for pixels in images:
            level = pixels.flat[0] if level is None else level
            if (pixels != level).any():
                return
        raise ValueError(
            f"{root}: expected images that show something, got only level {level} in {split}, since the transparent "
            f"pixels ({count:,} of {pluralize(len(rows), 'image')}) are laid over white; save the images over another "
            "color"
        )

    def list_reasons(self) -> tuple[str, ...]:
        """List why files were left out, one sentence for each reason."""
        return tuple(f"{abbreviate(names)} not read: {reason}" for reason, names in self._refused.items())

    def list_notes(self, color: str | None) -> tuple[str, ...]:
        """List the reasons, then a sentence for each kind of loss or change; ``color`` is as the user asked for it."""
        sentences = {
            "page": f"several pages or frames in {{}} ({self._num_pages:,} in all; {self._first.get('page')}): "
            "only the first is kept",
            "deep": f"up to {self._bits} bits per channel ({2**self._bits:,} levels) in {{}}: 8 bits (256 levels) are "
            "kept",
            "channels": "further channels in {}: they are left out",
            "transparent": "transparency in {}: it is laid over white",
            "blank": "{} show nothing without their transparency",
        }
        if color is None and self._counts["color"] and 2 * self._counts["gray"] >= self._counts["image"]:
            read = "which are read as red, green and blue: --color gray reads one channel"
            sentences["gray"] = f"only gray pixels in {{}}, {read}"
        return (*self.list_reasons(), *self._fill(sentences))

    def describe_changes(self, size: tuple[int, int], fit: str) -> tuple[str, ...]:
        """Describe the images that were resized to (H, W), or made gray, for a model, one sentence each."""
        wanted = "x".join(map(str, size))
        how = f"scaled to cover {wanted} and cut to the middle" if fit == "crop" else f"stretched to {wanted}"
        other = f"{{}} have a height or width other than {wanted} ({self._first.get('size')}), and were {how}"
        return self._fill({"size": other, "grayed": "{} are in color, and were made gray"})

    def _fill(self, sentences: Mapping[str, str]) -> tuple[str, ...]:
        """Put the number of images into the sentences of the kinds that there are."""
        of_all = f" of {pluralize(self._counts['image'], 'image')}"
        found = [(self._counts[kind], words) for kind, words in sentences.items()]
        return tuple(words.replace("{}", f"{count:,}{of_all}", 1) for count, words in found if count)
