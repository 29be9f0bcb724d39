"""Running out of memory: what it looks like, and how to go on with less at once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from ppl_vae.runtime.errors import is_out_of_memory

Result = TypeVar("Result")


def release(device: torch.device) -> None:
    """Gives back what a failed attempt held.

    Call it after the except clause: until then, the error's frames hold the attempt's tensors.
    """
    gc.collect()
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


class Passes:
    """How many particles, and of how many images, are computed at once: halved where memory runs out, and so for good.

    First the particles are halved, down to one; then the images.

    Args:
        particles: of an image, at the start.
        images: at the start.
        device: where the work is done.
        say: is told once, at the first halving; or None.
    """

    def __init__(
        self, particles: int, images: int, *, device: torch.device, say: Callable[[str], None] | None = None
    ) -> None:
        self.particles, self.images = particles, images
        self._device, self._say = device, say

    def run(self, attempt: Callable[[int, int], Result]) -> Result:
        """attempt(particles, images), again from its start with half of them for as long as memory runs out.

        Raises:
            MemoryError, RuntimeError: one particle of one image does not fit either.
        """
        while True:
            try:
                return attempt(self.particles, self.images)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or self.particles == self.images == 1:
                    raise
            release(self._device)
            self._halve()

    def _halve(self) -> None:
        if self.particles > 1:
            before, self.particles = _counted(self.particles, "particle"), self.particles // 2
            now = f"{self.particles:,}"
        else:
            before, self.images = _counted(self.images, "image"), self.images // 2
            now = f"{self.images:,}"
        if self._say is not None:
            self._say(f"Out of memory with {before} at once: goes on with {now}, and with fewer if need be.")
            self._say = None


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"


def batch_that_fits(try_step: Callable[[int], object], batch_size: int, device: torch.device) -> int | None:
    """The largest of B / 2, B / 4, ..., 1 images of which a training step fits into memory; None where none does.

    Args:
        try_step: n -> a step of n images that changes nothing: neither weights nor random numbers.
        batch_size: B, which did not fit.
        device: of the step.

    Raises:
        Whatever ``try_step`` raises that is not about memory.
    """
    release(device)
    while batch_size > 1:
        batch_size //= 2
        try:
            try_step(batch_size)
            return batch_size
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        release(device)
    return None


def too_large(batch_size: int, fits: int | None) -> str:
    """What a user is told of a batch that did not fit, by ``batch_that_fits``."""
    at = f"out of memory in a step of {_counted(batch_size, 'image')}"
    if fits is None:
        return f"{at}, and no smaller batch fits: a smaller network needs less"
    return f"{at}; --batch-size {fits} fits"
