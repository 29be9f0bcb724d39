"""Run folders: a new one, and whether one can be written to."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ppl_vae.runs.files import PARTIAL
from ppl_vae.runs.names import CONFIG, LOCK, MODEL, TRAINING_STATE


def new_run_dir(run_dir: str | None, *, dataset: str, likelihood: str) -> Path:
    """Makes the folder of a new run: as asked for, or one under runs/ by data set, likelihood, date and time.

    Raises:
        ValueError: the folder exists and holds something.
    """
    if run_dir is None:
        return new_folder(f"{Path(dataset).stem}-{likelihood}")
    path = Path(run_dir)
    check_new(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--run-dir: {path} cannot be made: {error.strerror}") from None
    check_writable(path)
    return path


def check_new(path: Path) -> None:
    """Raises ValueError where there is something else than an empty folder."""
    if path.exists() and not is_empty(path):
        saved_from_python = (path / MODEL).exists() and not (path / TRAINING_STATE).exists()
        trained = (path / CONFIG).exists() and not saved_from_python
        advice = f" (--resume {path} goes on with it)" if trained else ""
        raise ValueError(f"--run-dir: expected a new or empty folder, but {path} exists{advice}")


def is_empty(folder: Path) -> bool:
    """Whether it is a folder that holds nothing, but for what a process leaves that was killed as it began."""
    return folder.is_dir() and all(path.name == LOCK or path.match(PARTIAL) for path in folder.iterdir())


def new_folder(stem: str) -> Path:
    """Makes runs/STEM-DATE-TIME, or runs/STEM-DATE-TIME-2 and so on.

    Making the folder is what takes the name, also beside other processes.

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
    """Raises ValueError where nothing can be written into the folder: before the work, not after it."""
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder}: expected a folder that can be written to, got one that is read-only")
