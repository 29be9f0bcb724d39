"""Where the training images are: all on the device, or in host memory, from which a thread gathers the next batch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from ppl_vae.data.storage import get_available_memory, is_mapped
from ppl_vae.runtime.records import Data, arguments_of, join_arguments

Places = Generator[Tensor, None, None]


class Resident:
    """All images on the device; ``stored`` is (N, *E), or ``Records``."""

    def __init__(self, train: Data, device: torch.device) -> None:
        self.stored = train.to(device)

    def images(self, index: Tensor) -> Data:
        """The images at these places of the data set, (B,) -> (B, *E) on the device."""
        return self.stored[index]

    def epoch(self, batches: Sequence[Tensor]) -> Places:
        """Yield, for each batch of places in the data set, those in ``stored``, (B,) int64: the same ones here."""
        yield from batches


class Streamed:
    """One batch on the device; a thread gathers the next one from the host's memory while a step runs.

    The images have the same values as resident ones, so that a training is the same bit for bit. If a mapped file has
    been shortened, the system ends the process (SIGBUS), which no program can catch. Any other error of the thread is
    raised where the images are used.

    Args:
        train: (N, *E) in ordinary memory, or a mapped file; or ``Records`` of such tensors.
        device: The device of ``stored``.
        batch_size: The largest number of images in a batch.

    Attributes:
        stored: (batch_size, *E), the images of the present step; or ``Records``.
    """

    def __init__(self, train: Data, device: torch.device, batch_size: int) -> None:
        if train.device.type != "cpu":
            raise ValueError(f"train: expected images in the host's memory to stream from, got {train.device}")
        self._train = arguments_of(train)
        self._stored = [torch.empty((batch_size, *t.shape[1:]), dtype=t.dtype, device=device) for t in self._train]
        self.stored = join_arguments(self._stored)
        self._places = torch.arange(batch_size, device=device)

    def images(self, index: Tensor) -> Data:
        """As ``Resident``: (B,) -> (B, *E) on the device."""
        return join_arguments([tensor[index.cpu()].to(self.stored.device) for tensor in self._train])

    def epoch(self, batches: Sequence[Tensor]) -> Places:
        """As ``Resident``, (B,) int64; closing it ends the thread, whose errors it raises."""
        batches = [index.cpu() for index in batches]  # once per epoch, so that the thread never waits for a GPU
        with ThreadPoolExecutor(1, "streamed images") as pool:
            following = [pool.submit(self._gather, index) for index in batches[:1]]
            for index, after in zip_longest(batches, batches[1:]):
                gathered = following.pop().result()
                if after is not None:
                    following.append(pool.submit(self._gather, after))
                for stored, rows in zip(self._stored, gathered, strict=True):
                    stored[: len(index)].copy_(rows, non_blocking=True)
                yield self._places[: len(index)]

    def _gather(self, index: Tensor) -> list[Tensor]:
        """The rows train[index], without torch's threads, which the steps use; in pinned memory for a GPU."""
        gathered = []
        for train in self._train:
            images = torch.empty((len(index), *train.shape[1:]), dtype=train.dtype)
            if train.is_contiguous():
                # As bytes, since numpy lacks some of torch's types. Without mode="clip" numpy would allocate a buffer.
                rows, target = (x.reshape(len(x), -1).view(torch.uint8).numpy() for x in (train, images))
                np.take(rows, index.numpy(), axis=0, out=target, mode="clip")
            else:
                torch.index_select(train, 0, index, out=images)
            gathered.append(images.pin_memory() if self._places.is_cuda else images)
        return gathered


def exceeds_memory(train: Tensor, device: torch.device) -> bool:
    """Whether images (N, *E) take more than half of the device's free memory.

    On a CPU this concerns mapped files only, since other images are in memory already.
    """
    size = train.numel() * train.element_size()
    if device.type == "cuda":
        return bool(size > torch.cuda.mem_get_info(device)[0] / 2)
    available = get_available_memory()
    return is_mapped(train) and available is not None and size > available / 2
