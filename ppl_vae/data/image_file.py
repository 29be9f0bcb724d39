"""Decode image files to 8-bit levels."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

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
DEEP = "16 bits (65,536 levels) in {}: 8 bits (256 levels) are kept"
TRANSPARENT = "transparency in {}: it is laid over white"

_GRAY_MODES = ("1", "L", "LA", "La")
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262  # tags of TIFF 6.0


class UnreadableImageError(ValueError):
    """An image is left out, and the message gives the user the reason, without the name of the file."""


def decode(raw: bytes) -> tuple[Image.Image, list[str], int]:
    """Decode the first page of an image file, turned as its EXIF orientation says, and laid over white.

    The header is checked before memory is allocated for the pixels.

    Returns:
        The image, opaque and in mode L or RGB; what it does not show of its file, of the sentences above; and the
        largest level of a file of 16-bit gray, else 0.

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
        image: Image.Image = ImageOps.exif_transpose(opened)
        notes = [PAGES] if getattr(opened, "n_frames", 1) > 1 else []
        highest = 0
        if image.mode.startswith(("I", "F")):
            _check_scale(image, opened)
            notes.append(DEEP)
            levels = np.asarray(image)
            highest = int(levels.max())
            image = Image.fromarray(((levels.astype(np.int32) + 128) // 257).astype(np.uint8))  # round(level / 257)
        is_gray = image.mode in _GRAY_MODES
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if np.asarray(image.getchannel("A")).min() < 255:
                notes.append(TRANSPARENT)
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if is_gray else "RGB"), notes, highest


def _check_scale(image: Image.Image, opened: ImageFile) -> None:
    """Raise UnreadableImageError for long gray levels other than 0 for black to 65,535 for white."""
    is_known = image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM"))
    if isinstance(opened, TiffImageFile):
        is_known &= opened.tag_v2.get(_TIFF_BITS) == (16,) and opened.tag_v2.get(_TIFF_PHOTOMETRIC) == 1
    if not is_known:
        raise UnreadableImageError("only levels of 8 bits, or of 16 bits from black to white, are read; save 8 bits")
