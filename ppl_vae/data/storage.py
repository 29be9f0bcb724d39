"""Where images lie: in memory, in mapped files, and in the cache of images that were read once.

The cache has one folder per data set. In it, ``images.npy`` holds the images (N, *E), train before validation before
test. ``splits.json`` holds all other fields of ``Splits`` and the SHA-256 of the images, below a line with the SHA-256
of this text. The folder is written under another name and renamed when it is whole, so that nobody
sees half of it. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from ppl_vae.data.splits import SPLIT_ORDER, Splits
from ppl_vae.runtime.process import progress_bar

LARGE = 2**28  # a file of so many bytes is mapped, and not read into memory
_SHARE = 8  # an array may take one eighth of the available memory


def say(line: str) -> None:
    """Print one line on standard error, above a progress bar where there is one."""
    tqdm.write(line, file=sys.stderr)


# --- Available memory ---


def fits_in_memory(num_bytes: int) -> bool:
    """Whether an array of this size may be in memory rather than in a mapped file."""
    available = get_available_memory()
    return num_bytes <= LARGE or (available is not None and num_bytes <= available / _SHARE)


def get_available_memory() -> int | None:
    """Return the bytes that this process can allocate without swapping; None where the system does not say.

    They are the least of what the machine, the control groups and the process's own limit leave.
    """
    try:
        free = [1024 * _read_field("/proc/meminfo", "MemAvailable:"), *_read_control_groups()]
        limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
        if limit != resource.RLIM_INFINITY:
            free.append(limit - 1024 * _read_field("/proc/self/status", "VmData:"))
    except (OSError, ValueError):
        return None
    return max(min(free), 0)


_PROCESS_GROUPS, _ALL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def _read_control_groups() -> Iterator[int]:
    """Yield the bytes left in each control group (version 2) with a limit that contains this process.

    Reference: Linux, Documentation/admin-guide/cgroup-v2.rst.
    """
    own = _PROCESS_GROUPS.read_text(errors="surrogateescape") if _PROCESS_GROUPS.exists() else ""
    place = re.search("^0::/(.*)$", own, re.MULTILINE)
    group = _ALL_GROUPS / (place[1] if place else "")  # does not exist where only a part of the tree is mounted
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # the limit reads "max" where there is none
            limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
            yield limit - used + _read_field(folder / "memory.stat", "file")


def _read_field(path: str | Path, name: str) -> int:
    for line in Path(path).read_text(encoding="ascii").splitlines():
        if line.split()[0] == name:
            return int(line.split()[1])
    raise ValueError(f"{path}: no {name}")


# --- Tensors in files ---

_MAPPED: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()  # by address


def get_cache_folder() -> Path:
    """Return PPL_VAE_CACHE_DIR, else ppl_vae in XDG_CACHE_HOME, else ~/.cache/ppl_vae."""
    if folder := os.environ.get("PPL_VAE_CACHE_DIR"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "ppl_vae"


def _make_cache_folder() -> Path:
    """Make the cache folder, which others cannot open: the images may be private."""
    folder = get_cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor of any shape lies in a mapped file, which the system can drop from memory and read again."""
    return tensor.untyped_storage().data_ptr() in _MAPPED


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate a tensor of a shape in memory, or in a nameless file of the cache folder if it is too large.

    ``fits_in_memory`` decides. Where the disk is full, the tensor is in memory, and one line says so.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if fits_in_memory(num_bytes):
        return torch.empty(shape, dtype=dtype)
    try:
        with tempfile.TemporaryFile(dir=_make_cache_folder()) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # a write to a mapping would end the process on a full disk
            return _map_tensor(np.memmap(file, str(dtype).removeprefix("torch."), "r+", shape=shape))
    except OSError as error:
        reason = error.strerror or error
        say(f"{get_cache_folder()}: no space for {num_bytes:,} bytes, which go into memory: {reason}")
        return torch.empty(shape, dtype=dtype)


def _map_tensor(mapped: np.ndarray) -> Tensor:
    """View an array of any shape in a mapped file as a tensor for which ``is_mapped`` is true."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to stored images
        tensor = torch.from_numpy(mapped)
    _MAPPED[tensor.untyped_storage().data_ptr()] = mapped
    return tensor


# --- Threads ---

_MOST_THREADS = 16
_ITEMS_PER_THREAD = 4  # of the items that are worked on at once

Item = TypeVar("Item")
Result = TypeVar("Result")


def count_threads() -> int:
    """Count the cores that this process may use, at most 16."""
    return min(len(os.sched_getaffinity(0)), _MOST_THREADS)


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield function(item) for each item, in order, for work that releases the interpreter's lock.

    Only a few results wait for their turn at any time.
    """
    size = _ITEMS_PER_THREAD * count_threads()
    with ThreadPoolExecutor(count_threads(), "ppl_vae-data") as pool:
        waiting: Iterator[Result] = iter(())
        for start in range(0, len(items), size):
            following = pool.map(function, items[start : start + size])
            yield from waiting
            waiting = following
        yield from waiting


# --- The cache ---

# Raise this number when files are read differently than before: it makes the entries of older versions stale.
_READER_VERSION = 8

_IMAGES, _REST = "images.npy", "splits.json"


class CacheKey(NamedTuple):
    """Key of a cache entry: ``prefix`` is for a path and how it is read; an entry with another ``state`` is stale."""

    prefix: str
    state: str

    @property
    def path(self) -> Path:
        """Folder of the entry; it has another name once the source has changed."""
        return get_cache_folder() / f"{self.prefix}-{self.state}"


