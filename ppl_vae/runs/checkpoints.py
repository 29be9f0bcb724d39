"""Weights and training states: named tensors in safetensors files with a SHA-256, and how a damaged one is replaced."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ppl_vae import runs
from ppl_vae.runs.files import JsonObject, add_file_name, write_bytes
from ppl_vae.runtime.ranks import Say

_DIGEST = "sha256"
_UNKNOWN = "0" * 64  # stands in the place of the digest while it is computed
_MOST_HEADER = 32 * 2**20  # bytes


def save_tensors(path: Path, tensors: dict[str, Tensor], scalars: JsonObject, previous: Path | None = None) -> None:
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


def load_tensors(path: Path) -> tuple[dict[str, Tensor], JsonObject]:
    """Reads the tensors and the JSON object of a file by ``save_tensors``.

    Raises:
        ValueError: the file is missing or damaged.
        OSError: it cannot be read now, which says nothing of what it holds; names the file.
    """
    return _read_tensors(path, headers_only=False)


def load_step(path: Path) -> int:
    """The training step in the header of a file by ``save_tensors``. Raises as ``load_tensors``."""
    return get_step(path, _read_tensors(path, headers_only=True)[1])


def get_step(path: Path, scalars: JsonObject) -> int:
    """The training step among a file's scalars. Raises ValueError if there is none."""
    step = scalars.get("step")
    if type(step) is not int or step < 0:
        raise ValueError(f"{path}: damaged: expected the number of a step in its header, got {step!r}")
    return step


def _read_tensors(path: Path, *, headers_only: bool) -> tuple[dict[str, Tensor], JsonObject]:
    try:
        _check_bytes(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            scalars = json.loads((file.metadata() or {}).get("json", "{}"))
            tensors = {name: file.get_tensor(name) for name in ([] if headers_only else file.keys())}
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise ValueError(f"{path}: no such file; the run in {path.parent} has no weights yet") from None
        if error.errno == errno.EISDIR:
            raise ValueError(f"{path}: damaged: expected a file, got a folder") from None
        # Also safetensors' own, which have no number and tell of any as missing.
        raise add_file_name(error, path) from None
    except (SafetensorError, json.JSONDecodeError, RecursionError, _Damaged) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    if not isinstance(scalars, dict):
        raise ValueError(f"{path}: damaged: expected a JSON object in its header, got {type(scalars).__name__}")
    scalars.pop(_DIGEST, None)
    return tensors, scalars


class _Damaged(Exception):
    """A file is damaged; the message says how."""


def _needle(digest: str) -> bytes:
    """The bytes of the digest in the header, where the quotes of the JSON object are escaped."""
    return f'\\"{_DIGEST}\\": \\"{digest}'.encode()


def _check_bytes(path: Path) -> None:
    """Compares the SHA-256 of the file, with zeros in the digest's place. A file of another program has no digest.

    The header's length is checked as well: safetensors itself accepts up to 100 MB of JSON.
    """
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if length > min(max(0, len(content) - 8), _MOST_HEADER):
        raise _Damaged(f"a header of {length:,} bytes in a file of {len(content):,}, or one above {_MOST_HEADER:,}")
    place = content.find(_needle(""), 8, 8 + length)
    if place < 0:
        return
    place += len(_needle(""))
    digest = hashlib.sha256(content[:place] + _UNKNOWN.encode())
    digest.update(memoryview(content)[place + len(_UNKNOWN) :])
    if digest.hexdigest().encode() != content[place : place + len(_UNKNOWN)]:
        raise _Damaged("its bytes are not those that were written (SHA-256)")


# --- Resuming ---


Saved = tuple[dict[str, Tensor], JsonObject]


def find_newest_checkpoint(folder: Path, *, say: Say) -> Saved | None:
    """The newest of the last two training states that is whole; None if there is none yet.

    Raises:
        ValueError: whatever states there are, are damaged.
        OSError: one cannot be read now; an older one is not taken for that.
    """
    damaged: list[str] = []
    for path in (folder / runs.TRAINING_STATE, folder / runs.PREVIOUS_STATE):
        if not path.exists():
            continue
        try:
            saved = runs.load_tensors(path)
            step = runs.get_step(path, saved[1])
        except ValueError as error:
            damaged.append(str(error))
            continue
        if damaged:
            say(f"{damaged[0]}; the one before it is whole, of step {step:,}.")
        return saved
    if not damaged:
        return None
    raise ValueError(
        f"{damaged[0]}, and no other training state is whole; where {runs.MODEL} is, the run can be evaluated, and "
        "--start-from begins a new one with its weights"
    )


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
    if newest.exists() and previous.exists() and not is_whole(newest):
        previous.replace(newest)


def is_whole(path: Path) -> bool:
    """Whether there is such a file of weights or of a training state, and it is not damaged."""
    try:
        runs.load_step(path)
    except ValueError:
        return False
    return True
