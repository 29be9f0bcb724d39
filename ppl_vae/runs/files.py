"""The files of a run folder: names, JSON and metrics, each written as a whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CONFIG, ENVIRONMENT, METRICS, EVALUATION = "config.json", "environment.json", "metrics.jsonl", "evaluation.json"
MODEL, TRAINING_STATE, FIGURES = "model.safetensors", "training_state.safetensors", "figures"
JsonObject = dict[str, Any]  # of a JSON file
LOCK = ".lock"  # there while a process writes to the folder
PREVIOUS_STATE = "training_state.previous.safetensors"  # the checkpoint before the newest


def per_image_file(split: str) -> str:
    """The name of the file with the numbers of each image of a split."""
    return f"evaluation-{split}.safetensors"


PARTIAL = ".*.partial"  # the files that killed writes leave


@contextmanager
def replace_file(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Yields the path to write a file at, which takes the file's name if the block ends without an error.

    A link in the file's place is replaced, never followed. The old file gets the name ``previous``: at every moment one
    of the two names is that of a whole file. An OSError names the file.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a killed write; or a link, which opening would follow
        yield partial
        if previous is not None and path.is_file():
            os.replace(path, previous)
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise add_file_name(error, path) from None
        raise


def write_bytes(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Replaces a file as a whole or not at all, as ``replace_file``, and returns when it is on disk."""
    with replace_file(path, previous) as partial, partial.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    # The folder's list of names. Some network and FUSE file systems have no such thing (EINVAL), and some systems open
    # no folders; the file is whole and in its place without it.
    with suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_output(path: Path) -> Path:
    """The path of a file that is written after all the work.

    Raises ValueError where its folder does not exist, or where the path is a folder.
    """
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"--output: expected a file in a folder that exists, got {path}")
    return path


def add_file_name(error: OSError, path: Path) -> OSError:
    """The error with the file's name, which errors of open files lack."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def remove_partial(folder: Path) -> None:
    """Removes the files that killed writes left in a folder that no other process writes to."""
    for path in folder.glob(PARTIAL):
        if path.is_file() or path.is_symlink():
            with suppress(OSError):
                path.unlink()


MOST_BYTES = 64 * 2**20  # the largest JSON file that is read


def replace_non_finite(value: object) -> object:
    """The same value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: replace_non_finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: object) -> None:
    """Writes strict JSON; numbers that are not finite become null."""
    write_bytes(path, (json.dumps(replace_non_finite(value), indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> JsonObject:
    """The JSON object in a file. Raises ValueError where there is none."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(
                f"{path}: expected at most {MOST_BYTES // 2**20} MiB of JSON, got {path.stat().st_size:,} bytes"
            )
        value = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is {path.parent} a run folder?") from None
    except (NotADirectoryError, IsADirectoryError) as error:
        raise ValueError(f"{path}: expected a file of a run folder, got: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged: expected a JSON object, got {type(value).__name__}")
    return value


def read_evaluations(run_dir: Path, *, step: int | None = None) -> JsonObject:
    """The content of evaluation.json, empty if there is none yet. Raises ValueError for a damaged file.

    With a step, only the entries that were measured with the weights of this training step.
    """
    path = run_dir / EVALUATION
    evaluations = read_json(path) if path.exists() else {}
    for key, entry in evaluations.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: damaged: expected an object under {key!r}, got {type(entry).__name__}")
    return {key: entry for key, entry in evaluations.items() if step is None or entry.get("step") == step}


def append_metrics(run_dir: Path, record: JsonObject) -> None:
    """Appends a record to metrics.jsonl, on disk when this returns. A failure or a link leaves the file unchanged."""
    path, content = run_dir / METRICS, json.dumps(replace_non_finite(record), allow_nan=False).encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with open(descriptor, "ab", buffering=0) as file:
        size = os.fstat(descriptor).st_size
        try:
            if file.write(content) < len(content):
                raise OSError(28, "No space left on device")
            os.fsync(descriptor)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(descriptor, size)
            raise add_file_name(error, path) from None


def read_metrics(run_dir: Path) -> list[JsonObject]:
    """The records of metrics.jsonl, without a half-written last line. Raises ValueError for another damaged line."""
    path, records = run_dir / METRICS, []
    for number, record in _read_lines(path):
        if record is None:
            raise ValueError(
                f"{path}: damaged: line {number} is no record of an epoch; --resume {run_dir} goes on without the line"
            )
        records.append(record)
    return records


def mend_metrics(run_dir: Path, step: int) -> list[int]:
    """Removes damaged lines and every record after this step from the file; returns the numbers of damaged lines.

    A resumed run trains the epochs after the step again.
    """
    path = run_dir / METRICS
    lines = list(_read_lines(path))
    kept = [record for _, record in lines if record is not None and record["step"] <= step]
    content = "".join(f"{json.dumps(record, allow_nan=False)}\n" for record in kept).encode()
    if path.is_symlink() or not path.exists() or path.read_bytes() != content:
        write_bytes(path, content)
    return [number for number, record in lines if record is None]


def _read_lines(path: Path) -> Iterator[tuple[int, JsonObject | None]]:
    """The number of each line, from 1, and its record; None for a damaged line."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"] + 0
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if number == len(lines) and not line.endswith(b"\n"):
                return  # the line that was being written when the run was killed
            record = None
        yield number, record
