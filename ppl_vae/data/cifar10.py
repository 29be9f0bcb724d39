"""CIFAR-10 from the published binary version. The version for Python is a pickle, and is not read."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from os.path import isdir, isfile  # False, where pathlib would raise, in a folder that is closed
from pathlib import Path
from typing import NamedTuple

import numpy as np

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE, FOLDER = "cifar-10-binary.tar.gz", "cifar-10-batches-bin"
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
_BATCHES_MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
_BATCHES = tuple(_BATCHES_MD5)  # the last one is the test set

_NUM_IMAGES = 10_000  # of a batch
_NUM_PIXELS = 3 * 32 * 32


class Part(NamedTuple):
    """Images (N, 3, 32, 32) uint8 and their labels (N,) int64."""

    data: np.ndarray
    targets: np.ndarray


def is_present(folder: Path) -> bool:
    """Whether the folder holds the published archive, or the folder that it unpacks to."""
    return isfile(folder / ARCHIVE) or isdir(folder / FOLDER)


def read(folder: Path) -> tuple[Part, Part]:
    """Read the 50,000 training images and the 10,000 test images.

    Raises:
        ValueError: a file is missing, or is not the published one.
        OSError: a file cannot be read.
    """
    batches = {name: _decode(name, content) for name, content in _read_batches(folder)}
    if missing := [name for name in _BATCHES if name not in batches]:
        raise ValueError(f"expected {', '.join(_BATCHES)}, got no {', '.join(missing)}")
    *train, test = (batches[name] for name in _BATCHES)
    return Part(*(np.concatenate(arrays) for arrays in zip(*train, strict=True))), test


def _read_batches(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the batches, of at most one byte more than a batch has; nothing is unpacked on disk."""
    most = _NUM_IMAGES * (1 + _NUM_PIXELS) + 1
    if isdir(folder / FOLDER):
        for name in _BATCHES:
            if isfile(path := folder / FOLDER / name):
                with path.open("rb") as file:
                    yield name, file.read(most)
        return
    with (folder / ARCHIVE).open("rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != ARCHIVE_MD5:
            raise ValueError(f"{ARCHIVE}: its checksum is not the published one")
    try:
        with tarfile.open(folder / ARCHIVE, "r:gz") as tar:
            for member in tar:
                name = member.name.removeprefix(f"{FOLDER}/")
                if name in _BATCHES and member.isfile() and (content := tar.extractfile(member)) is not None:
                    yield name, content.read(most)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{ARCHIVE}: damaged: {error}") from None


def _decode(name: str, content: bytes) -> Part:
    """The images of a batch: for each a byte with its label, then its pixels."""
    size = _NUM_IMAGES * (1 + _NUM_PIXELS)
    if len(content) != size:
        raise ValueError(f"{name}: expected {size:,} bytes, got {'more' if len(content) > size else len(content)}")
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != _BATCHES_MD5[name]:
        raise ValueError(f"{name}: its checksum is not the published one")
    rows = np.frombuffer(content, np.uint8).reshape(_NUM_IMAGES, 1 + _NUM_PIXELS)
    if rows[:, 0].max() > 9:
        raise ValueError(f"{name}: expected labels from 0 to 9, got {rows[:, 0].max()}")
    return Part(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64))