class Draft(NamedTuple):
    """Splits whose images are still to be read.

    Args:
        splits: their images are tensors on the device "meta", with a shape and no values.
        blocks: images (n, *E), which go through train, validation and test.
        is_final: whether another attempt would read the same; False where a file could not be read for the moment.
    """

    splits: Splits
    blocks: Iterator[np.ndarray]
    is_final: bool = True


def outline(
    rows: Mapping[str, Tensor], event_shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The images of the three splits of a draft, as many as there are rows, without their values."""
    train, validation, test = (
        torch.empty((len(rows[split]), *event_shape), dtype=dtype, device="meta") for split in SPLIT_ORDER
    )
    return train, validation, test


def make_key(path: Path, options: Mapping[str, object], state: Sequence[object]) -> CacheKey:
    """Make the key of the source at a path, read with ``options``, whose files are in a state."""
    prefix, now = ([os.path.abspath(path), dict(options)], [_READER_VERSION, state])
    return CacheKey(*(hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16] for content in (prefix, now)))


def load_cached(key: CacheKey, name: str, make: Callable[[bool], Draft]) -> Splits:
    """Load splits from their entry in the cache, which is made first where it is missing, stale or damaged.

    One of several processes makes the entry, and the others wait. Where no entry can be written, one line says so, and
    the splits are read into memory. Splits that are not final are not kept.

    Args:
        name: of the splits.
        make: reads the source; its argument says whether it may write to the cache folder.
    """
    if (found := _load(key, name)) is not None:
        return found
    try:
        with FileLock(_make_cache_folder() / f"{key.prefix}.lock"):
            if (found := _load(key, name)) is not None:
                return found
            draft = make(True)
            if not draft.is_final:
                return read_into_memory(draft)
            _write(key, draft)
            return _read(key.path, check=False)
    except OSError as error:
        reason = error.strerror or error
        say(f"{name}: not kept in the cache folder {get_cache_folder()}, but read into memory: {reason}")
    return read_into_memory(make(False))


def read_into_memory(draft: Draft) -> Splits:
    """Read the images of a draft into memory, or into a nameless file where they are too large."""
    sizes = _count_images(draft.splits)
    rows = allocate((sum(sizes), *draft.splits.event_shape), draft.splits.train.dtype)
    start = 0
    for block in draft.blocks:
        rows[start : start + len(block)] = torch.from_numpy(block)
        start += len(block)
    train, validation, test = rows.split(sizes)
    return replace(draft.splits, train=train, validation=validation, test=test)


def _count_images(splits: Splits) -> list[int]:
    return [len(getattr(splits, split)) for split in SPLIT_ORDER]


def compute_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(key: CacheKey, draft: Draft) -> None:
    """Write the entry, and delete entries of older states and what a killed process left."""
    for pattern in (f".{key.prefix}-*", f"{key.prefix}-*"):
        for old in key.path.parent.glob(pattern):
            shutil.rmtree(old, ignore_errors=True)
    splits = draft.splits
    with tempfile.TemporaryDirectory(prefix=f".{key.prefix}-", dir=key.path.parent) as folder:
        with Path(folder, _IMAGES).open("wb") as file:
            dtype = np.dtype(str(splits.train.dtype).removeprefix("torch."))
            shape = (sum(_count_images(splits)), *splits.event_shape)
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            with progress_bar(total=shape[0], unit="image", desc=f"keeping {splits.name}", delay=1, leave=False) as bar:
                for block in draft.blocks:
                    file.write(np.ascontiguousarray(block).data.cast("B"))
                    bar.update(len(block))
        rest = {field.name: getattr(splits, field.name) for field in fields(splits) if field.name not in SPLIT_ORDER}
        rest["labels"] = {split: labels.tolist() for split, labels in splits.labels.items()}
        sha256 = compute_sha256(Path(folder, _IMAGES))
        text = json.dumps({"splits": rest, "sizes": _count_images(splits), "images": sha256})
        Path(folder, _REST).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}", encoding="ascii")
        os.rename(folder, key.path)


def _load(key: CacheKey, name: str) -> Splits | None:
    """Load the entry; None where there is none to use. A damaged one is deleted, and a line says so."""
    try:
        return _read(key.path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (OSError, ValueError) as error:
        say(f"{key.path}: damaged ({error}); {name} is read again")
        shutil.rmtree(key.path, ignore_errors=True)
        return None


def _read(entry: Path, *, check: bool = True) -> Splits:
    """Read an entry. Raises ValueError where it is damaged; one of a moment ago needs no check."""
    digest, _, text = (entry / _REST).read_text(encoding="ascii").partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError(f"the checksum of {_REST} is another")
    header = json.loads(text)
    if check and compute_sha256(entry / _IMAGES) != header["images"]:
        raise ValueError(f"the checksum of {_IMAGES} is another")
    rows = _map_tensor(np.load(entry / _IMAGES, mmap_mode="r"))
    rest = header["splits"]
    rest |= {name: tuple(rest[name]) for name in ("class_names", "unreadable", "notes")}
    rest["names"] = {split: tuple(names) for split, names in rest["names"].items()}
    rest["labels"] = {split: torch.tensor(labels, dtype=torch.int64) for split, labels in rest["labels"].items()}
    train, validation, test = rows.split(header["sizes"])
    return Splits(train=train, validation=validation, test=test, **rest)
