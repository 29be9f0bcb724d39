"""What an evaluation has done so far, kept beside the run while it goes: an interrupted one goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae import runs
from ppl_vae.runs.opening import Say
from ppl_vae.runtime import ranks as distributed

_SECONDS_BETWEEN_WRITES = 10.0
_MOST_TIME_OF_WRITING = 0.02  # of the evaluation's, where the file is so large that a write takes long

_SECONDS = "seconds"


def partial_path(folder: Path, split: str) -> Path:
    """The file in the run folder; it goes when evaluation.json has the split's entry."""
    return folder / f"evaluation-{split}.partial.safetensors"


class PartialEvaluation:
    """The finished groups of one evaluation; in a file every ten seconds, and when asked.

    Under torchrun rank 0 alone reads and writes it.

    Args:
        path: the file. What is in it is taken up where it is of the same evaluation.
        identity: JSON of all that decides the numbers.
        num_images: N.
        size: images a group.
        num_columns: F, numbers an image.
        say: is told what is taken up, and what is not.
    """

    def __init__(
        self, path: Path, identity: dict[str, Any], *, num_images: int, size: int, num_columns: int, say: Say
    ) -> None:
        self._path, self._identity, self._say = path, identity | {"images_per_group": size}, say
        self._starts = range(0, num_images, size)
        self._rows = torch.zeros(num_images, num_columns, dtype=torch.double)
        self._is_done = torch.zeros(len(self._starts), dtype=torch.bool)
        self._earlier = 0.0
        if distributed.is_writer() and path.exists():
            self._take_up()
        self._started = time.monotonic()
        self._next_write = self._started + _SECONDS_BETWEEN_WRITES

    @property
    def done(self) -> dict[int, Tensor]:
        """(n, F) rows by the place of their group's first image."""
        size = self._starts.step
        return {i * size: self._rows[i * size : (i + 1) * size] for i in self._is_done.nonzero()[:, 0].tolist()}

    @property
    def seconds(self) -> float:
        """What the evaluation has taken, without the interruptions."""
        return self._earlier + time.monotonic() - self._started

    @property
    def num_done(self) -> int:
        """Images."""
        return sum(map(len, self.done.values()))

    def add(self, first: int, rows: Tensor) -> None:
        """One more group, rows (n, F) from image ``first`` on, and a write where it is time for one."""
        self._rows[first : first + len(rows)] = rows.cpu()
        self._is_done[first // self._starts.step] = True
        now = time.monotonic()
        if now >= self._next_write:
            self.write()
            took = time.monotonic() - now
            self._next_write = now + took + max(_SECONDS_BETWEEN_WRITES, took / _MOST_TIME_OF_WRITING)

    def write(self) -> None:
        """Replaces the file as a whole."""
        if distributed.is_writer():
            tensors = {"rows": self._rows, "is_done": self._is_done}
            runs.save_tensors(self._path, tensors, self._identity | {_SECONDS: self.seconds})

    def remove(self) -> None:
        """The evaluation is finished, and stored elsewhere."""
        if distributed.is_writer():
            self._path.unlink(missing_ok=True)

    def _take_up(self) -> None:
        try:
            tensors, scalars = runs.load_tensors(self._path)
        except ValueError as error:
            self._say(f"{error}; the evaluation starts over.")
            return
        seconds = scalars.pop(_SECONDS, None)
        others = sorted(key for key in scalars.keys() | self._identity if scalars.get(key) != self._identity.get(key))
        if others:
            self._say(f"{self._path} is of another evaluation ({', '.join(others)}), and is replaced.")
        elif not self._fits(tensors) or not isinstance(seconds, float):
            self._say(f"{self._path}: damaged: not the numbers of its images; the evaluation starts over.")
        else:
            self._rows, self._is_done, self._earlier = tensors["rows"], tensors["is_done"], seconds
            done, of_all = self.num_done, len(self._rows)
            self._say(f"Goes on with an evaluation that was interrupted: {done:,} of {of_all:,} images are done.")

    def _fits(self, tensors: dict[str, Tensor]) -> bool:
        own = {"rows": self._rows, "is_done": self._is_done}
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == {
            name: (tensor.shape, tensor.dtype) for name, tensor in own.items()
        }
