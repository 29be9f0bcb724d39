"""Notes for the user on how the files of a folder of images were read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ppl_vae.data.image_file import Decoded
from ppl_vae.data.splits import abbreviate, pluralize

_GRAY_DIFFERENCE = 2  # levels between the channels of a gray image that a lossy WebP file stores in color
_PIXELS_AT_ONCE = 2**16  # so that most images in color are known by their first rows
_LEAST_HIGHEST = 2**14  # 16-bit levels that all are below it are of 14 bits or fewer


class Facts(NamedTuple):
    """What is counted of an image: the first five are of ``Decoded``, the next four of the pixels that are kept.

    The last two are of what was changed to get these: (H, W) before, if it is another, and whether colors became gray.
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
    is_made_gray: bool


def find_facts(decoded: Decoded, pixels: np.ndarray) -> Facts:
    """Collect the facts of an image whose ``pixels`` (H, W) or (H, W, 3) are kept."""
    is_gray = pixels.ndim == 2 or _is_gray(pixels)
    width, height = decoded.image.size
    return Facts(
        *decoded[1:],
        is_in_color=pixels.ndim == 3,
        is_gray=is_gray,
        low=int(pixels.min()),
        high=int(pixels.max()),
        other_size=None if (height, width) == pixels.shape[:2] else (height, width),
        is_made_gray=pixels.ndim == 2 and decoded.image.mode == "RGB" and not _is_gray(np.asarray(decoded.image)),
    )


class ImageNotes:
    """Counts of what the files of a folder contain beyond the pixels that are kept."""

    def __init__(self) -> None:
        self.num_images = 0
        self._refused: dict[str, list[str]] = {}  # files by the reason why they are left out
        self._pages: dict[str, int] = {}  # of the files with more than one
        self._deep: list[int] = []  # bits per channel of the files with more than 8
        self._of_16_bits: list[int] = []  # the highest levels of these files
        self._other_sizes: dict[str, tuple[int, int]] = {}  # (H, W) of the files that were resized
        self._num_with_channels_left_out = self._num_gray = self._num_in_color = self._num_made_gray = 0
        self._transparent, self._low, self._high = bytearray(), bytearray(), bytearray()  # of each image

    def add(self, name: str, facts: Facts) -> None:
        """Count an image."""
        self.num_images += 1
        if facts.num_pages > 1:
            self._pages[name] = facts.num_pages
        if facts.bits > 8:
            self._deep.append(facts.bits)
        if facts.bits == 16:
            self._of_16_bits.append(facts.highest)
        self._num_with_channels_left_out += facts.num_left_out > 0
        self._num_in_color += facts.is_in_color
        self._num_gray += facts.is_gray
        self._num_made_gray += facts.is_made_gray
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
        highest = max(self._of_16_bits, default=0)
        if 0 < highest < _LEAST_HIGHEST:
            raise ValueError(
                f"{root}: expected 16-bit levels on a scale where white is 65,535, got no level above {highest:,} in "
                f"{pluralize(len(self._of_16_bits), 'image')}, as of {highest.bit_length()} bits; multiply the levels "
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
                f"{root}: expected images that show something, got level {low} alone in {split}, since what is "
                f"transparent ({transparent.sum():,} of {pluralize(len(rows), 'image')}) is laid over white; "
                "save the images over another color"
            )

    def reasons(self) -> tuple[str, ...]:
        """List why files were left out, one sentence for each reason."""
        return tuple(f"{abbreviate(names)} not read: {reason}" for reason, names in self._refused.items())

    def notes(self, color: str | None) -> tuple[str, ...]:
        """List the reasons, then a sentence for each kind of loss or change, with its number of files.

        Args:
            color: as the user asked for it, or None.
        """
        found = [*self.reasons()]
        if self._pages:
            first, pages = next(iter(self._pages.items()))
            found.append(
                f"several pages or frames in {self._of_all(len(self._pages))} ({sum(self._pages.values()):,} in all; "
                f"{first} has {pages:,}): only the first is kept"
            )
        if self._deep:
            bits = max(self._deep)
            found.append(
                f"up to {bits} bits per channel ({2**bits:,} levels) in {self._of_all(len(self._deep))}: "
                "8 bits (256 levels) are kept"
            )
        if count := self._num_with_channels_left_out:
            found.append(f"further channels in {self._of_all(count)}: they are left out")
        if count := sum(self._transparent):
            extremes = zip(self._transparent, self._low, self._high, strict=True)
            num_blank = sum(is_transparent and low == high for is_transparent, low, high in extremes)
            found.append(
                f"transparency in {self._of_all(count)}: it is laid over white"
                + f"; {num_blank:,} of them show nothing then" * (num_blank > 0)
            )
        if color is None and self._num_in_color and 2 * self._num_gray >= self.num_images:
            found.append(
                f"gray pixels alone in {self._of_all(self._num_gray)}, which are read as red, green and blue: "
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
                f"{self._of_all(len(self._other_sizes))} have another height or width than {wanted} "
                f"({first} has {height}x{width}), and are {how}"
            )
        if self._num_made_gray:
            found.append(f"{self._of_all(self._num_made_gray)} are in color, and are made gray")
        return tuple(found)

    def _of_all(self, count: int) -> str:
        return f"{count:,} of {pluralize(self.num_images, 'image')}"


def _is_gray(pixels: np.ndarray) -> bool:
    """Whether the channels of (H, W, 3) levels agree."""
    num_rows = max(1, _PIXELS_AT_ONCE // pixels.shape[1])
    for start in range(0, len(pixels), num_rows):
        red, green, blue = np.moveaxis(pixels[start : start + num_rows], 2, 0)
        most, least = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
        if (most - least).max() > _GRAY_DIFFERENCE:
            return False
    return True
