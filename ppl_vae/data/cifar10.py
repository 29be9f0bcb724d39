"""CIFAR-10 from its published files. The version for Python is a pickle: it is searched for two values, never run."""

from __future__ import annotations

import gzip
import hashlib
import pickletools
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from os.path import isdir, isfile  # False, where pathlib would raise, in a folder that is closed
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

# The version without pickles, which is the one to download.
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
BINARY_ARCHIVE, BINARY_FOLDER = "cifar-10-binary.tar.gz", "cifar-10-batches-bin"
PYTHON_ARCHIVE, PYTHON_FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
FILES = (BINARY_ARCHIVE, BINARY_FOLDER, PYTHON_ARCHIVE, PYTHON_FOLDER)

# MD5 of the published archive with the binary version, and of each batch of both.
BINARY_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
_BINARY_BATCHES_MD5 = {
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
_PYTHON_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
_BATCHES = tuple(_PYTHON_MD5)  # the last one is the test set

_NUM_IMAGES = 10_000  # of a batch
_NUM_PIXELS = 3 * 32 * 32
_MOST_OVERHEAD = 2**22  # bytes of a pickled batch beside its pixels


class Part(NamedTuple):
    """data: (N, 3, 32, 32) uint8; targets: (N,) int64."""

    data: np.ndarray
    targets: np.ndarray


def is_there(folder: Path) -> bool:
    """Whether the folder holds the published files of one of the two versions, as an archive or unpacked."""
    return any(isfile(folder / name) or isdir(folder / name) for name in FILES)


def read(folder: Path) -> tuple[Part, Part]:
    """The 50,000 images to train on, and the 10,000 to test on.

    Raises:
        ValueError: a file is missing, or is not the published one.
        OSError: a file cannot be read.
    """
    batches = dict(_binary(folder) if _has_binary(folder) else _python(folder))
    if lacking := [name for name in _BATCHES if name not in batches]:
        raise ValueError(f"expected {', '.join(_BATCHES)}, got no {', '.join(lacking)}")
    train = [batches[name] for name in _BATCHES[:-1]]
    together = Part(np.concatenate([part.data for part in train]), np.concatenate([part.targets for part in train]))
    return together, batches[_BATCHES[-1]]


def _has_binary(folder: Path) -> bool:
    return isfile(folder / BINARY_ARCHIVE) or isdir(folder / BINARY_FOLDER)


# --- The binary version: for each image a byte with its label, then its pixels ---


def _binary(folder: Path) -> Iterator[tuple[str, Part]]:
    size = _NUM_IMAGES * (1 + _NUM_PIXELS)
    contents: Iterable[tuple[str, bytes]]
    if isdir(folder / BINARY_FOLDER):
        paths = ((name, folder / BINARY_FOLDER / f"{name}.bin") for name in _BATCHES)
        contents = ((name, _read(path, size)) for name, path in paths if isfile(path))
    else:
        _check_md5(folder / BINARY_ARCHIVE, BINARY_MD5)
        members = {f"{BINARY_FOLDER}/{name}.bin": name for name in _BATCHES}
        contents = _members(folder / BINARY_ARCHIVE, members, most=size)
    for name, content in contents:
        if len(content) != size:
            raise ValueError(f"{name}: expected {size:,} bytes, got {len(content):,}")
        _check_batch(name, content, _BINARY_BATCHES_MD5)
        rows = np.frombuffer(content, np.uint8).reshape(_NUM_IMAGES, 1 + _NUM_PIXELS)
        yield name, _part(name, rows[:, 1:], rows[:, 0])


# --- The version for Python ---


def _python(folder: Path) -> Iterator[tuple[str, Part]]:
    most = _NUM_IMAGES * _NUM_PIXELS + _MOST_OVERHEAD
    contents: Iterable[tuple[str, bytes]]
    if isdir(folder / PYTHON_FOLDER):
        paths = ((name, folder / PYTHON_FOLDER / name) for name in _BATCHES)
        contents = ((name, _read(path, most)) for name, path in paths if isfile(path))
    else:
        contents = _members(folder / PYTHON_ARCHIVE, {f"{PYTHON_FOLDER}/{name}": name for name in _BATCHES}, most=most)
    for name, content in contents:
        _check_batch(name, content, _PYTHON_MD5)
        pixels, labels = _values(name, content)
        yield name, _part(name, np.frombuffer(pixels, np.uint8).reshape(-1, _NUM_PIXELS), np.array(labels))


_STRINGS = ("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINUNICODE")
_OF_A_LIST = ("EMPTY_LIST", "MARK", "BINPUT", "LONG_BINPUT", "APPENDS")


def _values(name: str, content: bytes) -> tuple[bytes, list[int]]:
    """The pixels and labels that a pickle spells out: its one string of their length, and the list after "labels".

    The opcodes are read one by one, and none is carried out: no name is looked up, nothing is called.
    """
    pixels: list[bytes] = []
    labels: list[int] = []
    in_labels = False
    value: Any
    try:
        for opcode, value, _ in pickletools.genops(content):
            if opcode.name in _STRINGS:
                text = value.encode("latin-1") if isinstance(value, str) else value
                in_labels = text == b"labels"
                if len(text) == _NUM_IMAGES * _NUM_PIXELS:
                    pixels.append(text)
            elif in_labels and opcode.name == "BININT1":
                labels.append(value)
            elif opcode.name not in _OF_A_LIST:
                in_labels = False
    except ValueError as error:  # of opcodes that are none, and of texts that are no text
        raise ValueError(f"{name}: damaged: {error}") from None
    if len(pixels) != 1:
        raise ValueError(f"{name}: expected one string of {_NUM_IMAGES * _NUM_PIXELS:,} pixels, got {len(pixels)}")
    return pixels[0], labels


# --- Both ---


def _part(name: str, pixels: np.ndarray, labels: np.ndarray) -> Part:
    if labels.shape != (len(pixels),) or labels.max() > 9:
        raise ValueError(f"{name}: expected a label from 0 to 9 for each of {len(pixels):,} images")
    return Part(pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64))


def _members(archive: Path, names: dict[str, str], *, most: int) -> Iterator[tuple[str, bytes]]:
    """(role, content) of the files with these names, {name: role}, in an archive; nothing is unpacked on disk.

    Raises:
        ValueError: no such archive, or one of them is larger than ``most`` bytes.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if member.isfile() and member.name in names and (file := tar.extractfile(member)) is not None:
                    yield names[member.name], _limited(file, most, member.name)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{archive.name}: damaged: {error}") from None


def _read(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        return _limited(file, most, path.name)


def _limited(file: IO[bytes], most: int, name: str) -> bytes:
    content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{name}: expected at most {most:,} bytes, got more")
    return content


def _check_batch(name: str, content: bytes, expected: dict[str, str]) -> None:
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != expected[name]:
        raise ValueError(f"{name}: its checksum is not the published one")


def _check_md5(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.md5(usedforsecurity=False)
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise ValueError(f"{path.name}: its checksum is not the published one")
