"""What work goes on from: tensors with a SHA-256 in safetensors files, training states, and finished blocks."""

from __future__ import annotations

import errno
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ppl_vae import runs
from ppl_vae.runs.files import JsonObject, add_file_name, write_bytes
from ppl_vae.runtime import ranks as distributed
from ppl_vae.runtime.ranks import Say

_DIGEST = "sha256"
_UNKNOWN = "0" * 64  # stands in the place of the digest while it is computed
_MOST_HEADER = 32 * 2**20  # bytes


def save_tensors(path: Path, tensors: dict[str, Tensor], scalars: JsonObject, previous: Path | None = None) -> None:
    """Writes named tensors and a JSON object into one safetensors file, which is replaced as a whole or not at all.

    The old file gets the name ``previous``.
    """
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    # In the one string of the metadata: safetensors writes several in an order that changes from process to process.
    content = save(own, metadata={"json": json.dumps(scalars | {_DIGEST: _UNKNOWN})})
    del own
    place = content.index(_needle(_UNKNOWN)) + len(_needle(""))
    digest = hashlib.sha256(content).hexdigest().encode()
    write_bytes(path, b"".join((content[:place], digest, content[place + len(digest) :])), previous)


def load_tensors(path: Path, *, header_only: bool = False) -> tuple[dict[str, Tensor], JsonObject]:
    """Reads the tensors and the JSON object of a file by ``save_tensors``.

    Raises ValueError for a missing or damaged file, and OSError for one that cannot be read now.
    """
    try:
        _check_bytes(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            scalars = json.loads((file.metadata() or {}).get("json", "{}"))
            tensors = {name: file.get_tensor(name) for name in ([] if header_only else file.keys())}
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise ValueError(
                f"{path}: no such file; the run in {path.parent} has no weights yet; --resume {path.parent} trains it"
            ) from None
        if error.errno == errno.EISDIR:
            raise ValueError(f"{path}: damaged: expected a file, got a folder") from None
        # Safetensors' own errors come here too: they have no errno, and call every unreadable file missing.
        raise add_file_name(error, path) from None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    if not isinstance(scalars, dict):
        raise ValueError(f"{path}: damaged: expected a JSON object in its header, got {type(scalars).__name__}")
    scalars.pop(_DIGEST, None)
    return tensors, scalars


def load_step(path: Path) -> int:
    """The training step in the header of a file by ``save_tensors``. Raises as ``load_tensors``."""
    return get_step(path, load_tensors(path, header_only=True)[1])


def get_step(path: Path, scalars: JsonObject) -> int:
    """The training step among a file's scalars. Raises ValueError if there is none."""
    step = scalars.get("step")
    if type(step) is not int or step < 0:
        raise ValueError(f"{path}: damaged: expected the number of a step in its header, got {step!r}")
    return step


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
        raise ValueError(f"a header of {length:,} bytes in a file of {len(content):,}, or one above {_MOST_HEADER:,}")
    place = content.find(_needle(""), 8, 8 + length)
    if place < 0:
        return
    place += len(_needle(""))
    digest = hashlib.sha256(content[:place] + _UNKNOWN.encode())
    digest.update(memoryview(content)[place + len(_UNKNOWN) :])
    if digest.hexdigest().encode() != content[place : place + len(_UNKNOWN)]:
        raise ValueError("its bytes are not those that were written (SHA-256)")


# --- Resuming ---


Saved = tuple[dict[str, Tensor], JsonObject]


def find_newest_checkpoint(folder: Path, *, say: Say) -> Saved | None:
    """The newest of the last two training states that is whole; None if there is none yet.

    Raises ValueError if there are states and all are damaged. If the newest cannot be read now, its OSError is raised
    and no older one is taken.
    """
    damaged: list[str] = []
    for path in (folder / runs.TRAINING_STATE, folder / runs.PREVIOUS_STATE):
        if not path.exists():
            continue
        try:
            saved = runs.load_tensors(path)
            step = get_step(path, saved[1])
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

    Otherwise the next checkpoint would overwrite the whole one with the damaged one. Raises ValueError for a folder in
    the newest one's place.
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


# --- Finished blocks of an evaluation or a certificate ---

_SECONDS_BETWEEN_WRITES = 10.0

Identities = Mapping[str, Mapping[str, object]]  # by stage, JSON of everything that decides its numbers


class _Stage(NamedTuple):
    rows: Tensor  # (N, F) of all items
    is_done: Tensor  # (K,) which blocks are finished
    block_size: int


class BlockStore:
    """Finished blocks by stage, in one file that is replaced as a whole about every ten seconds and on request.

    Under torchrun rank 0 alone reads and writes the file. Blocks in it that have another identity than their stage are
    not used. ``say`` receives a line about what is used and what is not.
    """

    def __init__(self, path: Path, identities: Identities, say: Say) -> None:
        self._path, self._identities, self._say = path, dict(identities), say
        self._stages: dict[str, _Stage] = {}
        self._tensors: dict[str, Tensor] = {}
        self._seconds: dict[str, float] = {}
        if distributed.is_writer() and path.exists():
            self._read()
        self._current, self._since = "", time.monotonic()
        self._next_write = self._since + _SECONDS_BETWEEN_WRITES

    def open_stage(self, stage: str, *, num_items: int, block_size: int, num_columns: int) -> dict[int, Tensor]:
        """Make this the stage that ``add`` adds to, and return the rows of its finished blocks by their first item."""
        self._count_seconds()
        self._current = stage
        num_blocks = -(-num_items // block_size)
        rows = torch.zeros(num_items, num_columns, dtype=torch.double)
        is_done = torch.zeros(num_blocks, dtype=torch.bool)
        if f"{stage}/rows" in self._tensors:
            stored = [self._tensors[f"{stage}/rows"], self._tensors.get(f"{stage}/is_done", rows)]
            if [(t.shape, t.dtype) for t in stored] == [(t.shape, t.dtype) for t in (rows, is_done)]:
                rows, is_done = stored
            else:
                self._say(f"{self._path}: damaged: the rows of {stage} have another shape; it starts over.")
        self._stages[stage] = _Stage(rows, is_done, block_size)
        firsts = (is_done.nonzero()[:, 0] * block_size).tolist()
        return {first: rows[first : first + block_size] for first in firsts}

    def add(self, first: int, rows: Tensor) -> None:
        """Add the block that begins with item ``first``, rows (n, F), and write the file if a write is due."""
        stage = self._stages[self._current]
        stage.rows[first : first + len(rows)] = rows.cpu()
        stage.is_done[first // stage.block_size] = True
        if time.monotonic() >= self._next_write:
            self.write()
            self._next_write = time.monotonic() + _SECONDS_BETWEEN_WRITES

    def num_finished(self, stage: str) -> int:
        """How many items of an opened stage are finished."""
        rows, is_done, block_size = self._stages[stage]
        return int(is_done.repeat_interleave(block_size)[: len(rows)].sum())

    def seconds(self, stage: str) -> float:
        """Seconds that a stage has taken, without the interruptions."""
        self._count_seconds()
        return self._seconds[stage]

    def write(self) -> None:
        """Replace the file as a whole."""
        self._count_seconds()
        for name, stage in self._stages.items():
            self._tensors |= {f"{name}/rows": stage.rows, f"{name}/is_done": stage.is_done}
        if distributed.is_writer():
            save_tensors(self._path, self._tensors, {"stages": self._identities, "seconds": self._seconds})

    def remove(self) -> None:
        """Remove the file, once everything in it is stored elsewhere."""
        if distributed.is_writer():
            self._path.unlink(missing_ok=True)

    def _count_seconds(self) -> None:
        now = time.monotonic()
        if self._current:
            self._seconds[self._current] = self._seconds.get(self._current, 0.0) + now - self._since
        self._since = now

    def _read(self) -> None:
        asked = self._identities
        try:
            tensors, scalars = load_tensors(self._path)
            stored, seconds = scalars["stages"], scalars["seconds"]
            kept = {stage for stage in stored if stored[stage] == asked.get(stage)}
            self._seconds = {stage: float(seconds[stage]) for stage in kept & seconds.keys()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._say(f"{self._path}: no finished blocks can be read ({error}); what it held is computed again.")
            return
        self._tensors = {name: value for name, value in tensors.items() if name.rpartition("/")[0] in kept}
        if len(kept) < len(stored):
            self._say(f"{self._path.name} was begun with other options or weights: what depends on them starts over.")
        count = sum(int(value.sum()) for name, value in self._tensors.items() if name.endswith("/is_done"))
        if count:
            self._say(f"Goes on: {self._path.name} holds {count:,} finished block{'s' * (count != 1)}.")


class StageResults:
    """The complete stages of a certificate, in a file that stays, so that a later certificate need not repeat them.

    The file has the results of each stage as STAGE/NAME. A stored stage is used if its identity is the same. One that
    is not in ``identities`` stays in the file if it agrees with ``common``, which decides the numbers of every stage.
    """

    def __init__(self, path: Path, identities: Identities, common: Mapping[str, object], say: Say) -> None:
        self._path, self._identities = path, dict(identities)
        self.stages: dict[str, dict[str, Tensor]] = {}
        self.seconds: dict[str, float] = {}
        if not path.exists():
            return
        try:
            tensors, scalars = load_tensors(path)
        except ValueError as error:
            say(f"{error}; what it held is computed again.")
            return
        for stage, identity in scalars.get("stages", {}).items():
            if identity == identities.get(stage, identity | common):
                self._identities[stage] = identity
                found = {n.removeprefix(f"{stage}/"): v for n, v in tensors.items() if n.startswith(f"{stage}/")}
                self.add(stage, found, scalars["seconds"][stage])
        used = [stage for stage in identities if stage in self.stages]
        if used:
            say(f"Taken from {path.name}, as measured with the same options: {', '.join(used)}.")

    def add(self, stage: str, results: dict[str, Tensor], seconds: float) -> None:
        """Add a complete stage and the seconds that it took; ``save`` writes it."""
        self.stages[stage], self.seconds[stage] = results, seconds

    def save(self, others: dict[str, Tensor]) -> None:
        """Replace the file: every stage's results as STAGE/NAME, and other tensors under their own names."""
        tensors = {f"{stage}/{name}": v for stage, found in self.stages.items() for name, v in found.items()}
        save_tensors(self._path, tensors | others, {"stages": self._identities, "seconds": self.seconds})
