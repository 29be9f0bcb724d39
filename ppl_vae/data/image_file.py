"""Decode image files to 8-bit levels, and count for the user what the levels leave out.

An image is not read if its file is larger than ``MOST_BYTES``, or if it has more than ``MOST_PIXELS``, or more than
``FREE_PIXELS`` and also more than ``MOST_EXPANSION`` for every byte of its file. The header is checked before memory is
allocated for the pixels.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile

from ppl_vae.data.splits import abbreviate, pluralize

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


class DecodedImage(NamedTuple):
    """Upright, opaque image with 8 bits per channel, and what else its file contains.

    Args:
        image: in mode L or RGB.
        bits: per channel of the file.
        highest: the largest stored level of any channel where there are more than 8 bits, on a scale up to 65,535.
        num_pages: pages or frames of the file; the image is the first.
        num_left_out: channels that are neither gray, nor red, green or blue, nor opacity.
        is_transparent: whether any pixel is not opaque; the image is laid over white.
    """

    image: Image.Image
    bits: int
    highest: int
    num_pages: int
    num_left_out: int = 0
    is_transparent: bool = False


def list_formats() -> list[str]:
    """List the formats that are read, by Pillow's names."""
    Image.init()  # once; without it Pillow knows only the most common formats
    return [name for name in Image.OPEN if name not in _NOT_PIXELS]


_TOO_MANY_PIXELS = f"an image may have at most {MOST_PIXELS:,} pixels; scale it down"


def _check_size(num_pixels: int, num_bytes: int) -> None:
    """Raises UnreadableImageError where a header announces too many pixels for its file.

    The message names the limit and not the numbers of the image, so that files that exceed it can be listed together.
    """
    if num_pixels > MOST_PIXELS:
        raise UnreadableImageError(_TOO_MANY_PIXELS)
    if num_pixels > max(FREE_PIXELS, MOST_EXPANSION * num_bytes):
        raise UnreadableImageError(
            f"an image of more than {FREE_PIXELS:,} pixels may have at most {MOST_EXPANSION} per byte of its file; "
            "scale it down, or save it without compression"
        )


def decode(raw: bytes) -> DecodedImage:
    """Decode the first page of an image file.

    Raises:
        UnreadableImageError: the image is too large, or its levels have no known scale.
        Exception: of nearly every type, where the file is damaged.
    """
    try:
        opened = Image.open(BytesIO(raw), formats=list_formats())
    except Image.DecompressionBombError:
        raise UnreadableImageError(_TOO_MANY_PIXELS) from None
    with opened:
        _check_size(opened.width * opened.height, len(raw))
        bits = _read_bits_per_channel(opened, raw)
        opened.load()
        image: Image.Image = ImageOps.exif_transpose(opened)
        num_pages = _count_pages(opened)
        if image.mode.startswith(("I", "F")):
            return _reduce_long_levels(image, opened, bits)._replace(num_pages=num_pages)
        num_left_out = max(0, _read_tiff_tag(opened, _TIFF_CHANNELS, 1) - len(opened.getbands()))
    gray, is_transparent = image.mode in _GRAY_MODES, False
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        is_transparent = bool(np.asarray(image.getchannel("A")).min() < 255)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if gray else "RGB")
    highest = 257 * int(np.asarray(image).max()) if bits > 8 else 0
    return DecodedImage(image, bits, highest, num_pages, num_left_out, is_transparent)


