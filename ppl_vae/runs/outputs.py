"""Run folders: made, locked, and what they hold beside numbers: environment, figures, arrays, TensorBoard's events."""

from __future__ import annotations

import errno
import io
import os
import platform
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ppl_vae.runs import files
from ppl_vae.runs.files import JsonObject
from ppl_vae.runs.options import Options
from ppl_vae.runtime import ranks as distributed

if TYPE_CHECKING:  # a command that draws nothing does not wait for matplotlib
    from matplotlib.figure import Figure


def make_run_dir(run_dir: str | None, *, dataset: str, likelihood: str) -> Path:
    """Makes the folder of a new run: the given one, or one below runs/ named by data set, likelihood and time."""
    if run_dir is None:
        return make_new_folder(f"{Path(dataset).stem}-{likelihood}")
    check_new(Path(run_dir))
    make_folder(Path(run_dir), "--run-dir")
    check_writable(Path(run_dir))
    return Path(run_dir)


def make_output_folder(output: str | None, default: Path) -> Path:
    """Makes the folder of a command's results: a new or empty one that was given, or the default one."""
    folder = default if output is None else Path(output)
    if output is not None:
        check_new(folder, "--output")
    make_folder(folder, "--output")
    return folder


def make_folder(path: Path, flag: str) -> None:
    """Makes a folder, or raises ValueError in the name of the option that names it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag}: {path} cannot be made: {error.strerror}") from None


def make_parent(file: Path) -> None:
    """Makes the folder of a file before the work whose results go there.

    Raises ValueError for a folder in the file's place, and for a folder that cannot be made or written to.
    """
    if file.is_dir():
        raise ValueError(f"--output: expected a file, got the folder {file}")
    make_folder(file.parent, "--output")
    check_writable(file.parent)


def check_new(path: Path, flag: str = "--run-dir") -> None:
    """Raises ValueError if the path is not free and not an empty folder."""
    if path.exists() and not is_empty(path):
        saved_from_python = (path / files.MODEL).exists() and not (path / files.TRAINING_STATE).exists()
        can_resume = flag == "--run-dir" and (path / files.CONFIG).exists() and not saved_from_python
        advice = f" (--resume {path} goes on with it)" if can_resume else ""
        raise ValueError(f"{flag}: expected a new or empty folder, but {path} exists{advice}")


def is_empty(folder: Path) -> bool:
    """Whether the folder holds nothing, apart from what a process leaves that was killed at its start."""
    return folder.is_dir() and all(path.name == files.LOCK or path.match(files.PARTIAL) for path in folder.iterdir())


def make_new_folder(stem: str) -> Path:
    """Makes runs/STEM-DATE-TIME, or runs/STEM-DATE-TIME-2 and so on.

    Making the folder reserves the name, so that two processes never share one. Raises ValueError where that fails.
    """
    name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    for i in count(1):
        path = Path("runs") / (name if i == 1 else f"{name}-{i}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(f"{path}: expected a folder that can be made, got: {error.strerror}") from None
        break
    return path


def check_writable(folder: Path) -> None:
    """Raises ValueError if the folder is read-only."""
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder}: expected a folder that can be written to, got one that is read-only")


# --- One writer per run folder ---

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of some network file systems


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Locks a folder against other writing processes until the end of the block, or raises ValueError.

    The kernel releases the lock when the process ends, however it ends. A process may lock a folder again that it has
    locked already. Under torchrun only the rank that writes takes the lock. What killed writes have left is removed.
    """
    path = folder.resolve() / files.LOCK
    lock = FileLock(
        path, timeout=0, thread_local=False, is_singleton=True, fallback_to_soft=False, on_acquired=_write_owner
    )
    if lock.is_locked or not distributed.is_writer():
        yield
        return
    check_writable(folder)
    if (folder / files.FIGURES).is_symlink() or (folder / files.FIGURES).is_file():
        raise ValueError(f"{folder / files.FIGURES}: expected a folder of the run's own, got a link or a file")
    try:
        lock.acquire()
    except Timeout:
        owner = "another process"
        with suppress(OSError):
            owner = path.read_bytes()[:300].decode(errors="replace").strip() or owner
        raise ValueError(
            f"{folder}: expected a run folder that no other process writes to, but {owner} does; wait until it ends"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{folder}: its file system has no locks; start nothing else in this folder", stacklevel=3)
    try:
        files.remove_partial(folder)
        files.remove_partial(folder / files.FIGURES)
        yield
    finally:
        if lock.is_locked:  # not in a forked child, nor where the file system has no locks
            with suppress(OSError):
                path.unlink()  # while the lock is held, so that no other process's file is removed
            lock.release()


def _write_owner(descriptor: int) -> None:
    with suppress(OSError):  # on a full disk the owner stays unknown, and the lock holds
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


# --- The environment ---


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    """The CPU's name, and the vector instructions that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def describe_environment(device: str) -> JsonObject:
    """Versions, device, threads, git commit and whether dirty, argv, time."""
    # The commit is that of the repository that tracks the package's files, not of a project whose .venv holds them.
    is_tracked = _git("ls-files", "--error-unmatch", "__init__.py") is not None
    commit = _git("rev-parse", "HEAD") if is_tracked else None
    packages: dict[str, str | None] = {}
    for name in ("ppl_vae", "torch", "pyro-ppl", "numpy", "safetensors"):
        packages[name] = None
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": sys.argv,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "threads": torch.get_num_threads(),
        "ranks": distributed.num_ranks(),
        "git_commit": commit,
        "git_dirty": bool(_git("status", "--porcelain")) if commit else None,
    }


def record_environment(run_dir: Path, device: str) -> None:
    """Writes environment.json at the first start, and again if it is damaged; later starts go into its "resumed"."""
    path, now = run_dir / files.ENVIRONMENT, describe_environment(device)
    if path.exists():
        with suppress(ValueError, TypeError):
            first = files.read_json(path)
            now = first | {"resumed": [*first.get("resumed", []), now]}
    files.write_json(path, now)


# --- Figures and arrays ---


def write_figure(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    files.write_bytes(path, png.getvalue())


def write_picture(path: Path, levels: NDArray[np.uint8]) -> None:
    """Writes one image (C, H, W) with 1 or 3 channels of 8 bits as PNG.

    Renamed once it is whole, but not waited for until it is on disk, which took 11 ms each.
    """
    with files.replace_file(path) as partial:
        Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(partial, format="png")


def write_arrays(
    path: Path, tensors: Mapping[str, Tensor], names: Sequence[str] = (), splits: Sequence[str] = ()
) -> None:
    """Writes tensors, and the names and splits of images as "names" and "split", as compressed .npz without pickle."""
    arrays = {name: values.numpy() for name, values in tensors.items()}
    arrays |= {name: np.array(words) for name, words in (("names", names), ("split", splits)) if words}
    npz = io.BytesIO()
    np.savez_compressed(npz, **arrays)  # type: ignore[arg-type]
    files.write_bytes(path, npz.getvalue())


# --- TensorBoard's events ---

EVENTS = "tensorboard"
Log = Callable[[Mapping[str, object]], None]


def check_tensorboard(options: Options) -> None:
    """Raises ValueError if events are asked for and the package is missing."""
    if options.tensorboard == "on":
        _import_writer()


@contextmanager
def open_events(folder: Path, options: Options, *, step: int | None = None, prefix: str = "") -> Iterator[Log]:
    """Yields a function that writes every number of a record by the record's step.

    It does nothing with ``--tensorboard off``, and on ranks that do not write. Raises ValueError for a folder of events
    that is a link, and where tensorboard is not installed.

    Args:
        folder: The run's folder.
        options: The run's options.
        step: The step at which training starts or resumes. Events after it are purged, since the work is done again.
        prefix: Begins the name of each number; the names of nested objects follow, as in test/log_likelihood/mean.
    """
    if options.tensorboard != "on" or not distributed.is_writer():
        yield lambda record: None
        return
    path = folder / EVENTS
    if path.is_symlink():
        raise ValueError(f"{path}: expected a folder of the run's own, got a link to elsewhere")
    with _import_writer()(str(path), purge_step=None if step is None or not path.exists() else step + 1) as writer:

        def write(record: Mapping[str, object]) -> None:
            try:
                for name, value in _iterate_numbers(record, prefix):
                    if name != f"{prefix}step":
                        writer.add_scalar(name, value, record["step"])
                writer.flush()
            except OSError as error:
                raise files.add_file_name(error, path) from None

        yield write


def add_pictures_to_events(folder: Path, options: Options, *, step: int) -> None:
    """Writes the run's figures as TensorBoard images at a step; nothing with ``--tensorboard off``."""
    if options.tensorboard != "on":
        return
    with _import_writer()(str(folder / EVENTS)) as writer:
        for path in sorted((folder / files.FIGURES).glob("*.png")):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            writer.add_image(f"{files.FIGURES}/{path.stem}", pixels, step, dataformats="HWC")


def _iterate_numbers(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, float]]:
    """Every number of an object and of the objects in it, by its path of names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _iterate_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, float(value)


def _import_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard on: expected the package tensorboard, which is not installed; pip install "
            "'ppl_vae[tensorboard]' brings it"
        ) from None
    return SummaryWriter
