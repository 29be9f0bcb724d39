"""The file of compressed images: its header, its bits, and what they depend on."""

from __future__ import annotations

import hashlib
import io
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ppl_vae.runs.files import write_bytes

_MAGIC = b"vaebits2"
_DIGEST_BYTES = 12  # against accidents
_LIBRARIES = ("torch", "numpy", "constriction")


@dataclass(frozen=True, kw_only=True)
class CodedFile:
    """Everything that decoding needs apart from the run."""

    run: str  # a folder or a shipped name, as it was given
    versions: str  # of ``find_versions``, for a person, where the numbers differ
    weights: bytes  # digest of the weights
    images: bytes  # digest of the pixels, in the order of the images
    numbers: bytes  # digest of what this machine makes of a few fixed images
    event_shape: tuple[int, ...]
    largest: int  # value of a pixel
    num_particles: int
    seed: int  # of the initial bits
    initial_words: int
    sizes: tuple[int, ...]  # of groups of images, in the order of decoding
    words: NDArray[np.uint32]

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest unsigned type for the pixels."""
        found: np.dtype[np.unsignedinteger] = np.min_scalar_type(self.largest)
        return found

    def write(self, path: Path) -> int:
        """Write the file as a whole or not at all; returns its bytes.

        After the magic word and a digest of everything that follows, there are the three digests, the two strings and
        the integers, each of the strings and of the two tuples with its length before it, and the words.
        """
        content = self.weights + self.images + self.numbers
        for text in (self.run.encode(), self.versions.encode()):
            content += pack_integers(len(text)) + text
        runs = [number for size, found in groupby(self.sizes) for number in (size, len(list(found)))]
        content += pack_integers(self.largest, self.num_particles, self.seed, self.initial_words)
        content += pack_integers(len(self.event_shape), *self.event_shape, len(runs), *runs)
        content += self.words.astype("<u4").tobytes()
        content = _MAGIC + start_digest(content).digest() + content
        write_bytes(path, content)
        return len(content)


def read_coded_file(path: Path) -> CodedFile:
    """Read a file of ``CodedFile.write``. Raises ValueError if it is not one, damaged or cut off."""
    file = io.BytesIO(path.read_bytes())
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError(f"{path}: expected a file of compressed images of this version, got another")
    digest, content = file.read(_DIGEST_BYTES), file.getbuffer()[len(_MAGIC) + _DIGEST_BYTES :]
    if start_digest(content).digest() != digest:
        raise ValueError(f"{path}: damaged or cut off: its digest is not that of its content")
    weights, images, numbers = (file.read(_DIGEST_BYTES) for _ in range(3))
    run, versions = (file.read(_unpack_integer(file)).decode() for _ in range(2))
    largest, num_particles, seed, initial_words = (_unpack_integer(file) for _ in range(4))
    event_shape, runs = ([_unpack_integer(file) for _ in range(_unpack_integer(file))] for _ in range(2))
    return CodedFile(
        run=run,
        versions=versions,
        weights=weights,
        images=images,
        numbers=numbers,
        event_shape=tuple(event_shape),
        largest=largest,
        num_particles=num_particles,
        seed=seed,
        initial_words=initial_words,
        sizes=tuple(size for size, count in zip(runs[::2], runs[1::2], strict=True) for _ in range(count)),
        words=np.frombuffer(file.read(), dtype="<u4").astype(np.uint32),
    )


def pack_integers(*values: int) -> bytes:
    """Integers from 0, seven bits in a byte, the lowest first; the eighth says that more follow.

    >>> pack_integers(1, 300).hex()
    '01ac02'
    """
    found = bytearray()
    for value in values:
        while value > 127:
            found.append(value & 127 | 128)
            value >>= 7
        found.append(value)
    return bytes(found)


def _unpack_integer(file: io.BytesIO) -> int:
    value = place = 0
    while (byte := file.read(1)[0]) > 127:
        value, place = value | (byte & 127) << place, place + 7
    return value | byte << place


def find_versions() -> str:
    """What numbers depend on: the versions of libraries, and the processor."""
    return " ".join([*map(_find_version, _LIBRARIES), platform.machine()])


def describe_versions(versions: str) -> str:
    """``find_versions`` in words.

    >>> describe_versions("2.8.0 2.3.1 0.4.1 x86_64")
    'torch 2.8.0, numpy 2.3.1, constriction 0.4.1, x86_64'
    """
    *found, machine = versions.split(" ")
    return ", ".join([*(f"{name} {version}" for name, version in zip(_LIBRARIES, found, strict=False)), machine])


def _find_version(name: str) -> str:
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return "unknown"


def start_digest(content: bytes | memoryview = b"") -> hashlib.blake2b:
    """A digest of this content, to which more can be added."""
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES)


def compute_digest(arrays: Iterable[Tensor | NDArray[np.generic]]) -> bytes:
    """The digest of the values of arrays, one after the other."""
    digest = start_digest()
    for values in arrays:
        digest.update(np.asarray(values).tobytes())
    return digest.digest()
