"""The file of compressed images: its header, its bits, and what they depend on."""

from __future__ import annotations

import hashlib
import json
import platform
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ppl_vae.runs.files import write_bytes

_MAGIC = b"ppl_vae bits 1\n"
_DIGEST_BYTES = 16
_MOST_HEADER = 2**20


@dataclass(frozen=True, kw_only=True)
class CodedFile:
    """Everything that decoding needs apart from the run."""

    run: str  # a folder or a shipped name, as it was given
    weights: str  # digest of the weights
    images: str  # digest of the pixels, in the order of the images
    numbers: str  # digest of what this machine makes of a few fixed images
    versions: str  # for a person, where the numbers differ
    event_shape: tuple[int, ...]
    largest: int  # value of a pixel
    num_particles: int
    seed: int  # of the initial bits
    initial_words: int
    sizes: tuple[tuple[int, int], ...]  # of groups of images: (size, how many in a row), in the order of decoding
    words: NDArray[np.uint32]

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest unsigned type for the pixels."""
        found: np.dtype[np.unsignedinteger] = np.min_scalar_type(self.largest)
        return found

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """The size of every group."""
        return tuple(size for size, count in self.sizes for _ in range(count))

    def write(self, path: Path) -> int:
        """Write the file as a whole or not at all; returns its bytes."""
        header = {name: value for name, value in vars(self).items() if name != "words"}
        packed = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
        content = len(packed).to_bytes(4, "little") + packed + self.words.astype("<u4").tobytes()
        content = _MAGIC + hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest() + content
        write_bytes(path, content)
        return len(content)


def read_coded_file(path: Path) -> CodedFile:
    """Read a file of ``CodedFile.write``. Raises ValueError where it is none, damaged or cut off."""
    content = path.read_bytes()
    if not content.startswith(_MAGIC):
        raise ValueError(f"{path}: expected a file of compressed images ({_MAGIC.decode().strip()}), got another")
    start = len(_MAGIC) + _DIGEST_BYTES
    digest, content = content[len(_MAGIC) : start], content[start:]
    if hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest() != digest:
        raise ValueError(f"{path}: damaged or cut off: its digest is not that of its content")
    try:
        size = int.from_bytes(content[:4], "little")
        header = json.loads(zlib.decompressobj().decompress(content[4 : 4 + size], _MOST_HEADER))
        header["event_shape"] = tuple(header["event_shape"])
        header["sizes"] = tuple(map(tuple, header["sizes"]))
        return CodedFile(**header, words=np.frombuffer(content[4 + size :], dtype="<u4").astype(np.uint32))
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise ValueError(f"{path}: another version wrote it: {error}") from None


def count_runs(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Each size with how often it comes in a row.

    >>> count_runs([4, 4, 1])
    ((4, 2), (1, 1))
    """
    return tuple((size, len(list(found))) for size, found in groupby(sizes))


def describe_versions() -> str:
    """What numbers depend on: libraries and the processor."""
    return ", ".join(
        [*(f"{name} {_find_version(name)}" for name in ("torch", "numpy", "constriction")), platform.machine()]
    )


def _find_version(name: str) -> str:
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return "unknown"


class Digest:
    """A digest of tensors and arrays, given one after the other."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)

    def update(self, values: Tensor | NDArray[np.generic]) -> Digest:
        """Add the bytes of the values."""
        self._digest.update(np.ascontiguousarray(values).tobytes())
        return self

    @property
    def hex(self) -> str:
        """The digest of what was given so far."""
        return self._digest.hexdigest()
