"""Read folders of image files: bring them to one size and color, split them, and label them by subfolder."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ppl_vae.data import cache, limits
from ppl_vae.data.folder_layout import Layout, check_layout, find_layout
from ppl_vae.data.image_file import NotReadError, decode, formats
from ppl_vae.data.image_notes import Facts, ImageNotes, find_facts
from ppl_vae.data.splits import LEVELS, SPLIT_ORDER, Splits, abbreviate, complete_splits, pluralize
from ppl_vae.data.threads import map_in_threads
from ppl_vae.runtime.errors import Widths, check_widths
from ppl_vae.runtime.progress import progress_bar


class Found(NamedTuple):
    """Files below a folder.

    Args:
        images: the image files, by their names from there on, sorted.
        others: how many other files there are of each kind, by the ends of their names.
    """

    images: tuple[str, ...]
    others: Counter[str]

    def describe_others(self) -> str:
        """Count the other files, in all and of each kind: "3 other files (2 .csv, 1 without an extension)"."""
        if not self.others:
            return "an empty folder"
        kinds = [f"{count:,} {kind or 'without an extension'}" for kind, count in self.others.most_common()]
        return f"{pluralize(self.others.total(), 'other file')} ({abbreviate(kinds)})"


class Pictures(NamedTuple):
    """Images that could be read.

    Args:
        pixels: (N, C, H, W) uint8.
        names: of their files.
        unreadable: names of the other files.
        sha256: of the names and bytes of the files that were read.
        notes: what else was seen of the files.
    """

    pixels: Tensor
    names: tuple[str, ...]
    unreadable: tuple[str, ...]
    sha256: str
    notes: ImageNotes


def load_image_folder(path: Path, *, image_size: Sequence[int] | None, fit: str, color: str | None) -> Splits:
    """Load the images below a folder as 8-bit levels: (N, 1, H, W) gray or (N, 3, H, W) red, green, blue.

    Every format that Pillow decodes, but for icons and other wrappings of an image; hidden files are skipped, and so
    are those whose extension is no image's; links to folders are followed, but for those that lead back to a folder
    that they lie in. ``folder_layout`` says how folders name splits and classes. Images outside the folders of splits
    train where there is no folder train; splits that are lacking are a tenth each, by a fixed permutation of the sorted
    names. Two or more classes label the images if every image lies in one; labels count the sorted names of them all.
    Images are turned as their EXIF orientation says; transparent ones are laid over white; 16-bit gray becomes
    round(level / 257); of several pages or frames the first is taken. The notes of the splits say of how many files
    that is true.

    They are read once: what comes of them is kept in the cache folder, and read again when the name, the size or a
    time of change of any of them is another, or when one that the system did not give can be read.

    Args:
        image_size: (H, W), or one number for both; None: all images have one size already.
        fit: "crop" resizes to cover H x W and cuts the middle; "stretch" ignores the aspect ratio.
        color: "gray", "rgb", or None: gray where every image is.

    Raises:
        ValueError: no folder, one that cannot be opened or is named like a split without being one, no images, none
            that can be read, images of several sizes, levels without a known scale, or a split that is blank once
            transparent images lie over white.
    """
    found = find_images(path)
    if not found.images:
        raise ValueError(f"{path}: expected images that Pillow reads (such as PNG), got {found.describe_others()}")
    check_layout(path, found.images, find_layout(found.images))
    size = checked_size(image_size)
    how = {"image_size": size, "fit": fit, "color": color}
    draft = partial(_draft, path, found.images, size=size, fit=fit, color=color)
    splits = cache.cached(
        cache.source(path, how, _state(path, found.images)),
        path.resolve().name,
        partial(draft, in_file=True),
        partial(draft, in_file=False),
    )
    if not found.others:
        return splits
    return replace(splits, split=f"{splits.split}; {found.describe_others()} ignored")


_AT_ONCE = 2**23  # bytes of a block of images


def _draft(
    path: Path, names: Sequence[str], *, size: tuple[int, int] | None, fit: str, color: str | None, in_file: bool
) -> cache.Draft:
    """Read images into a nameless file or into memory; how many can be read is known only afterwards.

    Raises:
        ValueError: images that cannot be split, or a split that transparency made blank.
    """
    read = _Read(path, names, size=size, fit=fit, color=color)
    offsets: list[int] = []
    with tempfile.TemporaryFile(dir=cache.folder()) if in_file else BytesIO() as file:
        for pixels in read:
            offsets.append(file.tell())
            file.write(np.ascontiguousarray(pixels).data.cast("B"))
        offsets.append(file.tell())
        file.flush()
        stored = np.frombuffer(file.getvalue() if isinstance(file, BytesIO) else np.memmap(file, mode="r"), np.uint8)
    height, width = next(iter(read.sizes))
    event_shape = (3 if max(np.diff(offsets)) > height * width else 1, height, width)
    layout = find_layout(names)
    index = _index_of_splits(path, names, read.names, layout)
    numbers, class_names = label_by_folder(read.names, layout)
    labels = {split: numbers[rows] for split, rows in index.items()} if class_names else {}
    try:
        rows_of, labels, words = complete_splits(str(path), index, labels)
    except ValueError as error:  # a file of many pages counts as one image, which only the notes say
        raise ValueError("; ".join([str(error), *read.notes.notes("gray")])) from None
    for split in SPLIT_ORDER:
        read.notes.check_not_blank(path, split, rows_of[split].numpy())
    order = torch.cat([rows_of[split] for split in SPLIT_ORDER])

    def blocks() -> Iterator[np.ndarray]:
        for rows in order.split(max(1, _AT_ONCE // int(np.prod(event_shape)))):
            block = np.empty((len(rows), *event_shape), np.uint8)
            for i, row in enumerate(rows.tolist()):
                block[i] = stored[offsets[row] : offsets[row + 1]].reshape(height, width, -1).transpose(2, 0, 1)
            yield block

    return cache.Draft(
        kind=LEVELS,
        dtype=torch.uint8,
        event_shape=event_shape,
        sizes={split: len(rows) for split, rows in rows_of.items()},
        blocks=blocks(),
        sha256=read.sha256,
        split=layout.words if words == "as given" else words,
        labels=labels,
        class_names=class_names,
        unreadable=tuple(read.unreadable),
        inaccessible=tuple(os.path.abspath(path / name) for name in read.inaccessible),
        notes=read.notes.notes(color),
    )


def checked_size(image_size: Widths | None) -> tuple[int, int] | None:
    """Convert one number or two to (H, W).

    Raises:
        ValueError: anything else.
    """
    if image_size is None:
        return None
    try:
        size = check_widths("image_size", image_size)
    except ValueError:
        size = ()
    if len(size) not in (1, 2):
        raise ValueError(f"image_size: expected height and width, or one number for both, got {image_size!r}")
    return size[0], size[-1]


def find_images(root: Path) -> Found:
    """Find image files by extension, recursively, sorted by name; links are followed, but not in circles.

    Raises:
        ValueError: a folder that cannot be opened: a whole split or class could be missing.
    """
    extensions = {end for end, name in Image.registered_extensions().items() if name in formats()}
    images: list[str] = []
    others: Counter[str] = Counter()

    def refuse(error: OSError) -> None:
        name = Path(error.filename).relative_to(root).as_posix()
        which = "the folder" if name == "." else name
        raise ValueError(f"{root}: {which} cannot be opened: {error.strerror}") from None

    for folder, below, names in os.walk(root, onerror=refuse, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".") and not _leads_back(Path(folder, name))]
        for name in names:
            if name.startswith("."):
                continue
            kind = Path(name).suffix.lower()
            if kind in extensions:
                images.append((Path(folder) / name).relative_to(root).as_posix())
            else:
                others[kind] += 1
    return Found(tuple(sorted(images)), others)


def _leads_back(folder: Path) -> bool:
    """Whether a link leads back to a folder that contains it, so that following it would never end."""
    return os.path.realpath(folder) in map(os.path.realpath, Path(os.path.abspath(folder)).parents)


def _state(root: Path, names: Sequence[str]) -> list[Any]:
    """Describe the state of files: their names, sizes, and times of change of content and of metadata."""
    state: list[Any] = []
    for name in names:
        try:
            status = os.stat(root / name)
            state.append((name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        except OSError:  # a link to nothing
            state.append((name, -1, -1, -1))
    return state


def read_images(
    root: Path, names: Sequence[str], *, size: tuple[int, int] | None, fit: str, color: str | None
) -> Pictures:
    """Read image files, each brought to (H, W) and all to one color; those that fail are listed.

    Raises:
        ValueError: none can be read, or ``size`` is None and they have several sizes.
    """
    read = _Read(root, names, size=size, fit=fit, color=color)
    arrays = list(read)
    return Pictures(_stacked(arrays), tuple(read.names), tuple(read.unreadable), read.sha256, read.notes)


class _Read:
    """Iterator over files, in their order, that yields the pixels (H, W) or (H, W, 3) of those that can be read.

    At the end it holds the names of the files that were read, of those that are unreadable, and of the inaccessible
    ones among them; the SHA-256 of the names and bytes that were read; and notes on the files.

    Raises:
        ValueError: at the end, where none can be read, ``size`` is None and they have several sizes, or their levels
            have no known scale.
    """

    def __init__(
        self, root: Path, names: Sequence[str], *, size: tuple[int, int] | None, fit: str, color: str | None
    ) -> None:
        self.root, self.asked = root, names
        self.decode = partial(_decoded, root, size=size, fit=fit, color=color)
        self.names: list[str] = []
        self.unreadable: list[str] = []
        self.inaccessible: list[str] = []
        self.sizes: set[tuple[int, int]] = set()
        self.notes = ImageNotes()
        self._checksum = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._checksum.hexdigest()

    def __iter__(self) -> Iterator[np.ndarray]:
        bar = progress_bar(iterable=self.asked, unit="image", desc=f"reading {self.root.name}", delay=1, leave=False)
        formats()  # once, before several threads ask for them
        with _quiet_decoders(), bar:
            for name, found in zip(bar, map_in_threads(self.decode, self.asked), strict=True):
                if not isinstance(found, tuple):
                    self.unreadable.append(name)
                    if isinstance(found, OSError):
                        self.inaccessible.append(name)
                    if isinstance(found, NotReadError):
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
            unread = f"{len(self.asked):,} that cannot be read: {abbreviate(self.unreadable)}"
            raise ValueError("; ".join([f"{self.root}: expected images, got {unread}", *self.notes.reasons()]))
        if len(self.sizes) > 1:
            some = abbreviate(f"{height}x{width}" for height, width in sorted(self.sizes))
            raise ValueError(
                f"{self.root}: expected images of one size, got {len(self.sizes):,} sizes ({some}); "
                "--image-size H W brings them to one"
            )
        self.notes.check_scale(self.root)


@contextmanager
def _quiet_decoders() -> Iterator[None]:
    """Silence Pillow's warnings of what it repairs; the size of an image is checked here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def _decoded(
    root: Path, name: str, *, size: tuple[int, int] | None, fit: str, color: str | None
) -> tuple[bytes, np.ndarray, Facts] | OSError | NotReadError | None:
    """Decode a file to its bytes, pixels (H, W) or (H, W, 3) and facts; None where it is no readable image.

    Returns an OSError where the system refuses to read the file now, which it may allow another time, and a
    NotReadError where the user should know the reason.

    Raises:
        ValueError: the memory ran out; the file is not the cause, since its size was checked.
    """
    try:
        path = root / name
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever
            return None
        if status.st_size > limits.MOST_IMAGE_BYTES:
            return NotReadError(f"an image's file may have at most {limits.MOST_IMAGE_BYTES:,} bytes")
        raw = path.read_bytes()
    except OSError as error:
        return error
    try:
        decoded = decode(raw)
        image = decoded.image if size is None else _resized(decoded.image, size, fit)
        pixels = np.asarray(image if color is None else image.convert({"gray": "L", "rgb": "RGB"}[color]))
        return raw, pixels, find_facts(decoded, pixels)
    except MemoryError as error:
        raise ValueError(f"{root / name}: the memory ran out while it was decoded") from error
    except NotReadError as error:
        return error
    except Exception:  # a broken file makes Pillow raise nearly every type
        return None