def _reduce_long_levels(image: Image.Image, opened: ImageFile, bits: int) -> DecodedImage:
    """Convert long gray levels to round(255 level / white); a level that the file calls transparent becomes white."""
    scaled_by_pillow = opened.format in ("PNG", "PPM")  # older versions of Pillow read 16 bits of a PNG in mode I
    if image.mode == "F":
        raise UnreadableImageError("floating-point levels have no known scale; save them with 8 or 16 bits")
    if opened.format not in _FORMATS_WITH_16_BITS or not (image.mode.startswith("I;16") or scaled_by_pillow):
        raise UnreadableImageError("signed and 32-bit levels have no known scale; save them with 8 or 16 bits")
    white = 2**bits - 1 if opened.format == "TIFF" else 65_535  # Pillow brings the other formats to 16 bits
    levels = np.asarray(image)
    table = ((np.arange(white + 1) * 510 + white) // (2 * white)).astype(np.uint8)
    if _read_tiff_tag(opened, _TIFF_PHOTOMETRIC, 1) == 0:  # white is zero, which Pillow inverts for 8 bits alone
        table = table[::-1]
    pixels = table[levels]
    transparent = levels == image.info.get("transparency")
    pixels[transparent] = 255
    highest = int(levels.max()) * 65_535 // white
    return DecodedImage(Image.fromarray(pixels), bits, highest, num_pages=1, is_transparent=bool(transparent.any()))


def _read_bits_per_channel(opened: ImageFile, raw: bytes) -> int:
    """Read the bits per channel from the file's header; Pillow reports them for some formats only."""
    if opened.format == "PNG":
        return raw[24]  # the depth in IHDR
    if opened.format == "TIFF":
        return max(opened.tag_v2.get(_TIFF_BITS, (1,)))  # type: ignore[attr-defined]
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


def _read_tiff_tag(opened: ImageFile, tag: int, default: int) -> int:
    return int(opened.tag_v2.get(tag, default)) if opened.format == "TIFF" else default  # type: ignore[attr-defined]


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


class ImageFacts(NamedTuple):
    """Facts of an image that are counted.

    The first five are of its ``DecodedImage``, the others of the pixels that are kept.

    Args:
        is_in_color: whether the pixels have three channels.
        is_gray: whether the channels agree.
        low, high: the lowest and the highest level.
        other_size: (H, W) before the image was resized; None: it was not.
        was_in_color: whether colors became gray.
    """

    bits: int
    highest: int
    num_pages: int
    num_left_out: int
    is_transparent: bool
    is_in_color: bool
    is_gray: bool
    low: int
    high: int
    other_size: tuple[int, int] | None
    was_in_color: bool


def find_facts(decoded: DecodedImage, pixels: np.ndarray) -> ImageFacts:
    """Collect the facts of an image whose ``pixels`` (H, W) or (H, W, 3) are kept."""
    width, height = decoded.image.size
    return ImageFacts(
        *decoded[1:],
        is_in_color=pixels.ndim == 3,
        is_gray=pixels.ndim == 2 or _is_gray(pixels),
        low=int(pixels.min()),
        high=int(pixels.max()),
        other_size=None if (height, width) == pixels.shape[:2] else (height, width),
        was_in_color=pixels.ndim == 2 and decoded.image.mode == "RGB" and not _is_gray(np.asarray(decoded.image)),
    )


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
        self.num_images = 0
        self._refused: dict[str, list[str]] = {}  # files that are left out, by the reason
        self._pages: dict[str, int] = {}  # number of pages of the files with more than one
        self._deep: list[int] = []  # bits per channel of the files with more than 8
        self._highest_of_16_bits: list[int] = []  # highest level of each file with 16 bits
        self._other_sizes: dict[str, tuple[int, int]] = {}  # (H, W) of the files that were resized
        self._num_with_channels_left_out = self._num_gray = self._num_in_color = self._num_grayed = 0
        self._transparent, self._low, self._high = bytearray(), bytearray(), bytearray()  # one per image

    def add(self, name: str, facts: ImageFacts) -> None:
        """Count an image."""
        self.num_images += 1
        if facts.num_pages > 1:
            self._pages[name] = facts.num_pages
        if facts.bits > 8:
            self._deep.append(facts.bits)
        if facts.bits == 16:
            self._highest_of_16_bits.append(facts.highest)
        self._num_with_channels_left_out += facts.num_left_out > 0
        self._num_in_color += facts.is_in_color
        self._num_gray += facts.is_gray
        self._num_grayed += facts.was_in_color
        if facts.other_size is not None:
            self._other_sizes[name] = facts.other_size
        self._transparent.append(facts.is_transparent)
        self._low.append(facts.low)
        self._high.append(facts.high)

    def add_refused(self, name: str, reason: str) -> None:
        """Count a file that is left out for a reason that the user should know."""
        self._refused.setdefault(reason, []).append(name)

    def check_scale(self, root: Path) -> None:
        """Raises ValueError where the levels of all 16-bit files have no known scale."""
        highest, count = max(self._highest_of_16_bits, default=0), len(self._highest_of_16_bits)
        if 0 < highest < _LEAST_HIGHEST:
            raise ValueError(
                f"{root}: expected 16-bit levels on a scale where white is 65,535, got no level above {highest:,} in "
                f"{pluralize(count, 'image')}, as of {highest.bit_length()} bits; multiply the levels "
                "so that white is 65,535, or save the images with 8 bits"
            )

    def check_not_blank(self, root: Path, split: str, rows: np.ndarray) -> None:
        """Refuse partly transparent images of a single level: laid over white, they show nothing.

        Args:
            split: what the error calls the images.
            rows: (n,) places of the images, in the order in which they were added.

        Raises:
            ValueError: they have one level.
        """
        transparent = np.frombuffer(self._transparent, np.uint8)[rows]
        low = np.frombuffer(self._low, np.uint8)[rows].min()
        high = np.frombuffer(self._high, np.uint8)[rows].max()
        if transparent.any() and low == high:
            raise ValueError(
                f"{root}: expected images that show something, got only level {low} in {split}, since the "
                f"transparent pixels ({transparent.sum():,} of {pluralize(len(rows), 'image')}) are laid over white; "
                "save the images over another color"
            )

    def list_reasons(self) -> tuple[str, ...]:
        """List why files were left out, one sentence for each reason."""
        return tuple(f"{abbreviate(names)} not read: {reason}" for reason, names in self._refused.items())

    def list_notes(self, color: str | None) -> tuple[str, ...]:
        """List the reasons, then a sentence for each kind of loss or change, with its number of files.

        Args:
            color: as the user asked for it, or None.
        """
        found = [*self.list_reasons()]
        if self._pages:
            first, pages = next(iter(self._pages.items()))
            num_pages = sum(self._pages.values())
            found.append(
                f"several pages or frames in {self._count_of_all(len(self._pages))} ({num_pages:,} in all; "
                f"{first} has {pages:,}): only the first is kept"
            )
        if self._deep:
            bits = max(self._deep)
            found.append(
                f"up to {bits} bits per channel ({2**bits:,} levels) in {self._count_of_all(len(self._deep))}: "
                "8 bits (256 levels) are kept"
            )
        if count := self._num_with_channels_left_out:
            found.append(f"further channels in {self._count_of_all(count)}: they are left out")
        if count := sum(self._transparent):
            extremes = zip(self._transparent, self._low, self._high, strict=True)
            num_blank = sum(is_transparent and low == high for is_transparent, low, high in extremes)
            found.append(
                f"transparency in {self._count_of_all(count)}: it is laid over white"
                + f"; {num_blank:,} of them show nothing then" * (num_blank > 0)
            )
        if color is None and self._num_in_color and 2 * self._num_gray >= self.num_images:
            found.append(
                f"only gray pixels in {self._count_of_all(self._num_gray)}, which are read as red, green and blue: "
                "--color gray reads one channel"
            )
        return tuple(found)

    def describe_changes(self, size: tuple[int, int], fit: str) -> tuple[str, ...]:
        """Describe the images that were resized or made gray for a model, one sentence each.

        Args:
            size: (H, W) that they were brought to.
            fit: "crop" or "stretch".
        """
        found, wanted = [], "x".join(map(str, size))
        if self._other_sizes:
            first, (height, width) = next(iter(self._other_sizes.items()))
            how = f"scaled to cover {wanted} and cut to the middle" if fit == "crop" else f"stretched to {wanted}"
            found.append(
                f"{self._count_of_all(len(self._other_sizes))} have a height or width other than {wanted} "
                f"({first} has {height}x{width}), and were {how}"
            )
        if self._num_grayed:
            found.append(f"{self._count_of_all(self._num_grayed)} are in color, and were made gray")
        return tuple(found)

    def _count_of_all(self, count: int) -> str:
        return f"{count:,} of {pluralize(self.num_images, 'image')}"
