"""Several processes that train or evaluate together, as torchrun starts them: their ranks, and what they exchange.

Without torchrun there is one process, rank 0 of 1, and these functions change nothing. Tensors are summed by
torch.distributed, over gloo on CPUs and NCCL on GPUs; no object is ever unpickled. Rank 0 writes files and prints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ppl_vae.runtime.capture import is_capturing
from ppl_vae.runtime.errors import CannotCapture, EndedElsewhere

Result = TypeVar("Result")
Say = Callable[[str], None]  # takes one line for a person to read

TIMEOUT = timedelta(minutes=30)  # how long one exchange waits for the other ranks before all of them end


# --- Who takes part ---


def join(device: str) -> torch.device:
    """Join the other processes that torchrun started, if any, and return the device of this one.

    Under torchrun "cuda" means one GPU per process, cuda:LOCAL_RANK; a ValueError refuses several processes on one GPU.
    A second call changes nothing.
    """
    own = torch.device(device)
    if not _has_other_processes():
        return own
    if own.type == "cuda":
        own = _own_gpu(own)
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        # NCCL is named wherever it exists: a resumed run joins before its device is known. NCCL starts at first use.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        with _connection_errors():
            dist.init_process_group(backend, timeout=TIMEOUT)
    return own


def leave() -> None:
    """Undo ``join``: from here on, each process works alone."""
    if _is_joined():
        dist.destroy_process_group()


@contextmanager
def joined(device: str) -> Iterator[None]:
    """``join`` for the length of a block, then ``leave``."""
    join(device)
    try:
        yield
    finally:
        leave()


def rank() -> int:
    """This process's rank among the joined ones, from 0; 0 when it is alone."""
    return dist.get_rank() if _is_joined() else 0


def num_ranks() -> int:
    """How many processes are joined; 1 when this one is alone."""
    return dist.get_world_size() if _is_joined() else 1


def is_writer() -> bool:
    """Whether this process writes files and prints: rank 0, also before ``join`` and after ``leave``."""
    return dist.get_rank() == 0 if _is_joined() else not _has_other_processes() or os.environ["RANK"] == "0"


# --- What they exchange ---


def sum_over_ranks(tensor: Tensor) -> None:
    """tensor <- sum over ranks of tensor, in place, for any shape. Every rank receives the same bits."""
    if num_ranks() > 1:
        with _connection_errors():
            dist.all_reduce(tensor)


def gather_rows(mine: Tensor, num_rows: int, rows: Tensor) -> Tensor:
    """Collect a table's rows from all ranks, bit for bit, and return the whole table, (num_rows, *rest), on every rank.

    Args:
        mine: (n, *rest) this rank's rows; n may be 0, and ``rest`` and the type are the same on all ranks.
        num_rows: The number of rows of the whole table.
        rows: (n,) int64, their places in it. Each row belongs to exactly one rank.
    """
    table = mine.new_zeros((num_rows, *mine.shape[1:]))
    table[rows] = mine
    if num_ranks() > 1 and table.numel():
        sum_over_ranks(table.view(-1).view(torch.uint8))  # bytes and zeros: no rounding, and -0.0 keeps its sign
    return table


def agree(value: bool) -> bool:
    """Whether the value is True on any rank; every rank gets the same answer."""
    if num_ranks() == 1:
        return value
    votes = torch.tensor([int(value)])
    sum_over_ranks(votes)
    return bool(votes > 0)


def broadcast(value: Result) -> Result:
    """Return rank 0's value on every rank, by way of JSON; ConnectionError if rank 0 has ended."""
    found: list[Any] = gather_objects(value if rank() == 0 else None)
    return found[0]


def gather_objects(value: Result) -> list[Result]:
    """Return the values of all ranks, in order of rank, on every rank, by way of JSON."""
    if num_ranks() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    here = torch.tensor([rank()])
    sizes = gather_rows(torch.tensor([len(text)]), num_ranks(), here).tolist()
    letters = torch.zeros(1, max(sizes), dtype=torch.uint8)
    letters[0, : len(text)] = text
    table = gather_rows(letters, num_ranks(), here)
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(table, sizes, strict=True)]


