"""Cache images that were read once: one checked file per data set, in the order of its splits, mapped into memory.

The file is the images (N, *E) from its first byte on, train before validation before test; the labels, int64; a JSON
header with all else that ``Splits`` holds and the SHA-256 of each 64 MiB before it; the header's length and SHA-256;
and a mark. It is written under another name and renamed when it is whole, so that nobody sees half of it. The folder is
PPL_VAE_CACHE_DIR, else ppl_vae in XDG_CACHE_HOME, else ~/.cache/ppl_vae; it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from ppl_vae.data import limits
from ppl_vae.data.splits import KINDS, SPLIT_ORDER, Splits
from ppl_vae.data.threads import map_in_threads
from ppl_vae.runtime.progress import progress_bar

_DTYPES = {"uint8": torch.uint8, "float32": torch.float32}

# Raise this number when files are read differently than before: it makes the entries of older versions stale.
_READER_VERSION = 4

_MARK = b"ppl_vae cache 1\n"
_END = struct.Struct("<Q32s16s")  # length and SHA-256 of the header, mark
_MOST_HEADER = 2**28
_CHUNK, _READ_AT_ONCE = 2**26, 2**20  # bytes


class Source(NamedTuple):
    """Source of a cache entry: ``what`` is a path and how it is read; an entry with another ``state`` is stale."""

    what: str
    state: str

    @property
    def path(self) -> Path:
        """File of the entry; it has another name once the source has changed."""
        return folder() / f"{self.slot}-{_short(self.state)}.rows"

    @property
    def slot(self) -> str:
        """Prefix of the names of all files of this source, in any state."""
        return _short(self.what)


class Draft(NamedTuple):
    """Splits whose images are still to be read, in blocks (n, *E) that go through train, validation and test.

    ``inaccessible``: paths that the operating system refused to read; once it allows one, the entry is stale.
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
    inaccessible: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def folder() -> Path:
    """Folder of the cache."""
    if own := os.environ.get("PPL_VAE_CACHE_DIR"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ppl_vae"


def source(path: Path, how: Mapping[str, Any], state: list[Any]) -> Source:
    """Describe the source at a path, read with the options ``how``, whose files are in a state."""
    what = json.dumps([os.path.abspath(path), dict(how)])
    return Source(what, hashlib.sha256(json.dumps([_READER_VERSION, state]).encode()).hexdigest())


def cached(
    source: Source, name: str, make: Callable[[], Draft], make_in_memory: Callable[[], Draft] | None = None
) -> Splits:
    """Read splits from their entry in the cache, which is made first where it is missing or damaged.

    One of several processes makes the entry, and the others wait. Where no entry can be written, one line says so, and
    the splits are read into memory.

    Args:
        name: of the splits.
        make: reads the source.
        make_in_memory: reads the source without a file in the cache folder; None: ``make`` writes none.
    """
    found = _load(source, name)
    if found is not None:
        return found
    try:
        with _exclusive(source) as has_waited:
            found = _load(source, name) if has_waited else None
            if found is None:
                _write(source, make(), name)
                with source.path.open("rb") as file:
                    found = _read(file, source, name, check=False)  # it was written a moment ago
            return found
    except OSError as error:
        say(f"{name}: not kept in the cache folder {folder()}, but read into memory: {error.strerror or error}")
    return materialize((make_in_memory or make)(), name)


def materialize(draft: Draft, name: str) -> Splits:
    """Read the images of a draft into memory, or into a nameless file where they are too large."""
    rows = allocate((sum(draft.sizes.values()), *draft.event_shape), draft.dtype)
    at = 0
    for block in draft.blocks:
        rows[at : at + len(block)] = torch.from_numpy(block)
        at += len(block)
    return _splits(draft, name, rows)


def _splits(draft: Draft, name: str, rows: Tensor) -> Splits:
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


def say(line: str) -> None:
    """Print one line on standard error, above a progress bar where there is one."""
    tqdm.write(line, file=sys.stderr)


# --- Memory that is a file ---

_MAPPED: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()  # by address


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a mapped file, which the system can drop from memory and read again.

    Args:
        tensor: of any shape.
    """
    return tensor.untyped_storage().data_ptr() in _MAPPED


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate an uninitialized tensor of that shape, in memory or, where it is too large, in a nameless file.

    ``limits.fits`` decides. The file is in the cache folder; where that has no space, the tensor is in memory.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if limits.fits(num_bytes):
        return torch.empty(shape, dtype=dtype)
    try:
        _make_folder()
        with tempfile.TemporaryFile(dir=folder()) as file:
            _reserve(file, num_bytes)
            return _mapped(mmap.mmap(file.fileno(), num_bytes), shape, dtype)
    except OSError as error:
        say(f"{folder()}: no space for {num_bytes:,} bytes, which go into memory: {error.strerror or error}")
        return torch.empty(shape, dtype=dtype)


def _reserve(file: IO[bytes], num_bytes: int) -> None:
    """Reserve the file's bytes, and fail now where the disk is full: a write to a mapping would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    else:
        file.truncate(num_bytes)


def _mapped(mapping: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """View the start of a mapping as a tensor."""
    numbers = np.frombuffer(mapping, str(dtype).removeprefix("torch."), math.prod(shape))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to stored images
        tensor = torch.from_numpy(numbers)
    _MAPPED[tensor.untyped_storage().data_ptr()] = numbers
    return tensor.view(shape)


# --- Entries ---


def compute_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits. Raises OSError where it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _make_folder() -> None:
    folder().mkdir(parents=True, exist_ok=True, mode=0o700)  # what is private there is private here


@contextmanager
def _exclusive(source: Source) -> Iterator[bool]:
    """Keep other processes from making this source's entry; yields whether one had to be waited for."""
    _make_folder()
    lock, has_waited = FileLock(folder() / f"{source.slot}.lock", fallback_to_soft=False), False
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


def _write(source: Source, draft: Draft, name: str) -> None:
    """Write the entry, and delete entries of older states and what a killed process has left."""
    for left in folder().glob(f".{source.slot}-*.partial"):
        left.unlink(missing_ok=True)
    descriptor, partial_name = tempfile.mkstemp(".partial", f".{source.slot}-", folder())
    try:
        with open(descriptor, "wb") as file:
            _write_content(file, source, draft, name)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_name, source.path)
    except BaseException:
        Path(partial_name).unlink(missing_ok=True)
        raise
    for entry in folder().glob(f"{source.slot}-*.rows"):
        if entry != source.path:
            with suppress(OSError):
                entry.unlink()


def _write_content(file: IO[bytes], source: Source, draft: Draft, name: str) -> None:
    total = sum(draft.sizes.values())
    written = _Digested(file)
    with progress_bar(total=total, unit="image", desc=f"keeping {name}", delay=1, leave=False) as bar:
        for block in draft.blocks:
            written.write(np.ascontiguousarray(block).data.cast("B"))
            bar.update(len(block))
    written.write(bytes(-written.num_bytes % 8))
    labeled = [split for split in SPLIT_ORDER if split in draft.labels]
    for split in labeled:
        written.write(draft.labels[split].numpy().astype("<i8").tobytes())
    header = {
        **source._asdict(),
        "kind": draft.kind,
        "dtype": str(draft.dtype).removeprefix("torch."),
        "event_shape": list(draft.event_shape),
        "sizes": {split: draft.sizes[split] for split in SPLIT_ORDER},
        "labeled": labeled,
        "class_names": draft.class_names,
        "unreadable": draft.unreadable,
        "inaccessible": draft.inaccessible,
        "notes": draft.notes,
        "sha256": draft.sha256,
        "split": draft.split,
        "chunks": written.digests(),
    }
    encoded = json.dumps(header).encode()
    file.write(encoded + _END.pack(len(encoded), hashlib.sha256(encoded).digest(), _MARK))


class _Digested:
    """File that is written to, with the SHA-256 of each of its chunks."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.num_bytes = file, 0
        self._done: list[str] = []
        self._open = hashlib.sha256()

    def write(self, content: memoryview | bytes) -> None:
        self.file.write(content)
        while len(content):
            part = content[: _CHUNK - self.num_bytes % _CHUNK]
            self._open.update(part)
            self.num_bytes += len(part)
            content = content[len(part) :]
            if self.num_bytes % _CHUNK == 0:
                self._done.append(self._open.hexdigest())
                self._open = hashlib.sha256()

    def digests(self) -> list[str]:
        return self._done + [self._open.hexdigest()] * bool(self.num_bytes % _CHUNK)


class _Outdated(Exception):
    """A file that was inaccessible when the entry was made can be read now."""


def _load(source: Source, name: str) -> Splits | None:
    """Load the entry; None where there is none. A damaged one is deleted, and a line says so."""
    try:
        with source.path.open("rb") as file:
            return _read(file, source, name, check=True)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except _Outdated as error:
        say(f"{name}: {error} can be read now; {name} is read again")
        return None
    except (OSError, ValueError) as error:
        say(f"{source.path}: damaged ({error}); {name} is read again")
        with suppress(OSError):
            source.path.unlink()
        return None


def _read(file: IO[bytes], source: Source, name: str, *, check: bool) -> Splits:
    """Read an entry. Raises ValueError where it is damaged, _Outdated where an inaccessible file can be read now."""
    header, end_of_content = _header(file)
    try:
        if (header["what"], header["state"]) != (source.what, source.state):
            raise ValueError("it is of other files")
        sizes = {split: _whole(header["sizes"][split]) for split in SPLIT_ORDER}
        event_shape = tuple(_whole(n) for n in header["event_shape"])
        dtype = _DTYPES[header["dtype"]]
        labeled = [split for split in SPLIT_ORDER if split in header["labeled"]]
        words = {key: str(header[key]) for key in ("kind", "sha256", "split")}
        class_names, unreadable, inaccessible, notes = (
            tuple(map(str, header[key])) for key in ("class_names", "unreadable", "inaccessible", "notes")
        )
        chunks = list(header["chunks"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"its header lacks or garbles {error}") from None
    total = sum(sizes.values())
    num_bytes = total * math.prod(event_shape) * dtype.itemsize
    begin = num_bytes + -num_bytes % 8
    if begin + 8 * sum(sizes[split] for split in labeled) != end_of_content or not num_bytes:
        raise ValueError(f"its header announces {total:,} images of {event_shape}, it holds {end_of_content:,} bytes")
    if words["kind"] not in KINDS or len(chunks) != -(-end_of_content // _CHUNK):
        raise ValueError("its header is of something else")
    if check:
        for path in inaccessible:
            if _is_readable(Path(path)):
                raise _Outdated(path)
        digests = map_in_threads(partial(_digest, file.fileno(), end_of_content), range(len(chunks)))
        for i, (digest, expected) in enumerate(zip(digests, chunks, strict=True)):
            if digest != expected:
                raise ValueError(f"the checksum of part {i + 1} of {len(chunks)} is another")
    labels = {}
    for split in labeled:
        stored = os.pread(file.fileno(), 8 * sizes[split], begin)
        labels[split] = torch.from_numpy(np.frombuffer(stored, "<i8").astype(np.int64))
        begin += len(stored)
    mapping = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
    draft = Draft(
        dtype=dtype,
        event_shape=event_shape,
        sizes=sizes,
        blocks=iter(()),
        labels=labels,
        class_names=class_names,
        unreadable=unreadable,
        inaccessible=inaccessible,
        notes=notes,
        **words,
    )
    return _splits(draft, name, _mapped(mapping, (total, *event_shape), dtype))


def _is_readable(path: Path) -> bool:
    """Whether a file can be read to its end."""
    try:
        return os.path.isfile(path) and bool(compute_sha256(path))
    except (OSError, ValueError):
        return False


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"its header has {value!r} for a count")
    return value


def _header(file: IO[bytes]) -> tuple[dict[str, Any], int]:
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


def _digest(descriptor: int, end: int, chunk: int) -> str:
    """Compute the SHA-256 of a chunk. It is read and not mapped: a disk error in a mapping would end the process."""
    digest, at, stop = hashlib.sha256(), chunk * _CHUNK, min((chunk + 1) * _CHUNK, end)
    while at < stop and (block := os.pread(descriptor, min(_READ_AT_ONCE, stop - at), at)):
        digest.update(block)
        at += len(block)
    return digest.hexdigest()
