"""Read folders of image files: bring them to one size and color, split them, and label them by subfolder."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from ppl_vae.data import storage
from ppl_vae.data.folder_layout import check_layout, find_images, find_layout, index_splits, label_by_folder
from ppl_vae.data.image_file import (
    MOST_BYTES,
    ImageFacts,
    ImageNotes,
    UnreadableImageError,
    add_facts,
    decode,
    list_formats,
)
from ppl_vae.data.splits import LEVELS, SPLIT_ORDER, Splits, abbreviate, complete_splits
from ppl_vae.data.storage import get_cache_folder, map_in_threads
from ppl_vae.runtime.errors import Widths, check_widths
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

    All formats that Pillow decodes are read, except those that contain another image, such as icons. Hidden files, and
    files with the extension of no image, are skipped. Links to folders are followed, except those that lead back to a
    folder that contains them. ``folder_layout`` says how folders name splits and classes. Images outside the folders of
    splits train where there is no folder train; missing splits are a tenth each, by a fixed permutation of the sorted
    names. Two or more classes label the images if every image lies in one; labels count the sorted names of them all.
    Images are turned as their EXIF orientation says; transparent ones are laid over white; 16-bit gray becomes
    round(level / 257); of several pages or frames the first is taken. The notes of the splits count these files.

    The images are kept in the cache folder, and read again when the name, the size or a time of change of any file is
    another, or when the system could not read a file for the moment.

    ``image_size`` is (H, W), or one number for both; ``fit`` and ``color`` are as in ``ImageOptions``. Raises
    ValueError for a folder that cannot be opened or is named like a split without being one, for no images that can be
    read, several sizes, levels without a known scale, or a split that is blank once transparent images lie over white.
    """
    found = find_images(path)
    if not found.images:
        raise ValueError(f"{path}: expected images that Pillow reads (such as PNG), got {found.describe_others()}")
    check_layout(path, found.images, find_layout(found.images))
    options = ImageOptions(check_image_size(image_size), fit, color)
    state = [(name, *_describe_state(path / name)) for name in found.images]
    key = storage.make_key(path, {"image_size": options.size, "fit": fit, "color": color}, state)
    splits = storage.load_cached(key, path.resolve().name, partial(_draft, path, found.images, options))
    if not found.others:
        return splits
    return replace(splits, split=f"{splits.split}; {found.describe_others()} ignored")


def _describe_state(path: Path) -> tuple[int, int, int]:
    """Describe the state of a file: its size, and its times of change of content and of metadata."""
    try:
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns
    except OSError:  # a link to nothing
        return -1, -1, -1


