"""Memory and cores of this machine: how much there is, tensors that lie in files, and work in threads."""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

LARGE = 2**28  # a file of so many bytes is mapped, and not read into memory
_SHARE = 8  # an array may take one eighth of the available memory

Item = TypeVar("Item")
Result = TypeVar("Result")


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
        free = 1024 * _read_field("/proc/meminfo", "MemAvailable:")
    except (OSError, ValueError):
        return None
    free = min([free, *_read_control_groups()])
    with suppress(OSError, ValueError, ImportError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
        if limit != resource.RLIM_INFINITY:
            free = min(free, limit - 1024 * _read_field("/proc/self/status", "VmData:"))
    return max(free, 0)


_PROCESS_GROUPS, _ALL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def _read_control_groups() -> Iterator[int]:
    """Yield the bytes left in each control group (version 2) with a limit that contains this process.

    Reference: Linux, Documentation/admin-guide/cgroup-v2.rst.
    """
    try:
        place = re.search("^0::/(.*)$", _PROCESS_GROUPS.read_text(errors="surrogateescape"), re.MULTILINE)
    except OSError:
        return
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


def make_cache_folder() -> Path:
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
        with tempfile.TemporaryFile(dir=make_cache_folder()) as file:
            _reserve(file, num_bytes)
            return map_tensor(np.memmap(file, str(dtype).removeprefix("torch."), "r+", shape=shape))
    except OSError as error:
        reason = error.strerror or error
        say(f"{get_cache_folder()}: no space for {num_bytes:,} bytes, which go into memory: {reason}")
        return torch.empty(shape, dtype=dtype)


def _reserve(file: IO[bytes], num_bytes: int) -> None:
    """Reserve the file's bytes, and fail now where the disk is full: a write to a mapping would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    else:
        file.truncate(num_bytes)


def map_tensor(mapped: np.ndarray) -> Tensor:
    """View an array of any shape in a mapped file as a tensor for which ``is_mapped`` is true."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to stored images
        tensor = torch.from_numpy(mapped)
    _MAPPED[tensor.untyped_storage().data_ptr()] = mapped
    return tensor


# --- Threads ---

_MOST_THREADS = 16
_ITEMS_PER_THREAD = 4  # of the items that are worked on at once


def count_threads() -> int:
    """Count the cores that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_THREADS)


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
