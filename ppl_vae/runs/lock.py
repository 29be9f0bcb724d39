"""One writer a run folder."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from ppl_vae import distributed
from ppl_vae.runs.files import remove_partial
from ppl_vae.runs.folders import check_writable
from ppl_vae.runs.names import FIGURES, LOCK

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of some network file systems

_held: dict[Path, int] = {}  # by folder, the open file of this process's lock


def _forget() -> None:
    """A forked child is another process: its copies of open files would hold a lock whose owner was killed."""
    for descriptor in _held.values():
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The right to write into a run folder, or any other, until the end of the block; other processes are refused.

    The kernel holds the lock and frees it however the process ends; .lock says who has it. Within a process it can be
    taken again. Under torchrun only the rank that writes takes it. What killed writes have left is removed.

    Raises:
        ValueError: another process has it, or the folder is read-only, or its figures are a link to elsewhere.
    """
    place = folder.resolve()
    if place in _held or not distributed.is_writer():
        yield
        return
    check_writable(folder)
    if (folder / FIGURES).is_symlink():
        raise ValueError(f"{folder / FIGURES}: expected a folder of the run's own, got a link to elsewhere")
    descriptor = _taken(folder)
    _held[place] = descriptor
    try:
        remove_partial(folder)
        remove_partial(folder / FIGURES)
        yield
    finally:
        if _held.pop(place, None) is not None:  # still this process, and not a child of it
            with suppress(OSError):
                (folder / LOCK).unlink()  # while it is held, so that nobody else's goes
            os.close(descriptor)


def _taken(folder: Path) -> int:
    """The open file that holds the lock."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(descriptor, folder)
            if _is_still(descriptor, path):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner removed it as it ended, after it was opened here
    with suppress(OSError):  # a full disk: the words are missing then, not the lock
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _lock(descriptor: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "another process"
        raise ValueError(
            f"{folder}: expected a run folder that nobody else writes to, but {owner} does; wait until it ends"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{folder}: its file system has no locks; start nothing else in this folder", stacklevel=4)


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