def _draft(path: Path, names: Sequence[str], options: ImageOptions, in_file: bool) -> storage.Draft:
    """Read images into a nameless file or into memory; how many can be read is known only afterwards."""
    reader = ImageReader(path, names, options)
    offsets: list[int] = []
    with tempfile.TemporaryFile(dir=get_cache_folder()) if in_file else BytesIO() as file:
        for pixels in reader:
            offsets.append(file.tell())
            file.write(np.ascontiguousarray(pixels).data.cast("B"))
        offsets.append(file.tell())
        file.flush()
        stored = np.frombuffer(file.getvalue() if isinstance(file, BytesIO) else np.memmap(file, mode="r"), np.uint8)
    height, width = next(iter(reader.sizes))
    event_shape = (3 if max(np.diff(offsets)) > height * width else 1, height, width)
    layout = find_layout(names)
    index = index_splits(path, names, reader.names, layout)
    numbers, class_names = label_by_folder(reader.names, layout)
    labels = {split: numbers[rows] for split, rows in index.items()} if class_names else {}
    try:
        rows_of_splits, labels, words = complete_splits(str(path), index, labels)
    except ValueError as error:  # a file of many pages counts as one image, which only the notes say
        raise ValueError("; ".join([str(error), *reader.notes.list_notes("gray")])) from None
    for split in SPLIT_ORDER:
        rows = rows_of_splits[split].tolist()
        reader.notes.check_not_blank(path, split, rows, (stored[offsets[row] : offsets[row + 1]] for row in rows))
    order = torch.cat([rows_of_splits[split] for split in SPLIT_ORDER])

    def iterate_blocks() -> Iterator[np.ndarray]:
        for rows in order.split(max(1, _BLOCK // int(np.prod(event_shape)))):
            block = np.empty((len(rows), *event_shape), np.uint8)
            for i, row in enumerate(rows.tolist()):
                block[i] = stored[offsets[row] : offsets[row + 1]].reshape(height, width, -1).transpose(2, 0, 1)
            yield block

    splits = Splits(
        path.resolve().name,
        LEVELS,
        *storage.outline(rows_of_splits, event_shape, torch.uint8),
        sha256=reader.sha256,
        split=layout.words if words == "as given" else words,
        labels=labels,
        names={split: tuple(reader.names[row] for row in rows.tolist()) for split, rows in rows_of_splits.items()},
        class_names=class_names,
        unreadable=tuple(reader.unreadable),
        notes=reader.notes.list_notes(options.color),
    )
    return storage.Draft(splits, iterate_blocks(), reader.is_final)


def check_image_size(image_size: Widths | None) -> tuple[int, int] | None:
    """Convert one number or two to (H, W); anything else raises ValueError."""
    if image_size is None:
        return None
    size = check_widths("image_size", image_size)
    if len(size) not in (1, 2):
        raise ValueError(f"image_size: expected height and width, or one number for both, got {image_size!r}")
    return size[0], size[-1]


# --- Reading files ---


class ImageReader:
    """Iterator over files, in their order, that yields the pixels (H, W) or (H, W, 3) of those that can be read.

    Attributes (whole at the end):
        names: of the files that were read.
        unreadable: names of the other files.
        is_final: False where the system could not read a file for the moment.
        sizes: (H, W) of the images.
        notes: counts of what the files contain beyond the pixels.

    Raises:
        ValueError: at the end, where none can be read, they have several sizes, or their levels have no known scale.
    """

    def __init__(self, root: Path, files: Sequence[str], options: ImageOptions) -> None:
        self.root, self.files, self.options = root, files, options
        self.names: list[str] = []
        self.unreadable: list[str] = []
        self.is_final = True
        self.sizes: set[tuple[int, int]] = set()
        self.notes = ImageNotes()
        self._checksum = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """SHA-256 of the names and bytes of the files that were read."""
        return self._checksum.hexdigest()

    def __iter__(self) -> Iterator[np.ndarray]:
        bar = progress_bar(iterable=self.files, unit="image", desc=f"reading {self.root.name}", delay=1, leave=False)
        list_formats()  # once, before several threads ask for them
        read = partial(_read_image, self.root, self.options)
        with warnings.catch_warnings(), bar:
            warnings.filterwarnings("ignore", module="PIL")  # of files that it repairs; sizes are checked here
            for name, found in zip(bar, map_in_threads(read, self.files), strict=True):
                if not isinstance(found, tuple):
                    self.unreadable.append(name)
                    self.is_final = self.is_final and not isinstance(found, OSError)
                    if isinstance(found, UnreadableImageError):
                        self.notes.add_refused(name, str(found))
                    continue
                raw, pixels, facts = found
                self.names.append(name)
                self.notes.add(name, facts)
                self.sizes.add((pixels.shape[0], pixels.shape[1]))
                self._checksum.update(f"{name}\0{len(raw)}\0".encode("utf-8", "surrogateescape"))
                self._checksum.update(raw)
                if len(self.sizes) == 1:  # later ones of another size are only counted
                    yield pixels
        if not self.names:
            unread = f"{len(self.files):,} that cannot be read: {abbreviate(self.unreadable)}"
            raise ValueError("; ".join([f"{self.root}: expected images, got {unread}", *self.notes.list_reasons()]))
        if len(self.sizes) > 1:
            some = abbreviate(f"{height}x{width}" for height, width in sorted(self.sizes))
            raise ValueError(
                f"{self.root}: expected images of one size, got {len(self.sizes):,} sizes ({some}); "
                "--image-size H W brings them to one"
            )
        self.notes.check_scale(self.root)


def _read_image(
    root: Path, options: ImageOptions, name: str
) -> tuple[bytes, np.ndarray, ImageFacts] | OSError | UnreadableImageError | None:
    """Read a file to its bytes, pixels (H, W) or (H, W, 3) and facts; None where it is no readable image.

    Returns an OSError where the system cannot read the file for the moment (a missing or forbidden file shows in the
    state of the folder once it can be read), and an UnreadableImageError where the user should know the reason. Raises
    ValueError where the memory ran out; the file is not the cause, since its size was checked.
    """
    try:
        path = root / name
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever
            return None
        if status.st_size > MOST_BYTES:
            return UnreadableImageError(f"an image's file may have at most {MOST_BYTES:,} bytes")
        raw = path.read_bytes()
    except (FileNotFoundError, PermissionError):
        return None
    except OSError as error:
        return error
    try:
        original, facts = decode(raw)
        image = original
        if options.size is not None:
            height, width = options.size
            fit = Image.Image.resize if options.fit == "stretch" else ImageOps.fit
            image = fit(image, (width, height), Image.Resampling.BILINEAR)
        if options.color is not None:
            image = image.convert({"gray": "L", "rgb": "RGB"}[options.color])
        pixels = np.asarray(image)
        return raw, pixels, add_facts(facts, original, pixels)
    except MemoryError as error:
        raise ValueError(f"{root / name}: the memory ran out while it was decoded") from error
    except UnreadableImageError as error:
        return error
    except Exception:  # a broken file makes Pillow raise nearly every type
        return None
