"""Weights and training states: named tensors in safetensors files with a SHA-256, and how a damaged one is replaced."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ppl_vae import runs
from ppl_vae.runs.files import add_file_name, write_bytes
from ppl_vae.runtime.ranks import Say

_DIGEST = "sha256"
_UNKNOWN = "0" * 64  # stands in the place of the digest while it is computed
_MOST_HEADER = 32 * 2**20  # bytes
_CHUNK = 2**22  # bytes that are hashed at a time


def save_tensors(path: Path, tensors: dict[str, Tensor], scalars: dict[str, Any], previous: Path | None = None) -> None:
    """Writes named tensors and a JSON object into one safetensors file.

    Args:
        path: the file, which is replaced as a whole or not at all.
        tensors, scalars: what it holds.
        previous: the name that the old file then has.
    """
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    # In the one string of the metadata: safetensors writes several in an order that changes from process to process.
    content = save(own, metadata={"json": json.dumps(scalars | {_DIGEST: _UNKNOWN})})
    del own
    place = content.index(_needle(_UNKNOWN)) + len(_needle(""))
    digest = hashlib.sha256(content).hexdigest().encode()
    write_bytes(path, b"".join((content[:place], digest, content[place + len(digest) :])), previous)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and the JSON object of a file by ``save_tensors``.

    Raises:
        ValueError: the file is missing or damaged.
        OSError: it cannot be read now, which says nothing of what it holds; names the file.
    """
    return _read_tensors(path, headers_only=False)


def load_step(path: Path) -> int:
    """The training step in the header of a file by ``save_tensors``. Raises as ``load_tensors``."""
    return get_step(path, _read_tensors(path, headers_only=True)[1])


def get_step(path: Path, scalars: dict[str, Any]) -> int:
    """The training step among a file's scalars. Raises ValueError if there is none."""
    step = scalars.get("step")
    if type(step) is not int or step < 0:
        raise ValueError(f"{path}: damaged: expected the number of a step in its header, got {step!r}")
    return step


