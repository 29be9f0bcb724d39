"""Memory and cores of this machine: how much there is, tensors that lie in files, and work in threads."""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
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

# Files by the version of control groups: the limit, the used bytes, and the field of memory.stat with the bytes of
# files that can be dropped.
_VERSION_2 = ("memory.max", "memory.current", "file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _read_control_groups() -> Iterator[int]:
    """Yield the bytes left in each control group with a limit that contains this process.

    Reference: Linux, Documentation/admin-guide, cgroup-v2.rst and cgroup-v1/memory.rst; man 7 cgroups.
    """
    try:
        lines = _PROCESS_GROUPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        controllers, _, place = line.partition(":")[2].partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (_ALL_GROUPS / "memory", _VERSION_1) if controllers else (_ALL_GROUPS, _VERSION_2)
        group = top.joinpath(*PurePosixPath(place).parts[1:])  # does not exist where only a part of the tree is mounted
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # the limit reads "max" where there is none
                limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names[:2])
                yield limit - used + _read_field(folder / "memory.stat", names[2])
            if folder == top:
                break


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


def make_cache_folder() -> None:
    """Make the cache folder, which others cannot open: the images may be private."""
    get_cache_folder().mkdir(parents=True, exist_ok=True, mode=0o700)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a mapped file, which the system can drop from memory and read again.

    Args:
        tensor: of any shape.
    """
    return tensor.untyped_storage().data_ptr() in _MAPPED


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate an uninitialized tensor in memory or, where it is too large, in a nameless file of the cache folder.

    ``fits_in_memory`` decides. Where the disk is full, the tensor is in memory, and one line says so.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if fits_in_memory(num_bytes):
        return torch.empty(shape, dtype=dtype)
    try:
        make_cache_folder()
        with tempfile.TemporaryFile(dir=get_cache_folder()) as file:
            _reserve(file, num_bytes)
            return map_tensor(mmap.mmap(file.fileno(), num_bytes), shape, dtype)
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


def map_tensor(mapping: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """View the start of a mapping as a tensor of that shape, for which ``is_mapped`` is true."""
    numbers = np.frombuffer(mapping, str(dtype).removeprefix("torch."), math.prod(shape))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to stored images
        tensor = torch.from_numpy(numbers)
    _MAPPED[tensor.untyped_storage().data_ptr()] = numbers
    return tensor.view(shape)


# --- Threads ---

_MOST_THREADS = 16
_MOST_WAITING = 4  # results for each thread


def count_threads() -> int:
    """Count the cores that this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_THREADS)


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield function(item) for each item, in order, for work that releases the interpreter's lock.

    Only a few results wait for their turn at any time.
    """
    num_threads = count_threads()
    if num_threads == 1:
        yield from map(function, items)
        return
    pool, waiting = ThreadPoolExecutor(num_threads, "ppl_vae-data"), deque[Future[Result]]()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= _MOST_WAITING * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
