"""Where images lie: in memory, in mapped files, and in the cache of images that were read once.

The cache has one folder for each data set and way of reading it. In it, ``images.npy`` holds the images (N, *E), train
before validation before test, and ``splits.json`` holds all other fields of ``Splits``. The folder is written under
another name and renamed when it is whole, so that nobody sees half of it. It may be deleted at any time.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
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


# --- Blocks of images as one tensor ---


def collect(blocks: Iterable[np.ndarray], shape: tuple[int, ...], dtype: torch.dtype, path: Path | None) -> Tensor:
    """Collect blocks of images (n, *E) in a tensor (N, *E): in a file at ``path``, else as ``allocate`` decides."""
    if path is None:
        rows, start = allocate(shape, dtype), 0
        for block in blocks:
            rows[start : start + len(block)] = torch.from_numpy(block)
            start += len(block)
        return rows
    with path.open("wb") as file:
        descr = np.lib.format.dtype_to_descr(np.dtype(str(dtype).removeprefix("torch.")))
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in progress_bar(iterable=blocks, unit="block", desc="keeping images", delay=1, leave=False):
            file.write(np.ascontiguousarray(block).data.cast("B"))
        file.flush()
        os.fsync(file.fileno())  # else the images could be lost where a machine stops after the folder was renamed
    return _map_tensor(np.load(path, mmap_mode="r"))


# --- The cache ---

# Raise this number when files are read differently than before: it makes the entries of older versions stale.
_READER_VERSION = 10

_IMAGES, _REST = "images.npy", "splits.json"


def load_cached(
    source: Path, options: Mapping[str, object], state: object, read: Callable[[Path | None], Splits]
) -> Splits:
    """Load a source from its entry in the cache, which is made first where it is missing, stale or damaged.

    One of several processes makes the entry, and the others wait. Where no entry can be written, one line says so, and
    the source is read into memory.

    Args:
        source: a file or a folder.
        options: how it is read; other options have another entry.
        state: of the files; an entry of another state is stale.
        read: reads the source, and collects its images in the file at a path, or in memory if the path is None.
    """
    name = _hash([os.path.abspath(source), options])
    entry, state_hash = get_cache_folder() / name, _hash([_READER_VERSION, state])
    if (found := _load(entry, state_hash)) is not None:
        return found
    try:
        with FileLock(_make_cache_folder() / f"{name}.lock"):
            if (found := _load(entry, state_hash)) is not None:
                return found
            for old in (entry, *entry.parent.glob(f".{name}-*")):  # a killed process leaves one of the latter
                shutil.rmtree(old, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=entry.parent) as folder:
                splits = read(Path(folder, _IMAGES))
                _write_rest(Path(folder, _REST), splits, state_hash)
                os.rename(folder, entry)
                return splits
    except OSError as error:
        reason = error.strerror or error
        say(f"{source}: not kept in the cache folder {get_cache_folder()}, but read into memory: {reason}")
    return read(None)


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def compute_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_rest(path: Path, splits: Splits, state_hash: str) -> None:
    rest = {field.name: getattr(splits, field.name) for field in fields(splits) if field.name not in SPLIT_ORDER}
    rest["labels"] = {split: labels.tolist() for split, labels in splits.labels.items()}
    sizes = [len(getattr(splits, split)) for split in SPLIT_ORDER]
    path.write_text(json.dumps({"state": state_hash, "sizes": sizes, "splits": rest}), encoding="ascii")


def _load(entry: Path, state_hash: str) -> Splits | None:
    """Load an entry; None where it is missing, stale or damaged."""
    try:
        header = json.loads((entry / _REST).read_text(encoding="ascii"))
        if header["state"] != state_hash:
            return None
        rest = header["splits"]
        rest |= {name: tuple(rest[name]) for name in ("class_names", "unreadable", "notes")}
        rest["names"] = {split: tuple(names) for split, names in rest["names"].items()}
        rest["labels"] = {split: torch.tensor(labels, dtype=torch.int64) for split, labels in rest["labels"].items()}
        images = _map_tensor(np.load(entry / _IMAGES, mmap_mode="r"))
        train, validation, test = images.split(header["sizes"])
        return Splits(train=train, validation=validation, test=test, **rest)
    except Exception:  # a damaged file raises nearly every type
        return None
