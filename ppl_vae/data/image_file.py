"""Decode one image file to 8-bit levels, and record what they leave out."""

from __future__ import annotations

from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ppl_vae.data import limits

_GRAY_MODES = ("1", "L", "LA", "La")
_NOT_PIXELS = (
    *("EPS", "WMF", "PDF", "MPEG", "HDF5", "GRIB", "BUFR"),  # no images, or read by starting another program
    *("IPTC", "ICO", "ICNS", "BLP"),  # around another image, which is read whatever its format or its size
)
_FORMATS_OF_16_BITS = ("PNG", "TIFF", "PPM", "JPEG2000", "IM")  # whose gray levels run from 0 to a known white
# Where the number of bits stands after a marker; in JPEG 2000 it is less by one, and its highest bit says "signed".
_BITS_AFTER_MARKER = {"JPEG2000": (b"\xff\x4f\xff\x51", 42), "AVIF": (b"pixi", 9)}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_CHANNELS = 258, 262, 277  # tags of TIFF 6.0


class NotReadError(ValueError):
    """An image is left out, and the message gives the user the reason."""


class Decoded(NamedTuple):
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


def formats() -> list[str]:
    """List the formats that are read, by Pillow's names."""
    Image.init()  # once; without it Pillow knows only the most common formats
    return [name for name in Image.OPEN if name not in _NOT_PIXELS]


def decode(raw: bytes) -> Decoded:
    """Decode the first page of an image file.

    Raises:
        NotReadError: the image is too large, or its levels have no known scale.
        Exception: of nearly every type, where the file is damaged.
    """
    try:
        opened = Image.open(BytesIO(raw), formats=formats())
    except Image.DecompressionBombError:
        raise NotReadError(f"an image may have at most {limits.MOST_PIXELS:,} pixels; scale it down") from None
    with opened:
        try:
            limits.check_pixels(opened.width, opened.height, len(raw))
        except ValueError as error:
            raise NotReadError(str(error)) from None
        bits = _bits_per_channel(opened, raw)
        opened.load()
        image: Image.Image = ImageOps.exif_transpose(opened)
        num_pages = _count_pages(opened)
        if image.mode.startswith(("I", "F")):
            return _from_long_levels(image, opened, bits)._replace(num_pages=num_pages)
        num_left_out = max(0, _tiff_tag(opened, _TIFF_CHANNELS, 1) - len(opened.getbands()))
    gray, is_transparent = image.mode in _GRAY_MODES, False
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        is_transparent = bool(np.asarray(image.getchannel("A")).min() < 255)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if gray else "RGB")
    highest = 257 * int(np.asarray(image).max()) if bits > 8 else 0
    return Decoded(image, bits, highest, num_pages, num_left_out, is_transparent)


def _from_long_levels(image: Image.Image, opened: Any, bits: int) -> Decoded:
    """Convert long gray levels to round(255 level / white); a level that the file calls transparent becomes white."""
    scaled_by_pillow = opened.format in ("PNG", "PPM")  # older versions of Pillow read 16 bits of a PNG in mode I
    if image.mode == "F":
        raise NotReadError("floating-point levels have no known scale; save them with 8 or 16 bits")
    if opened.format not in _FORMATS_OF_16_BITS or not (image.mode.startswith("I;16") or scaled_by_pillow):
        raise NotReadError("signed and 32-bit levels have no known scale; save them with 8 or 16 bits")
    white = 2**bits - 1 if opened.format == "TIFF" else 65_535  # Pillow brings the other formats to 16 bits
    levels = np.asarray(image)
    table = ((np.arange(white + 1) * 510 + white) // (2 * white)).astype(np.uint8)
    if _tiff_tag(opened, _TIFF_PHOTOMETRIC, 1) == 0:  # white is zero, which Pillow inverts for 8 bits alone
        table = table[::-1]
    pixels = table[levels]
    transparent = levels == image.info.get("transparency")
    pixels[transparent] = 255
    highest = int(levels.max()) * 65_535 // white
    return Decoded(Image.fromarray(pixels), bits, highest, num_pages=1, is_transparent=bool(transparent.any()))


def _bits_per_channel(opened: Any, raw: bytes) -> int:
    """Read the bits per channel from the file's header; Pillow reports them for some formats only."""
    if opened.format == "PNG":
        return raw[24]  # the depth in IHDR
    if opened.format == "TIFF":
        return max(opened.tag_v2.get(_TIFF_BITS, (1,)))
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


def _tiff_tag(opened: Any, tag: int, default: int) -> int:
    return int(opened.tag_v2.get(tag, default)) if opened.format == "TIFF" else default


def _count_pages(opened: Any) -> int:
    """Count pages or frames; a Photoshop file's are layers, which are all in the image."""
    try:
        return 1 if opened.format == "PSD" else int(getattr(opened, "n_frames", 1))
    except MemoryError:
        raise
    except Exception:  # a page beyond the first is damaged
        return 1
