"""Limits on files, which are checked against a header before memory is allocated for what it announces.

An image counts as one that cannot be read if its file is larger than ``MOST_IMAGE_BYTES``, or if it has more than
``MOST_PIXELS``, or more than ``FREE_PIXELS`` and also more than ``MOST_EXPANSION`` for every byte of its file. The
arrays that are read of an .npz file may together take ``FREE_EXPANSION`` bytes, or ``MOST_EXPANSION`` times the bytes
of the file: binary images shrink to a twentieth of their size, and what was made to fill memory to a thousandth. An
array's header must announce exactly the bytes that are there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np

MOST_PIXELS = 89_478_485  # Pillow's own, 256 MiB of red, green and blue; beyond it Pillow only warns
MOST_IMAGE_BYTES = 2**30
FREE_PIXELS = 2**23  # 32 MiB of red, green, blue and opacity
FREE_EXPANSION, MOST_EXPANSION = 2**26, 200
ADVICE = "save it as .npy, which is not read into memory"

LARGE = 2**28  # bytes from which on a file is mapped, and not read

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class ObjectArrayError(ValueError):
    """An array of Python objects, which only unpickling could read."""


class ArrayHeader(NamedTuple):
    """Header of an .npy file; the numbers begin at ``offset``."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype
    offset: int


def read_array_header(file: IO[bytes], num_bytes: int) -> ArrayHeader:
    """Read an .npy header, whose announced size must be that of the file.

    Args:
        num_bytes: of the header and the array together.

    Raises:
        ValueError: no such header, objects, or an array of another size.
    """
    start = file.tell()
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"expected a header of version 1 or 2, got {version[0]}")
    shape, is_fortran, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise ObjectArrayError("Object arrays are not read")
    offset = file.tell() - start
    announced = math.prod(shape) * dtype.itemsize
    if any(isinstance(n, bool) or n < 0 for n in shape) or announced != num_bytes - offset:
        raise ValueError(
            f"its header announces {dtype} {shape}, which is {announced:,} bytes, and it holds {num_bytes - offset:,}"
        )
    return ArrayHeader(shape, is_fortran, dtype, offset)


def check_pixels(width: int, height: int, num_bytes: int) -> None:
    """Raises ValueError where the header of an image's file of that size announces too many pixels to decode.

    The message names the limit and not the numbers of the image, so that files that exceed it can be listed together.
    """
    if width * height > MOST_PIXELS:
        raise ValueError(f"an image may have at most {MOST_PIXELS:,} pixels; scale it down")
    if width * height > max(FREE_PIXELS, MOST_EXPANSION * num_bytes):
        raise ValueError(
            f"an image of more than {FREE_PIXELS:,} pixels may have at most {MOST_EXPANSION} per byte of its file; "
            "scale it down, or save it without compression"
        )


def check_expansion(path: Path, num_bytes: int) -> None:
    """Raises ValueError where ``num_bytes`` of arrays are more than an .npz file of that size may hold, or than fit."""
    most = max(FREE_EXPANSION, MOST_EXPANSION * os.path.getsize(path))
    if num_bytes > most:
        raise ValueError(
            f"its arrays take {num_bytes:,} bytes, more than {MOST_EXPANSION} times the file ({most:,}); {ADVICE}"
        )
    available = available_memory()
    if available is not None and num_bytes > available:
        raise ValueError(f"its arrays take {num_bytes:,} bytes, and {available:,} are available; {ADVICE}")


def fits(num_bytes: int) -> bool:
    """Whether an array of this size may be in memory rather than in a mapped file."""
    available = available_memory()
    return num_bytes <= LARGE or (available is not None and num_bytes <= available / _SHARE)


_SHARE = 8


def available_memory() -> int | None:
    """Bytes that this process can allocate without swapping: the least of machine, control groups and own limit.

    None where the system does not say.
    """
    try:
        free = 1024 * _field("/proc/meminfo", "MemAvailable:")
    except (OSError, ValueError):
        return None
    free = min([free, *_free_of_groups()])
    with suppress(OSError, ValueError, ImportError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
        if limit != resource.RLIM_INFINITY:
            free = min(free, limit - 1024 * _field("/proc/self/status", "VmData:"))
    return max(free, 0)


_OWN_GROUPS, _ALL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

# By the version of control groups: the limit, what is used, and of that in memory.stat the files that can be dropped.
_OF_VERSION_2 = ("memory.max", "memory.current", "file")
_OF_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _free_of_groups() -> Iterator[int]:
    """Yield the bytes left in each control group with a limit that contains this process.

    Reference: Linux, Documentation/admin-guide, cgroup-v2.rst and cgroup-v1/memory.rst; man 7 cgroups.
    """
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        controllers, _, place = line.partition(":")[2].partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (_ALL_GROUPS / "memory", _OF_VERSION_1) if controllers else (_ALL_GROUPS, _OF_VERSION_2)
        group = top.joinpath(*PurePosixPath(place).parts[1:])  # not there where only a part of the tree is mounted
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # "max" where there is no limit
                limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names[:2])
                yield limit - used + _field(folder / "memory.stat", names[2])
            if folder == top:
                break


def _field(path: str | Path, name: str) -> int:
    for line in Path(path).read_text(encoding="ascii").splitlines():
        if line.split()[0] == name:
            return int(line.split()[1])
    raise ValueError(f"{path}: no {name}")