def _read_tensors(path: Path, *, headers_only: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        _check_header(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            scalars = json.loads((file.metadata() or {}).get("json", "{}"))
            _check_digest(path, scalars.pop(_DIGEST, None) if isinstance(scalars, dict) else None)
            tensors = {name: file.get_tensor(name) for name in ([] if headers_only else file.keys())}
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise ValueError(f"{path}: no such file; the run in {path.parent} has no weights yet") from None
        if error.errno == errno.EISDIR:
            raise ValueError(f"{path}: damaged: expected a file, got a folder") from None
        raise add_file_name(
            error, path
        ) from None  # also safetensors' own, which have no number and tell of any as missing
    except (SafetensorError, json.JSONDecodeError, RecursionError, _Damaged) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    if not isinstance(scalars, dict):
        raise ValueError(f"{path}: damaged: expected a JSON object in its header, got {type(scalars).__name__}")
    return tensors, scalars


class _Damaged(Exception):
    """A file is damaged; the message says how."""


def _check_header(path: Path) -> None:
    """Checks the header's length before it is read: safetensors itself accepts up to 100 MB of JSON."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size >= 8 and length > min(size - 8, _MOST_HEADER):
        raise _Damaged(f"a header of {length:,} bytes in a file of {size:,}, or one above {_MOST_HEADER:,}")


def _needle(digest: str) -> bytes:
    """The bytes of the digest in the header, where the quotes of the JSON object are escaped."""
    return f'\\"{_DIGEST}\\": \\"{digest}'.encode()


def _check_digest(path: Path, told: object) -> None:
    """Compares the SHA-256 of the file, with zeros in the digest's place. A file of another program has no digest."""
    if told is None and not _is_named(path):
        return
    if not isinstance(told, str):
        raise _Damaged("its SHA-256 is not where it was written")
    digest = hashlib.sha256()
    for chunk in _read_with_zeros(path, told):
        digest.update(chunk)
    if digest.hexdigest() != told:
        raise _Damaged("its bytes are not those that were written (SHA-256)")


def _is_named(path: Path) -> bool:
    """Whether the header contains a digest."""
    with path.open("rb") as file:
        return _needle("") in file.read(int.from_bytes(file.read(8), "little"))


def _read_with_zeros(path: Path, told: str) -> Iterator[bytes]:
    """The bytes of the file in chunks, with zeros in the digest's place."""
    with path.open("rb") as file:
        start = file.read(8)
        header = file.read(int.from_bytes(start, "little"))
        yield start
        yield header.replace(_needle(told), _needle(_UNKNOWN), 1)
        while chunk := file.read(_CHUNK):
            yield chunk


# --- Resuming ---


Saved = tuple[dict[str, Tensor], dict[str, Any]]


def find_newest_checkpoint(folder: Path, *, say: Say) -> Saved | None:
    """The newest of the last two training states that is whole; None if there is none yet.

    Raises:
        ValueError: whatever states there are, are damaged.
        OSError: one cannot be read now; an older one is not taken for that.
    """
    damaged: list[str] = []
    for name in (runs.TRAINING_STATE, runs.PREVIOUS_STATE):
        if not (folder / name).exists():
            continue
        try:
            saved = runs.load_tensors(folder / name)
            step = runs.get_step(folder / name, saved[1])
        except ValueError as error:
            damaged.append(str(error))
            continue
        if damaged:
            say(f"{damaged[0]}; the one before it is whole, of step {step:,}.")
        return saved
    if not damaged:
        return None
    both = f"; {runs.PREVIOUS_STATE} is damaged too" if len(damaged) > 1 else "; there is none before it"
    raise ValueError(f"{damaged[0]}{both}; {_describe_weights(folder)}")


def mend_states(folder: Path) -> None:
    """Replaces a damaged newest training state by the one before it.

    Otherwise the next checkpoint would overwrite the whole one with the damaged one.

    Raises:
        ValueError: a folder is in the newest one's place.
        OSError: the newest one cannot be read now, and stays.
    """
    newest, previous = folder / runs.TRAINING_STATE, folder / runs.PREVIOUS_STATE
    if newest.is_dir():
        raise ValueError(f"{newest}: damaged: expected a file, got a folder; without it {previous.name} is taken")
    if newest.exists() and previous.exists():
        try:
            runs.load_step(newest)
        except ValueError:
            previous.replace(newest)


def _describe_weights(folder: Path) -> str:
    """Whether the weights are whole, and what can be done with them."""
    try:
        step = runs.load_step(folder / runs.MODEL)
    except ValueError:
        return f"{runs.MODEL} is not whole either: nothing of the training is left"
    return f"{runs.MODEL}, of step {step:,}, is whole: it can be evaluated and drawn, and --start-from begins with it"


def mend_weights(folder: Path, saved: Saved, *, say: Say) -> None:
    """Writes missing or damaged weights again, from the best ones in a training state."""
    path = folder / runs.MODEL
    try:
        runs.load_step(path)
    except ValueError as error:
        best = {name.removeprefix("best/"): w for name, w in saved[0].items() if name.startswith("best/")}
        if not best:
            return  # of the middle of the first epoch: training chooses them
        if path.exists():
            say(f"{error}; written again from the best weights of the training state.")
        runs.save_tensors(path, best, {"step": saved[1].get("best_step", 0)})


def mend_and_report_metrics(folder: Path, *, step: int, steps_an_epoch: int, say: Say) -> None:
    """Removes damaged records, and says which epochs up to the step have none."""
    damaged = runs.mend_metrics(folder)
    if damaged:
        say(f"{folder / runs.METRICS}: damaged: line {', '.join(map(str, damaged))}; left out.")
    there = {record["step"] for record in runs.read_metrics(folder)}
    lost = [e for e in range(1, step // steps_an_epoch + 1) if e * steps_an_epoch not in there]
    if lost:
        words = f"{lost[0]}" if len(lost) == 1 else f"{lost[0]} to {lost[-1]}, {len(lost)} in all"
        say(f"{folder / runs.METRICS} has no record of epoch {words}: the curves are without, the weights are whole.")
