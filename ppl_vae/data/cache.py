"""Cache images that were read once: one checked file per data set, in the order of its splits, mapped into memory.

The file holds the images (N, *E) from its first byte on, train before validation before test; the labels, int64; a
JSON header with all other fields of ``Splits`` and the SHA-256 of each 64 MiB before it; the header's length and
SHA-256; and a mark. It is written under another name and renamed when it is whole, so that nobody sees half of it.
``machine.get_cache_folder`` says where it is; the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ppl_vae.data.machine import allocate, get_cache_folder, make_cache_folder, map_in_threads, map_tensor, say
from ppl_vae.data.splits import KINDS, SPLIT_ORDER, Splits
from ppl_vae.runtime.progress import progress_bar

# Raise this number when files are read differently than before: it makes the entries of older versions stale.
_READER_VERSION = 5

_DTYPES = {"uint8": torch.uint8, "float32": torch.float32}
_MARK = b"ppl_vae cache 1\n"
_END = struct.Struct("<Q32s16s")  # length and SHA-256 of the header, mark
_MOST_HEADER = 2**28
_CHUNK, _BLOCK = 2**26, 2**20  # bytes


class CacheKey(NamedTuple):
    """Key of a cache entry: ``what`` is a path and how it is read; an entry with another ``state`` is stale."""

    what: str
    state: str

    @property
    def path(self) -> Path:
        """File of the entry; it has another name once the source has changed."""
        return get_cache_folder() / f"{self.prefix}-{_shorten(self.state)}.rows"

    @property
    def prefix(self) -> str:
        """Prefix of the names of all files of this source, in any state."""
        return _shorten(self.what)


class Draft(NamedTuple):
    """Splits whose images are still to be read.

    Args:
        blocks: images (n, *E), which go through train, validation and test.
        is_final: whether another attempt would read the same; False where a file could not be read for the moment.
    """

    kind: str
    dtype: torch.dtype
    event_shape: tuple[int, ...]
    sizes: Mapping[str, int]
    blocks: Iterator[np.ndarray]
    sha256: str
    split: str
    labels: Mapping[str, Tensor]
    class_names: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    is_final: bool = True


def make_key(path: Path, options: Mapping[str, Any], state: list[Any]) -> CacheKey:
    """Make the key of the source at a path, read with ``options``, whose files are in a state."""
    what = json.dumps([os.path.abspath(path), dict(options)])
    return CacheKey(what, hashlib.sha256(json.dumps([_READER_VERSION, state]).encode()).hexdigest())


def load_cached(
    key: CacheKey, name: str, make: Callable[[], Draft], make_in_memory: Callable[[], Draft] | None = None
) -> Splits:
    """Load splits from their entry in the cache, which is made first where it is missing, stale or damaged.

    One of several processes makes the entry, and the others wait. Where no entry can be written, one line says so, and
    the splits are read into memory.

    Args:
        name: of the splits.
        make: reads the source.
        make_in_memory: reads the source without a file in the cache folder; None: ``make`` writes none.
    """
    found = _load(key, name)
    if found is not None:
        return found
    try:
        with _lock(key) as has_waited:
            found = _load(key, name, accept_unfinal=True) if has_waited else None
            if found is None:
                _write(key, make(), name)
                with key.path.open("rb") as file:
                    found, _ = _read(file, key, name, is_new=True)
            return found
    except OSError as error:
        reason = error.strerror or error
        say(f"{name}: not kept in the cache folder {get_cache_folder()}, but read into memory: {reason}")
    return read_into_memory((make_in_memory or make)(), name)


def read_into_memory(draft: Draft, name: str) -> Splits:
    """Read the images of a draft into memory, or into a nameless file where they are too large."""
    rows = allocate((sum(draft.sizes.values()), *draft.event_shape), draft.dtype)
    start = 0
    for block in draft.blocks:
        rows[start : start + len(block)] = torch.from_numpy(block)
        start += len(block)
    return _build_splits(draft, name, rows)


def _build_splits(draft: Draft, name: str, rows: Tensor) -> Splits:
    """Build the splits of a draft from its images (N, *E)."""
    train, validation, test = rows.split([draft.sizes[split] for split in SPLIT_ORDER])
    return Splits(
        name=name,
        kind=draft.kind,
        train=train,
        validation=validation,
        test=test,
        sha256=draft.sha256,
        split=draft.split,
        labels=draft.labels,
        class_names=draft.class_names,
        unreadable=draft.unreadable,
        notes=draft.notes,
    )


def compute_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shorten(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


# --- Writing an entry ---


@contextmanager
def _lock(key: CacheKey) -> Iterator[bool]:
    """Keep other processes from making this source's entry; yields whether one had to be waited for."""
    make_cache_folder()
    lock, has_waited = FileLock(get_cache_folder() / f"{key.prefix}.lock", fallback_to_soft=False), False
    with suppress(OSError):  # a file system without locks: the entry may be made twice, each time whole
        try:
            lock.acquire(timeout=0)
        except Timeout:
            has_waited = True
            lock.acquire()
    try:
        yield has_waited
    finally:
        lock.release()


