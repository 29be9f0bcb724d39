"""Where the training images are: all on the device, or in host memory, from which a thread copies the next batches."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from queue import SimpleQueue
from threading import Event, Semaphore, Thread

import numpy as np
import torch
from torch import Tensor

from ppl_vae.data.storage import get_available_memory, is_mapped

Places = Generator[Tensor, None, None]


class Resident:
    """All images on the device; ``stored`` is (N, *E)."""

    def __init__(self, train: Tensor, device: torch.device) -> None:
        self.stored = train.to(device)

    def images(self, index: Tensor) -> Tensor:
        """The images at these places of the data set, (B,) -> (B, *E) on the device."""
        return self.stored[index]

    def epoch(self, batches: Sequence[Tensor]) -> Places:
        """Yield, for each batch of places in the data set, those in ``stored``, (B,) int64: the same ones here."""
        yield from batches


_HALF_BYTES = 2**20  # gathered at once: few hand-overs for small images, not much memory for large ones
_MAX_BATCHES = 32  # per half


class Streamed:
    """A ring of batches on the device, in two halves: a thread fills one half while the steps read the other.

    The images have the same values as resident ones, so that a training is the same bit for bit. Numpy gathers the
    rows in that one thread, which leaves the other threads to the steps. On a GPU each half is one copy from pinned
    memory, concurrent with the steps: the copy waits for the steps that read this half before, and the next steps wait
    for the copy.

    If a mapped file has been shortened, the system ends the process (SIGBUS), which no program can catch. Any other
    error of the thread is raised where the images are used.

    Args:
        train: (N, *E) in ordinary memory, or a mapped file.
        device: The device of ``stored``.
        batch_size: The largest number of images in a batch.
        slots: Batches in the ring, at least 2; None chooses by the size of an image.

    Attributes:
        stored: (slots * batch_size, *E), the ring; its contents change from step to step.
    """

    def __init__(self, train: Tensor, device: torch.device, batch_size: int, slots: int | None = None) -> None:
        if train.device.type != "cpu":
            raise ValueError(f"train: expected images in the host's memory to stream from, got {train.device}")
        batch_bytes = max(1, batch_size * train[0].numel() * train.element_size())
        self._at_once = slots // 2 if slots else min(_MAX_BATCHES, max(1, _HALF_BYTES // batch_bytes))  # per half
        self._half = self._at_once * batch_size  # images
        self._train = train
        shape = (2 * self._half, *train.shape[1:])
        on_gpu = device.type == "cuda"
        self.stored = torch.empty(shape, dtype=train.dtype, device=device)
        self._host = torch.empty(shape, dtype=train.dtype, pin_memory=True) if on_gpu else self.stored
        self._copies = _Copies(self._host, self.stored) if on_gpu else None
        self._places = torch.arange(2 * self._half, device=device)

    def images(self, index: Tensor) -> Tensor:
        """As ``Resident``: (B,) -> (B, *E) on the device."""
        return self._train[index.cpu()].to(self.stored.device)

    def epoch(self, batches: Sequence[Tensor]) -> Places:
        """As ``Resident``, (B,) int64; closing it ends the thread, whose errors it raises."""
        halves = [batches[first : first + self._at_once] for first in range(0, len(batches), self._at_once)]
        # Once per epoch, so that the thread never waits for a GPU.
        order = [torch.cat(list(half)).cpu() for half in halves]
        filled: SimpleQueue[BaseException | None] = SimpleQueue()
        free, stopped = Semaphore(2), Event()

        def fill() -> None:
            try:
                for number, index in enumerate(order):
                    free.acquire()
                    if stopped.is_set():
                        return
                    self._fill(number % 2, index)
                    filled.put(None)
            except BaseException as error:  # any error is raised in the training
                filled.put(error)

        if self._copies is not None:
            self._copies.begin()
        thread = Thread(target=fill, name="streamed images", daemon=True)
        thread.start()
        try:
            for number, half in enumerate(halves):
                error = filled.get()
                if error is not None:
                    raise error
                yield from self._yield_half(number % 2, half)
                free.release()
        finally:
            stopped.set()
            free.release()
            thread.join()
            if self._copies is not None:
                self._copies.end()

    def _yield_half(self, which: int, half: Sequence[Tensor]) -> Places:
        if self._copies is not None:
            self._copies.before_steps(which)
        first = which * self._half
        for index in half:
            yield self._places[first : first + len(index)]
            first += len(index)
        if self._copies is not None:
            self._copies.after_steps(which)

    def _fill(self, which: int, index: Tensor) -> None:
        rows = slice(which * self._half, which * self._half + len(index))
        if self._copies is not None:
            self._copies.before_gathering(which)
        _gather(self._train, index, self._host[rows])
        if self._copies is not None:
            self._copies.send(which, rows)


def _gather(train: Tensor, index: Tensor, out: Tensor) -> None:
    """out <- train[index], without torch's threads, which the steps use."""
    if train.is_contiguous():
        # As bytes, since numpy lacks some of torch's types. Without mode="clip" numpy would allocate a buffer.
        rows, target = (x.flatten(1).view(torch.uint8).numpy() for x in (train, out))
        np.take(rows, index.numpy(), axis=0, out=target, mode="clip")
    else:
        torch.index_select(train, 0, index, out=out)


class _Copies:
    """Copies halves from pinned memory to a GPU, on a stream of their own."""

    def __init__(self, host: Tensor, stored: Tensor) -> None:
        self._host, self._stored, self._stream = host, stored, torch.cuda.Stream(stored.device)
        self._read, self._copied = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))

    def begin(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stored.device))

    def before_gathering(self, which: int) -> None:
        self._copied[which].synchronize()  # pinned memory is not overwritten before its copy is done

    def send(self, which: int, rows: slice) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._read[which])
            self._stored[rows].copy_(self._host[rows], non_blocking=True)
            self._copied[which].record(self._stream)

    def before_steps(self, which: int) -> None:
        torch.cuda.current_stream(self._stored.device).wait_event(self._copied[which])

    def after_steps(self, which: int) -> None:
        self._read[which].record(torch.cuda.current_stream(self._stored.device))

    def end(self) -> None:
        self._stream.synchronize()


def exceeds_memory(train: Tensor, device: torch.device) -> bool:
    """Whether images (N, *E) take more than half of the device's free memory.

    On a CPU this concerns mapped files only, since other images are in memory already.
    """
    size = train.numel() * train.element_size()
    if device.type == "cuda":
        return bool(size > torch.cuda.mem_get_info(device)[0] / 2)
    available = get_available_memory()
    return is_mapped(train) and available is not None and size > available / 2