@contextmanager
def end_together() -> Iterator[None]:
    """Make an error on one rank end all ranks: that rank raises its error, the others raise EndedElsewhere.

    Every rank must enter this block.
    """
    try:
        yield
    except Exception:
        agree(True)
        raise
    if agree(False):
        raise EndedElsewhere("another rank met an error")


def rank_zero_only(say: Say) -> Say:
    """The same function on rank 0, and one that prints nothing on the others."""
    return say if is_writer() else lambda line: None


def rank_zero_first(read: Callable[[], Result]) -> Result:
    """Call ``read`` on rank 0 and then on the others: rank 0 creates the missing files, such as a cache."""
    with end_together():
        found = read() if is_writer() else None
    with end_together():
        return read() if found is None else found


def broadcast_decision(decide: Callable[[], bool]) -> bool:
    """Return what rank 0 decides, for example by looking at files, on every rank."""
    with end_together():
        found = decide() if is_writer() else None
    return bool(broadcast(found))


# --- A rank's share of a batch ---


@dataclass(frozen=True)
class BatchShare:
    """The images from start to stop of a batch of B, on which one rank works. Its weight is (stop - start) / B.

    A rank without images works on the first one with weight 0, so that every rank takes part in every exchange.
    """

    num_images: int
    start: int
    stop: int
    weight: float

    @property
    def size(self) -> int:
        """The number of its images."""
        return self.stop - self.start


def batch_share(num_images: int) -> BatchShare:
    """This rank's contiguous part of a batch; the parts of two ranks differ by at most one image."""
    start, stop = (r * num_images // num_ranks() for r in (rank(), rank() + 1))
    if start == stop:
        return BatchShare(num_images, 0, 1, 0.0)
    return BatchShare(num_images, start, stop, (stop - start) / num_images)


_share: BatchShare | None = None


@contextmanager
def use_share(share: BatchShare) -> Iterator[None]:
    """Tell ``mean_over_batch`` on which part of the batch this rank works."""
    global _share
    before, _share = _share, share
    try:
        yield
    finally:
        _share = before


def mean_over_batch(mean: Tensor) -> Tensor:
    """The mean over the whole batch, without gradients, from the mean over this rank's images.

    Outside of ``use_share`` it is the mean itself, of any shape, detached. A graph of several ranks that is being
    captured cannot wait for other processes, and raises CannotCapture.
    """
    if _share is None or num_ranks() == 1:
        return mean.detach()
    if is_capturing():
        raise CannotCapture("the loss needs a mean over all ranks in the middle of a step")
    total = mean.detach() * _share.weight
    sum_over_ranks(total)
    return total


def _has_other_processes() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _own_gpu(device: torch.device) -> torch.device:
    local, num_here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.index is not None and num_here > 1:
        raise ValueError(
            f"--device {device}: expected cuda, one GPU for each of {num_here} processes here, got one GPU"
        )
    if device.index is None and num_here > torch.cuda.device_count():
        raise ValueError(
            f"--nproc-per-node: expected at most one process per GPU, {torch.cuda.device_count()} here, got {num_here}"
        )
    return device if device.index is not None else torch.device("cuda", local)


@contextmanager
def _connection_errors() -> Iterator[None]:
    """Turn torch's RuntimeError of a lost connection into a ConnectionError, which scripts report in one line."""
    try:
        yield
    except RuntimeError as error:  # dist.DistError is one
        words = ("onnection", "gloo", "NCCL", "imed out", "imeout")
        if not isinstance(error, dist.DistError) and not any(part in str(error) for part in words):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        minutes = TIMEOUT.total_seconds() / 60
        raise ConnectionError(
            f"another process ended or did not answer within {minutes:.0f} minutes ({lines[0][:120]})"
        ) from None