def _write(key: CacheKey, draft: Draft, name: str) -> None:
    """Write the entry, and delete entries of older states and the partial files of a killed process."""
    folder = get_cache_folder()
    for left in folder.glob(f".{key.prefix}-*.partial"):
        left.unlink(missing_ok=True)
    descriptor, partial_name = tempfile.mkstemp(".partial", f".{key.prefix}-", folder)
    try:
        with open(descriptor, "wb") as file:
            _write_content(file, key, draft, name)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_name, key.path)
    except BaseException:
        Path(partial_name).unlink(missing_ok=True)
        raise
    for entry in folder.glob(f"{key.prefix}-*.rows"):
        if entry != key.path:
            with suppress(OSError):
                entry.unlink()


def _write_content(file: IO[bytes], key: CacheKey, draft: Draft, name: str) -> None:
    written = _DigestingFile(file)
    total = sum(draft.sizes.values())
    with progress_bar(total=total, unit="image", desc=f"keeping {name}", delay=1, leave=False) as bar:
        for block in draft.blocks:
            written.write(np.ascontiguousarray(block).data.cast("B"))
            bar.update(len(block))
    written.write(bytes(-written.num_bytes % 8))
    labeled = [split for split in SPLIT_ORDER if split in draft.labels]
    for split in labeled:
        written.write(draft.labels[split].numpy().astype("<i8").tobytes())
    header = {
        **key._asdict(),
        "kind": draft.kind,
        "dtype": str(draft.dtype).removeprefix("torch."),
        "event_shape": list(draft.event_shape),
        "sizes": {split: draft.sizes[split] for split in SPLIT_ORDER},
        "labeled": labeled,
        "class_names": draft.class_names,
        "unreadable": draft.unreadable,
        "notes": draft.notes,
        "is_final": draft.is_final,
        "sha256": draft.sha256,
        "split": draft.split,
        "chunks": written.finish(),
    }
    encoded = json.dumps(header).encode()
    file.write(encoded + _END.pack(len(encoded), hashlib.sha256(encoded).digest(), _MARK))