def _stacked(arrays: list[np.ndarray]) -> Tensor:
    """Stack (H, W) and (H, W, 3) into (N, C, H, W), C = 1 if all are gray. Empties the list to save memory."""
    height, width = arrays[0].shape[:2]
    channels = 3 if any(array.ndim == 3 for array in arrays) else 1
    stacked = np.empty((len(arrays), channels, height, width), np.uint8)
    for i in reversed(range(len(arrays))):
        array = arrays.pop()
        stacked[i] = array if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(stacked)


def _resized(image: Image.Image, size: tuple[int, int], fit: str) -> Image.Image:
    height, width = size
    if fit == "stretch":
        return image.resize((width, height), Image.Resampling.BILINEAR)
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


# --- What the folders mean ---


def _index_of_splits(root: Path, names: Sequence[str], read: Sequence[str], layout: Layout) -> dict[str, Tensor]:
    """Find {split: rows}; images outside the folders of splits belong to train.

    Raises:
        ValueError: images outside where there is a folder train, or a split without an image that can be read.
    """
    splits = [layout.place(name).split for name in names]
    named = {split for split in splits if split}
    outside = [name for name, split in zip(names, splits, strict=True) if split is None]
    if outside and "train" in named:
        raise ValueError(
            f"{root}: expected every image in train, valid or test, got {len(outside):,} outside: {abbreviate(outside)}"
        )
    of_images = [layout.place(name).split or "train" for name in read]
    index = {split: [i for i, own in enumerate(of_images) if own == split] for split in sorted({"train"} | named)}
    for split, rows in index.items():
        if not rows:
            raise ValueError(f"{root}: expected at least one image that can be read in {split}, got none")
    return {split: torch.tensor(rows) for split, rows in index.items()}


def label_by_folder(names: Sequence[str], layout: Layout) -> tuple[Tensor, tuple[str, ...]]:
    """Label images by folder: (N,) int64 and class names; no names unless all images lie in two or more classes."""
    of_images = [layout.place(name).class_name for name in names]
    classes = sorted({name for name in of_images if name is not None})
    if None in of_images or len(classes) < 2:
        return torch.zeros(len(names), dtype=torch.int64), ()
    numbers = {name: number for number, name in enumerate(classes)}
    return torch.tensor([numbers[name] for name in of_images if name is not None]), tuple(classes)
