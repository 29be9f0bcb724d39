"""Run folders: a new one, whether one can be written to, and its lock."""

from __future__ import annotations

import errno
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ppl_vae.runs.files import CONFIG, FIGURES, LOCK, MODEL, PARTIAL, TRAINING_STATE, remove_partial
from ppl_vae.runtime import ranks as distributed


def make_run_dir(run_dir: str | None, *, dataset: str, likelihood: str) -> Path:
    """Makes the folder of a new run: the given one, or one below runs/ named by data set, likelihood and time.

    Raises:
        ValueError: the folder exists and holds something.
    """
    if run_dir is None:
        return make_new_folder(f"{Path(dataset).stem}-{likelihood}")
    path = Path(run_dir)
    check_new(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--run-dir: {path} cannot be made: {error.strerror}") from None
    check_writable(path)
    return path


def check_new(path: Path) -> None:
    """Raises ValueError if the path is not free and not an empty folder."""
    if path.exists() and not is_empty(path):
        saved_from_python = (path / MODEL).exists() and not (path / TRAINING_STATE).exists()
        trained = (path / CONFIG).exists() and not saved_from_python
        advice = f" (--resume {path} goes on with it)" if trained else ""
        raise ValueError(f"--run-dir: expected a new or empty folder, but {path} exists{advice}")


def is_empty(folder: Path) -> bool:
    """Whether the folder holds nothing, apart from what a process leaves that was killed at its start."""
    return folder.is_dir() and all(path.name == LOCK or path.match(PARTIAL) for path in folder.iterdir())


def make_new_folder(stem: str) -> Path:
    """Makes runs/STEM-DATE-TIME, or runs/STEM-DATE-TIME-2 and so on.

    Making the folder reserves the name, so that two processes never share one.

    Raises:
        ValueError: it cannot be made.
    """
    name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        path = Path("runs") / f"{name}{suffix}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"{path}: expected a folder that can be made, got: {error.strerror}") from None
        return path
    raise ValueError(f"runs/{name}: expected a free name, but a thousand like it are taken; name a folder yourself")


def check_writable(folder: Path) -> None:
    """Raises ValueError if the folder is read-only."""
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder}: expected a folder that can be written to, got one that is read-only")


# --- One writer per run folder ---


_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of some network file systems


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder against other writing processes until the end of the block.

    The kernel releases the lock when the process ends, however it ends. A process may lock a folder again that it has
    locked already. Under torchrun only the rank that writes takes the lock. What killed writes have left is removed.

    Raises:
        ValueError: another process has the lock, the folder is read-only, or its figures are a link or a file.
    """
    path = folder.resolve() / LOCK
    lock = FileLock(
        path, timeout=0, thread_local=False, is_singleton=True, fallback_to_soft=False, on_acquired=_write_owner
    )
    if lock.is_locked or not distributed.is_writer():
        yield
        return
    check_writable(folder)
    if (folder / FIGURES).is_symlink() or (folder / FIGURES).is_file():
        raise ValueError(f"{folder / FIGURES}: expected a folder of the run's own, got a link or a file")
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