class _DigestingFile:
    """File that is written to, with the SHA-256 of each of its chunks."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.num_bytes = file, 0
        self._finished: list[str] = []
        self._digest = hashlib.sha256()

    def write(self, content: memoryview | bytes) -> None:
        self.file.write(content)
        while len(content):
            part = content[: _CHUNK - self.num_bytes % _CHUNK]
            self._digest.update(part)
            self.num_bytes += len(part)
            content = content[len(part) :]
            if self.num_bytes % _CHUNK == 0:
                self._finished.append(self._digest.hexdigest())
                self._digest = hashlib.sha256()

    def finish(self) -> list[str]:
        return self._finished + [self._digest.hexdigest()] * bool(self.num_bytes % _CHUNK)


# --- Reading an entry ---


def _load(key: CacheKey, name: str, *, accept_unfinal: bool = False) -> Splits | None:
    """Load the entry; None where there is none to use. A damaged one is deleted, and a line says so."""
    try:
        with key.path.open("rb") as file:
            splits, is_final = _read(file, key, name)
        return splits if is_final or accept_unfinal else None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (OSError, ValueError) as error:
        say(f"{key.path}: damaged ({error}); {name} is read again")
        with suppress(OSError):
            key.path.unlink()
        return None


def _read(file: IO[bytes], key: CacheKey, name: str, *, is_new: bool = False) -> tuple[Splits, bool]:
    """Read an entry, and whether it is final.

    Args:
        is_new: whether the file was written a moment ago, so that its checksums need no check.

    Raises:
        ValueError: it is damaged.
    """
    header, end = _read_header(file)
    try:
        if (header["what"], header["state"]) != (key.what, key.state):
            raise ValueError("it is of other files")
        labeled = [split for split in SPLIT_ORDER if split in header["labeled"]]
        chunks = list(header["chunks"])
        draft = Draft(
            dtype=_DTYPES[header["dtype"]],
            event_shape=tuple(map(_check_count, header["event_shape"])),
            sizes={split: _check_count(header["sizes"][split]) for split in SPLIT_ORDER},
            blocks=iter(()),
            labels={},
            is_final=header["is_final"] is True,
            kind=str(header["kind"]),
            sha256=str(header["sha256"]),
            split=str(header["split"]),
            class_names=tuple(map(str, header["class_names"])),
            unreadable=tuple(map(str, header["unreadable"])),
            notes=tuple(map(str, header["notes"])),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"its header lacks or garbles {error}") from None
    shape = (sum(draft.sizes.values()), *draft.event_shape)
    num_bytes = math.prod(shape) * draft.dtype.itemsize
    start = num_bytes + -num_bytes % 8
    if start + 8 * sum(draft.sizes[split] for split in labeled) != end or not num_bytes:
        raise ValueError(f"its header announces {shape[0]:,} images of {draft.event_shape}, it holds {end:,} bytes")
    if draft.kind not in KINDS or len(chunks) != -(-end // _CHUNK):
        raise ValueError("its header is of something else")
    if not is_new and list(map_in_threads(partial(_digest_chunk, file.fileno(), end), range(len(chunks)))) != chunks:
        raise ValueError("its checksum is another")
    labels = {}
    for split in labeled:
        stored = os.pread(file.fileno(), 8 * draft.sizes[split], start)
        labels[split] = torch.from_numpy(np.frombuffer(stored, "<i8").astype(np.int64))
        start += len(stored)
    mapping = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
    splits = _build_splits(draft._replace(labels=labels), name, map_tensor(mapping, shape, draft.dtype))
    return splits, draft.is_final


def _check_count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"its header has {value!r} for a count")
    return value


def _read_header(file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """Read the header, and find where the content before it ends."""
    size = file.seek(0, os.SEEK_END)
    if size < _END.size:
        raise ValueError("it is cut off")
    file.seek(size - _END.size)
    length, digest, mark = _END.unpack(file.read(_END.size))
    if mark != _MARK or length > min(size - _END.size, _MOST_HEADER):
        raise ValueError("it is cut off, or no cache file")
    file.seek(size - _END.size - length)
    encoded = file.read(length)
    if hashlib.sha256(encoded).digest() != digest:
        raise ValueError("the checksum of its header is another")
    try:
        header = json.loads(encoded)
    except (ValueError, RecursionError):
        raise ValueError("its header is no JSON") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, size - _END.size - length


def _digest_chunk(descriptor: int, end: int, chunk: int) -> str:
    """Compute the SHA-256 of a chunk. It is read and not mapped: a disk error in a mapping would end the process."""
    digest, start, stop = hashlib.sha256(), chunk * _CHUNK, min((chunk + 1) * _CHUNK, end)
    while start < stop and (block := os.pread(descriptor, min(_BLOCK, stop - start), start)):
        digest.update(block)
        start += len(block)
    return digest.hexdigest()
