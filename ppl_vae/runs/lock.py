"""One writer per run folder."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ppl_vae.runs.files import remove_partial
from ppl_vae.runs.folders import check_writable
from ppl_vae.runs.names import FIGURES, LOCK
from ppl_vae.runtime import ranks as distributed

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of some network file systems


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other writing processes until the end of the block.

    The kernel releases the lock when the process ends, however it ends. A process may lock a folder again that it has
    locked already. Under torchrun only the rank that writes takes the lock. What killed writes have left is removed.

    Raises:
        ValueError: another process has the lock, the folder is read-only, or its figures are a link to elsewhere.
    """
    path = folder.resolve() / LOCK
    lock = FileLock(
        path, timeout=0, thread_local=False, is_singleton=True, fallback_to_soft=False, on_acquired=_write_owner
    )
    if lock.is_locked or not distributed.is_writer():
        yield
        return
    check_writable(folder)
    if (folder / FIGURES).is_symlink():
        raise ValueError(f"{folder / FIGURES}: expected a folder of the run's own, got a link to elsewhere")
    _acquire(lock, folder)
    try:
        remove_partial(folder)
        remove_partial(folder / FIGURES)
        yield
    finally:
        if lock.is_locked:  # not in a forked child, nor where the file system has no locks
            with suppress(OSError):
                path.unlink()  # while the lock is held, so that no other process's file is removed
            lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder}: expected a run folder that no other process writes to, but {_read_owner(folder)} does; "
            "wait until it ends"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{folder}: its file system has no locks; start nothing else in this folder", stacklevel=4)


def _write_owner(descriptor: int) -> None:
    with suppress(OSError):  # on a full disk the owner stays unknown, and the lock holds
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def _read_owner(folder: Path) -> str:
    with suppress(OSError):
        return (folder / LOCK).read_bytes()[:300].decode(errors="replace").strip() or "another process"
    return "another process"
