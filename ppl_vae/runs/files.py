"""Bytes into a file: as a whole or not at all, whatever happens in between."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PARTIAL = ".*.partial"  # what a killed write leaves, beside the whole old file


def write_bytes(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Replaces the file as a whole or not at all, and returns when it is on disk.

    A link in its place is replaced, and never followed.

    Args:
        path: the file.
        content: all of it.
        previous: the name that the old file then has. There is a whole file of either name at any moment, once there
            was one.

    Raises:
        OSError: it cannot be written; names the file.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a killed write; or a link, which opening would follow
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.is_file():
            _keep(path, previous)
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise named(error, path) from None
        raise
    _sync(path.parent)


def _keep(path: Path, previous: Path) -> None:
    """A second name for the file, in one step."""
    link = previous.with_name(f".{previous.name}.partial")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link, follow_symlinks=False)
    except OSError:  # a file system without hard links: for a moment there is only the previous one
        os.replace(path, previous)
        return
    os.replace(link, previous)
    link.unlink(missing_ok=True)  # replacing a name by another of the same file leaves both


def append_line(path: Path, line: str) -> None:
    """One more line of a text file, on disk when this returns; where that fails, the file is as it was.

    Raises:
        OSError: it cannot be written, or is a link; names the file.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with open(descriptor, "ab", buffering=0) as file:
        size = os.fstat(descriptor).st_size
        content = line.encode() + b"\n"
        try:
            if file.write(content) < len(content):
                raise OSError(28, "No space left on device")
            os.fsync(descriptor)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(descriptor, size)
            raise named(error, path) from None


def named(error: OSError, path: Path) -> OSError:
    """The error with the file's name, which one of an open file is without."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def remove_partial(folder: Path) -> None:
    """Removes what killed writes have left in a folder that no other process writes to."""
    for path in folder.glob(PARTIAL):
        if path.is_file() or path.is_symlink():
            with suppress(OSError):
                path.unlink()


def _sync(folder: Path) -> None:
    """The folder's list of names onto the disk.

    Some network and FUSE file systems have no such thing (EINVAL), and some systems open no folders; the file is whole
    and in its place without it.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
